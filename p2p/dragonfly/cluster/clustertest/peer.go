package clustertest

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const pieceSize = 4 << 20 // of files up to 200 MiB

// Behaviour says what a peer does when it is asked for a piece.
type Behaviour int

const (
	Honest    Behaviour = iota
	Lie                 // other bytes, with the right MD5s of those
	Long                // more bytes than the range has, said beforehand
	Chunked             // the same, not said
	Stall               // half of the bytes, and no more
	StallLast           // the same, of the last piece only
	Drip                // a byte now and then
	LieDrip             // the same, of other content
	Trickle             // 1.4 KiB a second
	Mute                // no answer at all to a request for a piece
	BadSum              // other bytes than the MD5s say
	Silent              // no answer to what pieces there are
	Hostile             // pieces that cannot be
	Elsewhere           // pieces at the address of somebody else
	Redirect            // pieces of another peer on the same host, which are right
)

// Peer is a dfdaemon of Dragonfly. It is safe for concurrent use.
type Peer struct {
	dfdaemonv1.UnimplementedDaemonServer
	ID string

	host      *schedulerv1.PeerHost
	behaviour Behaviour
	scheduler *Scheduler
	conn      *grpc.ClientConn
	rpc       schedulerv1.SchedulerClient

	mu     sync.Mutex
	tasks  map[string][]byte
	served int
	asked  func()
}

// StartPeer starts a peer of a scheduler, which ends with the test.
func StartPeer(t testing.TB, s *Scheduler, name string, behaviour Behaviour) *Peer {
	t.Helper()
	var listeners []net.Listener
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	conn, err := grpc.NewClient("passthrough:///"+s.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	port := func(i int) int32 { return int32(listeners[i].Addr().(*net.TCPAddr).Port) }
	p := &Peer{
		ID: "127.0.0.1-1-" + name, behaviour: behaviour, scheduler: s, conn: conn,
		rpc: schedulerv1.NewSchedulerClient(conn), tasks: map[string][]byte{},
		host: &schedulerv1.PeerHost{Id: name, Ip: "127.0.0.1", RpcPort: port(0), DownPort: port(1), Hostname: name},
	}
	peers := grpc.NewServer()
	dfdaemonv1.RegisterDaemonServer(peers, p)
	uploads := &http.Server{Handler: http.HandlerFunc(p.upload)}
	var served sync.WaitGroup
	served.Go(func() { peers.Serve(listeners[0]) })
	served.Go(func() { uploads.Serve(listeners[1]) })
	t.Cleanup(func() {
		peers.Stop()
		uploads.Close()
		conn.Close()
		served.Wait()
	})
	return p
}

// Served returns how many pieces were asked for.
func (p *Peer) Served() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.served
}

// OnAsk has do called whenever the peer is asked for something.
func (p *Peer) OnAsk(do func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = do
}

// begin is the begin of an answer.
func (p *Peer) begin() {
	p.mu.Lock()
	asked := p.asked
	p.mu.Unlock()
	if asked != nil {
		asked()
	}
}

// Import has the peer have content under a cid and a tag, and announce it.
func (p *Peer) Import(ctx context.Context, cid, tag string, content []byte) error {
	id := TaskID(cid, tag)
	p.mu.Lock()
	p.tasks[id] = content
	p.mu.Unlock()
	packet, err := p.packet(id, 0, len(content)/pieceSize+1)
	if err != nil {
		return err
	}
	_, err = p.rpc.AnnounceTask(ctx, &schedulerv1.AnnounceTaskRequest{
		TaskId: id, Url: URL(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}, PeerHost: p.host, PiecePacket: packet,
		TaskType: commonv1.TaskType_DfCache,
	})
	return err
}

// Delete has the peer drop what it has under a cid and a tag, and say so. What the scheduler
// knows of the task stays.
func (p *Peer) Delete(ctx context.Context, cid, tag string) error {
	id := TaskID(cid, tag)
	p.mu.Lock()
	delete(p.tasks, id)
	p.mu.Unlock()
	_, err := p.rpc.LeaveTask(ctx, &schedulerv1.PeerTarget{TaskId: id, PeerId: p.ID})
	return err
}

