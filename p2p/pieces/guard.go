package pieces

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// guard looks, before metadata is read, whether bbolt's file is as this process
// has left it; and before and after a change, whether the data directory is
// still the one that was opened, and nobody else has it open. Locks do not tell:
// a directory can be put in the place of this one, and not every file system
// has locks.
type guard struct {
	file  *os.File // bbolt's, open a second time
	lock  *os.File // held while the store is open
	token string   // what the lock has in it

	// begin is held while a transaction begins, for which bbolt reads the
	// mapped file with locks of its own that a fault would leave locked.
	begin sync.Mutex
	last  atomic.Pointer[metaPage] // the newest that this process has read or written

	failure atomic.Pointer[error] // why nothing more is stored
	failed  chan struct{}         // closed when there is a failure
}

// fail ends what can be done with the store: it is of no use until it is opened
// again. It returns why: the first failure.
func (s *Store) fail(err error) error {
	if s.guard.failure.CompareAndSwap(nil, &err) {
		s.log.Error("nothing more is stored until a restart", "error", err)
		close(s.guard.failed)
	}
	return *s.guard.failure.Load()
}

// Failed returns a channel that is closed when the store can't store anything
// any more until it is opened again: a write failed, its metadata is damaged,
// or its directory is another one now. [Store.Failure] says which. What is
// open can be read; after a failed write, so can everything else.
func (s *Store) Failed() <-chan struct{} { return s.guard.failed }

// Failure returns why the store can't store anything any more, or nil.
func (s *Store) Failure() error {
	if err := s.guard.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// takeLock makes sure that no other process has the store open.
func (s *Store) takeLock(address string) error {
	f, err := os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return err
	}
	if err := lockFile(f, unix.LOCK_EX); err != nil {
		f.Close()
		return err
	}
	// Who holds the lock is for people to read. The lock itself is the kernel's;
	// where it has none, the token tells who came last.
	who := filepath.Base(os.Args[0])
	if address != "" {
		who += " at " + address
	}
	token := fmt.Sprintf("%d (%s)\n%s\n", os.Getpid(), who, rand.Text())
	if err := f.Truncate(0); err != nil {
		f.Close()
		return err
	}
	if _, err := f.WriteAt([]byte(token), 0); err != nil {
		f.Close()
		return err
	}
	s.guard.lock, s.guard.token = f, token
	return nil
}

// lockFile locks the store whose lock is f.
func lockFile(f *os.File, how int) error {
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if err == nil || !errors.Is(err, unix.EWOULDBLOCK) {
		if err != nil {
			err = fmt.Errorf("lock: %w", err)
		}
		return err
	}
	holder := make([]byte, 256)
	n, _ := f.ReadAt(holder, 0)
	who, _, _ := strings.Cut(string(holder[:n]), "\n")
	return fmt.Errorf("%w: %s has it open: stop that first, or use another directory", p2p.ErrUnavailable,
		strings.TrimSpace("process "+who))
}

// sameDirectory fails where the directory is not the one that was opened any
// more, or another process has opened it since.
func (s *Store) sameDirectory() error {
	for name, open := range map[string]*os.File{"lock": s.guard.lock, "meta.db": s.guard.file} {
		was, err := open.Stat()
		if err != nil {
			return err
		}
		is, err := os.Stat(s.path(name))
		if err != nil {
			return fmt.Errorf("%w: %s is gone, or another directory is in its place: %v", p2p.ErrUnavailable,
				s.path(name), err)
		}
		if !os.SameFile(was, is) {
			return fmt.Errorf("%w: %s is not the file any more that was opened: another directory is in its place",
				p2p.ErrUnavailable, s.path(name))
		}
	}
	holder := make([]byte, len(s.guard.token)+1)
	if n, _ := s.guard.lock.ReadAt(holder, 0); string(holder[:n]) != s.guard.token {
		who, _, _ := strings.Cut(string(holder[:n]), "\n")
		return fmt.Errorf("%w: %s was written by process %s: it has the directory open, too, or a copy was put in "+
			"its place", p2p.ErrUnavailable, s.path("lock"), who)
	}
	return nil
}

// metaPages reads bbolt's meta pages and returns the newer one. One that is just being
// written may look damaged: that goes by.
func (s *Store) metaPages() (*metaPage, error) {
	for attempt := 1; ; attempt++ {
		info, err := s.guard.file.Stat()
		if err != nil {
			return nil, err
		}
		newest, err := readMetaPages(s.guard.file, info.Size())
		if err == nil {
			return &newest, nil
		}
		if attempt == 20 {
			return nil, errDamagedMeta(s.path("meta.db"), err)
		}
		time.Sleep(time.Millisecond)
	}
}

// beginView begins a transaction that reads.
func (s *Store) beginView() (*bbolt.Tx, error) {
	if err := s.Failure(); errors.Is(err, digest.ErrCorrupt) {
		return nil, err
	}
	last := s.guard.last.Load()
	newest, err := s.metaPages()
	if err == nil && last != nil && newest.txid < last.txid {
		err = s.errReplaced(newest, last)
	}
	if err != nil {
		return nil, s.fail(err)
	}
	return s.beginTx(false)
}

