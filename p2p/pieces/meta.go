package pieces

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// formatVersion is the version of the directory's format, docs/format.md. A
// store of an earlier version is brought to it when it is opened, one of a
// later version is not opened. It changes with whatever an earlier program
// would misread, or not keep up: a bucket, the meaning of a field.
const formatVersion = 2

// The buckets of meta.db. Their values are sealed, see records.go. Keys are text; the parts of a key are separated by a
// zero byte, which no tag, digest or name contains.
var (
	// keyVersion -> version, 4 bytes; keyBytes -> bytes in all blobs, 8 bytes; both big-endian;
	// keyDeletes -> sum over deletes
	bucketMeta    = []byte("meta")
	bucketBlobs   = []byte("blobs")   // digest -> blobRecord
	bucketTables  = []byte("tables")  // digest -> encoded digest.Table
	bucketTasks   = []byte("tasks")   // tag, digest -> taskRecord
	bucketHolders = []byte("holders") // digest, tag -> nothing: the tags that have a blob
	bucketNames   = []byte("names")   // tag, name -> nameRecord
	bucketNamed   = []byte("named")   // tag, digest, name -> nothing: which names point to a task
	bucketParents = []byte("parents") // tag, child digest, parent digest -> nothing: which tasks refer to a task
	// tag, subject digest, referrer digest -> nothing: which tasks are about a task
	bucketReferrers = []byte("referrers")
	// tag, digest -> time of last use, nanoseconds since 1970, 8 bytes, big-endian
	bucketUsed    = []byte("used")
	bucketLoose   = []byte("loose")   // digest -> nothing: blobs that may be held by nobody
	bucketDeletes = []byte("deletes") // tag, cid -> deleteRecord: what was deleted in the swarm
	bucketCleared = []byte("cleared") // tag -> deleteRecord: of which all was deleted in the swarm
	// tag, digest -> nothing: loose tasks that go when the leases of those who have only asked end
	bucketSpared  = []byte("spared")
	bucketDamaged = []byte("damaged") // digest -> damageRecord: what was met in a blob
	// tag, manifest digest, child digest -> nothing: what was deleted by force, or is damaged, or
	// has lost something itself; it may be back
	bucketLost = []byte("lost")
	// number, 8 bytes, big-endian -> key in deletes or cleared, in the order in which this store was told of them
	bucketDeleteLog = []byte("deletelog")
	bucketSums      = []byte("sums") // bucket -> bucketSum

	allBuckets = [][]byte{bucketSums, bucketMeta, bucketBlobs, bucketTables, bucketTasks, bucketHolders,
		bucketNames, bucketNamed, bucketParents, bucketReferrers, bucketUsed, bucketLoose, bucketSpared, bucketDamaged,
		bucketLost, bucketDeletes, bucketCleared, bucketDeleteLog}

	keyVersion = []byte("version")
	keyBytes   = []byte("bytes")
	keyDeletes = []byte("deletes")
)

// Records are JSON: any tool can read them, and a field can be added without a
// new version.

type blobRecord struct {
	Size int64 `json:"size"` // in bytes
}

type taskRecord struct {
	MediaType string    `json:"mediaType,omitempty"`
	Pinned    bool      `json:"pinned,omitempty"`
	Loose     bool      `json:"loose,omitempty"` // kept until something holds it
	Imported  time.Time `json:"imported"`
	// when it was imported or pushed, wherever that was; zero: Imported
	Origin   time.Time       `json:"origin,omitzero"`
	After    time.Time       `json:"after,omitzero"`    // Version.After of the same
	Fetched  bool            `json:"fetched,omitempty"` // it came from peers, and nobody has imported it here
	Manifest bool            `json:"manifest,omitempty"`
	Refs     []digest.Digest `json:"refs,omitempty"`
	Subject  digest.Digest   `json:"subject,omitempty"`
	// when those end that clients have for whom it was stored, in seconds since 1970, the first first
	Leases []int64 `json:"leases,omitempty"`
}

