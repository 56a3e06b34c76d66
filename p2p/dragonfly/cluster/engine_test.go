package cluster_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"stathat.com/c/consistent"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/cluster"
	"github.com/dfcache/dfcache/p2p/dragonfly/cluster/clustertest"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a host with an engine on it.
type host struct {
	*front.Engine
	source  *cluster.Source
	t       *testing.T
	dir     string // of the store
	maxSize int64  // of the store; 0 is no limit
}

// newHost starts a host of a cluster. It ends with the test.
func newHost(t *testing.T, opts cluster.Options, schedulers ...*clustertest.Scheduler) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir()}
	h.open(opts, schedulers...)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		h.requireNothingLeft()
	})
	return h
}

func (h *host) open(opts cluster.Options, schedulers ...*clustertest.Scheduler) {
	h.t.Helper()
	store, err := pieces.Open(h.dir, pieces.Options{MaxSize: h.maxSize})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, s := range schedulers {
		opts.Schedulers = append(opts.Schedulers, s.Addr)
	}
	opts.PeerListen = cmp.Or(opts.PeerListen, "127.0.0.1:0")
	opts.UploadListen, opts.Advertise = "127.0.0.1:0", "127.0.0.1"
	h.Engine = front.New(store, opts.Log)
	if h.source, err = cluster.New(h.Engine, opts); err != nil {
		h.t.Fatal(errors.Join(err, h.Engine.Close()))
	}
}

// requireNothingLeft fails the test where a file has been left that came from a peer.
func (h *host) requireNothingLeft() {
	h.t.Helper()
	entries, err := os.ReadDir(filepath.Join(h.dir, "dragonfly"))
	if err != nil || len(entries) > 0 {
		h.t.Errorf("there is left: %v, %v", entries, err)
	}
}

func (h *host) stat(task p2p.Task, opts p2p.StatOptions) (p2p.Info, error) {
	return h.Stat(h.t.Context(), task.Tag, digest.FromDigest(task.Digest), opts)
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
	enginetest.RequireContent(h.t, h, task, want)
}

func (h *host) requireMissing(task p2p.Task) {
	h.t.Helper()
	if _, err := h.stat(task, p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
		h.t.Errorf("%s is here: %v", task, err)
	}
	h.requireNothingLeft()
}

func idOf(task p2p.Task) string { return clustertest.TaskID(task.Digest.String(), task.Tag) }

// await waits until a scheduler knows that some peers have a task.
func await(t *testing.T, s *clustertest.Scheduler, task p2p.Task, peers int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Knows(idOf(task)) == peers }); err != nil {
		t.Fatalf("the scheduler knows of %d peers with %s, want %d", s.Knows(idOf(task)), task, peers)
	}
}

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		h := &host{t: t, dir: t.TempDir()}
		h.open(cluster.Options{}, clustertest.StartScheduler(t))
		t.Cleanup(h.requireNothingLeft)
		return h.Engine
	})
}

// What is asked of Dragonfly is what Dragonfly's dfcache asks for. The ID was computed by sha256sum.
func TestTaskID(t *testing.T) {
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromString("")}
	const want = "68de4424d2a957fffa89e629dd5a3596e3bfff26668a7225d3d3337656772724"
	if got := idOf(task); got != want {
		t.Errorf("the stand-in's ID is %s, want %s", got, want)
	}
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{}, s)
	if got := enginetest.Import(t, h, "models", nil); got != task {
		t.Fatal(got)
	}
	if n := s.Knows(want); n != 1 {
		t.Errorf("%d peers have %s, want 1", n, want)
	}
}

// sizes are of what is nothing, tiny, small, and of more than one piece.
var sizes = []int{0, 1, 128, 129, p2p.MaxManifest, p2p.MaxManifest + 1, 9 << 20, 24<<20 + 5}

// What is imported here, Dragonfly's daemons export, and the reverse.
func TestBothWays(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{LookupTimeout: time.Minute}, s)
	for i, size := range sizes {
		if testing.Short() && size > p2p.MaxManifest+1 {
			continue
		}
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			for j, tag := range []string{"", "models/large"} {
				if j > 0 && size > 16<<20 {
					break // once is long enough
				}
				peer := clustertest.StartPeer(t, s, fmt.Sprintf("peer-%d-%d", i, j), clustertest.Honest)
				data := enginetest.Content(size, uint64(2*i+1))
				task := enginetest.Import(t, h, tag, data)
				got, err := peer.Export(t.Context(), task.Digest.String(), tag)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("export by Dragonfly: %d bytes, %v", len(got), err)
				}

				data = enginetest.Content(size, uint64(2*i+2))
				task = p2p.Task{Tag: tag, Digest: digest.SHA512.FromBytes(data)}
				if err := peer.Import(t.Context(), task.Digest.String(), tag, data); err != nil {
					t.Fatal(err)
				}
				if j == 0 {
					h.requireMissing(task)
				}
				h.requireFetched(task, data)
				if n := s.Knows(idOf(task)); n != 2 { // it is told before the fetch ends
					t.Fatalf("the scheduler knows of %d peers with %s, want 2", n, task)
				}
			}
		})
	}
	for _, r := range s.Results() {
		if !r.GetSuccess() {
			t.Errorf("a download failed: %v", r)
		}
	}
}

