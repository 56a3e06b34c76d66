// Package dragonfly is the engine that has Dragonfly for its network: a store of
// this host, and the dfdaemon of an upstream Dragonfly beside it, over the v1 API
// of d7y.io/api/v2 on its unix socket.
//
// The store has what Dragonfly does not: names, lists, sizes, manifests and what
// refers to them, and the proof of every byte. Dragonfly gets the blobs of the store
// that are committed, and gives those that are missing here. It moves them as files,
// which both daemons have to reach under the same path, and verifies nothing. So a
// blob is verified before Dragonfly gets it, and what Dragonfly gives is copied,
// and stored only where it has the digest that was asked for.
//
// What Dragonfly can't do is an error, or is said in the result: it knows no names,
// its delete is of one host, and it copies nothing to other hosts on request.
package dragonfly

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Options says how to use a Dragonfly. Where a value is zero, its default counts.
type Options struct {
	// Socket is the path of the unix socket of Dragonfly's dfdaemon. The default is
	// [DefaultSocket].
	Socket string

	LookupTimeout time.Duration // of asking whether something is there; 3 s
	Timeout       time.Duration // of an import or an export; 10 min

	// DetectManifest returns the media type of content that is a manifest, and what
	// it refers to; nil where it is none. Dragonfly tells nothing of what it has.
	// Without it nothing that comes from Dragonfly is a manifest.
	DetectManifest func(content []byte) (mediaType string, m *p2p.NewManifest)
	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
}

const (
	// DefaultSocket is where Dragonfly's dfdaemon listens if it is not told otherwise.
	DefaultSocket = "/var/run/dfdaemon.sock"
	// DefaultTimeout bounds an import or an export.
	DefaultTimeout = 10 * time.Minute

	// deleteTimeout bounds what Dragonfly does for one delete of ours.
	deleteTimeout = 10 * time.Second
)

// Engine is a store that has a Dragonfly for its network. It implements [p2p.Engine]
// and is safe for concurrent use.
type Engine struct {
	opts     Options
	dir      string // for what comes from Dragonfly and is not verified yet
	store    *pieces.Store
	upstream *client
	log      *slog.Logger

	ctx        context.Context // ends with Close
	cancel     context.CancelCauseFunc
	background sync.WaitGroup // fetches

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu      sync.Mutex
	fetches map[digest.Digest]*fetch
}

var _ p2p.Engine = (*Engine)(nil)

// New gives a store a Dragonfly for its network. The Engine takes over the store:
// it closes it. What an earlier one has left in the directory "dragonfly" of the
// store is removed. Dragonfly's dfdaemon has to reach the store's directory under the
// same path, and to read and write there, which root can. It need not run yet;
// [Engine.Health] says whether it does.
func New(store *pieces.Store, opts Options) (*Engine, error) {
	if opts.Socket == "" {
		opts.Socket = DefaultSocket
	}
	if opts.LookupTimeout == 0 {
		opts.LookupTimeout = 3 * time.Second
	}
	if opts.Timeout == 0 {
		opts.Timeout = DefaultTimeout
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	dir := filepath.Join(store.Dir(), "dragonfly")
	if err := prepareDir(dir); err != nil {
		return nil, fmt.Errorf("directory for what comes from Dragonfly: %w", err)
	}
	upstream, err := newClient(opts.Socket)
	if err != nil {
		return nil, err
	}
	e := &Engine{opts: opts, dir: dir, store: store, upstream: upstream, log: opts.Log, fetches: map[digest.Digest]*fetch{}}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	return e, nil
}

// prepareDir makes the directory anew, without what an earlier engine has left in it.
// Nobody but this user, and root, can enter it.
func prepareDir(dir string) error {
	return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700))
}

// Health asks whether Dragonfly's dfdaemon answers, within the time of a lookup. The
// error matches [p2p.ErrUnavailable] where it does not.
func (e *Engine) Health(ctx context.Context) error {
	if err := e.begin(ctx); err != nil {
		return err
	}
	defer e.calls.Done()
	return e.upstream.health(ctx, e.opts.LookupTimeout)
}

// begin announces a call. Where it returns nil, the caller calls e.calls.Done.
func (e *Engine) begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	e.callMu.Lock()
	defer e.callMu.Unlock()
	if e.closed {
		return fmt.Errorf("engine on Dragonfly: %w", p2p.ErrClosed)
	}
	e.calls.Add(1)
	return nil
}

