// Package cluster is the engine that is a peer in a Dragonfly cluster: a store of this
// host whose blobs Dragonfly's schedulers know of and Dragonfly's daemons fetch, and
// which fetches theirs, over the v1 API of d7y.io/api/v2. There is no daemon of
// Dragonfly on this host; package dragonfly is for where there is one.
//
// The store has what Dragonfly does not: names, lists, manifests and what refers to them,
// and the proof of every byte. Dragonfly's own MD5s, which a peer makes up as it likes,
// prove nothing here: what peers give is stored only where it has the digest that
// was asked for. What goes out is verified before.
//
// Each task belongs to the scheduler that the hash ring of Dragonfly's daemons gives it.
// Schedulers forget: so all tasks are announced again and again.
//
// What Dragonfly can't do is an error, or is said in the result: it knows no names,
// its delete is of one host, and it copies nothing to other hosts on request.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Options says how to be a peer. Where a number is 0, its default counts.
type Options struct {
	// Schedulers are the addresses, HOST:PORT, of all schedulers of the cluster, as
	// Dragonfly's daemons have them: who spells them otherwise looks for tasks elsewhere.
	Schedulers []string
	// Advertise is the IP by which other hosts reach this one. The default is the one
	// from which the first scheduler is reached.
	Advertise string
	// PeerListen and UploadListen are where peers ask for pieces, and fetch them:
	// [HOST]:PORT, with port 0 for any free one. The defaults are [DefaultPeerListen] and
	// [DefaultUploadListen]. Dragonfly wants ports from 1024 to 65534.
	PeerListen, UploadListen string
	// Version is told to schedulers.
	Version string

	LookupTimeout    time.Duration // of a call of a scheduler, and to connect with a peer; 3 s
	StallTimeout     time.Duration // without a byte, after which a peer is given up; 10 s
	Timeout          time.Duration // of fetching a blob; 10 min
	AnnounceInterval time.Duration // between announcements of the host; 30 s
	SweepInterval    time.Duration // between announcements of all tasks; 1 min
	SweepRate        float64       // tasks a second in that; 50
	UploadRate       int64         // bytes a second; 0 is no limit
	DownloadRate     int64         // bytes a second; 0 is no limit
	MaxUploads       int           // pieces that are sent at once; 64

	// DetectManifest returns the media type of content that is a manifest, and what
	// it refers to; nil where it is none. Dragonfly tells nothing of what it has.
	// Without it nothing that comes from Dragonfly is a manifest.
	DetectManifest func(content []byte) (mediaType string, m *p2p.NewManifest)
	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
}

const (
	// DefaultPeerListen is where Dragonfly's daemons listen for peers.
	DefaultPeerListen = ":65000"
	// DefaultUploadListen is where Dragonfly's daemons send pieces from.
	DefaultUploadListen = ":65002"
	// DefaultTimeout bounds fetching a blob.
	DefaultTimeout = 10 * time.Minute
)

// setDefaults gives what is not set its default.
func (o *Options) setDefaults() {
	for d, value := range map[*time.Duration]time.Duration{
		&o.LookupTimeout: 3 * time.Second, &o.StallTimeout: 10 * time.Second, &o.Timeout: DefaultTimeout,
		&o.AnnounceInterval: 30 * time.Second, &o.SweepInterval: time.Minute,
	} {
		if *d <= 0 {
			*d = value
		}
	}
	for s, value := range map[*string]string{&o.PeerListen: DefaultPeerListen, &o.UploadListen: DefaultUploadListen} {
		if *s == "" {
			*s = value
		}
	}
	if o.SweepRate <= 0 {
		o.SweepRate = 50
	}
	if o.MaxUploads <= 0 {
		o.MaxUploads = 64
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Engine is a store that is a peer in a Dragonfly cluster. It implements [p2p.Engine]
// and is safe for concurrent use.
type Engine struct {
	opts       Options
	dir        string // for what comes from peers and is not verified yet
	store      *pieces.Store
	log        *slog.Logger
	schedulers *schedulers
	host       *schedulerv1.PeerHost
	sums       *sums
	up, down   *rate.Limiter // nil: no limit
	client     *http.Client  // to fetch pieces
	peers      *grpc.Server
	uploads    *http.Server
	uploading  chan struct{} // holds one for each piece that is sent

	ctx        context.Context // ends with Close
	cancel     context.CancelCauseFunc
	background sync.WaitGroup // servers, announcements and fetches
	sweepNow   chan struct{}

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu      sync.Mutex
	fetches map[digest.Digest]*fetch
	held    map[string]*holding // by task ID
}

var _ p2p.Engine = (*Engine)(nil)

// New makes a store a peer in a Dragonfly cluster, and announces what it holds. The
// Engine takes over the store: it closes it. What an earlier one has left in the
// directory "dragonfly" of the store is removed. No scheduler need run yet;
// [Engine.Health] says whether one does.
func New(store *pieces.Store, opts Options) (_ *Engine, err error) {
	opts.setDefaults()
	e := &Engine{
		opts: opts, dir: filepath.Join(store.Dir(), "dragonfly"), store: store, log: opts.Log,
		sums: newSums(), up: limiter(opts.UploadRate), down: limiter(opts.DownloadRate),
		client: newHTTPClient(opts), uploading: make(chan struct{}, opts.MaxUploads), sweepNow: make(chan struct{}, 1),
		fetches: map[digest.Digest]*fetch{}, held: map[string]*holding{},
	}
	if err := errors.Join(os.RemoveAll(e.dir), os.Mkdir(e.dir, 0o700)); err != nil {
		return nil, fmt.Errorf("directory for what comes from Dragonfly: %w", err)
	}
	if e.schedulers, err = newSchedulers(opts.Schedulers); err != nil {
		return nil, err
	}
	listeners, err := e.listen()
	if err != nil {
		return nil, errors.Join(err, e.schedulers.close())
	}
	if e.host, err = newHost(opts, listeners); err != nil {
		return nil, errors.Join(err, listeners[0].Close(), listeners[1].Close(), e.schedulers.close())
	}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	e.serve(listeners)
	e.background.Go(e.announceHost)
	e.background.Go(e.announceTasks)
	return e, nil
}

// Address returns where other peers reach this one.
func (e *Engine) Address() string { return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.RpcPort)) }

