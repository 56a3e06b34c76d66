package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

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
	open    *writer            // what was created and is not finished, or nil
	over    error              // why nothing can follow but Close
}

var errCommitted = errors.New("the ingest is committed already")

// Ingest implements [p2p.Engine]. It does not wait for the daemon: where the
// daemon can't begin an ingest, the first Add or Commit says so.
//
// An Add of a reader that is not a regular *os.File copies it to the daemon through a pipe; so does
// one of a file whose content may depend on who reads it, as in /proc. Where ctx ends or the daemon
// fails while a Read of src blocks, Add returns at once, and the goroutine that copies ends when
// that Read returns. It does not close src.
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
	if i.open != nil {
		return nil, errors.New("what the ingest takes in is not finished")
	}
	return i.call()
}

// call begins a call of the ingest or of its writer, and returns what ends it.
func (i *ingest) call() (end func(), err error) {
	if i.over != nil {
		return nil, fmt.Errorf("ingest can't go on: %w", i.over)
	}
	if err := context.Cause(i.ctx); err != nil {
		i.fail(err)
		return nil, err
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
	if err = opts.Validate(); err == nil {
		err = source.Check(src)
	}
	if err != nil {
		i.fail(err)
		return p2p.Added{}, err
	}
	req := addMessage(opts)
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
	if err := i.handOver(req, f); err != nil {
		return p2p.Added{}, err
	}
	if added, err = i.waitAdded(progress); err != nil {
		i.withdraw(req)
	}
	return added, err
}

// handOver gives f to the daemon, for it to be added.
func (i *ingest) handOver(req *pb.IngestRequest_Add, f *os.File) error {
	req.DescriptorId = i.session.lastID.Add(1)
	if err := i.session.conn.channel.send(i.ctx, req.DescriptorId, f); err != nil {
		if i.ctx.Err() != nil {
			return context.Cause(i.ctx)
		}
		return i.client.lostError(err)
	}
	err := i.send(&pb.IngestRequest{Request: &pb.IngestRequest_Add_{Add: req}})
	if err != nil {
		i.withdraw(req)
	}
	return err
}

// withdraw takes back what was handed over, where an add has failed: the daemon may not have heard of it.
func (i *ingest) withdraw(req *pb.IngestRequest_Add) {
	i.session.conn.channel.withdraw(req.DescriptorId)
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
	w, err := i.create(req, progress)
	if err != nil {
		return p2p.Added{}, err
	}
	var broken error // why the pipe could not be written
	copied := make(chan error, 1)
	go func() {
		_, err := source.Copy(source.WriterFunc(func(p []byte) (n int, err error) {
			n, err = w.pipe.Write(p)
			broken = err
			return n, err
		}), source.Guard(i.stream.Context(), src))
		copied <- err
	}()
	select {
	case err := <-copied:
		// Where the daemon has ended the stream, src was not what broke.
		if err != nil && broken == nil && i.stream.Context().Err() == nil {
			w.abandon()
			return p2p.Added{}, fmt.Errorf("read what is to be added: %w", err)
		}
		return w.finish(broken)
	case <-w.answered:
		return w.finish(nil)
	}
}

// writer is a pipe to the daemon, which adds what comes. It implements [p2p.Writer].
type writer struct {
	i    *ingest
	pipe *os.File
	stop func() bool // with it, closing the client does not end the ingest any more

	answered chan struct{} // closed when the daemon has answered
	added    p2p.Added
	err      error
}

// Create implements [p2p.Ingest].
func (i *ingest) Create(opts p2p.AddOptions) (p2p.Writer, error) {
	end, err := i.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	if err = opts.Validate(); err == nil {
		i.open, err = i.create(addMessage(opts), opts.Progress)
	}
	if err != nil {
		i.fail(err)
		return nil, err
	}
	return i.open, nil
}

// create has the daemon add what is written to a pipe. The caller finishes or abandons it.
func (i *ingest) create(req *pb.IngestRequest_Add, progress func(int64)) (*writer, error) {
	r, pipe, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if raw, err := pipe.SyscallConn(); err == nil {
		// Where the user has too many large pipes, this one stays small.
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
	err = i.handOver(req, r)
	r.Close()
	if err != nil {
		pipe.Close()
		return nil, err
	}
	w := &writer{i: i, pipe: pipe, stop: context.AfterFunc(i.client.closing, i.cancel), answered: make(chan struct{})}
	go func() {
		defer close(w.answered)
		if w.added, w.err = w.wait(progress); w.err != nil {
			i.withdraw(req)
			pipe.SetWriteDeadline(time.Unix(1, 0)) // the daemon may leave it open
		}
	}()
	return w, nil
}

// wait waits for the daemon's answer, in a goroutine where a panic would end the process.
func (w *writer) wait(progress func(int64)) (added p2p.Added, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("what is told of the progress panicked: %v", v)
			w.i.cancel()
		}
	}()
	return w.i.waitAdded(progress)
}

