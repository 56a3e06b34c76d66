package cluster

import (
	"cmp"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
)

const (
	parallelPieces = 4        // are fetched from a peer at once
	maxPieceSize   = 64 << 20 // bytes; Dragonfly's have 15 MiB at most
	maxTotal       = 1 << 20  // pieces of a task: 15 TiB of the largest
	maxParents     = 64       // peers that are tried for one download

	maxRegistrations = 3 // downloads for one fetch
)

// errReregister says that the scheduler does not know the download, or not any more: it
// wants another registration.
var errReregister = errors.New("the scheduler wants to be asked again")

// download is one attempt to get a task from the peers that its scheduler names.
type download struct {
	e         *Engine
	task      p2p.Task
	id        string
	peerID    string // of this host in this download
	scheduler *scheduler
	file      *os.File // what has come; has no name
	length    int64    // as the scheduler knows it, or -1
	began     time.Time

	registered bool
	endStream  context.CancelFunc
	packets    chan *schedulerv1.PeerPacket // closed when the scheduler names no more peers
	ended      error                        // why that is
	receiving  sync.WaitGroup

	sendMu   sync.Mutex
	stream   schedulerv1.Scheduler_ReportPieceResultClient
	finished int32 // pieces; guarded by sendMu

	mu   sync.Mutex
	have map[span]string // the MD5s, in hex, of what has come
}

// span is a part of a file.
type span struct{ start, size int64 }

// parent is a peer to fetch from.
type parent struct {
	id   string
	addr netip.AddrPort // of its daemon, or, where it is said to have only one piece, of its uploads
	only *commonv1.PieceInfo
}

// source is where a piece is: the address of uploads, and by whose ID it is asked for,
// which may be another than that of the parent, on the same host.
type source struct {
	addr   netip.AddrPort
	peerID string
}

// newDownload begins a download with a scheduler. The caller closes it.
func (e *Engine) newDownload(task p2p.Task, at *scheduler, length int64) (_ *download, err error) {
	d := &download{e: e, task: task, id: taskID(task), peerID: e.newPeerID(), scheduler: at, length: length, began: time.Now(), have: map[span]string{}}
	if length <= 0 {
		d.length = -1 // it does not know
	}
	if d.file, err = os.CreateTemp(e.dir, ""); err != nil {
		return nil, pieces.DiskError(err)
	}
	// Nothing is left of it, whatever happens to this process.
	if err := os.Remove(d.file.Name()); err != nil {
		return nil, errors.Join(err, d.file.Close())
	}
	return d, nil
}

// close reports to the scheduler how the download has ended, and lets go of it.
func (d *download) close(err error) {
	if d.registered {
		if d.stream != nil && err == nil {
			d.report(&schedulerv1.PieceResult{PieceInfo: &commonv1.PieceInfo{PieceNum: endOfPiece}, Code: commonv1.Code_Success})
		}
		if d.stream != nil {
			d.stream.CloseSend()
		}
		result := &schedulerv1.PeerResult{
			TaskId: d.id, PeerId: d.peerID, SrcIp: d.e.host.Ip, Url: wire.URL(d.task), ContentLength: -1, TotalPieceCount: -1,
			Cost: uint32(min(time.Since(d.began).Milliseconds(), math.MaxUint32)), Success: err == nil, Code: commonv1.Code_Success,
		}
		if err != nil {
			result.Code = commonv1.Code_ClientError
		} else if info, err := d.file.Stat(); err == nil {
			result.ContentLength, result.TotalPieceCount, result.Traffic = info.Size(), d.finished, uint64(info.Size())
		}
		// Also where the download was given up.
		ctx := context.Background()
		if err := d.scheduler.call(ctx, "report "+d.task.String(), d.e.opts.LookupTimeout, func(ctx context.Context) error {
			_, err := d.scheduler.rpc.ReportPeerResult(ctx, result)
			return err
		}); err != nil {
			d.e.log.Debug("the end of a download was not reported", "task", d.task.String(), "error", err)
		}
	}
	if d.stream != nil {
		d.endStream() // unless the scheduler has ended it
	}
	d.receiving.Wait()
	d.file.Close()
}

