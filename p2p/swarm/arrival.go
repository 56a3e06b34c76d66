package swarm

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// arrival is a blob on its way here, as those see it who wait for it: its readers, the peers
// that get its pieces, and callers that ask what is here. The download fills it.
type arrival struct {
	digest  digest.Digest
	ctx     context.Context // ends with the download
	cancel  context.CancelCauseFunc
	partial *pieces.Partial
	ended   chan struct{} // closed when nothing of the download is left
	// first has pieces fetched before others, and source describes a peer that has given some.
	first  func(table *digest.Table, from, to int)
	source func(p peer.ID, bytes int64) p2p.Source

	mu       sync.Mutex
	tasks    map[p2p.Task]p2p.Info // what it is wanted as, as peers describe it
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
}

// newArrival returns one that somebody waits for as task.
func newArrival(task p2p.Task, partial *pieces.Partial) *arrival {
	return &arrival{
		digest: task.Digest, partial: partial,
		ended:    make(chan struct{}),
		tasks:    map[p2p.Task]p2p.Info{task: {Task: task}},
		readers:  map[*Arriving]struct{}{},
		waiting:  1,
		more:     make(chan struct{}),
		taken:    map[peer.ID]int64{},
		notices:  map[*int]func(string){},
		storeErr: errors.New("it has not been stored"),
	}
}

var (
	errSealed   = errors.New("the download is over")
	errUnwanted = errors.New("nobody waits for it any more")
)

// join counts one more who waits. It reports false where the download is over.
func (a *arrival) join() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil || a.ctx.Err() != nil {
		return false
	}
	a.waiting++
	return true
}

// leave takes back a join.
func (a *arrival) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting--
	a.stopIfUnwanted()
}

// stopIfUnwanted ends a download that nobody waits for. a.mu is held.
func (a *arrival) stopIfUnwanted() {
	if a.waiting == 0 && len(a.readers) == 0 && !a.proven {
		a.cancel(errUnwanted)
	}
}

func (a *arrival) wants(task p2p.Task) (known, sealed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, known = a.tasks[task]
	return known, a.sealed
}

// wanted returns the tasks that are fetched, of which there is always one.
func (a *arrival) wanted() []p2p.Task {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.tasks))
}

// addTask has a further task committed when the blob is complete.
func (a *arrival) addTask(info p2p.Info) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sealed {
		return errSealed
	}
	a.describe(info)
	return nil
}

// describe notes what a peer says of a task. a.mu is held.
func (a *arrival) describe(info p2p.Info) {
	known := a.tasks[info.Task]
	if known.Origin.Before(info.Origin) {
		known.Origin, known.After = info.Origin, info.After
	}
	if known.MediaType == "" {
		known.MediaType = info.MediaType
	}
	known.IsManifest = known.IsManifest || info.IsManifest
	known.Keep = max(known.Keep, info.Keep)
	known.Task = info.Task
	a.tasks[info.Task] = known
}

// changed tells all who wait that there is something new. a.mu is held.
func (a *arrival) changed() {
	close(a.more)
	a.more = make(chan struct{})
}

// open waits until the size of the blob is known and returns a reader. It
// takes over one join.
func (a *arrival) open(ctx context.Context) (*Arriving, error) {
	key := new(int)
	a.mu.Lock()
	defer a.mu.Unlock()
	if notice := p2p.NoticeOf(ctx); notice != nil {
		a.notices[key] = notice
	}
	r, err := a.openNow(ctx)
	if err != nil {
		delete(a.notices, key)
		return nil, err
	}
	r.notices = key
	a.readers[r] = struct{}{}
	r.stop = context.AfterFunc(ctx, func() { r.fail(context.Cause(ctx)) })
	return r, nil
}

// openNow waits for the first chain and makes a reader. a.mu is held.
func (a *arrival) openNow(ctx context.Context) (*Arriving, error) {
	for a.table == nil && a.err == nil {
		if err := a.waitChange(ctx); err != nil {
			a.waiting--
			a.stopIfUnwanted()
			return nil, err
		}
	}
	a.waiting--
	if a.err != nil {
		return nil, a.err
	}
	r, err := newArriving(a)
	if errors.Is(err, os.ErrClosed) {
		return nil, errSealed // it has been stored just now
	}
	if err != nil {
		a.stopIfUnwanted()
	}
	return r, err
}

// info describes the task as far as it has arrived. It reports false where not even its size is known.
func (a *arrival) info(task p2p.Task) (p2p.Info, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.table == nil {
		return p2p.Info{}, false
	}
	info := a.tasks[task]
	info.Task, info.Remote = task, false
	info.Size, info.PieceLength = a.table.Size, a.table.PieceLength
	info.Pieces, info.Held = a.table.Pieces(), a.have.Count()
	return info, true
}

// state is what this daemon tells peers of a task that is arriving.
func (a *arrival) state(task p2p.Task) *taskState {
	info, ok := a.info(task)
	if !ok {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	state := &taskState{
		Size: info.Size, MediaType: info.MediaType, Manifest: info.IsManifest,
		Pinned: info.Keep == p2p.KeepPinned, Origin: info.Origin, After: info.After,
	}
	if !a.have.Full() || a.have.Len() == 0 {
		state.Held, _ = a.have.AppendBinary(nil)
	}
	return state
}

// waitChange waits until something has changed. a.mu is held, and let go of meanwhile.
func (a *arrival) waitChange(ctx context.Context) error {
	more := a.more
	a.mu.Unlock()
	defer a.mu.Lock()
	select {
	case <-more:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// notify tells those who wait what they wait for.
func (a *arrival) notify(text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, notice := range a.notices {
		notice(text)
	}
}

// arrived tells the readers of a piece.
func (a *arrival) arrived(from peer.ID, piece int, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n > 0 {
		a.taken[from] += n
	}
	have := a.have.Clone()
	have.Add(piece)
	a.have = have
	a.changed()
}

// work has it arrive by another chain from now on, of which some pieces are here already.
func (a *arrival) work(table *digest.Table, links linksHash, have *schedule.Set) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.table, a.links, a.have = table, links, have.Clone()
	for r := range a.readers {
		r.check(table, have)
	}
	a.changed()
}

// end ends it: with an error, for all who wait.
func (a *arrival) end(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
	a.changed()
}

// prove tells all who wait that it is whole, and is what it is to be.
func (a *arrival) prove() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.proven = true
	a.changed()
}

// seal has no task added any more, and returns those that there are.
func (a *arrival) seal() []p2p.Info {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sealed = true
	return slices.Collect(maps.Values(a.tasks))
}

// spoil says that what has arrived is of no use to anybody later.
func (a *arrival) spoil() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.useless = true
}

// forget ends what has been deleted meanwhile, as covers says of when it was imported: all of it,
// with why, or, where it is wanted as something else, too, only that. It reports whether that
// was so.
func (a *arrival) forget(task p2p.Task, covers func(p2p.Info) bool, why error) (only bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	info, wanted := a.tasks[task]
	if !wanted || a.sealed || a.proven || info.Origin.IsZero() || !covers(info) {
		return false
	}
	if len(a.tasks) > 1 {
		delete(a.tasks, task)
		return true
	}
	a.useless = true
	a.cancel(why)
	return false
}
