package blobstore_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// eachPeer runs a test against an engine that has a peer, in this process and
// behind a socket. r is a repository of the store, and theirs of the peer's.
func eachPeer(t *testing.T, test func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository)) {
	theirs := func(t *testing.T, e *peertest.Engine) *blobstore.Repository {
		return repository(t, blobstore.New(e.Peer), "t")
	}
	t.Run("Open", func(t *testing.T) {
		e := peertest.New(t)
		test(t, e, repository(t, blobstore.New(e), "t"), theirs(t, e))
	})
	t.Run("Dial", func(t *testing.T) {
		e := peertest.New(t)
		s := dialEngine(t, e)
		test(t, e, repository(t, s, "t"), theirs(t, e))
	})
}

// dialEngine returns a store that is e behind a socket.
func dialEngine(t *testing.T, e p2p.Engine) *blobstore.Store {
	t.Helper()
	s, err := client.Dial(t.Context(), peertest.Serve(t, e))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var local = blobstore.Lookup{Local: true}

func exportedTo(t *testing.T, r *blobstore.Repository, cid string, l blobstore.Lookup) ([]byte, blobstore.File, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "out")
	f, err := r.ExportFile(t.Context(), cid, path, blobstore.ExportOptions{Lookup: l})
	if err != nil {
		if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
			t.Errorf("a failed export leaves %v", left)
		}
		return nil, f, err
	}
	data, readErr := os.ReadFile(path)
	if readErr != nil {
		t.Fatal(readErr)
	}
	return data, f, nil
}

func requireSources(t *testing.T, got []blobstore.Source, want int) {
	t.Helper()
	var sources []blobstore.Source
	if want > 0 {
		sources = []blobstore.Source{{Peer: peertest.PeerID, Address: peertest.Address, Bytes: int64(want)}}
	}
	if !slices.Equal(got, sources) {
		t.Errorf("sources are %v, want %v", got, sources)
	}
}

func TestStatOfPeers(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(300_000, 1)
		imported := mustImport(t, theirs, "v1", data, "file")
		for _, cid := range []string{"v1", imported.Digest.String()} {
			f, err := r.Stat(t.Context(), cid, blobstore.Lookup{})
			if err != nil || f.Digest != imported.Digest || f.Size != imported.Size || f.Pieces != imported.Pieces ||
				f.Held != 0 || f.Local || !f.Imported.IsZero() || !f.LastUsed.IsZero() || f.Providers != nil {
				t.Errorf("stat %s: %+v, %v", cid, f, err)
			}
			document, err := json.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{
				`"imported":null`, `"lastUsed":null`, `"local":false`, `"holders":null`, `"sources":[]`} {
				if !strings.Contains(string(document), want) {
					t.Errorf("%s is not in %s", want, document)
				}
			}
			// A count is of those that have the file, not of those that know its name.
			f, err = r.Stat(t.Context(), cid, blobstore.Lookup{Providers: true})
			if want := (blobstore.Providers{Some: 2, Whole: 1, Asked: 3, Silent: 1}); err != nil ||
				f.Providers == nil || *f.Providers != want {
				t.Errorf("stat %s: %+v, %v", cid, f.Providers, err)
			}
			document, err = json.Marshal(f)
			if want := `"holders":{"some":2,"whole":1,"asked":3,"silent":1}`; err != nil ||
				!strings.Contains(string(document), want) {
				t.Errorf("%s is not in %s, %v", want, document, err)
			}
			if _, err := r.Stat(t.Context(), cid, local); !errors.Is(err, blobstore.ErrNotFound) {
				t.Errorf("stat %s of this host: %v", cid, err)
			}
		}
		if _, err := r.Stat(t.Context(), "v1", blobstore.Lookup{Local: true, Providers: true}); !errors.Is(err,
			blobstore.ErrInvalid) {
			t.Errorf("count peers without asking them: %v", err)
		}
		// Nothing of this has been kept.
		for entry, err := range r.List(t.Context()) {
			t.Errorf("stat keeps %v, %v", entry, err)
		}
		if _, err := r.Stat(t.Context(), "v2", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrNotFound) ||
			errors.Is(err, blobstore.ErrUnreachable) {
			t.Errorf("a miss: %v", err)
		}
		e.Part()
		if _, err := r.Stat(t.Context(), "v1", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrUnreachable) ||
			errors.Is(err, blobstore.ErrNotFound) {
			t.Errorf("no peer: %v", err)
		}
		// What is here needs no peer.
		mustImport(t, r, "v3", data, "")
		f, err := r.Stat(t.Context(), "v3", blobstore.Lookup{Providers: true})
		if err != nil || !f.Local || f.Providers == nil || *f.Providers != (blobstore.Providers{}) {
			t.Errorf("stat of what is here: %+v, %v", f, err)
		}
	})
}

