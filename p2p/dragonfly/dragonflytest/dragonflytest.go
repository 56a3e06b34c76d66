// Package dragonflytest has a stand-in for the dfdaemon of an upstream Dragonfly, for
// tests of what is built on one. It speaks the real API on a unix socket, and does as
// the real one does where that hurts: it takes cid and tag together, without a
// separator, for what a task is called; keeps the first content of a task; verifies
// nothing; exports a hard link to its own cache file; deletes on its own host only; and
// lets callers wait where it has no scheduler.
//
// It promises no compatibility.
package dragonflytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Cluster is daemons that have one scheduler: what one has, the others can get.
type Cluster struct {
	mu      sync.Mutex
	daemons []*Daemon
}

// Daemon is one dfdaemon. It is safe for concurrent use.
type Daemon struct {
	dfdaemonv1.UnimplementedDaemonServer
	*Process
	cluster *Cluster

	mu          sync.Mutex
	tasks       map[string]string // the cache files of the tasks that it has
	made        int
	noScheduler bool
	lies        bool
	contained   bool
	advance     bool
	copies      map[string]int // more of a task
	timeout     time.Duration
}

// Start starts a daemon of the cluster, which ends with the test.
func (c *Cluster) Start(t testing.TB) *Daemon {
	t.Helper()
	d := &Daemon{cluster: c, tasks: map[string]string{}, copies: map[string]int{}}
	d.Process = NewProcess(t, func(server *grpc.Server) { dfdaemonv1.RegisterDaemonServer(server, d) })
	d.seen = func(req any) {
		if export, ok := req.(*dfdaemonv1.ExportTaskRequest); ok {
			d.set(func() { d.timeout = time.Duration(export.GetTimeout()) })
		}
	}
	c.mu.Lock()
	c.daemons = append(c.daemons, d)
	c.mu.Unlock()
	d.Run()
	t.Cleanup(d.Kill)
	return d
}

// LoseScheduler has every call that needs more than this daemon wait until its context ends.
func (d *Daemon) LoseScheduler() { d.set(func() { d.noScheduler = true }) }

// Lie has every export from now on give bytes that nobody has imported.
func (d *Daemon) Lie() { d.set(func() { d.lies = true }) }

// Contain has the daemon see other directories than its callers: what it exports is
// nowhere to be found.
func (d *Daemon) Contain() { d.set(func() { d.contained = true }) }

// Advance has the daemon keep what it fetches beside the output that it was fetched for.
func (d *Daemon) Advance() { d.set(func() { d.advance = true }) }

// Copy has the daemon have a task several times over.
func (d *Daemon) Copy(key string, n int) { d.set(func() { d.copies[key] = n }) }

func (d *Daemon) set(do func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	do()
}

// Timeout returns the timeout in the last request for an export.
func (d *Daemon) Timeout() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.timeout
}