// Two of our hosts find each other's files; a third gets them from either.
func TestTwoHosts(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	for i, size := range sizes {
		if testing.Short() && size > p2p.MaxManifest+1 {
			continue
		}
		data := enginetest.Content(size, uint64(i))
		task := enginetest.Import(t, a, "t", data)
		if _, err := b.Open(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
			t.Fatalf("before: %v", err)
		}
		info, err := b.stat(task, p2p.StatOptions{Providers: true})
		if err != nil || info.Size != int64(size) || info.Remote != (size > p2p.MaxManifest) ||
			*info.Providers != (p2p.Providers{Asked: 1, Some: 1, Whole: 1}) {
			t.Errorf("stat: %+v, %v", info, err)
		}
		b.requireFetched(task, data)
		await(t, s, task, 2)
	}
	missing := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("nowhere")}
	_, err := b.Open(t.Context(), missing, p2p.Network)
	enginetest.RequireError(t, "open", err, p2p.ErrNotFound)
	_, err = b.stat(missing, p2p.StatOptions{})
	enginetest.RequireError(t, "stat", err, p2p.ErrNotFound)
	_, err = b.Stat(t.Context(), "t", mustCID(t, "name"), p2p.StatOptions{})
	enginetest.RequireError(t, "stat", err, p2p.ErrNotFound, "knows no names")
}

