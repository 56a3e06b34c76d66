package digest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
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
		err = v.readError(i, err)
	}
	if err != nil {
		clear(p)
	}
	return err
}

// readError makes of an error of reading piece i one that says so. What the disk can't
// give is damage.
func (v *Verified) readError(i int, err error) error {
	if errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EUCLEAN) {
		return &CorruptError{Digest: v.t.Digest, Piece: i, Reason: fmt.Sprintf("it can't be read: %v", err)}
	}
	return fmt.Errorf("read piece %d of blob %s: %w", i, v.t.Digest, err)
}

// copyLength is how many bytes CopyRange has checked before it writes them, in whole pieces.
const copyLength = 1 << 20

// CopyRange writes the n bytes from off on to w, checking each piece before
// bytes of it are written, and calls progress, where it is not nil, with the
// count of bytes written so far. Reading and checking run beside the writing, up
// to three pieces, or as many of small ones as make 3 MiB, ahead of it. It stops when ctx ends, with the context's
// cause: at the next piece, or, where w has a SetWriteDeadline method as pipes
// and connections do, at once.
//
// A connection or an [net/http.ResponseWriter] takes the bytes from the blob's
// file by itself, in the kernel: they are read to be checked, but not copied
// again, and nothing of them is in memory while w takes its time. For any other w
// what was checked stays in memory until it is written, 16 MiB of it for all
// copies of the process; what finds no room there is read and checked again, 64 KiB at
// a time.
//
//nolint:cyclop,funlen // the reader, the writer and the end of both are told best together
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
	keep, write := true, func(b *block) (int64, error) { return v.writeBlock(w, b) }
	if to, file := kernelCopy(w, v.r, off); file != nil {
		defer file.Close()
		keep, write = false, func(b *block) (int64, error) {
			n, err := to.ReadFrom(&io.LimitedReader{R: file, N: b.n})
			if err == nil && n < b.n {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	} else if w == io.Discard {
		keep, write = false, func(b *block) (int64, error) { return b.n, nil }
	}

	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	const ahead = 3
	free := make(chan struct{}, ahead)
	for range ahead {
		free <- struct{}{}
	}
	ready := make(chan checked)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(ready)
		last := int((off + n - 1) / v.t.PieceLength)
		for i := int(off / v.t.PieceLength); i <= last; {
			select {
			case <-free:
			case <-ctx.Done():
				return
			}
			// Small pieces go together, but those that arrive, which are not to wait for each other.
			until := i
			if v.await == nil {
				until = min(last, i+max(1, int(copyLength/v.t.PieceLength))-1)
			}
			var c checked
			for ; i <= until && c.err == nil; i++ {
				c.err = v.check(ctx, i, keep, &c.blocks)
			}
			c.cut(off, off+n)
			if !keep {
				c.join()
			}
			select {
			case ready <- c:
			case <-ctx.Done():
				c.drop()
				return
			}
			if c.err != nil {
				return
			}
		}
	})
	defer reader.Wait()
	defer cancel(nil)
	var written int64
	for c := range ready {
		err := context.Cause(ctx)
		for i := range c.blocks {
			if err != nil {
				break
			}
			var n int64
			n, err = write(&c.blocks[i])
			written += n
			if err != nil {
				// It may have failed because of the caller's context, which ends before ours.
				err = cmp.Or(context.Cause(caller), err)
			}
		}
		if err == nil && progress != nil && len(c.blocks) > 0 {
			progress(written)
		}
		c.drop()
		if err = cmp.Or(err, c.err); err != nil {
			return err
		}
		free <- struct{}{}
	}
	return context.Cause(ctx)
}

// blockLength is how many bytes are in memory together: pieces are checked by
// blocks. It divides the length of every piece.
const blockLength = MinPieceLength

// space is the memory of a block.
type space = [blockLength]byte

// spaces are those that nobody uses.
var spaces = sync.Pool{New: func() any { return new(space) }}

// maxKept is how many blocks are kept in memory by all copies together, until they are written.
const maxKept = 16 << 20 / blockLength

var kept atomic.Int64

// block is a part of a piece that has been checked, or what is wanted of it.
type block struct {
	off, n int64
	whole  int64 // where what crc is of begins
	length int64 // of that, in bytes
	crc    uint32
	space  *space // that from whole on, where it was kept in memory
}

