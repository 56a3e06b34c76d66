package blobstore_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// blob describes text as a layer.
func blob(text string) ocispec.Descriptor {
	return content.NewDescriptorFromBytes(ocispec.MediaTypeImageLayer, []byte(text))
}

// image returns the manifest of an image.
func image(m ocispec.Manifest) []byte {
	m.SchemaVersion, m.MediaType = 2, ocispec.MediaTypeImageManifest
	data, err := json.Marshal(m)
	if err != nil {
		panic(err) // of a struct that can be marshalled
	}
	return data
}

// pushBlobs pushes texts as blobs.
func pushBlobs(t *testing.T, r *blobstore.Repository, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if err := r.Push(t.Context(), blob(text), strings.NewReader(text)); err != nil {
			t.Fatalf("push: %v", err)
		}
	}
}

func mustPushManifest(t *testing.T, r *blobstore.Repository, data []byte, tags ...string) blobstore.Manifest {
	t.Helper()
	m, err := r.PushManifest(t.Context(), data, blobstore.ManifestOptions{Tags: tags})
	if err != nil {
		t.Fatalf("push a manifest: %v", err)
	}
	return m
}

func tags(t *testing.T, r *blobstore.Repository) []string {
	t.Helper()
	all := []string{}
	if err := r.Tags(t.Context(), "", func(tags []string) error {
		all = append(all, tags...)
		return nil
	}); err != nil {
		t.Error(err)
	}
	return all
}

func TestPushManifest(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		subject := blob("not here")
		// Spaces, unknown fields and the order of fields stay as they are.
		data := fmt.Appendf(
			nil, " {\n\t\"unknown\": [1, 2], \"subject\": {\"digest\": %q, \"size\": 8, \"mediaType\": \"x/y\"},"+
				"\"layers\": [], \"config\": {\"digest\": %q, \"size\": 6, \"mediaType\": \"application/x-config\"}, "+
				"\"annotations\": {\"a\": \"b\"}} \n",
			subject.Digest, blob("config").Digest)
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			opts := blobstore.ManifestOptions{
				MediaType: "application/x-thing; charset=utf-8", Tags: []string{"v1", "v2"}}
			if alg != digest.SHA256 {
				opts.Digest = alg.FromBytes(data) // else the default
			}
			for range 2 { // the second time it is there
				pushed, err := r.PushManifest(t.Context(), data, opts)
				if err != nil {
					t.Fatal(err)
				}
				if pushed.Digest != alg.FromBytes(data) || pushed.Size != int64(len(data)) ||
					pushed.MediaType != "application/x-thing" ||
					pushed.ArtifactType != "application/x-config" || pushed.Annotations["a"] != "b" ||
					pushed.Subject != subject.Digest || !bytes.Equal(pushed.Content, data) {
					t.Errorf("pushed: %+v", pushed)
				}
				for _, reference := range []string{"v1", "v2", pushed.Digest.String()} {
					got, err := r.Manifest(t.Context(), reference)
					if err != nil || !content.Equal(got.Descriptor, pushed.Descriptor) ||
						!bytes.Equal(got.Content, data) || got.Subject != subject.Digest ||
						got.ArtifactType != pushed.ArtifactType || got.Annotations["a"] != "b" {
						t.Errorf("manifest %s: %+v, %v; want %+v", reference, got, err, pushed)
					}
				}
			}
		}
		if got, want := tags(t, r), []string{"v1", "v2"}; !slices.Equal(got, want) {
			t.Errorf("tags are %q, want %q", got, want)
		}
	})
}

