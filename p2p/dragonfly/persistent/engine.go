// Package persistent is the engine that has a Dragonfly of the API v2 for its network,
// whose dfdaemon is the one in Rust: a store of this host, and the persistent cache
// tasks of d7y.io/api/v2, over the unix socket of the dfdaemon beside it.
//
// Package whole has what this engine shares with the others on Dragonfly. A blob is
// verified while it is copied for Dragonfly, which keeps a hard link of what it gets, so
// that no file of the store is ever handed out. What comes back comes as pieces over the
// socket, and is stored only where it has the digest that was asked for.
package persistent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	commonv2 "d7y.io/api/v2/pkg/apis/common/v2"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Options says how to use a Dragonfly. Where a value is zero, its default counts.
type Options struct {
	// Socket is the path of the unix socket of Dragonfly's dfdaemon. The default is
	// [DefaultSocket].
	Socket string
	// Schedulers are the addresses of schedulers of its cluster, HOST:PORT. One of them
	// has to answer for a task to be deleted.
	Schedulers []string

	LookupTimeout time.Duration // of asking whether something is there; 3 s
	Timeout       time.Duration // of an import or an export; 10 min
	StallTimeout  time.Duration // without a piece, which has 64 MiB at most, after which an export is given up; 1 min
	TTL           time.Duration // of what Dragonfly gets, which no call extends, 5 min to 7 days; 7 days
	SweepInterval time.Duration // between looking for what Dragonfly has not got any more; 10 min

	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
}

const (
	// DefaultSocket is where Dragonfly's dfdaemon listens if it is not told otherwise.
	DefaultSocket = "/var/run/dragonfly/dfdaemon.sock"
	// DefaultTimeout bounds an import or an export.
	DefaultTimeout = 10 * time.Minute

	// deleteTimeout bounds what a scheduler does for one delete: it asks every host that
	// has the task.
	deleteTimeout = 10 * time.Second
	// settle is how much longer than its timeout an import can be under way elsewhere. One
	// that takes longer was broken off.
	settle = time.Minute
)

// What a task can be at the scheduler. One that is neither is on its way there, or was
// broken off.
const (
	stateSucceeded = "Succeeded"
	stateFailed    = "Failed"
)

// Engine is a store that has a Dragonfly of the API v2 for its network. It implements
// [p2p.Engine], and is safe for concurrent use.
//
// Dragonfly tells the size of a task: Stat fetches only what could be a manifest. Of
// Info.Holders, the one that is asked is Dragonfly's scheduler: it holds a task where it
// knows of a host that has it, which may be this one.
//
// What is committed is handed to Dragonfly, with what it refers to, before Commit
// returns. Where that fails, Commit does, and says that the content is stored on this
// host; to commit the same again makes up for it.
//
// Dragonfly drops what its TTL is over for. So all that the store holds is handed in
// again, every SweepInterval, where Dragonfly does not have it.
//
// Every task that is deleted here is deleted by Dragonfly on all hosts that it reaches;
// stores like this one on other hosts keep theirs.
type Engine struct {
	*whole.Engine
	opts     Options
	dir      string // for what is on its way from and to Dragonfly
	upstream *client

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup // sweeps, and what is taken back
}

var _ p2p.Engine = (*Engine)(nil)

// New gives a store a Dragonfly for its network. The Engine takes over the store:
// it closes it. What an earlier one has left in the directory "dragonfly" of the
// store is removed. Dragonfly's dfdaemon has to reach that directory under the same
// path, and to read there, which root can. It need not run yet; [Engine.Health] says
// whether it does.
func New(store *pieces.Store, opts Options) (*Engine, error) {
	if opts.Socket == "" {
		opts.Socket = DefaultSocket
	}
	for d, value := range map[*time.Duration]time.Duration{
		&opts.LookupTimeout: 3 * time.Second, &opts.Timeout: DefaultTimeout, &opts.StallTimeout: time.Minute, &opts.TTL: 7 * 24 * time.Hour, &opts.SweepInterval: 10 * time.Minute,
	} {
		if *d == 0 {
			*d = value
		}
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if len(opts.Schedulers) == 0 {
		return nil, errors.New("no scheduler of Dragonfly is named: nothing could be deleted there")
	}
	dir, err := whole.Dir(store)
	if err != nil {
		return nil, err
	}
	upstream, err := newClient(opts.Socket, opts.Schedulers)
	if err != nil {
		return nil, err
	}
	e := &Engine{opts: opts, dir: dir, upstream: upstream}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.Engine = whole.New(store, network{e}, whole.Options{Log: opts.Log})
	e.background.Go(func() {
		e.SweepEvery(e.ctx, opts.SweepInterval, func(ctx context.Context, task p2p.Task, _ int) error { return e.handInBlob(ctx, task) })
	})
	return e, nil
}

// network is what [whole.Engine] sees of Dragonfly.
type network struct{ *Engine }

// Health implements [whole.Network].
func (n network) Health(ctx context.Context) error {
	return n.upstream.health(ctx, n.opts.LookupTimeout)
}

// Stop ends handing in.
func (n network) Stop() { n.cancel() }

// Close leaves Dragonfly as it is.
func (n network) Close() error {
	n.background.Wait()
	return n.upstream.close()
}

// Size implements [whole.Network].
func (n network) Size(ctx context.Context, task p2p.Task) (int64, error) {
	got, err := n.find(ctx, task)
	if err != nil {
		return 0, err
	}
	return int64(got.GetContentLength()), nil
}

// Holders implements [whole.Network].
func (n network) Holders(ctx context.Context, task p2p.Task) (*p2p.Holders, error) {
	_, err := n.find(ctx, task)
	return n.HoldersOf(ctx, task, err)
}

// Deletable implements [whole.Network]: Dragonfly may have what was never here.
func (n network) Deletable(ctx context.Context, task p2p.Task) error {
	_, err := n.upstream.stat(ctx, task, p2p.ErrUnavailable, n.opts.LookupTimeout)
	return err
}

// replicas is how many hosts Dragonfly has a task on.
func replicas(task *commonv2.PersistentCacheTask) uint64 {
	return max(task.GetCurrentReplicaCount(), task.GetCurrentPersistentReplicaCount())
}

// find returns a task that Dragonfly can give. The error matches [p2p.ErrNotFound] where
// there is none.
func (e *Engine) find(ctx context.Context, task p2p.Task) (*commonv2.PersistentCacheTask, error) {
	got, err := e.upstream.stat(ctx, task, wire.ErrAway, e.opts.LookupTimeout)
	if err != nil {
		return nil, err
	}
	if got.GetState() != stateSucceeded || replicas(got) == 0 {
		return nil, fmt.Errorf("stat %s: %w: Dragonfly has not got it yet, or not any more: it is %s, on %d hosts", task, p2p.ErrNotFound, got.GetState(), replicas(got))
	}
	return got, nil
}

// Bring implements [whole.Network].
func (n network) Bring(ctx context.Context, task p2p.Task) error {
	found, err := n.find(ctx, task)
	if err == nil {
		err = n.Room(task, int64(found.GetContentLength()))
	}
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(n.dir, "")
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, pieces.DiskError(err))
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := n.upstream.download(ctx, task, f, int64(found.GetContentLength()), n.opts.Timeout, n.opts.StallTimeout, n.opts.LookupTimeout); err != nil {
		return err
	}
	err = n.Take(ctx, task, f)
	if errors.Is(err, digest.ErrMismatch) {
		err = fmt.Errorf("%w: what Dragonfly has under this digest is something else: delete it, and import the file again", err)
	}
	if err != nil {
		return fmt.Errorf("fetch %s from Dragonfly: %w", task, err)
	}
	return nil
}

