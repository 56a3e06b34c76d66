package persistent_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	commonv2 "d7y.io/api/v2/pkg/apis/common/v2"
	dfdaemonv2 "d7y.io/api/v2/pkg/apis/dfdaemon/v2"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/persistent"
	"github.com/dfcache/dfcache/p2p/dragonfly/persistent/persistenttest"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a host with a Dragonfly and an engine on it.
type host struct {
	*front.Engine
	t        *testing.T
	upstream *persistenttest.Daemon
	cluster  *persistenttest.Cluster
	dir      string // of the store
	maxSize  int64  // of the store; 0 is no limit
}

// newHost starts a host. It ends with the test, with nothing left that is on its way.
func newHost(t *testing.T, cluster *persistenttest.Cluster, opts persistent.Options) *host {
	t.Helper()
	h := &host{t: t, upstream: cluster.Start(t), cluster: cluster, dir: t.TempDir()}
	h.open(opts)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		h.requireNothingLeft()
	})
	return h
}

func (h *host) open(opts persistent.Options) {
	h.t.Helper()
	if opts.LookupTimeout == 0 {
		opts.LookupTimeout = time.Minute // the machine may be busy with other tests
	}
	store, err := pieces.Open(h.dir, pieces.Options{MaxSize: h.maxSize})
	if err != nil {
		h.t.Fatal(err)
	}
	opts.Socket, opts.Schedulers = h.upstream.Socket, []string{h.cluster.Addr}
	h.Engine = front.New(store, opts.Log)
	if _, err = persistent.New(h.Engine, opts); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) requireNothingLeft() {
	h.t.Helper()
	if entries, err := os.ReadDir(filepath.Join(h.dir, "dragonfly")); err != nil || len(entries) > 0 {
		h.t.Errorf("there is left: %v, %v", entries, err)
	}
}

func (h *host) stat(task p2p.Task, opts p2p.StatOptions) (p2p.Info, error) {
	return h.Stat(h.t.Context(), task.Tag, digest.FromDigest(task.Digest), opts)
}

func (h *host) delete(task p2p.Task) (p2p.Deleted, error) {
	return h.Delete(h.t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.DeleteOptions{})
}

func (h *host) requireFetched(task p2p.Task, want []byte) {
	h.t.Helper()
	if got, err := enginetest.Fetch(h.t.Context(), h, task); err != nil || !bytes.Equal(got, want) {
		h.t.Fatalf("%s: %d bytes, %v; want the %d that were imported", task, len(got), err, len(want))
	}
}

// requireOwnFile fails the test unless the blob's file is this store's alone.
func (h *host) requireOwnFile(task p2p.Task) {
	h.t.Helper()
	info, err := os.Stat(filepath.Join(h.dir, "blobs", task.Digest.Algorithm().String(), task.Digest.Encoded()))
	if err != nil {
		h.t.Fatal(err)
	}
	if n := info.Sys().(*syscall.Stat_t).Nlink; n != 1 {
		h.t.Errorf("the file of %s has %d links", task, n)
	}
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); !holds(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it never came: %s", what)
		}
	}
}

// requireSays fails the test unless an error says these texts.
func requireSays(t *testing.T, err error, says ...string) {
	t.Helper()
	for _, text := range says {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("the error %v does not say %q", err, text)
		}
	}
}

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		cluster := persistenttest.StartCluster(t)
		cluster.Start(t) // there is another host, which has nothing
		h := &host{t: t, upstream: cluster.Start(t), cluster: cluster, dir: t.TempDir()}
		h.open(persistent.Options{})
		t.Cleanup(h.requireNothingLeft)
		return h.Engine
	})
}

// What is imported on one host is exported on another, by Dragonfly's daemons.
func TestTwoHosts(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	for i, size := range []int{0, 1, 1000, p2p.MaxManifest, p2p.MaxManifest + 1, 9 << 20} {
		data := enginetest.Content(size, uint64(i))
		for _, tag := range []string{"", "models/large"} {
			task := enginetest.Import(t, a, tag, data)
			if _, err := b.Open(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
				t.Fatalf("before: %v", err)
			}
			if size > p2p.MaxManifest {
				info, err := b.stat(task, p2p.StatOptions{Providers: true})
				if err != nil || info.Size != int64(size) || !info.Remote ||
					*info.Providers != (p2p.Providers{Asked: 1, Some: 1, Whole: 1}) {
					t.Errorf("stat: %+v, %v", info, err)
				}
			}
			b.requireFetched(task, data)
			a.requireOwnFile(task)
			b.requireOwnFile(task)
			enginetest.RequireContent(t, b, task, data)
		}
	}
	if n := len(a.upstream.Tasks()); n != 12 {
		t.Errorf("Dragonfly has %d tasks, want 12", n)
	}
}