func TestManifestMediaType(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		const docker = "application/vnd.docker.distribution.manifest.v2+json"
		for i, c := range []struct{ given, in, more, want string }{ // want "" is an error
			{"", "", "", ocispec.MediaTypeImageManifest},
			{"", "", `"manifests":[]`, ocispec.MediaTypeImageIndex},
			{"", docker, "", docker},
			{docker, "", "", docker},
			{docker, docker, "", docker},
			{docker + "; charset=utf-8", docker, "", docker},
			{" " + docker + " ;x", docker, "", docker},
			{"application/vnd.Example.Thing+json", "", "", "application/vnd.Example.Thing+json"},
			{"application/vnd.Example.Thing+json",
				"application/vnd.Example.Thing+json", "", "application/vnd.Example.Thing+json"},
			{"", strings.Repeat("x", 255), "", strings.Repeat("x", 255)},
			{docker, ocispec.MediaTypeImageManifest, "", ""},
			{"", "a/b\r\nSet-Cookie: x", "", ""},
			{"a/b\x00", "", "", ""},
			{"", "a/ü", "", ""},
			{"", strings.Repeat("x", 256), "", ""},
		} {
			name, err := json.Marshal(c.in)
			if err != nil {
				t.Fatal(err)
			}
			if c.more == "" {
				c.more = fmt.Sprintf(`"config":{"digest":%q}`, blob("config").Digest)
			}
			data := fmt.Appendf(nil, `{"number":%d,"schemaVersion":2,"mediaType":%s,%s}`, i, name, c.more)
			m, err := r.PushManifest(t.Context(), data,
				blobstore.ManifestOptions{MediaType: c.given, Tags: []string{"tag"}})
			if c.want == "" {
				if !errors.Is(err, blobstore.ErrInvalid) {
					t.Errorf("pushed as %q, in it %q: %v", c.given, c.in, err)
				}
				requireGone(t, r, digest.SHA256.FromBytes(data))
				continue
			}
			if err != nil || m.MediaType != c.want {
				t.Errorf("pushed as %q, in it %q: %q, %v; want %q", c.given, c.in, m.MediaType, err, c.want)
			}
			if got, err := r.Resolve(t.Context(), "tag"); err != nil || got.MediaType != c.want {
				t.Errorf("pushed as %q, in it %q, and resolved: %q, %v; want %q", c.given, c.in, got.MediaType, err,
					c.want)
			}
		}
		// A blob's media type can't be anything either.
		bad := blob("text")
		bad.MediaType = "a/b\n"
		err := r.Push(t.Context(), bad, strings.NewReader("text"))
		if !errors.Is(err, blobstore.ErrInvalid) || !errors.Is(err, errdef.ErrInvalidMediaType) {
			t.Errorf("push of a blob of type %q: %v", bad.MediaType, err)
		}
	})
}