// Offer implements [whole.Network].
func (n network) Offer(ctx context.Context, tasks []p2p.Task) error {
	return n.HandIn(ctx, tasks, n.handInBlob)
}

// handInBlob has Dragonfly import a blob where it does not have it. Where another host
// does so just now, that is enough.
func (e *Engine) handInBlob(ctx context.Context, task p2p.Task) error {
	hand := func(blob *pieces.Blob) error {
		got, err := e.upstream.stat(ctx, task, p2p.ErrUnavailable, e.opts.LookupTimeout)
		switch state := got.GetState(); {
		case errors.Is(err, p2p.ErrNotFound):
		case err != nil:
			return err
		case state == stateSucceeded && replicas(got) > 0 && got.GetContentLength() == uint64(blob.Size()):
			return nil
		case state != stateSucceeded && state != stateFailed && time.Since(got.GetUpdatedAt().AsTime()) < e.opts.Timeout+settle:
			return nil
		default:
			// It is in the way: without content, with another, or broken off.
			if err := e.upstream.delete(ctx, task); err != nil {
				return err
			}
		}
		return e.copyIn(ctx, task, blob)
	}
	return e.HandInBlob(ctx, task, hand, func() error { return e.upstream.delete(ctx, task) })
}

// copyIn has Dragonfly import a copy of a blob.
func (e *Engine) copyIn(ctx context.Context, task p2p.Task, blob *pieces.Blob) error {
	f, err := os.CreateTemp(e.dir, "")
	if err != nil {
		return fmt.Errorf("import %s: %w", task, pieces.DiskError(err))
	}
	defer os.Remove(f.Name())
	err = blob.CopyRange(ctx, f, 0, blob.Size(), nil)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("import %s: %w", task, pieces.DiskError(err))
	}
	err = e.upstream.upload(ctx, task, f.Name(), e.opts.TTL, e.opts.Timeout)
	if err == nil || errors.Is(err, errKnown) {
		return nil
	}
	// What it has begun would be in the way for as long as its TTL.
	takeBack := func() {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
		defer cancel()
		if failed := e.upstream.delete(limited, task); failed != nil {
			e.opts.Log.Warn("an import that failed could not be taken back in Dragonfly: it is in the way until another one is made, later", "task", task.String(), "error", failed)
		}
	}
	if ctx.Err() != nil {
		e.background.Go(takeBack) // nobody waits for it who has given up
	} else {
		takeBack()
	}
	return err
}

// Forget implements [whole.Network]: it has Dragonfly delete tasks on all hosts.
func (n network) Forget(ctx context.Context, tasks []p2p.Task, held bool) (missed []p2p.Missed) {
	miss := func(reason string) {
		missed = append(missed, p2p.Missed{Peer: "Dragonfly", Address: n.opts.Socket, Reason: reason})
	}
	own := uint64(0)
	if held {
		own = 1
	}
	others := false
	for _, task := range tasks {
		if got, err := n.upstream.stat(ctx, task, p2p.ErrUnavailable, n.opts.LookupTimeout); err == nil && replicas(got) > own {
			others = true
		}
		if err := n.upstream.delete(ctx, task); err != nil {
			miss(fmt.Sprintf("%v: delete it again by this digest", err))
			return missed // the others are as this one
		}
	}
	if others {
		miss("other hosts had it. Dragonfly has deleted its own there, but a dfdaemon beside it keeps what it has fetched, and hands it in again: delete it on each of them")
	}
	return missed
}
