// Package dragonfly is the source that is a Dragonfly beside this daemon: its dfdaemon on this
// host, over the v1 API of d7y.io/api/v2 on its unix socket.
//
// Package whole has what this source shares with that of package cluster. Dragonfly gets the blobs of the store
// that are committed, and gives those that are missing here. It moves them as files,
// which both daemons have to reach under the same path, and verifies nothing. So a
// blob is verified before Dragonfly gets it, and what Dragonfly gives is copied,
// and stored only where it has the digest that was asked for.
//
// It promises no compatibility.
package dragonfly

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Options says how to use a Dragonfly. Where a value is zero, its default counts.
type Options struct {
	// Socket is the path of the unix socket of Dragonfly's dfdaemon. The default is
	// [DefaultSocket].
	Socket string

	LookupTimeout time.Duration // of asking whether something is there; 3 s
	Timeout       time.Duration // of an import or an export; 10 min
	SweepInterval time.Duration // between handing in what the store holds once more; 1 h

	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
}

const (
	// DefaultSocket is where Dragonfly's dfdaemon listens if it is not told otherwise.
	DefaultSocket = "/var/run/dfdaemon.sock"
	// DefaultTimeout bounds an import or an export.
	DefaultTimeout = 10 * time.Minute

	// refillEvery is how long what Dragonfly has dropped while it ran, and got again, is not handed in once
	// more: where it has no room for all, one would drive out the other with every sweep.
	refillEvery = 24 * time.Hour
	// maxRefilled is of how many tasks that is known.
	maxRefilled = 1 << 16
	// deleteTimeout bounds what Dragonfly does for one delete of ours.
	deleteTimeout = 10 * time.Second
)

// Source is a Dragonfly, as its dfdaemon on this host gives and takes. It implements
// [front.Source], and is safe for concurrent use.
//
// Dragonfly tells of a task only whether it has it: Stat fetches what is not here. Of
// Info.Providers, the one that is asked is Dragonfly's dfdaemon: it holds a task where it,
// or a Dragonfly peer that it knows of, does.
//
// What is committed is handed to Dragonfly, with what it refers to, before Commit
// returns. Where that fails, Commit does, and says that the content is stored on this
// host; to commit the same again makes up for it.
//
// Dragonfly drops what nobody has used for a while, and its scheduler forgets. So all that
// the store holds is asked for and handed in again: every hour, and at once when Dragonfly's
// dfdaemon was away. What it has dropped while it ran it gets again at most once a day.
//
// Every task that is deleted here is deleted by Dragonfly's dfdaemon of this host, too.
type Source struct {
	front    *front.Engine
	store    *pieces.Store
	opts     Options
	dir      string // for what comes from Dragonfly and is not verified yet
	upstream *client
	log      *slog.Logger

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup // sweeps
	sweepNow   chan struct{}

	mu       sync.Mutex
	refilled map[p2p.Task]time.Time // what Dragonfly had dropped, and when it got it again

	schedulerMu    sync.Mutex // held while Dragonfly's scheduler is asked
	schedulerErr   error      // of the last time
	schedulerAsked time.Time
	awaiting       atomic.Bool // whether it is waited for
}

var _ front.Source = (*Source)(nil)

