// Package whole is what the engines that have Dragonfly for their network have in
// common: a store of this host, and a [Network] that knows blobs by their digests and
// moves whole ones.
//
// The store has what Dragonfly does not: names, lists, manifests and what refers to
// them, and the proof of every byte. What comes from the network is stored only where it
// has the digest that was asked for.
//
// What Dragonfly can't do is an error, or is said in the result: it knows no names, its
// delete is of one host, and it copies nothing to other hosts on request.
package whole

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Network is what there is beyond this host. Its methods are called side by side.
type Network interface {
	// Health asks whether the network answers. The error matches [p2p.ErrUnavailable]
	// where it does not.
	Health(ctx context.Context) error
	// Size asks for the size of a task in bytes, or returns -1 where the network can't
	// tell. The error matches [p2p.ErrNotFound] where nobody has the task.
	Size(ctx context.Context, task p2p.Task) (int64, error)
	// Holders asks who besides this host has a task.
	Holders(ctx context.Context, task p2p.Task) (*p2p.Holders, error)
	// Bring fetches a task, and hands it to [Engine.Take].
	Bring(ctx context.Context, task p2p.Task) error
	// Offer tells the network of tasks that were stored.
	Offer(ctx context.Context, tasks []p2p.Task) error
	// Deletable asks whether there is something to delete of a task that the store does
	// not have. The error matches [p2p.ErrNotFound] where there is not.
	Deletable(ctx context.Context, task p2p.Task) error
	// Forget tells the network of tasks that were deleted here, where they were held, and
	// returns what is not deleted elsewhere, as far as it is known.
	Forget(ctx context.Context, tasks []p2p.Task, held bool) []p2p.Missed
	// Stop ends what comes from the network, and Close the network, when no call is under
	// way any more.
	Stop()
	Close() error
}

// Options says how the engine behaves.
type Options struct {
	Log *slog.Logger
}

// Engine is a store that has Dragonfly for its network. It implements [p2p.Engine] and
// is safe for concurrent use.
type Engine struct {
	store   *pieces.Store
	network Network
	opts    Options

	ctx     context.Context // of fetches; ends with Close
	cancel  context.CancelCauseFunc
	running sync.WaitGroup // fetches

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu      sync.Mutex
	fetches map[digest.Digest]*fetch
}

var _ p2p.Engine = (*Engine)(nil)

// New gives a store a network. The Engine takes over both: it closes them.
func New(store *pieces.Store, network Network, opts Options) *Engine {
	e := &Engine{store: store, network: network, opts: opts, fetches: map[digest.Digest]*fetch{}}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	return e
}

// Dir makes the directory "dragonfly" of a store anew, for what is not verified yet,
// without what an earlier engine has left in it. Nobody but this user, and root, can
// enter it.
func Dir(store *pieces.Store) (string, error) {
	dir := filepath.Join(store.Dir(), "dragonfly")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return "", fmt.Errorf("directory for what comes from Dragonfly: %w", err)
	}
	return dir, nil
}

var errClosed = fmt.Errorf("engine on Dragonfly: %w", p2p.ErrClosed)

// Begin announces a call, for which Close waits. Where it returns nil, the caller calls
// [Engine.End]. The error matches [p2p.ErrClosed] where the engine is closed.
func (e *Engine) Begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	e.callMu.Lock()
	defer e.callMu.Unlock()
	if e.closed {
		return errClosed
	}
	e.calls.Add(1)
	return nil
}

// End ends what [Engine.Begin] has announced.
func (e *Engine) End() { e.calls.Done() }

// Close ends fetches, waits for calls under way, and closes the network and the store.
func (e *Engine) Close() error {
	e.callMu.Lock()
	closed := e.closed
	e.closed = true
	e.callMu.Unlock()
	if closed {
		return nil
	}
	e.cancel(errClosed)
	e.network.Stop()
	e.calls.Wait()
	e.running.Wait()
	return errors.Join(e.network.Close(), e.store.Close())
}

