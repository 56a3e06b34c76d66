// Package storagetest is the suite that a content store for oras-go passes:
// what callers of [oras.Target], and of the interfaces that a store may have
// besides, rely on. It asks for nothing that oras-go's own stores do not give,
// but for what [Options] names.
//
//	func TestStorage(t *testing.T) {
//		storagetest.Run(t, func(t *testing.T) oras.Target { return newStore(t) }, storagetest.Options{})
//	}
//
// Tests of an interface that the store does not have are skipped:
// [content.Deleter], [content.PredecessorFinder], [content.Untagger],
// registry.TagLister, registry.ReferrerLister, registry.ReferenceFetcher,
// registry.ReferencePusher and registry.Mounter. A store that has to have one
// asserts that where the type is declared.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package storagetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
)

// Options says in what a store differs. The zero value is a store that is
// strict in everything.
type Options struct {
	// OtherRepository opens another repository of the store that target is a
	// repository of, and returns it with the name by which target's Mount
	// knows it. Where it is nil, mounts are not tested.
	OtherRepository func(t *testing.T, target oras.Target) (other oras.Target, name string)

	// KeyedByDescriptor: content is found by media type, size and digest
	// together, so that the same bytes can be several contents. Otherwise the
	// digest alone finds it. oras-go's memory store.
	KeyedByDescriptor bool

	// IgnoresContext: operations go on when their context has ended. oras-go's
	// memory and OCI layout stores.
	IgnoresContext bool

	// UncheckedDigests: only Push refuses a digest that is malformed or of an
	// unknown algorithm, with an error of its own; nothing else is found under
	// it. Otherwise all operations fail with errdef.ErrInvalidDigest.
	// oras-go's memory store.
	UncheckedDigests bool

	// ResolvesTagsOnly: Resolve does not know digests. oras-go's memory store.
	ResolvesTagsOnly bool

	// TakesEmptyReference: "" is a tag like any other. Otherwise it fails with
	// errdef.ErrMissingReference. oras-go's memory store.
	TakesEmptyReference bool

	// KeepsBadManifests: content with the media type of a manifest that is none
	// is refused, but stored all the same. oras-go's memory and OCI layout
	// stores.
	KeepsBadManifests bool

	// KeepsUnreferenced: Delete removes just what it is told to. Otherwise what
	// only that content referred to goes with it, and so do its referrers.
	// oras-go's OCI layout store, where AutoGC is off.
	KeepsUnreferenced bool
}

// Run runs the suite, its tests in parallel. open returns a new, empty store;
// what has to be closed, it closes by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) oras.Target, opts Options) {
	s := &suite{open: open, opts: opts}
	for _, c := range []struct {
		name string
		test func(t *testing.T, target oras.Target)
	}{
		{"RoundTrip", s.testRoundTrip},
		{"Readers", s.testReaders},
		{"NotFound", s.testNotFound},
		{"Duplicate", s.testDuplicate},
		{"BadPush", s.testBadPush},
		{"BadManifest", s.testBadManifest},
		{"BadDigest", s.testBadDigest},
		{"OtherDescriptor", s.testOtherDescriptor},
		{"ContextOver", s.testContextOver},
		{"ContextEndsInPush", s.testContextEndsInPush},
		{"ConcurrentPush", s.testConcurrentPush},
		{"ConcurrentBadPush", s.testConcurrentBadPush},
		{"ConcurrentFetch", s.testConcurrentFetch},
		{"ConcurrentAll", s.testConcurrentAll},

		{"Resolve", s.testResolve},
		{"TagMoves", s.testTagMoves},
		{"TagKeepsDescriptor", s.testTagKeepsDescriptor},
		{"TagByDigest", s.testTagByDigest},
		{"EmptyReference", s.testEmptyReference},
		{"Untag", s.testUntag},
		{"Tags", s.testTags},
		{"ConcurrentTag", s.testConcurrentTag},
		{"PushReference", s.testPushReference},
		{"FetchReference", s.testFetchReference},

		{"Predecessors", s.testPredecessors},
		{"Delete", s.testDelete},
		{"DeleteReferenced", s.testDeleteReferenced},
		{"DeleteTopDown", s.testDeleteTopDown},
		{"DeleteCollects", s.testDeleteCollects},
		{"DeleteAfterRetag", s.testDeleteAfterRetag},
		{"Referrers", s.testReferrers},
		{"Mount", s.testMount},

		{"Copy", s.testCopy},
		{"CopyAgain", s.testCopyAgain},
		{"CopyGraph", s.testCopyGraph},
		{"CopyByDigest", s.testCopyByDigest},
		{"CopyForeignLayer", s.testCopyForeignLayer},
		{"CopyFails", s.testCopyFails},
		{"CopyMountFrom", s.testCopyMountFrom},
		{"ExtendedCopy", s.testExtendedCopy},
		{"OrasTag", s.testOrasTag},
		{"OrasFetch", s.testOrasFetch},
		{"PackManifest", s.testPackManifest},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, open(t))
		})
	}
}

type suite struct {
	open func(*testing.T) oras.Target
	opts Options
}

// as returns the target as a T, or skips the test.
func as[T any](t *testing.T, target oras.Target) T {
	t.Helper()
	v, ok := target.(T)
	if !ok {
		t.Skipf("the store is no %T", new(T))
	}
	return v
}

// node is content with what describes it.
type node struct {
	ocispec.Descriptor
	data []byte
}

// graph is content to push, in an order in which nothing refers to what comes
// after it.
type graph struct {
	nodes []node
}