type nameRecord struct {
	Digest  digest.Digest `json:"digest"`
	Updated time.Time     `json:"updated"`
	After   time.Time     `json:"after,omitzero"`  // Version.After
	LetGo   bool          `json:"letGo,omitempty"` // whoever pointed it there let go of what it pointed to before
	// what whoever pointed it there has said of that, on this host
	Described json.RawMessage `json:"described,omitempty"`
}

func (r *nameRecord) version() Version { return Version{r.Updated, r.After} }

// key joins the parts of a key.
func key[T ~string](parts ...T) []byte {
	var k []byte
	for i, p := range parts {
		if i > 0 {
			k = append(k, 0)
		}
		k = append(k, p...)
	}
	return k
}

// prefix is a key up to and with the separator after its last part.
func prefix(parts ...string) []byte { return append(key(parts...), 0) }

func taskKey(t p2p.Task) []byte { return key(t.Tag, string(t.Digest)) }

// lastPart returns what follows the last separator of a key.
func lastPart(k []byte) string { return string(k[bytes.LastIndexByte(k, 0)+1:]) }

// firstPart returns what stands before the first separator of a key.
func firstPart(k []byte) string {
	first, _, _ := strings.Cut(string(k), "\x00")
	return first
}

// after moves c to the first key that sorts after last, and returns it.
func after(c *bbolt.Cursor, last []byte) []byte {
	k, _ := c.Seek(last)
	if k != nil && bytes.Equal(k, last) {
		k, _ = c.Next()
	}
	return k
}

// lastParts returns the last part of every key that starts with prefix.
func lastParts(tx *bbolt.Tx, bucket, prefix []byte) []string {
	var parts []string
	scan(tx, bucket, prefix, func(k, _ []byte) bool {
		parts = append(parts, lastPart(k))
		return true
	})
	return parts
}

func hasAny(tx *bbolt.Tx, bucket, prefix []byte) bool {
	found := false
	scan(tx, bucket, prefix, func(_, _ []byte) bool {
		found = true
		return false
	})
	return found
}

func encodeTime(t time.Time) []byte { return binary.BigEndian.AppendUint64(nil, uint64(t.UnixNano())) }

func decodeTime(v []byte) time.Time {
	if len(v) != 8 {
		return time.Time{}
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(v))).UTC()
}

// storedBytes returns the count of bytes in all blobs.
func storedBytes(tx *bbolt.Tx) int64 {
	v := value(tx, bucketMeta, keyBytes)
	if len(v) != 8 {
		return 0
	}
	return int64(binary.BigEndian.Uint64(v))
}

// countBytes adds n to the count of bytes in all blobs.
func countBytes(tx *bbolt.Tx, n int64) error {
	return putValue(tx, bucketMeta, keyBytes, binary.BigEndian.AppendUint64(nil, uint64(storedBytes(tx)+n)))
}

// update changes the metadata, durably, in one transaction with whatever
// others want to change at the same time. f may be called more than once, and
// an error of f undoes what it did and nothing else. It must not have effects
// outside the transaction but set variables of its own anew.
func (s *Store) update(f func(tx *bbolt.Tx) error) error { return s.updateMuch(1, f) }

// updateLimit bounds what one transaction takes in. bbolt keeps the records of a page that
// is written to in one sorted list until the commit: many manifests that name the same
// blobs, in one transaction, take time by the square of their number.
const updateLimit = 1000

// updateMuch is update for a change of so many records.
func (s *Store) updateMuch(records int, f func(tx *bbolt.Tx) error) error {
	return s.updates.do(&update{f: f}, records, s.runUpdates)
}

// update is one change of the metadata, and what it turns out to change.
type update struct {
	f       func(tx *bbolt.Tx) error
	changes []Change
}

