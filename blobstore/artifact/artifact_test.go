package artifact_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// layer describes a layer of a media type, with annotations in pairs.
func layer(mediaType string, annotations ...string) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.SHA256.FromString(mediaType), Size: 1}
	for i := 0; i < len(annotations); i += 2 {
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[annotations[i]] = annotations[i+1]
	}
	return d
}

// read reads the layout of a manifest of layers.
func read(t testing.TB, configType, config string, m ocispec.Manifest) *artifact.Layout {
	t.Helper()
	m.SchemaVersion, m.MediaType = 2, ocispec.MediaTypeImageManifest
	m.Config = layer(configType)
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := manifest.Read(data)
	if err != nil {
		t.Fatal(err)
	}
	return artifact.Read(parsed, []byte(config))
}

// TestRead: how files lie in what different programs make.
func TestRead(t *testing.T) {
	const title, path = ocispec.AnnotationTitle, "org.cncf.model.filepath"
	const metadata = "org.cncf.model.file.metadata+json"
	for name, test := range map[string]struct {
		configType, config string
		layers             []ocispec.Descriptor
		annotations        map[string]string
		kind               artifact.Kind
		want               string // names, with what is known of each
	}{
		"image": {configType: ocispec.MediaTypeImageConfig, layers: []ocispec.Descriptor{layer("a"), layer("b")},
			kind: artifact.KindImage, want: " | "},
		"titles in an image": {configType: ocispec.MediaTypeImageConfig,
			layers: []ocispec.Descriptor{layer("a", title, "x")}, kind: artifact.KindArtifact, want: "x"},
		"oras": {layers: []ocispec.Descriptor{layer("a", title, "x"),
			layer("b", title, "d", artifact.AnnotationUnpack, "true"), layer("c", artifact.AnnotationUnpack, "true")},
			want: "x | d packed d | "},
		"modes": {layers: []ocispec.Descriptor{layer("a", title, "x", artifact.AnnotationMode, "0640"),
			layer("a", title, "y", artifact.AnnotationMode, "47777"),
			layer("a", title, "z", artifact.AnnotationMode, "x")},
			want: "x 0640 | y 0777 | z"},
		"ModelPack": {layers: []ocispec.Descriptor{
			layer("application/vnd.cncf.model.weight.v1.raw", path, "w/m.bin", metadata, `{"mode":33188}`),
			layer("application/vnd.cncf.model.weight.config.v1.tar", path, "c", title, "other"),
			layer("application/vnd.cncf.model.doc.v1.tar+gzip", path, "d", metadata, "{"),
			layer("application/vnd.cnai.model.code.v1.tar+zstd", "org.cnai.model.filepath", "e")},
			want: "w/m.bin 0644 | c packed . | d packed . | e packed ."},
		"KitOps": {layers: []ocispec.Descriptor{layer("application/vnd.kitops.modelkit.model.v1.tar"),
			layer("application/vnd.kitops.modelkit.code.v1.tar+gzip"),
			layer("application/vnd.kitops.modelkit.docs.v1.raw", path, "README")},
			want: " packed . |  packed . | README"},
		"Ollama": {configType: "application/vnd.docker.container.image.v1+json", layers: []ocispec.Descriptor{
			layer("application/vnd.ollama.image.model"), layer("application/vnd.ollama.image.license"),
			layer("application/vnd.ollama.image.license"),
			layer("application/vnd.ollama.image.tensor; name=blk.0; dtype=F32")},
			kind: artifact.KindArtifact, want: "model | license | license-2 | tensor/blk.0"},
		"Helm": {configType: "application/vnd.cncf.helm.config.v1+json", config: `{"name":"n","version":"1.0"}`,
			layers: []ocispec.Descriptor{layer("application/vnd.cncf.helm.chart.content.v1.tar+gzip"),
				layer("application/vnd.cncf.helm.chart.provenance.v1.prov")},
			want: "n-1.0.tgz | n-1.0.tgz.prov"},
		"Helm, annotations": {configType: "application/vnd.cncf.helm.config.v1+json",
			annotations: map[string]string{ocispec.AnnotationTitle: "a", ocispec.AnnotationVersion: "2"},
			layers:      []ocispec.Descriptor{layer("application/tar+gzip")}, want: "a-2.tgz"},
		"Helm, nothing": {configType: "application/vnd.cncf.helm.config.v1+json", config: `[`,
			layers: []ocispec.Descriptor{layer("application/tar+gzip")}, want: "chart.tgz"},
	} {
		l := read(t, test.configType, test.config, ocispec.Manifest{Layers: test.layers, Annotations: test.annotations})
		var got []string
		for _, layer := range l.Layers {
			text := layer.Name
			if layer.HasMode {
				text += fmt.Sprintf(" %04o", layer.Mode)
			}
			if layer.Packed {
				text += " packed " + layer.Base
			}
			got = append(got, text)
		}
		if test.kind == "" {
			test.kind = artifact.KindArtifact
		}
		if strings.Join(got, " | ") != test.want || l.Kind != test.kind {
			t.Errorf("%s: %q, %s; want %q, %s", name, strings.Join(got, " | "), l.Kind, test.want, test.kind)
		}
	}
}

