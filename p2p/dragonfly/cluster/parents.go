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

// fromParents fetches from the peers of the queue, and then from those that the scheduler
// names, until what has come is what was asked for: from one peer, and where that is slow from another
// beside it. problem is what is wrong so far.
func (d *download) fromParents(ctx context.Context, queue []parent, problem error) error {
	var (
		running []*attempt // in the order in which they began; all but the last are slow
		ended   = make(chan *attempt)
		begun   int
		known   = map[parent]bool{}
		later   []parent // that made way for another
		packets = d.packets
		over    error // why the scheduler names no more
		limit   = time.NewTimer(d.e.opts.StallTimeout)
	)
	defer limit.Stop()
	begin := func(p parent) {
		a := &attempt{parent: p, watch: newWatchdog(ctx, d.e.opts.StallTimeout)}
		running = append(running, a)
		begun++
		go func() {
			a.err = d.from(a)
			ended <- a
		}()
	}
	for _, p := range queue {
		known[p] = true
	}
	stop := func() { // all of them, for another one
		for _, a := range running {
			a.watch.stop()
			later = append(later, a.parent)
		}
		for range running {
			d.leave(<-ended)
		}
		running = nil
	}
	defer stop()
	for {
		next := len(running) == 0 || running[len(running)-1].watch.isSlow()
		if next && begun < maxParents {
			if len(queue) == 0 && len(running) == 0 {
				queue, later = later, nil
			}
			if len(queue) > 0 {
				begin(queue[0])
				queue = queue[1:]
				continue
			}
			for _, a := range running {
				d.giveUp(a) // has the scheduler name others
			}
		}
		if len(running) == 0 {
			switch {
			case begun >= maxParents:
				return fmt.Errorf("%w (as %d others)", problem, maxParents-1)
			case over != nil && problem == nil:
				return over
			case over != nil:
				return fmt.Errorf("%w (and there is no other peer)", problem)
			}
		}
		var slow <-chan struct{}
		var waited <-chan time.Time
		if len(running) == 0 {
			waited = limit.C
		} else if !next {
			slow = running[len(running)-1].watch.slow
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-slow:
		case <-waited:
			return fmt.Errorf("scheduler %s: %w: it named no peer within %s", d.scheduler.addr, wire.ErrAway, d.e.opts.StallTimeout)
		case packet, more := <-packets:
			var named []parent
			if named, over = d.parents(packet, more); over != nil {
				packets = nil
			}
			for _, p := range named {
				if !known[p] && len(known) < maxParents {
					queue = append(queue, p)
					known[p] = true
				}
			}
		case a := <-ended:
			a.watch.stop()
			running = slices.DeleteFunc(running, func(other *attempt) bool { return other == a })
			limit.Reset(d.e.opts.StallTimeout)
			err := a.err
			if err == nil {
				if err = d.e.front.Take(ctx, d.task, d.file); err == nil {
					return nil
				}
				if errors.Is(err, digest.ErrMismatch) {
					err = fault("peer %s at %s gave something else: %w", a.id, a.addr, err)
					stop()
					d.forget()
				}
			}
			d.leave(a)
			if errors.Is(err, errConflict) {
				problem = cmp.Or(problem, err)
				if len(running) > 0 && a.watch.isSlow() {
					later = append(later, a.parent)
				} else { // the others are slow: it is this one's turn
					stop()
					queue = slices.Insert(queue, 0, a.parent)
				}
				continue
			}
			if context.Cause(ctx) != nil || !isPeersFault(err) {
				return err
			}
			problem = err
			d.e.log.Warn("a peer of Dragonfly was given up", "task", d.task.String(), "peer", a.id, "address", a.addr.String(), "error", err)
			d.giveUp(a)
		}
	}
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
		if err := d.e.front.Room(d.task, l.length); err != nil { // the scheduler may not have known
			return err
		}
		clear(d.have)
		if err := d.file.Truncate(l.length); err != nil {
			return err
		}
		d.layout = l
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

// forget forgets what has come.
func (d *download) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.have)
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
			delete(d.have, at) // what another one has told of, and is written over now
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
