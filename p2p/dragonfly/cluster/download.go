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
	"strconv"
	"sync"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
)

const (
	parallelPieces = 4        // are fetched from a peer at once
	maxPieceSize   = 64 << 20 // bytes; Dragonfly's have 15 MiB at most
	minPieceSize   = 64 << 10 // bytes, of a task of more than one: Dragonfly's have 4 MiB at least
	maxTotal       = 1 << 20  // pieces of a task: 15 TiB of the largest
	maxParents     = 64       // peers that are begun with in one download

	maxID = 256 // bytes of a peer's ID: Dragonfly's have about 100

	maxRegistrations = 3 // downloads for one fetch
)

// errReregister says that the scheduler does not know the download, or not any more: it
// wants another registration.
var errReregister = errors.New("the scheduler wants to be asked again")

// download is one attempt to get a task from the peers that its scheduler names.
type download struct {
	e         *Source
	task      p2p.Task
	id        string
	peerID    string // of this host in this download
	scheduler *scheduler
	in        *front.Receiving // what has come
	began     time.Time

	registered bool
	endStream  context.CancelFunc
	packets    chan *schedulerv1.PeerPacket // closed when the scheduler names no more peers
	ended      error                        // why that is
	receiving  sync.WaitGroup

	sendMu   sync.Mutex
	stream   schedulerv1.Scheduler_ReportPieceResultClient
	finished int32 // pieces; guarded by sendMu

	mu     sync.Mutex
	layout layout
	have   map[span]string   // the MD5s, in hex, of what has come
	prefix int64             // bytes from the beginning on that have
	stale  bool              // of these, some may be written over
	claims map[span]*claim   // what is on its way
	users  map[*attempt]bool // the attempts that have told of this layout
}

// span is a part of a file.
type span struct{ start, size int64 }

// parent is a peer to fetch from.
type parent struct {
	id   string
	addr netip.AddrPort      // of its daemon, or, where it is said to have only one piece, of its uploads
	only *commonv1.PieceInfo // as the scheduler tells of it, which may be of what another peer once had
}

// source is where a piece is: the address of uploads, and by whose ID it is asked for,
// which may be another than that of the parent, on the same host.
type source struct {
	addr   netip.AddrPort
	peerID string
}

// newDownload begins a download with a scheduler. The caller closes it.
func (e *Source) newDownload(ctx context.Context, task p2p.Task, at *scheduler) (_ *download, err error) {
	d := &download{e: e, task: task, id: taskID(task), peerID: e.newPeerID(), scheduler: at,
		began: time.Now(), have: map[span]string{}, claims: map[span]*claim{}, users: map[*attempt]bool{}}
	if d.in, err = e.front.Receive(ctx, task); err != nil {
		return nil, err
	}
	return d, nil
}

