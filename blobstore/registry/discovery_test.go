package registry_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

func TestBase(t *testing.T) {
	s := start(t, registry.Options{})
	for _, path := range []string{"/v2/", "/v2"} {
		s.do("GET", path, nil).want(http.StatusOK, "Content-Type", "application/json").content([]byte("{}"))
		s.do("HEAD", path, nil).want(http.StatusOK, "Content-Length", "2").content(nil)
	}
}

// follow returns what all pages of a list have.
func (s *server) follow(path, key string) (all []string, pages int) {
	s.Helper()
	for ; path != ""; pages++ {
		a := s.do("GET", path, nil).want(http.StatusOK)
		var body map[string]json.RawMessage
		var page []string
		if err := json.Unmarshal(a.body, &body); err != nil {
			s.Fatal(err)
		}
		if err := json.Unmarshal(body[key], &page); err != nil {
			s.Fatal(err)
		}
		all = append(all, page...)
		path = a.next()
	}
	return all, pages
}

func TestTags(t *testing.T) {
	s := start(t, registry.Options{})
	m := s.image("a/b", nil)
	want := []string{"0", "1.0", "A", "Z", "_x", "a", "a-1", "a.1", "b"}
	for _, tag := range slices.Backward(want) {
		s.pushManifest("a/b", tag, m)
	}
	const path = "/v2/a/b/tags/list"
	a := s.do("GET", path, nil).lists("tags", want...)
	if !strings.Contains(string(a.body), `"name":"a/b"`) || a.next() != "" {
		t.Errorf("%s, Link %q", a.body, a.next())
	}
	s.do("HEAD", path, nil).want(http.StatusOK, "Content-Length", size(a.body)).content(nil)
	for _, c := range []struct {
		query string
		want  []string
		more  bool
	}{
		{"n=3", want[:3], true},
		{"n=9", want, false},
		{"n=8", want[:8], true},
		{"n=100000000", want, false},
		{"n=99999999999999999999999", want, false},
		{"n=0", []string{}, false},
		{"n=0&last=A", []string{}, false},
		{"last=A", want[3:], false},
		{"last=A&n=2", want[3:5], true},
		{"last=B", want[3:], false}, // which there is not
		{"last=b", []string{}, false},
		{"last=zzz&n=5", []string{}, false},
		{"n=1&last=a-1", want[7:8], true},
	} {
		a := s.do("GET", path+"?"+c.query, nil).lists("tags", c.want...)
		if (a.next() != "") != c.more {
			t.Errorf("%s: Link is %q", c.query, a.header.Get("Link"))
		}
	}
	for n := range 10 {
		if all, pages := s.follow(path+"?n="+itoa(n+1), "tags"); !slices.Equal(all, want) || pages != (9+n)/(n+1) {
			t.Errorf("by %d: %q on %d pages", n+1, all, pages)
		}
	}
	for _, n := range []string{"-1", "x", "", "1.5", "%2B1"} {
		s.do("GET", path+"?n="+n, nil).fails(http.StatusBadRequest, "UNSUPPORTED")
	}
}

// TestTagsOfNothing: a name that is wrong is told from a repository without tags.
func TestTagsOfNothing(t *testing.T) {
	s := start(t, registry.Options{})
	s.do("GET", "/v2/a/tags/list", nil).fails(http.StatusNotFound, "NAME_UNKNOWN").contains("a")
	s.pushBlob("a", []byte("data"))
	s.do("GET", "/v2/a/tags/list", nil).fails(http.StatusNotFound, "NAME_UNKNOWN") // it may never get a manifest
	image := s.image("a", nil)
	s.pushManifest("a", digest.SHA256.FromBytes(image).String(), image)
	s.do("GET", "/v2/a/tags/list", nil).lists("tags")
	s.do("GET", "/v2/a/tags/list?n=5&last=x", nil).lists("tags")
}

