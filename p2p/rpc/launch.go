package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p"
)

// readyFD is the number of the descriptor on which a daemon that is launched
// says that it is ready.
const readyFD = 3

// readyLine is what it says. With --launched a [Launched] in JSON follows.
const readyLine = "ready\n"

// usageExit is the exit code of a daemon that does not take its flags.
const usageExit = 2

// maxReady bounds, in bytes, what a daemon can say.
const maxReady = 64 << 10

// Launched is what a daemon that has been started says of itself.
type Launched struct {
	PID      int      `json:"-"`        // 0 where a daemon answered already
	Door     string   `json:"door"`     // where else than at the socket it serves the content, and to whom, for people
	Warnings []string `json:"warnings"` // of its start
}

// LaunchOptions says what [Launch] starts.
type LaunchOptions struct {
	// Path is the dfdaemon program, found as a shell would.
	Path string
	// Args are its arguments. Paths in them are absolute: the daemon runs in
	// the root directory. "--ready-fd 3 --launched" is added to them.
	Args []string
	// Socket is the path of the socket that the daemon listens on.
	Socket string
	// LogPath is a file that the daemon's output is appended to, or "" to drop
	// it. Its directory has to exist.
	LogPath string
}

// Launch starts a dfdaemon in the background, in a session of its own, and waits
// until it serves. It returns what the daemon says, the zero Launched where one answers on the
// socket already: of several that launch one at once, one starts it.
//
// Where the daemon fails to start, the error is its own message. When ctx ends
// before the daemon is ready, it is told to stop, and the error is the cause of
// ctx. In a caller that goes on, a goroutine waits for the daemon's end, so that
// no zombie is left; a caller that ends leaves the daemon running.
//
// Every descriptor of the process from 3 up becomes close-on-exec.
func Launch(ctx context.Context, opts LaunchOptions) (Launched, error) {
	unlock, err := lockStart(ctx, opts.Socket)
	if err != nil {
		return Launched{}, fmt.Errorf("start dfdaemon: %w", err)
	}
	defer unlock()
	if alive, err := listens(opts.Socket); err != nil {
		return Launched{}, fmt.Errorf("start dfdaemon: socket %s: %w", opts.Socket, err)
	} else if alive {
		return Launched{}, nil
	}
	launched, err := start(ctx, opts)
	if err != nil {
		return Launched{}, fmt.Errorf("start dfdaemon: %w", err)
	}
	return launched, nil
}

// lockStart takes the lock that one launch at a time holds.
func lockStart(ctx context.Context, socket string) (unlock func(), err error) {
	dir, err := openSocketDir(socket, forOthers)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, err := os.OpenFile(socket+".start", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// start starts the daemon and waits for its word.
func start(ctx context.Context, opts LaunchOptions) (Launched, error) {
	program, err := exec.LookPath(opts.Path)
	if err != nil {
		return Launched{}, fmt.Errorf("%w: install dfdaemon beside dfcache, or start it by hand", err)
	}
	if program, err = filepath.Abs(program); err != nil {
		return Launched{}, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return Launched{}, err
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command(program, append(
		append([]string(nil), opts.Args...), "--ready-fd", fmt.Sprint(readyFD), "--launched")...)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w} // becomes readyFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	advice := "run dfdaemon by hand to see why"
	if opts.LogPath != "" {
		log, err := os.OpenFile(opts.LogPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
		if err != nil {
			return Launched{}, err
		}
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
		advice = "see " + opts.LogPath
	}
	closeOnExec()
	if err := cmd.Start(); err != nil {
		return Launched{}, err
	}
	w.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	var said []byte
	err = interruptible(ctx, r.SetReadDeadline, func() (err error) {
		said, err = io.ReadAll(io.LimitReader(r, maxReady))
		return err
	})
	switch {
	case err != nil:
		_ = cmd.Process.Signal(syscall.SIGTERM)
		return Launched{}, fmt.Errorf("wait until it is ready: %w", err)
	case strings.HasPrefix(string(said), readyLine):
		launched := Launched{PID: cmd.Process.Pid}
		if rest := said[len(readyLine):]; len(rest) > 0 {
			_ = json.Unmarshal(rest, &launched) // it serves, whatever it says of it
		}
		return launched, nil
	case len(said) > 0:
		return Launched{}, errors.New(strings.TrimSpace(string(said)))
	}
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = cmd.Process.Signal(syscall.SIGTERM)
		err = context.Cause(ctx)
	}
	if err == nil {
		err = errors.New("exit status 0")
	} else if failed, ok := errors.AsType[*exec.ExitError](err); ok && failed.ExitCode() == usageExit {
		advice += ", and whether " + program + " is of the same version as this program"
	}
	return Launched{}, fmt.Errorf("%w: it ended before it was ready (%w): %s", p2p.ErrUnavailable, err, advice)
}

// closeOnExec keeps the descriptors that this process has inherited from the
// daemon, which would hold them for as long as it runs: the lock of a script
// around dfcache, or the pipe whose end somebody waits for. Those that Go opened
// are close-on-exec already.
func closeOnExec() {
	// Without /proc a daemon that holds too much is better than none.
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd) // no harm where it has been closed since
		}
	}
}

// Ready is called by a daemon that was started with --ready-fd: with nil when it
// serves, or with what keeps it from serving. With --launched it also says something of
// itself; without, says is nil. It closes fd. A negative fd says that nobody waits.
func Ready(fd int, says *Launched, err error) {
	if fd < 0 {
		return
	}
	f := os.NewFile(uintptr(fd), "ready")
	defer f.Close()
	word := []byte(readyLine)
	if err != nil {
		word = []byte(err.Error() + "\n")
	} else if says != nil {
		if text, err := json.Marshal(says); err == nil && len(word)+len(text) <= maxReady {
			word = append(word, text...)
		}
	}
	_, _ = f.Write(word) // whoever waited may be gone
}
