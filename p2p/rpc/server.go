package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/grpclimit"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

const (
	// maxStreams is the number of calls at once on one connection.
	maxStreams = 256
	// maxEntries is the number of entries in one message of a List.
	maxEntries = 256
)

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
		_, _ = socket.Write(busy) // there is room for it
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

func (s *Server) unary(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	start := time.Now()
	reply, err := handler(ctx, req)
	return reply, s.ended(ctx, info.FullMethod, start, err)
}

func (s *Server) stream(
	srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) error {
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
	return &pb.StatReply{Info: infoMessage(info), Manifest: manifestMessage(info.Manifest),
		Holders: holdersMessage(info.Providers)}
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
	s.log.InfoContext(ctx, "deleted", "what", p2p.Describe(req.GetTag(), cid), "uid", authOf(ctx).caller.uid,
		"tasks", deleted.Tasks, "freed", deleted.Freed,
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