// What Dragonfly gives that is something else is stored nowhere, nor is a part of it.
func TestWrongContent(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	data := enginetest.Content(9<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	var number atomic.Uint32
	var sent atomic.Bool
	requireMissing := func() {
		t.Helper()
		if _, err := b.stat(task, p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("it is here: %v", err)
		}
		b.requireNothingLeft()
	}
	b.upstream.Shorten(true)
	_, err := b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what ends early", err, p2p.ErrUnreachable, "it has ended after")
	requireMissing()
	b.upstream.Shorten(false)
	b.upstream.Tamper(func(p *commonv2.Piece) { p.Content[0] ^= 1 })
	_, err = b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what is wrong", err, digest.ErrMismatch, task.Digest.String(), "delete it")
	requireMissing()
	for what, c := range map[string]struct {
		change func(*commonv2.Piece)
		says   string
	}{
		"a piece behind the end": {func(p *commonv2.Piece) { p.Offset += 5 << 20 }, "it has sent piece"},
		"a piece before the beginning": {
			func(p *commonv2.Piece) { p.Offset = math.MaxUint64 - 10 }, "it has sent piece"},
		"a piece that is shorter":        {func(p *commonv2.Piece) { p.Content = p.Content[1:] }, "it has ended after"},
		"a piece without content":        {func(p *commonv2.Piece) { p.Content, p.Length = nil, 0 }, "with 0 bytes"},
		"a piece of a large number":      {func(p *commonv2.Piece) { p.Number += 1 << 20 }, "it has sent piece"},
		"one piece in place of the rest": {func(p *commonv2.Piece) { p.Number = 0 }, "it has ended after"},
		"the same under another number": {
			func(p *commonv2.Piece) { p.Number = number.Add(1) }, "more than the 9437184 bytes"},
		"a piece that is too large": {func(p *commonv2.Piece) {
			if !sent.Swap(true) {
				p.Content = make([]byte, 66<<20)
			}
		}, "larger than max"},
	} {
		b.upstream.Tamper(c.change)
		_, err = b.Open(t.Context(), task, p2p.Network)
		enginetest.RequireError(t, what, err, p2p.ErrUnreachable, c.says)
		requireMissing()
	}
	b.upstream.Tamper(nil)
	b.upstream.Claim(1 << 50)
	_, err = b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what there is no room for", err, p2p.ErrNoSpace)
	requireMissing()
	b.upstream.Claim(10 << 20)
	_, err = b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what is shorter than it says", err, p2p.ErrUnreachable,
		"ended after 9437184 bytes of 10485760")
	requireMissing()
	b.upstream.Claim(0)
	b.requireFetched(task, data)
}

// What Dragonfly has dropped, because its TTL is over or its daemon was started anew, it gets again.
func TestDropped(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	a := newHost(t, cluster, persistent.Options{SweepInterval: 10 * time.Millisecond, TTL: time.Hour})
	b := newHost(t, cluster, persistent.Options{})
	data := []byte("data")
	task := enginetest.Import(t, a, "t", data)
	there := func() bool {
		_, err := b.stat(task, p2p.StatOptions{})
		return err == nil
	}
	a.upstream.Calls("UploadPersistentCacheTask")
	cluster.Wait(2 * time.Hour)
	eventually(t, "after its TTL", there)
	if n := a.upstream.Calls("UploadPersistentCacheTask"); n != 1 {
		t.Errorf("%d imports by Dragonfly, want 1", n)
	}
	if _, err := b.delete(task); err != nil { // of b's own, and of what Dragonfly has
		t.Fatal(err)
	}
	eventually(t, "after a delete on another host", there)
	b.upstream.Forget()
	a.upstream.Forget()
	eventually(t, "after a start of Dragonfly", func() bool { return len(a.upstream.Tasks()) == 1 })
}