// run fetches and stores the task.
func (d *download) run(ctx context.Context) error {
	var result *schedulerv1.RegisterResult
	err := d.scheduler.call(ctx, "register "+d.task.String(), d.e.opts.LookupTimeout, func(ctx context.Context) (err error) {
		result, err = d.scheduler.rpc.RegisterPeerTask(ctx, &schedulerv1.PeerTaskRequest{
			Url: wire.URL(d.task), UrlMeta: wire.Meta(d.task), PeerId: d.peerID, PeerHost: d.e.host, TaskId: d.id,
		})
		return err
	})
	if err != nil {
		return err
	}
	d.registered = true
	if err := d.open(ctx); err != nil {
		return err
	}
	var problem error // with what was tried last
	var queue []parent
	switch result.GetSizeScope() {
	case commonv1.SizeScope_EMPTY, commonv1.SizeScope_TINY:
		if problem = d.direct(ctx, result.GetPieceContent()); problem == nil || !errors.Is(problem, digest.ErrMismatch) {
			return problem
		}
		d.fail("", commonv1.Code_ClientPieceDownloadFail) // has the scheduler name peers
	case commonv1.SizeScope_SMALL:
		single := result.GetSinglePiece()
		addr, err := parseAddr(single.GetDstAddr())
		if err != nil || single.GetPieceInfo().GetRangeStart() != 0 {
			problem = fmt.Errorf("scheduler %s: the piece that it names, at %q, can't be fetched", d.scheduler.addr, single.GetDstAddr())
			d.fail(single.GetDstPid(), commonv1.Code_ClientPieceRequestFail)
		} else {
			queue = []parent{{single.GetDstPid(), addr, single.GetPieceInfo()}}
		}
	}
	return d.fromParents(ctx, queue, problem)
}

// fromParents fetches from one peer after the other, those of the queue first, until
// what has come is what was asked for.
func (d *download) fromParents(ctx context.Context, queue []parent, problem error) error {
	tried := map[parent]bool{}
	for len(tried) < maxParents {
		if len(queue) == 0 {
			more, err := d.next(ctx)
			if err != nil {
				if problem == nil || context.Cause(ctx) != nil {
					return err
				}
				return fmt.Errorf("%w (and there is no other peer)", problem)
			}
			queue = more
			continue
		}
		p := queue[0]
		queue = queue[1:]
		if tried[p] {
			continue
		}
		tried[p] = true
		err := d.from(ctx, p)
		if err == nil {
			return nil
		}
		if context.Cause(ctx) != nil || !isPeersFault(err) {
			return err
		}
		problem = err
		d.e.log.Warn("a peer of Dragonfly was given up", "task", d.task.String(), "peer", p.id, "address", p.addr.String(), "error", err)
		d.fail(p.id, commonv1.Code_ClientPieceDownloadFail)
	}
	return fmt.Errorf("%w (as %d others)", problem, maxParents-1)
}

// direct stores content that the scheduler has sent itself.
func (d *download) direct(ctx context.Context, content []byte) error {
	if _, err := d.file.WriteAt(content, 0); err != nil {
		return pieces.DiskError(err)
	}
	if err := d.e.Take(ctx, d.task, d.file); err != nil {
		if errors.Is(err, digest.ErrMismatch) {
			err = fmt.Errorf("scheduler %s sent something else: %w", d.scheduler.addr, err)
			err = errors.Join(err, d.file.Truncate(0))
		}
		return err
	}
	d.succeed("", pieceInfo(int64(len(content)), 0, nil))
	return nil
}