func TestHoldersOfArtifact(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		pushBlobs(t, theirs, "one", "{}")
		pushBlobs(t, r, "one", "two", "{}")
		m := ocispec.Manifest{Config: blob("{}"), Layers: []ocispec.Descriptor{fileOf("one", "a"), fileOf("two", "b")}}
		mustPushManifest(t, r, image(m), "v1")
		f, err := r.Stat(t.Context(), "v1", blobstore.Lookup{Providers: true})
		if err != nil || len(f.Files) != 2 || f.Files[0].Providers.Whole != 1 || f.Files[1].Providers.Whole != 0 ||
			f.Providers.Whole != 0 {
			t.Errorf("got %+v, %v; want the providers of the rarest file", f, err)
		}
	})
}

// fileOf describes a file of an artifact.
func fileOf(text, title string) ocispec.Descriptor {
	d := blob(text)
	d.Annotations = map[string]string{ocispec.AnnotationTitle: title}
	return d
}

// What was exported, or read, can be had from here when it is gone elsewhere.
func TestFetchKeepsTheArtifact(t *testing.T) {
	data := bytesOf(300_000, 1)
	for name, get := range map[string]func(t *testing.T, r *blobstore.Repository) ([]byte, blobstore.File, error){
		"export": func(t *testing.T, r *blobstore.Repository) ([]byte, blobstore.File, error) {
			return exportedTo(t, r, "v1", blobstore.Lookup{})
		},
		"to a writer": func(t *testing.T, r *blobstore.Repository) ([]byte, blobstore.File, error) {
			var out bytes.Buffer
			f, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{})
			return out.Bytes(), f, err
		},
		"open": func(t *testing.T, r *blobstore.Repository) ([]byte, blobstore.File, error) {
			in, err := r.Open(t.Context(), "v1", blobstore.Lookup{})
			if err != nil {
				return nil, blobstore.File{}, err
			}
			defer in.Close()
			var out bytes.Buffer
			_, err = io.Copy(&out, in)
			f := in.File()
			f.Sources = in.Sources()
			return out.Bytes(), f, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
				imported := mustImport(t, theirs, "v1", data, "file")
				if _, err := r.Open(t.Context(), "v1", local); !errors.Is(err, blobstore.ErrNotFound) {
					t.Errorf("open on this host: %v", err)
				}
				got, f, err := get(t, r)
				if err != nil || !bytes.Equal(got, data) || f.Local {
					t.Fatalf("got %d bytes of %+v, %v", len(got), f, err)
				}
				requireSources(t, f.Sources, len(data))
				e.Part()
				// All of the artifact is here: with its name, manifest and config.
				m, err := r.Manifest(t.Context(), "v1")
				if err != nil || m.Digest != imported.Manifest {
					t.Errorf("the manifest: %+v, %v", m.Descriptor, err)
				}
				to := memory.New()
				if d, err := oras.Copy(t.Context(), r, "v1", to, "v1", oras.DefaultCopyOptions); err != nil ||
					d.Digest != imported.Manifest {
					t.Errorf("copy: %v, %v", d, err)
				}
				got, f, err = exportedTo(t, r, "v1", local)
				if err != nil || !bytes.Equal(got, data) || !f.Local {
					t.Errorf("got %d bytes of %+v, %v", len(got), f, err)
				}
				requireSources(t, f.Sources, 0)
			})
		})
	}
}

// Content under its digest has no name, and what is here is not asked for.
func TestFetchOfDigest(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(300_000, 1)
		f := mustImport(t, theirs, "", data, "")
		got, exportedFile, err := exportedTo(t, r, f.Digest.String(), blobstore.Lookup{})
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		requireSources(t, exportedFile.Sources, len(data))
		e.Calls("stat")
		e.Calls("open")
		mustImport(t, r, "v1", data, "")
		for _, cid := range []string{f.Digest.String(), "v1"} {
			if _, f, err := exportedTo(t, r, cid, blobstore.Lookup{}); err != nil || len(f.Sources) != 0 {
				t.Errorf("got %+v, %v", f, err)
			}
		}
		if stats, opens := e.Calls("stat"), e.Calls("open"); stats != 0 || opens != 0 {
			t.Errorf("the peer was asked %d and %d times for what is here", stats, opens)
		}
	})
}