// What Dragonfly has lost while it was away it gets again when it is back, not with the next sweep.
func TestAbsence(t *testing.T) {
	h := newHost(t, persistenttest.StartCluster(t), persistent.Options{SweepInterval: time.Hour})
	enginetest.Import(t, h, "t", []byte("data"))
	h.upstream.Kill()
	h.upstream.Forget()
	for failed := 0; failed < 2; { // the connection is lost, and can't be made again
		if h.Health(t.Context()) != nil {
			failed++
		}
	}
	h.upstream.Run()
	eventually(t, "after an absence of Dragonfly", func() bool { return len(h.upstream.Tasks()) == 1 })
}

// A delete reaches what Dragonfly has on every host, and says what it does not reach.
func TestDelete(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	alone := enginetest.Import(t, a, "t", []byte("alone"))
	if deleted, err := a.delete(alone); err != nil || deleted.Tasks != 1 || len(deleted.Missed) != 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	both := enginetest.Import(t, a, "t", []byte("both"))
	b.requireFetched(both, []byte("both"))
	deleted, err := a.delete(both)
	if err != nil || deleted.Tasks != 1 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, "delete it on each of them") {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	if left := slices.Concat(a.upstream.Tasks(), b.upstream.Tasks(), cluster.States()); len(left) > 0 {
		t.Errorf("Dragonfly still has %v", left)
	}
	// What was never here, but is with Dragonfly.
	there := enginetest.Import(t, a, "t", []byte("there"))
	if deleted, err := b.delete(there); err != nil || len(deleted.Missed) != 1 || len(a.upstream.Tasks()) != 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	if deleted, err := b.delete(both); err != nil || len(deleted.Missed) > 0 { // of which no scheduler knows
		t.Errorf("delete of its own: %+v, %v", deleted, err)
	}
	if _, err := b.delete(both); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("delete of what is nowhere: %v", err)
	}
	// Without a scheduler.
	kept := enginetest.Import(t, a, "t", []byte("kept"))
	cluster.Leave(true)
	deleted, err = a.delete(kept)
	if err != nil || deleted.Tasks != 1 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, cluster.Addr) {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
}

// An import that was broken off is not in the way of the next one.
func TestBrokenOff(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	h := newHost(t, cluster, persistent.Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	h.upstream.OnCall(func(ctx context.Context, call string) error {
		if call != "uploading" {
			return nil
		}
		cancel(gone)
		<-ctx.Done()
		return ctx.Err()
	})
	in, err := h.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	data := []byte("data")
	if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	err = in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}})
	enginetest.RequireError(t, "import", err, gone, "stored on this host")
	eventually(t, "it is taken back", func() bool { return len(cluster.States()) == 0 })
	h.upstream.OnCall(nil)
	enginetest.Import(t, h, "t", data)
	if n := len(h.upstream.Tasks()); n != 1 {
		t.Errorf("Dragonfly has %d tasks, want 1", n)
	}
}

// A caller that gives up does not wait for what is taken back.
func TestGiveUpAtOnce(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	h := newHost(t, cluster, persistent.Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cluster.Hang(true)
	h.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "uploading" {
			cancel(gone)
		}
		return ctx.Err()
	})
	in, err := h.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Add(strings.NewReader("data"), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	err = in.Commit(p2p.Commit{Tasks: []p2p.NewTask{
		{Task: p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}, Keep: p2p.KeepPinned}}})
	enginetest.RequireError(t, "import", err, gone)
	eventually(t, "it is to be taken back", func() bool { return cluster.Waiting() == 1 })
	time.Sleep(200 * time.Millisecond) // one that was given up is not there any more then
	if cluster.Waiting() != 1 {
		t.Error("it was waited for")
	}
	cluster.Hang(false)
	eventually(t, "it is taken back", func() bool { return len(cluster.States()) == 0 })
}

// A fetch of which all has come does not wait for ever for its end.
func TestLingers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(
		t, cluster, persistent.Options{LookupTimeout: 2 * time.Second, StallTimeout: time.Hour, Timeout: time.Minute})
	b.upstream.Linger()
	data := enginetest.Content(5<<20, 1)
	b.requireFetched(enginetest.Import(t, a, "t", data), data)
}

