package blobstore_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/blobstore"
)

func TestImportFiles(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		dir := t.TempDir()
		large := string(bytesOf(300_000, 1))
		files := map[string]string{"a": "text", "sub/large": large, "sub/same": large, "sub/link": "-> ../a",
			"empty/": "", "none": ""}
		fill(t, dir, files)
		var last int64
		f, err := r.ImportFiles(t.Context(), "v1", []string{dir}, blobstore.ImportOptions{Progress: func(n int64) {
			if n < last {
				t.Errorf("progress goes from %d to %d", last, n)
			}
			last = n
		}})
		if err != nil {
			t.Fatal(err)
		}
		if f.Size != 600_004 || len(f.Files) != 4 || f.Files[2].Title != "sub/large" || !f.Local || last == 0 ||
			f.Digest != f.Manifest {
			t.Errorf("imported %+v; progress ended at %d", f, last)
		}
		stat, err := r.Stat(t.Context(), "v1", blobstore.Lookup{})
		if err != nil || stat.Size != f.Size || stat.Pieces != f.Pieces || stat.Held != f.Held ||
			len(stat.Files) != len(f.Files) || stat.Files[1].PieceLength != f.Files[1].PieceLength {
			t.Errorf("stat is %+v, %v; import said %+v", stat, err, f)
		}
		out := filepath.Join(t.TempDir(), "out")
		if _, err := r.ExportFile(t.Context(), "v1", out, blobstore.ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		requireTree(t, out, tree(t, dir))
		// Again nothing changes, and another one lets this go.
		if again, err := r.ImportFiles(t.Context(), "v1", []string{dir}, blobstore.ImportOptions{}); err != nil ||
			again.Manifest != f.Manifest {
			t.Errorf("again: %+v, %v", again, err)
		}
		if _, err := r.Remove(t.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		for e, err := range r.List(t.Context()) {
			t.Errorf("left is %v, %v", e, err)
		}
		// What fails stores nothing.
		fill(t, dir, map[string]string{"sub/out": "-> ../../x"})
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for what, err := range map[string]error{
			"a link out": importErr(r.ImportFiles(t.Context(), "v1", []string{dir}, blobstore.ImportOptions{})),
			"a digest": importErr(r.ImportFiles(t.Context(), string(f.Digest), []string{dir},
				blobstore.ImportOptions{})),
			"no name": importErr(r.ImportFiles(t.Context(), "", []string{dir}, blobstore.ImportOptions{})),
		} {
			if !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if _, err := r.ImportFiles(ended, "v1", []string{filepath.Join(dir, "a")},
			blobstore.ImportOptions{}); !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that has ended: %v", err)
		}
		for e, err := range r.List(t.Context()) {
			t.Errorf("left is %v, %v", e, err)
		}
	})
}

func importErr(_ blobstore.File, err error) error { return err }
