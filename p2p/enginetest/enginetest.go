// Package enginetest is the suite that every [p2p.Engine] passes: what the
// interface's comments promise, as tests.
package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Run runs the suite. open returns a new, empty engine; the suite closes it.
func Run(t *testing.T, open func(t *testing.T) p2p.Engine) {
	for name, test := range map[string]func(*testing.T, p2p.Engine){
		"RoundTrip":                 testRoundTrip,
		"RoundTripFile":             testRoundTripFile,
		"RoundTripPipe":             testRoundTripPipe,
		"Algorithms":                testAlgorithms,
		"Mismatch":                  testMismatch,
		"MismatchOfHeldBlob":        testMismatchOfHeldBlob,
		"SourceError":               testSourceError,
		"InvalidInput":              testInvalidInput,
		"NotFound":                  testNotFound,
		"NothingBeforeCommit":       testNothingBeforeCommit,
		"CommitOnce":                testCommitOnce,
		"CommitNeedsBlob":           testCommitNeedsBlob,
		"CommitIsAtomic":            testCommitIsAtomic,
		"UncommittedIsDropped":      testUncommittedIsDropped,
		"SharedAcrossTags":          testSharedAcrossTags,
		"CommitOfHeldBlob":          testCommitOfHeldBlob,
		"Names":                     testNames,
		"NameMoves":                 testNameMoves,
		"PinOutlivesName":           testPinOutlivesName,
		"DeleteReferenced":          testDeleteReferenced,
		"DeleteRemovesNames":        testDeleteRemovesNames,
		"DeleteWhileOpen":           testDeleteWhileOpen,
		"DeleteWhileIngested":       testDeleteWhileIngested,
		"TaskKeepsItsImport":        testTaskKeepsItsImport,
		"LastUsed":                  testLastUsed,
		"List":                      testList,
		"ListMany":                  testListMany,
		"ListStops":                 testListStops,
		"Progress":                  testProgress,
		"CopyToFails":               testCopyToFails,
		"CancelledBefore":           testCancelledBefore,
		"CancelledWhileReading":     testCancelledWhileReading,
		"CancelledWhileReadBlocks":  testCancelledWhileReadBlocks,
		"TimeoutWhileReading":       testTimeoutWhileReading,
		"CancelledBeforeCommit":     testCancelledBeforeCommit,
		"ConcurrentSameContent":     testConcurrentSameContent,
		"ConcurrentImportAndDelete": testConcurrentImportAndDelete,
		"Closed":                    testClosed,
	} {
		t.Run(name, func(t *testing.T) {
			e := open(t)
			t.Cleanup(func() {
				if err := e.Close(); err != nil {
					t.Errorf("close the engine: %v", err)
				}
			})
			test(t, e)
		})
	}
}

// Content returns n bytes that look random and depend on the seed alone.
func Content(n int, seed uint64) []byte {
	data := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(data)
	return data
}

// sizes are those at which something changes: nothing at all, one piece, the
// boundaries of pieces, and where pieces get longer.
var sizes = []int{
	0, 1, 1000,
	digest.MinPieceLength - 1, digest.MinPieceLength, digest.MinPieceLength + 1,
	3*digest.MinPieceLength + 17,
	512*digest.MinPieceLength + 1,
}

// Import stores data as a pinned task.
func Import(t *testing.T, e p2p.Engine, tag string, data []byte) p2p.Task {
	t.Helper()
	task, err := importReader(t.Context(), e, tag, bytes.NewReader(data), p2p.AddOptions{}, true)
	if err != nil {
		t.Fatalf("import %d bytes: %v", len(data), err)
	}
	return task
}

func importReader(ctx context.Context, e p2p.Engine, tag string, src io.Reader, opts p2p.AddOptions, pinned bool) (p2p.Task, error) {
	in, err := e.Ingest(ctx)
	if err != nil {
		return p2p.Task{}, err
	}
	defer in.Close()
	added, err := in.Add(src, opts)
	if err != nil {
		return p2p.Task{}, err
	}
	task := p2p.Task{Tag: tag, Digest: added.Digest}
	return task, in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, MediaType: "application/octet-stream", Pinned: pinned}}})
}

