// Package enginetest is the suite that every [p2p.Engine] passes: what the
// interface's comments promise, as tests.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
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
		"SourceChanges":             testSourceChanges,
		"InvalidInput":              testInvalidInput,
		"InvalidOptions":            testInvalidOptions,
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
		"DeleteSeveral":             testDeleteSeveral,
		"DeleteAll":                 testDeleteAll,
		"DeleteListed":              testDeleteListed,
		"DeleteRemovesNames":        testDeleteRemovesNames,
		"Descriptions":              testDescriptions,
		"Expect":                    testExpect,
		"LooseTask":                 testLooseTask,
		"LooseTaskIsAdopted":        testLooseTaskIsAdopted,
		"NameOnly":                  testNameOnly,
		"Unpin":                     testUnpin,
		"NameKeepsOld":              testNameKeepsOld,
		"Needs":                     testNeeds,
		"Lease":                     testLease,
		"LeaseByStat":               testLeaseByStat,
		"Lacks":                     testLacks,
		"ManifestReplacesRefs":      testManifestReplacesRefs,
		"InvalidManifest":           testInvalidManifest,
		"MediaTypes":                testMediaTypes,
		"Referrers":                 testReferrers,
		"ReferrerBeforeSubject":     testReferrerBeforeSubject,
		"StatManifest":              testStatManifest,
		"Rehash":                    testRehash,
		"Create":                    testCreate,
		"CreateSeveral":             testCreateSeveral,
		"CreateMismatch":            testCreateMismatch,
		"CreateUnfinished":          testCreateUnfinished,
		"CreateCancelled":           testCreateCancelled,
		"CreateClosed":              testCreateClosed,
		"CopyRange":                 testCopyRange,
		"FileBlob":                  testFileBlob,
		"DeleteWhileOpen":           testDeleteWhileOpen,
		"DeleteWhileIngested":       testDeleteWhileIngested,
		"TaskKeepsItsImport":        testTaskKeepsItsImport,
		"LastUsed":                  testLastUsed,
		"List":                      testList,
		"ListKinds":                 testListKinds,
		"ListMany":                  testListMany,
		"ListStops":                 testListStops,
		"Progress":                  testProgress,
		"CopyRangeFails":            testCopyRangeFails,
		"CancelledBefore":           testCancelledBefore,
		"CancelledWhileReading":     testCancelledWhileReading,
		"CancelledWhileReadBlocks":  testCancelledWhileReadBlocks,
		"TimeoutWhileReading":       testTimeoutWhileReading,
		"CancelledBeforeCommit":     testCancelledBeforeCommit,
		"ConcurrentSameContent":     testConcurrentSameContent,
		"ConcurrentImportAndDelete": testConcurrentImportAndDelete,
		"NoPeers":                   testNoPeers,
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
// boundaries of pieces, and, but for -short, a hundred pieces.
func sizes() []int {
	sizes := []int{
		0, 1, 1000,
		digest.MinPieceLength - 1, digest.MinPieceLength, digest.MinPieceLength + 1,
		3*digest.MinPieceLength + 17,
	}
	if !testing.Short() {
		sizes = append(sizes, 100*digest.MinPieceLength+1)
	}
	return sizes
}

// Import stores data as a pinned task.
func Import(t *testing.T, e p2p.Engine, tag string, data []byte) p2p.Task {
	t.Helper()
	task, err := importReader(t.Context(), e, tag, bytes.NewReader(data), p2p.AddOptions{}, p2p.KeepPinned)
	if err != nil {
		t.Fatalf("import %d bytes: %v", len(data), err)
	}
	return task
}

func importReader(
	ctx context.Context, e p2p.Engine, tag string, src io.Reader, opts p2p.AddOptions, keep p2p.Keep,
) (p2p.Task, error) {
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
	return task, in.Commit(
		p2p.Commit{Tasks: []p2p.NewTask{{Task: task, MediaType: "application/octet-stream", Keep: keep}}})
}

// importArtifact stores an artifact: a manifest that refers to its layers, and a name for it.
func importArtifact(
	t *testing.T, e p2p.Engine, tag, name string, manifest []byte, layers ...[]byte,
) (p2p.Task, []p2p.Task) {
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
	c.Tasks = append(c.Tasks, p2p.NewTask{
		Task: top, MediaType: "application/vnd.oci.image.manifest.v1+json", Manifest: &p2p.NewManifest{Refs: refs}})
	c.Names = []p2p.NewName{{Tag: tag, Name: name, Digest: top.Digest}}
	if err := in.Commit(c); err != nil {
		t.Fatalf("commit artifact %s: %v", name, err)
	}
	return top, tasks
}

// stat describes a task.
func stat(ctx context.Context, e p2p.Engine, task p2p.Task) (p2p.Info, error) {
	return e.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local})
}

// resolve returns the task that id names.
func resolve(ctx context.Context, e p2p.Engine, tag string, id digest.CID) (p2p.Task, error) {
	info, err := e.Stat(ctx, tag, id, p2p.StatOptions{Scope: p2p.Local})
	return info.Task, err
}

// Fetch opens a task's blob, wherever it is, and returns its content.
func Fetch(ctx context.Context, e p2p.Engine, task p2p.Task) ([]byte, error) {
	blob, err := e.Open(ctx, task, p2p.Network)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	content := bytes.NewBuffer(make([]byte, 0, blob.Size()))
	err = blob.CopyRange(ctx, content, 0, blob.Size(), nil)
	return content.Bytes(), err
}

// RequireError ends the test where an error is not the one that is wanted, and fails it
// where that does not say what it should.
func RequireError(t testing.TB, what string, err, want error, says ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: %v; want an error that is %q", what, err, want)
	}
	for _, text := range says {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the error %q does not say %q", what, err, text)
		}
	}
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

// expecting is what is still to be written. Large blobs would take the race detector long
// in a growing buffer.
type expecting []byte

// Write fails where something else comes.
func (e *expecting) Write(p []byte) (int, error) {
	if len(p) > len(*e) || !bytes.Equal(p, (*e)[:len(p)]) {
		return 0, errors.New("it is not the content stored")
	}
	*e = (*e)[len(p):]
	return len(p), nil
}

func requireBlob(t *testing.T, blob p2p.Blob, want []byte) {
	t.Helper()
	if blob.Size() != int64(len(want)) {
		t.Fatalf("size is %d, want %d", blob.Size(), len(want))
	}
	if s := blob.Sources(); s != nil {
		t.Errorf("the blob was here, and came from %v", s)
	}
	copied := expecting(want)
	if err := blob.CopyRange(t.Context(), &copied, 0, blob.Size(), nil); err != nil {
		t.Fatalf("copy: %v", err)
	}
	if len(copied) > 0 {
		t.Fatal("the content copied is shorter than the content stored")
	}
	read := expecting(want)
	if _, err := io.Copy(&read, io.NewSectionReader(blob, 0, blob.Size())); err != nil || len(read) > 0 {
		t.Fatalf("the content read is not the content stored (%v)", err)
	}
	if len(want) > 0 {
		off := len(want) / 3
		part := make([]byte, min(len(want)-off, digest.MinPieceLength+5))
		if _, err := blob.ReadAt(part, int64(off)); err != nil && !errors.Is(err, io.EOF) ||
			!bytes.Equal(part, want[off:off+len(part)]) {
			t.Fatalf("the part at %d is not the content stored (%v)", off, err)
		}
	}
	if n, err := blob.ReadAt(make([]byte, 1), blob.Size()); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("reading at the end gives %d, %v; want 0, EOF", n, err)
	}
}

func requireMissing(t *testing.T, e p2p.Engine, task p2p.Task) {
	t.Helper()
	if _, err := stat(t.Context(), e, task); !errors.Is(err, p2p.ErrNotFound) {
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
	for i, size := range sizes() {
		data := Content(size, uint64(i))
		before := time.Now().Add(-time.Second)
		task := Import(t, e, "models", data)
		if want := digest.SHA256.FromBytes(data); task.Digest != want {
			t.Fatalf("%d bytes: digest is %s, want %s", size, task.Digest, want)
		}
		info, err := stat(t.Context(), e, task)
		if err != nil {
			t.Fatal(err)
		}
		table := digest.Table{Size: int64(size), PieceLength: digest.PieceLength(int64(size))}
		if info.Task != task || info.Size != table.Size || info.PieceLength != table.PieceLength ||
			info.Pieces != table.Pieces() ||
			!info.Local() || info.Keep != p2p.KeepPinned || info.MediaType != "application/octet-stream" ||
			info.Imported.Before(before) || !info.LastUsed.IsZero() {
			t.Errorf("%d bytes: info is %+v", size, info)
		}
		RequireContent(t, e, task, data)
		got, err := resolve(t.Context(), e, "models", digest.FromDigest(task.Digest))
		if err != nil || got != task {
			t.Errorf("resolve the digest: %v, %v", got, err)
		}
	}
}

func testRoundTripFile(t *testing.T, e p2p.Engine) {
	for i, size := range sizes() {
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
			task, err := importReader(t.Context(), e, "", f, p2p.AddOptions{}, p2p.KeepPinned)
			if err != nil {
				t.Fatal(err)
			}
			RequireContent(t, e, task, data[off:])
			// Once more, with the digest known: the same result by another way.
			if _, err := f.Seek(off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			again, err := importReader(t.Context(), e, "again", f, p2p.AddOptions{Want: task.Digest}, p2p.KeepPinned)
			if err != nil {
				t.Fatal(err)
			}
			RequireContent(t, e, again, data[off:])
		}
	}
}

func testRoundTripPipe(t *testing.T, e p2p.Engine) {
	size := 5*digest.MaxPieceLength + 3
	if testing.Short() {
		size = 5*digest.MinPieceLength + 3
	}
	data := Content(size, 1)
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
	task, err := importReader(t.Context(), e, "t", r, p2p.AddOptions{Want: digest.SHA256.FromBytes(data)},
		p2p.KeepPinned)
	if err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, task, data)
}

