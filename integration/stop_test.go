package integration

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dfcache/dfcache/blobstore/client"
)

// TestStopLetsImportEnd: a daemon that is asked to stop while dfcache imports
// from a pipe takes the rest in, and dfcache says that all is well.
func TestStopLetsImportEnd(t *testing.T) {
	home := tempHome(t)
	d := startDaemon(t, home)
	cmd := exec.Command(dfcache, "import", "-i", "v1", "-", "--daemon-sock", d.socket, "--workhome", home,
		"--config", os.DevNull)
	var stderr strings.Builder
	cmd.Env, cmd.Stderr = environ(home), &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "hello, "); err != nil {
		t.Fatal(err)
	}
	within(t, "the import is under way", func() bool {
		taken, _ := os.ReadDir(filepath.Join(home, "data", "ingest"))
		return len(taken) > 0
	})
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	within(t, "the daemon takes no more calls", func() bool {
		store, err := client.Dial(t.Context(), d.socket)
		if err == nil {
			store.Close()
		}
		return err != nil
	})
	if _, err := io.WriteString(stdin, "world"); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("dfcache import: %v: %s", err, stderr.String())
	}
	if err := d.cmd.Wait(); err != nil {
		t.Errorf("dfdaemon ends with %v", err)
	}

	d = startDaemon(t, home)
	if out, errs, code := d.run(t, nil, "export", "-i", "v1", "-"); out != "hello, world" || code != 0 {
		t.Errorf("export after that: %q, exit code %d, %s", out, code, errs)
	}
}

// within polls until what holds is true. It is for states that nothing signals.
func within(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it does not become true that %s", what)
		}
	}
}
