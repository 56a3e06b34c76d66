package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p/dirs"
)

const (
	socketDirMode = 0o750
	socketMode    = 0o660
	// forOthers are what the mode of a socket's directory must not have: write for
	// the group, and anything for others.
	forOthers fs.FileMode = 0o027

	// lockTimeout bounds the wait for another daemon that makes its socket. The
	// group can lock the directory, and is not to keep the daemon from starting
	// without a word.
	lockTimeout = 10 * time.Second
)

// Listen listens on a unix socket at path, which is removed when the listener
// is closed. Those may connect who can enter its directory and is the
// socket's owner or in its group: the directory is made with mode 0750 where it
// is missing, and the socket has mode 0660.
//
// It fails with [io/fs.ErrPermission] where others can enter the directory or
// its group can write to it, with [io/fs.ErrExist] where a daemon answers on
// path or something that is not a socket is there, and with [digest.ErrInvalid]
// where path is too long for a socket. A socket that nobody listens on is
// replaced.
func Listen(path string) (net.Listener, error) { return listen(path, socketMode, forOthers) }

// ListenShared is Listen in a directory that others can enter, too, but not write
// to, as /run is, with a socket of mode 0600. It is for a server that knows who
// calls.
func ListenShared(path string) (net.Listener, error) { return listen(path, 0o600, 0o022) }

// listen makes a socket in a directory that has none of the bits of forbidden.
func listen(path string, mode, forbidden fs.FileMode) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, socketPathError(path)
	}
	dir, err := openSocketDir(path, forbidden)
	if err != nil {
		return nil, err
	}
	// Of two daemons that start, one could remove the other's new socket for a
	// stale one. The lock is let go when dir is closed.
	defer dir.Close()
	ctx, cancel := context.WithTimeout(context.Background(), lockTimeout)
	defer cancel()
	if err := lock(ctx, dir); err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	made, err := os.Lstat(path)
	own := &socket{l, path, made}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		own.Close()
		return nil, err
	}
	return own, nil
}

// socket is a listener that removes its socket when it is closed, and no other: one that a program has
// put in its place, as Dragonfly's dfdaemon does at its start, stays.
type socket struct {
	*net.UnixListener
	path string
	made os.FileInfo
}

// Close implements [net.Listener].
func (l *socket) Close() error {
	var err error
	if now, statErr := os.Lstat(l.path); statErr == nil && l.made != nil && os.SameFile(now, l.made) {
		err = os.Remove(l.path)
	}
	return errors.Join(err, l.UnixListener.Close())
}

// openSocketDir opens the directory that the socket at path is in, and makes it
// where it is missing. It refuses one where others could get at the socket.
func openSocketDir(path string, forbidden fs.FileMode) (*os.File, error) {
	name := filepath.Dir(path)
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		if err := dirs.Make(name, socketDirMode); err != nil {
			return nil, fmt.Errorf("directory of the socket: %w", err)
		}
	}
	dir, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("directory of the socket: %w", err)
	}
	if err := checkSocketDir(dir, forbidden); err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

func checkSocketDir(dir *os.File, forbidden fs.FileMode) error {
	info, err := dir.Stat()
	if err != nil {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != os.Geteuid() {
		return fmt.Errorf("directory of the socket: %s belongs to uid %d, neither root nor the daemon's user: %w: "+
			"choose another directory, or chown it", dir.Name(), owner, fs.ErrPermission)
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		advice := "choose a directory of its own, for example " +
			filepath.Join(dir.Name(), "dragonfly", "dfdaemon.sock")
		if info.Mode()&fs.ModeSticky == 0 { // else it is for all, as /tmp is
			advice = fmt.Sprintf("chmod 0750 %s where nothing else needs it, or %s", dir.Name(), advice)
		}
		return fmt.Errorf("directory of the socket: %s has mode %04o, so that others could reach or replace the "+
			"socket: %w: %s", dir.Name(), mode, fs.ErrPermission, advice)
	}
	return nil
}

// removeStale removes the socket at path where nobody listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: %w, and is not a socket: move it away, or choose another path", path, fs.ErrExist)
	}
	alive, err := listens(path)
	if err != nil {
		return fmt.Errorf("socket %s: %w: %w: remove it if no daemon uses it", path, fs.ErrExist, err)
	}
	if alive {
		return fmt.Errorf("socket %s: %w: a dfdaemon listens on it: stop that one, or choose another socket", path,
			fs.ErrExist)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// lock takes the lock on f that other processes take likewise. It is let go
// when f is closed.
func lock(ctx context.Context, f *os.File) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("lock %s: another process holds it: %w", f.Name(), context.Cause(ctx))
		}
	}
}

// listens reports whether a process listens on the socket at path.
func listens(path string) (bool, error) {
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return true, nil
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return false, nil
	case errors.Is(err, unix.EAGAIN): // so many connections wait that there is no room for ours
		return true, nil
	}
	return false, err
}
