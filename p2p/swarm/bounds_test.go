package swarm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// allocated returns how many bytes are allocated in all while f runs.
func allocated(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// TestAnswersOfManyElements: a peer answers with as many elements as fit into the bytes of
// an answer. They are refused before anything is made of them.
func TestAnswersOfManyElements(t *testing.T) {
	const asks = 20
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("x")}
	for _, body := range []string{
		`{"tasks":[` + strings.Repeat(`{},`, maxJSON/3-10) + `{}]}`,
		`{"tasks":[null],"names":[` + strings.Repeat(`{},`, maxJSON/3-10) + `{}]}`,
		`{"tasks":[{"hints":[` + strings.Repeat(`{},`, 200_000/3) + `{}]}]}`,
		`{"tasks":[{"hints":[{"addrs":[` + strings.Repeat(`"",`, 200_000/3) + `""]}]}]}`,
		`{"tasks":[` + strings.Repeat(`[`, maxJSON/2) + strings.Repeat(`]`, maxJSON/2-10) + `]}`,
		`{"tasks":[{"size":4398046511104}` + strings.Repeat(`,{"size":4398046511104}`, 500) + `]}`,
	} {
		h, answer := newHub(), []byte(body)
		h.start(t, func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				return instead(honest, pathFind, func(w http.ResponseWriter, _ *http.Request) { w.Write(answer) })
			}
		})
		asker := h.start(t)
		var all sync.WaitGroup
		n := allocated(func() {
			for range asks {
				all.Go(func() {
					_, err := asker.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
					if err == nil {
						t.Errorf("%.30s… is taken for an answer", body)
					}
				})
			}
			all.Wait()
		})
		// With the race detector pools give away what they have: then it is half as much again.
		if limit := asks * 8 * (maxPieces/6 + 80<<10); n > limit {
			t.Errorf("%d answers of %.30s… take %d bytes, want at most %d", asks, body, n, limit)
		}
	}
}

// TestRequestsOfManyElements is the same for what a peer asks, and tells.
func TestRequestsOfManyElements(t *testing.T) {
	h := newHub()
	server, other := h.start(t), h.start(t)
	send := func(path string, body []byte) error {
		_, err := other.client.do(t.Context(), other.client.streams, server.id, http.MethodPost, path, nil, body)
		return err
	}
	if err := send(pathFind, []byte(`{}`)); err != nil {
		t.Fatal(err)
	}
	for path, body := range map[string]string{
		pathFind:    `{"tasks":[` + strings.Repeat(`{},`, 150_000) + `{}]}`,
		pathDeletes: `{"deletes":[` + strings.Repeat(`{},`, 600_000) + `{}]}`,
	} {
		const asks = 10
		n := allocated(func() {
			for range asks {
				err := send(path, []byte(body))
				if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusBadRequest {
					t.Errorf("%s: %v; want it refused", path, err)
				}
			}
		})
		// What is read grows in a buffer, and the request is made of a copy.
		if limit := asks * 8 * len(body); n > limit {
			t.Errorf("%s: %d requests of %d bytes take %d, want at most %d", path, asks, len(body), n, limit)
		}
		long := bytes.Repeat([]byte(" "), maxJSON)
		if e, ok := errors.AsType[*statusError](send(path, long)); !ok || e.code != http.StatusBadRequest {
			t.Errorf("%s: a request of %d bytes is taken", path, len(long))
		}
	}
}

