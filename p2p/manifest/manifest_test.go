package manifest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// blob describes some content.
func blob(content string) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: "application/octet-stream", Digest: digest.SHA256.FromString(content), Size: int64(len(content)),
	}
}

func TestParse(t *testing.T) {
	config, layer, subject := blob("config"), blob("layer"), blob("subject")
	foreign := blob("foreign")
	foreign.URLs = []string{"https://example.com/layer"}
	data, err := json.Marshal(ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config, Layers: []ocispec.Descriptor{layer, foreign, layer}, Subject: &subject,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := &p2p.NewManifest{Refs: []digest.Digest{config.Digest, layer.Digest, foreign.Digest},
		Subject: subject.Digest}
	for _, mediaType := range []string{"", ocispec.MediaTypeImageManifest} {
		if got, err := manifest.Parse(mediaType, data); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("as %q: %+v, %v; want %+v", mediaType, got, err, want)
		}
	}
	index := []byte(fmt.Sprintf(`{"manifests":[{"digest":%q}]}`, layer.Digest))
	if got, err := manifest.Parse("application/vnd.other+json", index); err != nil ||
		!slices.Equal(got.Refs, []digest.Digest{layer.Digest}) || got.Subject != "" {
		t.Errorf("an index: %+v, %v", got, err)
	}
	for name, test := range map[string]struct {
		mediaType string
		data      []byte
	}{
		"not JSON":       {"", []byte("x")},
		"an array":       {"", []byte("[]")},
		"a bad digest":   {"", []byte(`{"config":{"digest":"sha256:x"}}`)},
		"another type":   {ocispec.MediaTypeImageIndex, data},
		"a type of text": {"a\nb", index},
		"too long":       {"", append([]byte("{}"), bytes.Repeat([]byte(" "), p2p.MaxManifest)...)},
	} {
		if got, err := manifest.Parse(test.mediaType, test.data); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// What is fetched from where nobody says what it is, is a manifest where it says so itself.
func TestDetect(t *testing.T) {
	d := digest.SHA256.FromString("x").String()
	desc := `{"mediaType":"a/b","digest":"` + d + `","size":1}`
	for content, want := range map[string]string{
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + desc +
			`,"layers":[]}`: ocispec.MediaTypeImageManifest,
		`{"schemaVersion":2,"config":` + desc + `,"layers":[` + desc +
			`]}`: ocispec.MediaTypeImageManifest,
		`{"schemaVersion":2,"manifests":[` + desc +
			`]}`: ocispec.MediaTypeImageIndex,
		`{}`:                  "",
		`{"schemaVersion":2}`: "",
		`{"schemaVersion":2,"mediaType":"application/json"}`:         "",
		`{"schemaVersion":2,"manifests":[{"digest":"sha256:x"}]}`:    "",
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json"}`: "",
		`[]`:   "",
		"text": "",
		"":     "",
	} {
		mediaType, m := manifest.Detect([]byte(content))
		if mediaType != want || (m != nil) != (want != "") {
			t.Errorf("%s is %q, %v; want %q", content, mediaType, m, want)
		}
	}
}

// What somebody says that a manifest is counts where it can be that.
func TestDescribe(t *testing.T) {
	desc := `{"mediaType":"a/b","digest":"` + digest.SHA256.FromString("x").String() + `","size":1}`
	const image, index, docker = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json"
	said := `{"schemaVersion":2,"mediaType":"` + image + `","layers":[` + desc + `]}`
	open := `{"schemaVersion":2,"config":` + desc + `,"layers":[` + desc + `]}`
	list := `{"schemaVersion":2,"manifests":[` + desc + `]}`
	own := `{"mediaType":"a/own","blobs":[` + desc + `]}`
	for _, test := range []struct {
		content, told, want string
		none                bool
	}{
		{said, image, image, false},
		{said, "", image, false},
		{said, "a/b", image, false},
		{said, index, image, false},
		{said, "a/\nb", image, false},
		{open, image, image, false},
		{open, docker, docker, false},
		{open, "a/own", "a/own", false},
		{open, index, image, false},
		{open, "", image, false},
		{open, "a/\nb", image, false},
		{list, image, index, false},
		{list, "a/own; x=y", "a/own", false},
		{own, "a/own", "a/own", false},
		{own, image, image, true},
		{"text", image, image, true},
		{"{}", "a/\nb", "a/\nb", true},
	} {
		mediaType, refs := manifest.Describe(test.told, []byte(test.content))
		if mediaType != test.want || (refs == nil) != test.none || refs != nil && len(refs.Refs) != 1 {
			t.Errorf("%s as %q: %q, %v; want %q", test.content, test.told, mediaType, refs, test.want)
		}
	}
}

// TestManyDescriptors: one that comes from elsewhere has no more than one that is pushed.
func TestManyDescriptors(t *testing.T) {
	of := func(n int) []byte {
		one := `{"mediaType":"application/x","digest":"` + string(digest.SHA256.FromString("")) + `","size":0},`
		return []byte(`{"schemaVersion":2,"config":` + strings.TrimSuffix(one, ",") + `,"layers":[` +
			strings.TrimSuffix(strings.Repeat(one, n-1), ",") + `]}`)
	}
	if _, err := manifest.Parse("", of(10_000)); err != nil {
		t.Error(err)
	}
	if mediaType, _ := manifest.Detect(of(10_000)); mediaType == "" {
		t.Error("10,000 are too many to be a manifest")
	}
	if _, err := manifest.Parse("", of(10_001)); !errors.Is(err, digest.ErrInvalid) ||
		!strings.Contains(err.Error(), "10001") {
		t.Errorf("10,001: %v", err)
	}
	if mediaType, _ := manifest.Detect(of(10_001)); mediaType != "" {
		t.Errorf("10,001 are %s", mediaType)
	}
}

// TestManyElements: a manifest that is small and becomes large in memory is refused
// before it does.
func TestManyElements(t *testing.T) {
	for name, many := range map[string]string{
		"annotations": `{"annotations":{` + strings.Repeat(`"":"",`, 600_000) + `"":""}}`,
		"URLs": `{"config":{"digest":"` + string(digest.SHA256.FromString("")) + `","urls":[` +
			strings.Repeat(`"",`, 1_300_000) + `""]}}`,
		"depth": `{"x":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`,
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := manifest.Parse("", []byte(many))
		runtime.ReadMemStats(&after)
		if !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if took := int(after.TotalAlloc - before.TotalAlloc); took > 2*len(many) {
			t.Errorf("%s: %d bytes are allocated for %d", name, took, len(many))
		}
	}
}
