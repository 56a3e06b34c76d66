package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
	"github.com/dfcache/dfcache/p2p/source"
)

// commitPart is the length in bytes that a part of a commit should have.
const commitPart = 1 << 20

// pipeSize is the size in bytes that is asked of the kernel for a pipe. The
// default of 64 KiB costs a switch between client and daemon every 16 pages.
const pipeSize = 1 << 20

// ingest is one Ingest stream.
type ingest struct {
	client  *Client
	ctx     context.Context // the caller's
	session *session
	stream  grpc.BidiStreamingClient[pb.IngestRequest, pb.IngestReply]
	cancel  context.CancelFunc // ends the stream
	over    error              // why nothing can follow but Close
}

var errCommitted = errors.New("the ingest is committed already")

// Ingest implements [p2p.Engine]. It does not wait for the daemon: where the
// daemon can't begin an ingest, the first Add or Commit says so.
//
// An Add of a reader that is not a regular *os.File copies it to the daemon
// through a pipe; so does one of a file whose content may depend on who reads it, as in /proc. Where ctx ends or the daemon fails while a Read of src blocks,
// Add returns at once, and the goroutine that copies ends when that Read
// returns. It does not close src.
func (c *Client) Ingest(ctx context.Context) (p2p.Ingest, error) {
	s, end, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	call, cancel := context.WithCancel(ctx)
	stream, err := s.daemon.Ingest(call)
	if err != nil {
		cancel()
		return nil, c.callError(ctx, err)
	}
	return &ingest{client: c, ctx: ctx, session: s, stream: stream, cancel: cancel}, nil
}

// begin begins a call of the ingest, and returns what ends it.
func (i *ingest) begin() (end func(), err error) {
	if i.over != nil {
		return nil, fmt.Errorf("ingest can't go on: %w", i.over)
	}
	i.client.mu.Lock()
	defer i.client.mu.Unlock()
	if i.client.closed {
		i.fail(i.client.closedError())
		return nil, i.over
	}
	i.client.calls.Add(1)
	return i.client.calls.Done, nil
}

// fail ends the session: the daemon drops everything.
func (i *ingest) fail(err error) {
	i.over = err
	i.cancel()
}

// Add implements [p2p.Ingest].
func (i *ingest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	end, err := i.begin()
	if err != nil {
		return p2p.Added{}, err
	}
	defer end()
	// Close is not to wait for a reader that gives nothing.
	defer context.AfterFunc(i.client.closing, i.cancel)()
	req := &pb.IngestRequest_Add{Want: string(opts.Want), Algorithm: string(opts.Algorithm)}
	if _, err = parseAdd(req); err == nil {
		err = source.Check(src)
	}
	if err != nil {
		i.fail(err)
		return p2p.Added{}, err
	}
	var added p2p.Added
	file, err := source.New(src)
	switch {
	case err != nil:
	case file != nil && isPlain(file.File):
		req.Offset = file.Start
		added, err = i.add(req, file.File, opts.Progress)
	default:
		// What a file says may depend on who reads it: that is done here.
		if added, err = i.addPipe(req, src, opts.Progress); err == nil {
			err = file.Unchanged(i.ctx, added.Digest, added.Size)
		}
	}
	if err != nil {
		i.fail(err)
		return p2p.Added{}, err
	}
	return added, nil
}

// isPlain reports whether the content of f is the same for the daemon.
func isPlain(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	same := false
	controlErr := raw.Control(func(fd uintptr) { same, err = source.IsPlain(int(fd)) })
	return same && err == nil && controlErr == nil
}

// add hands f to the daemon, and waits until it has taken it in.
func (i *ingest) add(req *pb.IngestRequest_Add, f *os.File, progress func(int64)) (added p2p.Added, err error) {
	channel := i.session.conn.channel
	req.DescriptorId = i.session.lastID.Add(1)
	if err := channel.send(i.ctx, req.DescriptorId, f); err != nil {
		if i.ctx.Err() != nil {
			return p2p.Added{}, context.Cause(i.ctx)
		}
		return p2p.Added{}, i.client.lostError(err)
	}
	defer func() {
		if err != nil {
			channel.withdraw(req.DescriptorId) // the daemon may not have heard of the add
		}
	}()
	if err := i.send(&pb.IngestRequest{Request: &pb.IngestRequest_Add_{Add: req}}); err != nil {
		return p2p.Added{}, err
	}
	return i.waitAdded(progress)
}

// waitAdded waits for the answer to an add or a rehash.
func (i *ingest) waitAdded(progress func(int64)) (p2p.Added, error) {
	last := int64(-1)
	for {
		reply, err := i.receive()
		if err != nil {
			return p2p.Added{}, err
		}
		switch r := reply.GetReply().(type) {
		case *pb.IngestReply_Progress_:
			if last = r.Progress.GetBytes(); progress != nil {
				progress(last)
			}
		case *pb.IngestReply_Added_:
			added := p2p.Added{Digest: digest.Digest(r.Added.GetDigest()), Size: r.Added.GetSize()}
			if _, err := digest.Parse(string(added.Digest)); err != nil {
				return p2p.Added{}, answerError(err)
			}
			if progress != nil && last != added.Size {
				progress(added.Size)
			}
			return added, nil
		case *pb.IngestReply_Committed_:
			return p2p.Added{}, errors.New("the daemon's answer is that of a commit")
		}
	}
}

