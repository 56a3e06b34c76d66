package main

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

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// running is a dfdaemon.
type running struct {
	t        *testing.T
	home     string
	socket   string
	registry string // its URL, or off
	cmd      *exec.Cmd
	console  *bufio.Scanner // log records
	stderr   bytes.Buffer
}

// launch starts a dfdaemon.
func launch(t *testing.T, args ...string) *running {
	t.Helper()
	// The name of a test's own directory can be too long for a socket.
	home := t.TempDir()
	r := &running{t: t, home: home, socket: filepath.Join(home, "r", "d.sock")}
	r.cmd = exec.Command("dfdaemon", append(
		[]string{"--workhome", home, "--daemon-sock", r.socket, "--console"}, args...)...)
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = &r.stderr
	// A test that runs into its timeout cleans nothing up.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if r.cmd.ProcessState == nil {
			r.cmd.Process.Kill()
			r.cmd.Wait()
		}
	})
	r.console = bufio.NewScanner(stdout)
	_, record, _ := strings.Cut(r.waitLog("msg=start"), " registry=")
	r.registry, _, _ = strings.Cut(record, " ")
	return r
}

// importing is a dfdaemon with an import under way.
type importing struct {
	*running
	client  *rpc.Client
	ingest  p2p.Ingest
	content *io.PipeWriter // of the import
	added   chan error     // the result of the import's Add
}

func start(t *testing.T, args ...string) *importing {
	t.Helper()
	r := &importing{running: launch(t, args...), added: make(chan error, 1)}
	var err error
	if r.client, err = rpc.Dial(t.Context(), r.socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.client.Close() })
	if r.ingest, err = r.client.Ingest(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.ingest.Close() })
	content, w := io.Pipe()
	r.content = w
	begun := make(chan struct{})
	go func() {
		_, err := r.ingest.Add(io.TeeReader(content, closer(begun)), p2p.AddOptions{})
		content.CloseWithError(err) // so that a writer does not wait for a reader
		r.added <- err
	}()
	t.Cleanup(func() { w.CloseWithError(errors.New("the test is over")) })
	if _, err := io.WriteString(w, "first, "); err != nil {
		t.Fatal(err)
	}
	<-begun
	return r
}

// closer closes itself with the first write.
type closer chan struct{}

func (c closer) Write(p []byte) (int, error) {
	select {
	case <-c:
	default:
		close(c)
	}
	return len(p), nil
}

// waitLog reads the log until a record has the text, and returns the record.
func (r *running) waitLog(text string) string {
	r.t.Helper()
	for r.console.Scan() {
		if strings.Contains(r.console.Text(), text) {
			return r.console.Text()
		}
	}
	r.t.Fatalf("%q was not logged: %v\n%s", text, r.console.Err(), &r.stderr)
	return ""
}

func (r *running) signal() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		r.t.Fatal(err)
	}
}

// wantExit waits for the end of the daemon and checks its exit code.
func (r *running) wantExit(want int) {
	r.t.Helper()
	for r.console.Scan() { // until the daemon closes it
	}
	r.cmd.Wait()
	if got := r.cmd.ProcessState.ExitCode(); got != want {
		r.t.Errorf("exit code is %d, want %d\n%s", got, want, &r.stderr)
	}
}

// wantFailedImport checks that the import did not outlive the daemon.
func (r *importing) wantFailedImport() {
	r.t.Helper()
	r.content.CloseWithError(errors.New("the test is over"))
	if err := <-r.added; err == nil {
		r.t.Error("the import did not fail")
	}
}

// An import that is running when the daemon is told to stop is let end.
func TestGracefulStop(t *testing.T) {
	r := start(t)
	r.signal()
	r.waitLog("msg=stop ")

	if _, err := io.WriteString(r.content, "second"); err != nil {
		t.Fatal(err)
	}
	r.content.Close()
	if err := <-r.added; err != nil {
		t.Fatal(err)
	}
	const want = "first, second"
	task := p2p.Task{Digest: digest.SHA256.FromBytes([]byte(want))}
	if err := r.ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}}); err != nil {
		t.Fatal(err)
	}
	r.ingest.Close()
	r.client.Close()
	r.wantExit(0)

	r.wantStored(len(want))
}

// wantStored checks, after the daemon's end, how many bytes it has, that they
// are sound, and that nothing else is left.
func (r *running) wantStored(size int) {
	r.t.Helper()
	out, err := exec.Command("dfdaemon", "fsck", "--workhome", r.home, "--format", "json").CombinedOutput()
	if err != nil || !strings.Contains(string(out), fmt.Sprintf(`"bytes": %d,`, size)) {
		r.t.Errorf("want %d bytes: %v\n%s", size, err, out)
	}
	left, err := os.ReadDir(filepath.Join(paths.DataDir(r.home), "ingest"))
	if err != nil || len(left) > 0 {
		r.t.Errorf("ingest has %v, %v", left, err)
	}
}

// A second signal does not wait.
func TestSecondSignal(t *testing.T) {
	r := start(t, "--shutdown-timeout", "0")
	r.signal()
	r.waitLog("msg=stop ")
	r.signal()
	r.wantExit(130)
	r.wantFailedImport()
	if !strings.Contains(r.stderr.String(), "operations that were running were cut off") {
		t.Errorf("stderr: %s", &r.stderr)
	}
}

func TestShutdownTimeout(t *testing.T) {
	r := start(t, "--shutdown-timeout", "10ms")
	r.signal()
	r.wantExit(5)
	r.wantFailedImport()
}

// A check that is interrupted says so, and not that everything is well.
func TestInterruptedFsck(t *testing.T) {
	home := t.TempDir()
	store, err := pieces.Open(paths.DataDir(home), pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetArgs([]string{"fsck", "--workhome", home})
	if err := root.ExecuteContext(ctx); exit.Code(err) != exit.Interrupted || out.Len() > 0 {
		t.Errorf("%v, exit code %d, output %q", err, exit.Code(err), &out)
	}
}
