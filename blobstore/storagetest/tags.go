package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
)

func (s *suite) testResolve(t *testing.T, target oras.Target) {
	g := graph{}
	layer := g.layer("layer")
	image := g.image(layer)
	g.index(image)
	g.push(t, target)
	for i, n := range g.nodes {
		for _, tag := range []string{fmt.Sprintf("v%d", i), fmt.Sprintf("V%d", i), fmt.Sprintf("_%d.x-y", i),
			strings.Repeat("x", 100+i)} {
			mustTag(t, target, n.Descriptor, tag)
			requireResolves(t, target, tag, n.Descriptor)
		}
		if s.opts.ResolvesTagsOnly {
			continue
		}
		got, err := target.Resolve(t.Context(), n.Digest.String())
		if err != nil || !content.Equal(got, n.Descriptor) || got.Annotations != nil {
			t.Errorf("resolve(%s): %+v, %v; want %+v", n.Digest, got, err, n.Descriptor)
		}
	}
	if s.opts.ResolvesTagsOnly {
		return
	}
	untagged := describe([]byte("never tagged"))
	mustPush(t, target, untagged, []byte("never tagged"))
	got, err := target.Resolve(t.Context(), untagged.Digest.String())
	if err != nil || got.Digest != untagged.Digest || got.Size != untagged.Size {
		t.Errorf("resolve of a blob that has no tag: %+v, %v; want %+v", got, err, untagged)
	}
}

// What a descriptor says that is tagged is what the tag resolves to, and what is copied with it.
func (s *suite) testTagKeepsDescriptor(t *testing.T, target oras.Target) {
	g := graph{}
	image := g.image(g.layer("layer"))
	g.push(t, target)
	said := image
	said.Annotations = map[string]string{"org.example.a": "b", "org.example.empty": "", "\u00fc": "<&>"}
	said.Platform = &ocispec.Platform{
		OS: "windows", Architecture: "arm64", Variant: "v8", OSVersion: "10", OSFeatures: []string{"win32k"}}
	other := image
	other.Annotations = map[string]string{"org.example.a": "c"}
	for _, step := range []struct {
		tag  string
		desc ocispec.Descriptor
	}{{"v1", said}, {"v2", other}, {"v3", image}, {"v2", said}, {"v1", image}} {
		mustTag(t, target, step.desc, step.tag)
		got, err := target.Resolve(t.Context(), step.tag)
		if err != nil || !content.Equal(got, image) || !maps.Equal(got.Annotations, step.desc.Annotations) ||
			!reflect.DeepEqual(got.Platform, step.desc.Platform) {
			t.Errorf("resolve(%s): %+v, %v; want %+v", step.tag, got, err, step.desc)
		}
	}
	dst := memory.New()
	copied, err := oras.Copy(t.Context(), target, "v2", dst, "copied", oras.DefaultCopyOptions)
	if err != nil || !maps.Equal(copied.Annotations, said.Annotations) {
		t.Errorf("copy: %+v, %v; want %+v", copied, err, said)
	}
	if pusher, ok := target.(registry.ReferencePusher); ok {
		if err := pusher.PushReference(t.Context(), other, bytes.NewReader(g.nodes[1].data), "v4"); err != nil {
			t.Fatal(err)
		}
	} else {
		mustTag(t, target, other, "v4")
	}
	if got, err := target.Resolve(t.Context(), "v4"); err != nil || !maps.Equal(got.Annotations, other.Annotations) {
		t.Errorf("resolve(v4): %+v, %v; want %+v", got, err, other)
	}
}

func (s *suite) testTagMoves(t *testing.T, target oras.Target) {
	g := graph{}
	g.addJSON(ocispec.MediaTypeImageManifest, map[string]any{"layers": []int{}})
	g.addJSON(ocispec.MediaTypeImageManifest, map[string]any{"layers": []int{}, "annotations": map[string]string{}})
	g.add("application/x-test", []byte("foobar"))
	g.add("application/x-test", []byte("barfoo"))
	g.push(t, target)
	for _, n := range append(g.nodes, g.nodes...) {
		for range 2 {
			mustTag(t, target, n.Descriptor, "tag")
			requireResolves(t, target, "tag", n.Descriptor)
		}
	}
	g.requireHeld(t, target) // what it pointed to before stays
	requireError(t, "tag of absent content", target.Tag(t.Context(), describe([]byte("absent")), "tag"),
		errdef.ErrNotFound)
	requireResolves(t, target, "tag", g.nodes[3].Descriptor)
}

