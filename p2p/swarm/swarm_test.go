package swarm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"iter"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hub is a network in which everybody is connected with everybody, until that is cut.
type hub struct {
	mu        sync.Mutex
	nets      map[peer.ID]*fakeNetwork
	providers map[Key]map[peer.ID]bool
	cut       func(a, b peer.ID) bool
	hung      map[peer.ID]bool // what is sent to them gets lost, and nothing says so
	ghosts    map[peer.ID]bool // that have gone; a peer that connects with them waits
	noTCP     bool             // pieces go over the network's streams
}

func newHub() *hub {
	return &hub{nets: map[peer.ID]*fakeNetwork{}, providers: map[Key]map[peer.ID]bool{}, hung: map[peer.ID]bool{},
		ghosts: map[peer.ID]bool{}}
}

// fakeNetwork is a Network without libp2p.
type fakeNetwork struct {
	hub       *hub
	self      peer.ID
	accepted  chan net.Conn
	closed    chan struct{}
	closing   sync.Once
	onConnect func(peer.ID)
}

func (h *hub) join(self peer.ID) *fakeNetwork {
	n := &fakeNetwork{hub: h, self: self, accepted: make(chan net.Conn), closed: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nets[self] = n
	return n
}

func (h *hub) reachable(a, b peer.ID) *fakeNetwork {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nets[a] == nil || h.cut != nil && h.cut(a, b) {
		return nil
	}
	return h.nets[b]
}

// setCut says who can't reach whom any more. Those that can again meet.
func (h *hub) setCut(cut func(a, b peer.ID) bool) {
	h.mu.Lock()
	before := h.cut
	h.cut = cut
	var met []func()
	for a, n := range h.nets {
		for b := range h.nets {
			if a != b && before != nil && before(a, b) && (cut == nil || !cut(a, b)) && n.onConnect != nil {
				met = append(met, func() { n.onConnect(b) })
			}
		}
	}
	h.mu.Unlock()
	for _, f := range met {
		f()
	}
}

func (n *fakeNetwork) Self() peer.ID { return n.self }

func (n *fakeNetwork) Connected() []peer.ID {
	n.hub.mu.Lock()
	defer n.hub.mu.Unlock()
	var all []peer.ID
	for id := range n.hub.nets {
		if id != n.self && (n.hub.cut == nil || !n.hub.cut(n.self, id)) {
			all = append(all, id)
		}
	}
	return all
}

func (n *fakeNetwork) Addresses(p peer.ID) peer.AddrInfo {
	return peer.AddrInfo{ID: p, Addrs: []multiaddr.Multiaddr{multiaddr.StringCast("/ip4/127.0.0.1/tcp/1")}}
}

func (n *fakeNetwork) Connect(ctx context.Context, p peer.AddrInfo) error {
	n.hub.mu.Lock()
	ghost := n.hub.ghosts[p.ID]
	n.hub.mu.Unlock()
	if ghost {
		<-ctx.Done()
		return ctx.Err()
	}
	if n.hub.reachable(n.self, p.ID) == nil {
		return errors.New("it can't be reached")
	}
	return nil
}

func (n *fakeNetwork) Providers(_ context.Context, key Key) iter.Seq[peer.AddrInfo] {
	return func(yield func(peer.AddrInfo) bool) {
		n.hub.mu.Lock()
		var all []peer.ID
		for p := range n.hub.providers[key] {
			all = append(all, p)
		}
		n.hub.mu.Unlock()
		for _, p := range all {
			if p != n.self && !yield(n.Addresses(p)) {
				return
			}
		}
		if n.hub.hangs("") {
			<-n.closed // as a search that asks a peer that hangs, and can't be cancelled
		}
	}
}

// hang has a peer go silent, or answer again. It stays connected.
func (h *hub) hang(p peer.ID, hung bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.hung, p)
	if hung {
		h.hung[p] = true
	}
}

// hangs reports whether a peer, or, with an empty p, any, is silent.
func (h *hub) hangs(p peer.ID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hung[p] || p == "" && len(h.hung) > 0
}

// hangingConn is a stream to a peer that may go silent. Its Close then waits for the
// other end, as that of libp2p does.
type hangingConn struct {
	net.Conn
	n  *fakeNetwork
	to peer.ID
}

