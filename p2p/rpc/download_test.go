package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// arrival is a blob of which pieces arrive when a test says so.
type arrival struct {
	p2p.Blob // nothing: the server reads no blob
	t        testing.TB
	content  []byte
	full     *digest.Table
	table    *digest.Table
	in, out  *os.File // the same file, written and read
	pieces   chan int
	over     chan error // has why nothing more arrives, nil where the whole is proven
	wants    chan wanted
	sources  []p2p.Source
	closed   chan struct{}
}

// arriving returns an arrival of content that nothing has arrived of, and an
// engine that opens it.
func arriving(t testing.TB, content []byte) (*arrival, *hooked) {
	t.Helper()
	r := digest.NewRecorder(digest.SHA256)
	r.Write(content)
	full, err := r.Table()
	if err != nil {
		t.Fatal(err)
	}
	return arrivalOf(t, full, content)
}

func arrivalOf(t testing.TB, full *digest.Table, content []byte) (*arrival, *hooked) {
	t.Helper()
	in, err := os.Create(filepath.Join(t.TempDir(), "arriving"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	out, err := os.Open(in.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Truncate(full.Size); err != nil {
		t.Fatal(err)
	}
	table := *full
	table.CRC, table.Chain = make([]uint32, len(full.CRC)), nil
	a := &arrival{
		t: t, content: content, full: full, table: &table, in: in, out: out,
		pieces: make(chan int, len(full.CRC)), over: make(chan error, 1), wants: make(chan wanted, 100),
		closed: make(chan struct{}),
	}
	h := &hooked{Engine: newStore(t.TempDir())}
	h.open = func(_ context.Context, task p2p.Task) (p2p.Blob, error) {
		if task.Digest != full.Digest {
			return nil, p2p.ErrNotFound
		}
		return a, nil
	}
	return a, h
}

// put makes pieces arrive.
func (a *arrival) put(pieces ...int) {
	a.t.Helper()
	for _, i := range pieces {
		start, end := a.full.Bounds(i)
		if a.content != nil {
			if _, err := a.in.WriteAt(a.content[start:end], start); err != nil {
				a.t.Fatal(err)
			}
		}
		a.table.CRC[i] = a.full.CRC[i]
		a.pieces <- i
	}
}

// end ends the download, after what has arrived so far.
func (a *arrival) end(err error) {
	a.over <- err
	close(a.pieces)
}

// wanted returns the next pieces that are wanted first.
func (a *arrival) wanted() wanted {
	a.t.Helper()
	select {
	case w := <-a.wants:
		return w
	case <-time.After(30 * time.Second):
		a.t.Fatal("nothing is wanted")
		return wanted{}
	}
}

// requireClosed waits until the server has closed the blob.
func (a *arrival) requireClosed() {
	a.t.Helper()
	select {
	case <-a.closed:
	case <-time.After(30 * time.Second):
		a.t.Fatal("the blob is not closed")
	}
}

var _ p2p.ArrivingBlob = (*arrival)(nil)

func (a *arrival) File() *os.File        { return a.out }
func (a *arrival) Table() *digest.Table  { return a.table }
func (a *arrival) Sources() []p2p.Source { return a.sources }
func (a *arrival) Want(first, last int)  { a.wants <- wanted{first: first, last: last} }

func (a *arrival) Close() error {
	close(a.closed)
	return a.out.Close()
}

func (a *arrival) Arrived(ctx context.Context) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		for {
			select {
			case i, more := <-a.pieces:
				if !more {
					if err := <-a.over; err != nil {
						yield(0, err)
					}
					return
				}
				if !yield(i, nil) {
					return
				}
			case <-ctx.Done():
				yield(0, context.Cause(ctx))
				return
			}
		}
	}
}

func (a *arrival) task() p2p.Task { return p2p.Task{Tag: "models", Digest: a.full.Digest} }

func (a *arrival) opened(c *Client) p2p.Blob {
	a.t.Helper()
	b, err := c.Open(a.t.Context(), a.task(), p2p.Network)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { b.Close() })
	if b.Size() != a.full.Size {
		a.t.Errorf("size is %d, want %d", b.Size(), a.full.Size)
	}
	return b
}

// result is what a read in the background ended with.
type result struct {
	data []byte
	err  error
}

func copyAll(ctx context.Context, b p2p.Blob, off, n int64) <-chan result {
	done := make(chan result, 1)
	go func() {
		var buf bytes.Buffer
		err := b.CopyRange(ctx, &buf, off, n, nil)
		done <- result{buf.Bytes(), err}
	}()
	return done
}