func TestPushManifestErrors(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		good := image(ocispec.Manifest{Config: blob("config")})
		large := append(good, bytes.Repeat([]byte(" "), blobstore.MaxManifest)...)
		for what, c := range map[string]struct {
			data []byte
			opts blobstore.ManifestOptions
			want []error
		}{
			"nothing":        {nil, blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"text":           {[]byte("hello"), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"an array":       {[]byte("[]"), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"null":           {[]byte("null"), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"half an object": {good[:len(good)/2], blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"two objects": {
				append(bytes.Clone(good), good...), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"bad layers": {
				[]byte(`{"layers":{}}`), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"no digest": {
				[]byte(`{"layers":[{"mediaType":"a/b"}]}`), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"a bad digest": {[]byte(`{"config":{"digest":"sha256:../../x"}}`), blobstore.ManifestOptions{},
				[]error{blobstore.ErrInvalid}},
			"a bad index": {[]byte(`{"manifests":[{"digest":"md5:x"}]}`), blobstore.ManifestOptions{},
				[]error{blobstore.ErrInvalid}},
			"a bad subject": {
				[]byte(`{"subject":{"digest":"x"}}`), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"a bad artifact": {
				[]byte(`{"blobs":[{"digest":""}]}`), blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid}},
			"too large": {
				large, blobstore.ManifestOptions{}, []error{blobstore.ErrInvalid, errdef.ErrSizeExceedsLimit}},
			"another digest": {good, blobstore.ManifestOptions{Digest: digest.SHA256.FromString("x")},
				[]error{blobstore.ErrMismatch, content.ErrMismatchedDigest}},
			"another and no manifest": {[]byte("x"), blobstore.ManifestOptions{Digest: digest.SHA512.FromString("y")},
				[]error{blobstore.ErrMismatch}},
			"an invalid digest": {good, blobstore.ManifestOptions{Digest: "sha256:x"},
				[]error{blobstore.ErrInvalid, errdef.ErrInvalidDigest}},
			"an invalid tag": {good, blobstore.ManifestOptions{Tags: []string{"ok", "a/b"}},
				[]error{blobstore.ErrInvalid, errdef.ErrInvalidReference}},
			"an empty tag": {good, blobstore.ManifestOptions{Tags: []string{""}},
				[]error{blobstore.ErrInvalid, errdef.ErrMissingReference}},
			"a digest for a tag": {
				good, blobstore.ManifestOptions{Tags: []string{digest.SHA256.FromBytes(good).String()}},
				[]error{blobstore.ErrInvalid, errdef.ErrInvalidReference}},
			"missing content": {
				good, blobstore.ManifestOptions{CheckRefs: true}, []error{blobstore.ErrMissingRef}},
		} {
			c.opts.Tags = append(c.opts.Tags, "tag")
			m, err := r.PushManifest(t.Context(), c.data, c.opts)
			for _, want := range c.want {
				if !errors.Is(err, want) {
					t.Errorf("push of %s: %v; want %v", what, err, want)
				}
			}
			if m.Digest != "" {
				t.Errorf("push of %s gives %+v", what, m.Descriptor)
			}
			requireGone(t, r, digest.SHA256.FromBytes(c.data))
		}
		if got := tags(t, r); len(got) != 0 {
			t.Errorf("the tags %q are there", got)
		}
		// The largest one there can be.
		limit := append(bytes.Clone(good), bytes.Repeat([]byte(" "), blobstore.MaxManifest-len(good))...)
		m := mustPushManifest(t, r, limit, "large")
		if got, err := r.Manifest(t.Context(), "large"); err != nil || !bytes.Equal(got.Content, limit) {
			t.Errorf("the largest manifest: %d bytes, %v", len(got.Content), err)
		}
		for _, d := range []ocispec.Descriptor{
			content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, large),
			{MediaType: ocispec.MediaTypeImageIndex, Digest: m.Digest[:len(m.Digest)-1] + "0", Size: 1 << 60},
		} {
			if err := r.Push(t.Context(), d, bytes.NewReader(large)); !errors.Is(err, errdef.ErrSizeExceedsLimit) {
				t.Errorf("push of a manifest of %d bytes: %v", d.Size, err)
			}
		}
	})
}

// TestManifestReference: only what was stored as a manifest is one.
func TestManifestReference(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		data := image(ocispec.Manifest{Config: blob("config")})
		d := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, data)
		f := mustImport(t, r, "", data, "") // a blob that happens to have its bytes
		if f.Digest != d.Digest {
			t.Fatal("another digest")
		}
		for _, c := range []struct {
			reference string
			want      error
		}{
			{d.Digest.String(), blobstore.ErrNotFound}, {d.Digest.String(), errdef.ErrNotFound},
			{"absent", blobstore.ErrNotFound}, {blob("absent").Digest.String(), errdef.ErrNotFound},
			{"", errdef.ErrMissingReference}, {"a b", errdef.ErrInvalidReference},
			{"sha256:x", errdef.ErrInvalidReference}, {"a b", blobstore.ErrInvalid},
		} {
			if m, err := r.Manifest(t.Context(), c.reference); !errors.Is(err, c.want) {
				t.Errorf("manifest %q: %+v, %v; want %v", c.reference, m, err, c.want)
			}
		}
		// To a copy it is not there as long as it is no manifest.
		if exists, err := r.Exists(t.Context(), d); exists || err != nil {
			t.Errorf("a manifest that is only a blob is there: %t, %v", exists, err)
		}
		if err := r.PushReference(t.Context(), d, bytes.NewReader(data), "v1"); err != nil {
			t.Errorf("push: %v", err)
		}
		if exists, err := r.Exists(t.Context(), d); !exists || err != nil {
			t.Errorf("the manifest is there: %t, %v", exists, err)
		}
		if m, err := r.Manifest(t.Context(), "v1"); err != nil || !content.Equal(m.Descriptor, d) {
			t.Errorf("manifest: %+v, %v; want %+v", m.Descriptor, err, d)
		}
		if found, err := r.Predecessors(t.Context(), blob("config")); err != nil || len(found) != 1 {
			t.Errorf("predecessors of the config: %v, %v", found, err)
		}
	})
}

func TestCheckRefs(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		pushBlobs(t, repository(t, s, "other"), "layer") // under another tag it is not here
		push := func(data []byte) error {
			_, err := r.PushManifest(t.Context(), data,
				blobstore.ManifestOptions{CheckRefs: true, Tags: []string{"v1"}})
			return err
		}
		absent := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, []byte(`{"absent":true}`))
		foreign, docker, urls := blob("foreign"), blob("docker"), blob("urls")
		foreign.MediaType =
			ocispec.MediaTypeImageLayerNonDistributableGzip //nolint:staticcheck // images with such layers exist
		docker.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		urls.URLs = []string{"https://example.org/layer"}
		m := image(ocispec.Manifest{
			Config: blob("config"), Subject: &absent,
			Layers: []ocispec.Descriptor{blob("layer"), foreign, docker, urls, blob("layer")},
		})
		for _, missing := range []string{"config", "layer"} {
			err := push(m)
			if !errors.Is(err, blobstore.ErrMissingRef) ||
				!strings.Contains(err.Error(), blob(missing).Digest.String()) {
				t.Errorf("push: %v; want %v of %s", err, blobstore.ErrMissingRef, missing)
			}
			if e, ok := errors.AsType[*p2p.MissingRefError](err); !ok || e.Missing != blob(missing).Digest ||
				e.Manifest != digest.SHA256.FromBytes(m) {
				t.Errorf("push: %+v; want a MissingRefError of %s", e, missing)
			}
			requireGone(t, r, digest.SHA256.FromBytes(m))
			pushBlobs(t, r, missing)
		}
		if err := push(m); err != nil {
			t.Errorf("push of an image whose parts are there: %v", err)
		}
		index := func(manifests ...ocispec.Descriptor) []byte {
			data, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
				MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests})
			if err != nil {
				t.Fatal(err)
			}
			return data
		}
		if err := push(index(absent)); !errors.Is(err, blobstore.ErrMissingRef) ||
			!strings.Contains(err.Error(), absent.Digest.String()) {
			t.Errorf("push of an index of an absent manifest: %v", err)
		}
		for _, data := range [][]byte{
			index(content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, m)), index(),
			[]byte(`{"schemaVersion":2,"manifests":[]}`),
		} {
			if err := push(data); err != nil {
				t.Errorf("push of %s: %v", data, err)
			}
		}
		// Without the check anything goes.
		mustPushManifest(t, r, index(absent), "unchecked")
	})
}

