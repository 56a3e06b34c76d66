// Package stdio knows what became of standard input and output.
package stdio

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// IsClosed reports whether a standard file was closed when the process began.
// Go opens /dev/null for reading and writing in its place then, which is not
// what a redirection to or from /dev/null does.
func IsClosed(f *os.File) bool {
	var file, null unix.Stat_t
	if unix.Fstat(int(f.Fd()), &file) != nil || unix.Stat(os.DevNull, &null) != nil || file.Rdev != null.Rdev ||
		file.Mode&unix.S_IFMT != unix.S_IFCHR {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

// Output is standard output, for what a command prints. Where that is closed, writing to it fails. Its
// errors are those of [exit.Printing]. It is safe for concurrent use.
type Output struct {
	mu  sync.Mutex
	err error // of the first Write that failed
}

// Write implements [io.Writer].
func (o *Output) Write(p []byte) (n int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if IsClosed(os.Stdout) {
		err = &os.PathError{Op: "write", Path: "standard output", Err: unix.EBADF}
	} else {
		n, err = os.Stdout.Write(p)
	}
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
