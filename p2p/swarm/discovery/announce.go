package discovery

import (
	"context"
	"crypto/sha256"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ipfs/go-libdht/kad/key/bitstr"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p-kad-dht/provider"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multihash"
)

// few is how many keys at a time are announced past the queue: those of a
// download that begins.
const few = 16

// announcer tells the table what this peer provides. provider.SweepingProvider
// does the work: it sends many keys to the peers of a region at one go, again
// and again. It is given what it wants to know: the keys (keySet is its
// keystore) and, through sweepRouter, when there is somebody to tell. Since its
// queue may be minutes long where many keys are announced, a few fresh ones are
// sent besides it, the first time.
type announcer struct {
	keys   *keySet
	table  *dht.IpfsDHT
	send   *pb.ProtocolMessenger
	sweep  *provider.SweepingProvider
	ready  atomic.Bool // the routing table has peers, and has stopped growing
	urgent chan [32]byte

	mu      sync.Mutex
	changed [][32]byte    // since the last run of flush
	kick    chan struct{} // buffered

	// Of tick: the size of the routing table at the last one, and at the last
	// announcement of everything, and for how many ticks it was not ready.
	last, swept, waited int
}

func newAnnouncer(self peer.ID, keys *keySet, table *dht.IpfsDHT, validity time.Duration) (*announcer, error) {
	a := &announcer{keys: keys, table: table, kick: make(chan struct{}, 1), urgent: make(chan [32]byte, 4*few)}
	var err error
	if a.send, err = pb.NewProtocolMessenger(table.MessageSender()); err != nil {
		return nil, err
	}
	// Without WithHost: it would drop the addresses of peers that fail, which
	// are not its own.
	a.sweep, err = provider.New(
		provider.WithPeerID(self),
		provider.WithSelfAddrs(table.Host().Addrs),
		provider.WithRouter(sweepRouter{a}),
		provider.WithMessageSender(table.MessageSender()),
		provider.WithKeystore(keys),
		provider.WithReprovideInterval(validity/2),
		provider.WithMaxReprovideDelay(validity/4),
		provider.WithMaxWorkers(8),
		provider.WithDedicatedBurstWorkers(4),
		provider.WithResumeCycle(false),
	)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// announce adds keys.
func (a *announcer) announce(keys ...[32]byte) {
	for some := range slices.Chunk(keys, 1<<12) { // others want the lock, too
		fresh := a.keys.add(some...)
		if len(keys) > few {
			a.touch(fresh...)
			continue
		}
		for _, k := range fresh {
			select {
			case a.urgent <- k:
			default:
				a.touch(k)
			}
		}
	}
}

// withdraw removes keys.
func (a *announcer) withdraw(keys ...[32]byte) {
	for some := range slices.Chunk(keys, 1<<12) {
		a.touch(a.keys.remove(some...)...)
	}
}

func (a *announcer) touch(keys ...[32]byte) {
	if len(keys) == 0 {
		return
	}
	a.mu.Lock()
	a.changed = append(a.changed, keys...)
	a.mu.Unlock()
	poke(a.kick)
}

// hurry announces urgent keys until ctx ends, and leaves to the sweeper when to
// do so again, or at all where it fails.
func (a *announcer) hurry(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case k := <-a.urgent:
			if !a.keys.has(k) {
				continue // it was withdrawn meanwhile
			}
			if !a.ready.Load() || a.provide(ctx, k) != nil {
				a.touch(k)
			} else if a.keys.has(k) {
				_ = a.sweep.AddToSchedule(multihashOf(k)) // fails only when closed
			}
		}
	}
}

// provide sends a record to the peers next to k.
func (a *announcer) provide(ctx context.Context, k [32]byte) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	mh := multihashOf(k)
	peers, err := a.table.GetClosestPeers(ctx, string(mh))
	if err != nil {
		return err
	}
	h := a.table.Host()
	self := peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}
	return tryEach(peers, func(p peer.ID) error { return a.send.PutProviderAddrs(ctx, p, mh, self) })
}

// run passes changes on to the sweeper until ctx ends.
func (a *announcer) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.kick:
		}
		a.mu.Lock()
		changed := a.changed
		a.changed = nil
		a.mu.Unlock()
		// What a key is now counts, not the order of calls. So a key that was
		// announced and withdrawn meanwhile is not sent.
		var start, stop []multihash.Multihash
		for _, k := range changed {
			if a.keys.has(k) {
				start = append(start, multihashOf(k))
			} else {
				stop = append(stop, multihashOf(k))
			}
		}
		// The only error is that of a closed provider, which ctx tells too.
		_ = a.sweep.StopProviding(stop...)
		_ = a.sweep.StartProviding(true, start...)
	}
}

