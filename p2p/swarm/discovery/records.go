package discovery

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
	"unique"

	lru "github.com/hashicorp/golang-lru/simplelru"
	"github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"
	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-base32"
	"github.com/multiformats/go-multihash"
)

// maxAnswer is how many providers of a key one peer names to another. They are
// picked at random, and 20 peers are asked.
const maxAnswer = 64

// records are the provider records that other peers left here, in memory.
//
// The table (kad-dht) takes no store of ours but only a datastore below its own,
// which writes the path /providers/KEY/PEER with the time of the announcement
// and reads all below /providers/KEY. Its stores scan everything at each lookup;
// this one is indexed by key, bounded, and in the order of time.
type records struct {
	datastore.Batching // refuses, or does nothing for, what is not below

	self     peer.ID
	own      *keySet // what this peer announces is not stored but known
	max      int
	validity time.Duration
	now      func() time.Time

	mu     sync.Mutex
	slots  []record
	free   []int32
	heads  map[[32]byte]int32 // the first record of a key
	oldest int32
	newest int32
}

// record is in two lists: that of its key, and that of all by time.
type record struct {
	key          [32]byte
	peer         unique.Handle[peer.ID]
	at           int64 // nanoseconds since 1970
	next         int32 // of the same key
	older, newer int32
}

const none = -1

func newRecords(self peer.ID, own *keySet, max int, validity time.Duration, now func() time.Time) *records {
	return &records{
		Batching: datastore.NewNullDatastore(),
		self:     self, own: own, max: max, validity: validity, now: now,
		heads: map[[32]byte]int32{}, oldest: none, newest: none,
	}
}

// multihashOf returns k as the sha2-256 multihash that the table speaks of.
func multihashOf(k [32]byte) multihash.Multihash {
	return append([]byte{multihash.SHA2_256, 32}, k[:]...)
}

// keyOf undoes multihashOf.
func keyOf(mh []byte) (k [32]byte, ok bool) {
	ok = len(mh) == 34 && mh[0] == multihash.SHA2_256 && mh[1] == 32
	if ok {
		k = [32]byte(mh[2:])
	}
	return k, ok
}

// parsePath takes /providers/KEY or /providers/KEY/PEER apart.
func parsePath(path string) (k [32]byte, p peer.ID, ok bool) {
	rest, ok := strings.CutPrefix(path, kadrecords.ProvidersKeyPrefix)
	if !ok {
		return k, "", false
	}
	key, id, both := strings.Cut(rest, "/")
	mh, err := base32.RawStdEncoding.DecodeString(key)
	if err != nil {
		return k, "", false
	}
	if k, ok = keyOf(mh); !ok || !both {
		return k, "", ok
	}
	b, err := base32.RawStdEncoding.DecodeString(id)
	if err != nil {
		return k, "", false
	}
	p, err = peer.IDFromBytes(b)
	return k, p, err == nil
}

// Put implements datastore.Write. Keys that are not ours are dropped and are no
// error, since that would fail the good ones of the batch.
func (r *records) Put(_ context.Context, path datastore.Key, value []byte) error {
	k, p, ok := parsePath(path.String())
	at, n := binary.Varint(value)
	if ok && p != "" && p != r.self && n > 0 {
		r.add(k, p, at)
	}
	return nil
}

// Batch implements datastore.Batching.
func (r *records) Batch(context.Context) (datastore.Batch, error) {
	return datastore.NewBasicBatch(r), nil
}

// Query implements datastore.Read for a prefix that is one key.
func (r *records) Query(_ context.Context, q query.Query) (query.Results, error) {
	var entries []query.Entry
	if k, _, ok := parsePath(q.Prefix); ok {
		for p, at := range r.providers(k) {
			entries = append(entries, query.Entry{
				Key:   q.Prefix + "/" + base32.RawStdEncoding.EncodeToString([]byte(p)),
				Value: binary.AppendVarint(nil, at),
			})
		}
	}
	return query.ResultsWithEntries(q, entries), nil
}

func (r *records) add(k [32]byte, p peer.ID, at int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire()
	h := unique.Make(p)
	i, ok := r.heads[k]
	if !ok {
		i = none
	}
	for ; i != none; i = r.slots[i].next {
		if r.slots[i].peer == h {
			r.slots[i].at = max(r.slots[i].at, at)
			r.unchain(i)
			r.chain(i)
			return
		}
	}
	for len(r.slots)-len(r.free) >= r.max {
		r.drop(r.oldest)
	}
	next, ok := r.heads[k]
	if !ok {
		next = none
	}
	rec := record{key: k, peer: h, at: at, next: next}
	if n := len(r.free); n > 0 {
		i = r.free[n-1]
		r.free = r.free[:n-1]
		r.slots[i] = rec
	} else {
		i = int32(len(r.slots))
		r.slots = append(r.slots, rec)
	}
	r.heads[k] = i
	r.chain(i)
}

// providers returns up to maxAnswer peers that announced k, and when, in
// nanoseconds since 1970; this peer among them if it announces k now.
func (r *records) providers(k [32]byte) map[peer.ID]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire()
	var found []int32
	if i, ok := r.heads[k]; ok {
		for ; i != none; i = r.slots[i].next {
			found = append(found, i)
		}
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	m := make(map[peer.ID]int64)
	for _, i := range found[:min(len(found), maxAnswer)] {
		m[r.slots[i].peer.Value()] = r.slots[i].at
	}
	if r.own.has(k) {
		m[r.self] = r.now().UnixNano()
	}
	return m
}

func (r *records) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire()
	return len(r.slots) - len(r.free)
}

// expire drops what is too old. Batches arrive a little out of order, so that a
// record may outlive its time by as much; a reader checks the time again.
func (r *records) expire() {
	limit := r.now().Add(-r.validity).UnixNano()
	for r.oldest != none && r.slots[r.oldest].at < limit {
		r.drop(r.oldest)
	}
}

// chain makes i the newest of all.
func (r *records) chain(i int32) {
	r.slots[i].older, r.slots[i].newer = r.newest, none
	if r.newest != none {
		r.slots[r.newest].newer = i
	} else {
		r.oldest = i
	}
	r.newest = i
}

// unchain takes i out of the list by time.
func (r *records) unchain(i int32) {
	older, newer := r.slots[i].older, r.slots[i].newer
	if older != none {
		r.slots[older].newer = newer
	} else {
		r.oldest = newer
	}
	if newer != none {
		r.slots[newer].older = older
	} else {
		r.newest = older
	}
}

func (r *records) drop(i int32) {
	r.unchain(i)
	rec := r.slots[i]
	if j := r.heads[rec.key]; j != i {
		for r.slots[j].next != i {
			j = r.slots[j].next
		}
		r.slots[j].next = rec.next
	} else if rec.next != none {
		r.heads[rec.key] = rec.next
	} else {
		delete(r.heads, rec.key)
	}
	r.slots[i] = record{}
	r.free = append(r.free, i)
}

// noCache turns off the table's own cache, which would not know what this peer
// has begun and ceased to announce.
type noCache struct{ lru.LRUCache }

func (noCache) Get(any) (any, bool) { return nil, false }
func (noCache) Add(any, any) bool   { return false }
