package swarm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
	"github.com/dfcache/dfcache/p2p/throttle"
)

const (
	// maxSources is how many peers one download asks.
	maxSources = 32
	// searchInterval is how often a download looks for further sources.
	searchInterval = 15 * time.Second
	// maxFailed is how often a source may fail without a fault of its own.
	maxFailed = 5
	// quietFor is how long a download may make no progress with one hash chain
	// while there are sources that have another.
	quietFor = 2 * time.Second
	// smallBlob is the size in bytes up to which one source is enough.
	smallBlob = 1 << 20
	// tickInterval is how often a download looks at the clock.
	tickInterval = 200 * time.Millisecond
)

var (
	errStalled = errors.New("it sent nothing for too long")
	errUseless = errors.New("it has come from another peer")
)

// download fetches one blob, for all who want it. Its loop, run, owns what
// decides; what readers see is guarded by mu.
type download struct {
	s       *Swarm
	digest  digest.Digest
	ctx     context.Context
	cancel  context.CancelCauseFunc
	partial *pieces.Partial
	events  chan func()
	calls   sync.WaitGroup // goroutines that send events
	ended   chan struct{}  // closed when nothing of it is left

	// These belong to run.
	sched      *schedule.Download
	active     linksHash // the chain in use
	chains     map[linksHash]*chain
	sources    map[peer.ID]*source
	prefer     *schedule.Set // what readers wait for
	requests   map[int]context.CancelCauseFunc
	hinted     map[peer.ID]bool
	searching  bool
	nextSearch time.Time
	searched   time.Time // when it was last looked for sources
	searches   int       // how often
	missed     error     // of the last of these
	progress   time.Time // when a piece arrived, or a chain was chosen

	mu       sync.Mutex
	tasks    map[p2p.Task]p2p.Info // who wants it, as peers describe it
	readers  map[*Arriving]struct{}
	waiting  int           // for the first chain
	table    *digest.Table // nil until there is a chain
	links    linksHash
	have     *schedule.Set // replaced, never changed
	more     chan struct{} // closed, and replaced, when anything here changes
	proven   bool
	sealed   bool // no task is added any more
	err      error
	taken    map[peer.ID]int64
	storeErr error
}

// chain is a size and a hash chain that some sources say the blob has.
type chain struct {
	links
	tried time.Time // when it was chosen last
}

// source is a peer that has pieces.
type source struct {
	id       peer.ID
	task     p2p.Task
	size     int64 // of the blob, as it says
	have     *schedule.Set
	stated   bool // chain is what it has said
	chain    linksHash
	asking   bool      // for its chain
	news     bool      // a request for news is under way
	failed   int       // in a row
	resting  bool      // after a failure
	away     time.Time // until when
	excluded bool      // for good, as far as this blob goes
}

