package registry_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

// ways are how a client hears that a blob is stored, or is there.
var ways = map[string]func(s *server, name string, data []byte){
	"POST": func(s *server, name string, data []byte) {
		s.do("POST", "/v2/"+name+"/blobs/uploads/?digest="+digest.SHA256.FromBytes(data).String(), data).want(
			http.StatusCreated)
	},
	"POST chunked": func(s *server, name string, data []byte) {
		s.do("POST", "/v2/"+name+"/blobs/uploads/?digest="+digest.SHA256.FromBytes(data).String(),
			io.MultiReader(bytes.NewReader(data))).want(http.StatusCreated)
	},
	"PUT": func(s *server, name string, data []byte) { s.pushBlob(name, data) },
	"PATCH": func(s *server, name string, data []byte) {
		location := s.begin(name)
		s.do("PATCH", location, data).want(http.StatusAccepted)
		s.do("PUT", location+"?digest="+digest.SHA256.FromBytes(data).String(), nil).want(http.StatusCreated)
	},
	"mount": func(s *server, name string, data []byte) {
		s.pushBlob("source", data)
		s.do("POST", "/v2/"+name+"/blobs/uploads/?from=source&mount="+digest.SHA256.FromBytes(data).String(), nil).want(
			http.StatusCreated)
	},
	"HEAD": func(s *server, name string, data []byte) {
		s.do("HEAD", "/v2/"+name+"/blobs/"+digest.SHA256.FromBytes(data).String(), nil).want(http.StatusOK)
	},
}

// repository is the one of that name, as Go programs see it.
func (s *server) repository(name string) *blobstore.Repository {
	s.Helper()
	r, err := s.store.Repository(name)
	if err != nil {
		s.Fatal(err)
	}
	return r
}

// reopen ends the registry and its store, and starts another one in the same directory.
func (s *server) reopen() *server {
	s.Helper()
	s.http.Close()
	err := errors.Join(s.handler.Close(), s.store.Close())
	if err == nil {
		s.store, err = blobstore.Open(s.dir)
	}
	if err != nil {
		s.Fatal(err)
	}
	again := startOn(s.T, s.store, registry.Options{})
	again.dir = s.dir
	return again
}

// What a client was told is there is there for its manifest, whatever is deleted or
// moved meanwhile.
func TestAcknowledgedStays(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cleanups := map[string]func(s *server, m digest.Digest){
		"delete": func(s *server, m digest.Digest) {
			s.do("DELETE", "/v2/a/manifests/"+m.String(), nil).want(http.StatusAccepted)
		},
		"dfcache delete": func(s *server, _ digest.Digest) {
			if _, err := s.repository("a").Remove(s.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
				s.Fatal(err)
			}
		},
		"dfcache import": func(s *server, _ digest.Digest) {
			if _, err := s.repository("a").Import(s.Context(), "v1", bytes.NewReader([]byte("other")),
				blobstore.ImportOptions{}); err != nil {
				s.Fatal(err)
			}
		},
		"by force": func(s *server, m digest.Digest) {
			index := encode(s.T, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
				MediaType: ocispec.MediaTypeImageIndex,
				Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Digest: m}}})
			s.do("PUT", "/v2/a/manifests/index", index, "Content-Type", ocispec.MediaTypeImageIndex).want(
				http.StatusCreated)
			if _, err := s.repository("a").Remove(s.Context(), m.String(),
				blobstore.DeleteOptions{Force: true}); err != nil {
				s.Fatal(err)
			}
		},
	}
	for what, cleanup := range cleanups {
		for how, tell := range ways {
			t.Run(what+"/"+how, func(t *testing.T) {
				s := start(t, registry.Options{})
				layer := content(1000, 1)
				m := s.pushManifest("a", "v1", s.image("a", nil, layer))
				tell(s, "a", layer)
				if how != "HEAD" {
					s = s.reopen() // it is as durable as the blob
				}
				cleanup(s, m)
				s.do("HEAD", "/v2/a/blobs/"+digest.SHA256.FromBytes(layer).String(), nil).want(http.StatusOK)
				s.pushManifest("a", "v2",
					encode(t, ocispec.Manifest{
						Versioned: specs.Versioned{SchemaVersion: 2},
						MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{
							Digest: digest.SHA256.FromBytes(layer)}, Layers: []ocispec.Descriptor{}}))
			})
		}
	}
}