// UploadAddress returns where other peers fetch pieces from this one.
func (e *Engine) UploadAddress() string {
	return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.DownPort))
}

// Health announces the host, and asks with that whether a scheduler answers. The error
// matches [p2p.ErrUnavailable] where none does.
func (e *Engine) Health(ctx context.Context) error {
	if err := e.begin(ctx); err != nil {
		return err
	}
	defer e.calls.Done()
	return e.announceHostOnce(ctx)
}

// begin announces a call. Where it returns nil, the caller calls e.calls.Done.
func (e *Engine) begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	e.callMu.Lock()
	defer e.callMu.Unlock()
	if e.closed {
		return fmt.Errorf("engine in a Dragonfly cluster: %w", p2p.ErrClosed)
	}
	e.calls.Add(1)
	return nil
}

// Close leaves the cluster, ends fetches and uploads, waits for calls under way, and
// closes the store. Schedulers that do not answer hold it up for LookupTimeout.
func (e *Engine) Close() error {
	e.callMu.Lock()
	closed := e.closed
	e.closed = true
	e.callMu.Unlock()
	if closed {
		return nil
	}
	e.cancel(fmt.Errorf("engine in a Dragonfly cluster: %w", p2p.ErrClosed))
	err := e.uploads.Close()
	e.peers.Stop()
	e.calls.Wait()
	e.leaveHost()
	e.background.Wait()
	e.client.CloseIdleConnections()
	return errors.Join(err, e.schedulers.close(), e.store.Close())
}

// Stat implements [p2p.Engine]. A name is known on this host only. Of what is not here,
// schedulers know the size and no more: what could be a manifest is fetched,
// as by Open, and then described. Where no scheduler answers, the error
// matches [p2p.ErrUnavailable], too.
//
// Of Info.Holders, the one that is asked is the task's scheduler: others hold the
// task where it knows of peers besides this one.
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
		info, err = e.statRemote(ctx, tag, cid, local, err)
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

// statRemote describes what the store has not, for the reason missing.
func (e *Engine) statRemote(ctx context.Context, tag string, cid digest.CID, local p2p.StatOptions, missing error) (p2p.Info, error) {
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if damage, ok := errors.AsType[*digest.CorruptError](missing); ok {
		task.Digest = damage.Digest // a name led to it
	} else if task.Digest == "" {
		return p2p.Info{}, fmt.Errorf("%w on this host, and Dragonfly knows no names: ask for the digest", missing)
	} else {
		found, err := e.lookup(ctx, task)
		if err != nil {
			return p2p.Info{}, err
		}
		if size := found.GetContentLength(); size > p2p.MaxManifest {
			table := digest.Table{Size: size, PieceLength: digest.PieceLength(size)}
			return p2p.Info{Task: task, Size: size, PieceLength: table.PieceLength, Pieces: table.Pieces(), Remote: true, Keep: p2p.KeepLoose}, nil
		}
	}
	if err := e.fetchMissing(ctx, task, missing); err != nil {
		return p2p.Info{}, err
	}
	return e.store.Stat(ctx, tag, cid, local)
}

// lookup asks a task's scheduler about it. The error matches [p2p.ErrNotFound] where no
// peer has it.
func (e *Engine) lookup(ctx context.Context, task p2p.Task) (*schedulerv1.Task, error) {
	found, err := e.statTask(ctx, task)
	if err == nil && !available(found) {
		err = fmt.Errorf("stat %s: %w: no peer has all of it", task, p2p.ErrNotFound)
	}
	return found, err
}

