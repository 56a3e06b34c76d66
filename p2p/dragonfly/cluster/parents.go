package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// attempt is a peer that is fetched from.
type attempt struct {
	parent
	watch    *watchdog
	reported bool  // to the scheduler, as of no use
	err      error // when it has ended
}

// errConflict says that a peer tells of other content than those that are fetched from beside it.
var errConflict = errors.New("other peers tell of something else")

// errTaken is the cause for which a request ends whose piece is fetched from another peer.
var errTaken = errors.New("another peer gives this piece")

// round is a fetch from the peers that a scheduler names.
type round struct {
	*download
	ctx     context.Context
	running []*attempt // in the order in which they began; all but the last are slow
	ended   chan *attempt
	begun   int
	known   map[parent]bool
	queue   []parent
	later   []parent // that made way for another
	problem error    // what is wrong so far
	over    error    // why the scheduler names no more
}

// fromParents fetches from the peers of the queue, and then from those that the scheduler
// names, until what has come is what was asked for: from one peer, and where that is slow from another
// beside it. problem is what is wrong so far.
func (d *download) fromParents(ctx context.Context, queue []parent, problem error) error {
	r := &round{download: d, ctx: ctx, ended: make(chan *attempt), known: map[parent]bool{}, problem: problem}
	defer r.stop()
	r.add(queue)
	packets := d.packets
	limit := time.NewTimer(d.e.opts.StallTimeout)
	defer limit.Stop()
	for {
		r.next()
		var slow <-chan struct{}
		var waited <-chan time.Time
		if n := len(r.running); n == 0 {
			if err := r.exhausted(); err != nil {
				return err
			}
			waited = limit.C
		} else if last := r.running[n-1].watch; !last.isSlow() {
			slow = last.slow
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-slow:
		case <-waited:
			return fmt.Errorf("scheduler %s: %w: it named no peer within %s", d.scheduler.addr, wire.ErrAway,
				d.e.opts.StallTimeout)
		case packet, more := <-packets:
			var named []parent
			if named, r.over = d.parents(packet, more); r.over != nil {
				packets = nil
			}
			r.add(named)
		case a := <-r.ended:
			limit.Reset(d.e.opts.StallTimeout)
			if done, err := r.end(a); done {
				return err
			}
		}
	}
}

// add takes in peers that are named for the first time.
func (r *round) add(named []parent) {
	for _, p := range named {
		if !r.known[p] && len(r.known) < maxParents {
			r.queue = append(r.queue, p)
			r.known[p] = true
		}
	}
}

// next fetches from one more peer, where all that are fetched from are slow.
func (r *round) next() {
	n := len(r.running)
	if n > 0 && !r.running[n-1].watch.isSlow() || r.begun >= maxParents {
		return
	}
	if len(r.queue) == 0 && n == 0 {
		r.queue, r.later = r.later, nil
	}
	if len(r.queue) == 0 {
		for _, a := range r.running {
			r.giveUp(a) // has the scheduler name others
		}
		return
	}
	a := &attempt{parent: r.queue[0], watch: newWatchdog(r.ctx, r.e.opts.StallTimeout)}
	r.queue = r.queue[1:]
	r.running = append(r.running, a)
	r.begun++
	go func() {
		a.err = r.from(a)
		r.ended <- a
	}()
}

// exhausted returns why there is no peer to fetch from any more; nil where one may be named.
func (r *round) exhausted() error {
	switch {
	case r.begun >= maxParents:
		return fmt.Errorf("%w (as %d others)", r.problem, maxParents-1)
	case r.over != nil && r.problem == nil:
		return r.over
	case r.over != nil:
		return fmt.Errorf("%w (and there is no other peer)", r.problem)
	}
	return nil
}

// stop stops all that are fetched from, for another one.
func (r *round) stop() {
	for _, a := range r.running {
		a.watch.stop()
		r.later = append(r.later, a.parent)
	}
	for range r.running {
		r.leave(<-r.ended)
	}
	r.running = nil
}

// end takes in that a peer is not fetched from any more. It reports whether the round is done:
// all of it has come, or err is why it can't.
func (r *round) end(a *attempt) (done bool, err error) {
	a.watch.stop()
	r.running = slices.DeleteFunc(r.running, func(other *attempt) bool { return other == a })
	err = a.err
	if err == nil {
		r.stop() // what is hashed nobody is to write to
		if err = r.keep(r.ctx); err == nil {
			return true, nil
		}
		if errors.Is(err, digest.ErrMismatch) {
			err = fault("peer %s at %s gave something else: %w", a.id, a.addr, err)
		}
	}
	r.leave(a)
	switch {
	case errors.Is(err, errConflict):
		r.problem = cmp.Or(r.problem, err)
		if len(r.running) > 0 && a.watch.isSlow() {
			r.later = append(r.later, a.parent)
		} else { // the others are slow: it is this one's turn
			r.stop()
			r.queue = slices.Insert(r.queue, 0, a.parent)
		}
	case context.Cause(r.ctx) != nil || !isPeersFault(err):
		return true, err
	default:
		r.problem = err
		if a.only != nil && !a.watch.bit() {
			// The scheduler has told of the piece, and may be wrong: peers are asked themselves.
			r.e.log.Debug("a piece is not what the scheduler says it is", "task", r.task.String(), "peer", a.id,
				"address", a.addr.String(), "error", err)
			r.askForParents()
			break
		}
		r.e.log.Warn("a peer of Dragonfly was given up", "task", r.task.String(), "peer", a.id,
			"address", a.addr.String(), "error", err)
		r.giveUp(a)
	}
	return false, nil
}

// giveUp tells the scheduler that a peer is of no use: it names others.
func (d *download) giveUp(a *attempt) {
	if !a.reported {
		a.reported = true
		d.fail(a.id, commonv1.Code_ClientPieceDownloadFail)
	}
}

