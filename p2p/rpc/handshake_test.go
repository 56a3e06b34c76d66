package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serveLogged is serve with a log to look at.
func serveLogged(t *testing.T, engine p2p.Engine) (socket string, log *lockedBuffer) {
	t.Helper()
	socket, log = filepath.Join(t.TempDir(), "run", "d.sock"), &lockedBuffer{}
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(engine, logTo(log))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Shutdown(ctx)
		<-served
	})
	return socket, log
}

func rawDial(t *testing.T, socket string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHostileHandshakes(t *testing.T) {
	http2 := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	for name, test := range map[string]struct {
		send string
		fds  int    // sent with it
		half bool   // whether the client goes on to listen
		log  string // in the server's log
	}{
		"says nothing":         {send: "", log: "EOF"},
		"stops in the preface": {send: "dfcache", log: "unexpected EOF"},
		"plain gRPC":           {send: http2, half: true, log: "does not speak the dfcache protocol"},
		"garbage": {send: "\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff", half: true,
			log: "does not speak"},
		"newer":                 {send: "dfcache/2\n", half: true, log: `speaks protocol \"dfcache/2\"`},
		"much newer":            {send: "dfcache/4711\nand so on", half: true, log: `speaks protocol \"dfcache/4711\"`},
		"endless version":       {send: "dfcache/" + strings.Repeat("1", 100), half: true, log: "speaks protocol"},
		"descriptors":           {send: "dfcache/1\n", fds: 10},
		"no HTTP/2 follows":     {send: "dfcache/1\nGET / HTTP/1.1\r\n\r\n" + strings.Repeat("x", 100), half: true},
		"closes after it":       {send: "dfcache/1\n"},
		"HTTP/2 without frames": {send: "dfcache/1\n" + http2},
	} {
		t.Run(name, func(t *testing.T) {
			socket, log := serveLogged(t, newStore(t.TempDir()))
			file := tempFile(t, nil)
			before := fdCount(t)
			c := rawDial(t, socket)
			var oob []byte
			if test.fds > 0 {
				var fds []int
				for range test.fds {
					fds = append(fds, int(file.Fd()))
				}
				oob = unix.UnixRights(fds...)
			}
			if test.send != "" || test.fds > 0 {
				if _, _, err := c.WriteMsgUnix([]byte(test.send), oob, nil); err != nil {
					t.Fatal(err)
				}
			}
			if test.half {
				io.Copy(io.Discard, c) // until the server closes it
			}
			c.Close()
			if test.log != "" {
				eventually(t, "the log has "+test.log, func() bool { return strings.Contains(log.String(), test.log) })
			}
			eventually(t, "all descriptors are closed", func() bool { return fdCount(t) <= before })
			// The server goes on.
			dial(t, socket)
		})
	}
}

// fakeDaemon answers one connection as answer does, on a listener of its own.
func fakeDaemon(t *testing.T, answer func(*net.UnixConn)) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "d.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			answer(c)
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return socket
}

func TestHostileDaemons(t *testing.T) {
	sendWith := func(text string, fds ...int) func(*net.UnixConn) {
		return func(c *net.UnixConn) {
			io.ReadFull(c, make([]byte, len(preface)))
			var oob []byte
			if len(fds) > 0 {
				oob = unix.UnixRights(fds...)
			}
			c.WriteMsgUnix([]byte(text), oob, nil)
		}
	}
	file := int(tempFile(t, nil).Fd())
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stream[0])
	defer unix.Close(stream[1])
	for name, test := range map[string]struct {
		answer func(*net.UnixConn)
		is     error
		text   string
	}{
		"closes": {func(*net.UnixConn) {}, p2p.ErrUnavailable, "closed the connection in the handshake"},
		"newer": {sendWith("dfcache/2\n"), nil,
			`this daemon speaks protocol "dfcache/2", this client "dfcache/1": install the same version on both`},
		"not ours":        {sendWith("HTTP/1.1 400 Bad Request\r\n"), errNotOurs, "does not speak"},
		"no descriptor":   {sendWith("dfcache/1\n"), errNotOurs, "0 descriptors"},
		"two descriptors": {sendWith("dfcache/1\n", file, file), errNotOurs, "2 descriptors"},
		"many descriptors": {sendWith("dfcache/1\n", file, file, file, file, file), p2p.ErrUnavailable,
			"more descriptors than expected"},
		"not a socket":    {sendWith("dfcache/1\n", file), p2p.ErrUnavailable, "descriptor channel"},
		"a stream socket": {sendWith("dfcache/1\n", stream[0]), p2p.ErrUnavailable, "SOCK_SEQPACKET"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := fakeDaemon(t, test.answer)
			before := fdCount(t)
			_, err := Dial(t.Context(), socket)
			if err == nil || !strings.Contains(err.Error(), test.text) || !strings.Contains(err.Error(), socket) {
				t.Errorf("got %v, want %q in it", err, test.text)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v is not %v", err, test.is)
			}
			if test.is == errNotOurs && (!errors.Is(err, p2p.ErrUnavailable) ||
				!strings.Contains(err.Error(), passAnother)) {
				t.Errorf("%v is not %v, or has no advice", err, p2p.ErrUnavailable)
			}
			eventually(t, "all descriptors are closed", func() bool { return fdCount(t) <= before })
		})
	}
}

func TestDialStopsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	socket := fakeDaemon(t, func(c *net.UnixConn) {
		io.ReadFull(c, make([]byte, len(preface)))
		cancel()
		io.Copy(io.Discard, c) // says nothing until the client goes
	})
	if _, err := Dial(ctx, socket); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// A program that speaks gRPC but not our handshake.
func TestPlainGRPCClient(t *testing.T) {
	socket := serve(t, newStore(t.TempDir()))
	cc, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	_, err = pb.NewDaemonClient(cc).Stat(t.Context(), &pb.StatRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

// needRoot ends a test that needs root: it is skipped with -short, and fails without root.
func needRoot(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs root")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: run the tests as .ci/run does, or with -short")
	}
}

// asUser runs f in a thread that has another user's rights.
func asUser(t *testing.T, uid int, f func()) {
	t.Helper()
	needRoot(t)
	done := make(chan syscall.Errno)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		// Not by way of package syscall, which would change all threads.
		_, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
		if errno == 0 {
			_, _, errno = syscall.RawSyscall(syscall.SYS_SETRESGID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		}
		if errno == 0 {
			_, _, errno = syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		}
		if errno == 0 {
			f()
		}
		done <- errno
	}()
	if errno := <-done; errno != 0 {
		t.Fatal(errno)
	}
}

// everyonesDir is a directory that every user can use.
func everyonesDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rpc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestForeignDaemonIsRefused(t *testing.T) {
	const nobody = 65534
	socket := filepath.Join(everyonesDir(t), "d.sock")
	var l net.Listener
	asUser(t, nobody, func() {
		var err error
		if l, err = net.Listen("unix", socket); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		return
	}
	s := NewServer(newStore(t.TempDir()), logTo(testLog{t}))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() { s.Shutdown(t.Context()); <-served }()

	_, err := Dial(t.Context(), socket)
	if !errors.Is(err, fs.ErrPermission) || !errors.Is(err, p2p.ErrUnavailable) || errors.Is(err, ErrNoDaemon) ||
		!strings.Contains(err.Error(), "uid 65534") || !strings.Contains(err.Error(), passAnother) {
		t.Errorf("got %v", err)
	}
	c, err := Dial(t.Context(), socket, WithServerUID(nobody))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := Dial(t.Context(), socket, WithServerUID(1)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("another uid allowed: %v", err)
	}
}

func TestServerUIDs(t *testing.T) {
	c := &Client{}
	serverUID(7).dial(&c.config)
	for uid, want := range map[uint32]bool{0: true, uint32(os.Geteuid()): true, 7: true, 1<<31 + 5: false} {
		if c.allows(uid) != want {
			t.Errorf("uid %d: %t", uid, !want)
		}
	}
}

func TestSocketIsClosedToOthers(t *testing.T) {
	const nobody = 65534
	dir := everyonesDir(t)
	socket := filepath.Join(dir, "run", "d.sock")
	serveAt(t, newStore(t.TempDir()), socket)
	asUser(t, nobody, func() {
		_, err := net.Dial("unix", socket)
		if err == nil {
			t.Error("another user can connect")
			return
		}
		err = (&Client{socket: socket}).dialError(err)
		if !errors.Is(err, p2p.ErrUnavailable) || !errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrNoDaemon) ||
			!strings.Contains(err.Error(), "join the group") {
			t.Errorf("got %v", err)
		}
	})
}

