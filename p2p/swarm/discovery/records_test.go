package discovery

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ipfs/go-libdht/kad/key/bitstr"
	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/test"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/multiformats/go-multiaddr"
)

// clock is a time that tests set.
type clock struct{ time.Time }

func (c *clock) now() time.Time          { return c.Time }
func (c *clock) advance(d time.Duration) { c.Time = c.Add(d) }

func providersOf(r *records, k [32]byte) []peer.ID { return slices.Sorted(maps.Keys(r.providers(k))) }

func TestRecordsExpire(t *testing.T) {
	c := &clock{time.Unix(1000, 0)}
	r := newRecords("self", &keySet{}, 100, 20*time.Minute, c.now)
	r.add(key(1), "a", c.UnixNano())
	c.advance(10 * time.Minute)
	r.add(key(1), "b", c.UnixNano())
	r.add(key(2), "b", c.UnixNano())
	if got := providersOf(r, key(1)); !slices.Equal(got, []peer.ID{"a", "b"}) {
		t.Errorf("holders %q", got)
	}
	c.advance(10*time.Minute + 1)
	if got := providersOf(r, key(1)); !slices.Equal(got, []peer.ID{"b"}) {
		t.Errorf("holders %q, want what has not expired", got)
	}
	r.add(key(1), "b", c.UnixNano()) // again: lives on
	c.advance(10 * time.Minute)
	if got := providersOf(r, key(1)); !slices.Equal(got, []peer.ID{"b"}) || r.len() != 1 {
		t.Errorf("holders %q, %d records, want the one that was announced again", got, r.len())
	}
	c.advance(20 * time.Minute)
	if r.len() != 0 || len(r.heads) != 0 {
		t.Errorf("%d records and %d keys are left", r.len(), len(r.heads))
	}
}

func TestRecordsAreBounded(t *testing.T) {
	c := &clock{time.Unix(1000, 0)}
	r := newRecords("self", &keySet{}, 10, time.Hour, c.now)
	for i := range 15 {
		r.add(key(i), "a", c.UnixNano())
		c.advance(time.Second)
		if i >= 2 {
			r.add(key(2), "a", c.UnixNano()) // stays young
		}
	}
	if r.len() != 10 || len(r.slots) != 10 {
		t.Errorf("%d records in %d slots, want 10", r.len(), len(r.slots))
	}
	for i := range 15 {
		if got, want := len(r.providers(key(i))), i == 2 || i >= 6; (got == 1) != want {
			t.Errorf("key %d has %d providers; want one: %v", i, got, want)
		}
	}
}

func TestRecordsKnowTheirOwn(t *testing.T) {
	own := &keySet{}
	r := newRecords("self", own, 10, time.Hour, time.Now)
	own.add(key(1))
	if got := providersOf(r, key(1)); !slices.Equal(got, []peer.ID{"self"}) {
		t.Errorf("holders %q, want self", got)
	}
	own.remove(key(1))
	if got := providersOf(r, key(1)); len(got) != 0 {
		t.Errorf("holders %q of what is withdrawn", got)
	}
}

func TestAnswersAreBounded(t *testing.T) {
	own := &keySet{}
	own.add(key(1))
	r := newRecords("self", own, 1000, time.Hour, time.Now)
	for i := range 500 {
		r.add(key(1), peer.ID(fmt.Sprint(i)), time.Now().UnixNano())
	}
	first, second := r.providers(key(1)), r.providers(key(1))
	if len(first) != maxAnswer+1 || maps.Equal(first, second) {
		t.Errorf("%d providers, the same each time: %v", len(first), maps.Equal(first, second))
	}
	if _, ok := first["self"]; !ok {
		t.Error("self is not among the holders")
	}
}

// The store against a simple model, with the lists checked.
func TestRecordsModel(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	c := &clock{time.Unix(1000, 0)}
	const limit, validity = 50, 100 * time.Second
	r := newRecords("self", &keySet{}, limit, validity, c.now)
	type provider struct {
		key  [32]byte
		peer peer.ID
	}
	type stamped struct {
		provider
		at time.Time
	}
	var model []stamped // oldest first
	for range 20_000 {
		c.advance(time.Duration(rng.IntN(4)) * time.Second)
		model = slices.DeleteFunc(model, func(s stamped) bool { return c.Sub(s.at) > validity })
		h := provider{key(rng.IntN(20)), peer.ID(fmt.Sprint(rng.IntN(10)))}
		model = slices.DeleteFunc(model, func(s stamped) bool { return s.provider == h })
		model = append(model, stamped{h, c.Time})
		if len(model) > limit {
			model = model[1:]
		}
		r.add(h.key, h.peer, c.UnixNano())

		want := map[peer.ID]int64{}
		k := key(rng.IntN(20))
		for _, s := range model {
			if s.key == k {
				want[s.peer] = s.at.UnixNano()
			}
		}
		if got := r.providers(k); !maps.Equal(got, want) {
			t.Fatalf("holders %v, want %v", got, want)
		}
		if r.len() != len(model) {
			t.Fatalf("%d records, want %d", r.len(), len(model))
		}
	}
	if len(r.slots) > limit {
		t.Errorf("%d slots for %d records", len(r.slots), limit)
	}
}

