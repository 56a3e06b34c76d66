package pieces

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p"
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
	return err
}

// chunk is how many bytes are copied before the hash may follow, the context
// is looked at, and write-back is started.
const chunk = 8 << 20

// copyFile copies src from its offset start on to dst, which is empty, in the kernel: it is cloned,
// where the file system can share blocks, else it goes by copy_file_range. Now and then it calls done
// with how far it is; where done returns an error it stops. It returns false, and has
// copied nothing, where src has to be read instead.
func copyFile(dst, src *os.File, start int64, done func(end int64) error) (copied bool, err error) {
	if start == 0 && unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		info, err := dst.Stat()
		if err != nil {
			return false, err
		}
		for end := int64(0); end < info.Size(); {
			end = min(end+chunk, info.Size())
			if err := done(end); err != nil {
				return false, err
			}
		}
		return true, nil
	}
	for end := int64(0); ; {
		from, to := start+end, end
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, chunk, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case end == 0 && (err != nil || n == 0):
			// Not between these two file systems, or not from this file: what
			// is in /proc claims to be empty here. Reading tells the truth,
			// and gives the right error where there is one.
			return false, nil
		case err != nil:
			return false, os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return true, nil
		}
		end += int64(n)
		if err := done(end); err != nil {
			return false, err
		}
	}
}

// startWriteBack asks the kernel to begin writing the range of f to disk, so
// that the fsync at the end finds little left to do. It is advice: a file
// system that knows no such thing does without.
func startWriteBack(f *os.File, from, to int64) {
	_ = unix.SyncFileRange(int(f.Fd()), from, to-from, unix.SYNC_FILE_RANGE_WRITE)
}