func (s *Store) runUpdates(jobs []*job[*update]) {
	fail := func(err error) {
		for _, j := range jobs {
			if j.err == nil {
				j.err = err
			}
		}
	}
	if err := s.Failure(); err != nil {
		fail(err)
		return
	}
	used, cleared := s.pending()
	defer s.removed()
	for {
		var stored int64
		var failed *job[*update]
		err := s.transaction(func(tx *bbolt.Tx) error {
			if err := flush(tx, used, cleared); err != nil {
				return err
			}
			defer func() { stored = storedBytes(tx) }()
			for _, j := range jobs {
				if j.err != nil {
					continue // it failed in an earlier round
				}
				s.changing = nil
				if err := j.value.f(tx); err != nil {
					failed, j.err = j, err
					return err
				}
				j.value.changes = s.changing
			}
			return nil
		})
		if err == nil {
			s.stored.Store(stored)
			s.flushed(used, cleared)
			s.reserveBlocks()
			for _, j := range jobs {
				if j.err == nil {
					s.tell(j.value.changes...)
				}
			}
			return
		}
		if failed != nil {
			continue // again, without the one that failed
		}
		fail(s.failedUpdate(err))
		return
	}
}

// failedUpdate says what a failed transaction means for the store.
func (s *Store) failedUpdate(err error) error {
	if failure := s.Failure(); failure != nil {
		return failure
	}
	_, written := errors.AsType[*fs.PathError](err) // of a write; that of a sync has no path
	err = fmt.Errorf("write the metadata: %w", DiskError(err))
	switch {
	case written && errors.Is(err, p2p.ErrNoSpace):
		return err // pages that nothing refers to yet were not written
	case errors.Is(err, digest.ErrCorrupt):
		return s.fail(errDamagedMeta(s.path("meta.db"), err))
	case s.unmapped():
		return fmt.Errorf("%w: %w: try again", p2p.ErrUnavailable, err) // nothing was written yet
	}
	// After a failed write or fsync nobody knows what is on disk. Going on could
	// acknowledge what is not there.
	return s.fail(fmt.Errorf("%w: %w: nothing more is stored until a restart: look at the disk first",
		p2p.ErrFailed, err))
}

