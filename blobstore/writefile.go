package blobstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/p2p/dirs"
	"github.com/dfcache/dfcache/p2p/source"
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
//
// A new file has the permissions of layer, where that has some.
func writeFile(path string, opts ExportOptions, layer artifact.Layer, write func(*os.File) error) error {
	mode := fs.FileMode(0)
	if layer.HasMode {
		mode = artifact.OwnerReads(layer.Mode)
	}
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
		// Who could read the file before can, and nobody else.
		if mode = info.Mode().Perm(); layer.HasMode {
			mode = merged(mode, layer.Mode)
		}
	}
	f, err := newOutput(path)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer f.Close()
	if mode != 0 {
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

// sparseWriter writes a file, which is empty, from its beginning on. Blocks of zeros become holes.
type sparseWriter struct {
	file *os.File
	end  int64 // bytes that were written
	hole bool  // the last of them are a hole, which the file does not have yet
}

// Write implements [io.Writer].
func (w *sparseWriter) Write(p []byte) (n int, err error) {
	n = len(p)
	if w.hole = source.IsZero(p); !w.hole {
		n, err = w.file.WriteAt(p, w.end)
	}
	w.end += int64(n)
	return n, err
}

// finish makes the file as long as what was written.
func (w *sparseWriter) finish() error {
	if w.hole {
		return w.file.Truncate(w.end)
	}
	return nil
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
	err := syncDir(o.dir)
	if errors.Is(err, fs.ErrPermission) {
		// Files can be put into a directory that can't be read. It can't be opened
		// either, so everything on its file system is synced.
		return onDisk(os.NewSyscallError("syncfs", unix.Syncfs(int(o.Fd()))))
	}
	return err
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

// writeDir makes the directory at path with the files of an artifact in their places, each with
// what write writes to it, and the rest of its tree, or nothing at all. A directory that is there is used,
// if it is empty; with opts.Overwrite, files are put between those that are in it.
// Unless opts.NoSync is set, what it makes is on disk when it returns, and no
// file has its name before its content is.
func writeDir(
	ctx context.Context, path string, opts ExportOptions, places []artifact.Place, tree artifact.Tree,
	write func(int, *os.File) error,
) (err error) {
	path = filepath.Clean(path)
	exists, full := checkDir(path, len(places), opts)
	// Whether it has what is packed already can't be told before that is unpacked.
	compare := opts.SkipSame && exists &&
		slices.ContainsFunc(places, func(p artifact.Place) bool { return p.Unpack })
	if full != nil && !compare {
		return full
	}
	// A new directory takes its place by a rename. One that is there stays, with
	// its mode and as the mount point that it may be: files move into it.
	parent := filepath.Dir(path)
	if exists {
		parent = path
	}
	temp := tempName(parent)
	defer func() { err = forUser(err, temp, path) }()
	if err := os.Mkdir(temp, 0o777); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	c := filling{modeless: map[string]bool{}, tree: tree}
	defer func() { err = errors.Join(err, removeTree(temp, c.tree)) }()
	if err := c.fill(ctx, temp, path, places, write); err != nil {
		return err
	}
	if compare && c.isIn(ctx, temp, path) {
		return errUnchanged
	}
	if full != nil {
		return full
	}
	if !opts.NoSync {
		// All together: the first has the file system's journal written, which has most of the others.
		for _, name := range c.names {
			if err := syncContent(filepath.Join(temp, name)); err != nil {
				return noSpace(path, err)
			}
		}
	}
	if exists {
		err = c.moveFiles(path, filepath.Base(temp), opts)
	} else {
		err = c.moveDir(temp, path, opts)
	}
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// checkDir reports whether there is a directory at path, and what of it is in the way of n files.
func checkDir(path string, n int, opts ExportOptions) (exists bool, err error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(path); err == nil {
			return false, fmt.Errorf("output %s: %w: it is a link to nothing: remove it, or name another output", path,
				fs.ErrExist)
		}
		return false, nil
	case err != nil:
		return false, fmt.Errorf("output: %w", err)
	case !info.IsDir():
		return false, fmt.Errorf("output %s: %w: the artifact has %d files: name a directory for them", path,
			fs.ErrExist, n)
	case !opts.Overwrite:
		entries, err := os.ReadDir(path)
		if err != nil {
			return false, fmt.Errorf("output: %w", err)
		}
		if len(entries) > 0 {
			return true, fmt.Errorf("output %s: %w: the directory is not empty", path, ErrNoOverwrite)
		}
	}
	return true, nil
}

// errUnchanged ends an export to a directory that has all of it already.
var errUnchanged = errors.New("unchanged")

// movedError is an error about a file that the user knows by another name.
type movedError struct {
	error
	text string
}

func (e movedError) Error() string { return e.text }

func (e movedError) Unwrap() error { return e.error }

// forUser has an error name what the user named, in place of a directory that nobody has seen.
func forUser(err error, temp, path string) error {
	if err == nil || !strings.Contains(err.Error(), filepath.Base(temp)) {
		return err
	}
	text := strings.ReplaceAll(err.Error(), temp, path)
	return movedError{err, strings.ReplaceAll(text, filepath.Base(temp), path)}
}

// filling is what a directory is filled with.
type filling struct {
	names    []string        // paths of its files
	modeless map[string]bool // those whose permissions are nobody's wish
	tree     artifact.Tree
}

// fill fills the directory temp, which nobody else knows, with all that an artifact has, but for the
// modes of directories. path is what the user calls the directory.
func (c *filling) fill(
	ctx context.Context, temp, path string, places []artifact.Place, write func(int, *os.File) error,
) error {
	root, err := os.OpenRoot(temp)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer root.Close()
	for i, p := range places {
		fill := func(out *os.File) error { return write(i, out) }
		if !p.Unpack {
			c.modeless[p.Path] = !p.HasMode
			err = writeNew(filepath.Join(temp, p.Path), p.Layer, fill)
		} else {
			var unpacked artifact.Tree
			unpacked, err = unpack(ctx, root, temp, p, fill)
			c.tree.Add(unpacked)
		}
		if err != nil {
			return noSpace(path, err)
		}
	}
	for _, dir := range c.tree.ByDepth() {
		if err := dirs.MakeIn(root, dir, 0o777); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	if err := artifact.MakeLinks(root, c.tree); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	c.names, err = pathsIn(temp)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// unpack unpacks an archive below root, which is the directory temp.
func unpack(
	ctx context.Context, root *os.Root, temp string, p artifact.Place, fill func(*os.File) error,
) (artifact.Tree, error) {
	if err := dirs.MakeIn(root, p.Path, 0o777); err != nil {
		return artifact.Tree{}, fmt.Errorf("output: %w", err)
	}
	archive, err := newOutput(filepath.Join(temp, "archive"))
	if err != nil {
		return artifact.Tree{}, fmt.Errorf("output: %w", err)
	}
	defer archive.Close()
	if err := fill(archive.File); err != nil {
		return artifact.Tree{}, err
	}
	size, err := archive.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = archive.Seek(0, io.SeekStart)
	}
	if err != nil {
		return artifact.Tree{}, fmt.Errorf("output: %w", err)
	}
	return artifact.Unpack(ctx, root, p, archive, size)
}

// writeNew makes the file of a layer in a directory that nobody else knows, with those that lead
// to it. It syncs neither.
func writeNew(path string, layer artifact.Layer, write func(*os.File) error) error {
	if err := dirs.Make(filepath.Dir(path), 0o777); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	f, err := newOutput(path)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	defer f.Close()
	if layer.HasMode {
		if err := f.Chmod(artifact.OwnerReads(layer.Mode)); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	return f.fill(path, ExportOptions{NoSync: true}, write)
}

// pathsIn returns the paths of the files below a directory, without links.
func pathsIn(dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Type() == fs.ModeSymlink {
			return err
		}
		name, err := filepath.Rel(dir, path)
		names = append(names, name)
		return err
	})
	return names, err
}

// removeTree removes a directory with what is in it, also from directories that nobody may write to.
func removeTree(path string, tree artifact.Tree) error {
	err := os.RemoveAll(path)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	for _, dir := range tree.ByDepth() {
		_ = os.Chmod(filepath.Join(path, dir), 0o700) // what can't be removed is told below
	}
	return os.RemoveAll(path)
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

// setModes gives directories below root their permissions, those of others in them first.
func setModes(root *os.Root, directories []string, tree artifact.Tree) error {
	for _, dir := range slices.Backward(directories) {
		// Its owner can look into it, as whoever syncs it has to.
		if err := root.Chmod(dir, tree.Directories[dir]|0o500); err != nil {
			return err
		}
	}
	return nil
}

// moveDir gives the directory temp, which has been filled, its own name.
func (c *filling) moveDir(temp, path string, opts ExportOptions) error {
	if err := c.finish(temp, opts); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	if opts.NoSync {
		return nil
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return errors.Join(err, os.Rename(path, temp)) // where it is removed
	}
	return nil
}

// finish gives the directories in a new one their modes, and makes all of it durable.
func (c *filling) finish(path string, opts ExportOptions) error {
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := setModes(root, c.tree.ByDepth(), c.tree); err != nil || opts.NoSync {
		return err
	}
	return c.sync(root)
}

// syncDir makes the names in the directory at path durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return onDisk(syncNames(d))
}

// sync makes the names of all files below root durable, with the directories that lead to them.
func (c *filling) sync(root *os.Root) error {
	directories := map[string]bool{".": true}
	add := func(dir string) {
		for ; !directories[dir]; dir = filepath.Dir(dir) {
			directories[dir] = true
		}
	}
	for _, name := range c.names {
		add(filepath.Dir(name))
	}
	for name := range c.tree.Links {
		add(filepath.Dir(name))
	}
	for name := range c.tree.Directories {
		add(name)
	}
	for dir := range directories {
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

// moveFiles moves all of it to the directory at path from one of
// its own, which it removes, without leaving it through a link. With
// opts.Overwrite they replace files, which keep who may read and write them; without, nothing was in the
// directory, and what does not succeed is undone.
//
//nolint:cyclop // the steps, and what undoes each, in their order
func (c *filling) moveFiles(path, from string, opts ExportOptions) (err error) {
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
		for _, dir := range slices.Backward(c.tree.ByDepth()) {
			_ = root.Chmod(dir, 0o700)
			_ = root.Remove(dir)
		}
		for _, name := range slices.Concat(c.names, slices.Collect(maps.Keys(c.tree.Links))) {
			for dir := filepath.Dir(name); dir != "." && root.Remove(dir) == nil; dir = filepath.Dir(dir) {
			}
		}
	}()
	made, modes, err := c.makePlaces(root, path)
	if err != nil {
		return err
	}
	for i, name := range c.names {
		source := filepath.Join(from, name)
		if opts.Overwrite {
			err = c.replace(root, source, name, modes[i])
		} else if err = root.Link(source, name); err == nil { // it never replaces what is there
			moved = append(moved, name)
		}
		if err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.tree.Links)) {
		if opts.Overwrite {
			err = root.Rename(filepath.Join(from, name), name)
		} else if err = root.Symlink(c.tree.Links[name], name); err == nil {
			moved = append(moved, name)
		}
		if err != nil {
			return err
		}
	}
	// Now, so that the sync covers it.
	if err := root.RemoveAll(from); err != nil {
		return err
	}
	if err := setModes(root, made, c.tree); err != nil || opts.NoSync {
		return err
	}
	return c.sync(root)
}

// makePlaces makes the directories of a tree, before anything is replaced. It returns those of them that were not
// there, and the modes of the files that are there: 0 where none is.
func (c *filling) makePlaces(root *os.Root, path string) (made []string, modes []fs.FileMode, err error) {
	for _, dir := range c.tree.ByDepth() {
		if _, err := root.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			made = append(made, dir)
		}
		if err := dirs.MakeIn(root, dir, 0o777); err != nil {
			return nil, nil, err
		}
	}
	modes = make([]fs.FileMode, len(c.names))
	for i, name := range slices.Concat(c.names, slices.Sorted(maps.Keys(c.tree.Links))) {
		if err := dirs.MakeIn(root, filepath.Dir(name), 0o777); err != nil {
			return nil, nil, err
		}
		switch info, err := root.Lstat(name); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, nil, err
		case info.IsDir():
			return nil, nil, fmt.Errorf("%s: %w: it is a directory", filepath.Join(path, name), fs.ErrExist)
		case info.Mode().IsRegular() && i < len(c.names):
			modes[i] = info.Mode().Perm()
		}
	}
	return made, modes, nil
}

// replace moves a file to name. Where it replaces one, of the mode given, those can read and write it who could
// before, and nobody else; whether it can be run is the new one's to say.
func (c *filling) replace(root *os.Root, from, name string, mode fs.FileMode) error {
	if mode != 0 {
		info, err := root.Lstat(from)
		if err != nil {
			return err
		}
		if !c.modeless[name] {
			mode = merged(mode, info.Mode())
		}
		if err := root.Chmod(from, mode); err != nil {
			return err
		}
	}
	return root.Rename(from, name)
}

// merged returns the permissions of a file that replaces another: who may read and write it is as before, and
// who may read it may run it where those of the new one say so.
func merged(before, now fs.FileMode) fs.FileMode {
	return before&^0o111 | now&0o111&(before>>2)
}
