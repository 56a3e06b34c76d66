package docs_test

import (
	"bytes"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/docs"
)

var programs = []string{"dfcache", "dfdaemon"}

// TestCurrent makes the documents anew, where everything that a page could take
// from its surroundings is another than usual. They have to be those that are here.
func TestCurrent(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	sources(t)
	bin, dir := t.TempDir(), t.TempDir()
	for _, program := range programs {
		build := exec.CommandContext(t.Context(), "go", "build", "-tags", "gendocs", "-o", bin, "../cmd/"+program)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", build, err, out)
		}
		for format, sub := range map[string]string{"man": "man", "markdown": "cli"} {
			doc := exec.CommandContext(t.Context(), filepath.Join(bin, program),
				"doc", "--path", filepath.Join(dir, sub), "--format", format)
			doc.Dir = dir
			doc.Env = surroundings(strings.ToUpper(program))
			if out, err := doc.CombinedOutput(); err != nil || len(out) > 0 {
				t.Fatalf("%v: %v\n%s", doc, err, out)
			}
		}
	}
	for _, sub := range []string{"man", "cli"} {
		got, want := read(t, sub), read(t, filepath.Join(dir, sub))
		for name := range want {
			if _, ok := got[name]; !ok {
				t.Errorf("%s/%s is missing: run make generate", sub, name)
			} else if !bytes.Equal(got[name], want[name]) {
				t.Errorf("%s/%s is not what the command's help says: run make generate", sub, name)
			}
		}
		for name := range got {
			if _, ok := want[name]; !ok {
				t.Errorf("%s/%s belongs to no command: run make generate", sub, name)
			}
		}
	}
}

// sources looks at what the programs are built of: go test repeats an earlier
// result until a file changes that the test itself has looked at.
func sources(t *testing.T) {
	t.Helper()
	for _, path := range []string{"../go.mod", "../blobstore", "../cmd", "../digest", "../p2p"} {
		if err := filepath.WalkDir(path, func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
			t.Fatal(err)
		}
	}
}

// surroundings is an environment with everything that programs look at, by the
// prefix of a program's own variables.
func surroundings(prefix string) []string {
	return []string{
		"HOME=/elsewhere", "XDG_CONFIG_HOME=/elsewhere/config", "XDG_DATA_HOME=/elsewhere/data",
		"XDG_STATE_HOME=/elsewhere/state", "XDG_RUNTIME_DIR=/elsewhere/run", "PATH=/elsewhere/bin",
		"TZ=Asia/Tokyo", "LANG=de_DE.UTF-8", "COLUMNS=40", "SOURCE_DATE_EPOCH=1",
		prefix + "_CONFIG=/elsewhere/config.yaml", prefix + "_WORKHOME=/elsewhere/home", prefix + "_FORMAT=json",
		prefix + "_TAG=elsewhere", prefix + "_SERVICE_NAME=elsewhere", prefix + "_PPROF_PORT=1",
	}
}

func read(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, entry := range entries {
		if files[entry.Name()], err = os.ReadFile(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// Every page is embedded, and belongs to the program that it is about.
func TestEmbedded(t *testing.T) {
	for sub, pages := range map[string]func(string) map[string][]byte{"man": docs.Man, "cli": docs.Markdown} {
		all := map[string][]byte{}
		for _, program := range programs {
			own := pages(program)
			for name, page := range own {
				if !strings.HasPrefix(name, program) || len(page) == 0 {
					t.Errorf("%s has the page %s of %d bytes", program, name, len(page))
				}
			}
			maps.Copy(all, own)
		}
		if want := read(t, sub); !maps.EqualFunc(all, want, bytes.Equal) {
			t.Errorf("%s: embedded are %v, want what is there: %v", sub, slices.Sorted(maps.Keys(all)),
				slices.Sorted(maps.Keys(want)))
		}
		if got := pages("df"); len(got) > 0 {
			t.Errorf("%s: a program that there is not has %d pages", sub, len(got))
		}
	}
}
