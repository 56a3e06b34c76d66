package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/blobstore"
)

// powerless is a file system of its own in a file, mounted where only this test sees it, of
// which the power can be cut.
type powerless struct {
	t     *testing.T
	image string
	shell io.Writer     // of the mount namespace
	said  *bufio.Reader // what it prints
	at    string        // where it is mounted
	dir   string        // the same, seen from here
	enter []string      // a command that runs another one where it is mounted
}

// newDisk makes a file system of a kind, "ext4" or "xfs", and mounts it. It needs root.
func newDisk(t *testing.T, kind string) *powerless {
	t.Helper()
	image := newImage(t, kind)
	d := newMount(t)
	d.image = image
	d.mount()
	return d
}

// newImage makes a file with an empty file system of a kind, "ext4", "xfs" or "btrfs".
func newImage(t *testing.T, kind string) (image string) {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Fatal("needs loop devices, which a container may lack: ", err)
	}
	image = filepath.Join(t.TempDir(), "image")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(imageSize); err != nil { // mostly holes; xfs wants 300 MiB
		t.Fatal(err)
	}
	f.Close()
	if out, err := exec.Command("mkfs."+kind, "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v\n%s", kind, err, out)
	}
	return image
}

const imageSize = 512 << 20

// newMount makes a mount namespace, in which an image can be mounted.
func newMount(t *testing.T) *powerless {
	t.Helper()
	d := &powerless{t: t}
	ctx, cancel := context.WithCancel(context.Background())
	at := t.TempDir()
	shell := exec.CommandContext(ctx, "unshare", "--mount", "sh")
	shell.Stderr = os.Stderr
	in, err := shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the mount ends with the shell
		cancel()
		shell.Wait()
	})
	d.shell, d.said = in, bufio.NewReader(out)
	pid := shell.Process.Pid
	d.at, d.dir = at, fmt.Sprintf("/proc/%d/root%s", pid, at)
	d.enter = []string{"nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", pid)}
	return d
}

// run runs a command where the file system is mounted.
func (d *powerless) run(command string) {
	d.t.Helper()
	fmt.Fprintf(d.shell, "%s && echo done || echo failed\n", command)
	if line, err := d.said.ReadString('\n'); line != "done\n" {
		d.t.Fatalf("%s: %q, %v", command, line, err)
	}
}

func (d *powerless) mount() { d.run(fmt.Sprintf("mount -o loop %s %s", d.image, d.at)) }

func (d *powerless) unmount() { d.run("umount " + d.at) }

// cutPower drops what the disk has not got, and mounts what it has again.
func (d *powerless) cutPower() {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, without a flush of the log.
	const shutdown, noLogFlush = 0x8004587d, 2
	err = unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush)
	f.Close()
	if err != nil {
		d.t.Fatalf("cut the power: %v", err)
	}
	d.unmount()
	d.mount()
}

// TestExportSurvivesPowerCut: what an export has acknowledged is there after a
// power cut, whatever file system it went to, and what it replaced is not lost
// where it had not come so far.
func TestExportSurvivesPowerCut(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			disk := newDisk(t, kind)
			d := startDaemon(t, t.TempDir())
			data := bytes.Repeat([]byte("some content\n"), 100_000)
			if _, stderr, code := d.run(t, bytes.NewReader(data), "import", "-i", "v1", "-"); code != 0 {
				t.Fatal(stderr)
			}
			export := func(name string, flags ...string) {
				t.Helper()
				args := append([]string{"export", "-i", "v1", filepath.Join(disk.at, name)}, flags...)
				if _, stderr, code := d.runWrapped(t, disk.enter, nil, args...); code != 0 {
					t.Fatal(stderr)
				}
			}

			old := filepath.Join(disk.dir, "old")
			if err := os.WriteFile(old, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			disk.run("sync")
			for _, name := range []string{"new", "old"} {
				export(name, "--overwrite")
				disk.cutPower()
				if got, err := os.ReadFile(filepath.Join(disk.dir, name)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("export %s: after a power cut the file has %d bytes, %v", name, len(got), err)
				}
			}
			// That this cuts the power is shown by what was not synced.
			export("unsynced", "--no-sync")
			disk.cutPower()
			if got, err := os.ReadFile(filepath.Join(disk.dir, "unsynced")); err == nil && bytes.Equal(got, data) {
				t.Error("the power cut has cut nothing")
			}
		})
	}
}