func (e *Engine) holders(ctx context.Context, task p2p.Task) (*p2p.Holders, error) {
	found, err := e.lookup(ctx, task)
	switch {
	case err == nil:
		others := int(found.GetPeerCount())
		if e.isHeld(taskID(task)) {
			others-- // this one
		}
		if others > 0 {
			return &p2p.Holders{Asked: 1, Some: 1, Whole: 1}, nil
		}
		return &p2p.Holders{Asked: 1}, nil
	case errors.Is(err, p2p.ErrNotFound):
		return &p2p.Holders{Asked: 1}, nil
	case errors.Is(err, p2p.ErrUnreachable):
		return &p2p.Holders{Asked: 1, Silent: 1}, nil
	}
	return nil, err
}

// Open implements [p2p.Engine]. A blob that is not here is fetched and stored before
// Open returns. The result is a [*pieces.Blob], which has no Sources.
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

// fetchMissing fetches what the store has not, for the reason missing. Where no peer
// has it either, damage is what is reported.
func (e *Engine) fetchMissing(ctx context.Context, task p2p.Task, missing error) error {
	err := e.fetch(ctx, task)
	if errors.Is(missing, digest.ErrCorrupt) && (errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable)) {
		return missing
	}
	return err
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

// take stores what was fetched, where it is what was asked for. It takes f from its start.
func (e *Engine) take(ctx context.Context, task p2p.Task, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n := p2p.NewTask{Task: task, Keep: p2p.KeepLoose}
	var src io.Reader = f
	if e.opts.DetectManifest != nil && info.Size() <= p2p.MaxManifest {
		content, err := io.ReadAll(f)
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
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}})
}

// Ingest implements [p2p.Engine]. What is committed is announced, too, before Commit
// returns. A scheduler that does not answer fails nothing: the content is stored, and is
// announced when a scheduler does.
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

// ingest announces what is committed.
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
	tasks := map[p2p.Task]bool{}
	for _, n := range c.Tasks {
		tasks[n.Task] = true
	}
	for _, n := range c.Names {
		tasks[p2p.Task{Tag: n.Tag, Digest: n.Digest}] = true
	}
	for task := range tasks {
		id := in.e.hold(task, "")
		if !in.e.schedulers.up() {
			continue // they are told when one is up again
		}
		if err := in.e.announce(in.ctx, id, true); err != nil {
			in.e.log.Warn("a task is stored, and not announced yet: it will be", "task", task.String(), "error", err)
			if errors.Is(err, wire.ErrAway) {
				break // nor are the others: no caller waits for each of them
			}
		}
	}
	return nil
}

// Delete implements [p2p.Engine]. For every task that goes here, this peer leaves it at
// its scheduler, too. Other peers keep theirs: none is ever counted as reached, and
// where one still has something, Deleted.Missed says so.
func (e *Engine) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := e.begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer e.calls.Done()
	deleted, tasks, err := e.store.DeleteTasks(ctx, tag, cid, opts)
	if errors.Is(err, p2p.ErrNotFound) && cid.Digest() != "" {
		// Others may have what is not here.
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		if _, err := e.lookup(ctx, task); err != nil {
			return p2p.Deleted{}, err
		}
		tasks, err = []p2p.Task{task}, nil
	}
	if err != nil {
		return p2p.Deleted{}, err
	}
	deleted.Missed = e.leaveTasks(ctx, tasks)
	return deleted, nil
}

// leaveTasks tells schedulers that tasks are not here any more, and asks whether others
// have them. It returns what was not done, as far as it is known.
func (e *Engine) leaveTasks(ctx context.Context, tasks []p2p.Task) (missed []p2p.Missed) {
	miss := func(task p2p.Task, reason string) {
		missed = append(missed, p2p.Missed{Peer: "Dragonfly", Address: e.schedulers.of(taskID(task)).addr, Reason: reason})
	}
	for _, task := range tasks {
		if err := e.leave(ctx, taskID(task)); err != nil {
			miss(task, err.Error()+": peers may ask this host for it until the scheduler forgets it")
			continue
		}
		_, err := e.lookup(ctx, task)
		if err == nil {
			miss(task, task.String()+": other hosts of Dragonfly have it still, and keep it: its delete is of one host only, so delete it on each of them")
		} else if !errors.Is(err, p2p.ErrNotFound) {
			miss(task, "whether other hosts of Dragonfly have it still is not known: "+err.Error())
		} else {
			continue
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

// Peers implements [p2p.Engine]: schedulers do not tell of peers but for a download.
func (e *Engine) Peers(ctx context.Context) ([]p2p.Peer, error) { return e.store.Peers(ctx) }

// Replicate implements [p2p.Engine]: Dragonfly has no call for it, and the error matches
// [errors.ErrUnsupported], too.
func (e *Engine) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if _, err := e.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local}); err != nil || n <= 0 {
		return nil, err
	}
	return nil, fmt.Errorf("replicate %s: %w: %w by Dragonfly: export it on the hosts that are to have it", p2p.Describe(tag, cid), p2p.ErrUnreachable, errors.ErrUnsupported)
}
