package blobstore_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// eachStore runs a test against an embedded store, and against one behind a socket.
func eachStore(t *testing.T, test func(t *testing.T, s *blobstore.Store)) {
	for name, open := range stores {
		if testing.Short() && name == "Open" {
			continue // the socket leads to the same store
		}
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

// eachStoreWithoutLeases is eachStore for what is deleted at once, whoever was told of it.
func eachStoreWithoutLeases(t *testing.T, test func(t *testing.T, s *blobstore.Store)) {
	for name, open := range storesWith(pieces.Options{Lease: time.Nanosecond}) {
		if testing.Short() && name == "Open" {
			continue
		}
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

// stores open new stores, which are closed when the test ends. They have to be
// in order then.
var stores = storesWith(pieces.Options{})

func storesWith(opts pieces.Options) map[string]func(t *testing.T) *blobstore.Store {
	return map[string]func(t *testing.T) *blobstore.Store{
		"Open": func(t *testing.T) *blobstore.Store {
			dir := filepath.Join(t.TempDir(), "new", "dir")
			engine, err := pieces.Open(dir, opts)
			if err != nil {
				t.Fatal(err)
			}
			s := blobstore.New(engine)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				requireInOrder(t, dir)
			})
			return s
		},
		"Dial": func(t *testing.T) *blobstore.Store {
			s, err := client.Dial(t.Context(), serveWith(t, opts))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
			return s
		},
	}
}

// requireInOrder fails the test unless the closed store in dir has nothing
// unfinished in it, and a check of it finds nothing wrong.
func requireInOrder(t testing.TB, dir string) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil || len(left) > 0 {
		t.Errorf("ingest/ has %v, %v; want nothing", left, err)
	}
	s, err := pieces.Open(dir, pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// The test's own context has ended where this runs in a cleanup.
	if _, err := s.Check(context.Background(), func(p pieces.Problem) { t.Errorf("check: %s", p) }); err != nil {
		t.Error(err)
	}
}

// serve starts what a dfdaemon is made of and returns its socket.
func serve(t testing.TB) string { return serveWith(t, pieces.Options{}) }

func serveWith(t testing.TB, opts pieces.Options) string {
	t.Helper()
	dir := t.TempDir()
	store, err := pieces.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "run", "s")
	l, err := rpc.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	server := rpc.NewServer(store, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // clients are closed by now; nothing is to be waited for
		server.Shutdown(ctx)
		<-served
		if err := store.Close(); err != nil {
			t.Error(err)
		}
		requireInOrder(t, dir)
	})
	return socket
}

func repository(t *testing.T, s *blobstore.Store, tag string) *blobstore.Repository {
	t.Helper()
	r, err := s.Repository(tag)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func bytesOf(n int, seed byte) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

func mustImport(t *testing.T, r *blobstore.Repository, cid string, data []byte, title string) blobstore.File {
	t.Helper()
	f, err := r.Import(t.Context(), cid, bytes.NewReader(data), blobstore.ImportOptions{Title: title})
	if err != nil {
		t.Fatalf("import %s: %v", cid, err)
	}
	return f
}

func TestImportAndExport(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "models/llm")
		for i, size := range []int{0, 1, 1000, 5 << 20} {
			data := bytesOf(size, byte(i))
			d := digest.SHA256.FromBytes(data)
			for _, cid := range []string{"", string(d), "v1", string(digest.SHA512.FromBytes(data))} {
				f := mustImport(t, r, cid, data, "/some/where/model.bin")
				want := d
				if strings.HasPrefix(cid, "sha512") {
					want = digest.Digest(cid)
				}
				if f.Digest != want || f.Size != int64(size) || f.Tag != "models/llm" || !f.Local {
					t.Errorf("import as %q: %+v", cid, f)
				}
				if (f.Title == "model.bin" && f.Manifest != "") != (cid == "v1") {
					t.Errorf("import as %q: title %q, manifest %q", cid, f.Title, f.Manifest)
				}
				if cid == "" {
					cid = string(d)
				}
				if f.CID != cid {
					t.Errorf("cid is %q, want %q", f.CID, cid)
				}
				stat, err := r.Stat(t.Context(), cid, blobstore.Lookup{})
				known := !stat.Imported.IsZero()
				stat.Imported, stat.LastUsed = f.Imported, f.LastUsed
				if err != nil || !reflect.DeepEqual(stat, f) || !known {
					t.Errorf("stat %s: %+v, %v; want %+v", cid, stat, err, f)
				}
				var out bytes.Buffer
				if _, err := r.Export(t.Context(), cid, &out, blobstore.ExportOptions{}); err != nil ||
					!bytes.Equal(out.Bytes(), data) {
					t.Errorf("export %s: %d bytes, %v", cid, out.Len(), err)
				}
				path := filepath.Join(t.TempDir(), "out")
				if _, err := r.ExportFile(t.Context(), cid, path, blobstore.ExportOptions{}); err != nil {
					t.Errorf("export %s to a file: %v", cid, err)
				}
				if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
					t.Errorf("export %s to a file: other content (%v)", cid, err)
				}
				reader, err := r.Open(t.Context(), cid, blobstore.Lookup{Local: true})
				if err != nil {
					t.Fatal(err)
				}
				if size <= 1000 { // it reads byte by byte
					if err := iotest.TestReader(reader, data); err != nil {
						t.Errorf("read %s: %v", cid, err)
					}
				}
				reader.Close()
			}
		}
	})
}