// transaction runs f in a transaction of its own, with a fault that tests can
// inject in place of the commit.
func (s *Store) transaction(f func(tx *bbolt.Tx) error) (err error) {
	defer recoverDamage(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	tx, err := s.beginUpdate()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := f(tx); err != nil {
		return err
	}
	if s.failCommit != nil {
		if err := s.failCommit(); err != nil {
			return err
		}
	}
	txid := tx.ID()
	if err := tx.Commit(); err != nil {
		return err
	}
	return s.committed(txid)
}

// addTask makes or completes a task of the commit c. It returns the children it
// referred to and does not any more.
//
//nolint:cyclop // the steps of one transaction, in their order
func (r *removal) addTask(tx *bbolt.Tx, n p2p.NewTask, c *commit) (released []digest.Digest, err error) {
	k := taskKey(n.Task)
	record, found, err := get[taskRecord](tx, bucketTasks, k)
	if err != nil {
		return nil, err
	}
	var before Version
	if found {
		before = record.version()
	} else {
		record.Imported = r.now
		record.Loose = n.Keep == p2p.KeepUntilReferred
		record.Fetched = !n.Origin.IsZero()
		r.s.note(Change{Event: Added, Subject: SubjectTask, Reason: r.came, Task: n.Task})
	}
	version, err := r.s.stamp(tx, n.Task.Tag, string(n.Task.Digest), Version{n.Origin, n.After}, before)
	if err != nil {
		return nil, err
	}
	record.Origin, record.After = version.At, version.After
	record.Fetched = record.Fetched && !n.Origin.IsZero()
	record.Pinned = record.Pinned || n.Keep == p2p.KeepPinned
	if err := record.retype(tx, n, c.named[n.Task]); err != nil {
		return nil, err
	}
	if m := n.Manifest; m != nil {
		record.Manifest = true
		released = record.Refs
		if err := record.unlink(tx, n.Task); err != nil {
			return nil, err
		}
		record.Refs, record.Subject = m.Refs, m.Subject
		if err := record.link(tx, n.Task); err != nil {
			return nil, err
		}
		for _, d := range m.Refs {
			child, take := p2p.Task{Tag: n.Task.Tag, Digest: d}, adopt
			if n.Origin.IsZero() && !c.tasks[child] {
				take = r.takeOver // it was there before, as its client was told
			}
			if err := take(tx, child); err != nil {
				return nil, err
			}
		}
		if err := inherit(tx, n.Task, m.Refs); err != nil {
			return nil, err
		}
	}
	record.Loose = record.Loose && !record.held(tx, n.Task)
	if n.Keep == p2p.KeepUntilReferred && n.Origin.IsZero() && !c.named[n.Task] && !record.attached(tx, n.Task) {
		r.lease(&record)
		if err := removeKeys(tx, bucketSpared, k); err != nil { // it was pushed now
			return nil, err
		}
	}
	if err := put(tx, bucketTasks, k, record); err != nil {
		return nil, err
	}
	// What is about this task, and came before it, is held by it now.
	for _, referrer := range lastParts(tx, bucketReferrers, prefix(n.Task.Tag, string(n.Task.Digest))) {
		take := adopt
		if n.Origin.IsZero() {
			take = r.takeOver
		}
		if err := take(tx, p2p.Task{Tag: n.Task.Tag, Digest: digest.Digest(referrer)}); err != nil {
			return nil, err
		}
	}
	return released, putValue(tx, bucketHolders, key(string(n.Task.Digest), n.Task.Tag), nil)
}

// retype gives the record the media type with which its task is committed. A manifest keeps the one
// that it came with, and so does what a name points to: that is what the name stands for. What is
// pushed as something else then is refused; what comes from peers has no say. named says that the
// commit points a name to the task.
func (r *taskRecord) retype(tx *bbolt.Tx, n p2p.NewTask, named bool) error {
	isNamed := func() bool { return hasAny(tx, bucketNamed, prefix(n.Task.Tag, string(n.Task.Digest))) }
	switch {
	case n.MediaType == "" || n.MediaType == r.MediaType, r.isManifest() && n.Manifest == nil:
		return nil
	case r.MediaType == "" || !r.isManifest() && !isNamed(), !r.isManifest() && n.Manifest != nil && !n.Origin.IsZero():
		r.MediaType = n.MediaType
		return nil
	case !n.Origin.IsZero(), n.Manifest == nil && !named:
		return nil
	}
	return otherType(n.Task, r.MediaType, n.MediaType)
}

// otherType is the error of what is to be of another media type than it has.
func otherType(t p2p.Task, is, want string) error {
	return fmt.Errorf("%s: %w: it is here as %q, and can't be %q too: push it as what it is, or delete it first", t,
		digest.ErrInvalid, is, want)
}

// origin returns when the task was imported or pushed, on whatever host.
func (r *taskRecord) origin() time.Time {
	if r.Origin.IsZero() {
		return r.Imported
	}
	return r.Origin
}

// version returns when that was, and after what.
func (r *taskRecord) version() Version { return Version{r.origin(), r.After} }

// isManifest reports whether the task was committed as one. The first stores
// said so by its references only.
func (r *taskRecord) isManifest() bool { return r.Manifest || len(r.Refs) > 0 }

// keep returns what keeps the task.
func (r *taskRecord) keep() p2p.Keep {
	switch {
	case r.Pinned:
		return p2p.KeepPinned
	case r.Loose:
		return p2p.KeepUntilReferred
	}
	return p2p.KeepReferred
}

// link enters what the manifest t refers to in the indexes.
func (r *taskRecord) link(tx *bbolt.Tx, t p2p.Task) error {
	// In the order of the keys: what comes last is not in the way of what is there.
	for _, child := range slices.Sorted(slices.Values(r.Refs)) {
		if err := putValue(tx, bucketParents, key(t.Tag, string(child), string(t.Digest)), nil); err != nil {
			return err
		}
	}
	if r.Subject == "" {
		return nil
	}
	return putValue(tx, bucketReferrers, key(t.Tag, string(r.Subject), string(t.Digest)), nil)
}

// unlink takes out of the indexes what the manifest t refers to.
func (r *taskRecord) unlink(tx *bbolt.Tx, t p2p.Task) error {
	for _, child := range r.Refs {
		if err := removeKeys(tx, bucketParents, key(t.Tag, string(child), string(t.Digest))); err != nil {
			return err
		}
	}
	if r.Subject == "" {
		return nil
	}
	return removeKeys(tx, bucketReferrers, key(t.Tag, string(r.Subject), string(t.Digest)))
}

// held reports whether a name, another task or its subject holds the task t.
func (r *taskRecord) held(tx *bbolt.Tx, t p2p.Task) bool {
	return hasAny(tx, bucketNamed, prefix(t.Tag, string(t.Digest))) ||
		hasAny(tx, bucketParents, prefix(t.Tag, string(t.Digest))) ||
		r.attached(tx, t)
}

// attached reports whether what the task t is about is there.
func (r *taskRecord) attached(tx *bbolt.Tx, t p2p.Task) bool {
	return r.Subject != "" && has(tx, bucketTasks, key(t.Tag, string(r.Subject)))
}

// adopt says that something holds the task t from now on, where t exists.
func adopt(tx *bbolt.Tx, t p2p.Task) error { return setLoose(tx, t, false) }

// setLoose says whether t, where it exists, is kept until something holds it.
func setLoose(tx *bbolt.Tx, t p2p.Task, loose bool) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found || record.Loose == loose {
		return err
	}
	record.Loose = loose
	if !loose {
		if err := removeKeys(tx, bucketSpared, taskKey(t)); err != nil {
			return err
		}
	}
	return put(tx, bucketTasks, taskKey(t), record)
}

