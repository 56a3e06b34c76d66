package swarm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/test"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
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
	if testing.Short() {
		t.Skip("-short: takes long")
	}
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
	if testing.Short() {
		t.Skip("-short: takes long")
	}
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

// TestMalformedAnswers: an answer that can't be one to what was asked is refused, whatever else it says.
func TestMalformedAnswers(t *testing.T) {
	h := newHub()
	var answer findReply
	liar := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return instead(honest, pathFind, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, &answer) })
		}
	})
	a := h.start(t)
	d, now := digest.SHA256.FromString("x"), time.Now()
	one := findRequest{Tasks: make([]taskRef, 1), Names: make([]nameRef, 1), Referrers: make([]taskRef, 1),
		Follow: true}
	tasks := func(all ...*taskState) findReply {
		return findReply{Tasks: all, Names: make([]*nameState, 1), Referrers: make([][]digest.Digest, 1)}
	}
	names := func(all ...*nameState) findReply {
		return findReply{Tasks: make([]*taskState, 1), Names: all, Referrers: make([][]digest.Digest, 1)}
	}
	referrers := func(all ...[]digest.Digest) findReply {
		return findReply{Tasks: make([]*taskState, 1), Names: make([]*nameState, 1), Referrers: all}
	}
	led := func(all ...followed) findReply {
		reply := tasks(nil)
		reply.Followed = all
		return reply
	}
	for what, reply := range map[string]findReply{
		"no task":                    tasks(),
		"two tasks":                  tasks(nil, nil),
		"no name":                    names(),
		"two names":                  names(nil, nil),
		"no referrers":               referrers(),
		"referrers of two":           referrers(nil, nil),
		"a size below zero":          tasks(&taskState{Size: -1}),
		"a size beyond all":          tasks(&taskState{Size: maxPieces*digest.MaxPieceLength + 1}),
		"a part of another size":     tasks(&taskState{Size: 5 * digest.MinPieceLength, Held: []byte{1, 2}}),
		"a name for no digest":       names(&nameState{Digest: "sha256:x", Updated: now}),
		"a delete of tomorrow":       names(&nameState{Deleted: now, DeletedAge: -1}),
		"a delete of long ago":       names(&nameState{Deleted: now, DeletedAge: maxAge + 1}),
		"a name that leads to none":  led(followed{taskRef: taskRef{"t", "x"}}),
		"one that leads to no blob":  led(followed{taskRef: taskRef{"t", d}, State: taskState{Size: -1}}),
		"one that leads to too much": led(slices.Repeat([]followed{{taskRef: taskRef{"t", d}}}, maxFollowed+1)...),
		"a referrer without digest":  referrers([]digest.Digest{d, "x"}),
		"more referrers than may be": referrers(slices.Repeat([]digest.Digest{d}, 2*maxReferrers)),
	} {
		answer = reply
		if got, err := a.client.find(t.Context(), liar.id, &one); !errors.Is(err, errMessage) {
			t.Errorf("%s: %+v, %v; want %v", what, got, err, errMessage)
		}
	}
	answer = tasks(&taskState{Size: 1, Hints: make([]hint, 2*maxHints)})
	if got, err := a.client.find(t.Context(), liar.id, &one); err != nil || len(got.Tasks[0].Hints) != maxHints {
		t.Errorf("an answer that names %d peers: %+v, %v; want %d of them", 2*maxHints, got, err, maxHints)
	}
}

