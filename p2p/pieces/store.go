package pieces

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dirs"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// Options says how to open a store.
type Options struct {
	// Log gets what an operator should know. The default is to be silent.
	Log *slog.Logger
	// Address says where the store can be reached while it is open, for whoever
	// finds it locked: a daemon's socket.
	Address string
	// Existing makes it an error that matches [fs.ErrNotExist] if there is no
	// store in the directory, and leaves the directory as it is.
	Existing bool
	// MaxSize is how many bytes blobs and what is being taken in may have
	// together; 0 is no limit. What goes beyond it fails with [p2p.ErrNoSpace].
	MaxSize int64
	// Lease is how long a client has to build on what it was told is here: as long
	// as an upload may take. The default is [DefaultLease].
	Lease time.Duration
	// Backend has the bytes of blobs. The default is the directory itself, which has the metadata
	// in any case.
	Backend backend.Backend
	// Now tells the time; the default is time.Now.
	Now func() time.Time

	recheck time.Duration // for tests: in place of recheckInterval
}

// Store is a store of which the metadata is in a directory of this machine. It implements [p2p.Engine]
// and is safe for concurrent use.
type Store struct {
	dir   string
	log   *slog.Logger
	bytes backend.Backend // blobs, and what becomes one
	files backend.Files   // for the metadata
	db    *bbolt.DB
	guard guard

	lease    time.Duration
	maxSize  int64        // 0 is no limit
	stored   atomic.Int64 // bytes in all blobs
	incoming atomic.Int64 // bytes in copies that are not blobs yet
	promised atomic.Int64 // bytes that are to arrive, for which room was set aside
	roomMu   sync.Mutex   // kept while room is looked for and promised

	updates    batch[*update]
	changing   []Change     // what the function of an update that runs has changed so far
	failCommit func() error // for tests: a commit that fails
	flushes    map[digest.Algorithm]*batch[struct{}]

	clock    func() time.Time
	opened   time.Time                        // by clock
	began    time.Time                        // the same moment, to measure from
	believed atomic.Pointer[func() time.Time] // see Believe

	calls  sync.WaitGroup // calls under way
	callMu sync.Mutex     // guards closed, and calls against Close
	closed bool
	// closing ends with Close, of which it has the error. What is read for a caller ends with it.
	closing  context.Context
	sweeping sync.WaitGroup // what the store does of its own accord
	writing  sync.WaitGroup // writers that have something to drop
	close    context.CancelCauseFunc

	// holdMu guards holds and is kept while blobs are dropped, so that a caller with
	// a hold knows that its blob stays as it is.
	holdMu sync.Mutex
	holds  map[digest.Digest]*hold

	mu      sync.Mutex
	used    map[p2p.Task]time.Time // uses that are not in the metadata yet
	saved   time.Time              // when they were last written there
	moved   map[digest.Digest]bool // loose blobs whose files are moved away, which a power cut may undo
	cleared map[digest.Digest]bool // loose blobs that are gone for good, to be taken off the list
	lent    lent

	watchMu  sync.Mutex // kept while watchers are told
	watchers []*func([]Change)

	partials map[digest.Digest]*Partial // those that are open
	unopened map[digest.Digest]leftover // those that are not
}

// hold is what keeps a blob from being dropped.
type hold struct {
	count  int
	orphan bool // whether the blob's file may be in place without a record
}

// usedInterval is how long the time of last use may stay in memory only.
const usedInterval = time.Minute

// Open opens the store in dir, and makes one if there is none. It reads and
// checks all of the metadata, about a gigabyte for a million blobs, and none of
// the blobs. Where that is damaged the error matches [digest.ErrCorrupt]; where
// another process has the store open, or its format is not known, the error matches
// [p2p.ErrUnavailable]. The caller closes the store.
func Open(dir string, opts Options) (*Store, error) {
	return open(dir, opts, backend.Disk{})
}

