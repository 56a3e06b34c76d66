// Package stdio knows what became of standard input and output.
package stdio

import (
	"os"

	"golang.org/x/sys/unix"
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