// New makes a Dragonfly one of an engine's sources. What an earlier one has left in the directory
// "dragonfly" of the store is removed. Dragonfly's dfdaemon has to reach the store's directory under the
// same path, and to read and write there, which root can. It need not run yet;
// [Source.Health] says whether it does.
func New(f *front.Engine, opts Options) (*Source, error) {
	if opts.Socket == "" {
		opts.Socket = DefaultSocket
	}
	if opts.LookupTimeout == 0 {
		opts.LookupTimeout = 3 * time.Second
	}
	if opts.Timeout == 0 {
		opts.Timeout = DefaultTimeout
	}
	if opts.SweepInterval == 0 {
		opts.SweepInterval = time.Hour
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	dir, err := whole.Dir(f.Store())
	if err != nil {
		return nil, err
	}
	upstream, err := newClient(opts.Socket)
	if err != nil {
		return nil, err
	}
	e := &Source{front: f, store: f.Store(), opts: opts, dir: dir, upstream: upstream, log: opts.Log,
		sweepNow: make(chan struct{}, 1), refilled: map[p2p.Task]time.Time{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.background.Go(func() {
		whole.SweepEvery(e.ctx, e.store, opts.Log, opts.SweepInterval, e.sweepNow, e.sweep)
	})
	e.background.Go(func() { wire.OnReturn(e.ctx, upstream.conn, e.returned) })
	f.Add(e)
	return e, nil
}

// returned has all be looked for again in a Dragonfly that was away: it may have lost everything.
func (e *Source) returned() {
	e.mu.Lock()
	clear(e.refilled)
	e.mu.Unlock()
	whole.Soon(e.sweepNow)
}

// sweep asks whether Dragonfly's dfdaemon has a task of the store, and hands it in once more; what it
// has dropped only where it has not got it again lately.
func (e *Source) sweep(ctx context.Context, task p2p.Task) error {
	e.mu.Lock()
	last, again := e.refilled[task]
	if again = again && time.Since(last) < refillEvery; !again {
		if len(e.refilled) >= maxRefilled {
			clear(e.refilled)
		}
		e.refilled[task] = time.Now() // before it is asked: an import that comes meanwhile takes that back
	}
	e.mu.Unlock()
	dropped := false
	err := e.handInIf(ctx, task, func() bool {
		dropped = true
		return !again
	})
	if !dropped && !again {
		e.forgive(task)
	}
	return err
}

// forgive says that Dragonfly has a task.
func (e *Source) forgive(task p2p.Task) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.refilled, task)
}

// Health asks whether Dragonfly answers. The error matches [p2p.ErrUnavailable] where it does not.
func (e *Source) Health(ctx context.Context) error {
	return e.upstream.health(ctx, e.opts.LookupTimeout)
}

// Name implements [front.Source].
func (e *Source) Name() string { return whole.Name }

// Find implements [front.Source]: Dragonfly tells no sizes.
func (e *Source) Find(ctx context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	return whole.Found(ctx, e.log, task, -1, e.upstream.stat(ctx, task, false, e.opts.LookupTimeout), opts)
}

// See implements [front.Source].
func (e *Source) See(
	ctx context.Context, tag string, cid digest.CID, _ p2p.DeleteOptions, held bool,
) (front.Seen, error) {
	return whole.See(ctx, tag, cid, held, func(ctx context.Context, task p2p.Task) error {
		return e.upstream.stat(ctx, task, true, e.opts.LookupTimeout)
	}), nil
}

// Stop implements [front.Source]: it ends handing in.
func (e *Source) Stop() { e.cancel() }

// Close implements [front.Source]: it leaves Dragonfly's dfdaemon as it is.
func (e *Source) Close() error {
	e.background.Wait()
	return e.upstream.close()
}

// Fetch implements [front.Source]. The blob is stored when it returns.
func (e *Source) Fetch(ctx context.Context, task p2p.Task, _ bool) (p2p.Blob, error) {
	return nil, e.front.Once(ctx, task, func(ctx context.Context) error { return e.bring(ctx, task) })
}

// bring has Dragonfly export a task's blob, and stores it.
func (e *Source) bring(ctx context.Context, task p2p.Task) error {
	if err := e.upstream.stat(ctx, task, false, e.opts.LookupTimeout); err != nil {
		return err
	}
	// Should Dragonfly go on to write when we have given up, there is no directory any more.
	dir, err := os.MkdirTemp(e.dir, "")
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			e.log.Warn("what came from Dragonfly could not be removed; the next start will", "error", err)
		}
	}()
	output := filepath.Join(dir, "content")
	if err := e.upstream.export(ctx, task, output, e.opts.Timeout); err != nil {
		return err
	}
	err = e.take(ctx, task, output)
	e.giveBack(ctx, task, dir, err)
	if err != nil {
		return fmt.Errorf("fetch %s from Dragonfly: %w", task, err)
	}
	return nil
}

// giveBack sees to it that Dragonfly has of a task that it has exported to a directory what it says
// it has. taken is why it was not taken. What is something else than what was asked for Dragonfly is not
// to have: it would give that again, also to others. And with its storage strategy "advance" the file of
// its cache is in the directory, and goes with it: it has to have another one, or know that it has none.
func (e *Source) giveBack(ctx context.Context, task p2p.Task, dir string, taken error) {
	wrong := errors.Is(taken, digest.ErrMismatch)
	if entries, err := os.ReadDir(dir); err == nil && len(entries) <= 1 && !wrong {
		return
	}
	err := e.drop(context.WithoutCancel(ctx), task)
	if err == nil && taken == nil {
		err = e.handInBlob(ctx, task)
	}
	switch {
	case err != nil && wrong:
		e.log.Warn("Dragonfly keeps something else under a digest on this host: delete it there", "task", task.String(),
			"error", err)
	case err != nil:
		e.log.Warn("Dragonfly has lost what it has fetched: other hosts may ask it in vain", "task", task.String(),
			"error", err)
	}
}

// drop has Dragonfly's dfdaemon delete a task. Imports and fetches at the same time each leave a
// copy, of which one is deleted at a time.
func (e *Source) drop(ctx context.Context, task p2p.Task) error {
	err := e.upstream.delete(ctx, task)
	for range 3 {
		if err != nil || e.upstream.stat(ctx, task, true, e.opts.LookupTimeout) != nil {
			break
		}
		err = e.upstream.delete(ctx, task)
	}
	return err
}