func mustCID(t *testing.T, s string) digest.CID {
	t.Helper()
	c, err := digest.ParseCID(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What was imported here under a name Dragonfly's dfcache exports by the name, as it was given there; until
// the name is deleted or another file's.
func TestNamesForDragonfly(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{SweepInterval: 20 * time.Millisecond}, s)
	peer := func() *clustertest.Peer { // one that has nothing
		return clustertest.StartPeer(t, s, fmt.Sprint(rand.Int64()), clustertest.Honest)
	}
	for i, text := range []string{"v1", "model:v1", strings.Repeat("long/", 100)} {
		for _, tag := range []string{"", "Team/Models"} {
			name, err := given.CID(text)
			if err != nil {
				t.Fatal(err)
			}
			repo, err := given.Tag(tag)
			if err != nil {
				t.Fatal(err)
			}
			r, err := blobstore.New(h).Repository(repo)
			if err != nil {
				t.Fatal(err)
			}
			id := clustertest.TaskID(text, tag)
			data := enginetest.Content([]int{100, 1000, 5 << 20}[i], uint64(len(tag)))
			opts := blobstore.ImportOptions{}
			if given.IsHashed(name) {
				opts.Annotations = map[string]string{given.Annotation: text}
			}
			if _, err := r.Import(t.Context(), name, bytes.NewReader(data), opts); err != nil {
				t.Fatal(err)
			}
			if got, err := peer().Export(t.Context(), text, tag); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("export of %q under %q by Dragonfly: %d bytes, %v", text, tag, len(got), err)
			}
			if _, err := r.Remove(t.Context(), name, blobstore.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			if n := s.Knows(id); n != 1 { // the peer
				t.Errorf("after the delete of %q the scheduler knows of %d peers with it, want 1", text, n)
			}
		}
	}

	// A digest goes with the names that lead to it, and a name from one file to another.
	r, err := blobstore.New(h).Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	one := enginetest.Content(5<<20, 1)
	f, err := r.Import(t.Context(), "moved", bytes.NewReader(one), blobstore.ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	two := enginetest.Content(5<<20, 2)
	if _, err := r.Import(t.Context(), "moved", bytes.NewReader(two), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := peer().Export(t.Context(), "moved", "t"); err != nil || !bytes.Equal(got, two) {
		t.Errorf("export of a name that was moved: %d bytes, %v", len(got), err)
	}
	if f, err = r.Stat(t.Context(), "moved", blobstore.Lookup{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(t.Context(), f.Manifest.String(), blobstore.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Knows(clustertest.TaskID("moved", "t")) == 1 }); err != nil {
		t.Error("a name that went with its digest is announced still")
	}
}

// An import of a name and the sweep of the store, which come upon the name at once, announce it as one peer:
// none of them has schedulers forget what the other one has told.
func TestNamesAreAnnouncedOnce(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{SweepInterval: time.Millisecond}, s)
	r, err := blobstore.New(h).Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	content := enginetest.Content(1000, 1)
	for i := range 100 {
		name := fmt.Sprint("name-", i)
		if _, err := r.Import(t.Context(), name, bytes.NewReader(content), blobstore.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
		if n := s.Knows(clustertest.TaskID(name, "t")); n != 1 {
			t.Errorf("after the import of %s the scheduler knows of %d peers with it, want 1", name, n)
		}
	}
	if n := s.Calls("LeaveTask"); n != 0 {
		t.Errorf("%d peers were taken back, and nothing was deleted", n)
	}
}

// Dragonfly takes cid and tag together, without a separator: of two names that are one to it, the first
// counts, and none of them takes the place of a digest.
func TestNamesThatMeet(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{}, s)
	one := strings.Repeat("one", 100) // more than a scheduler keeps itself
	for _, c := range []struct{ cid, tag, content string }{{"a", "bc", one}, {"ab", "c", strings.Repeat("two", 100)}} {
		r, err := blobstore.New(h).Repository(c.tag)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Import(t.Context(), c.cid, strings.NewReader(c.content),
			blobstore.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Honest)
	if got, err := peer.Export(t.Context(), "a", "bc"); err != nil || string(got) != one {
		t.Errorf("export by Dragonfly: %q, %v", got, err)
	}
	if n := s.Knows(clustertest.TaskID("ab", "c")); n != 2 {
		t.Errorf("the scheduler knows of %d peers, want this one, once, and the one that asked", n)
	}
}

// A peer that gives something else is found out, whatever its MD5s say, and another
// one is used where there is one.
func TestBadPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const stalled = "nothing came for"
	for _, size := range []int{1000, 5 << 20} {
		for name, c := range map[string]struct {
			behaviour clustertest.Behaviour
			want      error
			says      string
		}{
			"lie":       {clustertest.Lie, digest.ErrMismatch, "gave something else"},
			"long":      {clustertest.Long, nil, "more than the"},
			"chunked":   {clustertest.Chunked, nil, "more than the"},
			"drip":      {clustertest.Drip, p2p.ErrUnreachable, stalled},
			"stall":     {clustertest.Stall, p2p.ErrUnreachable, stalled},
			"mute":      {clustertest.Mute, p2p.ErrUnreachable, stalled},
			"bad sum":   {clustertest.BadSum, nil, "has the MD5"},
			"silent":    {clustertest.Silent, p2p.ErrUnreachable, stalled},
			"hostile":   {clustertest.Hostile, nil, "tells of a piece"},
			"elsewhere": {clustertest.Elsewhere, nil, "want an address of this peer"},
		} {
			t.Run(fmt.Sprintf("%s %d", name, size), func(t *testing.T) {
				s := clustertest.StartScheduler(t)
				var opts cluster.Options
				if c.says == stalled {
					opts.StallTimeout = 500 * time.Millisecond
				}
				h := newHost(t, opts, s)
				bad := clustertest.StartPeer(t, s, "bad", c.behaviour)
				data := enginetest.Content(size, 1)
				task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
				if err := bad.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				_, err := h.fetch(ctx, task)
				single := size == 1000 // of which the scheduler itself tells
				if single && (c.behaviour == clustertest.Silent || c.behaviour == clustertest.Elsewhere) {
					if err != nil { // what the peer does not tell was not asked
						t.Fatal(err)
					}
					return
				}
				if err == nil {
					t.Fatal("it was taken for good")
				}
				if single && c.behaviour == clustertest.Hostile {
					return // it is not asked at all
				}
				if c.want != nil {
					enginetest.RequireError(t, "fetch", err, c.want)
				}
				if !strings.Contains(err.Error(), c.says) {
					t.Errorf("the error %q does not say %q", err, c.says)
				}
				// the task, what was wanted, what came
				if c.behaviour == clustertest.Lie && strings.Count(err.Error(), "sha256:") < 3 {
					t.Errorf("the error %q does not name both digests", err)
				}
				h.requireMissing(task)
				if failed := s.Failed(); !slices.Contains(failed, bad.ID) {
					t.Errorf("the scheduler was told that %v failed, want %s", failed, bad.ID)
				}
				if results := s.Results(); len(results) != 1 || results[0].GetSuccess() {
					t.Errorf("the scheduler was told %v; want one failure", results)
				}

				good := clustertest.StartPeer(t, s, "good", clustertest.Honest)
				if err := good.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
					t.Fatal(err)
				}
				asked := bad.Served()
				h.requireFetched(task, data)
				if bad.Served() == asked && c.behaviour != clustertest.Silent && c.behaviour != clustertest.Hostile &&
					c.behaviour != clustertest.Elsewhere {
					t.Error("the bad one was not asked first: this test shows nothing")
				}
			})
		}
	}
}

// A peer that brings nothing, or next to nothing, is not waited for until it is given up:
// another one is asked beside it.
func TestBesideSlowPeer(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const stall = 6 * time.Second // half of it passes
	for _, size := range []int{1000, 9 << 20} {
		for name, behaviour := range map[string]clustertest.Behaviour{
			"drip": clustertest.Drip, "stall": clustertest.Stall, "mute": clustertest.Mute,
			"silent":                 clustertest.Silent,
			"drip of something else": clustertest.LieDrip,
			"trickle":                clustertest.Trickle, // which is slow, and is not given up
		} {
			t.Run(fmt.Sprintf("%s %d", name, size), func(t *testing.T) {
				t.Parallel()
				var mu sync.Mutex
				var log bytes.Buffer
				s := clustertest.StartScheduler(t)
				h := newHost(t, cluster.Options{
					StallTimeout: stall, Log: slog.New(slog.NewTextHandler(&lockedWriter{&mu, &log}, nil))}, s)
				bad, good := clustertest.StartPeer(t, s, "bad", behaviour), clustertest.StartPeer(
					t, s, "good", clustertest.Honest)
				data := enginetest.Content(size, 1)
				task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
				for _, p := range []*clustertest.Peer{bad, good} {
					if err := p.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
						t.Fatal(err)
					}
				}
				var first, second atomic.Bool
				bad.OnAsk(func() { first.Store(true) })
				good.OnAsk(func() {
					if second.Swap(true) {
						return
					}
					mu.Lock()
					defer mu.Unlock()
					if !first.Load() || strings.Contains(log.String(), "given up") {
						t.Errorf("the good peer was not asked beside the bad one:\n%s", log.String())
					}
				})
				if single := size == 1000; single && behaviour == clustertest.Silent {
					h.requireFetched(task, data) // what the peer does not tell is not asked
					return
				}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				if got, err := h.fetch(ctx, task); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				if single := size == 1000; !second.Load() && (!single || behaviour != clustertest.Trickle) {
					t.Error("the good peer was not asked")
				}
				mu.Lock()
				defer mu.Unlock()
				if behaviour == clustertest.LieDrip && strings.Contains(log.String(), "given up") {
					t.Errorf("the one that tells of something else was waited for once more:\n%s", log.String())
				}
				if strings.Contains(log.String(), "canceled") {
					t.Errorf("that another one gave a piece was held against a peer:\n%s", log.String())
				}
			})
		}
	}
}

// lockedWriter writes under a lock.
type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// What has come from a peer that was given up is not fetched again from the next one,
// unless that one says that it is something else.
func TestPiecesAreKept(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for first, c := range map[clustertest.Behaviour]struct {
		want  int
		stall time.Duration // long enough for what comes at once
	}{clustertest.StallLast: {1, 5 * time.Second}, clustertest.Lie: {3, time.Hour}} {
		s := clustertest.StartScheduler(t)
		h := newHost(t, cluster.Options{StallTimeout: c.stall}, s)
		data := enginetest.Content(9<<20, 1)
		task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
		bad, good := clustertest.StartPeer(t, s, "bad", first), clustertest.StartPeer(t, s, "good", clustertest.Honest)
		for _, p := range []*clustertest.Peer{bad, good} {
			if err := p.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
				t.Fatal(err)
			}
		}
		h.requireFetched(task, data)
		if bad.Served() != 3 || good.Served() != c.want {
			t.Errorf("%d and %d pieces were fetched, want 3 and %d", bad.Served(), good.Served(), c.want)
		}
	}
}

