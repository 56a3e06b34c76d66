package discovery

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// Options.NAT: waits 5 seconds for the answers of routers, and takes no
		// context (in a module below libp2p).
		goleak.IgnoreAnyFunction("github.com/libp2p/go-libp2p/p2p/net/nat/internal/nat.discoverNATs.func1"))
}

// testKey is the key of the swarms of tests.
var testKey = NewKey()

// start runs a peer on loopback that is closed with the test.
func start(t *testing.T, change ...func(*Options)) *Network {
	t.Helper()
	id, _, err := crypto.GenerateEd25519Key(nil)
	if err != nil {
		t.Fatal(err)
	}
	opts := Options{Identity: id, Key: testKey, Listen: []string{"127.0.0.1:0"}, tick: 50 * time.Millisecond}
	for _, f := range change {
		f(&opts)
	}
	n, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

func bootstrap(entries ...string) func(*Options) {
	return func(o *Options) { o.Bootstrap = entries }
}

// addr returns a bootstrap entry for n.
func addr(t *testing.T, n *Network) string {
	t.Helper()
	addrs, err := peer.AddrInfoToP2pAddrs(&peer.AddrInfo{ID: n.Self(), Addrs: n.host.Addrs()})
	if err != nil || len(addrs) == 0 {
		t.Fatalf("addresses %v, %v", addrs, err)
	}
	return addrs[0].String()
}

// eventually waits until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline, tick := time.NewTimer(time.Minute), time.NewTicker(10*time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("not within a minute: %s", what)
		case <-tick.C:
		}
	}
}

// connectedWithAll waits until all peers are connected with all.
func connectedWithAll(t *testing.T, peers ...*Network) {
	t.Helper()
	for _, n := range peers {
		eventually(t, fmt.Sprintf("a peer is connected with all %d others", len(peers)-1), func() bool {
			return len(n.Connected()) == len(peers)-1
		})
	}
}

// finds waits until n finds that who provides key.
func finds(t *testing.T, n *Network, key [32]byte, who *Network) {
	t.Helper()
	eventually(t, "a key is found", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for p := range n.Providers(ctx, key) {
			if p.ID == who.Self() {
				if len(p.Addrs) == 0 {
					t.Errorf("no addresses of the provider")
				}
				return true
			}
		}
		return false
	})
}

// findsNobody waits until n finds no provider of key.
func findsNobody(t *testing.T, n *Network, key [32]byte) {
	t.Helper()
	eventually(t, "a key is not found", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for range n.Providers(ctx, key) {
			return false
		}
		return ctx.Err() == nil
	})
}

// holds tells whether n itself has a record that who provides key.
func holds(t *testing.T, n *Network, key [32]byte, who *Network) bool {
	t.Helper()
	infos, err := n.table.ProviderStore().GetProviders(t.Context(), multihashOf(key))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(infos, func(info peer.AddrInfo) bool { return info.ID == who.Self() })
}

func key(i int) (k [32]byte) {
	copy(k[:], fmt.Sprintf("key %d", i))
	return k
}

func TestTwoPeers(t *testing.T) {
	a := start(t)
	a.Announce(key(1)) // alone: nobody to tell
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	finds(t, b, key(1), a)
	eventually(t, "what a had to tell while alone is sent", func() bool { return holds(t, b, key(1), a) })
	a.Announce(key(2))
	finds(t, b, key(2), a)
	b.Announce(key(2))
	finds(t, a, key(2), b)

	for _, n := range []*Network{a, b} {
		for range n.Providers(t.Context(), key(3)) {
			t.Error("a provider of a key that nobody announced")
		}
	}
	if got := a.Connected(); !slices.Equal(got, []peer.ID{b.Self()}) {
		t.Errorf("connected with %v, want %v", got, b.Self())
	}
	if info := a.Addresses(b.Self()); !slices.ContainsFunc(info.Addrs, b.host.Addrs()[0].Equal) {
		t.Errorf("a believes b to be at %v, want %v", info.Addrs, b.host.Addrs())
	}
	if info := a.Addresses("nobody"); len(info.Addrs) != 0 {
		t.Errorf("addresses of an unknown peer: %v", info.Addrs)
	}
}

