package storagetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
)

// others are stores to copy to and from: in memory, in an OCI layout, in a
// registry, and another one of those that are tested.
func (s *suite) others() map[string]func(t *testing.T) oras.Target {
	return map[string]func(t *testing.T) oras.Target{
		"memory": func(*testing.T) oras.Target { return memory.New() },
		"layout": func(t *testing.T) oras.Target {
			store, err := oci.New(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			return store
		},
		"registry": func(t *testing.T) oras.Target { return newRemote(t) },
		"itself":   s.open,
	}
}

// newImages returns an index of two images, which share their config and a layer.
func newImages() (g graph, root ocispec.Descriptor) {
	config := g.add(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux"}`))
	shared := g.layer("shared")
	large := g.add(ocispec.MediaTypeImageLayer, bytesOf(1<<20+1, 1))
	empty := g.layer("")
	amd64 := g.image(config, shared, large)
	arm64 := g.manifest(ocispec.Manifest{
		Config: config, Layers: []ocispec.Descriptor{shared, empty},
		Annotations: map[string]string{"org.example.key": "value"},
	})
	amd64.Platform = &ocispec.Platform{Architecture: "amd64", OS: "linux"}
	arm64.Platform = &ocispec.Platform{Architecture: "arm64", OS: "linux"}
	return g, g.index(amd64, arm64)
}

func (s *suite) testCopy(t *testing.T, _ oras.Target) {
	g, root := newImages()
	for name, open := range s.others() {
		copied := func(t *testing.T, src, dst oras.Target, dstRef, want string) {
			g.push(t, src)
			mustTag(t, src, root, "v1")
			got, err := oras.Copy(t.Context(), src, "v1", dst, dstRef, oras.DefaultCopyOptions)
			if err != nil || !content.Equal(got, root) {
				t.Fatalf("copy: %+v, %v; want %+v", got, err, root)
			}
			requireResolves(t, dst, want, root)
			g.requireHeld(t, dst)
		}
		t.Run("from "+name, func(t *testing.T) { copied(t, open(t), s.open(t), "", "v1") })
		t.Run("to "+name, func(t *testing.T) { copied(t, s.open(t), open(t), "copy", "copy") })
	}
}

// pushCounter counts the pushes to a store.
type pushCounter struct {
	oras.Target
	pushes atomic.Int64
}

func (p *pushCounter) Push(ctx context.Context, d ocispec.Descriptor, src io.Reader) error {
	p.pushes.Add(1)
	return p.Target.Push(ctx, d, src)
}

// testCopyAgain: what is there is not copied again, but tagged.
func (s *suite) testCopyAgain(t *testing.T, target oras.Target) {
	g, root := newImages()
	src := memory.New()
	g.push(t, src)
	mustTag(t, src, root, "v1")
	mustPush(t, target, g.nodes[2].Descriptor, g.nodes[2].data)
	dst := &pushCounter{Target: target}
	for i, want := range []int64{int64(len(g.nodes)) - 1, 0} {
		dst.pushes.Store(0)
		for _, ref := range []string{"v1", "v2"} {
			if _, err := oras.Copy(t.Context(), src, "v1", dst, ref, oras.DefaultCopyOptions); err != nil {
				t.Fatalf("copy: %v", err)
			}
			requireResolves(t, target, ref, root)
		}
		if got := dst.pushes.Load(); got != want {
			t.Errorf("copy %d pushed %d nodes, want %d", i, got, want)
		}
		g.requireHeld(t, target)
	}
	// With the interfaces that the store has besides.
	for _, ref := range []string{"v1", "v3"} {
		if _, err := oras.Copy(t.Context(), src, "v1", target, ref, oras.DefaultCopyOptions); err != nil {
			t.Fatalf("copy: %v", err)
		}
		requireResolves(t, target, ref, root)
	}
}

func (s *suite) testCopyGraph(t *testing.T, target oras.Target) {
	g, root := newImages()
	src, dst := memory.New(), memory.New()
	g.push(t, src)
	for _, stores := range [][2]oras.Target{{src, target}, {target, dst}} {
		if err := oras.CopyGraph(t.Context(), stores[0], stores[1], root,
			oras.CopyGraphOptions{Concurrency: 10}); err != nil {
			t.Fatal(err)
		}
		g.requireHeld(t, stores[1])
	}
}

func (s *suite) testCopyByDigest(t *testing.T, target oras.Target) {
	if s.opts.ResolvesTagsOnly {
		t.Skip("the store does not resolve digests")
	}
	g, root := newImages()
	src, err := oci.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	g.push(t, src)
	for _, stores := range [][2]oras.Target{{src, target}, {target, s.open(t)}, {target, newRemote(t)}} {
		for range 2 {
			got, err := oras.Copy(t.Context(), stores[0], root.Digest.String(), stores[1], "", oras.DefaultCopyOptions)
			if err != nil || !content.Equal(got, root) {
				t.Fatalf("copy: %+v, %v; want %+v", got, err, root)
			}
			requireResolves(t, stores[1], root.Digest.String(), root)
			g.requireHeld(t, stores[1])
		}
	}
}

// testCopyForeignLayer: a layer that is not for distribution is not copied, and
// need not be there.
func (s *suite) testCopyForeignLayer(t *testing.T, target oras.Target) {
	g := graph{}
	//nolint:staticcheck // images with such layers exist
	foreign := content.NewDescriptorFromBytes(ocispec.MediaTypeImageLayerNonDistributableGzip,
		[]byte("not for you"))
	foreign.URLs = []string{"https://example.org/layer"}
	image := g.image(g.add(ocispec.MediaTypeImageConfig, []byte("{}")), g.layer("layer"), foreign)
	src := memory.New()
	g.push(t, src)
	mustTag(t, src, image, "v1")
	remote := newRemote(t)
	for _, stores := range [][2]oras.Target{{src, target}, {target, remote}, {remote, s.open(t)}} {
		if _, err := oras.Copy(t.Context(), stores[0], "v1", stores[1], "", oras.DefaultCopyOptions); err != nil {
			t.Fatal(err)
		}
		g.requireHeld(t, stores[1])
		requireExists(t, stores[1], foreign, false)
	}
}

// brokenStore is a store in which one content can't be read to its end.
type brokenStore struct {
	oras.Target
	broken ocispec.Descriptor
	err    error
}

func (b *brokenStore) Fetch(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	fetched, err := b.Target.Fetch(ctx, d)
	if err != nil || d.Digest != b.broken.Digest {
		return fetched, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(fetched, d.Size/2), errReader{b.err}), fetched}, nil
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// testCopyFails: of a copy that fails nothing can be taken for whole, and
// another one completes it.
func (s *suite) testCopyFails(t *testing.T, target oras.Target) {
	g, root := newImages()
	src := memory.New()
	g.push(t, src)
	mustTag(t, src, root, "v1")
	broken := &brokenStore{src, g.nodes[2].Descriptor, errors.New("the source is broken")}
	_, err := oras.Copy(t.Context(), broken, "v1", target, "", oras.DefaultCopyOptions)
	requireError(t, "copy", err, broken.err)
	requireExists(t, target, root, false)
	requireExists(t, target, broken.broken, false)
	_, err = target.Resolve(t.Context(), "v1")
	requireError(t, "resolve", err, errdef.ErrNotFound)
	if _, err := oras.Copy(t.Context(), src, "v1", target, "", oras.DefaultCopyOptions); err != nil {
		t.Fatal(err)
	}
	g.requireHeld(t, target)
	requireResolves(t, target, "v1", root)

	_, err = oras.Copy(t.Context(), target, "absent", memory.New(), "", oras.DefaultCopyOptions)
	requireError(t, "copy of what is not there", err, errdef.ErrNotFound)
}

func (s *suite) testCopyMountFrom(t *testing.T, target oras.Target) {
	_, other, name := s.mounter(t, target)
	g, root := newImages()
	src := memory.New()
	g.push(t, src)
	mustTag(t, src, root, "v1")
	for _, n := range g.nodes[:2] { // two of the blobs are in the other repository
		mustPush(t, other, n.Descriptor, n.data)
	}
	var mu sync.Mutex
	var mounted, copied []ocispec.Descriptor
	opts := oras.DefaultCopyOptions
	opts.MountFrom = func(context.Context, ocispec.Descriptor) ([]string, error) {
		return []string{"no/such/repository", name}, nil
	}
	note := func(to *[]ocispec.Descriptor) func(context.Context, ocispec.Descriptor) error {
		return func(_ context.Context, d ocispec.Descriptor) error {
			mu.Lock()
			defer mu.Unlock()
			*to = append(*to, d)
			return nil
		}
	}
	opts.OnMounted, opts.PostCopy = note(&mounted), note(&copied)
	if _, err := oras.Copy(t.Context(), src, "v1", target, "", opts); err != nil {
		t.Fatal(err)
	}
	if want := g.descriptors(); !equalSets(mounted, want[:2]) || !equalSets(copied, want[2:]) {
		t.Errorf("mounted were %+v, and copied %+v; want the first two of %+v, and the others", mounted, copied, want)
	}
	g.requireHeld(t, target)
	requireResolves(t, target, "v1", root)
}

// testExtendedCopy copies an image with what is about it.
func (s *suite) testExtendedCopy(t *testing.T, target oras.Target) {
	g := graph{}
	config := g.add(ocispec.MediaTypeImageConfig, []byte("{}"))
	image := g.image(config, g.layer("layer"))
	sbom := g.manifest(ocispec.Manifest{Config: config, ArtifactType: "application/x-sbom", Subject: &image,
		Layers: []ocispec.Descriptor{g.layer("sbom")}})
	g.manifest(ocispec.Manifest{Config: config, ArtifactType: "application/x-signature", Subject: &sbom,
		Layers: []ocispec.Descriptor{g.layer("signature")}})
	for name, open := range s.others() {
		copied := func(t *testing.T, src, dst oras.Target) {
			from, ok := src.(oras.ReadOnlyGraphTarget)
			if !ok {
				t.Skip("the store is no content.PredecessorFinder")
			}
			g.push(t, src)
			mustTag(t, src, image, "v1")
			got, err := oras.ExtendedCopy(t.Context(), from, "v1", dst, "", oras.DefaultExtendedCopyOptions)
			if err != nil || !content.Equal(got, image) {
				t.Fatalf("copy: %+v, %v; want %+v", got, err, image)
			}
			requireResolves(t, dst, "v1", image)
			g.requireHeld(t, dst)
			if dst, ok := dst.(content.ReadOnlyGraphStorage); ok {
				referrers, err := registry.Referrers(t.Context(), dst, image, "")
				if err != nil || !equalSets(referrers, []ocispec.Descriptor{sbom}) {
					t.Errorf("referrers are %+v, %v; want %+v", referrers, err, sbom)
				}
			}
		}
		t.Run("from "+name, func(t *testing.T) { copied(t, open(t), s.open(t)) })
		t.Run("to "+name, func(t *testing.T) { copied(t, s.open(t), open(t)) })
	}
	if _, ok := target.(oras.ReadOnlyGraphTarget); !ok {
		return
	}
	// Only one kind of what is about it.
	g.push(t, target)
	mustTag(t, target, image, "v1")
	opts := oras.DefaultExtendedCopyOptions
	opts.FindPredecessors = func(ctx context.Context, src content.ReadOnlyGraphStorage, d ocispec.Descriptor) (
		[]ocispec.Descriptor, error) {
		return registry.Referrers(ctx, src, d, "application/x-sbom")
	}
	dst := memory.New()
	if _, err := oras.ExtendedCopy(t.Context(), target.(oras.ReadOnlyGraphTarget), "v1", dst, "", opts); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, true, true, true, true, false, false} {
		requireExists(t, dst, g.nodes[i].Descriptor, want)
	}
}

func (s *suite) testOrasTag(t *testing.T, target oras.Target) {
	g := graph{}
	image := g.image(g.layer("config"))
	blob := g.add("application/x-test", []byte("foobar"))
	g.push(t, target)
	for _, d := range []ocispec.Descriptor{image, blob} {
		mustTag(t, target, d, "v1")
		from := []string{"v1"}
		if !s.opts.ResolvesTagsOnly {
			from = append(from, d.Digest.String())
		}
		for _, src := range from {
			for range 2 { // the second time the tags are there
				if got, err := oras.Tag(t.Context(), target, src, "v2"); err != nil || !content.Equal(got, d) {
					t.Fatalf("tag %s: %+v, %v; want %+v", src, got, err, d)
				}
				tags := []string{"v3", "v4", "v5", "v1"}
				if got, err := oras.TagN(t.Context(), target, src, tags, oras.DefaultTagNOptions); err != nil ||
					!content.Equal(got, d) {
					t.Fatalf("tag %s: %+v, %v; want %+v", src, got, err, d)
				}
				for _, tag := range append(tags, "v2") {
					requireResolves(t, target, tag, d)
				}
			}
		}
	}
	_, err := oras.Tag(t.Context(), target, "absent", "v6")
	requireError(t, "tag of what is not there", err, errdef.ErrNotFound)
	_, err = oras.TagN(t.Context(), target, "absent", []string{"v6", "v7"}, oras.DefaultTagNOptions)
	requireError(t, "tag of what is not there", err, errdef.ErrNotFound)

	data := []byte(`{"layers":[]}`)
	for range 2 {
		d, err := oras.TagBytesN(t.Context(), target, ocispec.MediaTypeImageManifest, data, []string{"b1", "b2", "b3"},
			oras.DefaultTagBytesNOptions)
		if err != nil {
			t.Fatalf("tag bytes: %v", err)
		}
		for _, tag := range []string{"b1", "b2", "b3"} {
			requireResolves(t, target, tag, d)
		}
		RequireContent(t, target, d, data)
	}
}

func (s *suite) testOrasFetch(t *testing.T, target oras.Target) {
	g, root := newImages()
	g.push(t, target)
	mustTag(t, target, root, "v1")
	arm64 := ocispec.Platform{Architecture: "arm64", OS: "linux"}
	references := []string{"v1"}
	if !s.opts.ResolvesTagsOnly {
		references = append(references, root.Digest.String())
	}
	for _, reference := range references {
		for _, c := range []struct {
			platform *ocispec.Platform
			want     node
		}{
			{nil, g.nodes[6]}, {&arm64, g.nodes[5]},
		} {
			opts := oras.DefaultResolveOptions
			opts.TargetPlatform = c.platform
			d, err := oras.Resolve(t.Context(), target, reference, opts)
			if err != nil || !content.Equal(d, c.want.Descriptor) {
				t.Errorf("resolve %s: %+v, %v; want %+v", reference, d, err, c.want)
			}
			d, fetched, err := oras.Fetch(t.Context(), target, reference, oras.FetchOptions{ResolveOptions: opts})
			if err != nil {
				t.Fatal(err)
			}
			data, err := content.ReadAll(fetched, d)
			if err != nil || !content.Equal(d, c.want.Descriptor) || !bytes.Equal(data, c.want.data) {
				t.Errorf("fetch %s: %+v, %q, %v", reference, d, data, err)
			}
			fetched.Close()
			d, data, err = oras.FetchBytes(t.Context(), target, reference,
				oras.FetchBytesOptions{FetchOptions: oras.FetchOptions{ResolveOptions: opts}})
			if err != nil || !content.Equal(d, c.want.Descriptor) || !bytes.Equal(data, c.want.data) {
				t.Errorf("fetch bytes of %s: %+v, %q, %v", reference, d, data, err)
			}
		}
		_, _, err := oras.FetchBytes(t.Context(), target, reference, oras.FetchBytesOptions{MaxBytes: 3})
		requireError(t, "fetch of too much", err, errdef.ErrSizeExceedsLimit)
	}
	// A copy of one platform is that image alone.
	opts := oras.DefaultCopyOptions
	opts.WithTargetPlatform(&arm64)
	dst := s.open(t)
	if got, err := oras.Copy(t.Context(), target, "v1", dst, "arm64", opts); err != nil ||
		!content.Equal(got, g.nodes[5].Descriptor) {
		t.Errorf("copy of one platform: %+v, %v", got, err)
	}
	requireResolves(t, dst, "arm64", g.nodes[5].Descriptor)
	for i, want := range []bool{true, true, false, true, false, true, false} {
		requireExists(t, dst, g.nodes[i].Descriptor, want)
	}
}

func (s *suite) testPackManifest(t *testing.T, target oras.Target) {
	layer, err := oras.PushBytes(t.Context(), target, "", []byte("layer"))
	if err != nil {
		t.Fatal(err)
	}
	RequireContent(t, target, layer, []byte("layer"))
	for _, c := range []struct {
		version oras.PackManifestVersion
		opts    oras.PackManifestOptions
	}{
		{oras.PackManifestVersion1_0, oras.PackManifestOptions{Layers: []ocispec.Descriptor{layer}}},
		{oras.PackManifestVersion1_1, oras.PackManifestOptions{Layers: []ocispec.Descriptor{layer}}},
		{oras.PackManifestVersion1_1, oras.PackManifestOptions{
			ManifestAnnotations: map[string]string{ocispec.AnnotationCreated: "2000-01-01T00:00:00Z"}}},
		{oras.PackManifestVersion1_1, oras.PackManifestOptions{Subject: &layer}},
	} {
		d, err := oras.PackManifest(t.Context(), target, c.version, "application/x-test", c.opts)
		if err != nil {
			t.Errorf("pack: %v", err)
			continue
		}
		requireExists(t, target, d, true)
		children, err := content.Successors(t.Context(), target, d)
		if err != nil || len(children) < 2 {
			t.Errorf("what was packed is made of %+v, %v", children, err)
		}
		for _, child := range children {
			requireExists(t, target, child, true)
		}
		if finder, ok := target.(content.PredecessorFinder); ok &&
			slices.ContainsFunc(children, func(c ocispec.Descriptor) bool { return content.Equal(c, layer) }) {
			found, err := finder.Predecessors(t.Context(), layer)
			if err != nil || !slices.ContainsFunc(found,
				func(p ocispec.Descriptor) bool { return content.Equal(p, d) }) {
				t.Errorf("predecessors of the layer are %+v, %v; want %+v among them", found, err, d)
			}
		}
		mustTag(t, target, d, "packed")
		requireResolves(t, target, "packed", d)
	}
	// The same again is no error.
	opts := oras.PackManifestOptions{ManifestAnnotations: map[string]string{
		ocispec.AnnotationCreated: "2000-01-01T00:00:00Z"}}
	if _, err := oras.PackManifest(t.Context(), target, oras.PackManifestVersion1_1,
		"application/x-test", opts); err != nil {
		t.Errorf("pack again: %v", err)
	}
	if strings.Count(layer.MediaType, "/") != 1 {
		t.Errorf("the layer's media type is %q", layer.MediaType)
	}
}
