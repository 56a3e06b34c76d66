// Package clustertest has stand-ins for a scheduler and a dfdaemon of an upstream
// Dragonfly, for tests of peers in its cluster. They speak the real API over TCP and
// HTTP on this host, check requests by the API's own rules, and do as the real ones do
// where that matters: a scheduler forgets, keeps the length and the first piece of a task as it was
// told first, whoever has left since, fetches tiny content itself when it is announced, and names
// peers other than those that have failed; a peer cuts files into
// pieces of 4 MiB, believes MD5s, and takes an answer for good only with status 200.
//
// It promises no compatibility.
package clustertest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// URL is what Dragonfly's dfcache makes of a cid.
func URL(cid string) string { return "d7y:/" + url.QueryEscape(cid) }

// TaskID is what Dragonfly makes of a cid and a tag.
func TaskID(cid, tag string) string {
	h := sha256.New()
	io.WriteString(h, URL(cid))
	io.WriteString(h, tag)
	return hex.EncodeToString(h.Sum(nil))
}

// Scheduler is a scheduler. It is safe for concurrent use.
type Scheduler struct {
	schedulerv1.UnimplementedSchedulerServer
	Addr string

	server *grpc.Server
	served chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed with every call
	tasks   map[string]*task
	hosts   map[string]*schedulerv1.AnnounceHostRequest
	calls   map[string]int
	results []*schedulerv1.PeerResult
	failed  []*schedulerv1.PieceResult
	hang    map[string]bool
	before  map[string]func()
	direct  []byte // sent in place of tiny content
	lose    int    // downloads
	vague   bool
}

type task struct {
	length int64
	total  int32
	tiny   []byte
	first  *commonv1.PieceInfo
	peers  []*member // in order of arrival
}

type member struct {
	id      string
	host    *schedulerv1.PeerHost
	done    bool // has all of it
	blocked map[string]bool
	small   bool
}

// StartScheduler starts a scheduler, which ends with the test.
func StartScheduler(t testing.TB) *Scheduler {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Scheduler{Addr: l.Addr().String(), hosts: map[string]*schedulerv1.AnnounceHostRequest{}}
	s.reset()
	s.start(l)
	t.Cleanup(s.Stop)
	return s
}

func (s *Scheduler) start(l net.Listener) {
	s.server = grpc.NewServer()
	s.served = make(chan struct{})
	schedulerv1.RegisterSchedulerServer(s.server, s)
	go func() {
		defer close(s.served)
		s.server.Serve(l)
	}()
}

// Stop ends the scheduler.
func (s *Scheduler) Stop() {
	s.server.Stop()
	<-s.served
}

// Restart starts a scheduler that was stopped, which has forgotten everything.
func (s *Scheduler) Restart(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	s.Forget()
	s.start(l)
}

func (s *Scheduler) reset() {
	s.tasks, s.calls, s.changed, s.hang = map[string]*task{}, map[string]int{}, make(chan struct{}), map[string]bool{}
}

// Forget has the scheduler forget all tasks.
func (s *Scheduler) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks = map[string]*task{}
}

// Hang has calls, by name, not be answered.
func (s *Scheduler) Hang(calls ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hang = map[string]bool{}
	for _, call := range calls {
		s.hang[call] = true
	}
}

// Before has the scheduler call do before it does what the next such call asks.
func (s *Scheduler) Before(call string, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = map[string]func(){call: do}
}

// Lie has the scheduler send something else for tiny content.
func (s *Scheduler) Lie(content []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.direct = content
}

// Lose has the scheduler not know of the next n downloads when they begin.
func (s *Scheduler) Lose(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose = n
}

// TellNoLengths has the scheduler not know how long anything is.
func (s *Scheduler) TellNoLengths() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vague = true
}

// Await waits until ok, which is called with each call of the scheduler.
func (s *Scheduler) Await(ctx context.Context, ok func() bool) error {
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Knows reports how many peers have all of a task, as far as the scheduler knows.
func (s *Scheduler) Knows(id string) (peers int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[id]; t != nil {
		for _, m := range t.peers {
			if m.done {
				peers++
			}
		}
	}
	return peers
}

// Calls returns how often a call was made.
func (s *Scheduler) Calls(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[name]
}

// Hosts returns how many hosts are announced.
func (s *Scheduler) Hosts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.hosts)
}

// Results returns the results of downloads.
func (s *Scheduler) Results() []*schedulerv1.PeerResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.results)
}

// Failed returns the peers that were told to have failed.
func (s *Scheduler) Failed() (peers []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.failed {
		peers = append(peers, f.GetDstPid())
	}
	return peers
}

type validator interface{ Validate() error }

// begin is the begin of a call. The end of it is noted when end is called.
func (s *Scheduler) begin(ctx context.Context, call string, req validator) (end func(), err error) {
	s.mu.Lock()
	hang, before := s.hang[call], s.before[call]
	delete(s.before, call)
	s.mu.Unlock()
	if before != nil {
		before()
	}
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err := req.Validate(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.calls[call]++
		close(s.changed)
		s.changed = make(chan struct{})
	}, nil
}