// importArtifact stores an artifact: a manifest that refers to its layers, and a name for it.
func importArtifact(t *testing.T, e p2p.Engine, tag, name string, manifest []byte, layers ...[]byte) (p2p.Task, []p2p.Task) {
	t.Helper()
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	add := func(data []byte) p2p.Task {
		added, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return p2p.Task{Tag: tag, Digest: added.Digest}
	}
	var c p2p.Commit
	var refs []digest.Digest
	var tasks []p2p.Task
	for _, layer := range layers {
		task := add(layer)
		tasks, refs = append(tasks, task), append(refs, task.Digest)
		c.Tasks = append(c.Tasks, p2p.NewTask{Task: task})
	}
	top := add(manifest)
	c.Tasks = append(c.Tasks, p2p.NewTask{Task: top, MediaType: "application/vnd.oci.image.manifest.v1+json", Refs: refs})
	c.Names = []p2p.NewName{{Tag: tag, Name: name, Digest: top.Digest}}
	if err := in.Commit(c); err != nil {
		t.Fatalf("commit artifact %s: %v", name, err)
	}
	return top, tasks
}

// RequireContent fails the test unless the task has exactly this content, however it is read.
func RequireContent(t *testing.T, e p2p.Engine, task p2p.Task, want []byte) {
	t.Helper()
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatalf("open %s: %v", task, err)
	}
	defer blob.Close()
	requireBlob(t, blob, want)
}

func requireBlob(t *testing.T, blob p2p.Blob, want []byte) {
	t.Helper()
	if blob.Size() != int64(len(want)) {
		t.Fatalf("size is %d, want %d", blob.Size(), len(want))
	}
	var buf bytes.Buffer
	if err := blob.CopyTo(t.Context(), &buf, nil); err != nil {
		t.Fatalf("copy: %v", err)
	}
	if !bytes.Equal(buf.Bytes(), want) {
		t.Fatal("the content copied is not the content stored")
	}
	got, err := io.ReadAll(io.NewSectionReader(blob, 0, blob.Size()))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the content read is not the content stored (%v)", err)
	}
	if len(want) > 0 {
		off := len(want) / 3
		part := make([]byte, min(len(want)-off, digest.MinPieceLength+5))
		if _, err := blob.ReadAt(part, int64(off)); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(part, want[off:off+len(part)]) {
			t.Fatalf("the part at %d is not the content stored (%v)", off, err)
		}
	}
	if n, err := blob.ReadAt(make([]byte, 1), blob.Size()); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("reading at the end gives %d, %v; want 0, EOF", n, err)
	}
}

func requireMissing(t *testing.T, e p2p.Engine, task p2p.Task) {
	t.Helper()
	if _, err := e.Stat(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("stat %s: %v; want not found", task, err)
	}
	if blob, err := e.Open(t.Context(), task, p2p.Local); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("open %s: %v; want not found", task, err)
		if err == nil {
			blob.Close()
		}
	}
}

func requireError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error is %v; want one that is %q", what, err, want)
	}
}