// fetch returns a reader of a blob that is not here, or is damaged, and has it
// fetched; or nil, where its bytes were here and only the task was not, or where
// it has been mended meanwhile.
func (s *Swarm) fetch(ctx context.Context, task p2p.Task, damaged bool) (*Arriving, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	for {
		if held, err := s.store.Holds(ctx, task.Digest); err != nil {
			return nil, err
		} else if held && !damaged {
			info, _, err := s.statTask(ctx, task, false)
			if err != nil {
				return nil, err
			}
			// A blob that is damaged here is fetched as if it were not.
			if err := s.adopt(ctx, info); !errors.Is(err, digest.ErrCorrupt) {
				return nil, err
			}
		}
		d, err := s.download(task)
		if err != nil {
			return nil, err
		}
		if d == nil && damaged {
			return nil, nil
		}
		if d == nil {
			continue // one has just ended, maybe well
		}
		a, err := s.openTask(ctx, d, task)
		if !errors.Is(err, errSealed) {
			return a, err
		}
		select {
		case <-d.ended:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

var errSealed = errors.New("the download is over")

// openTask opens a task's blob of a download that was joined for it. It fails
// with errSealed where that is over, and the task is not of it.
func (s *Swarm) openTask(ctx context.Context, d *download, task p2p.Task) (*Arriving, error) {
	known, sealed := d.wants(task)
	var err error
	if sealed {
		err = errSealed
	} else if !known {
		var info p2p.Info
		if info, _, err = s.statTask(ctx, task, false); err == nil {
			err = d.addTask(info)
		}
	}
	if err != nil {
		d.leave()
		return nil, err
	}
	return d.open(ctx)
}

// download returns the download of a task's blob, and begins one where there is
// none; or nil, when one has just ended. The caller has it open or leaves it.
func (s *Swarm) download(task p2p.Task) (*download, error) {
	s.mu.Lock()
	d := s.downloads[task.Digest]
	if d == nil {
		defer s.mu.Unlock()
		return s.startDownload(task)
	}
	s.mu.Unlock()
	if d.join() {
		return d, nil
	}
	<-d.ended
	return nil, nil
}

// startDownload begins a download. s.mu is held.
func (s *Swarm) startDownload(task p2p.Task) (*download, error) {
	partial, err := s.store.Partial(s.ctx, task.Digest)
	if err != nil {
		return nil, err
	}
	d := &download{
		s: s, digest: task.Digest, partial: partial,
		events:   make(chan func()),
		ended:    make(chan struct{}),
		chains:   map[linksHash]*chain{},
		sources:  map[peer.ID]*source{},
		requests: map[int]context.CancelCauseFunc{},
		hinted:   map[peer.ID]bool{},
		tasks:    map[p2p.Task]p2p.Info{task: {Task: task}},
		readers:  map[*Arriving]struct{}{},
		waiting:  1,
		more:     make(chan struct{}),
		taken:    map[peer.ID]int64{},
		storeErr: errors.New("it has not been stored"),
	}
	d.ctx, d.cancel = context.WithCancelCause(s.ctx)
	s.downloads[task.Digest] = d
	s.background.Go(d.run)
	return d, nil
}

// downloadOf returns the download that fetches a task, or nil.
func (s *Swarm) downloadOf(task p2p.Task) *download {
	s.mu.Lock()
	d := s.downloads[task.Digest]
	s.mu.Unlock()
	if d == nil {
		return nil
	}
	if known, _ := d.wants(task); !known {
		return nil
	}
	return d
}

// join counts one more who waits. It reports false where the download is over.
func (d *download) join() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil || d.ctx.Err() != nil {
		return false
	}
	d.waiting++
	return true
}

// leave takes back a join.
func (d *download) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting--
	d.stopIfUnwanted()
}

// stopIfUnwanted ends a download that nobody waits for. d.mu is held.
func (d *download) stopIfUnwanted() {
	if d.waiting == 0 && len(d.readers) == 0 && !d.proven {
		d.cancel(errUnwanted)
	}
}

var errUnwanted = errors.New("nobody waits for it any more")

func (d *download) wants(task p2p.Task) (known, sealed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, known = d.tasks[task]
	return known, d.sealed
}

// wanted returns the tasks that are fetched, of which there is always one.
func (d *download) wanted() []p2p.Task {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.tasks))
}

// keys returns what is announced of them.
func (d *download) keys() (keys []Key) {
	for _, t := range d.wanted() {
		keys = append(keys, taskKey(t))
	}
	return keys
}

// addTask has a further task committed when the blob is complete.
func (d *download) addTask(info p2p.Info) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sealed {
		return errSealed
	}
	d.describe(info)
	return nil
}

// describe notes what a peer says of a task. d.mu is held.
func (d *download) describe(info p2p.Info) {
	known := d.tasks[info.Task]
	if known.Origin.Before(info.Origin) {
		known.Origin = info.Origin
	}
	if known.MediaType == "" {
		known.MediaType = info.MediaType
	}
	known.IsManifest = known.IsManifest || info.IsManifest
	known.Keep = max(known.Keep, info.Keep)
	known.Task = info.Task
	d.tasks[info.Task] = known
}

// changed tells all who wait that there is something new. d.mu is held.
func (d *download) changed() {
	close(d.more)
	d.more = make(chan struct{})
}

