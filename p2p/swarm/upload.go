package swarm

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

const (
	// uploadIdle is how long an upload is remembered that nobody asks for: how
	// often each piece was sent, and who asked.
	uploadIdle = time.Minute
	// maxOpen is how many uploads are remembered at most, those apart that are asked for
	// at the moment. A small file needs it for one piece.
	maxOpen = 256
	// maxWaiting is how many requests for one blob may wait.
	maxWaiting = 1024
	// maxNewsWait is how long a request for news is kept waiting.
	maxNewsWait = 10 * time.Second
	// sendChunk is how much of a piece is read at a time. What is read is still near the
	// processor when it is sent, and what slow peers hold up is a part, not a piece.
	sendChunk = 256 << 10
	// sendStep is how much is sent at a time, as a record of TLS, and sendTimeout how long that
	// may take: the peer that is asked has no more patience than the one that asks (throttle.MinRate).
	sendStep    = 16 << 10
	sendTimeout = 20 * time.Second
)

// uploads are the blobs that peers are asking for. It is safe for concurrent use.
type uploads struct {
	slots   int                 // at once, of each blob
	all     *semaphore.Weighted // at once, of all
	limiter *rate.Limiter       // nil: no limit
	chunk   int64               // what is sent at a time, in bytes
	buffers *buffers
	open    int // how many are kept that nobody asks for now: each has a descriptor

	mu     sync.Mutex
	active map[digest.Digest]*upload
}

// upload is one blob that peers are asking for.
type upload struct {
	links linksHash
	table *digest.Table // size and piece length
	src   uploadSource

	mu      sync.Mutex
	sched   *schedule.Uploads
	damaged *schedule.Set                    // pieces that can't be read any more
	granted map[*schedule.Turn]chan struct{} // closed when it is its turn
	askers  map[peer.ID]time.Time            // who asked, and when last
	users   int
	used    time.Time
	closed  bool
}

// uploadSource is where an upload reads from: a blob of the store, or one that
// is being downloaded.
type uploadSource interface {
	// have returns the set of pieces that are there, which is not to be
	// changed, and a channel that is closed when there are more; nil where all are.
	have() (*schedule.Set, <-chan struct{})
	// bytes returns the content, unchecked.
	bytes() io.ReaderAt
	close() error
}

// stored is a blob of the store as the source of an upload.
type stored struct {
	blob *pieces.Blob
	full *schedule.Set
}

func (s stored) have() (*schedule.Set, <-chan struct{}) { return s.full, nil }
func (s stored) bytes() io.ReaderAt                     { return s.blob.File() }
func (s stored) close() error                           { return s.blob.Close() }

// use returns the upload of d, made with open where there is none. The caller
// calls done.
func (u *uploads) use(d digest.Digest, open func() (*upload, error)) (_ *upload, done func(), err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	up := u.active[d]
	if up == nil {
		up, err = open()
		if errors.Is(err, p2p.ErrBusy) {
			u.shrink(0)
			up, err = open()
		}
		if err != nil {
			return nil, nil, err
		}
		up.sched = schedule.NewUploads(up.table.Pieces(), u.slots)
		up.granted = map[*schedule.Turn]chan struct{}{}
		up.damaged = schedule.NewSet(up.table.Pieces())
		up.askers = map[peer.ID]time.Time{}
		u.active[d] = up
	}
	up.mu.Lock()
	up.users++
	up.mu.Unlock()
	u.shrink(u.open)
	return up, func() {
		up.mu.Lock()
		defer up.mu.Unlock()
		up.users--
		up.used = time.Now()
		up.tryClose()
	}, nil
}

// tryClose closes the source of an upload that is not to be used any more.
func (up *upload) tryClose() {
	if up.closed && up.users == 0 && up.src != nil {
		_ = up.src.close() // it was read only
		up.src = nil
	}
}

// shrink drops uploads that nobody asks for now, those first that nobody has asked for the longest,
// until there are n. u.mu is held.
func (u *uploads) shrink(n int) {
	for len(u.active) > n {
		var oldest digest.Digest
		var used time.Time
		for d, up := range u.active {
			up.mu.Lock()
			if up.users == 0 && (oldest == "" || up.used.Before(used)) {
				oldest, used = d, up.used
			}
			up.mu.Unlock()
		}
		if oldest == "" {
			return // requests are bounded by connections
		}
		u.end(oldest)
	}
}

// drop ends an upload for new requests: its source is not what it was.
func (u *uploads) drop(d digest.Digest) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.end(d)
}

// end is drop with u.mu held.
func (u *uploads) end(d digest.Digest) {
	if up := u.active[d]; up != nil {
		delete(u.active, d)
		up.mu.Lock()
		defer up.mu.Unlock()
		up.closed = true
		up.tryClose()
	}
}

// sweep forgets uploads that nobody asks for; all of them where that is to be.
func (u *uploads) sweep(all bool) {
	u.mu.Lock()
	var idle []digest.Digest
	for d, up := range u.active {
		up.mu.Lock()
		if all || up.users == 0 && time.Since(up.used) > uploadIdle {
			idle = append(idle, d)
		}
		up.mu.Unlock()
	}
	u.mu.Unlock()
	for _, d := range idle {
		u.drop(d)
	}
}

