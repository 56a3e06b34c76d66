package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// maxPieces is how many pieces are described in one message at most: a megabyte of them.
const maxPieces = 16 << 10

// maxConns is how many connections others may have open at each of the two doors. Dragonfly's peers
// prove nothing: one that comes when there are more takes the place of the oldest of the address with most.
const maxConns = 512

// defaultPieces is how many are where a peer does not say: as many as Dragonfly asks for.
const defaultPieces = 16

// listen listens for peers and for uploads.
func (e *Source) listen() (l [2]net.Listener, err error) {
	if l[0], err = net.Listen("tcp", e.opts.PeerListen); err != nil {
		return l, fmt.Errorf("listen for Dragonfly's peers: %w: choose another address", err)
	}
	if l[1], err = net.Listen("tcp", e.opts.UploadListen); err != nil {
		return l, errors.Join(fmt.Errorf("listen for uploads to Dragonfly's peers: %w: choose another address", err),
			l[0].Close())
	}
	for i := range l {
		l[i] = connpool.Listen(l[i], maxConns)
	}
	return l, nil
}

// serve answers peers until the engine is closed.
func (e *Source) serve(l [2]net.Listener) {
	e.peers = wire.NewServer(grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: 2 * time.Minute}))
	dfdaemonv1.RegisterDaemonServer(e.peers, &daemon{e: e})
	healthv1.RegisterHealthServer(e.peers, health.NewServer())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /download/{prefix}/{id}", e.upload)
	mux.HandleFunc("GET /healthy", func(w http.ResponseWriter, _ *http.Request) { // as Dragonfly's daemons answer it
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		_, _ = io.WriteString(w, `"OK"`)
	})
	e.uploads = &http.Server{
		Handler: mux, ReadHeaderTimeout: e.opts.StallTimeout, IdleTimeout: 90 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return e.ctx },
	}
	e.background.Go(func() {
		if err := e.peers.Serve(l[0]); err != nil && e.ctx.Err() == nil {
			e.log.Error("Dragonfly's peers are not answered any more", "error", err)
		}
	})
	e.background.Go(func() {
		if err := e.uploads.Serve(l[1]); err != nil && e.ctx.Err() == nil {
			e.log.Error("nothing is uploaded to Dragonfly's peers any more", "error", err)
		}
	})
}

// packet describes a task to peers, with up to limit of its pieces from the one with
// the number start on.
func (e *Source) packet(ctx context.Context, id string, h *holding, start, limit int) (*commonv1.PiecePacket, error) {
	blob, err := e.store.OpenForPeers(ctx, h.task)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	size := blob.Size()
	p := &commonv1.PiecePacket{
		TaskId: id, DstPid: h.peerID, DstAddr: e.UploadAddress(),
		TotalPiece: int32(pieceCount(size)), ContentLength: size,
	}
	if limit == 0 || size == 0 {
		return p, nil
	}
	for i := start; i < int(p.TotalPiece) && i-start < limit; i++ {
		sum, err := e.sums.piece(ctx, h.task.Digest, blob, i)
		if err != nil {
			return nil, err
		}
		p.PieceInfos = append(p.PieceInfos, pieceInfo(size, i, sum))
	}
	p.PieceMd5Sign = e.sums.sign(h.task.Digest)
	return p, nil
}

// daemon implements what Dragonfly's daemons ask of each other.
type daemon struct {
	dfdaemonv1.UnimplementedDaemonServer
	e *Source
}

// CheckHealth says that the daemon is there.
func (d *daemon) CheckHealth(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// GetPieceTasks describes pieces of a task.
func (d *daemon) GetPieceTasks(ctx context.Context, req *commonv1.PieceTaskRequest) (*commonv1.PiecePacket, error) {
	limit := int(min(req.GetLimit(), maxPieces))
	if limit == 0 {
		limit = defaultPieces
	}
	return d.packet(ctx, req, limit)
}

// packet describes up to limit pieces of a task.
func (d *daemon) packet(ctx context.Context, req *commonv1.PieceTaskRequest, limit int) (*commonv1.PiecePacket, error) {
	h := d.e.holding(req.GetTaskId())
	if h == nil {
		return nil, wire.Error(commonv1.Code_PeerTaskNotFound, "task %.64q is not here", req.GetTaskId())
	}
	p, err := d.e.packet(ctx, req.GetTaskId(), h, int(min(req.GetStartNum(), 1<<30)), limit)
	if err != nil {
		if errors.Is(err, p2p.ErrNotFound) || errors.Is(err, digest.ErrCorrupt) {
			return nil, wire.Error(commonv1.Code_PeerTaskNotFound, "%v", err)
		}
		return nil, wire.Error(commonv1.Code_UnknownError, "%v", err)
	}
	return p, nil
}

// SyncPieceTasks describes all pieces of a task: first how many there are, without a
// sum that had to be computed, as Dragonfly's daemons lose patience after 30 seconds.
// Then, for as long as the peer wants, it answers what it asks for once more.
func (d *daemon) SyncPieceTasks(stream dfdaemonv1.Daemon_SyncPieceTasksServer) error {
	ctx := stream.Context()
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	p, err := d.packet(ctx, req, 0)
	for err == nil {
		if err := stream.Send(p); err != nil {
			return err
		}
		if len(p.PieceInfos) > 0 {
			req.StartNum = uint32(p.PieceInfos[len(p.PieceInfos)-1].PieceNum) + 1
		}
		if int64(req.StartNum) >= int64(p.TotalPiece) {
			break
		}
		p, err = d.GetPieceTasks(ctx, req)
	}
	for err == nil {
		if req, err = stream.Recv(); err != nil {
			break
		}
		if p, err = d.GetPieceTasks(ctx, req); err == nil {
			err = stream.Send(p)
		}
	}
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		return nil // it has what it wants
	}
	return err
}

