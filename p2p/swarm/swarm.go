package swarm

import (
	"context"
	"errors"
	"fmt"
	"iter"
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
	"github.com/dfcache/dfcache/p2p/manifest"
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
	MaxConns      int           // connections that peers may have open here; 1024, or a quarter of the descriptors that the process may have
	Memory        int64         // bytes of pieces in memory, for uploads and for downloads each; 64 MiB

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

// Swarm is a store that asks its peers for what it does not have, and gives
// them what it has. It implements [p2p.Engine] and is safe for concurrent use.
type Swarm struct {
	opts      Options
	store     *pieces.Store
	network   Network
	security  *security
	client    *client
	peers     *peerTable
	instance  *Instance
	inbox     *inbox
	uploads   *uploads
	buffers   *buffers
	limit     *rate.Limiter // of what is fetched; nil: none
	log       *slog.Logger
	metrics   *metrics
	advertise []string // where peers connect for pieces
	manifests *manifestCache
	recent    *recent
	moves     moves
	recalled  chan struct{} // is closed when moves has those of earlier runs
	conflicts conflicts

	announcements announcements
	unwatch       func() // ends what keeps them up to date

	agreedMu sync.Mutex
	agreed   time.Duration // how far most clocks were ahead of this host's when it showed agreedAt
	agreedAt reading

	server *http.Server

	ctx        context.Context // ends with Close
	cancel     context.CancelCauseFunc
	background sync.WaitGroup // goroutines that are no call
	late       late           // questions to peers, which may outlive who has asked them
	searches   chan struct{}  // holds a token for every search for announcements

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu        sync.Mutex
	downloads map[digest.Digest]*download
	told      chan toldDelete // what is to be told to peers
	applied   applied
	releasing map[string]bool // tags of which it is looked for what is left to nobody
}

var _ p2p.Engine = (*Swarm)(nil)

// New makes a store part of a swarm. The Swarm takes over store and network: it
// closes them. What the store holds is announced.
func New(store *pieces.Store, network Network, opts Options) (_ *Swarm, err error) {
	opts.setDefaults()
	security, err := newSecurity(opts.Identity, opts.Secret, opts.Plain)
	if err != nil {
		return nil, err
	}
	s := &Swarm{
		opts:     opts,
		store:    store,
		network:  network,
		security: security,
		peers:    newPeerTable(),
		instance: opts.Instance,
		inbox:    newInbox(),
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
		downloads:     map[digest.Digest]*download{},
		told:          make(chan toldDelete, 1024),
		searches:      make(chan struct{}, maxSearches),
		applied:       applied{results: map[string]pieces.DeleteResult{}},
		releasing:     map[string]bool{},
		recalled:      make(chan struct{}),
		announcements: announcements{network: network, store: store, gone: map[Key]bool{}},
		unwatch:       func() {},
	}
	s.metrics = newMetrics(opts.Metrics, s)
	s.client = newClient(security, network, s.peers, s.instance, opts.Now)
	s.instance.mu.Lock()
	s.instance.log = opts.Log
	s.instance.mu.Unlock()
	store.Believe(s.now)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())

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
		s.advertise = append(s.advertise, l.Addr().String())
		listeners = append(listeners, &listener{l, security, false, conns})
	}
	handler := s.handler()
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
		s.unwatch = store.Watch(s.announcements.changed)
		s.background.Go(s.announceAll)
	}
	for _, l := range listeners {
		s.background.Go(func() { _ = s.server.Serve(l) })
	}
	s.background.Go(s.recall)
	s.background.Go(s.tend)
	s.background.Go(s.tellAll)
	network.OnConnect(func(p peer.ID) {
		if s.begin(s.ctx) != nil {
			return
		}
		s.peers.get(p).heard()
		s.background.Go(func() { s.greet(p) })
		s.calls.Done()
	})
	return s, nil
}

// Addresses returns where peers connect for pieces, as HOST:PORT.
func (s *Swarm) Addresses() []string { return slices.Clone(s.advertise) }

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