// What there is no room for is refused before any of it is fetched, whoever tells its size.
func TestRoom(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := &host{t: t, dir: t.TempDir(), maxSize: 4 << 20}
	h.open(cluster.Options{}, s)
	defer h.Close()
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Honest)
	data := enginetest.Content(5<<20, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	if err := peer.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
		t.Fatal(err)
	}
	for _, vague := range []bool{false, true} {
		if vague {
			s.TellNoLengths()
		}
		_, err := h.fetch(t.Context(), task)
		enginetest.RequireError(t, "fetch", err, p2p.ErrNoSpace)
		if peer.Served() > 0 {
			t.Errorf("%d pieces were asked for, want none", peer.Served())
		}
		h.requireMissing(task)
	}
}

// A scheduler goes on telling of the content that it was told of first, however long that was, and
// whoever has left since: only the digest decides.
func TestWrongLength(t *testing.T) {
	for _, wrong := range []int{0, 100, 1000, 9 << 20} {
		for _, right := range []int{0, 99, 999, 5 << 20} {
			for _, leaves := range []bool{true, false} {
				t.Run(fmt.Sprintf("%d for %d, leaves %t", wrong, right, leaves), func(t *testing.T) {
					s := clustertest.StartScheduler(t)
					liar := clustertest.StartPeer(t, s, "liar", clustertest.Honest)
					good := clustertest.StartPeer(t, s, "good", clustertest.Honest)
					data := enginetest.Content(right, 1)
					task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
					cid := task.Digest.String()
					if err := liar.Import(t.Context(), cid, "t", enginetest.Content(wrong, 2)); err != nil {
						t.Fatal(err)
					}
					if leaves {
						if err := liar.Delete(t.Context(), cid, "t"); err != nil {
							t.Fatal(err)
						}
					}
					if err := good.Import(t.Context(), cid, "t", data); err != nil {
						t.Fatal(err)
					}
					h := newHost(t, cluster.Options{}, s)
					h.requireFetched(task, data)
					if slices.Contains(s.Failed(), good.ID) {
						t.Errorf("the scheduler was told that %v failed: one of them is honest", s.Failed())
					}
				})
			}
		}
	}
}

// A peer that says that there is more than there is room for is not believed where others say less.
func TestWrongRoom(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := &host{t: t, dir: t.TempDir(), maxSize: 8 << 20}
	h.open(cluster.Options{}, s)
	defer h.Close()
	data := enginetest.Content(5<<20, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	for _, content := range [][]byte{enginetest.Content(9<<20, 1), data} { // the liar first
		peer := clustertest.StartPeer(t, s, fmt.Sprint(len(content)), clustertest.Honest)
		if err := peer.Import(t.Context(), task.Digest.String(), "t", content); err != nil {
			t.Fatal(err)
		}
	}
	h.requireFetched(task, data)
}

// However many want a blob, it is fetched once.
func TestOneFetch(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			if got, err := b.fetch(t.Context(), task); err != nil || !bytes.Equal(got, data) {
				t.Errorf("fetch: %d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	if n := s.Calls("RegisterPeerTask"); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
}

// A scheduler that sends something else for tiny content is found out, too.
func TestLyingScheduler(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	task := enginetest.Import(t, a, "t", []byte("tiny"))
	s.Lie([]byte("tinY!"))
	b.requireFetched(task, []byte("tiny"))
}

// Tasks that a scheduler has forgotten are announced again, and so is what was
// in the store before.
func TestForgotten(t *testing.T) {
	s := clustertest.StartScheduler(t)
	opts := cluster.Options{SweepInterval: 20 * time.Millisecond, AnnounceInterval: 20 * time.Millisecond}
	h := &host{t: t, dir: t.TempDir()}
	h.open(opts, s)
	var tasks []p2p.Task
	for i, size := range []int{0, 100, 5 << 20} {
		tasks = append(tasks, enginetest.Import(t, h, "t", enginetest.Content(size, uint64(i))))
	}
	known := func() {
		t.Helper()
		for _, task := range tasks {
			await(t, s, task, 1)
		}
	}
	known()
	s.Forget()
	known()
	s.Stop()
	tasks = append(tasks, enginetest.Import(t, h, "t", []byte("imported meanwhile")))
	s.Restart(t)
	known()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if s.Hosts() != 0 || s.Knows(idOf(tasks[0])) != 0 {
		t.Error("the host has not left")
	}
	h.open(opts, s)
	known()
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Honest)
	if _, err := peer.Export(t.Context(), tasks[2].Digest.String(), "t"); err != nil {
		t.Error(err)
	}
	n := s.Calls("AnnounceHost")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Calls("AnnounceHost") > n+2 }); err != nil {
		t.Error("the host is not announced again")
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a process has announced that could not take it back is taken back by the next.
func TestEarlierProcess(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := &host{t: t, dir: t.TempDir()}
	// What is late for so short a timeout is announced again.
	h.open(cluster.Options{LookupTimeout: 200 * time.Millisecond, SweepInterval: 20 * time.Millisecond}, s)
	task := enginetest.Import(t, h, "t", []byte("data"))
	await(t, s, task, 1)
	opts := cluster.Options{PeerListen: h.source.Address()}
	s.Hang("LeaveHost")
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	s.Hang()
	await(t, s, task, 1) // one that is no more
	h.open(opts, s)
	defer h.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Calls("LeaveHost") > 0 && s.Hosts() == 1 }); err != nil {
		t.Fatal(err)
	}
	other := enginetest.Import(t, h, "t", []byte("other"))
	await(t, s, task, 1)
	await(t, s, other, 1)
	if deleted, err := h.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil ||
		len(deleted.Missed) > 0 {
		t.Errorf("delete: %+v, %v; nobody else has it", deleted, err)
	}
}

