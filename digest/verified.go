package digest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Verified reads a stored blob and checks every piece against its CRC32C
// before it hands out a byte of it: a flipped or missing byte gives a
// [CorruptError], never wrong data. It is safe for concurrent use where the
// underlying reader is, and holds at most one piece in memory.
type Verified struct {
	r io.ReaderAt
	t *Table

	mu    sync.Mutex
	piece int    // the piece in buf, -1 where none is
	buf   []byte // a whole piece that has been checked
}

// NewVerified returns a reader of the blob that t describes, whose bytes r
// holds. It does not close r.
func NewVerified(r io.ReaderAt, t *Table) *Verified {
	return &Verified{r: r, t: t, piece: -1}
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
			if err := v.readPiece(i, rest[:end-start]); err != nil {
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
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.piece != i {
		start, end := v.t.Bounds(i)
		v.piece = -1
		if int64(cap(v.buf)) < end-start {
			v.buf = make([]byte, end-start)
		}
		v.buf = v.buf[:end-start]
		if err := v.readPiece(i, v.buf); err != nil {
			return 0, err
		}
		v.piece = i
	}
	return copy(p, v.buf[off:]), nil
}

// readPiece fills p, which is as long as piece i, and checks it. On failure p
// is cleared, so that a caller that overlooks the error holds no wrong data.
func (v *Verified) readPiece(i int, p []byte) error {
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

// CopyTo writes the whole blob to w, checking each piece before it is written,
// and calls progress, where it is not nil, with the count of bytes written so
// far. Reading and checking run beside the writing; three pieces are held in
// memory. It stops when ctx ends, with the context's cause: at the next piece,
// or, where w has a SetWriteDeadline method as pipes and connections do, at once.
func (v *Verified) CopyTo(ctx context.Context, w io.Writer, progress func(written int64)) error {
	if d, ok := w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		stop := context.AfterFunc(ctx, func() { d.SetWriteDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type checked struct {
		p   []byte
		err error
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
		for i := range v.t.Pieces() {
			var buf []byte
			select {
			case buf = <-free:
			case <-ctx.Done():
				return
			}
			start, end := v.t.Bounds(i)
			if int64(cap(buf)) < end-start {
				buf = make([]byte, end-start)
			}
			buf = buf[:end-start]
			err := v.readPiece(i, buf)
			select {
			case ready <- checked{buf, err}:
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
		if c.err != nil {
			return c.err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := w.Write(c.p)
		written += int64(n)
		if err != nil {
			return cmp.Or(context.Cause(ctx), err) // it may have failed because of ctx
		}
		if progress != nil {
			progress(written)
		}
		free <- c.p
	}
	return context.Cause(ctx)
}