// content is what the peer gives for a task.
func (p *Peer) content(id string) ([]byte, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	content, ok := p.tasks[id]
	if ok && (p.behaviour == Lie || p.behaviour == LieDrip) {
		wrong := append([]byte(nil), content...)
		wrong[0] ^= 1
		wrong[len(wrong)/2] ^= 1
		return wrong, true
	}
	return content, ok
}

func (p *Peer) packet(id string, start, limit int) (*commonv1.PiecePacket, error) {
	content, ok := p.content(id)
	if !ok {
		return nil, Error(commonv1.Code_PeerTaskNotFound, "task not found")
	}
	total := (len(content) + pieceSize - 1) / pieceSize
	packet := &commonv1.PiecePacket{
		TaskId: id, DstPid: p.ID, DstAddr: fmt.Sprintf("127.0.0.1:%d", p.host.GetDownPort()),
		TotalPiece: int32(total), ContentLength: int64(len(content)),
	}
	if p.behaviour == Elsewhere {
		packet.DstAddr = fmt.Sprintf("127.0.0.2:%d", p.host.GetDownPort())
	}
	for i := start; i < total && i < start+limit; i++ {
		part := content[i*pieceSize : min(len(content), (i+1)*pieceSize)]
		sum := md5.Sum(part)
		info := &commonv1.PieceInfo{PieceNum: int32(i), RangeStart: uint64(i * pieceSize), RangeSize: uint32(len(part)),
			PieceMd5: hex.EncodeToString(sum[:])}
		switch p.behaviour {
		case Hostile:
			info.RangeStart = 1<<64 - 5
		case BadSum:
			info.PieceMd5 = hex.EncodeToString(make([]byte, md5.Size))
		}
		packet.PieceInfos = append(packet.PieceInfos, info)
	}
	return packet, nil
}