// TestManifest: what a cache ID makes is what `oras push` makes, and the same again makes the same.
func TestManifest(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "models")
		f := mustImport(t, r, "v1", []byte("data"), "model.bin")
		var raw bytes.Buffer
		if _, err := r.Export(t.Context(), string(f.Manifest), &raw, blobstore.ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw.Bytes(), &m); err != nil {
			t.Fatal(err)
		}
		if m.SchemaVersion != 2 || m.MediaType != ocispec.MediaTypeImageManifest ||
			m.ArtifactType != blobstore.ArtifactType ||
			m.Config.MediaType != ocispec.MediaTypeEmptyJSON || m.Config.Size != 2 || len(m.Layers) != 1 ||
			m.Layers[0].Digest != f.Digest || m.Layers[0].Size != 4 ||
			m.Layers[0].Annotations[ocispec.AnnotationTitle] != "model.bin" {
			t.Errorf("manifest is %s", raw.String())
		}
		var config bytes.Buffer
		if _, err := r.Export(t.Context(), string(m.Config.Digest), &config, blobstore.ExportOptions{}); err != nil ||
			config.String() != "{}" {
			t.Errorf("config is %q, %v", config.String(), err)
		}
		if again := mustImport(t, r, "v1", []byte("data"), "model.bin"); !reflect.DeepEqual(again, f) {
			t.Errorf("importing the same again gives %+v, was %+v", again, f)
		}
	})
}

// TestFileThatIsTheConfig: the file's content is that of the artifact's own config.
func TestFileThatIsTheConfig(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "")
		mustImport(t, r, "v1", []byte("{}"), "empty.json")
		var out bytes.Buffer
		if _, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{}); err != nil || out.String() != "{}" {
			t.Errorf("export: %q, %v", out.String(), err)
		}
		if _, err := r.Remove(t.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		for e := range r.List(t.Context()) {
			t.Errorf("%v is left", e)
		}
	})
}

func TestTitles(t *testing.T) {
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "")
	for title, want := range map[string]string{
		"": "v1", ".": "v1", "..": "v1", "/": "v1", "a/..": "v1", "../../etc/passwd": "passwd", "dir/": "dir",
		"x\xffy": "x_y", "with space": "with space", "emoji😀": "emoji😀",
	} {
		if f := mustImport(t, r, "v1", []byte("data"), title); f.Title != want {
			t.Errorf("title %q is stored as %q, want %q", title, f.Title, want)
		}
	}
}