// TestHostileManifest: what is wrong with a manifest is said in a few words,
// and what little text can be made of is not made in memory.
func TestHostileManifest(t *testing.T) {
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "t")
	long := strings.Repeat("9", blobstore.MaxManifest-1000)
	good := blob("config").Digest
	for what, text := range map[string]string{
		"descriptors without a digest": `{"layers":[{}` + strings.Repeat(",{}", blobstore.MaxManifest/3-10) + `]}`,
		"descriptors that are null": `{"manifests":[null` + strings.Repeat(",null", blobstore.MaxManifest/5-10) +
			`]}`,
		"a long digest":                `{"config":{"digest":"sha256:` + long + `"}}`,
		"a long algorithm":             `{"config":{"digest":"` + long + `:x"}}`,
		"a long media type":            `{"config":{"digest":"x","mediaType":"` + long + `"}}`,
		"a long media type of its own": `{"mediaType":"` + long + `"}`,
		"a long number":                `{"schemaVersion":` + long + `}`,
		"a long size":                  fmt.Sprintf(`{"config":{"digest":%q,"size":%s}}`, good, long),
		"a long string for a number":   `{"schemaVersion":"` + long + `"}`,
		"deep nesting": `{"x":` + strings.Repeat("[", blobstore.MaxManifest/2-10) +
			strings.Repeat("]", blobstore.MaxManifest/2-10) + `}`,
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := r.PushManifest(t.Context(), []byte(text), blobstore.ManifestOptions{})
		runtime.ReadMemStats(&after)
		if !errors.Is(err, blobstore.ErrInvalid) {
			t.Errorf("%s: %.300v", what, err)
			continue
		}
		if n := len(err.Error()); n > 1000 {
			t.Errorf("%s: the error has %d bytes: %.300v", what, n, err)
		}
		if made := after.TotalAlloc - before.TotalAlloc; made > 32*blobstore.MaxManifest {
			t.Errorf("%s: %d MiB were made of it in memory", what, made>>20)
		}
	}
}

