package blobstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/blobstore/storagetest"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/memory"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// What a Repository is to oras-go.
var (
	_ oras.GraphTarget          = (*blobstore.Repository)(nil)
	_ content.Deleter           = (*blobstore.Repository)(nil)
	_ content.Untagger          = (*blobstore.Repository)(nil)
	_ registry.TagLister        = (*blobstore.Repository)(nil)
	_ registry.ReferrerLister   = (*blobstore.Repository)(nil)
	_ registry.ReferenceFetcher = (*blobstore.Repository)(nil)
	_ registry.ReferencePusher  = (*blobstore.Repository)(nil)
	_ registry.Mounter          = (*blobstore.Repository)(nil)
)

// storeRepository is a repository that knows its store.
type storeRepository struct {
	*blobstore.Repository
	store *blobstore.Store
}

func TestStorage(t *testing.T) {
	stores := storesWith(pieces.Options{Lease: time.Nanosecond}) // what is deleted goes at once
	stores["Memory"] = func(t *testing.T) *blobstore.Store {
		s := blobstore.New(memory.New(memory.Options{Lease: time.Nanosecond}))
		t.Cleanup(func() { s.Close() })
		return s
	}
	stores["Bytes in memory"] = func(t *testing.T) *blobstore.Store {
		engine, err := pieces.Open(t.TempDir(), pieces.Options{Lease: time.Nanosecond, Backend: backend.NewMemory()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { engine.Close() })
		return blobstore.New(engine)
	}
	for name, open := range stores {
		for tag, other := range map[string]string{"": "other", "library/models": ""} {
			if (name == "Dial") != (tag == "") {
				continue // the socket leads to the same store: each takes one
			}
			if testing.Short() && name == "Dial" {
				continue
			}
			t.Run(name+" "+blobstore.RepositoryName(tag), func(t *testing.T) {
				storagetest.Run(t, func(t *testing.T) oras.Target {
					s := open(t)
					return storeRepository{repository(t, s, tag), s}
				}, storagetest.Options{
					OtherRepository: func(t *testing.T, target oras.Target) (oras.Target, string) {
						s := target.(storeRepository).store
						return storeRepository{repository(t, s, other), s}, blobstore.RepositoryName(other)
					},
				})
			})
		}
	}
}

// TestTwoNamesOfAnError: what fails matches the errors of this package, and
// those that oras-go and its callers look for.
func TestTwoNamesOfAnError(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		pushBlobs(t, r, "config")
		absent, bad := blob("absent"), blob("bad")
		bad.Digest = "sha256:bad"
		m := mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("config")}), "v1")
		err2 := func(_ any, err error) error { return err }
		for what, c := range map[string]struct {
			err          error
			ours, theirs error
		}{
			"fetch":   {err2(r.Fetch(t.Context(), absent)), blobstore.ErrNotFound, errdef.ErrNotFound},
			"resolve": {err2(r.Resolve(t.Context(), "absent")), blobstore.ErrNotFound, errdef.ErrNotFound},
			"manifest": {err2(r.Manifest(t.Context(), "absent")), blobstore.ErrNotFound,
				errdef.ErrNotFound},
			"tag": {r.Tag(t.Context(), absent, "v2"), blobstore.ErrNotFound, errdef.ErrNotFound},
			"tag by digest": {r.Tag(t.Context(), absent, absent.Digest.String()), blobstore.ErrNotFound,
				errdef.ErrNotFound},
			"untag":  {r.Untag(t.Context(), "absent"), blobstore.ErrNotFound, errdef.ErrNotFound},
			"delete": {r.Delete(t.Context(), absent), blobstore.ErrNotFound, errdef.ErrNotFound},
			"mount": {r.Mount(t.Context(), absent, "other", nil), blobstore.ErrNotFound,
				errdef.ErrNotFound},
			"push of other bytes": {r.Push(t.Context(), absent, strings.NewReader("ABSENT")), blobstore.ErrMismatch,
				content.ErrMismatchedDigest},
			"fetch of a bad one":  {err2(r.Fetch(t.Context(), bad)), blobstore.ErrInvalid, errdef.ErrInvalidDigest},
			"exists of a bad one": {err2(r.Exists(t.Context(), bad)), blobstore.ErrInvalid, errdef.ErrInvalidDigest},
			"push of a bad one": {r.Push(t.Context(), bad, strings.NewReader("bad")), blobstore.ErrInvalid,
				errdef.ErrInvalidDigest},
			"resolve a bad tag": {err2(r.Resolve(t.Context(), "a b")), blobstore.ErrInvalid,
				errdef.ErrInvalidReference},
			"resolve a bad digest": {err2(r.Resolve(t.Context(), "sha256:x")), blobstore.ErrInvalid,
				errdef.ErrInvalidReference},
			"resolve nothing": {err2(r.Resolve(t.Context(), "")), blobstore.ErrInvalid,
				errdef.ErrMissingReference},
			"tag with a bad tag": {r.Tag(t.Context(), m.Descriptor, "a/b"), blobstore.ErrInvalid,
				errdef.ErrInvalidReference},
			"tag another's digest": {r.Tag(t.Context(), m.Descriptor, blob("config").Digest.String()),
				blobstore.ErrInvalid, errdef.ErrInvalidReference},
			"untag a digest": {r.Untag(t.Context(), m.Digest.String()), blobstore.ErrInvalid,
				errdef.ErrInvalidReference},
			"mount from nowhere": {r.Mount(t.Context(), absent, "Not/OK", nil), blobstore.ErrInvalid,
				blobstore.ErrInvalid},
			"delete of a part": {r.Delete(t.Context(), blob("config")), blobstore.ErrReferenced,
				blobstore.ErrReferenced},
			"a negative size": {r.Push(t.Context(), ocispec.Descriptor{Digest: absent.Digest, Size: -1},
				strings.NewReader("")), blobstore.ErrInvalid, content.ErrInvalidDescriptorSize},
		} {
			if !errors.Is(c.err, c.ours) || !errors.Is(c.err, c.theirs) {
				t.Errorf("%s: %v; want an error that is %v and %v", what, c.err, c.ours, c.theirs)
			}
		}
		// A failure that is of one family only is not taken for one of the other.
		if err := r.Delete(t.Context(), blob("config")); errors.Is(err, errdef.ErrNotFound) ||
			errors.Is(err, content.ErrMismatchedDigest) {
			t.Errorf("delete of a part: %v", err)
		}
	})
}

