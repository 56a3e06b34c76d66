// Package persistent is the source that is a Dragonfly of the API v2, whose dfdaemon is the
// one in Rust: its persistent cache tasks, over the unix socket of the dfdaemon on this host.
//
// Package whole has what this source shares with the others that are a Dragonfly. A blob is
// verified while it is copied for Dragonfly, which keeps a hard link of what it gets, so
// that no file of the store is ever handed out. What comes back comes as pieces over the
// socket, and is stored only where it has the digest that was asked for.
//
// It promises no compatibility.
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
	"github.com/dfcache/dfcache/p2p/front"
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

// Source is a Dragonfly of the API v2. It implements [front.Source], and is safe for concurrent
// use.
//
// Dragonfly tells the size of a task: Stat fetches only what could be a manifest. Of
// Info.Providers, the one that is asked is Dragonfly's scheduler: it holds a task where it
// knows of a host that has it, which may be this one.
//
// What is committed is handed to Dragonfly, with what it refers to, before Commit
// returns. Where that fails, Commit does, and says that the content is stored on this
// host; to commit the same again makes up for it.
//
// Dragonfly drops what its TTL is over for. So all that the store holds is handed in
// again, every SweepInterval and when Dragonfly's dfdaemon was away, where Dragonfly does not have it.
//
// Every task that is deleted here is deleted by Dragonfly on all hosts that it reaches;
// stores like this one on other hosts keep theirs.
type Source struct {
	front    *front.Engine
	store    *pieces.Store
	opts     Options
	dir      string // for what is on its way from and to Dragonfly
	upstream *client

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup // sweeps, and what is taken back
}

var _ front.Source = (*Source)(nil)

// New makes a Dragonfly one of an engine's sources. What an earlier one has left in the directory
// "dragonfly" of the store is removed. Dragonfly's dfdaemon has to reach that directory under the same
// path, and to read there, which root can. It need not run yet; [Source.Health] says
// whether it does.
func New(f *front.Engine, opts Options) (*Source, error) {
	if opts.Socket == "" {
		opts.Socket = DefaultSocket
	}
	for d, value := range map[*time.Duration]time.Duration{
		&opts.LookupTimeout: 3 * time.Second, &opts.Timeout: DefaultTimeout, &opts.StallTimeout: time.Minute,
		&opts.TTL: 7 * 24 * time.Hour, &opts.SweepInterval: 10 * time.Minute,
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
	dir, err := whole.Dir(f.Store())
	if err != nil {
		return nil, err
	}
	upstream, err := newClient(opts.Socket, opts.Schedulers)
	if err != nil {
		return nil, err
	}
	e := &Source{front: f, store: f.Store(), opts: opts, dir: dir, upstream: upstream}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	now := make(chan struct{}, 1)
	e.background.Go(func() { whole.SweepEvery(e.ctx, e.store, opts.Log, opts.SweepInterval, now, e.handInBlob) })
	// It has dropped all that it had, unless it is told to keep it.
	e.background.Go(func() { wire.OnReturn(e.ctx, upstream.conn, func() { whole.Soon(now) }) })
	f.Add(e)
	return e, nil
}

// Health asks whether Dragonfly answers. The error matches [p2p.ErrUnavailable] where it does not.
func (e *Source) Health(ctx context.Context) error {
	return e.upstream.health(ctx, e.opts.LookupTimeout)
}

// Stop implements [front.Source]: it ends handing in.
func (e *Source) Stop() { e.cancel() }

// Close implements [front.Source]: it leaves Dragonfly as it is.
func (e *Source) Close() error {
	e.background.Wait()
	return e.upstream.close()
}

// Name implements [front.Source].
func (e *Source) Name() string { return whole.Name }

// Find implements [front.Source].
func (e *Source) Find(ctx context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	got, err := e.find(ctx, task)
	return whole.Found(ctx, e.opts.Log, task, int64(got.GetContentLength()), err, opts)
}

// See implements [front.Source].
func (e *Source) See(
	ctx context.Context, tag string, cid digest.CID, _ p2p.DeleteOptions, held bool,
) (front.Seen, error) {
	return whole.See(ctx, tag, cid, held, func(ctx context.Context, task p2p.Task) error {
		_, err := e.upstream.stat(ctx, task, p2p.ErrUnavailable, e.opts.LookupTimeout)
		return err
	}), nil
}

// replicas is how many hosts Dragonfly has a task on.
func replicas(task *commonv2.PersistentCacheTask) uint64 {
	return max(task.GetCurrentReplicaCount(), task.GetCurrentPersistentReplicaCount())
}

// find returns a task that Dragonfly can give. The error matches [p2p.ErrNotFound] where
// there is none.
func (e *Source) find(ctx context.Context, task p2p.Task) (*commonv2.PersistentCacheTask, error) {
	got, err := e.upstream.stat(ctx, task, wire.ErrAway, e.opts.LookupTimeout)
	if err != nil {
		return nil, err
	}
	if got.GetState() != stateSucceeded || replicas(got) == 0 {
		return nil, fmt.Errorf("stat %s: %w: Dragonfly has not got it yet, or not any more: it is %s, on %d hosts",
			task, p2p.ErrNotFound, got.GetState(), replicas(got))
	}
	return got, nil
}

// Fetch implements [front.Source]. The blob is stored when it returns.
func (e *Source) Fetch(ctx context.Context, task p2p.Task, _ bool) (p2p.Blob, error) {
	return nil, e.front.Once(ctx, task, func(ctx context.Context) error { return e.bring(ctx, task) })
}

func (e *Source) bring(ctx context.Context, task p2p.Task) error {
	found, err := e.find(ctx, task)
	if err == nil {
		err = e.front.Room(task, int64(found.GetContentLength()))
	}
	if err != nil {
		return err
	}
	in, err := e.front.Receive(ctx, task)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, err)
	}
	defer in.Close()
	size, err := e.upstream.download(ctx, task, in, int64(found.GetContentLength()),
		func(size int64) error { return e.front.Room(task, size) }, limits{e.opts.Timeout, e.opts.StallTimeout,
			e.opts.LookupTimeout})
	if err != nil {
		return err
	}
	err = in.Keep(size)
	if errors.Is(err, digest.ErrMismatch) {
		err = fmt.Errorf(
			"%w: what Dragonfly has under this digest is something else: delete it, and import the file again", err)
	}
	if err != nil {
		return fmt.Errorf("fetch %s from Dragonfly: %w", task, err)
	}
	return nil
}

