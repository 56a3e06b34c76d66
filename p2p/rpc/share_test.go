package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// serveEveryone serves a store to every user of this host, of whom all together may have so much.
func serveEveryone(t *testing.T, conns, calls int) (socket string, s *Server) {
	t.Helper()
	socket = filepath.Join(everyonesDir(t), "run", "d.sock")
	s = NewServer(newStore(t.TempDir()), logTo(testLog{t}))
	s.shares.conns, s.shares.calls = connpool.New(conns), connpool.New(calls)
	run(t, s, socket)
	if err := errors.Join(os.Chmod(filepath.Dir(socket), 0o755), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	return socket, s
}

// dialAs connects as a user, and makes the handshake.
func dialAs(t *testing.T, uid int, socket string) (c *conn, err error) {
	t.Helper()
	connect := func() {
		var raw net.Conn
		if raw, err = net.Dial("unix", socket); err == nil {
			c = &conn{UnixConn: raw.(*net.UnixConn)}
		}
	}
	if uid == os.Geteuid() {
		connect()
	} else {
		asUser(t, uid, connect)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.clientHandshake(t.Context(), func(uint32) bool { return true })
}

// requireClosed checks that the daemon hangs up.
func requireClosed(t *testing.T, c *conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is not closed")
	}
}

// rawClient speaks HTTP/2 on a connection, without gRPC's rules.
func rawClient(t *testing.T, c *conn) *http.ClientConn {
	t.Helper()
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil },
		Protocols:   new(http.Protocols),
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	client, err := transport.NewClientConn(t.Context(), "http", "dfdaemon:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// rawCall begins an ingest, sends it body, and leaves it at that until the test ends. ended is closed when
// the daemon has ended it.
func rawCall(t *testing.T, client *http.ClientConn, body io.Reader) (ended <-chan struct{}) {
	t.Helper()
	nothing, stop := io.Pipe()
	sent := struct {
		io.Reader
		io.Closer
	}{io.MultiReader(body, nothing), nothing}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://dfdaemon/dfcache.v1.Daemon/Ingest", sent)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if answer, err := client.RoundTrip(r); err == nil {
			io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
		}
	}()
	t.Cleanup(func() {
		cancel() // it may wait to send more
		stop.Close()
		<-done
	})
	return done
}

// TestShareOfConnections: a user who has all connections there may be gets no more, and makes room for
// another one, who has no more of them then.
func TestShareOfConnections(t *testing.T) {
	needRoot(t)
	const many = 65534
	socket, _ := serveEveryone(t, 4, maxCalls)
	var open []*conn
	for range 4 {
		c, err := dialAs(t, many, socket)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if _, err := dialAs(t, many, socket); !errors.Is(err, p2p.ErrBusy) {
		t.Errorf("one more: %v", err)
	}
	for _, c := range open[:2] {
		add(t, dial(t, socket), "", strings.NewReader("x"))
		requireClosed(t, c)
	}
	if _, err := Dial(t.Context(), socket); !errors.Is(err, p2p.ErrBusy) {
		t.Errorf("a user with as many gets another's: %v", err)
	}
	open[2].Close()
	eventually(t, "what is closed makes room", func() bool {
		_, err := dialAs(t, many, socket)
		return err == nil
	})
}

// TestShareOfCalls is the same for calls.
func TestShareOfCalls(t *testing.T) {
	needRoot(t)
	const many = 65534
	socket, s := serveEveryone(t, maxConns, 4)
	other, err := dialAs(t, many, socket)
	if err != nil {
		t.Fatal(err)
	}
	client := rawClient(t, other)
	for range 4 {
		rawCall(t, client, strings.NewReader(""))
	}
	eventually(t, "its calls have begun", func() bool { return s.shares.calls.Len() == 4 })
	own := dial(t, socket)
	eventually(t, "another user's calls go through", func() bool {
		_, err := stat(t.Context(), own, someTask)
		return errors.Is(err, p2p.ErrNotFound)
	})
	for range 4 {
		if in, err := own.Ingest(t.Context()); err != nil {
			t.Error(err)
		} else {
			defer in.Close()
		}
	}
	eventually(t, "there are no more", func() bool {
		_, err := stat(t.Context(), own, someTask)
		return errors.Is(err, p2p.ErrBusy)
	})
	requireClosed(t, other)
	own.Close()
	eventually(t, "none is counted", func() bool { return s.shares.calls.Len() == 0 })
}

// TestTakenDescriptors: a descriptor that a call has taken is not counted any more.
func TestTakenDescriptors(t *testing.T) {
	socket, s := serveEveryone(t, maxConns, maxCalls)
	s.shares.kept = connpool.New(2)
	c := dial(t, socket)
	for range 20 {
		add(t, c, "", tempFile(t, []byte("x")))
	}
	if n := s.shares.kept.Len(); n != 0 {
		t.Errorf("%d descriptors are counted", n)
	}
}

// TestUnfinishedMessages: what is kept of messages of which the end does not come is bounded, and whoever begins more
// is hung up on; others go on.
func TestUnfinishedMessages(t *testing.T) {
	socket, s := serveEveryone(t, maxConns, maxCalls)
	other, err := dialAs(t, os.Geteuid(), socket)
	if err != nil {
		t.Fatal(err)
	}
	client := rawClient(t, other)
	part := binary.BigEndian.AppendUint32([]byte{0}, maxRequest)
	part = append(part, make([]byte, 1000)...)
	free := func() int {
		s.shares.mu.Lock()
		defer s.shares.mu.Unlock()
		return s.shares.free
	}
	const may = maxUnfinished / maxRequest / 2
	for range may {
		rawCall(t, client, bytes.NewReader(part))
	}
	eventually(t, "as many are there as may be", func() bool { return free() == maxUnfinished/2 })
	select {
	case <-rawCall(t, client, bytes.NewReader(part)):
	case <-time.After(30 * time.Second):
		t.Fatal("one more is let in")
	}
	eventually(t, "all is given back", func() bool { return free() == maxUnfinished })
	add(t, dial(t, socket), "", strings.NewReader("x"))
}

// empties are empty messages without end. It counts how many bytes of them are sent.
type empties struct{ sent atomic.Int64 }

func (e *empties) Read(p []byte) (int, error) {
	clear(p)
	e.sent.Add(int64(len(p)))
	return len(p), nil
}

// TestUnreadMessages: what a client sends that its call does not read stays with the client.
func TestUnreadMessages(t *testing.T) {
	socket, _ := serveEveryone(t, maxConns, maxCalls)
	c, err := dialAs(t, os.Geteuid(), socket)
	if err != nil {
		t.Fatal(err)
	}
	add, err := proto.Marshal(addRequest(1, 0)) // which waits for the descriptor
	if err != nil {
		t.Fatal(err)
	}
	var rest empties
	rawCall(t, rawClient(t, c), io.MultiReader(
		bytes.NewReader(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(add)))), bytes.NewReader(add), &rest))
	eventually(t, "the window is full", func() bool { return rest.sent.Load() >= callWindow/2 })
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if n := rest.sent.Load(); n > 2*callWindow {
			t.Fatalf("%d bytes are taken in, want %d at most", n, callWindow)
		}
	}
}

