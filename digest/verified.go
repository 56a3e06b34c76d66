package digest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Verified reads a stored blob and checks every piece against its CRC32C
// before it hands out a byte of it: a flipped or missing byte gives a
// [CorruptError], never wrong data. It is safe for concurrent use where the
// underlying reader is, and holds at most one piece in memory.
type Verified struct {
	r     io.ReaderAt
	t     *Table
	await func(ctx context.Context, piece int) error // nil where every piece is there

	mu    sync.Mutex
	piece int    // the piece in buf, -1 where none is
	buf   []byte // a whole piece that has been checked
}

// NewVerified returns a reader of the blob that t describes, whose bytes r
// holds. It does not close r.
func NewVerified(r io.ReaderAt, t *Table) *Verified {
	return &Verified{r: r, t: t, piece: -1}
}

// NewArriving returns a reader of a blob whose pieces are still arriving. Before
// piece i is read, await(ctx, i) is called, from several goroutines at a time; it
// returns nil when the piece is in r and t.CRC[i] is set, for as long as it is to
// be trusted. Reads return its errors.
func NewArriving(r io.ReaderAt, t *Table, await func(ctx context.Context, piece int) error) *Verified {
	return &Verified{r: r, t: t, await: await, piece: -1}
}

// Table returns the table that v checks pieces with.
func (v *Verified) Table() *Table { return v.t }

// Size returns the blob's size in bytes.
func (v *Verified) Size() int64 { return v.t.Size }

