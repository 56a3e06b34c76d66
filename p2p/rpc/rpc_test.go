package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/stats"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) {
	if daemon := os.Getenv("RPC_TEST_DAEMON"); daemon != "" {
		os.Exit(testDaemon(daemon))
	}
	goleak.VerifyTestMain(m)
}

// testLog writes a server's log to the test's, as long as that runs.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func logTo(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// serve serves engine on a new socket until the test ends.
func serve(t testing.TB, engine p2p.Engine, opts ...ServerOption) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "run", "d.sock")
	serveAt(t, engine, socket, opts...)
	return socket
}

// serveAt serves engine on socket until the test ends.
func serveAt(t testing.TB, engine p2p.Engine, socket string, opts ...ServerOption) *Server {
	t.Helper()
	s := NewServer(engine, logTo(testLog{t}), opts...)
	run(t, s, socket)
	return s
}

// run has a server serve on socket until the test ends.
func run(t testing.TB, s *Server, socket string) {
	t.Helper()
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

func dial(t testing.TB, socket string, opts ...DialOption) *Client {
	t.Helper()
	c, err := Dial(t.Context(), socket, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// pair returns a client of a server of engine.
func pair(t testing.TB, engine p2p.Engine) *Client {
	t.Helper()
	return dial(t, serve(t, engine))
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func tempFile(t testing.TB, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return f
}

// add ingests content as a task under tag.
func add(t testing.TB, e p2p.Engine, tag string, src io.Reader) p2p.Task {
	t.Helper()
	ingest, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(src, p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: tag, Digest: added.Digest}
	if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}}); err != nil {
		t.Fatal(err)
	}
	return task
}

// stat describes a task.
func stat(ctx context.Context, e p2p.Engine, task p2p.Task) (p2p.Info, error) {
	return e.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local})
}

func readAll(t testing.TB, b p2p.Blob) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := b.CopyRange(t.Context(), &buf, 0, b.Size(), nil); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// eventually waits until ok holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			t.Fatalf("%s: not after 30 s", what)
		}
	}
}

func fdCount(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// someTask is a well-formed task that no engine holds.
var someTask = p2p.Task{Tag: "models", Digest: digest.SHA256.FromString("nothing")}

func TestAddAndOpen(t *testing.T) {
	content := random(3<<20 + 17)
	file := func(t *testing.T, content []byte) io.Reader { return tempFile(t, content) }
	for name, test := range map[string]struct {
		src  func(t *testing.T) io.Reader
		opts p2p.AddOptions
		want []byte
	}{
		"file":       {src: func(t *testing.T) io.Reader { return file(t, content) }, want: content},
		"empty file": {src: func(t *testing.T) io.Reader { return file(t, nil) }},
		"file from an offset": {
			src: func(t *testing.T) io.Reader {
				f := tempFile(t, content)
				f.Seek(1000, io.SeekStart)
				return f
			},
			want: content[1000:],
		},
		"file past its end": {
			src: func(t *testing.T) io.Reader {
				f := tempFile(t, content)
				f.Seek(int64(len(content))+5, io.SeekStart)
				return f
			},
		},
		"reader": {src: func(*testing.T) io.Reader { return bytes.NewReader(content) }, want: content},
		"plain reader": {src: func(*testing.T) io.Reader { return io.MultiReader(bytes.NewReader(content)) },
			want: content},
		"empty reader": {src: func(*testing.T) io.Reader { return strings.NewReader("") }},
		"device": {src: func(t *testing.T) io.Reader {
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return f
		}},
		"pipe": {
			src: func(t *testing.T) io.Reader {
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				var writer sync.WaitGroup
				writer.Go(func() { w.Write(content); w.Close() })
				t.Cleanup(func() { r.Close(); writer.Wait() })
				return r
			},
			want: content,
		},
		"sha512": {
			src:  func(*testing.T) io.Reader { return bytes.NewReader(content) },
			opts: p2p.AddOptions{Algorithm: digest.SHA512},
			want: content,
		},
		"wanted digest": {
			src:  func(t *testing.T) io.Reader { return file(t, content) },
			opts: p2p.AddOptions{Want: digest.SHA384.FromBytes(content)},
			want: content,
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := pair(t, newStore(t.TempDir()))
			ingest, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer ingest.Close()
			var progress []int64
			test.opts.Progress = func(taken int64) { progress = append(progress, taken) }
			added, err := ingest.Add(test.src(t), test.opts)
			if err != nil {
				t.Fatal(err)
			}
			alg := digest.SHA256
			if test.opts.Algorithm != "" {
				alg = test.opts.Algorithm
			}
			if test.opts.Want != "" {
				alg = test.opts.Want.Algorithm()
			}
			if want := (p2p.Added{Digest: alg.FromBytes(test.want), Size: int64(len(test.want))}); added != want {
				t.Fatalf("added %v, want %v", added, want)
			}
			if !slices.IsSorted(progress) || len(progress) == 0 || progress[len(progress)-1] != added.Size {
				t.Errorf("progress %v does not grow to %d", progress, added.Size)
			}
			task := p2p.Task{Tag: "a/b", Digest: added.Digest}
			if _, err := stat(t.Context(), c, task); !errors.Is(err, p2p.ErrNotFound) {
				t.Errorf("before the commit: %v", err)
			}
			if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
				t.Fatal(err)
			}
			if err := ingest.Commit(p2p.Commit{}); err == nil {
				t.Error("a second commit succeeds")
			}
			if _, err := ingest.Add(strings.NewReader(""), p2p.AddOptions{}); err == nil {
				t.Error("an add after the commit succeeds")
			}
			for range 2 {
				if err := ingest.Close(); err != nil {
					t.Error(err)
				}
			}

			blob, err := c.Open(t.Context(), task, p2p.Network)
			if err != nil {
				t.Fatal(err)
			}
			defer blob.Close()
			if blob.Size() != int64(len(test.want)) {
				t.Errorf("size %d, want %d", blob.Size(), len(test.want))
			}
			if !bytes.Equal(readAll(t, blob), test.want) {
				t.Error("the blob differs")
			}
		})
	}
}

