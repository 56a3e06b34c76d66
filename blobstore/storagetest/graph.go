package storagetest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
)

// newGraph returns images, indexes of them, and what is about them, with the
// predecessors of each node, as numbers.
func newGraph() (g graph, predecessors [][]int) {
	config := g.add(ocispec.MediaTypeImageConfig, []byte("config")) // 0
	foo, bar := g.layer("foo"), g.layer("bar")                      // 1, 2
	hello := g.layer("hello")                                       // 3
	image4 := g.image(config, foo, bar)                             // 4
	image5 := g.image(config, hello)                                // 5
	image6 := g.image(config, foo, bar, hello)                      // 6
	index7 := g.index(image4, image5)                               // 7
	index8 := g.index(image6)                                       // 8
	index9 := g.index()                                             // 9
	index10 := g.index(index7, index8, index9)                      // 10
	sig11 := g.layer("sig_1")                                       // 11
	g.artifact(image6, sig11)                                       // 12
	sig13 := g.layer("sig_2")                                       // 13
	g.manifest(ocispec.Manifest{Config: sig13, Subject: &index10})  // 14
	g.artifact(foo)                                                 // 15: about a layer
	g.addJSON(ocispec.MediaTypeImageIndex, ocispec.Index{           // 16: it has its subject in it
		Manifests: []ocispec.Descriptor{index9}, Subject: &index9,
	})
	return g, [][]int{
		0: {4, 5, 6}, 1: {4, 6, 15}, 2: {4, 6}, 3: {5, 6},
		4: {7}, 5: {7}, 6: {8, 12}, 7: {10}, 8: {10}, 9: {10, 16}, 10: {14},
		11: {12}, 12: nil, 13: {14}, 14: nil, 15: nil, 16: nil,
	}
}

func (g *graph) requirePredecessors(t *testing.T, in content.PredecessorFinder, want [][]int) {
	t.Helper()
	for i, n := range g.nodes {
		got, err := in.Predecessors(t.Context(), n.Descriptor)
		var nodes []ocispec.Descriptor
		for _, j := range want[i] {
			nodes = append(nodes, g.nodes[j].Descriptor)
		}
		if err != nil || !equalSets(got, nodes) {
			t.Errorf("predecessors of node %d are %+v, %v; want nodes %v", i, got, err, want[i])
		}
	}
}

func (s *suite) testPredecessors(t *testing.T, target oras.Target) {
	as[content.PredecessorFinder](t, target)
	g, want := newGraph()
	orders := map[string][]int{}
	for i := range g.nodes {
		orders["up"] = append(orders["up"], i)
	}
	orders["down"] = slices.Clone(orders["up"])
	slices.Reverse(orders["down"])
	orders["mixed"] = rand.New(rand.NewPCG(1, 2)).Perm(len(g.nodes))
	for name, order := range orders {
		t.Run(name, func(t *testing.T) {
			target := s.open(t)
			for _, i := range order {
				mustPush(t, target, g.nodes[i].Descriptor, g.nodes[i].data)
			}
			g.requirePredecessors(t, target.(content.PredecessorFinder), want)
			g.requireHeld(t, target)
		})
	}
	concurrently(len(g.nodes), func(i int) {
		if err := target.Push(t.Context(), g.nodes[i].Descriptor, bytes.NewReader(g.nodes[i].data)); err != nil {
			t.Errorf("push node %d: %v", i, err)
		}
	})
	g.requirePredecessors(t, target.(content.PredecessorFinder), want)
	g.requireHeld(t, target)
}