//nolint:funlen // the steps of opening, in their order, with what each undoes
func open(dir string, opts Options, files backend.Files) (_ *Store, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{
		dir:      dir,
		bytes:    opts.Backend,
		log:      opts.Log,
		files:    files,
		maxSize:  opts.MaxSize,
		guard:    guard{failed: make(chan struct{})},
		updates:  batch[*update]{limit: updateLimit},
		clock:    opts.Now,
		lease:    cmp.Or(opts.Lease, DefaultLease),
		flushes:  map[digest.Algorithm]*batch[struct{}]{},
		holds:    map[digest.Digest]*hold{},
		used:     map[p2p.Task]time.Time{},
		saved:    time.Now(),
		moved:    map[digest.Digest]bool{},
		cleared:  map[digest.Digest]bool{},
		partials: map[digest.Digest]*Partial{},
		unopened: map[digest.Digest]leftover{},
		lent:     lent{tasks: map[p2p.Task][]time.Time{}, going: map[p2p.Task]bool{}},
	}
	s.closing, s.close = context.WithCancelCause(context.Background())
	if s.clock == nil {
		s.clock = time.Now
	}
	s.opened, s.began = s.now(), time.Now()
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := digest.SelfTest(); err != nil {
		return nil, fmt.Errorf("open store: this build's SHA-2 can't make hash chains: %w: build it with Go's own", err)
	}
	if s.bytes == nil {
		s.bytes = backend.NewDir(dir, files, s.log)
	}
	for _, alg := range backend.Algorithms {
		s.flushes[alg] = new(batch[struct{}])
	}
	if !opts.Existing {
		// For owner and group only: a blob may be less public than the machine is.
		err = dirs.Make(dir, 0o750)
	}
	if err == nil {
		err = s.bytes.Prepare(opts.Existing)
	}
	if opts.Existing && errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open store: there is none in %s: %w", dir, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, DiskError(err))
	}
	if err := s.takeLock(opts.Address); err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	if err = s.checkMeta(); err == nil {
		err = s.openMeta()
	}
	if err != nil {
		s.guard.lock.Close()
		return nil, fmt.Errorf("open store: %w", err)
	}
	err = s.view(func(tx *bbolt.Tx) error {
		s.stored.Store(storedBytes(tx))
		return nil
	})
	if err == nil {
		err = s.recover()
	}
	if err == nil {
		err = s.findPartials()
	}
	if err == nil {
		s.keepReserve()
	}
	if err != nil {
		s.db.Close()
		s.guard.file.Close()
		s.guard.lock.Close()
		return nil, fmt.Errorf("open store %s: recover: %w", dir, DiskError(err))
	}
	if !opts.Existing { // whoever only looks changes nothing
		s.sweeping.Go(s.sweep)
		s.sweeping.Go(func() { s.watchMeta(cmp.Or(opts.recheck, recheckInterval)) })
	}
	return s, nil
}

// checkMeta makes sure that a new metadata file is not made beside blobs that
// belonged to one that was lost: they would all be there and none be found.
func (s *Store) checkMeta() error {
	if info, err := os.Stat(s.path("meta.db")); err == nil && info.Size() > 0 || err != nil && !backend.IsMissing(err) {
		return err
	}
	for _, err := range s.bytes.Blobs() {
		if err != nil {
			return err
		}
		return fmt.Errorf("%w: %s is missing or empty, but there are blobs: put it back from a copy; or move %s "+
			"away, start with an empty store, and import from there, each file is named by its digest",
			digest.ErrCorrupt, s.path("meta.db"), s.path("blobs"))
	}
	return nil
}

// leftovers returns the blobs that may be in place without being anybody's: they
// were being deleted, or not committed yet.
func (s *Store) leftovers() ([]digest.Digest, error) {
	loose, err := s.loose()
	if err != nil {
		return nil, err
	}
	// What is claimed may be in place without the records for it.
	claimed, err := s.bytes.Claims()
	return append(loose, claimed...), err
}

