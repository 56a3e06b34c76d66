package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/grpclimit"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
	"github.com/dfcache/dfcache/p2p/source"
)

const (
	// maxStreams is the number of calls at once on one connection.
	maxStreams = 256
	// maxEntries is the number of entries in one message of a List.
	maxEntries = 256
	// maxArrived is the number of pieces in one message about a blob that is
	// arriving, and of those that wait for the next one.
	maxArrived = 1024
	// announcements is how many messages tell of the pieces of a blob that is arriving:
	// each has the client woken up, and copy.
	announcements = 64
	// progressInterval is the least time between two messages of progress.
	progressInterval = 100 * time.Millisecond
)

// announceDelay is how long a piece that nobody has asked for may wait for others, to be
// announced with them. Only tests change it.
var announceDelay = 250 * time.Millisecond

// ServerOption is an option of [NewServer].
type ServerOption interface{ server(*serverConfig) }

type serverConfig struct{ grpc []grpc.ServerOption }

func (s statsHandler) server(c *serverConfig) { c.grpc = append(c.grpc, grpc.StatsHandler(s.h)) }

// Server serves an engine to clients on this host. It is safe for concurrent use.
type Server struct {
	grpc   *grpc.Server
	log    *slog.Logger
	shares *shares

	mu    sync.Mutex
	conns map[*conn]struct{} // accepted and not closed
}

// NewServer returns a server of engine, which stays the caller's to close,
// after the server has been shut down. Calls are logged to log: every one at
// debug level, what changes the store at info, failures at warn.
//
// A client reads a [p2p.FileBlob] in its file. Of any other blob it gets a copy, in memory.
func NewServer(engine p2p.Engine, log *slog.Logger, opts ...ServerOption) *Server {
	var config serverConfig
	for _, o := range opts {
		o.server(&config)
	}
	s := &Server{log: log, shares: newShares(), conns: make(map[*conn]struct{})}
	s.grpc = grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(serverCredentials{log}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(uint32(min(maxStreams, s.shares.calls.Limit()))),
		grpc.InTapHandle(s.shares.begin),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ForceServerCodecV2(grpclimit.Codec(maxElements)),
		grpc.StaticStreamWindowSize(callWindow),
		grpc.StaticConnWindowSize(window),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	}, config.grpc...)...)
	pb.RegisterDaemonServer(s.grpc, &service{engine: engine, log: log, commits: semaphore.NewWeighted(maxCommits)})
	return s
}

// Serve serves the connections that l accepts, which have to be of a unix
// socket ([Listen]), until the server is shut down; it then returns nil. It
// closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(listener{l, s})
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// Shutdown stops accepting calls and lets those that run end. When ctx ends
// first, it ends them, and returns the cause of ctx. No call runs when it
// returns.
func (s *Server) Shutdown(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	var open []*conn
	for c := range s.conns {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.Close() // gRPC would wait for handshakes
	}
	s.grpc.Stop()
	<-done
	return context.Cause(ctx)
}

// listener makes a conn of what it accepts.
type listener struct {
	net.Listener
	s *Server
}

func (l listener) Accept() (net.Conn, error) {
	for {
		accepted, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		socket, ok := accepted.(*net.UnixConn)
		if !ok {
			accepted.Close()
			return nil, fmt.Errorf("connection is a %T, want one of a unix socket", accepted)
		}
		if c, err := l.s.admit(socket); err == nil {
			return c, nil
		} else {
			l.s.log.Warn("connection refused", "error", err, "uid", c.who.uid, "pid", c.who.pid)
		}
	}
}

