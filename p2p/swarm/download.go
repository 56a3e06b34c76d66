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
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

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
	// searchPause is the time between two searches when no source can be asked.
	searchPause = time.Second
	// maxFailed is how often in a row a source may fail before it makes room for another.
	maxFailed = 5
	// maxTries is how often one hash chain is gone by.
	maxTries = 3
	// quietFor is how long a download may make no progress with one hash chain
	// while there are sources that have another.
	quietFor = 2 * time.Second
	// smallBlob is the size in bytes up to which one source is enough.
	smallBlob = 1 << 20
	// tickInterval is how often a download looks at the clock.
	tickInterval = 200 * time.Millisecond
	// maxGap is how long a download may not have looked at the clock: what is longer is
	// time in which this process was stopped, or busy, and nobody is to blame for it.
	maxGap = time.Second
	// noticeAfter is how long nothing may move before whoever waits is told why, and
	// noticeInterval how often.
	noticeAfter    = 3 * time.Second
	noticeInterval = 10 * time.Second
)

var (
	errStalled = throttle.ErrStalled
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
	requests   map[int]*request
	hinted     map[peer.ID]bool
	searching  bool
	nextSearch time.Time
	searched   time.Time // when the last search for sources began
	searches   int       // how many there were
	missed     error     // of the last of these
	noRoom     error     // why there was no room for a chain's blob
	ticked     time.Time // when the clock was looked at last
	progress   time.Time // when it had made any progress, by the one clock that ends it
	lastPiece  time.Time // when a piece arrived, or a chain was chosen
	lastEnd    time.Time // when a source had nothing more to give
	labelled   int       // how many tasks were recorded with the partial blob
	noticed    time.Time // when those who wait were told last

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
	notices  map[*int]func(string) // of those who want to know what is waited for
	useless  bool                  // what has arrived is of no use to anybody later
	storeErr error

	held atomic.Int32 // transfers that wait for this host: its memory, its limits
}

// chain is a size and a hash chain that some sources say the blob has.
type chain struct {
	links
	tried time.Time // when it was chosen last
	tries int       // how often
	came  int64     // bytes that had arrived with it at the last progress
}

// request is one for a piece that is under way.
type request struct {
	cancel context.CancelCauseFunc
	pace   *throttle.Progress
	came   atomic.Int64 // bytes of the piece
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
	problem  error     // of the last failure
	dry      bool      // it has nothing that is missing, and expects nothing
	gone     bool      // it has said that it does not have the blob any more
	excluded bool      // for good, as far as this blob goes
}

