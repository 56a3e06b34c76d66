package dragonfly_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly"
	"github.com/dfcache/dfcache/p2p/dragonfly/dragonflytest"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a host with a Dragonfly and an engine on it.
type host struct {
	*front.Engine
	t        *testing.T
	upstream *dragonflytest.Daemon
	dir      string // of the store
	maxSize  int64  // of the store; 0 is no limit
}

// newHost starts a host. It ends with the test.
func newHost(t *testing.T, cluster *dragonflytest.Cluster, opts dragonfly.Options) *host {
	t.Helper()
	h := &host{t: t, upstream: cluster.Start(t), dir: t.TempDir()}
	h.open(opts)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		h.requireNothingLeft()
	})
	return h
}

func (h *host) open(opts dragonfly.Options) {
	h.t.Helper()
	if opts.LookupTimeout == 0 {
		opts.LookupTimeout = time.Minute // the machine may be busy with other tests
	}
	store, err := pieces.Open(h.dir, pieces.Options{MaxSize: h.maxSize})
	if err != nil {
		h.t.Fatal(err)
	}
	opts.Socket = h.upstream.Socket
	h.Engine = front.New(store, opts.Log)
	if _, err = dragonfly.New(h.Engine, opts); err != nil {
		h.t.Fatal(err)
	}
}

// requireNothingLeft fails the test where a file has been left that came from Dragonfly.
func (h *host) requireNothingLeft() {
	h.t.Helper()
	entries, err := os.ReadDir(filepath.Join(h.dir, "dragonfly"))
	if err != nil || len(entries) > 0 {
		h.t.Errorf("there is left: %v, %v", entries, err)
	}
}

func (h *host) blobPath(d digest.Digest) string {
	return filepath.Join(h.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

func (h *host) stat(task p2p.Task, opts p2p.StatOptions) (p2p.Info, error) {
	return h.Stat(h.t.Context(), task.Tag, digest.FromDigest(task.Digest), opts)
}

func (h *host) delete(task p2p.Task) (p2p.Deleted, error) {
	return h.Delete(h.t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.DeleteOptions{})
}

// fetch opens a task's blob, wherever it is, and returns its content.
func (h *host) fetch(ctx context.Context, task p2p.Task) ([]byte, error) {
	return enginetest.Fetch(ctx, h, task)
}

func (h *host) requireFetched(task p2p.Task, want []byte) {
	h.t.Helper()
	got, err := h.fetch(h.t.Context(), task)
	if err != nil {
		h.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		h.t.Fatalf("%s: the content is not what was imported", task)
	}
}

func (h *host) requireMissing(task p2p.Task) {
	h.t.Helper()
	if _, err := h.stat(task, p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
		h.t.Errorf("%s is here: %v", task, err)
	}
	if _, err := os.Stat(h.blobPath(task.Digest)); !errors.Is(err, fs.ErrNotExist) {
		h.t.Errorf("%s has a file: %v", task, err)
	}
	h.requireNothingLeft()
}

// requireOwnFile fails the test unless the blob's file is this store's alone.
func (h *host) requireOwnFile(task p2p.Task) {
	h.t.Helper()
	info, err := os.Stat(h.blobPath(task.Digest))
	if err != nil {
		h.t.Fatal(err)
	}
	if n := info.Sys().(*syscall.Stat_t).Nlink; n != 1 {
		h.t.Errorf("the file of %s has %d links", task, n)
	}
	for _, name := range h.upstream.Files() {
		cached, err := os.Stat(name)
		if err != nil {
			h.t.Fatal(err)
		}
		if os.SameFile(info, cached) {
			h.t.Errorf("the file of %s is Dragonfly's own", task)
		}
	}
}

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		cluster := new(dragonflytest.Cluster)
		cluster.Start(t) // there is another host, which has nothing
		h := &host{t: t, upstream: cluster.Start(t), dir: t.TempDir()}
		h.open(dragonfly.Options{})
		t.Cleanup(h.requireNothingLeft)
		return h.Engine
	})
}