func cid(t *testing.T, s string) digest.CID {
	t.Helper()
	c, err := digest.ParseCID(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testRoundTrip(t *testing.T, e p2p.Engine) {
	for i, size := range sizes {
		data := Content(size, uint64(i))
		before := time.Now().Add(-time.Second)
		task := Import(t, e, "models", data)
		if want := digest.SHA256.FromBytes(data); task.Digest != want {
			t.Fatalf("%d bytes: digest is %s, want %s", size, task.Digest, want)
		}
		info, err := e.Stat(t.Context(), task, p2p.Local)
		if err != nil {
			t.Fatal(err)
		}
		table := digest.Table{Size: int64(size), PieceLength: digest.PieceLength(int64(size))}
		if info.Task != task || info.Size != table.Size || info.PieceLength != table.PieceLength || info.Pieces != table.Pieces() ||
			!info.Local() || !info.Pinned || info.MediaType != "application/octet-stream" || info.Imported.Before(before) || !info.LastUsed.IsZero() {
			t.Errorf("%d bytes: info is %+v", size, info)
		}
		RequireContent(t, e, task, data)
		got, err := e.Resolve(t.Context(), "models", digest.FromDigest(task.Digest), p2p.Local)
		if err != nil || got != task {
			t.Errorf("resolve the digest: %v, %v", got, err)
		}
	}
}

func testRoundTripFile(t *testing.T, e p2p.Engine) {
	for i, size := range sizes {
		data := Content(size+100, uint64(i))
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, off := range []int64{0, 100} { // a file is taken from its offset on
			if _, err := f.Seek(off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			task, err := importReader(t.Context(), e, "", f, p2p.AddOptions{}, true)
			if err != nil {
				t.Fatal(err)
			}
			RequireContent(t, e, task, data[off:])
			// Once more, with the digest known: the same result by another way.
			if _, err := f.Seek(off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			again, err := importReader(t.Context(), e, "again", f, p2p.AddOptions{Want: task.Digest}, true)
			if err != nil {
				t.Fatal(err)
			}
			RequireContent(t, e, again, data[off:])
		}
	}
}

func testRoundTripPipe(t *testing.T, e p2p.Engine) {
	data := Content(5*digest.MaxPieceLength+3, 1)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var writing sync.WaitGroup
	defer writing.Wait()
	writing.Go(func() {
		defer w.Close()
		w.Write(data)
	})
	task, err := importReader(t.Context(), e, "t", r, p2p.AddOptions{Want: digest.SHA256.FromBytes(data)}, true)
	if err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, task, data)
}

func testAlgorithms(t *testing.T, e p2p.Engine) {
	data := Content(3*digest.MinPieceLength+1, 1)
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		for _, opts := range []p2p.AddOptions{{Algorithm: alg}, {Want: alg.FromBytes(data)}} {
			task, err := importReader(t.Context(), e, "t", bytes.NewReader(data), opts, true)
			if err != nil {
				t.Fatalf("%s: %v", alg, err)
			}
			if task.Digest != alg.FromBytes(data) {
				t.Errorf("%s: digest is %s", alg, task.Digest)
			}
			RequireContent(t, e, task, data)
		}
	}
}

func testMismatch(t *testing.T, e p2p.Engine) {
	data, want := Content(100_000, 1), digest.SHA256.FromBytes([]byte("something else"))
	_, err := importReader(t.Context(), e, "t", bytes.NewReader(data), p2p.AddOptions{Want: want}, true)
	mismatch, ok := errors.AsType[*digest.MismatchError](err)
	if !ok || mismatch.Want != want || mismatch.Got != digest.SHA256.FromBytes(data) {
		t.Errorf("error is %v; want a mismatch with both digests", err)
	}
	requireError(t, "import", err, digest.ErrMismatch)
	requireMissing(t, e, p2p.Task{Tag: "t", Digest: want})
	requireMissing(t, e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)})
}

func testMismatchOfHeldBlob(t *testing.T, e p2p.Engine) {
	data := Content(100_000, 1)
	task := Import(t, e, "t", data)
	for _, wrong := range [][]byte{Content(100_000, 2), Content(10, 2)} {
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, wrong, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, err = importReader(t.Context(), e, "other", f, p2p.AddOptions{Want: task.Digest}, true)
		requireError(t, "import of wrong content that claims to be what is held", err, digest.ErrMismatch)
		requireMissing(t, e, p2p.Task{Tag: "other", Digest: task.Digest})
	}
	RequireContent(t, e, task, data)
}

var errSource = errors.New("the source broke")

func testSourceError(t *testing.T, e p2p.Engine) {
	data := Content(300_000, 1)
	_, err := importReader(t.Context(), e, "t", io.MultiReader(bytes.NewReader(data), failingReader{}), p2p.AddOptions{}, true)
	requireError(t, "import", err, errSource)
	requireMissing(t, e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)})
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errSource }

