// Package persistenttest has a stand-in for a Dragonfly of the API v2, for tests of what
// is built on one: a scheduler, and the dfdaemons of some hosts. They speak the real API,
// and do as the real ones do where that hurts: a dfdaemon keeps a hard link of the file
// that it is given, and compares nothing; what it sends, it sends in any order, and where
// a piece fails, the stream ends as if that were all; nearly every error is "internal",
// and says in words what it is; an upload that is broken off is under way for ever; what
// is there can't be uploaded again, and is gone when its TTL is over.
//
// It promises no compatibility.
package persistenttest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	commonv2 "d7y.io/api/v2/pkg/apis/common/v2"
	dfdaemonv2 "d7y.io/api/v2/pkg/apis/dfdaemon/v2"
	schedulerv2 "d7y.io/api/v2/pkg/apis/scheduler/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dfcache/dfcache/p2p/dragonfly/dragonflytest"
)

// PieceLength is how long the pieces are into which the daemons cut a file.
const PieceLength = 4 << 20

// Cluster is a scheduler, and the daemons that have it. It is safe for concurrent use.
type Cluster struct {
	schedulerv2.UnimplementedSchedulerServer
	Addr string // of the scheduler

	mu      sync.Mutex
	daemons []*Daemon
	tasks   map[string]*task
	late    time.Duration // how far its clock is ahead
	away    bool
	deletes int
	hung    chan struct{} // closed when deletes that hang go on
	waiting int           // deletes that hang
}

// task is what the scheduler knows of one.
type task struct {
	size    uint64
	state   string
	ttl     time.Duration
	created time.Time
	updated time.Time
}

// Daemon is the dfdaemon of a host. It is safe for concurrent use. What OnCall is given is
// called with "uploading", too: when the scheduler knows of an upload, and the daemon has
// nothing of it yet.
type Daemon struct {
	dfdaemonv2.UnimplementedDfdaemonDownloadServer
	*dragonflytest.Process
	cluster *Cluster

	mu        sync.Mutex
	files     map[string]string // the cache files of the tasks that it has
	made      int
	change    func(*commonv2.Piece)
	short     bool
	claimed   uint64
	lingers   bool
	healthy   *health.Server
	contained bool
	oldIDs    bool
}

// StartCluster starts a scheduler, which ends with the test.
func StartCluster(t testing.TB) *Cluster {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{Addr: l.Addr().String(), tasks: map[string]*task{}}
	server := grpc.NewServer()
	schedulerv2.RegisterSchedulerServer(server, c)
	t.Cleanup(dragonflytest.Serve(server, l))
	return c
}

// Start starts a daemon of the cluster, which ends with the test.
func (c *Cluster) Start(t testing.TB) *Daemon {
	t.Helper()
	d := &Daemon{cluster: c, files: map[string]string{}}
	d.Process = dragonflytest.NewProcess(t, func(server *grpc.Server) {
		dfdaemonv2.RegisterDfdaemonDownloadServer(server, d)
		healthy := health.NewServer()
		healthy.SetServingStatus(dfdaemonv2.DfdaemonDownload_ServiceDesc.ServiceName,
			healthpb.HealthCheckResponse_SERVING)
		healthpb.RegisterHealthServer(server, healthy)
		d.set(func() { d.healthy = healthy })
	})
	c.mu.Lock()
	c.daemons = append(c.daemons, d)
	c.mu.Unlock()
	d.Run()
	t.Cleanup(d.Kill)
	return d
}

// Wait has the clock of the scheduler go forward.
func (c *Cluster) Wait(d time.Duration) { c.set(func() { c.late += d }) }

// Age has all that the scheduler knows be older.
func (c *Cluster) Age(d time.Duration) {
	c.set(func() {
		for _, t := range c.tasks {
			t.updated = t.updated.Add(-d)
		}
	})
}

// Leave has the scheduler answer nobody any more, or, with false, again.
func (c *Cluster) Leave(away bool) { c.set(func() { c.away = away }) }

// Hang has the scheduler not answer deletes, or, with false, answer again.
func (c *Cluster) Hang(hangs bool) {
	c.set(func() {
		if hangs {
			c.hung = make(chan struct{})
		} else {
			close(c.hung)
			c.hung = nil
		}
	})
}

// Waiting returns how many deletes are not answered.
func (c *Cluster) Waiting() (n int) {
	c.set(func() { n = c.waiting })
	return n
}

// Deletes returns how many deletes the scheduler was asked for.
func (c *Cluster) Deletes() (n int) {
	c.set(func() { n = c.deletes })
	return n
}

// States returns what the tasks are that the scheduler knows.
func (c *Cluster) States() (states []string) {
	c.set(func() {
		for _, task := range c.tasks {
			states = append(states, task.state)
		}
	})
	slices.Sort(states)
	return states
}

func (c *Cluster) set(do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	do()
}