// checked are blocks that can be written, of whole pieces.
type checked struct {
	blocks []block
	err    error // why there are no more
}

// check waits for piece i, reads and checks it, and adds its blocks to blocks where it is good.
func (v *Verified) check(ctx context.Context, i int, keep bool, blocks *[]block) error {
	if err := v.arrive(ctx, i); err != nil {
		return err
	}
	scratch := spaces.Get().(*space)
	defer func() { spaces.Put(scratch) }()
	start, end := v.t.Bounds(i)
	found := checked{blocks: make([]block, 0, (end-start+blockLength-1)/blockLength)}
	var crc uint32
	for at := start; at < end; {
		length := min(blockLength, end-at)
		got, err := v.read(scratch[:length], at)
		if err != nil {
			found.drop()
			return v.readError(i, err)
		}
		b := block{off: at, n: length, whole: at, length: length, crc: CRC32C(scratch[:got])}
		if at == start {
			crc = b.crc
		} else {
			crc = combineCRC(crc, b.crc, int64(got))
		}
		if int64(got) < length {
			found.drop()
			return v.t.CheckSum(i, at+int64(got)-start, crc)
		}
		if keep {
			if kept.Add(1) <= maxKept {
				b.space, scratch = scratch, spaces.Get().(*space)
			} else {
				kept.Add(-1)
			}
		}
		found.blocks = append(found.blocks, b)
		at += length
	}
	if err := v.t.CheckSum(i, end-start, crc); err != nil {
		found.drop()
		return err
	}
	*blocks = append(*blocks, found.blocks...)
	return nil
}

// read fills p from off on, as far as there is something.
func (v *Verified) read(p []byte, off int64) (int, error) {
	n, err := v.r.ReadAt(p, off)
	if n == len(p) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // a full read may come with io.EOF
	}
	return n, err
}

// writeBlock writes a block. What is not in memory any more is checked again.
func (v *Verified) writeBlock(w io.Writer, b *block) (int64, error) {
	from := b.space
	if from == nil {
		from = spaces.Get().(*space)
		defer spaces.Put(from)
		n, err := v.read(from[:b.length], b.whole)
		if i := int(b.whole / v.t.PieceLength); err != nil {
			return 0, v.readError(i, err)
		} else if int64(n) < b.length || CRC32C(from[:n]) != b.crc {
			return 0, &CorruptError{v.t.Digest, i, "it has changed since it was checked"}
		}
	}
	n, err := w.Write(from[b.off-b.whole:][:b.n])
	return int64(n), err
}

// cut leaves of the blocks what is between off and end.
func (c *checked) cut(off, end int64) {
	wanted := c.blocks[:0]
	for _, b := range c.blocks {
		from, to := max(off, b.off), min(end, b.off+b.n)
		if from >= to {
			b.drop()
			continue
		}
		b.off, b.n = from, to-from
		wanted = append(wanted, b)
	}
	c.blocks = wanted
}

// join makes one block of all, none of which is in memory.
func (c *checked) join() {
	if len(c.blocks) == 0 {
		return
	}
	last := c.blocks[len(c.blocks)-1]
	c.blocks[0].n = last.off + last.n - c.blocks[0].off
	c.blocks = c.blocks[:1]
}

func (c *checked) drop() {
	for i := range c.blocks {
		c.blocks[i].drop()
	}
}

// drop gives the memory of a block back.
func (b *block) drop() {
	if b.space != nil {
		spaces.Put(b.space)
		b.space = nil
		kept.Add(-1)
	}
}

// CopyWhole is CopyRange of the whole blob, of which the last piece is written
// only when proven returns nil: a reader that counts bytes, as HTTP clients do, does not
// take for whole what is not.
func (v *Verified) CopyWhole(
	ctx context.Context, w io.Writer, proven func(context.Context) error, progress func(written int64),
) error {
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
	if err := raw.Control(func(fd uintptr) { again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) }); err != nil ||
		again == nil {
		return nil, nil
	}
	if _, err := again.Seek(off, io.SeekStart); err != nil {
		again.Close()
		return nil, nil
	}
	return to, again
}
