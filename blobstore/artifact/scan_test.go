package artifact_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
)

func TestScan(t *testing.T) {
	dir := t.TempDir()
	make := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = errors.Join(err, os.Symlink(target, path))
		} else {
			err = errors.Join(err, os.WriteFile(path, []byte(text), 0o640))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	make("d/z", "z")
	make("d/sub/a", "a")
	make("d/sub/up", "-> ../z")
	make("d/dangling", "-> nothing")
	make("f", "f")
	make("link", "-> d")
	if err := os.Mkdir(filepath.Join(dir, "d", "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	scan := func(paths ...string) string {
		files, tree, err := artifact.Scan(paths)
		if err != nil {
			return "error " + err.Error()
		}
		var all []string
		for _, f := range files {
			all = append(all, fmt.Sprintf("%s=%s(%d)", f.Name, f.Path, f.Size))
		}
		return fmt.Sprint(all, tree)
	}
	alone := "map[empty:-rwx------ sub:-rwxr-xr-x] map[dangling:nothing sub/up:../z]}"
	for paths, want := range map[string]string{
		"d":     "[sub/a=d/sub/a(1) z=d/z(1)] {" + alone,
		"./d/":  "[sub/a=d/sub/a(1) z=d/z(1)] {" + alone,
		"link":  "[sub/a=link/sub/a(1) z=link/z(1)] {" + alone,
		"f":     "[f=f(1)] {map[] map[]}",
		"d f":   "[d/sub/a=d/sub/a(1) d/z=d/z(1) f=f(1)] {map[d:-rwxr-xr-x d/empty:-rwx------ d/sub:-rwxr-xr-x] map[d/dangling:nothing d/sub/up:../z]}",
		"d d/z": "[d/sub/a=d/sub/a(1) d/z=d/z(1) z=d/z(1)] {map[d:-rwxr-xr-x d/empty:-rwx------ d/sub:-rwxr-xr-x] map[d/dangling:nothing d/sub/up:../z]}",
		"d ./d": "error input ./d: invalid: d has the same name",
		"/ f":   "error input /: invalid: it has no name of its own",
		"none":  "error input: stat none: no such file or directory",
	} {
		if got := scan(strings.Fields(paths)...); got != want {
			t.Errorf("%s: %s\nwant %s", paths, got, want)
		}
	}
	for name, target := range map[string]string{"out": "../f", "root": "/etc", "chain": "sub/up2/../../f"} {
		if err := os.Symlink("..", filepath.Join(dir, "d", "sub", "up2")); err != nil {
			t.Fatal(err)
		}
		make("d/"+name, "-> "+target)
		if got := scan("d"); !strings.Contains(got, "the link leads out of the directory") {
			t.Errorf("link %s: %s", name, got)
		}
		if err := errors.Join(os.Remove("d/"+name), os.Remove("d/sub/up2")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("d/\xff", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := scan("d"); !strings.Contains(got, "not UTF-8") {
		t.Errorf("a name that is not UTF-8: %s", got)
	}
}

// TestScanTooManyFiles: what no manifest can refer to is refused before anything is read.
func TestScanTooManyFiles(t *testing.T) {
	dir := t.TempDir()
	first := filepath.Join(dir, "0")
	if err := os.WriteFile(first, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range artifact.MaxFiles {
		if i == artifact.MaxFiles-1 {
			if files, _, err := artifact.Scan([]string{dir}); err != nil || len(files) != artifact.MaxFiles {
				t.Errorf("as many as are possible: %d, %v", len(files), err)
			}
		}
		if err := os.Link(first, filepath.Join(dir, fmt.Sprint(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	if files, _, err := artifact.Scan([]string{dir}); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("one file too many: %d, %v", len(files), err)
	}
}