// testTagByDigest: content has its digest for a tag, so that tagging it so
// changes nothing. oras.Copy does it where it is told to copy a digest.
func (s *suite) testTagByDigest(t *testing.T, target oras.Target) {
	g := graph{}
	g.index()
	g.add("application/x-test", []byte("foobar"))
	g.push(t, target)
	for _, n := range g.nodes {
		mustTag(t, target, n.Descriptor, n.Digest.String())
		requireResolves(t, target, n.Digest.String(), n.Descriptor)
	}
	g.requireHeld(t, target)
	if target, ok := target.(registry.TagLister); ok {
		if tags, err := registry.Tags(t.Context(), target); err != nil || len(tags) != 0 {
			t.Errorf("tags are %q, %v; want none", tags, err)
		}
	}
	absent := describe([]byte("absent"))
	requireError(t, "tag of absent content", target.Tag(t.Context(), absent, absent.Digest.String()),
		errdef.ErrNotFound)
}

func (s *suite) testEmptyReference(t *testing.T, target oras.Target) {
	if s.opts.TakesEmptyReference {
		t.Skip("the store takes an empty reference")
	}
	data := []byte("hello, world")
	d := describe(data)
	requireError(t, "tag of absent content", target.Tag(t.Context(), d, ""), errdef.ErrMissingReference)
	mustPush(t, target, d, data)
	requireError(t, "tag", target.Tag(t.Context(), d, ""), errdef.ErrMissingReference)
	_, err := target.Resolve(t.Context(), "")
	requireError(t, "resolve", err, errdef.ErrMissingReference)
	if target, ok := target.(content.Untagger); ok {
		requireError(t, "untag", target.Untag(t.Context(), ""), errdef.ErrMissingReference)
	}
	if target, ok := target.(registry.ReferenceFetcher); ok {
		_, _, err := target.FetchReference(t.Context(), "")
		requireError(t, "fetch", err, errdef.ErrMissingReference)
	}
	if target, ok := target.(registry.ReferencePusher); ok {
		err := target.PushReference(t.Context(), d, bytes.NewReader(data), "")
		requireError(t, "push", err, errdef.ErrMissingReference)
	}
}

func (s *suite) testUntag(t *testing.T, target oras.Target) {
	untagger := as[content.Untagger](t, target)
	g := graph{}
	g.index()
	g.add("application/x-test", []byte("foobar"))
	g.push(t, target)
	for _, n := range g.nodes {
		for _, tag := range []string{"one", "two"} {
			mustTag(t, target, n.Descriptor, tag)
		}
		for i, tag := range []string{"one", "two"} {
			if err := untagger.Untag(t.Context(), tag); err != nil {
				t.Errorf("untag: %v", err)
			}
			_, err := target.Resolve(t.Context(), tag)
			requireError(t, "resolve", err, errdef.ErrNotFound)
			requireError(t, "untag again", untagger.Untag(t.Context(), tag), errdef.ErrNotFound)
			if i == 0 {
				requireResolves(t, target, "two", n.Descriptor)
			}
			RequireContent(t, target, n.Descriptor, n.data)
		}
		mustTag(t, target, n.Descriptor, "tag")
		requireError(t, "untag a digest", untagger.Untag(t.Context(), n.Digest.String()), errdef.ErrInvalidReference)
		requireResolves(t, target, "tag", n.Descriptor)
	}
}

func (s *suite) testTags(t *testing.T, target oras.Target) {
	lister := as[registry.TagLister](t, target)
	list := func(last string) []string {
		t.Helper()
		var all []string
		if err := lister.Tags(t.Context(), last, func(tags []string) error {
			all = append(all, tags...)
			return nil
		}); err != nil {
			t.Errorf("tags after %q: %v", last, err)
		}
		return all
	}
	if tags := list(""); len(tags) != 0 {
		t.Errorf("an empty store has the tags %q", tags)
	}
	g := graph{}
	config := g.layer("config")
	images := []ocispec.Descriptor{g.image(config), g.image(config, g.layer("layer"))}
	g.push(t, target)
	if tags := list(""); len(tags) != 0 {
		t.Errorf("without a tag the tags are %q", tags)
	}
	want := []string{"1", "10", "2", "V1", "_", "v1", "v1-rc", "v1.1", "v10", "v1_1", "v2", "v3"}
	for i, at := range []int{7, 3, 0, 11, 5, 9, 1, 10, 2, 8, 4, 6} {
		mustTag(t, target, images[i%2], want[at])
	}
	if !slices.IsSorted(want) {
		t.Fatal("the test is wrong")
	}
	if tags := list(""); !slices.Equal(tags, want) {
		t.Errorf("tags are %q, want %q", tags, want)
	}
	for i, tag := range want {
		if tags := list(tag); !slices.Equal(tags, want[i+1:]) {
			t.Errorf("tags after %s are %q, want %q", tag, tags, want[i+1:])
		}
	}
	for last, from := range map[string]int{"0": 0, "v": 5, "v1.0": 7, "v2.5": 11, "z": 12} {
		if tags := list(last); !slices.Equal(tags, want[from:]) {
			t.Errorf("tags after %s, which is none, are %q, want %q", last, tags, want[from:])
		}
	}
	stop := errors.New("stop")
	calls := 0
	err := lister.Tags(t.Context(), "", func([]string) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("tags with a function that fails: %v after %d calls", err, calls)
	}
}