// One that a host has begun, and never ended, is in the way only as long as it can be under way.
func TestStuck(t *testing.T) {
	for name, c := range map[string]struct {
		age     time.Duration
		deletes int
	}{"just begun": {0, 0}, "long ago": {time.Hour, 1}} {
		t.Run(name, func(t *testing.T) {
			cluster := persistenttest.StartCluster(t)
			a := newHost(t, cluster, persistent.Options{})
			a.upstream.OnCall(func(_ context.Context, call string) error {
				if call == "uploading" {
					cluster.Leave(true) // so that nothing can be taken back
					return errors.New("no space left")
				}
				return nil
			})
			data := []byte("data")
			task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
			requireSays(t, tryImport(a, task, data), "no space left")
			cluster.Leave(false)
			cluster.Age(c.age)
			if got := cluster.States(); !slices.Equal(got, []string{"Uploading"}) {
				t.Fatalf("Dragonfly has %v", got)
			}
			b := newHost(t, cluster, persistent.Options{})
			_, err := b.stat(task, p2p.StatOptions{})
			enginetest.RequireError(t, "stat", err, p2p.ErrNotFound, "it is Uploading, on 0 hosts")
			if err := tryImport(b, task, data); err != nil {
				t.Error(err)
			}
			if got := cluster.Deletes(); got != c.deletes || len(b.upstream.Tasks()) != c.deletes {
				t.Errorf("%d deletes and %d tasks, want %d", got, len(b.upstream.Tasks()), c.deletes)
			}
		})
	}
}

func tryImport(h *host, task p2p.Task, data []byte) error {
	in, err := h.Ingest(h.t.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}})
}

// Of two hosts that hand in the same, the one that comes second is content.
func TestBothImport(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	data := []byte("data")
	b.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "UploadPersistentCacheTask" {
			b.upstream.OnCall(nil)
			enginetest.Import(t, a, "t", data)
		}
		return nil
	})
	enginetest.Import(t, b, "t", data)
	if n, m := len(a.upstream.Tasks()), len(b.upstream.Tasks()); n != 1 || m != 0 || cluster.Deletes() != 0 {
		t.Errorf("Dragonfly has %d tasks on the one host and %d on the other, after %d deletes; want 1, 0 and none", n,
			m, cluster.Deletes())
	}
}