// What is imported on one host is exported on another, by Dragonfly's daemons.
func TestTwoHosts(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	for i, size := range []int{0, 1, 1000, p2p.MaxManifest, p2p.MaxManifest + 1, 9 << 20} {
		data := enginetest.Content(size, uint64(i))
		for _, tag := range []string{"", "models/large"} {
			task := enginetest.Import(t, a, tag, data)
			b.upstream.Calls("StatTask") // those before
			b.upstream.Calls("ExportTask")
			if _, err := b.stat(task, p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
				t.Fatalf("before: %v", err)
			}
			if _, err := b.Open(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
				t.Fatalf("before: %v", err)
			}
			if n := b.upstream.Calls("StatTask") + b.upstream.Calls("ExportTask"); n > 0 {
				t.Errorf("%d calls of Dragonfly for what is to be here", n)
			}
			b.requireFetched(task, data)
			a.requireOwnFile(task)
			b.requireOwnFile(task)
			enginetest.RequireContent(t, b, task, data)
			want := 1
			if tag != "" {
				want = 0 // its bytes are here
			}
			if n := b.upstream.Calls("ExportTask"); n != want {
				t.Errorf("%d exports under tag %q, want %d", n, tag, want)
			}
		}
		sha512 := p2p.Task{Tag: "t", Digest: digest.SHA512.FromBytes(data)}
		importAs(t, a, sha512, data)
		info, err := b.stat(sha512, p2p.StatOptions{}) // which fetches it
		if err != nil || info.Size != int64(size) || !info.Local() || info.Remote {
			t.Errorf("stat: %+v, %v", info, err)
		}
		b.requireOwnFile(sha512)
	}
	b.requireNothingLeft()
}

func importAs(t *testing.T, e p2p.Engine, task p2p.Task, data []byte) {
	t.Helper()
	if err := tryImport(t.Context(), e, task, data); err != nil {
		t.Fatal(err)
	}
}

func tryImport(ctx context.Context, e p2p.Engine, task p2p.Task, data []byte) error {
	in, err := e.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{Want: task.Digest}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}})
}

// What Dragonfly gives that is something else is stored nowhere.
func TestWrongContent(t *testing.T) {
	for name, size := range map[string]int{"small": 1000, "large": 5 << 20} {
		t.Run(name, func(t *testing.T) {
			cluster := new(dragonflytest.Cluster)
			a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
			task := enginetest.Import(t, a, "t", enginetest.Content(size, 1))
			b.upstream.Lie()
			wrong := digest.SHA256.FromString("not what was imported").String()
			_, err := b.Open(t.Context(), task, p2p.Network)
			enginetest.RequireError(t, "open", err, digest.ErrMismatch, task.Digest.String(), wrong, "delete it there")
			b.requireMissing(task)
			_, err = b.stat(task, p2p.StatOptions{})
			enginetest.RequireError(t, "stat", err, digest.ErrMismatch, task.Digest.String(), wrong)
			b.requireMissing(task)
		})
	}
}