// open opens the stream over which the scheduler names peers, and is told how they do.
func (d *download) open(ctx context.Context) error {
	ctx, endStream := context.WithCancel(ctx)
	stream, err := d.scheduler.rpc.ReportPieceResult(ctx)
	if err != nil {
		endStream()
		return fmt.Errorf("scheduler %s: %w: %w", d.scheduler.addr, wire.ErrAway, err)
	}
	d.stream, d.endStream = stream, endStream
	d.packets = make(chan *schedulerv1.PeerPacket)
	d.receiving.Go(func() {
		defer close(d.packets)
		for {
			packet, err := stream.Recv()
			if err != nil {
				d.ended = err
				return
			}
			select {
			case d.packets <- packet:
			case <-ctx.Done():
				d.ended = context.Cause(ctx)
				return
			}
		}
	})
	d.report(&schedulerv1.PieceResult{PieceInfo: &commonv1.PieceInfo{PieceNum: beginOfPiece}})
	return nil
}

// next waits until the scheduler names peers.
func (d *download) next(ctx context.Context) ([]parent, error) {
	limit := time.NewTimer(d.e.opts.StallTimeout)
	defer limit.Stop()
	for {
		var packet *schedulerv1.PeerPacket
		var more bool
		select {
		case packet, more = <-d.packets:
		case <-limit.C:
			return nil, fmt.Errorf("scheduler %s: %w: it named no peer within %s", d.scheduler.addr, wire.ErrAway, d.e.opts.StallTimeout)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if !more && wire.Code(status.Convert(d.ended)) == commonv1.Code_SchedReregister {
			return nil, fmt.Errorf("scheduler %s: %w: %w: %w", d.scheduler.addr, p2p.ErrUnreachable, errReregister, d.ended)
		}
		if !more {
			return nil, fmt.Errorf("scheduler %s: %w: it ended the download: %w", d.scheduler.addr, p2p.ErrUnreachable, d.ended)
		}
		if code := packet.GetCode(); code != commonv1.Code_Success {
			return nil, fmt.Errorf("scheduler %s: %w: it names no peer: %s (%d)", d.scheduler.addr, p2p.ErrUnreachable, code, code)
		}
		var parents []parent
		for _, dest := range append([]*schedulerv1.PeerPacket_DestPeer{packet.GetMainPeer()}, packet.GetCandidatePeers()...) {
			ip, err := netip.ParseAddr(dest.GetIp())
			port := dest.GetRpcPort()
			if err != nil || port < 1 || port > math.MaxUint16 || len(parents) == maxParents {
				continue
			}
			addr := netip.AddrPortFrom(ip.Unmap(), uint16(port))
			if addr == d.self() {
				continue
			}
			parents = append(parents, parent{id: dest.GetPeerId(), addr: addr})
		}
		if len(parents) > 0 {
			return parents, nil
		}
	}
}

func (d *download) self() netip.AddrPort {
	ip, _ := netip.ParseAddr(d.e.host.Ip)
	return netip.AddrPortFrom(ip.Unmap(), uint16(d.e.host.RpcPort))
}

// report sends a result to the scheduler. One that does not take it within the stall
// timeout gets no more.
func (d *download) report(r *schedulerv1.PieceResult) {
	d.sendMu.Lock()
	defer d.sendMu.Unlock()
	r.TaskId, r.SrcPid = d.id, d.peerID
	if r.GetSuccess() {
		d.finished++
	}
	r.FinishedCount = d.finished
	stuck := time.AfterFunc(d.e.opts.StallTimeout, d.endStream)
	defer stuck.Stop()
	d.stream.Send(r) // where it fails, so does receiving, which tells
}

// fail tells the scheduler that a peer is of no use: it names others.
func (d *download) fail(peerID string, code commonv1.Code) {
	d.report(&schedulerv1.PieceResult{DstPid: peerID, PieceInfo: &commonv1.PieceInfo{}, Code: code})
}

func (d *download) succeed(peerID string, piece *commonv1.PieceInfo) {
	now := uint64(time.Now().UnixNano())
	d.report(&schedulerv1.PieceResult{DstPid: peerID, PieceInfo: piece, Success: true, Code: commonv1.Code_Success, BeginTime: now, EndTime: now})
}

// faultError is an error that is a peer's fault: another one may do better.
type faultError struct{ err error }

func (e *faultError) Error() string { return e.err.Error() }
func (e *faultError) Unwrap() error { return e.err }

func isPeersFault(err error) bool {
	_, ok := errors.AsType[*faultError](err)
	return ok
}

func fault(format string, args ...any) error { return &faultError{fmt.Errorf(format, args...)} }

// from fetches the task from a peer, and stores it. Pieces that came from others before
// are kept where this one gives them the same MD5: should the whole turn out to
// be something else, it is this peer that has vouched for all of it.
func (d *download) from(ctx context.Context, p parent) error {
	watch := newWatchdog(ctx, d.e.opts.StallTimeout)
	defer watch.stop()
	err := d.pieces(watch, p)
	if err != nil {
		if watch.bit() {
			return fault("peer %s at %s: %w: nothing came for %s, or next to nothing", p.id, p.addr, p2p.ErrUnreachable, d.e.opts.StallTimeout)
		}
		if isPeersFault(err) {
			return fmt.Errorf("peer %s at %s: %w", p.id, p.addr, err)
		}
		return err
	}
	if err := d.e.Take(ctx, d.task, d.file); err != nil {
		if !errors.Is(err, digest.ErrMismatch) {
			return err
		}
		d.have = map[span]string{} // nobody else uses it now
		return fault("peer %s at %s gave something else: %w", p.id, p.addr, err)
	}
	return nil
}

// pieces fetches all pieces from a peer.
func (d *download) pieces(watch *watchdog, p parent) error {
	ctx, cancel := context.WithCancel(watch.ctx)
	defer cancel()
	fetching, ctx := errgroup.WithContext(ctx)
	fetching.SetLimit(parallelPieces)
	err := d.eachPiece(ctx, watch, p, func(from source, piece *commonv1.PieceInfo) {
		fetching.Go(func() error {
			if d.has(piece) {
				return nil
			}
			if err := d.piece(ctx, watch, from, piece); err != nil {
				return err
			}
			d.succeed(p.id, piece)
			return nil
		})
	})
	first := err != nil && ctx.Err() == nil // else a piece has failed, and ended it
	if first {
		cancel()
	}
	if failed := fetching.Wait(); failed != nil && !first {
		return failed
	}
	return err
}

// resize makes the file as long as a peer says that the content is. Where another one
// said something else, nothing of what it gave is kept.
func (d *download) resize(length int64) error {
	info, err := d.file.Stat()
	if err != nil || info.Size() == length {
		return err
	}
	d.mu.Lock()
	d.have = map[span]string{}
	d.mu.Unlock()
	return d.file.Truncate(length)
}

// has reports whether a piece has come already, with the MD5 that it is said to have.
func (d *download) has(piece *commonv1.PieceInfo) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	sum, ok := d.have[spanOf(piece)]
	return ok && sum == piece.GetPieceMd5()
}

