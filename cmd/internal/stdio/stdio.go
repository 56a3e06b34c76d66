// Package stdio knows what became of standard input and output.
package stdio

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// IsClosed reports whether a standard file may have been closed when the process
// began. Go opens /dev/null for reading and writing in its place then. A shell's
// redirection to or from /dev/null opens it for one of both; but a program that
// starts this one may open it for both (Python's subprocess.DEVNULL does). So it
// is asked only where content would be lost, not where a result is printed.
func IsClosed(f *os.File) bool {
	var file, null unix.Stat_t
	if unix.Fstat(int(f.Fd()), &file) != nil || unix.Stat(os.DevNull, &null) != nil || file.Rdev != null.Rdev ||
		file.Mode&unix.S_IFMT != unix.S_IFCHR {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

// Output is standard output, for what a command prints. Its errors are those of [exit.Printing]. It is
// safe for concurrent use.
type Output struct {
	mu  sync.Mutex
	err error // of the first Write that failed
}

// Write implements [io.Writer].
func (o *Output) Write(p []byte) (n int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, err = os.Stdout.Write(p)
	if err = exit.Printing(err); o.err == nil {
		o.err = err
	}
	return n, err
}

// Err returns the error of the first Write that failed. What prints a help does not look at it.
func (o *Output) Err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}
