package blobstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/storagetest"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func newUpload(t *testing.T, r *blobstore.Repository, alg digest.Algorithm) *blobstore.Upload {
	t.Helper()
	u, err := r.NewUpload(t.Context(), alg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func mustAppend(t *testing.T, u *blobstore.Upload, data []byte) {
	t.Helper()
	before := u.Size()
	n, err := u.Append(bytes.NewReader(data))
	if err != nil || n != int64(len(data)) || u.Size() != before+n {
		t.Fatalf("append %d bytes at %d: %d, %v; the size is %d", len(data), before, n, err, u.Size())
	}
}

// requireBlob fails the test unless the repository has data, and no tag for it.
func requireBlob(t *testing.T, r *blobstore.Repository, d digest.Digest, data []byte) {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: int64(len(data))}
	storagetest.RequireContent(t, r, desc, data)
	found, err := r.Resolve(t.Context(), d.String())
	if err != nil || !content.Equal(found, desc) {
		t.Errorf("resolve %s: %+v, %v; want %+v", d, found, err, desc)
	}
}

func requireGone(t *testing.T, r *blobstore.Repository, digests ...digest.Digest) {
	t.Helper()
	for _, d := range digests {
		if exists, err := r.Exists(t.Context(), ocispec.Descriptor{Digest: d}); exists || err != nil {
			t.Errorf("%s is there: %t, %v", d, exists, err)
		}
	}
}

func TestUpload(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := bytesOf(5<<20, 1)
		for name, parts := range map[string][]int{
			"empty":       {},
			"empty parts": {0, 0},
			"one":         {1000},
			"many":        {1, 0, 2, 1 << 20, 1<<20 - 1, 1<<20 + 1, 64 << 10, 999},
			"large":       {5 << 20},
		} {
			for _, hint := range []digest.Algorithm{"", digest.SHA256, digest.SHA384, digest.SHA512} {
				for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
					u := newUpload(t, r, hint)
					size := 0
					for _, n := range parts {
						mustAppend(t, u, data[size:size+n])
						size += n
					}
					d := alg.FromBytes(data[:size])
					desc, err := u.Commit(d)
					if err != nil || desc.Digest != d || desc.Size != int64(size) ||
						desc.MediaType != "application/octet-stream" {
						t.Errorf("commit of %s as %s, begun as %q: %+v, %v", name, alg, hint, desc, err)
					}
					requireBlob(t, r, d, data[:size])
					if err := u.Close(); err != nil {
						t.Error(err)
					}
				}
			}
		}
	})
}

// TestUploadGoesOn: after a source that fails, another one goes on.
func TestUploadGoesOn(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := bytesOf(3<<20, 1)
		u := newUpload(t, r, "")
		broken := errors.New("the connection is broken")
		ends := []int{0, 1000, 1 << 20, 2<<20 + 1, 3 << 20}
		for i, end := range ends[1:] {
			part := data[ends[i]:end]
			n, err := u.Append(io.MultiReader(bytes.NewReader(part), iotest.ErrReader(broken)))
			if !errors.Is(err, broken) || n != int64(len(part)) || u.Size() != int64(end) {
				t.Fatalf("append: %d, %v; want %d bytes and the source's error; the size is %d", n, err, len(part),
					u.Size())
			}
			if n, err := u.Append(iotest.ErrReader(broken)); n != 0 || !errors.Is(err, broken) {
				t.Fatalf("append of nothing: %d, %v", n, err)
			}
		}
		// The error comes with the last bytes.
		more := []byte("more")
		if n, err := u.Append(&lastReader{more, broken}); n != int64(len(more)) || !errors.Is(err, broken) {
			t.Fatalf("append: %d, %v", n, err)
		}
		data = append(data, more...)
		d := digest.SHA512.FromBytes(data)
		if _, err := u.Commit(d); err != nil {
			t.Fatal(err)
		}
		requireBlob(t, r, d, data)
	})
}

// lastReader gives its bytes and its error at once.
type lastReader struct {
	data []byte
	err  error
}

func (r *lastReader) Read(p []byte) (int, error) { return copy(p, r.data), r.err }