// Close leaves the swarm and closes the store. Downloads end; what has arrived
// of them is kept.
func (s *Swarm) Close() error {
	s.callMu.Lock()
	closed := s.closed
	s.closed = true
	s.callMu.Unlock()
	if closed {
		return nil
	}
	s.cancel(fmt.Errorf("swarm: %w", p2p.ErrClosed))
	s.calls.Wait()
	s.server.Close()
	s.client.close()
	err := s.network.Close()
	s.background.Wait()
	s.late.wait()
	s.client.late.wait()
	s.uploads.sweep(true)
	s.unwatch()
	return errors.Join(err, s.store.Close())
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
			s.meetAll()
		}
		if time.Since(housekept) > time.Hour {
			housekept = time.Now()
			now := s.opts.Now()
			if err := s.store.DropPartials(housekept.Add(-s.opts.KeepPartial)); err != nil {
				s.log.Warn("what has arrived of blobs that nobody wants could not be removed", "error", err)
			}
			if n, err := s.store.ForgetDeletes(s.ctx, now.Add(-s.opts.RememberDeletes)); err != nil && s.ctx.Err() == nil {
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

// Stat implements [p2p.Engine].
func (s *Swarm) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return s.stat(ctx, tag, cid, opts, false)
}

// HoldManifest implements [p2p.Holder].
func (s *Swarm) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return s.stat(ctx, tag, cid, opts, true)
}

// stat describes what cid names, and keeps the name and its manifest where hold is set.
func (s *Swarm) stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions, hold bool) (info p2p.Info, err error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer s.calls.Done()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Info{}, err
	}
	if opts.Scope == p2p.Local || s.opts.Mode == SeedOnly {
		return s.statLocal(ctx, tag, cid, opts)
	}
	if cid.CacheID() != "" {
		info, err = s.statName(ctx, tag, cid, opts, hold)
	} else {
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		var name *p2p.NewName
		if hold {
			name = s.ledTo(ctx, task)
		}
		info, err = s.statDigest(ctx, task, opts, name, hold)
	}
	if err == nil && opts.Lease && len(info.Lacks) > 0 && !info.Remote {
		info.Lacks = s.lacking(ctx, info)
	}
	return info, err
}

// statLocal describes what is here, or has begun to arrive.
func (s *Swarm) statLocal(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	info, err := s.store.Stat(ctx, tag, cid, opts)
	if errors.Is(err, p2p.ErrNotFound) && cid.Digest() != "" {
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		if d := s.downloadOf(task); d != nil {
			if info, ok := d.info(task); ok {
				return info, nil
			}
		}
	}
	return info, err
}

// localOnly returns the same options for what is here alone.
func localOnly(opts p2p.StatOptions) p2p.StatOptions {
	return p2p.StatOptions{Scope: p2p.Local, Manifest: opts.Manifest, ContentOnly: opts.ContentOnly, MaxContent: opts.MaxContent, Lease: opts.Lease}
}

// statName describes what a name stands for.
func (s *Swarm) statName(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions, hold bool) (p2p.Info, error) {
	name, err := s.resolve(ctx, tag, cid.CacheID())
	if err != nil {
		return p2p.Info{}, err
	}
	if name.from == "" {
		// It may be moved right now: the store has the last word on what is here.
		info, err := s.store.Stat(ctx, tag, cid, localOnly(opts))
		if err != nil || !opts.Holders {
			return s.withRefs(ctx, info, opts, ""), err
		}
		return s.statDigest(ctx, info.Task, opts, nil, hold)
	}
	n := &p2p.NewName{
		Tag: tag, Name: cid.CacheID(), Digest: name.digest, Updated: name.version.At, After: name.version.After, KeepOld: !name.letGo,
	}
	if !hold {
		s.recent.lead(*n)
	}
	return s.statDigest(ctx, p2p.Task{Tag: tag, Digest: name.digest}, opts, n, hold)
}

// statDigest describes a task. name is what led to it where that is not here.
func (s *Swarm) statDigest(ctx context.Context, task p2p.Task, opts p2p.StatOptions, name *p2p.NewName, hold bool) (p2p.Info, error) {
	info, err := s.statLocal(ctx, task.Tag, digest.FromDigest(task.Digest), localOnly(opts))
	here, damage := err == nil, err
	// What is damaged here may be whole elsewhere.
	if !here && !errors.Is(err, p2p.ErrNotFound) && !errors.Is(err, digest.ErrCorrupt) {
		return info, err
	}
	var from peer.ID
	if !here || opts.Holders {
		var remote p2p.Info
		ask := s.statTask
		if name != nil {
			ask = s.statNamed
		}
		remote, from, err = ask(ctx, task, opts)
		switch {
		case err == nil && here:
			info.Holders = remote.Holders
		case err == nil:
			info = remote
		case !here && errors.Is(damage, digest.ErrCorrupt) && (errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable)):
			return info, damage // it is here, and nobody has it whole
		case !here:
			return info, err
		case errors.Is(err, p2p.ErrNotFound), errors.Is(err, p2p.ErrUnreachable):
			info.Holders = remote.Holders
		default:
			return info, err
		}
	}
	// Whether it is a manifest is for its content to say, not for whoever answered first.
	mayBe := info.IsManifest || !here && from != "" && (name != nil || info.Size <= p2p.MaxManifest)
	if !opts.Manifest || !mayBe {
		return info, nil
	}
	if info.Manifest == nil {
		content, err := s.fetchManifest(ctx, task, from)
		if err != nil && ctx.Err() == nil && !info.IsManifest && info.Size > p2p.MaxManifest {
			return info, nil // nobody says otherwise
		}
		if err != nil {
			return info, err
		}
		refs := s.describe(&info, content)
		if hold {
			if err := s.keep(ctx, info, content, refs, name); err != nil {
				return info, err
			}
			info.Remote, info.Held = false, info.Pieces
		}
		if refs == nil {
			return info, nil
		}
		info.Manifest = &p2p.Manifest{Content: content}
	} else if hold && name != nil {
		if err := s.commit(ctx, p2p.Commit{Names: []p2p.NewName{*name}}); err != nil {
			return info, err
		}
	}
	return s.withRefs(ctx, info, opts, from), nil
}