// Write implements [io.Writer].
func (w *writer) Write(p []byte) (int, error) {
	end, err := w.i.call()
	if err != nil {
		return 0, err
	}
	defer end()
	n, err := w.pipe.Write(p)
	if err != nil {
		_, err = w.finish(err)
		w.i.fail(err)
	}
	return n, err
}

// Finish implements [p2p.Writer].
func (w *writer) Finish() (p2p.Added, error) {
	end, err := w.i.call()
	if err != nil {
		return p2p.Added{}, err
	}
	defer end()
	if w.i.open != w {
		return p2p.Added{}, errors.New("the content is finished already")
	}
	added, err := w.finish(nil)
	if w.i.open = nil; err != nil {
		w.i.fail(err)
	}
	return added, err
}

// finish closes the pipe, and waits for the answer; broken is why not all went into it, if so.
func (w *writer) finish(broken error) (p2p.Added, error) {
	defer w.stop()
	select {
	case <-w.answered:
		broken = cmp.Or(broken, errors.New("it answered before the end"))
	default:
	}
	w.pipe.Close()
	select {
	case <-w.answered:
	case <-w.i.ctx.Done():
		return p2p.Added{}, context.Cause(w.i.ctx)
	}
	if w.err == nil && broken != nil {
		return p2p.Added{}, fmt.Errorf("the daemon did not take in everything: %w", broken)
	}
	return w.added, w.err
}

// abandon ends the ingest, before the daemon can take the end of the pipe for that of the content.
func (w *writer) abandon() {
	w.stop()
	w.i.cancel()
	<-w.answered
	w.pipe.Close()
}

// send sends a request. Where the daemon has ended the stream, it returns why.
func (i *ingest) send(req *pb.IngestRequest) error {
	err := i.stream.Send(req)
	for errors.Is(err, io.EOF) {
		if _, recvErr := i.receive(); recvErr != nil {
			return recvErr
		}
	}
	return i.client.callError(i.ctx, err)
}

func (i *ingest) receive() (*pb.IngestReply, error) {
	reply, err := i.stream.Recv()
	if errors.Is(err, io.EOF) {
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
	_, _ = i.stream.Recv() // the call's end, which is on its way
	i.fail(errCommitted)
	return nil
}

func (i *ingest) commit(commit p2p.Commit) error {
	if err := commit.Validate(); err != nil {
		return err
	}
	for _, part := range commitParts(commit, commitPart) {
		if err := i.send(&pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: part}}); err != nil {
			return err
		}
	}
	reply, err := i.receive()
	if err != nil {
		return err
	}
	if reply.GetCommitted() == nil {
		return errors.New("the daemon's answer is not that of a commit")
	}
	if tell := p2p.NoticeOf(i.ctx); tell != nil {
		for _, text := range reply.GetCommitted().GetNotices() {
			tell(text)
		}
	}
	return nil
}

// Close implements [p2p.Ingest]. It waits until the daemon has dropped what was
// not committed, unless the ingest failed or its context ended.
func (i *ingest) Close() error {
	defer i.cancel()
	if i.open != nil {
		i.open.abandon()
		i.open = nil
	}
	if i.over != nil {
		return nil
	}
	i.over = p2p.ErrClosed
	_ = i.stream.CloseSend() // where that fails, so does Recv
	for {
		if _, err := i.stream.Recv(); err != nil {
			return nil // with the connection gone too the daemon drops everything
		}
	}
}