// Offer implements [front.Source].
func (e *Source) Offer(ctx context.Context, c p2p.Commit) error {
	return whole.HandIn(ctx, e.store, whole.Tasks(c), e.handInBlob)
}

// handInBlob has Dragonfly import a blob where it does not have it. Where another host
// does so just now, that is enough.
func (e *Source) handInBlob(ctx context.Context, task p2p.Task) error {
	hand := func(blob *pieces.Blob) error {
		got, err := e.upstream.stat(ctx, task, p2p.ErrUnavailable, e.opts.LookupTimeout)
		switch state := got.GetState(); {
		case errors.Is(err, p2p.ErrNotFound):
		case err != nil:
			return err
		case state == stateSucceeded && replicas(got) > 0 && got.GetContentLength() == uint64(blob.Size()):
			return nil
		case state != stateSucceeded && state != stateFailed &&
			time.Since(got.GetUpdatedAt().AsTime()) < e.opts.Timeout+settle:
			return nil
		default:
			// It is in the way: without content, with another, or broken off.
			if err := e.upstream.delete(ctx, task); err != nil {
				return err
			}
		}
		return e.copyIn(ctx, task, blob)
	}
	return whole.HandInBlob(ctx, e.store, task, hand, func() error { return e.upstream.delete(ctx, task) })
}

// copyIn has Dragonfly import a copy of a blob.
func (e *Source) copyIn(ctx context.Context, task p2p.Task, blob *pieces.Blob) error {
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
			e.opts.Log.Warn("an import that failed could not be taken back in Dragonfly: it is in the way until "+
				"another one is made, later", "task", task.String(), "error", failed)
		}
	}
	if ctx.Err() != nil {
		e.background.Go(takeBack) // a caller that has given up does not wait for it
	} else {
		takeBack()
	}
	return err
}

// Forget implements [front.Source]: it has Dragonfly delete tasks on all hosts.
func (e *Source) Forget(ctx context.Context, d front.Deletion) (missed []front.Told) {
	miss := func(reason string) {
		missed = append(missed, front.Told{Peer: whole.Name, Address: e.opts.Socket, Failed: reason})
	}
	own := uint64(0)
	if d.Held {
		own = 1
	}
	others := false
	for _, task := range d.Tasks {
		if got, err := e.upstream.stat(ctx, task, p2p.ErrUnavailable, e.opts.LookupTimeout); err == nil &&
			replicas(got) > own {
			others = true
		}
		if err := e.upstream.delete(ctx, task); err != nil {
			miss(fmt.Sprintf("%v: delete it again by this digest", err))
			return missed // the others are as this one
		}
	}
	if others {
		miss("other hosts had it. Dragonfly has deleted its own there, but a dfdaemon beside it keeps what it has " +
			"fetched, and hands it in again: delete it on each of them")
	}
	return missed
}