func TestErrors(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		mustImport(t, r, "v1", []byte("data"), "")
		layer := string(digest.SHA256.FromString("data"))
		for _, c := range []struct {
			what string
			do   func() error
			want error
		}{
			{"import other content", func() error {
				_, err := r.Import(t.Context(), string(digest.SHA256.FromString("x")), strings.NewReader("y"),
					blobstore.ImportOptions{})
				return err
			}, blobstore.ErrMismatch},
			{"import a bad cid", func() error {
				_, err := r.Import(t.Context(), "a b", strings.NewReader("y"), blobstore.ImportOptions{})
				return err
			}, blobstore.ErrInvalid},
			{"stat a bad cid", func() error {
				_, err := r.Stat(t.Context(), "sha256:x", blobstore.Lookup{})
				return err
			}, blobstore.ErrInvalid},
			{"stat an absent one", func() error { _, err := r.Stat(t.Context(), "v2", blobstore.Lookup{}); return err },
				blobstore.ErrNotFound},
			{"open an absent one", func() error { _, err := r.Open(t.Context(), "v2", blobstore.Lookup{}); return err },
				blobstore.ErrNotFound},
			{"export an absent one", func() error {
				_, err := r.ExportFile(t.Context(), "v2", filepath.Join(t.TempDir(), "x"), blobstore.ExportOptions{})
				return err
			}, blobstore.ErrNotFound},
			{"delete an absent one", func() error {
				_, err := r.Remove(t.Context(), "v2", blobstore.DeleteOptions{})
				return err
			}, blobstore.ErrNotFound},
			{"delete no cid", func() error {
				_, err := r.Remove(t.Context(), "", blobstore.DeleteOptions{})
				return err
			}, blobstore.ErrInvalid},
			{"delete a layer", func() error {
				_, err := r.Remove(t.Context(), layer, blobstore.DeleteOptions{})
				return err
			}, blobstore.ErrReferenced},
			{"a bad tag", func() error { _, err := s.Repository("Not/OK"); return err }, blobstore.ErrInvalid},
		} {
			if err := c.do(); !errors.Is(err, c.want) {
				t.Errorf("%s: %v; want %v", c.what, err, c.want)
			}
		}
		if _, err := r.Remove(t.Context(), layer, blobstore.DeleteOptions{Force: true}); err != nil {
			t.Errorf("delete a layer by force: %v", err)
		}
	})
}

func TestOpenNoDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, err := blobstore.Open(""); !errors.Is(err, blobstore.ErrInvalid) {
		t.Errorf("error is %v, want %v", err, blobstore.ErrInvalid)
	}
	if files, err := os.ReadDir("."); err != nil || len(files) > 0 {
		t.Errorf("in the working directory are %v, %v", files, err)
	}
}

func TestDialNobody(t *testing.T) {
	_, err := client.Dial(t.Context(), filepath.Join(t.TempDir(), "nobody"))
	if !errors.Is(err, blobstore.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
}

func exportTo(t *testing.T, path string, overwrite bool) error {
	t.Helper()
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "")
	mustImport(t, r, "v1", []byte("new content"), "")
	_, err = r.ExportFile(t.Context(), "v1", path, blobstore.ExportOptions{Overwrite: overwrite})
	return err
}

func TestExportFileOutputs(t *testing.T) {
	read := func(path string) string {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return string(data)
	}
	dir := t.TempDir()
	old := filepath.Join(dir, "old")
	if err := os.WriteFile(old, []byte("old content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := exportTo(t, old, false); !errors.Is(err, fs.ErrExist) || read(old) != "old content" {
		t.Errorf("export over a file: %v; the file has %q", err, read(old))
	}
	if err := exportTo(t, old, true); err != nil || read(old) != "new content" {
		t.Errorf("export with overwrite: %v; the file has %q", err, read(old))
	}
	if info, err := os.Stat(old); err != nil || info.Mode() != 0o600 {
		t.Errorf("after an export with overwrite the mode is %v, was 0600 (%v)", info.Mode(), err)
	}
	// Through a link the file is replaced, and the link stays.
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(target, []byte("old content"), 0o600), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	if err := exportTo(t, link, true); err != nil || read(target) != "new content" {
		t.Errorf("export over a link: %v; the file behind it has %q", err, read(target))
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link is %v now (%v)", info.Mode(), err)
	}
	dangling, fifo := filepath.Join(dir, "dangling"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink("nowhere", dangling), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, dangling, fifo, "/dev/null"} {
		if err := exportTo(t, path, true); !errors.Is(err, fs.ErrExist) {
			t.Errorf("export to %s: %v", path, err)
		}
	}
	if err := exportTo(t, filepath.Join(dir, "no", "such", "dir"), false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("export into a directory that is not there: %v", err)
	}
	mask := syscall.Umask(0o027)
	fresh := filepath.Join(dir, "fresh")
	err := exportTo(t, fresh, false)
	syscall.Umask(mask)
	if info, e := os.Stat(fresh); err != nil || e != nil || info.Mode() != 0o640 {
		t.Errorf("a new file has mode %v, want what the umask leaves of 0666 (%v, %v)", info.Mode(), err, e)
	}
}

// TestExportLeavesNothing: an export that fails leaves the directory as it was.
func TestExportLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s, err := blobstore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "")
	f := mustImport(t, r, "v1", bytesOf(3<<20, 1), "")
	path := filepath.Join(dir, "blobs", "sha256", f.Digest.Encoded())
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-1] ^= 1
	if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	existing := filepath.Join(out, "existing")
	if err := os.WriteFile(existing, []byte("as it was"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"existing", "new"} {
		_, err := r.ExportFile(t.Context(), "v1", filepath.Join(out, name), blobstore.ExportOptions{Overwrite: true})
		if !errors.Is(err, blobstore.ErrCorrupt) {
			t.Errorf("export of a damaged file: %v", err)
		}
	}
	whole := mustImport(t, r, "v2", bytesOf(3<<20, 2), "")
	ctx, cancel := context.WithCancel(t.Context())
	_, err = r.ExportFile(ctx, whole.Digest.String(), filepath.Join(out, "new"),
		blobstore.ExportOptions{Progress: func(int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("export with a context that ends: %v", err)
	}
	left, err := os.ReadDir(out)
	if err != nil || len(left) != 1 {
		t.Errorf("the directory has %v (%v)", left, err)
	}
	if got, err := os.ReadFile(existing); err != nil || string(got) != "as it was" {
		t.Errorf("the existing file has %q (%v)", got, err)
	}
}

// TestMovingName: a cache ID that is imported anew again and again always has
// one file or the other, whole.
func TestMovingName(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		contents := [][]byte{bytesOf(1000, 0), bytesOf(70_000, 1), bytesOf(10, 2)}
		mustImport(t, r, "v1", contents[0], "")
		ctx, cancel := context.WithCancel(t.Context())
		var writers sync.WaitGroup
		for i := range contents {
			writers.Go(func() {
				for ctx.Err() == nil {
					if _, err := r.Import(ctx, "v1", bytes.NewReader(contents[i]),
						blobstore.ImportOptions{}); err != nil && ctx.Err() == nil {
						t.Errorf("import: %v", err)
						return
					}
				}
			})
		}
		for range 100 {
			var out bytes.Buffer
			f, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{})
			if err != nil || f.Digest != digest.SHA256.FromBytes(out.Bytes()) {
				t.Errorf("export: %d bytes as %s, %v", out.Len(), f.Digest, err)
				break
			}
		}
		cancel()
		writers.Wait()
	})
}