// A blob that is deleted itself is gone at once, whoever was told that it is there; and
// what was pushed and referred to goes with what refers to it, also soon after.
func TestAcknowledgedGoes(t *testing.T) {
	for how, tell := range ways {
		t.Run(how, func(t *testing.T) {
			s := start(t, registry.Options{})
			layer := content(1000, 1)
			path := "/v2/a/blobs/" + s.pushBlob("a", layer).String()
			tell(s, "a", layer)
			s.do("DELETE", path, nil).want(http.StatusAccepted)
			s.do("HEAD", path, nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
		})
	}
	s := start(t, registry.Options{})
	layer := content(1000, 1)
	m := s.pushManifest("a", "v1", s.image("a", nil, layer))
	s.do("DELETE", "/v2/a/manifests/"+m.String(), nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/tags/list", nil).fails(http.StatusNotFound, "NAME_UNKNOWN") // nothing is left
}

// A manifest that a client was told of by its digest is there for its index.
func TestAcknowledgedManifestStays(t *testing.T) {
	s := start(t, registry.Options{})
	m := s.pushManifest("a", "v1", s.image("a", nil, content(1000, 1)))
	path := "/v2/a/manifests/" + m.String()
	s.do("HEAD", path, nil).want(http.StatusOK)
	if _, err := s.repository("a").Remove(t.Context(), "v1", blobstore.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.do("HEAD", path, nil).want(http.StatusOK)
	index := encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Digest: m}}})
	s.do("PUT", "/v2/a/manifests/index", index, "Content-Type", ocispec.MediaTypeImageIndex).want(http.StatusCreated)
	s.do("GET", path, nil).want(http.StatusOK)
}

// Content that is sent slowly, while what holds it is deleted, is there when that ends.
func TestDeleteDuringPush(t *testing.T) {
	for _, what := range []string{"the manifest", "the blob"} {
		s := start(t, registry.Options{})
		layer := content(1000, 1)
		d := digest.SHA256.FromBytes(layer)
		m := s.pushManifest("a", "v1", s.image("a", nil, layer))
		// The body is sent when the registry asks for it: it has looked by then.
		s.http.Client().Transport.(*http.Transport).ExpectContinueTimeout = time.Minute
		body, w := io.Pipe()
		r, err := http.NewRequestWithContext(
			t.Context(), "POST", s.http.URL+"/v2/a/blobs/uploads/?digest="+d.String(), body)
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = int64(len(layer))
		r.Header.Set("Expect", "100-continue")
		done := make(chan int)
		go func() {
			defer close(done)
			a, err := s.http.Client().Do(r)
			if err != nil {
				t.Error(err)
				return
			}
			a.Body.Close()
			done <- a.StatusCode
		}()
		if _, err := w.Write(layer[:500]); err != nil {
			t.Fatal(err)
		}
		s.do("DELETE", "/v2/a/manifests/"+m.String(), nil).want(http.StatusAccepted)
		if what == "the blob" {
			s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
		}
		if _, err := w.Write(layer[500:]); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if status := <-done; status != http.StatusCreated {
			t.Errorf("%s was deleted meanwhile: status %d", what, status)
		}
		s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(layer)
	}
}

// Damage that nobody has met yet is repaired by content that comes again.
func TestPushRepairs(t *testing.T) {
	for how, push := range ways {
		if how == "mount" || how == "HEAD" {
			continue // they bring nothing
		}
		t.Run(how, func(t *testing.T) {
			s := start(t, registry.Options{})
			data := content(200_000, 1)
			d := s.pushBlob("a", data)
			s.damage(d)
			push(s, "a", data)
			s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
		})
	}
}

// A mount takes for there what a HEAD does, which has a file of the right size, and reads it.
func TestMountOfDamage(t *testing.T) {
	data := content(200_000, 1)
	d := digest.SHA256.FromBytes(data)
	path := func(s *server) string { return filepath.Join(s.dir, "blobs", "sha256", d.Encoded()) }
	for what, harm := range map[string]func(s *server) error{
		"cut": func(s *server) error {
			return errors.Join(os.Chmod(path(s), 0o600), os.Truncate(path(s), 5))
		},
		"removed": func(s *server) error { return os.Remove(path(s)) },
		"directory": func(s *server) error {
			return errors.Join(os.Remove(path(s)), os.Mkdir(path(s), 0o755))
		},
		"flipped, and not met yet": func(s *server) error { s.damage(d); return nil },
	} {
		for _, from := range []string{"&from=a", ""} {
			for _, asked := range []bool{false, true} {
				s := start(t, registry.Options{})
				s.pushBlob("a", data)
				if err := harm(s); err != nil {
					t.Fatal(err)
				}
				head := http.StatusNotFound
				if strings.HasPrefix(what, "flipped") {
					head = http.StatusOK
				}
				if asked {
					s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).want(head)
				}
				s.do("POST", "/v2/b/blobs/uploads/?mount="+d.String()+from, nil).want(http.StatusAccepted)
			}
		}
	}
}