// admit makes a conn of a socket, or closes it.
func (s *Server) admit(socket *net.UnixConn) (*conn, error) {
	c := &conn{UnixConn: socket, onClose: s.forget, shares: s.shares}
	var err error
	if c.who, err = peerOf(socket); err != nil {
		socket.Close()
		return c, err
	}
	c.inflow = inflow{shares: s.shares, uid: c.who.uid}
	var ok bool
	if c.leave, ok = s.shares.conns.Offer(c.who.key(), c.hangUp); !ok {
		socket.Write(busy) // there is room for it
		socket.Close()
		return c, errCrowded
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = struct{}{}
	return c, nil
}

func (s *Server) forget(c *conn) {
	c.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func authOf(ctx context.Context) authInfo {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(authInfo); ok {
			return info
		}
	}
	return authInfo{} // can't be: the credentials put it there
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	reply, err := handler(ctx, req)
	return reply, s.ended(ctx, info.FullMethod, start, err)
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	err := handler(srv, stream)
	return s.ended(stream.Context(), info.FullMethod, start, err)
}

// ended logs a call and makes a status of its error.
func (s *Server) ended(ctx context.Context, method string, start time.Time, err error) error {
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	err = toStatus(err)
	code := status.Code(err)
	level := slog.LevelDebug
	switch code {
	case codes.OK, codes.NotFound, codes.Canceled:
	default:
		level = slog.LevelWarn
	}
	if !s.log.Enabled(ctx, level) {
		return err
	}
	who := authOf(ctx).caller
	attrs := []slog.Attr{
		slog.String("method", path.Base(method)),
		slog.Uint64("uid", uint64(who.uid)),
		slog.Int("pid", int(who.pid)),
		slog.Duration("duration", time.Since(start)),
		slog.String("code", code.String()),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()))
	}
	s.log.LogAttrs(ctx, level, "call", attrs...)
	return err
}

// service answers calls.
type service struct {
	pb.UnimplementedDaemonServer
	engine  p2p.Engine
	log     *slog.Logger
	commits *semaphore.Weighted // bytes of all commits that are under way
}

func (s *service) Stat(ctx context.Context, req *pb.StatRequest) (*pb.StatReply, error) {
	cid, opts, err := parseStat(req)
	if err != nil {
		return nil, err
	}
	info, err := s.engine.Stat(ctx, req.GetTag(), cid, opts)
	if err != nil {
		return nil, err
	}
	return statMessage(info), nil
}

func statMessage(info p2p.Info) *pb.StatReply {
	return &pb.StatReply{Info: infoMessage(info), Manifest: manifestMessage(info.Manifest), Holders: holdersMessage(info.Holders)}
}

func (s *service) Delete(ctx context.Context, req *pb.DeleteRequest) (*pb.DeleteReply, error) {
	cid, opts, err := parseDelete(req)
	if err != nil {
		return nil, err
	}
	deleted, err := s.engine.Delete(ctx, req.GetTag(), cid, opts)
	if err != nil {
		return nil, err
	}
	s.log.InfoContext(ctx, "deleted", "what", p2p.Describe(req.GetTag(), cid), "uid", authOf(ctx).caller.uid, "tasks", deleted.Tasks, "freed", deleted.Freed,
		"reached", deleted.Reached, "missed", len(deleted.Missed))
	return deletedMessage(deleted), nil
}

func (s *service) Replicate(ctx context.Context, req *pb.ReplicateRequest) (*pb.ReplicateReply, error) {
	cid, n, err := parseReplicate(req)
	if err != nil {
		return nil, err
	}
	peers, err := p2p.Replicate(ctx, s.engine, req.GetTag(), cid, n)
	if err != nil {
		return nil, err
	}
	return &pb.ReplicateReply{Peers: peers}, nil
}

func (s *service) Peers(ctx context.Context, _ *pb.PeersRequest) (*pb.PeersReply, error) {
	peers, err := p2p.Peers(ctx, s.engine)
	if err != nil {
		return nil, err
	}
	reply := &pb.PeersReply{}
	for _, p := range peers {
		reply.Peers = append(reply.Peers, peerMessage(p))
	}
	return reply, nil
}

