package source

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// Bytes pass through buffers on their way to a file or a hash. A short one will do: a
// thousand senders who send nothing more can each have one. A source that fills it gets a
// long one, for fewer calls of the system, while there are not too many of those.
type (
	shortBuffer [64 << 10]byte
	longBuffer  [1 << 20]byte
)

const maxLongBuffers = 16

var (
	shortBuffers = sync.Pool{New: func() any { return new(shortBuffer) }}
	longBuffers  = sync.Pool{New: func() any { return new(longBuffer) }}
	longInUse    atomic.Int32
)

// Buffer returns a buffer for n bytes, or for some of them where n is more than 1 MiB, or there are
// many long buffers: it has at least 64 KiB. The caller gives it back by [Release].
func Buffer(n int) []byte {
	if n > len(shortBuffer{}) {
		if longInUse.Add(1) <= maxLongBuffers {
			return longBuffers.Get().(*longBuffer)[:]
		}
		longInUse.Add(-1)
	}
	return shortBuffers.Get().(*shortBuffer)[:]
}

// Release gives back a buffer, or the beginning of one.
func Release(b []byte) {
	if cap(b) == len(longBuffer{}) {
		longBuffers.Put((*longBuffer)(b[:cap(b)]))
		longInUse.Add(-1)
	} else {
		shortBuffers.Put((*shortBuffer)(b[:cap(b)]))
	}
}

// firstLength is how many bytes are taken in at once of a source that gave less
// before, or nothing: whoever is waited for need not have a buffer.
const firstLength = 4 << 10

// WriterFunc is a function as an [io.Writer].
type WriterFunc func(p []byte) (int, error)

// Write implements [io.Writer].
func (f WriterFunc) Write(p []byte) (int, error) { return f(p) }

// Copy copies src to w up to its end, and returns how many bytes w has taken. Its errors are
// those of src and w as they are.
func Copy(w io.Writer, src io.Reader) (n int64, err error) {
	first := make([]byte, firstLength)
	for last := 0; ; {
		space := first
		if last >= firstLength {
			space = Buffer(last + 1)
		}
		read, readErr := src.Read(space)
		if read > 0 {
			var written int
			written, err = w.Write(space[:read])
			n += int64(written)
		}
		if last >= firstLength {
			Release(space)
		}
		last = read
		switch {
		case err != nil:
			return n, err
		case errors.Is(readErr, io.EOF):
			return n, nil
		case readErr != nil:
			return n, readErr
		}
	}
}