// ReadAt implements [io.ReaderAt]. It reads whole pieces: short reads scattered
// over a large blob cost a piece each.
func (v *Verified) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read blob %s: negative offset %d", v.t.Digest, off)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= v.t.Size {
			return done, io.EOF
		}
		i := int(at / v.t.PieceLength)
		start, end := v.t.Bounds(i)
		rest := p[done:]
		if at == start && int64(len(rest)) >= end-start {
			// A whole piece is wanted: it is checked where it is wanted.
			if err := v.readPiece(context.Background(), i, rest[:end-start]); err != nil {
				return done, err
			}
			done += int(end - start)
			continue
		}
		n, err := v.readPart(i, rest, at-start)
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// readPart copies what piece i has from off on to p.
func (v *Verified) readPart(i int, p []byte, off int64) (int, error) {
	if err := v.arrive(context.Background(), i); err != nil {
		return 0, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.piece != i {
		start, end := v.t.Bounds(i)
		v.piece = -1
		if int64(cap(v.buf)) < end-start {
			v.buf = make([]byte, end-start)
		}
		v.buf = v.buf[:end-start]
		if err := v.checkedPiece(i, v.buf); err != nil {
			return 0, err
		}
		v.piece = i
	}
	return copy(p, v.buf[off:]), nil
}

// arrive waits for piece i.
func (v *Verified) arrive(ctx context.Context, i int) error {
	if v.await == nil {
		return nil
	}
	return v.await(ctx, i)
}

// readPiece waits for piece i, and fills p with it.
func (v *Verified) readPiece(ctx context.Context, i int, p []byte) error {
	if err := v.arrive(ctx, i); err != nil {
		return err
	}
	return v.checkedPiece(i, p)
}

// checkedPiece fills p, which is as long as piece i, and checks it. On failure p
// is cleared, so that a caller that overlooks the error holds no wrong data.
func (v *Verified) checkedPiece(i int, p []byte) error {
	start, _ := v.t.Bounds(i)
	n, err := v.r.ReadAt(p, start)
	if n == len(p) {
		err = nil // a full read may come with io.EOF
	}
	switch {
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = v.t.CheckPiece(i, p[:n])
	default:
		err = fmt.Errorf("read piece %d of blob %s: %w", i, v.t.Digest, err)
	}
	if err != nil {
		clear(p)
	}
	return err
}

// copyLength is how many bytes CopyRange has read before it writes them, in whole pieces.
const copyLength = 1 << 20

// CopyRange writes the n bytes from off on to w, checking each piece before
// bytes of it are written, and calls progress, where it is not nil, with the
// count of bytes written so far. Reading and checking run beside the writing;
// three pieces, or as many of small ones as make 3 MiB, are held in memory. It stops when ctx ends, with the context's
// cause: at the next piece, or, where w has a SetWriteDeadline method as pipes
// and connections do, at once.
//
// A connection or an [net/http.ResponseWriter] takes the bytes from the blob's
// file by itself, in the kernel: they are read to be checked, but not copied
// again.
func (v *Verified) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(written int64)) error {
	if off < 0 || n < 0 || off > v.t.Size-n {
		return fmt.Errorf("read blob %s: %d bytes from %d on: it has %d", v.t.Digest, n, off, v.t.Size)
	}
	if n == 0 {
		return context.Cause(ctx)
	}
	if d, ok := w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		stop := context.AfterFunc(ctx, func() { d.SetWriteDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	write := func(p []byte) (int64, error) {
		n, err := w.Write(p)
		return int64(n), err
	}
	if to, file := kernelCopy(w, v.r, off); file != nil {
		defer file.Close()
		write = func(p []byte) (int64, error) {
			n, err := to.ReadFrom(&io.LimitedReader{R: file, N: int64(len(p))})
			if err == nil && n < int64(len(p)) {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}

	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type checked struct {
		buf  []byte // to be used again
		part []byte // what is wanted of it
		err  error
	}
	const ahead = 3
	free := make(chan []byte, ahead)
	for range ahead {
		free <- nil
	}
	ready := make(chan checked)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(ready)
		last := int((off + n - 1) / v.t.PieceLength)
		for i := int(off / v.t.PieceLength); i <= last; {
			var buf []byte
			select {
			case buf = <-free:
			case <-ctx.Done():
				return
			}
			// Small pieces go together, but those that arrive, which are not to wait for each other.
			until := i
			if v.await == nil {
				until = min(last, i+max(1, int(copyLength/v.t.PieceLength))-1)
			}
			start, _ := v.t.Bounds(i)
			_, end := v.t.Bounds(until)
			if int64(cap(buf)) < end-start {
				buf = make([]byte, end-start)
			}
			buf = buf[:end-start]
			good, err := start, error(nil)
			for ; i <= until && err == nil; i++ {
				from, to := v.t.Bounds(i)
				if err = v.readPiece(ctx, i, buf[from-start:to-start]); err == nil {
					good = to
				}
			}
			begin := min(max(off, start), good)
			select {
			case ready <- checked{buf, buf[begin-start : max(begin, min(off+n, good))-start], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	defer reader.Wait()
	defer cancel(nil)
	var written int64
	for c := range ready {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if len(c.part) > 0 {
			n, err := write(c.part)
			written += n
			if err != nil {
				// It may have failed because of the caller's context, which ends before ours.
				return cmp.Or(context.Cause(caller), err)
			}
			if progress != nil {
				progress(written)
			}
		}
		if c.err != nil {
			return c.err
		}
		free <- c.buf
	}
	return context.Cause(ctx)
}

// CopyWhole is CopyRange of the whole blob, of which the last piece is written
// only when proven returns nil: who counts bytes, as HTTP clients do, does not
// take for whole what is not.
func (v *Verified) CopyWhole(ctx context.Context, w io.Writer, proven func(context.Context) error, progress func(written int64)) error {
	last, _ := v.t.Bounds(max(0, v.t.Pieces()-1))
	if err := v.CopyRange(ctx, w, 0, last, progress); err != nil {
		return err
	}
	if err := proven(ctx); err != nil {
		return err
	}
	rest := progress
	if progress != nil {
		rest = func(written int64) { progress(last + written) }
	}
	return v.CopyRange(ctx, w, last, v.t.Size-last, rest)
}

// kernelCopy returns w and the file that r is, from off on, where w takes bytes
// from a file without a way through this process; else nil. A file could, too,
// but gets what is in memory already faster from there.
func kernelCopy(w io.Writer, r io.ReaderAt, off int64) (io.ReaderFrom, *os.File) {
	to, ok := w.(io.ReaderFrom)
	if !ok {
		return nil, nil
	}
	switch w.(type) {
	case *os.File:
		return nil, nil
	case interface{ SetWriteDeadline(time.Time) error }, interface{ WriteHeader(int) }:
	default:
		return nil, nil // bytes.Buffer and the like read as anybody does
	}
	f, ok := r.(*os.File)
	if !ok {
		return nil, nil
	}
	// Opened again, it has an offset of its own.
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, nil
	}
	var again *os.File
	if err := raw.Control(func(fd uintptr) { again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) }); err != nil || again == nil {
		return nil, nil
	}
	if _, err := again.Seek(off, io.SeekStart); err != nil {
		again.Close()
		return nil, nil
	}
	return to, again
}