func TestCatalog(t *testing.T) {
	s := start(t, registry.Options{})
	s.do("GET", "/v2/_catalog", nil).lists("repositories")
	for _, n := range []string{"", "?n=1", "?n=0", "?last=x"} {
		s.do("GET", "/v2/_catalog"+n, nil).lists("repositories")
	}
	check := func(want ...string) {
		t.Helper()
		s.do("GET", "/v2/_catalog", nil).lists("repositories", want...)
		for n := range len(want) + 2 {
			if all, pages := s.follow("/v2/_catalog?n="+itoa(n+1), "repositories"); !slices.Equal(all, want) ||
				pages != max(1, (len(want)+n)/(n+1)) {
				t.Errorf("by %d: %q on %d pages", n+1, all, pages)
			}
		}
		for i := range want {
			s.do("GET", "/v2/_catalog?last="+url.QueryEscape(want[i]), nil).lists("repositories", want[i+1:]...)
		}
		s.do("GET", "/v2/_catalog?n=0", nil).lists("repositories")
	}
	push := func(name string) { s.pushManifest(name, "v1", s.image(name, nil)) }
	remove := func(name string) {
		t.Helper()
		s.do("DELETE", "/v2/"+name+"/manifests/"+digest.SHA256.FromBytes(s.image(name, nil)).String(), nil).want(
			http.StatusAccepted)
	}
	// The default repository, which is the empty tag, has its place wherever that is.
	push("dfcache/default")
	check("dfcache/default")
	push("z")
	check("dfcache/default", "z")
	push("a")
	push("dfcache")
	push("dfcache/defaulu")
	push("a/b-c")
	check("a", "a/b-c", "dfcache", "dfcache/default", "dfcache/defaulu", "z")
	remove("dfcache/default")
	check("a", "a/b-c", "dfcache", "dfcache/defaulu", "z")
	remove("z")
	push("dfcache/default")
	remove("dfcache/defaulu")
	check("a", "a/b-c", "dfcache", "dfcache/default")
	// Blobs whose manifest has not come, and may never come, are no repository, wherever it would stand.
	for _, name := range []string{"b", "dfcache/defaulu", "zz"} {
		s.pushBlob(name, []byte("data"))
		s.pushBlob(name, []byte("more"))
	}
	check("a", "a/b-c", "dfcache", "dfcache/default")
	// What dfcache has imported under its digest is one.
	if _, err := s.repository("b").Import(t.Context(), "", strings.NewReader("imported"),
		blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	check("a", "a/b-c", "b", "dfcache", "dfcache/default")
	s.do("GET", "/v2/_catalog?n=x", nil).fails(http.StatusBadRequest, "UNSUPPORTED")
}

// referrers reads an index of referrers.
func (a *answer) referrers() []ocispec.Descriptor {
	a.Helper()
	a.want(http.StatusOK, "Content-Type", ocispec.MediaTypeImageIndex)
	var index ocispec.Index
	if err := json.Unmarshal(a.body, &index); err != nil {
		a.Fatalf("%s: %v", a.what, err)
	}
	if index.SchemaVersion != 2 || index.MediaType != ocispec.MediaTypeImageIndex || index.Manifests == nil {
		a.Errorf("%s: %s", a.what, a.body)
	}
	return index.Manifests
}

func TestReferrers(t *testing.T) {
	s := start(t, registry.Options{})
	subject := s.image("a", nil)
	d := digest.SHA256.FromBytes(subject)
	path := "/v2/a/referrers/" + d.String()
	// Of nothing there is an empty list, in a repository that never was, too.
	if list := s.do("GET", path, nil).referrers(); len(list) != 0 {
		t.Errorf("%v", list)
	}
	target := &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: int64(len(subject))}
	var want []ocispec.Descriptor
	push := func(manifest []byte, mediaType, artifactType string, annotations map[string]string) {
		t.Helper()
		pushed := digest.SHA256.FromBytes(manifest)
		s.do("PUT", "/v2/a/manifests/"+pushed.String(), manifest, "Content-Type", mediaType).want(
			http.StatusCreated, "OCI-Subject", d.String())
		want = append(want, ocispec.Descriptor{MediaType: mediaType, Digest: pushed, Size: int64(len(manifest)),
			ArtifactType: artifactType, Annotations: annotations})
	}
	notes := map[string]string{"org.example.note": "<b>&\u2028</b>", "x": ""}
	push(s.image("a", func(m *ocispec.Manifest) {
		m.Subject, m.ArtifactType, m.Annotations = target, "application/vnd.example.sbom", notes
	}),
		ocispec.MediaTypeImageManifest, "application/vnd.example.sbom", notes)
	push(s.image("a", func(m *ocispec.Manifest) { m.Subject = target }), ocispec.MediaTypeImageManifest,
		ocispec.MediaTypeImageConfig, nil)
	s.pushManifest("a", "subject", subject) // it may come later
	push(
		encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: ocispec.MediaTypeImageIndex, Subject: target,
			Manifests: []ocispec.Descriptor{}}), ocispec.MediaTypeImageIndex, "", nil)
	push(
		encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: ocispec.MediaTypeImageIndex, Subject: target,
			ArtifactType: "application/vnd.example.sbom", Manifests: []ocispec.Descriptor{}}),
		ocispec.MediaTypeImageIndex, "application/vnd.example.sbom", nil)
	// An index that lists the subject is no referrer, nor is one of another subject.
	s.do("PUT", "/v2/a/manifests/index", index(t, *target),
		"Content-Type", ocispec.MediaTypeImageIndex).want(http.StatusCreated)
	s.pushManifest("a", "of-another", s.image("a", func(m *ocispec.Manifest) {
		m.Subject = &ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: digest.SHA256.FromString("x"), Size: 1}
	}))
	slices.SortFunc(want, func(a, b ocispec.Descriptor) int {
		return strings.Compare(a.Digest.String(), b.Digest.String())
	})
	a := s.do("GET", path, nil)
	equal(t, a.referrers(), want)
	if a.next() != "" || a.header.Get("OCI-Filters-Applied") != "" {
		t.Errorf("Link %q, OCI-Filters-Applied %q", a.next(), a.header.Get("OCI-Filters-Applied"))
	}
	s.do("HEAD", path, nil).want(http.StatusOK, "Content-Type", ocispec.MediaTypeImageIndex,
		"Content-Length", size(a.body)).content(nil)
	for _, artifactType := range []string{
		"application/vnd.example.sbom", ocispec.MediaTypeImageConfig, "application/nothing"} {
		var some []ocispec.Descriptor
		for _, w := range want {
			if w.ArtifactType == artifactType {
				some = append(some, w)
			}
		}
		a := s.do("GET", path+"?artifactType="+url.QueryEscape(artifactType), nil).want(
			http.StatusOK, "OCI-Filters-Applied", "artifactType")
		equal(t, a.referrers(), some)
	}
	// What is deleted refers no more.
	s.do("DELETE", "/v2/a/manifests/"+want[0].Digest.String(), nil).want(http.StatusAccepted)
	equal(t, s.do("GET", path, nil).referrers(), want[1:])
	// With the subject its referrers go.
	s.do("DELETE", "/v2/a/manifests/index", nil).want(http.StatusAccepted)
	for _, bad := range []string{"sha256:x", "v1", "x:y", ""} {
		s.do("GET", "/v2/a/referrers/"+bad, nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
	}
}