func testInvalidInput(t *testing.T, e p2p.Engine) {
	ctx, good := t.Context(), Import(t, e, "t", []byte("good"))
	for _, task := range []p2p.Task{{Tag: "UPPER", Digest: good.Digest}, {Tag: "t", Digest: "sha256:xx"}, {Tag: "t"}, {Tag: "a\x00b", Digest: good.Digest}, {Tag: "../x", Digest: good.Digest}} {
		_, err := e.Stat(ctx, task, p2p.Local)
		requireError(t, fmt.Sprintf("stat %q", task), err, digest.ErrInvalid)
		_, err = e.Open(ctx, task, p2p.Local)
		requireError(t, fmt.Sprintf("open %q", task), err, digest.ErrInvalid)
		_, err = e.Resolve(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.Local)
		requireError(t, fmt.Sprintf("resolve %q", task), err, digest.ErrInvalid)
		_, err = e.Delete(ctx, task.Tag, digest.FromDigest(task.Digest), true)
		requireError(t, fmt.Sprintf("delete %q", task), err, digest.ErrInvalid)
		in, err := e.Ingest(ctx)
		if err != nil {
			t.Fatal(err)
		}
		requireError(t, fmt.Sprintf("commit %q", task), in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}), digest.ErrInvalid)
		in.Close()
	}
	for _, name := range []string{"", "a b", ".x", "a/b", strings.Repeat("a", 129), string(good.Digest)} {
		in, err := e.Ingest(ctx)
		if err != nil {
			t.Fatal(err)
		}
		err = in.Commit(p2p.Commit{Names: []p2p.NewName{{Tag: "t", Name: name, Digest: good.Digest}}})
		requireError(t, fmt.Sprintf("name %q", name), err, digest.ErrInvalid)
		in.Close()
	}
	for _, opts := range []p2p.AddOptions{{Want: "sha256:xx"}, {Want: "md5:d41d8cd98f00b204e9800998ecf8427e"}, {Algorithm: "md5"}} {
		_, err := importReader(ctx, e, "t", strings.NewReader("x"), opts, true)
		requireError(t, fmt.Sprintf("add %+v", opts), err, digest.ErrInvalid)
	}
	bad := "UPPER"
	for _, err := range e.List(ctx, &bad) {
		requireError(t, "list", err, digest.ErrInvalid)
	}
}

func testNotFound(t *testing.T, e p2p.Engine) {
	held := Import(t, e, "t", []byte("held"))
	for _, task := range []p2p.Task{
		{Tag: "t", Digest: digest.SHA256.FromBytes([]byte("absent"))},
		{Tag: "other", Digest: held.Digest}, // the blob is here, but not under this tag
		{Tag: "", Digest: held.Digest},
	} {
		requireMissing(t, e, task)
		id := digest.FromDigest(task.Digest)
		_, err := e.Resolve(t.Context(), task.Tag, id, p2p.Local)
		requireError(t, "resolve", err, p2p.ErrNotFound)
		_, err = e.Delete(t.Context(), task.Tag, id, false)
		requireError(t, "delete", err, p2p.ErrNotFound)
	}
	_, err := e.Resolve(t.Context(), "t", cid(t, "absent"), p2p.Local)
	requireError(t, "resolve a name", err, p2p.ErrNotFound)
	_, err = e.Delete(t.Context(), "t", cid(t, "absent"), false)
	requireError(t, "delete a name", err, p2p.ErrNotFound)
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	err = in.Commit(p2p.Commit{Names: []p2p.NewName{{Tag: "other", Name: "v1", Digest: held.Digest}}})
	requireError(t, "name a task that the tag does not hold", err, p2p.ErrNotFound)
}

func testNothingBeforeCommit(t *testing.T, e p2p.Engine) {
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(strings.NewReader("data"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	requireMissing(t, e, task)
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v", entries)
	}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, task, []byte("data"))
}

func testCommitOnce(t *testing.T, e p2p.Engine) {
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Commit(p2p.Commit{}); err != nil {
		t.Fatalf("an empty commit: %v", err)
	}
	if err := in.Commit(p2p.Commit{}); err == nil {
		t.Error("a second commit succeeds")
	}
	for range 2 {
		if err := in.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func testCommitNeedsBlob(t *testing.T, e p2p.Engine) {
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes([]byte("absent"))}
	requireError(t, "commit", in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}), p2p.ErrNotFound)
	requireMissing(t, e, task)
}

func testCommitIsAtomic(t *testing.T, e p2p.Engine) {
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	added, err := in.Add(strings.NewReader("data"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	err = in.Commit(p2p.Commit{
		Tasks: []p2p.NewTask{{Task: task}},
		Names: []p2p.NewName{{Tag: "t", Name: "v1", Digest: digest.SHA256.FromBytes([]byte("absent"))}},
	})
	requireError(t, "commit", err, p2p.ErrNotFound)
	in.Close()
	requireMissing(t, e, task)
	Import(t, e, "t", []byte("data")) // and the engine goes on
	RequireContent(t, e, task, []byte("data"))
}

func testUncommittedIsDropped(t *testing.T, e p2p.Engine) {
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := in.Add(strings.NewReader("kept"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dropped, err := in.Add(strings.NewReader("dropped"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: kept.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
		t.Fatal(err)
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, task, []byte("kept"))
	again, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	err = again.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: dropped.Digest}}}})
	requireError(t, "commit what was dropped", err, p2p.ErrNotFound)
}

