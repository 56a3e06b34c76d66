package blobstore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// writeFile makes the file at path with what write writes to it, or nothing at
// all. The file has no name until it is complete, so that not even kill -9
// leaves a part of it; a file system that has no unnamed files gets a hidden
// one in the same directory instead. Without overwrite an existing path is an
// error that matches fs.ErrExist, also when it appears at the last moment.
func writeFile(path string, overwrite bool, write func(*os.File) error) error {
	mode := fs.FileMode(0)
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		// A dangling link is in the way too: it is not ours to follow or to replace.
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("output %s: %w: it is a link to nothing", path, fs.ErrExist)
		}
	case err != nil:
		return fmt.Errorf("output: %w", err)
	case info.IsDir():
		return fmt.Errorf("output %s: %w: it is a directory: name a file in it", path, fs.ErrExist)
	case !info.Mode().IsRegular():
		return fmt.Errorf("output %s: %w: it is not a regular file: write to \"-\" and redirect it there", path, fs.ErrExist)
	case !overwrite:
		return fmt.Errorf("output %s: %w: pass --overwrite to replace it", path, fs.ErrExist)
	default:
		// Through a link the file is replaced, not the link.
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		mode = info.Mode().Perm()
	}
	f, err := newOutput(path)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer f.Close()
	if mode != 0 {
		// Who could read the file before can, and nobody else.
		if err := f.Chmod(mode); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	switch err := write(f.File); {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		// The error names the file, which has no name, by its directory.
		return fmt.Errorf("output %s: %w: free some space on its disk, or choose another place", path, ErrNoSpace)
	case err != nil:
		return err
	}
	if err := f.publish(path, overwrite); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// output is a file that is being written.
type output struct {
	*os.File
	dir  string
	temp string // the name it has for now, or ""
}

func newOutput(path string) (*output, error) {
	dir := filepath.Dir(path)
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o666)
	if err == nil {
		return &output{File: f, dir: dir}, nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	return newNamedOutput(dir)
}

// newNamedOutput is newOutput for file systems without unnamed files.
func newNamedOutput(dir string) (*output, error) {
	f, err := os.OpenFile(tempName(dir), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	return &output{File: f, dir: dir, temp: f.Name()}, nil
}

// publish gives the file its name.
func (o *output) publish(path string, overwrite bool) error {
	if !overwrite {
		// A link never replaces what is there.
		return o.link(path)
	}
	if o.temp == "" {
		// There is no call that gives an unnamed file the name of another:
		// it takes a name beside it first.
		temp := tempName(o.dir)
		if err := o.link(temp); err != nil {
			return err
		}
		o.temp = temp
	}
	if err := os.Rename(o.temp, path); err != nil {
		return err
	}
	o.temp = ""
	return nil
}

func (o *output) link(path string) error {
	if o.temp != "" {
		return os.Link(o.temp, path)
	}
	err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", o.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return &os.LinkError{Op: "link", Old: "new file", New: path, Err: err}
	}
	return nil
}

// tempName returns a name in dir that nothing else has.
func tempName(dir string) string { return filepath.Join(dir, ".dfcache-"+rand.Text()) }

// Close closes the file and removes it if it was not published.
func (o *output) Close() error {
	err := o.File.Close()
	if o.temp != "" {
		os.Remove(o.temp)
	}
	return err
}

// writeDir makes the directory at path with the files of an artifact, each with
// what write writes to it, or nothing at all. A directory that is there is used,
// if it is empty; with overwrite, files are put between those that are in it.
func writeDir(path string, overwrite bool, files []File, write func(File, *os.File) error) (err error) {
	names, err := fileNames(files)
	if err != nil {
		return err
	}
	path = filepath.Clean(path)
	exists := true
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("output %s: %w: it is a link to nothing", path, fs.ErrExist)
		}
		exists = false
	case err != nil:
		return fmt.Errorf("output: %w", err)
	case !info.IsDir():
		return fmt.Errorf("output %s: %w: the artifact has %d files: name a directory for them", path, fs.ErrExist, len(files))
	case !overwrite:
		entries, err := os.ReadDir(path)
		if err != nil {
			return fmt.Errorf("output: %w", err)
		}
		if len(entries) > 0 {
			return fmt.Errorf("output %s: %w: the directory is not empty: pass --overwrite to put %d files there", path, fs.ErrExist, len(files))
		}
	}
	// A new directory takes its place by a rename. One that is there stays, with
	// its mode and as the mount point that it may be: files move into it.
	parent := filepath.Dir(path)
	if exists {
		parent = path
	}
	temp := tempName(parent)
	if err := os.Mkdir(temp, 0o777); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	for i, f := range files {
		name := filepath.Join(temp, names[i])
		if err := os.MkdirAll(filepath.Dir(name), 0o777); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		if err := writeFile(name, false, func(out *os.File) error { return write(f, out) }); err != nil {
			return err
		}
	}
	if exists {
		err = moveFiles(path, filepath.Base(temp), names, overwrite)
	} else {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// fileNames returns the paths that the files of an artifact get below its directory.
func fileNames(files []File) ([]string, error) {
	names := make([]string, len(files))
	taken := map[string]bool{}
	for i, f := range files {
		if err := checkTitle(f.Title); err != nil {
			return nil, err
		}
		names[i] = filepath.Clean(f.Title)
		if taken[names[i]] {
			return nil, fmt.Errorf("file %q of the artifact: %w: two files have this name", f.Title, ErrInvalid)
		}
		taken[names[i]] = true
	}
	for i, name := range names {
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			if taken[dir] {
				return nil, fmt.Errorf("file %q of the artifact: %w: %q is a file of it too", files[i].Title, ErrInvalid, dir)
			}
		}
	}
	return names, nil
}

// moveFiles moves the files of these names to the directory at path from one of
// its own, without leaving it through a link. With overwrite they replace files,
// whose modes they get; without, nothing was in the directory, and what does not
// succeed is undone.
func moveFiles(path, from string, names []string, overwrite bool) (err error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	var moved []string
	defer func() {
		if err == nil || overwrite {
			return
		}
		for _, name := range moved {
			root.Remove(name)
		}
		for _, name := range names {
			for dir := filepath.Dir(name); dir != "." && root.Remove(dir) == nil; dir = filepath.Dir(dir) {
			}
		}
	}()
	modes := make([]fs.FileMode, len(names))
	for i, name := range names { // before anything is replaced
		if err := root.MkdirAll(filepath.Dir(name), 0o777); err != nil {
			return err
		}
		switch info, err := root.Lstat(name); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case info.IsDir():
			return fmt.Errorf("%s: %w: it is a directory", filepath.Join(path, name), fs.ErrExist)
		case info.Mode().IsRegular():
			modes[i] = info.Mode().Perm()
		}
	}
	for i, name := range names {
		source := filepath.Join(from, name)
		if !overwrite {
			// A link never replaces what is there.
			if err := root.Link(source, name); err != nil {
				return err
			}
			moved = append(moved, name)
			continue
		}
		if modes[i] != 0 {
			if err := root.Chmod(source, modes[i]); err != nil {
				return err
			}
		}
		if err := root.Rename(source, name); err != nil {
			return err
		}
	}
	return nil
}
