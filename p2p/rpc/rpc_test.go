package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

// serveAt serves engine on socket. The returned function ends it.
func serveAt(t testing.TB, engine p2p.Engine, socket string, opts ...ServerOption) *Server {
	t.Helper()
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(engine, logTo(testLog{t}), opts...)
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
	return s
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
	if err := ingest.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Pinned: true}}}); err != nil {
		t.Fatal(err)
	}
	return task
}

func readAll(t testing.TB, b p2p.Blob) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := b.CopyTo(t.Context(), &buf, nil); err != nil {
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
		"reader":       {src: func(*testing.T) io.Reader { return bytes.NewReader(content) }, want: content},
		"plain reader": {src: func(*testing.T) io.Reader { return io.MultiReader(bytes.NewReader(content)) }, want: content},
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
			if _, err := c.Stat(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
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
	deleted, err := c.Delete(t.Context(), "", digest.FromDigest(task.Digest), false)
	if want := (p2p.Deleted{Tasks: 1, Freed: int64(len(content))}); err != nil || deleted != want {
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
	err = blob.CopyTo(t.Context(), io.Discard, nil)
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

type bareBlob struct{ p2p.Blob }

func TestOpenRefusesBlob(t *testing.T) {
	s := newStore(t.TempDir())
	table := &digest.Table{Digest: someTask.Digest, PieceLength: digest.PieceLength(0)}
	h := &hooked{Engine: s}
	c := pair(t, h)
	h.open = func(context.Context, p2p.Task) (p2p.Blob, error) {
		f := tempFile(t, nil) // open for writing too
		return &storeBlob{digest.NewVerified(f, table), f}, nil
	}
	if _, err := c.Open(t.Context(), someTask, p2p.Local); err == nil || !strings.Contains(err.Error(), "open for writing") {
		t.Errorf("writable file: %v", err)
	}
	h.open = func(context.Context, p2p.Task) (p2p.Blob, error) {
		f := tempFile(t, nil)
		return bareBlob{&storeBlob{digest.NewVerified(f, table), f}}, nil
	}
	if _, err := c.Open(t.Context(), someTask, p2p.Local); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("no file: %v", err)
	}
}

func TestCommitAndLookUp(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
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
		{Task: p2p.Task{Tag: "models", Digest: digests[0]}, MediaType: "application/x; a=b", Pinned: true, Refs: digests[1:]},
		{Task: p2p.Task{Tag: "", Digest: digests[1]}, Refs: []digest.Digest{}},
	}
	names := []p2p.NewName{{Tag: "models", Name: "v1", Digest: digests[0]}}
	if err := ingest.Commit(p2p.Commit{Tasks: tasks, Names: names}); err != nil {
		t.Fatal(err)
	}

	cid, err := digest.ParseCID("v1")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Resolve(t.Context(), "models", cid, p2p.Local); err != nil || got != tasks[0].Task {
		t.Errorf("resolved %v, %v; want %v", got, err, tasks[0].Task)
	}
	if _, err := c.Resolve(t.Context(), "", cid, p2p.Network); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("resolved under another tag: %v", err)
	}
	info, err := c.Stat(t.Context(), tasks[0].Task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	want := p2p.Info{
		Task: tasks[0].Task, Size: 3, PieceLength: digest.PieceLength(3), Pieces: 1, Held: 1,
		MediaType: "application/x; a=b", Pinned: true, Imported: imported,
	}
	if !info.Imported.Equal(want.Imported) || !info.LastUsed.IsZero() {
		t.Errorf("times %v, %v", info.Imported, info.LastUsed)
	}
	info.Imported = want.Imported
	if info != want {
		t.Errorf("info %+v, want %+v", info, want)
	}

	list := func(tag *string) (got []string) {
		for e, err := range c.List(t.Context(), tag) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%s %s %s %d", e.Task.Tag, e.Name, e.Task.Digest, e.Total))
		}
		return got
	}
	name, one, two := fmt.Sprintf("models v1 %s 6", digests[0]), fmt.Sprintf("models  %s 3", digests[0]), fmt.Sprintf("  %s 3", digests[1])
	empty, models, none := "", "models", "none"
	for _, test := range []struct {
		tag  *string
		want []string
	}{{nil, []string{two, name, one}}, {&empty, []string{two}}, {&models, []string{name, one}}, {&none, nil}} {
		if got := list(test.tag); !slices.Equal(got, test.want) {
			t.Errorf("list %v, want %v", got, test.want)
		}
	}
}

