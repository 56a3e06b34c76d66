package registry_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
)

// A store is served to registry clients; what one pushes is in the store.
func ExampleNew() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	handler := registry.New(store, registry.Options{})
	defer handler.Close()
	server := httptest.NewServer(handler)
	defer server.Close()

	// A client pushes an artifact of one blob, as tag v1 of repository models.
	repo, err := remote.NewRepository(strings.TrimPrefix(server.URL, "http://") + "/models")
	if err != nil {
		log.Fatal(err)
	}
	repo.PlainHTTP = true
	layer, err := oras.PushBytes(ctx, repo, "", []byte("hello"))
	if err != nil {
		log.Fatal(err)
	}
	manifest, err := oras.PackManifest(ctx, repo, oras.PackManifestVersion1_1, "application/vnd.example.greeting",
		oras.PackManifestOptions{Layers: []ocispec.Descriptor{layer}})
	if err != nil {
		log.Fatal(err)
	}
	if err := repo.Tag(ctx, manifest, "v1"); err != nil {
		log.Fatal(err)
	}

	// Another one pulls it.
	found, err := repo.Resolve(ctx, "v1")
	if err != nil {
		log.Fatal(err)
	}
	pulled, err := repo.Fetch(ctx, layer)
	if err != nil {
		log.Fatal(err)
	}
	defer pulled.Close()
	data, err := io.ReadAll(pulled)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%v %s\n", found.Digest == manifest.Digest, data)

	// In the store it is a file.
	models, err := store.Repository("models")
	if err != nil {
		log.Fatal(err)
	}
	file, err := models.Stat(ctx, "v1", blobstore.Lookup{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(file.Digest == layer.Digest, file.Size)
	// Output:
	// true hello
	// true 5
}