// addPipe copies src to the daemon through a pipe.
func (i *ingest) addPipe(req *pb.IngestRequest_Add, src io.Reader, progress func(int64)) (p2p.Added, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return p2p.Added{}, err
	}
	if raw, err := w.SyscallConn(); err == nil {
		// Where the user has too many large pipes, this one stays small.
		raw.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
	broken := make(chan error, 1) // why src could not be read
	copied := make(chan error, 1) // why the pipe could not be written; nil where src was copied or broke
	go func() {
		out := &pipeWriter{w: w}
		buf := copyBuffers.Get().(*[256 << 10]byte)
		_, err := io.CopyBuffer(out, source.Guard(i.stream.Context(), src), buf[:])
		copyBuffers.Put(buf)
		// Where the daemon has ended the stream, src was not what broke.
		if err != nil && out.err == nil && i.stream.Context().Err() == nil {
			broken <- err
			i.cancel() // before the daemon can take the end of the pipe for that of src
		}
		w.Close()
		copied <- out.err
	}()
	added, err := i.add(req, r, progress)
	r.Close()
	if err != nil {
		w.Close() // nothing reads from it any more
	} else {
		// The daemon has seen the end of the pipe, so this is over or about to be.
		select {
		case err = <-copied:
			if err != nil {
				err = fmt.Errorf("the daemon did not take in everything: %w", err)
			}
		case <-i.ctx.Done():
			err = context.Cause(i.ctx)
		}
	}
	select {
	case err = <-broken:
		err = fmt.Errorf("read what is to be added: %w", err)
	default:
	}
	return added, err
}

// copyBuffers are what bytes pass through on their way into a pipe.
var copyBuffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// pipeWriter keeps the error of a Write, to tell it from one of the reader.
type pipeWriter struct {
	w   *os.File
	err error
}

func (p *pipeWriter) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err != nil {
		p.err = err
	}
	return n, err
}

// send sends a request. Where the daemon has ended the stream, it returns why.
func (i *ingest) send(req *pb.IngestRequest) error {
	err := i.stream.Send(req)
	for err == io.EOF {
		if _, recvErr := i.receive(); recvErr != nil {
			return recvErr
		}
	}
	return i.client.callError(i.ctx, err)
}

func (i *ingest) receive() (*pb.IngestReply, error) {
	reply, err := i.stream.Recv()
	if err == io.EOF {
		return nil, errors.New("the daemon ended the ingest without a word")
	}
	return reply, i.client.callError(i.ctx, err)
}

// worthAsking is how many bytes are worth asking whether there is room for them: fewer are sent sooner.
const worthAsking = 1 << 20

// Room implements [p2p.Ingest].
func (i *ingest) Room(n int64) error {
	if n < worthAsking {
		return nil
	}
	s, end, err := i.client.begin(i.ctx) // not the ingest's own: an Add may be under way
	if err != nil {
		return err
	}
	defer end()
	_, err = s.daemon.Room(i.ctx, &pb.RoomRequest{Bytes: n})
	if status.Code(err) == codes.Unimplemented { // a daemon of an earlier release tells with what it gets
		return nil
	}
	return i.client.callError(i.ctx, err)
}

// Rehash implements [p2p.Ingest].
func (i *ingest) Rehash(d, want digest.Digest) (added p2p.Added, err error) {
	end, err := i.begin()
	if err != nil {
		return p2p.Added{}, err
	}
	defer end()
	req := &pb.IngestRequest_Rehash{Digest: string(d), Want: string(want)}
	if _, _, err = parseRehash(req); err == nil {
		err = i.send(&pb.IngestRequest{Request: &pb.IngestRequest_Rehash_{Rehash: req}})
	}
	if err == nil {
		added, err = i.waitAdded(nil)
	}
	if err != nil {
		i.fail(err)
	}
	return added, err
}

// Commit implements [p2p.Ingest].
func (i *ingest) Commit(commit p2p.Commit) error {
	end, err := i.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := i.commit(commit); err != nil {
		i.fail(err)
		return err
	}
	i.stream.Recv() // the call's end, which is on its way
	i.fail(errCommitted)
	return nil
}

func (i *ingest) commit(commit p2p.Commit) error {
	parts := commitParts(commit, commitPart)
	var check commitParser
	for _, part := range parts {
		if err := check.add(part); err != nil {
			return err
		}
	}
	for _, part := range parts {
		if err := i.send(&pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: part}}); err != nil {
			return err
		}
	}
	reply, err := i.receive()
	if err == nil && reply.GetCommitted() == nil {
		err = errors.New("the daemon's answer is not that of a commit")
	}
	return err
}

// Close implements [p2p.Ingest]. It waits until the daemon has dropped what was
// not committed, unless the ingest failed or its context ended.
func (i *ingest) Close() error {
	defer i.cancel()
	if i.over != nil {
		return nil
	}
	i.over = p2p.ErrClosed
	i.stream.CloseSend()
	for {
		if _, err := i.stream.Recv(); err != nil {
			return nil // with the connection gone too the daemon drops everything
		}
	}
}