func testAlgorithms(t *testing.T, e p2p.Engine) {
	data := Content(3*digest.MinPieceLength+1, 1)
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		for _, opts := range []p2p.AddOptions{{Algorithm: alg}, {Want: alg.FromBytes(data)}} {
			task, err := importReader(t.Context(), e, "t", bytes.NewReader(data), opts, p2p.KeepPinned)
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
	_, err := importReader(t.Context(), e, "t", bytes.NewReader(data), p2p.AddOptions{Want: want}, p2p.KeepPinned)
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
		_, err = importReader(t.Context(), e, "other", f, p2p.AddOptions{Want: task.Digest}, p2p.KeepPinned)
		requireError(t, "import of wrong content that claims to be what is held", err, digest.ErrMismatch)
		requireMissing(t, e, p2p.Task{Tag: "other", Digest: task.Digest})
	}
	RequireContent(t, e, task, data)
}

var errSource = errors.New("the source broke")

func testSourceError(t *testing.T, e p2p.Engine) {
	data := Content(300_000, 1)
	_, err := importReader(t.Context(), e, "t", io.MultiReader(bytes.NewReader(data), failingReader{}),
		p2p.AddOptions{}, p2p.KeepPinned)
	requireError(t, "import", err, errSource)
	requireMissing(t, e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)})
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errSource }

// testSourceChanges: a file that is written to while it is added is refused, whether it
// is copied or compared with what is held. One whose name or mode alone changes is taken.
func testSourceChanges(t *testing.T, e p2p.Engine) {
	// So long that the clock of the file system goes on meanwhile.
	data := Content(2*digest.MaxPieceLength, 1)
	held := digest.SHA256.FromBytes(data)
	if _, err := importReader(t.Context(), e, "held", bytes.NewReader(data), p2p.AddOptions{},
		p2p.KeepPinned); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "file")
	for what, c := range map[string]struct {
		change func(f *os.File, n int) error
		says   string // where it is refused
	}{
		"written in place": {func(f *os.File, n int) error {
			_, err := f.WriteAt([]byte{byte(n)}, 0)
			return err
		}, "it was written to"},
		"appended to": {func(f *os.File, n int) error {
			_, err := f.WriteAt([]byte("more"), int64(len(data)+4*n))
			return err
		}, "it was only appended to"},
		"cut": {func(f *os.File, n int) error { return f.Truncate(int64(max(10, len(data)-n))) }, "it was cut"},
		"mode": {func(f *os.File, n int) error {
			if n > 0 {
				return nil // or it goes on while the content is looked at again
			}
			return f.Chmod(0o640)
		}, ""},
	} {
		for _, want := range []digest.Digest{"", held} {
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			over := make(chan struct{})
			var changing sync.WaitGroup
			changing.Go(func() {
				for n := 0; ; n++ {
					if err := c.change(f, n); err != nil {
						t.Error(err)
						return
					}
					select {
					case <-over:
						return
					case <-time.After(100 * time.Microsecond):
					}
				}
			})
			src, err := os.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			task, err := importReader(t.Context(), e, "changes", src, p2p.AddOptions{Want: want}, p2p.KeepPinned)
			close(over)
			changing.Wait()
			src.Close()
			f.Close()
			if c.says == "" {
				if err != nil || task.Digest != held {
					t.Errorf("%s, want %q: %s, %v", what, want, task, err)
				}
			} else if !errors.Is(err, p2p.ErrChanged) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s, want %q: %v; want %q", what, want, err, c.says)
			}
		}
	}
}

func testInvalidInput(t *testing.T, e p2p.Engine) {
	ctx, good := t.Context(), Import(t, e, "t", []byte("good"))
	for _, task := range []p2p.Task{{Tag: "UPPER", Digest: good.Digest}, {Tag: "t", Digest: "sha256:xx"}, {Tag: "t"},
		{Tag: "a\x00b", Digest: good.Digest}, {Tag: "../x", Digest: good.Digest}} {
		_, err := stat(ctx, e, task)
		requireError(t, fmt.Sprintf("stat %q", task), err, digest.ErrInvalid)
		_, err = e.Open(ctx, task, p2p.Local)
		requireError(t, fmt.Sprintf("open %q", task), err, digest.ErrInvalid)
		_, err = resolve(ctx, e, task.Tag, digest.FromDigest(task.Digest))
		requireError(t, fmt.Sprintf("resolve %q", task), err, digest.ErrInvalid)
		_, err = e.Delete(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.DeleteOptions{Force: true})
		requireError(t, fmt.Sprintf("delete %q", task), err, digest.ErrInvalid)
		in, err := e.Ingest(ctx)
		if err != nil {
			t.Fatal(err)
		}
		requireError(t, fmt.Sprintf("commit %q", task), in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}),
			digest.ErrInvalid)
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
	for _, opts := range []p2p.AddOptions{
		{Want: "sha256:xx"}, {Want: "md5:d41d8cd98f00b204e9800998ecf8427e"}, {Algorithm: "md5"}} {
		_, err := importReader(ctx, e, "t", strings.NewReader("x"), opts, p2p.KeepPinned)
		requireError(t, fmt.Sprintf("add %+v", opts), err, digest.ErrInvalid)
	}
	bad := "UPPER"
	for _, err := range e.List(ctx, p2p.Query{Tag: &bad}) {
		requireError(t, "list", err, digest.ErrInvalid)
	}
}

// testInvalidOptions: what makes no sense together is refused, by every engine.
func testInvalidOptions(t *testing.T, e p2p.Engine) {
	ctx, task := t.Context(), Import(t, e, "t", []byte("good"))
	other := digest.SHA256.FromString("other")
	importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), []byte("layer"))
	for what, opts := range map[string]p2p.StatOptions{
		"no scope":           {Scope: -1},
		"too far a scope":    {Scope: p2p.Local + 1},
		"providers, locally": {Scope: p2p.Local, Providers: true},
	} {
		_, err := e.Stat(ctx, "t", cid(t, "v1"), opts)
		requireError(t, "a stat that "+what, err, digest.ErrInvalid)
	}
	_, err := e.Delete(ctx, "t", cid(t, "v1"), p2p.DeleteOptions{NameOnly: true, Force: true})
	requireError(t, "a delete of a name by force", err, digest.ErrInvalid)
	for what, q := range map[string]p2p.Query{
		"after what is too long": {Kind: p2p.KindNames, After: strings.Repeat("a", p2p.MaxTag+1)},
	} {
		for _, err := range e.List(ctx, q) {
			requireError(t, "list "+what, err, digest.ErrInvalid)
		}
	}
	many := slices.Repeat([]digest.Digest{other}, p2p.MaxManifestRefs+1)
	for what, n := range map[string]p2p.NewTask{
		"long media type":          {MediaType: strings.Repeat("x", p2p.MaxMediaType+1)},
		"media type of two lines":  {MediaType: "a\nb"},
		"unknown keep":             {Keep: 17},
		"origin before all clocks": {Origin: time.Unix(-1, 0)},
		"too many refs":            {Manifest: &p2p.NewManifest{Refs: many}},
		"too many needs":           {Manifest: &p2p.NewManifest{Refs: many[:1], Needs: many}},
		"need that is no ref":      {Manifest: &p2p.NewManifest{Needs: many[:1]}},
	} {
		in, err := e.Ingest(ctx)
		if err != nil {
			t.Fatal(err)
		}
		n.Task = task
		requireError(t, "commit a task with "+what, in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}}), digest.ErrInvalid)
		in.Close()
	}
	if got := len(list(t, e, nil)); got != 4 {
		t.Errorf("list has %d entries after that, want 4", got)
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
		_, err := resolve(t.Context(), e, task.Tag, id)
		requireError(t, "resolve", err, p2p.ErrNotFound)
		_, err = e.Delete(t.Context(), task.Tag, id, p2p.DeleteOptions{})
		requireError(t, "delete", err, p2p.ErrNotFound)
	}
	_, err := resolve(t.Context(), e, "t", cid(t, "absent"))
	requireError(t, "resolve a name", err, p2p.ErrNotFound)
	_, err = e.Delete(t.Context(), "t", cid(t, "absent"), p2p.DeleteOptions{})
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
	deleted, err := e.Delete(t.Context(), "a", digest.FromDigest(a.Digest), p2p.DeleteOptions{})
	if err != nil || deleted.Tasks != 1 || deleted.Freed != 0 {
		t.Errorf("delete under the first tag: %+v, %v; want one task and nothing freed", deleted, err)
	}
	requireMissing(t, e, a)
	RequireContent(t, e, b, data)
	deleted, err = e.Delete(t.Context(), "b", digest.FromDigest(b.Digest), p2p.DeleteOptions{})
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
	got, err := resolve(t.Context(), e, "t", cid(t, "v1"))
	if err != nil || got != manifest {
		t.Fatalf("resolve: %v, %v; want %v", got, err, manifest)
	}
	other, _ := importArtifact(t, e, "t", "v2", []byte(`{"two":2}`), config, Content(1000, 2))
	deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), p2p.DeleteOptions{})
	if err != nil || deleted.Tasks != 2 || deleted.Freed != int64(len(layer)+len(`{"one":1}`)) {
		t.Errorf("delete: %+v, %v; want manifest and layer, but not the config that v2 shares", deleted, err)
	}
	requireMissing(t, e, manifest)
	requireMissing(t, e, parts[1])
	RequireContent(t, e, parts[0], config)
	_, err = resolve(t.Context(), e, "t", cid(t, "v1"))
	requireError(t, "resolve the deleted name", err, p2p.ErrNotFound)
	RequireContent(t, e, other, []byte(`{"two":2}`))
	_, err = resolve(t.Context(), e, "u", cid(t, "v2"))
	requireError(t, "resolve under another tag", err, p2p.ErrNotFound)
}

