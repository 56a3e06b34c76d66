package swarm

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// smallBlob is the size in bytes up to which one source is enough.
const smallBlob = 1 << 20

// download fetches one blob, for all who want it. Its loop, run, owns what
// decides; what others see of it is its arrival.
type download struct {
	*arrival
	s      *Swarm
	events chan func()
	calls  sync.WaitGroup // goroutines that send events

	// These belong to run.
	sched      *schedule.Download
	active     linksHash // the chain in use
	chains     map[linksHash]*chain
	sources    map[peer.ID]*source
	prefer     *schedule.Set // what readers wait for
	requests   map[int]*request
	hinted     map[peer.ID]bool      // are asked because a source has named them
	nothing    map[peer.ID]time.Time // when they have said that they have nothing
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

	held atomic.Int32 // transfers that wait for this host: its memory, its limits
}

// downloads are the blobs that are being fetched. It is safe for concurrent use: mu guards all.
type downloads struct {
	mu  sync.Mutex
	all map[digest.Digest]*download
}

// of returns the download that fetches a task, or nil.
func (ds *downloads) of(task p2p.Task) *download {
	ds.mu.Lock()
	d := ds.all[task.Digest]
	ds.mu.Unlock()
	if d == nil {
		return nil
	}
	if known, _ := d.wants(task); !known {
		return nil
	}
	return d
}

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
	s.downloads.mu.Lock()
	d := s.downloads.all[task.Digest]
	if d == nil {
		defer s.downloads.mu.Unlock()
		return s.startDownload(task)
	}
	s.downloads.mu.Unlock()
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

// startDownload begins a download. s.downloads.mu is held.
func (s *Swarm) startDownload(task p2p.Task) (*download, error) {
	partial, err := s.store.Partial(s.ctx, task.Digest)
	if err != nil {
		return nil, err
	}
	d := &download{
		arrival:  newArrival(task, partial),
		s:        s,
		events:   make(chan func()),
		chains:   map[linksHash]*chain{},
		sources:  map[peer.ID]*source{},
		requests: map[int]*request{},
		hinted:   map[peer.ID]bool{},
		nothing:  map[peer.ID]time.Time{},
	}
	d.arrival.first = func(table *digest.Table, from, to int) {
		d.post(func() {
			if d.sched != nil && d.sched.Held().Len() == table.Pieces() {
				d.preferRange(from, to)
			}
		})
	}
	d.source = func(p peer.ID, bytes int64) p2p.Source {
		return p2p.Source{Peer: p.String(), Address: s.peers.get(p).lastAddress(), Bytes: bytes}
	}
	d.ctx, d.cancel = context.WithCancelCause(s.ctx)
	s.downloads.all[task.Digest] = d
	s.background.Go(d.run)
	return d, nil
}

// keys returns what is announced of them.
func (d *download) keys() (keys []Key) {
	for _, t := range d.wanted() {
		keys = append(keys, taskKey(t))
	}
	return keys
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
		// Those who wait for it are told now: what is asked of peers may take a while to end.
		d.end(err)
	}
	d.calls.Wait()
	d.finish(err, started)
}

// finish commits a blob that is complete, and lets go of everything.
func (d *download) finish(err error, started time.Time) {
	s := d.s
	if err == nil {
		d.prove()
		// The readers have all of it by now, and need not wait for the disk.
		err = d.store()
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
	if err != nil {
		s.announcements.ended(d.wanted()...)
	}
	s.downloads.mu.Lock()
	delete(s.downloads.all, d.digest)
	s.downloads.mu.Unlock()
	s.uploads.drop(d.digest)
	if proven {
		s.log.Info("fetched", "digest", d.digest, "size", size, "peers", len(taken), "duration", time.Since(started))
	}
	close(d.ended)
}

// store makes the blob one of the store.
func (d *download) store() error {
	return d.s.front.Complete(context.WithoutCancel(d.ctx), d.partial, d.table.Size, d.seal())
}

// resume begins with what an earlier download has left, or is known of a blob
// that is damaged, and with those of whom a lookup has just told.
func (d *download) resume() {
	for _, t := range d.wanted() {
		d.recall(t)
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