// Room answers where it is asked before an ingest gets the bytes, which may wait for another one.
func (s *service) Room(ctx context.Context, req *pb.RoomRequest) (*pb.RoomReply, error) {
	if req.GetBytes() < 0 {
		return nil, fmt.Errorf("room for %d bytes: %w", req.GetBytes(), digest.ErrInvalid)
	}
	ingest, err := s.engine.Ingest(ctx)
	if err != nil {
		return nil, err
	}
	defer ingest.Close()
	return &pb.RoomReply{}, ingest.Room(req.GetBytes())
}

func (s *service) List(req *pb.ListRequest, stream grpc.ServerStreamingServer[pb.ListReply]) error {
	query, err := parseList(req)
	if err != nil {
		return err
	}
	var batch []*pb.Entry
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		entries := batch
		batch = nil
		return stream.Send(&pb.ListReply{Entries: entries})
	}
	for entry, err := range s.engine.List(stream.Context(), query) {
		if err != nil {
			return errors.Join(flush(), err)
		}
		batch = append(batch, &pb.Entry{Info: infoMessage(entry.Info), Name: entry.Name, Total: entry.Total})
		if len(batch) == maxEntries {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

func (s *service) Open(stream grpc.BidiStreamingServer[pb.OpenRequest, pb.OpenReply]) error {
	req, err := stream.Recv()
	if err == io.EOF {
		return fmt.Errorf("open: %w: the call ends before it says what", digest.ErrInvalid)
	}
	if err != nil {
		return err
	}
	task, scope, err := parseOpen(req)
	if err != nil {
		return err
	}
	ctx := stream.Context()
	var notices chan string
	if req.GetNotices() {
		ctx, notices = withNotices(ctx)
	}
	blob, err := openNoticing(notices, stream, func() (p2p.Blob, error) { return s.engine.Open(ctx, task, scope) })
	if err != nil {
		return err
	}
	defer blob.Close()
	fb, ok := blob.(p2p.FileBlob)
	if !ok {
		memory, err := copyToMemory(ctx, blob, task.Digest)
		if err != nil {
			return fmt.Errorf("open %s: %w", task, err)
		}
		defer memory.file.Close()
		fb = memory
	}
	if err := checkReadOnly(fb.File()); err != nil {
		return fmt.Errorf("open %s: %w", task, err)
	}
	if err := authOf(ctx).channel.send(ctx, req.GetDescriptorId(), fb.File()); err != nil {
		return fmt.Errorf("open %s: %w", task, err)
	}
	if arriving, ok := blob.(p2p.ArrivingBlob); ok {
		return announce(stream, arriving, notices)
	}
	for _, m := range openMessages(fb.Table()) {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// openNoticing calls open, and passes notices on meanwhile.
func openNoticing(notices <-chan string, stream grpc.BidiStreamingServer[pb.OpenRequest, pb.OpenReply], open func() (p2p.Blob, error)) (blob p2p.Blob, err error) {
	if notices == nil {
		return open()
	}
	err = noticing(notices, func() (err error) {
		blob, err = open()
		return err
	}, func(text string) error { return stream.Send(&pb.OpenReply{Notice: text}) })
	return blob, err
}

// wanted are the pieces that a client wants first.
type wanted struct {
	first, last int
	err         error // why they can't be
}

// announce tells a client of each piece of a blob as it arrives, several at a time, and
// the blob which pieces the client wants. Where the client does not read, sending blocks, and
// with it all of this.
func announce(stream grpc.BidiStreamingServer[pb.OpenRequest, pb.OpenReply], blob p2p.ArrivingBlob, notices <-chan string) error {
	table := blob.Table()
	header := &pb.OpenReply_Header{Size: table.Size, PieceLength: table.PieceLength, Arriving: true}
	if err := stream.Send(&pb.OpenReply{Header: header, Sent: true}); err != nil {
		return err
	}
	call := stream.Context()
	wants := make(chan wanted)
	go func() { // it ends with the call, in which it receives
		for {
			req, err := stream.Recv()
			if err != nil {
				return // no more wants, or the call is over
			}
			var w wanted
			w.first, w.last, w.err = parseWant(req, table.Pieces())
			select {
			case wants <- w:
			case <-call.Done():
				return
			}
		}
	}()

	ctx, cancel := context.WithCancel(call)
	arrived := make(chan int, maxArrived)
	var failure error // why nothing more arrives, set before arrived is closed
	var watcher sync.WaitGroup
	watcher.Go(func() {
		defer close(arrived)
		for i, err := range blob.Arrived(ctx) {
			if err != nil {
				failure = err
				return
			}
			select {
			case arrived <- i:
			case <-ctx.Done():
				return
			}
		}
	})
	defer watcher.Wait()
	defer cancel()
	var (
		left    = table.Pieces()
		asked   = make([]bool, left)
		batch   = min(max(1, left/announcements), maxArrived)
		message = &pb.OpenReply{}
		soon    = true                         // of what is there at first
		late    = time.NewTimer(announceDelay) // runs while there is something in message
	)
	late.Stop()
	defer late.Stop()
	flush := func() error {
		late.Stop()
		if len(message.Pieces) == 0 {
			return nil
		}
		left -= len(message.Pieces)
		full := message
		message, soon = &pb.OpenReply{}, false
		return stream.Send(full)
	}
	for {
		select {
		case w := <-wants:
			if w.err != nil {
				return w.err
			}
			blob.Want(w.first, w.last)
			for i := w.first; i <= w.last; i++ {
				asked[i] = true
			}
			for _, p := range message.Pieces {
				soon = soon || asked[p.GetIndex()]
			}
		case text := <-notices:
			if err := stream.Send(&pb.OpenReply{Notice: text}); err != nil {
				return err
			}
		case <-late.C:
			soon = true
		case i, more := <-arrived:
			if !more {
				if err := cmp.Or(failure, context.Cause(call)); err != nil {
					return err
				}
				if err := flush(); err != nil {
					return err
				}
				if left != 0 {
					return fmt.Errorf("%s: its download ended without %d pieces", table.Digest, left)
				}
				return stream.Send(&pb.OpenReply{Done: &pb.OpenReply_Done{Sources: sourceMessages(blob.Sources())}})
			}
			if len(message.Pieces) == 0 {
				late.Reset(announceDelay)
			}
			message.Pieces = append(message.Pieces, &pb.OpenReply_Piece{Index: uint32(i), Crc32C: table.CRC[i]})
			soon = soon || asked[i]
			if len(arrived) > 0 && len(message.Pieces) < maxArrived {
				continue
			}
		}
		if n := len(message.Pieces); soon || n >= batch || n == left {
			if err := flush(); err != nil {
				return err
			}
		}
	}
}

// checkReadOnly makes sure that a client can't write to a blob through its file.
func checkReadOnly(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var flags int
	if controlErr := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) }); controlErr != nil {
		return controlErr
	}
	if err != nil {
		return err
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		return errors.New("the blob's file is open for writing: it can't be handed over")
	}
	return nil
}

func (s *service) Ingest(stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply]) (err error) {
	ctx := stream.Context()
	ingest, err := s.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := ingest.Close(); closeErr != nil {
			s.log.WarnContext(ctx, "an ingest could not be cleaned up", "error", closeErr)
		}
	}()
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			return nil // the client gave up
		}
		if err != nil {
			return err
		}
		switch r := req.GetRequest().(type) {
		case *pb.IngestRequest_Add_:
			if err := s.add(stream, ingest, r.Add); err != nil {
				return err
			}
		case *pb.IngestRequest_Rehash_:
			if err := s.rehash(stream, ingest, r.Rehash); err != nil {
				return err
			}
		case *pb.IngestRequest_Commit_:
			return s.commit(stream, ingest, r.Commit)
		default:
			return fmt.Errorf("ingest: %w: neither an add nor a rehash nor a commit: the client is newer than the daemon", digest.ErrInvalid)
		}
	}
}