func testNameMoves(t *testing.T, e p2p.Engine) {
	before, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	after, newParts := importArtifact(t, e, "t", "v1", []byte(`{"two":2}`), Content(1000, 2))
	got, err := resolve(t.Context(), e, "t", cid(t, "v1"))
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
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), p2p.DeleteOptions{}); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete: %+v, %v; want the manifest only", deleted, err)
	}
	requireMissing(t, e, manifest)
	RequireContent(t, e, pinned, layer)
}

func testDeleteReferenced(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	id := digest.FromDigest(parts[0].Digest)
	_, err := e.Delete(t.Context(), "t", id, p2p.DeleteOptions{})
	requireError(t, "delete a layer", err, p2p.ErrReferenced)
	if err != nil && !strings.Contains(err.Error(), "v1") {
		t.Errorf("error %q does not name what refers to it", err)
	}
	RequireContent(t, e, parts[0], Content(1000, 1))
	// What has no name is named by its digest.
	nameless := push(t, e, []byte(`{"two":2}`), refs(manifest))
	_, err = e.Delete(t.Context(), "t", digest.FromDigest(manifest.Digest), p2p.DeleteOptions{})
	RequireError(t, "delete a manifest", err, p2p.ErrReferenced, string(nameless.Digest))
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(nameless.Digest), p2p.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if deleted, err := e.Delete(t.Context(), "t", id, p2p.DeleteOptions{Force: true}); err != nil ||
		deleted.Tasks != 1 {
		t.Errorf("delete by force: %+v, %v", deleted, err)
	}
	requireMissing(t, e, parts[0])
	RequireContent(t, e, manifest, []byte(`{"one":1}`))
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "v1"), p2p.DeleteOptions{}); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete the name after that: %+v, %v", deleted, err)
	}
}

func testDeleteSeveral(t *testing.T, e p2p.Engine) {
	ctx := t.Context()
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	index := push(t, e, []byte(`{"two":2}`), refs(manifest))
	importArtifact(t, e, "t", "v2", []byte(`{"three":3}`), Content(1000, 2))
	alone := Import(t, e, "t", Content(1000, 3))
	of := func(task p2p.Task) digest.CID { return digest.FromDigest(task.Digest) }
	// One that something else refers to keeps all of them.
	before := list(t, e, nil)
	_, err := e.Delete(ctx, "t", of(alone), p2p.DeleteOptions{Also: []digest.CID{cid(t, "v2"), of(parts[0])}})
	requireError(t, "delete a layer among others", err, p2p.ErrReferenced)
	if after := list(t, e, nil); !reflect.DeepEqual(after, before) {
		t.Errorf("a delete that failed left %v, had %v", after, before)
	}
	// What they refer to of each other does not, in any order, nor does one that is nowhere, or twice there.
	absent := cid(t, "absent")
	deleted, err := e.Delete(ctx, "t", of(parts[0]), p2p.DeleteOptions{Also: []digest.CID{
		of(manifest), absent, of(index), of(alone), of(alone), cid(t, "v1")}})
	if want := []digest.CID{absent}; err != nil || !slices.Equal(deleted.NotFound, want) || deleted.Tasks != 4 {
		t.Errorf("delete of several: %+v, %v", deleted, err)
	}
	for _, task := range []p2p.Task{parts[0], manifest, index, alone} {
		requireMissing(t, e, task)
	}
	if _, err := resolve(ctx, e, "t", cid(t, "v2")); err != nil {
		t.Error(err)
	}
	_, err = e.Delete(ctx, "t", absent, p2p.DeleteOptions{Also: []digest.CID{of(alone)}})
	requireError(t, "delete what is nowhere", err, p2p.ErrNotFound)
	for what, opts := range map[string]p2p.DeleteOptions{
		"too many":                            {Also: slices.Repeat([]digest.CID{absent}, p2p.MaxAlso+1)},
		"a digest by name only, among others": {NameOnly: true, Also: []digest.CID{of(alone)}},
		"no cid among others":                 {Also: []digest.CID{{}}},
		"all, and a cid":                      {All: true},
	} {
		_, err := e.Delete(ctx, "t", absent, opts)
		requireError(t, "delete "+what, err, digest.ErrInvalid)
	}
	_, err = e.Delete(ctx, "t", digest.CID{}, p2p.DeleteOptions{})
	requireError(t, "delete nothing", err, digest.ErrInvalid)
}

func testDeleteAll(t *testing.T, e p2p.Engine) {
	ctx := t.Context()
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	importArtifact(t, e, "t", "latest", []byte(`{"one":1}`), Content(1000, 1))
	push(t, e, []byte(`{"two":2}`), refs(manifest))
	Import(t, e, "t", Content(2000, 2))
	Import(t, e, "t2", Content(1000, 1))
	deleted, err := e.Delete(ctx, "t", digest.CID{}, p2p.DeleteOptions{All: true})
	if err != nil || deleted.Tasks != 4 || deleted.Freed != 2000+2*int64(len(`{"one":1}`)) {
		t.Errorf("delete of all: %+v, %v", deleted, err)
	}
	if left := list(t, e, nil); len(left) != 1 || !strings.HasPrefix(left[0], "t2 ") {
		t.Errorf("a delete of all left %v", left)
	}
	RequireContent(t, e, p2p.Task{Tag: "t2", Digest: parts[0].Digest}, Content(1000, 1))
	if deleted, err = e.Delete(ctx, "t", digest.CID{}, p2p.DeleteOptions{All: true}); err != nil || deleted.Tasks != 0 {
		t.Errorf("delete of all where there is nothing: %+v, %v", deleted, err)
	}
	// What is put in afterwards stays.
	importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	if _, err := resolve(ctx, e, "t", cid(t, "v1")); err != nil {
		t.Errorf("imported after the delete of all: %v", err)
	}
	RequireContent(t, e, parts[0], Content(1000, 1))
}