// Error is an error as Dragonfly sends it.
func Error(code commonv1.Code, message string) error {
	st, err := status.New(codes.Unknown, fmt.Sprintf("[%d]%s", code, message)).WithDetails(
		&commonv1.GrpcDfError{Code: code, Message: message})
	if err != nil {
		panic(err)
	}
	return st.Err()
}

// AnnounceHost implements the API.
func (s *Scheduler) AnnounceHost(ctx context.Context, req *schedulerv1.AnnounceHostRequest) (*emptypb.Empty, error) {
	end, err := s.begin(ctx, "AnnounceHost", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hosts[req.GetId()] = req
	return &emptypb.Empty{}, nil
}

// LeaveHost implements the API.
func (s *Scheduler) LeaveHost(ctx context.Context, req *schedulerv1.LeaveHostRequest) (*emptypb.Empty, error) {
	end, err := s.begin(ctx, "LeaveHost", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hosts[req.GetId()] == nil {
		return nil, Error(commonv1.Code_BadRequest, "host not found")
	}
	delete(s.hosts, req.GetId())
	for _, t := range s.tasks {
		t.peers = slices.DeleteFunc(t.peers, func(m *member) bool { return m.host.GetId() == req.GetId() })
	}
	return &emptypb.Empty{}, nil
}

// AnnounceTask implements the API.
func (s *Scheduler) AnnounceTask(ctx context.Context, req *schedulerv1.AnnounceTaskRequest) (*emptypb.Empty, error) {
	end, err := s.begin(ctx, "AnnounceTask", req)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := req.GetPeerHost().Validate(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if req.GetTaskType() != commonv1.TaskType_DfCache {
		return nil, status.Error(codes.InvalidArgument, "not a task of dfcache")
	}
	p := req.GetPiecePacket()
	s.mu.Lock()
	t := s.tasks[req.GetTaskId()]
	if t == nil {
		t = &task{length: p.GetContentLength(), total: p.GetTotalPiece()}
		if len(p.GetPieceInfos()) > 0 {
			t.first = p.GetPieceInfos()[0]
		}
		s.tasks[req.GetTaskId()] = t
	}
	m := t.member(p.GetDstPid(), req.GetPeerHost())
	m.done = true
	fetch := t.length > 0 && t.length <= 128 && t.tiny == nil
	s.mu.Unlock()
	if fetch {
		content, err := fetchRange(ctx, fmt.Sprintf("%s:%d", req.GetPeerHost().GetIp(),
			req.GetPeerHost().GetDownPort()), req.GetTaskId(), p.GetDstPid(), 0, t.length)
		if err == nil {
			s.mu.Lock()
			t.tiny = content
			s.mu.Unlock()
		}
	}
	return &emptypb.Empty{}, nil
}

func (t *task) member(id string, host *schedulerv1.PeerHost) *member {
	for _, m := range t.peers {
		if m.id == id {
			return m
		}
	}
	m := &member{id: id, host: host, blocked: map[string]bool{}}
	t.peers = append(t.peers, m)
	return m
}

// parents returns the peers that m can fetch from.
func (t *task) parents(m *member) (parents []*member) {
	for _, other := range t.peers {
		if other.done && !m.blocked[other.id] && other.host.GetId() != m.host.GetId() {
			parents = append(parents, other)
		}
	}
	return parents
}

// StatTask implements the API.
func (s *Scheduler) StatTask(ctx context.Context, req *schedulerv1.StatTaskRequest) (*schedulerv1.Task, error) {
	end, err := s.begin(ctx, "StatTask", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[req.GetTaskId()]
	if t == nil {
		return nil, Error(commonv1.Code_PeerTaskNotFound, "task not found")
	}
	done := slices.ContainsFunc(t.peers, func(m *member) bool { return m.done })
	length := t.length
	if s.vague {
		length = -1
	}
	return &schedulerv1.Task{
		Id: req.GetTaskId(), Type: commonv1.TaskType_DfCache, ContentLength: length, TotalPieceCount: t.total,
		State: "Succeeded", PeerCount: int32(len(t.peers)), HasAvailablePeer: done,
	}, nil
}

// LeaveTask implements the API.
func (s *Scheduler) LeaveTask(ctx context.Context, req *schedulerv1.PeerTarget) (*emptypb.Empty, error) {
	end, err := s.begin(ctx, "LeaveTask", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[req.GetTaskId()]; t != nil {
		n := len(t.peers)
		t.peers = slices.DeleteFunc(t.peers, func(m *member) bool { return m.id == req.GetPeerId() })
		if len(t.peers) < n {
			return &emptypb.Empty{}, nil
		}
	}
	return nil, Error(commonv1.Code_SchedPeerNotFound, "peer not found")
}

// RegisterPeerTask implements the API.
func (s *Scheduler) RegisterPeerTask(
	ctx context.Context, req *schedulerv1.PeerTaskRequest,
) (*schedulerv1.RegisterResult, error) {
	end, err := s.begin(ctx, "RegisterPeerTask", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	id := req.GetTaskId()
	t := s.tasks[id]
	if t == nil {
		t = &task{length: -1, total: -1}
		s.tasks[id] = t
	}
	m := t.member(req.GetPeerId(), req.GetPeerHost())
	result := &schedulerv1.RegisterResult{TaskId: id, TaskType: commonv1.TaskType_DfCache}
	parents := t.parents(m)
	switch {
	case t.length == 0:
		result.SizeScope, result.DirectPiece = commonv1.SizeScope_EMPTY, &schedulerv1.RegisterResult_PieceContent{}
	case t.tiny != nil:
		content := t.tiny
		if s.direct != nil {
			content = s.direct
		}
		result.SizeScope, result.DirectPiece = commonv1.SizeScope_TINY, &schedulerv1.RegisterResult_PieceContent{
			PieceContent: content}
	case t.total == 1 && t.first != nil && len(parents) > 0:
		m.small = true
		p := parents[0]
		result.SizeScope = commonv1.SizeScope_SMALL
		result.DirectPiece = &schedulerv1.RegisterResult_SinglePiece{SinglePiece: &schedulerv1.SinglePiece{
			DstPid: p.id, DstAddr: fmt.Sprintf("%s:%d", p.host.GetIp(), p.host.GetDownPort()), PieceInfo: t.first,
		}}
	}
	return result, nil
}

// ReportPieceResult implements the API.
func (s *Scheduler) ReportPieceResult(stream schedulerv1.Scheduler_ReportPieceResultServer) error {
	var t *task
	var m *member
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := s.begin(stream.Context(), "ReportPieceResult", r)
		if err != nil {
			return err
		}
		s.mu.Lock()
		first := m == nil
		if first {
			if t = s.tasks[r.GetTaskId()]; t != nil {
				for _, other := range t.peers {
					if other.id == r.GetSrcPid() {
						m = other
					}
				}
			}
		}
		var packet *schedulerv1.PeerPacket
		switch {
		case m == nil || s.lose > 0:
			if s.lose > 0 {
				s.lose--
			}
			s.mu.Unlock()
			return Error(commonv1.Code_SchedReregister, "peer not found")
		case r.GetPieceInfo().GetPieceNum() == -1:
			if t.tiny == nil && t.length != 0 && !m.small {
				packet = t.schedule(r.GetTaskId(), m)
			}
		case !r.GetSuccess() && r.GetCode() != commonv1.Code_Success:
			s.failed = append(s.failed, r)
			m.blocked[r.GetDstPid()] = true
			packet = t.schedule(r.GetTaskId(), m)
		}
		s.mu.Unlock()
		end()
		if packet != nil {
			if err := stream.Send(packet); err != nil {
				return err
			}
		}
	}
}

// schedule names peers for m.
func (t *task) schedule(id string, m *member) *schedulerv1.PeerPacket {
	packet := &schedulerv1.PeerPacket{TaskId: id, SrcPid: m.id, Code: commonv1.Code_SchedNeedBackSource}
	for _, p := range t.parents(m) {
		dest := &schedulerv1.PeerPacket_DestPeer{Ip: p.host.GetIp(), RpcPort: p.host.GetRpcPort(), PeerId: p.id}
		if packet.MainPeer == nil {
			packet.MainPeer, packet.Code = dest, commonv1.Code_Success
		} else {
			packet.CandidatePeers = append(packet.CandidatePeers, dest)
		}
	}
	return packet
}

// ReportPeerResult implements the API.
func (s *Scheduler) ReportPeerResult(ctx context.Context, req *schedulerv1.PeerResult) (*emptypb.Empty, error) {
	end, err := s.begin(ctx, "ReportPeerResult", req)
	if err != nil {
		return nil, err
	}
	defer end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results = append(s.results, req)
	if t := s.tasks[req.GetTaskId()]; t != nil {
		for _, m := range t.peers {
			if m.id == req.GetPeerId() {
				m.done = req.GetSuccess()
				return &emptypb.Empty{}, nil
			}
		}
	}
	return nil, Error(commonv1.Code_SchedPeerNotFound, "peer not found")
}

// fetchRange fetches a piece as Dragonfly's daemons do.
func fetchRange(ctx context.Context, addr, taskID, peerID string, start, n int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(
		ctx, http.MethodGet, fmt.Sprintf("http://%s/download/%s/%s?peerId=%s", addr, taskID[:3], taskID, peerID), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", start, start+n-1))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %s", resp.Status)
	}
	content, err := io.ReadAll(resp.Body)
	if err == nil && int64(len(content)) != n {
		err = fmt.Errorf("%d bytes for a range of %d", len(content), n)
	}
	return content, err
}
