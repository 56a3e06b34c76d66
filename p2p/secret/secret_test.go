package secret

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	if _, _, err := Read(path+"x", 5); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	if _, _, err := Read(filepath.Dir(path), 5); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a directory: %v", err)
	}
	if err := unix.Mkfifo(path+".pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Read(path+".pipe", 5); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
}
