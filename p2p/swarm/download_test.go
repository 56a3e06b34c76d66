package swarm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/semaphore"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// gate lets pieces pass, so many of them, and then holds them back.
type gate struct {
	mu     sync.Mutex
	left   int
	opened chan struct{}
	passed atomic.Int64
}

func newGate(n int) *gate { return &gate{left: n, opened: make(chan struct{})} }

// open lets all pass.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.opened:
	default:
		close(g.opened)
	}
}

func (g *gate) pass(ctx context.Context) {
	g.mu.Lock()
	if g.left > 0 {
		g.left--
		g.mu.Unlock()
		g.passed.Add(1)
		return
	}
	g.mu.Unlock()
	select {
	case <-g.opened:
		g.passed.Add(1)
	case <-ctx.Done():
	}
}

// through makes a peer give its pieces through the gate.
func (g *gate) through(o *Options) {
	o.tamper = func(honest http.Handler) http.Handler {
		return edit(honest, pathPieces, func(w http.ResponseWriter, r *http.Request,
			answer *httptest.ResponseRecorder) {
			if answer.Body.Len() > 1000 {
				g.pass(r.Context())
			}
			send(w, answer)
		})
	}
}

// arrive reads n pieces of a blob that is arriving, in whatever order they come.
func arrive(t testing.TB, a *Arriving, n int) {
	t.Helper()
	for _, err := range a.Arrived(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if n--; n == 0 {
			return
		}
	}
}

func (p *testPeer) open(t testing.TB, ctx context.Context, task p2p.Task) *Arriving {
	t.Helper()
	blob, err := p.Open(ctx, task, p2p.Network)
	if err != nil {
		t.Fatal(err)
	}
	a, ok := blob.(*Arriving)
	if !ok {
		t.Fatalf("the blob is a %T, want one that arrives", blob)
	}
	return a
}

// What comes from peers arrives as the socket's server has to hand it over.
func TestArriving(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	for _, size := range []int{0, 10*digest.MinPieceLength + 1} {
		data := content(size, 8)
		task := a.add(t, "", data)
		for arrives := false; !arrives; {
			blob, err := b.Open(t.Context(), task, p2p.Network)
			if err != nil {
				t.Fatal(err)
			}
			var arriving *Arriving
			if arriving, arrives = blob.(*Arriving); arrives {
				enginetest.RequireArriving(t, arriving, data)
			} else { // it was stored before Open came to it
				deleteHere(t, b, task)
			}
			blob.Close()
		}
	}
}

// deleteHere has a peer alone not have a task any more.
func deleteHere(t *testing.T, p *testPeer, task p2p.Task) {
	t.Helper()
	_, err := p.store.Delete(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.DeleteOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

const (
	gateSize   = 2 << 20
	gatePieces = gateSize / digest.MinPieceLength
)

// A daemon that stops in the middle of a download goes on at the missing pieces.
func TestResume(t *testing.T) {
	h := newHub()
	g := newGate(10)
	a, b := h.start(t, g.through), h.start(t)
	data := content(gateSize, 8)
	task := a.add(t, "", data)
	blob := b.open(t, t.Context(), task)
	arrive(t, blob, 10)
	info, err := b.Stat(t.Context(), "", digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local})
	if err != nil || info.Held != 10 || info.Pieces != gatePieces || info.Local() || info.Remote {
		t.Errorf("while it arrives it is %+v, %v", info, err)
	}
	b.Close()
	if _, err := blob.ReadAt(make([]byte, gateSize), 0); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("a reader of a daemon that has stopped gets %v, want %v", err, p2p.ErrClosed)
	}
	blob.Close()
	g.open()
	b.restart(t, h)
	b.want(t, task, data)
	peers, err := b.Peers(t.Context())
	if err != nil || len(peers) != 1 || peers[0].Gave != gateSize-10*digest.MinPieceLength {
		t.Errorf("after the restart a peer gave %+v, %v; want the pieces that were missing", peers, err)
	}
	b.wantStored(t, task)
}

// However many wait for it, a blob is fetched once; the last one that goes stops it.
func TestOneDownload(t *testing.T) {
	h := newHub()
	g := newGate(5)
	a, b := h.start(t, g.through), h.start(t)
	data := content(gateSize, 9)
	task := a.add(t, "", data)
	first, cancel := context.WithCancel(t.Context())
	one := b.open(t, first, task)
	two := b.open(t, t.Context(), task)
	arrive(t, one, 5)
	d := b.downloadBy(one)
	if two.d != d.arrival {
		t.Fatal("it is fetched twice")
	}
	cancel()
	if _, err := one.ReadAt(make([]byte, gateSize), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a reader whose context has ended gets %v", err)
	}
	one.Close()
	select {
	case <-d.ended:
		t.Error("the download ended although somebody waits for it")
	default:
	}
	two.Close()
	<-d.ended
	if b.downloads.of(task) != nil {
		t.Error("the download goes on although nobody waits for it")
	}
	g.open()
	before := g.passed.Load()
	var reading sync.WaitGroup
	for range 20 {
		reading.Go(func() { b.want(t, task, data) })
	}
	reading.Wait()
	if got := g.passed.Load() - before; got > gatePieces-5+5 { // those that were under way may have passed
		t.Errorf("%d pieces were given, want %d", got, gatePieces-5)
	}
}

