package swarm

import (
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
)

// recent remembers for a moment what peers have said that they have of tasks, so that what
// a lookup has just told is not asked again: by the Stat of a name for what that leads to, and
// by the Open that follows. What a peer does not have it does not remember: that may be there
// the moment after.
type recent struct {
	mu    sync.Mutex
	tasks map[p2p.Task][]provider
	bytes int                  // of all states
	led   map[p2p.Task][]leads // which names have led to tasks that were not held
}

func newRecent() *recent {
	return &recent{tasks: map[p2p.Task][]provider{}, led: map[p2p.Task][]leads{}}
}

// leads is a name that has led to a task, and a peer that has all of that, where it is known.
type leads struct {
	name p2p.NewName
	provider
}

// provider is a peer that has said what it has of a task.
type provider struct {
	peer  peer.ID
	state *taskState
	at    time.Time
}

const (
	recentFor      = 2 * time.Second
	maxRecent      = 1024 // tasks
	maxRecentBytes = 8 << 20
	// ledFor is how long it is remembered which name has led to a task: a host that holds that
	// then has fetched the file before.
	ledFor = 10 * time.Minute
	// maxLed is how many names of one task that is remembered of.
	maxLed = 8
)

func (r *recent) put(t p2p.Task, p peer.ID, state *taskState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(h provider) bool { return h.peer == p })
	if len(r.tasks) >= maxRecent || r.bytes+state.bytes() > maxRecentBytes {
		clear(r.tasks)
		r.bytes = 0
	}
	if all := r.tasks[t]; len(all) < maxSources {
		r.tasks[t] = append(all, provider{p, state, time.Now()})
		r.bytes += state.bytes()
	}
}

// of returns what is remembered of a task.
func (r *recent) of(t p2p.Task) []provider {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(h provider) bool { return time.Since(h.at) > recentFor })
	return slices.Clone(r.tasks[t])
}

// take returns what is remembered of a task, and forgets it.
func (r *recent) take(t p2p.Task) []provider {
	all := r.of(t)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(provider) bool { return true })
	return all
}

// lead remembers that a name of peers leads to a task.
func (r *recent) lead(name p2p.NewName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.led) >= maxRecent {
		clear(r.led)
	}
	task := p2p.Task{Tag: name.Tag, Digest: name.Digest}
	l := leads{name, provider{at: time.Now()}}
	for _, h := range r.tasks[task] {
		if h.state.whole() {
			state := *h.state
			state.Hints = nil
			l.peer, l.state = h.peer, &state
			break
		}
	}
	others := slices.DeleteFunc(r.led[task], func(o leads) bool { return o.name.Name == name.Name })
	r.led[task] = append(others[max(0, len(others)-maxLed+1):], l)
}

// takeLeads returns the names that have led to a task, and forgets them.
func (r *recent) takeLeads(task p2p.Task) []leads {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.led[task]
	delete(r.led, task)
	return slices.DeleteFunc(all, func(l leads) bool { return time.Since(l.at) > ledFor })
}

// remove forgets providers of a task. r.mu is held.
func (r *recent) remove(t p2p.Task, which func(provider) bool) {
	var left []provider
	for _, h := range r.tasks[t] {
		if which(h) {
			r.bytes -= h.state.bytes()
		} else {
			left = append(left, h)
		}
	}
	if r.tasks[t] = left; left == nil {
		delete(r.tasks, t)
	}
}