// Schedulers forget a peer after a day, however often it is announced: so there is a
// new one before.
func TestPeerLifetime(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{SweepInterval: 20 * time.Millisecond, PeerLifetime: time.Nanosecond}, s)
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, h, "t", data)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Calls("LeaveTask") > 2 && s.Knows(idOf(task)) == 1 }); err != nil {
		t.Fatal("the task is not announced as of another peer")
	}
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Honest)
	if got, err := peer.Export(t.Context(), task.Digest.String(), "t"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("export by Dragonfly: %d bytes, %v", len(got), err)
	}
}

// Every task is announced to, and looked for at, the scheduler that Dragonfly's daemons
// would ask about it; one that is away is left out.
func TestPlacement(t *testing.T) {
	one, two := clustertest.StartScheduler(t), clustertest.StartScheduler(t)
	a := newHost(t, cluster.Options{SweepInterval: time.Hour, AnnounceInterval: 20 * time.Millisecond}, one, two)
	b := newHost(t, cluster.Options{SweepInterval: time.Hour, AnnounceInterval: time.Hour}, two, one)
	// Daemons of today, and older ones.
	rings := map[string]*consistent.Consistent{":127.0.0.1": consistent.New(), "127.0.0.1": consistent.New()}
	for suffix, ring := range rings {
		ring.Add(one.Addr + suffix)
		ring.Add(two.Addr + suffix)
	}
	var tasks []p2p.Task
	at := map[[2]int]int{}
	for i := range 40 {
		data := fmt.Appendf(nil, "file %d", i)
		task := enginetest.Import(t, a, "t", data)
		tasks = append(tasks, task)
		wants := map[*clustertest.Scheduler]int{one: 0, two: 0}
		for suffix, ring := range rings {
			where, err := ring.Get(idOf(task))
			if err != nil {
				t.Fatal(err)
			}
			if where == one.Addr+suffix {
				wants[one] = 1
			} else {
				wants[two] = 1
			}
		}
		at[[2]int{wants[one], wants[two]}]++
		for s, want := range wants {
			if got := s.Knows(idOf(task)); got != want {
				t.Fatalf("%s: the scheduler %s knows of %d peers, want %d", task, s.Addr, got, want)
			}
		}
		b.requireFetched(task, data)
	}
	if len(at) != 3 { // one, the other, both
		t.Fatalf("all tasks are at %v: this test shows nothing", at)
	}
	if one.Hosts() != 2 || two.Hosts() != 2 {
		t.Errorf("%d and %d hosts are announced, want 2 each", one.Hosts(), two.Hosts())
	}
	one.Stop()
	for _, task := range tasks {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := two.Await(ctx, func() bool { return two.Knows(idOf(task)) > 0 }); err != nil {
			t.Fatalf("%s did not move to the scheduler that is left", task)
		}
	}
}

// Nobody waits for a scheduler longer than the engine is told to.
func TestHang(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const short = 500 * time.Millisecond
	s := clustertest.StartScheduler(t)
	a := newHost(t, cluster.Options{}, s)
	b := newHost(t, cluster.Options{LookupTimeout: short, StallTimeout: short}, s)
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	for _, call := range []string{"StatTask", "RegisterPeerTask", "ReportPieceResult", "ReportPeerResult"} {
		s.Hang(call)
		_, err := b.fetch(t.Context(), task)
		if call == "ReportPeerResult" { // which is only a report
			if err != nil {
				t.Error(err)
			}
			continue
		}
		enginetest.RequireError(t, call, err, p2p.ErrUnreachable, s.Addr, "within 500ms")
		enginetest.RequireError(t, call, err, p2p.ErrUnavailable)
		b.requireMissing(task)
	}
	s.Hang("AnnounceTask", "StatTask", "LeaveTask", "LeaveHost", "AnnounceHost")
	other := enginetest.Import(t, b, "t", []byte("other"))
	enginetest.RequireError(t, "health", b.Health(t.Context()), p2p.ErrUnavailable)
	if deleted, err := b.Delete(t.Context(), "t", digest.FromDigest(other.Digest), p2p.DeleteOptions{}); err != nil ||
		deleted.Tasks != 1 || len(deleted.Missed) == 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	s.Hang()
	if err := b.Health(t.Context()); err != nil {
		t.Error(err)
	}
}

