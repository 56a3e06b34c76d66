package blobstore

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
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
		return o.publish(path, overwrite)
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
	err := writeFile(path, false, func(f *os.File) error {
		return os.WriteFile(path, []byte("somebody else's"), 0o600)
	})
	if got, _ := os.ReadFile(path); !errors.Is(err, fs.ErrExist) || string(got) != "somebody else's" {
		t.Errorf("%v; the file has %q", err, got)
	}
}