func TestExportOfSeveralFiles(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		pushBlobs(t, theirs, "one", "two", "three", "{}")
		pushBlobs(t, r, "two")
		m := ocispec.Manifest{Config: blob("{}"),
			Layers: []ocispec.Descriptor{fileOf("one", "a"), fileOf("two", "b"), fileOf("three", "c")}}
		mustPushManifest(t, theirs, image(m), "v1")
		dir := filepath.Join(t.TempDir(), "out")
		f, err := r.ExportFile(t.Context(), "v1", dir, blobstore.ExportOptions{})
		if err != nil {
			t.Fatal(err)
		}
		requireSources(t, f.Sources, len("onethree"))
		for i, want := range []string{"one", "two", "three"} {
			got, err := os.ReadFile(filepath.Join(dir, f.Files[i].Title))
			if err != nil || string(got) != want {
				t.Errorf("file %d is %q, %v", i, got, err)
			}
		}
		requireSources(t, f.Files[0].Sources, 3)
		requireSources(t, f.Files[1].Sources, 0)
		requireSources(t, f.Files[2].Sources, 5)
		document, err := json.Marshal(f)
		if want := `"sources":[{"peer":"12D3KooWPeer","address":"10.0.0.7:4001","bytes":8}]`; err != nil ||
			!strings.Contains(string(document), want) {
			t.Errorf("%s is not in %s, %v", want, document, err)
		}
		e.Part()
		if ok, err := r.Exists(t.Context(), blob("{}")); err != nil || !ok {
			t.Errorf("the config is not here: %v", err)
		}
	})
}

// A proof that fails costs a new attempt, and never a wrong byte.
func TestExportAfterLies(t *testing.T) {
	data := bytesOf(300_000, 1)
	for lies, want := range map[int]error{1: nil, 2: nil, 3: blobstore.ErrMismatch} {
		eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
			f := mustImport(t, theirs, "v1", data, "")
			e.Lies[f.Digest] = lies
			got, exportedFile, err := exportedTo(t, r, "v1", blobstore.Lookup{})
			if !errors.Is(err, want) || want == nil && !bytes.Equal(got, data) {
				t.Fatalf("after %d lies: %d bytes, %v; want %v", lies, len(got), err, want)
			}
			if n := e.Calls("open"); want != nil && n != 3 {
				t.Errorf("%d attempts", n)
			}
			if want == nil {
				requireSources(t, exportedFile.Sources, len(data))
				return
			}
			if _, err := r.Stat(t.Context(), f.Digest.String(), local); !errors.Is(err, blobstore.ErrNotFound) {
				t.Errorf("it was stored: %v", err)
			}
			// What can't be taken back is not written again.
			var out bytes.Buffer
			e.Lies[f.Digest] = 1
			if _, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{}); !errors.Is(err,
				blobstore.ErrMismatch) || out.Len() >= len(data) {
				t.Errorf("to a writer: %d bytes, %v", out.Len(), err)
			}
		})
	}
}

func TestFetchBreaks(t *testing.T) {
	lost := fmt.Errorf("every peer is gone: %w", p2p.ErrUnreachable)
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		f := mustImport(t, theirs, "v1", bytesOf(300_000, 1), "")
		e.Piece = func(_ context.Context, d digest.Digest, i int) error {
			if d == f.Digest && i == 2 {
				return lost
			}
			return nil
		}
		if _, _, err := exportedTo(t, r, "v1", blobstore.Lookup{}); !errors.Is(err, p2p.ErrUnreachable) {
			t.Errorf("got %v", err)
		}
		// The name of what could not be fetched is of no use here.
		if _, err := r.Stat(t.Context(), "v1", local); !errors.Is(err, blobstore.ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if n := e.Calls("open"); n != 1 {
			t.Errorf("%d attempts", n)
		}
	})
}