// Tasks returns what the tasks that the daemon has are called: URL and tag in a row.
func (d *Daemon) Tasks() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var keys []string
	for key := range d.tasks {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// Forget has the daemon lose all that it has.
func (d *Daemon) Forget() { d.set(func() { clear(d.tasks) }) }

// dfError is an error as Dragonfly has them.
func dfError(code commonv1.Code, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	st, err := status.New(codes.Unknown, fmt.Sprintf("[%d]%s", code, message)).WithDetails(
		&commonv1.GrpcDfError{Code: code, Message: message})
	if err != nil {
		return err
	}
	return st.Err()
}

// keyOf is what a task is called: both texts in a row.
func keyOf(req interface {
	GetUrl() string
	GetUrlMeta() *commonv1.UrlMeta
}) string {
	return req.GetUrl() + req.GetUrlMeta().GetTag()
}

// file returns the cache file of a task that this daemon has.
func (d *Daemon) file(key string) (name string, found bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name, found = d.tasks[key]
	return name, found
}

// elsewhere returns the cache file of a task that another daemon has, when the
// scheduler has answered.
func (d *Daemon) elsewhere(ctx context.Context, key string) (string, error) {
	d.mu.Lock()
	noScheduler := d.noScheduler
	d.mu.Unlock()
	if noScheduler {
		<-ctx.Done()
		return "", ctx.Err()
	}
	d.cluster.mu.Lock()
	daemons := slices.Clone(d.cluster.daemons)
	d.cluster.mu.Unlock()
	for _, other := range daemons {
		if name, found := other.file(key); found {
			return name, nil
		}
	}
	return "", dfError(commonv1.Code_PeerTaskNotFound, "task %s not found", key)
}

// keep copies a file to the cache, and returns its name there.
func (d *Daemon) keep(key, from string) (string, error) {
	in, err := os.Open(from)
	if err != nil {
		return "", dfError(commonv1.Code_BadRequest, "open %s: %v", from, err)
	}
	defer in.Close()
	d.mu.Lock()
	d.made++
	name := d.CacheFile(fmt.Sprint(d.made))
	d.mu.Unlock()
	out, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tasks[key] = name
	return name, nil
}

// CheckHealth implements the API.
func (d *Daemon) CheckHealth(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// StatTask implements the API.
func (d *Daemon) StatTask(ctx context.Context, req *dfdaemonv1.StatTaskRequest) (*emptypb.Empty, error) {
	key := keyOf(req)
	if _, found := d.file(key); found {
		return &emptypb.Empty{}, nil
	}
	if req.GetLocalOnly() {
		return nil, dfError(commonv1.Code_PeerTaskNotFound, "task %s not found in local cache", key)
	}
	_, err := d.elsewhere(ctx, key)
	return &emptypb.Empty{}, err
}

// ImportTask implements the API.
func (d *Daemon) ImportTask(_ context.Context, req *dfdaemonv1.ImportTaskRequest) (*emptypb.Empty, error) {
	key := keyOf(req)
	if _, found := d.file(key); found {
		return &emptypb.Empty{}, nil
	}
	if !filepath.IsAbs(req.GetPath()) {
		return nil, dfError(commonv1.Code_BadRequest, "path %s is not absolute", req.GetPath())
	}
	_, err := d.keep(key, req.GetPath())
	return &emptypb.Empty{}, err
}

// ExportTask implements the API.
func (d *Daemon) ExportTask(ctx context.Context, req *dfdaemonv1.ExportTaskRequest) (*emptypb.Empty, error) {
	if timeout := time.Duration(req.GetTimeout()); timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	key := keyOf(req)
	if _, err := os.Lstat(req.GetOutput()); err == nil {
		return nil, dfError(commonv1.Code_BadRequest, "output %s exists", req.GetOutput())
	}
	name, found := d.file(key)
	if !found {
		if req.GetLocalOnly() {
			return nil, dfError(commonv1.Code_PeerTaskNotFound, "task %s not found in local cache", key)
		}
		from, err := d.elsewhere(ctx, key)
		if err == nil {
			name, err = d.keep(key, from)
		}
		d.mu.Lock()
		advance := d.advance
		d.mu.Unlock()
		if err == nil && advance {
			beside := filepath.Join(filepath.Dir(req.GetOutput()), ".content.dfget.cache")
			err = os.Rename(name, beside)
			name = beside
			d.set(func() { d.tasks[key] = beside })
		}
		if err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	lies, contained := d.lies, d.contained
	d.mu.Unlock()
	if contained {
		return &emptypb.Empty{}, nil
	}
	if lies {
		if err := os.WriteFile(name, []byte("not what was imported"), 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.Link(name, req.GetOutput()); err != nil {
		return nil, dfError(commonv1.Code_BadRequest, "%v", err)
	}
	return &emptypb.Empty{}, nil
}

// DeleteTask implements the API.
func (d *Daemon) DeleteTask(_ context.Context, req *dfdaemonv1.DeleteTaskRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := keyOf(req)
	if d.copies[key] > 0 {
		d.copies[key]--
	} else if name, found := d.tasks[key]; found {
		delete(d.tasks, key)
		if err := os.Remove(name); err != nil {
			return nil, err
		}
	}
	return &emptypb.Empty{}, nil
}
