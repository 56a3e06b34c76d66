package pieces

import (
	"slices"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Change is one thing about a store that is not as it was before, and why.
type Change struct {
	Event   Event
	Subject Subject
	Reason  Reason
	// Task is the task that has changed. Of a name, it is what that points to now, or has pointed to
	// until it was removed; of a blob and of a partial blob, only the digest is set.
	Task   p2p.Task
	Name   string // of a name
	Size   int64  // of a blob in bytes, or of what had arrived of one
	Detail string // what is wrong with a blob that is damaged
}

// Event says what has happened to a subject.
type Event string

// Events.
const (
	Added   Event = "added"
	Moved   Event = "moved" // of a name: it points elsewhere now
	Removed Event = "removed"
	Damaged Event = "damaged" // of a blob: it is not here until its content comes again
	Mended  Event = "mended"  // of a blob: it was damaged, and is whole
)

// Subject says what a change is about.
type Subject string

// Subjects.
const (
	SubjectName Subject = "name"
	SubjectTask Subject = "task"
	SubjectBlob Subject = "blob" // its bytes, however many tasks they are of
	// what has arrived of a blob; it is told of only when that is removed, and not stored
	SubjectPartial Subject = "partial"
)

// Reason says why something has changed.
type Reason string

// Reasons.
const (
	ReasonImported     Reason = "imported"     // a client has put it in here
	ReasonFetched      Reason = "fetched"      // it came from elsewhere
	ReasonDeleted      Reason = "deleted"      // a delete named it, or the name that it was held by
	ReasonMoved        Reason = "moved"        // a name held it, and points elsewhere now
	ReasonUnreferenced Reason = "unreferenced" // nothing refers to it any more
	ReasonExpired      Reason = "expired"      // it was kept for somebody who has not come back
	ReasonRoom         Reason = "room"         // others needed its room
	ReasonDropped      Reason = "dropped"      // whoever fetched it has no use for it
	ReasonRead         Reason = "read"         // a read has met it
)

// Watch has f told of all changes from now on, until stop is called: of those of one call at
// once, when they are durable, in the order in which they became so, and before the call returns.
// It is not told of what has failed, nor of what [Open] makes up for. Nothing else changes in the
// store while f runs: it returns at once, does not call the store or stop, and leaves the changes
// as they are. It is never called twice at a time, and not any more when stop has returned.
func (s *Store) Watch(f func([]Change)) (stop func()) {
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	w := &f
	s.watchers = append(s.watchers, w)
	return func() {
		s.watchMu.Lock()
		defer s.watchMu.Unlock()
		s.watchers = slices.DeleteFunc(s.watchers, func(other *func([]Change)) bool { return other == w })
	}
}

// note has a change told, when the transaction that is under way is durable.
func (s *Store) note(c Change) { s.changing = append(s.changing, c) }

// tell tells of changes that are durable.
func (s *Store) tell(changes ...Change) {
	if len(changes) == 0 {
		return
	}
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	for _, f := range s.watchers {
		(*f)(changes)
	}
}

// tellPartial tells that what had arrived of a blob was removed, where that was anything.
func (s *Store) tellPartial(d digest.Digest, size int64, why Reason) {
	if size > 0 {
		s.tell(Change{Event: Removed, Subject: SubjectPartial, Reason: why, Task: p2p.Task{Digest: d}, Size: size})
	}
}