// take copies a file that Dragonfly has exported to the store. It is never moved or
// linked there: it can be the file in Dragonfly's own cache, by another name.
func (e *Source) take(ctx context.Context, task p2p.Task, name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: Dragonfly's dfdaemon says that it has written %s, and there is nothing: it has to see "+
			"that directory under the same path", p2p.ErrUnavailable, name)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	err = e.front.Take(ctx, task, f)
	if errors.Is(err, digest.ErrMismatch) {
		err = fmt.Errorf("%w: what Dragonfly has brought under this digest is something else: it goes on this host; "+
			"where it comes from, delete it there, and import the file again", err)
	}
	return err
}

// Offer implements [front.Source].
func (e *Source) Offer(ctx context.Context, c p2p.Commit) error {
	if err := whole.HandIn(ctx, e.store, whole.Tasks(c), func(ctx context.Context, task p2p.Task) error {
		err := e.handInBlob(ctx, task)
		e.forgive(task) // a sweep that came before took it for dropped
		return err
	}); err != nil {
		return err
	}
	if tell := p2p.NoticeOf(ctx); tell != nil {
		if err := e.askScheduler(ctx); err != nil {
			e.awaitScheduler()
			tell(fmt.Sprintf("it is stored on this host, and Dragonfly has it here, but %s: %v",
				whole.NotFoundYet, err))
		}
	}
	return nil
}

// silence is for how long a scheduler that does not answer is not asked again.
const silence = 10 * time.Second

// nowhere is a task that nobody has: what Dragonfly's dfdaemon has itself it says without its scheduler.
var nowhere = p2p.Task{Digest: digest.SHA256.FromString("dfcache: does the scheduler answer?")}

// awaitScheduler has Dragonfly be told of everything once more when its scheduler answers again: its
// dfdaemon does so once with each import, and does not try again.
func (e *Source) awaitScheduler() {
	if e.awaiting.Swap(true) {
		return
	}
	e.background.Go(func() {
		defer e.awaiting.Store(false)
		tick := time.NewTicker(silence)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-e.ctx.Done():
				return
			}
			if e.askScheduler(e.ctx) == nil {
				whole.Soon(e.sweepNow)
				return
			}
		}
	})
}

// askScheduler asks whether Dragonfly's scheduler answers: its dfdaemon takes a file without it.
func (e *Source) askScheduler(ctx context.Context) error {
	e.schedulerMu.Lock()
	defer e.schedulerMu.Unlock()
	if e.schedulerErr != nil && time.Since(e.schedulerAsked) < silence {
		return e.schedulerErr
	}
	err := e.upstream.stat(ctx, nowhere, false, e.opts.LookupTimeout)
	if errors.Is(err, p2p.ErrNotFound) {
		err = nil
	}
	if ctx.Err() == nil {
		e.schedulerErr, e.schedulerAsked = err, time.Now()
	}
	return err
}

// handInBlob has Dragonfly import a blob, which is verified before where Dragonfly's
// dfdaemon does not have it yet. Where it has, it tells its scheduler once more.
func (e *Source) handInBlob(ctx context.Context, task p2p.Task) error {
	return e.handInIf(ctx, task, func() bool { return true })
}

// handInIf does what handInBlob does; what Dragonfly does not have it gets only where may says so.
func (e *Source) handInIf(ctx context.Context, task p2p.Task, may func() bool) error {
	hand := func(blob *pieces.Blob) error {
		err := e.upstream.stat(ctx, task, true, e.opts.LookupTimeout)
		if errors.Is(err, p2p.ErrNotFound) {
			if !may() {
				return nil
			}
			err = blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
		}
		if err != nil {
			return err
		}
		return e.upstream.importFile(ctx, task, blob.File().Name(), e.opts.Timeout)
	}
	return whole.HandInBlob(ctx, e.store, task, hand, func() error { return e.upstream.delete(ctx, task) })
}

// Forget implements [front.Source]: it has Dragonfly's dfdaemon delete tasks, and asks
// whether that was all.
func (e *Source) Forget(ctx context.Context, d front.Deletion) (missed []front.Told) {
	miss := func(reason string) {
		missed = append(missed, front.Told{Peer: whole.Name, Address: e.opts.Socket, Failed: reason})
	}
	limited, cancel := context.WithTimeoutCause(ctx, deleteTimeout,
		fmt.Errorf("the dfdaemon of Dragonfly at %s has not done it within %s", e.opts.Socket, deleteTimeout))
	defer cancel()
	for _, task := range d.Tasks {
		if err := e.drop(limited, task); err != nil {
			miss(fmt.Sprintf("%s: %v: delete it again by this digest", task, err))
		}
	}
	if len(missed) > 0 {
		return missed
	}
	for _, task := range d.Tasks {
		err := e.upstream.stat(ctx, task, false, e.opts.LookupTimeout)
		if errors.Is(err, p2p.ErrNotFound) {
			continue
		}
		if err == nil {
			miss(task.String() + ": Dragonfly's scheduler knows of hosts that have it still, and keep it: its delete " +
				"is of one host only, so delete it on each of them")
		} else {
			miss("whether other hosts of Dragonfly have it still is not known: " + err.Error())
		}
		break // the others are as this one
	}
	return missed
}