func (c hangingConn) Write(p []byte) (int, error) {
	if c.n.hub.hangs(c.to) {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c hangingConn) Close() error {
	if c.n.hub.hangs(c.to) {
		<-c.n.closed
	}
	return c.Conn.Close()
}

func (n *fakeNetwork) Announce(keys ...Key) {
	n.hub.mu.Lock()
	defer n.hub.mu.Unlock()
	for _, k := range keys {
		if n.hub.providers[k] == nil {
			n.hub.providers[k] = map[peer.ID]bool{}
		}
		n.hub.providers[k][n.self] = true
	}
}

func (n *fakeNetwork) Withdraw(keys ...Key) {
	n.hub.mu.Lock()
	defer n.hub.mu.Unlock()
	for _, k := range keys {
		delete(n.hub.providers[k], n.self)
	}
}

type fakeAddr string

func (a fakeAddr) Network() string { return "fake" }
func (a fakeAddr) String() string  { return string(a) }

type fakeConn struct {
	net.Conn
	remote fakeAddr
}

func (c fakeConn) RemoteAddr() net.Addr { return c.remote }

func (n *fakeNetwork) Dial(ctx context.Context, p peer.ID) (net.Conn, error) {
	other := n.hub.reachable(n.self, p)
	if other == nil {
		return nil, errors.New("it can't be reached")
	}
	mine, theirs := net.Pipe()
	dialled := fakeConn{hangingConn{mine, n, p}, fakeAddr(p.String())}
	if n.hub.hangs(p) {
		return dialled, nil
	}
	select {
	case other.accepted <- fakeConn{theirs, fakeAddr(n.self.String())}:
		return dialled, nil
	case <-other.closed:
		mine.Close()
		return nil, errors.New("it has gone")
	case <-ctx.Done():
		mine.Close()
		return nil, context.Cause(ctx)
	}
}

func (n *fakeNetwork) Listener() net.Listener { return fakeListener{n} }

type fakeListener struct{ *fakeNetwork }

func (l fakeListener) Addr() net.Addr { return fakeAddr(l.self.String()) }

func (l fakeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (n *fakeNetwork) OnConnect(f func(peer.ID)) {
	n.hub.mu.Lock()
	n.onConnect = f
	n.hub.mu.Unlock()
	for _, p := range n.Connected() {
		f(p)
		if other := n.hub.reachable(p, n.self); other != nil {
			n.hub.mu.Lock()
			theirs := n.hub.nets[p].onConnect
			n.hub.mu.Unlock()
			if theirs != nil {
				theirs(n.self)
			}
		}
	}
}

func (n *fakeNetwork) Trouble() error { return nil }

func (n *fakeNetwork) Close() error {
	n.closing.Do(func() {
		n.hub.mu.Lock()
		defer n.hub.mu.Unlock()
		delete(n.hub.nets, n.self)
		for _, who := range n.hub.providers {
			delete(who, n.self)
		}
		close(n.closed)
	})
	return nil
}

// testPeer is a daemon without its doors.
type testPeer struct {
	*front.Engine
	*Swarm
	dir  string
	id   peer.ID
	key  crypto.PrivKey
	opts Options

	maxSize int64 // of the store, when it is started again
}

func testLog(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start starts a peer. Options may change what it is.
func (h *hub) start(t testing.TB, change ...func(*Options)) *testPeer {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &testPeer{dir: t.TempDir(), key: key}
	p.opts = Options{
		Identity: key, Secret: []byte("the secret of the swarm"), Listen: []string{"127.0.0.1:0"},
		LookupTimeout: 5 * time.Second, StallTimeout: 5 * time.Second,
	}
	if h.noTCP {
		p.opts.Listen = nil
	}
	if log := testLog(t); log != nil {
		p.opts.Log = log
	}
	for _, f := range change {
		f(&p.opts)
	}
	p.restart(t, h)
	return p
}

// restart starts a peer again that was closed.
func (p *testPeer) restart(t testing.TB, h *hub) {
	t.Helper()
	var err error
	if p.id, err = peer.IDFromPrivateKey(p.key); err != nil {
		t.Fatal(err)
	}
	store, err := pieces.Open(p.dir, pieces.Options{Log: p.opts.Log, Now: p.opts.Now, MaxSize: p.maxSize})
	if err != nil {
		t.Fatal(err)
	}
	e := front.New(store, p.opts.Log)
	if p.Swarm, err = New(e, h.join(p.id), p.opts); err != nil {
		t.Fatal(err)
	}
	p.Engine = e
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// commit commits to the store, as what comes from peers is.
func (p *testPeer) commit(ctx context.Context, c p2p.Commit) error {
	in, err := p.store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	return in.Commit(c)
}

// Close, Peers and Replicate are those of the engine in front.
func (p *testPeer) Close() error { return p.Engine.Close() }

func (p *testPeer) Peers(ctx context.Context) ([]p2p.Peer, error) { return p.Engine.Peers(ctx) }

func (p *testPeer) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	return p.Engine.Replicate(ctx, tag, cid, n)
}

// content returns n bytes that depend on the seed.
func content(n int, seed uint64) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	mathrand.NewChaCha8(key).Read(b)
	return b
}

// add imports content under a tag.
func (p *testPeer) add(t testing.TB, tag string, b []byte) p2p.Task {
	t.Helper()
	in, err := p.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(bytes.NewReader(b), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: tag, Digest: added.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{
		{Task: task, MediaType: "application/octet-stream", Keep: p2p.KeepPinned}}}); err != nil {
		t.Fatal(err)
	}
	return task
}

// read reads all of a task's blob.
func (p *testPeer) read(ctx context.Context, task p2p.Task) ([]byte, error) {
	blob, err := p.Open(ctx, task, p2p.Network)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	var out bytes.Buffer
	err = blob.CopyRange(ctx, &out, 0, blob.Size(), nil)
	return out.Bytes(), err
}

// want reads a task's blob and compares it.
func (p *testPeer) want(t testing.TB, task p2p.Task, b []byte) {
	t.Helper()
	got, err := p.read(t.Context(), task)
	if err != nil {
		t.Fatalf("read %s: %v", task, err)
	}
	if !bytes.Equal(got, b) {
		t.Fatalf("read %s: %d bytes that differ from the %d that were imported", task, len(got), len(b))
	}
}

// wantStored waits until a task is in the store.
func (p *testPeer) wantStored(t testing.TB, task p2p.Task) p2p.Info {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		info, err := p.store.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest),
			p2p.StatOptions{Scope: p2p.Local})
		if err == nil {
			return info
		}
		if !errors.Is(err, p2p.ErrNotFound) || time.Now().After(deadline) {
			t.Fatalf("%s is not stored: %v", task, err)
		}
		<-time.After(time.Millisecond)
	}
}

