package secret

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode := range fs.FileMode(0o777 + 1) {
		if mode&0o400 == 0 { // a right that root does not need
			continue
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		data, info, err := Read(path, 6)
		if public, _, err := ReadPublic(path, 6); err != nil || string(public) != "secret" {
			t.Errorf("what is no secret, mode %#o: %q, %v", mode, public, err)
		}
		if open := mode&0o006 != 0 || mode&0o020 != 0; open != (err != nil) {
			t.Errorf("mode %#o: %v", mode, err)
		} else if open && !strings.Contains(err.Error(), "run: chmod 600 "+path) {
			t.Errorf("mode %#o: no advice: %v", mode, err)
		} else if !open && (string(data) != "secret" || info.Mode().Perm() != mode) {
			t.Errorf("mode %#o: %q, %v", mode, data, info)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Read(path, 5); err == nil || !strings.Contains(err.Error(), "larger than 5 bytes") {
		t.Errorf("too large: %v", err)
	}
	if err := os.Truncate(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _, err := Read(path, 5)
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; err == nil || took > 1<<20 {
		t.Errorf("64 MiB are read, which takes %d bytes: %v", took, err)
	}
	if _, _, err := Read(path+"x", 5); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	if _, _, err := Read(filepath.Dir(path), 5); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a directory: %v", err)
	}
	if err := unix.Mkfifo(path+".pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, _, err := Read(path+".pipe", 5)
		read <- err
	}()
	select {
	case err := <-read:
		if err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("a pipe: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a pipe that nobody writes to is waited for")
	}
}

// A secret that another user owns is one that this user can change.
func TestReadOfAnothers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: needs root, to give a file away")
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := errors.Join(os.WriteFile(path, []byte("secret"), 0o600), os.Chown(path, 12345, 0)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Read(path, 6); err == nil ||
		!strings.Contains(err.Error(),
			"belongs to uid 12345, neither root nor the user of this process: it is a secret; run: chown 0 "+path) {
		t.Errorf("another user's: %v", err)
	}
	if _, _, err := ReadPublic(path, 6); err != nil {
		t.Errorf("what is no secret: %v", err)
	}
}

// A secret is read again when anything about its file has changed: who may read it, too.
func TestSame(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	look := func() fs.FileInfo {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	written := time.Unix(1, 0)
	write := func(to, content string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(to, []byte(content), 0o600), os.Chtimes(to, written, written)); err != nil {
			t.Fatal(err)
		}
	}
	write(path, "secret")
	for what, change := range map[string]func() error{
		"size": func() error { write(path, "longer secret"); return nil },
		"time": func() error { return os.Chtimes(path, written, written.Add(time.Nanosecond)) },
		"mode": func() error { return os.Chmod(path, 0o640) },
		"file": func() error { write(path+".new", "SECRET"); return os.Rename(path+".new", path) },
	} {
		write(path, "secret")
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		before := look()
		if !Same(before, look()) {
			t.Error("what has not changed is not the same")
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if Same(before, look()) {
			t.Errorf("another %s is the same", what)
		}
	}
}