// TestFollowIsBounded: of what a name leads to a peer is told so much, and of what a large manifest
// refers to nothing.
func TestFollowIsBounded(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	var files [][]byte
	for i := range 2 * maxFollowed {
		files = append(files, []byte{byte(i)})
	}
	a.push(t, "t", "some", "", files[:3]...)
	a.push(t, "t", "many", "", files...)
	for i := range maxFollowedSize / 64 {
		files = append(files, []byte(fmt.Sprint(i)))
	}
	a.push(t, "t", "large", "", files...)
	for names, want := range map[string]int{
		"some": 4, "many": maxFollowed, "large": 1, "none": 0, "some large many": maxFollowed} {
		req := findRequest{Follow: true}
		for _, name := range strings.Fields(names) {
			req.Names = append(req.Names, nameRef{"t", name})
		}
		reply, err := b.client.find(t.Context(), a.id, &req)
		if err != nil || len(reply.Followed) != want {
			t.Errorf("%s: told of %d tasks, %v; want %d", names, len(reply.Followed), err, want)
		}
	}
	// A peer that does not ask is not told, nor is one told of what could not be had.
	reply, err := b.client.find(t.Context(), a.id, &findRequest{Names: []nameRef{{"t", "some"}}})
	if err != nil || len(reply.Followed) > 0 {
		t.Errorf("not asked: told of %d tasks, %v", len(reply.Followed), err)
	}
	a.Close()
	a.opts.Mode = NeverServe
	a.restart(t, h)
	reply, err = b.client.find(t.Context(), a.id, &findRequest{Names: []nameRef{{"t", "some"}}, Follow: true})
	if err != nil || len(reply.Followed) > 0 {
		t.Errorf("by a peer that serves nothing: told of %d tasks, %v", len(reply.Followed), err)
	}
}

// TestRecentIsBounded: what is remembered of peers is bounded in tasks, peers, bytes and time.
func TestRecentIsBounded(t *testing.T) {
	r := newRecent()
	task := func(i int) p2p.Task { return p2p.Task{Tag: fmt.Sprint(i)} }
	for i := range 2 * maxSources {
		r.put(task(0), peer.ID(fmt.Sprint(i)), &taskState{})
		r.put(task(0), peer.ID(fmt.Sprint(i)), &taskState{})
	}
	if n := len(r.of(task(0))); n != maxSources {
		t.Errorf("%d peers are remembered, want %d", n, maxSources)
	}
	for i := range 2 * maxRecent {
		r.put(task(i), "p", &taskState{})
	}
	if n := len(r.tasks); n > maxRecent {
		t.Errorf("%d tasks are remembered, want at most %d", n, maxRecent)
	}
	large := &taskState{Held: make([]byte, maxRecentBytes/10),
		Hints: []hint{{Addrs: []string{strings.Repeat("x", maxRecentBytes/10)}}}}
	for i := range 20 {
		r.put(task(i), "p", large)
		if r.bytes > maxRecentBytes {
			t.Errorf("%d bytes are remembered, want at most %d", r.bytes, maxRecentBytes)
		}
	}
	r.put(task(0), "p", large)
	if n := len(r.of(task(0))); n != 1 {
		t.Errorf("%d are remembered of the last task, want 1", n)
	}
	r.tasks[task(0)][0].at = time.Now().Add(-recentFor)
	if n := len(r.of(task(0))); n != 0 {
		t.Errorf("%d are remembered of what was said a while ago", n)
	}
	for i := range 20 {
		r.take(task(i))
	}
	if r.bytes != 0 || len(r.tasks) != 0 {
		t.Errorf("of nothing %d bytes of %d tasks are remembered", r.bytes, len(r.tasks))
	}
}

// TestRequestsAreBounded: more questions than one request may have are refused, and so is a blob at
// once that is no manifest.
func TestRequestsAreBounded(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	large := a.add(t, "t", content(p2p.MaxManifest+1, 1))
	refused := func(what string, err error) {
		t.Helper()
		if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusBadRequest {
			t.Errorf("%s: %v; want it refused", what, err)
		}
	}
	task, name := taskRef(large), nameRef{"t", "v1"}
	for what, req := range map[string]findRequest{
		"tasks":     {Tasks: slices.Repeat([]taskRef{task}, maxFind+1)},
		"names":     {Names: slices.Repeat([]nameRef{name}, maxFind+1)},
		"referrers": {Referrers: slices.Repeat([]taskRef{task}, maxFind+1)},
		"all kinds": {Tasks: slices.Repeat([]taskRef{task}, maxFind/2),
			Names: slices.Repeat([]nameRef{name}, maxFind/2), Referrers: []taskRef{task}},
		"no digest":  {Tasks: []taskRef{{"t", "x"}}},
		"no name":    {Names: []nameRef{{"t", string(task.Digest)}}},
		"no tag":     {Names: []nameRef{{"../t", "v1"}}},
		"no subject": {Referrers: []taskRef{{"t", "x"}}},
	} {
		_, err := b.client.find(t.Context(), a.id, &req)
		refused(what, err)
	}
	_, err := b.client.do(t.Context(), b.client.http, a.id, http.MethodGet, pathBlob, taskQuery(large), nil)
	refused("a large blob at once", err)
}