// askedBy notes a peer that asks, and returns some others that do.
func (up *upload) askedBy(p peer.ID) []peer.ID {
	up.mu.Lock()
	defer up.mu.Unlock()
	now := time.Now()
	_, known := up.askers[p]
	up.askers[p] = now
	var others []peer.ID
	for id, at := range up.askers {
		switch {
		case now.Sub(at) > uploadIdle:
			delete(up.askers, id)
		case id != p:
			others = append(others, id)
		}
	}
	// A peer that comes back has been told; now and then it is told of those who came since.
	if known && rand.IntN(8) != 0 {
		return nil
	}
	rand.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	return others[:min(len(others), maxHints)]
}

// askers returns peers that have asked for a blob, but for one of them.
func (u *uploads) askers(d digest.Digest, not peer.ID) []peer.ID {
	u.mu.Lock()
	up := u.active[d]
	u.mu.Unlock()
	if up == nil {
		return nil
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	var all []peer.ID
	for id, at := range up.askers {
		if id != not && time.Since(at) <= uploadIdle && len(all) < maxHints {
			all = append(all, id)
		}
	}
	return all
}

// there returns the pieces that can be sent.
func (up *upload) there() (*schedule.Set, <-chan struct{}) {
	have, more := up.src.have()
	up.mu.Lock()
	defer up.mu.Unlock()
	if up.damaged.Count() > 0 {
		have = have.Clone().AndNot(up.damaged)
	}
	return have, more
}

// pick waits until it is the turn of a request, and tells which piece to send;
// -1 where there is none that is wanted. The caller calls release, with whether
// the piece was sent.
func (u *uploads) pick(
	ctx context.Context, up *upload, from peer.ID, want *schedule.Set,
) (piece int, release func(sent bool), err error) {
	turn, granted, err := up.ask(from, want)
	if err != nil {
		return -1, nil, err
	}
	end := func(sent bool) {
		have, _ := up.there()
		up.mu.Lock()
		defer up.mu.Unlock()
		if turn.Piece() >= 0 {
			up.sched.End(turn, sent)
		}
		up.grant(have)
	}
	select {
	case <-granted:
	case <-ctx.Done():
		up.mu.Lock()
		waited := up.sched.Leave(turn)
		delete(up.granted, turn)
		up.mu.Unlock()
		if !waited {
			end(false) // it was granted just now
		}
		return -1, nil, context.Cause(ctx)
	}
	if turn.Piece() < 0 {
		return -1, end, nil
	}
	if err := u.all.Acquire(ctx, 1); err != nil {
		end(false)
		return -1, nil, err
	}
	return turn.Piece(), func(sent bool) {
		u.all.Release(1)
		end(sent)
	}, nil
}

// ask has a request wait for its turn: the channel is closed when it is.
func (up *upload) ask(from peer.ID, want *schedule.Set) (*schedule.Turn, <-chan struct{}, error) {
	have, _ := up.there()
	up.mu.Lock()
	defer up.mu.Unlock()
	if up.sched.Waiting() >= maxWaiting {
		return nil, nil, &statusError{http.StatusServiceUnavailable, "too many requests for this blob"}
	}
	turn, granted := up.sched.Ask(string(from), want), make(chan struct{})
	up.granted[turn] = granted
	up.grant(have)
	return turn, granted, nil
}

// grant tells those whose turn it is. up.mu is held.
func (up *upload) grant(have *schedule.Set) {
	for {
		turn, ok := up.sched.Grant(have)
		if !ok {
			return
		}
		close(up.granted[turn])
		delete(up.granted, turn)
	}
}

// broken says that a piece can't be read any more. It reports whether that is
// the first one, of a blob that may be mended.
func (up *upload) broken(piece int) (mend bool) {
	up.mu.Lock()
	defer up.mu.Unlock()
	up.damaged.Add(piece)
	_, mend = up.src.(stored)
	return mend && up.damaged.Count() == 1
}

// news waits until there is one of the pieces that are wanted.
func (up *upload) news(ctx context.Context, want *schedule.Set) {
	timeout := time.NewTimer(maxNewsWait)
	defer timeout.Stop()
	for {
		have, more := up.there()
		if have.Intersects(want) || more == nil {
			return
		}
		select {
		case <-more:
		case <-timeout.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// buffers are what pieces pass through. Their sum is bounded: an upload that wants one waits.
type buffers struct {
	room *semaphore.Weighted
	pool sync.Pool
}

func newBuffers(bytes int64) *buffers {
	return &buffers{room: semaphore.NewWeighted(max(bytes, digest.MaxPieceLength))}
}

// get returns a buffer of n bytes, at most a piece. It waits where there is no
// room, until ctx ends.
func (b *buffers) get(ctx context.Context, n int) ([]byte, error) {
	if err := b.room.Acquire(ctx, int64(n)); err != nil {
		return nil, err
	}
	if buf, ok := b.pool.Get().(*[]byte); ok && cap(*buf) >= n {
		return (*buf)[:n], nil
	}
	return make([]byte, n), nil
}

// put gives a buffer back, in the length that it was got with.
func (b *buffers) put(buf []byte) {
	b.room.Release(int64(len(buf)))
	b.pool.Put(&buf)
}
