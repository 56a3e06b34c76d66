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
	if testing.Short() {
		t.Skip("-short: needs a mount namespace")
	}
	home := tempHome(t)
	data := filepath.Join(home, "data")
	if err := os.Mkdir(data, 0o750); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, home, onSmallDisk(data, 16)...)
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
		if _, err := r.Export(t.Context(), name, &out, blobstore.ExportOptions{}); err != nil ||
			!bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	fill(t, filepath.Join(inside, "something else"))
	for name := range stored {
		if _, err := r.Remove(t.Context(), name, blobstore.DeleteOptions{}); err != nil {
			t.Fatalf("delete when the disk is full: %v", err)
		}
	}
	if err := os.Remove(filepath.Join(inside, "something else")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Import(t.Context(), "after", bytes.NewReader(content(10<<20, 3)),
		blobstore.ImportOptions{}); err != nil {
		t.Errorf("import after space was freed: %v", err)
	}
}

// TestDeleteOnFullDisk deletes on a disk that is full to the last byte, and stays so. In a swarm a
// delete is remembered, too.
func TestDeleteOnFullDisk(t *testing.T) {
	l := newLAN(t, 1)
	h := l.hosts[0]
	data := filepath.Join(h.home, "data")
	if err := os.Mkdir(data, 0o750); err != nil {
		t.Fatal(err)
	}
	h.daemon = startDaemonWith(t, h.home, []string{"--swarm-key", l.key}, append(h.in(), onSmallDisk(data, 16)...)...)
	inside := filepath.Join("/proc", fmt.Sprint(h.cmd.Process.Pid), "root", data)
	store := h.dial(t)
	defer store.Close()
	r := repository(t, store, strings.Repeat("a-long-tag/", 20)+"t")
	const n = 40
	for i := range n {
		if _, err := r.Import(t.Context(), fmt.Sprint(i), bytes.NewReader(content(1000, uint64(i))),
			blobstore.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		fill(t, filepath.Join(inside, fmt.Sprint("something else ", i)))
		if _, err := r.Remove(t.Context(), fmt.Sprint(i), blobstore.DeleteOptions{}); err != nil {
			t.Fatalf("delete %d: %v", i, err)
		}
	}
}

// TestFetchDoesNotFit has a host with a small disk fetch a file from another one that does not
// fit there: it is refused before it begins, and costs nothing. What has arrived of others makes room.
func TestFetchDoesNotFit(t *testing.T) {
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.start("--upload-rate", "10MiB")
	data := filepath.Join(b.home, "data")
	if err := os.Mkdir(data, 0o750); err != nil {
		t.Fatal(err)
	}
	b.daemon = startDaemonWith(t, b.home, []string{"--swarm-key", l.key}, append(b.in(), onSmallDisk(data, 64)...)...)
	l.meet(1)
	inside := filepath.Join("/proc", fmt.Sprint(b.cmd.Process.Pid), "root", data)
	free := freeBlocks(t, inside)

	name, _, cid := l.file(100<<20, 1)
	a.ok("import", "-i", cid, name)
	code, says := b.fails("export", "-O", filepath.Join(b.home, "out"), "-i", cid)
	if code != 7 || !strings.Contains(says, "bytes free") {
		t.Errorf("export of what does not fit: exit status %d: %s", code, says)
	}
	if left, err := os.ReadDir(filepath.Join(inside, "partial")); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if now := freeBlocks(t, inside); now+256 < free { // the metadata may have grown
		t.Errorf("%d blocks are free, %d were before", now, free)
	}

	// What somebody has given up to fetch is seen, and in nobody's way.
	name, _, cid = l.file(40<<20, 2)
	a.ok("import", "-i", cid, name)
	if code, says := b.fails("export", "--timeout", "3s", "-O", filepath.Join(b.home, "out"), "-i", cid); code != 5 {
		t.Errorf("export that is given up: exit status %d: %s", code, says)
	}
	for !strings.Contains(b.ok("list"), "partial ") {
		if l.late() {
			t.Fatal("what has arrived is not listed")
		}
	}
	name, _, own := l.file(45<<20, 3)
	b.ok("import", "-i", own, name)
	fill(t, filepath.Join(inside, "something else"))
	b.ok("delete", "-i", own)
}

// fill writes a file until the disk is full.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// onSmallDisk returns a command that runs a daemon with a file system of so many MiB mounted
// at dir, where only the daemon sees it. It goes when the daemon does.
func onSmallDisk(dir string, size int) []string {
	mount := fmt.Sprintf(`mount -t tmpfs -o size=%dm,mode=750 none %s && exec "$0" "$@"`, size, dir)
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
	if testing.Short() {
		t.Skip("-short: needs a mount namespace")
	}
	home := tempHome(t)
	d := startDaemon(t, home)
	store := d.dial(t)
	defer store.Close()
	if _, err := repository(t, store, "").Import(t.Context(), "big", bytes.NewReader(content(8<<20, 1)),
		blobstore.ImportOptions{}); err != nil {
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