// A name of Dragonfly's that two of its tasks share is never that of two of ours.
func TestCollision(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	r := func(tag string) *blobstore.Repository {
		r, err := blobstore.New(h).Repository(tag)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, c := range []struct{ cid, tag, content string }{
		{"a", "bc", "one"}, {"ab", "c", "two"}, {"abc", "", "three"}} {
		if _, err := r(c.tag).Import(t.Context(), c.cid, strings.NewReader(c.content),
			blobstore.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ cid, tag, content string }{
		{"a", "bc", "one"}, {"ab", "c", "two"}, {"abc", "", "three"}} {
		var out bytes.Buffer
		if _, err := r(c.tag).Export(t.Context(), c.cid, &out, blobstore.ExportOptions{}); err != nil ||
			out.String() != c.content {
			t.Errorf("%s under %q is %q, %v; want %q", c.cid, c.tag, out.String(), err, c.content)
		}
	}
	// A manifest, a config and a file each.
	keys := h.upstream.Tasks()
	if len(keys) != 9 {
		t.Errorf("Dragonfly has %d tasks, want 9", len(keys))
	}
	for _, key := range keys {
		if tag, ok := strings.CutPrefix(key, "d7y:/sha256%3A"); !ok || len(tag) < 64 ||
			!slices.Contains([]string{"", "c", "bc"}, tag[64:]) {
			t.Errorf("Dragonfly has %q; want a full digest and a tag", key)
		}
	}
}

// Nobody waits for Dragonfly longer than the engine is told to.
func TestHang(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const short = 500 * time.Millisecond
	cluster := new(dragonflytest.Cluster)
	a := newHost(t, cluster, dragonfly.Options{})
	b := newHost(t, cluster, dragonfly.Options{LookupTimeout: short, Timeout: time.Hour})
	task := enginetest.Import(t, a, "t", []byte("data"))
	b.upstream.LoseScheduler()
	_, err := b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open", err, p2p.ErrUnreachable, b.upstream.Socket, "no answer within 500ms")
	_, err = b.stat(task, p2p.StatOptions{})
	enginetest.RequireError(t, "stat", err, p2p.ErrUnreachable, b.upstream.Socket)
	b.requireMissing(task)

	// What needs no scheduler works.
	other := enginetest.Import(t, b, "t", []byte("other"))
	info, err := b.stat(other, p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 1, Some: 1, Whole: 1}) {
		t.Errorf("stat: %+v, %v", info.Providers, err)
	}
	if deleted, err := b.delete(other); err != nil || deleted.Tasks != 1 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, "is not known") {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
}

// An export and an import are bounded, too.
func TestSlow(t *testing.T) {
	const short = 50 * time.Millisecond
	cluster := new(dragonflytest.Cluster)
	a := newHost(t, cluster, dragonfly.Options{})
	b := newHost(t, cluster, dragonfly.Options{Timeout: short})
	task := enginetest.Import(t, a, "t", []byte("data"))
	b.upstream.OnCall(func(ctx context.Context, call string) error {
		if call == "ExportTask" || call == "ImportTask" {
			<-ctx.Done()
		}
		return ctx.Err()
	})
	_, err := b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open", err, p2p.ErrUnreachable, "export", "no answer within 50ms")
	if got := b.upstream.Timeout(); got != short {
		t.Errorf("Dragonfly is told of a timeout of %s, want %s", got, short)
	}
	b.requireMissing(task)
	enginetest.RequireError(t, "import", tryImport(t.Context(), b, task, []byte("data")), p2p.ErrUnavailable,
		"stored on this host", "import", "no answer within 50ms")
}

// Dragonfly tells the size of nothing: what there is no room for is not copied, at least, and it is
// told so where Dragonfly itself has none.
func TestRoom(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a := newHost(t, cluster, dragonfly.Options{})
	b := &host{t: t, upstream: cluster.Start(t), dir: t.TempDir(), maxSize: 4 << 20}
	b.open(dragonfly.Options{})
	defer b.Close()
	task := enginetest.Import(t, a, "t", enginetest.Content(5<<20, 1))
	_, err := b.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrNoSpace, "of 5242880 bytes")
	b.requireMissing(task)
	b.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "ExportTask" {
			return status.Error(codes.Unknown, "[4000]write /var/lib/dragonfly/x: no space left on device")
		}
		return nil
	})
	_, err = b.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrNoSpace, "Dragonfly's dfdaemon at", "/var/lib/dragonfly/x")
}

// A Dragonfly in a container, which sees other files under the same path, is told of.
func TestOtherPaths(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	task := enginetest.Import(t, a, "t", []byte("data"))
	b.upstream.Contain()
	_, err := b.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open", err, p2p.ErrUnavailable, "under the same path")
	b.requireMissing(task)
}

// What Dragonfly has already it is told of again: it tells its scheduler then.
func TestImportAgain(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	for range 2 {
		enginetest.Import(t, h, "t", []byte("data"))
		if n := h.upstream.Calls("ImportTask"); n != 1 {
			t.Errorf("%d imports by Dragonfly, want 1", n)
		}
	}
}