// What nobody can find any more does not keep a manifest from being deleted; a blob it does.
func testDeleteListed(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	list := func(name, text string, of p2p.Task) p2p.Task {
		t.Helper()
		task, err := tryPush(t.Context(), e, []byte(text), refs(of), p2p.NewName{Name: name, KeepOld: true})
		if err != nil {
			t.Fatal(err)
		}
		return task
	}
	untag := func(name string) {
		t.Helper()
		if _, err := e.Delete(t.Context(), "t", cid(t, name), p2p.DeleteOptions{NameOnly: true}); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() error {
		_, err := e.Delete(t.Context(), "t", digest.FromDigest(manifest.Digest), p2p.DeleteOptions{})
		return err
	}
	before := list("list", `{"list":1}`, manifest)
	now := list("list", `{"list":2}`, manifest)
	outer := list("outer", `{"outer":1}`, before)
	requireError(t, "delete what is listed under a name", remove(), p2p.ErrReferenced)
	untag("list")
	RequireError(t, "delete what a list is of that is in another one", remove(), p2p.ErrReferenced,
		string(before.Digest))
	untag("outer")
	untag("v1")
	_, err := e.Delete(t.Context(), "t", digest.FromDigest(parts[0].Digest), p2p.DeleteOptions{})
	requireError(t, "delete a blob of a manifest without a name", err, p2p.ErrReferenced)
	if err := remove(); err != nil {
		t.Errorf("delete what only lists without a name have: %v", err)
	}
	requireMissing(t, e, manifest)
	for _, task := range []p2p.Task{before, now, outer} {
		if info, err := stat(t.Context(), e, task); err != nil || !slices.Contains(info.Lacks, manifest.Digest) {
			t.Errorf("%s lacks %v, %v; want the manifest", task, info.Lacks, err)
		}
	}
}

// What is said with a name is told with it, until it is moved.
func testDescriptions(t *testing.T, e p2p.Engine) {
	one, two := push(t, e, []byte(`{"one":1}`), refs()), push(t, e, []byte(`{"two":2}`), refs())
	point := func(to p2p.Task, description []byte) error {
		in, err := e.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		return in.Commit(p2p.Commit{Names: []p2p.NewName{
			{Tag: "t", Name: "v1", Digest: to.Digest, KeepOld: true, Description: description}}})
	}
	longest := []byte(`{"a":"` + strings.Repeat("x", p2p.MaxDescription-8) + `"}`)
	for _, step := range []struct {
		to         p2p.Task
		said, want []byte
	}{
		{one, nil, nil},
		{one, []byte(`{"a":"b"}`), []byte(`{"a":"b"}`)},
		{one, nil, []byte(`{"a":"b"}`)},
		{two, nil, nil},
		{two, longest, longest},
		{two, []byte(`{}`), nil},
	} {
		if err := point(step.to, step.said); err != nil {
			t.Fatal(err)
		}
		info, err := e.Stat(t.Context(), "t", cid(t, "v1"), p2p.StatOptions{})
		if err != nil || !bytes.Equal(info.Description, step.want) {
			t.Errorf("after %.50q: the name is said to be %.50q, %v", step.said, info.Description, err)
		}
		if info, err := stat(t.Context(), e, step.to); err != nil || info.Description != nil {
			t.Errorf("its digest is said to be %.50q, %v", info.Description, err)
		}
	}
	for _, bad := range []string{"[]", "{", "x", string(longest) + " "} {
		requireError(t, fmt.Sprintf("say %.50q", bad), point(one, []byte(bad)), digest.ErrInvalid)
	}
}

// A change is made where what it changes is what its caller expects, or not at all.
func testExpect(t *testing.T, e p2p.Engine) {
	one, two := push(t, e, []byte(`{"one":1}`), refs()), push(t, e, []byte(`{"two":2}`), refs())
	blob := push(t, e, Content(1000, 1), nil)
	name := cid(t, "v1")
	point := func(to p2p.Task, id digest.CID, expect digest.Digest) error {
		in, err := e.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		return in.Commit(p2p.Commit{
			Names:  []p2p.NewName{{Tag: "t", Name: "v1", Digest: to.Digest, KeepOld: true}},
			Expect: []p2p.Expectation{{Tag: "t", CID: id, Digest: expect}},
		})
	}
	remove := func(id digest.CID, expect digest.Digest) error {
		_, err := e.Delete(t.Context(), "t", id, p2p.DeleteOptions{Expect: &expect, NameOnly: id.CacheID() != ""})
		return err
	}
	of := func(task p2p.Task) digest.CID { return digest.FromDigest(task.Digest) }
	absent := digest.SHA256.FromString("absent")
	for i, c := range []struct {
		err, want error
	}{
		{point(one, name, two.Digest), p2p.ErrMoved},
		{remove(name, two.Digest), p2p.ErrMoved},
		{remove(name, ""), p2p.ErrNotFound},
		{point(one, name, ""), nil},
		{point(two, name, ""), p2p.ErrMoved},
		{point(two, name, two.Digest), p2p.ErrMoved},
		{point(two, name, one.Digest), nil},
		{point(one, of(one), ""), p2p.ErrMoved}, // it is there
		{point(one, of(blob), blob.Digest), p2p.ErrMoved},
		{point(one, of(blob), ""), nil}, // a blob is no manifest
		{point(two, of(one), one.Digest), nil},
		{point(two, digest.FromDigest(absent), absent), p2p.ErrMoved},
		{point(two, digest.FromDigest(absent), ""), nil},
		{point(two, name, "sha256:x"), digest.ErrInvalid},
		{remove(name, one.Digest), p2p.ErrMoved},
		{remove(name, "sha256:x"), digest.ErrInvalid},
		{remove(of(one), ""), p2p.ErrMoved},
		{remove(of(blob), blob.Digest), p2p.ErrMoved},
		{remove(of(blob), ""), nil},
		{remove(of(one), one.Digest), nil},
		{remove(of(one), one.Digest), p2p.ErrMoved},
	} {
		if c.want != nil {
			requireError(t, fmt.Sprintf("change %d", i), c.err, c.want)
		} else if c.err != nil {
			t.Errorf("change %d: %v", i, c.err)
		}
	}
	for _, opts := range []p2p.DeleteOptions{{Also: []digest.CID{of(two)}, Expect: &two.Digest},
		{All: true, Expect: &two.Digest}} {
		_, err := e.Delete(t.Context(), "t", map[bool]digest.CID{false: name}[opts.All], opts)
		requireError(t, "delete several of which something is expected", err, digest.ErrInvalid)
	}
	if task, err := resolve(t.Context(), e, "t", name); err != nil || task != two {
		t.Errorf("the name is %s, %v; want %s", task, err, two)
	}
	if err := remove(name, two.Digest); err != nil {
		t.Error(err)
	}
	requireMissing(t, e, one)
	requireMissing(t, e, blob)
	if _, err := stat(t.Context(), e, two); err != nil {
		t.Error(err)
	}
}

func testDeleteRemovesNames(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	importArtifact(t, e, "t", "latest", []byte(`{"one":1}`), Content(1000, 1))
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "latest"), p2p.DeleteOptions{}); err != nil ||
		deleted.Tasks != 0 {
		t.Errorf("delete one of two names: %+v, %v; want no task removed", deleted, err)
	}
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(manifest.Digest),
		p2p.DeleteOptions{}); err != nil || deleted.Tasks != 2 {
		t.Errorf("delete the manifest: %+v, %v; want manifest and layer", deleted, err)
	}
	requireMissing(t, e, parts[0])
	_, err := resolve(t.Context(), e, "t", cid(t, "v1"))
	requireError(t, "resolve a name of the deleted manifest", err, p2p.ErrNotFound)
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v", entries)
	}
}

// push stores content that nothing holds yet; a manifest where m is not nil.
func push(t *testing.T, e p2p.Engine, data []byte, m *p2p.NewManifest) p2p.Task {
	t.Helper()
	task, err := tryPush(t.Context(), e, data, m)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func tryPush(
	ctx context.Context, e p2p.Engine, data []byte, m *p2p.NewManifest, names ...p2p.NewName,
) (p2p.Task, error) {
	in, err := e.Ingest(ctx)
	if err != nil {
		return p2p.Task{}, err
	}
	defer in.Close()
	added, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
	if err != nil {
		return p2p.Task{}, err
	}
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	for i := range names {
		names[i].Tag, names[i].Digest = task.Tag, task.Digest
	}
	return task, in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred, Manifest: m}},
		Names: names})
}

func refs(tasks ...p2p.Task) *p2p.NewManifest {
	m := &p2p.NewManifest{}
	for _, task := range tasks {
		m.Refs = append(m.Refs, task.Digest)
	}
	return m
}

func requireKeep(t *testing.T, e p2p.Engine, task p2p.Task, want p2p.Keep) {
	t.Helper()
	if info, err := stat(t.Context(), e, task); err != nil || info.Keep != want {
		t.Errorf("stat %s: kept as %v, %v; want %v", task, info.Keep, err, want)
	}
}

func testLooseTask(t *testing.T, e p2p.Engine) {
	layer := push(t, e, Content(1000, 1), nil)
	requireKeep(t, e, layer, p2p.KeepUntilReferred)
	// Committed again it stays so; pinned it stays pinned.
	push(t, e, Content(1000, 1), nil)
	requireKeep(t, e, layer, p2p.KeepUntilReferred)
	Import(t, e, "t", Content(1000, 1))
	push(t, e, Content(1000, 1), nil)
	requireKeep(t, e, layer, p2p.KeepPinned)
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(layer.Digest), p2p.DeleteOptions{}); err != nil ||
		deleted.Tasks != 1 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	requireMissing(t, e, layer)
}

func testLooseTaskIsAdopted(t *testing.T, e p2p.Engine) {
	shared, layer := push(t, e, Content(1000, 1), nil), push(t, e, Content(1000, 2), nil)
	pinned := Import(t, e, "t", Content(1000, 3))
	one := push(t, e, []byte(`{"one":1}`), refs(shared, layer, pinned))
	two := push(t, e, []byte(`{"two":2}`), refs(shared))
	requireKeep(t, e, layer, p2p.KeepReferred)
	requireKeep(t, e, one, p2p.KeepUntilReferred)
	index := push(t, e, []byte(`{"index":1}`), refs(one))
	requireKeep(t, e, one, p2p.KeepReferred)
	_, err := e.Delete(t.Context(), "t", digest.FromDigest(one.Digest), p2p.DeleteOptions{})
	requireError(t, "delete a manifest that an index refers to", err, p2p.ErrReferenced)
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(index.Digest), p2p.DeleteOptions{}); err != nil ||
		deleted.Tasks != 3 {
		t.Errorf("delete the index: %+v, %v; want index, manifest and layer", deleted, err)
	}
	requireMissing(t, e, one)
	requireMissing(t, e, layer)
	RequireContent(t, e, shared, Content(1000, 1))
	RequireContent(t, e, pinned, Content(1000, 3))
	RequireContent(t, e, two, []byte(`{"two":2}`))

	// What comes after that which refers to it is held from the start.
	digestOf := func(data []byte) p2p.Task {
		return p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	}
	late := Content(1000, 4)
	push(t, e, []byte(`{"three":3}`), refs(digestOf(late)))
	requireKeep(t, e, push(t, e, late, nil), p2p.KeepReferred)
}

func testNameOnly(t *testing.T, e p2p.Engine) {
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1))
	importArtifact(t, e, "t", "v2", []byte(`{"one":1}`), Content(1000, 1))
	for i, name := range []string{"v1", "v2"} {
		deleted, err := e.Delete(t.Context(), "t", cid(t, name), p2p.DeleteOptions{NameOnly: true})
		if err != nil || !reflect.DeepEqual(deleted, p2p.Deleted{}) {
			t.Errorf("delete the name %s: %+v, %v; want nothing else gone", name, deleted, err)
		}
		_, err = resolve(t.Context(), e, "t", cid(t, name))
		requireError(t, "resolve the deleted name", err, p2p.ErrNotFound)
		requireKeep(t, e, manifest, []p2p.Keep{p2p.KeepReferred, p2p.KeepUntilReferred}[i])
	}
	RequireContent(t, e, parts[0], Content(1000, 1))
	_, err := e.Delete(t.Context(), "t", cid(t, "v1"), p2p.DeleteOptions{NameOnly: true})
	requireError(t, "delete an absent name", err, p2p.ErrNotFound)
	_, err = e.Delete(t.Context(), "t", digest.FromDigest(manifest.Digest), p2p.DeleteOptions{NameOnly: true})
	requireError(t, "delete the name that is a digest", err, digest.ErrInvalid)
	// With a name again, it goes with it.
	importArtifact(t, e, "t", "v3", []byte(`{"one":1}`), Content(1000, 1))
	if deleted, err := e.Delete(t.Context(), "t", cid(t, "v3"), p2p.DeleteOptions{}); err != nil || deleted.Tasks != 2 {
		t.Errorf("delete: %+v, %v; want manifest and layer", deleted, err)
	}
}

