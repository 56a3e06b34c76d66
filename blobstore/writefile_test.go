package blobstore

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/blobstore/artifact"
)

// TestNamedOutput covers file systems that have no unnamed files, where a
// hidden file stands in.
func TestNamedOutput(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write := func(text string, publish, overwrite bool) error {
		o, err := newNamedOutput(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		if _, err := o.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if !publish {
			return nil
		}
		return o.publish(path, ExportOptions{Overwrite: overwrite})
	}
	for _, c := range []struct {
		text               string
		publish, overwrite bool
		err                error
		want               string
	}{
		{"never seen", false, false, nil, ""},
		{"first", true, false, nil, "first"},
		{"second", true, false, fs.ErrExist, "first"},
		{"third", true, true, nil, "third"},
	} {
		if err := write(c.text, c.publish, c.overwrite); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", c.text, err)
		}
		if got, _ := os.ReadFile(path); string(got) != c.want {
			t.Errorf("%s: the file has %q", c.text, got)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("the directory has %v", left)
	}
}

// TestNoOverwriteAtTheLastMoment: the file appears while it is being written.
func TestNoOverwriteAtTheLastMoment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	err := writeFile(path, ExportOptions{}, artifact.Layer{}, func(f *os.File) error {
		return os.WriteFile(path, []byte("somebody else's"), 0o600)
	})
	if got, _ := os.ReadFile(path); !errors.Is(err, fs.ErrExist) || string(got) != "somebody else's" {
		t.Errorf("%v; the file has %q", err, got)
	}
}

// TestMoveFilesUndone: what can't be moved into an empty directory as a whole
// is not there at all.
func TestMoveFilesUndone(t *testing.T) {
	dir := t.TempDir()
	names := []string{"a", "sub/b", "sub/dir/c", "d"}
	for _, name := range names {
		path := filepath.Join(dir, "temp", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	// It appears at the last moment.
	if err := os.WriteFile(filepath.Join(dir, "d"), []byte("somebody else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	filled := filling{names: names}
	if err := filled.moveFiles(dir, "temp", ExportOptions{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("move over a file: %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 || left[0].Name() != "d" || left[1].Name() != "temp" {
		t.Errorf("the directory has %v, %v", left, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "d")); err != nil || string(got) != "somebody else's" {
		t.Errorf("the file has %q, %v", got, err)
	}
	if err := filled.moveFiles(dir, "temp", ExportOptions{Overwrite: true}); err != nil {
		t.Errorf("move with overwrite: %v", err)
	}
	for _, name := range names {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || len(got) != 0 {
			t.Errorf("%s has %q, %v", name, got, err)
		}
	}
}

// TestDirectoryAppears: somebody else makes the directory while it is written.
func TestDirectoryAppears(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir")
	places := []artifact.Place{{Path: "a"}, {Path: "b"}}
	err := writeDir(t.Context(), path, ExportOptions{}, places, artifact.Tree{}, func(int, *os.File) error {
		return os.MkdirAll(filepath.Join(path, "theirs"), 0o700)
	})
	if left, _ := os.ReadDir(path); !errors.Is(err, fs.ErrExist) || len(left) != 1 || left[0].Name() != "theirs" {
		t.Errorf("%v; the directory has %v", err, left)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("beside it are %v", left)
	}
}