// loosen keeps a task that has lost a holder, where nothing else holds it.
func loosen(tx *bbolt.Tx, t p2p.Task) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found || record.held(tx, t) {
		return err
	}
	return setLoose(tx, t, true)
}

// checkType compares the media type that a name is made with to that of its task. One that no name
// points to yet, and that is no manifest, gets it.
func checkType(tx *bbolt.Tx, n p2p.NewName) error {
	t := p2p.Task{Tag: n.Tag, Digest: n.Digest}
	record, _, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	switch {
	case err != nil, n.MediaType == "", n.MediaType == record.MediaType:
		return err
	case record.isManifest(), hasAny(tx, bucketNamed, prefix(n.Tag, string(n.Digest))):
		return otherType(t, record.MediaType, n.MediaType)
	}
	record.MediaType = n.MediaType
	return put(tx, bucketTasks, taskKey(t), record)
}

// setName points a name to a task and returns the task it pointed to before, or
// "". What came from a peer does not replace what is newer.
func (r *removal) setName(tx *bbolt.Tx, n p2p.NewName) (before digest.Digest, err error) {
	k := key(n.Tag, n.Name)
	record, found, err := get[nameRecord](tx, bucketNames, k)
	if err != nil {
		return "", err
	}
	known := record.version()
	if !n.Updated.IsZero() {
		known = Version{} // what is to be compared with it is not part of it
	}
	version, err := r.s.stamp(tx, n.Tag, n.Name, Version{n.Updated, n.After}, known)
	if err != nil {
		return "", err
	}
	if found && !n.Updated.IsZero() && !NewerName(n.Digest, n.Updated, record.Digest, record.Updated) {
		return "", nil
	}
	if found && record.Digest != n.Digest {
		before = record.Digest
		r.noteName(Moved, r.came, n)
		if err := removeKeys(tx, bucketNamed, key(n.Tag, string(before), n.Name)); err != nil {
			return "", err
		}
	}
	if err := checkType(tx, n); err != nil {
		return "", err
	}
	described := json.RawMessage(n.Description)
	switch {
	case n.Description == nil && record.Digest == n.Digest:
		described = record.Described
	case string(n.Description) == "{}":
		described = nil
	}
	if err := put(tx, bucketNames, k, nameRecord{
		Digest: n.Digest, Updated: version.At, After: version.After, LetGo: !n.KeepOld, Described: described,
	}); err != nil {
		return "", err
	}
	if !found {
		r.noteName(Added, r.came, n)
	}
	take := adopt
	if n.Updated.IsZero() {
		take = r.takeOver
	}
	if err := take(tx, p2p.Task{Tag: n.Tag, Digest: n.Digest}); err != nil {
		return "", err
	}
	return before, putValue(tx, bucketNamed, key(n.Tag, string(n.Digest), n.Name), nil)
}