// Another program can name our tasks as the documentation says. Where it has put something
// else there, an import puts that right.
func TestForeign(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	upload := func(task p2p.Task, content string) {
		t.Helper()
		conn, err := wire.Dial("unix:" + a.upstream.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		text := "dfcache/" + task.Digest.String() + "/" + task.Tag
		if _, err := dfdaemonv2.NewDfdaemonDownloadClient(conn).UploadPersistentCacheTask(t.Context(),
			&dfdaemonv2.UploadPersistentCacheTaskRequest{
				ContentForCalculatingTaskId: &text, Path: path, PersistentReplicaCount: 1,
				Ttl: durationpb.New(time.Hour),
			}); err != nil {
			t.Fatal(err)
		}
	}
	right := p2p.Task{Tag: "models", Digest: digest.SHA256.FromString("right")}
	upload(right, "right")
	b.requireFetched(right, []byte("right"))
	wrong := p2p.Task{Tag: "models", Digest: digest.SHA256.FromString("data")}
	upload(wrong, "something else")
	_, err := b.Open(t.Context(), wrong, p2p.Network)
	enginetest.RequireError(t, "open", err, digest.ErrMismatch)
	if err := tryImport(a, wrong, []byte("data")); err != nil {
		t.Fatal(err)
	}
	b.requireFetched(wrong, []byte("data"))
}

// What is deleted while Dragonfly imports it is not there afterwards.
func TestDeleteWhileHandedIn(t *testing.T) {
	h := newHost(t, persistenttest.StartCluster(t), persistent.Options{})
	data := []byte("data")
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	h.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "UploadPersistentCacheTask" {
			h.upstream.OnCall(nil)
			if _, err := h.delete(task); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	if err := tryImport(h, task, data); err != nil {
		t.Fatal(err)
	}
	if left := h.upstream.Tasks(); len(left) > 0 {
		t.Errorf("Dragonfly has %v", left)
	}
}

// A daemon that is not what is needed is told of.
func TestOtherDaemons(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	old, contained := newHost(t, cluster, persistent.Options{}), newHost(t, cluster, persistent.Options{})
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}
	old.upstream.CountOldIDs()
	for range 2 { // the second time, too
		requireSays(t, tryImport(old, task, []byte("data")), "stored on this host", "older than September 2025")
	}
	if left := cluster.States(); len(left) > 0 {
		t.Errorf("Dragonfly has %v", left)
	}
	contained.upstream.Contain()
	requireSays(t, tryImport(contained, task, []byte("data")), "stored on this host", "not exist")
}

// A peer that does not answer is told apart from one that has nothing, and nobody is waited for long.
func TestAway(t *testing.T) {
	const short = 500 * time.Millisecond
	cluster := persistenttest.StartCluster(t)
	h := newHost(t, cluster, persistent.Options{LookupTimeout: short})
	if err := h.Health(t.Context()); err != nil {
		t.Error(err)
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}
	_, err := h.stat(task, p2p.StatOptions{})
	enginetest.RequireError(t, "stat of what nobody has", err, p2p.ErrNotFound)
	cluster.Leave(true)
	_, err = h.stat(task, p2p.StatOptions{})
	enginetest.RequireError(t, "stat without a scheduler", err, p2p.ErrUnreachable, "available schedulers not found")
	enginetest.RequireError(t, "import without a scheduler", tryImport(h, task, []byte("data")), p2p.ErrUnavailable,
		"stored on this host")
	info, err := h.stat(task, p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 1, Silent: 1}) {
		t.Errorf("stat of what is here: %+v, %v", info.Providers, err)
	}
	h.upstream.OnCall(func(ctx context.Context, _ string) error {
		<-ctx.Done()
		return ctx.Err()
	})
	absent := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")}
	_, err = h.stat(absent, p2p.StatOptions{})
	enginetest.RequireError(t, "stat that hangs", err, p2p.ErrUnreachable, "no answer within 500ms")
	h.upstream.Ail()
	h.upstream.OnCall(nil)
	enginetest.RequireError(t, "health of one that ails", h.Health(t.Context()), p2p.ErrUnavailable, "NOT_SERVING")
	h.upstream.OnCall(func(context.Context, string) error {
		return status.Error(codes.Unimplemented, "unknown service")
	})
	_, err = h.stat(absent, p2p.StatOptions{})
	enginetest.RequireError(t, "stat of an older daemon", err, p2p.ErrUnreachable, "API v2")
	enginetest.RequireError(t, "health of an older daemon", h.Health(t.Context()), p2p.ErrUnavailable, "API v2")
	h.upstream.Kill()
	_, err = h.stat(absent, p2p.StatOptions{})
	enginetest.RequireError(t, "stat of nobody", err, p2p.ErrUnreachable, h.upstream.Socket, "see that it runs")
	enginetest.RequireError(t, "health of nobody", h.Health(t.Context()), p2p.ErrUnavailable, h.upstream.Socket)
	h.upstream.OnCall(nil)
	h.upstream.Run()
	cluster.Leave(false)
	eventually(t, "Dragonfly answers again", func() bool { return h.Health(t.Context()) == nil })
}

// What there is no room for is refused before any of it is fetched; and where Dragonfly has none
// itself, that is what is told.
func TestRoom(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	a := newHost(t, cluster, persistent.Options{})
	b := &host{t: t, upstream: cluster.Start(t), cluster: cluster, dir: t.TempDir(), maxSize: 4 << 20}
	b.open(persistent.Options{})
	defer b.Close()
	task := enginetest.Import(t, a, "t", enginetest.Content(5<<20, 1))
	_, err := enginetest.Fetch(t.Context(), b, task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrNoSpace)
	if n := b.upstream.Calls("DownloadPersistentCacheTask"); n > 0 {
		t.Errorf("it was asked for %d times", n)
	}
	b.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "UploadPersistentCacheTask" {
			return status.Error(codes.Internal, "No space left on device (os error 28)")
		}
		return nil
	})
	enginetest.RequireError(t, "import", tryImport(b, p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")},
		[]byte("data")), p2p.ErrNoSpace, "stored on this host")
}

// A byte now and then does not hold a fetch up until it is over.
func TestDrip(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cluster := persistenttest.StartCluster(t)
	a, b := newHost(t, cluster, persistent.Options{}), newHost(
		t, cluster, persistent.Options{StallTimeout: time.Second})
	task := enginetest.Import(t, a, "t", enginetest.Content(6*persistenttest.PieceLength, 1))
	b.upstream.Tamper(func(piece *commonv2.Piece) {
		time.Sleep(300 * time.Millisecond)
		piece.Content = piece.Content[:1]
	})
	_, err := enginetest.Fetch(t.Context(), b, task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrUnreachable, "next to nothing")
}