// As the table uses it.
func TestRecordsBelowProviderManager(t *testing.T) {
	self, other := test.RandPeerIDFatal(t), test.RandPeerIDFatal(t)
	peers, err := pstoremem.NewPeerstore()
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	own := &keySet{}
	r := newRecords(self, own, 10_000, time.Hour, time.Now)
	m, err := kadrecords.NewProviderManager(self, peers, r, kadrecords.Cache(noCache{}), kadrecords.CleanupInterval(0),
		kadrecords.ProvideValidity(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	at := []multiaddr.Multiaddr{multiaddr.StringCast("/ip4/10.0.0.1/tcp/1")}
	for i := range 1000 { // more than it buffers
		if err := m.AddProvider(t.Context(), multihashOf(key(i)), peer.AddrInfo{ID: other, Addrs: at}); err != nil {
			t.Fatal(err)
		}
	}
	for _, odd := range []string{"x", string(multihashOf(key(1))) + "x", "\x13\x20" + strings.Repeat("x", 32)} {
		if err := m.AddProvider(t.Context(), []byte(odd), peer.AddrInfo{ID: other, Addrs: at}); err != nil {
			t.Fatal(err)
		}
	}
	own.add(key(1), key(2))
	own.remove(key(2))
	for i, want := range map[int]int{0: 1, 1: 2, 2: 1, 999: 1, 1000: 0} {
		infos, err := m.GetProviders(t.Context(), multihashOf(key(i)))
		if err != nil || len(infos) != want {
			t.Errorf("key %d: %d providers, %v; want %d", i, len(infos), err, want)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if r.len() != 1000 {
		t.Errorf("%d records, want 1000: those of odd keys must not hurt the others", r.len())
	}
}

func TestParsePath(t *testing.T) {
	for _, bad := range []string{"", "/", "/providers", "/providers/", "/providers/!", "/providers//x", "/other/CIQA",
		"/providers/CIQA/CIQA"} {
		if _, _, ok := parsePath(bad); ok {
			t.Errorf("%q is a path", bad)
		}
	}
}

func TestKeySet(t *testing.T) {
	s := &keySet{}
	var keys [][32]byte
	for i := range 1000 {
		keys = append(keys, key(i))
	}
	if fresh := s.add(keys[:600]...); len(fresh) != 600 {
		t.Errorf("%d fresh keys, want 600", len(fresh))
	}
	if fresh := s.add(keys...); !slices.Equal(fresh, keys[600:]) {
		t.Errorf("%d fresh keys, want the 400 others", len(fresh))
	}
	if gone := s.remove(key(7), key(7), key(-1)); !slices.Equal(gone, [][32]byte{key(7)}) {
		t.Errorf("gone: %v", gone)
	}
	if s.has(key(7)) || !s.has(key(8)) {
		t.Error("7 is there or 8 is not")
	}
	for _, prefix := range []bitstr.Key{"", "0", "1", "0110", "01100110", "011001101", "0110011010011"} {
		want := map[[32]byte]bool{}
		for i, k := range keys {
			p := placeOf(k)
			bits := ""
			for _, b := range p {
				bits += fmt.Sprintf("%08b", b)
			}
			if i != 7 && strings.HasPrefix(bits, string(prefix)) {
				want[k] = true
			}
		}
		got, err := s.Get(t.Context(), prefix)
		if err != nil || len(got) != len(want) {
			t.Errorf("%d keys with prefix %q, %v; want %d", len(got), prefix, err, len(want))
		}
		for _, mh := range got {
			if k, ok := keyOf(mh); !ok || !want[k] {
				t.Errorf("prefix %q: unexpected %x", prefix, mh)
			}
		}
		if n, _ := s.CountKeysUpTo(t.Context(), prefix, 3); n != min(3, len(want)) {
			t.Errorf("%d of prefix %q up to 3, want %d", n, prefix, min(3, len(want)))
		}
		if ok, _ := s.ContainsPrefix(t.Context(), prefix); ok != (len(want) > 0) {
			t.Errorf("contains prefix %q: %v", prefix, ok)
		}
	}
	if n, _ := s.Size(t.Context()); n != 999 {
		t.Errorf("size %d, want 999", n)
	}
}

func BenchmarkRecords(b *testing.B) {
	r := newRecords("self", &keySet{}, 1_000_000, time.Hour, time.Now)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r.add(key(i%2_000_000), "a", time.Now().UnixNano())
	}
}