// recover makes up for whatever was interrupted when the store was last open.
func (s *Store) recover() error {
	loose, err := s.leftovers()
	if err != nil {
		return err
	}
	if len(loose) > 0 {
		if err := s.drop(loose); err != nil {
			return err
		}
		if err := s.syncMoved(); err != nil {
			return err
		}
		s.log.Info("removed what was not committed, or was being deleted", "blobs", len(loose))
	}
	// The claims go only now that nothing depends on them.
	n, err := s.bytes.Clean()
	if n > 0 {
		s.log.Info("removed what an interrupted import left", "files", n)
	}
	return err
}

// syncMoved makes durable that the files of blobs were moved away.
func (s *Store) syncMoved() error {
	algorithms := map[digest.Algorithm]bool{}
	s.mu.Lock()
	for d := range s.moved {
		algorithms[d.Algorithm()] = true
	}
	s.mu.Unlock()
	for alg := range algorithms {
		if err := s.syncBlobs(alg); err != nil {
			return fmt.Errorf("write to disk: %w", err)
		}
	}
	return nil
}

// now returns the time by the clock of this host.
func (s *Store) now() time.Time { return s.clock().UTC() }

// Dir returns the directory that the store is in, as an absolute path.
func (s *Store) Dir() string { return s.dir }

// Scratch returns a directory on the same disk for what is short-lived. What is left in it
// goes when the store is opened again.
func (s *Store) Scratch() string { return s.bytes.Scratch() }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// begin announces a call. Where it returns nil, the caller calls end.
func (s *Store) begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	s.callMu.Lock()
	defer s.callMu.Unlock()
	if s.closed {
		return fmt.Errorf("store %s: %w", s.dir, p2p.ErrClosed)
	}
	s.calls.Add(1)
	return nil
}

func (s *Store) end() { s.calls.Done() }

// Close waits for calls under way and closes the store. It does not wait for what is read for an
// Add, which may never come: the Add fails with [p2p.ErrClosed]. Blobs that are open
// stay readable. Ingests that are open can only be closed any more.
func (s *Store) Close() error {
	s.callMu.Lock()
	closed := s.closed
	s.closed = true
	s.callMu.Unlock()
	s.close(fmt.Errorf("store %s: %w", s.dir, p2p.ErrClosed))
	s.sweeping.Wait()
	s.calls.Wait()
	s.writing.Wait()
	if closed {
		return nil
	}
	var err error
	if s.Failure() == nil {
		err = s.syncMoved()
	}
	if used, cleared := s.pending(); err == nil && len(used)+len(cleared) > 0 {
		err = s.update(func(*bbolt.Tx) error { return nil })
	}
	return errors.Join(err, s.db.Close(), s.guard.file.Close(), s.guard.lock.Close())
}

// touch notes that a task was used now.
func (s *Store) touch(t p2p.Task) {
	now := time.Now()
	s.mu.Lock()
	s.used[t] = now
	due := now.Sub(s.saved) > usedInterval || len(s.used) > 4096
	if due {
		s.saved = now
	}
	s.mu.Unlock()
	if due {
		if err := s.update(func(*bbolt.Tx) error { return nil }); err != nil {
			s.log.Warn("could not note when blobs were used", "error", err)
		}
	}
}

// pending returns what is kept in memory until there is a transaction to join:
// uses, and loose blobs that are gone.
func (s *Store) pending() (map[p2p.Task]time.Time, []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.used), slices.Collect(maps.Keys(s.cleared))
}

// flush writes what is pending.
func flush(tx *bbolt.Tx, used map[p2p.Task]time.Time, cleared []digest.Digest) error {
	for t, at := range used {
		if !has(tx, bucketTasks, taskKey(t)) {
			continue // deleted since
		}
		if err := putValue(tx, bucketUsed, taskKey(t), encodeTime(at)); err != nil {
			return err
		}
	}
	for _, d := range cleared {
		if err := removeKeys(tx, bucketLoose, key(d)); err != nil {
			return err
		}
	}
	return nil
}

// flushed forgets what flush has written, now that it is durable.
func (s *Store) flushed(used map[p2p.Task]time.Time, cleared []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t, at := range used {
		if s.used[t].Equal(at) {
			delete(s.used, t)
		}
	}
	for _, d := range cleared {
		delete(s.cleared, d)
	}
}