func (s *suite) testDelete(t *testing.T, target oras.Target) {
	deleter := as[content.Deleter](t, target)
	g := graph{}
	g.index()
	g.add("application/x-test", []byte("foobar"))
	g.add("application/x-test", nil)
	for range 2 { // it can come back
		g.push(t, target)
		for i, n := range g.nodes {
			for _, tag := range []string{"one", "two"} {
				mustTag(t, target, n.Descriptor, tag)
			}
			RequireContent(t, target, n.Descriptor, n.data)
			if err := deleter.Delete(t.Context(), n.Descriptor); err != nil {
				t.Fatalf("delete: %v", err)
			}
			s.requireAbsent(t, target, n.Descriptor)
			requireError(t, "delete again", deleter.Delete(t.Context(), n.Descriptor), errdef.ErrNotFound)
			for _, tag := range []string{"one", "two"} {
				_, err := target.Resolve(t.Context(), tag)
				requireError(t, "resolve a tag of what was deleted", err, errdef.ErrNotFound)
			}
			for _, other := range g.nodes[i+1:] {
				RequireContent(t, target, other.Descriptor, other.data)
			}
		}
	}
	if target, ok := target.(registry.TagLister); ok {
		if tags, err := registry.Tags(t.Context(), target); err != nil || len(tags) != 0 {
			t.Errorf("tags are %q, %v; want none", tags, err)
		}
	}
}

// testDeleteReferenced: a store may refuse to delete what a manifest refers to.
// It does so or it does not, but nothing in between.
func (s *suite) testDeleteReferenced(t *testing.T, target oras.Target) {
	deleter := as[content.Deleter](t, target)
	g := graph{}
	config, layer := g.layer("config"), g.layer("layer")
	g.image(config, layer)
	g.push(t, target)
	err := deleter.Delete(t.Context(), layer)
	if err != nil {
		g.requireHeld(t, target)
		return
	}
	s.requireAbsent(t, target, layer)
	g.nodes = slices.Delete(g.nodes, 1, 2)
	g.requireHeld(t, target)
}

// testDeleteTopDown takes a graph down, in which everything has a tag, so that
// nothing but what is deleted goes.
func (s *suite) testDeleteTopDown(t *testing.T, target oras.Target) {
	deleter := as[content.Deleter](t, target)
	finder, finds := target.(content.PredecessorFinder)
	g := graph{}
	config := g.add(ocispec.MediaTypeImageConfig, []byte("config"))     // 0
	foo, bar, hello := g.layer("foo"), g.layer("bar"), g.layer("hello") // 1, 2, 3
	image4, image5 := g.image(config, foo, bar), g.image(config, hello) // 4, 5
	image6 := g.image(config, foo, bar, hello)                          // 6
	g.index(image4, image5)                                             // 7
	g.index(image6)                                                     // 8
	g.push(t, target)
	for i, n := range g.nodes {
		mustTag(t, target, n.Descriptor, "node-"+string(rune('0'+i)))
	}
	predecessors := [][]int{{4, 5, 6}, {4, 6}, {4, 6}, {5, 6}, {7}, {7}, {8}, nil, nil}
	gone := map[int]bool{}
	for _, i := range []int{8, 6, 7, 5, 4, 3, 2, 1, 0} {
		if err := deleter.Delete(t.Context(), g.nodes[i].Descriptor); err != nil {
			t.Fatalf("delete node %d: %v", i, err)
		}
		gone[i] = true
		for j, n := range g.nodes {
			requireExists(t, target, n.Descriptor, !gone[j])
			predecessors[j] = slices.DeleteFunc(predecessors[j], func(p int) bool { return gone[p] })
		}
		if finds {
			g.requirePredecessors(t, finder, predecessors)
		}
	}
}

