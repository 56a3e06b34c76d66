// Package cluster is the engine that is a peer in a Dragonfly cluster: a store of this
// host whose blobs Dragonfly's schedulers know of and Dragonfly's daemons fetch, and
// which fetches theirs, over the v1 API of d7y.io/api/v2. There is no daemon of
// Dragonfly on this host; package dragonfly is for where there is one.
//
// Package whole has what both engines share. Dragonfly's own MD5s, which a peer makes up as it likes,
// prove nothing here: what peers give is stored only where it has the digest that
// was asked for. What goes out is verified before.
//
// Each task belongs to the scheduler that the hash ring of Dragonfly's daemons gives it.
// Schedulers forget: so all tasks are announced again and again.
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

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
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
	StallTimeout     time.Duration // without 1 KiB a second, after which a peer is given up; after half of it another one is asked, too; 10 s
	Timeout          time.Duration // of fetching a blob; 10 min
	AnnounceInterval time.Duration // between announcements of the host; 30 s
	SweepInterval    time.Duration // between announcements of all tasks; 1 min
	SweepRate        float64       // tasks a second in that; 50
	PeerLifetime     time.Duration // after which a task is announced as of a new peer: schedulers forget a peer after a day; 20 h
	UploadRate       int64         // bytes a second; 0 is no limit
	DownloadRate     int64         // bytes a second; 0 is no limit
	MaxUploads       int           // pieces that are sent at once; 64

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

// Engine is a store that is a peer in a Dragonfly cluster. It implements [p2p.Engine],
// and is safe for concurrent use.
//
// Of what is not here, schedulers know the size and no more: Stat fetches what could be
// a manifest. Of Info.Holders, the one that is asked is the task's scheduler: others hold
// the task where it knows of peers besides this one.
//
// What is committed is announced before Commit returns. A scheduler that does not answer
// fails nothing: the content is stored, and is announced when a scheduler does.
//
// For every task that is deleted here, this peer leaves it at its scheduler. Close leaves
// the cluster: schedulers that do not answer hold it up for LookupTimeout.
type Engine struct {
	*whole.Engine
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
	waiting    chan struct{} // and one for each of these and of those that wait for it

	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	background sync.WaitGroup // servers and announcements
	sweepNow   chan struct{}
	fresh      chan struct{} // closed when schedulers know nothing of an earlier process any more

	mu   sync.Mutex
	held map[string]*holding // by task ID
}

var _ p2p.Engine = (*Engine)(nil)

// New makes a store a peer in a Dragonfly cluster, and announces what it holds. The
// Engine takes over the store: it closes it. What an earlier one has left in the
// directory "dragonfly" of the store is removed. No scheduler need run yet;
// [Engine.Health] says whether one does.
func New(store *pieces.Store, opts Options) (*Engine, error) {
	opts.setDefaults()
	dir, err := whole.Dir(store)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		opts: opts, dir: dir, store: store, log: opts.Log,
		sums: newSums(), up: throttle.New(opts.UploadRate), down: throttle.New(opts.DownloadRate),
		client: newHTTPClient(opts), uploading: make(chan struct{}, opts.MaxUploads), sweepNow: make(chan struct{}, 1),
		waiting: make(chan struct{}, opts.MaxUploads+maxWaiting), fresh: make(chan struct{}), held: map[string]*holding{},
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
	e.Engine = whole.New(store, network{e}, whole.Options{Log: opts.Log})
	e.serve(listeners)
	e.background.Go(e.announceAll)
	return e, nil
}

// Address returns where other peers reach this one.
func (e *Engine) Address() string { return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.RpcPort)) }

// UploadAddress returns where other peers fetch pieces from this one.
func (e *Engine) UploadAddress() string {
	return net.JoinHostPort(e.host.Ip, fmt.Sprint(e.host.DownPort))
}

// network is what [whole.Engine] sees of the cluster.
type network struct{ *Engine }

// Health announces the host, and asks with that whether a scheduler answers.
func (n network) Health(ctx context.Context) error { return n.announceHostOnce(ctx) }

// Stop ends uploads and announcements.
func (n network) Stop() {
	n.cancel()
	n.uploads.Close() // its listener is closed; there is nothing else to report
	n.peers.Stop()
}

// Close leaves the cluster.
func (n network) Close() error {
	n.background.Wait()
	if err := n.leaveHost(context.Background()); err != nil {
		n.log.Warn("no scheduler of Dragonfly was told that this host leaves: they find out by themselves", "error", err)
	}
	n.client.CloseIdleConnections()
	return n.schedulers.close()
}

// Size implements [whole.Network].
func (n network) Size(ctx context.Context, task p2p.Task) (int64, error) {
	found, _, err := n.lookup(ctx, task)
	return found.GetContentLength(), err
}

// Deletable implements [whole.Network]: others may have what is not here.
func (n network) Deletable(ctx context.Context, task p2p.Task) error {
	_, _, err := n.lookup(ctx, task)
	return err
}

// Holders implements [whole.Network].
func (n network) Holders(ctx context.Context, task p2p.Task) (*p2p.Holders, error) {
	found, _, err := n.lookup(ctx, task)
	switch {
	case err == nil:
		others := int(found.GetPeerCount())
		if n.isHeld(taskID(task)) {
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

// Bring implements [whole.Network].
func (n network) Bring(ctx context.Context, task p2p.Task) error {
	found, at, err := n.lookup(ctx, task)
	if err == nil {
		err = n.Room(task, found.GetContentLength())
	}
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(ctx, n.opts.Timeout, fmt.Errorf("%w: it took longer than %s", wire.ErrAway, n.opts.Timeout))
	defer cancel()
	for range maxRegistrations {
		if err = n.bringOnce(limited, task, at, found.GetContentLength()); !errors.Is(err, errReregister) {
			break
		}
	}
	if err != nil && context.Cause(limited) != nil {
		err = context.Cause(limited)
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, err)
	}
	return nil
}

// bringOnce is one attempt to fetch a task, as a new peer.
func (e *Engine) bringOnce(ctx context.Context, task p2p.Task, at *scheduler, length int64) error {
	d, err := e.newDownload(task, at, length)
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

// Offer implements [whole.Network].
func (n network) Offer(ctx context.Context, tasks []p2p.Task) error {
	for _, task := range tasks {
		id := n.hold(task, "")
		if !n.schedulers.up() {
			continue // they are told when one is up again
		}
		if err := n.announce(ctx, id); err != nil {
			n.log.Warn("a task is stored, and not announced yet: it will be", "task", task.String(), "error", err)
			if errors.Is(err, wire.ErrAway) {
				break // nor are the others: no caller waits for each of them
			}
		}
	}
	return nil
}

// Forget implements [whole.Network]: it tells schedulers that tasks are not here any
// more, and asks whether others have them.
func (n network) Forget(ctx context.Context, tasks []p2p.Task, _ bool) (missed []p2p.Missed) {
	miss := func(task p2p.Task, reason string) {
		missed = append(missed, p2p.Missed{Peer: "Dragonfly", Address: n.schedulers.of(taskID(task))[0].addr, Reason: reason})
	}
	for _, task := range tasks {
		if err := n.leave(ctx, taskID(task)); err != nil {
			miss(task, err.Error()+": peers may ask this host for it until the scheduler forgets it")
			continue
		}
		_, _, err := n.lookup(ctx, task)
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