// Tamper has change do something to each piece that the daemon sends.
func (d *Daemon) Tamper(change func(*commonv2.Piece)) { d.set(func() { d.change = change }) }

// Shorten has the daemon end what it sends before the last piece, or, with false, not.
func (d *Daemon) Shorten(short bool) { d.set(func() { d.short = short }) }

// Linger has the daemon not end what it sends.
func (d *Daemon) Linger() { d.set(func() { d.lingers = true }) }

// Claim has the daemon say that what it sends has n bytes, whatever it has.
func (d *Daemon) Claim(n uint64) { d.set(func() { d.claimed = n }) }

// Ail has the daemon say that it can't serve, until it is run again.
func (d *Daemon) Ail() { d.set(func() { d.healthy.Shutdown() }) }

// Contain has the daemon see other directories than its callers.
func (d *Daemon) Contain() { d.set(func() { d.contained = true }) }

// CountOldIDs has the daemon calculate task IDs as it did before September 2025.
func (d *Daemon) CountOldIDs() { d.set(func() { d.oldIDs = true }) }

// Forget has the daemon lose all that it has; the scheduler knows.
func (d *Daemon) Forget() { d.set(func() { clear(d.files) }) }

func (d *Daemon) set(do func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	do()
}

// Tasks returns the IDs of the tasks that the daemon has.
func (d *Daemon) Tasks() (ids []string) {
	d.set(func() {
		for id := range d.files {
			ids = append(ids, id)
		}
	})
	slices.Sort(ids)
	return ids
}

func internal(format string, args ...any) error {
	return status.Errorf(codes.Internal, format, args...)
}

var errNoScheduler = internal("available schedulers not found")

// has returns the cache file of a task that this daemon has.
func (d *Daemon) has(id string) (name string, found bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name, found = d.files[id]
	return name, found
}

// find returns what the scheduler knows of a task, and who has it.
func (c *Cluster) find(id string) (*commonv2.PersistentCacheTask, []*Daemon, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.away {
		return nil, nil, errNoScheduler
	}
	t := c.tasks[id]
	if t != nil && time.Now().Add(c.late).After(t.created.Add(t.ttl)) {
		delete(c.tasks, id)
		t = nil
	}
	if t == nil {
		return nil, nil, internal("persistent cache task %s not found", id)
	}
	var providers []*Daemon
	for _, d := range c.daemons {
		if _, found := d.has(id); found {
			providers = append(providers, d)
		}
	}
	n := uint64(len(providers))
	return &commonv2.PersistentCacheTask{
		Id: id, PersistentReplicaCount: 1, CurrentPersistentReplicaCount: n, CurrentReplicaCount: n,
		PieceLength: PieceLength, ContentLength: t.size, PieceCount: uint32((t.size + PieceLength - 1) / PieceLength),
		State: t.state,
		Ttl:   durationpb.New(t.ttl), CreatedAt: timestamppb.New(t.created), UpdatedAt: timestamppb.New(t.updated),
	}, providers, nil
}

// StatPersistentCacheTask implements the API.
func (d *Daemon) StatPersistentCacheTask(
	_ context.Context, req *dfdaemonv2.StatPersistentCacheTaskRequest,
) (*commonv2.PersistentCacheTask, error) {
	t, _, err := d.cluster.find(req.GetTaskId())
	return t, err
}