// A mount reads what it acknowledges: damage that nobody has met begins an upload, which
// repairs it, also where a manifest is mounted that refers to what is damaged.
func TestMountReads(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(200_000, 1)
	m := s.pushManifest("a", "v1", s.image("a", nil, data))
	d := digest.SHA256.FromBytes(data)
	mount := func(d digest.Digest) *answer {
		return s.do("POST", "/v2/b/blobs/uploads/?from=a&mount="+d.String(), nil)
	}
	for _, mounted := range []digest.Digest{d, m} {
		s.damage(d)
		mount(mounted).want(http.StatusAccepted)
		s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
		s.pushBlob("b", data)
		mount(mounted).want(http.StatusCreated)
		s.do("GET", "/v2/b/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
	}
}

// Damage that was met is remembered: whoever asks hears that the blob is not there, and
// sends it, and it is whole.
func TestDamageIsRemembered(t *testing.T) {
	harms := map[string]func(path string) error{
		"flipped": func(path string) error {
			data, err := os.ReadFile(path)
			if err == nil {
				data[len(data)-1] ^= 1
				err = errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444))
			}
			return err
		},
		"cut":     func(path string) error { return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 5)) },
		"removed": os.Remove,
	}
	for what, harm := range harms {
		for how, push := range ways {
			if how == "HEAD" {
				continue // it brings nothing
			}
			t.Run(what+"/"+how, func(t *testing.T) {
				s := start(t, registry.Options{})
				data := content(200_000, 1)
				m := s.pushManifest("a", "v1", s.image("a", nil, data))
				d := digest.SHA256.FromBytes(data)
				if err := harm(filepath.Join(s.dir, "blobs", "sha256", d.Encoded())); err != nil {
					t.Fatal(err)
				}
				path := "/v2/a/blobs/" + d.String()
				if a, err := s.try("GET", path, nil); err == nil && a.err == nil && a.status == http.StatusOK {
					t.Fatal("a damaged blob was sent whole")
				}
				for range 2 {
					s.do("HEAD", path, nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
					s.do("HEAD", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
					s.do("HEAD", "/v2/a/manifests/"+m.String(), nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
					s.do("GET", "/v2/a/manifests/v1", nil).want(http.StatusOK)
					if exists, err := s.repository("a").Exists(t.Context(), ocispec.Descriptor{Digest: d}); exists ||
						err != nil {
						t.Errorf("it exists: %v, %v", exists, err)
					}
					s = s.reopen()
				}
				if how == "mount" {
					s.do("POST", "/v2/b/blobs/uploads/?from=a&mount="+d.String(), nil).want(http.StatusAccepted)
					return
				}
				push(s, "a", data)
				s.do("HEAD", path, nil).want(http.StatusOK)
				s.do("GET", path, nil).want(http.StatusOK).content(data)
				s.do("HEAD", "/v2/a/manifests/v1", nil).want(http.StatusOK)
				s.do("HEAD", "/v2/a/manifests/"+m.String(), nil).want(http.StatusOK)
			})
		}
	}
}

// What is damaged here, and peers have, is there for whoever asks, and for its manifest.
func TestPeersMendWhatIsReferredTo(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
		data := content(300_000, 1)
		d := theirs.pushBlob("a", data)
		path := "/v2/a/blobs/" + d.String()
		s.do("GET", path, nil).want(http.StatusOK).content(data)
		e.Damage(t, d, 7)
		if err := e.Store.Recheck(t.Context(), d); !errors.Is(err, digest.ErrCorrupt) {
			t.Fatalf("checked again: %v", err)
		}
		s.do("HEAD", path, nil).want(http.StatusOK)
		s.pushManifest("a", "v1", encode(
			t, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2},
				MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{Digest: d},
				Layers: []ocispec.Descriptor{}}))
		e.Part()
		s.do("GET", path, nil).want(http.StatusOK).content(data)
	})
}