func TestBlobOutlivesEverything(t *testing.T) {
	content := random(200_000)
	s := newStore(t.TempDir())
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	server := serveAt(t, s, socket)
	c := dial(t, socket)
	task := add(t, c, "", bytes.NewReader(content))
	ctx, cancel := context.WithCancel(t.Context())
	blob, err := c.Open(ctx, task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	deleted, err := c.Delete(t.Context(), "", digest.FromDigest(task.Digest), p2p.DeleteOptions{})
	if want := (p2p.Deleted{Tasks: 1, Freed: int64(len(content))}); err != nil || !reflect.DeepEqual(deleted, want) {
		t.Fatalf("deleted %v, %v; want %v", deleted, err, want)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, blob), content) {
		t.Error("the blob differs")
	}
	if err := blob.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := blob.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("a closed blob can be read")
	}
}

func TestOpenFindsDamage(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	task := add(t, c, "", bytes.NewReader(random(200_000)))
	f, err := os.OpenFile(s.path(task.Digest), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("damage"), 100_000)
	f.Close()
	blob, err := c.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	err = blob.CopyRange(t.Context(), io.Discard, 0, blob.Size(), nil)
	var corrupt *digest.CorruptError
	if !errors.As(err, &corrupt) || corrupt.Piece != 1 || corrupt.Digest != task.Digest {
		t.Errorf("got %v, want damage in piece 1", err)
	}
}

func TestBlobFileIsReadOnly(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
	task := add(t, c, "", strings.NewReader("content"))
	b, err := c.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.(*blob).file.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("write to the blob's file: %v", err)
	}
}

func TestOpenRefusesBlob(t *testing.T) {
	s := newStore(t.TempDir())
	table := &digest.Table{Digest: someTask.Digest, PieceLength: digest.PieceLength(0)}
	h := &hooked{Engine: s}
	c := pair(t, h)
	h.open = func(context.Context, p2p.Task) (p2p.Blob, error) {
		f := tempFile(t, nil) // open for writing too
		return &storeBlob{digest.NewVerified(f, table), f}, nil
	}
	if _, err := c.Open(t.Context(), someTask, p2p.Local); err == nil ||
		!strings.Contains(err.Error(), "open for writing") {
		t.Errorf("writable file: %v", err)
	}
}

// A blob that has no file is handed over as a copy, which nobody who gets it can change.
func TestOpenCopiesBlob(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	c := pair(t, h)
	content := random(100_000)
	recorder := digest.NewRecorder(digest.SHA256)
	recorder.Write(content)
	table, err := recorder.Table()
	if err != nil {
		t.Fatal(err)
	}
	h.open = func(context.Context, p2p.Task) (p2p.Blob, error) {
		f := tempFile(t, content)
		return struct{ p2p.Blob }{&storeBlob{digest.NewVerified(f, table), f}}, nil
	}
	b, err := c.Open(t.Context(), p2p.Task{Tag: "t", Digest: table.Digest}, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var got bytes.Buffer
	if err := b.CopyRange(t.Context(), &got, 0, b.Size(), nil); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("the copy has %d bytes, %v; want the blob's %d", got.Len(), err, len(content))
	}
	f := b.(*blob).file
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("write to it: %v", err)
	}
	again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
	if err != nil {
		return // it can't be opened for writing at all
	}
	defer again.Close()
	if _, err := again.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("write to it, opened once more: %v", err)
	}
}

func TestCommitAndLookUp(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	var digests []digest.Digest
	for _, s := range []string{"one", "two"} {
		added, err := ingest.Add(strings.NewReader(s), p2p.AddOptions{})
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, added.Digest)
	}
	tasks := []p2p.NewTask{
		{
			Task: p2p.Task{Tag: "models", Digest: digests[0]}, MediaType: "application/x; a=b", Keep: p2p.KeepPinned,
			Manifest: &p2p.NewManifest{
				Refs:    []digest.Digest{digests[1], someTask.Digest},
				Needs:   digests[1:],
				Subject: digest.SHA512.FromString("subject"),
			},
		},
		{Task: p2p.Task{Tag: "models", Digest: digests[1]}, Keep: p2p.KeepReferred},
		{Task: p2p.Task{Tag: "", Digest: digests[1]}, Keep: p2p.KeepUntilReferred, Manifest: &p2p.NewManifest{}},
	}
	names := []p2p.NewName{
		{Tag: "models", Name: "v1", Digest: digests[0]},
		{Tag: "models", Name: "v2", Digest: digests[0], KeepOld: true, MediaType: "application/x",
			Description: []byte(`{"a":"b"}`)},
	}
	if err := ingest.Commit(p2p.Commit{Tasks: tasks, Names: names}); err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if got := s.tasks[task.Task]; !reflect.DeepEqual(got, task) {
			t.Errorf("the engine got %+v, want %+v", got, task)
		}
	}
	for _, name := range names {
		if got := s.names[nameKey(name.Tag, name.Name)]; !reflect.DeepEqual(got, name) {
			t.Errorf("the engine got %+v, want %+v", got, name)
		}
	}

	info := func(task p2p.NewTask) p2p.Info {
		return p2p.Info{
			Task: task.Task, Size: 3, PieceLength: digest.PieceLength(3), Pieces: 1, Held: 1,
			MediaType: task.MediaType, IsManifest: task.Manifest != nil, Keep: task.Keep, Imported: imported.Local(),
		}
	}
	manifest := info(tasks[0])
	manifest.Manifest = &p2p.Manifest{Content: []byte("one"), Refs: []p2p.Info{info(tasks[1])}}
	empty := info(tasks[2])
	empty.Manifest = &p2p.Manifest{Content: []byte("two")}
	for _, test := range []struct {
		tag, cid string
		manifest bool
		want     p2p.Info
	}{
		{"models", "v1", false, info(tasks[0])},
		{"models", "v1", true, manifest},
		{"models", string(digests[0]), true, manifest},
		{"models", string(digests[1]), true, info(tasks[1])},
		{"", string(digests[1]), true, empty},
	} {
		cid, err := digest.ParseCID(test.cid)
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Stat(t.Context(), test.tag, cid, p2p.StatOptions{Manifest: test.manifest})
		if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("stat %s under %q: %+v, %v; want %+v", cid, test.tag, got, err, test.want)
		}
		if _, err := c.Stat(t.Context(), "none", cid, p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("under another tag: %v", err)
		}
	}
}