// add answers one Add of an ingest.
func (s *service) add(stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, req *pb.IngestRequest_Add) error {
	ctx := stream.Context()
	opts, err := parseAdd(req)
	if err != nil {
		return err
	}
	fd, err := authOf(ctx).channel.take(ctx, req.GetDescriptorId())
	if err != nil {
		return fmt.Errorf("the file to add: %w", err)
	}
	src, err := openSource(fd, req.GetOffset())
	if err != nil {
		return err
	}
	defer src.Close()
	last := time.Now()
	opts.Progress = func(taken int64) {
		if now := time.Now(); now.Sub(last) >= progressInterval {
			last = now
			// Where the stream is over, so is ctx, and with it the ingest.
			stream.Send(&pb.IngestReply{Reply: &pb.IngestReply_Progress_{Progress: &pb.IngestReply_Progress{Bytes: taken}}})
		}
	}
	added, err := ingest.Add(src, opts)
	if err != nil {
		return err
	}
	return stream.Send(addedMessage(added))
}

// rehash answers one Rehash of an ingest.
func (s *service) rehash(stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, req *pb.IngestRequest_Rehash) error {
	d, want, err := parseRehash(req)
	if err != nil {
		return err
	}
	added, err := ingest.Rehash(d, want)
	if err != nil {
		return err
	}
	return stream.Send(addedMessage(added))
}