func testSharedAcrossTags(t *testing.T, e p2p.Engine) {
	data := Content(200_000, 1)
	a, b := Import(t, e, "a", data), Import(t, e, "b", data)
	deleted, err := e.Delete(t.Context(), "a", digest.FromDigest(a.Digest), false)
	if err != nil || deleted.Tasks != 1 || deleted.Freed != 0 {
		t.Errorf("delete under the first tag: %+v, %v; want one task and nothing freed", deleted, err)
	}
	requireMissing(t, e, a)
	RequireContent(t, e, b, data)
	deleted, err = e.Delete(t.Context(), "b", digest.FromDigest(b.Digest), false)
	if err != nil || deleted.Tasks != 1 || deleted.Freed != int64(len(data)) {
		t.Errorf("delete under the last tag: %+v, %v; want one task and %d bytes freed", deleted, err, len(data))
	}
	requireMissing(t, e, b)
	RequireContent(t, e, Import(t, e, "a", data), data) // it can come back
}

func testCommitOfHeldBlob(t *testing.T, e p2p.Engine) {
	data := []byte("held")
	task := Import(t, e, "a", data)
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	other := p2p.Task{Tag: "b", Digest: task.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: other}}}); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, other, data)
}

func testNames(t *testing.T, e p2p.Engine) {
	layer, config := Content(1000, 1), []byte("{}")
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), config, layer)
	got, err := e.Resolve(t.Context(), "t", cid(t, "v1"), p2p.Local)
	if err != nil || got != manifest {
		t.Fatalf("resolve: %v, %v; want %v", got, err, manifest)
	}
	other, _ := importArtifact(t, e, "t", "v2", []byte(`{"two":2}`), config, Content(1000, 2))
	deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), false)
	if err != nil || deleted.Tasks != 2 || deleted.Freed != int64(len(layer)+len(`{"one":1}`)) {
		t.Errorf("delete: %+v, %v; want manifest and layer, but not the config that v2 shares", deleted, err)
	}
	requireMissing(t, e, manifest)
	requireMissing(t, e, parts[1])
	RequireContent(t, e, parts[0], config)
	_, err = e.Resolve(t.Context(), "t", cid(t, "v1"), p2p.Local)
	requireError(t, "resolve the deleted name", err, p2p.ErrNotFound)
	RequireContent(t, e, other, []byte(`{"two":2}`))
	_, err = e.Resolve(t.Context(), "u", cid(t, "v2"), p2p.Local)
	requireError(t, "resolve under another tag", err, p2p.ErrNotFound)
}

func testNameMoves(t *testing.T, e p2p.Engine) {
	before, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	after, newParts := importArtifact(t, e, "t", "v1", []byte(`{"two":2}`), Content(1000, 2))
	got, err := e.Resolve(t.Context(), "t", cid(t, "v1"), p2p.Local)
	if err != nil || got != after {
		t.Errorf("resolve: %v, %v; want %v", got, err, after)
	}
	requireMissing(t, e, before)
	requireMissing(t, e, parts[0])
	RequireContent(t, e, newParts[0], Content(1000, 2))
	// The same once more changes nothing.
	again, _ := importArtifact(t, e, "t", "v1", []byte(`{"two":2}`), Content(1000, 2))
	if again != after {
		t.Errorf("the manifest is %v, was %v", again, after)
	}
	RequireContent(t, e, newParts[0], Content(1000, 2))
}

func testPinOutlivesName(t *testing.T, e p2p.Engine) {
	layer := Content(1000, 1)
	pinned := Import(t, e, "t", layer)
	manifest, _ := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), layer)
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), false); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete: %+v, %v; want the manifest only", deleted, err)
	}
	requireMissing(t, e, manifest)
	RequireContent(t, e, pinned, layer)
}