// A Reader's first bytes come before its last ones have.
func TestReadWhileItComes(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(300_000, 1)
		f := mustImport(t, theirs, "", data, "")
		released := make(chan struct{})
		e.Piece = func(ctx context.Context, _ digest.Digest, i int) error {
			if i > 0 {
				<-released
			}
			return nil
		}
		in, err := r.Fetch(t.Context(), ocispec.Descriptor{Digest: f.Digest})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		got := make([]byte, 1000)
		if _, err := io.ReadFull(in, got); err != nil || !bytes.Equal(got, data[:1000]) {
			t.Errorf("read: %v", err)
		}
		close(released)
		rest, err := io.ReadAll(in)
		if err != nil || !bytes.Equal(rest, data[1000:]) {
			t.Errorf("read %d bytes, %v", len(rest), err)
		}
	})
}

// That an artifact could not be kept is no failure of its export.
func TestKeepFails(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(1000, 1)
		mustImport(t, theirs, "v1", data, "")
		e.HoldError = errors.New("the disk is full")
		if got, _, err := exportedTo(t, r, "v1", blobstore.Lookup{}); err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		e.HoldError = nil
		if got, _, err := exportedTo(t, r, "v1", blobstore.Lookup{}); err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		if _, err := r.Stat(t.Context(), "v1", local); err != nil {
			t.Errorf("the next one does not keep it: %v", err)
		}
	})
}

// A file that nobody has any more is looked for a few times, not for long.
func TestNameOfNothing(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		f := mustImport(t, theirs, "v1", bytesOf(1000, 1), "")
		if _, err := theirs.Remove(t.Context(), f.Digest.String(), blobstore.DeleteOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Stat(t.Context(), "v1", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrNotFound) ||
			!strings.Contains(err.Error(), f.Digest.String()) {
			t.Errorf("got %v", err)
		}
		if n := e.Calls("stat"); n > 6 {
			t.Errorf("the peer was asked %d times", n)
		}
	})
}

// A client that was told that content is in the network does not push it.
func TestPushOfWhatPeersHave(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		check := blobstore.ManifestOptions{Tags: []string{"v1"}, CheckRefs: true}
		pushBlobs(t, theirs, "{}", "one", "two")
		pushBlobs(t, r, "one")
		data := image(ocispec.Manifest{Config: blob("{}"),
			Layers: []ocispec.Descriptor{blob("one"), blob("two"), blob("two")}})
		if ok, err := r.Exists(t.Context(), blob("two")); err != nil || !ok {
			t.Errorf("exists: %t, %v", ok, err)
		}
		if _, err := r.PushManifest(t.Context(), data, check); err != nil {
			t.Fatal(err)
		}
		if n := e.Calls("open"); n != 2 {
			t.Errorf("%d downloads of two blobs", n)
		}
		e.Part()
		to := memory.New()
		if _, err := oras.Copy(t.Context(), r, "v1", to, "v1", oras.DefaultCopyOptions); err != nil {
			t.Errorf("not all of it is here: %v", err)
		}
	})
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		check := blobstore.ManifestOptions{Tags: []string{"v1"}, CheckRefs: true}
		pushBlobs(t, theirs, "{}")
		data := image(ocispec.Manifest{Config: blob("{}"), Layers: []ocispec.Descriptor{blob("one"), blob("two")}})
		missing := func(want digest.Digest) {
			t.Helper()
			_, err := r.PushManifest(t.Context(), data, check)
			if m, ok := errors.AsType[*p2p.MissingRefError](err); !ok || m.Missing != want {
				t.Errorf("got %v, want that %s is missing", err, want)
			}
			if _, err := r.Resolve(t.Context(), "v1"); err == nil {
				t.Error("it was stored")
			}
		}
		missing(blob("one").Digest)
		if n := e.Calls("open"); n != 2 {
			t.Errorf("%d downloads, want one that succeeds and one that fails", n)
		}
		e.Part()
		missing(blob("one").Digest)
		if n := e.Calls("open"); n != 1 {
			t.Errorf("%d downloads without a peer", n)
		}
	})
}