// withRefs completes what is known of what a manifest refers to with what peers
// know, where one of them has told of it or all are asked.
func (s *Swarm) withRefs(ctx context.Context, info p2p.Info, opts p2p.StatOptions, from peer.ID) p2p.Info {
	if info.Manifest == nil || opts.ContentOnly || from == "" && !opts.Holders {
		return info
	}
	_, parsed := manifest.Describe(info.MediaType, info.Manifest.Content)
	if parsed == nil {
		return info
	}
	known := map[digest.Digest]p2p.Info{}
	for _, ref := range info.Manifest.Refs {
		known[ref.Task.Digest] = ref
	}
	var refs []p2p.Info
	var missing []taskRef
	for _, d := range parsed.Refs[:min(len(parsed.Refs), p2p.MaxRefs)] {
		task := p2p.Task{Tag: info.Task.Tag, Digest: d}
		ref, found := known[d]
		if !found {
			var err error
			ref, err = s.statLocal(ctx, task.Tag, digest.FromDigest(d), p2p.StatOptions{Scope: p2p.Local})
			found = err == nil
		}
		if found {
			known[d] = ref
		} else {
			missing = append(missing, taskRef(task))
		}
		if opts.Holders {
			if remote, _, err := s.statTask(ctx, task, p2p.StatOptions{Holders: true}); err == nil || found {
				if !found {
					ref = remote
				}
				ref.Holders = remote.Holders
				known[d] = ref
			}
		}
	}
	if len(missing) > 0 && from != "" && !opts.Holders {
		for i, state := range s.statesOf(ctx, from, missing) {
			if task := p2p.Task(missing[i]); state != nil {
				known[task.Digest] = infoOf(task, state)
			}
		}
	}
	for _, d := range parsed.Refs[:min(len(parsed.Refs), p2p.MaxRefs)] {
		if ref, found := known[d]; found {
			refs = append(refs, ref)
		}
	}
	info.Manifest.Refs = refs
	return info
}

// Open implements [p2p.Engine]. A blob that is here is a [*pieces.Blob], one
// that is not a [*Arriving].
func (s *Swarm) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	blob, err := s.store.Open(ctx, task, p2p.Local)
	if err == nil || scope == p2p.Local || !errors.Is(err, p2p.ErrNotFound) && !errors.Is(err, digest.ErrCorrupt) {
		return blob, err
	}
	if s.opts.Mode == SeedOnly {
		return nil, fmt.Errorf("%s: %w", task, errSeedOnly)
	}
	arriving, err := s.fetch(ctx, task, false)
	if err != nil {
		return nil, err
	}
	if arriving == nil { // its bytes were here, under another tag
		return s.store.Open(ctx, task, p2p.Local)
	}
	return arriving, nil
}

// Verify implements [p2p.Holder].
func (s *Swarm) Verify(ctx context.Context, task p2p.Task) error { return s.store.Verify(ctx, task) }

// Mend implements [p2p.Holder].
func (s *Swarm) Mend(ctx context.Context, task p2p.Task) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.calls.Done()
	return s.mend(ctx, task)
}

// mend makes a blob whole that is damaged here, and returns when it is stored. Its
// good pieces are not fetched.
func (s *Swarm) mend(ctx context.Context, task p2p.Task) error {
	if _, err := s.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local}); err != nil && !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	// Whoever has met the damage may have read in another process.
	if err := s.store.Recheck(ctx, task.Digest); !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	if s.opts.Mode == SeedOnly {
		return fmt.Errorf("mend %s: %w", task, errSeedOnly)
	}
	arriving, err := s.fetch(ctx, task, true)
	if arriving != nil {
		err = errors.Join(arriving.stored(ctx), arriving.Close())
	}
	if err != nil {
		return fmt.Errorf("mend %s: %w", task, err)
	}
	s.log.Info("a damaged blob was mended", "task", task.String())
	return nil
}