func testUnpin(t *testing.T, e p2p.Engine) {
	data := Content(1000, 1)
	_, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), data)
	task := Import(t, e, "t", data)
	requireKeep(t, e, task, p2p.KeepPinned)
	if task != parts[0] {
		t.Fatal(task)
	}
	id := digest.FromDigest(task.Digest)
	for range 2 {
		deleted, err := e.Delete(t.Context(), "t", id, p2p.DeleteOptions{Unpin: true})
		if err != nil || !reflect.DeepEqual(deleted, p2p.Deleted{}) {
			t.Errorf("delete of what a manifest refers to: %+v, %v; want nothing gone", deleted, err)
		}
		requireKeep(t, e, task, p2p.KeepReferred)
	}
	RequireContent(t, e, task, data)
	if _, err := e.Delete(t.Context(), "t", cid(t, "v1"), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := resolve(t.Context(), e, "t", id)
	requireError(t, "resolve what nothing refers to any more", err, p2p.ErrNotFound)
	// What nothing refers to goes at once.
	Import(t, e, "t", data)
	if deleted, err := e.Delete(t.Context(), "t", id, p2p.DeleteOptions{Unpin: true}); err != nil ||
		deleted.Tasks != 1 {
		t.Errorf("delete of what nothing refers to: %+v, %v", deleted, err)
	}
	_, err = e.Delete(t.Context(), "t", id, p2p.DeleteOptions{Unpin: true})
	requireError(t, "delete what is not there", err, p2p.ErrNotFound)
}

func testNameKeepsOld(t *testing.T, e p2p.Engine) {
	tag := func(data string) p2p.Task {
		t.Helper()
		task, err := tryPush(t.Context(), e, []byte(data), refs(), p2p.NewName{Name: "v1", KeepOld: true})
		if err != nil {
			t.Fatal(err)
		}
		requireKeep(t, e, task, p2p.KeepReferred)
		return task
	}
	first := tag(`{"one":1}`)
	second := tag(`{"two":2}`)
	requireKeep(t, e, first, p2p.KeepUntilReferred)
	if got, err := resolve(t.Context(), e, "t", cid(t, "v1")); err != nil || got != second {
		t.Errorf("resolve: %v, %v; want %v", got, err, second)
	}
	// Tagged again as it is, nothing changes.
	if again := tag(`{"two":2}`); again != second {
		t.Errorf("the task is %v, was %v", again, second)
	}
	requireKeep(t, e, second, p2p.KeepReferred)
}

func testNeeds(t *testing.T, e p2p.Engine) {
	here := push(t, e, Content(1000, 1), nil)
	Import(t, e, "u", Content(1000, 2))
	absent := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(Content(1000, 2))} // under another tag only
	m := refs(here, absent)
	m.Needs = m.Refs
	task, err := tryPush(t.Context(), e, []byte(`{"one":1}`), m, p2p.NewName{Name: "v1"})
	requireError(t, "commit a manifest that refers to what is absent", err, p2p.ErrMissingRef)
	if missing, ok := errors.AsType[*p2p.MissingRefError](err); !ok || missing.Missing != absent.Digest ||
		missing.Manifest != task.Digest {
		t.Errorf("error %q does not name what is missing", err)
	}
	requireMissing(t, e, task)
	requireKeep(t, e, here, p2p.KeepUntilReferred)
	m.Needs = m.Refs[:1]
	if _, err := tryPush(t.Context(), e, []byte(`{"one":1}`), m); err != nil {
		t.Errorf("commit a manifest that refers to what is absent, and need not be there: %v", err)
	}
}

// What was stored for somebody outlives what held it, once for each of them.
func testLease(t *testing.T, e p2p.Engine) {
	data := Content(1000, 1)
	layer := push(t, e, data, nil)
	remove := func(m p2p.Task) {
		t.Helper()
		if _, err := e.Delete(t.Context(), "t", digest.FromDigest(m.Digest), p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	one := push(t, e, []byte(`{"one":1}`), refs(layer)) // which it was stored for
	for range 2 {
		push(t, e, data, nil)
	}
	remove(one)
	requireKeep(t, e, layer, p2p.KeepUntilReferred)
	for _, manifest := range []string{`{"two":2}`, `{"three":3}`} {
		RequireContent(t, e, layer, data)
		m := refs(layer)
		m.Needs = m.Refs
		task := push(t, e, []byte(manifest), m)
		requireKeep(t, e, layer, p2p.KeepReferred)
		remove(task)
	}
	requireMissing(t, e, layer)
}

// So does what somebody was told is there, but not where it is deleted itself.
func testLeaseByStat(t *testing.T, e p2p.Engine) {
	ask := func(task p2p.Task) error {
		t.Helper()
		_, err := e.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest),
			p2p.StatOptions{Scope: p2p.Local, Lease: true})
		return err
	}
	manifest, layers := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), Content(1000, 1), Content(1000, 2))
	requireError(t, "ask for what is absent", ask(p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")}),
		p2p.ErrNotFound)
	if err := ask(layers[0]); err != nil {
		t.Fatal(err)
	}
	importArtifact(t, e, "t", "v1", []byte(`{"two":2}`), Content(1000, 3))
	requireMissing(t, e, manifest)
	requireMissing(t, e, layers[1])
	requireKeep(t, e, layers[0], p2p.KeepUntilReferred)
	if err := ask(layers[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(layers[0].Digest), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	requireMissing(t, e, layers[0])

	// A manifest, too, with all that it holds.
	manifest, layers = importArtifact(t, e, "t", "v2", []byte(`{"one":1}`), Content(1000, 1))
	if err := ask(manifest); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Delete(t.Context(), "t", cid(t, "v2"), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	requireKeep(t, e, manifest, p2p.KeepUntilReferred)
	requireKeep(t, e, layers[0], p2p.KeepReferred)
	// Whoever was told has come back: it goes with its name.
	importArtifact(t, e, "t", "v2", []byte(`{"one":1}`), Content(1000, 1))
	if _, err := e.Delete(t.Context(), "t", cid(t, "v2"), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	requireMissing(t, e, manifest)
	requireMissing(t, e, layers[0])
}

// A manifest, and what refers to that, tells what it has lost by force, until it is back.
func testLacks(t *testing.T, e p2p.Engine) {
	data := Content(1000, 1)
	layer := push(t, e, data, nil)
	image := push(t, e, []byte(`{"image":1}`), refs(layer, p2p.Task{Digest: digest.SHA256.FromString("never there")}))
	index := push(t, e, []byte(`{"index":1}`), refs(image))
	want := func(want ...digest.Digest) {
		t.Helper()
		for _, task := range []p2p.Task{image, index} {
			if info, err := stat(t.Context(), e, task); err != nil || !slices.Equal(info.Lacks, want) {
				t.Errorf("%s lacks %v, %v; want %v", task, info.Lacks, err, want)
			}
		}
	}
	want()
	force := p2p.DeleteOptions{Force: true}
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(layer.Digest), force); err != nil {
		t.Fatal(err)
	}
	want(layer.Digest)
	m := refs(image)
	m.Needs = m.Refs
	_, err := tryPush(t.Context(), e, []byte(`{"another index":1}`), m)
	requireError(t, "refer to what is not whole", err, p2p.ErrMissingRef)
	push(t, e, data, nil)
	want()
	if _, err := tryPush(t.Context(), e, []byte(`{"another index":1}`), m); err != nil {
		t.Error(err)
	}
	// One that never was whole tells so when it was refused for that.
	part := Content(1000, 2)
	m = refs(p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(part)})
	other := push(t, e, []byte(`{"other":1}`), m)
	m.Needs = m.Refs
	_, err = tryPush(t.Context(), e, []byte(`{"other":1}`), m)
	requireError(t, "refer to what is absent", err, p2p.ErrMissingRef)
	if info, err := stat(t.Context(), e, other); err != nil || !slices.Equal(info.Lacks, m.Refs) {
		t.Errorf("what was refused lacks %v, %v; want %v", info.Lacks, err, m.Refs)
	}
	push(t, e, part, nil)
	if info, err := stat(t.Context(), e, other); err != nil || len(info.Lacks) > 0 {
		t.Errorf("it lacks %v, %v", info.Lacks, err)
	}
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(image.Digest), force); err != nil {
		t.Fatal(err)
	}
	if info, err := stat(t.Context(), e, index); err != nil ||
		!slices.Equal(info.Lacks, []digest.Digest{image.Digest}) {
		t.Errorf("the index lacks %v, %v; want %s", info.Lacks, err, image.Digest)
	}
}

func testManifestReplacesRefs(t *testing.T, e p2p.Engine) {
	// A manifest that came as a blob is one as soon as it is pushed as one.
	layer := push(t, e, Content(1000, 1), nil)
	manifest := Import(t, e, "t", []byte(`{"one":1}`))
	if info, err := stat(t.Context(), e, manifest); err != nil || info.IsManifest {
		t.Errorf("stat of a blob: %+v, %v; want it to be no manifest", info, err)
	}
	push(t, e, []byte(`{"one":1}`), refs(layer))
	if info, err := stat(t.Context(), e, manifest); err != nil || !info.IsManifest || info.Keep != p2p.KeepPinned {
		t.Errorf("stat: %+v, %v; want a pinned manifest", info, err)
	}
	requireKeep(t, e, layer, p2p.KeepReferred)
	// As a blob once more, it still is.
	push(t, e, []byte(`{"one":1}`), nil)
	if info, err := stat(t.Context(), e, manifest); err != nil || !info.IsManifest {
		t.Errorf("stat: %+v, %v; want a manifest", info, err)
	}
	_, err := e.Delete(t.Context(), "t", digest.FromDigest(layer.Digest), p2p.DeleteOptions{})
	requireError(t, "delete its layer", err, p2p.ErrReferenced)
	// With other references what it referred to is let go.
	push(t, e, []byte(`{"one":1}`), refs())
	requireMissing(t, e, layer)
}

func testInvalidManifest(t *testing.T, e p2p.Engine) {
	for name, m := range map[string]*p2p.NewManifest{
		"reference": {Refs: []digest.Digest{"sha256:short"}},
		"need":      {Needs: []digest.Digest{"md5:d41d8cd98f00b204e9800998ecf8427e"}},
		"subject":   {Subject: "none"},
		"itself":    {Refs: []digest.Digest{digest.SHA256.FromString(`{"one":1}`)}},
	} {
		_, err := tryPush(t.Context(), e, []byte(`{"one":1}`), m)
		requireError(t, "commit a manifest with an invalid "+name, err, digest.ErrInvalid)
	}
	_, err := tryPush(t.Context(), e, Content(p2p.MaxManifest+1, 1), refs())
	requireError(t, "commit a manifest that is too large", err, digest.ErrInvalid)
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v", entries)
	}
}