func TestProvidersNeverNamesSelfAndEachOnce(t *testing.T) {
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	c := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b, c)
	for _, n := range []*Network{a, b, c} {
		n.Announce(key(1))
	}
	for _, n := range []*Network{a, b, c} {
		eventually(t, "both others are found", func() bool {
			var ids []peer.ID
			for p := range n.Providers(t.Context(), key(1)) {
				if p.ID == n.Self() || slices.Contains(ids, p.ID) {
					t.Fatalf("%s after %v, from %s", p.ID, ids, n.Self())
				}
				ids = append(ids, p.ID)
			}
			return len(ids) == 2
		})
	}
	// A caller that breaks out of the loop leaves nothing behind (goleak), nor does one that gives up.
	for range a.Providers(t.Context(), key(1)) {
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range a.Providers(ctx, key(1)) {
	}
}

func TestWithdraw(t *testing.T) {
	validity := func(o *Options) { o.Validity = 2 * time.Second }
	a := start(t, validity)
	b := start(t, validity, bootstrap(addr(t, a)))
	c := start(t, validity, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b, c)
	a.Announce(key(1), key(2))
	finds(t, b, key(1), a)
	finds(t, c, key(2), a)
	eventually(t, "others hold the record", func() bool { return holds(t, b, key(1), a) && holds(t, c, key(1), a) })
	a.Withdraw(key(1))
	findsNobody(t, b, key(1)) // when the records have expired
	finds(t, c, key(2), a)    // still, and again
}

// What is withdrawn before it was its turn is not announced at all.
func TestWithdrawBeforeItsTurn(t *testing.T) {
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	a.Announce(key(1))
	eventually(t, "the first record is sent", func() bool { return holds(t, b, key(1), a) })
	a.announcer.urgent <- key(2) // as if it had been announced, and withdrawn
	a.Announce(key(3))
	eventually(t, "the last record is sent", func() bool { return holds(t, b, key(3), a) })
	if holds(t, b, key(2), a) {
		t.Error("a key that was withdrawn is announced")
	}
}

// Records that only others hold, not the announcer's own answer, must be sent
// again before they expire.
func TestAnnouncesAgain(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	validity := func(o *Options) { o.Validity = 2 * time.Second }
	a := start(t, validity)
	b := start(t, validity, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	a.Announce(key(1))
	held := func() bool { return holds(t, b, key(1), a) }
	eventually(t, "the record is sent", held)
	first := time.Now()
	eventually(t, "its time passes", func() bool { return time.Since(first) > 3*a.opts.Validity/2 })
	eventually(t, "there is a newer record", held)
}

func TestOtherKeyCannotConnect(t *testing.T) {
	a := start(t)
	a.Announce(key(1))
	b := start(t, bootstrap(addr(t, a)), func(o *Options) { o.Key = NewKey() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := b.Connect(ctx, peer.AddrInfo{ID: a.Self(), Addrs: a.host.Addrs()}); err == nil {
		t.Fatal("connected with another key")
	} else if !strings.Contains(err.Error(), "swarm key") || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error does not speak of the swarm key, in one line: %v", err)
	}
	if _, err := b.Dial(ctx, a.Self()); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error of a stream is %v, want one line", err)
	}
	if len(a.Connected())+len(b.Connected()) != 0 {
		t.Errorf("connected: %v, %v", a.Connected(), b.Connected())
	}
	for range b.Providers(ctx, key(1)) {
		t.Error("found a key of another swarm")
	}
	c := start(t, bootstrap(addr(t, a))) // as the right key would
	connectedWithAll(t, a, c)
}

func TestTenPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	peers := []*Network{start(t)}
	for range 9 {
		peers = append(peers, start(t, bootstrap(addr(t, peers[len(peers)-1])))) // a chain
	}
	for i, n := range peers {
		n.Announce(key(i))
	}
	connectedWithAll(t, peers...)
	for i, who := range peers {
		for _, n := range peers {
			if n != who {
				finds(t, n, key(i), who)
			}
		}
	}
}

