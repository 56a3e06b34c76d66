package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// TestManifest: it is kept as it was sent, whatever is in it.
func TestManifest(t *testing.T) {
	s := start(t, registry.Options{})
	layer := []byte("layer")
	image := s.image("a", nil, layer)
	s.pushManifest("a", "image", image)
	imageDescriptor := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageManifest,
		digest.SHA256.FromBytes(image), len(image))
	index := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[` +
		imageDescriptor + `]}`)
	s.do("PUT", "/v2/a/manifests/nested", index, "Content-Type", ocispec.MediaTypeImageIndex).want(http.StatusCreated)
	for name, c := range map[string]struct {
		sent, kept string // Content-Type
		manifest   []byte
	}{
		"image": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest, image},
		"parameters": {ocispec.MediaTypeImageManifest + "; charset=utf-8", ocispec.MediaTypeImageManifest,
			s.image("a", nil, []byte("p"))},
		"no type": {"", ocispec.MediaTypeImageManifest, s.image("a", nil, []byte("q"))},
		"no type in it": {"", ocispec.MediaTypeImageManifest,
			s.image("a", func(m *ocispec.Manifest) { m.MediaType = "" }, []byte("r"))},
		"no type but of index": {"", ocispec.MediaTypeImageIndex, slices.Concat(index, []byte(" "))},
		"spaces": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest,
			append([]byte("  \n\t"), image...)},
		"unknown fields": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest,
			[]byte(`{"zzz": [1, {"x":null,"x":1}], "schemaVersion":2, "config": {"mediaType":"a/b","size":2,"b":[],` +
				`"digest":"` + digest.SHA256.FromString("{}").String() + `"}, "a":1}`)},
		"unknown type": {"application/vnd.example.thing+json",
			"application/vnd.example.thing+json", []byte(`{"thing":true}`)},
		"docker": {dockerManifest, dockerManifest,
			s.image("a", func(m *ocispec.Manifest) { m.MediaType = dockerManifest }, []byte("d"))},
		"docker list": {dockerList, dockerList,
			[]byte(`{"schemaVersion":2,"mediaType":"` + dockerList + `","manifests":[` + imageDescriptor + `]}`)},
		"index": {ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageIndex, index},
		"nested index": {ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageIndex,
			[]byte(`{"schemaVersion":2,"manifests":[` +
				fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageIndex,
					digest.SHA256.FromBytes(index), len(index)) + `]}`)},
		"empty index": {ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageIndex,
			[]byte(`{"schemaVersion":2,"manifests":[]}`)},
		"no layers": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest, s.image("a", nil)},
		"large": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageManifest,
			s.image("a", func(m *ocispec.Manifest) {
				m.Annotations = map[string]string{}
				for i := range 390 {
					m.Annotations[itoa(i)] = strings.Repeat("A", 10_000)
				}
			})},
		"largest": {"application/vnd.example+json", "application/vnd.example+json", padded(blobstore.MaxManifest)},
	} {
		tag := strings.ReplaceAll(name, " ", "-")
		for _, reference := range []digest.Digest{"", digest.SHA512.FromBytes(c.manifest)} {
			d, path := reference, "/v2/a/manifests/"+reference.String()
			if d == "" {
				d, path = digest.SHA256.FromBytes(c.manifest), "/v2/a/manifests/"+tag
			}
			var header []string
			if c.sent != "" {
				header = []string{"Content-Type", c.sent}
			}
			a := s.do("PUT", path, c.manifest, header...).
				want(http.StatusCreated, "Location", "/v2/a/manifests/"+d.String(), "Docker-Content-Digest", d.String(),
					"OCI-Subject", "", "OCI-Tag", "")
			described := []string{
				"Content-Type", c.kept, "Content-Length", size(c.manifest),
				"Docker-Content-Digest", d.String(), "Etag", `"` + d.String() + `"`,
			}
			for _, path := range []string{path, a.header.Get("Location")} {
				s.do("GET", path, nil).want(http.StatusOK, described...).content(c.manifest)
				s.do("GET", path, nil, "Accept", "application/vnd.example.other").want(
					http.StatusOK, described...).content(c.manifest)
				s.do("HEAD", path, nil).want(http.StatusOK, described...).content(nil)
			}
		}
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

// index returns an index of manifests.
func index(t *testing.T, manifests ...ocispec.Descriptor) []byte {
	t.Helper()
	return encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: manifests})
}

// TestTypeIsKept: what a tag answers is not changed by a push of the same bytes as something else.
func TestTypeIsKept(t *testing.T) {
	s := start(t, registry.Options{})
	const index = ocispec.MediaTypeImageIndex
	image := s.image("a", func(m *ocispec.Manifest) { m.MediaType = "" }, []byte("layer"))
	s.do("PUT", "/v2/a/manifests/first", image, "Content-Type", "text/plain").fails(
		http.StatusBadRequest, "MANIFEST_INVALID").contains("push it as that")
	s.pushManifest("a", "prod", image)
	thing := []byte(`{"thing":true}`)
	s.do("PUT", "/v2/a/manifests/thing", thing, "Content-Type", "application/vnd.example.a+json").want(
		http.StatusCreated)
	for _, mediaType := range []string{"text/plain", index, dockerManifest, "application/vnd.example.b+json"} {
		for _, m := range [][]byte{image, thing} {
			for _, reference := range []string{"other", "prod", digest.SHA256.FromBytes(m).String()} {
				s.do("PUT", "/v2/a/manifests/"+reference, m, "Content-Type", mediaType).fails(
					http.StatusBadRequest, "MANIFEST_INVALID").contains(mediaType)
			}
		}
	}
	s.do("GET", "/v2/a/manifests/prod", nil).want(http.StatusOK, "Content-Type", ocispec.MediaTypeImageManifest)
	s.do("GET", "/v2/a/manifests/thing", nil).want(http.StatusOK, "Content-Type", "application/vnd.example.a+json")
	s.do("GET", "/v2/a/tags/list", nil).lists("tags", "prod", "thing")
	for range 2 { // the same again is fine
		s.pushManifest("a", "again", image)
	}
	// In another repository it is something else, and a mount brings that to none where it is already.
	s.do("PUT", "/v2/b/manifests/thing", thing, "Content-Type", "application/vnd.example.b+json").want(
		http.StatusCreated)
	s.do("POST", "/v2/a/blobs/uploads/?from=b&mount="+digest.SHA256.FromBytes(thing).String(), nil).want(
		http.StatusCreated)
	s.do("GET", "/v2/a/manifests/thing", nil).want(http.StatusOK, "Content-Type", "application/vnd.example.a+json")
}

// padded returns a manifest of n bytes.
func padded(n int) []byte {
	return append([]byte(`{"schemaVersion":2}`), bytes.Repeat([]byte(" "), n-19)...)
}

func TestManifestIsAbsent(t *testing.T) {
	s := start(t, registry.Options{})
	s.pushManifest("a", "v1", s.image("a", nil))
	d := digest.SHA256.FromString("absent").String()
	for _, method := range []string{"GET", "HEAD", "DELETE"} {
		for _, reference := range []string{
			"v2", "V1", d, ".INVALID_MANIFEST_NAME", "-x", strings.Repeat("x", 129), "", "v1%20", "%00"} {
			s.do(method, "/v2/a/manifests/"+reference, nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
		}
		s.do(method, "/v2/b/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
		for _, reference := range []string{"sha256:baddigeststring", "sha1:" + d[7:47], "a:b"} {
			s.do(method, "/v2/a/manifests/"+reference, nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
		}
	}
	s.do("GET", "/v2/a/manifests/v1", nil).want(http.StatusOK)
}

func TestRefusedManifests(t *testing.T) {
	s := start(t, registry.Options{})
	image := s.image("a", nil)
	d := digest.SHA256.FromBytes(image)
	other := digest.SHA256.FromString("other")
	for _, c := range []struct {
		what, reference, mediaType string
		manifest                   []byte
		status                     int
		code                       string
	}{
		{"a tag that is none", ".INVALID_MANIFEST_NAME", ocispec.MediaTypeImageManifest, image, 400,
			"MANIFEST_INVALID"},
		{"no tag", "", ocispec.MediaTypeImageManifest, image, 400, "MANIFEST_INVALID"},
		{"a long tag", strings.Repeat("x", 129), ocispec.MediaTypeImageManifest, image, 400, "MANIFEST_INVALID"},
		{"a digest that is none", "sha256:baddigeststring", ocispec.MediaTypeImageManifest, image, 400,
			"DIGEST_INVALID"},
		{"the digest of other content", other.String(), ocispec.MediaTypeImageManifest, image, 400, "DIGEST_INVALID"},
		{"another sha512", digest.SHA512.FromString("other").String(), ocispec.MediaTypeImageManifest, image, 400,
			"DIGEST_INVALID"},
		{"the digest of other content, which is no manifest", other.String(), ocispec.MediaTypeImageManifest,
			[]byte("blob"), 400, "DIGEST_INVALID"},
		{"no JSON", "v1", ocispec.MediaTypeImageManifest, []byte("blob"), 400, "MANIFEST_INVALID"},
		{"broken JSON", "v1", ocispec.MediaTypeImageManifest, image[:len(image)-1], 400, "MANIFEST_INVALID"},
		{"two documents", "v1", ocispec.MediaTypeImageManifest, slices.Concat(image, image), 400, "MANIFEST_INVALID"},
		{"nothing", "v1", ocispec.MediaTypeImageManifest, nil, 400, "MANIFEST_INVALID"},
		{"an array", "v1", ocispec.MediaTypeImageManifest, []byte("[]"), 400, "MANIFEST_INVALID"},
		{"null", "v1", ocispec.MediaTypeImageManifest, []byte("null"), 400, "MANIFEST_INVALID"},
		{"layers that are none", "v1", ocispec.MediaTypeImageManifest, []byte(`{"layers":"x"}`), 400,
			"MANIFEST_INVALID"},
		{"a malformed digest in it", "v1", ocispec.MediaTypeImageManifest, []byte(`{"layers":[{"digest":"sha256:x"}]}`),
			400, "MANIFEST_INVALID"},
		{"a malformed digest of the subject", "v1", ocispec.MediaTypeImageManifest,
			[]byte(`{"subject":{"digest":"x"}}`), 400, "MANIFEST_INVALID"},
		{"another type than it says", "v1", ocispec.MediaTypeImageIndex, image, 400, "MANIFEST_INVALID"},
		{"a generic type", "v1", "application/json", image, 400, "MANIFEST_INVALID"},
		{"a malformed type", "v1", "/;;", image, 400, "MANIFEST_INVALID"},
		{"Docker schema 1", "v1", "application/vnd.docker.distribution.manifest.v1+prettyjws",
			[]byte(`{"schemaVersion":1}`), 400, "UNSUPPORTED"},
		{"Docker schema 1, not signed", "v1", "application/vnd.docker.distribution.manifest.v1+json",
			[]byte(`{"schemaVersion":1}`), 400, "UNSUPPORTED"},
		{"too much", "v1", "application/vnd.example+json", padded(blobstore.MaxManifest + 1), 413, "MANIFEST_INVALID"},
	} {
		s.do("PUT", "/v2/a/manifests/"+c.reference, c.manifest, "Content-Type", c.mediaType).fails(c.status, c.code)
		if t.Failed() {
			t.Fatal(c.what)
		}
	}
	s.do("PUT", "/v2/a/manifests/v1", streamed(padded(blobstore.MaxManifest+1))).fails(
		http.StatusRequestEntityTooLarge, "MANIFEST_INVALID")
	s.do("GET", "/v2/a/tags/list", nil).fails(http.StatusNotFound, "NAME_UNKNOWN")
	s.do("GET", "/v2/a/manifests/"+d.String(), nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
}

// TestTooLargeIsRefusedAtOnce: not after reading it.
func TestTooLargeIsRefusedAtOnce(t *testing.T) {
	s := start(t, registry.Options{})
	c := s.dial()
	c.send("PUT", "/v2/a/manifests/v1", 1<<40, nil)
	c.answer("PUT").fails(http.StatusRequestEntityTooLarge, "MANIFEST_INVALID")
}

// TestMissingReferences: a manifest comes after what it refers to, but for its
// subject and what is not for distribution.
func TestMissingReferences(t *testing.T) {
	s := start(t, registry.Options{})
	missing := []byte("missing")
	d := digest.SHA256.FromBytes(missing)
	descriptor := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: int64(len(missing))}
	s.pushBlob("other", missing)
	for what, manifest := range map[string][]byte{
		"config": s.image("a", func(m *ocispec.Manifest) { m.Config = descriptor }),
		"layer": s.image("a", func(m *ocispec.Manifest) { m.Layers = append(m.Layers, descriptor) },
			[]byte("there")),
		"manifest": index(t, descriptor),
	} {
		a := s.do("PUT", "/v2/a/manifests/v1", manifest).fails(http.StatusNotFound, "MANIFEST_BLOB_UNKNOWN")
		a.contains(d.String())
		var detail struct{ Digest string }
		if err := json.Unmarshal(a.problem().Detail, &detail); err != nil || detail.Digest != d.String() {
			t.Errorf("%s: the detail does not name %s: %s", what, d, a.body)
		}
		s.do("GET", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	}
	foreign := []ocispec.Descriptor{
		{MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Digest: d, Size: 7},
		{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: d, Size: 7},
		{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: 7, URLs: []string{"https://example.com/layer"}},
	}
	for i, layer := range foreign {
		s.pushManifest("a", "foreign"+itoa(i),
			s.image("a", func(m *ocispec.Manifest) { m.Layers = append(m.Layers, layer) }))
	}
	m := s.image("a", func(m *ocispec.Manifest) { m.Subject = &descriptor })
	s.do("PUT", "/v2/a/manifests/subject", m).want(http.StatusCreated, "OCI-Subject", d.String())
	s.pushBlob("a", missing)
	s.pushManifest("a", "v1", s.image("a", nil, missing))
}

// TestTagParameters: one push by digest points many tags to it.
func TestTagParameters(t *testing.T) {
	s := start(t, registry.Options{})
	m := s.image("a", nil)
	for i, d := range []digest.Digest{digest.SHA256.FromBytes(m), digest.SHA512.FromBytes(m)} {
		one, two := "one"+itoa(i), "two"+itoa(i)
		s.do("PUT", "/v2/a/manifests/"+d.String()+"?tag="+one+"&tag="+two, m,
			"Content-Type", ocispec.MediaTypeImageManifest).
			want(http.StatusCreated, "OCI-Tag", one+", "+two, "Docker-Content-Digest", d.String(),
				"Location", "/v2/a/manifests/"+d.String())
		for _, tag := range []string{one, two} {
			s.do("GET", "/v2/a/manifests/"+tag, nil).want(http.StatusOK, "Docker-Content-Digest", d.String()).content(m)
		}
	}
	s.do("GET", "/v2/a/tags/list", nil).lists("tags", "one0", "one1", "two0", "two1")
	// Tags move to what is pushed by digest, and what is there is not sent for nothing.
	other := s.image("a", nil, []byte("other"))
	d := digest.SHA256.FromBytes(other)
	for range 2 {
		s.do("PUT", "/v2/a/manifests/"+d.String()+"?tag=one0", other).want(http.StatusCreated, "OCI-Tag", "one0")
		s.do("GET", "/v2/a/manifests/one0", nil).want(http.StatusOK).content(other)
	}
	for _, bad := range []string{"", ".x", d.String(), "a/b", strings.Repeat("x", 129)} {
		s.do("PUT", "/v2/a/manifests/"+d.String()+"?tag=good&tag="+bad, other).fails(
			http.StatusBadRequest, "MANIFEST_INVALID")
	}
	s.do("PUT", "/v2/a/manifests/v1?tag=v2", other).fails(http.StatusBadRequest, "UNSUPPORTED")
	s.do("GET", "/v2/a/manifests/good", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
}

func TestMoveTag(t *testing.T) {
	s := start(t, registry.Options{})
	first, second := s.image("a", nil, []byte("1")), s.image("a", nil, []byte("2"))
	s.pushManifest("a", "v1", first)
	s.pushManifest("a", "v1", second)
	s.do("GET", "/v2/a/manifests/v1", nil).want(http.StatusOK).content(second)
	// What the tag pointed to before stays, as the specification has it.
	s.do("GET", "/v2/a/manifests/"+digest.SHA256.FromBytes(first).String(), nil).want(http.StatusOK).content(first)
}

func TestDeleteManifest(t *testing.T) {
	s := start(t, registry.Options{})
	layer := []byte("layer")
	m := s.image("a", nil, layer)
	d := s.pushManifest("a", "v1", m)
	s.pushManifest("a", "v2", m)
	s.do("DELETE", "/v2/a/manifests/v1", nil).want(http.StatusAccepted, "Content-Length", "0")
	s.do("GET", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	s.do("DELETE", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	s.do("GET", "/v2/a/manifests/v2", nil).want(http.StatusOK).content(m)
	s.do("DELETE", "/v2/a/manifests/v2", nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/manifests/"+d.String(), nil).want(http.StatusOK).content(m) // the manifest stays
	s.do("GET", "/v2/a/tags/list", nil).lists("tags")
	s.pushManifest("a", "v3", m)
	// By digest it goes with its tags.
	s.do("DELETE", "/v2/a/manifests/"+d.String(), nil).want(http.StatusAccepted)
	for _, path := range []string{"/v2/a/manifests/" + d.String(), "/v2/a/manifests/v3"} {
		s.do("HEAD", path, nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
		s.do("GET", path, nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	}
	s.do("DELETE", "/v2/a/manifests/"+d.String(), nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	// A blob is no manifest.
	blob := s.pushBlob("a", []byte("blob"))
	s.do("DELETE", "/v2/a/manifests/"+blob.String(), nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	s.do("HEAD", "/v2/a/blobs/"+blob.String(), nil).want(http.StatusOK)
	// One that an index refers to stays.
	child := s.pushManifest("a", "child", m2(s))
	s.do("PUT", "/v2/a/manifests/index",
		index(t, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: child, Size: int64(len(m2(s)))}),
		"Content-Type", ocispec.MediaTypeImageIndex).want(http.StatusCreated)
	s.do("DELETE", "/v2/a/manifests/"+child.String(), nil).fails(http.StatusMethodNotAllowed, "DENIED").contains(
		"index")
	s.do("DELETE", "/v2/a/manifests/child", nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/manifests/"+child.String(), nil).want(http.StatusOK)
}

func m2(s *server) []byte { return s.image("a", nil, []byte("of an index")) }

// TestPushedFileIsAFile: both doors lead to the same.
func TestPushedFileIsAFile(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(100_000, 1)
	s.pushManifest("models", "v2", s.image("models", func(m *ocispec.Manifest) {
		m.Layers[0].Annotations = map[string]string{ocispec.AnnotationTitle: "model.bin"}
	}, data))
	repo, err := s.store.Repository("models")
	if err != nil {
		t.Fatal(err)
	}
	f, err := repo.Stat(t.Context(), "v2", blobstore.Lookup{})
	if err != nil || f.Digest != digest.SHA256.FromBytes(data) || f.Title != "model.bin" {
		t.Errorf("stat: %+v, %v", f, err)
	}
	var out bytes.Buffer
	if _, err := repo.Export(t.Context(), "v2", &out, blobstore.ExportOptions{}); err != nil ||
		!bytes.Equal(out.Bytes(), data) {
		t.Errorf("export: %d bytes, %v", out.Len(), err)
	}
}

// TestContradictedManifests: a manifest that says another size than a blob has, and one that
// refers to too much, are refused.
func TestContradictedManifests(t *testing.T) {
	s := start(t, registry.Options{})
	layer := s.pushBlob("a", []byte("layer"))
	config := `{"mediaType":"application/x","digest":"` + layer.String() + `","size":5}`
	manifest := func(layers string) []byte {
		return []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + config +
			`,"layers":[` + layers + `]}`)
	}
	of := func(size string) []byte {
		return manifest(`{"mediaType":"application/x","digest":"` + layer.String() + `","size":` + size + `}`)
	}
	for _, size := range []string{"4", "6", "1000000000000000", "-5"} {
		s.do("PUT", "/v2/a/manifests/v1", of(size)).fails(http.StatusBadRequest, "MANIFEST_INVALID").contains("has 5")
	}
	s.do("PUT", "/v2/a/manifests/v1", of("5")).want(http.StatusCreated)
	many := strings.Repeat(`{"mediaType":"application/x","digest":"`+layer.String()+`","size":5},`, 9_999)
	s.do("PUT", "/v2/a/manifests/v2", manifest(strings.TrimSuffix(many, ","))).want(http.StatusCreated)
	s.do("PUT", "/v2/a/manifests/v3", manifest(many+many[:len(many)/9_999-1])).fails(
		http.StatusBadRequest, "MANIFEST_INVALID").contains("10001")
}