// A caller who gives up is told so, and takes the fetch with him; the whole of a
// fetch has an end, too.
func TestCallerGivesUp(t *testing.T) {
	s := clustertest.StartScheduler(t)
	bad := clustertest.StartPeer(t, s, "bad", clustertest.Stall)
	h := newHost(t, cluster.Options{Timeout: time.Hour, StallTimeout: time.Hour}, s)
	task := p2p.Task{Digest: digest.SHA256.FromString("data")}
	if err := bad.Import(t.Context(), task.Digest.String(), "", enginetest.Content(5<<20, 1)); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error)
	go func() {
		_, err := h.fetch(ctx, task)
		result <- err
	}()
	if err := s.Await(t.Context(), func() bool { return s.Calls("ReportPieceResult") > 0 }); err != nil {
		t.Fatal(err)
	}
	cancel(gone)
	enginetest.RequireError(t, "fetch", <-result, gone)
	if err := s.Await(t.Context(), func() bool { return len(s.Results()) == 1 }); err != nil {
		t.Fatal(err)
	}
	h = newHost(t, cluster.Options{Timeout: 200 * time.Millisecond}, s)
	_, err := h.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrUnreachable, "longer than 200ms")
}

// Whatever is waited for, a caller that gives up is let go, and nothing goes on without it.
func TestGiveUpAnywhere(t *testing.T) {
	gone := errors.New("gone")
	for step, behaviour := range map[string]clustertest.Behaviour{
		"StatTask": clustertest.Honest, "RegisterPeerTask": clustertest.Honest, "ReportPieceResult": clustertest.Honest,
		"AnnounceTask": clustertest.Honest,
		"pieces":       clustertest.Silent, "header": clustertest.Mute, "body": clustertest.Stall,
		"slow body": clustertest.Drip,
	} {
		t.Run(step, func(t *testing.T) {
			s := clustertest.StartScheduler(t)
			peer := clustertest.StartPeer(t, s, "peer", behaviour)
			data := enginetest.Content(5<<20, 1)
			task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
			if err := peer.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
				t.Fatal(err)
			}
			h := &host{t: t, dir: t.TempDir()}
			h.open(cluster.Options{Timeout: time.Hour, StallTimeout: time.Hour, LookupTimeout: time.Hour,
				SweepInterval: time.Hour}, s)
			reached := make(chan struct{})
			var once sync.Once
			note := func() { once.Do(func() { close(reached) }) }
			if behaviour == clustertest.Honest {
				s.Hang(step)
				s.Before(step, note)
			} else {
				peer.OnAsk(note)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			result := make(chan error)
			go func() {
				if step == "AnnounceTask" {
					result <- commit(ctx, h)
				} else {
					_, err := h.fetch(ctx, task)
					result <- err
				}
			}()
			<-reached
			cancel(gone)
			if err := within(t, result); step != "AnnounceTask" { // which is made up for later: the content is stored
				enginetest.RequireError(t, "fetch", err, gone)
			}
			if registered := step != "StatTask" && step != "RegisterPeerTask" && step != "AnnounceTask"; registered {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				if err := s.Await(ctx, func() bool { return len(s.Results()) == 1 }); err != nil {
					t.Error("the fetch goes on")
				}
			}
			closed := make(chan error)
			go func() { closed <- h.Close() }()
			if err := within(t, closed); err != nil {
				t.Error(err)
			}
			h.requireNothingLeft()
		})
	}
}

// within returns what comes, and fails the test where that takes long.
func within(t *testing.T, c <-chan error) error {
	t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
		return nil
	}
}

// commit imports something.
func commit(ctx context.Context, h *host) error {
	in, err := h.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(strings.NewReader("data"), p2p.AddOptions{}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{
		{Task: p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}, Keep: p2p.KeepPinned}}})
}

// What is imported while no scheduler answers is found by nobody yet: that is said, and is no failure.
func TestImportWithoutScheduler(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{LookupTimeout: 5 * time.Second}, s)
	var said []string
	ctx := p2p.WithNotice(t.Context(), func(text string) { said = append(said, text) })
	if err := commit(ctx, h); err != nil || len(said) > 0 {
		t.Errorf("with a scheduler: %v, and it is said: %q", err, said)
	}
	s.Stop()
	defer s.Restart(t)
	for i := range 2 { // the second time it is known to be away
		if err := commit(ctx, h); err != nil || len(said) != i+1 ||
			!strings.Contains(said[i], "can't find it until its scheduler answers") {
			t.Errorf("without a scheduler: %v, and it is said: %q", err, said)
		}
	}
}

// Bytes move no faster than they may, either way.
func TestRates(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const rate = 4 << 20
	for name, opts := range map[string][2]cluster.Options{
		"upload": {{UploadRate: rate}, {}}, "download": {{}, {DownloadRate: rate}}} {
		s := clustertest.StartScheduler(t)
		a, b := newHost(t, opts[0], s), newHost(t, opts[1], s)
		data := enginetest.Content(rate, 1)
		task := enginetest.Import(t, a, "t", data)
		began := time.Now()
		b.requireFetched(task, data)
		if took := time.Since(began); took < 800*time.Millisecond {
			t.Errorf("%s: %d bytes took %s at %d bytes a second", name, rate, took, rate)
		}
	}
}