// TestMalformedDeletes: a delete that is none is not done, and keeps nobody from learning of others.
func TestMalformedDeletes(t *testing.T) {
	now := time.Now()
	d := digest.SHA256.FromString("x").String()
	for _, m := range []deleteMessage{
		{Tag: "../t", CID: "v1"}, {CID: "no:cid"}, {CID: ""}, {CID: "v1", Soft: true}, {CID: d, NameOnly: true},
	} {
		m.At = now
		if got, err := m.parse(now); err == nil {
			t.Errorf("%+v is taken for %+v", m, got)
		}
	}
	h := newHub()
	a := h.start(t)
	var first, second, tooMany deletesReply
	for _, reply := range []*deletesReply{&first, &second} {
		task := a.add(t, "t", content(1000, uint64(len(first.Deletes))))
		reply.Deletes = []deleteMessage{
			{Tag: "../t", CID: "v1", At: now}, {Tag: "t", CID: string(task.Digest), At: a.wantStored(t, task).Origin}}
	}
	first.Next = 7
	kept := a.add(t, "t", content(1000, 9))
	forgotten := deleteMessage{Tag: "t", CID: string(kept.Digest), At: a.wantStored(t, kept).Origin,
		Age: int64(2 * a.Swarm.opts.RememberDeletes / time.Second)}
	first.Deletes = append(first.Deletes, forgotten)
	tooMany.Deletes = slices.Repeat(first.Deletes[1:2], maxDeletes+1)
	liar := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return instead(honest, pathDeletes, func(w http.ResponseWriter, r *http.Request) {
				switch after := r.FormValue("after"); {
				case r.Method == http.MethodPost:
					writeJSON(w, &deletesResult{})
				case after == "0":
					writeJSON(w, &first)
				case after == "7":
					writeJSON(w, &second)
				default:
					writeJSON(w, &tooMany)
				}
			})
		}
	})
	for _, reply := range []deletesReply{first, second} {
		a.gone(t, "t", reply.Deletes[1].CID)
	}
	a.wantStored(t, kept) // of which the delete is so old that it is remembered by nobody else
	first.Next = 8
	if err := a.deletes.compare(t.Context(), liar.id); !errors.Is(err, errMessage) {
		t.Errorf("more deletes in an answer than may be: %v, want %v", err, errMessage)
	}
	req := deletesRequest{Deletes: tooMany.Deletes}
	err := liar.client.call(t.Context(), liar.client.streams, a.id, http.MethodPost, pathDeletes, &req,
		&deletesResult{})
	if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusBadRequest {
		t.Errorf("more deletes in a request than may be: %v; want it refused", err)
	}
	task := a.add(t, "t", content(1000, 3))
	if deleted := a.delete(t, "t", string(task.Digest), p2p.DeleteOptions{}); deleted.Reached != 0 ||
		len(deleted.Missed) != 1 {
		t.Errorf("a peer that answers nothing to a delete is said to have done it: %+v", deleted)
	}
}

// TestInbox: of long messages only so many are taken in at once as there is room for;
// short ones do not wait for them.
func TestInbox(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // a test that waits for ever fails
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
	if in.room.TryAcquire(1) {
		t.Error("long messages take no room")
	}
	if b, _, err := in.read(ctx, bytes.NewReader(make([]byte, shortMessage)), maxJSON); err != nil ||
		len(b) != shortMessage {
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

// TestServedFilesMakeRoom: where no descriptor is free for a file that is asked for, those that
// nobody asks for now are closed.
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
		if _, err := a.Open(t.Context(), task, p2p.Network); !errors.Is(err, p2p.ErrBusy) ||
			errors.Is(err, p2p.ErrNotFound) {
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

// TestBusySource: where the peer that has a blob is too busy for as long as anybody waits, that is the reason.
func TestBusySource(t *testing.T) {
	h := newHub()
	a := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			busy := func(w http.ResponseWriter, _ *http.Request) {
				http.Error(w, "busy", http.StatusServiceUnavailable)
			}
			return instead(instead(honest, pathLinks, busy), pathPieces, busy)
		}
	})
	b := h.start(t, func(o *Options) { o.LookupTimeout, o.StallTimeout = 200*time.Millisecond, 200*time.Millisecond })
	if err := b.wantEnd(t, t.Context(), a.add(t, "t", content(100, 1)), p2p.ErrBusy); errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("read: %v", err)
	}
}