func testDeleteReferenced(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	id := digest.FromDigest(parts[0].Digest)
	_, err := e.Delete(t.Context(), "t", id, false)
	requireError(t, "delete a layer", err, p2p.ErrReferenced)
	if err != nil && !strings.Contains(err.Error(), "v1") {
		t.Errorf("error %q does not name what refers to it", err)
	}
	RequireContent(t, e, parts[0], Content(1000, 1))
	if deleted, err := e.Delete(t.Context(), "t", id, true); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete by force: %+v, %v", deleted, err)
	}
	requireMissing(t, e, parts[0])
	RequireContent(t, e, manifest, []byte(`{"one":1}`))
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), false); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete the name after that: %+v, %v", deleted, err)
	}
}

func testDeleteRemovesNames(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	importArtifact(t, e, "t", "latest", []byte(`{"one":1}`), Content(1000, 1))
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "latest"), false); err != nil || deleted.Tasks != 0 {
		t.Errorf("delete one of two names: %+v, %v; want no task removed", deleted, err)
	}
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(manifest.Digest), false); err != nil || deleted.Tasks != 2 {
		t.Errorf("delete the manifest: %+v, %v; want manifest and layer", deleted, err)
	}
	requireMissing(t, e, parts[0])
	_, err := e.Resolve(t.Context(), "t", cid(t, "v1"), p2p.Local)
	requireError(t, "resolve a name of the deleted manifest", err, p2p.ErrNotFound)
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v", entries)
	}
}

func testDeleteWhileOpen(t *testing.T, e p2p.Engine) {
	data := Content(10*digest.MinPieceLength, 1)
	task := Import(t, e, "t", data)
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(task.Digest), false); err != nil {
		t.Fatal(err)
	}
	requireMissing(t, e, task)
	requireBlob(t, blob, data)
}

func testDeleteWhileIngested(t *testing.T, e p2p.Engine) {
	data := Content(200_000, 1)
	task := Import(t, e, "a", data)
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	// The ingest has seen that the blob is here and relies on it.
	if _, err := e.Delete(t.Context(), "a", digest.FromDigest(task.Digest), false); err != nil {
		t.Fatal(err)
	}
	other := p2p.Task{Tag: "b", Digest: task.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: other}}}); err != nil {
		t.Fatal(err)
	}
	requireMissing(t, e, task)
	RequireContent(t, e, other, data)
}

