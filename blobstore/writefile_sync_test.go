package blobstore

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dfcache/dfcache/blobstore/artifact"
)

// syncs keeps what the disk would have after a power cut: of a file its size, of a
// directory its names, as they were when they were synced last. The sync of that
// number fails; 0 is none.
type syncs struct {
	fails, done int
	sizes       map[uint64]int64
	names       map[uint64][]string
}

// recordSyncs has syncs kept in the place of those to the disk.
func recordSyncs(t *testing.T, fails int) *syncs {
	s := &syncs{fails: fails, sizes: map[uint64]int64{}, names: map[uint64][]string{}}
	before := syncFile
	t.Cleanup(func() { syncFile = before })
	syncFile = func(f *os.File) error {
		if s.done++; s.done == s.fails {
			return syscall.EIO
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if inode := inodeOf(info); info.IsDir() {
			s.names[inode] = namesIn(t, f.Name())
		} else {
			s.sizes[inode] = info.Size()
		}
		return nil
	}
	return s
}

func inodeOf(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

func namesIn(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// filesIn returns the content of all files below dir.
func filesIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	content := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		content[path] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// outputs are the ways to write outputs, each in a directory where before is.
var outputs = []struct {
	name   string
	before []string // files, with "before" in them
	write  func(dir string, opts ExportOptions) error
	opts   ExportOptions
}{
	{"a new file", nil, writeOut, ExportOptions{}},
	{"a file replaced", []string{"out"}, writeOut, ExportOptions{Overwrite: true}},
	{"a new file that had a name before", nil, writeNamed, ExportOptions{}},
	{"a file replaced by one that had a name before", []string{"out"}, writeNamed, ExportOptions{Overwrite: true}},
	{"a new directory", nil, writeAll, ExportOptions{}},
	{"an empty directory", []string{"dir/."}, writeAll, ExportOptions{}},
	{"a directory with files", []string{"dir/a", "dir/other"}, writeAll, ExportOptions{Overwrite: true}},
}

func writeText(f *os.File) error {
	_, err := f.WriteString("the content")
	return err
}

func writeOut(dir string, opts ExportOptions) error {
	return writeFile(filepath.Join(dir, "out"), opts, artifact.Layer{}, writeText)
}

// writeNamed does as writeFile where a file system has no unnamed files.
func writeNamed(dir string, opts ExportOptions) error {
	o, err := newNamedOutput(dir)
	if err != nil {
		return err
	}
	defer o.Close()
	return o.fill(filepath.Join(dir, "out"), opts, writeText)
}

func writeAll(dir string, opts ExportOptions) error {
	places := []artifact.Place{{Path: "a"}, {Path: "sub/b"}, {Path: "sub/deep/er/c"}}
	return writeDir(context.Background(), filepath.Join(dir, "dir"), opts, places, artifact.Tree{},
		func(_ int, f *os.File) error { return writeText(f) })
}

func putBefore(t *testing.T, dir string, names []string) {
	for _, name := range names {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if filepath.Base(name) == "." {
			err := os.MkdirAll(path, 0o777)
			if err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte("before"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOutputsAreSynced: when an output is written, the disk has what is seen.
func TestOutputsAreSynced(t *testing.T) {
	for _, c := range outputs {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			putBefore(t, dir, c.before)
			old := map[uint64]bool{}
			s := recordSyncs(t, 0)
			walk(t, dir, func(path string, info fs.FileInfo) {
				old[inodeOf(info)] = true
				if info.IsDir() {
					s.names[inodeOf(info)] = namesIn(t, path)
				}
			})
			if err := c.write(dir, c.opts); err != nil {
				t.Fatal(err)
			}
			walk(t, dir, func(path string, info fs.FileInfo) {
				inode := inodeOf(info)
				if info.IsDir() {
					if synced, now := s.names[inode], namesIn(t, path); !slices.Equal(synced, now) {
						t.Errorf("%s has %q, on disk are %q", path, now, synced)
					}
				} else if size, ok := s.sizes[inode]; !old[inode] && (!ok || size != info.Size()) {
					t.Errorf("%s has %d bytes, on disk are %d (%v)", path, info.Size(), size, ok)
				}
			})

			s = recordSyncs(t, 0)
			another := t.TempDir()
			putBefore(t, another, c.before)
			opts := c.opts
			opts.NoSync = true
			if err := c.write(another, opts); err != nil || s.done != 0 {
				t.Errorf("without syncs: %d, %v", s.done, err)
			}
		})
	}
}

func walk(t *testing.T, dir string, visit func(path string, info fs.FileInfo)) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			visit(path, info)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestContentBeforeName: a power cut at any sync leaves no name whose content the
// disk does not have, but those of files that are on their way.
func TestContentBeforeName(t *testing.T) {
	for _, c := range outputs {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			putBefore(t, dir, c.before)
			s := recordSyncs(t, 0)
			record, before := syncFile, filesIn(t, dir)
			syncFile = func(f *os.File) error {
				walk(t, dir, func(path string, info fs.FileInfo) {
					if _, synced := s.sizes[inodeOf(info)]; !info.IsDir() && !synced && before[path] == "" &&
						!strings.Contains(path, "/.dfcache-") {
						t.Errorf("%s has its name, and the disk has not its content", path)
					}
				})
				return record(f)
			}
			if err := c.write(dir, c.opts); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestSyncFails: an output that can't be made durable is no success, and nothing
// of it is left but what was replaced already.
func TestSyncFails(t *testing.T) {
	for _, c := range outputs {
		t.Run(c.name, func(t *testing.T) {
			for n := 1; ; n++ {
				dir := t.TempDir()
				putBefore(t, dir, c.before)
				before := filesIn(t, dir)
				s := recordSyncs(t, n)
				err := c.write(dir, c.opts)
				if s.done < n {
					if n == 1 || err != nil {
						t.Errorf("without a failure, after %d syncs: %v", n-1, err)
					}
					return
				}
				if !errors.Is(err, syscall.EIO) {
					t.Errorf("sync %d fails: %v", n, err)
				}
				left := filesIn(t, dir)
				if strings.HasPrefix(c.name, "a file replaced") && n < 3 && !maps.Equal(left, before) {
					t.Errorf("sync %d fails, which is before anything is replaced, and there is %v", n, left)
				}
				if c.opts.Overwrite {
					for path := range left {
						if left[path] != before[path] && left[path] != "the content" || filepath.Base(path)[0] == '.' {
							t.Errorf("sync %d fails: %s has %q", n, path, left[path])
						}
					}
					for path := range before {
						if _, ok := left[path]; !ok {
							t.Errorf("sync %d fails: %s is gone", n, path)
						}
					}
				} else if !maps.Equal(left, before) {
					t.Errorf("sync %d fails, and there is %v", n, left)
				}
				walk(t, dir, func(path string, _ fs.FileInfo) {
					if filepath.Base(path)[0] == '.' {
						t.Errorf("sync %d fails: %s is left", n, path)
					}
				})
			}
		})
	}
}
