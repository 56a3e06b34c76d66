// Package cluster is the source that is a Dragonfly cluster, of which this daemon is a peer: its
// blobs Dragonfly's schedulers know of and Dragonfly's daemons fetch, and it fetches theirs, over
// the v1 API of d7y.io/api/v2. There is no daemon of Dragonfly on this host; package dragonfly is
// for where there is one.
//
// Package whole has what both sources share. Dragonfly's own MD5s, which a peer makes up as it likes,
// prove nothing here: what peers give is stored only where it has the digest that
// was asked for. What goes out is verified before.
//
// Each task belongs to the scheduler that the hash ring of Dragonfly's daemons gives it.
// Schedulers forget: so all tasks are announced again and again.
//
// It promises no compatibility.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// Options says how to be a peer. Where a number is 0, its default counts.
type Options struct {
	// Schedulers are the addresses, HOST:PORT, of all schedulers of the cluster, as
	// Dragonfly's daemons have them: a host that spells them otherwise looks for tasks elsewhere.
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

	LookupTimeout time.Duration // of a call of a scheduler, and to connect with a peer; 3 s
	// without 1 KiB a second, after which a peer is given up; after half of it another one is asked, too; 10 s
	StallTimeout     time.Duration
	Timeout          time.Duration // of fetching a blob; 10 min
	AnnounceInterval time.Duration // between announcements of the host; 30 s
	SweepInterval    time.Duration // between announcements of all tasks; 1 min
	SweepRate        float64       // tasks a second in that; 50
	// after which a task is announced as of a new peer: schedulers forget a peer after a day; 20 h
	PeerLifetime time.Duration
	UploadRate   int64 // bytes a second; 0 is no limit
	DownloadRate int64 // bytes a second; 0 is no limit
	MaxUploads   int   // pieces that are sent at once; 64

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

	// maxWaiting is how many uploads may wait for others.
	maxWaiting = 1024
)

// setDefaults gives what is not set its default.
func (o *Options) setDefaults() {
	for d, value := range map[*time.Duration]time.Duration{
		&o.LookupTimeout: 3 * time.Second, &o.StallTimeout: 10 * time.Second, &o.Timeout: DefaultTimeout,
		&o.AnnounceInterval: 30 * time.Second, &o.SweepInterval: time.Minute, &o.PeerLifetime: 20 * time.Hour,
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

// Source is a Dragonfly cluster, as a peer sees it. It implements [front.Source], and is safe for
// concurrent use.
//
// Of what is not here, schedulers know the size and no more: Stat fetches what could be
// a manifest. Of Info.Providers, the one that is asked is the task's scheduler: others hold
// the task where it knows of peers besides this one.
//
// What is committed is announced before Commit returns. A scheduler that does not answer
// fails nothing: the content is stored, and is announced when a scheduler does.
//
// For every task that is deleted here, this peer leaves it at its scheduler. Close leaves
// the cluster: schedulers that do not answer hold it up for LookupTimeout.
type Source struct {
	front      *front.Engine
	opts       Options
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
	waiting    chan struct{} // and one for each of these and of those that wait for it

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup // servers and announcements
	sweepNow   chan struct{}
	fresh      chan struct{} // closed when schedulers know nothing of an earlier process any more

	naming sync.Mutex          // held while it is read and noted what a name leads to; never while others are asked
	mu     sync.Mutex          // taken after naming
	held   map[string]*holding // by task ID
}

var _ front.Source = (*Source)(nil)

// New makes the store of an engine a peer in a Dragonfly cluster, which becomes one of the engine's
// sources, and announces what the store holds. What an earlier one has left in the directory
// "dragonfly" of the store is removed. No scheduler need run yet;
// [Source.Health] says whether one does.
func New(f *front.Engine, opts Options) (*Source, error) {
	opts.setDefaults()
	// What an earlier program has left there.
	_, err := whole.Dir(f.Store())
	if err != nil {
		return nil, err
	}
	e := &Source{
		front: f, opts: opts, store: f.Store(), log: opts.Log,
		sums: newSums(), up: throttle.New(opts.UploadRate), down: throttle.New(opts.DownloadRate),
		client: newHTTPClient(opts), uploading: make(chan struct{}, opts.MaxUploads), sweepNow: make(chan struct{}, 1),
		waiting: make(chan struct{}, opts.MaxUploads+maxWaiting), fresh: make(chan struct{}),
		held: map[string]*holding{},
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
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.serve(listeners)
	e.background.Go(e.announceAll)
	f.Add(e)
	return e, nil
}

// Address returns where other peers reach this one.
func (e *Source) Address() string { return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.RpcPort)) }

// UploadAddress returns where other peers fetch pieces from this one.
func (e *Source) UploadAddress() string {
	return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.DownPort))
}

// Health announces the host, and asks with that whether a scheduler answers.
func (e *Source) Health(ctx context.Context) error { return e.announceHostOnce(ctx) }

// Stop implements [front.Source]: it ends uploads and announcements.
func (e *Source) Stop() {
	e.cancel()
	e.uploads.Close() // its listener is closed; there is nothing else to report
	e.peers.Stop()
}

// Close implements [front.Source]: it leaves the cluster.
func (e *Source) Close() error {
	e.background.Wait()
	if err := e.leaveHost(context.Background()); err != nil {
		e.log.Warn("no scheduler of Dragonfly was told that this host leaves: they find out by themselves",
			"error", err)
	}
	e.client.CloseIdleConnections()
	return e.schedulers.close()
}