func TestFetch(t *testing.T) {
	for _, plain := range []bool{false, true} {
		for _, size := range []int{0, 1, 10_000, digest.MinPieceLength, 1_000_000, 20 << 20} {
			if testing.Short() && size > 1<<20 {
				continue
			}
			h := newHub()
			same := func(o *Options) { o.Plain = plain }
			a, b := h.start(t, same), h.start(t, same)
			data := content(size, 1)
			task := a.add(t, "models", data)
			b.want(t, task, data)
			info := b.wantStored(t, task)
			if origin := a.wantStored(t, task); !info.Origin.Equal(origin.Origin) || info.Keep != p2p.KeepPinned ||
				info.MediaType != origin.MediaType {
				t.Errorf("fetched is %+v, want what %+v is", info, origin)
			}
			a.Close()
			b.want(t, task, data)
		}
	}
}

func TestNotFound(t *testing.T) {
	h := newHub()
	a := h.start(t)
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes([]byte("nowhere"))}
	if _, err := a.read(t.Context(), task); !errors.Is(err, p2p.ErrUnreachable) || errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("alone: error is %v, want %v", err, p2p.ErrUnreachable)
	}
	h.start(t)
	if _, err := a.read(t.Context(), task); !errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("with a peer: error is %v, want %v", err, p2p.ErrNotFound)
	}
	if _, err := os.ReadDir(a.dir + "/partial"); err != nil {
		t.Error(err)
	}
}

func TestReadAtWhileArriving(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(8<<20, 2)
	task := a.add(t, "", data)
	blob, err := b.Open(t.Context(), task, p2p.Network)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	got := make([]byte, 100_000)
	for _, off := range []int64{8<<20 - 100_000, 0, 3_000_001} {
		if _, err := blob.ReadAt(got, off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data[off:off+100_000]) {
			t.Errorf("at %d: other bytes", off)
		}
	}
}

// blobFile names the file of a stored blob.
func blobFile(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// damage flips a byte of a stored blob.
func damage(t testing.TB, dir string, d digest.Digest, at int64) {
	t.Helper()
	name := blobFile(dir, d)
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// downloadBy returns the download that a reader reads from.
func (p *testPeer) downloadBy(a *Arriving) *download {
	p.downloads.mu.Lock()
	defer p.downloads.mu.Unlock()
	return p.downloads.all[a.d.digest]
}