// What dfcache stat does has to be one call: how long it takes depends on that.
func TestStatIsOneCall(t *testing.T) {
	var calls callNames
	c := dial(t, serve(t, newStore(t.TempDir()), WithStatsHandler(&calls)))
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(strings.NewReader("manifest"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	layer, err := ingest.Add(strings.NewReader("layer"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	if err := ingest.Commit(p2p.Commit{
		Tasks: []p2p.NewTask{
			{Task: p2p.Task{Tag: "t", Digest: layer.Digest}},
			{Task: task, Manifest: &p2p.NewManifest{Refs: []digest.Digest{layer.Digest}}},
		},
		Names: []p2p.NewName{{Tag: "t", Name: "v1", Digest: task.Digest}},
	}); err != nil {
		t.Fatal(err)
	}
	calls.names = nil
	cid, err := digest.ParseCID("v1")
	if err != nil {
		t.Fatal(err)
	}
	info, err := c.Stat(t.Context(), "t", cid, p2p.StatOptions{Manifest: true})
	if err != nil || string(info.Manifest.Content) != "manifest" || len(info.Manifest.Refs) != 1 {
		t.Errorf("got %+v, %v", info, err)
	}
	if want := []string{"/dfcache.v1.Daemon/Stat"}; !slices.Equal(calls.names, want) {
		t.Errorf("calls %v, want %v", calls.names, want)
	}
}

// The longest answer there can be, and the longest task to commit.
func TestLargestManifest(t *testing.T) {
	s := newStore(t.TempDir())
	h := &hooked{Engine: s}
	c := pair(t, h)
	long := p2p.Info{
		Task:       p2p.Task{Tag: strings.Repeat("a", p2p.MaxTag), Digest: digest.SHA512.FromString("")},
		Size:       1<<63 - 1,
		MediaType:  strings.Repeat("x", p2p.MaxMediaType),
		Remote:     true,
		IsManifest: true,
		Origin:     time.Unix(0, 1<<63-1),
		Imported:   time.Unix(0, 1<<63-1),
		LastUsed:   time.Unix(0, 1<<63-1),
	}
	long.PieceLength, long.Pieces, long.Held = long.Size, int(long.Size), int(long.Size)
	info := long
	info.Manifest = &p2p.Manifest{Content: random(p2p.MaxManifest), Refs: slices.Repeat([]p2p.Info{long}, p2p.MaxRefs)}
	info.Providers = &p2p.Providers{Some: 1 << 60, Whole: 1 << 60, Asked: 1 << 60, Silent: 1 << 60}
	h.stat = func(context.Context, p2p.StatOptions) (p2p.Info, error) { return info, nil }
	got, err := c.Stat(t.Context(), "", digest.FromDigest(someTask.Digest), p2p.StatOptions{Manifest: true})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, info) {
		t.Error("the manifest differs")
	}

	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(strings.NewReader("content"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.NewTask{Task: p2p.Task{Tag: long.Task.Tag, Digest: added.Digest}, MediaType: long.MediaType,
		Origin: long.Origin}
	refs := slices.Repeat([]digest.Digest{long.Task.Digest}, p2p.MaxManifestRefs)
	task.Manifest = &p2p.NewManifest{Refs: refs, Needs: refs, Subject: long.Task.Digest}
	if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{task}}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(s.tasks[task.Task], task) {
		t.Error("the task differs")
	}
}

func TestRehash(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(strings.NewReader("content"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := p2p.Added{Digest: digest.SHA512.FromString("content"), Size: 7}
	if got, err := ingest.Rehash(added.Digest, want.Digest); err != nil || got != want {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
	task := p2p.Task{Digest: want.Digest}
	if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stat(t.Context(), c, task); err != nil {
		t.Error(err)
	}
	if _, err := ingest.Rehash(added.Digest, want.Digest); err == nil {
		t.Error("a rehash after the commit succeeds")
	}

	// One that fails ends the ingest.
	if ingest, err = c.Ingest(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	if added, err = ingest.Add(strings.NewReader("other"), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = ingest.Rehash(added.Digest, want.Digest)
	var mismatch *digest.MismatchError
	if !errors.As(err, &mismatch) || mismatch.Want != want.Digest || mismatch.Got != digest.SHA512.FromString("other") {
		t.Errorf("got %v", err)
	}
	if err := ingest.Commit(p2p.Commit{}); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("commit after it: %v", err)
	}
	s.waitIdle(t)
}

func TestDeleteOptions(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	var got p2p.DeleteOptions
	deleted := p2p.Deleted{
		Tasks: 3, Freed: 1 << 40, Reached: 3, Removed: 2,
		Missed: []p2p.Missed{{Peer: "12D3KooWA", Address: "10.0.0.7:4001", Reason: "away"}, {Peer: "12D3KooWB"}},
	}
	h.delete = func(opts p2p.DeleteOptions) (p2p.Deleted, error) { got = opts; return deleted, nil }
	c := pair(t, h)
	cid, err := digest.ParseCID("v1")
	if err != nil {
		t.Fatal(err)
	}
	deleted.NotFound = []digest.CID{cid}
	other := digest.FromDigest(digest.SHA256.FromString("another one"))
	for _, want := range []p2p.DeleteOptions{{}, {Force: true}, {NameOnly: true}, {Also: []digest.CID{other}},
		{All: true}} {
		id := cid
		if want.All {
			id = digest.CID{}
		}
		if d, err := c.Delete(t.Context(), "t", id, want); err != nil || !reflect.DeepEqual(d, deleted) ||
			!reflect.DeepEqual(got, want) {
			t.Errorf("the engine got %+v, want %+v; the client %v, %v", got, want, d, err)
		}
	}
}

func TestQuery(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	var got p2p.Query
	task := p2p.Entry{Info: p2p.Info{Task: someTask, Keep: p2p.KeepUntilReferred}, Total: 5}
	name := p2p.Entry{Info: p2p.Info{Task: someTask}, Name: "v1"}
	tags := []p2p.Entry{{}, {Info: p2p.Info{Task: p2p.Task{Tag: "models"}}}}
	var entries []p2p.Entry
	h.list = func(q p2p.Query) iter.Seq2[p2p.Entry, error] {
		got = q
		return func(yield func(p2p.Entry, error) bool) {
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
		}
	}
	c := pair(t, h)
	empty := ""
	for _, test := range []struct {
		query   p2p.Query
		entries []p2p.Entry
	}{
		{p2p.Query{}, []p2p.Entry{name, task}},
		{p2p.Query{Tag: &empty}, nil},
		{p2p.Query{Tag: &someTask.Tag, Kind: p2p.KindNames, After: "\xff"}, []p2p.Entry{name}},
		{p2p.Query{Kind: p2p.KindTags, After: strings.Repeat("a", p2p.MaxTag)}, tags},
		{p2p.Query{Tag: &empty, RefersTo: someTask.Digest}, []p2p.Entry{task}},
	} {
		entries = test.entries
		var listed []p2p.Entry
		for e, err := range c.List(t.Context(), test.query) {
			if err != nil {
				t.Fatal(err)
			}
			listed = append(listed, e)
		}
		if !reflect.DeepEqual(got, test.query) || !reflect.DeepEqual(listed, test.entries) {
			t.Errorf("the engine got %+v, want %+v; the client %+v, want %+v", got, test.query, listed, test.entries)
		}
	}
}

func TestStatOptions(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	var got p2p.StatOptions
	remote := p2p.Info{
		Task: someTask, Remote: true, Size: 5, Origin: time.Unix(0, 7),
		Providers: &p2p.Providers{Some: 3, Whole: 2, Asked: 5, Silent: 1},
	}
	h.stat = func(_ context.Context, opts p2p.StatOptions) (p2p.Info, error) { got = opts; return remote, nil }
	c := pair(t, h)
	for _, want := range []p2p.StatOptions{
		{}, {Scope: p2p.Local}, {Scope: p2p.Local, Manifest: true}, {Manifest: true}, {Providers: true},
		{Manifest: true, Providers: true},
	} {
		info, err := c.Stat(t.Context(), "", digest.FromDigest(someTask.Digest), want)
		if err != nil || got != want || !reflect.DeepEqual(info, remote) {
			t.Errorf("the engine got %+v, want %+v; the client %+v, %v", got, want, info, err)
		}
	}
	if remote.Local() {
		t.Error("what peers have is local")
	}
}

func TestReplicateAndPeers(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	c := pair(t, h)
	h.replicate = func(_ context.Context, task p2p.Task, n int) ([]string, error) {
		if task != someTask || n != 2 {
			t.Errorf("the engine got %v, %d", task, n)
		}
		return []string{"12D3KooWA", "12D3KooWB"}, nil
	}
	got, err := c.Replicate(t.Context(), someTask.Tag, digest.FromDigest(someTask.Digest), 2)
	if err != nil || !slices.Equal(got, []string{"12D3KooWA", "12D3KooWB"}) {
		t.Errorf("got %v, %v", got, err)
	}
	// It ends with its context, here and there.
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan struct{})
	cause := errors.New("the user has seen enough")
	h.replicate = func(ctx context.Context, _ p2p.Task, _ int) ([]string, error) {
		cancel(cause)
		<-ctx.Done()
		close(ended)
		return nil, context.Cause(ctx)
	}
	if _, err := c.Replicate(ctx, "", digest.FromDigest(someTask.Digest), 1); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	<-ended

	if peers, err := c.Peers(t.Context()); err != nil || len(peers) != 0 {
		t.Errorf("got %v, %v", peers, err)
	}
	want := []p2p.Peer{
		{
			ID: "12D3KooWA", Addresses: []string{"10.0.0.7:4001", "[fd00::7]:4001"}, State: p2p.PeerConnected,
			Mode: "seed-only",
			Gave: 1 << 40, Took: 7, Latency: 3 * time.Millisecond, LastSeen: time.Unix(0, 5), Faults: 2,
			Reason: "a wrong piece",
		},
		{ID: "12D3KooWB", State: p2p.PeerAway},
		{ID: "12D3KooWC", State: p2p.PeerShunned, Reason: "\uFFFD"},
		{ID: "12D3KooWD", State: p2p.PeerForeign, Version: "v9", Ahead: -time.Hour},
		{ID: "12D3KooWE", State: p2p.PeerCloned, Ahead: 365 * 24 * time.Hour},
	}
	h.peers = func() ([]p2p.Peer, error) {
		sent := slices.Clone(want)
		sent[2].Reason = "\xff" // a peer can say anything
		return sent, nil
	}
	if peers, err := c.Peers(t.Context()); err != nil || !reflect.DeepEqual(peers, want) {
		t.Errorf("got %+v, %v; want %+v", peers, err, want)
	}
	h.peers = func() ([]p2p.Peer, error) { return nil, p2p.ErrClosed }
	if _, err := c.Peers(t.Context()); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestListByTag(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
	one, two := add(t, c, "models", strings.NewReader("one")), add(t, c, "", strings.NewReader("two"))
	list := func(tag *string) (got []p2p.Task) {
		for e, err := range c.List(t.Context(), p2p.Query{Tag: tag}) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e.Task)
		}
		return got
	}
	empty, models, none := "", "models", "none"
	for _, test := range []struct {
		tag  *string
		want []p2p.Task
	}{{nil, []p2p.Task{two, one}}, {&empty, []p2p.Task{two}}, {&models, []p2p.Task{one}}, {&none, nil}} {
		if got := list(test.tag); !slices.Equal(got, test.want) {
			t.Errorf("list %v, want %v", got, test.want)
		}
	}
}

// A commit and a list that do not fit one message.
func TestManyTasks(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := newStore(t.TempDir())
	c := pair(t, s)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(strings.NewReader("content"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const n = 30_000
	var commit p2p.Commit
	for i := range n {
		task := p2p.Task{Tag: fmt.Sprintf("tag%06d/%s", i, strings.Repeat("x", 100)), Digest: added.Digest}
		commit.Tasks = append(commit.Tasks, p2p.NewTask{Task: task})
	}
	if err := ingest.Commit(commit); err != nil {
		t.Fatal(err)
	}
	want := make(map[p2p.Task]p2p.NewTask)
	for _, task := range commit.Tasks {
		want[task.Task] = task
	}
	if !maps.EqualFunc(s.tasks, want, func(a, b p2p.NewTask) bool { return reflect.DeepEqual(a, b) }) {
		t.Error("the tasks differ")
	}
	i := 0
	for e, err := range c.List(t.Context(), p2p.Query{}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Task != commit.Tasks[i].Task {
			t.Fatalf("entry %d is %v", i, e.Task)
		}
		i++
	}
	if i != n {
		t.Errorf("%d entries", i)
	}
	for range c.List(t.Context(), p2p.Query{}) {
		break // ends the call, so that Close does not wait for it
	}
}

func TestListEndsWithError(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	h.list = func(p2p.Query) iter.Seq2[p2p.Entry, error] {
		return func(yield func(p2p.Entry, error) bool) {
			if yield(p2p.Entry{Info: p2p.Info{Task: someTask}}, nil) {
				yield(p2p.Entry{}, p2p.ErrUnavailable)
			}
		}
	}
	c := pair(t, h)
	var got []error
	for e, err := range c.List(t.Context(), p2p.Query{}) {
		if err == nil && e.Task != someTask {
			t.Errorf("entry %v", e)
		}
		got = append(got, err)
	}
	if len(got) != 2 || got[0] != nil || !errors.Is(got[1], p2p.ErrUnavailable) {
		t.Errorf("got %v", got)
	}
}

func TestInvalidRequests(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
	bad := p2p.Task{Tag: "Not A Tag", Digest: someTask.Digest}
	list := func(q p2p.Query) error {
		for _, err := range c.List(t.Context(), q) {
			return err
		}
		return nil
	}
	for name, call := range map[string]func() error{
		"stat": func() error { _, err := stat(t.Context(), c, bad); return err },
		"open": func() error { _, err := c.Open(t.Context(), bad, p2p.Local); return err },
		"tag that is not UTF-8": func() error {
			_, err := stat(t.Context(), c, p2p.Task{Tag: "\xff", Digest: someTask.Digest})
			return err
		},
		"scope": func() error {
			_, err := c.Stat(t.Context(), "", digest.FromDigest(someTask.Digest), p2p.StatOptions{Scope: 7})
			return err
		},
		"delete": func() error { _, err := c.Delete(t.Context(), "", digest.CID{}, p2p.DeleteOptions{}); return err },
		"delete of a digest by name only": func() error {
			_, err := c.Delete(t.Context(), "", digest.FromDigest(someTask.Digest), p2p.DeleteOptions{NameOnly: true})
			return err
		},
		"hold":               func() error { return c.Hold(t.Context(), bad.Tag, digest.FromDigest(bad.Digest)) },
		"hold nothing":       func() error { return c.Hold(t.Context(), "", digest.CID{}) },
		"hold the referrers": func() error { return c.HoldReferrers(t.Context(), bad) },
		"verify":             func() error { return c.Verify(t.Context(), bad) },
		"mend":               func() error { return c.Mend(t.Context(), bad) },
		"replicate": func() error {
			_, err := c.Replicate(t.Context(), "", digest.FromDigest(someTask.Digest), -1)
			return err
		},
		"list":         func() error { return list(p2p.Query{Tag: &bad.Tag}) },
		"kind of list": func() error { return list(p2p.Query{Kind: -1}) },
		"add": func() error {
			i, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			_, err = i.Add(strings.NewReader(""), p2p.AddOptions{Want: "sha256:xx"})
			return err
		},
		"rehash": func() error {
			i, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			_, err = i.Rehash(someTask.Digest, "v1")
			return err
		},
		"keep": func() error {
			i, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			return i.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: someTask, Keep: 9}}})
		},
		"commit": func() error {
			i, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			return i.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: bad}}})
		},
	} {
		if err := call(); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMismatchEndsIngest(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	for _, src := range []io.Reader{tempFile(t, []byte("other")), strings.NewReader("other")} {
		ingest, err := c.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = ingest.Add(src, p2p.AddOptions{Want: someTask.Digest})
		var mismatch *digest.MismatchError
		if !errors.As(err, &mismatch) || mismatch.Want != someTask.Digest ||
			mismatch.Got != digest.SHA256.FromString("other") {
			t.Errorf("got %v", err)
		}
		if err := ingest.Commit(p2p.Commit{}); !errors.Is(err, digest.ErrMismatch) {
			t.Errorf("commit after it: %v", err)
		}
		ingest.Close()
	}
	s.waitIdle(t)
	if files, err := os.ReadDir(s.dir); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

func TestCloseDropsIngest(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ingest.Add(strings.NewReader("x"), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := ingest.Close(); err != nil {
		t.Fatal(err)
	}
	// Close has waited for it.
	if files, err := os.ReadDir(s.dir); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
	if _, err := ingest.Add(strings.NewReader("x"), p2p.AddOptions{}); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("add after close: %v", err)
	}
}

// failingReader gives some bytes, then an error.
type failingReader struct {
	n   int
	err error
}

func (r *failingReader) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, r.err
	}
	n := min(len(p), r.n)
	r.n -= n
	return n, nil
}

func TestSourceFails(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	broken := errors.New("broken cable")
	for _, n := range []int{0, 5, 3 << 20} {
		ingest, err := c.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ingest.Add(&failingReader{n, broken}, p2p.AddOptions{}); !errors.Is(err, broken) {
			t.Errorf("add: %v", err)
		}
		if err := ingest.Commit(p2p.Commit{}); !errors.Is(err, broken) {
			t.Errorf("commit: %v", err)
		}
		ingest.Close()
	}
	s.waitIdle(t) // the daemon has dropped them
}

// The daemon fails while there is always more to read, and while a Read blocks.
func TestDaemonFailsInAdd(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	full := fmt.Errorf("blob of 5 bytes: %w", p2p.ErrNoSpace)
	h.ingest = func(context.Context) (p2p.Ingest, error) {
		return addFunc(func(io.Reader) error { return full }), nil
	}
	c := pair(t, h)
	blocked := &signalReader{began: make(chan struct{}), release: make(chan struct{})}
	defer close(blocked.release)
	for _, src := range []io.Reader{endless{}, blocked} {
		ingest, err := c.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = ingest.Add(src, p2p.AddOptions{})
		if !errors.Is(err, p2p.ErrNoSpace) || err.Error() != full.Error() {
			t.Errorf("source %T: got %v", src, err)
		}
		ingest.Close()
	}
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	w, err := ingest.Create(p2p.AddOptions{})
	for err == nil {
		_, err = w.Write(make([]byte, 1000))
	}
	if err.Error() != full.Error() {
		t.Errorf("write: got %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// addFunc is an ingest of which only Add works.
type addFunc func(io.Reader) error

func (f addFunc) Add(src io.Reader, _ p2p.AddOptions) (p2p.Added, error) {
	return p2p.Added{Digest: someTask.Digest}, f(src)
}
func (addFunc) Create(p2p.AddOptions) (p2p.Writer, error) { return nil, errors.ErrUnsupported }
func (addFunc) Room(int64) error                          { return nil }
func (addFunc) Rehash(_, _ digest.Digest) (p2p.Added, error) {
	return p2p.Added{}, errors.ErrUnsupported
}
func (addFunc) Commit(p2p.Commit) error { return nil }
func (addFunc) Close() error            { return nil }

// A daemon that says it is done before it has read everything is not believed.
func TestDaemonReadsTooLittle(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	h.ingest = func(context.Context) (p2p.Ingest, error) {
		return addFunc(func(io.Reader) error { return nil }), nil
	}
	c := pair(t, h)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	if _, err = ingest.Add(endless{}, p2p.AddOptions{}); err == nil ||
		!strings.Contains(err.Error(), "did not take in everything") {
		t.Errorf("got %v", err)
	}
	written, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer written.Close()
	w, err := written.Create(p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	<-w.(*writer).answered
	if _, err := w.Finish(); err == nil || !strings.Contains(err.Error(), "did not take in everything") {
		t.Errorf("finish: got %v", err)
	}
}

func TestIngestThatCannotBegin(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	h.ingest = func(context.Context) (p2p.Ingest, error) { return nil, p2p.ErrNoSpace }
	c := pair(t, h)
	for name, use := range map[string]func(p2p.Ingest) error{
		"file":   func(i p2p.Ingest) error { _, err := i.Add(tempFile(t, nil), p2p.AddOptions{}); return err },
		"reader": func(i p2p.Ingest) error { _, err := i.Add(endless{}, p2p.AddOptions{}); return err },
		"commit": func(i p2p.Ingest) error { return i.Commit(p2p.Commit{}) },
	} {
		ingest, err := c.Ingest(t.Context())
		if err == nil {
			err = use(ingest)
			ingest.Close()
		}
		if !errors.Is(err, p2p.ErrNoSpace) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCancelReachesEngine(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	began, ended := make(chan struct{}, 1), make(chan error, 1)
	h.stat = func(ctx context.Context, _ p2p.StatOptions) (p2p.Info, error) {
		began <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return p2p.Info{}, context.Cause(ctx)
	}
	c := pair(t, h)

	why := errors.New("changed my mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { <-began; cancel(why) }()
	if _, err := stat(ctx, c, someTask); !errors.Is(err, why) {
		t.Errorf("got %v, want the cause", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the engine saw %v", err)
	}

	ctx, cancelTimeout := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelTimeout()
	if _, err := stat(ctx, c, someTask); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the engine was not told")
	}
	if _, err := stat(ctx, c, someTask); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

func TestDeadlineBoundsIngest(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	deadlines := make(chan bool, 1)
	h.ingest = func(ctx context.Context) (p2p.Ingest, error) {
		_, ok := ctx.Deadline()
		deadlines <- ok
		return h.Engine.Ingest(ctx)
	}
	c := pair(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	ingest, err := c.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	if !<-deadlines {
		t.Error("the engine has no deadline")
	}
}

// signalReader blocks in Read until it is released.
type signalReader struct {
	began   chan struct{}
	once    sync.Once
	release chan struct{}
}

func (r *signalReader) Read([]byte) (int, error) {
	r.once.Do(func() { close(r.began) })
	<-r.release
	return 0, io.EOF
}

func TestStalledSource(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	src := &signalReader{began: make(chan struct{}), release: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	ingest, err := c.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	go func() {
		defer cancel()
		<-src.began
		eventually(t, "the daemon reads", func() bool { return s.adds.Load() > 0 })
	}()
	if _, err := ingest.Add(src, p2p.AddOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	s.waitIdle(t) // although src still blocks
	close(src.release)
}

// watchedIngest says when it begins to add, and when it is closed.
type watchedIngest struct {
	p2p.Ingest
	adding, closed chan struct{}
}

func (w watchedIngest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	close(w.adding)
	return w.Ingest.Add(src, opts)
}

func (w watchedIngest) Close() error {
	defer close(w.closed)
	return w.Ingest.Close()
}

// A source that does not come to its end does not hold up the daemon when the
// call ends: a pipe that nobody writes to, and a file that takes forever.
func TestAddEndsWithCall(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	long := tempFile(t, nil)
	if err := long.Truncate(1 << 38); err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]*os.File{"pipe": r, "regular file": long} {
		for how, end := range map[string]func(*Client, context.CancelFunc){
			"cancelled":   func(_ *Client, cancel context.CancelFunc) { cancel() },
			"client gone": func(c *Client, _ context.CancelFunc) { c.current.conn.Close() },
		} {
			t.Run(name+", "+how, func(t *testing.T) {
				store, err := pieces.Open(t.TempDir(), pieces.Options{})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { store.Close() })
				h := &hooked{Engine: store}
				adding, closed := make(chan struct{}), make(chan struct{})
				h.ingest = func(ctx context.Context) (p2p.Ingest, error) {
					ingest, err := store.Ingest(ctx)
					return watchedIngest{ingest, adding, closed}, err
				}
				c := pair(t, h)
				before := fdCount(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				stream, err := c.current.daemon.Ingest(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := c.current.conn.channel.send(ctx, 1, src); err != nil {
					t.Fatal(err)
				}
				if err := stream.Send(addRequest(1, 0)); err != nil {
					t.Fatal(err)
				}
				<-adding
				end(c, cancel)
				select {
				case <-closed:
				case <-time.After(30 * time.Second):
					w.Close() // so that the test can end
					t.Error("the daemon goes on after 30 s")
				}
				// Nobody goes on reading either.
				eventually(t, "its descriptor is closed", func() bool { return fdCount(t) <= before })
			})
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	s := newStore(t.TempDir())
	c := pair(t, s)
	var all sync.WaitGroup
	for i := range 300 { // more than the streams of a connection
		all.Go(func() {
			content := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 1000)
			ingest, err := c.Ingest(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer ingest.Close()
			added, err := ingest.Add(bytes.NewReader(content), p2p.AddOptions{Want: digest.SHA256.FromBytes(content)})
			if err != nil {
				t.Error(err)
				return
			}
			task := p2p.Task{Tag: "t", Digest: added.Digest}
			if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
				t.Error(err)
				return
			}
			blob, err := c.Open(t.Context(), task, p2p.Local)
			if err != nil {
				t.Error(err)
				return
			}
			defer blob.Close()
			if !bytes.Equal(readAll(t, blob), content) {
				t.Error("the blob differs")
			}
		})
	}
	all.Wait()
}

func TestClosedClient(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	began, release := make(chan struct{}), make(chan struct{})
	h.stat = func(context.Context, p2p.StatOptions) (p2p.Info, error) {
		close(began)
		<-release
		return p2p.Info{Task: someTask}, nil
	}
	c := pair(t, h)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	running, closed := make(chan error, 1), make(chan struct{})
	go func() {
		_, err := stat(t.Context(), c, someTask)
		running <- err
	}()
	<-began
	go func() { c.Close(); close(closed) }()
	eventually(t, "the client closes", c.isClosed)
	if _, err := stat(t.Context(), c, someTask); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("a call after Close: %v", err)
	}
	if _, err := ingest.Add(strings.NewReader(""), p2p.AddOptions{}); !errors.Is(err, p2p.ErrClosed) {
		t.Errorf("an add after Close: %v", err)
	}
	select {
	case <-closed:
		t.Error("Close did not wait for the call under way")
	default:
	}
	close(release)
	if err := <-running; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	<-closed
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoDaemon(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "d.sock")
	dead := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, socket := range []string{missing, dead} {
		_, err := Dial(t.Context(), socket)
		if !errors.Is(err, ErrNoDaemon) || !errors.Is(err, p2p.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		if err == nil || !strings.Contains(err.Error(), socket) || !strings.Contains(err.Error(), "another socket") {
			t.Errorf("message %v", err)
		}
	}
	_, err = Dial(t.Context(), "/"+strings.Repeat("x", maxSocketPath))
	if !errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), "107") {
		t.Errorf("long path: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Dial(ctx, missing); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

func TestDaemonComesBack(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	first := serveAt(t, h, socket)
	c := dial(t, socket)
	task := add(t, c, "", strings.NewReader("content"))

	// A call under way when the daemon goes away.
	began := make(chan struct{})
	h.stat = func(ctx context.Context, _ p2p.StatOptions) (p2p.Info, error) {
		close(began)
		<-ctx.Done()
		return p2p.Info{}, context.Cause(ctx)
	}
	lost := make(chan error, 1)
	go func() {
		_, err := stat(t.Context(), c, task)
		lost <- err
	}()
	<-began
	hard, cancel := context.WithCancel(t.Context())
	cancel()
	if err := first.Shutdown(hard); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-lost; !errors.Is(err, p2p.ErrUnavailable) || !strings.Contains(err.Error(), socket) ||
		strings.Contains(err.Error(), "rpc error") {
		t.Errorf("the call under way: %v", err)
	}
	if _, err := stat(t.Context(), c, task); !errors.Is(err, p2p.ErrUnavailable) {
		t.Errorf("while it is away: %v", err)
	}

	h.stat = nil
	serveAt(t, h, socket)
	blob, err := c.Open(t.Context(), task, p2p.Local) // needs the new connection's channel
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	if got := readAll(t, blob); string(got) != "content" {
		t.Errorf("got %q", got)
	}
}

func TestShutdownLetsCallsEnd(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	first := serveAt(t, h, socket)
	c := dial(t, socket)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	added, err := ingest.Add(strings.NewReader("content"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- first.Shutdown(t.Context()) }()
	eventually(t, "the socket is gone", func() bool { _, err := os.Stat(socket); return err != nil })
	eventually(t, "the client notices", func() bool { return !c.current.usable() })

	// The client goes on with the next daemon, and the ingest with the old one.
	serveAt(t, h, socket)
	if _, err := stat(t.Context(), c, someTask); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("a call meanwhile: %v", err)
	}
	select {
	case err := <-stopped:
		t.Fatalf("Shutdown did not wait for the ingest: %v", err)
	default:
	}
	task := p2p.Task{Digest: added.Digest}
	if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
		t.Errorf("commit: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := stat(t.Context(), c, task); err != nil {
		t.Errorf("after the commit: %v", err)
	}
}

func TestNothingLeaks(t *testing.T) {
	s := newStore(t.TempDir())
	h := &hooked{Engine: s}
	socket := serve(t, h)
	keep := dial(t, socket) // so that what gRPC opens once is open
	task := add(t, keep, "", strings.NewReader("content"))
	file := tempFile(t, random(100))
	before := fdCount(t)

	for range 3 {
		c, err := Dial(t.Context(), socket)
		if err != nil {
			t.Fatal(err)
		}
		add(t, c, "", bytes.NewReader(random(100_000)))
		add(t, c, "", file)
		blob, err := c.Open(t.Context(), task, p2p.Local)
		if err != nil {
			t.Fatal(err)
		}
		blob.Close()
		if _, err := c.Open(t.Context(), someTask, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
			t.Fatal(err)
		}
		// An Open that is cancelled after the daemon has sent the file.
		ctx, cancel := context.WithCancel(t.Context())
		h.open = func(ctx context.Context, task p2p.Task) (p2p.Blob, error) {
			cancel()
			return s.Open(t.Context(), task, p2p.Local)
		}
		if blob, err := c.Open(ctx, task, p2p.Local); err == nil {
			blob.Close() // it was faster
		}
		h.open = nil
		// Adds that the daemon never takes the descriptor of.
		h.ingest = func(context.Context) (p2p.Ingest, error) { return nil, p2p.ErrNoSpace }
		for range 20 {
			if i, err := c.Ingest(t.Context()); err == nil {
				i.Add(file, p2p.AddOptions{})
				i.Close()
			}
		}
		h.ingest = nil
		c.Close()
	}
	s.waitIdle(t)
	eventually(t, "all descriptors are closed", func() bool { return fdCount(t) <= before })
}

// progressIngest reports progress much more often than anyone wants to know.
type progressIngest struct{ addFunc }

const progressReports = 100_000

func (p progressIngest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	for i := range int64(progressReports) {
		opts.Progress(i)
	}
	return p2p.Added{Digest: someTask.Digest, Size: progressReports}, p.addFunc(src)
}

func TestProgressIsNotEverything(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	h.ingest = func(context.Context) (p2p.Ingest, error) {
		return progressIngest{func(src io.Reader) error { _, err := io.Copy(io.Discard, src); return err }}, nil
	}
	c := pair(t, h)
	ingest, err := c.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ingest.Close()
	n, last := 0, int64(0)
	if _, err := ingest.Add(strings.NewReader(""),
		p2p.AddOptions{Progress: func(taken int64) { n++; last = taken }}); err != nil {
		t.Fatal(err)
	}
	if n > progressReports/100 || last != progressReports {
		t.Errorf("%d reports, the last of them %d", n, last)
	}
}

// callNames is a stats.Handler that remembers which calls it saw.
type callNames struct {
	mu    sync.Mutex
	names []string
}

func (c *callNames) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names = append(c.names, info.FullMethodName)
	return ctx
}
func (c *callNames) HandleRPC(context.Context, stats.RPCStats)                         {}
func (c *callNames) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (c *callNames) HandleConn(context.Context, stats.ConnStats)                       {}

func TestStatsHandler(t *testing.T) {
	var client, server callNames
	c := dial(t, serve(t, newStore(t.TempDir()), WithStatsHandler(&server)), WithStatsHandler(&client))
	if _, err := stat(t.Context(), c, someTask); !errors.Is(err, p2p.ErrNotFound) {
		t.Fatal(err)
	}
	want := []string{"/dfcache.v1.Daemon/Stat"}
	if !slices.Equal(client.names, want) || !slices.Equal(server.names, want) {
		t.Errorf("client saw %v, server %v", client.names, server.names)
	}
}

// A connection that never makes its handshake does not hold up a hard stop.
func TestShutdownInHandshake(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "d.sock")
	s := serveAt(t, newStore(t.TempDir()), socket)
	rawDial(t, socket)
	eventually(t, "the connection is accepted", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.conns) == 1
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if len(s.conns) != 0 {
		t.Errorf("%d connections left", len(s.conns))
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// What holds and mends reaches the engine as it was asked, tells what it waits for, and ends
// with its context, here and there.
func TestHold(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	c := pair(t, h)
	id := digest.FromDigest(someTask.Digest)
	failed := fmt.Errorf("no: %w", p2p.ErrUnreachable)
	calls := map[string]func(context.Context) error{
		"hold":               func(ctx context.Context) error { return c.Hold(ctx, someTask.Tag, id) },
		"hold the referrers": func(ctx context.Context) error { return c.HoldReferrers(ctx, someTask) },
		"verify":             func(ctx context.Context) error { return c.Verify(ctx, someTask) },
		"mend":               func(ctx context.Context) error { return c.Mend(ctx, someTask) },
	}
	for want, call := range calls {
		h.hold = func(ctx context.Context, what string, task p2p.Task) error {
			if what != want || task != someTask {
				t.Errorf("the engine was told to %s %s, want %s", what, task, want)
			}
			return nil
		}
		if err := call(t.Context()); err != nil {
			t.Errorf("%s: %v", want, err)
		}
		heard := make(chan string, 1)
		h.hold = func(ctx context.Context, _ string, _ p2p.Task) error {
			p2p.NoticeOf(ctx)("patience")
			if got := <-heard; got != "patience" {
				t.Errorf("%s: the notice is %q", want, got)
			}
			return failed
		}
		if err := call(p2p.WithNotice(t.Context(), func(text string) { heard <- text })); !errors.Is(err,
			p2p.ErrUnreachable) {
			t.Errorf("%s fails with %v", want, err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cause, ended := errors.New("the user has seen enough"), make(chan struct{})
		h.hold = func(ctx context.Context, _ string, _ p2p.Task) error {
			cancel(cause)
			<-ctx.Done()
			close(ended)
			return context.Cause(ctx)
		}
		if err := call(ctx); !errors.Is(err, cause) {
			t.Errorf("%s, cancelled: %v", want, err)
		}
		<-ended
	}
	var what string
	h.hold = func(_ context.Context, got string, _ p2p.Task) error { what = got; return nil }
	info, err := c.HoldManifest(t.Context(), someTask.Tag, id, p2p.StatOptions{Providers: true})
	if want := fmt.Sprintf("hold the manifest %+v", p2p.StatOptions{Manifest: true, Providers: true}); err != nil ||
		info.Task != someTask || what != want {
		t.Errorf("the engine was told to %s, want %s; got %+v, %v", what, want, info, err)
	}
}