// mendLater has a blob mended that nobody here waits for.
func (s *Swarm) mendLater(task p2p.Task) {
	if s.begin(s.ctx) != nil {
		return
	}
	defer s.calls.Done()
	s.background.Go(func() {
		if err := s.mend(s.ctx, task); err != nil && s.ctx.Err() == nil {
			s.log.Error("a blob is damaged, and no peer could mend it: import the file again, or delete it", "task", task.String(), "error", err)
		}
	})
}

// Ingest implements [p2p.Engine].
func (s *Swarm) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	in, err := s.store.Ingest(ctx)
	if err != nil {
		return nil, err
	}
	return &ingest{in, ctx, s}, nil
}

// ingest dates the names that are committed.
type ingest struct {
	p2p.Ingest
	ctx context.Context
	s   *Swarm
}

func (in *ingest) Commit(c p2p.Commit) error {
	for _, n := range c.Tasks {
		if n.Manifest != nil {
			for _, d := range n.Manifest.Needs {
				if err := in.s.awaitStored(in.ctx, p2p.Task{Tag: n.Task.Tag, Digest: d}); err != nil {
					return err
				}
			}
		}
	}
	c.Names = in.s.afterAll(in.ctx, c.Names)
	if err := in.Ingest.Commit(c); err != nil {
		return err
	}
	if in.s.begin(context.Background()) == nil {
		for _, n := range c.Names {
			in.s.moves.add(nameRef{n.Tag, n.Name})
		}
		in.s.calls.Done()
	}
	return nil
}

// afterAll returns names that are moved here, with what peers know of them: whoever
// moves a name does it after all that can be seen of it, whatever the clocks say.
// A peer that does not answer in time does not keep a name from being moved.
func (s *Swarm) afterAll(ctx context.Context, names []p2p.NewName) []p2p.NewName {
	names = slices.Clone(names)
	ctx, cancel := s.within(ctx)
	defer cancel()
	for i := range names {
		n := &names[i]
		mine, err := s.nameState(ctx, n.Tag, n.Name)
		if err != nil {
			continue // the store will say why
		}
		l := s.lookup(ctx, &findRequest{Names: []nameRef{{n.Tag, n.Name}}}, nameKey(n.Tag, n.Name), true)
		for a := range l.answers {
			theirs := a.reply.Names[0]
			if theirs == nil {
				continue
			}
			if at := theirs.Updated; at.After(n.After) && (mine == nil || !s.store.Covers(mine.gone(s.store.Limit()), at)) {
				n.After = at
			}
			if at := theirs.gone(s.store.Limit()).Last(s.store.Limit()); at.After(n.After) {
				n.After = at
			}
		}
		l.end()
	}
	return names
}

// awaitStored waits until a blob of which all has arrived is in the store: who
// has read it may build on it.
func (s *Swarm) awaitStored(ctx context.Context, task p2p.Task) error {
	d := s.downloadOf(task)
	if d == nil {
		return nil
	}
	d.mu.Lock()
	proven := d.proven
	d.mu.Unlock()
	if !proven {
		return nil
	}
	select {
	case <-d.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// commit commits what needs no new content.
func (s *Swarm) commit(ctx context.Context, c p2p.Commit) error {
	in, err := s.store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	return in.Commit(c)
}

// List implements [p2p.Engine].
func (s *Swarm) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return s.store.List(ctx, q)
}

// HoldReferrers implements [p2p.Holder].
func (s *Swarm) HoldReferrers(ctx context.Context, task p2p.Task) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.calls.Done()
	if err := task.Validate(); err != nil || s.opts.Mode == SeedOnly {
		return err
	}
	return s.bringReferrers(ctx, task)
}

// caught notes that a peer lied about a blob.
func (s *Swarm) caught(p peer.ID, d digest.Digest, err error) {
	e := s.peers.get(p)
	if v := e.version(); v != "" && v != s.opts.Version {
		err = fmt.Errorf("%w (its dfdaemon is %s, this one %s)", err, v, s.opts.Version)
	}
	e.fault(err.Error())
	s.metrics.faults.WithLabelValues(p.String()).Inc()
	s.log.Warn("a peer was caught with a lie, and is not asked for this blob any more", "peer", p.String(), "address", e.lastAddress(), "digest", d, "error", err)
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
			d.Reason = s.conflicts.with(s, p)
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
			ID: s.ID(), State: p2p.PeerCloned, Addresses: []string{where}, LastSeen: s.opts.Now(), Version: s.opts.Version, Reason: errTwin.Error(),
		})
	}
	return append(connected, others...), nil
}