// ended reports whether there is nothing to be had from a source, nor will be as far as it knows.
func (s *source) ended() bool { return s.dry || s.gone || s.excluded }

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
			info, _, err := s.statTask(ctx, task, p2p.StatOptions{})
			if err != nil {
				return nil, err
			}
			// A blob that is damaged here is fetched as if it were not.
			if err := s.adopt(ctx, info); !errors.Is(err, digest.ErrCorrupt) {
				return nil, err
			}
		}
		d, err := s.download(ctx, task)
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
		if info, _, err = s.statTask(ctx, task, p2p.StatOptions{}); err == nil {
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
func (s *Swarm) download(ctx context.Context, task p2p.Task) (*download, error) {
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
	select {
	case <-d.ended:
		return nil, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
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
		requests: map[int]*request{},
		hinted:   map[peer.ID]bool{},
		tasks:    map[p2p.Task]p2p.Info{task: {Task: task}},
		readers:  map[*Arriving]struct{}{},
		waiting:  1,
		more:     make(chan struct{}),
		taken:    map[peer.ID]int64{},
		notices:  map[*int]func(string){},
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

// label records whose it is that arrives, where that has changed.
func (d *download) label() {
	tasks := d.wanted()
	if d.sched == nil || d.sched.Held().Len() < 2 || len(tasks) == d.labelled {
		return // of one piece there is never a part
	}
	d.labelled = len(tasks)
	var tags []string
	for _, t := range tasks {
		tags = append(tags, t.Tag)
	}
	if err := d.partial.Want(tags); err != nil {
		d.s.log.Warn("it could not be noted whose a partial blob is", "digest", d.digest, "error", err)
	}
}

// describe notes what a peer says of a task. d.mu is held.
func (d *download) describe(info p2p.Info) {
	known := d.tasks[info.Task]
	if known.Origin.Before(info.Origin) {
		known.Origin, known.After = info.Origin, info.After
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
	key := new(int)
	d.mu.Lock()
	defer d.mu.Unlock()
	if notice := p2p.NoticeOf(ctx); notice != nil {
		d.notices[key] = notice
	}
	a, err := d.openNow(ctx)
	if err != nil {
		delete(d.notices, key)
		return nil, err
	}
	a.notices = key
	d.readers[a] = struct{}{}
	a.stop = context.AfterFunc(ctx, func() { a.fail(context.Cause(ctx)) })
	return a, nil
}

// openNow waits for the first chain and makes a reader. d.mu is held.
func (d *download) openNow(ctx context.Context) (*Arriving, error) {
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
	}
	return a, err
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
		Pinned: info.Keep == p2p.KeepPinned, Origin: info.Origin, After: info.After,
	}
	if !d.have.Full() || d.have.Len() == 0 {
		state.Held, _ = d.have.AppendBinary(nil)
	}
	return state
}

// run is the life of a download.
func (d *download) run() {
	started := time.Now()
	d.progress, d.lastPiece = started, started
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
	if err != nil {
		// Whoever waits for it is told now: what is asked of peers may take a while to end.
		d.mu.Lock()
		d.err = err
		d.changed()
		d.mu.Unlock()
	}
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
	closePartial := d.partial.Close
	if d.useless || errors.Is(err, p2p.ErrNoSpace) {
		closePartial = d.partial.Remove
	}
	if err := closePartial(); err != nil {
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
	n := p2p.NewTask{Task: info.Task, MediaType: info.MediaType, Keep: p2p.KeepLoose, Origin: info.Origin, After: info.After}
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

// patience is how long a download goes on without any progress.
func (d *download) patience() time.Duration {
	return 3 * max(d.s.opts.StallTimeout, d.s.opts.LookupTimeout)
}

// tick looks at the clock.
func (d *download) tick() error {
	now := time.Now()
	if gap := now.Sub(d.ticked); !d.ticked.IsZero() && gap > maxGap {
		d.progress, d.lastPiece = d.progress.Add(gap), d.lastPiece.Add(gap)
	}
	d.ticked = now
	d.measure(now)
	d.label()
	usable, ended, asking := 0, 0, false
	for _, src := range d.sources {
		if src.resting && now.After(src.away) {
			src.resting = false
			d.offer(src)
		}
		switch {
		case src.ended():
			ended++
		case !src.resting && (d.sched == nil || !src.stated || src.chain == d.active):
			usable++
		}
		asking = asking || src.asking
	}
	for id, r := range d.requests {
		select {
		case <-r.pace.Slow():
			d.sched.Slow(id)
		default:
		}
	}
	if !d.searching && (now.After(d.nextSearch) || usable == 0 && now.Sub(d.searched) > searchPause) {
		d.search()
	}
	if !d.searching && d.searches > 0 && d.sched == nil {
		switch {
		case d.missed != nil && len(d.sources) == 0:
			return d.missed // nobody has it
		case d.noRoom != nil && !asking:
			return d.noRoom
		}
	}
	// Where there is nothing to be had any more of those who had it, one search shows
	// whether there are others.
	if ended > 0 && ended == len(d.sources) && !asking && len(d.requests) == 0 && !d.searching && d.searched.After(d.lastEnd) {
		return d.over()
	}
	quiet := 3 * d.s.opts.StallTimeout
	if len(d.requests) == 0 {
		quiet = min(quietFor, d.s.opts.StallTimeout)
	}
	if d.sched != nil && now.Sub(d.lastPiece) > quiet {
		if other, ok := d.otherChain(); ok {
			d.s.log.Warn("the peers that have one hash chain of a blob do not give all of it: trying another chain", "digest", d.digest)
			d.activate(other)
		}
	}
	still := now.Sub(d.progress)
	if still > d.patience() {
		err := fmt.Errorf("fetch %s: %w that gives it: %s: try again", d.digest, p2p.ErrUnreachable, d.standing(still))
		for _, src := range d.sources {
			if errors.Is(src.problem, p2p.ErrBusy) {
				return fmt.Errorf("%w (peer %s: %w)", err, d.s.nameOf(src.id), src.problem)
			}
		}
		return err
	}
	if still > min(noticeAfter, d.s.opts.StallTimeout) && now.Sub(d.noticed) > noticeInterval {
		d.noticed = now
		d.notify(fmt.Sprintf("%s: given up in %s", d.standing(still), (d.patience() - still).Round(time.Second)))
	}
	return nil
}

// measure notes progress: where more has arrived with the chain in use than ever since it was
// chosen, and by more than a byte now and then. Time in which this host is what is waited for counts
// as progress, too.
func (d *download) measure(now time.Time) {
	if d.held.Load() > 0 {
		d.progress = now
	}
	if d.sched == nil {
		return
	}
	c := d.chains[d.active]
	came := int64(d.sched.Held().Count()) * digest.PieceLength(c.size)
	for _, r := range d.requests {
		came += r.came.Load()
	}
	enough := int64(d.patience().Seconds() * throttle.MinRate)
	if d.s.limit != nil {
		enough = 1 // it may be slow by our own choice
	}
	if came-c.came >= max(enough, 1) {
		c.came, d.progress = came, now
	}
}

// over is how a download ends that nobody has anything for any more.
func (d *download) over() error {
	gone := 0
	var why error
	for _, src := range d.sources {
		switch {
		case src.gone:
			gone++
		case src.dry && why == nil:
			why = fmt.Errorf("peer %s has it, and lacks pieces of it: they are damaged there", d.s.nameOf(src.id))
		case src.problem != nil:
			why = fmt.Errorf("peer %s: %w", d.s.nameOf(src.id), src.problem)
		}
	}
	if gone == len(d.sources) && errors.Is(d.missed, p2p.ErrNotFound) {
		d.mu.Lock()
		d.useless = true
		d.mu.Unlock()
		return fmt.Errorf("%w: it was deleted, or its name moved, while it was fetched", d.missed)
	}
	if why == nil {
		why = errors.New("those that had it do not have it any more")
	}
	return fmt.Errorf("fetch %s: %w that has the rest of it: %s: %w", d.digest, p2p.ErrUnreachable, d.arrivedSoFar(), why)
}

// arrivedSoFar says how much there is.
func (d *download) arrivedSoFar() string {
	if d.sched == nil {
		return "not even its size is known"
	}
	return fmt.Sprintf("%d of %d pieces have arrived, and are kept", d.sched.Held().Count(), d.sched.Held().Len())
}

// standing says how it stands with a download that makes no progress, and what it waits for.
func (d *download) standing(still time.Duration) string {
	var waits []string
	for _, src := range d.sources {
		switch {
		case src.ended():
		case src.resting && src.problem != nil:
			waits = append(waits, fmt.Sprintf("peer %s (%v)", d.s.nameOf(src.id), src.problem))
		default:
			waits = append(waits, "peer "+d.s.nameOf(src.id))
		}
	}
	slices.Sort(waits)
	if n := len(waits); n == 0 {
		waits = []string{"a peer that has it"}
	} else if n > maxNamed {
		waits = append(waits[:maxNamed], fmt.Sprintf("%d more", n-maxNamed))
	}
	return fmt.Sprintf("%s; nothing has come for %s: waiting for %s", d.arrivedSoFar(), still.Round(time.Second), strings.Join(waits, ", "))
}

// maxNamed is how many peers are named that are waited for.
const maxNamed = 3

// notify tells those who wait what they wait for.
func (d *download) notify(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, notice := range d.notices {
		notice(text)
	}
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
		if len(d.sources) >= maxSources && !d.makePlace() {
			return
		}
		src = &source{id: p}
		d.sources[p] = src
	}
	if src.excluded || src.dry {
		return // what it says of itself in general, it can't give: it is asked for news
	}
	src.gone = false
	if src.size != state.Size {
		src.stated = false
	}
	src.task, src.size, src.have = t, state.Size, have
	d.offer(src)
	for _, h := range state.Hints {
		d.follow(h)
	}
}

// makePlace forgets a source that gives nothing.
func (d *download) makePlace() bool {
	for id, src := range d.sources {
		if src.ended() && !src.excluded || src.failed > maxFailed {
			if d.sched != nil {
				d.sched.RemoveSource(string(id))
			}
			delete(d.sources, id)
			return true
		}
	}
	return false
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
	if src.excluded || src.gone || src.resting {
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
		pace := throttle.NewProgress(d.ctx, d.s.opts.StallTimeout)
		defer pace.Stop()
		l, err := d.s.client.links(pace, id, task)
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
		if src.stated && !src.excluded && !src.gone && (d.sched == nil || src.chain != d.active) {
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
		if a == nil || a.tries == maxTries {
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
	c.tried, c.tries, c.came = time.Now(), c.tries+1, 0
	for _, r := range d.requests {
		r.cancel(errUseless)
	}
	clear(d.requests)
	if err := d.partial.Use(d.ctx, c.size, c.chain); err != nil {
		if d.ctx.Err() != nil {
			return
		}
		err = fmt.Errorf("fetch %s: %w", d.digest, err)
		if errors.Is(err, p2p.ErrNoSpace) && (d.sched == nil || c.size != d.chains[d.active].size) {
			// The size may be a lie: another chain may fit.
			d.noRoom, c.tries = err, maxTries
			return
		}
		if !errors.Is(err, digest.ErrMismatch) && !errors.Is(err, digest.ErrInvalid) {
			d.cancel(err)
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
		src.failed, src.resting, src.dry = 0, false, false
		d.offer(src)
	}
	d.progress, d.lastPiece = time.Now(), time.Now()
	d.label()
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
	// A busy peer lets a request wait for its turn. One that has failed is asked soon again instead.
	turn := 3 * d.s.opts.StallTimeout
	if src.failed > 0 {
		turn = d.s.opts.StallTimeout
	}
	r := &request{cancel: cancel, pace: throttle.NewProgress(ctx, turn)}
	d.requests[req.ID] = r
	active, task, sched := d.active, src.task, d.sched
	d.calls.Go(func() {
		defer cancel(nil)
		defer r.pace.Stop()
		piece, n, err := d.transfer(r, src.id, task, &pieceRequest{links: active, want: req.Want}, func(reply *pieceReply) {
			d.post(func() {
				if d.sched != sched {
					return
				}
				src.have, src.dry = reply.have, false
				for _, h := range reply.hints {
					d.follow(h)
				}
				if !sched.Answered(req.ID, reply.piece, reply.have) && reply.piece >= 0 {
					cancel(errUseless)
				}
			})
		})
		d.post(func() {
			if d.requests[req.ID] == r {
				delete(d.requests, req.ID)
			}
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
		d.progress, d.lastPiece = time.Now(), time.Now()
		src.stated, src.chain = true, d.active // it has agreed
		useless := d.sched.Done(req.ID)
		d.arrived(src.id, piece, n)
		for _, id := range useless {
			if r := d.requests[id]; r != nil {
				r.cancel(errUseless)
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
	src.problem = err
	var refused *statusError
	switch {
	case errors.Is(err, digest.ErrMismatch), errors.Is(err, errMessage), errors.Is(err, errLength):
		// It has said which chain it goes by, or how long the piece is, and does not hold to it.
		d.lied(src, err)
	case errors.Is(err, p2p.ErrNoSpace), errors.Is(err, os.ErrPermission):
		d.cancel(fmt.Errorf("fetch %s: %w", d.digest, err)) // it is ours
	case errors.As(err, &refused):
		d.refused(src, refused)
	default:
		// It may have gone, or be stopped or slow, or the network, or this host may have been: it may come back.
		d.rest(src, 200*time.Millisecond<<min(src.failed, 4))
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
		src.chain, src.dry = h, false
		if !src.stated {
			d.rest(src, tickInterval) // and then it is asked which
		}
	case http.StatusNotFound:
		// It may have it again later, which a search tells.
		src.gone, d.lastEnd = true, time.Now()
		if d.sched != nil {
			d.sched.RemoveSource(string(src.id))
		}
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		d.rest(src, 500*time.Millisecond)
	default:
		if e.code >= 500 {
			d.rest(src, 200*time.Millisecond<<min(src.failed, 4))
			return
		}
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
	src.excluded, d.lastEnd = true, time.Now()
	if d.sched != nil {
		d.sched.RemoveSource(string(src.id))
	}
}

// lied excludes a source that was caught, and has it shunned for a while.
func (d *download) lied(src *source, err error) {
	src.problem = err
	d.exclude(src)
	d.s.caught(src.id, d.digest, err)
}

// askNews asks a source to tell when it has one of the pieces that are wanted.
func (d *download) askNews(src *source, want *schedule.Set) {
	src.news = true
	id, task, active, sched := src.id, src.task, d.active, d.sched
	d.calls.Go(func() {
		r := &request{pace: throttle.NewProgress(d.ctx, maxNewsWait+d.s.opts.StallTimeout)}
		defer r.pace.Stop()
		var have *schedule.Set
		began := time.Now()
		_, _, err := d.transfer(r, id, task, &pieceRequest{links: active, news: true, want: want}, func(reply *pieceReply) { have = reply.have })
		none := err == nil && (have == nil || !have.Intersects(want))
		// Who expects more keeps the request waiting.
		dry := none && time.Since(began) < maxNewsWait/2
		if none {
			// Who answers at once, again and again, is not to keep us busy.
			t := time.NewTimer(tickInterval)
			defer t.Stop()
			select {
			case <-t.C:
			case <-d.ctx.Done():
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
			if dry && !src.dry {
				d.lastEnd = time.Now()
			}
			src.dry = dry
			d.offer(src)
		})
	})
}

// errLength says that an answer is not as long as it was said to be.
var errLength = errors.New("the answer has another length than promised")

// transfer sends one request for a piece, and takes in what comes. It returns
// the piece, or -1, and how many bytes have come.
func (d *download) transfer(r *request, p peer.ID, task p2p.Task, req *pieceRequest, answered func(*pieceReply)) (piece int, n int64, err error) {
	s := d.s
	ctx := r.pace.Context()
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
	var resp *http.Response
	if _, err := r.pace.Await(func() (_ int, err error) {
		resp, err = s.client.do(ctx, over, p, http.MethodPost, pathPieces, taskQuery(task), req.append(nil))
		return 0, err
	}); err != nil {
		return -1, 0, explain(err)
	}
	defer resp.Body.Close()
	r.pace.Restart(s.opts.StallTimeout)
	body := &counted{r: r.pace.Reader(resp.Body, s.limit)}
	reply, err := readPieceReply(body, req.want.Len())
	if err != nil {
		if isShort(err) {
			err = body.short()
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
	d.held.Add(1) // it is not the peer's fault when there is no memory
	buf, err := s.buffers.get(ctx, int(length))
	d.held.Add(-1)
	if err != nil {
		return -1, 0, explain(err)
	}
	defer s.buffers.put(buf)
	before := body.n
	body.came = &r.came
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

// errGone says that a connection has ended in the middle of an answer.
var errGone = errors.New("the connection broke off")

func isShort(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// counted counts what is read of a body.
type counted struct {
	r    io.Reader
	n    int64
	came *atomic.Int64 // counts, too, where it is not nil
	err  error         // of the last Read
}

func (c *counted) Read(p []byte) (n int, err error) {
	n, c.err = c.r.Read(p)
	c.n += int64(n)
	if c.came != nil {
		c.came.Add(int64(n))
	}
	return n, c.err
}

// short is why a body is too short: its sender has ended it so, or the connection broke off.
func (c *counted) short() error {
	if c.err == io.EOF {
		return errLength
	}
	return errGone
}
