package pieces

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p"
)

// files is what the store asks of the file system wherever a failure must not
// cost anything. Tests put one that fails in its place.
type files interface {
	Create(name string) (*os.File, error) // new, for reading and writing
	Mark(name, marker string) error       // makes a marker of a file
	Sync(f *os.File) error
	SyncDir(name string) error
	Rename(from, to string) error
	Remove(name string) error
}

// disk is the file system of the operating system.
type disk struct{}

func (disk) Create(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return nil, err
	}
	// The mode is to be 0444 whatever the umask is.
	if err := f.Chmod(0o444); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Mark gives the file a second name. An empty file would do, and has to where there are no
// hard links. But to make a file and remove it for each blob is slow: ext4 passes over all inodes that were
// freed in the last minutes, one by one, before it takes one.
func (disk) Mark(name, marker string) error {
	err := os.Link(name, marker)
	if !errors.Is(err, syscall.EPERM) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return emptyMarker(marker)
}

func emptyMarker(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	return f.Close()
}

func (disk) Sync(f *os.File) error { return f.Sync() }

func (disk) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (disk) Rename(from, to string) error { return os.Rename(from, to) }

func (disk) Remove(name string) error { return os.Remove(name) }

// openRegular opens a file for reading that has to be a regular one. What
// somebody has put in its place, a pipe for example, does not hold the reader up.
func openRegular(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, errNotRegular
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	err = unix.SetNonblock(fd, false)
	f := os.NewFile(uintptr(fd), name)
	if err == nil {
		err = requireRegular(f.Stat())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// errNotRegular says that something else is in the place of a regular file.
var errNotRegular = errors.New("it is not a regular file")

func requireRegular(info os.FileInfo, err error) error {
	if err == nil && !info.Mode().IsRegular() {
		return errNotRegular
	}
	return err
}

// DiskError makes an error of the file system match [p2p.ErrNoSpace] where it is one of
// space, and [p2p.ErrBusy] where it is one of descriptors, for all who open files beside a [Store], too.
func DiskError(err error) error {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return fmt.Errorf("%w: %w: try again; if that does not help, let the process have more (ulimit -n)", p2p.ErrBusy, err)
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w: free some space on the data directory's disk and try again", p2p.ErrNoSpace, err)
	}
	if errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("%w: %w: let the daemon write larger files (ulimit -f), or use another file system", p2p.ErrNoSpace, err)
	}
	return err
}

// chunk is how many bytes are copied before the hash may follow, the context
// is looked at, and write-back is started.
const chunk = 8 << 20

// copied is news of a copy: how many bytes it has now, and where they passed
// through memory, the latest of them.
type copied struct {
	end  int64
	part []byte // in a buffer
}

// release gives the buffer back.
func (c copied) release() {
	if c.part != nil {
		putBuffer(c.part)
	}
}

// copyChunks copies src to dst up to its end. Now and then it calls done with
// how far it is; where done returns an error it stops. A regular file is copied
// in the kernel, from its current offset on: cloned, where the file system can
// share blocks, else with copy_file_range. What dst has is the same either way.
func copyChunks(dst *os.File, src io.Reader, done func(copied) error) error {
	if isRegular(src) {
		return copyFile(dst, src.(*os.File), done)
	}
	return copyReader(dst, src, done)
}

// isRegular reports whether src is a regular file, which the kernel can copy.
func isRegular(src io.Reader) bool {
	f, ok := src.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

func copyFile(dst, src *os.File, done func(copied) error) error {
	start, err := src.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if start == 0 && unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		info, err := dst.Stat()
		if err != nil {
			return err
		}
		for end := int64(0); end < info.Size(); {
			end = min(end+chunk, info.Size())
			if err := done(copied{end: end}); err != nil {
				return err
			}
		}
		return nil
	}
	var end int64
	for {
		from, to := start+end, end
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, chunk, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case end == 0 && (err != nil || n == 0):
			// Not between these two file systems, or not from this file: what
			// is in /proc claims to be empty here. Reading tells the truth,
			// and gives the right error where there is one.
			return copyReader(dst, io.NewSectionReader(src, start, 1<<63-1-start), done)
		case err != nil:
			return os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return nil
		}
		end += int64(n)
		if err := done(copied{end: end}); err != nil {
			return err
		}
	}
}

// Bytes pass through buffers on their way to a file or a hash. A short one will do: a
// thousand senders who send nothing more can each have one. A source that fills it gets a
// long one, for fewer calls of the system, while there are not too many of those.
type (
	buffer     [64 << 10]byte
	longBuffer [1 << 20]byte
)

const maxLongBuffers = 16

var (
	buffers     = sync.Pool{New: func() any { return new(buffer) }}
	longBuffers = sync.Pool{New: func() any { return new(longBuffer) }}
	longInUse   atomic.Int32
)

// longestBuffer returns a long buffer, or a short one where there are many long ones.
func longestBuffer() []byte {
	if longInUse.Add(1) <= maxLongBuffers {
		return longBuffers.Get().(*longBuffer)[:]
	}
	longInUse.Add(-1)
	return buffers.Get().(*buffer)[:]
}

// putBuffer gives back a buffer, or the beginning of one.
func putBuffer(b []byte) {
	if cap(b) == len(longBuffer{}) {
		longBuffers.Put((*longBuffer)(b[:cap(b)]))
		longInUse.Add(-1)
	} else {
		buffers.Put((*buffer)(b[:cap(b)]))
	}
}

// firstLength is how many bytes are taken in at once of a source that gave less
// before, or nothing: whoever is waited for need not have a buffer.
const firstLength = 4 << 10

// copyReader copies through memory. Who is told of a part gives its buffer back, whatever comes of it.
func copyReader(dst *os.File, src io.Reader, done func(copied) error) error {
	first := make([]byte, firstLength)
	for end, last := int64(0), 0; ; {
		space := first
		switch {
		case last >= len(buffer{}):
			space = longestBuffer()
		case last >= firstLength:
			space = buffers.Get().(*buffer)[:]
		}
		n, err := src.Read(space)
		if last < firstLength && n > 0 {
			space = buffers.Get().(*buffer)[:]
			copy(space, first[:n])
		}
		if n == 0 && last >= firstLength {
			putBuffer(space)
		}
		if last = n; n > 0 {
			if _, err := dst.WriteAt(space[:n], end); err != nil {
				putBuffer(space)
				return err
			}
			end += int64(n)
			if err := done(copied{end, space[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the source: %w", err)
		}
	}
}

// startWriteBack asks the kernel to begin writing the range of f to disk, so
// that the fsync at the end finds little left to do. It is advice: a file
// system that knows no such thing does without.
func startWriteBack(f *os.File, from, to int64) {
	_ = unix.SyncFileRange(int(f.Fd()), from, to-from, unix.SYNC_FILE_RANGE_WRITE)
}