// testDeleteCollects: what only the deleted content referred to goes with it,
// unless it has a tag, and so do its referrers.
func (s *suite) testDeleteCollects(t *testing.T, target oras.Target) {
	deleter := as[content.Deleter](t, target)
	g := graph{}
	config := g.add(ocispec.MediaTypeImageConfig, []byte("config")) // 0
	// 1, 2, 3
	foo, bar, hello := g.layer("foo"), g.layer("bar"), g.layer("hello")
	// 4, 5
	image4, image5 := g.image(config, foo), g.image(config, bar)
	image6 := g.image(config, hello) // 6
	// 7, 8
	index7, index8 := g.index(image4, image5), g.index(image6)
	world := g.layer("world")                                                                                      // 9
	about10 := g.manifest(ocispec.Manifest{Config: config, Subject: &image6, Layers: []ocispec.Descriptor{world}}) // 10
	g.manifest(ocispec.Manifest{Config: config, Subject: &about10, Layers: []ocispec.Descriptor{bar}})             // 11
	concurrently(len(g.nodes), func(i int) {
		if err := target.Push(t.Context(), g.nodes[i].Descriptor, bytes.NewReader(g.nodes[i].data)); err != nil {
			t.Errorf("push node %d: %v", i, err)
		}
	})
	mustTag(t, target, image4, "tagged")
	mustTag(t, target, index8, "another")
	check := func(left ...int) {
		t.Helper()
		for i, n := range g.nodes {
			if want := slices.Contains(left, i); want || !s.opts.KeepsUnreferenced {
				if got, err := target.Exists(t.Context(), n.Descriptor); err != nil || got != want {
					t.Errorf("node %d is there: %t, %v; want %t", i, got, err, want)
				}
			}
		}
	}
	if err := deleter.Delete(t.Context(), index7); err != nil {
		t.Fatal(err)
	}
	check(0, 1, 2, 3, 4, 6, 8, 9, 10, 11) // image 5 is gone; layer 2 is one of 11's
	// Whether what is about an image keeps it is the store's own choice.
	if err := deleter.Delete(t.Context(), index8); err != nil {
		t.Fatal(err)
	}
	if err := deleter.Delete(t.Context(), image6); err != nil && !errors.Is(err, errdef.ErrNotFound) {
		t.Fatal(err)
	}
	check(0, 1, 4)
	if err := deleter.Delete(t.Context(), image4); err != nil {
		t.Fatal(err)
	}
	check()
}

// testDeleteAfterRetag: a manifest whose tag has moved on has no tag, and goes
// with the index that referred to it.
func (s *suite) testDeleteAfterRetag(t *testing.T, target oras.Target) {
	deleter := as[content.Deleter](t, target)
	g := graph{}
	config := g.add(ocispec.MediaTypeImageConfig, []byte("config")) // 0
	image3 := g.image(config, g.layer("foo"))                       // 1, 2
	image4 := g.image(config, g.layer("bar"))                       // 3, 4
	index := g.index(image3)                                        // 5
	g.push(t, target)
	mustTag(t, target, image3, "latest")
	mustTag(t, target, image4, "latest")
	if err := deleter.Delete(t.Context(), index); err != nil {
		t.Fatal(err)
	}
	requireExists(t, target, index, false)
	if !s.opts.KeepsUnreferenced {
		requireExists(t, target, image3, false)
		requireExists(t, target, g.nodes[1].Descriptor, false)
	}
	g.nodes = []node{g.nodes[0], g.nodes[3], g.nodes[4]}
	g.requireHeld(t, target)
	requireResolves(t, target, "latest", image4)
}

func (s *suite) testReferrers(t *testing.T, target oras.Target) {
	as[content.PredecessorFinder](t, target)
	store := target.(content.ReadOnlyGraphStorage)
	lister, lists := target.(registry.ReferrerLister)
	g := graph{}
	config := g.add("application/x-config", []byte("config"))
	subject := g.image(config)
	absent := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, []byte(`{"layers":[]}`))
	g.index(subject) // refers to it, but is not about it
	g.manifest(ocispec.Manifest{Config: config, Subject: &absent})
	annotations := map[string]string{"org.example.key": "value"}
	want := []ocispec.Descriptor{
		g.manifest(ocispec.Manifest{Config: config, Subject: &subject, Annotations: annotations}),
		g.manifest(ocispec.Manifest{Config: config, Subject: &subject, ArtifactType: "application/x-sbom"}),
		g.addJSON(ocispec.MediaTypeImageIndex,
			ocispec.Index{Subject: &subject, ArtifactType: "application/x-sbom", Annotations: annotations}),
		g.addJSON(ocispec.MediaTypeImageIndex, ocispec.Index{Subject: &subject}),
		g.artifact(subject),
	}
	want[0].ArtifactType, want[0].Annotations = "application/x-config", annotations
	want[1].ArtifactType = "application/x-sbom"
	want[2].ArtifactType, want[2].Annotations = "application/x-sbom", annotations
	want[4].ArtifactType = "application/x-signature"

	check := func(d ocispec.Descriptor, artifactType string, want []ocispec.Descriptor) {
		t.Helper()
		got, err := registry.Referrers(t.Context(), store, d, artifactType)
		if err != nil || !equalReferrers(got, want) {
			t.Errorf("referrers of type %q are %+v, %v; want %+v", artifactType, got, err, want)
		}
	}
	check(subject, "", nil)
	for _, n := range slices.Backward(g.nodes) { // the referrers first
		mustPush(t, target, n.Descriptor, n.data)
	}
	check(subject, "", want)
	check(subject, "application/x-sbom", want[1:3])
	check(subject, "application/x-config", want[:1])
	check(subject, "application/x-signature", want[4:])
	check(subject, "application/x-none", nil)
	check(g.nodes[2].Descriptor, "", nil)
	if got, err := registry.Referrers(t.Context(), store, absent, ""); err != nil || len(got) != 1 {
		t.Errorf("referrers of what is not there: %+v, %v; want one", got, err)
	}
	if lists {
		stop := errors.New("stop")
		calls := 0
		err := lister.Referrers(t.Context(), subject, "", func([]ocispec.Descriptor) error { calls++; return stop })
		if !errors.Is(err, stop) || calls != 1 {
			t.Errorf("referrers with a function that fails: %v after %d calls", err, calls)
		}
	}
}

