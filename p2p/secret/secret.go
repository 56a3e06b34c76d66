// Package secret reads files that are secrets: keys and passwords. All of them have one rule. It
// reads what goes with them, such as certificates, in the same way.
//
// It promises no compatibility.
package secret

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
)

// forbidden are what the mode of a secret must not have: anything for others but
// the right to search, which means nothing to a file, and write for the group. A group may
// read it, as the secrets of containers often have it.
const forbidden fs.FileMode = 0o026

// Read reads the regular file at path, of maxSize bytes at most, and says what it was before it was
// read. It refuses a file that others can read, or that group or others can write, and one of
// another user than root and that of this process, and says what to do. The error matches
// [fs.ErrNotExist] where there is no file, and [digest.ErrInvalid] where that is too large.
func Read(path string, maxSize int64) ([]byte, fs.FileInfo, error) {
	return read(path, maxSize, forbidden)
}

// ReadPublic is [Read] for what is no secret.
func ReadPublic(path string, maxSize int64) ([]byte, fs.FileInfo, error) {
	return read(path, maxSize, 0)
}

func read(path string, maxSize int64, forbidden fs.FileMode) ([]byte, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // what turns out to be a pipe is not waited for
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		return nil, nil, fmt.Errorf("%s is a directory", path)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return nil, nil, fmt.Errorf("the permissions %#o of %s are too open: it is a secret; run: chmod 600 %s", mode,
			path, path)
	}
	// Whoever owns a file can write to it, whatever its mode.
	if owner := info.Sys().(*syscall.Stat_t).Uid; forbidden != 0 && owner != 0 && int(owner) != os.Geteuid() {
		return nil, nil, fmt.Errorf("%s belongs to uid %d, neither root nor the user of this process: it is a "+
			"secret; run: chown %d %s", path, owner, os.Geteuid(), path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, nil, err
	}
	if int64(len(data)) > maxSize {
		return nil, nil, fmt.Errorf("%s: %w: it is larger than %d bytes", path, digest.ErrInvalid, maxSize)
	}
	return data, info, nil
}

// Same reports whether a file that was read is as it was: the same file, with the
// same size, time and permissions.
func Same(before, now fs.FileInfo) bool {
	return os.SameFile(before, now) && before.Size() == now.Size() && before.ModTime().Equal(now.ModTime()) &&
		before.Mode() == now.Mode()
}