// endless gives the same bytes again and again, and counts them. Beyond a limit it fails.
type endless struct {
	head  io.Reader
	given int
	limit int
}

func (e *endless) Read(p []byte) (int, error) {
	if n, _ := e.head.Read(p); n > 0 {
		return n, nil
	}
	if e.given += len(p); e.given > e.limit {
		return 0, errors.New("more was read than there may be")
	}
	clear(p)
	return len(p), nil
}

// TestBinaryAnswers: what a peer says of how long a part of its answer is, is believed only within
// bounds: no memory is set aside for it, and no more is read.
func TestBinaryAnswers(t *testing.T) {
	d := digest.SHA256.FromString("x")
	size := func(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
	reply := func(flags byte, piece, have, hints uint32) []byte {
		b := []byte{pieceVersion, flags}
		for _, n := range []uint32{piece, have, hints} {
			b = binary.BigEndian.AppendUint32(b, n)
		}
		return b
	}
	links := func(r io.Reader) error { _, err := readLinks(r, d); return err }
	piece := func(r io.Reader) error { _, err := readPieceReply(r, 100); return err }
	for name, c := range map[string]struct {
		read func(io.Reader) error
		head []byte
	}{
		"a chain that does not end":                 {links, size(2 * digest.MinPieceLength)},
		"a chain of a blob that there can't be":     {links, size(1 << 62)},
		"a chain of a blob of less than nothing":    {links, size(-1)},
		"a set of pieces of 64 MiB":                 {piece, reply(flagWhole, 0, 64<<20, 0)},
		"hints of 64 MiB":                           {piece, reply(flagWhole, 0, 0, 64<<20)},
		"a set and hints that are nothing together": {piece, reply(flagWhole, 0, 1<<31, 1<<31)},
		"a piece that there is not":                 {piece, reply(flagWhole|flagPiece, 100, 0, 0)},
	} {
		r := &endless{head: bytes.NewReader(c.head), limit: 1 << 20}
		var err error
		n := allocated(func() { err = c.read(r) })
		if !errors.Is(err, errMessage) || n > 1<<20 || r.given > maxHintBytes {
			t.Errorf("%s: %v; %d bytes were read, and %d allocated", name, err, r.given, n)
		}
	}
}

// TestMessagesOfManyElements: each kind of message that comes from a peer is bounded in how many elements it
// has. (What they would take is in TestAnswersOfManyElements.)
func TestMessagesOfManyElements(t *testing.T) {
	for _, m := range []struct {
		message
		before, after string
	}{
		{&hello{}, `{"addrs":["x"`, `]}`},
		{&hello{}, `{"pieces":["x"`, `]}`},
		{&findRequest{}, `{"tasks":[""`, `]}`},
		{&findReply{}, `{"tasks":[""`, `]}`},
		{&deletesRequest{}, `{"deletes":[""`, `]}`},
		{&deletesReply{}, `{"deletes":[""`, `]}`},
		{&deletesResult{}, `{"results":[""`, `]}`},
		{&hints{}, `[""`, `]`},
	} {
		size, _ := m.bounds()
		if size > maxJSON {
			t.Errorf("a %T may have %d bytes", m.message, size)
		}
		text := m.before + strings.Repeat(",1", (size-len(m.before)-len(m.after))/2) + m.after
		if err := decodeJSON([]byte(text), m.message); !errors.Is(err, jsonlimit.ErrLimit) ||
			!errors.Is(err, errMessage) {
			t.Errorf("%T: %.20s… of %d bytes: %v", m.message, text, len(text), err)
		}
	}
}

// TestRefusalsAreBounded: of the words of a refusal only the first are read.
func TestRefusalsAreBounded(t *testing.T) {
	h := newHub()
	chatty := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return instead(honest, pathFind, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(http.StatusTeapot)
				for words := bytes.Repeat([]byte("no "), 1<<10); ; {
					if _, err := w.Write(words); err != nil {
						return
					}
				}
			})
		}
	})
	b := h.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := b.client.find(ctx, chatty.id, &findRequest{})
	if e, ok := errors.AsType[*statusError](err); !ok || len(e.text) > 1024 {
		t.Errorf("the refusal is %.100v", err)
	}
}

