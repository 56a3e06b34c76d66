package swarm

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// Options says how to be part of a swarm. Where a number is 0, its default counts.
type Options struct {
	// Identity proves who this daemon is: an ed25519 key, of which the peer ID is made.
	Identity crypto.PrivKey
	// Secret proves that this daemon is of the swarm.
	Secret []byte
	// Listen are the addresses, host:port, where peers connect for pieces.
	Listen []string
	// Plain has pieces move unencrypted between this daemon and others that have it set, too.
	Plain bool
	// Mode says what this daemon does for others and for its own callers. The default is Full.
	Mode Mode
	// Version is told to peers.
	Version string
	// Instance is this run of the daemon; the default is a new one.
	Instance *Instance

	LookupTimeout time.Duration // of asking the network what it has; 3 s
	StallTimeout  time.Duration // in which a request has to bring throttle.MinRate on average, or is given up; 10 s
	UploadRate    int64         // bytes a second; 0 is no limit
	DownloadRate  int64         // bytes a second; 0 is no limit
	UploadSlots   int           // uploads of one blob at once; schedule.Slots
	MaxUploads    int           // uploads at once; 64
	MaxRequests   int           // requests for pieces of one blob at once; schedule.Requests
	// connections that peers may have open here; 1024, or a quarter of the descriptors that the process may have
	MaxConns int
	Memory   int64 // bytes of pieces in memory, for uploads and for downloads each; 64 MiB

	// RememberDeletes is how long deletes are remembered: a peer that is away
	// for longer brings back what was deleted. 30 days.
	RememberDeletes time.Duration
	// KeepPartial is how long what has arrived of a blob is kept when nobody
	// wants it any more. 24 h.
	KeepPartial time.Duration

	// Now tells the time of imports, moves and deletes; the default is time.Now.
	Now func() time.Time
	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
	// Metrics, where it is not nil, gets the metrics.
	Metrics prometheus.Registerer

	tamper func(http.Handler) http.Handler // for tests: what the peer API is replaced with
}