// A rate at which little passes in the stall timeout is not taken for a peer that stalls.
func TestLowRate(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(
		t, cluster.Options{DownloadRate: 64 << 10, StallTimeout: 600 * time.Millisecond}, s)
	data := enginetest.Content(128<<10, 1)
	b.requireFetched(enginetest.Import(t, a, "t", data), data)
}

// What is deleted here is not asked of this host any more; what others keep is said.
func TestDelete(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	b.requireFetched(task, data)
	await(t, s, task, 2)
	id := digest.FromDigest(task.Digest)
	deleted, err := a.Delete(t.Context(), "t", id, p2p.DeleteOptions{})
	if err != nil || deleted.Tasks != 1 || deleted.Reached != 0 || len(deleted.Missed) != 1 ||
		!strings.Contains(deleted.Missed[0].Reason, "have it still") {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	await(t, s, task, 1)
	c := newHost(t, cluster.Options{}, s) // gets it from b, who has not imported it
	c.requireFetched(task, data)
	if deleted, err := c.Delete(t.Context(), "t", id, p2p.DeleteOptions{}); err != nil || len(deleted.Missed) != 1 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	if deleted, err = b.Delete(t.Context(), "t", id, p2p.DeleteOptions{}); err != nil || len(deleted.Missed) != 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	await(t, s, task, 0)
	_, err = a.Delete(t.Context(), "t", id, p2p.DeleteOptions{})
	enginetest.RequireError(t, "delete", err, p2p.ErrNotFound)
	// It can be imported again.
	enginetest.Import(t, a, "t", data)
	b.requireFetched(task, data)
	_, err = p2p.Replicate(t.Context(), a, "t", id, 1)
	enginetest.RequireError(t, "replicate", err, p2p.ErrUnreachable)
}

// What is deleted while it is announced is not announced afterwards.
func TestDeleteWhileAnnounced(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{SweepInterval: 20 * time.Millisecond}, s)
	task := enginetest.Import(t, h, "t", enginetest.Content(5<<20, 1))
	s.Before("AnnounceTask", func() {
		if _, err := h.Delete(context.WithoutCancel(t.Context()), "t", digest.FromDigest(task.Digest),
			p2p.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if n := s.Knows(idOf(task)); n != 0 {
			t.Errorf("the scheduler knows of %d peers after the delete, want none", n)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Await(ctx, func() bool { return s.Calls("LeaveTask") == 2 && s.Knows(idOf(task)) == 0 }); err != nil {
		t.Errorf("the scheduler knows of %d peers of a deleted task", s.Knows(idOf(task)))
	}
}

// Damage is not sent, and is mended by what others have.
func TestDamage(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	data := enginetest.Content(9<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	path := filepath.Join(a.dir, "blobs", task.Digest.Algorithm().String(), task.Digest.Encoded())
	damage := func() {
		t.Helper()
		wrong := bytes.Clone(data)
		wrong[5<<20] ^= 1
		if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, wrong, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	damage()
	_, err := b.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrUnreachable)
	b.requireMissing(task)
	if failed := s.Failed(); len(failed) == 0 {
		t.Error("nothing was reported")
	}
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Honest)
	if err := peer.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
		t.Fatal(err)
	}
	if err := a.Mend(t.Context(), task); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireContent(t, a, task, data)
	b.requireFetched(task, data)
}

// Peers are told at once how many pieces there are, then of each, and again of those
// that they ask for once more.
func TestSyncPieceTasks(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{}, s)
	task := enginetest.Import(t, h, "t", enginetest.Content(9<<20, 1))
	conn, err := grpc.NewClient("passthrough:///"+h.source.Address(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := dfdaemonv1.NewDaemonClient(conn).SyncPieceTasks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(start, limit uint32) {
		t.Helper()
		if err := stream.Send(&commonv1.PieceTaskRequest{
			TaskId: idOf(task), SrcPid: "me", DstPid: "x", StartNum: start, Limit: limit}); err != nil {
			t.Fatal(err)
		}
	}
	var sign string
	answer := func(want ...int32) {
		t.Helper()
		p, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var got []int32
		for _, piece := range p.GetPieceInfos() {
			got = append(got, piece.GetPieceNum())
		}
		if !slices.Equal(got, want) || p.GetTotalPiece() != 3 || p.GetContentLength() != 9<<20 {
			t.Errorf("pieces %d of %d in %d bytes, want %d of 3 in 9 MiB", got, p.GetTotalPiece(), p.GetContentLength(),
				want)
		}
		sign = p.GetPieceMd5Sign()
	}
	ask(0, 2)
	answer()
	answer(0, 1)
	answer(2)
	if sign == "" {
		t.Error("the last pieces come without the sum over all of them")
	}
	ask(1, 1)
	answer(1)
	ask(0, 0)
	answer(0, 1, 2)
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
}

// Dragonfly's daemons wait for two seconds for the header of an answer, and longer for
// the rest: it does not wait for a slot, nor for the rate.
func TestUploadHeader(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{UploadRate: 1 << 10, MaxUploads: 1}, s)
	id := idOf(enginetest.Import(t, h, "t", enginetest.Content(5<<20, 1)))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for range 3 {
		req, err := http.NewRequestWithContext(
			ctx, http.MethodGet, "http://"+h.source.UploadAddress()+"/download/"+id[:3]+"/"+id+"?peerId=x", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Range", "bytes=0-4194303")
		resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.ContentLength != 4<<20 {
			t.Errorf("%s, %d bytes", resp.Status, resp.ContentLength)
		}
	}
}

// A peer that asks and reads nothing gives its upload back.
func TestUploadStalls(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{MaxUploads: 1, StallTimeout: 300 * time.Millisecond}, s)
	id := idOf(enginetest.Import(t, h, "t", enginetest.Content(24<<20, 1))) // more than the system keeps
	ask := func(last int) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", h.source.UploadAddress())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "GET /download/%s/%s?peerId=x HTTP/1.1\r\nHost: x\r\nRange: bytes=0-%d\r\n\r\n",
			id[:3], id, last); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	stalled := ask(24<<20 - 1)
	if _, err := io.ReadFull(stalled, make([]byte, 1000)); err != nil { // it has begun
		t.Fatal(err)
	}
	if _, err := io.ReadFull(ask(1<<20-1), make([]byte, 1<<20)); err != nil {
		t.Errorf("the next peer gets nothing: %v", err)
	}
}

// Whoever opens connections without end gets the place of their own.
func TestManyConnections(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{StallTimeout: time.Hour}, s)
	for door, address := range map[string]string{"peers": h.source.Address(), "uploads": h.source.UploadAddress()} {
		var first net.Conn
		for i := range 513 {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if i == 0 {
				first = conn
			}
		}
		// one that says nothing goes after 10
		if err := first.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, first); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the oldest of 513 connections stays", door)
		}
	}
}