func (g *graph) add(mediaType string, data []byte) ocispec.Descriptor {
	n := node{content.NewDescriptorFromBytes(mediaType, data), data}
	g.nodes = append(g.nodes, n)
	return n.Descriptor
}

func (g *graph) layer(text string) ocispec.Descriptor {
	return g.add(ocispec.MediaTypeImageLayer, []byte(text))
}

func (g *graph) addJSON(mediaType string, v any) ocispec.Descriptor {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // of structs that can be marshalled
	}
	return g.add(mediaType, data)
}

func (g *graph) manifest(m ocispec.Manifest) ocispec.Descriptor {
	m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	return g.addJSON(m.MediaType, m)
}

func (g *graph) image(config ocispec.Descriptor, layers ...ocispec.Descriptor) ocispec.Descriptor {
	return g.manifest(ocispec.Manifest{Config: config, Layers: layers})
}

func (g *graph) index(manifests ...ocispec.Descriptor) ocispec.Descriptor {
	return g.addJSON(ocispec.MediaTypeImageIndex,
		ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: manifests})
}

// mediaTypeArtifact is the media type of the artifact manifest that the release
// candidates of the image specification 1.1 had. oras-go goes on to know it.
const mediaTypeArtifact = "application/vnd.oci.artifact.manifest.v1+json"

type artifact struct {
	MediaType    string               `json:"mediaType"`
	ArtifactType string               `json:"artifactType"`
	Blobs        []ocispec.Descriptor `json:"blobs,omitempty"`
	Subject      *ocispec.Descriptor  `json:"subject,omitempty"`
	Annotations  map[string]string    `json:"annotations,omitempty"`
}

func (g *graph) artifact(subject ocispec.Descriptor, blobs ...ocispec.Descriptor) ocispec.Descriptor {
	return g.addJSON(mediaTypeArtifact, artifact{
		MediaType: mediaTypeArtifact, ArtifactType: "application/x-signature", Subject: &subject, Blobs: blobs})
}

// descriptors returns what describes the nodes.
func (g *graph) descriptors() []ocispec.Descriptor {
	var all []ocispec.Descriptor
	for _, n := range g.nodes {
		all = append(all, n.Descriptor)
	}
	return all
}

// push pushes all nodes, children first.
func (g *graph) push(t *testing.T, to content.Pusher) {
	t.Helper()
	for i, n := range g.nodes {
		if err := to.Push(t.Context(), n.Descriptor, bytes.NewReader(n.data)); err != nil {
			t.Fatalf("push node %d: %v", i, err)
		}
	}
}

// requireHeld fails the test unless every node is there and whole.
func (g *graph) requireHeld(t *testing.T, in content.ReadOnlyStorage) {
	t.Helper()
	for _, n := range g.nodes {
		requireExists(t, in, n.Descriptor, true)
		RequireContent(t, in, n.Descriptor, n.data)
	}
}

// bytesOf returns n bytes that look random and depend on the seed alone.
func bytesOf(n int, seed byte) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// describe describes data with a media type that nothing knows.
func describe(data []byte) ocispec.Descriptor {
	return content.NewDescriptorFromBytes("application/x-test", data)
}

func mustPush(t *testing.T, to content.Pusher, d ocispec.Descriptor, data []byte) {
	t.Helper()
	if err := to.Push(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatalf("push %s: %v", d.Digest, err)
	}
}

func mustTag(t *testing.T, in content.Tagger, d ocispec.Descriptor, reference string) {
	t.Helper()
	if err := in.Tag(t.Context(), d, reference); err != nil {
		t.Fatalf("tag %s as %s: %v", d.Digest, reference, err)
	}
}

func requireExists(t *testing.T, in content.ReadOnlyStorage, d ocispec.Descriptor, want bool) {
	t.Helper()
	if got, err := in.Exists(t.Context(), d); err != nil || got != want {
		t.Errorf("exists(%s) is %t, %v; want %t", d.Digest, got, err, want)
	}
}

// RequireContent fails the test where what is fetched is not what is wanted.
func RequireContent(t *testing.T, in content.Fetcher, d ocispec.Descriptor, want []byte) {
	t.Helper()
	fetched, err := in.Fetch(t.Context(), d)
	if err != nil {
		t.Errorf("fetch(%s): %v", d.Digest, err)
		return
	}
	defer fetched.Close()
	// Not in a growing buffer, whose copies take the race detector long.
	r := content.NewVerifyReader(fetched, d)
	got := make([]byte, len(want))
	n, err := io.ReadFull(r, got)
	if err == nil {
		err = r.Verify()
	}
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("fetch(%s): %d bytes, %v; want the %d that were pushed", d.Digest, n, err, len(want))
	}
}

func requireResolves(t *testing.T, in content.Resolver, reference string, want ocispec.Descriptor) {
	t.Helper()
	if got, err := in.Resolve(t.Context(), reference); err != nil || !content.Equal(got, want) {
		t.Errorf("resolve(%s) is %+v, %v; want %+v", reference, got, err, want)
	}
}

func requireError(t *testing.T, what string, err error, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v; want %v", what, err, want)
	}
}

// equalSets reports whether both have the same descriptors, in any order.
func equalSets(a, b []ocispec.Descriptor) bool {
	text := func(all []ocispec.Descriptor) []string {
		var texts []string
		for _, d := range all {
			texts = append(texts, fmt.Sprintf("%s %s %d", d.Digest, d.MediaType, d.Size))
		}
		slices.Sort(texts)
		return texts
	}
	return slices.Equal(text(a), text(b))
}

// concurrently calls f n times at once, and returns when all calls have.
func concurrently(n int, f func(i int)) {
	var group sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		group.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	group.Wait()
}

// algorithms are those of the image specification.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}