func TestUploadMismatch(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := []byte("hello, world")
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			for _, hint := range []digest.Algorithm{digest.SHA256, alg} {
				u := newUpload(t, r, hint)
				mustAppend(t, u, data)
				want := alg.FromString("something else")
				_, err := u.Commit(want)
				for _, is := range []error{blobstore.ErrMismatch, content.ErrMismatchedDigest} {
					if !errors.Is(err, is) {
						t.Errorf("commit as %s: %v; want %v", alg, err, is)
					}
				}
				if mismatch, ok := errors.AsType[*digest.MismatchError](err); !ok || mismatch.Want != want ||
					mismatch.Got != alg.FromBytes(data) {
					t.Errorf("commit as %s: %+v; want a MismatchError of both digests", alg, mismatch)
				}
				requireGone(t, r, want, alg.FromBytes(data), digest.SHA256.FromBytes(data))
				requireOver(t, u)
			}
		}
		for _, bad := range []digest.Digest{"", "sha256:abc", "md5:0123"} {
			u := newUpload(t, r, "")
			mustAppend(t, u, data)
			if _, err := u.Commit(bad); !errors.Is(err, errdef.ErrInvalidDigest) ||
				!errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("commit as %q: %v", bad, err)
			}
			requireOver(t, u)
		}
		if _, err := r.NewUpload(t.Context(), "md5"); !errors.Is(err, blobstore.ErrInvalid) {
			t.Errorf("an upload of an unknown algorithm: %v", err)
		}
		for e := range r.List(t.Context()) {
			t.Errorf("%+v is there", e)
		}
	})
}

// requireOver fails the test unless nothing can be done with the upload any more.
func requireOver(t *testing.T, u *blobstore.Upload) {
	t.Helper()
	for _, src := range []string{"more", ""} {
		if n, err := u.Append(strings.NewReader(src)); n != 0 || err == nil {
			t.Errorf("append %q to an upload that is over: %d, %v", src, n, err)
		}
	}
	if _, err := u.Commit(digest.SHA256.FromString("")); err == nil {
		t.Error("an upload that is over can be committed")
	}
	for range 2 {
		if err := u.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func TestUploadOver(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		d := digest.SHA256.FromString("hello")
		u := newUpload(t, r, "")
		mustAppend(t, u, []byte("hello"))
		if err := u.Close(); err != nil {
			t.Error(err)
		}
		requireOver(t, u)
		requireGone(t, r, d)
		u = newUpload(t, r, "")
		mustAppend(t, u, []byte("hello"))
		if _, err := u.Commit(d); err != nil {
			t.Fatal(err)
		}
		requireOver(t, u)
		requireBlob(t, r, d, []byte("hello"))
	})
}

// stuckReader gives what it has, and then blocks until it is released.
type stuckReader struct {
	io.Reader
	stuck   chan struct{} // closed when it blocks
	release chan struct{}
}

func newStuckReader(text string) *stuckReader {
	return &stuckReader{strings.NewReader(text), make(chan struct{}), make(chan struct{})}
}

func (r *stuckReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == nil {
		return n, nil
	}
	close(r.stuck)
	<-r.release
	return copy(p, "late"), nil
}

// TestUploadEnds: Close and the end of the context end an upload at once, also
// while an Append waits for its source, and nothing is left.
func TestUploadEnds(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		reason := errors.New("the session has expired")
		for name, c := range map[string]struct {
			end  func(*blobstore.Upload, context.CancelCauseFunc)
			want error // of the Append, nil for any
		}{
			"Close":   {func(u *blobstore.Upload, _ context.CancelCauseFunc) { u.Close() }, nil},
			"context": {func(_ *blobstore.Upload, cancel context.CancelCauseFunc) { cancel(reason) }, reason},
		} {
			for _, before := range []string{"", "hello"} {
				ctx, cancel := context.WithCancelCause(t.Context())
				u, err := r.NewUpload(ctx, "")
				if err != nil {
					t.Fatal(err)
				}
				if before == "" {
					c.end(u, cancel) // with nothing under way
					requireOver(t, u)
					cancel(nil)
					continue
				}
				src := newStuckReader(before)
				appended := make(chan error)
				go func() {
					_, err := u.Append(src)
					appended <- err
				}()
				<-src.stuck
				c.end(u, cancel)
				if err := u.Close(); err != nil { // it does not wait for the source
					t.Errorf("close after %s: %v", name, err)
				}
				close(src.release)
				if err := <-appended; err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("append to an upload that ended by %s: %v; want %v", name, err, c.want)
				}
				requireOver(t, u)
				requireGone(t, r, digest.SHA256.FromString(before), digest.SHA256.FromString(before+"late"))
				cancel(nil)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if u, err := r.NewUpload(ctx, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("an upload whose context has ended: %v, %v", u, err)
		}
	})
}