// removal is what a change takes away.
type removal struct {
	s       *Store
	now     time.Time
	came    Reason // why what a commit adds is added
	tasks   []p2p.Task
	origins []time.Time     // of tasks
	loose   []digest.Digest // blobs that no task is left of
	freed   int64           // bytes in them
	missing []digest.CID    // that were to be deleted, and are not here
	order   []digest.CID    // in which the others were deleted
	ended   []p2p.Task      // whose leases in memory it has fulfilled, each one for one

	copiesOnly bool // what was put in on this host is not taken away: it becomes loose
}

func (s *Store) newRemoval() removal { return removal{s: s, now: s.now()} }

// noteName has a change of a name told.
func (r *removal) noteName(e Event, why Reason, n p2p.NewName) {
	r.s.note(Change{Event: e, Subject: SubjectName, Reason: why, Task: p2p.Task{Tag: n.Tag, Digest: n.Digest},
		Name: n.Name})
}

func (r *removal) deleted() p2p.Deleted {
	return p2p.Deleted{Tasks: len(r.tasks), Freed: r.freed, NotFound: r.missing}
}

// noteLoose ends a removal: it notes which blobs may go now. They are in order, as many that are
// not would take time by the square of their number: see updateLimit.
func (r *removal) noteLoose(tx *bbolt.Tx) error {
	slices.Sort(r.loose)
	for _, d := range r.loose {
		if err := putValue(tx, bucketLoose, key(d), nil); err != nil {
			return err
		}
	}
	return nil
}

// release removes a task that nothing holds, neither a pin nor a name nor
// another task; and then what only it held. One that a client was told of becomes
// loose instead (lease.go).
func (r *removal) release(tx *bbolt.Tx, t p2p.Task, why Reason) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found || record.keep() != p2p.KeepReferred || record.held(tx, t) {
		return err
	}
	if r.copiesOnly && !record.Fetched {
		return setLoose(tx, t, true)
	}
	if spared, err := r.spare(tx, t, &record); spared || err != nil {
		return err
	}
	return r.remove(tx, t, why)
}

// releaseCopies does what release does, but takes away nothing that was put in on
// this host: the change is one that a peer has told of, by whoever reads here.
func (r *removal) releaseCopies(tx *bbolt.Tx, t p2p.Task, why Reason) error {
	before := r.copiesOnly
	r.copiesOnly = true
	defer func() { r.copiesOnly = before }()
	return r.release(tx, t, why)
}

// remove removes a task, the names that point to it, and what only it held.
func (r *removal) remove(tx *bbolt.Tx, t p2p.Task, why Reason) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found {
		return err
	}
	for _, name := range lastParts(tx, bucketNamed, prefix(t.Tag, string(t.Digest))) {
		if err := r.dropName(tx, p2p.NewName{Tag: t.Tag, Name: name, Digest: t.Digest}, why); err != nil {
			return err
		}
	}
	if err := removeKeys(tx, bucketTasks, taskKey(t), bucketSpared, taskKey(t), bucketUsed, taskKey(t), bucketHolders,
		key(string(t.Digest), t.Tag)); err != nil {
		return err
	}
	r.s.endAll(t)
	if err := forgive(tx, t); err != nil {
		return err
	}
	r.s.note(Change{Event: Removed, Subject: SubjectTask, Reason: why, Task: t})
	r.tasks, r.origins = append(r.tasks, t), append(r.origins, record.origin())
	if !hasAny(tx, bucketHolders, prefix(string(t.Digest))) {
		blob, _, err := get[blobRecord](tx, bucketBlobs, key(t.Digest))
		if err != nil {
			return err
		}
		r.loose = append(r.loose, t.Digest)
		r.freed += blob.Size
	}
	if err := record.unlink(tx, t); err != nil {
		return err
	}
	released := record.Refs
	for _, referrer := range lastParts(tx, bucketReferrers, prefix(t.Tag, string(t.Digest))) {
		released = append(released, digest.Digest(referrer))
	}
	for _, d := range released {
		if err := r.release(tx, p2p.Task{Tag: t.Tag, Digest: d}, ReasonUnreferenced); err != nil {
			return err
		}
	}
	return nil
}