func readPart(b p2p.Blob, off, n int64) <-chan result {
	done := make(chan result, 1)
	go func() {
		p := make([]byte, n)
		read, err := b.ReadAt(p, off)
		done <- result{p[:read], err}
	}()
	return done
}

const pieceLength = digest.MinPieceLength

func TestDownload(t *testing.T) {
	content := random(5*pieceLength + 17)
	a, h := arriving(t, content)
	a.sources = []p2p.Source{{Peer: "12D3KooWA", Address: "10.0.0.7:4001", Bytes: 7}, {Peer: "12D3KooWB"}}
	b := a.opened(pair(t, h))

	// The whole is copied in order; that it needs all of it goes without saying.
	progress := []int64{}
	whole := make(chan result, 1)
	go func() {
		var buf bytes.Buffer
		err := b.CopyRange(t.Context(), &buf, 0, b.Size(), func(written int64) { progress = append(progress, written) })
		whole <- result{buf.Bytes(), err}
	}()
	if w := a.wanted(); w.first != 0 || w.last != 0 {
		t.Errorf("a copy of the whole wants %d to %d first", w.first, w.last)
	}
	// A part is wanted first, once for all that is read of it.
	part := copyAll(t.Context(), b, 2*pieceLength+5, 2*pieceLength)
	if w := a.wanted(); w.first != 2 || w.last != 4 {
		t.Errorf("a copy of a part wants %d to %d first", w.first, w.last)
	}
	at := readPart(b, 3*pieceLength, 10)
	last := readPart(b, 5*pieceLength, 100)
	if w := a.wanted(); w.first != 5 || w.last != 5 {
		t.Errorf("a read of the end wants %d to %d first", w.first, w.last)
	}
	a.put(5, 3)
	if r := <-last; !bytes.Equal(r.data, content[5*pieceLength:]) || r.err != io.EOF {
		t.Errorf("read %d bytes, %v", len(r.data), r.err)
	}
	if r := <-at; !bytes.Equal(r.data, content[3*pieceLength:3*pieceLength+10]) || r.err != nil {
		t.Errorf("read %d bytes, %v", len(r.data), r.err)
	}
	a.put(4, 2)
	if r := <-part; !bytes.Equal(r.data, content[2*pieceLength+5:4*pieceLength+5]) || r.err != nil {
		t.Errorf("copied %d bytes, %v", len(r.data), r.err)
	}
	// A read gives up with its context, and the blob goes on.
	ctx, cancel := context.WithCancelCause(t.Context())
	given := copyAll(ctx, b, 0, 1)
	cause := errors.New("the user has seen enough")
	cancel(cause)
	if r := <-given; !errors.Is(r.err, cause) {
		t.Errorf("got %v", r.err)
	}
	// Of what is read, that is wanted which is not there and was not wanted before.
	all := readPart(b, 0, b.Size())
	if w := a.wanted(); w.first != 1 || w.last != 1 {
		t.Errorf("a read of the whole wants %d to %d first", w.first, w.last)
	}
	a.put(0, 1)
	if r := <-all; !bytes.Equal(r.data, content) || r.err != nil {
		t.Errorf("read %d bytes, %v", len(r.data), r.err)
	}
	if b.Sources() != nil {
		t.Errorf("sources are %v before the end", b.Sources())
	}
	// All is there, and the whole is not proven.
	select {
	case r := <-whole:
		t.Errorf("the whole is copied before it is proven: %v", r.err)
	default:
	}
	a.end(nil)
	if r := <-whole; !bytes.Equal(r.data, content) || r.err != nil {
		t.Errorf("copied %d bytes, %v", len(r.data), r.err)
	}
	if !slices.IsSorted(progress) || progress[len(progress)-1] != b.Size() {
		t.Errorf("progress %v does not grow to %d", progress, b.Size())
	}
	if !reflect.DeepEqual(b.Sources(), a.sources) {
		t.Errorf("sources are %v", b.Sources())
	}
	a.requireClosed()
	if !bytes.Equal(readAll(t, b), content) {
		t.Error("the blob differs")
	}
	select {
	case w := <-a.wants:
		t.Errorf("%d to %d are wanted, and were there or had been asked for", w.first, w.last)
	default:
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := b.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed blob: %v", err)
	}
}