// Of one import Dragonfly gets each blob once, whatever refers to it.
func TestHandInOnce(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	r, err := blobstore.New(h).Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Import(t.Context(), "v1", strings.NewReader("data"), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := h.upstream.Calls("ImportTask"); n != 3 {
		t.Errorf("%d imports by Dragonfly, want those of a manifest, a config and a file", n)
	}
}

// What else Dragonfly has to say is told in its words, and is not taken for an answer.
func TestOtherErrors(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	task := enginetest.Import(t, h, "t", []byte("data"))
	h.upstream.OnCall(func(context.Context, string) error {
		return status.Error(codes.Unknown, "[5000]scheduler error")
	})
	info, err := h.stat(task, p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 1, Silent: 1}) {
		t.Errorf("stat: %+v, %v", info.Providers, err)
	}
	_, err = h.fetch(t.Context(), p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")})
	if err == nil || errors.Is(err, p2p.ErrNotFound) || !errors.Is(err, p2p.ErrUnreachable) ||
		!strings.Contains(err.Error(), "[5000]scheduler error") {
		t.Errorf("fetch: %v", err)
	}
	deleted, err := h.delete(task)
	if err != nil || len(deleted.Missed) != 1 || !strings.Contains(deleted.Missed[0].Reason, "[5000]scheduler error") {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
}

// The end of a caller's context ends its wait, and is what it is told.
func TestCallerGivesUp(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	data := []byte("data")
	task := enginetest.Import(t, a, "t", data)
	began, ended := make(chan struct{}, 10), make(chan struct{}, 10)
	b.upstream.OnCall(func(ctx context.Context, call string) error {
		if call != "ExportTask" {
			return nil
		}
		began <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return ctx.Err()
	})
	// Of two that wait, one goes, then the other.
	gone := errors.New("gone")
	var cancels []context.CancelCauseFunc
	results := make([]chan error, 2)
	for i := range results {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancels, results[i] = append(cancels, cancel), make(chan error, 1)
		go func() {
			_, err := b.fetch(ctx, task)
			results[i] <- err
		}()
	}
	<-began
	cancels[0](gone)
	enginetest.RequireError(t, "the first", <-results[0], gone)
	cancels[1](gone)
	enginetest.RequireError(t, "the second", <-results[1], gone)
	<-ended // the last one who goes takes the fetch with him
	b.upstream.OnCall(nil)
	b.requireFetched(task, data)
}

// However many want a blob, it is fetched once.
func TestOneFetch(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	data := enginetest.Content(1<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	enginetest.Import(t, a, "u", data)
	const callers = 16
	release := make(chan struct{})
	var under, most atomic.Int32
	b.upstream.OnCall(func(ctx context.Context, call string) error {
		if call == "ExportTask" {
			most.Store(max(most.Load(), under.Add(1)))
			<-release
			under.Add(-1)
		}
		return nil
	})
	var all sync.WaitGroup
	var started sync.WaitGroup
	for i := range callers {
		started.Add(1)
		all.Go(func() {
			task := task
			if i%2 == 0 {
				task.Tag = "u"
			}
			started.Done()
			if got, err := b.fetch(t.Context(), task); err != nil || !bytes.Equal(got, data) {
				t.Errorf("fetch: %d bytes, %v", len(got), err)
			}
		})
	}
	started.Wait()
	close(release)
	all.Wait()
	if n, m := b.upstream.Calls("ExportTask"), most.Load(); n != 1 || m != 1 {
		t.Errorf("%d exports for two tags, %d at once; want 1", n, m)
	}
}

// Damage is mended by what Dragonfly has.
func TestMend(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	h := newHost(t, cluster, dragonfly.Options{})
	for name, damage := range map[string]func(path string) error{
		"flipped": func(path string) error {
			return errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, []byte("dat?"), 0o600))
		},
		"short":   func(path string) error { return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 1)) },
		"missing": os.Remove,
	} {
		data := []byte("data")
		task := enginetest.Import(t, h, "t", data)
		if err := damage(h.blobPath(task.Digest)); err != nil {
			t.Fatal(err)
		}
		r, err := blobstore.New(h).Repository("t")
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if _, err := r.Export(t.Context(), task.Digest.String(), &out, blobstore.ExportOptions{}); err != nil ||
			out.String() != "data" {
			t.Errorf("%s: export gives %q, %v", name, out.String(), err)
		}
		enginetest.RequireContent(t, h, task, data)
		h.requireOwnFile(task)

		// Where Dragonfly has it no more, the damage is what is told.
		h.upstream.Forget()
		if err := damage(h.blobPath(task.Digest)); err != nil {
			t.Fatal(err)
		}
		_, err = r.Export(t.Context(), task.Digest.String(), io.Discard, blobstore.ExportOptions{})
		enginetest.RequireError(t, name, err, digest.ErrCorrupt)
		if _, err := h.delete(task); err != nil {
			t.Fatal(err)
		}
	}
	err := h.Mend(t.Context(), p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")})
	enginetest.RequireError(t, "mend what is not here", err, p2p.ErrNotFound)
}

