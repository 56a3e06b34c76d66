package pieces

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// A lease keeps what a client was told is here until what it builds on that can
// have come: a registry's client pushes layers, or hears that they are there, and
// then pushes the manifest that refers to them. A task that loses its last holder
// under a lease does not go: it becomes loose. Each one who was told has a lease,
// and each manifest that comes, or name, ends one of every task that it takes over.
// Only a delete of the very digest ends them all.
//
// What was stored for a client ([p2p.KeepUntilReferred]) has its lease in the task's record:
// it holds also when the store is opened again, and what it has saved stays loose, as
// if it had been pushed just then. A client that only asked has a lease in memory, and what that
// has saved is released again when it ends: nobody has pushed it.
//
// However the clock of the host is set meanwhile, a lease lasts as long: what has passed
// is measured (leaseNow), and one of an earlier run that seems to last longer is cut.

const (
	// DefaultLease is how long a lease lasts where Options does not say.
	DefaultLease = time.Hour
	// maxLeases is how many leases of one task are counted. A task that has as
	// many keeps them until they end.
	maxLeases = 64
	// maxLent is how many leases there are in memory. Beyond it the oldest go.
	maxLent = 1 << 16
)

// lent are the leases of those who have only asked. The Store's mu guards them.
type lent struct {
	tasks map[p2p.Task][]time.Time // when each ends, the first first
	n     int                      // how many there are in tasks
	order []lease                  // the oldest first; some of them are over already
	going map[p2p.Task]bool        // what the transaction that is under way removes
}

type lease struct {
	task p2p.Task
	end  time.Time
}

// lend gives a lease to a client that is about to be told that a task is here. It
// reports false where the task is being removed. Where the task turns out not to be
// here, the caller takes the lease back.
func (s *Store) lend(t p2p.Task) bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.lent
	if l.going[t] {
		return false
	}
	for len(l.order) > 0 && (l.n >= maxLent || !l.order[0].end.After(now)) {
		l.end(l.order[0])
		l.order = l.order[1:]
	}
	if len(l.order) >= 2*maxLent {
		l.order = slices.DeleteFunc(l.order, func(e lease) bool { return !slices.Contains(l.tasks[e.task], e.end) })
	}
	end := now.Add(s.lease)
	if all := l.tasks[t]; len(all) == maxLeases {
		l.set(t, all[1:])
	}
	l.set(t, append(l.tasks[t], end))
	l.order = append(l.order, lease{t, end})
	return true
}

// Lease gives a lease to a client of another daemon that is told of a task here. It
// fails with [p2p.ErrNotFound] where the task is not here.
func (s *Store) Lease(ctx context.Context, t p2p.Task) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	if err := s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, t) }); err != nil {
		return err
	}
	if !s.lend(t) {
		return errGoing(t)
	}
	return nil
}

func errGoing(t p2p.Task) error {
	return fmt.Errorf("%s: %w: it is being deleted", t, p2p.ErrNotFound)
}

// takeBack ends the last lease of a task that was lent.
func (s *Store) takeBack(t p2p.Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if all := s.lent.tasks[t]; len(all) > 0 {
		s.lent.set(t, all[:len(all)-1])
	}
}

func (l *lent) set(t p2p.Task, all []time.Time) {
	l.n += len(all) - len(l.tasks[t])
	if len(all) == 0 {
		delete(l.tasks, t)
	} else {
		l.tasks[t] = all
	}
}

// end ends a lease, where it has not been ended before.
func (l *lent) end(e lease) {
	all := l.tasks[e.task]
	for len(all) > 0 && !all[0].After(e.end) {
		all = all[1:]
	}
	l.set(e.task, all)
}

// spare makes t, which nothing holds any more, loose where somebody has a lease of it,
// and reports whether that is so. Where nobody has, t is about to be removed, and nobody
// gets one before that has happened or failed.
func (r *removal) spare(tx *bbolt.Tx, t p2p.Task, record *taskRecord) (spared bool, err error) {
	if len(r.s.live(record.Leases)) > 0 {
		return true, setLoose(tx, t, true)
	}
	if !r.s.isLent(t) {
		return false, nil
	}
	if err := putValue(tx, bucketSpared, taskKey(t), nil); err != nil {
		return true, err
	}
	return true, setLoose(tx, t, true)
}

// isLent reports whether there is a lease of t in memory. Where there is none, there
// will be none before the transaction that is under way is over.
func (s *Store) isLent(t p2p.Task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lent.has(t) {
		return true
	}
	s.lent.going[t] = true
	return false
}