// The caller that the server logs is the one that the kernel names.
func TestCallerIsKnown(t *testing.T) {
	socket, log := serveLogged(t, newStore(t.TempDir()))
	c := dial(t, socket)
	task := add(t, c, "", strings.NewReader("x"))
	if _, err := c.Delete(t.Context(), "", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stat(t.Context(), c, task); !errors.Is(err, p2p.ErrNotFound) {
		t.Fatal(err)
	}
	who := fmt.Sprintf("uid=%d pid=%d", os.Getuid(), os.Getpid())
	for _, want := range []string{
		"level=DEBUG msg=call method=Stat " + who,
		"level=DEBUG msg=call method=Ingest " + who,
		"code=NotFound",
		"level=INFO msg=committed uid=",
		"level=INFO msg=deleted",
	} {
		eventually(t, "the log has "+want, func() bool { return strings.Contains(log.String(), want) })
	}
	if strings.Contains(log.String(), "level=WARN") {
		t.Errorf("warnings in %s", log)
	}
	req := &pb.StatRequest{Tag: "Bad"}
	if _, err := c.current.daemon.Stat(t.Context(), req); status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	eventually(t, "a warning", func() bool { return strings.Contains(log.String(), "level=WARN msg=call method=Stat") })
}

// rawIngest begins an ingest below the client, to send what that would not.
func rawIngest(t *testing.T, c *Client) grpc.BidiStreamingClient[pb.IngestRequest, pb.IngestReply] {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // no answer is a failure, too
	t.Cleanup(cancel)
	stream, err := c.current.daemon.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func addRequest(id uint64, offset int64) *pb.IngestRequest {
	return &pb.IngestRequest{Request: &pb.IngestRequest_Add_{
		Add: &pb.IngestRequest_Add{DescriptorId: id, Offset: offset}}}
}

func TestHostileDescriptors(t *testing.T) {
	open := func(path string, flags int) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			f, err := os.OpenFile(path, flags, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return f
		}
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := func(end int) func(*testing.T) *os.File {
		return func(t *testing.T) *os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { r.Close(); w.Close() })
			return []*os.File{r, w}[end]
		}
	}
	for name, test := range map[string]struct {
		open   func(*testing.T) *os.File
		offset int64
		text   string
	}{
		"directory":     {open(t.TempDir(), os.O_RDONLY), 0, "it is a directory"},
		"device":        {open(os.DevNull, os.O_RDONLY), 0, "it is a device"},
		"file in /proc": {open("/proc/self/status", os.O_RDONLY), 0, "through a pipe"},
		"file in /sys": {open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY), 0,
			"through a pipe"},
		"write-only":            {open(path, os.O_WRONLY), 0, "not open for reading"},
		"O_PATH":                {open(path, unix.O_PATH), 0, "not open for reading"},
		"writing end":           {pipe(1), 0, "not open for reading"},
		"pipe with an offset":   {pipe(0), 5, "a pipe has no offset"},
		"file before its start": {open(path, os.O_RDONLY), -1, "offset -1"},
		"socket": {func(t *testing.T) *os.File {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(pair[1])
			f := os.NewFile(uintptr(pair[0]), "socket")
			t.Cleanup(func() { f.Close() })
			return f
		}, 0, "it is a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t.TempDir())
			c := pair(t, s)
			f := test.open(t)
			before := fdCount(t)
			stream := rawIngest(t, c)
			if err := c.current.conn.channel.send(t.Context(), 99, f); err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(addRequest(99, test.offset)); err != nil {
				t.Fatal(err)
			}
			_, err := stream.Recv()
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, want %q in it", err, test.text)
			}
			c.current.conn.channel.withdraw(99) // as the client does
			eventually(t, "all descriptors are closed", func() bool { return fdCount(t) <= before })
			s.waitIdle(t)
		})
	}
}

func TestBadIngestStreams(t *testing.T) {
	commit := func(more bool) *pb.IngestRequest {
		return &pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: &pb.IngestRequest_Commit{More: more}}}
	}
	s := newStore(t.TempDir())
	c := pair(t, s)
	for name, requests := range map[string][]*pb.IngestRequest{
		"empty request":         {{}},
		"add within a commit":   {commit(true), addRequest(1, 0)},
		"empty within a commit": {commit(true), {}},
		"rehash of nothing":     {{Request: &pb.IngestRequest_Rehash_{}}},
	} {
		stream := rawIngest(t, c)
		for _, r := range requests {
			stream.Send(r)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A commit that never ends is dropped.
	stream := rawIngest(t, c)
	stream.Send(commit(true))
	stream.CloseSend()
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("unfinished commit: %v", err)
	}
	s.waitIdle(t)
}