// What has arrived is as independent as a blob that was here.
func TestDownloadOutlivesEverything(t *testing.T) {
	content := random(3 * pieceLength)
	a, h := arriving(t, content)
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	server := serveAt(t, h, socket)
	c := dial(t, socket)
	ctx, cancel := context.WithCancel(t.Context())
	b, err := c.Open(ctx, a.task(), p2p.Network)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	a.put(0, 1, 2)
	a.end(nil)
	if !bytes.Equal(readAll(t, b), content) {
		t.Error("the blob differs")
	}
	cancel()
	if err := errors.Join(c.Close(), server.Shutdown(t.Context())); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, b), content) {
		t.Error("the blob differs")
	}
}

// What the engine waits for is told to a client that wants to know, before there is a blob and after.
func TestNotices(t *testing.T) {
	content := random(2 * pieceLength)
	a, h := arriving(t, content)
	open, told := h.open, make(chan string)
	var notice func(string)
	h.open = func(ctx context.Context, task p2p.Task) (p2p.Blob, error) {
		if notice = p2p.NoticeOf(ctx); notice != nil {
			notice("a peer")
			if got := <-told; got != "a peer" {
				t.Errorf("told is %q", got)
			}
		}
		return open(ctx, task)
	}
	c := pair(t, h)
	ctx := p2p.WithNotice(t.Context(), func(text string) { told <- text })
	b, err := c.Open(ctx, a.task(), p2p.Network)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	notice("a \xff piece")
	if got := <-told; got != "a \uFFFD piece" {
		t.Errorf("told is %q", got)
	}
	a.put(0, 1)
	a.end(nil)
	if r := <-copyAll(ctx, b, 0, b.Size()); !bytes.Equal(r.data, content) || r.err != nil {
		t.Errorf("read %d bytes, %v", len(r.data), r.err)
	}
}

func TestDownloadOfNothing(t *testing.T) {
	a, h := arriving(t, nil)
	a.sources = []p2p.Source{{Peer: "12D3KooWA"}}
	b := a.opened(pair(t, h))
	whole := copyAll(t.Context(), b, 0, 0)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the user has seen enough")
	cancel(cause)
	if r := <-copyAll(ctx, b, 0, 0); !errors.Is(r.err, cause) {
		t.Errorf("not proven, and copied: %v", r.err)
	}
	select {
	case r := <-whole:
		t.Errorf("copied before it is proven: %v", r.err)
	default:
	}
	a.end(nil)
	if r := <-whole; len(r.data) != 0 || r.err != nil {
		t.Errorf("got %q, %v", r.data, r.err)
	}
	if len(b.Sources()) != 1 {
		t.Errorf("sources are %v", b.Sources())
	}
	if n, err := b.ReadAt(make([]byte, 1), 0); n != 0 || err != io.EOF {
		t.Errorf("got %d, %v", n, err)
	}
}

// What ends a download ends the reads that wait, and fails those that come, also
// of pieces that were there.
func TestDownloadEnds(t *testing.T) {
	lost := fmt.Errorf("piece 2: %w: every peer that had it is gone", p2p.ErrUnreachable)
	for name, test := range map[string]struct {
		end  func(t *testing.T, a *arrival, s *Server, c *Client, b p2p.Blob, cancel func())
		want error
	}{
		"fetch fails": {func(_ *testing.T, a *arrival, _ *Server, _ *Client, _ p2p.Blob, _ func()) { a.end(lost) },
			p2p.ErrUnreachable},
		"proof fails": {func(_ *testing.T, a *arrival, _ *Server, _ *Client, _ p2p.Blob, _ func()) {
			a.end(&digest.MismatchError{})
		}, digest.ErrMismatch},
		"pieces lack": {func(_ *testing.T, a *arrival, _ *Server, _ *Client, _ p2p.Blob, _ func()) { a.end(nil) },
			nil},
		"context ends": {func(_ *testing.T, _ *arrival, _ *Server, _ *Client, _ p2p.Blob, cancel func()) { cancel() },
			context.Canceled},
		"daemon goes": {func(t *testing.T, _ *arrival, s *Server, _ *Client, _ p2p.Blob, _ func()) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			s.Shutdown(ctx)
		}, p2p.ErrUnavailable},
		"client closes": {func(t *testing.T, _ *arrival, _ *Server, c *Client, _ p2p.Blob, _ func()) {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}, p2p.ErrClosed},
		"blob closes": {func(t *testing.T, _ *arrival, _ *Server, _ *Client, b p2p.Blob, _ func()) {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}, os.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			a, h := arriving(t, random(4*pieceLength))
			socket := filepath.Join(t.TempDir(), "run", "d.sock")
			server := serveAt(t, h, socket)
			c := dial(t, socket)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			b, err := c.Open(ctx, a.task(), p2p.Network)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			before := readPart(b, 0, 2*pieceLength)
			if w := a.wanted(); w.first != 0 || w.last != 1 {
				t.Errorf("%d to %d are wanted", w.first, w.last)
			}
			a.put(0, 1)
			if r := <-before; r.err != nil {
				t.Fatal(r.err)
			}
			whole := copyAll(t.Context(), b, 0, b.Size())
			waiting := readPart(b, 2*pieceLength, pieceLength)
			if w := a.wanted(); w.first != 2 || w.last != 2 {
				t.Errorf("%d to %d are wanted", w.first, w.last)
			}
			test.end(t, a, server, c, b, cancel)
			check := func(what string, err error) {
				t.Helper()
				if err == nil || test.want != nil && !errors.Is(err, test.want) {
					t.Errorf("%s: %v, want %v", what, err, test.want)
				}
			}
			check("a read that waits", (<-waiting).err)
			check("a copy that waits", (<-whole).err)
			check("a read of what was there", (<-readPart(b, 0, 10)).err)
			check("a copy of what was there", (<-copyAll(t.Context(), b, 0, 10)).err)
			a.requireClosed()
			if b.Sources() != nil {
				t.Errorf("sources are %v", b.Sources())
			}
		})
	}
}