func testTaskKeepsItsImport(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	first, err := e.Stat(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := importReader(t.Context(), e, "t", strings.NewReader("data"), p2p.AddOptions{}, false); err != nil {
		t.Fatal(err)
	}
	second, err := e.Stat(t.Context(), task, p2p.Local)
	if err != nil || !second.Imported.Equal(first.Imported) || !second.Pinned {
		t.Errorf("after a second import: %+v, %v; want time and pin of the first: %+v", second, err, first)
	}
}

func testLastUsed(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	before := time.Now().Add(-time.Second)
	RequireContent(t, e, task, []byte("data"))
	info, err := e.Stat(t.Context(), task, p2p.Local)
	if err != nil || info.LastUsed.Before(before) {
		t.Errorf("last used is %v (%v); want a time after %v", info.LastUsed, err, before)
	}
}

func list(t *testing.T, e p2p.Engine, tag *string) []string {
	t.Helper()
	var lines []string
	for entry, err := range e.List(t.Context(), tag) {
		if err != nil {
			t.Fatalf("list: %v", err)
		}
		line := entry.Task.Tag + " " + string(entry.Task.Digest)
		if entry.Name != "" {
			line = entry.Task.Tag + " " + entry.Name
		}
		lines = append(lines, fmt.Sprintf("%s %d", line, entry.Total))
	}
	return lines
}

func testList(t *testing.T, e p2p.Engine) {
	line := func(tag string, data []byte, total int) string {
		return fmt.Sprintf("%s %s %d", tag, digest.SHA256.FromBytes(data), total)
	}
	one, two := Content(10, 1), Content(20, 2)
	for _, tag := range []string{"a", "a-b", "", "a/b"} {
		Import(t, e, tag, one)
	}
	importArtifact(t, e, "a", "v1", []byte(`{"one":1}`), one, two)
	importArtifact(t, e, "a", "latest", []byte(`{"one":1}`), one, two)
	inA := []string{line("a", one, 10), line("a", two, 20), line("a", []byte(`{"one":1}`), 39)}
	slices.Sort(inA)
	inA = append([]string{"a latest 39", "a v1 39"}, inA...)
	want := slices.Concat([]string{line("", one, 10)}, inA, []string{line("a-b", one, 10), line("a/b", one, 10)})
	if got := list(t, e, nil); !slices.Equal(got, want) {
		t.Errorf("list:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	a, empty, absent := "a", "", "absent"
	if got := list(t, e, &a); !slices.Equal(got, inA) {
		t.Errorf("list of a:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(inA, "\n"))
	}
	if got := list(t, e, &empty); !slices.Equal(got, want[:1]) {
		t.Errorf("list of the empty tag: %v", got)
	}
	if got := list(t, e, &absent); len(got) > 0 {
		t.Errorf("list of a tag that holds nothing: %v", got)
	}
}

func testListMany(t *testing.T, e p2p.Engine) {
	// More than any implementation reads at once.
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(strings.NewReader("data"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: added.Digest}}}}
	var want []string
	for i := range 1024 {
		name := fmt.Sprintf("v%04d", i)
		c.Names = append(c.Names, p2p.NewName{Tag: "t", Name: name, Digest: added.Digest})
		want = append(want, "t "+name+" 4")
	}
	if err := in.Commit(c); err != nil {
		t.Fatal(err)
	}
	want = append(want, fmt.Sprintf("t %s 4", added.Digest))
	if got := list(t, e, nil); !slices.Equal(got, want) {
		t.Errorf("list has %d lines, want %d, all in order", len(got), len(want))
	}
}

func testListStops(t *testing.T, e p2p.Engine) {
	for _, tag := range []string{"a", "b", "c"} {
		Import(t, e, tag, []byte("data"))
	}
	n := 0
	for range e.List(t.Context(), nil) {
		n++
		break
	}
	if n != 1 {
		t.Errorf("%d entries after a break", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range e.List(ctx, nil) {
		requireError(t, "list", err, context.Canceled)
	}
}

func testProgress(t *testing.T, e p2p.Engine) {
	data := Content(3*digest.MaxPieceLength+7, 1)
	var last int64
	progress := func(n int64) {
		if n < last || n > int64(len(data)) {
			t.Errorf("progress goes from %d to %d of %d", last, n, len(data))
		}
		last = n
	}
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	// A wanted digest that is not held must not make the file be read twice.
	for _, opts := range []p2p.AddOptions{{Want: digest.SHA512.FromBytes(data), Progress: progress}, {Progress: progress}} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		last = 0
		if _, err := importReader(t.Context(), e, "t", f, opts, true); err != nil || last != int64(len(data)) {
			t.Fatalf("progress of the import ends at %d of %d (%v)", last, len(data), err)
		}
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	last = 0
	if err := blob.CopyTo(t.Context(), io.Discard, progress); err != nil || last != int64(len(data)) {
		t.Errorf("progress of the copy ends at %d of %d (%v)", last, len(data), err)
	}
}

type failingWriter struct{}

var errSink = errors.New("the sink broke")

func (failingWriter) Write([]byte) (int, error) { return 0, errSink }

func testCopyToFails(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", Content(10*digest.MinPieceLength, 1))
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	requireError(t, "copy to a sink that breaks", blob.CopyTo(t.Context(), failingWriter{}, nil), errSink)
	ctx, cancel := context.WithCancel(t.Context())
	err = blob.CopyTo(ctx, io.Discard, func(int64) { cancel() })
	requireError(t, "copy with a context that ends", err, context.Canceled)
}

func testCancelledBefore(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	id := digest.FromDigest(task.Digest)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := e.Stat(ctx, task, p2p.Local)
	requireError(t, "stat", err, context.Canceled)
	_, err = e.Open(ctx, task, p2p.Local)
	requireError(t, "open", err, context.Canceled)
	_, err = e.Resolve(ctx, "t", id, p2p.Local)
	requireError(t, "resolve", err, context.Canceled)
	_, err = e.Delete(ctx, "t", id, false)
	requireError(t, "delete", err, context.Canceled)
	_, err = importReader(ctx, e, "t", strings.NewReader("x"), p2p.AddOptions{}, true)
	requireError(t, "import", err, context.Canceled)
	RequireContent(t, e, task, []byte("data"))
}

// stalledPipe returns a pipe that has some data, and then nothing for ever.
func stalledPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if _, err := w.Write([]byte("some data")); err != nil {
		t.Fatal(err)
	}
	return r
}

func testCancelledWhileReading(t *testing.T, e p2p.Engine) {
	ctx, cancel := context.WithCancel(t.Context())
	in, err := e.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	result := make(chan error)
	src := stalledPipe(t)
	go func() {
		_, err := in.Add(src, p2p.AddOptions{})
		result <- err
	}()
	cancel()
	requireError(t, "add from a pipe that stalls", <-result, context.Canceled)
}

// blockedReader says that it is read, and then blocks until it is released.
type blockedReader struct{ began, release chan struct{} }

func (b blockedReader) Read([]byte) (int, error) {
	close(b.began)
	<-b.release
	return 0, io.EOF
}

func testCancelledWhileReadBlocks(t *testing.T, e p2p.Engine) {
	ctx, cancel := context.WithCancel(t.Context())
	in, err := e.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	src := blockedReader{make(chan struct{}), make(chan struct{})}
	defer close(src.release)
	go func() {
		<-src.began
		cancel()
	}()
	_, err = in.Add(src, p2p.AddOptions{})
	requireError(t, "add from a reader that blocks", err, context.Canceled)
}

func testTimeoutWhileReading(t *testing.T, e p2p.Engine) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	in, err := e.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = in.Add(stalledPipe(t), p2p.AddOptions{})
	requireError(t, "add from a pipe that stalls", err, context.DeadlineExceeded)
}

func testCancelledBeforeCommit(t *testing.T, e p2p.Engine) {
	ctx, cancel := context.WithCancel(t.Context())
	in, err := e.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(strings.NewReader("data"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	requireError(t, "commit", in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}), context.Canceled)
	in.Close()
	requireMissing(t, e, task)
}

func testConcurrentSameContent(t *testing.T, e p2p.Engine) {
	data := Content(20*digest.MinPieceLength, 1)
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			opts := p2p.AddOptions{}
			if i%2 == 0 {
				opts.Want = digest.SHA256.FromBytes(data)
			}
			if _, err := importReader(t.Context(), e, fmt.Sprintf("t%d", i%4), bytes.NewReader(data), opts, true); err != nil {
				t.Errorf("import %d: %v", i, err)
			}
		})
	}
	all.Wait()
	for i := range 4 {
		RequireContent(t, e, p2p.Task{Tag: fmt.Sprintf("t%d", i), Digest: digest.SHA256.FromBytes(data)}, data)
	}
}

