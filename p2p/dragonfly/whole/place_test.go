package whole_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
)

// A directory of Dragonfly's is known by what is in it, wherever it is: nothing of ours is to be in it
// or around it.
func TestMayKeep(t *testing.T) {
	id := strings.Repeat("0a", 32)
	for name, files := range map[string][]string{
		"cache of the one in Go":     {id + "/10.0.0.1-1-uuid/metadata", id + "/10.0.0.1-1-uuid/data"},
		"work home of the one in Go": {"daemon.lock", "dfget.lock"},
		"storage of the one in Rust": {"content/persistent-cache-tasks/x", "metadata/CURRENT"},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			theirs := filepath.Join(top, "srv", "theirs")
			for _, file := range files {
				path := filepath.Join(theirs, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			link := filepath.Join(top, "link")
			if err := os.Symlink(theirs, link); err != nil {
				t.Fatal(err)
			}
			for dir, says := range map[string]string{
				theirs:                             "is the directory of",
				filepath.Join(theirs, "ours"):      "is in the directory of",
				filepath.Join(theirs, "our/data"):  "is in the directory of",
				filepath.Join(link, "ours"):        "is in the directory of",
				filepath.Join(top, "srv"):          "is around the directory of",
				top:                                "is around the directory of",
				filepath.Join(top, "srv", "ours"):  "",
				filepath.Join(top, "srv2", "ours"): "",
			} {
				err := whole.MayKeep(dir)
				if says == "" {
					if err != nil {
						t.Errorf("%s: %v", dir, err)
					}
				} else if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("%s: %v; want an error that says that it %s Dragonfly's", dir, err, says)
				}
			}
		})
	}
}