// claim is a piece that is on its way from a peer.
type claim struct {
	by     *attempt
	ctx    context.Context // of the request
	end    context.CancelCauseFunc
	before *claim        // which this one takes over
	done   chan struct{} // closed when nothing is written for it any more
}

// use sees to it that the file is as a peer says that the content is. Where another one
// said something else, nothing of what it gave is kept; unless it is fetched from now: that is a conflict.
func (d *download) use(a *attempt, l layout) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users[a] {
		return nil
	}
	if l != d.layout {
		if len(d.users) > 0 {
			return errConflict
		}
		if err := d.e.front.Room(d.task, l.length); err != nil {
			return fault("%w, as it says", err)
		}
		d.in.Restart()
		if err := d.in.Truncate(l.length); err != nil {
			return err
		}
		d.layout, d.prefix, d.stale = l, 0, false
		clear(d.have)
	}
	d.users[a] = true
	return nil
}

// leave says that a peer is not fetched from any more.
func (d *download) leave(a *attempt) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.users, a)
}

// has reports whether a piece has come already, with the MD5 that it is said to have. d.mu is
// held. It is a conflict where it has another one, and other peers are fetched from.
//
// So what has come is what all of them tell of: should the whole turn out to be something
// else, each has vouched for all of it.
func (d *download) has(piece *commonv1.PieceInfo) (bool, error) {
	sum, here := d.have[spanOf(piece)]
	if here && sum != piece.GetPieceMd5() && len(d.users) > 1 {
		return false, errConflict
	}
	return here && sum == piece.GetPieceMd5(), nil
}

// claim claims a piece for a peer, when no other one that is not slow gives it. It returns nil where
// the piece has come.
func (d *download) claim(ctx context.Context, a *attempt, piece *commonv1.PieceInfo) (*claim, error) {
	at := spanOf(piece)
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if here, err := d.has(piece); here || err != nil {
			return nil, err
		}
		other := d.claims[at]
		if other == nil || other.by.watch.isSlow() && !a.watch.isSlow() {
			c := &claim{by: a, before: other, done: make(chan struct{})}
			c.ctx, c.end = context.WithCancelCause(ctx)
			d.claims[at] = c
			d.drop(at) // what another one has told of, and is written over now
			if other != nil {
				other.end(errTaken)
			}
			return c, nil
		}
		slow := other.by.watch.slow
		if a.watch.isSlow() {
			slow = nil
		}
		d.mu.Unlock()
		release := a.watch.hold() // it is not this one that is waited for
		select {
		case <-other.done:
		case <-slow:
		case <-ctx.Done():
		}
		release()
		d.mu.Lock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// release gives a claim back.
func (d *download) release(c *claim, piece *commonv1.PieceInfo) {
	c.end(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	if at := spanOf(piece); d.claims[at] == c {
		delete(d.claims, at)
	}
	close(c.done)
}

// fetch has a piece come: from this peer, or from another one that is faster.
func (d *download) fetch(ctx context.Context, a *attempt, from source, piece *commonv1.PieceInfo) error {
	for {
		c, err := d.claim(ctx, a, piece)
		if c == nil {
			return err
		}
		if err = d.fetchClaimed(c, from, piece); !errors.Is(err, errTaken) {
			return err
		}
	}
}

func (d *download) fetchClaimed(c *claim, from source, piece *commonv1.PieceInfo) error {
	defer d.release(c, piece)
	if c.before != nil {
		<-c.before.done
		d.mu.Lock()
		here, err := d.has(piece)
		d.mu.Unlock()
		if here || err != nil {
			return err
		}
	}
	err := d.piece(c.ctx, c.by.watch, from, piece)
	if err != nil && errors.Is(context.Cause(c.ctx), errTaken) {
		return errTaken
	}
	if err == nil {
		defer c.by.watch.hold()() // a scheduler that is slow is not this peer's fault
		d.succeed(c.by.id, piece)
	}
	return err
}

// watchdog ends a context when nothing has happened for a while, and nobody holds it. It is
// safe for concurrent use.
type watchdog struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	limit time.Duration
	timer *time.Timer   // fires when half of the limit has passed
	slow  chan struct{} // closed when that happened once
	once  sync.Once     // closes it

	mu   sync.Mutex
	half bool // of the limit has passed
	held int
}

func newWatchdog(ctx context.Context, limit time.Duration) *watchdog {
	w := &watchdog{limit: limit, slow: make(chan struct{})}
	w.ctx, w.end = context.WithCancelCause(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(limit/2, w.look)
	return w
}

// look looks at the clock.
func (w *watchdog) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held == 0 && w.half {
		w.end(throttle.ErrStalled)
		return
	}
	if w.held == 0 {
		w.half = true
		w.markSlow()
	}
	w.timer.Reset(w.limit / 2)
}

// kick says that something has happened.
func (w *watchdog) kick() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.half = false
	w.timer.Reset(w.limit / 2)
}

// hold says that something else is waited for, until the function is called that it returns.
func (w *watchdog) hold() (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held++
	return func() {
		w.mu.Lock()
		w.held--
		w.mu.Unlock()
		w.kick()
	}
}

// markSlow says that the peer is slow.
func (w *watchdog) markSlow() { w.once.Do(func() { close(w.slow) }) }

// isSlow reports whether the peer was slow once.
func (w *watchdog) isSlow() bool {
	select {
	case <-w.slow:
		return true
	default:
		return false
	}
}

// bit reports whether nothing has happened for too long.
func (w *watchdog) bit() bool { return errors.Is(context.Cause(w.ctx), throttle.ErrStalled) }

func (w *watchdog) stop() {
	w.timer.Stop()
	w.end(nil)
}