func TestClosedStore(t *testing.T) {
	for name, open := range map[string]func() (*blobstore.Store, error){
		"Open": func() (*blobstore.Store, error) { return blobstore.Open(t.TempDir()) },
		"Dial": func() (*blobstore.Store, error) { return client.Dial(t.Context(), serve(t)) },
	} {
		t.Run(name, func(t *testing.T) {
			s, err := open()
			if err != nil {
				t.Fatal(err)
			}
			r := repository(t, s, "t")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			_, exists := r.Exists(t.Context(), blob("x"))
			_, manifest := r.PushManifest(t.Context(), []byte("{}"), blobstore.ManifestOptions{})
			tags := r.Tags(t.Context(), "", func([]string) error { return nil })
			upload := errors.New("no error")
			if u, err := r.NewUpload(t.Context(), ""); err != nil {
				upload = err
			} else {
				u.Close()
			}
			for _, err := range []error{exists, manifest, tags, upload,
				r.Push(t.Context(), blob("x"), strings.NewReader("x")), r.Tag(t.Context(), blob("x"), "v1")} {
				if !errors.Is(err, blobstore.ErrClosed) {
					t.Errorf("after Close: %v", err)
				}
			}
		})
	}
}

func TestRepositoryNames(t *testing.T) {
	for name, tag := range map[string]string{
		p2p.DefaultRepository: "", "models": "models", "library/models": "library/models",
		"dfcache/default2": "dfcache/default2",
	} {
		if got, err := blobstore.TagOf(name); err != nil || got != tag {
			t.Errorf("tag of %q is %q, %v; want %q", name, got, err, tag)
		}
		if got := blobstore.RepositoryName(tag); got != name {
			t.Errorf("name of %q is %q, want %q", tag, got, name)
		}
	}
	for _, name := range []string{"", "/", "a/", "/a", "A", "a//b", "a..b", "../a", "a/../b", "a b",
		strings.Repeat("a", 256)} {
		if tag, err := blobstore.TagOf(name); !errors.Is(err, blobstore.ErrInvalid) {
			t.Errorf("tag of %q is %q, %v", name, tag, err)
		}
	}
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, tag := range []string{"", "library/models"} {
		if r := repository(t, s, tag); r.Name() != tag {
			t.Errorf("the name of repository %q is %q", tag, r.Name())
		}
	}
	if _, err := s.Repository(p2p.DefaultRepository); !errors.Is(err, blobstore.ErrInvalid) {
		t.Errorf("the empty tag has a second name: %v", err)
	}
}