// Delete is Dragonfly's, too, on this host, and says what that does not reach.
func TestDelete(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	data := []byte("data")
	task := enginetest.Import(t, a, "t", data)
	deleted, err := a.delete(task)
	if err != nil || deleted.Tasks != 1 || deleted.Reached != 0 || len(deleted.Missed) != 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	if keys := a.upstream.Tasks(); len(keys) > 0 {
		t.Errorf("Dragonfly has %v still", keys)
	}
	_, err = a.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch what is deleted", err, p2p.ErrNotFound)
	_, err = a.delete(task)
	enginetest.RequireError(t, "delete again", err, p2p.ErrNotFound)

	// Another host keeps it, and the result says so.
	enginetest.Import(t, a, "t", data)
	b.requireFetched(task, data)
	deleted, err = a.delete(task)
	if err != nil || deleted.Tasks != 1 || deleted.Reached != 0 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, "hosts that have it still, and keep it") {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	enginetest.RequireContent(t, b, task, data)

	// A name goes with what only it held, and all of that is deleted there.
	r, err := blobstore.New(b).Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.delete(task); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Import(t.Context(), "v1", strings.NewReader("file"), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if keys := b.upstream.Tasks(); len(keys) != 3 {
		t.Errorf("Dragonfly has %q, want three tasks", keys)
	}
	if _, err := r.Remove(t.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if keys := b.upstream.Tasks(); len(keys) > 0 {
		t.Errorf("Dragonfly has %q still", keys)
	}

	// What a delete could not do is said, and can be made up for.
	enginetest.Import(t, a, "t", data)
	a.upstream.Kill()
	deleted, err = a.delete(task)
	if err != nil || deleted.Tasks != 1 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, task.Digest.String()) {
		t.Errorf("delete without Dragonfly: %+v, %v", deleted, err)
	}
	restart(t, a)
	if _, err := a.delete(task); err != nil {
		t.Errorf("delete what only Dragonfly has: %v", err)
	}
	if keys := a.upstream.Tasks(); len(keys) > 0 {
		t.Errorf("Dragonfly has %q still", keys)
	}
}

// restart has a host's Dragonfly answer again.
func restart(t *testing.T, h *host) {
	t.Helper()
	if err := os.Remove(h.upstream.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	h.upstream.Run()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for h.Health(ctx) != nil {
		<-tick.C
	}
}

// Names are of one host.
func TestNames(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	ra, err := blobstore.New(a).Repository("models")
	if err != nil {
		t.Fatal(err)
	}
	f, err := ra.Import(t.Context(), "v1", strings.NewReader("file"), blobstore.ImportOptions{Title: "model.bin"})
	if err != nil {
		t.Fatal(err)
	}
	rb, err := blobstore.New(b).Repository("models")
	if err != nil {
		t.Fatal(err)
	}
	_, err = rb.Stat(t.Context(), "v1", blobstore.Lookup{})
	enginetest.RequireError(t, "stat of a name", err, p2p.ErrNotFound, "Dragonfly knows no names", "the digest")
	// The digest of its manifest leads to all of it.
	m, err := rb.Manifest(t.Context(), f.Manifest.String())
	if err != nil || m.Digest != f.Manifest || !bytes.Contains(m.Content, []byte("model.bin")) {
		t.Errorf("manifest: %+v, %v", m, err)
	}
	var out bytes.Buffer
	if _, err := rb.Export(t.Context(), f.Digest.String(), &out, blobstore.ExportOptions{}); err != nil ||
		out.String() != "file" {
		t.Errorf("export: %q, %v", out.String(), err)
	}
	_, err = p2p.Replicate(t.Context(), b, "models", digest.FromDigest(f.Digest), 1)
	enginetest.RequireError(t, "replicate", err, p2p.ErrUnreachable, "unsupported operation by Dragonfly",
		"export it on")
}

// Without Dragonfly what is here is here, and errors say what is wrong.
func TestNoDragonfly(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	data := []byte("data")
	a.upstream.Kill()
	enginetest.RequireError(t, "health", a.Health(t.Context()), p2p.ErrUnavailable, a.upstream.Socket)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	err := tryImport(t.Context(), a, task, data)
	enginetest.RequireError(t, "import", err, p2p.ErrUnavailable, a.upstream.Socket, "it is stored on this host",
		"import it again")
	enginetest.RequireContent(t, a, task, data)
	info, err := a.stat(task, p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 1, Silent: 1}) {
		t.Errorf("stat: %+v, %v", info.Providers, err)
	}
	absent := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")}
	_, err = a.Open(t.Context(), absent, p2p.Network)
	enginetest.RequireError(t, "open", err, p2p.ErrUnreachable, a.upstream.Socket, "unavailable: dial unix")
	_, err = a.stat(absent, p2p.StatOptions{Scope: p2p.Local})
	enginetest.RequireError(t, "stat here", err, p2p.ErrNotFound)

	// The next import makes up for it.
	restart(t, a)
	importAs(t, a, task, data)
	b.requireFetched(task, data)
}

// Dragonfly ends in the middle of a call.
func TestKilled(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	task := enginetest.Import(t, a, "t", []byte("data"))
	for call, want := range map[string]error{
		"StatTask": p2p.ErrUnreachable, "ExportTask": p2p.ErrUnreachable, "ImportTask": p2p.ErrUnavailable} {
		began := make(chan struct{}, 1)
		b.upstream.OnCall(func(ctx context.Context, c string) error {
			if c != call {
				return nil
			}
			began <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		})
		result := make(chan error, 1)
		go func() {
			if call == "ImportTask" {
				result <- tryImport(t.Context(), b, p2p.Task{Digest: digest.SHA256.FromString("new")}, []byte("new"))
				return
			}
			_, err := b.fetch(t.Context(), task)
			result <- err
		}()
		<-began
		b.upstream.Kill()
		enginetest.RequireError(t, call, <-result, want, b.upstream.Socket, "see that it runs")
		b.requireMissing(task)
		b.upstream.OnCall(nil)
		restart(t, b)
	}
}

// What an earlier process has left is removed, and Dragonfly's file is not.
func TestLeftovers(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	enginetest.Import(t, h, "t", []byte("data"))
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(h.dir, "dragonfly", "1234")
	if err := errors.Join(os.Mkdir(left, 0o700),
		os.Link(h.upstream.Files()[0], filepath.Join(left, "content"))); err != nil {
		t.Fatal(err)
	}
	h.open(dragonfly.Options{})
	h.requireNothingLeft()
	if info, err := os.Stat(filepath.Join(h.dir, "dragonfly")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v, %v", info.Mode(), err)
	}
	if content, err := os.ReadFile(h.upstream.Files()[0]); err != nil || string(content) != "data" {
		t.Errorf("Dragonfly's file is %q, %v", content, err)
	}
}

// What Dragonfly gets is verified before: damage does not spread.
func TestDamageIsNotHandedIn(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	task := enginetest.Import(t, h, "t", []byte("data"))
	path := h.blobPath(task.Digest)
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, []byte("dat?"), 0o600)); err != nil {
		t.Fatal(err)
	}
	in, err := h.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	err = in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "other", Digest: task.Digest}}}})
	enginetest.RequireError(t, "commit of a damaged blob under another tag", err, digest.ErrCorrupt)
	if keys := h.upstream.Tasks(); len(keys) != 1 {
		t.Errorf("Dragonfly has %q", keys)
	}
}