// TestPlaceAll: what can't be in its place.
func TestPlaceAll(t *testing.T) {
	file := func(name string) artifact.Layer { return artifact.Layer{Descriptor: layer(name), Name: name} }
	for name, test := range map[string]struct {
		names []string
		tree  artifact.Tree
		ok    bool
	}{
		"plain":                {names: []string{"a", "b/c", "..d", "b/./e"}, ok: true},
		"parent":               {names: []string{"../a"}},
		"parent below":         {names: []string{"a/../../b"}},
		"absolute":             {names: []string{"/a"}},
		"the output":           {names: []string{"a/.."}},
		"NUL":                  {names: []string{"a\x00b"}},
		"long":                 {names: []string{strings.Repeat("a/", 2050)}},
		"twice":                {names: []string{"a", "b/../a"}},
		"below a file":         {names: []string{"a/b", "a"}},
		"below a link":         {names: []string{"a/b"}, tree: artifact.Tree{Links: map[string]string{"a": "c"}}},
		"a link":               {names: []string{"a"}, tree: artifact.Tree{Links: map[string]string{"a": "c"}}},
		"links":                {tree: artifact.Tree{Links: map[string]string{"a": "b/../c", "b/c": "..", "d": "."}}, ok: true},
		"link out":             {tree: artifact.Tree{Links: map[string]string{"a": ".."}}},
		"link out, below":      {tree: artifact.Tree{Links: map[string]string{"b/c": "../../d"}}},
		"absolute link":        {tree: artifact.Tree{Links: map[string]string{"a": "/etc"}}},
		"link with NUL":        {tree: artifact.Tree{Links: map[string]string{"a": "b\x00"}}},
		"link to nothing":      {tree: artifact.Tree{Links: map[string]string{"a": ""}}},
		"directory":            {names: []string{"a/b"}, tree: artifact.Tree{Directories: map[string]fs.FileMode{"a": 0}}, ok: true},
		"directory and file":   {names: []string{"a"}, tree: artifact.Tree{Directories: map[string]fs.FileMode{"a": 0}}},
		"directory and below":  {names: []string{"a"}, tree: artifact.Tree{Directories: map[string]fs.FileMode{"a/b": 0}}},
		"directory below link": {tree: artifact.Tree{Links: map[string]string{"a": "c"}, Directories: map[string]fs.FileMode{"a/b": 0}}},
	} {
		var layers []artifact.Layer
		for _, name := range test.names {
			layers = append(layers, file(name))
		}
		places, err := artifact.PlaceAll(layers, test.tree, true, false)
		if test.ok != (err == nil) || err != nil && (!errors.Is(err, digest.ErrInvalid) || len(err.Error()) > 1000) {
			t.Errorf("%s: %v, %v", name, places, err)
		}
	}
}