// A source that vanishes costs what was under way, no more.
func TestSourceVanishes(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	g := newGate(10)
	a, b, c := h.start(t, g.through), h.start(t), h.start(t)
	data := content(gateSize, 10)
	task := a.add(t, "", data)
	blob := b.open(t, t.Context(), task)
	defer blob.Close()
	arrive(t, blob, 10)
	c.add(t, "", data) // another one appears
	a.Close()
	if got, err := b.read(t.Context(), task); err != nil || string(got) != string(data) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	var fromA, fromC int64
	for _, s := range blob.Sources() {
		switch s.Peer {
		case a.id.String():
			fromA = s.Bytes
		case c.id.String():
			fromC = s.Bytes
		}
	}
	if fromA != 10*digest.MinPieceLength || fromC != gateSize-10*digest.MinPieceLength {
		t.Errorf("%d bytes came from the one that vanished and %d from the other, want 10 pieces and the rest", fromA,
			fromC)
	}
}

// A peer that has a part of a blob gives it on, and all of it can be had from those who
// have parts.
func TestPartsAreEnough(t *testing.T) {
	h := newHub()
	g := newGate(10)
	a, b, c := h.start(t, g.through), h.start(t), h.start(t)
	data := content(gateSize, 11)
	task := a.add(t, "", data)
	one := b.open(t, t.Context(), task)
	defer one.Close()
	arrive(t, one, 10)
	// c can't reach a, and gets what b has.
	h.setCut(func(x, y peer.ID) bool { return x == c.id && y == a.id || x == a.id && y == c.id })
	two := c.open(t, t.Context(), task)
	defer two.Close()
	arrive(t, two, 10)
	g.open()
	got := make([]byte, gateSize)
	if _, err := io.ReadFull(io.NewSectionReader(two, 0, gateSize), got); err != nil || string(got) != string(data) {
		t.Errorf("what came by way of another one: %v", err)
	}
	for _, s := range two.Sources() {
		if s.Peer != b.id.String() {
			t.Errorf("%d bytes came from %s, which can't be reached", s.Bytes, s.Peer)
		}
	}
}

func TestFlashCrowd(t *testing.T) {
	h := newHub()
	seed := h.start(t)
	data := content(4<<20, 12)
	task := seed.add(t, "", data)
	var all []*testPeer
	for range 8 {
		all = append(all, h.start(t))
	}
	var fetching sync.WaitGroup
	for _, p := range all {
		fetching.Go(func() { p.want(t, task, data) })
	}
	fetching.Wait()
	peers, err := seed.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var took int64
	for _, p := range peers {
		took += p.Took
	}
	if took >= int64(len(all)*len(data)) {
		t.Errorf("the seed gave %d bytes, want less than %d times the blob", took, len(all))
	}
}

func TestModes(t *testing.T) {
	h := newHub()
	full := h.start(t)
	seed := h.start(t, func(o *Options) { o.Mode = SeedOnly })
	never := h.start(t, func(o *Options) { o.Mode = NeverServe })
	data := content(100_000, 13)
	task := seed.add(t, "", data)
	secret := never.add(t, "", content(100_000, 14))
	elsewhere := full.add(t, "", content(100_000, 15))
	never.want(t, task, data)
	full.want(t, task, data)
	if _, err := full.read(t.Context(), secret); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("from one that serves nothing: %v, want %v", err, p2p.ErrNotFound)
	}
	if _, err := seed.read(t.Context(), elsewhere); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("by one that fetches nothing: %v, want %v", err, p2p.ErrNotFound)
	}
	never.push(t, "", "v1", "", []byte("layer"))
	if reply, err := full.client.find(t.Context(), never.id, &findRequest{Names: []nameRef{{"", "v1"}}}); err != nil ||
		reply.Names[0] != nil && reply.Names[0].Digest != "" {
		t.Errorf("one that serves nothing tells what a name stands for: %+v, %v", reply, err)
	}
	full.push(t, "", "v2", "", []byte("layer"))
	for _, p := range []*testPeer{seed, never} {
		query := url.Values{"cid": {"v2"}}
		err := full.client.callQuery(t.Context(), full.client.streams, p.id, http.MethodPost, pathReplicate, query, nil,
			nil)
		if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusForbidden {
			t.Errorf("one that is %s is asked to hold something: %v; want it refused", p.opts.Mode, err)
		}
	}
}