func spanOf(piece *commonv1.PieceInfo) span {
	return span{int64(piece.GetRangeStart()), int64(piece.GetRangeSize())}
}

// eachPiece asks a peer which pieces there are, and calls do for each of them. It
// returns when it has for all.
func (d *download) eachPiece(ctx context.Context, watch *watchdog, p parent, do func(from source, piece *commonv1.PieceInfo)) error {
	check := checker{length: d.length, seen: map[int32]bool{}}
	if p.only != nil {
		if err := check.packet(&commonv1.PiecePacket{TotalPiece: 1, ContentLength: int64(p.only.GetRangeSize())}); err != nil {
			return err
		}
		if err := check.piece(p.only); err != nil {
			return err
		}
		if err := d.resize(check.length); err != nil {
			return err
		}
		do(source{p.addr, p.id}, p.only)
		return nil
	}
	conn, err := dial(p.addr.String())
	if err != nil {
		return fault("%w", err)
	}
	defer conn.Close()
	stream, err := dfdaemonv1.NewDaemonClient(conn).SyncPieceTasks(ctx)
	if err == nil {
		err = stream.Send(&commonv1.PieceTaskRequest{TaskId: d.id, SrcPid: d.peerID, DstPid: p.id, Limit: defaultPieces})
	}
	if err != nil && !errors.Is(err, io.EOF) { // which has its reason in what is received
		return fault("%w: %w", p2p.ErrUnreachable, err)
	}
	for !check.complete() {
		packet, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return fault("it told of %d bytes in %d pieces, of %d in %d", check.sum, len(check.seen), check.length, check.total)
		}
		if err != nil {
			return fault("%w: %w", p2p.ErrUnreachable, err)
		}
		known, before := check.told, len(check.seen)
		if err := check.packet(packet); err != nil {
			return err
		}
		if check.told && !known {
			if err := d.resize(check.length); err != nil {
				return err
			}
		}
		if len(packet.GetPieceInfos()) == 0 {
			continue
		}
		from, err := parseAddr(packet.GetDstAddr())
		if err != nil || from.Addr() != p.addr.Addr() {
			return fault("it says that its pieces are at %q: want an address of this peer", packet.GetDstAddr())
		}
		at := source{from, cmp.Or(packet.GetDstPid(), p.id)}
		for _, piece := range packet.GetPieceInfos() {
			if check.seen[piece.GetPieceNum()] {
				continue
			}
			if err := check.piece(piece); err != nil {
				return err
			}
			do(at, piece)
		}
		if len(check.seen) > before || check.told && !known {
			watch.kick() // a packet that tells nothing new is no progress
		}
	}
	return nil
}