// TestAcknowledgedSurvivesPowerCut cuts the power as soon as an import, a push or a delete is
// acknowledged: it has happened, and all before it.
func TestAcknowledgedSurvivesPowerCut(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			disk := newDisk(t, kind)
			home, data := tempHome(t), filepath.Join(disk.at, "data")
			start := func() (*daemon, *blobstore.Store, *blobstore.Repository) {
				d := startDaemonWith(t, home, []string{"--data-dir", data}, disk.enter...)
				store := d.dial(t)
				return d, store, repository(t, store, "t")
			}
			d, store, r := start()
			importAs := func(name string, data []byte) error {
				_, err := r.Import(t.Context(), name, bytes.NewReader(data), blobstore.ImportOptions{})
				return err
			}
			remove := func(name string) error {
				_, err := r.Remove(t.Context(), name, blobstore.DeleteOptions{})
				return err
			}
			there := map[string][]byte{}
			for i := range 3 {
				// The metadata has pages of its own to write to: to sync them takes nothing else to the disk.
				for n := range 8 {
					warm := fmt.Sprintf("warm%d.%d", i, n)
					if err := errors.Join(importAs(warm, content(100, uint64(1000*i+n))), remove(warm)); err != nil {
						t.Fatal(err)
					}
				}
				name, own := fmt.Sprint("v", i), content(70_000, uint64(i))
				there[name] = own
				var err error
				switch i {
				case 0:
					err = importAs(name, own)
				case 1:
					err = push(d.host, "t", name, own)
				default:
					err = errors.Join(importAs(name, own), remove(name))
					there[name] = nil
				}
				if err != nil {
					t.Fatal(err)
				}
				d.stop(t, syscall.SIGKILL)
				store.Close()
				disk.cutPower()
				d, store, r = start()
				for name, want := range there {
					got, err := readWhole(t.Context(), r, name)
					if errors.Is(err, blobstore.ErrNotFound) && want == nil {
						continue
					}
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("after power cut %d: %s has %d bytes, want %d (%v)", i, name, len(got), len(want), err)
					}
				}
			}
			store.Close()
			d.stop(t, syscall.SIGTERM)
			fsck := exec.Command(disk.enter[0],
				append(disk.enter[1:], dfdaemon, "fsck", "--data-dir", data, "--config", os.DevNull)...)
			fsck.Env = environ(home)
			if out, err := fsck.CombinedOutput(); err != nil {
				t.Errorf("fsck: %v\n%s", err, out)
			}
		})
	}
}

// TestDiskFails: a disk that can't be written to any more is told as that, and not as a daemon that does not
// answer.
func TestDiskFails(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: needs a mount namespace")
	}
	home, disk := tempHome(t), newDisk(t, "ext4")
	d := startDaemonWith(t, home, []string{"--data-dir", filepath.Join(disk.at, "data")}, disk.enter...)
	file := filepath.Join(home, "file")
	if err := os.WriteFile(file, content(1<<20, 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := d.run(t, nil, "import", "-i", "v1", file); code != 0 {
		t.Fatalf("import: exit code %d, %s", code, stderr)
	}
	// What the kernel does where it finds ext4 damaged.
	disk.run("mount -o remount,errors=remount-ro " + disk.at)
	var stat unix.Stat_t
	if err := unix.Stat(disk.dir, &stat); err != nil {
		t.Fatal(err)
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev)))
	if err == nil {
		err = os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "trigger_fs_error"), []byte("test"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, stderr, code := d.run(t, nil, "import", "-i", "v2", file)
	if code != 1 || !strings.Contains(stderr, "mounted read-only") || !strings.Contains(stderr, "dmesg") {
		t.Errorf("import: exit code %d, %s", code, stderr)
	}
	_, stderr, code = d.run(t, nil, "delete", "-i", "v1")
	if code != 1 || !strings.Contains(stderr, "the store has failed") || !strings.Contains(stderr, "look at the disk") {
		t.Errorf("delete: exit code %d, %s", code, stderr)
	}
	if err := d.cmd.Wait(); d.cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("dfdaemon ends with %v", err)
	}
}
