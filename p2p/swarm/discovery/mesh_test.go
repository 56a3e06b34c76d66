package discovery

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/test"
	"github.com/multiformats/go-multiaddr"
)

func at(i int) peer.AddrInfo {
	return peer.AddrInfo{ID: peer.ID(fmt.Sprint("peer ", i)), Addrs: []multiaddr.Multiaddr{
		multiaddr.StringCast(fmt.Sprintf("/ip4/10.0.%d.%d/tcp/1", i/256, i%256)),
	}}
}

func nobody(peer.ID) bool { return false }

func TestBookDue(t *testing.T) {
	c := &clock{time.Unix(1000, 0)}
	b := &book{peers: map[peer.ID]*known{}}
	b.add(at(1), c.Time, false)
	due := func() bool { return len(b.due(c.Time, 8, time.Second, time.Minute, nobody)) == 1 }
	if !due() {
		t.Fatal("a new peer is not due")
	}
	if due() {
		t.Error("due while it is dialled")
	}
	b.tried("peer 1", c.Time, errors.New("no"))
	var pauses []time.Duration
	for range 9 {
		last := c.Time
		for !due() {
			c.advance(time.Second)
		}
		pauses = append(pauses, c.Sub(last))
		b.tried("peer 1", c.Time, errors.New("no"))
	}
	want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60}
	for i := range want {
		want[i] *= time.Second
	}
	if !slices.Equal(pauses, want) {
		t.Errorf("pauses %v, want %v", pauses, want)
	}
	// A success, though it hung up: not at once again, but without the long pause.
	c.advance(time.Minute)
	if !due() {
		t.Fatal("not due")
	}
	b.tried("peer 1", c.Time, nil)
	if due() {
		t.Error("due at once after a success")
	}
	if c.advance(10 * time.Second); !due() {
		t.Error("not due after a success and a pause")
	}
	if len(b.due(c.Add(time.Hour), 8, time.Second, time.Minute, func(peer.ID) bool { return true })) != 0 {
		t.Error("a connected peer is due")
	}
	for i := range 20 {
		b.add(at(i), c.Time, false)
	}
	if n := len(b.due(c.Time, 8, time.Second, time.Minute, nobody)); n != 8 {
		t.Errorf("%d peers are due, want 8", n)
	}
}

func TestBookForgets(t *testing.T) {
	c := &clock{time.Unix(1000, 0)}
	b := &book{peers: map[peer.ID]*known{}}
	b.add(at(1), c.Time, false)
	b.add(at(2), c.Time, false)
	b.add(peer.AddrInfo{ID: "no address"}, c.Time, false)
	c.advance(20 * time.Hour)
	b.alive([]peer.ID{"peer 2"}, c.Time)
	c.advance(5 * time.Hour)
	b.alive(nil, c.Time)
	if got := slices.Collect(maps.Keys(b.peers)); !slices.Equal(got, []peer.ID{"peer 2"}) {
		t.Errorf("known are %q, want peer 2", got)
	}

	for i := range maxKnown + 100 {
		c.advance(time.Second)
		b.add(at(i+10), c.Time, false)
	}
	if len(b.peers) != maxKnown || b.peers["peer 2"] != nil || b.peers["peer 109"] != nil ||
		b.peers["peer 110"] == nil {
		t.Errorf("%d peers are known; want %d, the oldest gone", len(b.peers), maxKnown)
	}
}

func TestBookAddresses(t *testing.T) {
	b := &book{peers: map[peer.ID]*known{}}
	info := at(1)
	for i := range 40 {
		info.Addrs = at(i).Addrs
		b.add(info, time.Now(), false)
	}
	got := b.addrs(info.ID)
	if len(got) != maxAddrs || !got[0].Equal(at(39).Addrs[0]) {
		t.Errorf("%d addresses, %v; want %d, the newest first", len(got), got, maxAddrs)
	}
	b.add(info, time.Now(), true)
	if got := b.addrs(info.ID); len(got) != 1 {
		t.Errorf("addresses %v, want one in place of the others", got)
	}
}

func TestBookSaved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	b := &book{peers: map[peer.ID]*known{}}
	if err := b.load(path); err != nil {
		t.Errorf("without a file: %v", err)
	}
	info := at(1)
	info.ID = test.RandPeerIDFatal(t)
	now := time.Unix(1000, 0)
	b.add(info, now, false)
	if !b.isDirty() {
		t.Error("a change needs no saving")
	}
	if err := b.save(path); err != nil {
		t.Fatal(err)
	}
	if b.isDirty() {
		t.Error("what was saved needs saving")
	}
	again := &book{peers: map[peer.ID]*known{}}
	if err := again.load(path); err != nil {
		t.Fatal(err)
	}
	k := again.peers[info.ID]
	if k == nil || !k.seen.Equal(now) || len(k.addrs) != 1 || !k.addrs[0].Equal(info.Addrs[0]) {
		t.Errorf("loaded %+v", k)
	}
}

