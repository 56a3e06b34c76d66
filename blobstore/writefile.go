package blobstore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p/dirs"
)

// ErrNoOverwrite says that an output is there, and would be replaced with Overwrite. It matches
// [fs.ErrExist].
var ErrNoOverwrite error = noOverwrite{}

type noOverwrite struct{}

func (noOverwrite) Error() string { return fs.ErrExist.Error() }

func (noOverwrite) Unwrap() error { return fs.ErrExist }

// writeFile makes the file at path with what write writes to it, or nothing at
// all. The file has no name until it is complete, so that not even kill -9
// leaves a part of it; a file system that has no unnamed files gets a hidden
// one in the same directory instead. Without opts.Overwrite an existing path is an
// error that matches fs.ErrExist, also when it appears at the last moment.
//
// Unless opts.NoSync is set, the content is on disk before the name appears, and
// the name when writeFile returns: a power cut leaves what was there before or all of it.
func writeFile(path string, opts ExportOptions, write func(*os.File) error) error {
	mode := fs.FileMode(0)
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		// A dangling link is in the way too: it is not ours to follow or to replace.
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("output %s: %w: it is a link to nothing: remove it, or name another output", path,
				fs.ErrExist)
		}
	case err != nil:
		return fmt.Errorf("output: %w", err)
	case info.IsDir():
		return fmt.Errorf("output %s: %w: it is a directory: name a file in it", path, fs.ErrExist)
	case !info.Mode().IsRegular():
		return fmt.Errorf("output %s: %w: it is not a regular file: write to \"-\" and redirect it there", path,
			fs.ErrExist)
	case !opts.Overwrite:
		return fmt.Errorf("output %s: %w", path, ErrNoOverwrite)
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
	return f.fill(path, opts, write)
}

// fill writes the file and gives it its name.
func (o *output) fill(path string, opts ExportOptions, write func(*os.File) error) error {
	err := write(o.File)
	if err == nil && !opts.NoSync {
		err = onDisk(syncFile(o.File))
	}
	if err != nil {
		return noSpace(path, err)
	}
	if err := o.publish(path, opts); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// noSpace makes an error of space one of the output at path. Another one stays.
func noSpace(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// It names the file, which has no name, by its directory.
		return fmt.Errorf("output %s: %w: free some space on its disk, or choose another place", path, ErrNoSpace)
	}
	if errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("output %s: %w: it is larger than a file may be here: raise the limit (ulimit -f), or "+
			"choose another place", path, ErrNoSpace)
	}
	return err
}

// syncFile has the disk take in a file's content, or a directory's names. Only tests change it.
var syncFile = (*os.File).Sync