// Close ends fetches, waits for calls under way, and closes the store. Dragonfly's
// dfdaemon is left as it is.
func (e *Engine) Close() error {
	e.callMu.Lock()
	closed := e.closed
	e.closed = true
	e.callMu.Unlock()
	if closed {
		return nil
	}
	e.cancel(fmt.Errorf("engine on Dragonfly: %w", p2p.ErrClosed))
	e.calls.Wait()
	e.background.Wait()
	return errors.Join(e.upstream.close(), e.store.Close())
}

// Stat implements [p2p.Engine]. Dragonfly tells of a task only whether it has it. So
// one that is not here is fetched, as by Open, and then described. A name is
// known on this host only. Where Dragonfly does not answer, the error matches
// [p2p.ErrUnavailable], too.
//
// Of Info.Holders, the one that is asked is Dragonfly's dfdaemon: it holds the task
// where it, or a Dragonfly peer that it knows of, does.
func (e *Engine) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	if err := e.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer e.calls.Done()
	local := p2p.StatOptions{Scope: p2p.Local, Manifest: opts.Manifest}
	info, err := e.store.Stat(ctx, tag, cid, local)
	if opts.Scope == p2p.Local {
		return info, err
	}
	if isMissing(err) {
		if err := e.fetchNamed(ctx, tag, cid, err); err != nil {
			return p2p.Info{}, err
		}
		info, err = e.store.Stat(ctx, tag, cid, local)
	}
	if err == nil && opts.Holders {
		info.Holders, err = e.holders(ctx, info.Task)
	}
	return info, err
}

// isMissing reports whether an error of the store says that it does not have
// something, or not any more.
func isMissing(err error) bool {
	return errors.Is(err, p2p.ErrNotFound) || errors.Is(err, digest.ErrCorrupt)
}

// fetchNamed fetches what cid names and the store has not, for the reason missing.
func (e *Engine) fetchNamed(ctx context.Context, tag string, cid digest.CID, missing error) error {
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if damage, ok := errors.AsType[*digest.CorruptError](missing); ok {
		task.Digest = damage.Digest // a name led to it
	} else if task.Digest == "" {
		return fmt.Errorf("%w on this host, and Dragonfly knows no names: ask for the digest", missing)
	}
	return e.fetchMissing(ctx, task, missing)
}

// fetchMissing fetches what the store has not, for the reason missing. Where
// Dragonfly does not have it either, damage is what is reported.
func (e *Engine) fetchMissing(ctx context.Context, task p2p.Task, missing error) error {
	err := e.fetch(ctx, task)
	if errors.Is(missing, digest.ErrCorrupt) && (errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable)) {
		return missing
	}
	return err
}

func (e *Engine) holders(ctx context.Context, task p2p.Task) (*p2p.Holders, error) {
	err := e.upstream.stat(ctx, task, false, e.opts.LookupTimeout)
	switch {
	case err == nil:
		return &p2p.Holders{Asked: 1, Some: 1, Whole: 1}, nil
	case errors.Is(err, p2p.ErrNotFound):
		return &p2p.Holders{Asked: 1}, nil
	case context.Cause(ctx) != nil:
		return nil, err
	}
	e.log.Warn("Dragonfly does not say who has a task", "task", task.String(), "error", err)
	return &p2p.Holders{Asked: 1, Silent: 1}, nil
}

// Open implements [p2p.Engine]. A blob that is not here is fetched and stored before
// Open returns: Dragonfly hands over whole files only. The result is a [*pieces.Blob],
// which has no Sources: Dragonfly does not say where a file has come from.
func (e *Engine) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if err := e.begin(ctx); err != nil {
		return nil, err
	}
	defer e.calls.Done()
	if scope == p2p.Mend {
		if err := e.mend(ctx, task); err != nil {
			return nil, fmt.Errorf("mend %s: %w", task, err)
		}
		return e.store.Open(ctx, task, p2p.Local)
	}
	blob, err := e.store.Open(ctx, task, p2p.Local)
	if scope == p2p.Local || !isMissing(err) {
		return blob, err
	}
	if err := e.fetchMissing(ctx, task, err); err != nil {
		return nil, err
	}
	return e.store.Open(ctx, task, p2p.Local)
}

// mend replaces a blob that is damaged here.
func (e *Engine) mend(ctx context.Context, task p2p.Task) error {
	if _, err := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local}); err != nil && !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	if err := e.fetch(ctx, task); err != nil {
		return err
	}
	e.log.Info("a damaged blob was mended", "task", task.String())
	return nil
}

// fetch is one blob that is on its way from Dragonfly, for all who want it.
type fetch struct {
	task    p2p.Task
	cancel  context.CancelCauseFunc
	waiting int           // callers; guarded by Engine.mu
	done    chan struct{} // closed when nothing of it is left
	err     error         // once done is closed
}