// parseAddr parses IP:PORT.
func parseAddr(s string) (netip.AddrPort, error) {
	addr, err := netip.ParseAddrPort(s)
	if err == nil && addr.Port() == 0 {
		err = errors.New("there is no port 0")
	}
	return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), err
}

// checker checks what a peer says of a task, so far as that is needed to go on: whether
// it is true, only the digest of the whole can say.
type checker struct {
	length int64 // -1 while it is not known
	total  int32
	told   bool // the peer has told both
	seen   map[int32]bool
	sum    int64 // of the sizes of pieces seen
}

func (c *checker) complete() bool { return c.told && len(c.seen) == int(c.total) && c.sum == c.length }

// packet takes length and number of pieces, which a peer that is fetching itself may
// not know yet.
func (c *checker) packet(p *commonv1.PiecePacket) error {
	length, total := p.GetContentLength(), p.GetTotalPiece()
	if length < 0 || total < 0 {
		return nil
	}
	if c.length >= 0 && length != c.length {
		return fault("it says that the content has %d bytes, where it has %d", length, c.length)
	}
	if total > maxTotal || length > int64(total)*maxPieceSize || c.told && total != c.total {
		return fault("it says that there are %d pieces of %d bytes", total, length)
	}
	c.length, c.total, c.told = length, total, true
	return nil
}

// piece takes a piece that was not seen before.
func (c *checker) piece(p *commonv1.PieceInfo) error {
	start, size := p.GetRangeStart(), int64(p.GetRangeSize())
	if !c.told || p.GetPieceNum() < 0 || p.GetPieceNum() >= c.total || size == 0 || size > maxPieceSize ||
		start > uint64(c.length) || size > c.length-int64(start) || p.GetPieceStyle() != commonv1.PieceStyle_PLAIN {
		return fault("it tells of a piece %d, %d bytes from %d on, of %d bytes in %d pieces", p.GetPieceNum(), size, start, c.length, c.total)
	}
	c.seen[p.GetPieceNum()] = true
	c.sum += size
	return nil
}