// TestInbox: of long messages only so many are taken in at once as there is room for;
// short ones do not wait for them.
func TestInbox(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // who waits for ever fails
	defer cancel()
	in := newInbox()
	var held []func()
	for range inboxRoom / maxJSON {
		_, done, err := in.read(ctx, bytes.NewReader(make([]byte, maxJSON)), maxJSON)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, done)
	}
	if b, _, err := in.read(ctx, bytes.NewReader(make([]byte, shortMessage)), maxJSON); err != nil || len(b) != shortMessage {
		t.Errorf("a short message: %d bytes, %v", len(b), err)
	}
	got := make(chan error, 1)
	go func() {
		b, done, err := in.read(ctx, bytes.NewReader(make([]byte, maxJSON)), maxJSON)
		if err == nil && len(b) != maxJSON {
			err = errors.New("not all of it")
		}
		done()
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("a long message is taken in without room (%v)", err)
	case <-time.After(50 * time.Millisecond):
	}
	held[0]()
	if err := <-got; err != nil {
		t.Error(err)
	}
	for _, done := range held {
		done()
	}
	if _, _, err := in.read(ctx, bytes.NewReader(make([]byte, maxJSON+1)), maxJSON); !errors.Is(err, errMessage) {
		t.Errorf("one byte too many: %v", err)
	}
	if !in.room.TryAcquire(inboxRoom) {
		t.Error("there is less room than at first")
	}
}

// openFiles returns how many files of a directory this process has open.
func openFiles(t *testing.T, dir string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if name, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(name, dir) {
			n++
		}
	}
	return n
}

// TestServedFilesAreClosed: a peer that takes many small files does not have this one keep all of
// them open.
func TestServedFilesAreClosed(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	a.uploads.open = 5
	for i := range uint64(30) {
		data := content(100, i)
		b.want(t, a.add(t, "t", data), data)
		if n := openFiles(t, filepath.Join(a.dir, "blobs")); n > 6 {
			t.Fatalf("%d files were served, and %d are open", i+1, n)
		}
	}
}

// closing is the source of an upload that tells when it is closed.
type closing struct {
	stored
	closed *bool
}

func (c closing) close() error {
	*c.closed = true
	return nil
}

// TestServedFilesMakeRoom: where no descriptor is free for a file that is asked for, those that nobody asks for now are closed.
func TestServedFilesMakeRoom(t *testing.T) {
	u := &uploads{slots: 1, open: 10, active: map[digest.Digest]*upload{}}
	var closed bool
	opened := func() *upload {
		return &upload{table: &digest.Table{Size: 1, PieceLength: 1}, src: closing{closed: &closed}}
	}
	_, done, err := u.use("a", func() (*upload, error) { return opened(), nil })
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*upload, error) {
		if !closed {
			return nil, p2p.ErrBusy
		}
		return opened(), nil
	}
	if _, _, err := u.use("b", open); !errors.Is(err, p2p.ErrBusy) || closed {
		t.Errorf("while it is asked for: %v, closed is %v", err, closed)
	}
	done()
	if _, done, err = u.use("b", open); err != nil {
		t.Fatal(err)
	}
	done()
}

// withoutDescriptors runs f while this process can open nothing.
func withoutDescriptors(t *testing.T, f func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	f()
}

// TestOutOfDescriptors: what can't be opened for want of descriptors is not called missing.
func TestOutOfDescriptors(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(100, 1)
	task := a.add(t, "t", data)
	ask := func(path string) error {
		resp, err := b.client.do(t.Context(), b.client.streams, a.id, http.MethodGet, path, taskQuery(task), nil)
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		return err
	}
	if err := ask(pathBlob); err != nil {
		t.Fatal(err)
	}
	withoutDescriptors(t, func() {
		if _, err := a.Open(t.Context(), task, p2p.Network); !errors.Is(err, p2p.ErrBusy) || errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("open: %v", err)
		}
		for _, path := range []string{pathBlob, pathLinks} {
			if err := ask(path); !errors.Is(err, p2p.ErrBusy) {
				t.Errorf("%s: %v", path, err)
			}
		}
	})
	b.want(t, task, data)
}

// TestBusySource: where who has a blob is too busy for as long as anybody waits, that is the reason.
func TestBusySource(t *testing.T) {
	h := newHub()
	a := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			busy := func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "busy", http.StatusServiceUnavailable) }
			return instead(instead(honest, pathLinks, busy), pathPieces, busy)
		}
	})
	b := h.start(t, func(o *Options) { o.LookupTimeout, o.StallTimeout = 200*time.Millisecond, 200*time.Millisecond })
	if err := b.wantEnd(t, t.Context(), a.add(t, "t", content(100, 1)), p2p.ErrBusy); errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("read: %v", err)
	}
}