func equalReferrers(a, b []ocispec.Descriptor) bool {
	return equalSets(a, b) && !slices.ContainsFunc(a, func(x ocispec.Descriptor) bool {
		return !slices.ContainsFunc(b, func(y ocispec.Descriptor) bool {
			if x.Digest != y.Digest || x.ArtifactType != y.ArtifactType || len(x.Annotations) != len(y.Annotations) {
				return false
			}
			for k, v := range x.Annotations {
				if y.Annotations[k] != v {
					return false
				}
			}
			return true
		})
	})
}

// mounter returns what tests of mounts need, or skips the test.
func (s *suite) mounter(t *testing.T, target oras.Target) (m registry.Mounter, other oras.Target, name string) {
	t.Helper()
	m = as[registry.Mounter](t, target)
	if s.opts.OtherRepository == nil {
		t.Skip("no other repository is known")
	}
	other, name = s.opts.OtherRepository(t, target)
	return m, other, name
}

func (s *suite) testMount(t *testing.T, target oras.Target) {
	m, other, name := s.mounter(t, target)
	g := graph{}
	g.layer("layer")
	g.add("application/x-test", nil)
	g.push(t, other)
	unwanted := func() (io.ReadCloser, error) {
		t.Error("what could be mounted was to be copied")
		return nil, errors.New("not to be called")
	}
	for range 2 { // what is there already can be mounted too
		for _, n := range g.nodes {
			if err := m.Mount(t.Context(), n.Descriptor, name, unwanted); err != nil {
				t.Fatalf("mount: %v", err)
			}
		}
	}
	g.requireHeld(t, target)
	g.requireHeld(t, other)

	data := []byte("elsewhere")
	d := describe(data)
	give := func(text string) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(text)), nil }
	}
	refused := errors.New("refused")
	err := m.Mount(t.Context(), d, name, func() (io.ReadCloser, error) { return nil, refused })
	requireError(t, "mount of what is not there, with content that is refused", err, refused)
	requireError(t, "mount of what is not there, with other content", m.Mount(t.Context(), d, name, give("elsewhere?")),
		content.ErrTrailingData)
	s.requireAbsent(t, target, d)
	if err := m.Mount(t.Context(), d, name, give("elsewhere")); err != nil {
		t.Errorf("mount of what is not there, with its content: %v", err)
	}
	RequireContent(t, target, d, data)
	requireExists(t, other, d, false)

	// One repository's copy does not depend on the other's.
	if deleter, ok := other.(content.Deleter); ok {
		if err := deleter.Delete(t.Context(), g.nodes[0].Descriptor); err != nil {
			t.Fatal(err)
		}
		requireExists(t, other, g.nodes[0].Descriptor, false)
		g.requireHeld(t, target)
	}
	bad := d
	bad.Digest = "sha256:abc"
	requireError(t, "mount of an invalid digest", m.Mount(t.Context(), bad, name, nil), errdef.ErrInvalidDigest)
}
