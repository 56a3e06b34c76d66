package script

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// grace is how long a daemon may take to be ready, and to end after a signal.
// It is only there to end a test that would hang.
const grace = 30 * time.Second

// readyMessage is what a daemon says when it serves, by rpc.Ready.
const readyMessage = "ready\n"

type daemonKey struct{}

// daemon is the daemon of one script.
type daemon struct {
	t    testing.TB
	work string
	// Of the daemon that runs; nil where none does.
	cmd *exec.Cmd
}

// output returns the name of the file that the daemon's output goes to. It is
// no pipe, so that what the daemon wrote before it said that it is ready is
// there by then.
func (d *daemon) output(name string) string { return filepath.Join(d.work, ".tmp", "daemon."+name) }

func of(ts *testscript.TestScript) *daemon { return ts.Value(daemonKey{}).(*daemon) }

func daemonCmd(ts *testscript.TestScript, neg bool, args []string) {
	d := of(ts)
	if d.cmd != nil {
		ts.Fatalf("a daemon is running already")
	}
	err := d.start(ts, args)
	d.show(ts)
	_, address, _ := strings.Cut(d.registry(ts), "://")
	ts.Setenv("REGISTRY", address)
	finish(ts, neg, err)
}

func stopDaemonCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) <= 1, "stopdaemon [SIGNAL]")
	signal := "TERM"
	if len(args) == 1 {
		signal = args[0]
	}
	number := unix.SignalNum("SIG" + strings.TrimPrefix(signal, "SIG"))
	if number == 0 {
		ts.Fatalf("unknown signal %q", signal)
	}
	d := of(ts)
	if d.cmd == nil {
		ts.Fatalf("no daemon is running")
	}
	err := d.stop(number)
	d.show(ts)
	ts.Check(err)
}

func killDaemonCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 0, "killdaemon")
	d := of(ts)
	if d.cmd == nil {
		ts.Fatalf("no daemon is running")
	}
	d.stop(syscall.SIGKILL) // the error is the signal
	d.show(ts)
}

// start starts a daemon and waits until it is ready or has failed.
func (d *daemon) start(ts *testscript.TestScript, args []string) error {
	ready, childReady, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer childReady.Close()

	cmd := exec.Command(filepath.Join(bin, "dfdaemon"), append([]string{
		"--workhome", filepath.Join(d.work, "home"),
		"--daemon-sock", ts.Getenv("SOCK"),
		"--ready-fd", "3",
	}, args...)...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = environ(ts)
	cmd.ExtraFiles = []*os.File{childReady}
	// A test that runs into its timeout cleans nothing up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	for name, w := range map[string]*io.Writer{"stdout": &cmd.Stdout, "stderr": &cmd.Stderr} {
		f, err := os.Create(d.output(name))
		if err != nil {
			return err
		}
		defer f.Close()
		*w = f
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	d.cmd = cmd
	childReady.Close() // so that the daemon's end is the only one

	// The daemon closes the pipe when it knows whether it could start.
	ready.SetReadDeadline(time.Now().Add(grace))
	message, err := io.ReadAll(ready)
	if err == nil && string(message) == readyMessage {
		return nil
	}
	signal := syscall.SIGTERM
	if err == nil {
		signal = 0 // it ends by itself, after it has said why on stderr
	}
	return errors.Join(fmt.Errorf("daemon is not ready: %q", message), err, d.stop(signal))
}

// stop sends a signal and waits until the daemon has ended.
func (d *daemon) stop(signal syscall.Signal) error {
	cmd := d.cmd
	d.cmd = nil
	cmd.Process.Signal(signal) // it may have ended already
	kill := time.AfterFunc(grace, func() { cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("dfdaemon: %w", err)
	}
	return nil
}

// show makes the daemon's output that of the current script command.
func (d *daemon) show(ts *testscript.TestScript) {
	stdout, stderr := ts.ReadFile(d.output("stdout")), ts.ReadFile(d.output("stderr"))
	io.WriteString(ts.Stdout(), stdout)
	io.WriteString(ts.Stderr(), stderr)
}

// cleanup stops every daemon that the script has left.
func (d *daemon) cleanup() {
	if d.cmd != nil {
		if err := d.stop(syscall.SIGTERM); err != nil {
			stderr, _ := os.ReadFile(d.output("stderr"))
			d.t.Errorf("%v\n%s", err, stderr)
		}
	}
	for _, pid := range strays(d.work) {
		d.t.Errorf("the script left a dfdaemon behind, pid %d", pid)
		stopPID(pid)
	}
}

// environ returns the environment of the script's commands.
func environ(ts *testscript.TestScript) []string {
	file := filepath.Join(ts.Getenv("WORK"), ".tmp", "environ")
	ts.Check(ts.Exec("sh", "-c", `env -0 >"$0"`, file))
	return strings.Split(strings.TrimSuffix(ts.ReadFile(file), "\x00"), "\x00")
}

var pidPattern = regexp.MustCompile(`\bpid[ =:]+(\d+)`)

func killStartedCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 1, "killstarted FILE")
	match := pidPattern.FindStringSubmatch(ts.ReadFile(args[0]))
	if match == nil {
		ts.Fatalf("no pid in %s", args[0])
	}
	pid, err := strconv.Atoi(match[1])
	ts.Check(err)
	// The number comes out of some text: don't end what is none of ours.
	if !isOurs(pid, of(ts).work) {
		ts.Fatalf("pid %d is not a dfdaemon of this script", pid)
	}
	ts.Check(stopPID(pid))
}

// stopPID sends SIGTERM to a process, which need not be a child, and waits until
// it has ended.
func stopPID(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pid %d: %w", pid, err)
	}
	defer unix.Close(fd)
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil {
			return fmt.Errorf("pid %d: %w", pid, err)
		}
		ended, err := waitFor(fd)
		if err != nil || ended {
			return err
		}
	}
	return fmt.Errorf("pid %d does not end", pid)
}

// waitFor reports whether the process ended before the time of grace was over.
func waitFor(pidfd int) (bool, error) {
	deadline := time.Now().Add(grace)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}},
			max(0, int(time.Until(deadline).Milliseconds())))
		if err == unix.EINTR {
			continue
		}
		return n > 0, err
	}
}

// strays returns the daemons that run in the environment of the script.
func strays(work string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && isOurs(pid, work) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func isOurs(pid int, work string) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	if exe, err := os.Readlink(filepath.Join(dir, "exe")); err != nil || exe != filepath.Join(bin, "dfdaemon") {
		return false
	}
	env, err := os.ReadFile(filepath.Join(dir, "environ"))
	return err == nil && bytes.Contains(append([]byte{0}, env...), []byte("\x00WORK="+work+"\x00"))
}