func (o *Options) setDefaults() {
	def := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	span := func(n *time.Duration, d time.Duration) {
		if *n == 0 {
			*n = d
		}
	}
	span(&o.LookupTimeout, 3*time.Second)
	span(&o.StallTimeout, 10*time.Second)
	span(&o.RememberDeletes, 30*24*time.Hour)
	span(&o.KeepPartial, 24*time.Hour)
	def(&o.UploadSlots, schedule.Slots)
	def(&o.MaxUploads, 64)
	def(&o.MaxRequests, schedule.Requests)
	def(&o.MaxConns, connpool.Share(1024, 4))
	if o.Memory == 0 {
		o.Memory = 64 << 20
	}
	if o.Mode == "" {
		o.Mode = Full
	}
	if o.Instance == nil {
		o.Instance = NewInstance()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Errors of modes.
var (
	errNeverServe = &statusError{http.StatusForbidden, "this daemon serves nothing"}
	errSeedOnly   = fmt.Errorf("%w: this daemon is seed-only, and fetches nothing", p2p.ErrNotFound)
)

// Swarm is a source of content: peers, that are asked for what is not here, and get what is.
// It is safe for concurrent use.
type Swarm struct {
	opts      Options
	front     *front.Engine
	store     *pieces.Store
	network   Network
	client    *client
	peers     *peerTable
	questions *questions
	deletes   *deletes
	names     *names
	clock     *clock
	meetings  *meetings
	api       *api
	instance  *Instance
	uploads   *uploads
	downloads *downloads
	buffers   *buffers
	limit     *rate.Limiter // of what is fetched; nil: none
	log       *slog.Logger
	metrics   *metrics
	manifests *manifestCache
	recent    *recent

	announcements announcements
	unwatch       func() // ends what keeps them up to date

	server *http.Server

	ctx        context.Context // ends with Close
	cancel     context.CancelCauseFunc
	background sync.WaitGroup // goroutines that are no call

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu        sync.Mutex
	releasing map[string]bool // tags of which it is looked for what is left to nobody
}

// New makes the store of an engine part of a swarm, which becomes one of the engine's sources,
// and announces what the store holds. Where it returns nil as its error, the Swarm takes over
// network: it closes it.
//
//nolint:funlen // the parts are put together in one place
func New(f *front.Engine, network Network, opts Options) (_ *Swarm, err error) {
	opts.setDefaults()
	security, err := newSecurity(opts.Identity, opts.Secret, opts.Plain)
	if err != nil {
		return nil, err
	}
	s := &Swarm{
		opts:     opts,
		front:    f,
		store:    f.Store(),
		network:  network,
		peers:    newPeerTable(),
		instance: opts.Instance,
		uploads: &uploads{
			slots:   opts.UploadSlots,
			all:     semaphore.NewWeighted(int64(opts.MaxUploads)),
			limiter: throttle.New(opts.UploadRate),
			chunk:   sendChunk,
			buffers: newBuffers(opts.Memory),
			open:    connpool.Share(maxOpen, 8),
			active:  map[digest.Digest]*upload{},
		},
		buffers:       newBuffers(opts.Memory),
		limit:         throttle.New(opts.DownloadRate),
		log:           opts.Log,
		manifests:     newManifestCache(),
		recent:        newRecent(),
		downloads:     &downloads{all: map[digest.Digest]*download{}},
		releasing:     map[string]bool{},
		announcements: announcements{network: network, store: f.Store(), log: opts.Log, gone: map[Key]bool{}},
		unwatch:       func() {},
	}
	s.client = newClient(security, network, s.peers, s.instance, opts.Now)
	s.instance.mu.Lock()
	s.instance.log = opts.Log
	s.instance.mu.Unlock()
	s.clock = &clock{own: opts.Now, network: network, peers: s.peers}
	s.store.Believe(s.clock.now)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.deletes = &deletes{
		store: s.store, network: network, peers: s.peers, client: s.client, forget: s.forget,
		now: opts.Now, remember: opts.RememberDeletes, log: opts.Log, ctx: s.ctx,
		told: make(chan toldDelete, 1024), applied: applied{results: map[string]pieces.DeleteResult{}},
	}
	s.questions = &questions{
		network: network, peers: s.peers, client: s.client, security: security, deletes: s.deletes,
		timeout: opts.LookupTimeout, log: opts.Log, ctx: s.ctx, background: &s.background,
		searches: make(chan struct{}, maxSearches),
	}
	s.deletes.questions = s.questions
	s.names = &names{
		store: s.store, peers: s.peers, client: s.client, questions: s.questions, deletes: s.deletes,
		recent: s.recent, log: opts.Log, ctx: s.ctx, recalled: make(chan struct{}),
	}
	s.meetings = &meetings{
		network: network, peers: s.peers, client: s.client, instance: s.instance, clock: s.clock,
		deletes: s.deletes, names: s.names, timeout: opts.StallTimeout, log: opts.Log, ctx: s.ctx,
	}
	s.metrics = newMetrics(opts.Metrics, s) // it reads the parts above
	s.api = &api{
		opts: &s.opts, front: f, store: s.store, network: network, peers: s.peers, instance: s.instance,
		meetings: s.meetings, names: s.names, deletes: s.deletes, downloads: s.downloads, uploads: s.uploads,
		inbox: newInbox(), mend: s.mendLater, metrics: s.metrics, log: opts.Log,
	}

	conns := newConns(opts.MaxConns)
	listeners := []net.Listener{&listener{network.Listener(), security, true, conns}}
	for _, address := range opts.Listen {
		l, err := net.Listen("tcp", address)
		if err != nil {
			for _, l := range listeners[1:] {
				l.Close()
			}
			return nil, fmt.Errorf("listen for peers: %w", err)
		}
		s.api.advertise = append(s.api.advertise, l.Addr().String())
		listeners = append(listeners, &listener{l, security, false, conns})
	}
	handler := s.api.handler()
	if opts.tamper != nil {
		handler = opts.tamper(handler)
	}
	s.server = &http.Server{
		Handler:           handler,
		ConnContext:       withConn,
		ReadHeaderTimeout: 20 * time.Second,
		IdleTimeout:       2 * idleTimeout, // the client's ends first
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(opts.Log.Handler(), slog.LevelDebug),
	}
	if opts.Mode != NeverServe {
		s.unwatch = s.store.Watch(s.announcements.changed)
		s.background.Go(func() { s.announcements.announceAll(s.ctx) })
	}
	for _, l := range listeners {
		s.background.Go(func() { _ = s.server.Serve(l) })
	}
	s.background.Go(s.names.recall)
	s.background.Go(s.tend)
	s.background.Go(s.deletes.tellAll)
	network.OnConnect(func(p peer.ID) {
		if s.begin(s.ctx) != nil {
			return
		}
		s.peers.get(p).heard()
		s.background.Go(func() { s.meetings.greet(p) })
		s.calls.Done()
	})
	f.Add(s)
	return s, nil
}

// Addresses returns where peers connect for pieces, as HOST:PORT.
func (s *Swarm) Addresses() []string { return slices.Clone(s.api.advertise) }

// ID returns the ID of this daemon among peers.
func (s *Swarm) ID() string { return s.network.Self().String() }

// begin announces a call. Where it returns nil, the caller calls s.calls.Done.
func (s *Swarm) begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	s.callMu.Lock()
	defer s.callMu.Unlock()
	if s.closed {
		return fmt.Errorf("swarm: %w", p2p.ErrClosed)
	}
	s.calls.Add(1)
	return nil
}

// Stop implements [front.Source]: downloads end; what has arrived of them is kept.
func (s *Swarm) Stop() {
	s.callMu.Lock()
	s.closed = true
	s.callMu.Unlock()
	s.cancel(fmt.Errorf("swarm: %w", p2p.ErrClosed))
}

// Close implements [front.Source]: it leaves the swarm.
func (s *Swarm) Close() error {
	s.Stop()
	s.calls.Wait()
	s.server.Close()
	s.client.close()
	err := s.network.Close()
	s.background.Wait()
	s.questions.late.wait()
	s.client.late.wait()
	s.uploads.sweep(true)
	s.unwatch()
	return err
}

// tend does what is to be done now and then.
func (s *Swarm) tend() {
	tick := time.NewTicker(uploadIdle / 2)
	defer tick.Stop()
	var housekept time.Time
	met := time.Now()
	for {
		s.uploads.sweep(false)
		if time.Since(met) > helloInterval {
			met = time.Now()
			s.meetings.meetAll()
		}
		if time.Since(housekept) > time.Hour {
			housekept = time.Now()
			now := s.opts.Now()
			if err := s.store.DropPartials(housekept.Add(-s.opts.KeepPartial)); err != nil {
				s.log.Warn("what has arrived of blobs that nobody wants could not be removed", "error", err)
			}
			if n, err := s.store.ForgetDeletes(s.ctx, now.Add(-s.opts.RememberDeletes)); err != nil &&
				s.ctx.Err() == nil {
				s.log.Warn("old deletes could not be forgotten", "error", err)
			} else if n > 0 {
				s.log.Info("forgot old deletes", "deletes", n)
			}
		}
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
	}
}

// caught notes that a peer sent something false of a blob.
func (s *Swarm) caught(p peer.ID, d digest.Digest, err error) {
	e := s.peers.get(p)
	if v := e.version(); v != "" && v != s.opts.Version {
		err = fmt.Errorf("%w (its dfdaemon is %s, this one %s)", err, v, s.opts.Version)
	}
	e.fault(err.Error())
	s.metrics.faults.WithLabelValues(p.String()).Inc()
	s.log.Warn("a peer was caught with a lie, and is not asked for this blob any more", "peer", p.String(),
		"address", e.lastAddress(), "digest", d, "error", err)
}

// nameOf names a peer in messages.
func (s *Swarm) nameOf(p peer.ID) string {
	if address := s.peers.get(p).lastAddress(); address != "" {
		return fmt.Sprintf("%s (%s)", p, address)
	}
	return p.String()
}

// Peers implements [p2p.Peering].
func (s *Swarm) Peers(ctx context.Context) ([]p2p.Peer, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	var connected, others []p2p.Peer
	describe := func(p peer.ID, isConnected bool) p2p.Peer {
		d := s.peers.get(p).describe(s.network.Addresses(p), isConnected)
		if d.Reason == "" {
			d.Reason = s.names.conflicts.with(s.ctx, s.store, p)
		}
		return d
	}
	seen := map[peer.ID]bool{s.network.Self(): true}
	for _, p := range s.network.Connected() {
		seen[p] = true
		connected = append(connected, describe(p, true))
	}
	for _, p := range s.peers.known() {
		if !seen[p] {
			others = append(others, describe(p, false))
		}
	}
	if where := s.instance.other(); where != "" {
		connected = append(connected, p2p.Peer{
			ID: s.ID(), State: p2p.PeerCloned, Addresses: []string{where}, LastSeen: s.opts.Now(),
			Version: s.opts.Version, Reason: errTwin.Error(),
		})
	}
	return append(connected, others...), nil
}