// tick looks at the routing table. It says when to begin to announce: not at the
// first peer, next to which all keys would lie for minutes, but when the table
// has stopped to grow. It has everything announced again when the table has
// doubled since, or was empty, unless all peers are asked for all keys.
func (a *announcer) tick() {
	size := a.table.RoutingTable().Size()
	if size == 0 {
		a.ready.Store(false)
		a.waited = 0
	} else if !a.ready.Load() {
		if a.waited++; size == a.last || a.waited > 10 {
			a.ready.Store(true)
			if a.swept == 0 {
				a.swept = size // the sweeper, too, begins with everything
			} else {
				a.swept = 1
			}
		}
	}
	a.last = size
	if a.ready.Load() && size > a.table.BucketSize() && size >= 2*a.swept {
		a.swept = size
		var all [][32]byte
		for k := range a.keys.matching("") {
			all = append(all, k)
		}
		a.touch(all...)
	}
}

// sweepRouter finds peers for the sweeper, and waits while there are none. (An
// error instead would make the sweeper look for peers at ever longer intervals
// of up to a minute, and forget what it was told to announce.)
type sweepRouter struct{ a *announcer }

func (r sweepRouter) GetClosestPeers(ctx context.Context, key string) ([]peer.ID, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !r.a.ready.Load() {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
	return r.a.table.GetClosestPeers(ctx, key)
}

// keySet is the keys that this peer announces, in order of their place in the
// table (the SHA-256 of the multihash) as far as the first byte. It implements
// keystore.Keystore for the sweeper, which only reads: the changes that it makes
// are made before it is told. Safe for concurrent use.
type keySet struct {
	mu     sync.RWMutex
	shards [256]map[place][32]byte
	n      int
}

type place [sha256.Size]byte

func placeOf(k [32]byte) place { return sha256.Sum256(multihashOf(k)) }

func (s *keySet) has(k [32]byte) bool {
	p := placeOf(k)
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.shards[p[0]][p]
	return ok
}

// add returns the keys that were not there before.
func (s *keySet) add(keys ...[32]byte) (fresh [][32]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		p := placeOf(k)
		if _, ok := s.shards[p[0]][p]; ok {
			continue
		}
		if s.shards[p[0]] == nil {
			s.shards[p[0]] = map[place][32]byte{}
		}
		s.shards[p[0]][p] = k
		s.n++
		fresh = append(fresh, k)
	}
	return fresh
}

// remove returns the keys that were there.
func (s *keySet) remove(keys ...[32]byte) (gone [][32]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		p := placeOf(k)
		if _, ok := s.shards[p[0]][p]; ok {
			delete(s.shards[p[0]], p)
			s.n--
			gone = append(gone, k)
		}
	}
	return gone
}

// matching yields the keys whose place starts with prefix, a string of 0s and 1s.
func (s *keySet) matching(prefix bitstr.Key) iter.Seq[[32]byte] {
	return func(yield func([32]byte) bool) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		for b := range s.shards {
			if !hasBits(place{byte(b)}, prefix[:min(len(prefix), 8)]) {
				continue
			}
			for p, k := range s.shards[b] {
				if hasBits(p, prefix) && !yield(k) {
					return
				}
			}
		}
	}
}

func hasBits(p place, prefix bitstr.Key) bool {
	for i := range len(prefix) {
		if p[i/8]>>(7-i%8)&1 != prefix[i]-'0' {
			return false
		}
	}
	return true
}

// Get implements keystore.Keystore.
func (s *keySet) Get(_ context.Context, prefix bitstr.Key) (mhs []multihash.Multihash, _ error) {
	for k := range s.matching(prefix) {
		mhs = append(mhs, multihashOf(k))
	}
	return mhs, nil
}

// CountKeysUpTo implements keystore.Keystore.
func (s *keySet) CountKeysUpTo(_ context.Context, prefix bitstr.Key, limit int) (n int, _ error) {
	for range s.matching(prefix) {
		if n++; n == limit {
			break
		}
	}
	return n, nil
}

// ContainsPrefix implements keystore.Keystore.
func (s *keySet) ContainsPrefix(ctx context.Context, prefix bitstr.Key) (bool, error) {
	n, err := s.CountKeysUpTo(ctx, prefix, 1)
	return n > 0, err
}

// Put implements keystore.Keystore. It changes nothing and says that all are new.
func (s *keySet) Put(_ context.Context, mhs ...multihash.Multihash) ([]multihash.Multihash, error) {
	return mhs, nil
}

// Delete implements keystore.Keystore. It changes nothing.
func (s *keySet) Delete(context.Context, ...multihash.Multihash) error { return nil }

// Empty implements keystore.Keystore. It changes nothing.
func (s *keySet) Empty(context.Context) error { return nil }

// Size implements keystore.Keystore.
func (s *keySet) Size(context.Context) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.n, nil
}

// BatchSize implements keystore.Keystore.
func (s *keySet) BatchSize() int { return 1 << 10 }

// Close implements keystore.Keystore. The set stays as it is.
func (s *keySet) Close() error { return nil }