// Health asks whether the network answers. The error matches [p2p.ErrUnavailable] where
// it does not.
func (e *Engine) Health(ctx context.Context) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	return e.network.Health(ctx)
}

// Stat implements [p2p.Engine]. A name is known on this host only. What is not here,
// and of what Dragonfly tells no size, or one that a manifest could have, is fetched, as
// by Open, and then described. Where Dragonfly does not answer, the error matches
// [p2p.ErrUnavailable], too.
func (e *Engine) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	if err := e.Begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer e.End()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Info{}, err
	}
	local := p2p.StatOptions{Scope: p2p.Local, Manifest: opts.Manifest, ContentOnly: opts.ContentOnly, MaxContent: opts.MaxContent, Lease: opts.Lease}
	info, err := e.store.Stat(ctx, tag, cid, local)
	if opts.Scope == p2p.Local {
		return info, err
	}
	if isMissing(err) {
		info, err = e.statRemote(ctx, tag, cid, local, err)
	}
	if err == nil && opts.Holders {
		info.Holders, err = e.network.Holders(ctx, info.Task)
	}
	return info, err
}

// isMissing reports whether an error of the store says that it does not have
// something, or not any more.
func isMissing(err error) bool {
	return errors.Is(err, p2p.ErrNotFound) || errors.Is(err, digest.ErrCorrupt)
}

// statRemote describes what the store has not, for the reason missing.
func (e *Engine) statRemote(ctx context.Context, tag string, cid digest.CID, local p2p.StatOptions, missing error) (p2p.Info, error) {
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if damage, ok := errors.AsType[*digest.CorruptError](missing); ok {
		task.Digest = damage.Digest // a name led to it
	} else if task.Digest == "" {
		return p2p.Info{}, fmt.Errorf("%w on this host, and Dragonfly knows no names: ask for the digest", missing)
	} else {
		size, err := e.network.Size(ctx, task)
		if err != nil {
			return p2p.Info{}, err
		}
		if size > p2p.MaxManifest {
			table := digest.Table{Size: size, PieceLength: digest.PieceLength(size)}
			return p2p.Info{Task: task, Size: size, PieceLength: table.PieceLength, Pieces: table.Pieces(), Remote: true, Keep: p2p.KeepLoose}, nil
		}
	}
	if err := e.fetchMissing(ctx, task, missing); err != nil {
		return p2p.Info{}, err
	}
	return e.store.Stat(ctx, tag, cid, local)
}

// Open implements [p2p.Engine]. A blob that is not here is fetched and stored before
// Open returns. The result is a [*pieces.Blob], which has no Sources: nothing says where
// a blob has come from.
func (e *Engine) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	blob, err := e.store.Open(ctx, task, p2p.Local)
	if scope == p2p.Local || !isMissing(err) {
		return blob, err
	}
	if err := e.fetchMissing(ctx, task, err); err != nil {
		return nil, err
	}
	return e.store.Open(ctx, task, p2p.Local)
}

// Hold implements [p2p.Holder]. Of a manifest, all that it refers to is fetched, too.
func (e *Engine) Hold(ctx context.Context, tag string, cid digest.CID) error {
	info, err := e.HoldManifest(ctx, tag, cid, p2p.StatOptions{})
	if err != nil {
		return err
	}
	if info.Remote {
		blob, err := e.Open(ctx, info.Task, p2p.Network)
		if err != nil {
			return err
		}
		return blob.Close()
	}
	return nil
}

// HoldManifest implements [p2p.Holder]: what Stat describes of a manifest is here.
func (e *Engine) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return e.Stat(ctx, tag, cid, opts)
}

// HoldReferrers implements [p2p.Holder]: Dragonfly has no lists, and nothing comes from it.
func (e *Engine) HoldReferrers(ctx context.Context, task p2p.Task) error {
	return e.store.HoldReferrers(ctx, task)
}

