package source

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
)

// Check reports a reader that can't be read from because there is none. The error matches
// [digest.ErrInvalid].
func Check(src io.Reader) error {
	if src == nil {
		return fmt.Errorf("%w: there is no reader to take content from", digest.ErrInvalid)
	}
	return nil
}

// Guard returns a reader of src for a goroutine that is not the caller's, where a panic
// would end the process: it becomes an error. So does a Read that claims more bytes than there is
// room for. The Reads fail once ctx has ended.
func Guard(ctx context.Context, src io.Reader) io.Reader { return guard{ctx, src} }

type guard struct {
	ctx context.Context
	src io.Reader
}

func (g guard) Read(p []byte) (n int, err error) {
	defer func() {
		if v := recover(); v != nil {
			n, err = 0, fmt.Errorf("the reader panicked: %v", v)
		}
	}()
	if err := context.Cause(g.ctx); err != nil {
		return 0, err // it may give nothing, and no error, for ever
	}
	n, err = g.src.Read(p)
	if n < 0 || n > len(p) {
		return 0, fmt.Errorf("the reader claims %d bytes where there is room for %d", n, len(p))
	}
	return n, err
}

// Interruptor returns what ends a Read of src that blocks, or nil where nothing does: a
// goroutine has to wait for it then. Pipes and connections have their SetReadDeadline for that.
func Interruptor(src io.Reader) func() {
	d, ok := src.(interface{ SetReadDeadline(time.Time) error })
	if !ok {
		return nil
	}
	if f, ok := src.(*os.File); ok && !isNonblocking(f) {
		return nil // it has the method, and no deadlines
	}
	return func() {
		defer func() { _ = recover() }() // whoever waits is told of the end of its context
		d.SetReadDeadline(time.Unix(1, 0))
	}
}

// isNonblocking reports whether the runtime waits for f, and not the kernel.
func isNonblocking(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	flags := 0
	controlErr := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	return err == nil && controlErr == nil && flags&unix.O_NONBLOCK != 0
}