// hold keeps a blob from being dropped until it is let go.
func (s *Store) hold(d digest.Digest) {
	s.holdMu.Lock()
	defer s.holdMu.Unlock()
	if s.holds[d] == nil {
		s.holds[d] = new(hold)
	}
	s.holds[d].count++
}

// letGo ends a hold. The last one to let go of a blob that no task holds drops
// it. published says that the blob's file may be in place without a record.
func (s *Store) letGo(d digest.Digest, published bool) error {
	s.holdMu.Lock()
	h := s.holds[d]
	h.count--
	h.orphan = h.orphan || published
	last := h.count == 0
	if last {
		delete(s.holds, d)
	}
	s.holdMu.Unlock()
	if !last {
		return nil
	}
	unheld := false
	err := s.view(func(tx *bbolt.Tx) error {
		stored := h.orphan || has(tx, bucketBlobs, key(d))
		unheld = stored && !hasAny(tx, bucketHolders, prefix(string(d)))
		return nil
	})
	if err != nil || !unheld {
		return err
	}
	return s.drop([]digest.Digest{d})
}

// drop removes those of the blobs that neither a task nor an ingest holds.
func (s *Store) drop(blobs []digest.Digest) error {
	trash, err := s.unlink(blobs)
	for _, name := range trash {
		// Freeing the blocks of a large file takes time: it is done outside of the lock.
		err = errors.Join(err, s.bytes.Discard(name))
	}
	if len(trash) > 0 {
		s.keepReserve()
	}
	return err
}

// unlink removes the records and names of blobs that nothing holds, and
// returns the files that are left to be removed. Until its file is gone too, for
// good, a blob is on the list of loose ones or has a marker.
func (s *Store) unlink(blobs []digest.Digest) (trash []string, err error) {
	s.holdMu.Lock()
	defer s.holdMu.Unlock()
	var gone []digest.Digest
	err = s.free(len(blobs), func(tx *bbolt.Tx) error {
		gone = gone[:0]
		for _, d := range blobs {
			if hasAny(tx, bucketHolders, prefix(string(d))) {
				if err := removeKeys(tx, bucketLoose, key(d)); err != nil {
					return err
				}
				continue
			}
			if s.holds[d] != nil {
				continue
			}
			blob, found, err := get[blobRecord](tx, bucketBlobs, key(d))
			if err != nil {
				return err
			}
			if found {
				if err := countBytes(tx, -blob.Size); err != nil {
					return err
				}
				s.note(Change{Event: Removed, Subject: SubjectBlob, Reason: ReasonUnreferenced,
					Task: p2p.Task{Digest: d}, Size: blob.Size})
			}
			if err := removeKeys(tx, bucketBlobs, key(d), bucketTables, key(d), bucketDamaged, key(d)); err != nil {
				return err
			}
			gone = append(gone, d)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, d := range gone {
		name, e := s.bytes.Take(d)
		switch {
		case e == nil:
			trash = append(trash, name)
		case !backend.IsMissing(e):
			err = errors.Join(err, e)
			continue
		}
		s.mu.Lock()
		s.moved[d] = true
		s.mu.Unlock()
	}
	return trash, err
}

// loose returns the blobs that may be held by nobody.
func (s *Store) loose() (loose []digest.Digest, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		for _, d := range lastParts(tx, bucketLoose, nil) {
			loose = append(loose, digest.Digest(d))
		}
		return nil
	})
	return loose, err
}

// dropLoose drops what a change has left without a holder. The change itself
// is durable, so a failure here is not one of it: it is made up for at the
// next start.
func (s *Store) dropLoose() {
	loose, err := s.loose()
	for part := range slices.Chunk(loose, updateLimit) { // others take their turns between
		err = errors.Join(err, s.drop(part))
	}
	if err != nil {
		s.log.Error("could not free what was deleted; the next start will", "error", err)
	}
}