func testConcurrentImportAndDelete(t *testing.T, e p2p.Engine) {
	// Importers and deleters of the same few blobs get in each other's way as
	// much as they can. What is acknowledged and not deleted has to be right.
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			tag := fmt.Sprintf("t%d", worker)
			for i := range 20 {
				data := Content(1000+i%3, uint64(i%3))
				task, err := importReader(t.Context(), e, tag, bytes.NewReader(data), p2p.AddOptions{}, true)
				if err != nil {
					t.Errorf("import: %v", err)
					return
				}
				blob, err := e.Open(t.Context(), task, p2p.Local)
				if err != nil {
					t.Errorf("open what was just imported: %v", err)
					return
				}
				var buf bytes.Buffer
				if err := blob.CopyTo(t.Context(), &buf, nil); err != nil || !bytes.Equal(buf.Bytes(), data) {
					t.Errorf("content is not what was imported (%v)", err)
				}
				blob.Close()
				if _, err := e.Delete(t.Context(), tag, digest.FromDigest(task.Digest), false); err != nil {
					t.Errorf("delete: %v", err)
					return
				}
			}
		})
	}
	all.Wait()
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v after everything was deleted", entries)
	}
}

func testClosed(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	requireBlob(t, blob, []byte("data"))
	_, err = e.Stat(t.Context(), task, p2p.Local)
	requireError(t, "stat", err, p2p.ErrClosed)
	_, err = e.Open(t.Context(), task, p2p.Local)
	requireError(t, "open", err, p2p.ErrClosed)
	_, err = e.Ingest(t.Context())
	requireError(t, "ingest", err, p2p.ErrClosed)
	_, err = e.Delete(t.Context(), "t", digest.FromDigest(task.Digest), false)
	requireError(t, "delete", err, p2p.ErrClosed)
	for _, err := range e.List(t.Context(), nil) {
		requireError(t, "list", err, p2p.ErrClosed)
	}
}