func (s *Store) errReplaced(is, was *metaPage) error {
	return fmt.Errorf("%w: %s is at change %d, this process left it at %d: a copy was put in its place, or another "+
		"process writes to it", p2p.ErrUnavailable, s.path("meta.db"), is.txid, was.txid)
}

// beginUpdate begins a transaction that writes. It fails for good where the metadata is
// not what this process has left.
func (s *Store) beginUpdate() (*bbolt.Tx, error) {
	err := s.sameDirectory()
	if err == nil {
		var newest *metaPage
		if newest, err = s.metaPages(); err == nil {
			if last := s.guard.last.Load(); *newest != *last {
				err = s.errReplaced(newest, last)
			}
		}
	}
	if err != nil {
		return nil, s.fail(err)
	}
	return s.beginTx(true)
}

// committed notes a change, unless it may not be one of this store.
func (s *Store) committed(txid int) error {
	err := s.sameDirectory()
	var newest *metaPage
	if err == nil {
		newest, err = s.metaPages()
	}
	if err == nil && newest.txid != uint64(txid) {
		err = s.errReplaced(newest, &metaPage{txid: uint64(txid)})
	}
	if err != nil {
		return s.fail(err)
	}
	s.guard.last.Store(newest)
	return nil
}

// beginTx begins a transaction. Where the system could not map the file when it had
// grown, bbolt has none mapped: it is opened again.
func (s *Store) beginTx(writable bool) (tx *bbolt.Tx, err error) {
	s.guard.begin.Lock()
	defer s.guard.begin.Unlock()
	tx, err = s.db.Begin(writable)
	if !errors.Is(err, berrors.ErrInvalidMapping) {
		return tx, err
	}
	if err := s.db.Close(); err != nil {
		s.log.Warn("could not close the metadata, to open it again", "error", err)
	}
	if s.db, err = openBolt(s.path("meta.db"), false); err != nil {
		return nil, s.fail(fmt.Errorf("%w: open the metadata again: %w", p2p.ErrUnavailable, err))
	}
	return s.db.Begin(writable)
}

// recheckInterval is how often the metadata is read and checked again while it is open, as long as
// that takes little of the time.
const recheckInterval = time.Minute

// watchMeta checks the metadata again and again, until the store is closed. Damage of a record is met
// when that is read; that of what leads to it may look as if there were no such record.
func (s *Store) watchMeta(interval time.Duration) {
	for pause := interval; ; {
		select {
		case <-time.After(pause):
		case <-s.closing.Done():
			return
		}
		began := time.Now()
		if _, err := s.recheckMeta(s.closing); err != nil {
			return // the store has failed, or is closed
		}
		pause = max(interval, 200*time.Since(began))
	}
}

// recheckMeta reads all of the metadata, and checks it as opening it does. Where it is damaged
// nothing more can be done with the store. It reports false where so much is written that it came to nothing.
func (s *Store) recheckMeta(ctx context.Context) (checked bool, err error) {
	for range 20 {
		tx, err := s.beginView()
		if err != nil {
			return false, err
		}
		// Until it ends, no page of what it sees is written to.
		meta, err := s.metaPages()
		if err == nil && meta.txid == uint64(tx.ID()) {
			c := newMetaCheck(ctx)
			if err = newPageReader(s.guard.file, *meta, c).readAll(); err == nil {
				_, err = c.finish()
			}
			if err != nil && ctx.Err() == nil {
				err = s.fail(errDamagedMeta(s.path("meta.db"), err))
			}
			return true, errors.Join(err, tx.Rollback())
		}
		if err = errors.Join(err, tx.Rollback()); err != nil {
			return false, s.fail(err)
		}
	}
	return false, nil
}

// unmapped reports whether bbolt has no file mapped.
func (s *Store) unmapped() bool {
	s.guard.begin.Lock()
	defer s.guard.begin.Unlock()
	tx, err := s.db.Begin(false)
	if err == nil {
		err = tx.Rollback()
	}
	return errors.Is(err, berrors.ErrInvalidMapping)
}

// view reads the metadata.
func (s *Store) view(f func(tx *bbolt.Tx) error) (err error) {
	defer s.noteDamage(&err)
	defer recoverDamage(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	tx, err := s.beginView()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	return f(tx)
}

// noteDamage ends the use of a store whose metadata is damaged.
func (s *Store) noteDamage(err *error) {
	if errors.As(*err, new(metaDamage)) {
		*err = s.fail(errDamagedMeta(s.path("meta.db"), *err))
	}
}

// metaDamage is what was met of damage in open metadata. It matches [digest.ErrCorrupt].
type metaDamage struct{ reason any }

func (d metaDamage) Error() string        { return fmt.Sprint(d.reason) }
func (d metaDamage) Is(target error) bool { return target == digest.ErrCorrupt }

// recoverDamage turns the panics with which bbolt meets damaged pages, the
// memory one that can't be read, and the store damaged records, into errors.
func recoverDamage(err *error) {
	if r := recover(); r != nil {
		*err = metaDamage{r}
	}
}