func (s *suite) testConcurrentTag(t *testing.T, target oras.Target) {
	g := graph{}
	config := g.layer("config")
	for i := range concurrency {
		g.image(config, g.layer(fmt.Sprint(i)))
	}
	g.push(t, target)
	var images []ocispec.Descriptor
	for _, n := range g.nodes {
		if n.MediaType == ocispec.MediaTypeImageManifest {
			images = append(images, n.Descriptor)
		}
	}
	concurrently(concurrency, func(i int) {
		for _, tag := range []string{"shared", fmt.Sprintf("tag-%d", i)} {
			if err := target.Tag(t.Context(), images[i], tag); err != nil {
				t.Errorf("tag: %v", err)
			}
		}
	})
	for i, image := range images {
		requireResolves(t, target, fmt.Sprintf("tag-%d", i), image)
	}
	got, err := target.Resolve(t.Context(), "shared")
	if err != nil || !slices.ContainsFunc(images, func(d ocispec.Descriptor) bool { return content.Equal(d, got) }) {
		t.Errorf("what all tagged is %+v, %v", got, err)
	}
	if target, ok := target.(registry.TagLister); ok {
		if tags, err := registry.Tags(t.Context(), target); err != nil || len(tags) != concurrency+1 {
			t.Errorf("there are %d tags, %v; want %d", len(tags), err, concurrency+1)
		}
	}
}

func (s *suite) testPushReference(t *testing.T, target oras.Target) {
	pusher := as[registry.ReferencePusher](t, target)
	g := graph{}
	config := g.layer("config")
	g.push(t, target)
	g.nodes = nil
	g.image(config)
	g.index()
	for _, n := range g.nodes {
		for _, c := range badPushes(n.Descriptor, n.data) {
			err := pusher.PushReference(t.Context(), c.d, c.src, "tag")
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("push of %s, with %s: %v; want %v", n.MediaType, c.what, err, c.want)
			}
			s.requireAbsent(t, target, n.Descriptor)
			_, err = target.Resolve(t.Context(), "tag")
			requireError(t, "resolve of what was refused", err, errdef.ErrNotFound)
		}
	}
	// Pushed twice: the second time only the tag moves, and that is no error.
	for range 2 {
		for _, n := range g.nodes {
			if err := pusher.PushReference(t.Context(), n.Descriptor, bytes.NewReader(n.data), "tag"); err != nil {
				t.Fatalf("push: %v", err)
			}
			requireResolves(t, target, "tag", n.Descriptor)
			RequireContent(t, target, n.Descriptor, n.data)
		}
	}
	g.requireHeld(t, target)
	// A digest of its own is as good as no tag.
	g.nodes = nil
	d := g.index(config)
	if err := pusher.PushReference(t.Context(), d, bytes.NewReader(g.nodes[0].data), d.Digest.String()); err != nil {
		t.Errorf("push by digest: %v", err)
	}
	g.requireHeld(t, target)
}

func (s *suite) testFetchReference(t *testing.T, target oras.Target) {
	fetcher := as[registry.ReferenceFetcher](t, target)
	g := graph{}
	g.index()
	g.add("application/x-test", []byte("foobar"))
	g.push(t, target)
	for _, n := range g.nodes {
		mustTag(t, target, n.Descriptor, "tag")
		for _, reference := range []string{"tag", n.Digest.String()} {
			d, fetched, err := fetcher.FetchReference(t.Context(), reference)
			if err != nil {
				t.Errorf("fetch %s: %v", reference, err)
				continue
			}
			data, err := content.ReadAll(fetched, d)
			if err != nil || !content.Equal(d, n.Descriptor) || !bytes.Equal(data, n.data) {
				t.Errorf("fetch %s: %+v, %q, %v", reference, d, data, err)
			}
			if err := fetched.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