// UploadPersistentCacheTask implements the API.
func (d *Daemon) UploadPersistentCacheTask(
	ctx context.Context, req *dfdaemonv2.UploadPersistentCacheTaskRequest,
) (*commonv2.PersistentCacheTask, error) {
	d.mu.Lock()
	contained, oldIDs := d.contained, d.oldIDs
	d.made++
	name := d.CacheFile(fmt.Sprint(d.made))
	d.mu.Unlock()
	if err := req.ValidateAll(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	info, err := os.Stat(req.GetPath())
	if contained {
		err = os.ErrNotExist
	}
	if err != nil {
		return nil, internal("%v", err)
	}
	id := fmt.Sprintf("%x", sha256.Sum256([]byte(req.GetContentForCalculatingTaskId())))
	if oldIDs {
		id = fmt.Sprint(crc32.ChecksumIEEE([]byte(req.GetContentForCalculatingTaskId())))
	}
	if known, _, err := d.cluster.find(id); err == nil && known.GetState() != "Failed" {
		return nil, internal("status: AlreadyExists, message: \"persistent cache task %s is %s cannot upload\"", id,
			known.GetState())
	}
	c := d.cluster
	now := time.Now()
	c.set(func() {
		now = now.Add(c.late)
		c.tasks[id] = &task{size: uint64(info.Size()), state: "Uploading", ttl: req.GetTtl().AsDuration(), created: now,
			updated: now}
	})
	if err := d.Hook(ctx, "uploading"); err != nil {
		return nil, internal("%v", err) // and all stays as it is
	}
	if err := os.Link(req.GetPath(), name); err != nil {
		return nil, internal("%v", err)
	}
	var gone bool
	c.set(func() {
		t := c.tasks[id]
		if gone = t == nil; !gone {
			t.state = "Succeeded"
		}
	})
	if gone {
		return nil, internal("persistent cache task %s is not there any more", id)
	}
	d.set(func() { d.files[id] = name })
	t, _, err := c.find(id)
	return t, err
}

// DownloadPersistentCacheTask implements the API.
func (d *Daemon) DownloadPersistentCacheTask(
	req *dfdaemonv2.DownloadPersistentCacheTaskRequest,
	stream dfdaemonv2.DfdaemonDownload_DownloadPersistentCacheTaskServer,
) error {
	id := req.GetTaskId()
	t, providers, err := d.cluster.find(id)
	if err != nil {
		return err
	}
	name, found := d.has(id)
	if !found {
		if len(providers) == 0 {
			return internal("not all persistent cache pieces are downloaded with scheduler")
		}
		from, _ := providers[0].has(id)
		if name, err = d.keep(id, from); err != nil {
			return internal("%v", err)
		}
	}
	d.mu.Lock()
	change, short, lingers, length := d.change, d.short, d.lingers, cmp.Or(d.claimed, t.GetContentLength())
	d.mu.Unlock()
	send := func(answer *dfdaemonv2.DownloadPersistentCacheTaskResponse) error {
		answer.HostId, answer.TaskId, answer.PeerId = "host", id, "peer"
		return stream.Send(answer)
	}
	err = send(&dfdaemonv2.DownloadPersistentCacheTaskResponse{
		Response: &dfdaemonv2.DownloadPersistentCacheTaskResponse_DownloadPersistentCacheTaskStartedResponse{
			DownloadPersistentCacheTaskStartedResponse: &dfdaemonv2.DownloadPersistentCacheTaskStartedResponse{
				ContentLength: length},
		}})
	if err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return internal("%v", err)
	}
	defer f.Close()
	numbers := rand.Perm(int(t.GetPieceCount()))
	if len(numbers) > 0 {
		numbers = append(numbers, numbers[0]) // from the local cache and from a parent, at the same moment
	}
	if short {
		numbers = numbers[:max(0, len(numbers)-2)]
	}
	for _, number := range numbers {
		offset := int64(number) * PieceLength
		buf := make([]byte, min(PieceLength, int64(t.GetContentLength())-offset))
		if _, err := f.ReadAt(buf, offset); err != nil && !errors.Is(err, io.EOF) {
			return internal("%v", err)
		}
		piece := &commonv2.Piece{Number: uint32(number), Offset: uint64(offset), Length: uint64(len(buf)), Content: buf,
			Cost: durationpb.New(0), CreatedAt: timestamppb.Now()}
		if change != nil {
			change(piece)
		}
		if !req.GetNeedPieceContent() {
			piece.Content = nil
		}
		err := send(&dfdaemonv2.DownloadPersistentCacheTaskResponse{
			Response: &dfdaemonv2.DownloadPersistentCacheTaskResponse_DownloadPieceFinishedResponse{
				DownloadPieceFinishedResponse: &dfdaemonv2.DownloadPieceFinishedResponse{Piece: piece},
			}})
		if err != nil {
			return err
		}
	}
	if lingers {
		<-stream.Context().Done()
	}
	return nil
}

// keep copies a file to the cache, and returns its name there.
func (d *Daemon) keep(id, from string) (string, error) {
	content, err := os.ReadFile(from)
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.made++
	name := d.CacheFile(fmt.Sprint(d.made))
	if err := os.WriteFile(name, content, 0o644); err != nil {
		return "", err
	}
	d.files[id] = name
	return name, nil
}

// DeletePersistentCacheTask implements the API of the scheduler: on every host.
func (c *Cluster) DeletePersistentCacheTask(
	ctx context.Context, req *schedulerv2.DeletePersistentCacheTaskRequest,
) (*emptypb.Empty, error) {
	if err := req.ValidateAll(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if hung := c.hung; hung != nil {
		c.waiting++
		c.mu.Unlock()
		select {
		case <-hung:
		case <-ctx.Done():
		}
		c.mu.Lock()
		c.waiting--
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if c.away {
		return nil, status.Error(codes.Unavailable, "it shuts down")
	}
	c.deletes++
	if c.tasks[req.GetTaskId()] == nil {
		return nil, status.Error(codes.NotFound, "there is no such task")
	}
	delete(c.tasks, req.GetTaskId())
	for _, d := range c.daemons {
		d.mu.Lock()
		if name, found := d.files[req.GetTaskId()]; found {
			delete(d.files, req.GetTaskId())
			os.Remove(name)
		}
		d.mu.Unlock()
	}
	return &emptypb.Empty{}, nil
}