// upload sends one range of a task: /download/<id[:3]>/<id>. As Dragonfly's daemons do,
// it answers 200, not 206. Every byte is verified before it is sent; where one turns
// out to be damaged on the way, the answer ends early.
func (e *Source) upload(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, format string, args ...any) {
		w.Header().Set("Connection", "close")
		http.Error(w, fmt.Sprintf(format, args...), code)
	}
	if err := e.front.Begin(r.Context()); err != nil {
		refuse(http.StatusServiceUnavailable, "%v", err)
		return
	}
	defer e.front.End()
	id := r.PathValue("id")
	h := e.holding(id)
	if h == nil || r.PathValue("prefix") != id[:3] { // an ID that is held is long enough
		refuse(http.StatusNotFound, "task %.64q is not here", id)
		return
	}
	first, last, ok := parseRange(r.Header.Values("Range"))
	if !ok {
		refuse(http.StatusBadRequest, "want one range, bytes=FIRST-LAST")
		return
	}
	blob, err := e.store.OpenForPeers(r.Context(), h.task)
	if err != nil {
		refuse(http.StatusNotFound, "%v", err)
		return
	}
	defer blob.Close()
	if last >= blob.Size() {
		refuse(http.StatusRequestedRangeNotSatisfiable, "bytes %d to %d: the task has %d", first, last, blob.Size())
		return
	}
	select {
	case e.waiting <- struct{}{}:
		defer func() { <-e.waiting }()
	default:
		refuse(http.StatusServiceUnavailable, "%d uploads are waiting already", cap(e.waiting))
		return
	}
	n := last - first + 1
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	w.WriteHeader(http.StatusOK)
	// Dragonfly's daemons wait for two seconds for this, and for 30 for the rest.
	if err := control.Flush(); err != nil {
		return
	}
	select {
	case e.uploading <- struct{}{}:
		defer func() { <-e.uploading }()
	case <-r.Context().Done():
		return
	}
	out := &uploader{w: w, control: control, ctx: r.Context(), limit: e.up, stall: e.opts.StallTimeout}
	if err := blob.CopyRange(r.Context(), out, first, n, nil); err != nil {
		e.log.Debug("an upload to a peer of Dragonfly failed", "task", h.task.String(), "peer", r.RemoteAddr,
			"error", err)
	}
}

// parseRange returns the first and the last byte of the only range there is.
func parseRange(headers []string) (first, last int64, ok bool) {
	if len(headers) != 1 {
		return 0, 0, false
	}
	from, to, found := strings.Cut(strings.TrimPrefix(headers[0], "bytes="), "-")
	a, errA := strconv.ParseUint(from, 10, 63)
	b, errB := strconv.ParseUint(to, 10, 63)
	ok = strings.HasPrefix(headers[0], "bytes=") && found && errA == nil && errB == nil && a <= b
	return int64(a), int64(b), ok
}

// uploader writes an answer no faster than it may.
type uploader struct {
	w       http.ResponseWriter
	control *http.ResponseController
	ctx     context.Context
	limit   *rate.Limiter
	stall   time.Duration
}

func (u *uploader) Write(p []byte) (written int, err error) {
	const chunk = 256 << 10 // has to move within the stall timeout
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		if err := throttle.Wait(u.ctx, u.limit, len(part)); err != nil {
			return written, err
		}
		if err := u.control.SetWriteDeadline(time.Now().Add(u.stall)); err != nil {
			return written, err
		}
		n, err := u.w.Write(part)
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

var _ io.Writer = (*uploader)(nil)