// SyncPieceTasks implements the API.
func (p *Peer) SyncPieceTasks(stream dfdaemonv1.Daemon_SyncPieceTasksServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := req.Validate(); err != nil {
		return err
	}
	p.begin()
	if p.behaviour == Silent {
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	for {
		packet, err := p.packet(req.GetTaskId(), int(req.GetStartNum()), int(req.GetLimit()))
		if err != nil {
			return err
		}
		if p.behaviour == Redirect {
			packet.DstPid += "-other"
		}
		if err := stream.Send(packet); err != nil {
			return err
		}
		if len(packet.PieceInfos) < int(req.GetLimit()) {
			return nil
		}
		req.StartNum += uint32(len(packet.PieceInfos))
	}
}

func (p *Peer) upload(w http.ResponseWriter, r *http.Request) {
	p.begin()
	p.mu.Lock()
	p.served++
	p.mu.Unlock()
	var prefix, id string
	var first, last int
	if n, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); n != 2 || err != nil ||
		len(r.URL.Path) != len("/download/abc/")+64 {
		http.Error(w, "bad", http.StatusBadRequest)
		return
	}
	prefix, id = r.URL.Path[len("/download/"):len("/download/")+3], r.URL.Path[len("/download/abc/"):]
	content, ok := p.content(id)
	want := p.ID
	if p.behaviour == Redirect {
		want += "-other"
	}
	if !ok || prefix != id[:3] || r.URL.Query().Get("peerId") != want {
		http.Error(w, "not found", http.StatusInternalServerError)
		return
	}
	part := content[min(first, len(content)):min(last+1, len(content))] // promised is all of the range
	behaviour := p.behaviour
	if behaviour == StallLast && last+1 == len(content) {
		behaviour = Stall
	}
	switch behaviour {
	case Long:
		w.Header().Set("Content-Length", fmt.Sprint(len(part)+1))
		w.Write(append(part[:len(part):len(part)], 'x'))
		return
	case Chunked:
		w.(http.Flusher).Flush()
		w.Write(append(part[:len(part):len(part)], 'x'))
		return
	case Stall:
		w.Header().Set("Content-Length", fmt.Sprint(len(part)))
		w.Write(part[:len(part)/2])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	case Mute:
		<-r.Context().Done()
		return
	case Drip, LieDrip, Trickle:
		w.Header().Set("Content-Length", fmt.Sprint(len(part)))
		each := 1
		if behaviour == Trickle {
			each = 144
		}
		for part := range slices.Chunk(part, each) {
			w.Write(part)
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(last+1-first))
	w.Write(part)
}

// Export fetches what is under a cid and a tag from the peers that the scheduler names,
// and believes them as far as Dragonfly does. It has it then itself.
func (p *Peer) Export(ctx context.Context, cid, tag string) (content []byte, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	id := TaskID(cid, tag)
	found, err := p.rpc.StatTask(ctx, &schedulerv1.StatTaskRequest{TaskId: id})
	if err != nil {
		return nil, err
	}
	if found.GetState() != "Succeeded" || !found.GetHasAvailablePeer() {
		return nil, errors.New("no peer has it")
	}
	registered, err := p.rpc.RegisterPeerTask(
		ctx, &schedulerv1.PeerTaskRequest{
			Url: URL(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}, PeerId: p.ID, PeerHost: p.host, TaskId: id})
	if err != nil {
		return nil, err
	}
	stream, err := p.rpc.ReportPieceResult(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&schedulerv1.PieceResult{
		TaskId: id, SrcPid: p.ID, PieceInfo: &commonv1.PieceInfo{PieceNum: -1}}); err != nil {
		return nil, err
	}
	switch registered.GetSizeScope() {
	case commonv1.SizeScope_EMPTY, commonv1.SizeScope_TINY:
		content = registered.GetPieceContent()
	case commonv1.SizeScope_SMALL:
		single := registered.GetSinglePiece()
		content, err = p.fetch(ctx, id, single.GetDstPid(), single.GetDstAddr(), single.GetPieceInfo())
	default:
		packet, failed := stream.Recv()
		if failed != nil {
			return nil, failed
		}
		if packet.GetCode() != commonv1.Code_Success {
			return nil, fmt.Errorf("no peers: %s", packet.GetCode())
		}
		content, err = p.fetchAll(ctx, id, packet.GetMainPeer())
	}
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.tasks[id] = content
	p.mu.Unlock()
	_, err = p.rpc.ReportPeerResult(ctx,
		&schedulerv1.PeerResult{TaskId: id, PeerId: p.ID, SrcIp: p.host.GetIp(), Url: URL(cid), Success: true,
			Code: commonv1.Code_Success, ContentLength: int64(len(content))})
	return content, err
}

func (p *Peer) fetch(ctx context.Context, id, peer, addr string, piece *commonv1.PieceInfo) ([]byte, error) {
	part, err := fetchRange(ctx, addr, id, peer, int64(piece.GetRangeStart()), int64(piece.GetRangeSize()))
	if err != nil {
		return nil, err
	}
	if sum := md5.Sum(part); hex.EncodeToString(sum[:]) != piece.GetPieceMd5() {
		return nil, errors.New("the MD5 of a piece is wrong")
	}
	return part, nil
}

// fetchAll fetches from a peer what it says there is.
func (p *Peer) fetchAll(ctx context.Context, id string, from *schedulerv1.PeerPacket_DestPeer) ([]byte, error) {
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///%s:%d", from.GetIp(), from.GetRpcPort()),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := dfdaemonv1.NewDaemonClient(conn).SyncPieceTasks(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&commonv1.PieceTaskRequest{
		TaskId: id, SrcPid: p.ID, DstPid: from.GetPeerId(), Limit: 16}); err != nil {
		return nil, err
	}
	var content []byte
	signed, total, sign := sha256.New(), int32(0), ""
	number := int32(0)
	for told := false; !told || number < total; told = true { // the stream stays open
		packet, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if err := packet.Validate(); err != nil {
			return nil, err
		}
		total, sign = packet.GetTotalPiece(), packet.GetPieceMd5Sign()
		for _, piece := range packet.GetPieceInfos() {
			if piece.GetPieceNum() != number || piece.GetRangeStart() != uint64(len(content)) {
				return nil, fmt.Errorf("piece %d at %d is not the next one", piece.GetPieceNum(), piece.GetRangeStart())
			}
			part, err := p.fetch(ctx, id, packet.GetDstPid(), packet.GetDstAddr(), piece)
			if err != nil {
				return nil, err
			}
			content = append(content, part...)
			io.WriteString(signed, piece.GetPieceMd5())
			number++
		}
	}
	if number != total || hex.EncodeToString(signed.Sum(nil)) != sign {
		return nil, fmt.Errorf("%d of %d pieces, signed %q", number, total, sign)
	}
	return content, nil
}