func TestRepositories(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		list := func(last string) (all []string) {
			t.Helper()
			if err := s.Repositories(t.Context(), last, func(tags []string) error {
				all = append(all, tags...)
				return nil
			}); err != nil {
				t.Errorf("repositories after %q: %v", last, err)
			}
			return all
		}
		if got := list(""); len(got) != 0 {
			t.Errorf("an empty store has %q", got)
		}
		want := []string{"", "a", "a-b", "a.b", "a/b", "a/b/c", "a/b0", "a0", "a_b", "b", "zz"}
		for i := range want {
			tag := want[(i*7+3)%len(want)]
			pushBlobs(t, repository(t, s, tag), "blob 1", "blob 2")
			mustImport(t, repository(t, s, tag), "v1", []byte("file"), "")
		}
		if got := list(""); !slices.Equal(got, want) {
			t.Errorf("repositories are %q, want %q", got, want)
		}
		for i, tag := range want[1:] {
			if got := list(tag); !slices.Equal(got, want[i+2:]) {
				t.Errorf("repositories after %q are %q, want %q", tag, got, want[i+2:])
			}
		}
		for last, from := range map[string]int{"A": 1, "a/a": 4, "a/b/a": 5, "bb": 10, "zzz": 11} {
			if got := list(last); !slices.Equal(got, want[from:]) {
				t.Errorf("repositories after %q, which is none, are %q, want %q", last, got, want[from:])
			}
		}
		stop := errors.New("stop")
		if err := s.Repositories(t.Context(), "", func([]string) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("repositories with a function that fails: %v", err)
		}
		// One that holds nothing any more is none.
		r := repository(t, s, "a.b")
		for _, text := range []string{"blob 1", "blob 2"} {
			if err := r.Delete(t.Context(), blob(text)); err != nil {
				t.Error(err)
			}
		}
		if _, err := r.Remove(t.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if got := list("a-b"); !slices.Equal(got, want[4:]) {
			t.Errorf("repositories are %q, want %q", got, want[4:])
		}
	})
}

// TestPages: tags, repositories and referrers come in order, in pages that are
// not too large, and a page may be kept.
func TestPages(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		var want []string
		for i := range 2500 {
			want = append(want, fmt.Sprintf("v%04d", i))
		}
		subject := mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("config")}), want...)
		pages := func(last string, list func(last string, fn func([]string) error) error) (pages int, all []string) {
			t.Helper()
			var kept [][]string
			if err := list(last, func(page []string) error {
				if len(page) == 0 || len(page) > 1000 {
					t.Errorf("a page has %d entries", len(page))
				}
				kept = append(kept, page)
				return nil
			}); err != nil {
				t.Error(err)
			}
			return len(kept), slices.Concat(kept...)
		}
		tags := func(last string, fn func([]string) error) error { return r.Tags(t.Context(), last, fn) }
		for from, count := range map[int]int{0: 3, 500: 2, 1499: 2, 1500: 1, 2499: 1, 2500: 0} {
			last := ""
			if from > 0 {
				last = want[from-1]
			}
			if n, got := pages(last, tags); n != count || !slices.Equal(got, want[from:]) {
				t.Errorf("after %q there are %d pages of %d tags, want %d of %d", last, n, len(got), count,
					len(want)-from)
			}
		}
		stop := errors.New("stop")
		calls := 0
		err := r.Tags(t.Context(), "", func([]string) error {
			if calls++; calls == 2 {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) || calls != 2 {
			t.Errorf("tags with a function that fails at its second call: %v after %d", err, calls)
		}

		// Referrers.
		var digests []string
		for i := range 300 {
			m := mustPushManifest(t, r, image(ocispec.Manifest{
				Config: blob("config"), Subject: &subject.Descriptor,
				ArtifactType: []string{"application/x-a", "application/x-b"}[i%2],
				Annotations:  map[string]string{"number": fmt.Sprint(i), "text": strings.Repeat("x", 10_000)},
			}))
			digests = append(digests, m.Digest.String())
		}
		slices.Sort(digests)
		referrers := func(artifactType string) func(string, func([]string) error) error {
			return func(_ string, fn func([]string) error) error {
				return r.Referrers(t.Context(), subject.Descriptor, artifactType,
					func(found []ocispec.Descriptor) error {
						var page []string
						for _, d := range found {
							if d.Annotations["number"] == "" || d.MediaType != ocispec.MediaTypeImageManifest ||
								artifactType != "" && d.ArtifactType != artifactType {
								t.Errorf("a referrer is %+v", d)
							}
							page = append(page, d.Digest.String())
						}
						return fn(page)
					})
			}
		}
		if n, got := pages("", referrers("")); n < 2 || !slices.Equal(got, digests) {
			t.Errorf("there are %d pages of %d referrers, want more than one of %d, sorted", n, len(got), len(digests))
		}
		if _, got := pages("", referrers("application/x-b")); len(got) != 150 || !slices.IsSorted(got) {
			t.Errorf("there are %d referrers of one type, want 150, sorted", len(got))
		}
	})
}