// With the storage strategy "advance", Dragonfly keeps what it fetches where it writes
// it: it loses nothing when we have taken that, and other hosts get it from there.
func TestAdvance(t *testing.T) {
	var cluster dragonflytest.Cluster
	a, b, c := newHost(t, &cluster, dragonfly.Options{}), newHost(t, &cluster, dragonfly.Options{}), newHost(
		t, &cluster, dragonfly.Options{})
	b.upstream.Advance()
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	b.requireFetched(task, data)
	a.upstream.Forget()
	c.requireFetched(task, data)

	// What is not what was asked for is not kept there either.
	other := enginetest.Import(t, a, "u", []byte("other"))
	b.upstream.Lie()
	if _, err := b.fetch(t.Context(), other); !errors.Is(err, digest.ErrMismatch) {
		t.Fatalf("fetch of %s: %v", other, err)
	}
	if key := "d7y:/" + url.QueryEscape(other.Digest.String()) + "u"; slices.Contains(b.upstream.Tasks(), key) {
		t.Errorf("Dragonfly believes that it has %s", key)
	}
	b.requireMissing(other)
}

// Of a task that Dragonfly has several times, nothing is left after a delete.
func TestDeleteCopies(t *testing.T) {
	var cluster dragonflytest.Cluster
	h := newHost(t, &cluster, dragonfly.Options{})
	task := enginetest.Import(t, h, "t", []byte("data"))
	h.upstream.Copy(h.upstream.Tasks()[0], 2)
	if deleted, err := h.delete(task); err != nil || len(deleted.Missed) > 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	if left := h.upstream.Tasks(); len(left) > 0 {
		t.Errorf("Dragonfly has %v still", left)
	}
}