// More peers than hold a record: not everybody is asked, and the records count.
// TestManyPeers: there are more peers than a bucket of the table of providers
// has room for, so that not all are asked.
func TestManyPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	peers := []*Network{start(t)}
	entry := addr(t, peers[0])
	for range 23 {
		peers = append(peers, start(t, bootstrap(entry)))
	}
	for i, n := range peers {
		n.Announce(key(i), key(1000)) // some while the table still grows
	}
	connectedWithAll(t, peers...)
	for i, who := range peers {
		finds(t, peers[(i+7)%len(peers)], key(i), who)
	}
	peers[3].Announce(key(77)) // and one afterwards
	for _, n := range peers {
		if n != peers[3] {
			finds(t, n, key(77), peers[3])
		}
	}
	eventually(t, "all other providers of a key are found", func() bool {
		count := 0
		for range peers[5].Providers(t.Context(), key(1000)) {
			count++
		}
		return count == len(peers)-1
	})
}

func TestBootstrapGone(t *testing.T) {
	a := start(t)
	b, c := start(t, bootstrap(addr(t, a))), start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b, c)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	connectedWithAll(t, b, c)
	d := start(t, bootstrap(addr(t, b)))
	connectedWithAll(t, b, c, d)
	peers := []*Network{b, c, d}
	for i, who := range peers {
		who.Announce(key(i))
		for _, n := range peers {
			if n != who {
				finds(t, n, key(i), who)
			}
		}
	}
}

func TestBootstrapComesLater(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0") // to know a free port
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	l.Close()
	id, pub, err := crypto.GenerateEd25519Key(nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := peer.IDFromPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(at)
	b := start(t, bootstrap(fmt.Sprintf("/ip4/127.0.0.1/tcp/%s/p2p/%s", port, p)))
	b.Announce(key(1))
	findsNobody(t, b, key(1)) // it is alone
	a := start(t, func(o *Options) { o.Identity, o.Listen = id, []string{at} })
	connectedWithAll(t, a, b)
	finds(t, a, key(1), b)
}

func TestReconnects(t *testing.T) {
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	// a has no bootstrap: it remembers b.
	if err := a.host.Network().ClosePeer(b.Self()); err != nil {
		t.Fatal(err)
	}
	connectedWithAll(t, a, b)
}

func TestStateFile(t *testing.T) {
	state := filepath.Join(t.TempDir(), "peers.json")
	a := start(t)
	opts := func(o *Options) { o.StateFile = state }
	b := start(t, bootstrap(addr(t, a)), opts)
	connectedWithAll(t, a, b)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	c := start(t, opts) // no bootstrap
	connectedWithAll(t, a, c)
	eventually(t, "the state is saved while it runs", func() bool {
		var peers []saved
		data, err := os.ReadFile(state)
		return err == nil && json.Unmarshal(data, &peers) == nil && len(peers) > 0
	})

	// A damaged one is no reason not to start.
	if err := os.WriteFile(state, []byte("["), 0o600); err != nil {
		t.Fatal(err)
	}
	d := start(t, opts, bootstrap(addr(t, a)))
	connectedWithAll(t, a, c, d)
}

func TestPeersFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "peers")
	log := &logged{n: map[string]int{}}
	a := start(t)
	b := start(t, func(o *Options) { o.PeersFile, o.Log = file, slog.New(log) }) // there is none
	eventually(t, "a missing file is logged", func() bool { return log.count("cannot use the peers file") == 1 })
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# nobody yet\n")
	write("# one\n\n " + addr(t, a) + " # the first\n")
	connectedWithAll(t, a, b)
	write("no entry at all\n") // leaves all as it is
	eventually(t, "a bad file is logged", func() bool { return log.count("cannot use the peers file") == 2 })
	c := start(t)
	write(addr(t, a) + "\n" + addr(t, c) + "\n")
	connectedWithAll(t, a, b, c)
}

