package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/grpclimit"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// maxSocketPath is the longest path of a unix socket on Linux, in bytes.
const maxSocketPath = 107

// DialOption is an option of [Dial].
type DialOption interface{ dial(*dialConfig) }

// Option is an option of both [Dial] and [NewServer].
type Option interface {
	DialOption
	ServerOption
}

type dialConfig struct {
	serverUIDs []uint32
	grpc       []grpc.DialOption
}

type serverUID uint32

func (u serverUID) dial(c *dialConfig) { c.serverUIDs = append(c.serverUIDs, uint32(u)) }

// WithServerUID accepts a daemon that runs as uid, besides root and the
// caller's own user. Without it, another user's process that took the socket's
// path is refused.
func WithServerUID(uid uint32) DialOption { return serverUID(uid) }

type statsHandler struct{ h stats.Handler }

func (s statsHandler) dial(c *dialConfig) { c.grpc = append(c.grpc, grpc.WithStatsHandler(s.h)) }

// WithStatsHandler gives gRPC a handler of its events, for traces and metrics.
func WithStatsHandler(h stats.Handler) Option { return statsHandler{h} }

// Client is a [p2p.Engine] that is a dfdaemon behind a unix socket. It is safe
// for concurrent use.
//
// A call that is under way when the daemon goes away fails with
// [p2p.ErrUnavailable]; the next one connects again.
type Client struct {
	socket string
	config dialConfig

	dialing chan struct{} // has a token in it while current is looked up or made

	mu      sync.Mutex
	current *session   // the latest; nil after Close
	retired []*session // those before it that may still have calls under way
	closed  bool
	calls   sync.WaitGroup // under way; begun under mu, and not when closed
	// downloads are the calls among them that tell of blobs that are arriving.
	downloads map[*download]struct{}
	ending    sync.WaitGroup // the Close under way
	// closing ends with Close. What is read for a caller ends with it.
	closing context.Context
	close   context.CancelFunc
}

var _ p2p.Engine = (*Client)(nil)

// session is one connection to the daemon, with gRPC on it.
type session struct {
	conn   *conn
	cc     *grpc.ClientConn
	daemon pb.DaemonClient
	lastID atomic.Uint64 // of a descriptor
}

// usable reports whether a call can begin: not when the connection is lost, and
// not when the daemon lets running calls end before it stops. gRPC's own state
// comes a little later than the loss does.
func (s *session) usable() bool {
	return !s.conn.isClosed() && s.cc.GetState() == connectivity.Ready
}

// Dial connects to the dfdaemon that listens on socket. ctx bounds only that.
//
// It fails with [ErrNoDaemon] where nothing listens, with [io/fs.ErrPermission]
// where the caller may not connect or where the process that listens belongs to
// another user ([WithServerUID]), and with [p2p.ErrUnavailable] for these and
// for any other reason why there is no daemon to talk to. The caller closes the
// client.
func Dial(ctx context.Context, socket string, opts ...DialOption) (*Client, error) {
	if len(socket) > maxSocketPath {
		return nil, socketPathError(socket)
	}
	c := &Client{socket: socket, dialing: make(chan struct{}, 1), downloads: make(map[*download]struct{})}
	c.closing, c.close = context.WithCancel(context.Background())
	for _, o := range opts {
		o.dial(&c.config)
	}
	s, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.current = s
	return c, nil
}

func socketPathError(path string) error {
	return fmt.Errorf("socket path %s: %w: it has %d bytes, at most %d are possible: choose a shorter one", path,
		digest.ErrInvalid, len(path), maxSocketPath)
}

// connect makes a new session.
func (c *Client) connect(ctx context.Context) (*session, error) {
	socket, err := (&net.Dialer{}).DialContext(ctx, "unix", c.socket)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, c.dialError(err)
	}
	gone, lost := context.WithCancel(ctx)
	defer lost()
	s := &session{conn: &conn{UnixConn: socket.(*net.UnixConn), onClose: func(*conn) { lost() }}}
	if err := s.conn.clientHandshake(ctx, c.allows); err != nil {
		s.conn.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("dfdaemon at %s: %w", c.socket, err)
	}
	// gRPC gets this one connection. When it is lost, so is the session: the
	// descriptor channel belongs to it.
	ready := make(chan *conn, 1)
	ready <- s.conn
	options := append([]grpc.DialOption{
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case conn := <-ready:
				return conn, nil
			default:
				return nil, errors.New("the connection was lost")
			}
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the handshake is over
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply), grpc.ForceCodecV2(grpclimit.Codec(maxElements))),
		grpc.WithStaticStreamWindowSize(window),
		grpc.WithStaticConnWindowSize(window),
	}, c.config.grpc...)
	if s.cc, err = grpc.NewClient("passthrough:///dfdaemon", options...); err != nil {
		s.conn.Close()
		return nil, fmt.Errorf("dfdaemon at %s: %w", c.socket, err)
	}
	s.daemon = pb.NewDaemonClient(s.cc)
	s.cc.Connect()
	for {
		state := s.cc.GetState()
		if state == connectivity.Ready {
			return s, nil
		}
		// A daemon that is about to stop says so and closes the connection; gRPC is
		// idle then as it was before, and stays so.
		if state == connectivity.TransientFailure || state == connectivity.Shutdown || s.conn.isClosed() {
			s.close()
			return nil, fmt.Errorf("dfdaemon at %s: %w: it closed the connection after the handshake: see its log",
				c.socket, p2p.ErrUnavailable)
		}
		s.cc.WaitForStateChange(gone, state)
		if ctx.Err() != nil {
			s.close()
			return nil, context.Cause(ctx)
		}
	}
}

