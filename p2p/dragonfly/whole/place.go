package whole

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// MayKeep returns an error where a directory for a store is Dragonfly's own, in it or around it, as
// far as that can be seen: Dragonfly's dfdaemon removes from its directory what it does not know when
// it starts, and a store makes a directory that Dragonfly's may have. Nothing is written.
func MayKeep(dir string) error {
	dir = resolved(dir)
	for at := dir; ; at = filepath.Dir(at) {
		if mark := markIn(at); mark != "" {
			where := "is in"
			if at == dir {
				where = "is"
			}
			return fmt.Errorf("%s %s the directory of Dragonfly's dfdaemon, which has %s, and removes there what it "+
				"does not know when it starts: choose another directory", dir, where, mark)
		}
		if at == filepath.Dir(at) {
			break
		}
	}
	if mark := markBelow(dir, 2); mark != "" {
		return fmt.Errorf("%s is around the directory of Dragonfly's dfdaemon, which has %s: choose another directory",
			dir, mark)
	}
	return nil
}

// resolved follows symbolic links of as much of a path as there is.
func resolved(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	for at, rest := path, ""; ; at, rest = filepath.Dir(at), filepath.Join(filepath.Base(at), rest) {
		if real, err := filepath.EvalSymlinks(at); err == nil {
			return filepath.Join(real, rest)
		}
		if at == filepath.Dir(at) {
			return path
		}
	}
}

// maxLook is how many entries of a directory are looked at.
const maxLook = 1000

// entries returns what a directory has, as far as it can be read, up to maxLook.
func entries(dir string) []os.DirEntry {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	all, _ := f.ReadDir(maxLook)
	return all
}

func markBelow(dir string, depth int) string {
	for _, e := range entries(dir) {
		if !e.IsDir() {
			continue
		}
		child := filepath.Join(dir, e.Name())
		mark := markIn(child)
		if mark == "" && depth > 1 {
			mark = markBelow(child, depth-1)
		}
		if mark != "" {
			return mark
		}
	}
	return ""
}

// markIn returns the path of what shows that a directory is that of a dfdaemon of Dragonfly's, or "".
func markIn(dir string) string {
	// The work home of the one in Go.
	if lock := filepath.Join(dir, "dfget.lock"); exists(lock) && exists(filepath.Join(dir, "daemon.lock")) {
		return lock
	}
	// The storage of the one in Rust.
	for _, tasks := range []string{"tasks", "persistent-tasks", "persistent-cache-tasks"} {
		if content := filepath.Join(dir, "content", tasks); exists(content) &&
			exists(filepath.Join(dir, "metadata", "CURRENT")) {
			return content
		}
	}
	// The cache of the one in Go: TASK/PEER/metadata, beside the data.
	for _, e := range entries(dir) {
		if !e.IsDir() || len(e.Name()) != 64 || strings.Trim(e.Name(), "0123456789abcdef") != "" {
			continue
		}
		task := filepath.Join(dir, e.Name())
		for _, peer := range entries(task) {
			if peer.IsDir() && exists(filepath.Join(task, peer.Name(), "metadata")) {
				return task
			}
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
