package dragonfly_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/blobstore/storagetest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly"
	"github.com/dfcache/dfcache/p2p/dragonfly/dragonflytest"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

func repository(t *testing.T, h *host, tag string) *blobstore.Repository {
	t.Helper()
	r, err := blobstore.New(h).Repository(tag)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type storeRepository struct {
	*blobstore.Repository
	host *host
}

func TestStorage(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	storagetest.Run(t, func(t *testing.T) oras.Target {
		h := newHost(t, new(dragonflytest.Cluster), dragonfly.Options{})
		return storeRepository{repository(t, h, "models"), h}
	}, storagetest.Options{
		OtherRepository: func(t *testing.T, target oras.Target) (oras.Target, string) {
			h := target.(storeRepository).host
			return storeRepository{repository(t, h, "other"), h}, "other"
		},
		KeepsUnreferenced: true, // for as long as whoever was told that it is there may build on it
	})
}

// artifact is an index of two artifacts, in a memory store, tagged v1.
func artifact(t *testing.T) (*memory.Store, ocispec.Descriptor) {
	t.Helper()
	src := memory.New()
	var manifests []ocispec.Descriptor
	for _, text := range []string{"one", "two"} {
		layer, err := oras.PushBytes(t.Context(), src, "application/octet-stream", bytes.Repeat([]byte(text), 100_000))
		if err != nil {
			t.Fatal(err)
		}
		m, err := oras.PackManifest(t.Context(), src, oras.PackManifestVersion1_1,
			"application/vnd.example", oras.PackManifestOptions{Layers: []ocispec.Descriptor{layer}})
		if err != nil {
			t.Fatal(err)
		}
		manifests = append(manifests, m)
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests})
	if err != nil {
		t.Fatal(err)
	}
	root, err := oras.PushBytes(t.Context(), src, ocispec.MediaTypeImageIndex, index)
	if err != nil {
		t.Fatal(err)
	}
	if err := src.Tag(t.Context(), root, "v1"); err != nil {
		t.Fatal(err)
	}
	return src, root
}

// requireSame fails the test unless dst has all that root leads to in src.
func requireSame(t *testing.T, src, dst oras.ReadOnlyTarget, root ocispec.Descriptor) {
	t.Helper()
	want, err := content.FetchAll(t.Context(), src, root)
	if err != nil {
		t.Fatal(err)
	}
	got, err := content.FetchAll(t.Context(), dst, root)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: %v", root.Digest, err)
	}
	children, err := content.Successors(t.Context(), src, root)
	if err != nil {
		t.Fatal(err)
	}
	for _, child := range children {
		requireSame(t, src, dst, child)
	}
}

// What oras copies to one host, it copies from another, by digest.
func TestCopy(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	src, root := artifact(t)
	if _, err := oras.Copy(t.Context(), src, "v1", repository(t, a, "models"),
		"v1", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	dst := memory.New()
	got, err := oras.Copy(t.Context(), repository(t, b, "models"), root.Digest.String(), dst,
		"v1", oras.DefaultCopyOptions)
	if err != nil || got.MediaType != root.MediaType {
		t.Fatalf("copy: %v, %v", got, err)
	}
	requireSame(t, src, dst, root)
	_, err = oras.Copy(t.Context(), repository(t, b, "other"), root.Digest.String(), memory.New(),
		"v1", oras.DefaultCopyOptions)
	enginetest.RequireError(t, "copy from another repository", err, p2p.ErrNotFound)
}

// The same by registries.
func TestRegistry(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	door := func() *remote.Repository {
		handler := registry.New(blobstore.New(newHost(t, cluster, dragonfly.Options{})), registry.Options{})
		server := httptest.NewServer(handler)
		t.Cleanup(func() {
			server.Close()
			handler.Close()
		})
		r, err := remote.NewRepository(strings.TrimPrefix(server.URL, "http://") + "/models")
		if err != nil {
			t.Fatal(err)
		}
		r.PlainHTTP = true
		return r
	}
	a, b := door(), door()
	src, root := artifact(t)
	if _, err := oras.Copy(t.Context(), src, "v1", a, "v1", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	dst := memory.New()
	if _, err := oras.Copy(t.Context(), b, root.Digest.String(), dst, "v1", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	requireSame(t, src, dst, root)
}

// A push that Dragonfly was not there for is made up for by the next one, which
// leaves out what is on this host.
func TestPushAgain(t *testing.T) {
	cluster := new(dragonflytest.Cluster)
	a, b := newHost(t, cluster, dragonfly.Options{}), newHost(t, cluster, dragonfly.Options{})
	src, root := artifact(t)
	a.upstream.Kill()
	failed := 0
	for { // each push gets one step further, as what has failed is here
		_, err := oras.Copy(t.Context(), src, "v1", repository(t, a, "models"),
			"v1", oras.CopyOptions{CopyGraphOptions: oras.CopyGraphOptions{Concurrency: 1}})
		if err == nil {
			t.Fatal("a push succeeds without Dragonfly")
		}
		if !errors.Is(err, p2p.ErrUnavailable) {
			t.Fatal(err)
		}
		failed++
		if _, err := a.stat(p2p.Task{Tag: "models", Digest: root.Digest},
			p2p.StatOptions{Scope: p2p.Local}); err == nil {
			break
		}
	}
	if failed < 4 {
		t.Errorf("all is here after %d failures", failed)
	}
	restart(t, a)
	if _, err := oras.Copy(t.Context(), src, "v1", repository(t, a, "models"),
		"v1", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	dst := memory.New()
	if _, err := oras.Copy(t.Context(), repository(t, b, "models"), root.Digest.String(), dst,
		"v1", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	requireSame(t, src, dst, root)
}