// openSource makes a file of a descriptor that a client sent, which it takes
// over. It is what the client has open, so that its own rights decided what it
// can be; here it has to be something that ends, and that the engine can
// interrupt, by its SetReadDeadline: a pipe that nobody writes to. A regular file
// has no deadline, and needs none.
//
// A regular file whose content may depend on who reads it is refused: here it would be read
// with the daemon's rights. A client reads it itself.
//
// A regular file shares its offset with the client. It is set here because the
// engine reads from where the file stands; the client waits meanwhile.
func openSource(fd int, offset int64) (f *os.File, err error) {
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	refuse := func(what string) (*os.File, error) {
		return nil, fmt.Errorf("what is to be added: %w: %s", digest.ErrInvalid, what)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("what is to be added: %w", err)
	}
	if flags&unix.O_PATH != 0 || flags&unix.O_ACCMODE == unix.O_WRONLY {
		return refuse("it is not open for reading")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("what is to be added: %w", err)
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		switch plain, err := source.IsPlain(fd); {
		case err != nil:
			return nil, fmt.Errorf("what is to be added: %w", err)
		case !plain:
			return refuse("its file system may show it otherwise to the daemon than to its reader, as /proc does: send what it has through a pipe")
		}
		if _, err := unix.Seek(fd, offset, io.SeekStart); err != nil {
			return nil, fmt.Errorf("what is to be added: seek to %d: %w", offset, err)
		}
	case unix.S_IFIFO:
		if offset != 0 {
			return refuse("a pipe has no offset")
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("what is to be added: %w", err)
		}
	case unix.S_IFDIR:
		return refuse("it is a directory, not a file or a pipe")
	case unix.S_IFSOCK:
		return refuse("it is a socket, not a file or a pipe")
	default:
		return refuse("it is a device, not a file or a pipe")
	}
	return os.NewFile(uintptr(fd), "client's file"), nil
}

// commit answers the Commit of an ingest, of which part is the first part.
func (s *service) commit(stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, part *pb.IngestRequest_Commit) error {
	parser := commitParser{room: s.commits}
	defer parser.end()
	for {
		if err := parser.add(part); err != nil {
			return err
		}
		if !part.GetMore() {
			break
		}
		req, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if part = req.GetCommit(); part == nil {
			return fmt.Errorf("ingest: %w: a commit that has more to come is followed by something else", digest.ErrInvalid)
		}
	}
	if err := ingest.Commit(parser.commit); err != nil {
		return err
	}
	ctx := stream.Context()
	s.log.InfoContext(ctx, "committed", "uid", authOf(ctx).caller.uid, "tasks", len(parser.commit.Tasks), "names", len(parser.commit.Names))
	return stream.Send(&pb.IngestReply{Reply: &pb.IngestReply_Committed_{Committed: &pb.IngestReply_Committed{}}})
}
