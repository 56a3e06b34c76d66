package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDeadMount: what is to be put where a file system has died fails because of that. It is
// not taken for an output that exists.
func TestDeadMount(t *testing.T) {
	needRoot(t)
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal("needs FUSE, which a container may lack: ", err)
	}
	home, dead := t.TempDir(), filepath.Join(t.TempDir(), "dead")
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, home)
	if _, stderr, code := d.run(t, strings.NewReader("data"), "import", "-i", "v1", "-"); code != 0 {
		t.Fatal(stderr)
	}
	if err := unix.Mount("dead", dead, "fuse", 0,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dead, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	fuse.Close()
	const says = "transport endpoint is not connected"
	for _, at := range []string{dead, filepath.Join(dead, "sub"), filepath.Join(dead, "sub", "more")} {
		for _, args := range [][]string{{"export", "-i", "v1", at}, {"export", "-i", "v1", "--overwrite", at}} {
			if _, stderr, code := d.run(t, nil, args...); code != 1 || !strings.Contains(stderr, says) {
				t.Errorf("dfcache %s: exit %d, %s", strings.Join(args, " "), code, stderr)
			}
		}
		for _, args := range [][]string{
			{"--data-dir", at}, {"--workhome", at}, {"fsck", "--data-dir", at},
			{"swarm", "key", "new", filepath.Join(at, "key")},
		} {
			cmd := exec.Command(dfdaemon, append(args, "--config", os.DevNull)...)
			if args[0] != "fsck" && args[0] != "swarm" {
				cmd.Args = append(cmd.Args, "--daemon-sock", filepath.Join(home, "second", "s"))
			}
			cmd.Env = environ(home)
			out, _ := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(string(out), says) {
				t.Errorf("dfdaemon %s: exit %d, %s", strings.Join(args, " "), code, out)
			}
		}
	}
}