func (s *session) close() {
	s.cc.Close()
	s.conn.Close()
}

func (c *Client) allows(uid uint32) bool {
	if uid == 0 || int(uid) == os.Geteuid() {
		return true
	}
	for _, u := range c.config.serverUIDs {
		if u == uid {
			return true
		}
	}
	return false
}

// dialError explains why there is no connection.
func (c *Client) dialError(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // the rest of it is in our message
	}
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("dfdaemon at %s is %w (%w): start dfdaemon, or name another socket", c.socket, ErrNoDaemon,
			err)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Errorf("dfdaemon at %s is %w (%w): only the daemon's user and group may call it: join the group, "+
			"or start a dfdaemon of your own at another socket", c.socket, p2p.ErrUnavailable, err)
	}
	return fmt.Errorf("dfdaemon at %s is %w (%w): see its log, or name another socket", c.socket, p2p.ErrUnavailable,
		err)
}

// begin begins a call. It returns a session that is connected, as far as can be
// known, and a function that ends the call.
func (c *Client) begin(ctx context.Context) (s *session, end func(), err error) {
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, nil, c.closedError()
	}
	c.calls.Add(1)
	s = c.current
	c.mu.Unlock()
	if s.usable() {
		return s, c.calls.Done, nil
	}
	if s, err = c.reconnect(ctx); err != nil {
		c.calls.Done()
		return nil, nil, err
	}
	return s, c.calls.Done, nil
}

// reconnect makes a new session the current one, unless another call just did.
func (c *Client) reconnect(ctx context.Context) (*session, error) {
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if s := c.current; s.usable() { // written only with the token held, or with no call under way
		return s, nil
	}
	s, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// A daemon that is stopping lets calls on the old connection end. gRPC
	// closes it then.
	var open []*session
	for _, old := range append(c.retired, c.current) {
		if old.conn.isClosed() {
			old.close()
		} else {
			open = append(open, old)
		}
	}
	c.retired, c.current = open, s
	return s, nil
}

func (c *Client) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// Close closes the connection. Calls under way end first; an ingest that is
// open is dropped. Blobs that were opened stay readable, but for those that are
// still arriving from peers: reading them fails with [p2p.ErrClosed] from then on,
// and their download is given up where nobody else waits for it. It is safe to
// call more than once.
func (c *Client) Close() error {
	c.mu.Lock()
	first := !c.closed
	if first {
		c.ending.Add(1)
	}
	c.closed = true
	downloads := slices.Collect(maps.Keys(c.downloads))
	c.mu.Unlock()
	c.close()
	for _, d := range downloads {
		d.finish(c.closedError())
		d.cancel()
	}
	if !first {
		c.ending.Wait()
		return nil
	}
	defer c.ending.Done()
	c.calls.Wait()
	for _, s := range append(c.retired, c.current) {
		s.close()
	}
	return nil
}

// Stat implements [p2p.Engine]. It is one call, whatever it asks for.
func (c *Client) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return c.stat(ctx, tag, cid, opts, pb.DaemonClient.Stat)
}

func (c *Client) stat(
	ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions,
	call func(pb.DaemonClient, context.Context, *pb.StatRequest, ...grpc.CallOption) (*pb.StatReply, error),
) (p2p.Info, error) {
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Info{}, err
	}
	req := &pb.StatRequest{
		Tag: tag, Cid: cid.String(), Scope: scopes.message(opts.Scope),
		Manifest: opts.Manifest, Holders: opts.Providers, Lease: opts.Lease,
	}
	s, end, err := c.begin(ctx)
	if err != nil {
		return p2p.Info{}, err
	}
	defer end()
	reply, err := call(s.daemon, ctx, req)
	if err != nil {
		return p2p.Info{}, c.callError(ctx, err)
	}
	return statOf(reply)
}

// Delete implements [p2p.Engine].
func (c *Client) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Deleted{}, err
	}
	req := &pb.DeleteRequest{Tag: tag, Force: opts.Force, NameOnly: opts.NameOnly, All: opts.All,
		Unpin: opts.Unpin, Expect: (*string)(opts.Expect)}
	if cids := opts.CIDs(cid); len(cids) == 1 {
		req.Cid = cid.String()
	} else {
		for _, c := range cids {
			req.Cids = append(req.Cids, c.String())
		}
	}
	s, end, err := c.begin(ctx)
	if err != nil {
		return p2p.Deleted{}, err
	}
	defer end()
	reply, err := s.daemon.Delete(ctx, req)
	if err != nil {
		return p2p.Deleted{}, c.callError(ctx, err)
	}
	return deletedOf(reply)
}