// TestUploadCloseWhileCommitting: either all of it is stored, or nothing is.
func TestUploadCloseWhileCommitting(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		for i := range 30 {
			data := bytesOf(1000+i, byte(i))
			alg := []digest.Algorithm{digest.SHA256, digest.SHA512}[i%2]
			d := alg.FromBytes(data)
			u := newUpload(t, r, "")
			mustAppend(t, u, data)
			committed := make(chan error)
			go func() {
				_, err := u.Commit(d)
				committed <- err
			}()
			if err := u.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := <-committed; err == nil {
				requireBlob(t, r, d, data)
			} else if exists, _ := r.Exists(t.Context(), ocispec.Descriptor{Digest: d}); exists {
				requireBlob(t, r, d, data) // the answer to the commit came too late
			}
			requireOver(t, u)
		}
	})
}

// TestUploadTwice: of two uploads of the same content both are right.
func TestUploadTwice(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := bytesOf(1<<20, 1)
		d := digest.SHA256.FromBytes(data)
		a, b := newUpload(t, r, ""), newUpload(t, r, digest.SHA512)
		mustAppend(t, a, data)
		mustAppend(t, b, data)
		for _, u := range []*blobstore.Upload{a, b} {
			if _, err := u.Commit(d); err != nil {
				t.Error(err)
			}
			requireBlob(t, r, d, data)
		}
	})
}

// TestUploadIsOnDisk: bytes are written as they come, not kept in memory.
func TestUploadIsOnDisk(t *testing.T) {
	dir := t.TempDir()
	s, err := blobstore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	u := newUpload(t, repository(t, s, ""), "")
	mustAppend(t, u, bytesOf(4<<20, 1))
	files, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil || len(files) != 1 {
		t.Fatalf("ingest/ has %v, %v; want one file", files, err)
	}
	if info, err := files[0].Info(); err != nil || info.Size() < 3<<20 {
		t.Errorf("%d bytes of 4 MiB are written, %v", info.Size(), err)
	}
	u.Close()
	if files, err := os.ReadDir(filepath.Join(dir, "ingest")); err != nil || len(files) != 0 {
		t.Errorf("ingest/ has %v, %v; want nothing", files, err)
	}
}

// TestNoSpace: a push for which there is no room is refused at once, whatever is still to come.
func TestNoSpace(t *testing.T) {
	dir := t.TempDir()
	engine, err := pieces.Open(dir, pieces.Options{MaxSize: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := blobstore.New(engine)
	r := repository(t, s, "t")
	pushBlobs(t, r, "small")
	data := bytesOf(8<<20, 1)
	u := newUpload(t, r, "")
	if n, err := u.Append(bytes.NewReader(data)); !errors.Is(err, blobstore.ErrNoSpace) || n >= int64(len(data)) {
		t.Errorf("append: %d, %v", n, err)
	}
	if n, err := u.Append(strings.NewReader("more")); n != 0 || !errors.Is(err, blobstore.ErrNoSpace) {
		t.Errorf("append after that: %d, %v", n, err)
	}
	if _, err := u.Commit(digest.SHA256.FromBytes(data)); !errors.Is(err, blobstore.ErrNoSpace) {
		t.Errorf("commit: %v", err)
	}
	d := content.NewDescriptorFromBytes("application/x-test", data)
	if err := r.Push(t.Context(), d, bytes.NewReader(data)); !errors.Is(err, blobstore.ErrNoSpace) {
		t.Errorf("push: %v", err)
	}
	large := append([]byte("{}"), bytes.Repeat([]byte(" "), 3<<20)...)
	if _, err := r.PushManifest(t.Context(), large, blobstore.ManifestOptions{}); !errors.Is(err,
		blobstore.ErrNoSpace) {
		t.Errorf("push of a manifest: %v", err)
	}
	requireGone(t, r, d.Digest, digest.SHA256.FromBytes(large))
	pushBlobs(t, r, "another") // there is room for it
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	requireInOrder(t, dir)
}