var errUnwanted = errors.New("nobody waits for it any more")

// fetch brings a task's blob here from Dragonfly, or replaces it where it is damaged.
// It returns when the task is stored.
func (e *Engine) fetch(ctx context.Context, task p2p.Task) error {
	if err := task.Validate(); err != nil {
		return err
	}
	for {
		f := e.join(task)
		select {
		case <-f.done:
		case <-ctx.Done():
		}
		e.leave(f)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		// It may have been for another tag, or have ended as this caller came.
		if f.task == task && !errors.Is(f.err, errUnwanted) {
			return f.err
		}
	}
}

// join returns the fetch of a task's blob, and begins one where there is none. The
// caller leaves it.
func (e *Engine) join(task p2p.Task) *fetch {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.fetches[task.Digest]
	if f == nil {
		f = &fetch{task: task, done: make(chan struct{})}
		var ctx context.Context
		ctx, f.cancel = context.WithCancelCause(e.ctx)
		e.fetches[task.Digest] = f
		e.background.Go(func() {
			f.err = e.bring(ctx, task)
			f.cancel(nil)
			e.mu.Lock()
			delete(e.fetches, task.Digest)
			e.mu.Unlock()
			close(f.done)
		})
	}
	f.waiting++
	return f
}

// leave takes back a join. The last one ends the fetch.
func (e *Engine) leave(f *fetch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.waiting--; f.waiting == 0 {
		f.cancel(errUnwanted)
	}
}

// bring has Dragonfly export a task's blob, and stores it.
func (e *Engine) bring(ctx context.Context, task p2p.Task) error {
	if e.whole(ctx, task) {
		return nil // it has come, or has been mended, just before
	}
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
	if err := e.take(ctx, task, output); err != nil {
		return fmt.Errorf("fetch %s from Dragonfly: %w", task, err)
	}
	return nil
}

// whole reports whether a task is here, without damage.
func (e *Engine) whole(ctx context.Context, task p2p.Task) bool {
	blob, err := e.store.OpenForPeers(ctx, task)
	if err != nil {
		return false
	}
	defer blob.Close()
	return blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil) == nil
}

// take copies a file that Dragonfly has exported to the store. It is never moved or
// linked there: it can be the file in Dragonfly's own cache, by another name.
func (e *Engine) take(ctx context.Context, task p2p.Task, name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: Dragonfly's dfdaemon says that it has written %s, and there is nothing: it has to see that directory under the same path", p2p.ErrUnavailable, name)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	n := p2p.NewTask{Task: task, Keep: p2p.KeepLoose}
	var src io.Reader = f
	if e.opts.DetectManifest != nil && info.Size() <= p2p.MaxManifest {
		// What is looked at is what is verified, whoever changes the file meanwhile.
		content, err := io.ReadAll(io.LimitReader(f, p2p.MaxManifest+1))
		if err != nil {
			return err
		}
		src = bytes.NewReader(content)
		n.MediaType, n.Manifest = e.opts.DetectManifest(content)
	}
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(src, p2p.AddOptions{Want: task.Digest}); err != nil {
		if errors.Is(err, digest.ErrMismatch) {
			err = fmt.Errorf("%w: what Dragonfly has under this digest is something else: delete it there, and import the file again", err)
		}
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}})
}

// Ingest implements [p2p.Engine]. What is committed is handed to Dragonfly, too, with
// what it refers to, before Commit returns. Where that fails, Commit does, and says
// that the content is stored on this host; to commit the same again makes up for it.
func (e *Engine) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := e.begin(ctx); err != nil {
		return nil, err
	}
	defer e.calls.Done()
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return nil, err
	}
	return &ingest{in, ctx, e}, nil
}

// ingest hands what is committed to Dragonfly.
type ingest struct {
	p2p.Ingest
	ctx context.Context
	e   *Engine
}

func (in *ingest) Commit(c p2p.Commit) error {
	if err := in.e.begin(in.ctx); err != nil {
		return err
	}
	defer in.e.calls.Done()
	if err := in.Ingest.Commit(c); err != nil {
		return err
	}
	var tasks []p2p.Task
	for _, n := range c.Tasks {
		tasks = append(tasks, n.Task)
	}
	for _, n := range c.Names {
		tasks = append(tasks, p2p.Task{Tag: n.Tag, Digest: n.Digest})
	}
	seen := map[p2p.Task]bool{}
	for _, task := range tasks {
		if err := in.e.handIn(in.ctx, task, seen); err != nil {
			return fmt.Errorf("it is stored on this host, but Dragonfly has not got all of it: %w; then import it again", err)
		}
	}
	return nil
}