// TestReferrersOfAnything: what is about content is found whatever that is, and
// wherever it is.
func TestReferrersOfAnything(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		pushBlobs(t, r, "layer")
		for _, subject := range []ocispec.Descriptor{blob("layer"), blob("absent")} {
			m := mustPushManifest(t, r, image(
				ocispec.Manifest{Config: blob("config"), Subject: &subject, ArtifactType: "application/x-note"}))
			var got []ocispec.Descriptor
			if err := r.Referrers(t.Context(), subject, "", func(page []ocispec.Descriptor) error {
				got = append(got, page...)
				return nil
			}); err != nil || len(got) != 1 || got[0].Digest != m.Digest ||
				got[0].ArtifactType != "application/x-note" {
				t.Errorf("referrers: %+v, %v; want %s", got, err, m.Digest)
			}
			if found, err := repository(t, s, "other").Predecessors(t.Context(), subject); err != nil ||
				len(found) != 0 {
				t.Errorf("under another tag it has the predecessors %v, %v", found, err)
			}
		}
		bad := blob("x")
		bad.Digest = "sha256:x"
		if err := r.Referrers(t.Context(), bad, "", func([]ocispec.Descriptor) error { return nil }); !errors.Is(err,
			errdef.ErrInvalidDigest) {
			t.Errorf("referrers of a bad digest: %v", err)
		}
	})
}

// TestMountManifest: a manifest that is mounted is one, with what it refers to.
func TestMountManifest(t *testing.T) {
	eachStoreWithoutLeases(t, func(t *testing.T, s *blobstore.Store) {
		for _, tag := range []string{"", "from"} {
			from, to := repository(t, s, tag), repository(t, s, "to")
			pushBlobs(t, from, "config")
			m := mustPushManifest(t, from, image(ocispec.Manifest{Config: blob("config")}), "v1")
			if err := to.Mount(t.Context(), m.Descriptor, blobstore.RepositoryName(tag), nil); err != nil {
				t.Fatalf("mount a manifest: %v", err)
			}
			if got, err := to.Manifest(t.Context(), m.Digest.String()); err != nil ||
				!content.Equal(got.Descriptor, m.Descriptor) {
				t.Errorf("mounted: %+v, %v; want %+v", got.Descriptor, err, m.Descriptor)
			}
			if found, err := to.Predecessors(t.Context(), blob("config")); err != nil || len(found) != 1 {
				t.Errorf("predecessors of the config: %v, %v", found, err)
			}
			if got := tags(t, to); len(got) != 0 {
				t.Errorf("with the manifest came the tags %q", got)
			}
			// A blob keeps its media type, and there is one copy of it.
			if err := to.Mount(t.Context(), blob("config"), blobstore.RepositoryName(tag), nil); err != nil {
				t.Fatalf("mount a blob: %v", err)
			}
			if got, err := to.Resolve(t.Context(), blob("config").Digest.String()); err != nil ||
				!content.Equal(got, blob("config")) {
				t.Errorf("mounted: %+v, %v", got, err)
			}
			deleted, err := from.Remove(t.Context(), "v1", blobstore.DeleteOptions{})
			if err != nil || deleted.Tasks != 2 || deleted.Freed != 0 {
				t.Errorf("removed where it was mounted from: %+v, %v", deleted, err)
			}
			if err := to.Delete(t.Context(), m.Descriptor); err != nil {
				t.Error(err)
			}
			requireGone(t, to, m.Digest, blob("config").Digest)
		}
	})
}

