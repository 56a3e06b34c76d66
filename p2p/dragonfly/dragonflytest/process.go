package dragonflytest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/grpc"
)

// Process is what every stand-in for a dfdaemon is: a server at a unix socket, with a
// directory for its cache, that can be killed and started again. It is safe for concurrent use.
type Process struct {
	Socket string // where it listens

	t        testing.TB
	dir      string // of its cache
	register func(*grpc.Server)
	seen     func(request any) // told of every request with one message; nil: nobody is

	mu    sync.Mutex
	stop  func()
	hook  func(ctx context.Context, call string) error
	calls map[string]int
}

// NewProcess makes a process that serves what register registers. It does not run yet;
// its directory goes with the test.
func NewProcess(t testing.TB, register func(*grpc.Server)) *Process {
	t.Helper()
	// The test's own directory can have a name that is too long for a socket.
	dir, err := os.MkdirTemp("", "dragonfly")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &Process{Socket: filepath.Join(dir, "s"), t: t, dir: filepath.Join(dir, "cache"), register: register,
		calls: map[string]int{}}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

// Run has a process that does not run, or was killed, answer, with what it has in its cache.
func (p *Process) Run() {
	p.t.Helper()
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		p.t.Fatal(err)
	}
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo,
			handler grpc.UnaryHandler) (any, error) {
			if p.seen != nil {
				p.seen(req)
			}
			if err := p.called(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo,
			handler grpc.StreamHandler) error {
			if err := p.called(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handler(srv, stream)
		}))
	p.register(server)
	stop := Serve(server, l)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop = stop
}

// Serve runs a server at a listener until the function that it returns is called.
func Serve(server *grpc.Server, l net.Listener) (stop func()) {
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	return func() {
		server.Stop()
		<-served
	}
}

// Kill ends the process, with all calls that are under way.
func (p *Process) Kill() {
	p.mu.Lock()
	stop := p.stop
	p.mu.Unlock()
	stop()
}

func (p *Process) called(ctx context.Context, method string) error {
	call := filepath.Base(method)
	p.mu.Lock()
	p.calls[call]++
	p.mu.Unlock()
	return p.Hook(ctx, call)
}

// OnCall has hook called at the beginning of every call, with its name, such as
// "ExportTask". Its error is that of the call.
func (p *Process) OnCall(hook func(ctx context.Context, call string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = hook
}

// Hook calls what OnCall was given, if anything.
func (p *Process) Hook(ctx context.Context, call string) error {
	p.mu.Lock()
	hook := p.hook
	p.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, call)
}

// Calls returns how many calls of this name there were since it was last asked.
func (p *Process) Calls(call string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.calls[call]
	p.calls[call] = 0
	return n
}

// CacheFile returns the path of a file in the cache, for its stand-in to make.
func (p *Process) CacheFile(name string) string { return filepath.Join(p.dir, name) }

// Files returns the paths of the files in the cache.
func (p *Process) Files() []string {
	files, err := filepath.Glob(p.CacheFile("*"))
	if err != nil {
		p.t.Error(err)
	}
	return files
}