func equal(t *testing.T, got, want []ocispec.Descriptor) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d referrers, want %d", len(got), len(want))
	}
	for i := range got {
		if string(encode(t, got[i])) != string(encode(t, want[i])) {
			t.Errorf("referrer %d is %s, want %s", i, encode(t, got[i]), encode(t, want[i]))
		}
	}
}

// TestManyReferrers: they come in pages that clients read, none twice, none lost.
func TestManyReferrers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := start(t, registry.Options{})
	target := &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.SHA256.FromString("absent"),
		Size: 1}
	var want []string
	for i := range 7 {
		m := s.image("a", func(m *ocispec.Manifest) {
			m.Subject, m.ArtifactType = target, "application/vnd.example.t"+itoa(i%2)
			m.Annotations = map[string]string{"n": itoa(i), "text": strings.Repeat("<", 1_300_000)}
		})
		want = append(want, s.pushManifest("a", "t"+itoa(i), m).String())
	}
	slices.Sort(want)
	for _, filter := range []string{"", "?artifactType=application%2Fvnd.example.t0"} {
		var got []string
		pages := 0
		for path := "/v2/a/referrers/" + target.Digest.String() + filter; path != ""; pages++ {
			a := s.do("GET", path, nil)
			if len(a.body) > 4<<20 {
				t.Errorf("a page has %d bytes", len(a.body))
			}
			for _, d := range a.referrers() {
				got = append(got, d.Digest.String())
			}
			if applied := a.header.Get("OCI-Filters-Applied"); (applied != "") != (filter != "") {
				t.Errorf("OCI-Filters-Applied is %q on page %d", applied, pages)
			}
			path = a.next()
		}
		if filter == "" && (!slices.Equal(got, want) || pages != 3) ||
			filter != "" && (len(got) != 4 || !slices.IsSorted(got) || pages != 2) {
			t.Errorf("filter %q: %d pages of %d referrers", filter, pages, len(got))
		}
	}
}