// Verify implements [p2p.Holder].
func (e *Engine) Verify(ctx context.Context, task p2p.Task) error { return e.store.Verify(ctx, task) }

// Mend implements [p2p.Holder].
func (e *Engine) Mend(ctx context.Context, task p2p.Task) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	if err := e.mend(ctx, task); err != nil {
		return fmt.Errorf("mend %s: %w", task, err)
	}
	return nil
}

// mend replaces a blob that is damaged here.
func (e *Engine) mend(ctx context.Context, task p2p.Task) error {
	if _, err := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local}); err != nil && !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	if err := e.store.Recheck(ctx, task.Digest); !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	if err := e.fetch(ctx, task); err != nil {
		return err
	}
	e.opts.Log.Info("a damaged blob was mended", "task", task.String())
	return nil
}

// Ingest implements [p2p.Engine]. The network is told of what is committed before Commit
// returns.
func (e *Engine) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return nil, err
	}
	return &ingest{in, ctx, e}, nil
}

// ingest tells the network of what is committed.
type ingest struct {
	p2p.Ingest
	ctx context.Context
	e   *Engine
}

func (in *ingest) Commit(c p2p.Commit) error {
	if err := in.e.Begin(in.ctx); err != nil {
		return err
	}
	defer in.e.End()
	if err := in.Ingest.Commit(c); err != nil {
		return err
	}
	tasks := map[p2p.Task]bool{}
	for _, n := range c.Tasks {
		tasks[n.Task] = true
	}
	for _, n := range c.Names {
		tasks[p2p.Task{Tag: n.Tag, Digest: n.Digest}] = true
	}
	return in.e.network.Offer(in.ctx, slices.Collect(maps.Keys(tasks)))
}

// Delete implements [p2p.Engine]. The network is told of every task that goes here. Other
// hosts of Dragonfly keep theirs: none is ever counted as reached, and where one still
// has something, Deleted.Missed says so.
func (e *Engine) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := e.Begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer e.End()
	deleted, tasks, err := e.store.DeleteTasks(ctx, tag, cid, opts)
	held := err == nil
	if errors.Is(err, p2p.ErrNotFound) && cid.Digest() != "" {
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		tasks, err = []p2p.Task{task}, e.network.Deletable(ctx, task)
	}
	if err != nil {
		return p2p.Deleted{}, err
	}
	deleted.Missed = e.network.Forget(ctx, tasks, held)
	return deleted, nil
}

// List implements [p2p.Engine]: it lists the store.
func (e *Engine) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return e.store.List(ctx, q)
}

// Room reports whether the store has room for what is to be brought, of so many bytes, or of an
// unknown size where that is below 0: else the error matches [p2p.ErrNoSpace]. Networks ask before they
// begin.
func (e *Engine) Room(task p2p.Task, size int64) error {
	if err := e.store.Room(max(size, 0)); err != nil {
		return fmt.Errorf("fetch %s of %d bytes: %w", task, size, err)
	}
	return nil
}

// Take stores the content of a file that the network has brought, where it is what was
// asked for: the error matches [digest.ErrMismatch] where it is not. The content is
// copied: the file may be known by other names. The caller closes the file.
func (e *Engine) Take(ctx context.Context, task p2p.Task, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := e.Room(task, info.Size()); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n := p2p.NewTask{Task: task, Keep: p2p.KeepLoose, Origin: time.Now()} // nobody knows when it was imported
	var src io.Reader = f
	if info.Size() <= p2p.MaxManifest {
		// What is looked at is what is verified, whoever changes the file meanwhile.
		content, err := io.ReadAll(io.LimitReader(f, p2p.MaxManifest+1))
		if err != nil {
			return err
		}
		src = bytes.NewReader(content)
		n.MediaType, n.Manifest = manifest.Detect(content)
	}
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(src, p2p.AddOptions{Want: task.Digest}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}})
}