// A scheduler that has forgotten a download is asked again; not for ever.
func TestReregister(t *testing.T) {
	s := clustertest.StartScheduler(t)
	a, b := newHost(t, cluster.Options{}, s), newHost(t, cluster.Options{}, s)
	data := enginetest.Content(5<<20, 1)
	task := enginetest.Import(t, a, "t", data)
	s.Lose(3)
	_, err := b.fetch(t.Context(), task)
	enginetest.RequireError(t, "fetch", err, p2p.ErrUnreachable, "wants to be asked again")
	s.Lose(2)
	b.requireFetched(task, data)
}

// A peer may send those who ask to another one on its host.
func TestRedirect(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{}, s)
	peer := clustertest.StartPeer(t, s, "peer", clustertest.Redirect)
	data := enginetest.Content(5<<20, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	if err := peer.Import(t.Context(), task.Digest.String(), "t", data); err != nil {
		t.Fatal(err)
	}
	h.requireFetched(task, data)
}

// Whoever asks for something else than one range of a task is refused.
func TestUploadRefuses(t *testing.T) {
	s := clustertest.StartScheduler(t)
	h := newHost(t, cluster.Options{}, s)
	task := enginetest.Import(t, h, "t", []byte("0123456789"))
	id := idOf(task)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string, ranges ...string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(
			t.Context(), http.MethodGet, "http://"+h.source.UploadAddress()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header["Range"] = ranges
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var body bytes.Buffer
		if _, err := body.ReadFrom(resp.Body); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, body.String()
	}
	path := "/download/" + id[:3] + "/" + id + "?peerId=x"
	if code, body := get(path, "bytes=2-4"); code != http.StatusOK || body != "234" {
		t.Errorf("%d %q, want 200 and the range", code, body)
	}
	if code, body := get("/healthy"); code != http.StatusOK || body != `"OK"` {
		t.Errorf("/healthy: %d %q, want 200", code, body)
	}
	for _, c := range []struct {
		want   int
		path   string
		ranges []string
	}{
		{400, path, nil},
		{400, path, []string{"bytes=0-1", "bytes=2-3"}},
		{400, path, []string{"bytes=0-1,3-4"}},
		{400, path, []string{"bytes=4-3"}},
		{400, path, []string{"bytes=0-"}},
		{400, path, []string{"bytes=-3"}},
		{400, path, []string{"bytes=+0-3"}},
		{400, path, []string{"0-3"}},
		{400, path, []string{"bytes=0-9223372036854775808"}},
		{416, path, []string{"bytes=0-10"}},
		{416, path, []string{"bytes=0-9223372036854775807"}},
		{404, "/download/abc/" + id, []string{"bytes=0-1"}},
		{404, "/download/" + id[:3] + "/" + id[:10], []string{"bytes=0-1"}},
		{404, "/download/a/a", []string{"bytes=0-1"}},
		{404, "/", []string{"bytes=0-1"}},
	} {
		if code, body := get(c.path, c.ranges...); code != c.want {
			t.Errorf("%s %v: %d %q, want %d", c.path, c.ranges, code, body, c.want)
		}
	}
}

// What cannot work is said at the start.
func TestOptions(t *testing.T) {
	for says, opts := range map[string]cluster.Options{
		"no scheduler":       {},
		"want HOST:PORT":     {Schedulers: []string{"nowhere"}},
		"IP to advertise":    {Schedulers: []string{"127.0.0.1:8002"}, Advertise: "0.0.0.0"},
		"another address":    {Schedulers: []string{"127.0.0.1:8002"}, PeerListen: "192.0.2.1:0"},
		"by which other hos": {Schedulers: []string{"127.0.0.1:8002"}, Advertise: "host"},
	} {
		store, err := pieces.Open(t.TempDir(), pieces.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if opts.PeerListen == "" {
			opts.PeerListen = "127.0.0.1:0"
		}
		opts.UploadListen = "127.0.0.1:0"
		if _, err := cluster.New(front.New(store, nil), opts); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v; want an error that says %q", opts, err, says)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}
}