func TestResolve(t *testing.T) {
	a := start(t)
	var mu sync.Mutex
	var asked []string
	resolve := func(_ context.Context, hostport string) (peer.AddrInfo, error) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, hostport)
		if len(asked) == 1 {
			return peer.AddrInfo{}, errors.New("not yet")
		}
		return peer.AddrInfo{ID: a.Self(), Addrs: a.host.Addrs()}, nil
	}
	b := start(t, bootstrap("localhost:7"), func(o *Options) { o.Resolve = resolve })
	connectedWithAll(t, a, b)
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(asked, "127.0.0.1:7") && !slices.Contains(asked, "[::1]:7") {
		t.Errorf("asked %q, want the addresses of localhost", asked)
	}
}

func TestDial(t *testing.T) {
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	type result struct {
		remote string
		err    error
	}
	done := make(chan result, 1)
	go func() {
		c, err := a.Listener().Accept()
		if err != nil {
			done <- result{err: err}
			return
		}
		defer c.Close()
		_, err = io.Copy(c, c)
		done <- result{c.RemoteAddr().String(), err}
	}()
	c, err := b.Dial(t.Context(), a.Self())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.RemoteAddr().String(); got != a.Self().String() {
		t.Errorf("dialled %s, want %s", got, a.Self())
	}
	sent := strings.Repeat("some bytes ", 10_000)
	go func() {
		io.WriteString(c, sent)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != sent {
		t.Errorf("got %d bytes and %v, want %d", len(got), err, len(sent))
	}
	if r := <-done; r.err != nil || r.remote != b.Self().String() {
		t.Errorf("accepted from %q (%v), want %s", r.remote, r.err, b.Self())
	}

	if _, err := b.Dial(t.Context(), "nobody"); err == nil {
		t.Error("dialled nobody")
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := a.Listener().Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("the second close: %v", err)
	}
}

func TestOnConnect(t *testing.T) {
	a := start(t)
	before, after := make(chan peer.ID, 10), make(chan peer.ID, 10)
	a.OnConnect(func(p peer.ID) { before <- p })
	b := start(t, bootstrap(addr(t, a)))
	wait := func(c chan peer.ID, what string) {
		t.Helper()
		select {
		case p := <-c:
			if p != b.Self() {
				t.Errorf("%s: told of %s, want %s", what, p, b.Self())
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: not told", what)
		}
	}
	wait(before, "a later connection")
	a.OnConnect(func(p peer.ID) { after <- p })
	wait(after, "a connection that there is")
	if err := a.host.Network().ClosePeer(b.Self()); err != nil {
		t.Fatal(err)
	}
	wait(before, "a connection anew")
	wait(after, "a connection anew")
}

func TestConnect(t *testing.T) {
	a, b := start(t), start(t)
	if err := a.Connect(t.Context(), peer.AddrInfo{ID: a.Self(), Addrs: a.host.Addrs()}); err == nil {
		t.Error("connected with itself")
	}
	if err := a.Connect(t.Context(), peer.AddrInfo{ID: b.Self()}); err == nil {
		t.Error("connected with an unknown peer")
	}
	if err := a.Connect(t.Context(), peer.AddrInfo{ID: b.Self(), Addrs: b.host.Addrs()}); err != nil {
		t.Error(err)
	}
	connectedWithAll(t, a, b)
}

func TestNewRefuses(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	peersFile := filepath.Join(t.TempDir(), "peers")
	if err := os.WriteFile(peersFile, []byte("good.example.com\n/ip4/1.2.3.4/tcp/1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*Options)
		want   string
		is     error
	}{
		"no key":          {func(o *Options) { o.Key = Key{} }, "swarm key new", nil},
		"no identity":     {func(o *Options) { o.Identity = nil }, "identity", nil},
		"bootstrap entry": {bootstrap("ok.example.com", "bad entry"), `"bad entry"`, nil},
		"peers file": {func(o *Options) { o.PeersFile = peersFile },
			`line 2: bootstrap entry "/ip4/1.2.3.4/tcp/1"`, nil},
		"a pipe of peers": {func(o *Options) { o.PeersFile = pipe }, "not a regular file", nil},
		"no Resolve": {func(o *Options) { o.Bootstrap, o.Resolve = []string{"ok.example.com"}, nil },
			"Resolve", nil},
		"listen address": {func(o *Options) { o.Listen = []string{"localhost"} }, `"localhost"`, nil},
		"taken port": {func(o *Options) { o.Listen = []string{taken.Addr().String()} }, taken.Addr().String(),
			syscall.EADDRINUSE},
		"negative validity": {func(o *Options) { o.Validity = -1 }, "negative", nil},
	} {
		t.Run(name, func(t *testing.T) {
			id, _, err := crypto.GenerateEd25519Key(nil)
			if err != nil {
				t.Fatal(err)
			}
			opts := Options{Identity: id, Key: testKey, Listen: []string{"127.0.0.1:0"},
				Resolve: func(context.Context, string) (peer.AddrInfo, error) {
					return peer.AddrInfo{}, errors.New("no")
				}}
			tt.change(&opts)
			n, err := New(opts)
			if err == nil {
				n.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %q, want %q (%v)", err, tt.want, tt.is)
			}
		})
	}
}

// Two daemons must not share a port.
func TestPortIsNotShared(t *testing.T) {
	a := start(t)
	_, port, err := net.SplitHostPort(strings.Replace(a.host.Addrs()[0].String()[len("/ip4/"):], "/tcp/", ":", 1))
	if err != nil {
		t.Fatal(err)
	}
	n, err := New(Options{Identity: a.opts.Identity, Key: testKey, Listen: []string{"127.0.0.1:" + port}})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("error %v", err)
	}
	if err == nil {
		n.Close()
	}
}

// libp2p's defaults allow 8 connections from one address, loopback excepted.
func TestNoLimitByAddress(t *testing.T) {
	open := func(m network.ResourceManager) (n int) {
		for _, at := range []string{"/ip4/10.1.2.3/tcp/1", "/ip6/2001:db8::1/tcp/1"} {
			for range 200 {
				c, err := m.OpenConnection(network.DirInbound, true, multiaddr.StringCast(at))
				if err == nil {
					n++
					defer c.Done()
				}
			}
		}
		return n
	}
	m, err := newResources(256)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if n := open(m); n != 400 {
		t.Errorf("%d of 400 connections from two addresses", n)
	}
	limits := rcmgr.InfiniteLimits
	m, err = rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits), rcmgr.WithMetricsDisabled())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if open(m) == 400 {
		t.Error("libp2p does not limit by address any more: this test proves nothing")
	}
}