// Name implements [front.Source].
func (e *Source) Name() string { return whole.Name }

// Find implements [front.Source]: schedulers know the size that they were told first, and no more.
func (e *Source) Find(ctx context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	known, _, err := e.lookup(ctx, task)
	found, failed := whole.Found(ctx, e.log, task, known.GetContentLength(), err, opts)
	others := int(known.GetPeerCount())
	if e.isHeld(taskID(task)) {
		others-- // this host
	}
	if h := found.Info.Providers; h != nil && others <= 0 {
		h.Some, h.Whole = 0, 0
	}
	return found, failed
}

// See implements [front.Source].
func (e *Source) See(
	ctx context.Context, tag string, cid digest.CID, _ p2p.DeleteOptions, held bool,
) (front.Seen, error) {
	return whole.See(ctx, tag, cid, held, func(ctx context.Context, task p2p.Task) error {
		_, _, err := e.lookup(ctx, task)
		return err
	}), nil
}

// Fetch implements [front.Source]. The blob is stored when it returns.
func (e *Source) Fetch(ctx context.Context, task p2p.Task, _ bool) (p2p.Blob, error) {
	return nil, e.front.Once(ctx, task, func(ctx context.Context) error { return e.bring(ctx, task) })
}

func (e *Source) bring(ctx context.Context, task p2p.Task) error {
	_, at, err := e.lookup(ctx, task)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(
		ctx, e.opts.Timeout, fmt.Errorf("%w: it took longer than %s", wire.ErrAway, e.opts.Timeout))
	defer cancel()
	for range maxRegistrations {
		if err = e.bringOnce(limited, task, at); !errors.Is(err, errReregister) {
			break
		}
	}
	if err != nil && context.Cause(limited) != nil {
		err = context.Cause(limited)
	}
	if err != nil {
		err = fmt.Errorf("fetch %s: %w", task, err)
		if !errors.Is(err, digest.ErrMismatch) && (isPeersFault(err) || errors.Is(err, p2p.ErrUnreachable)) {
			return &noPeerError{err}
		}
		return err
	}
	return nil
}

// noPeerError says that no peer of Dragonfly gave what was asked for, in whatever way each has failed.
type noPeerError struct{ error }

func (e *noPeerError) Unwrap() []error { return []error{e.error, wire.ErrAway} }

// bringOnce is one attempt to fetch a task, as a new peer.
func (e *Source) bringOnce(ctx context.Context, task p2p.Task, at *scheduler) error {
	d, err := e.newDownload(ctx, task, at)
	if err != nil {
		return err
	}
	if err = d.run(ctx); err == nil {
		// It may have been here before, damaged: schedulers may go on with the new peer only.
		if err := e.leave(ctx, d.id); err != nil {
			e.log.Debug("a scheduler goes on with a peer that is no more", "task", task.String(), "error", err)
		}
		e.hold(task, d.peerID) // before others hear of it
	}
	d.close(err)
	return err
}

// Offer implements [front.Source].
func (e *Source) Offer(ctx context.Context, c p2p.Commit) error {
	var failed error
	var ids []string
	for _, task := range whole.Tasks(c) {
		ids = append(ids, e.hold(task, ""))
	}
	for _, n := range c.Names {
		id, err := e.holdName(ctx, n.Tag, n.Name, n.Digest)
		if err != nil {
			e.log.Warn("a name is stored, and not announced yet: it will be", "name", n.Name, "tag", n.Tag,
				"error", err)
		}
		if id != "" {
			ids = append(ids, id)
		}
	}
	for _, id := range ids {
		if !e.schedulers.up() {
			failed = errDown
			continue // they are told when one is up again
		}
		if err := e.announce(ctx, id); err != nil {
			failed = err
			e.log.Warn("a task is stored, and not announced yet: it will be", "id", id, "error", err)
			if errors.Is(err, wire.ErrAway) {
				break // nor are the others: no caller waits for each of them
			}
		}
	}
	if tell := p2p.NoticeOf(ctx); tell != nil && failed != nil {
		tell(fmt.Sprintf("it is stored on this host, but %s: %v", whole.NotFoundYet, failed))
	}
	return nil
}

// Forget implements [front.Source]: it tells schedulers that tasks are not here any
// more, and asks whether others have them.
func (e *Source) Forget(ctx context.Context, d front.Deletion) (missed []front.Told) {
	for _, id := range e.namesGone(ctx, d.Tag) {
		if err := e.leave(ctx, id); err != nil {
			e.log.Debug("a name that is gone was not taken back", "id", id, "error", err)
		}
	}
	miss := func(task p2p.Task, reason string) {
		missed = append(missed, front.Told{
			Peer: whole.Name, Address: e.schedulers.of(taskID(task))[0].addr, Failed: reason})
	}
	for _, task := range d.Tasks {
		if err := e.leave(ctx, taskID(task)); err != nil {
			miss(task, err.Error()+": peers may ask this host for it until the scheduler forgets it")
			continue
		}
		_, _, err := e.lookup(ctx, task)
		if err == nil {
			miss(task, task.String()+": other hosts of Dragonfly have it still, and keep it: its delete is of one "+
				"host only, so delete it on each of them")
		} else if !errors.Is(err, p2p.ErrNotFound) {
			miss(task, "whether other hosts of Dragonfly have it still is not known: "+err.Error())
		} else {
			continue
		}
		break // the others are as this one
	}
	return missed
}
