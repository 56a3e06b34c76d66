package blobstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
)

// A store in a directory of the program's own: import a file under a name,
// look at it, export it.
func ExampleOpen() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	store, err := blobstore.Open(filepath.Join(dir, "store"))
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	models, err := store.Repository("models")
	if err != nil {
		log.Fatal(err)
	}
	file, err := models.Import(ctx, "v1", strings.NewReader("hello, world\n"),
		blobstore.ImportOptions{Title: "hello.txt"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(file.Digest, file.Size)

	if _, err := models.ExportFile(ctx, "v1", filepath.Join(dir, "copy.txt"), blobstore.ExportOptions{}); err != nil {
		log.Fatal(err)
	}
	_, err = models.Stat(ctx, "v2", blobstore.Lookup{})
	fmt.Println(errors.Is(err, blobstore.ErrNotFound))
	// Output:
	// sha256:853ff93762a06ddbf722c4ebe9ddd66d8f63ddaea97f521c3ecc20da7c976020 13
	// true
}

// The same through the dfdaemon of this machine.
func ExampleDial() {
	ctx := context.Background()
	store, err := client.Dial(ctx, "/run/dragonfly/dfdaemon.sock")
	if errors.Is(err, blobstore.ErrUnavailable) {
		fmt.Println("no dfdaemon is running")
		return
	} else if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	// From here on as with Open.
}

// Content is checked against the digest that it is imported under.
func ExampleRepository_Import() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	r, err := store.Repository("")
	if err != nil {
		log.Fatal(err)
	}
	const cid = "sha256:853ff93762a06ddbf722c4ebe9ddd66d8f63ddaea97f521c3ecc20da7c976020"
	_, err = r.Import(context.Background(), cid, strings.NewReader("something else"), blobstore.ImportOptions{})
	fmt.Println(errors.Is(err, blobstore.ErrMismatch))
	// Output: true
}

// A file is read like any other; every byte is verified before it is handed out.
func ExampleRepository_Open() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	r, err := store.Repository("")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := r.Import(ctx, "greeting", strings.NewReader("hello, world"), blobstore.ImportOptions{}); err != nil {
		log.Fatal(err)
	}
	f, err := r.Open(ctx, "greeting", blobstore.Lookup{})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(7, io.SeekStart); err != nil {
		log.Fatal(err)
	}
	rest, err := io.ReadAll(f)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(rest))
	// Output: world
}

// Everything that is stored under a tag.
func ExampleRepository_List() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	r, err := store.Repository("models")
	if err != nil {
		log.Fatal(err)
	}
	for _, name := range []string{"v1", "v2"} {
		if _, err := r.Import(ctx, name, strings.NewReader("model "+name), blobstore.ImportOptions{}); err != nil {
			log.Fatal(err)
		}
	}
	for entry, err := range r.List(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		if entry.Name != "" {
			fmt.Println(entry.Task.Tag, entry.Name)
		}
	}
	// Output:
	// models v1
	// models v2
}

// A repository is a target of oras-go. An artifact is copied from another
// target, here one in memory, into an embedded store; then it is a file like
// one that was imported.
func Example_copyIn() {
	ctx := context.Background()
	src := memory.New()
	layer, err := oras.PushBytes(ctx, src, "text/plain", []byte("hello, world\n"))
	if err != nil {
		log.Fatal(err)
	}
	layer.Annotations = map[string]string{ocispec.AnnotationTitle: "hello.txt"}
	manifest, err := oras.PackManifest(ctx, src, oras.PackManifestVersion1_1,
		"application/vnd.example.greeting", oras.PackManifestOptions{
			Layers: []ocispec.Descriptor{layer},
		})
	if err != nil {
		log.Fatal(err)
	}
	if err := src.Tag(ctx, manifest, "v1"); err != nil {
		log.Fatal(err)
	}

	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	greetings, err := store.Repository("greetings")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := oras.Copy(ctx, src, "v1", greetings, "v1", oras.DefaultCopyOptions); err != nil {
		log.Fatal(err)
	}

	file, err := greetings.Export(ctx, "v1", os.Stdout, blobstore.ExportOptions{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(file.Title, file.Digest == layer.Digest)
	// Output:
	// hello, world
	// hello.txt true
}

// What was imported under a cache ID is an artifact, which oras-go copies to any
// other target.
func Example_copyOut() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := blobstore.Open(dir)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	models, err := store.Repository("models")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := models.Import(ctx, "v1", strings.NewReader("weights"),
		blobstore.ImportOptions{Title: "model.bin"}); err != nil {
		log.Fatal(err)
	}

	dst := memory.New()
	manifest, err := oras.Copy(ctx, models, "v1", dst, "latest", oras.DefaultCopyOptions)
	if err != nil {
		log.Fatal(err)
	}
	parts, err := content.Successors(ctx, dst, manifest)
	if err != nil {
		log.Fatal(err)
	}
	layer := parts[1] // after the config
	data, err := content.FetchAll(ctx, dst, layer)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %s\n", layer.Annotations[ocispec.AnnotationTitle], data)
	// Output: model.bin: weights
}
