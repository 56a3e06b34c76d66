package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// source is a regular file that is added, as it was before it was read.
type source struct {
	f      *os.File
	start  int64 // the offset from which on it is added
	before unix.Stat_t
}

// newSource returns src as a source, or nil where it is no regular file.
func newSource(src io.Reader) (*source, error) {
	f, ok := src.(*os.File)
	if !ok {
		return nil, nil
	}
	s := &source{f: f}
	if err := s.stat(&s.before); err != nil {
		return nil, err
	}
	if s.before.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil
	}
	var err error
	s.start, err = f.Seek(0, io.SeekCurrent)
	return s, err
}

// stat looks at the file, not at a path.
func (s *source) stat(to *unix.Stat_t) error {
	raw, err := s.f.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), to) })
	return os.NewSyscallError("fstat", errors.Join(controlErr, err))
}

// unchanged fails with [p2p.ErrChanged] where the file has changed since newSource, so that
// what was read of it, which t is the table of, may be what it never was. A source of nil has
// no such thing.
//
// A change of the times alone may be one of the name or the mode, or have come when all was read: the
// content is then what was read, if it still is. What was only appended to is said to be so.
func (s *source) unchanged(ctx context.Context, t *digest.Table) error {
	if s == nil {
		return nil
	}
	var now unix.Stat_t
	if err := s.stat(&now); err != nil {
		return err
	}
	if sameContent(s.before, now) {
		return nil
	}
	again := digest.NewRecorder(t.Digest.Algorithm())
	if err := record(ctx, again, io.NewSectionReader(s.f, s.start, t.Size), nil); err != nil {
		return err
	}
	read, err := again.Table()
	if err != nil {
		return err
	}
	same := read.Digest == t.Digest
	var later unix.Stat_t
	if err := s.stat(&later); err != nil {
		return err
	}
	const advice = "import it when nobody writes to it, or a copy"
	switch {
	case same && s.before.Size == now.Size && sameContent(now, later):
		return nil
	case same && later.Size > s.before.Size:
		return fmt.Errorf("%w: it was only appended to, and has %d bytes where it had %d; nothing was stored: %s, or what it has now with 'head -c %d FILE | dfcache import -'", p2p.ErrChanged, later.Size, s.before.Size, advice, later.Size)
	case later.Size < s.before.Size:
		return fmt.Errorf("%w: it was cut from %d bytes to %d; nothing was stored: %s", p2p.ErrChanged, s.before.Size, later.Size, advice)
	}
	return fmt.Errorf("%w: it was written to; nothing was stored: %s", p2p.ErrChanged, advice)
}

// sameContent reports whether nothing says that a file was written to between two looks.
func sameContent(a, b unix.Stat_t) bool {
	return a.Size == b.Size && a.Mtim == b.Mtim && a.Ctim == b.Ctim
}