// FuzzNames: whatever the names of files, links and directories are, what is made of them is below the output, and
// no link leads out.
func FuzzNames(f *testing.F) {
	f.Add("a/b", "c", `{"directories":{"d":"0755"},"links":{"a":"b"}}`)
	f.Add("../a", "/b", `{"links":{"a/b/up":"../..","out":"a/b/up/../x"}}`)
	f.Add("a", "a/b", `{"directories":{"../x":"0"},"links":{"x":"/etc","y\u0000":""}}`)
	f.Add(strings.Repeat("a/", 3000), "a\x00", `{"links":{"a":"a"}}`)
	f.Fuzz(func(t *testing.T, first, second, text string) {
		l := read(t, "application/x", "", ocispec.Manifest{
			ArtifactType: artifact.TreeType, Annotations: map[string]string{artifact.AnnotationTree: text},
			Layers: []ocispec.Descriptor{layer("a", ocispec.AnnotationTitle, first),
				layer("b", ocispec.AnnotationTitle, second)}})
		layers, _, err := l.Choose(artifact.Choice{})
		if err != nil {
			t.Fatal(err)
		}
		tree, err := l.Tree()
		if err != nil {
			return
		}
		places, err := artifact.PlaceAll(layers, tree, true, false)
		if err != nil {
			if !errors.Is(err, digest.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		dir := t.TempDir()
		out, root := openOut(t, dir)
		for _, p := range places {
			path := filepath.Join(out, p.Path)
			if os.MkdirAll(filepath.Dir(path), 0o777) == nil {
				_ = os.WriteFile(path, nil, 0o666) // a name may be too long for the file system
			}
		}
		err = artifact.MakeLinks(root, tree)
		if entries, _ := os.ReadDir(dir); len(entries) != 1 {
			t.Fatalf("there is %v", entries)
		}
		if err == nil {
			requireInside(t, out)
		}
	})
}

func TestTree(t *testing.T) {
	files := []artifact.File{{Name: "a", Mode: 0o755, Digest: digest.SHA256.FromString("a"), Size: 1},
		{Name: "b/c", Mode: 0o400, Digest: digest.SHA256.FromString("c"), Size: 2}}
	tree := artifact.Tree{Directories: map[string]fs.FileMode{"b": 0o750, "empty": 0o700},
		Links: map[string]string{"l": "b/c"}}
	data, err := artifact.New(files, tree)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := manifest.Read(data)
	if err != nil {
		t.Fatal(err)
	}
	l := artifact.Read(parsed, nil)
	got, err := l.Tree()
	if err != nil || !reflect.DeepEqual(got, tree) {
		t.Errorf("the tree is %v, %v; want %v", got, err, tree)
	}
	if len(l.Layers) != 2 || l.Layers[0].Mode != 0o755 || l.Layers[1].Name != "b/c" || l.Layers[1].Mode != 0o400 {
		t.Errorf("the layers are %+v", l.Layers)
	}
	if again, err := artifact.New(files, tree); err != nil || string(again) != string(data) {
		t.Errorf("again it is %s, %v", again, err)
	}
	files = append(files, artifact.File{Name: strings.Repeat("x", p2p.MaxManifest), Digest: files[0].Digest})
	if _, err := artifact.New(files, tree); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("a manifest that is too large: %v", err)
	}
	for _, text := range []string{"x", `{"directories":{"a":"x"}}`, `{"directories":{"../a":"0755"}}`, `{"links":{"/a":"b"}}`,
		`{"links":{"a":["b"]}}`} {
		l := read(t, "application/x", "", ocispec.Manifest{ArtifactType: artifact.TreeType,
			Annotations: map[string]string{artifact.AnnotationTree: text}})
		if got, err := l.Tree(); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("tree %s: %v, %v", text, got, err)
		}
	}
}
