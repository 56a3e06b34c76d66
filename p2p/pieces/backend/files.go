package backend

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Files is what is asked of the file system wherever a failure must not
// cost anything. Tests put one that fails in its place.
type Files interface {
	Create(name string) (*os.File, error) // new, for reading and writing
	Mark(name, marker string) error       // makes a marker of a file
	Sync(f *os.File) error
	SyncDir(name string) error
	Rename(from, to string) error
	Remove(name string) error
}

// Disk is the file system of the operating system.
type Disk struct{}

// Create implements [Files].
func (Disk) Create(name string) (*os.File, error) {
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
func (Disk) Mark(name, marker string) error {
	err := os.Link(name, marker)
	if !errors.Is(err, syscall.EPERM) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return EmptyMarker(marker)
}

// EmptyMarker makes a marker where there are no hard links.
func EmptyMarker(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	return f.Close()
}

// Sync implements [Files].
func (Disk) Sync(f *os.File) error { return f.Sync() }

// SyncDir implements [Files].
func (Disk) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Rename implements [Files].
func (Disk) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements [Files].
func (Disk) Remove(name string) error { return os.Remove(name) }

// OpenRegular opens a file for reading that has to be a regular one, and fails with [ErrNotRegular]
// where it is not. What somebody has put in its place, a pipe for example, does not hold the reader up.
func OpenRegular(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, ErrNotRegular
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

func requireRegular(info os.FileInfo, err error) error {
	if err == nil && !info.Mode().IsRegular() {
		return ErrNotRegular
	}
	return err
}

// IsMissing reports whether err says that a file is not there.
func IsMissing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

func ignoreMissing(err error) error {
	if IsMissing(err) {
		return nil
	}
	return err
}

// FreeOn returns how many bytes are free on the disk of a directory, where that is known.
func FreeOn(dir string) (n int64, known bool) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Blocks == 0 {
		return 0, false
	}
	return int64(fs.Bavail) * fs.Bsize, true
}