// TestOtherType: no method makes something else of a manifest, or of what a tag points to.
func TestOtherType(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		const docker = "application/vnd.docker.distribution.manifest.v2+json"
		pushBlobs(t, r, "config")
		data, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: blob("config"),
			Layers: []ocispec.Descriptor{}})
		if err != nil {
			t.Fatal(err)
		}
		desc := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, data)
		if err := r.PushReference(t.Context(), desc, bytes.NewReader(data), "prod"); err != nil {
			t.Fatal(err)
		}
		for _, mediaType := range []string{docker, ocispec.MediaTypeImageIndex, "text/plain"} {
			other := content.NewDescriptorFromBytes(mediaType, data)
			_, err := oras.TagBytes(t.Context(), r, mediaType, data, "other")
			if !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("TagBytes as %s: %v", mediaType, err)
			}
			if err := r.Tag(t.Context(), other, "other"); !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("Tag as %s: %v", mediaType, err)
			}
			err = r.Push(t.Context(), other, bytes.NewReader(data))
			if mediaType == "text/plain" && !errors.Is(err, errdef.ErrAlreadyExists) ||
				mediaType != "text/plain" && !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("Push as %s: %v", mediaType, err)
			}
			if _, err := r.PushManifest(t.Context(), data, blobstore.ManifestOptions{MediaType: mediaType,
				Tags: []string{"other"}}); !errors.Is(err, blobstore.ErrInvalid) {
				t.Errorf("PushManifest as %s: %v", mediaType, err)
			}
			if got, err := r.Resolve(t.Context(), "prod"); err != nil || !content.Equal(got, desc) {
				t.Fatalf("after it came as %s: %v, %v", mediaType, got, err)
			}
		}
		if got := tags(t, r); len(got) != 1 {
			t.Errorf("tags: %v", got)
		}
		for _, tag := range []string{"prod", "again"} {
			if got, err := oras.TagBytes(t.Context(), r, desc.MediaType, data, tag); err != nil ||
				!content.Equal(got, desc) {
				t.Errorf("TagBytes again: %v, %v", got, err)
			}
		}
		// A tag can point to a blob.
		text := content.NewDescriptorFromBytes("text/plain", []byte("text"))
		for mediaType, want := range map[string]error{"text/plain": nil, "text/html": blobstore.ErrInvalid} {
			if _, err := oras.TagBytes(t.Context(), r, "text/plain", []byte("text"), "text"); err != nil {
				t.Fatal(err)
			}
			if _, err := oras.TagBytes(t.Context(), r, mediaType, []byte("text"), "more"); !errors.Is(err, want) {
				t.Errorf("a blob as %s: %v", mediaType, err)
			}
			if got, err := r.Resolve(t.Context(), "text"); err != nil || !content.Equal(got, text) {
				t.Errorf("the blob is %v, %v", got, err)
			}
		}
	})
}

// TestTaggedDescriptor: what a descriptor says is kept with its tag when the store is opened again, as far
// as it is not too much.
func TestTaggedDescriptor(t *testing.T) {
	dir := t.TempDir()
	open := func() (*blobstore.Store, *blobstore.Repository) {
		t.Helper()
		s, err := blobstore.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s, repository(t, s, "t")
	}
	s, r := open()
	desc := mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("config")})).Descriptor
	many := map[string]string{}
	for i := range 257 {
		many[fmt.Sprint(i)] = ""
	}
	said := map[string]map[string]string{
		"v1": {"a": "b"}, "v2": {"a": strings.Repeat("x", p2p.MaxDescription)}, "v3": many, "v4": {"a": "<\x00\u2028>"}}
	for tag, annotations := range said {
		desc.Annotations = annotations
		if err := r.Tag(t.Context(), desc, tag); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, r = open()
	defer s.Close()
	said["v2"], said["v3"] = nil, nil
	for tag, want := range said {
		// A push by a client that says nothing of it leaves it as it is.
		mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("config")}), tag)
		if got, err := r.Resolve(t.Context(), tag); err != nil || !maps.Equal(got.Annotations, want) {
			t.Errorf("%s: %v, %v; want %v", tag, got.Annotations, err, want)
		}
	}
	mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("other")}), "v1")
	if got, err := r.Resolve(t.Context(), "v1"); err != nil || got.Annotations != nil {
		t.Errorf("a tag that was moved: %v, %v", got.Annotations, err)
	}
}
