package rpc

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
)

func TestListen(t *testing.T) {
	// Whatever the umask is.
	for _, mask := range []int{0, 0o022, 0o177} {
		path := filepath.Join(t.TempDir(), "run", "d.sock")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		old := syscall.Umask(mask)
		l, err := Listen(path)
		syscall.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != fs.ModeSocket|0o660 {
			t.Errorf("umask %03o: socket %v, %v", mask, info.Mode(), err)
		}
		l.Close()
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Close: %v", err)
		}
	}
}

// A socket in a directory for all is its owner's alone.
func TestListenShared(t *testing.T) {
	dir := t.TempDir()
	for mode, ok := range map[fs.FileMode]bool{0o755: true, 0o775: false, 0o757: false} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		l, err := ListenShared(filepath.Join(dir, "s"))
		if !ok {
			if !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%04o: %v", mode, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(filepath.Join(dir, "s")); err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("socket %v, %v", info.Mode(), err)
		}
		l.Close()
	}
}

func TestListenMakesDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "d.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, dir := range []string{filepath.Dir(path), filepath.Dir(filepath.Dir(path))} {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o750 {
			t.Errorf("%s: %v, %v", dir, info.Mode(), err)
		}
	}
}

func TestListenRefusesDirectory(t *testing.T) {
	for mode, ok := range map[fs.FileMode]bool{
		0o700: true, 0o750: true, 0o710: true,
		0o755: false, 0o751: false, 0o770: false, 0o777: false, 0o702: false,
	} {
		dir := filepath.Join(t.TempDir(), "run")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		l, err := Listen(filepath.Join(dir, "d.sock"))
		if ok {
			if err != nil {
				t.Errorf("%04o: %v", mode, err)
				continue
			}
			l.Close()
		} else if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chmod 0750 "+dir) {
			t.Errorf("%04o: %v", mode, err)
		}
	}
}

// Nobody is to take /tmp away from everybody else.
func TestListenRefusesSharedDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, fs.ModeSticky|0o777); err != nil {
		t.Fatal(err)
	}
	_, err := Listen(filepath.Join(dir, "d.sock"))
	if !errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), "chmod") ||
		!strings.Contains(err.Error(), "for example "+dir+"/dragonfly/dfdaemon.sock") {
		t.Errorf("got %v", err)
	}
}

func TestListenRefusesForeignDirectory(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(filepath.Join(dir, "d.sock")); !errors.Is(err, fs.ErrPermission) ||
		!strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("got %v", err)
	}
}

func TestListenOnUsedPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	path := filepath.Join(dir, "d.sock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("notes"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("on a file: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "notes" {
		t.Errorf("the file is %q, %v", b, err)
	}
	os.Remove(path)

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	living, err := Listen(path)
	if err != nil {
		t.Fatalf("on a stale socket: %v", err)
	}
	if _, err := Listen(path); !errors.Is(err, fs.ErrExist) ||
		!strings.Contains(err.Error(), "a dfdaemon listens on it") {
		t.Errorf("on a living socket: %v", err)
	}
	living.Close()
	if _, err := Listen("/" + strings.Repeat("x", maxSocketPath)); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("on a long path: %v", err)
	}
}

// Another program may put its own socket in the place of ours: that one stays.
func TestListenReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "s")
	ours, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if err := ours.Close(); err != nil {
		t.Error(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the other socket: %v", err)
	}
	conn.Close()
}

// Of many that listen at once over a stale socket, one does.
func TestListenAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	path := filepath.Join(dir, "d.sock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	var n atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if l, err := Listen(path); err == nil {
				n.Add(1)
				t.Cleanup(func() { l.Close() })
			}
		})
	}
	all.Wait()
	if n.Load() != 1 {
		t.Errorf("%d listen", n.Load())
	}
	if alive, err := listens(path); !alive || err != nil {
		t.Errorf("listens: %t, %v", alive, err)
	}
}

func TestLockWaits(t *testing.T) {
	dir := t.TempDir()
	held, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	locked := make(chan error, 1)
	go func() { locked <- lock(t.Context(), f) }()
	held.Close()
	if err := <-locked; err != nil {
		t.Error(err)
	}
}