// A commit and a list that do not fit one message.
func TestManyTasks(t *testing.T) {
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
		commit.Tasks = append(commit.Tasks, p2p.NewTask{Task: task, Refs: []digest.Digest{}})
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
	for e, err := range c.List(t.Context(), nil) {
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
	for range c.List(t.Context(), nil) {
		break // ends the call, so that Close does not wait for it
	}
}

func TestListEndsWithError(t *testing.T) {
	h := &hooked{Engine: newStore(t.TempDir())}
	h.list = func(yield func(p2p.Entry, error) bool) {
		if yield(p2p.Entry{Info: p2p.Info{Task: someTask}}, nil) {
			yield(p2p.Entry{}, p2p.ErrUnavailable)
		}
	}
	c := pair(t, h)
	var got []error
	for e, err := range c.List(t.Context(), nil) {
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
	for name, call := range map[string]func() error{
		"stat": func() error { _, err := c.Stat(t.Context(), bad, p2p.Local); return err },
		"open": func() error { _, err := c.Open(t.Context(), bad, p2p.Local); return err },
		"resolve": func() error {
			_, err := c.Resolve(t.Context(), "\xff", digest.FromDigest(someTask.Digest), p2p.Local)
			return err
		},
		"scope":  func() error { _, err := c.Stat(t.Context(), someTask, 7); return err },
		"delete": func() error { _, err := c.Delete(t.Context(), "", digest.CID{}, false); return err },
		"list": func() error {
			for _, err := range c.List(t.Context(), &bad.Tag) {
				return err
			}
			return nil
		},
		"add": func() error {
			i, err := c.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			_, err = i.Add(strings.NewReader(""), p2p.AddOptions{Want: "sha256:xx"})
			return err
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
		if !errors.As(err, &mismatch) || mismatch.Want != someTask.Digest || mismatch.Got != digest.SHA256.FromString("other") {
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
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// addFunc is an ingest of which only Add works.
type addFunc func(io.Reader) error

func (f addFunc) Add(src io.Reader, _ p2p.AddOptions) (p2p.Added, error) {
	return p2p.Added{Digest: someTask.Digest}, f(src)
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
	if _, err = ingest.Add(endless{}, p2p.AddOptions{}); err == nil || !strings.Contains(err.Error(), "did not take in everything") {
		t.Errorf("got %v", err)
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
	h.stat = func(ctx context.Context, _ p2p.Task) (p2p.Info, error) {
		began <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return p2p.Info{}, context.Cause(ctx)
	}
	c := pair(t, h)

	why := errors.New("changed my mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { <-began; cancel(why) }()
	if _, err := c.Stat(ctx, someTask, p2p.Local); !errors.Is(err, why) {
		t.Errorf("got %v, want the cause", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the engine saw %v", err)
	}

	ctx, cancelTimeout := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelTimeout()
	if _, err := c.Stat(ctx, someTask, p2p.Local); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the engine was not told")
	}
	if _, err := c.Stat(ctx, someTask, p2p.Local); !errors.Is(err, context.DeadlineExceeded) {
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
	s.waitIdle(t) // although nothing came through the pipe, and it is still open
	close(src.release)
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
	h.stat = func(context.Context, p2p.Task) (p2p.Info, error) {
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
		_, err := c.Stat(t.Context(), someTask, p2p.Local)
		running <- err
	}()
	<-began
	go func() { c.Close(); close(closed) }()
	eventually(t, "the client closes", c.isClosed)
	if _, err := c.Stat(t.Context(), someTask, p2p.Local); !errors.Is(err, p2p.ErrClosed) {
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
		if err == nil || !strings.Contains(err.Error(), socket) || !strings.Contains(err.Error(), "--daemon-sock") {
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
	h.stat = func(ctx context.Context, _ p2p.Task) (p2p.Info, error) {
		close(began)
		<-ctx.Done()
		return p2p.Info{}, context.Cause(ctx)
	}
	lost := make(chan error, 1)
	go func() {
		_, err := c.Stat(t.Context(), task, p2p.Local)
		lost <- err
	}()
	<-began
	hard, cancel := context.WithCancel(t.Context())
	cancel()
	if err := first.Shutdown(hard); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-lost; !errors.Is(err, p2p.ErrUnavailable) || !strings.Contains(err.Error(), socket) || strings.Contains(err.Error(), "rpc error") {
		t.Errorf("the call under way: %v", err)
	}
	if _, err := c.Stat(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrUnavailable) {
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
	if _, err := c.Stat(t.Context(), someTask, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
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
	if _, err := c.Stat(t.Context(), task, p2p.Local); err != nil {
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
	if _, err := ingest.Add(strings.NewReader(""), p2p.AddOptions{Progress: func(taken int64) { n++; last = taken }}); err != nil {
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
	if _, err := c.Stat(t.Context(), someTask, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
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