// handIn hands a task to Dragonfly, and what it refers to, as far as that is here: an
// earlier commit may have failed to, and whoever pushes again leaves out what is here.
func (e *Engine) handIn(ctx context.Context, task p2p.Task, seen map[p2p.Task]bool) error {
	if seen[task] {
		return nil
	}
	seen[task] = true
	info, err := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if errors.Is(err, p2p.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	if err := e.handInBlob(ctx, task); err != nil {
		return err
	}
	if info.Manifest == nil {
		return nil
	}
	for _, ref := range info.Manifest.Refs {
		if err := e.handIn(ctx, ref.Task, seen); err != nil {
			return err
		}
	}
	return nil
}

// handInBlob has Dragonfly import a blob, which is verified before where Dragonfly's
// dfdaemon does not have it yet. Where it has, it tells its scheduler once more.
func (e *Engine) handInBlob(ctx context.Context, task p2p.Task) error {
	blob, err := e.store.OpenForPeers(ctx, task)
	if errors.Is(err, p2p.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	err = e.upstream.stat(ctx, task, true, e.opts.LookupTimeout)
	if errors.Is(err, p2p.ErrNotFound) {
		err = blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
	}
	if err != nil {
		return err
	}
	return e.upstream.importFile(ctx, task, blob.File().Name(), e.opts.Timeout)
}

// Delete implements [p2p.Engine]. Every task that goes here is deleted by Dragonfly's
// dfdaemon of this host, too. Other Dragonfly peers keep theirs: none is ever counted
// as reached, and where one still has something, Deleted.Missed says so.
func (e *Engine) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := e.begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer e.calls.Done()
	deleted, tasks, err := e.store.DeleteTasks(ctx, tag, cid, opts)
	if errors.Is(err, p2p.ErrNotFound) && cid.Digest() != "" {
		// Dragonfly may have what was never here, or the rest of a delete that failed.
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		if err := e.upstream.stat(ctx, task, true, e.opts.LookupTimeout); err != nil {
			return p2p.Deleted{}, err
		}
		tasks, err = []p2p.Task{task}, nil
	}
	if err != nil {
		return p2p.Deleted{}, err
	}
	deleted.Missed = e.deleteUpstream(ctx, tasks)
	return deleted, nil
}

// deleteUpstream has Dragonfly's dfdaemon delete tasks, and asks whether that was all.
// It returns what was not deleted, as far as it is known.
func (e *Engine) deleteUpstream(ctx context.Context, tasks []p2p.Task) (missed []p2p.Missed) {
	miss := func(reason string) {
		missed = append(missed, p2p.Missed{Peer: "Dragonfly", Address: e.opts.Socket, Reason: reason})
	}
	limited, cancel := context.WithTimeoutCause(ctx, deleteTimeout, fmt.Errorf("the dfdaemon of Dragonfly at %s has not done it within %s", e.opts.Socket, deleteTimeout))
	defer cancel()
	for _, task := range tasks {
		if err := e.upstream.delete(limited, task); err != nil {
			miss(fmt.Sprintf("%s: %v: delete it again by this digest", task, err))
		}
	}
	if len(missed) > 0 {
		return missed
	}
	for _, task := range tasks {
		err := e.upstream.stat(ctx, task, false, e.opts.LookupTimeout)
		if errors.Is(err, p2p.ErrNotFound) {
			continue
		}
		if err == nil {
			miss(task.String() + ": Dragonfly's scheduler knows of hosts that have it still, and keep it: its delete is of one host only, so delete it on each of them")
		} else {
			miss("whether other hosts of Dragonfly have it still is not known: " + err.Error())
		}
		break // the others are as this one
	}
	return missed
}

// List implements [p2p.Engine]: it lists the store. Dragonfly has no lists, so
// Query.FromPeers brings nothing.
func (e *Engine) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return e.store.List(ctx, q)
}

// Peers implements [p2p.Engine]: Dragonfly does not tell of its peers.
func (e *Engine) Peers(ctx context.Context) ([]p2p.Peer, error) { return e.store.Peers(ctx) }

// Replicate implements [p2p.Engine]: Dragonfly has no call for it, and the error matches
// [errors.ErrUnsupported], too.
func (e *Engine) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if _, err := e.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local}); err != nil || n <= 0 {
		return nil, err
	}
	return nil, fmt.Errorf("replicate %s: %w: %w by Dragonfly: export it on the hosts that are to have it", p2p.Describe(tag, cid), p2p.ErrUnreachable, errors.ErrUnsupported)
}