// TestMountFromAnywhere: without a repository's name any that holds it will do.
func TestMountFromAnywhere(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		to := repository(t, s, "to")
		if err := to.Mount(t.Context(), blob("layer"), "", nil); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("mount of what is nowhere: %v", err)
		}
		for i, tag := range []string{"", "from"} {
			text := fmt.Sprintf("layer %d", i)
			pushBlobs(t, repository(t, s, tag), text)
			if err := to.Mount(t.Context(), blob(text), "", nil); err != nil {
				t.Errorf("mount from %q: %v", tag, err)
			}
			if got, err := content.FetchAll(t.Context(), to, blob(text)); err != nil || string(got) != text {
				t.Errorf("mounted from %q: %q, %v", tag, got, err)
			}
		}
	})
}

// TestReopen: what was pushed is there when the store is opened again, and its
// blobs are where every tool that knows OCI layouts looks for them.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	m := image(ocispec.Manifest{Config: blob("config"), Layers: []ocispec.Descriptor{blob("layer")}})
	for i := range 3 {
		s, err := blobstore.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		r := repository(t, s, "t")
		if i == 0 {
			pushBlobs(t, r, "config", "layer")
			mustPushManifest(t, r, m, "v1", "v2")
		}
		for _, tag := range []string{"v1", "v2"} {
			if got, err := r.Manifest(t.Context(), tag); err != nil || !bytes.Equal(got.Content, m) {
				t.Errorf("manifest %s: %+v, %v", tag, got, err)
			}
		}
		if found, err := r.Predecessors(t.Context(), blob("layer")); err != nil || len(found) != 1 {
			t.Errorf("predecessors: %v, %v", found, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	layout, err := oci.NewStorage(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"config", "layer", string(m)} {
		if got, err := content.FetchAll(t.Context(), layout, blob(text)); err != nil || string(got) != text {
			t.Errorf("oras-go reads %q from the directory, %v; want %q", got, err, text)
		}
	}
	requireInOrder(t, dir)
}

// TestPushHeals: content that has been damaged on the disk can be pushed again.
func TestPushHeals(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"lost": os.Remove,
		"cut":  func(path string) error { return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 3)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := blobstore.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			r := repository(t, s, "t")
			pushBlobs(t, r, "layer")
			d := blob("layer")
			if err := damage(filepath.Join(dir, "blobs", "sha256", d.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
			if fetched, err := r.Fetch(t.Context(), d); !errors.Is(err, blobstore.ErrCorrupt) ||
				errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("fetch: %v, %v", fetched, err)
			}
			requireGone(t, r, d.Digest) // so that a client pushes it again
			if err := r.Push(t.Context(), d, strings.NewReader("layer")); err != nil {
				t.Fatalf("push: %v", err)
			}
			if got, err := content.FetchAll(t.Context(), r, d); err != nil || string(got) != "layer" {
				t.Errorf("fetch: %q, %v", got, err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			requireInOrder(t, dir)
		})
	}
}

// TestFetchedReader: what Fetch returns can do what a registry needs.
func TestFetchedReader(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := bytesOf(3<<20, 1)
		f := mustImport(t, r, "", data, "")
		fetched, err := r.Fetch(t.Context(), ocispec.Descriptor{Digest: f.Digest})
		if err != nil {
			t.Fatal(err)
		}
		defer fetched.Close()
		reader := fetched.(*blobstore.Reader)
		if err := r.Delete(t.Context(), ocispec.Descriptor{Digest: f.Digest}); err != nil {
			t.Fatal(err)
		}
		// deleted, but open
		for _, c := range [][2]int64{{0, 0}, {0, 3 << 20}, {1, 1}, {1<<20 - 1, 2}, {3<<20 - 1, 1}, {3 << 20, 0}} {
			var out bytes.Buffer
			if err := reader.CopyRange(t.Context(), &out, c[0], c[1]); err != nil ||
				!bytes.Equal(out.Bytes(), data[c[0]:c[0]+c[1]]) {
				t.Errorf("range %v: %d bytes, %v", c, out.Len(), err)
			}
		}
		for _, c := range [][2]int64{{-1, 1}, {0, 3<<20 + 1}, {3 << 20, 1}, {1, -1}, {1 << 62, 1 << 62}} {
			if err := reader.CopyRange(t.Context(), io.Discard, c[0], c[1]); err == nil {
				t.Errorf("there is a range %v", c)
			}
		}
		// A writer that fails leaves the offset behind what it took.
		full := errors.New("full")
		n, err := reader.WriteTo(&limitedWriter{left: 2 << 20, err: full})
		at, _ := reader.Seek(0, io.SeekCurrent)
		if !errors.Is(err, full) || at != n {
			t.Errorf("wrote %d bytes, %v; the offset is %d", n, err, at)
		}
		if n, err := io.Copy(io.Discard, reader); err != nil || n != int64(len(data))-at {
			t.Errorf("after that there are %d bytes, %v; want %d", n, err, int64(len(data))-at)
		}
	})
}

