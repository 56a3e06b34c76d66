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

	specs "github.com/opencontainers/image-spec/specs-go"
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
		Versioned: specs.Versioned{SchemaVersion: 2},
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
	said := `{"schemaVersion":2,"mediaType":"` + image + `","config":` + desc + `,"layers":[` + desc + `]}`
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
		{open, "a/own", image, false},
		{open, index, image, false},
		{open, "", image, false},
		{open, "a/\nb", image, false},
		{list, image, index, false},
		{list, "a/own; x=y", index, false},
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

// What two programs read in two ways is refused where it comes in, as what is checked here would not
// be what others see; what is stored already can be read.
func TestAmbiguous(t *testing.T) {
	const image, index = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	d := digest.SHA256.FromString("hello").String()
	desc := `{"mediaType":"a/b","digest":"` + d + `","size":5}`
	whole := func(more string) string {
		return `{"schemaVersion":2,"config":` + desc + `,"layers":[` + desc + `]` + more + `}`
	}
	with := func(more string) string {
		return `{"schemaVersion":2,"config":` + desc + `,"layers":[{"mediaType":"a/b","digest":"` + d + `","size":5` +
			more + `}]}`
	}
	for text, says := range map[string]string{
		whole(`,"manifests":[` + desc + `]`):          "more than one",
		whole(`,"manifests":[]`):                      "more than one",
		whole(`,"blobs":[` + desc + `]`):              "more than one",
		whole(`,"layers":[]`):                         `"layers" twice`,
		whole(`,"l\u0061yers":[]`):                    `"layers" twice`,
		whole(`,"config":null`):                       `"config" twice`,
		whole(`,"x":1,"x":2`):                         `"x" twice`,
		whole(`,"Layers":[]`):                         `"Layers", which some read as "layers"`,
		whole(`,"layer\u017f":[]`):                    `which some read as "layers"`,
		whole(",\"layer\u017f\":[]"):                  `which some read as "layers"`,
		whole(`,"MANIFESTS":[]`):                      `which some read as "manifests"`,
		whole(`,"MediaType":"a/b"`):                   `which some read as "mediaType"`,
		whole(`,"Subject":` + desc):                   `which some read as "subject"`,
		whole(`,"annotations":{"a":"1","a":"2"}`):     `"a" twice`,
		whole(`,"fsLayers":[]`):                       "fsLayers",
		with(`,"digest":"` + d + `"`):                 `"digest" twice`,
		with(`,"Digest":"` + d + `"`):                 `which some read as "digest"`,
		with(`,"\u017fize":7`):                        `which some read as "size"`,
		with(`,"annotations":{"a":"1","a":"2"}`):      `"a" twice`,
		with(`,"platform":{"os":"a","OS":"b"}`):       `which some read as "os"`,
		with(`,"platform":{"os":"a","os":"b"}`):       `"os" twice`,
		with(`,"data":"aGVsbG8x"`):                    "embedded",
		with(`,"data":"aGVsbHU="`):                    "embedded",
		`{}`:                                          "config",
		`{"schemaVersion":2}`:                         "config",
		`{"schemaVersion":2,"config":null}`:           "config",
		`{"schemaVersion":2,"manifests":[]}`:          "no manifests",
		strings.Replace(whole(""), "2", "1", 1):       "schemaVersion is 1",
		strings.Replace(whole(""), "2", "3", 1):       "schemaVersion is 3",
		strings.Replace(whole(""), "2", `"2"`, 1):     "JSON",
		whole(`,"mediaType":"` + index + `"`):         index,
		whole(`,"mediaType":"` + dockerImage + `"`):   dockerImage,
		whole(`,"subject":{"digest":"x","size":1}`):   "digest",
		whole(`,"subject":` + desc + `,"subject":{}`): `"subject" twice`,
	} {
		_, err := manifest.Parse(image, []byte(text))
		if !errors.Is(err, digest.ErrInvalid) || !strings.Contains(fmt.Sprint(err), says) {
			t.Errorf("%s: %v, want that it says %q", text, err, says)
		}
		if mediaType, refs := manifest.Describe(image, []byte(text)); refs != nil && mediaType == image {
			t.Errorf("%s of a peer is an image", text)
		}
	}
	for _, test := range []struct{ mediaType, text, says string }{
		{index, whole(""), "an index has manifests"},
		{index, `{"schemaVersion":2}`, "an index has manifests"},
		{index, `{"schemaVersion":1,"manifests":[]}`, "schemaVersion is 1"},
		{"text/plain", whole(""), "push it as that"},
		{"text/plain", `{"schemaVersion":2,"manifests":[]}`, "push it as that"},
		{"APPLICATION/VND.oci.image.index.v1+json", `{"schemaVersion":2,"manifests":[]}`, "it is written"},
		{"application/vnd.oci.artifact.manifest.v1+json", whole(""), "it has layers"},
		{image, `{"config":null}`, "an image has"},
		{"a/b", `{"thing":1,"thing":2}`, `"thing" twice`},
	} {
		if _, err := manifest.Parse(test.mediaType, []byte(test.text)); !errors.Is(err, digest.ErrInvalid) ||
			!strings.Contains(fmt.Sprint(err), test.says) {
			t.Errorf("%s as %s: %v, want that it says %q", test.text, test.mediaType, err, test.says)
		}
	}
	for text, mediaType := range map[string]string{
		whole(""):                           image,
		whole(`,"x":{"a":1,"a":2},"y":"x"`): image, // not looked into
		whole(`,"annotations":{"a":"1","A":"2"},"manifests":null`):              image,
		with(`,"data":"aGVsbG8=","x":1,"platform":{"os":"a","x":{}}`):           image,
		whole(`,"mediaType":"` + dockerImage + `"`):                             dockerImage,
		`{"schemaVersion":0,"config":` + desc + `,"layers":null}`:               image, // as Go's types have it
		`{"schemaVersion":2,"manifests":null}`:                                  index,
		`{"schemaVersion":2,"manifests":[` + desc + `],"subject":` + desc + `}`: index,
		`{"layers":[]}`:  image,
		`{"thing":true}`: "application/vnd.example.thing+json",
		`{"config":` + desc + `,"layers":[` + desc + `]}`: "application/vnd.example.thing+json",
	} {
		if _, err := manifest.Parse(mediaType, []byte(text)); err != nil {
			t.Errorf("%s as %s: %v", text, mediaType, err)
		}
	}
	for text, fits := range map[string]bool{
		whole(""): true, `{"layers":[]}`: false, `{"schemaVersion":2,"layers":[]}`: false,
		`{"config":` + desc + `,"layers":[]}`: false, `{"schemaVersion":2,"config":` + desc + `}`: true,
	} {
		if m, err := manifest.Accept([]byte(text)); err != nil || (m.CheckRequired(image) == nil) != fits {
			t.Errorf("%s: %v; has what is required: %t", text, err, !fits)
		}
	}
	// What an earlier version has stored.
	old := whole(`,"manifests":[` + desc + `],"Layers":[]`)
	if m, err := manifest.Read([]byte(old)); err != nil || len(m.References(true).Refs) != 1 {
		t.Errorf("what is stored can't be read: %v", err)
	}
}

const dockerImage = "application/vnd.docker.distribution.manifest.v2+json"

// TestDescriptors: a descriptor has a digest wherever it stands, also in what is stored.
func TestDescriptors(t *testing.T) {
	for _, descriptor := range []string{
		`{}`, `{"size":1}`, `{"digest":""}`, `{"digest":"x"}`, `{"digest":"sha256:00"}`, `{"digest":"md5:` +
			strings.Repeat("0", 32) + `"}`, `{"digest":"x","data":"eA==","size":1}`,
	} {
		for _, in := range []string{
			`"config":%s`, `"layers":[%s]`, `"manifests":[%s]`, `"blobs":[%s]`, `"subject":%s`,
		} {
			text := fmt.Sprintf(`{"schemaVersion":2,`+in+`}`, descriptor)
			if m, err := manifest.Read([]byte(text)); !errors.Is(err, digest.ErrInvalid) {
				t.Errorf("%s: %+v, %v", text, m, err)
			}
		}
	}
}