// TestDanglingName: what a cache ID leads to was deleted by force.
func TestDanglingName(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		f := mustImport(t, r, "v1", []byte("data"), "")
		if _, err := r.Remove(t.Context(), string(f.Digest), blobstore.DeleteOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Stat(t.Context(), "v1", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrNotFound) ||
			!strings.Contains(err.Error(), "v1") || !strings.Contains(err.Error(), string(f.Digest)) {
			t.Errorf("error is %v; want one that names both", err)
		}
	})
}

// TestImportIsOneStep: nothing that follows the commit can make an import fail.
func TestImportIsOneStep(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := blobstore.New(noQueries{engine})
	defer s.Close()
	for _, cid := range []string{"", "v1"} {
		mustImport(t, repository(t, s, ""), cid, []byte("data"), "")
	}
}

// noQueries is an engine of a daemon that takes no more calls.
type noQueries struct{ p2p.Engine }

func (noQueries) Stat(context.Context, string, digest.CID, p2p.StatOptions) (p2p.Info, error) {
	return p2p.Info{}, p2p.ErrUnavailable
}

func TestFileJSON(t *testing.T) {
	data, err := json.Marshal(blobstore.File{CID: "v1"})
	want :=
		`{"cid":"v1","tag":"","digest":"","size":0,"title":"","manifest":"","pieces":0,"pieceLength":0,"held":0,"local":false,"imported":null,"lastUsed":null,"holders":null,"sources":[],"unchanged":false,"files":[]}`
	if err != nil || string(data) != want {
		t.Errorf("%s, %v; want %s", data, err, want)
	}
}

func TestReader(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "")
		data := bytesOf(300_000, 1)
		mustImport(t, r, "v1", data, "")
		reader, err := r.Open(t.Context(), "v1", blobstore.Lookup{})
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		if f := reader.File(); f.Size != reader.Size() || f.CID != "v1" {
			t.Errorf("file is %+v", f)
		}
		for _, off := range []int64{0, 100_000, 300_000} {
			if _, err := reader.Seek(off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			n, err := io.Copy(&out, reader)
			if err != nil || n != int64(len(data))-off || !bytes.Equal(out.Bytes(), data[off:]) {
				t.Errorf("copying from %d on gives %d bytes, %v", off, n, err)
			}
			if at, _ := reader.Seek(0, io.SeekCurrent); at != reader.Size() {
				t.Errorf("after copying the offset is %d", at)
			}
		}
	})
}