func TestNAT(t *testing.T) {
	a := start(t, func(o *Options) { o.NAT = true })
	b := start(t, func(o *Options) { o.NAT = true }, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	a.Announce(key(1))
	finds(t, b, key(1), a)
}

func TestSeenAt(t *testing.T) {
	var addrs []multiaddr.Multiaddr
	for _, s := range []string{
		"/ip4/172.17.0.2/tcp/65002", "/ip6/2001:db8::1/tcp/65002", "/dns4/x/tcp/1",
		"/ip4/9.9.9.9/tcp/1/p2p/" + someID + "/p2p-circuit",
	} {
		addrs = append(addrs, multiaddr.StringCast(s))
	}
	var got []string
	for _, a := range seenAt(multiaddr.StringCast("/ip4/10.0.0.5/tcp/43210"), addrs) {
		got = append(got, a.String())
	}
	if want := []string{"/ip4/10.0.0.5/tcp/65002"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := seenAt(multiaddr.StringCast("/ip4/10.0.0.5/tcp/43210/p2p/"+someID+"/p2p-circuit"), addrs); got != nil {
		t.Errorf("a peer that came over a relay is said to be at %v", got)
	}
}

func TestDistinct(t *testing.T) {
	x, y := multiaddr.StringCast("/ip4/2.0.0.2/tcp/1"), multiaddr.StringCast("/ip4/1.0.0.1/tcp/1")
	if got := distinct([]multiaddr.Multiaddr{x, y, x, y}); !slices.EqualFunc(got, []multiaddr.Multiaddr{x, y},
		multiaddr.Multiaddr.Equal) {
		t.Errorf("%v, want %v and %v, in this order", got, x, y)
	}
}

func TestPublicOf(t *testing.T) {
	lo4, lo6 := multiaddr.StringCast("/ip4/127.0.0.1/tcp/1"), multiaddr.StringCast("/ip6/::1/tcp/1")
	lan := multiaddr.StringCast("/ip4/10.0.0.1/tcp/1")
	for _, tt := range [][2][]multiaddr.Multiaddr{
		{{lo4, lan, lo6}, {lan}},
		{{lo4, lo6}, {lo4, lo6}},
		{nil, nil},
	} {
		if got := publicOf(tt[0]); !slices.EqualFunc(got, tt[1], multiaddr.Multiaddr.Equal) {
			t.Errorf("of %v: %v, want %v", tt[0], got, tt[1])
		}
	}
}

// Very many keys are taken at once, and one that comes behind them
// does not wait for them.
func TestManyKeys(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	keys := make([][32]byte, 50_000)
	for i := range keys {
		keys[i] = key(i)
	}
	a.Announce(keys...)
	a.Announce(key(-1))
	finds(t, b, key(-1), a)
	finds(t, b, key(49_999), a)
	// a answers for its own. The records must arrive, too, but for the last few
	// hundred, which the table keeps back.
	eventually(t, "the records arrive", func() bool { return b.records.len() > 49_000 })
}

// What libp2p says of clocks, in one place or another of a longer error, is told in words.
func TestTroubleWithClocks(t *testing.T) {
	var n Network
	for _, err := range []error{nil, errors.New("connection refused"),
		x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}} {
		if n.trouble.note(err); n.Trouble() != nil {
			t.Errorf("%v: %v", err, n.Trouble())
		}
	}
	for err, want := range map[error]string{
		fmt.Errorf("dial: %w", x509.CertificateInvalidError{Reason: x509.Expired}): "clock of this host is behind",
		errors.New("failed to negotiate security protocol: x509: certificate has expired or is not yet valid: " +
			"current time 2026"): "clock of this host is behind",
		errors.New("failed to open new stream: remote error: tls: bad certificate"): "clock of this host is ahead",
	} {
		if n.trouble.note(err); n.Trouble() == nil || !strings.Contains(n.Trouble().Error(), want) {
			t.Errorf("%v: %v, want %q", err, n.Trouble(), want)
		}
	}
	n.trouble.at = time.Now().Add(-2 * troubleFor)
	if n.Trouble() != nil {
		t.Errorf("long after: %v", n.Trouble())
	}
}

// TestTwinAddresses: what anybody on the local network may have said has this host ask so many addresses, and
// not its own.
func TestTwinAddresses(t *testing.T) {
	var asked []string
	n := start(t, func(o *Options) {
		o.Resolve = func(_ context.Context, at string) (peer.AddrInfo, error) {
			asked = append(asked, at)
			return peer.AddrInfo{}, errors.New("nobody is there")
		}
	})
	info := peer.AddrInfo{ID: n.Self(), Addrs: n.host.Addrs()}
	for i := range 100 {
		info.Addrs = append(info.Addrs, at(i).Addrs...)
	}
	found{n}.HandlePeerFound(info)
	if len(asked) != maxTwinAddrs || slices.ContainsFunc(asked,
		func(at string) bool { return strings.HasPrefix(at, "127.") }) {
		t.Errorf("asked are %q", asked)
	}
}