// Bytes move no faster than they may, either way.
func TestRates(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const rate = 4 << 20
	slowly := func(o *Options) { o.UploadRate = rate }
	for name, set := range map[string][2]func(*Options){
		"upload":   {slowly, func(*Options) {}},
		"download": {func(*Options) {}, func(o *Options) { o.DownloadRate = rate }},
	} {
		h := newHub()
		a, b := h.start(t, set[0]), h.start(t, set[1])
		data := content(rate, 16)
		task := a.add(t, "", data)
		began := time.Now()
		b.want(t, task, data)
		if took := time.Since(began); took < 800*time.Millisecond {
			t.Errorf("%s: %d bytes took %s at %d bytes a second", name, len(data), took, rate)
		}
	}
}

// No more pieces are sent at once than may be, and no more requests wait than that.
func TestUploadBounds(t *testing.T) {
	const pieces = 4
	up := &upload{src: stored{full: schedule.FullSet(pieces)},
		table: &digest.Table{Size: pieces * digest.MinPieceLength, PieceLength: digest.MinPieceLength}}
	u := &uploads{slots: pieces, all: semaphore.NewWeighted(1), active: map[digest.Digest]*upload{}}
	up, done, err := u.use("sha256:x", func() (*upload, error) { return up, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	want := schedule.FullSet(pieces)
	_, release, err := u.pick(t.Context(), up, "a", want)
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := u.pick(gone, up, "b", want); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second piece at once: %v; want it to wait", err)
	}
	release(true)
	piece, release, err := u.pick(t.Context(), up, "b", want)
	if err != nil || piece < 0 {
		t.Fatalf("piece %d, %v", piece, err)
	}
	defer release(true)

	u.slots = 0
	other := &upload{src: up.src, table: up.table}
	other, doneOther, err := u.use("sha256:y", func() (*upload, error) { return other, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer doneOther()
	ctx, end := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer end()
	for i := range maxWaiting {
		waiting.Go(func() { u.pick(ctx, other, peer.ID(fmt.Sprint(i)), want) })
	}
	for {
		other.mu.Lock()
		n := other.sched.Waiting()
		other.mu.Unlock()
		if n == maxWaiting {
			break
		}
		runtime.Gosched()
	}
	_, _, err = u.pick(gone, other, "one too many", want)
	if e, ok := errors.AsType[*statusError](err); !ok || e.code != http.StatusServiceUnavailable {
		t.Errorf("with %d that wait: %v; want a refusal", maxWaiting, err)
	}
}

func TestOtherTag(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(100_000, 17)
	task := a.add(t, "one", data)
	b.want(t, task, data)
	b.wantStored(t, task)
	other := p2p.Task{Tag: "two", Digest: task.Digest}
	if _, err := b.read(t.Context(), other); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("under a tag that nobody has: %v, want %v", err, p2p.ErrNotFound)
	}
	a.add(t, "two", data)
	before, _ := b.Peers(t.Context())
	b.want(t, other, data)
	after, _ := b.Peers(t.Context())
	if before[0].Gave != after[0].Gave {
		t.Errorf("%d bytes were fetched that were here", after[0].Gave-before[0].Gave)
	}
	b.wantStored(t, other)
}

// Damage on the disk of a peer is not served, and not fetched by others.
func TestDamagedSource(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	data := content(1<<20, 18)
	task := a.add(t, "", data)
	c.add(t, "", data)
	damage(t, a.dir, task.Digest, 300_000)
	b.want(t, task, data)
	b.wantStored(t, task)
	for p, name := range map[*testPeer]string{a: "the damaged one", c: "the other one"} {
		if e := b.peers.get(p.id); e.isShunned() {
			t.Errorf("%s is shunned", name)
		}
	}
	// A peer that is asked for what is damaged has it mended. (It may have been asked of the
	// other one only.)
	blob, err := c.store.OpenForPeers(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	table := blob.Table()
	blob.Close()
	askFor(t, b, a, task, table, 300_000).Body.Close()
	for deadline := time.Now().Add(time.Minute); ; {
		blob, err := a.store.Open(t.Context(), task, p2p.Local)
		if err == nil {
			err = errors.Join(blob.CopyRange(t.Context(), io.Discard, 0, blob.Size(), nil), blob.Close())
		}
		if err == nil {
			break
		}
		if !errors.Is(err, digest.ErrCorrupt) || time.Now().After(deadline) {
			t.Fatalf("the damaged one has not been mended: %v", err)
		}
		<-time.After(time.Millisecond)
	}
}

// askFor has p ask another one for the piece at an offset. The caller closes the body.
func askFor(t *testing.T, p, from *testPeer, task p2p.Task, table *digest.Table, at int64) *http.Response {
	t.Helper()
	resp, err := tryAskFor(t, p, from, task, table, at)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func tryAskFor(t *testing.T, p, from *testPeer, task p2p.Task, table *digest.Table, at int64) (*http.Response, error) {
	req := pieceRequest{links: links{table.Size, table.Chain}.hash(task.Digest), want: schedule.NewSet(table.Pieces())}
	req.want.Add(int(at / table.PieceLength))
	return p.client.do(t.Context(), p.client.http, from.id, http.MethodPost, pathPieces, taskQuery(task),
		req.append(nil))
}

// Of a piece that is sent in parts the last one is not sent where it is damaged.
func TestDamagedParts(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	a.uploads.chunk = 16 << 10
	data := content(1<<20, 20)
	task := a.add(t, "", data)
	blob, err := a.store.OpenForPeers(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	table := blob.Table()
	blob.Close()
	const at = 300_000
	damage(t, a.dir, task.Digest, at)
	up, used, err := a.api.upload(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	defer used()
	resp := askFor(t, b, a, task, table, at)
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if missing := resp.ContentLength - int64(len(got)); !errors.Is(err, io.ErrUnexpectedEOF) ||
		missing != a.uploads.chunk {
		t.Errorf("all but %d bytes were sent, and then %v; want all but the last %d", missing, err, a.uploads.chunk)
	}
	// It is not sent again, by whoever sends already; nor is the rest as soon as the damage is remembered.
	if have, _ := up.there(); have.Has(at / int(table.PieceLength)) {
		t.Error("damage that was met is offered again")
	}
	resp, err = tryAskFor(t, b, a, task, table, at)
	if status, ok := errors.AsType[*statusError](err); err != nil && (!ok || status.code != http.StatusNotFound) {
		t.Fatal(err)
	}
	if err == nil {
		reply, err := readPieceReply(resp.Body, table.Pieces())
		resp.Body.Close()
		if err != nil || reply.piece >= 0 || reply.have.Has(at/int(table.PieceLength)) {
			t.Errorf("the second answer: %+v, %v", reply, err)
		}
	}
	// One that has the piece is enough, and a is not taken for a liar.
	c.add(t, "", data)
	d := h.start(t)
	d.want(t, task, data)
	if d.peers.get(a.id).isShunned() {
		t.Error("a peer that has damage is shunned")
	}
}

// What is damaged is fetched, and nothing else.
func TestMend(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(20*digest.MinPieceLength, 19)
	task := a.add(t, "", data)
	b.add(t, "", data)
	before := b.wantStored(t, task)
	for _, at := range []int64{0, 7, 5 * digest.MinPieceLength, int64(len(data)) - 1} {
		damage(t, b.dir, task.Digest, at)
	}
	if _, err := b.read(t.Context(), task); !errors.Is(err, digest.ErrCorrupt) {
		t.Fatalf("read what is damaged: %v", err)
	}
	if err := b.Mend(t.Context(), task); err != nil {
		t.Fatal(err)
	}
	blob, err := b.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	b.want(t, task, data)
	var out bytes.Buffer
	if err := blob.CopyRange(t.Context(), &out, 0, blob.Size(), nil); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("mended are %d bytes, %v", out.Len(), err)
	}
	peers, _ := b.Peers(t.Context())
	if peers[0].Gave < 3*digest.MinPieceLength || peers[0].Gave > 4*digest.MinPieceLength {
		t.Errorf("%d bytes were fetched for three pieces", peers[0].Gave)
	}
	after := b.wantStored(t, task)
	after.LastUsed = before.LastUsed
	if !reflect.DeepEqual(after, before) {
		t.Errorf("the task is %+v, was %+v", after, before)
	}

	// Without a peer that has it, it stays as it is, and says so soon.
	other := b.add(t, "", content(1000, 20))
	damage(t, b.dir, other.Digest, 3)
	began := time.Now()
	if err := b.Mend(t.Context(), other); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("mend what nobody has: %v", err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("that took %v", d)
	}
	eventually(t, "something is left of it", func() bool {
		left, err := os.ReadDir(b.dir + "/partial")
		return err == nil && len(left) == 0
	})
	if err := b.Mend(t.Context(), p2p.Task{Tag: "none", Digest: other.Digest}); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("mend what is not here: %v", err)
	}
}

func TestManyBlobs(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a, b := h.start(t), h.start(t)
	var fetching sync.WaitGroup
	tasks := map[p2p.Task][]byte{}
	for i := range 100 {
		data := fmt.Appendf(nil, "blob %d", i)
		tasks[a.add(t, "many", data)] = data
	}
	for task, data := range tasks {
		fetching.Go(func() { b.want(t, task, data) })
	}
	fetching.Wait()
}