// What breaks the rules of the descriptor channel ends the connection, and
// leaves nothing open.
func TestHostileChannels(t *testing.T) {
	message := func(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }
	file := int(tempFile(t, nil).Fd())
	for name, misbehave := range map[string]func(*net.UnixConn) error{
		"closes it":     func(c *net.UnixConn) error { return c.Close() },
		"stops writing": func(c *net.UnixConn) error { return c.CloseWrite() },
		"short message": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte("x"), unix.UnixRights(file), nil)
			return err
		},
		"long message": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix(make([]byte, 4096), unix.UnixRights(file), nil)
			return err
		},
		"two descriptors": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix(message(1), unix.UnixRights(file, file), nil)
			return err
		},
		"ten descriptors": func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix(
				message(1), unix.UnixRights(file, file, file, file, file, file, file, file, file, file), nil)
			return err
		},
		"one id twice": func(c *net.UnixConn) error {
			c.WriteMsgUnix(message(1), unix.UnixRights(file), nil)
			_, _, err := c.WriteMsgUnix(message(1), unix.UnixRights(file), nil)
			return err
		},
		"too many": func(c *net.UnixConn) error {
			for id := range uint64(maxUnclaimed + 1) {
				c.WriteMsgUnix(message(id), unix.UnixRights(file), nil)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t.TempDir())
			c := pair(t, s)
			before := fdCount(t)
			stream := rawIngest(t, c)
			if err := misbehave(c.current.conn.channel.conn); err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
				t.Fatalf("got %v", err)
			}
			s.waitIdle(t)
			// those of the connection too
			eventually(t, "all descriptors are closed", func() bool { return fdCount(t) < before })
			// The client notices, and connects again.
			add(t, c, "", strings.NewReader("x"))
		})
	}
}

func TestWithdraw(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	channel := c.current.conn.channel
	file := tempFile(t, nil)
	before := fdCount(t)
	for id := range uint64(10 * maxUnclaimed) { // many more than can be left there
		if err := channel.send(t.Context(), 1000+id, file); err != nil {
			t.Fatal(err)
		}
		channel.withdraw(1000 + id)
	}
	eventually(t, "all descriptors are closed", func() bool { return fdCount(t) <= before })

	// An add that waits for a descriptor that is withdrawn.
	stream := rawIngest(t, c)
	if err := stream.Send(addRequest(7, 0)); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := stream.Recv()
		got <- err
	}()
	eventually(t, "the add fails", func() bool {
		channel.withdraw(7)
		select {
		case err := <-got:
			if !strings.Contains(err.Error(), "withdrawn") {
				t.Errorf("got %v", err)
			}
			return true
		default:
			return false
		}
	})
}

// newChannels returns the two ends of a descriptor channel.
func newChannels(t *testing.T) (server, client *channel) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	channels := make([]*channel, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		channels[i] = newChannel(c.(*net.UnixConn),
			[]func() (func(), bool){func() (func(), bool) { return func() {}, true }, nil}[i], func() {})
		t.Cleanup(channels[i].close)
	}
	return channels[0], channels[1]
}

func TestChannel(t *testing.T) {
	server, client := newChannels(t)
	file := tempFile(t, []byte("content"))
	before := fdCount(t)

	// In any order, to whoever waits.
	for _, id := range []uint64{3, 1, 2} {
		if err := client.send(t.Context(), id, file); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	for _, id := range []uint64{1, 2, 3} {
		all.Go(func() {
			fd, err := server.take(t.Context(), id)
			if err != nil {
				t.Error(err)
				return
			}
			unix.Close(fd)
		})
	}
	all.Wait()

	// A client drops what it did not ask for, or asked for no longer.
	if err := client.expect(4); err != nil {
		t.Fatal(err)
	}
	client.forget(4)
	for _, id := range []uint64{4, 5} {
		if err := server.send(t.Context(), id, file); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "they are closed", func() bool { return fdCount(t) <= before })

	// Contexts.
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if _, err := server.take(ctx, 6); !errors.Is(err, why) {
		t.Errorf("take: %v", err)
	}
	server.sending <- struct{}{}
	if err := server.send(ctx, 6, file); !errors.Is(err, why) {
		t.Errorf("send: %v", err)
	}
	<-server.sending
	if len(server.slots) != 0 || len(client.slots) != 0 {
		t.Errorf("slots left: %v, %v", server.slots, client.slots)
	}

	// The end of one side is that of the other.
	client.close()
	if _, err := server.take(t.Context(), 7); !errors.Is(err, errChannelClosed) {
		t.Errorf("take: %v", err)
	}
	<-server.ended
	if err := server.expect(8); !errors.Is(err, errChannelClosed) {
		t.Errorf("expect: %v", err)
	}
}

// A send to a side that reads nothing ends with its context.
func TestSendStops(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	f := os.NewFile(uintptr(fds[0]), "")
	socket, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	c := newChannel(socket.(*net.UnixConn), nil, func() {})
	defer c.close()
	file := tempFile(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sent := make(chan struct{}, 1<<20)
	done := make(chan error, 1)
	go func() {
		for id := uint64(0); ; id++ {
			if err := c.send(ctx, id, file); err != nil {
				done <- err
				return
			}
			sent <- struct{}{}
		}
	}()
	// Full, or about to be: whichever the cancel meets, the send ends.
	for range 10 {
		<-sent
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