// frame is one of HTTP/2.
func frame(kind, flags byte, stream uint32, payload string) string {
	b := []byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return string(binary.BigEndian.AppendUint32(b, stream)) + payload
}

// TestInflow: messages are counted from the header to the end, however their bytes are cut.
func TestInflow(t *testing.T) {
	const headers = 1
	preface := strings.Repeat("p", clientPreface)
	begun := "\x00\x00\x00\x00\x0aabc" // 3 bytes of 10
	for name, test := range map[string]struct {
		sent string
		want int // bytes that are counted in the end
		err  error
	}{
		"nothing":         {"", 0, nil},
		"headers":         {frame(headers, 0, 1, begun), 0, nil},
		"begun":           {frame(frameData, 0, 1, begun), 10, nil},
		"ended":           {frame(frameData, 0, 1, begun+"defghij"), 0, nil},
		"in two frames":   {frame(frameData, 0, 1, begun) + frame(frameData, 0, 1, "defghij"), 0, nil},
		"the next":        {frame(frameData, 0, 1, begun+"defghij\x00\x00\x00\x00\x07"), 7, nil},
		"empty, the next": {frame(frameData, 0, 1, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07"), 7, nil},
		"two calls": {frame(frameData, 0, 1, begun) + frame(frameData, 0, 3, begun) +
			frame(frameData, 0, 1, "defghij"), 10, nil},
		"reset":         {frame(frameData, 0, 1, begun) + frame(frameReset, 0, 1, "\x00\x00\x00\x08"), 0, nil},
		"call ended":    {frame(frameData, flagEnded, 1, begun), 0, nil},
		"ended later":   {frame(frameData, 0, 1, begun) + frame(frameData, flagEnded, 1, ""), 0, nil},
		"half a header": {frame(frameData, 0, 1, "\x00\x00"), 0, nil},
		"too long":      {frame(frameData, 0, 1, "\x00\x7f\x00\x00\x00"), 0, nil},
		"padded":        {frame(frameData, flagIsPadded, 1, "\x00"), 0, errPadded},
		"too much": {strings.Repeat(
			frame(frameData, 0, 1, begun+"defghij")+frame(frameData, 0, 5, "\x00\x00\x40\x00\x00")+
				frame(frameData, 0, 7, "\x00\x00\x40\x00\x00"), 1), 4 << 20, errUnfinished},
		"too many": {func() (all string) {
			for i := range uint32(2*maxStreams + 1) {
				all += frame(frameData, 0, 2*i+1, "\x00")
			}
			return all
		}(), 0, errUnfinished},
	} {
		for _, step := range []int{1, 2, 7, 1 << 20} {
			s := newShares()
			s.free = 10 << 20
			in := inflow{shares: s, uid: 1}
			var err error
			for rest := preface + test.sent; rest != "" && err == nil; {
				n := min(step, len(rest))
				err = in.saw([]byte(rest[:n]))
				rest = rest[n:]
			}
			if got := 10<<20 - s.free; got != test.want || !errors.Is(err, test.err) {
				t.Errorf("%s, %d bytes at a time: %d bytes are counted, want %d (%v)", name, step, got, test.want, err)
			}
			if in.end(); s.free != 10<<20 || len(s.unfinished) != 0 {
				t.Errorf("%s: %d bytes stay counted", name, 10<<20-s.free)
			}
		}
	}
}

// TestRoomIsAsked: the daemon says that there is no room for something before any of it is sent.
func TestRoomIsAsked(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
	in, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := in.Room(worthAsking); err != nil {
		t.Error(err)
	}
	if err := in.Room(1 << 62); !errors.Is(err, p2p.ErrNoSpace) {
		t.Errorf("room for 4 EiB: %v", err)
	}
	if _, err := in.Add(strings.NewReader("x"), p2p.AddOptions{}); err != nil {
		t.Errorf("what has room: %v", err)
	}
	if _, err := c.current.daemon.Room(t.Context(),
		&pb.RoomRequest{Bytes: -1}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("room for less than nothing: %v", err)
	}
}