// TestPieceRequests: what is no request for a piece of a blob, or for one of another hash chain, gets
// none; a peer that asks rightly then is not kept waiting.
func TestPieceRequests(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(200*digest.MinPieceLength, 1)
	task := a.add(t, "t", data)
	table := tableOf(task.Digest, data)
	chain := links{table.Size, table.Chain}.hash(task.Digest)
	ask := func(task p2p.Task, body []byte) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		resp, err := b.client.do(ctx, b.client.streams, a.id, http.MethodPost, pathPieces, taskQuery(task), body)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	request := func(chain linksHash, n int) []byte {
		return (&pieceRequest{links: chain, want: schedule.FullSet(n)}).append(nil)
	}
	good := request(chain, table.Pieces())
	for name, c := range map[string]struct {
		task p2p.Task
		body []byte
		code int
	}{
		"of less pieces":     {task, request(chain, 60), http.StatusBadRequest},
		"of more pieces":     {task, request(chain, 1000), http.StatusBadRequest},
		"of too many pieces": {task, request(chain, maxPieces+8), http.StatusBadRequest},
		"nothing":            {task, nil, http.StatusBadRequest},
		"cut off":            {task, good[:len(good)-1], http.StatusBadRequest},
		"too long":           {task, append(bytes.Clone(good), 0), http.StatusBadRequest},
		"another version":    {task, append([]byte{9}, good[1:]...), http.StatusBadRequest},
		"another chain":      {task, request(linksHash{1}, table.Pieces()), http.StatusConflict},
		"what is not here":   {p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("x")}, good, http.StatusNotFound},
		"no digest":          {p2p.Task{Tag: "t", Digest: "../x"}, good, http.StatusBadRequest},
	} {
		err := ask(c.task, c.body)
		if e, ok := errors.AsType[*statusError](err); !ok || e.code != c.code {
			t.Errorf("%s: %v; want code %d", name, err, c.code)
		}
		if err := ask(task, good); err != nil {
			t.Fatalf("after %s, an honest request: %v", name, err)
		}
	}
}

