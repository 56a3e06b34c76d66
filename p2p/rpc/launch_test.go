package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p"
)

// testDaemon is what the test binary is when a test launches it: a daemon that
// does what mode says.
func testDaemon(mode string) int {
	socket := os.Args[1]
	at := slices.Index(os.Args, "--ready-fd")
	fd, err := strconv.Atoi(os.Args[at+1])
	if at < 0 || err != nil {
		return 3
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	switch mode {
	case "fails":
		Ready(fd, nil, errors.New("data directory /x is locked by process 17"))
		return 1
	case "dies":
		fmt.Fprintln(os.Stderr, "panic: at the disco")
		return 2
	case "hangs":
		<-stop
		os.WriteFile(socket+".stopped", nil, 0o600)
		return 0
	}
	l, err := Listen(socket)
	if err != nil {
		Ready(fd, nil, err)
		return 1
	}
	wd, _ := os.Getwd()
	fmt.Printf("dir %s, session of its own %t\n", wd, sessionOfItsOwn())
	s := NewServer(newStore(os.TempDir()), slog.New(slog.NewTextHandler(io.Discard, nil)))
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	Ready(fd, &Launched{Door: "registry nowhere", Warnings: []string{"it is a test"}}, nil)
	<-stop
	s.Shutdown(context.Background())
	<-served // with the socket's file, even where it had not begun
	return 0
}

func sessionOfItsOwn() bool {
	sid, _, _ := syscall.Syscall(syscall.SYS_GETSID, 0, 0, 0)
	return int(sid) == os.Getpid()
}

func launchOptions(t *testing.T, mode string) LaunchOptions {
	t.Helper()
	t.Setenv("RPC_TEST_DAEMON", mode)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	return LaunchOptions{
		Path:    program,
		Args:    []string{socket},
		Socket:  socket,
		LogPath: filepath.Join(t.TempDir(), "log"),
	}
}

// stop ends a daemon, and waits until its socket is gone and it is no zombie.
func stop(t *testing.T, pid int, socket string) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon ends", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is still there")
	}
}

func TestLaunchStartsOne(t *testing.T) {
	opts := launchOptions(t, "serves")
	pids := make(chan int, 5)
	var all sync.WaitGroup
	for range cap(pids) {
		all.Go(func() {
			launched, err := Launch(t.Context(), opts)
			if err != nil {
				t.Error(err)
			}
			if launched.PID != 0 && (launched.Door != "registry nowhere" ||
				!slices.Equal(launched.Warnings, []string{"it is a test"})) {
				t.Errorf("the daemon says %+v", launched)
			}
			// Whoever started it, it answers now.
			c, err := Dial(t.Context(), opts.Socket)
			if err != nil {
				t.Error(err)
			} else {
				c.Close()
			}
			pids <- launched.PID
		})
	}
	all.Wait()
	close(pids)
	var started []int
	for pid := range pids {
		if pid != 0 {
			started = append(started, pid)
		}
	}
	for _, pid := range started {
		stop(t, pid, opts.Socket)
	}
	if len(started) != 1 {
		t.Errorf("%d daemons started", len(started))
	}
	log, err := os.ReadFile(opts.LogPath)
	if want := "dir /, session of its own true\n"; err != nil || string(log) != want {
		t.Errorf("log %q, %v; want %q", log, err, want)
	}
}

// What the caller has inherited from its parent does not go on to the daemon.
func TestLaunchClosesDescriptors(t *testing.T) {
	opts := launchOptions(t, "serves")
	path := filepath.Join(t.TempDir(), "lock")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600) // without O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	launched, err := Launch(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	pid := launched.PID
	defer stop(t, pid, opts.Socket)
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) < 3 {
		t.Fatalf("descriptors of the daemon: %q, %v", links, err)
	}
	for _, link := range links {
		if target, _ := os.Readlink(link); target == path {
			t.Errorf("the daemon has %s, as %s", target, link)
		}
	}
}

func TestLaunchFails(t *testing.T) {
	opts := launchOptions(t, "fails")
	_, err := Launch(t.Context(), opts)
	if err == nil || err.Error() != "start dfdaemon: data directory /x is locked by process 17" {
		t.Errorf("got %v, want the daemon's own message", err)
	}
	opts = launchOptions(t, "dies")
	_, err = Launch(t.Context(), opts)
	if !errors.Is(err, p2p.ErrUnavailable) || !strings.Contains(err.Error(), "exit status 2") ||
		!strings.Contains(err.Error(), "see "+opts.LogPath+", and whether "+opts.Path+" is of the same version") {
		t.Errorf("got %v", err)
	}
	if log, err := os.ReadFile(opts.LogPath); err != nil || !strings.Contains(string(log), "panic: at the disco") {
		t.Errorf("log %q, %v", log, err)
	}
	opts.Path = "dfdaemon-that-is-not-there"
	if _, err := Launch(t.Context(), opts); err == nil || !strings.Contains(err.Error(), "install dfdaemon") {
		t.Errorf("got %v", err)
	}
}

func TestLaunchStopsWithContext(t *testing.T) {
	opts := launchOptions(t, "hangs")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// The log is made just before the program starts.
	go func() {
		defer cancel()
		eventually(t, "the daemon starts", func() bool { _, err := os.Stat(opts.LogPath); return err == nil })
	}()
	if _, err := Launch(ctx, opts); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := Launch(ctx, opts); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

func TestReadyWithoutLauncher(t *testing.T) {
	Ready(-1, nil, nil)
	Ready(-1, nil, errors.New("x"))
	// Whoever waited has gone.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	fd, err := syscall.Dup(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	Ready(fd, nil, nil)
	if err := syscall.Close(fd); !errors.Is(err, syscall.EBADF) {
		t.Errorf("the descriptor is not closed: %v", err)
	}
}