func TestReferrersOfPeers(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest,
			Digest: digest.SHA256.FromString("subject"), Size: 7}
		here := mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("{}"), Subject: &subject}))
		there := mustPushManifest(t, theirs,
			image(ocispec.Manifest{Config: blob("{}"), Subject: &subject, Annotations: map[string]string{"a": "b"}}))
		digests := func(list []ocispec.Descriptor, err error) []digest.Digest {
			t.Helper()
			if err != nil {
				t.Error(err)
			}
			var got []digest.Digest
			for _, d := range list {
				got = append(got, d.Digest)
			}
			slices.Sort(got)
			return got
		}
		referrers := func() (all []ocispec.Descriptor, err error) {
			err = r.Referrers(t.Context(), subject,
				"", func(page []ocispec.Descriptor) error { all = append(all, page...); return nil })
			return all, err
		}
		want := []digest.Digest{here.Digest, there.Digest}
		slices.Sort(want)
		if got := digests(referrers()); !slices.Equal(got, want) {
			t.Errorf("referrers are %v, want %v", got, want)
		}
		e.Part()
		// Those that came are here now, and what is here is an answer.
		if got := digests(r.Predecessors(t.Context(), subject)); !slices.Equal(got, want) {
			t.Errorf("predecessors are %v, want %v", got, want)
		}
	})
}

// A host on its own takes what is pushed.
func TestPushWithoutPeers(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, _ *blobstore.Repository) {
		e.Part()
		src := memory.New()
		d, err := oras.PackManifest(t.Context(), src, oras.PackManifestVersion1_1,
			"application/x", oras.PackManifestOptions{})
		if err == nil {
			err = src.Tag(t.Context(), d, "v1")
		}
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := r.Exists(t.Context(), d); ok || err != nil {
			t.Errorf("exists: %t, %v", ok, err)
		}
		if _, err := oras.Copy(t.Context(), src, "v1", r, "v1", oras.DefaultCopyOptions); err != nil {
			t.Errorf("copy: %v", err)
		}
		other := digest.SHA256.FromString("other")
		if _, err := r.Fetch(t.Context(), ocispec.Descriptor{Digest: other}); !errors.Is(err,
			blobstore.ErrUnreachable) {
			t.Errorf("fetch: %v", err)
		}
	})
}

// What is mounted has to be here: a mount copies nothing.
func TestMountIsLocal(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		pushBlobs(t, theirs, "one")
		to := repository(t, blobstore.New(e), "to")
		if err := to.Mount(t.Context(), blob("one"), "t", nil); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("mount of what a peer has: %v", err)
		}
		if n := e.Calls("stat"); n != 0 {
			t.Errorf("the peer was asked %d times", n)
		}
	})
}

// beginning is an engine on whose host everything has just begun to arrive that
// the peer has.
type beginning struct{ *peertest.Engine }

func (b beginning) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	info, err := b.Engine.Stat(ctx, tag, cid, opts)
	if opts.Scope == p2p.Local && errors.Is(err, p2p.ErrNotFound) {
		if info, err = b.Peer.Stat(ctx, tag, cid, opts); err == nil {
			info.Held = 0
		}
	}
	return info, err
}

// What has begun to arrive is not here.
func TestPushOfWhatArrives(t *testing.T) {
	e := peertest.New(t)
	theirs := repository(t, blobstore.New(e.Peer), "t")
	pushBlobs(t, theirs, "{}", "one", "two")
	s := blobstore.New(beginning{e})
	r := repository(t, s, "t")
	if err := r.Push(t.Context(), blob("one"), strings.NewReader("one")); err != nil {
		t.Errorf("push: %v", err)
	}
	if err := repository(t, s, "to").Mount(t.Context(), blob("two"), "t", nil); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("mount: %v", err)
	}
	data := image(ocispec.Manifest{Config: blob("{}"), Layers: []ocispec.Descriptor{blob("one"), blob("two")}})
	if _, err := r.PushManifest(t.Context(), data, blobstore.ManifestOptions{CheckRefs: true}); err != nil {
		t.Errorf("push the manifest: %v", err)
	}
	if n := e.Calls("open"); n != 2 {
		t.Errorf("%d downloads, want those of the two that were not pushed", n)
	}
}

func TestManifestContent(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		want := mustPushManifest(t, theirs, image(ocispec.Manifest{Config: blob("{}")}), "v1")
		if m, err := r.Manifest(t.Context(), "v1"); err != nil || !reflect.DeepEqual(m, want) {
			t.Errorf("got %+v, %v; want %+v", m, err, want)
		}
		for _, keep := range []bool{false, true} {
			m, err := r.ManifestContent(t.Context(), "v1", keep, 0)
			if err != nil || m.Digest != want.Digest || m.Size != want.Size || m.MediaType != want.MediaType ||
				!bytes.Equal(m.Content, want.Content) {
				t.Errorf("got %+v, %v; want %+v", m, err, want)
			}
			if _, err := r.Stat(t.Context(), m.Digest.String(), local); (err == nil) != keep {
				t.Errorf("kept, where that is %v: %v", keep, err)
			}
		}
	})
}

