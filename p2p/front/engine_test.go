package front_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/front/fronttest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) *front.Engine {
	t.Helper()
	store, err := pieces.Open(t.TempDir(), pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e := front.New(store, nil)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// An engine with a source that has nothing does all that an engine has to.
func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		e := open(t)
		e.Add(fronttest.New(e, t.TempDir()))
		return e
	})
}

// put puts a file into a directory, under a digest that may be of something else.
func put(t *testing.T, dir string, d digest.Digest, data []byte) {
	t.Helper()
	path := filepath.Join(dir, d.Algorithm().String(), d.Encoded())
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// What a source has is found, fetched once however many want it, proven, and kept; a manifest as
// what it is.
func TestDirectory(t *testing.T) {
	e, dir := open(t), t.TempDir()
	e.Add(fronttest.New(e, dir))
	layer := enginetest.Content(5<<20, 1)
	d := digest.SHA256.FromBytes(layer)
	manifest := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `",` +
		`"config":` + descriptor("application/vnd.oci.empty.v1+json", []byte("{}")) + `,"layers":[` +
		descriptor("a/b", layer) + `]}`)
	m := digest.SHA256.FromBytes(manifest)
	put(t, dir, d, layer)
	put(t, dir, m, manifest)
	put(t, dir, digest.SHA256.FromString("{}"), []byte("{}"))

	info, err := e.Stat(t.Context(), "t", digest.FromDigest(d), p2p.StatOptions{Providers: true})
	if err != nil || !info.Remote || info.Size != int64(len(layer)) ||
		*info.Providers != (p2p.Providers{Asked: 1, Some: 1, Whole: 1}) {
		t.Errorf("stat of a layer: %+v, %v", info, err)
	}
	info, err = e.Stat(t.Context(), "t", digest.FromDigest(m), p2p.StatOptions{Manifest: true})
	if err != nil || info.MediaType != ocispec.MediaTypeImageManifest || info.Manifest == nil ||
		!bytes.Equal(info.Manifest.Content, manifest) {
		t.Errorf("stat of a manifest: %+v, %v", info, err)
	}
	if err := e.Hold(t.Context(), "t", digest.FromDigest(m)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "sha256")); err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{layer, manifest, []byte("{}")} {
		enginetest.RequireContent(t, e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}, data)
	}
	// It is under the other tag where the source still has it.
	other := p2p.Task{Tag: "other", Digest: d}
	if _, err := e.Open(t.Context(), other, p2p.Network); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("open under a tag that nobody has it under: %v", err)
	}
	put(t, dir, d, []byte("not read: the bytes are here"))
	if got, err := enginetest.Fetch(t.Context(), e, other); err != nil || !bytes.Equal(got, layer) {
		t.Errorf("fetch under another tag: %d bytes, %v", len(got), err)
	}
}

func descriptor(mediaType string, data []byte) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest.SHA256.FromBytes(data), len(data))
}

// A source that lies is passed over for the next one, and what it gives is nowhere kept.
func TestNextSource(t *testing.T) {
	e, lies, has := open(t), t.TempDir(), t.TempDir()
	e.Add(fronttest.New(e, lies))
	honest := &late{fronttest.New(e, has), make(chan struct{})}
	e.Add(honest)
	data := enginetest.Content(100_000, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	put(t, lies, task.Digest, enginetest.Content(100_000, 2))
	_, err := e.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what only a liar has", err, digest.ErrMismatch)
	if _, err := e.Stat(t.Context(), "t", digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("after a lie: %v", err)
	}
	put(t, has, task.Digest, data)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if got, err := enginetest.Fetch(t.Context(), e, task); err != nil || !bytes.Equal(got, data) {
				t.Errorf("fetch: %d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	close(honest.wait)
	info, err := e.Stat(t.Context(), "t", digest.FromDigest(task.Digest), p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 2, Some: 2, Whole: 2}) {
		t.Errorf("stat: %+v, %v", info.Providers, err)
	}
}

// A source that has all of a blob is asked before one that is listed first and has it not.
func TestOrder(t *testing.T) {
	e, dir := open(t), t.TempDir()
	asked := &empty{}
	e.Add(asked)
	e.Add(fronttest.New(e, dir))
	put(t, dir, digest.SHA256.FromString("data"), []byte("data"))
	if _, err := enginetest.Fetch(t.Context(), e,
		p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}); err != nil || asked.fetches > 0 {
		t.Errorf("a source that has nothing was asked %d times for content, %v", asked.fetches, err)
	}
	_, err := enginetest.Fetch(t.Context(), e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")})
	enginetest.RequireError(t, "fetch what is nowhere", err, p2p.ErrNotFound)
	if asked.fetches != 1 {
		t.Errorf("a source was asked %d times for what is nowhere, want once", asked.fetches)
	}
}

// late is a source that says what it has when it may.
type late struct {
	*fronttest.Directory
	wait chan struct{}
}

func (s *late) Find(ctx context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	select {
	case <-s.wait:
		return s.Directory.Find(ctx, task, opts)
	case <-ctx.Done():
		return front.Found{}, context.Cause(ctx)
	}
}

// empty is a source that has nothing.
type empty struct {
	*fronttest.Directory
	fetches int
}

func (*empty) Name() string { return "nothing" }

func (*empty) Stop() {}

func (*empty) Close() error { return nil }

func (*empty) Offer(context.Context, p2p.Commit) error { return nil }

func (*empty) Find(context.Context, p2p.Task, front.FindOptions) (front.Found, error) {
	return front.Found{}, p2p.ErrNotFound
}

func (s *empty) Fetch(context.Context, p2p.Task, bool) (p2p.Blob, error) {
	s.fetches++
	return nil, p2p.ErrNotFound
}

// What is damaged here is mended from a source; where none has it, the damage is what is told.
func TestMend(t *testing.T) {
	dir := t.TempDir()
	store, err := pieces.Open(dir, pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e, has := front.New(store, nil), t.TempDir()
	defer e.Close()
	e.Add(fronttest.New(e, has))
	data := enginetest.Content(200_000, 1)
	task := enginetest.Import(t, e, "t", data)
	path := filepath.Join(dir, "blobs", task.Digest.Algorithm().String(), task.Digest.Encoded())
	wrong := bytes.Clone(data)
	wrong[100_000] ^= 1
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, wrong, 0o600)); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireError(t, "verify", e.Verify(t.Context(), task), digest.ErrCorrupt)
	enginetest.RequireError(t, "mend what nobody has", e.Mend(t.Context(), task), p2p.ErrNotFound)
	if _, err := enginetest.Fetch(t.Context(), e, task); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("read what nobody has whole: %v", err)
	}
	if err := os.Truncate(path, 3); err != nil {
		t.Fatal(err)
	}
	_, err = e.Open(t.Context(), task, p2p.Network)
	enginetest.RequireError(t, "open what nobody has whole", err, digest.ErrCorrupt)
	put(t, has, task.Digest, data)
	if err := e.Mend(t.Context(), task); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireContent(t, e, task, data)
}

// Close ends what is on its way, and those who wait for it.
func TestClose(t *testing.T) {
	e := open(t)
	began := make(chan struct{})
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}
	waits := make(chan error)
	go func() {
		waits <- e.Once(context.Background(), task, func(ctx context.Context) error {
			close(began)
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}()
	<-began
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	enginetest.RequireError(t, "wait", <-waits, p2p.ErrClosed)
}
