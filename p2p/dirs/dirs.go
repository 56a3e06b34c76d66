// Package dirs makes directories.
//
// It promises no compatibility.
package dirs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// Make makes the directory at path with those that lead to it, as [os.MkdirAll] does. But
// where that says that one exists which can't be used, because it is the mount point of a file system that has
// died, or a link to nothing, Make says so: the error does not match [fs.ErrExist].
func Make(path string, perm fs.FileMode) error { return explain(os.MkdirAll(path, perm), os.Stat) }

// MakeIn is [Make] below root.
func MakeIn(root *os.Root, path string, perm fs.FileMode) error {
	return explain(root.MkdirAll(path, perm), root.Stat)
}

// explain says why a directory that exists is of no use. stat is that of where it was to be made.
func explain(err error, stat func(name string) (fs.FileInfo, error)) error {
	failed, ok := errors.AsType[*fs.PathError](err)
	if !ok || !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, statErr := stat(failed.Path)
	switch {
	case errors.Is(statErr, fs.ErrNotExist):
		return fmt.Errorf("%s is a link to nothing: %w", failed.Path, fs.ErrNotExist)
	case statErr != nil:
		return statErr
	case !info.IsDir():
		return &fs.PathError{Op: failed.Op, Path: failed.Path, Err: syscall.ENOTDIR}
	}
	return err
}