func TestReplicateAndPeers(t *testing.T) {
	for name, store := range map[string]func(t *testing.T, e *peertest.Engine) *blobstore.Store{
		"Open": func(_ *testing.T, e *peertest.Engine) *blobstore.Store { return blobstore.New(e) },
		"Dial": func(t *testing.T, e *peertest.Engine) *blobstore.Store { return dialEngine(t, e) },
	} {
		t.Run(name, func(t *testing.T) {
			e := peertest.New(t)
			s := store(t, e)
			r := repository(t, s, "t")
			f := mustImport(t, r, "v1", bytesOf(10, 1), "")
			for _, cid := range []string{"v1", f.Digest.String()} {
				if got, err := r.Replicate(t.Context(), cid, 1); err != nil ||
					!slices.Equal(got, []string{peertest.PeerID}) {
					t.Errorf("replicate %s: %v, %v", cid, got, err)
				}
			}
			if _, err := r.Replicate(t.Context(), "v1", 2); !errors.Is(err, blobstore.ErrUnreachable) ||
				!strings.Contains(err.Error(), "1 of 2") {
				t.Errorf("got %v", err)
			}
			if _, err := r.Replicate(t.Context(), "a b", 1); !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("got %v", err)
			}
			peers, err := s.Peers(t.Context())
			if want := []blobstore.Peer{
				{ID: peertest.PeerID, Addresses: []string{peertest.Address}, State: p2p.PeerConnected}}; err != nil ||
				!reflect.DeepEqual(peers, want) {
				t.Errorf("peers are %+v, %v", peers, err)
			}
		})
	}
}

// What only a peer has can be tagged here.
func TestTagOfPeers(t *testing.T) {
	eachPeer(t, func(t *testing.T, _ *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(300_000, 1)
		imported := mustImport(t, theirs, "v1", data, "file")
		for _, reference := range []string{"v1", imported.Digest.String()} {
			target, err := r.Resolve(t.Context(), reference)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Tag(t.Context(), target, "stable"); err != nil {
				t.Fatalf("tag %s: %v", reference, err)
			}
			if got, err := r.Resolve(t.Context(), "stable"); err != nil || got.Digest != target.Digest {
				t.Errorf("the tag of %s is %v, %v", reference, got, err)
			}
			if exported, _, err := exportedTo(t, r, "stable", blobstore.Lookup{}); err != nil ||
				!bytes.Equal(exported, data) {
				t.Errorf("exported by the tag of %s: %d bytes, %v", reference, len(exported), err)
			}
		}
		absent := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest,
			Digest: digest.SHA256.FromString("absent"), Size: 6}
		if err := r.Tag(t.Context(), absent, "stable"); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("tag what nobody has: %v", err)
		}
	})
}

// hangingKeep is an engine whose peers go silent when what was exported is to be kept.
type hangingKeep struct {
	p2p.Engine
	kept atomic.Int32
}

func (e *hangingKeep) HoldManifest(ctx context.Context, _ string, _ digest.CID, _ p2p.StatOptions) (p2p.Info, error) {
	e.kept.Add(1)
	<-ctx.Done()
	return p2p.Info{}, context.Cause(ctx)
}

// An export that has the file does not wait for what would be kept with it.
func TestExportWaitsForNothingElse(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	peer := peertest.New(t)
	theirs := repository(t, blobstore.New(peer.Peer), "t")
	if _, err := theirs.Import(t.Context(), "v1", strings.NewReader("content"),
		blobstore.ImportOptions{Title: "file"}); err != nil {
		t.Fatal(err)
	}
	e := &hangingKeep{Engine: peer}
	r := repository(t, blobstore.New(e), "t")
	done := make(chan error)
	go func() {
		_, err := r.ExportFile(t.Context(), "v1", filepath.Join(t.TempDir(), "out"), blobstore.ExportOptions{})
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil || e.kept.Load() != 1 {
			t.Errorf("export: %v; %d attempts to keep the artifact, want 1", err, e.kept.Load())
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the export waits for a peer that is silent")
	}
}
