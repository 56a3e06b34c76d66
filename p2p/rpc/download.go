package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// download is an open blob that is arriving from peers: the daemon's file, of
// which a call says what can be read.
type download struct {
	*digest.Verified
	table  *digest.Table
	file   *os.File
	client *Client
	ctx    context.Context // the caller's
	stream openStream
	cancel func() // ends the call

	over    chan struct{} // closed when nothing more arrives
	asking  chan struct{} // has a token in it where there is something in wants
	running sync.WaitGroup

	mu      sync.Mutex
	there   []bool                 // pieces that can be read
	asked   []bool                 // pieces that were wanted first
	wants   []*pb.OpenRequest_Want // to be sent
	missing int                    // pieces
	waiting map[int]chan struct{}  // closed when the piece is there
	ended   bool                   // over is closed
	err     error                  // why the blob did not become whole
	sources []p2p.Source
}

func newDownload(table *digest.Table, file *os.File) *download {
	pieces := table.Pieces()
	d := &download{
		table: table, file: file, missing: pieces,
		over: make(chan struct{}), asking: make(chan struct{}, 1),
		there: make([]bool, pieces), asked: make([]bool, pieces), waiting: make(map[int]chan struct{}),
	}
	d.Verified = digest.NewArriving(file, table, d.await)
	return d
}

// follow makes d a blob that arrives as the call of stream tells; cancel ends the
// call, and over says that it has ended. Both are called, whatever follow returns.
func (c *Client) follow(ctx context.Context, d *download, stream openStream, cancel, over func()) (p2p.Blob, error) {
	d.client, d.ctx, d.stream, d.cancel = c, ctx, stream, cancel
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		cancel()
		over()
		d.file.Close()
		return nil, c.closedError()
	}
	c.downloads[d] = struct{}{}
	d.running.Go(d.ask)
	d.running.Go(func() {
		d.receive()
		cancel()
		c.mu.Lock()
		delete(c.downloads, d)
		c.mu.Unlock()
		over()
	})
	return d, nil
}

// receive takes in what the daemon says of the blob, up to the call's end.
func (d *download) receive() {
	for {
		reply, err := d.stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errors.New("the daemon's answer ends before the blob is whole")
		}
		whole := false
		if err == nil {
			notice(d.ctx, reply)
			whole, err = d.add(reply)
		}
		if err != nil {
			d.finish(d.client.callError(d.ctx, err))
			return
		}
		if whole {
			d.finish(nil)
			_, _ = d.stream.Recv() // the call's end, which is on its way
			return
		}
	}
}

// add takes in one message. It reports whether the blob is whole.
func (d *download) add(reply *pb.OpenReply) (whole bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if reply.GetHeader() != nil || reply.GetSent() || len(reply.GetCrc32C()) > 0 {
		return false, errors.New("the daemon's answer begins again")
	}
	for _, p := range reply.GetPieces() {
		i := int(p.GetIndex())
		if i >= len(d.there) || d.there[i] {
			return false, fmt.Errorf("the daemon's answer has piece %d of %d, or has it twice", i, len(d.there))
		}
		d.table.CRC[i], d.there[i] = p.GetCrc32C(), true
		d.missing--
		if arrived, ok := d.waiting[i]; ok {
			close(arrived)
			delete(d.waiting, i)
		}
	}
	done := reply.GetDone()
	if done == nil {
		return false, nil
	}
	if d.missing > 0 {
		return false, fmt.Errorf("the daemon's answer ends without %d of %d pieces", d.missing, len(d.there))
	}
	d.sources, err = sourcesOf(done.GetSources())
	return err == nil, err
}

// finish says that nothing more arrives: because the blob is whole and proven, or
// because of err. What is said first counts.
func (d *download) finish(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ended {
		d.ended, d.err = true, err
		close(d.over)
	}
}

// ask sends what is wanted.
func (d *download) ask() {
	for {
		select {
		case <-d.asking:
		case <-d.over:
			return
		}
		d.mu.Lock()
		wants := d.wants
		d.wants = nil
		d.mu.Unlock()
		for _, want := range wants {
			if d.stream.Send(&pb.OpenRequest{Want: want}) != nil {
				return // receive is told why
			}
		}
	}
}

// want has the pieces of n bytes from off on fetched before others, but for those
// that are there or that it was called for before.
func (d *download) want(off, n int64) {
	if off < 0 || n <= 0 || off >= d.table.Size {
		return
	}
	first := int(off / d.table.PieceLength)
	last := int((min(n, d.table.Size-off) + off - 1) / d.table.PieceLength)
	d.mu.Lock()
	defer d.mu.Unlock()
	for first <= last && (d.there[first] || d.asked[first]) {
		first++
	}
	for first <= last && (d.there[last] || d.asked[last]) {
		last--
	}
	if first > last || d.ended {
		return
	}
	for i := first; i <= last; i++ {
		d.asked[i] = true
	}
	d.wants = append(d.wants, &pb.OpenRequest_Want{First: uint32(first), Last: uint32(last)})
	select {
	case d.asking <- struct{}{}:
	default:
	}
}

// await waits for piece i.
func (d *download) await(ctx context.Context, i int) error {
	d.mu.Lock()
	if d.err != nil || d.there[i] {
		defer d.mu.Unlock()
		return d.err
	}
	arrived, ok := d.waiting[i]
	if !ok {
		arrived = make(chan struct{})
		d.waiting[i] = arrived
	}
	d.mu.Unlock()
	select {
	case <-arrived:
	case <-d.over:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// ReadAt implements [io.ReaderAt].
func (d *download) ReadAt(p []byte, off int64) (int, error) {
	d.want(off, int64(len(p)))
	return d.Verified.ReadAt(p, off)
}

// CopyRange implements [p2p.Blob]. Of a copy of the whole only the beginning is
// asked for: peers that fetch in the same order have nothing to give each other.
func (d *download) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(written int64)) error {
	if off != 0 || n != d.Size() {
		d.want(off, n)
		return d.Verified.CopyRange(ctx, w, off, n, progress)
	}
	d.want(0, 1)
	return d.Verified.CopyWhole(ctx, w, d.wait, progress)
}

// wait waits until the whole is proven.
func (d *download) wait(ctx context.Context) error {
	select {
	case <-d.over:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Sources implements [p2p.Blob]. They are known when the blob is whole.
func (d *download) Sources() []p2p.Source {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sources
}

// Close ends the call, if it is not over: the daemon gives the download up where
// nobody else waits for it. Then it closes the file.
func (d *download) Close() error {
	d.finish(fmt.Errorf("blob %s: %w", d.table.Digest, os.ErrClosed))
	d.cancel()
	d.running.Wait()
	return d.file.Close()
}