// open waits until the size of the blob is known and returns a reader. It
// takes over one join.
func (d *download) open(ctx context.Context) (*Arriving, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.table == nil && d.err == nil {
		if err := d.waitChange(ctx); err != nil {
			d.waiting--
			d.stopIfUnwanted()
			return nil, err
		}
	}
	d.waiting--
	if d.err != nil {
		return nil, d.err
	}
	a, err := newArriving(d)
	if errors.Is(err, os.ErrClosed) {
		return nil, errSealed // it has been stored just now
	}
	if err != nil {
		d.stopIfUnwanted()
		return nil, err
	}
	d.readers[a] = struct{}{}
	a.stop = context.AfterFunc(ctx, func() { a.fail(context.Cause(ctx)) })
	return a, nil
}

// info describes the task as far as it has arrived. It reports false where not even its size is known.
func (d *download) info(task p2p.Task) (p2p.Info, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.table == nil {
		return p2p.Info{}, false
	}
	info := d.tasks[task]
	info.Task, info.Remote = task, false
	info.Size, info.PieceLength = d.table.Size, d.table.PieceLength
	info.Pieces, info.Held = d.table.Pieces(), d.have.Count()
	return info, true
}

// state is what this daemon tells peers of a task that is arriving.
func (d *download) state(task p2p.Task) *taskState {
	info, ok := d.info(task)
	if !ok {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	state := &taskState{
		Size: info.Size, MediaType: info.MediaType, Manifest: info.IsManifest,
		Pinned: info.Keep == p2p.KeepPinned, Origin: info.Origin,
	}
	if !d.have.Full() || d.have.Len() == 0 {
		state.Held, _ = d.have.AppendBinary(nil)
	}
	return state
}

// run is the life of a download.
func (d *download) run() {
	started := time.Now()
	d.resume()
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	err := d.tick()
	for err == nil && !d.complete() {
		d.step()
		select {
		case event := <-d.events:
			event()
		case <-tick.C:
			err = d.tick()
		case <-d.ctx.Done():
			err = context.Cause(d.ctx)
		}
	}
	d.cancel(err)
	d.calls.Wait()
	d.finish(err, started)
}

// finish commits a blob that is complete, and lets go of everything.
func (d *download) finish(err error, started time.Time) {
	s := d.s
	d.mu.Lock()
	if err == nil {
		d.proven = true
		d.changed()
	}
	d.mu.Unlock()
	if err == nil {
		// The readers have all of it by now, and need not wait for the disk.
		err = d.commit()
		d.storeErr = err
		if err != nil {
			s.log.Error("a blob was fetched and could not be stored", "digest", d.digest, "error", err)
		}
	} else {
		s.log.Debug("download ended", "digest", d.digest, "error", err)
	}
	d.mu.Lock()
	if err := d.partial.Close(); err != nil {
		s.log.Warn("a partial blob could not be closed", "digest", d.digest, "error", err)
	}
	if !d.proven {
		d.err = err
	}
	d.sealed = true
	proven, size, taken := d.proven, int64(0), maps.Clone(d.taken)
	if d.table != nil {
		size = d.table.Size
	}
	d.changed()
	d.mu.Unlock()
	if !proven && s.opts.Mode == Full {
		s.network.Withdraw(d.keys()...)
	}
	s.mu.Lock()
	delete(s.downloads, d.digest)
	s.mu.Unlock()
	s.uploads.drop(d.digest)
	if proven {
		s.log.Info("fetched", "digest", d.digest, "size", size, "peers", len(taken), "duration", time.Since(started))
	}
	close(d.ended)
}

// commit makes the blob one of the store.
func (d *download) commit() error {
	d.mu.Lock()
	d.sealed = true
	infos := slices.Collect(maps.Values(d.tasks))
	d.mu.Unlock()
	var c p2p.Commit
	for _, info := range infos {
		n := newTask(info)
		if info.IsManifest {
			content := make([]byte, min(d.table.Size, p2p.MaxManifest))
			if err := d.readAll(content); err == nil {
				n.Manifest = d.s.parseManifest(info.MediaType, content)
			}
		}
		c.Tasks = append(c.Tasks, n)
	}
	if err := d.partial.Commit(context.WithoutCancel(d.ctx), c); err != nil {
		return err
	}
	d.s.announce(c)
	return nil
}

func (d *download) readAll(p []byte) error {
	f, err := d.partial.File()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.ReadFull(f, p)
	return err
}

// newTask is how a task is kept that peers have described.
func newTask(info p2p.Info) p2p.NewTask {
	n := p2p.NewTask{Task: info.Task, MediaType: info.MediaType, Keep: p2p.KeepLoose, Origin: info.Origin}
	if info.Keep == p2p.KeepPinned {
		n.Keep = p2p.KeepPinned
	}
	if n.Origin.IsZero() {
		n.Origin = time.Unix(0, 1).UTC() // never now: that is for what is imported here
	}
	return n
}

// resume begins with what an earlier download has left, or is known of a blob
// that is damaged, and with those of whom a lookup has just told. For a small
// blob no others are looked for at once.
func (d *download) resume() {
	for _, t := range d.wanted() {
		for _, h := range d.s.recent.take(t) {
			d.addSource(h.peer, t, h.state)
			if h.state.Size <= smallBlob {
				d.nextSearch = time.Now().Add(tickInterval)
			}
		}
	}
	if t := d.partial.Saved(); t != nil {
		l := links{t.Size, t.Chain}
		d.chains[l.hash(d.digest)] = &chain{links: l}
	}
}

func (d *download) complete() bool { return d.sched != nil && d.sched.Complete() }

// post has f run by the loop. It reports false where that is over.
func (d *download) post(f func()) bool {
	select {
	case d.events <- f:
		return true
	case <-d.ctx.Done():
		return false
	}
}

// step does whatever can be done now.
func (d *download) step() {
	if d.sched == nil {
		d.choose()
	}
	if d.sched == nil || d.ctx.Err() != nil {
		return
	}
	for {
		req, ok := d.sched.Next()
		if !ok {
			break
		}
		d.request(req)
	}
	for id, want := range d.sched.Idle() {
		if src := d.sources[peer.ID(id)]; src != nil && !src.news && time.Now().After(src.away) {
			d.askNews(src, want)
		}
	}
}

// tick looks at the clock.
func (d *download) tick() error {
	now := time.Now()
	usable := 0
	for _, src := range d.sources {
		if !src.excluded && (d.sched == nil || !src.stated || src.chain == d.active) {
			usable++
		}
	}
	if !d.searching && (now.After(d.nextSearch) || usable == 0 && now.Sub(d.searched) > time.Second) {
		d.search()
	}
	if usable == 0 && d.missed != nil && d.sched == nil && len(d.sources) == 0 && !d.searching {
		return d.missed // nobody has it
	}
	if d.sched != nil && len(d.requests) == 0 && now.Sub(d.progress) > min(quietFor, d.s.opts.StallTimeout) {
		if other, ok := d.otherChain(); ok {
			d.s.log.Warn("the peers that have one hash chain of a blob do not give all of it: trying another chain", "digest", d.digest)
			d.activate(other)
		}
	}
	if limit := 3 * max(d.s.opts.StallTimeout, d.s.opts.LookupTimeout); !d.searching && now.Sub(d.progress) > limit && len(d.requests) == 0 {
		if d.sched == nil {
			return fmt.Errorf("fetch %s: %w: none of those that have it tells its size", d.digest, p2p.ErrUnreachable)
		}
		return fmt.Errorf("fetch %s: %w that has the rest of it: %d of %d pieces have arrived, and are kept: try again", d.digest, p2p.ErrUnreachable, d.sched.Held().Count(), d.sched.Held().Len())
	}
	for _, src := range d.sources {
		if !src.excluded && src.resting && now.After(src.away) {
			src.resting = false
			d.offer(src)
		}
	}
	return nil
}

// search looks for sources.
func (d *download) search() {
	d.searching, d.searched = true, time.Now()
	d.searches++
	d.nextSearch = time.Now().Add(min(searchInterval, 100*time.Millisecond<<min(d.searches, 8)))
	tasks := d.wanted()
	d.calls.Go(func() {
		var missed error
		for _, t := range tasks {
			ctx, cancel := d.s.within(d.ctx)
			l := d.s.lookup(ctx, &findRequest{Tasks: []taskRef{taskRef(t)}}, taskKey(t), false)
			found := false
			for a := range l.answers {
				if state := a.reply.Tasks[0]; d.s.accept(ctx, a.peer, t, state) {
					found = true
					d.post(func() { d.addSource(a.peer, t, state) })
				}
			}
			if found {
				l.end()
			} else {
				missed = l.missed(t.String())
			}
			cancel()
		}
		d.post(func() {
			d.searching = false
			d.missed = missed
		})
	})
}

// addSource takes in what a peer says that it has.
func (d *download) addSource(p peer.ID, t p2p.Task, state *taskState) {
	have, err := state.pieces()
	if err != nil {
		return
	}
	d.mu.Lock()
	if !d.sealed {
		d.describe(infoOf(t, state))
	}
	d.mu.Unlock()
	src := d.sources[p]
	if src == nil {
		if len(d.sources) >= maxSources {
			return
		}
		src = &source{id: p}
		d.sources[p] = src
		if d.progress.IsZero() {
			d.progress = time.Now()
		}
	}
	if src.excluded {
		return
	}
	if src.size != state.Size {
		src.stated = false
	}
	src.task, src.size, src.have = t, state.Size, have
	d.offer(src)
	for _, h := range state.Hints {
		d.follow(h)
	}
}

// follow asks a peer that another one has named.
func (d *download) follow(h hint) {
	info, err := h.addrInfo()
	if err != nil || info.ID == d.s.network.Self() || d.hinted[info.ID] || d.sources[info.ID] != nil ||
		len(d.sources)+len(d.hinted) >= 2*maxSources || d.s.peers.get(info.ID).isShunned() {
		return
	}
	d.hinted[info.ID] = true
	t := d.wanted()[0]
	d.calls.Go(func() {
		ctx, cancel := d.s.within(d.ctx)
		defer cancel()
		if err := d.s.network.Connect(ctx, info); err == nil {
			if reply, err := d.s.client.find(ctx, info.ID, &findRequest{Tasks: []taskRef{taskRef(t)}}); err == nil {
				if state := reply.Tasks[0]; d.s.accept(ctx, info.ID, t, state) {
					d.post(func() { d.addSource(info.ID, t, state) })
					return
				}
			}
		}
		d.post(func() { delete(d.hinted, info.ID) })
	})
}

// offer gives a source to the scheduler, where it has the chain in use, or may
// have it; and asks for its chain, where that is of interest.
func (d *download) offer(src *source) {
	if src.excluded {
		return
	}
	asked := 0
	for _, other := range d.sources {
		if other.asking || other.stated {
			asked++
		}
	}
	// The chain is taken from two sources, and from those that have another one.
	differs := d.sched != nil && src.have.Len() != d.sched.Held().Len()
	if chain := digest.ChainSize(d.digest.Algorithm(), src.size); !src.stated && chain == 0 {
		d.learn(src, links{size: src.size}) // of one piece there is nothing to ask
		return
	}
	if !src.stated && !src.asking && (d.sched == nil && asked < 4 || asked < 2 || differs) {
		d.askLinks(src)
	}
	if d.sched != nil && !differs && (!src.stated || src.chain == d.active) {
		d.sched.SetSource(string(src.id), src.have)
	}
}

// askLinks asks a source for its chain.
func (d *download) askLinks(src *source) {
	src.asking = true
	id, task := src.id, src.task
	d.calls.Go(func() {
		ctx, cancel := context.WithTimeoutCause(d.ctx, d.s.opts.StallTimeout, errStalled)
		defer cancel()
		l, err := d.s.client.links(ctx, id, task)
		d.post(func() {
			src.asking = false
			if err != nil {
				d.failed(src, err)
				return
			}
			d.learn(src, l)
		})
	})
}

// learn notes the chain of a source.
func (d *download) learn(src *source, l links) {
	src.stated, src.chain, src.failed, src.resting = true, l.hash(d.digest), 0, false
	if d.chains[src.chain] == nil {
		if len(d.chains) >= maxSources {
			d.exclude(src)
			return
		}
		d.chains[src.chain] = &chain{links: l}
	}
	switch {
	case d.sched == nil:
	case src.chain == d.active:
		d.offer(src)
	default:
		d.sched.RemoveSource(string(src.id))
		d.dispute()
	}
}

// choose begins with the chain that most sources have.
func (d *download) choose() {
	if best, ok := d.otherChain(); ok {
		d.activate(best)
	}
}

// otherChain returns the chain to try next: of those that a source has, one that
// was not tried, and of several the one that most whole sources have.
func (d *download) otherChain() (linksHash, bool) {
	votes := map[linksHash]int{}
	for _, src := range d.sources {
		if src.stated && !src.excluded && (d.sched == nil || src.chain != d.active) {
			votes[src.chain]++
			if src.have.Full() {
				votes[src.chain] += maxSources
			}
		}
	}
	var best linksHash
	found := false
	for h, n := range votes {
		a, b := d.chains[h], d.chains[best]
		if a == nil {
			continue
		}
		if !found || a.tried.Before(b.tried) || a.tried.Equal(b.tried) && n > votes[best] {
			best, found = h, true
		}
	}
	return best, found
}

// activate goes on with a chain: what has arrived is verified with it.
func (d *download) activate(h linksHash) {
	c := d.chains[h]
	c.tried, d.progress = time.Now(), time.Now()
	for _, cancel := range d.requests {
		cancel(errUseless)
	}
	if err := d.partial.Use(d.ctx, c.size, c.chain); err != nil {
		if d.ctx.Err() != nil {
			return
		}
		if !errors.Is(err, digest.ErrMismatch) && !errors.Is(err, digest.ErrInvalid) {
			d.cancel(fmt.Errorf("fetch %s: %w", d.digest, err))
			return
		}
		delete(d.chains, h)
		for _, src := range d.sources {
			if src.stated && src.chain == h {
				d.lied(src, err)
			}
		}
		return
	}
	table := d.partial.Table()
	have := schedule.NewSet(table.Pieces())
	for i := range table.Pieces() {
		if d.partial.Held(i) {
			have.Add(i)
		}
	}
	first := d.sched == nil
	d.active = h

	d.sched = schedule.NewDownload(table.Pieces(), have, schedule.Limits{Requests: d.s.opts.MaxRequests})
	d.prefer = schedule.NewSet(table.Pieces())
	for _, src := range d.sources {
		src.failed, src.resting = 0, false
		d.offer(src)
	}
	d.dispute()
	d.mu.Lock()
	d.table, d.links, d.have = table, h, have.Clone()
	for a := range d.readers {
		a.check(table, have)
	}
	d.changed()
	d.mu.Unlock()
	if first && d.s.opts.Mode == Full {
		d.s.network.Announce(d.keys()...)
	}
	if !first {
		d.s.uploads.drop(d.digest)
	}
}

// dispute has the pieces fetched first that tell which of two chains is false:
// from the last state in which they differ only one leads on.
func (d *download) dispute() {
	mine := d.chains[d.active]
	for h, other := range d.chains {
		if h == d.active || other.size != mine.size {
			continue
		}
		size := digest.ChainSize(d.digest.Algorithm(), mine.size)
		n := d.sched.Held().Len()
		if n < 2 {
			continue
		}
		state := size / (n - 1)
		for i := n - 2; i >= 0; i-- {
			if string(mine.chain[i*state:(i+1)*state]) != string(other.chain[i*state:(i+1)*state]) {
				d.first(i, i+1)
				break
			}
		}
	}
}

// first has pieces fetched before others.
func (d *download) first(from, to int) {
	for i := from; i <= to; i++ {
		d.prefer.Add(i)
	}
	d.prefer.AndNot(d.sched.Held())
	d.sched.Prefer(d.prefer)
}

// request asks for a piece.
func (d *download) request(req schedule.Request) {
	src := d.sources[peer.ID(req.Source)]
	ctx, cancel := context.WithCancelCause(d.ctx)
	d.requests[req.ID] = cancel
	active, task, sched := d.active, src.task, d.sched
	d.calls.Go(func() {
		defer cancel(nil)
		piece, n, err := d.transfer(ctx, src.id, task, &pieceRequest{links: active, want: req.Want}, func(reply *pieceReply) {
			d.post(func() {
				if d.sched != sched {
					return
				}
				src.have = reply.have
				for _, h := range reply.hints {
					d.follow(h)
				}
				if !sched.Answered(req.ID, reply.piece, reply.have) && reply.piece >= 0 {
					cancel(errUseless)
				}
			})
		})
		d.post(func() {
			delete(d.requests, req.ID)
			if d.sched == sched {
				d.done(req, src, piece, n, err)
			}
		})
	})
}

// done takes in how a request ended.
func (d *download) done(req schedule.Request, src *source, piece int, n int64, err error) {
	switch {
	case err == nil && piece < 0:
		// It had none of them any more, or never. One that goes on saying that it
		// has some is not asked for ever.
		if req.Want.Intersects(src.have) {
			d.failed(src, errors.New("it has what is wanted, and sends none"))
		}
	case err == nil:
		src.failed, src.resting = 0, false
		d.progress = time.Now()
		src.stated, src.chain = true, d.active // it has agreed
		useless := d.sched.Done(req.ID)
		d.arrived(src.id, piece, n)
		for _, id := range useless {
			if cancel := d.requests[id]; cancel != nil {
				cancel(errUseless)
			}
		}
	default:
		d.sched.Cancel(req.ID)
		if !errors.Is(err, pieces.ErrStale) {
			d.failed(src, err)
		}
	}
}

// arrived tells the readers of a piece.
func (d *download) arrived(from peer.ID, piece int, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n > 0 {
		d.taken[from] += n
	}
	have := d.have.Clone()
	have.Add(piece)
	d.have = have
	d.changed()
}

// failed decides what becomes of a source after an error.
func (d *download) failed(src *source, err error) {
	if d.ctx.Err() != nil || errors.Is(err, errUseless) {
		return
	}
	var refused *statusError
	switch {
	case errors.Is(err, digest.ErrMismatch), errors.Is(err, errMessage), errors.Is(err, errLength):
		// It has said which chain it goes by, or how long the piece is, and does not hold to it.
		d.lied(src, err)
	case errors.Is(err, errStalled):
		d.exclude(src)
		d.fault(src, err, false)
	case errors.Is(err, p2p.ErrNoSpace), errors.Is(err, os.ErrPermission):
		d.cancel(fmt.Errorf("fetch %s: %w", d.digest, err)) // it is ours
	case errors.As(err, &refused):
		d.refused(src, refused)
	default:
		// It may have gone, or the network; it may come back.
		d.rest(src, 200*time.Millisecond<<min(src.failed, 5))
		if src.failed > maxFailed {
			delete(d.sources, src.id)
		}
		d.s.log.Debug("a source failed", "digest", d.digest, "peer", src.id.String(), "error", err)
	}
}

// refused takes in what a source does not want to do.
func (d *download) refused(src *source, e *statusError) {
	switch e.code {
	case http.StatusConflict:
		// It has another chain.
		if d.sched != nil {
			d.sched.RemoveSource(string(src.id))
		}
		var h linksHash
		if b, err := hex.DecodeString(e.text); err == nil && len(b) == len(h) {
			h = linksHash(b)
		}
		src.stated = d.chains[h] != nil && h != d.active
		src.chain = h
		if !src.stated && !src.asking {
			d.askLinks(src)
		}
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		d.rest(src, 500*time.Millisecond)
	default:
		d.exclude(src)
	}
}

// rest leaves a source alone for a while.
func (d *download) rest(src *source, pause time.Duration) {
	src.failed++
	src.resting, src.away = true, time.Now().Add(pause)
	if d.sched != nil {
		d.sched.RemoveSource(string(src.id))
	}
}

// exclude asks a source for nothing more of this blob.
func (d *download) exclude(src *source) {
	src.excluded = true
	if d.sched != nil {
		d.sched.RemoveSource(string(src.id))
	}
}

// lied excludes a source that was caught, and has it shunned for a while.
func (d *download) lied(src *source, err error) {
	d.exclude(src)
	d.fault(src, err, true)
}

func (d *download) fault(src *source, err error, lie bool) { d.s.caught(src.id, d.digest, err, lie) }

// askNews asks a source to tell when it has one of the pieces that are wanted.
func (d *download) askNews(src *source, want *schedule.Set) {
	src.news = true
	id, task, active, sched := src.id, src.task, d.active, d.sched
	d.calls.Go(func() {
		ctx, cancel := context.WithTimeoutCause(d.ctx, maxNewsWait+d.s.opts.StallTimeout, errStalled)
		defer cancel()
		var have *schedule.Set
		_, _, err := d.transfer(ctx, id, task, &pieceRequest{links: active, news: true, want: want}, func(reply *pieceReply) { have = reply.have })
		if err == nil && (have == nil || !have.Intersects(want)) {
			// Who answers at once, again and again, is not to keep us busy.
			t := time.NewTimer(tickInterval)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
			}
		}
		d.post(func() {
			src.news = false
			if d.sched != sched {
				return
			}
			if err != nil {
				d.failed(src, err)
				return
			}
			src.failed, src.resting, src.have = 0, false, have
			d.offer(src)
		})
	})
}