// onDisk says of what a sync failed.
func onDisk(err error) error {
	if err != nil {
		return fmt.Errorf("write to disk: %w", err)
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

// publish gives the file its name, and makes that durable unless opts.NoSync is
// set. Where it fails, there is no file, or the one before.
func (o *output) publish(path string, opts ExportOptions) error {
	if !opts.Overwrite {
		// A link never replaces what is there.
		if err := o.link(path); err != nil {
			return err
		}
		if err := o.removeTemp(); err != nil {
			return errors.Join(err, os.Remove(path))
		}
		if err := o.syncDir(opts); err != nil {
			return errors.Join(err, os.Remove(path))
		}
		return nil
	}
	// What was there can't be had back, so a directory that can't be synced is
	// found out before.
	if err := o.syncDir(opts); err != nil {
		return err
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
	return o.syncDir(opts)
}

// syncDir makes the names in the file's directory durable.
func (o *output) syncDir(opts ExportOptions) error {
	if opts.NoSync {
		return nil
	}
	d, err := os.Open(o.dir)
	if errors.Is(err, fs.ErrPermission) {
		// Files can be put into a directory that can't be read. It can't be opened
		// either, so everything on its file system is synced.
		return onDisk(os.NewSyscallError("syncfs", unix.Syncfs(int(o.Fd()))))
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return onDisk(syncNames(d))
}

// syncNames makes the names in the directory d durable.
func syncNames(d *os.File) error {
	err := syncFile(d)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil // its file system knows no such thing
	}
	return err
}

// writeBackLength is how many bytes are written before their way to the disk begins.
const writeBackLength = 8 << 20

// writeBack has what is written to f begin its way to the disk, so that the sync at
// the end finds little to do. It returns what is told how many bytes f has,
// and tells next, where that is not nil.
func writeBack(f *os.File, next func(written int64)) func(written int64) {
	var begun int64
	return func(written int64) {
		if written < begun { // all over again
			begun = 0
		}
		if written-begun >= writeBackLength {
			// Advice: a file system that knows no such thing does without.
			_ = unix.SyncFileRange(int(f.Fd()), begun, written-begun, unix.SYNC_FILE_RANGE_WRITE)
			begun = written
		}
		if next != nil {
			next(written)
		}
	}
}

func (o *output) link(path string) error {
	if o.temp != "" {
		return os.Link(o.temp, path)
	}
	err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", o.Fd()), unix.AT_FDCWD, path,
		unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return &os.LinkError{Op: "link", Old: "new file", New: path, Err: err}
	}
	return nil
}

// tempName returns a name in dir that nothing else has.
func tempName(dir string) string { return filepath.Join(dir, ".dfcache-"+rand.Text()) }

// removeTemp removes the name that the file has for now.
func (o *output) removeTemp() error {
	if o.temp == "" {
		return nil
	}
	err := os.Remove(o.temp)
	o.temp = ""
	return err
}

// Close closes the file and removes it if it was not published.
func (o *output) Close() error {
	return errors.Join(o.File.Close(), o.removeTemp())
}

// writeDir makes the directory at path with the files of an artifact, each with
// what write writes to it, or nothing at all. A directory that is there is used,
// if it is empty; with opts.Overwrite, files are put between those that are in it.
// Unless opts.NoSync is set, what it makes is on disk when it returns, and no
// file has its name before its content is.
func writeDir(path string, opts ExportOptions, files []File, write func(File, *os.File) error) (err error) {
	names, err := fileNames(files)
	if err != nil {
		return err
	}
	path = filepath.Clean(path)
	exists := true
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("output %s: %w: it is a link to nothing: remove it, or name another output", path,
				fs.ErrExist)
		}
		exists = false
	case err != nil:
		return fmt.Errorf("output: %w", err)
	case !info.IsDir():
		return fmt.Errorf("output %s: %w: the artifact has %d files: name a directory for them", path, fs.ErrExist,
			len(files))
	case !opts.Overwrite:
		entries, err := os.ReadDir(path)
		if err != nil {
			return fmt.Errorf("output: %w", err)
		}
		if len(entries) > 0 {
			return fmt.Errorf("output %s: %w: the directory is not empty", path, ErrNoOverwrite)
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
		if err := writeNew(filepath.Join(temp, names[i]),
			func(out *os.File) error { return write(f, out) }); err != nil {
			return err
		}
	}
	if !opts.NoSync {
		// All together: the first has the file system's journal written, which has most of the others.
		for _, name := range names {
			if err := syncContent(filepath.Join(temp, name)); err != nil {
				return noSpace(path, err)
			}
		}
	}
	if exists {
		err = moveFiles(path, filepath.Base(temp), names, opts)
	} else {
		err = moveDir(temp, path, names, opts)
	}
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// writeNew makes a file in a directory that nobody else knows, with those that lead
// to it. It syncs neither.
func writeNew(path string, write func(*os.File) error) error {
	if err := dirs.Make(filepath.Dir(path), 0o777); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	f, err := newOutput(path)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer f.Close()
	return f.fill(path, ExportOptions{NoSync: true}, write)
}

// syncContent has the disk take in the content of the file at path.
func syncContent(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer f.Close()
	return onDisk(syncFile(f))
}

// moveDir gives the directory temp, which has the files of these names, its own name.
func moveDir(temp, path string, names []string, opts ExportOptions) error {
	if opts.NoSync {
		return os.Rename(temp, path)
	}
	if err := syncDirs(temp, names); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	if err := syncDirs(filepath.Dir(path), nil); err != nil {
		return errors.Join(err, os.Rename(path, temp)) // where it is removed
	}
	return nil
}

// syncDirs makes the files of these names in the directory at path durable, with
// the directories that lead to them.
func syncDirs(path string, names []string) error {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	return syncRoot(root, names)
}

func syncRoot(root *os.Root, names []string) error {
	dirs := map[string]bool{".": true}
	for _, name := range names {
		for dir := filepath.Dir(name); !dirs[dir]; dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	for dir := range dirs {
		d, err := root.Open(dir)
		if err != nil {
			return err
		}
		err = syncNames(d)
		d.Close()
		if err != nil {
			return onDisk(err)
		}
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
				return nil, fmt.Errorf("file %q of the artifact: %w: %q is a file of it too", files[i].Title,
					ErrInvalid, dir)
			}
		}
	}
	return names, nil
}

// moveFiles moves the files of these names to the directory at path from one of
// its own, which it removes, without leaving it through a link. With opts.Overwrite they
// replace files, whose modes they get; without, nothing was in the directory, and what does not
// succeed is undone.
func moveFiles(path, from string, names []string, opts ExportOptions) (err error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	var moved []string
	defer func() {
		if err == nil || opts.Overwrite {
			return
		}
		for _, name := range moved {
			_ = root.Remove(name) // the error before it is what counts
		}
		for _, name := range names {
			for dir := filepath.Dir(name); dir != "." && root.Remove(dir) == nil; dir = filepath.Dir(dir) {
			}
		}
	}()
	modes, err := makePlaces(root, path, names)
	if err != nil {
		return err
	}
	for i, name := range names {
		source := filepath.Join(from, name)
		if opts.Overwrite {
			err = replace(root, source, name, modes[i])
		} else if err = root.Link(source, name); err == nil { // it never replaces what is there
			moved = append(moved, name)
		}
		if err != nil {
			return err
		}
	}
	// Now, so that the sync covers it.
	if err := root.RemoveAll(from); err != nil || opts.NoSync {
		return err
	}
	return syncRoot(root, names)
}

// makePlaces makes the directories of files, before anything is replaced, and returns the modes of
// those that are there: 0 where none is.
func makePlaces(root *os.Root, path string, names []string) ([]fs.FileMode, error) {
	modes := make([]fs.FileMode, len(names))
	for i, name := range names {
		if err := dirs.MakeIn(root, filepath.Dir(name), 0o777); err != nil {
			return nil, err
		}
		switch info, err := root.Lstat(name); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		case info.IsDir():
			return nil, fmt.Errorf("%s: %w: it is a directory", filepath.Join(path, name), fs.ErrExist)
		case info.Mode().IsRegular():
			modes[i] = info.Mode().Perm()
		}
	}
	return modes, nil
}

// replace moves a file to name, where it gets the mode of the one that it replaces, unless that is 0.
func replace(root *os.Root, from, name string, mode fs.FileMode) error {
	if mode != 0 {
		if err := root.Chmod(from, mode); err != nil {
			return err
		}
	}
	return root.Rename(from, name)
}