// TestNeverServe: a peer that serves nothing gives nothing to one that asks without having found it.
func TestNeverServe(t *testing.T) {
	h := newHub()
	a, b := h.start(t, func(o *Options) { o.Mode = NeverServe }), h.start(t)
	data := content(2*digest.MinPieceLength, 1)
	manifest := a.push(t, "t", "n", "", data)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	table := tableOf(task.Digest, data)
	for _, request := range []struct {
		method, path string
		of           p2p.Task
		body         []byte
	}{
		{http.MethodGet, pathBlob, manifest, nil},
		{http.MethodGet, pathLinks, task, nil},
		{http.MethodPost, pathPieces, task,
			(&pieceRequest{links: links{table.Size, table.Chain}.hash(task.Digest), want: schedule.FullSet(2)}).append(
				nil)},
	} {
		_, err := b.client.do(t.Context(), b.client.streams, a.id, request.method, request.path, taskQuery(request.of),
			request.body)
		if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusForbidden {
			t.Errorf("%s: %v; want it refused", request.path, err)
		}
	}
	reply, err := b.client.find(t.Context(), a.id, &findRequest{
		Tasks: []taskRef{taskRef(task)}, Names: []nameRef{{"t", "n"}}, Referrers: []taskRef{taskRef(task)},
	})
	if err != nil || reply.Tasks[0] != nil || reply.Names[0] != nil && reply.Names[0].Digest != "" ||
		len(reply.Referrers[0]) > 0 {
		t.Errorf("it tells %+v, %v", reply, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, who := range h.providers {
		if who[a.id] {
			t.Error("it announces what it has")
		}
	}
}

// beginDownload returns a download of what a peer has, of which one piece has arrived and no
// more comes.
func beginDownload(t *testing.T, data []byte) (from *testPeer, d *download, task p2p.Task) {
	t.Helper()
	h := newHub()
	from, b := h.start(t, newGate(1).through), h.start(t)
	task = from.add(t, "", data)
	blob := b.open(t, t.Context(), task)
	t.Cleanup(func() { blob.Close() })
	arrive(t, blob, 1)
	return from, b.downloadBy(blob), task
}

// inLoop has the loop of a download do something, and waits for it.
func inLoop(d *download, do func()) {
	done := make(chan struct{})
	d.post(func() {
		defer close(done)
		do()
	})
	<-done
}

// TestSourcesAreBounded: however many peers say that they have a blob, name others, or state hash
// chains, a download takes up so many of them.
func TestSourcesAreBounded(t *testing.T) {
	a, d, task := beginDownload(t, content(gateSize, 60))
	inLoop(d, func() {
		for range 3 * maxSources {
			d.follow(hint{ID: test.RandPeerIDFatal(t).String(), Addrs: []string{"/ip4/127.0.0.1/tcp/1"}})
		}
		if n := len(d.sources) + len(d.hinted); n > 2*maxSources {
			t.Errorf("%d peers are asked that were named", n)
		}
		for i := range 3 * maxSources {
			id := test.RandPeerIDFatal(t)
			d.addSource(id, task, &taskState{Size: gateSize})
			if src := d.sources[id]; src != nil {
				chain := bytes.Clone(d.chains[d.active].chain)
				chain[i] ^= 1
				d.noteChain(src, links{gateSize, chain})
			}
			if src := d.sources[a.id]; src != nil && i > maxSources {
				chain := bytes.Clone(d.chains[d.active].chain)
				chain[i] ^= 2
				d.noteChain(src, links{gateSize, chain})
			}
		}
		if len(d.sources) > maxSources || len(d.chains) > maxSources {
			t.Errorf("%d sources, and %d hash chains", len(d.sources), len(d.chains))
		}
	})
}

// TestAnswerOfAnotherSize: a source that has said that the blob has another size, between an answer and its end, is
// no reason to crash.
func TestAnswerOfAnotherSize(t *testing.T) {
	a, d, task := beginDownload(t, content(100*digest.MinPieceLength, 61))
	inLoop(d, func() {
		d.addSource(a.id, task, &taskState{Size: 1000})
		want := schedule.NewSet(100)
		want.Add(99)
		d.done(schedule.Request{ID: -1, Source: string(a.id), Want: want}, d.sources[a.id], schedule.FullSet(100), -1,
			0, nil)
	})
}

// TestReplacedChain: what was verified with a hash chain is not sent on under it when another one has taken its
// place, not to one that has asked before either.
func TestReplacedChain(t *testing.T) {
	h := newHub()
	g := newGate(10)
	a, b := h.start(t, g.through), h.start(t)
	task := a.add(t, "", content(gateSize, 62))
	blob := b.open(t, t.Context(), task)
	defer blob.Close()
	arrive(t, blob, 10)
	up, used, err := b.api.upload(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	defer used()
	if have, _ := up.there(); have.Count() != 10 {
		t.Errorf("%d pieces are offered, want 10", have.Count())
	}
	d := b.downloadBy(blob)
	done := make(chan struct{})
	d.post(func() {
		defer close(done)
		other := links{gateSize, bytes.Clone(d.chains[d.active].chain)}
		other.chain[0] ^= 1
		d.noteChain(d.sources[a.id], other)
		d.activate(other.hash(d.digest))
	})
	<-done
	if have, _ := up.there(); have.Count() > 0 {
		t.Errorf("%d pieces are offered under a chain that has been replaced", have.Count())
	}
	again, used, err := b.api.upload(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	defer used()
	if have, _ := again.there(); again.links == up.links || have.Count() == 0 {
		t.Errorf("under the other chain %d pieces are offered", have.Count())
	}
	if n, err := blob.ReadAt(make([]byte, 1), 0); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("a reader that was given a piece of the chain before reads on: %d bytes, %v", n, err)
	}
}

// TestPeersAreBounded: of peers that come and go, or are only named, so many are remembered, and those that
// were seen last.
func TestPeersAreBounded(t *testing.T) {
	now := time.Now()
	table := newPeerTable()
	table.now = func() time.Time { return now }
	for i := range maxPeers + 100 {
		now = now.Add(time.Second)
		table.get(peer.ID(fmt.Sprint(i)))
		table.get("here").answered(time.Millisecond)
	}
	known := table.known()
	if len(known) != maxPeers || !slices.Contains(known, "here") || slices.Contains(known, "0") {
		t.Errorf("%d peers are known, want %d without the oldest", len(known), maxPeers)
	}
}