// errLength says that an answer is not as long as it was said to be.
var errLength = errors.New("the answer has another length than promised")

// transfer sends one request for a piece, and takes in what comes. It returns
// the piece, or -1, and how many bytes have come.
func (d *download) transfer(ctx context.Context, p peer.ID, task p2p.Task, req *pieceRequest, answered func(*pieceReply)) (piece int, n int64, err error) {
	s := d.s
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := s.opts.StallTimeout
	// A busy peer lets a request wait for its turn.
	watch := time.AfterFunc(3*stall, func() { cancel(errStalled) })
	if req.news {
		watch.Reset(maxNewsWait + stall)
	}
	defer watch.Stop()
	explain := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	// What only waits goes over the connection that is there, instead of one
	// more that would have to be made.
	over := s.client.http
	if req.news {
		over = s.client.streams
	}
	start := time.Now()
	resp, err := s.client.do(ctx, over, p, http.MethodPost, pathPieces, taskQuery(task), req.append(nil))
	if err != nil {
		return -1, 0, explain(err)
	}
	defer resp.Body.Close()
	watch.Reset(stall)
	body := &watched{r: resp.Body, watch: watch, stall: stall, ctx: ctx, limit: s.limit}
	reply, err := readPieceReply(body, req.want.Len())
	if err != nil {
		if isShort(err) {
			err = errLength
		}
		return -1, 0, explain(err)
	}
	if !req.news {
		s.peers.get(p).answered(time.Since(start))
	}
	if reply.piece >= 0 && (req.news || !req.want.Has(reply.piece)) {
		return -1, 0, fmt.Errorf("%w: piece %d, which was not asked for", errMessage, reply.piece)
	}
	answered(reply)
	if reply.piece < 0 {
		return -1, 0, nil
	}
	begin, end := d.partial.Table().Bounds(reply.piece)
	length := max(end-begin, 0) // a chain that replaces this one may have fewer pieces
	if resp.ContentLength >= 0 && resp.ContentLength != body.n+length {
		return -1, 0, fmt.Errorf("%w: %d bytes for a piece of %d", errLength, resp.ContentLength-body.n, length)
	}
	watch.Stop() // it is not the peer's fault when there is no memory
	buf, err := s.buffers.get(ctx, int(length))
	if err != nil {
		return -1, 0, explain(err)
	}
	defer s.buffers.put(buf)
	watch.Reset(stall)
	before := body.n
	err = d.partial.Receive(reply.piece, body, buf)
	n = body.n - before
	s.metrics.received.Add(float64(n))
	if isShort(err) {
		err = fmt.Errorf("%w: %d bytes of %d", errGone, n, length)
	}
	if err != nil {
		return -1, n, explain(err)
	}
	s.peers.get(p).addGave(n)
	return reply.piece, n, nil
}

// errGone says that a connection has ended in the middle of a piece.
var errGone = errors.New("the connection broke off")

func isShort(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// watched reads a body, at the rate that is allowed, and notes that bytes come.
type watched struct {
	r     io.Reader
	watch *time.Timer
	stall time.Duration
	ctx   context.Context
	limit *rate.Limiter
	n     int64
}

func (w *watched) Read(p []byte) (int, error) {
	if w.limit != nil && len(p) > w.limit.Burst() {
		p = p[:w.limit.Burst()]
	}
	n, err := w.r.Read(p)
	w.n += int64(n)
	if n > 0 {
		if w.limit != nil {
			w.watch.Stop()
			if e := throttle.Wait(w.ctx, w.limit, n); e != nil && err == nil {
				err = e
			}
		}
		w.watch.Reset(w.stall)
	}
	return n, err
}
