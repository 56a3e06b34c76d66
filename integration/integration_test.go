package integration

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
)

// The programs under test.
var dfcache, dfdaemon string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "dfcache-it-")
	if err != nil {
		log.Fatal(err)
	}
	args := []string{"build", "-o", dir}
	if raceEnabled {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "../cmd/dfcache", "../cmd/dfdaemon")...)
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		log.Fatalf("build the programs: %v", err)
	}
	dfcache, dfdaemon = filepath.Join(dir, "dfcache"), filepath.Join(dir, "dfdaemon")
	code := m.Run()
	for _, process := range running(dfdaemon) {
		log.Printf("%s runs still: its test has not ended it", process)
		code = 1
	}
	os.RemoveAll(dir)
	if err := goleak.Find(); err != nil && code == 0 {
		log.Print(err)
		code = 1
	}
	os.Exit(code)
}

// running returns the processes, as directories in /proc, that run a program.
func running(program string) (processes []string) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe") // fails for a bad pattern only
	for _, link := range links {
		if exe, err := os.Readlink(link); err == nil && exe == program {
			processes = append(processes, filepath.Dir(link))
		}
	}
	return processes
}

// quickExit keeps programs with the race detector from sleeping for a second
// when they end.
const quickExit = "GORACE=atexit_sleep_ms=10"

// environ is the environment of every program under test: nothing of the
// tester's own settings.
func environ(home string) []string {
	env := []string{"HOME=" + home, "XDG_RUNTIME_DIR=" + home, "DFDAEMON_REGISTRY=127.0.0.1:0", quickExit}
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "DFCACHE_") || strings.HasPrefix(name, "DFDAEMON_") ||
			strings.HasPrefix(name, "OTEL_") || strings.HasPrefix(name, "XDG_") || name == "HOME" {
			continue
		}
		env = append(env, v)
	}
	return env
}

// daemon is a dfdaemon of a test's own.
type daemon struct {
	cmd    *exec.Cmd
	home   string // has everything: home/data, home/logs, home/run/s
	socket string
	says   string // what it prints when it starts
	host   string // of its registry: localhost and the port
}

// startDaemon starts a dfdaemon with everything below home and waits until it
// serves. wrap, where it is not empty, is a command that runs it.
func startDaemon(t *testing.T, home string, wrap ...string) *daemon {
	t.Helper()
	return startDaemonWith(t, home, nil, wrap...)
}

// startDaemonWith is startDaemon with further flags of the daemon. It ends with the test.
func startDaemonWith(t *testing.T, home string, flags []string, wrap ...string) *daemon {
	t.Helper()
	d := &daemon{home: home, socket: filepath.Join(home, "run", "s")}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// It prints to a file, which has all of it when the daemon is ready.
	stderr, err := os.Create(filepath.Join(home, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	args := slices.Concat(wrap, []string{
		dfdaemon, "--workhome", home, "--daemon-sock", d.socket, "--config", os.DevNull, "--ready-fd", "3"}, flags)
	d.cmd = exec.Command(args[0], args[1:]...)
	d.cmd.Env, d.cmd.ExtraFiles, d.cmd.Stderr = environ(home), []*os.File{w}, stderr
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	line, readErr := bufio.NewReader(r).ReadString('\n')
	said, err := os.ReadFile(stderr.Name())
	if strings.TrimSpace(line) != "ready" || err != nil {
		d.cmd.Process.Kill()
		d.cmd.Wait()
		t.Fatalf("dfdaemon did not start: %q, %v, %v\n%s", line, readErr, err, said)
	}
	d.says = string(said)
	if at := regexp.MustCompile(`, registry https?://[^ ]+:(\d+),`).FindStringSubmatch(d.says); at != nil {
		d.host = "localhost:" + at[1]
	}
	t.Cleanup(func() { d.stop(t, syscall.SIGTERM) })
	return d
}

// stop ends the daemon and waits for it.
func (d *daemon) stop(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if d.cmd.ProcessState != nil {
		return
	}
	if err := d.cmd.Process.Signal(sig); err != nil {
		t.Errorf("signal dfdaemon: %v", err)
	}
	err := d.cmd.Wait()
	said, readErr := os.ReadFile(filepath.Join(d.home, "stderr"))
	if sig == syscall.SIGTERM && err != nil {
		t.Errorf("dfdaemon ends with %v", err)
	}
	if more := strings.TrimPrefix(string(said), d.says); more != "" || readErr != nil {
		t.Errorf("dfdaemon printed %s %v", more, readErr)
	}
}

// needRoot ends a test that needs root: it is skipped with -short, and fails without root.
func needRoot(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs root")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: run the tests as .ci/run does, or with -short")
	}
}

func (d *daemon) dial(t *testing.T) *blobstore.Store {
	t.Helper()
	store, err := client.Dial(context.Background(), d.socket)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func repository(t *testing.T, s *blobstore.Store, tag string) *blobstore.Repository {
	t.Helper()
	r, err := s.Repository(tag)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// run runs dfcache against the daemon and returns its output and exit code.
func (d *daemon) run(t *testing.T, stdin io.Reader, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return d.runWrapped(t, nil, stdin, args...)
}

// runWrapped is run with a command that runs dfcache.
func (d *daemon) runWrapped(
	t *testing.T, wrap []string, stdin io.Reader, args ...string,
) (stdout, stderr string, code int) {
	t.Helper()
	args = slices.Concat(wrap, []string{dfcache}, args,
		[]string{"--daemon-sock", d.socket, "--workhome", d.home, "--config", os.DevNull})
	cmd := exec.Command(args[0], args[1:]...)
	var out, errs strings.Builder
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ(d.home), stdin, &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatalf("dfcache %s: %v", strings.Join(args, " "), err)
	} else if ok {
		code = exit.ExitCode()
	}
	return out.String(), errs.String(), code
}

// requireFsck fails the test unless `dfdaemon fsck` finds nothing wrong. No
// daemon may run.
func requireFsck(t *testing.T, home string) {
	t.Helper()
	cmd := exec.Command(dfdaemon, "fsck", "--workhome", home, "--config", os.DevNull)
	cmd.Env = environ(home)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("fsck: %v\n%s", err, out)
	}
}

// requireNoIngest fails the test if something is left of an import.
func requireNoIngest(t *testing.T, data string) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(data, "ingest"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("ingest/ has %s", e.Name())
	}
}

func content(n int, seed uint64) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(data)
	return data
}

func tempHome(t *testing.T) string {
	t.Helper()
	// t.TempDir has the test's name in it, and the path of a socket has to be short.
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
	return dir
}