// Dragonfly takes a file without its scheduler, and then no other host finds it: that is said.
func TestImportWithoutScheduler(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{LookupTimeout: 200 * time.Millisecond})
	var said []string
	ctx := p2p.WithNotice(t.Context(), func(text string) { said = append(said, text) })
	importOne := func(content string) {
		t.Helper()
		task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString(content)}
		if err := tryImport(ctx, h, task, []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	importOne("one")
	if len(said) > 0 {
		t.Errorf("with the scheduler it is said: %q", said)
	}
	h.upstream.LoseScheduler()
	importOne("two")
	if len(said) != 1 || !strings.Contains(said[0], "can't find it until its scheduler answers") {
		t.Errorf("without the scheduler it is said: %q", said)
	}
}

// What is deleted while it is handed in is not in Dragonfly afterwards.
func TestDeleteWhileHandedIn(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
	data := []byte("data")
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	h.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "ImportTask" {
			if _, err := h.delete(task); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	enginetest.Import(t, h, task.Tag, data)
	if left := h.upstream.Tasks(); len(left) > 0 {
		t.Errorf("Dragonfly has %v still", left)
	}
	h.requireMissing(task)
}

// What Dragonfly gives that is something else does not stay in the Dragonfly of this host, as one more
// that has it: when the right one is there, the next fetch gets that.
func TestWrongCopyGoes(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	data := enginetest.Content(1000, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	liar := cluster.Start(t)
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	url, meta := "d7y:/"+url.QueryEscape(task.Digest.String()), &commonv1.UrlMeta{Tag: task.Tag}
	if _, err := liar.ImportTask(t.Context(), &dfdaemonv1.ImportTaskRequest{
		Url: url, UrlMeta: meta, Path: wrong}); err != nil {
		t.Fatal(err)
	}
	a := newHost(t, cluster, dragonfly.Options{})
	_, err := a.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, digest.ErrMismatch)
	if left := a.upstream.Tasks(); len(left) > 0 {
		t.Errorf("the Dragonfly of this host has %q", left)
	}
	if _, err := liar.DeleteTask(t.Context(), &dfdaemonv1.DeleteTaskRequest{Url: url, UrlMeta: meta}); err != nil {
		t.Fatal(err)
	}
	importAs(t, newHost(t, cluster, dragonfly.Options{}), task, data)
	a.requireFetched(task, data)
}

// What Dragonfly has lost while it was away is handed in when it is back, not with the next sweep.
func TestAbsence(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{SweepInterval: time.Hour})
	enginetest.Import(t, h, "t", []byte("data"))
	for range 2 {
		imported := make(chan struct{}, 1)
		h.upstream.OnCall(func(_ context.Context, call string) error {
			if call == "ImportTask" {
				select {
				case imported <- struct{}{}:
				default:
				}
			}
			return nil
		})
		h.upstream.Kill()
		h.upstream.Forget()
		for failed := 0; failed < 2; { // the connection is lost, and can't be made again
			if h.Health(t.Context()) != nil {
				failed++
			}
		}
		restart(t, h)
		select {
		case <-imported:
		case <-time.After(30 * time.Second):
			t.Fatal("Dragonfly does not get again what it has lost")
		}
	}
}