// A manifest keeps the media type that it came with, and so does what a name points to.
func testMediaTypes(t *testing.T, e p2p.Engine) {
	const first, other = "application/vnd.example.first+json", "application/vnd.example.other+json"
	layer := push(t, e, Content(1000, 1), nil)
	manifest := push(t, e, []byte("{}"), nil)
	commit := func(n p2p.NewTask, names ...p2p.NewName) error {
		in, err := e.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		c := p2p.Commit{Names: names}
		if n.Task.Digest != "" {
			c.Tasks = []p2p.NewTask{n}
		}
		return in.Commit(c)
	}
	isType := func(what string, task p2p.Task, err, wantErr error, want string) {
		t.Helper()
		if wantErr != nil {
			requireError(t, what, err, wantErr)
		} else if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if info, err := stat(t.Context(), e, task); err != nil || info.MediaType != want {
			t.Errorf("after %s: it is %q, %v; want %q", what, info.MediaType, err, want)
		}
	}
	name := func(task p2p.Task, name, mediaType string) p2p.NewName {
		return p2p.NewName{Tag: "t", Name: name, Digest: task.Digest, MediaType: mediaType}
	}
	as := func(task p2p.Task, mediaType string, m *p2p.NewManifest) p2p.NewTask {
		return p2p.NewTask{Task: task, MediaType: mediaType, Keep: p2p.KeepUntilReferred, Manifest: m}
	}
	fetched := as(manifest, other, refs(layer))
	fetched.Origin = time.Now().Add(time.Hour)

	err := commit(as(manifest, first, refs(layer)), name(manifest, "prod", first))
	isType("the first push", manifest, err, nil, first)
	err = commit(as(manifest, first, refs(layer)), name(manifest, "again", ""))
	isType("the same push", manifest, err, nil, first)
	err = commit(as(manifest, other, refs(layer)), name(manifest, "other", ""))
	isType("a push as something else", manifest, err, digest.ErrInvalid, first)
	isType("a push without a name", manifest, commit(as(manifest, other, refs(layer))), digest.ErrInvalid, first)
	isType("a fetch", manifest, commit(fetched), nil, first)
	isType("a push as a blob", manifest, commit(as(manifest, "a/b", nil)), nil, first)
	err = commit(p2p.NewTask{}, name(manifest, "other", other))
	isType("a name for something else", manifest, err, digest.ErrInvalid, first)
	isType("a name", manifest, commit(p2p.NewTask{}, name(manifest, "more", first)), nil, first)
	if _, err := resolve(t.Context(), e, "t", cid(t, "other")); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("what was refused has a name: %v", err)
	}

	isType("a blob's type", layer, commit(as(layer, "a/b", nil)), nil, "a/b")
	isType("another type of a blob", layer, commit(as(layer, "a/c", nil)), nil, "a/c")
	isType("a name with a type", layer, commit(p2p.NewTask{}, name(layer, "blob", "a/d")), nil, "a/d")
	isType("a push of a blob with a name", layer, commit(as(layer, "a/e", nil)), nil, "a/d")
	err = commit(as(layer, "a/e", nil), name(layer, "blob2", ""))
	isType("a push with a name", layer, err, digest.ErrInvalid, "a/d")
	err = commit(p2p.NewTask{}, name(layer, "blob2", "a/e"))
	isType("another name with another type", layer, err, digest.ErrInvalid, "a/d")
	err = commit(p2p.NewTask{}, name(layer, "blob2", strings.Repeat("x", p2p.MaxMediaType+1)))
	isType("a type that is too long", layer, err, digest.ErrInvalid, "a/d")
}

// about makes a manifest that is about subject.
func about(subject p2p.Task, parts ...p2p.Task) *p2p.NewManifest {
	m := refs(parts...)
	m.Subject = subject.Digest
	return m
}

// referring lists what refers to a task.
func referring(t *testing.T, e p2p.Engine, to p2p.Task) []p2p.Task {
	t.Helper()
	var tasks []p2p.Task
	for entry, err := range e.List(t.Context(), p2p.Query{Tag: &to.Tag, RefersTo: to.Digest}) {
		if err != nil {
			t.Fatalf("list what refers to %s: %v", to, err)
		}
		if entry.Name != "" || !entry.IsManifest {
			t.Errorf("list what refers to %s: %+v; want manifests", to, entry)
		}
		tasks = append(tasks, entry.Task)
	}
	return tasks
}

func testReferrers(t *testing.T, e p2p.Engine) {
	layer := push(t, e, Content(1000, 1), nil)
	subject := push(t, e, []byte(`{"subject":1}`), refs(layer))
	part := push(t, e, Content(1000, 2), nil)
	signature := push(t, e, []byte(`{"signature":1}`), about(subject, part))
	requireKeep(t, e, signature, p2p.KeepReferred)
	if got := referring(t, e, layer); !slices.Equal(got, []p2p.Task{subject}) {
		t.Errorf("to the layer refer %v, want the subject", got)
	}
	both := push(t, e, []byte(`{"both":1}`), about(subject, subject))
	index := push(t, e, []byte(`{"index":1}`), refs(subject))
	got, want := referring(t, e, subject), []p2p.Task{signature, both, index}
	byDigest := func(a, b p2p.Task) int { return strings.Compare(string(a.Digest), string(b.Digest)) }
	slices.SortFunc(got, byDigest)
	slices.SortFunc(want, byDigest)
	if !slices.Equal(got, want) {
		t.Errorf("to the subject refer %v, want %v", got, want)
	}
	if got := referring(t, e, p2p.Task{Tag: "u", Digest: subject.Digest}); len(got) > 0 {
		t.Errorf("under another tag there refer %v, want none", got)
	}
	for _, holder := range []p2p.Task{index, both} {
		if _, err := e.Delete(t.Context(), "t", digest.FromDigest(holder.Digest), p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	requireMissing(t, e, subject) // the index was its last holder
	requireMissing(t, e, signature)
	requireMissing(t, e, part)
	if entries := list(t, e, nil); len(entries) > 0 {
		t.Errorf("list has %v", entries)
	}

	// What has a name or a pin of its own outlives its subject.
	subject = push(t, e, []byte(`{"subject":1}`), refs())
	named, err := tryPush(t.Context(), e, []byte(`{"signature":1}`), about(subject), p2p.NewName{Name: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(subject.Digest), p2p.DeleteOptions{}); err != nil ||
		deleted.Tasks != 1 {
		t.Errorf("delete the subject: %+v, %v; want only that to go", deleted, err)
	}
	requireKeep(t, e, named, p2p.KeepReferred)
	if got := referring(t, e, subject); !slices.Equal(got, []p2p.Task{named}) {
		t.Errorf("to the absent subject refer %v, want %v", got, named)
	}
}

func testReferrerBeforeSubject(t *testing.T, e p2p.Engine) {
	content := []byte(`{"subject":1}`)
	subject := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(content)}
	signature := push(t, e, []byte(`{"signature":1}`), about(subject))
	requireKeep(t, e, signature, p2p.KeepUntilReferred)
	if got := referring(t, e, subject); !slices.Equal(got, []p2p.Task{signature}) {
		t.Errorf("to the absent subject refer %v, want %v", got, signature)
	}
	push(t, e, content, refs())
	requireKeep(t, e, signature, p2p.KeepReferred)
	if deleted, err := e.Delete(t.Context(), "t", digest.FromDigest(signature.Digest),
		p2p.DeleteOptions{}); err != nil || deleted.Tasks != 1 {
		t.Errorf("delete the referrer: %+v, %v", deleted, err)
	}
	if got := referring(t, e, subject); len(got) > 0 {
		t.Errorf("to the subject refer %v, want none", got)
	}
	RequireContent(t, e, subject, content)
}

func testStatManifest(t *testing.T, e p2p.Engine) {
	content := []byte(`{"one":1}`)
	small, large := Content(1000, 1), Content(100_000, 2)
	manifest, parts := importArtifact(t, e, "t", "v1", content, small, large)
	for _, id := range []string{"v1", string(manifest.Digest)} {
		info, err := e.Stat(t.Context(), "t", cid(t, id), p2p.StatOptions{Scope: p2p.Local, Manifest: true})
		if err != nil || info.Task != manifest || info.Manifest == nil {
			t.Fatalf("stat %s: %+v, %v; want the manifest %s", id, info, err, manifest)
		}
		if !bytes.Equal(info.Manifest.Content, content) {
			t.Errorf("stat %s: its content is %q", id, info.Manifest.Content)
		}
		if refs := info.Manifest.Refs; len(refs) != 2 || refs[0].Task != parts[0] || refs[1].Task != parts[1] ||
			refs[0].Size != 1000 || refs[1].Size != 100_000 || !refs[1].Local() {
			t.Errorf("stat %s: it refers to %+v", id, refs)
		}
		if !info.LastUsed.IsZero() {
			t.Errorf("stat %s counts as a use", id)
		}
		info, err = e.Stat(t.Context(), "t", cid(t, id),
			p2p.StatOptions{Scope: p2p.Local, Manifest: true, ContentOnly: true})
		if err != nil || info.Manifest == nil || !bytes.Equal(info.Manifest.Content, content) {
			t.Errorf("stat %s, content only: %+v, %v", id, info, err)
		}
		if info, err = e.Stat(t.Context(), "t", cid(t, id), p2p.StatOptions{Scope: p2p.Local}); err != nil ||
			info.Manifest != nil {
			t.Errorf("stat %s without the manifest: %+v, %v", id, info, err)
		}
	}
	info, err := e.Stat(t.Context(), "t", digest.FromDigest(parts[0].Digest),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if err != nil || info.Manifest != nil {
		t.Errorf("stat of a blob, with its manifest: %+v, %v; want none", info, err)
	}
	// Of the first MaxRefs those are told that are held, in the manifest's order.
	many := &p2p.NewManifest{}
	for i := range 2 * p2p.MaxRefs {
		many.Refs = append(many.Refs, digest.SHA256.FromString(fmt.Sprint(i)))
	}
	other := Import(t, e, "t", []byte("other"))
	inOrder := []p2p.Task{parts[0], other, manifest}
	slices.SortFunc(inOrder, func(a, b p2p.Task) int { return -strings.Compare(string(a.Digest), string(b.Digest)) })
	for i, at := range []int{1, 100, p2p.MaxRefs - 1} {
		many.Refs[at] = inOrder[i].Digest
	}
	many.Refs[p2p.MaxRefs] = parts[1].Digest
	elsewhere := Import(t, e, "other", []byte("held under another tag only"))
	many.Refs[2] = elsewhere.Digest
	largest := Content(p2p.MaxManifest, 3)
	task := push(t, e, largest, many)
	info, err = e.Stat(t.Context(), "t", digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if err != nil || info.Manifest == nil || !bytes.Equal(info.Manifest.Content, largest) {
		t.Fatalf("stat of the largest manifest: %v", err)
	}
	var told []p2p.Task
	for _, ref := range info.Manifest.Refs {
		told = append(told, ref.Task)
	}
	if !slices.Equal(told, inOrder) {
		t.Errorf("it refers to %v, want what is held of the first %d: %v", told, p2p.MaxRefs, inOrder)
	}
}

func testRehash(t *testing.T, e p2p.Engine) {
	data := Content(3*digest.MinPieceLength+17, 1)
	want := digest.SHA512.FromBytes(data)
	rehash := func(want digest.Digest) error {
		in, err := e.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		added, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
		if err != nil {
			t.Fatal(err)
		}
		again, err := in.Rehash(added.Digest, want)
		if err != nil {
			return err
		}
		if again != (p2p.Added{Digest: want, Size: int64(len(data))}) {
			t.Errorf("rehashed: %+v", again)
		}
		return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: want}}}})
	}
	other := digest.SHA512.FromString("other")
	requireError(t, "rehash what is new under the digest of something else", rehash(other), digest.ErrMismatch)
	if err := rehash(want); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, p2p.Task{Tag: "t", Digest: want}, data)
	if entries := list(t, e, nil); len(entries) != 1 {
		t.Errorf("list has %v; want only what was committed", entries)
	}
	// Where the blob is here under the first digest already, both are.
	first := Import(t, e, "t", data)
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(want), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := rehash(want); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, p2p.Task{Tag: "t", Digest: want}, data)
	RequireContent(t, e, first, data)
	requireError(t, "rehash under the digest of something else", rehash(other), digest.ErrMismatch)
	requireError(t, "rehash under no digest", rehash("sha512:none"), digest.ErrInvalid)
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = in.Rehash(first.Digest, want)
	requireError(t, "rehash what was not added", err, p2p.ErrNotFound)
}