func TestPeersMessage(t *testing.T) {
	var infos []peer.AddrInfo
	for range maxPeersTold {
		info := peer.AddrInfo{ID: test.RandPeerIDFatal(t)}
		for i := range maxAddrs {
			info.Addrs = append(info.Addrs,
				multiaddr.StringCast(fmt.Sprintf("/dns4/%s.example.com/tcp/%d", strings.Repeat("a", 60), i)))
		}
		infos = append(infos, info)
	}
	got, err := decodePeers(bytes.NewReader(encodePeers(infos)))
	if err != nil || len(got) == 0 || len(got) == len(infos) {
		t.Errorf("of %d with long addresses: %d, %v; want some of them", len(infos), len(got), err)
	}
	got, err = decodePeers(bytes.NewReader(encodePeers(infos[:3])))
	if err != nil || len(got) != 3 || got[2].ID != infos[2].ID || len(got[2].Addrs) != maxAddrs {
		t.Errorf("of 3: %v, %v", got, err)
	}
	if got, err := decodePeers(bytes.NewReader(encodePeers(nil))); err != nil || len(got) != 0 {
		t.Errorf("of none: %v, %v", got, err)
	}
	one := `{"ID":"` + someID + `","Addrs":["/ip4/1.2.3.4/tcp/5"]}`
	for name, bad := range map[string]string{
		"empty":       "",
		"no list":     one,
		"no ID":       `[{"Addrs":[]}]`,
		"bad ID":      `[{"ID":"x","Addrs":[]}]`,
		"bad address": `[{"ID":"` + someID + `","Addrs":["x"]}]`,
		"too many":    "[" + strings.Repeat(one+",", maxPeersTold) + one + "]",
		"many addresses": `[{"ID":"` + someID + `","Addrs":[` + strings.Repeat(`"/ip4/1.2.3.4/tcp/5",`, maxAddrs) +
			`"/ip4/1.2.3.4/tcp/5"]}]`,
		"too long":       "[" + strings.Repeat(" ", maxPeersMessage) + "]",
		"something else": "[" + one + "]x",
	} {
		if got, err := decodePeers(strings.NewReader(bad)); err == nil {
			t.Errorf("%s: no error but %v", name, got)
		}
	}
	endless := strings.NewReader(strings.Repeat(" ", 1<<20))
	if got, err := decodePeers(endless); err == nil || endless.Len() < 1<<20-maxPeersMessage-1 {
		t.Errorf("%v, %v of a list that does not end; %d bytes of it are not read", got, err, endless.Len())
	}
}

func FuzzDecodePeers(f *testing.F) {
	f.Add([]byte(`[]`))
	f.Add([]byte(`[{"ID":"` + someID + `","Addrs":["/ip4/1.2.3.4/tcp/5"]}]`))
	f.Add([]byte(`[{"ID":"` + someID + `","Addrs":["/dnsaddr/x/p2p/` + someID + `", null]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		infos, err := decodePeers(bytes.NewReader(data))
		if err != nil {
			return
		}
		if len(infos) > maxPeersTold {
			t.Fatalf("%d peers", len(infos))
		}
		b := &book{peers: map[peer.ID]*known{}}
		for _, info := range infos {
			b.add(peer.AddrInfo{ID: info.ID, Addrs: withoutLoopback(info.Addrs)}, time.Now(), false)
		}
		again, err := decodePeers(bytes.NewReader(encodePeers(infos)))
		if err != nil || len(again) != len(infos) && len(encodePeers(infos)) < maxPeersMessage/2 {
			t.Errorf("%d peers are %d after encoding, %v", len(infos), len(again), err)
		}
	})
}

// A peer that talks nonsense, or does not stop, or does not begin, is left alone.
func TestHostilePeersProtocol(t *testing.T) {
	a, b := start(t), start(t)
	for name, answer := range map[string]func(network.Stream){
		"nonsense": func(s network.Stream) { s.Write([]byte("nonsense")); s.Close() },
		"endless": func(s network.Stream) {
			for {
				if _, err := s.Write(bytes.Repeat([]byte(" "), 1024)); err != nil {
					return
				}
			}
		},
		"reset": func(s network.Stream) { s.Reset() },
	} {
		b.host.SetStreamHandler(peersProtocol, answer)
		if err := a.Connect(t.Context(), peer.AddrInfo{ID: b.Self(), Addrs: b.host.Addrs()}); err != nil {
			t.Fatal(err)
		}
		if infos, err := a.askPeers(t.Context(), b.Self()); err == nil {
			t.Errorf("%s: no error but %v", name, infos)
		}
	}
	if got := slices.Collect(maps.Keys(a.book.peers)); !slices.Equal(got, []peer.ID{b.Self()}) {
		t.Errorf("known are %v, want %v", got, b.Self())
	}
}

// On a host with other addresses, nobody is told of loopback, neither by peers nor
// by mDNS.
func TestListenOnAllInterfaces(t *testing.T) {
	a := start(t, func(o *Options) { o.Listen = []string{":0", "[::1]:0"} })
	forMDNS, err := (&mdnsHost{Host: a.host}).Network().InterfaceListenAddresses()
	if err != nil {
		t.Fatal(err)
	}
	for _, addrs := range [][]multiaddr.Multiaddr{a.host.Addrs(), forMDNS} {
		if others := withoutLoopback(addrs); len(addrs) == 0 || len(others) > 0 && len(others) < len(addrs) {
			t.Errorf("addresses to tell: %v", addrs)
		}
	}
}
