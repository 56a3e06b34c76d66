package pieces

import (
	"errors"
	"fmt"
	"os"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

const (
	// diskMargin is how many bytes of the disk are left to the metadata when there is
	// to be room for a blob.
	diskMargin = 1 << 20
	// reserveSize is how many bytes of the disk the metadata has beyond its size, and as many
	// are kept for changes that free some.
	reserveSize = 2 << 20
)

// Room reports whether there is room for n more bytes, under the limit of the store and on
// its disk: else the error matches [p2p.ErrNoSpace]. What has arrived of blobs that nobody
// fetches any more makes room for it, the oldest first.
func (s *Store) Room(n int64) error {
	s.roomMu.Lock()
	defer s.roomMu.Unlock()
	return s.room(n)
}

// room is Room. s.roomMu is held.
func (s *Store) room(n int64) error {
	for {
		err := s.hasRoom(n)
		if err == nil || s.hasRoom(n-s.unopenedSize()) != nil || !s.dropOldestPartial() {
			return err
		}
	}
}

// unopenedSize returns how many bytes blobs have that nobody fetches.
func (s *Store) unopenedSize() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, left := range s.unopened {
		n += left.size
	}
	return n
}

func (s *Store) hasRoom(n int64) error {
	if err := s.underLimit(n); err != nil {
		return err
	}
	free, known := s.bytes.Free()
	promised := s.promised.Load()
	if left := free - diskMargin - promised; known && n > -promised && n > left {
		return fmt.Errorf("%w: the disk of %s has %d bytes free, of which there are %d for this, not %d: free some "+
			"space on it, or delete something", p2p.ErrNoSpace, s.dir, free, max(left, 0), n)
	}
	return nil
}

// underLimit reports whether n more bytes are within the limit of the store.
func (s *Store) underLimit(n int64) error {
	total := s.incoming.Load() + s.stored.Load() + s.promised.Load()
	if s.maxSize > 0 && n > s.maxSize-total { // the sum could be too large for an int64
		return fmt.Errorf("%w: the store may have %d bytes, and has %d with what is under way: there is no room for "+
			"%d: delete something, or raise the limit", p2p.ErrNoSpace, s.maxSize, total, n)
	}
	return nil
}

// promise sets room aside for n bytes that are to arrive, or takes back what was set aside
// where n is negative.
func (s *Store) promise(n int64) error {
	s.roomMu.Lock()
	defer s.roomMu.Unlock()
	if n > 0 {
		if err := s.room(n); err != nil {
			return err
		}
	}
	s.promised.Add(n)
	return nil
}

// dropOldestPartial removes what has arrived of the blob that was fetched longest ago, of
// those that nobody fetches. It reports false where there is none.
func (s *Store) dropOldestPartial() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var oldest digest.Digest
	var when time.Time
	for d := range s.unopened {
		at, _ := s.bytes.StatPartial(d)
		if oldest == "" || at.Changed.Before(when) {
			oldest, when = d, at.Changed
		}
	}
	if oldest == "" {
		return false
	}
	if err := s.dropPartial(oldest, ReasonRoom); err != nil {
		s.log.Warn("what has arrived of a blob could not be removed to make room", "digest", oldest, "error", err)
		return false
	}
	s.log.Info("removed what had arrived of a blob, to make room", "digest", oldest)
	return true
}

// A full disk must not keep anybody from deleting, and a delete needs room, too: for the new
// pages of the metadata. So the metadata's file has blocks that it does not use yet, which nobody
// else can take; and the store has a file that is there to be removed.

// keepReserve makes the reserve, where it is not there and there is plenty of room for it.
func (s *Store) keepReserve() {
	s.roomMu.Lock()
	defer s.roomMu.Unlock()
	s.reserveBlocks()
	name := s.path("reserve")
	if info, err := os.Stat(name); err == nil && info.Size() == reserveSize || !s.plenty() {
		return
	}
	// a pipe in its place holds nobody up
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, 0o600)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), 0, 0, reserveSize)
		if errors.Is(err, unix.EOPNOTSUPP) {
			_, err = f.Write(make([]byte, reserveSize))
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		s.log.Warn("no room could be reserved for deletes on a full disk", "error", err)
		_ = os.Remove(name) // the next attempt begins anew
	}
}

// plenty reports whether there is enough room to reserve some.
func (s *Store) plenty() bool {
	free, known := backend.FreeOn(s.dir)
	return known && free >= 2*reserveSize
}

// reserveBlocks gives the metadata's file blocks for what it grows by, where they have become few.
// Not every file system can; then there is only the other reserve.
func (s *Store) reserveBlocks() {
	var stat unix.Stat_t
	if err := unix.Stat(s.path("meta.db"), &stat); err != nil || stat.Blocks*512 >= stat.Size+reserveSize/2 ||
		!s.plenty() {
		return
	}
	f, err := os.OpenFile(s.path("meta.db"), os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, stat.Size+reserveSize)
}

// free is updateMuch for what frees room: where there is none for the change itself, partial blobs
// and then the reserve make some.
func (s *Store) free(records int, f func(tx *bbolt.Tx) error) error {
	for {
		err := s.updateMuch(records, f)
		if !errors.Is(err, p2p.ErrNoSpace) || !s.dropOldestPartial() && os.Remove(s.path("reserve")) != nil {
			return err
		}
	}
}