// Every piece is there, and the whole is not what its digest says.
func TestDownloadIsNotProven(t *testing.T) {
	a, h := arriving(t, random(2*pieceLength))
	b := a.opened(pair(t, h))
	whole := copyAll(t.Context(), b, 0, b.Size())
	a.put(1, 0)
	if r := <-readPart(b, 0, b.Size()); r.err != nil { // nothing is missing
		t.Error(r.err)
	}
	a.end(fmt.Errorf("%s: %w", a.full.Digest, digest.ErrMismatch))
	if r := <-whole; !errors.Is(r.err, digest.ErrMismatch) || len(r.data) == len(a.content) {
		t.Errorf("got %d bytes, %v; want less than all", len(r.data), r.err)
	}
}

func TestDownloadOpenedWithClosingClient(t *testing.T) {
	a, h := arriving(t, random(pieceLength))
	c := pair(t, h)
	open := h.open
	closed := make(chan error, 1)
	h.open = func(ctx context.Context, task p2p.Task) (p2p.Blob, error) {
		go func() { closed <- c.Close() }()
		eventually(t, "the client is closing", c.isClosed)
		return open(ctx, task)
	}
	if _, err := c.Open(t.Context(), a.task(), p2p.Network); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	a.requireClosed()
}

func TestNothingLeaksOfDownloads(t *testing.T) {
	first, h := arriving(t, random(3*pieceLength))
	c := pair(t, h)
	round := func(a *arrival, whole bool) {
		b, err := c.Open(t.Context(), a.task(), p2p.Network)
		if err != nil {
			t.Fatal(err)
		}
		if whole {
			a.put(2, 1, 0)
			a.end(nil)
			readAll(t, b)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		a.requireClosed()
		a.in.Close()
	}
	round(first, true)
	before := fdCount(t)
	for i := range 50 {
		a, again := arrivalOf(t, first.full, first.content)
		h.open = again.open
		round(a, i%2 == 0)
	}
	eventually(t, "files are closed", func() bool { return fdCount(t) <= before })
	if n := len(c.downloads); n > 0 {
		t.Errorf("%d downloads are remembered", n)
	}
}

// sparse returns the table of a blob of pieces of zeros.
func sparse(pieces int) *digest.Table {
	size := int64(pieces) * digest.MaxPieceLength
	table := &digest.Table{Digest: digest.SHA256.FromString("sparse"), Size: size,
		PieceLength: digest.PieceLength(size)}
	zero := digest.CRC32C(make([]byte, table.PieceLength))
	for range table.Pieces() {
		table.CRC = append(table.CRC, zero)
	}
	return table
}

// stream begins an Open by hand.
func stream(t *testing.T, c *Client, first *pb.OpenRequest) grpc.BidiStreamingClient[pb.OpenRequest, pb.OpenReply] {
	t.Helper()
	s, err := c.current.daemon.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(first); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDownloadOfManyPieces(t *testing.T) {
	const pieces = 10_000
	a, h := arrivalOf(t, sparse(pieces), nil)
	c := pair(t, h)
	order := rand.New(rand.NewPCG(1, 2)).Perm(pieces)
	// What is there when the blob is opened comes in few messages.
	a.put(order...)
	a.end(nil)
	raw := stream(t, c, &pb.OpenRequest{
		Task: taskMessage(a.task()), Scope: pb.Scope_SCOPE_NETWORK, DescriptorId: c.current.lastID.Add(1)})
	messages, got := 0, []int{}
	for {
		reply, err := raw.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		messages++
		for _, p := range reply.Pieces {
			got = append(got, int(p.Index))
		}
		if len(reply.Pieces) > maxArrived {
			t.Errorf("%d pieces in one message", len(reply.Pieces))
		}
	}
	if !slices.Equal(got, order) {
		t.Errorf("%d pieces, or in another order", len(got))
	}
	if messages > pieces/4 {
		t.Errorf("%d messages for %d pieces that were there", messages, pieces)
	}

	a, again := arrivalOf(t, sparse(pieces), nil)
	h.open = again.open
	b := a.opened(c)
	part := readPart(b, b.Size()-10, 10)
	if w := a.wanted(); w.first != pieces-1 || w.last != pieces-1 {
		t.Errorf("%d to %d are wanted", w.first, w.last)
	}
	go func() {
		a.put(order...)
		a.end(nil)
	}()
	if r := <-part; r.err != nil || len(r.data) != 10 {
		t.Errorf("read %d bytes, %v", len(r.data), r.err)
	}
	<-b.(*download).over
	if r := <-readPart(b, 0, 10); r.err != nil {
		t.Error(r.err)
	}
}

// Of many pieces, one that was asked for is told of at once, and others after a while,
// however few they are.
func TestDownloadTellsOfFew(t *testing.T) {
	const pieces = 4 * announcements
	few := func(delay time.Duration, read func(b p2p.Blob, a *arrival)) {
		defer func(d time.Duration) { announceDelay = d }(announceDelay)
		announceDelay = delay
		a, h := arrivalOf(t, sparse(pieces), nil)
		b := a.opened(pair(t, h))
		read(b, a)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		a.requireClosed()
	}
	few(time.Hour, func(b p2p.Blob, a *arrival) {
		for _, i := range []int{7, 9, 8} {
			part := readPart(b, int64(i)*a.full.PieceLength, 10)
			a.wanted()
			a.put(i)
			if r := <-part; r.err != nil || len(r.data) != 10 {
				t.Errorf("piece %d: read %d bytes, %v", i, len(r.data), r.err)
			}
		}
		// Also where it was there before it was asked for.
		a.put(20)
		if r := <-readPart(b, 20*a.full.PieceLength, 10); r.err != nil || len(r.data) != 10 {
			t.Errorf("piece 20: read %d bytes, %v", len(r.data), r.err)
		}
	})
	few(time.Millisecond, func(b p2p.Blob, a *arrival) {
		progress := make(chan int64, pieces)
		ctx, cancel := context.WithCancel(t.Context())
		copied := make(chan error)
		go func() {
			copied <- b.CopyRange(ctx, io.Discard, 0, b.Size(), func(written int64) { progress <- written })
		}()
		a.wanted()
		for i := range 3 {
			a.put(i)
			select {
			case n := <-progress:
				if want := int64(i+1) * a.full.PieceLength; n != want {
					t.Errorf("%d bytes are copied, want %d", n, want)
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("piece %d is not told of", i)
			}
		}
		cancel()
		<-copied
	})
}

// A client that does not read stops the daemon, and its messages do not pile up.
func TestDownloadOfSlowReader(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const pieces = 1 << 18 // 2.7 MB of messages, of which 1 MiB can be under way
	a, h := arrivalOf(t, sparse(pieces), nil)
	var yielded atomic.Int64
	h.open = func(context.Context, p2p.Task) (p2p.Blob, error) { return &flood{a, &yielded}, nil }
	c := pair(t, h)
	raw := stream(t, c, &pb.OpenRequest{
		Task: taskMessage(a.task()), Scope: pb.Scope_SCOPE_NETWORK, DescriptorId: c.current.lastID.Add(1)})
	// Until it stands still for a while. Where it never did, all would be there.
	for before := int64(-1); before != yielded.Load() || before == 0; {
		before = yielded.Load()
		select {
		case <-time.After(200 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
	if n := yielded.Load(); n > pieces*3/4 {
		t.Errorf("%d of %d pieces were announced to a client that does not read", n, pieces)
	}
	got := 0
	for {
		reply, err := raw.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got += len(reply.Pieces)
	}
	if got != pieces {
		t.Errorf("%d of %d pieces", got, pieces)
	}
}

// flood is a blob all pieces of which are there.
type flood struct {
	*arrival
	yielded *atomic.Int64
}

func (f *flood) Arrived(context.Context) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		for i := range f.full.CRC {
			f.yielded.Add(1)
			f.table.CRC[i] = f.full.CRC[i]
			if !yield(i, nil) {
				return
			}
		}
	}
}

// A client that asks for what there is not is refused, and its download given up.
func TestBadWants(t *testing.T) {
	for name, bad := range map[string]*pb.OpenRequest{
		"past the end": {Want: &pb.OpenRequest_Want{First: 1, Last: 2}},
		"backwards":    {Want: &pb.OpenRequest_Want{First: 1, Last: 0}},
		"nothing":      {},
		"open again":   {Task: taskMessage(someTask), Scope: pb.Scope_SCOPE_NETWORK},
	} {
		t.Run(name, func(t *testing.T) {
			a, h := arriving(t, random(2*pieceLength))
			c := pair(t, h)
			raw := stream(t, c, &pb.OpenRequest{
				Task: taskMessage(a.task()), Scope: pb.Scope_SCOPE_NETWORK, DescriptorId: c.current.lastID.Add(1)})
			if reply, err := raw.Recv(); err != nil || !reply.GetSent() || !reply.GetHeader().GetArriving() {
				t.Fatalf("got %v, %v", reply, err)
			}
			if err := raw.Send(&pb.OpenRequest{Want: &pb.OpenRequest_Want{First: 1, Last: 1}}); err != nil {
				t.Fatal(err)
			}
			if w := a.wanted(); w.first != 1 || w.last != 1 {
				t.Errorf("%d to %d are wanted", w.first, w.last)
			}
			if err := raw.Send(bad); err != nil {
				t.Fatal(err)
			}
			if _, err := raw.Recv(); status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v", err)
			}
			a.requireClosed()
			if len(a.wants) > 0 {
				t.Error("the engine got it")
			}
		})
	}
}

// A client of an earlier version says what to open and no more.
func TestOpenWithoutWants(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	task := add(t, c, "", strings.NewReader("content"))
	raw := stream(t, c, &pb.OpenRequest{
		Task: taskMessage(task), Scope: pb.Scope_SCOPE_LOCAL, DescriptorId: c.current.lastID.Add(1)})
	raw.CloseSend()
	if reply, err := raw.Recv(); err != nil || !reply.GetSent() || len(reply.GetCrc32C()) != 1 {
		t.Errorf("got %v, %v", reply, err)
	}
	if _, err := raw.Recv(); err != io.EOF {
		t.Errorf("got %v", err)
	}
	raw, err := c.current.daemon.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	raw.CloseSend()
	if _, err := raw.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an Open of nothing: %v", err)
	}
}

// What a daemon must not say of a blob that is arriving.
func TestBadDownloadMessages(t *testing.T) {
	piece := func(i uint32) *pb.OpenReply { return &pb.OpenReply{Pieces: []*pb.OpenReply_Piece{{Index: i}}} }
	done := &pb.OpenReply{Done: &pb.OpenReply_Done{}}
	for name, messages := range map[string][]*pb.OpenReply{
		"piece past the end": {piece(2)},
		"largest index":      {piece(1<<32 - 1)},
		"piece twice":        {piece(1), piece(1)},
		"done too early":     {piece(1), done},
		"bad source":         {piece(0), piece(1), {Done: &pb.OpenReply_Done{Sources: []*pb.Source{{Bytes: -1}}}}},
		"header":             {{Header: &pb.OpenReply_Header{}}},
		"sent":               {{Sent: true}},
		"checksum":           {{Crc32C: []uint32{1}}},
	} {
		d := newDownload(&digest.Table{Size: 2 * pieceLength, PieceLength: pieceLength, CRC: make([]uint32, 2)}, nil)
		var err error
		for _, m := range messages {
			var whole bool
			if whole, err = d.add(m); whole {
				t.Errorf("%s: it is whole", name)
			}
		}
		if err == nil || !strings.Contains(err.Error(), "daemon's answer") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := newDownload(&digest.Table{Size: 2 * pieceLength, PieceLength: pieceLength, CRC: make([]uint32, 2)}, nil)
	for i, m := range []*pb.OpenReply{{}, piece(1), piece(0), done} {
		if whole, err := d.add(m); err != nil || whole != (m == done) {
			t.Errorf("message %d: %t, %v", i, whole, err)
		}
	}
}