// sweep releases what was spared for those who have only asked, and have not come
// back, until the store is closed.
func (s *Store) sweep() {
	tick := time.NewTicker(min(max(s.lease/8, 10*time.Millisecond), time.Minute))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.closing.Done():
			return
		}
		if s.begin(context.Background()) != nil {
			return
		}
		if err := s.releaseSpared(); err != nil {
			s.log.Warn("what nobody needs any more could not be released; it will be tried again", "error", err)
		}
		s.end()
	}
}

func (s *Store) releaseSpared() error {
	some := false
	err := s.view(func(tx *bbolt.Tx) error {
		scan(tx, bucketSpared, nil, func(k, _ []byte) bool {
			some = !s.lentNow(p2p.Task{Tag: firstPart(k), Digest: digest.Digest(lastPart(k))})
			return !some
		})
		return nil
	})
	if err != nil || !some {
		return err
	}
	var removed removal
	err = s.free(1, func(tx *bbolt.Tx) error {
		removed = s.newRemoval()
		var ended []p2p.Task
		scan(tx, bucketSpared, nil, func(k, _ []byte) bool {
			if t := (p2p.Task{Tag: firstPart(k), Digest: digest.Digest(lastPart(k))}); !s.lentNow(t) &&
				len(ended) < listBatch {
				ended = append(ended, t)
			}
			return true
		})
		for _, t := range ended {
			if err := setLoose(tx, t, false); err != nil { // and it is spared no more
				return err
			}
			if err := removed.release(tx, t, ReasonExpired); err != nil {
				return err
			}
		}
		return removed.noteLoose(tx)
	})
	if err == nil && len(removed.loose) > 0 {
		s.dropLoose()
	}
	return err
}

// lentNow reports whether there is a lease of t in memory that has not ended.
func (s *Store) lentNow(t p2p.Task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lent.has(t)
}

// has reports whether there is a lease of t that has not ended.
func (l *lent) has(t p2p.Task) bool {
	all := l.tasks[t]
	return len(all) > 0 && all[len(all)-1].After(time.Now())
}

// leaseNow returns the time by which leases in records end: that of the clock when the
// store was opened, and what has passed since then.
func (s *Store) leaseNow() time.Time { return s.opened.Add(time.Since(s.began)) }

// live returns those leases of a record that have not ended. One that ends later than
// any that could be given now was given before the clock was set back: it ends as one that
// was given when the store was opened.
func (s *Store) live(leases []int64) (all []int64) {
	now := s.leaseNow()
	for _, end := range leases {
		if end > now.Add(s.lease).Unix() {
			end = s.opened.Add(s.lease).Unix()
		}
		if end > now.Unix() {
			all = append(all, end)
		}
	}
	return all
}

// lease gives a lease to the client that has just stored what record is of.
func (r *removal) lease(record *taskRecord) {
	record.Leases = r.s.live(record.Leases)
	if len(record.Leases) == maxLeases {
		record.Leases = record.Leases[1:]
	}
	record.Leases = append(record.Leases, r.s.leaseNow().Add(r.s.lease).Unix())
}

// takeOver says that what a client has pushed holds the task t from now on, where
// t exists: it is not loose, and one of its leases has ended.
func (r *removal) takeOver(tx *bbolt.Tx, t p2p.Task) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found {
		return err
	}
	leases := r.s.live(record.Leases)
	if !r.returned(t) && 0 < len(leases) && len(leases) < maxLeases {
		leases = leases[1:]
	}
	if !record.Loose && len(leases) == len(record.Leases) {
		return nil
	}
	record.Loose, record.Leases = false, leases
	if err := removeKeys(tx, bucketSpared, taskKey(t)); err != nil {
		return err
	}
	return put(tx, bucketTasks, taskKey(t), record)
}

// returned reports whether somebody who has only asked for t has a lease of it,
// which ends when r is durable.
func (r *removal) returned(t p2p.Task) bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if len(r.s.lent.tasks[t]) == 0 {
		return false
	}
	r.ended = append(r.ended, t)
	return true
}

// endLeases ends those leases that a change which is durable now has fulfilled.
func (s *Store) endLeases(ended []p2p.Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range ended {
		if all := s.lent.tasks[t]; 0 < len(all) && len(all) < maxLeases {
			s.lent.set(t, all[1:])
		}
	}
}

// endAll ends the leases in memory of a task that goes.
func (s *Store) endAll(t p2p.Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lent.set(t, nil)
}

// removed forgets what was about to go: the transaction is over.
func (s *Store) removed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.lent.going)
}