// Replicate implements [p2p.Peering]. It takes as long as ctx allows.
func (c *Client) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if err := p2p.ValidateRef(tag, cid); err != nil {
		return nil, err
	}
	req := &pb.ReplicateRequest{Tag: tag, Cid: cid.String(), N: int64(n)}
	s, end, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	reply, err := s.daemon.Replicate(ctx, req)
	if err != nil {
		return nil, c.callError(ctx, err)
	}
	return reply.GetPeers(), nil
}

// Peers implements [p2p.Peering].
func (c *Client) Peers(ctx context.Context) (peers []p2p.Peer, err error) {
	s, end, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	reply, err := s.daemon.Peers(ctx, &pb.PeersRequest{})
	if err != nil {
		return nil, c.callError(ctx, err)
	}
	for _, m := range reply.GetPeers() {
		p, err := parsePeer(m)
		if err != nil {
			return nil, err
		}
		peers = append(peers, p)
	}
	return peers, nil
}

// List implements [p2p.Engine]. The loop over it is a call under way: Close
// waits for its end.
func (c *Client) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) {
		if err := q.Validate(); err != nil {
			yield(p2p.Entry{}, err)
			return
		}
		s, end, err := c.begin(ctx)
		if err != nil {
			yield(p2p.Entry{}, err)
			return
		}
		defer end()
		call, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := s.daemon.List(call, queryMessage(q))
		for err == nil {
			var reply *pb.ListReply
			if reply, err = stream.Recv(); err != nil {
				break
			}
			for _, e := range reply.GetEntries() {
				entry, err := entryOf(e, q.Kind)
				if !yield(entry, err) || err != nil {
					return
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return
		}
		err = c.callError(ctx, err)
		if q.Kind == p2p.KindPartials && errors.Is(err, digest.ErrInvalid) {
			err = c.unknownCall() // of a release before there was this kind
		}
		yield(p2p.Entry{}, err)
	}
}

// Open implements [p2p.Engine]. The blob has a descriptor of its own on the
// daemon's file, and reads and checks it in this process. One that is whole needs
// neither ctx nor the client any more. One that is arriving from peers needs both
// until it is whole: its pieces are announced by a call that goes on until then,
// or until ctx ends, the blob is closed, or the client is.
func (c *Client) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	req := &pb.OpenRequest{Task: taskMessage(task), Scope: scopes.message(scope), Notices: p2p.NoticeOf(ctx) != nil}
	s, end, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	call, cancel := context.WithCancel(ctx)
	stream, file, parser, err := c.open(call, s, req)
	if err == nil && parser.arriving {
		return c.follow(ctx, newDownload(parser.table, file), stream, cancel, end)
	}
	defer end()
	defer cancel()
	if err != nil {
		return nil, c.callError(ctx, err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) { // the call's end, which is on its way
		file.Close()
		if err == nil {
			return nil, errors.New("the daemon's answer does not end")
		}
		return nil, c.callError(ctx, err)
	}
	return &blob{digest.NewVerified(file, parser.table), file}, nil
}

// openStream is the stream of an Open.
type openStream = grpc.BidiStreamingClient[pb.OpenRequest, pb.OpenReply]

// open makes an Open call, and returns what has come when the descriptor has.
func (c *Client) open(
	ctx context.Context, s *session, req *pb.OpenRequest,
) (openStream, *os.File, *tableParser, error) {
	req.DescriptorId = s.lastID.Add(1)
	if err := s.conn.channel.expect(req.DescriptorId); err != nil {
		return nil, nil, nil, c.lostError(err)
	}
	defer s.conn.channel.forget(req.DescriptorId)
	stream, err := s.daemon.Open(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) { // of which Recv has the cause
		return nil, nil, nil, err
	}
	var parser tableParser
	for sent := false; !sent; {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errors.New("the daemon's answer ends too early")
		}
		if err == nil {
			notice(ctx, reply)
			err = parser.add(digest.Digest(req.GetTask().GetDigest()), reply)
		}
		if err != nil {
			return nil, nil, nil, err
		}
		sent = reply.GetSent()
	}
	fd, err := s.conn.channel.take(ctx, req.DescriptorId)
	if err != nil {
		return nil, nil, nil, c.lostError(err)
	}
	return stream, os.NewFile(uintptr(fd), "blob "+req.GetTask().GetDigest()), &parser, nil
}

// notice tells a caller that wants to know what the daemon waits for.
func notice(ctx context.Context, reply *pb.OpenReply) {
	if tell := p2p.NoticeOf(ctx); tell != nil && reply.GetNotice() != "" {
		tell(reply.GetNotice())
	}
}

// blob is an open blob: the daemon's file, read here.
type blob struct {
	*digest.Verified
	file *os.File
}

// Sources implements [p2p.Blob]: the blob was here.
func (b *blob) Sources() []p2p.Source { return nil }

func (b *blob) Close() error { return b.file.Close() }
