package dirs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// dead mounts a FUSE file system whose process has gone.
func dead(t *testing.T, dir string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs root, to mount a file system that dies")
	}
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal("needs FUSE, which a container may lack: ", err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("dead", dir, "fuse", 0,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	fuse.Close()
}

func TestMake(t *testing.T) {
	dir := t.TempDir()
	in, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), nil, 0o600),
		os.Symlink("nowhere", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	try := func(name string, want error) {
		t.Helper()
		for how, err := range map[string]error{
			"Make": Make(filepath.Join(dir, name), 0o700), "MakeIn": MakeIn(in, name, 0o700)} {
			if !errors.Is(err, want) || want != nil && errors.Is(err, fs.ErrExist) {
				t.Errorf("%s %s: %v, want %v", how, name, err, want)
			}
		}
	}
	try("a/b/c", nil)
	try("a/b", nil)
	try("file", syscall.ENOTDIR)
	try("file/a", syscall.ENOTDIR)
	try("link", fs.ErrNotExist)
	if err := Make(filepath.Join(dir, "link"), 0o700); err == nil ||
		!strings.Contains(err.Error(), "link is a link to nothing") {
		t.Errorf("Make link: %v", err)
	}
	// below a root the link is followed
	if err := Make(filepath.Join(dir, "link", "a"), 0o700); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Make link/a: %v", err)
	}
	dead(t, filepath.Join(dir, "dead"))
	try("dead", syscall.ENOTCONN)
	try("dead/a", syscall.ENOTCONN)
	try("dead/a/b", syscall.ENOTCONN)
}