// close reports to the scheduler how the download has ended, and lets go of it.
func (d *download) close(err error) {
	if d.registered {
		if d.stream != nil && err == nil {
			d.report(&schedulerv1.PieceResult{
				PieceInfo: &commonv1.PieceInfo{PieceNum: endOfPiece}, Code: commonv1.Code_Success})
		}
		if d.stream != nil {
			_ = d.stream.CloseSend()
		}
		result := &schedulerv1.PeerResult{
			TaskId: d.id, PeerId: d.peerID, SrcIp: d.e.host.Ip, Url: wire.URL(d.task), ContentLength: -1,
			TotalPieceCount: -1,
			Cost:            uint32(min(time.Since(d.began).Milliseconds(), math.MaxUint32)), Success: err == nil,
			Code: commonv1.Code_Success,
		}
		if err != nil {
			result.Code = commonv1.Code_ClientError
		} else {
			result.ContentLength, result.TotalPieceCount = d.layout.length, d.finished
			result.Traffic = uint64(d.layout.length)
		}
		// Also where the download was given up.
		ctx := context.Background()
		if err := d.scheduler.call(ctx, "report "+d.task.String(), d.e.opts.LookupTimeout,
			func(ctx context.Context) error {
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
	if err := d.in.Close(); err != nil {
		d.e.log.Warn("what has come of a download could not be removed; the next start will", "error", err)
	}
}

// run fetches and stores the task.
func (d *download) run(ctx context.Context) error {
	var result *schedulerv1.RegisterResult
	err := d.scheduler.call(ctx, "register "+d.task.String(), d.e.opts.LookupTimeout,
		func(ctx context.Context) (err error) {
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
		if problem = d.direct(ctx, result.GetPieceContent()); problem == nil ||
			!errors.Is(problem, digest.ErrMismatch) {
			return problem
		}
		d.askForParents()
	case commonv1.SizeScope_SMALL:
		single := result.GetSinglePiece()
		addr, err := parseAddr(single.GetDstAddr())
		if err != nil || len(single.GetDstPid()) > maxID || single.GetPieceInfo().GetRangeStart() != 0 {
			problem = fmt.Errorf("scheduler %s: the piece that it names, at %.64q, can't be fetched", d.scheduler.addr,
				single.GetDstAddr())
			d.askForParents()
		} else {
			queue = []parent{{single.GetDstPid(), addr, single.GetPieceInfo()}}
		}
	}
	return d.fromParents(ctx, queue, problem)
}

// direct stores content that the scheduler has sent itself.
func (d *download) direct(ctx context.Context, content []byte) error {
	if _, err := d.in.WriteAt(content, 0); err != nil {
		return err
	}
	d.layout.length = int64(len(content))
	if err := d.keep(ctx); err != nil {
		if errors.Is(err, digest.ErrMismatch) {
			err = fmt.Errorf("scheduler %s sent something else: %w", d.scheduler.addr, err)
		}
		return err
	}
	d.succeed("", pieceInfo(int64(len(content)), 0, nil))
	return nil
}

// keep stores what has come. Where it is something else than what was asked for, all of it is forgotten.
// Nobody writes any more.
func (d *download) keep(ctx context.Context) error {
	if err := d.advance(); err != nil {
		return err
	}
	err := d.in.Keep(d.layout.length)
	if !errors.Is(err, digest.ErrMismatch) {
		return err
	}
	again, failed := d.e.front.Receive(ctx, d.task)
	if failed != nil {
		return failed
	}
	if failed := d.in.Close(); failed != nil {
		d.e.log.Warn("what has come of a download could not be removed; the next start will", "error", failed)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.in, d.layout, d.prefix, d.stale = again, layout{}, 0, false
	clear(d.have)
	return err
}

// advance has what has come from the beginning on be hashed, beside what follows.
func (d *download) advance() error {
	d.mu.Lock()
	for d.prefix < d.layout.length {
		size := min(d.layout.size, d.layout.length-d.prefix)
		if _, here := d.have[span{d.prefix, size}]; !here || size == 0 {
			break
		}
		d.prefix += size
	}
	end, stale, in := d.prefix, d.stale, d.in
	d.stale = false
	d.mu.Unlock()
	if stale {
		in.Restart()
	}
	return in.Advance(end)
}

// drop forgets a piece that has come, as it is written over. d.mu is held.
func (d *download) drop(at span) {
	delete(d.have, at)
	if at.start < d.prefix {
		d.prefix, d.stale = 0, true
	}
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

// parents returns the peers that the scheduler names in a packet, or why it names no more.
func (d *download) parents(packet *schedulerv1.PeerPacket, more bool) (parents []parent, err error) {
	if !more && wire.Code(status.Convert(d.ended)) == commonv1.Code_SchedReregister {
		return nil, fmt.Errorf("scheduler %s: %w: %w: %w", d.scheduler.addr, p2p.ErrUnreachable, errReregister, d.ended)
	}
	if !more {
		return nil, fmt.Errorf("scheduler %s: %w: it ended the download: %w", d.scheduler.addr, p2p.ErrUnreachable,
			d.ended)
	}
	if code := packet.GetCode(); code != commonv1.Code_Success {
		return nil, fmt.Errorf("scheduler %s: %w: it names no peer: %s (%d)", d.scheduler.addr, p2p.ErrUnreachable,
			code, code)
	}
	for _, dest := range append([]*schedulerv1.PeerPacket_DestPeer{packet.GetMainPeer()},
		packet.GetCandidatePeers()...) {
		ip, err := netip.ParseAddr(dest.GetIp())
		port := dest.GetRpcPort()
		if err != nil || port < 1 || port > math.MaxUint16 || len(dest.GetPeerId()) > maxID ||
			len(parents) == maxParents {
			continue
		}
		addr := netip.AddrPortFrom(ip.Unmap(), uint16(port))
		if addr == d.self() {
			continue
		}
		parents = append(parents, parent{id: dest.GetPeerId(), addr: addr})
	}
	return parents, nil
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
	_ = d.stream.Send(r) // where it fails, so does receiving, which tells
}

// fail tells the scheduler that a peer is of no use: it names others.
func (d *download) fail(peerID string, code commonv1.Code) {
	d.report(&schedulerv1.PieceResult{DstPid: peerID, PieceInfo: &commonv1.PieceInfo{}, Code: code})
}

// askForParents has the scheduler name peers, of which none has failed.
func (d *download) askForParents() { d.fail("", commonv1.Code_ClientPieceDownloadFail) }

func (d *download) succeed(peerID string, piece *commonv1.PieceInfo) {
	now := uint64(time.Now().UnixNano())
	d.report(&schedulerv1.PieceResult{DstPid: peerID, PieceInfo: piece, Success: true, Code: commonv1.Code_Success,
		BeginTime: now, EndTime: now})
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

// from has a peer give what has not come of the task.
func (d *download) from(a *attempt) error {
	err := d.pieces(a)
	if a.watch.bit() {
		return fault("peer %s at %s: %w: nothing came for %s, or next to nothing", a.id, a.addr, p2p.ErrUnreachable,
			d.e.opts.StallTimeout)
	}
	if isPeersFault(err) {
		return fmt.Errorf("peer %s at %s: %w", a.id, a.addr, err)
	}
	return err
}

// pieces fetches all pieces from a peer.
func (d *download) pieces(a *attempt) error {
	ctx, cancel := context.WithCancel(a.watch.ctx)
	defer cancel()
	fetching, ctx := errgroup.WithContext(ctx)
	fetching.SetLimit(parallelPieces)
	err := d.eachPiece(ctx, a, func(from source, piece *commonv1.PieceInfo) {
		fetching.Go(func() error { return d.fetch(ctx, a, from, piece) })
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

func spanOf(piece *commonv1.PieceInfo) span {
	return span{int64(piece.GetRangeStart()), int64(piece.GetRangeSize())}
}

// eachPiece asks a peer which pieces there are, and calls do for each of them. It
// returns when it has for all.
//
//nolint:cyclop // what each answer of a parent means stands in one place
func (d *download) eachPiece(ctx context.Context, a *attempt, do func(from source, piece *commonv1.PieceInfo)) error {
	// How long the content is, the peer says: a scheduler goes on telling what it was told first.
	check := checker{layout: layout{length: -1}, seen: map[int32]bool{}}
	// take calls do for those of a packet that were not told before.
	take := func(packet *commonv1.PiecePacket, from source) error {
		for _, piece := range packet.GetPieceInfos() {
			if check.seen[piece.GetPieceNum()] {
				continue
			}
			if err := check.piece(piece); err != nil {
				return err
			}
			if err := d.use(a, check.layout); err != nil {
				return err
			}
			do(from, piece)
		}
		return nil
	}
	if a.only != nil {
		packet := &commonv1.PiecePacket{
			TotalPiece: 1, ContentLength: int64(a.only.GetRangeSize()), PieceInfos: []*commonv1.PieceInfo{a.only}}
		if err := check.packet(packet); err != nil {
			return err
		}
		return take(packet, source{a.addr, a.id})
	}
	conn, err := dial(a.addr.String())
	if err != nil {
		return fault("%w", err)
	}
	defer conn.Close()
	stream, err := dfdaemonv1.NewDaemonClient(conn).SyncPieceTasks(ctx)
	if err == nil {
		err = stream.Send(&commonv1.PieceTaskRequest{
			TaskId: d.id, SrcPid: d.peerID, DstPid: a.id, Limit: defaultPieces})
	}
	if err != nil && !errors.Is(err, io.EOF) { // which has its reason in what is received
		return fault("%w: %w", p2p.ErrUnreachable, err)
	}
	for !check.complete() {
		packet, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return fault("it told of %d pieces, of %d", len(check.seen), check.total)
		}
		if err != nil {
			return fault("%w: %w", p2p.ErrUnreachable, err)
		}
		known, before := check.told, len(check.seen)
		if err := check.packet(packet); err != nil {
			return err
		}
		if check.told && !known {
			a.watch.kick()
		}
		if len(packet.GetPieceInfos()) == 0 {
			continue
		}
		from, err := parseAddr(packet.GetDstAddr())
		if err != nil || from.Addr() != a.addr.Addr() || len(packet.GetDstPid()) > maxID {
			return fault("it says that its pieces are at %.64q, of peer %.64q: want an address of this peer",
				packet.GetDstAddr(), packet.GetDstPid())
		}
		if err := take(packet, source{from, cmp.Or(packet.GetDstPid(), a.id)}); err != nil {
			return err
		}
		if len(check.seen) > before {
			a.watch.kick() // a packet that tells nothing new is no progress
		}
	}
	return d.use(a, check.layout) // of nothing, where there are no pieces
}

// parseAddr parses IP:PORT.
func parseAddr(s string) (netip.AddrPort, error) {
	addr, err := netip.ParseAddrPort(s)
	if err == nil && addr.Port() == 0 {
		err = errors.New("there is no port 0")
	}
	return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), err
}

// layout is how a file is cut into pieces: all have the same size, but for the last.
type layout struct {
	length, size int64 // -1 is a length that is not known
}

// checker checks what a peer says of a task, so far as that is needed to go on: whether
// it is true, only the digest of the whole can say.
type checker struct {
	layout
	total int32
	told  bool // the peer has told length and number
	seen  map[int32]bool
}

func (c *checker) complete() bool { return c.told && len(c.seen) == int(c.total) }

// packet takes length and number of pieces, which a peer that is fetching itself may
// not know yet.
func (c *checker) packet(p *commonv1.PiecePacket) error {
	length, total := p.GetContentLength(), p.GetTotalPiece()
	if length < 0 || total < 0 {
		return nil
	}
	if c.length >= 0 && length != c.length {
		return fault("it says that the content has %d bytes, and before that it has %d", length, c.length)
	}
	if total > maxTotal || length > int64(total)*maxPieceSize || length < int64(total) || c.told && total != c.total {
		return fault("it says that there are %d pieces of %d bytes", total, length)
	}
	c.length, c.total, c.told = length, total, true
	return nil
}

// piece takes a piece that was not seen before.
func (c *checker) piece(p *commonv1.PieceInfo) error {
	number, start, size := int64(p.GetPieceNum()), int64(p.GetRangeStart()), int64(p.GetRangeSize())
	last := number == int64(c.total)-1
	each := size
	if last && number > 0 {
		each = start / number
	}
	if !c.told || number < 0 || number >= int64(c.total) || p.GetPieceStyle() != commonv1.PieceStyle_PLAIN ||
		size == 0 || size > each || each > maxPieceSize || c.total > 1 && each < minPieceSize ||
		c.size > 0 && each != c.size ||
		start != number*each || last != (start+size == c.length) {
		return fault("it tells of a piece %d, %d bytes from %d on, of %d bytes in %d pieces", number, size,
			p.GetRangeStart(), c.length, c.total)
	}
	c.size = each
	c.seen[p.GetPieceNum()] = true
	return nil
}

// piece fetches one piece into the file: as many bytes as it has, and no more.
func (d *download) piece(ctx context.Context, watch *watchdog, from source, piece *commonv1.PieceInfo) error {
	at := spanOf(piece)
	target := url.URL{Scheme: "http", Host: from.addr.String(), Path: "/download/" + d.id[:3] + "/" + d.id,
		RawQuery: url.Values{"peerId": {from.peerID}}.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return fault("piece %d: %w", piece.GetPieceNum(), err)
	}
	last := at.start + at.size - 1
	req.Header.Set("Range", "bytes="+strconv.FormatInt(at.start, 10)+"-"+strconv.FormatInt(last, 10))
	progress := throttle.NewProgress(ctx, d.e.opts.StallTimeout)
	defer progress.Stop()
	go func() {
		select {
		case <-progress.Slow():
			watch.markSlow()
		case <-progress.Context().Done():
		}
	}()
	defer func() {
		if errors.Is(context.Cause(progress.Context()), throttle.ErrStalled) {
			watch.end(throttle.ErrStalled) // one piece that stalls is enough to give the peer up
		}
	}()
	var resp *http.Response
	if _, err := progress.Await(func() (int, error) {
		resp, err = d.e.client.Do(req.WithContext(progress.Context()))
		return 0, err
	}); err != nil {
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
	n, err := copyTo(io.MultiWriter(io.NewOffsetWriter(d.in, at.start), sum), io.LimitReader(body, at.size))
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
	got := hex.EncodeToString(sum.Sum(nil))
	if want := piece.GetPieceMd5(); want != "" && got != want {
		return fault("piece %d: it has the MD5 %s, where it says %.64q", piece.GetPieceNum(), got, want)
	}
	d.mu.Lock()
	d.have[at] = got
	d.mu.Unlock()
	return d.advance()
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
	defer r.watch.hold()() // each piece has a clock of its own
	return r.r.Read(p)
}

func newHTTPClient(opts Options) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: opts.LookupTimeout}).DialContext,
			IdleConnTimeout:        90 * time.Second,
			MaxIdleConns:           100,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