// connect returns the two ends of a TCP connection, closed at the end of the test.
func connect(t *testing.T) (conn, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if conn, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if peer, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return conn, peer
}

func testCopyRange(t *testing.T, e p2p.Engine) {
	const piece = digest.MinPieceLength
	data := Content(3*piece+17, 1)
	blob, err := e.Open(t.Context(), Import(t, e, "t", data), p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	size := int64(len(data))
	for _, r := range []struct{ off, n int64 }{{0, size}, {0, 0}, {size, 0}, {0, 1}, {size - 1, 1}, {piece - 1, 2},
		{piece, piece}, {1, size - 2}, {3 * piece, 17}} {
		// A connection takes its bytes in another way than anything else does.
		conn, peer := connect(t)
		received := make(chan []byte, 1)
		go func() {
			got, _ := io.ReadAll(peer)
			received <- got
		}()
		var buf bytes.Buffer
		for _, w := range []io.Writer{&buf, conn} {
			last := int64(0)
			if err := blob.CopyRange(t.Context(), w, r.off, r.n, func(n int64) { last = n }); err != nil ||
				last != r.n {
				t.Errorf("%d bytes from %d on to a %T: %v, the last progress was %d", r.n, r.off, w, err, last)
			}
		}
		conn.Close()
		if want := data[r.off : r.off+r.n]; !bytes.Equal(<-received, want) || !bytes.Equal(buf.Bytes(), want) {
			t.Errorf("%d bytes from %d on are wrong", r.n, r.off)
		}
	}
	for _, r := range []struct{ off, n int64 }{{-1, 1}, {0, -1}, {0, size + 1}, {size, 1}, {1 << 62, 1 << 62}} {
		if err := blob.CopyRange(t.Context(), io.Discard, r.off, r.n, nil); err == nil {
			t.Errorf("%d bytes from %d on of %d: no error", r.n, r.off, size)
		}
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
	if _, err := e.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
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
	if _, err := e.Delete(t.Context(), "a", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
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
	first, err := stat(t.Context(), e, task)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := importReader(t.Context(), e, "t", strings.NewReader("data"), p2p.AddOptions{},
		p2p.KeepReferred); err != nil {
		t.Fatal(err)
	}
	second, err := stat(t.Context(), e, task)
	if err != nil || !second.Imported.Equal(first.Imported) || second.Keep != p2p.KeepPinned {
		t.Errorf("after a second import: %+v, %v; want time and pin of the first: %+v", second, err, first)
	}
}

func testLastUsed(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	before := time.Now().Add(-time.Second)
	RequireContent(t, e, task, []byte("data"))
	info, err := stat(t.Context(), e, task)
	if err != nil || info.LastUsed.Before(before) {
		t.Errorf("last used is %v (%v); want a time after %v", info.LastUsed, err, before)
	}
	// A name was used when what it leads to was.
	before = time.Time{}
	_, parts := importArtifact(t, e, "u", "v1", []byte(`{"one":1}`), Content(1000, 1))
	u := "u"
	for range 2 {
		for entry, err := range e.List(t.Context(), p2p.Query{Tag: &u}) {
			if err != nil {
				t.Fatal(err)
			}
			if entry.Name != "" && entry.LastUsed.IsZero() != before.IsZero() {
				t.Errorf("the name was last used at %v", entry.LastUsed)
			}
		}
		RequireContent(t, e, parts[0], Content(1000, 1))
		before = time.Now()
	}
}

func list(t *testing.T, e p2p.Engine, tag *string) []string {
	t.Helper()
	var lines []string
	for entry, err := range e.List(t.Context(), p2p.Query{Tag: tag}) {
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

func testListKinds(t *testing.T, e p2p.Engine) {
	for _, tag := range []string{"b", "", "a-b", "a", "a/b"} {
		importArtifact(t, e, tag, "v2", []byte(`{"one":1}`), Content(1000, 1))
		importArtifact(t, e, tag, "v1", []byte(`{"two":2}`), Content(1000, 1))
	}
	tags := func(after string) []string {
		got := []string{}
		for entry, err := range e.List(t.Context(), p2p.Query{Kind: p2p.KindTags, After: after}) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, entry.Task.Tag)
		}
		return got
	}
	if got, want := tags(""), []string{"", "a", "a-b", "a/b", "b"}; !slices.Equal(got, want) {
		t.Errorf("tags are %q, want %q", got, want)
	}
	if got, want := tags("a-b"), []string{"a/b", "b"}; !slices.Equal(got, want) {
		t.Errorf("tags after a-b are %q, want %q", got, want)
	}
	if got, want := tags("aa"), []string{"b"}; !slices.Equal(got, want) {
		t.Errorf("tags after aa are %q, want %q", got, want)
	}
	Import(t, e, "a-b", []byte("only here"))
	Import(t, e, "", []byte("only here"))
	holds := digest.SHA256.FromString("only here")
	for _, c := range []struct {
		after string
		want  []string
	}{{"", []string{"", "a-b"}}, {"a", []string{"a-b"}}, {"a-b", nil}} {
		var got []string
		for entry, err := range e.List(t.Context(), p2p.Query{Kind: p2p.KindTags, Has: holds, After: c.after}) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, entry.Task.Tag)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("tags after %q that hold the blob are %q, want %q", c.after, got, c.want)
		}
	}
	for _, err := range e.List(t.Context(), p2p.Query{Kind: p2p.KindTags, Has: digest.SHA256.FromString("nowhere")}) {
		t.Errorf("what is nowhere is held (%v)", err)
	}
	names := func(q p2p.Query) []string {
		q.Kind = p2p.KindNames
		got := []string{}
		for entry, err := range e.List(t.Context(), q) {
			if err != nil {
				t.Fatal(err)
			}
			if !entry.IsManifest || entry.Total != 0 {
				t.Errorf("entry %+v: want a manifest, and no total", entry)
			}
			got = append(got, entry.Task.Tag+":"+entry.Name)
		}
		return got
	}
	a := "a"
	for _, c := range []struct {
		q    p2p.Query
		want []string
	}{
		{p2p.Query{Tag: &a}, []string{"a:v1", "a:v2"}},
		{p2p.Query{Tag: &a, After: "v1"}, []string{"a:v2"}},
		{p2p.Query{Tag: &a, After: "v"}, []string{"a:v1", "a:v2"}},
		{p2p.Query{Tag: &a, After: "v2"}, []string{}},
		{p2p.Query{}, []string{":v1", ":v2", "a:v1", "a:v2", "a-b:v1", "a-b:v2", "a/b:v1", "a/b:v2", "b:v1", "b:v2"}},
	} {
		if got := names(c.q); !slices.Equal(got, c.want) {
			t.Errorf("names of %+v are %q, want %q", c.q, got, c.want)
		}
	}
	d := digest.SHA256.FromString("")
	for _, q := range []p2p.Query{
		{Kind: -1},
		{Kind: p2p.KindPartials + 1},
		{Kind: p2p.KindTags, Tag: &a},
		{RefersTo: d},
		{RefersTo: d, Tag: &a, Kind: p2p.KindNames},
		{RefersTo: "none", Tag: &a},
		{Has: "none", Kind: p2p.KindTags},
		{Has: d},
	} {
		for _, err := range e.List(t.Context(), q) {
			requireError(t, fmt.Sprintf("list %+v", q), err, digest.ErrInvalid)
		}
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
	for range e.List(t.Context(), p2p.Query{}) {
		n++
		break
	}
	if n != 1 {
		t.Errorf("%d entries after a break", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range e.List(ctx, p2p.Query{}) {
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
	for _, opts := range []p2p.AddOptions{
		{Want: digest.SHA512.FromBytes(data), Progress: progress}, {Progress: progress}} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		last = 0
		if _, err := importReader(t.Context(), e, "t", f, opts, p2p.KeepPinned); err != nil ||
			last != int64(len(data)) {
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
	if err := blob.CopyRange(t.Context(), io.Discard, 0, blob.Size(), progress); err != nil ||
		last != int64(len(data)) {
		t.Errorf("progress of the copy ends at %d of %d (%v)", last, len(data), err)
	}
}

type failingWriter struct{}

var errSink = errors.New("the sink broke")

func (failingWriter) Write([]byte) (int, error) { return 0, errSink }

func testCopyRangeFails(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", Content(10*digest.MinPieceLength, 1))
	blob, err := e.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	requireError(t, "copy to a sink that breaks", blob.CopyRange(t.Context(), failingWriter{}, 0, blob.Size(), nil),
		errSink)
	ctx, cancel := context.WithCancel(t.Context())
	err = blob.CopyRange(ctx, io.Discard, 0, blob.Size(), func(int64) { cancel() })
	requireError(t, "copy with a context that ends", err, context.Canceled)
}

func testCancelledBefore(t *testing.T, e p2p.Engine) {
	task := Import(t, e, "t", []byte("data"))
	id := digest.FromDigest(task.Digest)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := stat(ctx, e, task)
	requireError(t, "stat", err, context.Canceled)
	_, err = e.Open(ctx, task, p2p.Local)
	requireError(t, "open", err, context.Canceled)
	_, err = resolve(ctx, e, "t", id)
	requireError(t, "resolve", err, context.Canceled)
	_, err = e.Delete(ctx, "t", id, p2p.DeleteOptions{})
	requireError(t, "delete", err, context.Canceled)
	_, err = importReader(ctx, e, "t", strings.NewReader("x"), p2p.AddOptions{}, p2p.KeepPinned)
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
			if _, err := importReader(t.Context(), e, fmt.Sprintf("t%d", i%4), bytes.NewReader(data), opts,
				p2p.KeepPinned); err != nil {
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
				task, err := importReader(t.Context(), e, tag, bytes.NewReader(data), p2p.AddOptions{}, p2p.KeepPinned)
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
				if err := blob.CopyRange(t.Context(), &buf, 0, blob.Size(), nil); err != nil ||
					!bytes.Equal(buf.Bytes(), data) {
					t.Errorf("content is not what was imported (%v)", err)
				}
				blob.Close()
				if _, err := e.Delete(t.Context(), tag, digest.FromDigest(task.Digest),
					p2p.DeleteOptions{}); err != nil {
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
	_, err = stat(t.Context(), e, task)
	requireError(t, "stat", err, p2p.ErrClosed)
	_, err = e.Open(t.Context(), task, p2p.Local)
	requireError(t, "open", err, p2p.ErrClosed)
	_, err = e.Ingest(t.Context())
	requireError(t, "ingest", err, p2p.ErrClosed)
	_, err = e.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{})
	requireError(t, "delete", err, p2p.ErrClosed)
	for _, err := range e.List(t.Context(), p2p.Query{}) {
		requireError(t, "list", err, p2p.ErrClosed)
	}
	_, err = p2p.Replicate(t.Context(), e, "t", digest.FromDigest(task.Digest), 1)
	requireError(t, "replicate", err, p2p.ErrClosed)
	if p, ok := e.(p2p.Peering); ok {
		_, err = p.Peers(t.Context())
		requireError(t, "peers", err, p2p.ErrClosed)
	}
	requireError(t, "hold", e.Hold(t.Context(), "t", digest.FromDigest(task.Digest)), p2p.ErrClosed)
	requireError(t, "hold the referrers", e.HoldReferrers(t.Context(), task), p2p.ErrClosed)
	requireError(t, "verify", e.Verify(t.Context(), task), p2p.ErrClosed)
	requireError(t, "mend", e.Mend(t.Context(), task), p2p.ErrClosed)
}

// testNoPeers is for what an engine says that has no peers, or none yet.
func testNoPeers(t *testing.T, e p2p.Engine) {
	ctx := t.Context()
	peers, err := p2p.Peers(ctx, e)
	if err != nil || len(peers) != 0 {
		t.Errorf("peers are %v, %v; want none", peers, err)
	}
	task := Import(t, e, "t", []byte("data"))
	layer := Content(1000, 1)
	manifest, parts := importArtifact(t, e, "t", "v1", []byte(`{"one":1}`), layer)

	// What is here is found at any distance.
	for _, id := range []digest.CID{digest.FromDigest(task.Digest), cid(t, "v1")} {
		info, err := e.HoldManifest(ctx, "t", id, p2p.StatOptions{})
		if err != nil || info.Remote || !info.Local() || info.Providers != nil ||
			(info.Manifest != nil) != (info.Task == manifest) {
			t.Errorf("hold the manifest of %s: %+v, %v", id, info, err)
		}
		if err := e.Hold(ctx, "t", id); err != nil {
			t.Errorf("hold %s: %v", id, err)
		}
	}
	for _, task := range []p2p.Task{task, manifest, parts[0]} {
		blob, err := e.Open(ctx, task, p2p.Network)
		if err != nil {
			t.Fatal(err)
		}
		if s := blob.Sources(); s != nil {
			t.Errorf("%s came from %v", task, s)
		}
		blob.Close()
		if err := errors.Join(e.Verify(ctx, task), e.Mend(ctx, task)); err != nil {
			t.Errorf("verify and mend %s, which is whole: %v", task, err)
		}
	}
	absent := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")}
	for what, err := range map[string]error{
		"hold": e.Hold(ctx, "t", digest.FromDigest(absent.Digest)), "verify": e.Verify(ctx, absent),
		"mend": e.Mend(ctx, absent),
	} {
		if !errors.Is(err, p2p.ErrNotFound) && !errors.Is(err, p2p.ErrUnreachable) {
			t.Errorf("%s what is nowhere: %v", what, err)
		}
	}
	if err := e.HoldReferrers(ctx, parts[0]); err != nil && !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("hold what refers to the layer: %v", err)
	}
	bad := p2p.Task{Tag: "UPPER", Digest: absent.Digest}
	for what, err := range map[string]error{
		"hold": e.Hold(ctx, "UPPER", cid(t, "v1")), "hold the referrers": e.HoldReferrers(ctx, bad),
		"verify": e.Verify(ctx, bad), "mend": e.Mend(ctx, bad),
	} {
		requireError(t, what+" under a bad tag", err, digest.ErrInvalid)
	}

	for _, id := range []digest.CID{digest.FromDigest(task.Digest), cid(t, "v1")} {
		holders, err := p2p.Replicate(ctx, e, "t", id, 1)
		requireError(t, "replicate "+id.String(), err, p2p.ErrUnreachable)
		if len(holders) != 0 {
			t.Errorf("replicate %s: on %v", id, holders)
		}
	}
	_, err = p2p.Replicate(ctx, e, "t", cid(t, "absent"), 1)
	requireError(t, "replicate what is not here", err, p2p.ErrNotFound)
	_, err = p2p.Replicate(ctx, e, "UPPER", cid(t, "v1"), 1)
	requireError(t, "replicate under a bad tag", err, digest.ErrInvalid)
	deleted, err := e.Delete(ctx, "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{})
	if want := (p2p.Deleted{Tasks: 1, Freed: 4}); err != nil || !reflect.DeepEqual(deleted, want) {
		t.Errorf("deleted %+v, %v; want %+v", deleted, err, want)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = p2p.Replicate(ended, e, "t", cid(t, "v1"), 1)
	requireError(t, "replicate, cancelled", err, context.Canceled)
	_, err = p2p.Peers(ended, e)
	requireError(t, "peers, cancelled", err, context.Canceled)
}
