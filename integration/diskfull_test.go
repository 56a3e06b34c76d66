package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/blobstore"
)

// TestDiskFull gives the daemon a data directory on a file system of 16 MiB:
// what does not fit is refused with a clear error, nothing of it is left, and
// the store goes on.
func TestDiskFull(t *testing.T) {
	home := tempHome(t)
	data := filepath.Join(home, "data")
	if err := os.Mkdir(data, 0o750); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, home, onSmallDisk(data)...)
	inside := filepath.Join("/proc", fmt.Sprint(d.cmd.Process.Pid), "root", data)
	store := d.dial(t)
	defer store.Close()
	r := repository(t, store, "t")

	small := content(1<<20, 1)
	if _, err := r.Import(t.Context(), "small", bytes.NewReader(small), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	free := freeBlocks(t, inside)

	big := filepath.Join(home, "big")
	if err := os.WriteFile(big, content(40<<20, 2), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, stderr, code := d.run(t, nil, "import", "-t", "t", "-i", "big", big)
		if code != 7 || !strings.Contains(stderr, "no space left") || !strings.Contains(stderr, "free some space") {
			t.Errorf("import of a file that does not fit: exit code %d, %s", code, stderr)
		}
		f, err := os.Open(big)
		if err != nil {
			t.Fatal(err)
		}
		// A pipe goes another way through the daemon than a file does.
		_, err = r.Import(t.Context(), "big", io.MultiReader(f), blobstore.ImportOptions{})
		f.Close()
		if !errors.Is(err, blobstore.ErrNoSpace) {
			t.Errorf("import of a stream that does not fit: %v", err)
		}
		requireNoIngest(t, inside)
		if now := freeBlocks(t, inside); now != free {
			t.Errorf("%d blocks are free, %d were before", now, free)
		}
	}

	// Until not even the metadata has room.
	stored := map[string][]byte{}
	for i := 0; ; i++ {
		name, small := fmt.Sprintf("s%d", i), content(100_000, uint64(100+i))
		_, err := r.Import(t.Context(), name, bytes.NewReader(small), blobstore.ImportOptions{})
		if errors.Is(err, blobstore.ErrNoSpace) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		stored[name] = small
	}
	requireNoIngest(t, inside)
	for name, want := range stored {
		var out bytes.Buffer
		if _, err := r.Export(t.Context(), name, &out, blobstore.ExportOptions{}); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name := range stored {
		if _, err := r.Remove(t.Context(), name, blobstore.DeleteOptions{}); err != nil {
			t.Fatalf("delete when the disk is full: %v", err)
		}
	}
	if _, err := r.Import(t.Context(), "after", bytes.NewReader(content(10<<20, 3)), blobstore.ImportOptions{}); err != nil {
		t.Errorf("import after space was freed: %v", err)
	}
}

// onSmallDisk returns a command that runs a daemon with a file system of 16 MiB mounted
// at dir, where only the daemon sees it. It goes when the daemon does.
func onSmallDisk(dir string) []string {
	mount := fmt.Sprintf(`mount -t tmpfs -o size=16m,mode=750 none %s && exec "$0" "$@"`, dir)
	if os.Geteuid() != 0 {
		return []string{"unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount}
	}
	return []string{"unshare", "--mount", "sh", "-c", mount}
}

func freeBlocks(t *testing.T, path string) uint64 {
	t.Helper()
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		t.Fatal(err)
	}
	return s.Bfree
}

// TestOutputDiskFull exports to a file system that is too small: a clear error,
// and no file.
func TestOutputDiskFull(t *testing.T) {
	home := tempHome(t)
	d := startDaemon(t, home)
	store := d.dial(t)
	defer store.Close()
	if _, err := repository(t, store, "").Import(t.Context(), "big", bytes.NewReader(content(8<<20, 1)), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(home, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`mount -t tmpfs -o size=2m none %s || exit 99
"$0" "$@"; code=$?; ls -A %s; exit $code`, out, out)
	wrap := []string{"unshare", "--mount", "sh", "-c", script}
	if os.Geteuid() != 0 {
		wrap = []string{"unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script}
	}
	stdout, stderr, code := d.runWrapped(t, wrap, nil, "export", "-i", "big", filepath.Join(out, "file"))
	if code != 7 || !strings.Contains(stderr, "no space left") || stdout != "" {
		t.Errorf("export to a full disk: exit code %d, stderr %q, and these files: %q", code, stderr, stdout)
	}
}