// limitedWriter fails when it has taken what it can.
type limitedWriter struct {
	left int
	err  error
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return 0, w.err
	}
	w.left -= len(p)
	return len(p), nil
}

// TestPushAndImportMeet: both doors lead to the same content.
func TestPushAndImportMeet(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := []byte("the same")
		d := content.NewDescriptorFromBytes("application/octet-stream", data)
		if err := r.Push(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		f := mustImport(t, r, "v1", data, "file.txt")
		if f.Digest != d.Digest {
			t.Errorf("imported as %s", f.Digest)
		}
		if err := r.Push(t.Context(), d, strings.NewReader("")); !errors.Is(err, errdef.ErrAlreadyExists) {
			t.Errorf("push of what was imported: %v", err)
		}
		m, err := r.Manifest(t.Context(), "v1")
		if err != nil || m.Digest != f.Manifest || m.ArtifactType != blobstore.ArtifactType {
			t.Errorf("manifest of what was imported: %+v, %v", m.Descriptor, err)
		}
		if got, err := r.Resolve(t.Context(), "v1"); err != nil || !content.Equal(got, m.Descriptor) {
			t.Errorf("resolve what was imported: %+v, %v; want %+v", got, err, m.Descriptor)
		}
		if _, err := r.Stat(t.Context(), digest.SHA256.FromBytes(data).String(), blobstore.Lookup{}); err != nil {
			t.Errorf("stat of what was pushed: %v", err)
		}
	})
}

// vanishing is an engine in which everything is deleted as soon as it has been
// looked at.
type vanishing struct{ p2p.Engine }

func (v vanishing) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	info, err := v.Engine.Stat(ctx, tag, cid, opts)
	if err == nil {
		_, err = v.Engine.Delete(ctx, tag, digest.FromDigest(info.Task.Digest), p2p.DeleteOptions{Force: true})
	}
	return info, err
}

// TestDeletedMeanwhile: what is deleted between a look at it and its use is
// pushed, or not there, but nothing else.
func TestDeletedMeanwhile(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := blobstore.New(engine)
	defer s.Close()
	calm, hasty := repository(t, s, "t"), repository(t, blobstore.New(vanishing{engine}), "t")
	data := image(ocispec.Manifest{Config: blob("config")})
	d := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, data)
	mustPushManifest(t, calm, data, "v1")
	if err := hasty.PushReference(t.Context(), d, bytes.NewReader(data), "v2"); err != nil {
		t.Errorf("push: %v", err)
	}
	if got, err := calm.Resolve(t.Context(), "v2"); err != nil || !content.Equal(got, d) {
		t.Errorf("resolve: %+v, %v", got, err)
	}
	if _, _, err := hasty.FetchReference(t.Context(), "v2"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("fetch: %v", err)
	}
	pushBlobs(t, calm, "layer")
	give := func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("layer")), nil }
	to := repository(t, blobstore.New(vanishing{engine}), "to")
	if err := to.Mount(t.Context(), blob("layer"), "t", give); err != nil {
		t.Errorf("mount: %v", err)
	}
	requireGone(t, calm, blob("layer").Digest)
	if got, err := content.FetchAll(t.Context(), repository(t, s, "to"), blob("layer")); err != nil ||
		string(got) != "layer" {
		t.Errorf("what was mounted is %q, %v", got, err)
	}
}
