package swarm

import (
	"context"
	"log/slog"
	"slices"
	"sync"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// announcements are what this daemon tells the swarm that it provides: the tasks and names of
// its store, as that tells of changes, and the tasks that are arriving.
type announcements struct {
	network Network
	store   *pieces.Store
	log     *slog.Logger

	mu   sync.Mutex
	gone map[Key]bool // removed since all that is here began to be listed; nil when it has been
}

// changed is told what changes in the store.
func (a *announcements) changed(changes []pieces.Change) {
	var added, removed []Key
	for _, c := range changes {
		var k Key
		switch c.Subject {
		case pieces.SubjectTask:
			k = taskKey(c.Task)
		case pieces.SubjectName:
			k = nameKey(c.Task.Tag, c.Name)
		default:
			continue
		}
		switch c.Event {
		case pieces.Added:
			added = append(added, k)
		case pieces.Removed:
			removed = append(removed, k)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gone != nil {
		for _, k := range removed {
			a.gone[k] = true
		}
		for _, k := range added {
			delete(a.gone, k)
		}
	}
	a.network.Withdraw(removed...)
	a.network.Announce(added...)
}

// ended withdraws tasks that do not arrive any more, but for those that are here.
func (a *announcements) ended(tasks ...p2p.Task) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range tasks {
		if here, err := a.store.HasTask(t); err == nil && !here {
			a.network.Withdraw(taskKey(t))
		}
	}
}

// announceAll announces what the store holds.
func (a *announcements) announceAll(ctx context.Context) {
	const batch = 1024
	var keys []Key
	announce := func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.network.Announce(slices.DeleteFunc(keys, func(k Key) bool { return a.gone[k] })...)
		keys = nil
	}
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.gone = nil
	}()
	for e, err := range a.store.List(ctx, p2p.Query{}) {
		if err != nil {
			if ctx.Err() == nil {
				a.log.Error("not all that is here could be announced", "error", err)
			}
			break
		}
		if e.Name != "" {
			keys = append(keys, nameKey(e.Task.Tag, e.Name))
		} else {
			keys = append(keys, taskKey(e.Task))
		}
		if len(keys) == batch {
			announce()
		}
	}
	announce()
}