// piece fetches one piece into the file: as many bytes as it has, and no more.
func (d *download) piece(ctx context.Context, watch *watchdog, from source, piece *commonv1.PieceInfo) error {
	at := spanOf(piece)
	target := url.URL{Scheme: "http", Host: from.addr.String(), Path: "/download/" + d.id[:3] + "/" + d.id, RawQuery: url.Values{"peerId": {from.peerID}}.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return fault("piece %d: %w", piece.GetPieceNum(), err)
	}
	last := at.start + at.size - 1
	req.Header.Set("Range", "bytes="+strconv.FormatInt(at.start, 10)+"-"+strconv.FormatInt(last, 10))
	progress := throttle.NewProgress(ctx, d.e.opts.StallTimeout)
	defer progress.Stop()
	defer func() {
		if errors.Is(context.Cause(progress.Context()), throttle.ErrStalled) {
			watch.end(throttle.ErrStalled) // one piece that stalls is enough to give the peer up
		}
	}()
	resp, err := d.e.client.Do(req.WithContext(progress.Context()))
	if err != nil {
		return fault("piece %d: %w: %w", piece.GetPieceNum(), p2p.ErrUnreachable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		return fault("piece %d: it answers %s", piece.GetPieceNum(), resp.Status)
	}
	tooLong := fault("piece %d: it sends more than the %d bytes of the range", piece.GetPieceNum(), at.size)
	if resp.ContentLength > at.size {
		return tooLong
	}
	sum := md5.New()
	body := &watchedReader{progress.Reader(resp.Body, d.e.down), watch}
	n, err := copyTo(io.MultiWriter(io.NewOffsetWriter(d.file, at.start), sum), io.LimitReader(body, at.size))
	if err != nil {
		return err
	}
	if n < at.size {
		return fault("piece %d: it sends %d of %d bytes", piece.GetPieceNum(), n, at.size)
	}
	if extra, err := io.ReadFull(body, make([]byte, 1)); extra > 0 {
		return tooLong
	} else if !errors.Is(err, io.EOF) {
		return fault("piece %d: %w", piece.GetPieceNum(), err)
	}
	d.mu.Lock()
	d.have[at] = hex.EncodeToString(sum.Sum(nil))
	d.mu.Unlock()
	return nil
}

// copyTo copies what a peer sends. Errors of the writer are not the peer's fault.
func copyTo(w io.Writer, r io.Reader) (n int64, err error) {
	buf := make([]byte, 64<<10)
	for {
		got, failed := r.Read(buf)
		if got > 0 {
			if _, err := w.Write(buf[:got]); err != nil {
				return n, pieces.DiskError(err)
			}
			n += int64(got)
		}
		if errors.Is(failed, io.EOF) {
			return n, nil
		}
		if failed != nil {
			return n, fault("%w: %w", p2p.ErrUnreachable, failed)
		}
	}
}

// watchedReader tells a watchdog of what comes from a peer.
type watchedReader struct {
	r     io.Reader
	watch *watchdog
}

func (r *watchedReader) Read(p []byte) (int, error) {
	r.watch.holding.Add(1) // each piece has a clock of its own
	defer r.watch.holding.Add(-1)
	n, err := r.r.Read(p)
	if n > 0 {
		r.watch.kick()
	}
	return n, err
}

// watchdog ends a context when nothing has happened for a while, and nobody holds it.
type watchdog struct {
	ctx     context.Context
	end     context.CancelCauseFunc
	timer   *time.Timer
	limit   time.Duration
	holding atomic.Int32 // who fetch a piece
}

func newWatchdog(ctx context.Context, limit time.Duration) *watchdog {
	w := &watchdog{limit: limit}
	w.ctx, w.end = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(limit, func() {
		if w.holding.Load() > 0 {
			w.kick()
		} else {
			w.end(throttle.ErrStalled)
		}
	})
	return w
}

func (w *watchdog) kick() { w.timer.Reset(w.limit) }

// bit reports whether nothing has happened for too long.
func (w *watchdog) bit() bool { return context.Cause(w.ctx) == throttle.ErrStalled }

func (w *watchdog) stop() {
	w.timer.Stop()
	w.end(nil)
}

func newHTTPClient(opts Options) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: opts.LookupTimeout}).DialContext,
			ResponseHeaderTimeout:  opts.StallTimeout,
			IdleConnTimeout:        90 * time.Second,
			MaxIdleConns:           100,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
