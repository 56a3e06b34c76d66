package pieces

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/source"
)

// DiskError makes an error of the file system match [p2p.ErrNoSpace] where it is one of
// space, and [p2p.ErrBusy] where it is one of descriptors, for all who open files beside a [Store], too.
func DiskError(err error) error {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return fmt.Errorf("%w: %w: try again; if that does not help, let the process have more (ulimit -n)",
			p2p.ErrBusy, err)
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w: free some space on the data directory's disk and try again", p2p.ErrNoSpace, err)
	}
	if errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("%w: %w: let the daemon write larger files (ulimit -f), or use another file system",
			p2p.ErrNoSpace, err)
	}
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("%w: the data directory's disk is mounted read-only, as the kernel does with one that "+
			"fails: see what it says (dmesg), and mount it for writing again", err)
	}
	return err
}

// chunk is how many bytes are copied before the hash may follow, the context
// is looked at, and write-back is started.
const chunk = 8 << 20

// copyFile copies src from its offset start on to dst, which is empty, in the kernel: it is cloned,
// where the file system can share blocks, else it goes by copy_file_range, and holes stay holes. Now and
// then it calls done with how far it is; where done returns an error it stops. It returns false where src
// has to be read instead, from where done was told last.
func copyFile(dst, src *os.File, start int64, done func(end int64) error) (copied bool, err error) {
	if start == 0 && unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		info, err := dst.Stat()
		if err != nil {
			return false, err
		}
		return true, inChunks(0, info.Size(), done)
	}
	size, sparse := holes(src)
	if sparse {
		defer func() { _, _ = unix.Seek(int(src.Fd()), start, unix.SEEK_SET) }() // others may share it
	}
	some := false // was copied
	for end, data := int64(0), int64(0); ; {
		length := int64(chunk)
		if sparse {
			if end == data {
				if end, data, err = skipHole(dst, src, start, end, size, done); err != nil {
					return false, err
				}
			}
			if length = min(chunk, data-end); length == 0 {
				return end > 0, nil
			}
		}
		from, to := start+end, end
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(length), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case !some && (err != nil || n == 0):
			// Not between these two file systems, or not from this file: what
			// is in /proc claims to be empty here. Reading tells the truth,
			// and gives the right error where there is one.
			return false, nil
		case err != nil:
			return false, os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return true, nil
		}
		some = true
		end += int64(n)
		if err := done(end); err != nil {
			return false, err
		}
	}
}

// inChunks calls done for each chunk between from and to.
func inChunks(from, to int64, done func(end int64) error) error {
	for from < to {
		from = min(from+chunk, to)
		if err := done(from); err != nil {
			return err
		}
	}
	return nil
}

// holes reports whether a file has holes, and its size. One that has none is not asked for them later.
func holes(f *os.File) (size int64, sparse bool) {
	var stat unix.Stat_t
	if unix.Fstat(int(f.Fd()), &stat) != nil || stat.Blocks*512 >= stat.Size {
		return 0, false
	}
	plain, err := source.IsPlain(int(f.Fd()))
	return stat.Size, plain && err == nil
}

// skipHole makes dst longer by the hole that src, of size bytes, has at start+end, if it has one there. It
// returns where the next data begins, and where that ends: both are where src ends, if there is none.
func skipHole(
	dst, src *os.File, start, end, size int64, done func(end int64) error,
) (from, to int64, err error) {
	from, to, err = dataFrom(src, start+end)
	if err != nil {
		return 0, 0, err
	}
	from, to = max(end, min(from, size)-start), max(end, min(to, size)-start)
	if from == end {
		return from, to, nil
	}
	if err := dst.Truncate(from); err != nil {
		return 0, 0, err
	}
	return from, to, inChunks(end, from, done)
}

// dataFrom returns the bounds of the next run of bytes in a file that is not a hole. It moves the
// file's offset.
func dataFrom(f *os.File, from int64) (start, end int64, err error) {
	const far = 1 << 62
	start, err = unix.Seek(int(f.Fd()), from, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return far, far, nil // there is nothing behind from
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	return start, end, os.NewSyscallError("lseek", err)
}

// startWriteBack asks the kernel to begin writing the range of f to disk, so
// that the fsync at the end finds little left to do. It is advice: a file
// system that knows no such thing does without.
func startWriteBack(f *os.File, from, to int64) {
	_ = unix.SyncFileRange(int(f.Fd()), from, to-from, unix.SYNC_FILE_RANGE_WRITE)
}