// What Dragonfly drops is handed in again, and it is told again of what it has, for its
// scheduler. What it drops once more it has no room for.
func TestSweep(t *testing.T) {
	h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{SweepInterval: 10 * time.Millisecond})
	task := enginetest.Import(t, h, "t", []byte("data"))
	called := make(chan struct{}, 1)
	var drop atomic.Bool
	h.upstream.OnCall(func(_ context.Context, call string) error {
		if call == "StatTask" && drop.Swap(false) { // not when it has just been told that it has it
			h.upstream.Forget()
		}
		select {
		case called <- struct{}{}:
		default:
		}
		return nil
	})
	await := func(what string, ok func() bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		for !ok() {
			select {
			case <-called:
			case <-ctx.Done():
				t.Fatal(what)
			}
		}
	}
	for range 3 {
		h.upstream.Calls("ImportTask")
		await("Dragonfly is not told again", func() bool { return h.upstream.Calls("ImportTask") > 0 })
	}
	drop.Store(true)
	await("Dragonfly does not get again what it has dropped", func() bool {
		return !drop.Load() && len(h.upstream.Tasks()) == 1
	})
	drop.Store(true)
	stats := 0
	await("Dragonfly is not asked again", func() bool {
		n := h.upstream.Calls("StatTask")
		if !drop.Load() {
			stats += n
		}
		return stats > 6 // of which some may be those before
	})
	if got := h.upstream.Tasks(); len(got) > 0 {
		t.Errorf("Dragonfly gets %q at once whenever it has dropped it", got)
	}
	if deleted, err := h.delete(task); err != nil || len(deleted.Missed) > 0 {
		t.Fatalf("delete: %+v, %v", deleted, err)
	}
	if left := h.upstream.Tasks(); len(left) > 0 {
		await("what was deleted is handed in", func() bool { return len(h.upstream.Tasks()) == 0 })
	}
}

// Closing ends what waits for Dragonfly.
func TestClose(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	task := enginetest.Import(t, a, "t", []byte("data"))
	began := make(chan struct{}, 1)
	b.upstream.OnCall(func(ctx context.Context, call string) error {
		began <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	result := make(chan error, 1)
	go func() {
		_, err := b.Open(t.Context(), task, p2p.Network)
		result <- err
	}()
	<-began
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireError(t, "open", <-result, p2p.ErrClosed)
}
