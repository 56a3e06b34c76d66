// Package artifact knows how files lie in OCI artifacts: which layers of a manifest are files, what
// they are called, which modes they have, and which are packed directories.
//
// Everybody does that differently. It reads what oras and dfcache make (a title for each layer),
// CNCF ModelPack and KitOps (a path, and archives), Ollama (a kind for each layer) and Helm (a chart
// that is named by its config). What it reads comes from others: a name is only a wish until [Place]
// has said where it can be.
//
// It promises no compatibility.
package artifact

import (
	"cmp"
	"fmt"
	"io/fs"
	"mime"
	"path"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/p2p/jsonlimit"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Kind says what a manifest is.
type Kind string

// The kinds of manifests.
const (
	KindArtifact Kind = "artifact" // its layers are files
	KindImage    Kind = "image"    // its layers are the parts of a file system
	KindIndex    Kind = "index"    // it refers to manifests, one for each platform, most often
)

// Annotations of layers, and of our own manifests.
const (
	// AnnotationUnpack says that a layer is a directory that oras has packed.
	AnnotationUnpack = "io.deis.oras.content.unpack"
	// AnnotationDigest is the digest of such a layer, unpacked.
	AnnotationDigest = "io.deis.oras.content.digest"
	// AnnotationMode has the permissions of a layer that is a file, as four octal digits.
	AnnotationMode = "io.github.dfcache.mode"

	annotationPath          = "org.cncf.model.filepath"
	annotationMetadata      = "org.cncf.model.file.metadata+json"
	annotationEarlyPath     = "org.cnai.model.filepath" // before ModelPack was CNCF's
	annotationEarlyMetadata = "org.cnai.model.file.metadata+json"
)

// Media types, or what they begin with.
const (
	typeModelPack      = "application/vnd.cncf.model."
	typeEarlyModelPack = "application/vnd.cnai.model."
	typeKitOps         = "application/vnd.kitops.modelkit."
	typeOllama         = "application/vnd.ollama.image."
	typeHelmConfig     = "application/vnd.cncf.helm.config.v1+json"
	typeHelmChart      = "application/vnd.cncf.helm.chart.content."
	typeEarlyHelmChart = "application/tar+gzip"
	typeHelmProof      = "application/vnd.cncf.helm.chart.provenance."
	typeDockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// Layer is a layer of a manifest.
type Layer struct {
	ocispec.Descriptor
	// Name is the path that the layout gives it below a directory, as it is there, or "".
	Name string
	// Mode has the permissions of the file, where HasMode says that the artifact has them.
	Mode    fs.FileMode
	HasMode bool
	// Packed says that it is an archive of what belongs into the directory.
	Packed bool
	// Base is the directory that the names in the archive begin with, and go to: "." where they are
	// paths below the output itself.
	Base string
}

// Layout is how files lie in a manifest.
type Layout struct {
	Kind   Kind
	Layers []Layer

	annotations map[string]string // of the manifest
	tree        bool              // it is a tree of dfcache's own
}

// Read reads the layout of a manifest. config is the content of its config where that is known, and
// named by [NamingConfig], else nil.
func Read(m *manifest.Manifest, config []byte) *Layout {
	l := &Layout{Kind: kindOf(m), annotations: m.Annotations, tree: m.ArtifactType == TreeType}
	if l.Kind == KindIndex {
		return l
	}
	chart := ""
	if m.Config != nil && m.Config.MediaType == typeHelmConfig {
		chart = chartName(config, m.Annotations)
	}
	given := map[string]int{}
	for _, layers := range [][]manifest.Descriptor{m.Layers, m.Blobs} {
		for _, d := range layers {
			l.Layers = append(l.Layers, newLayer(d.Descriptor, chart, given))
		}
	}
	return l
}

// kindOf says what a manifest is.
func kindOf(m *manifest.Manifest) Kind {
	if m.Manifests != nil {
		return KindIndex
	}
	if m.ArtifactType != "" || m.Config == nil {
		return KindArtifact
	}
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, typeDockerConfig:
		for _, d := range m.Layers {
			if d.Annotations[ocispec.AnnotationTitle] != "" || strings.HasPrefix(d.MediaType, typeOllama) {
				return KindArtifact
			}
		}
		return KindImage
	}
	return KindArtifact
}

// NamingConfig returns the descriptor of the config that files are named by, or nil where none is.
func NamingConfig(m *manifest.Manifest) *ocispec.Descriptor {
	if m.Config == nil || m.Config.MediaType != typeHelmConfig {
		return nil
	}
	return &m.Config.Descriptor
}

// newLayer reads a layer. chart is the name of a chart with its version, or "". given counts
// the names that were made of a kind.
func newLayer(d ocispec.Descriptor, chart string, given map[string]int) Layer {
	l := Layer{Descriptor: d, Name: d.Annotations[ocispec.AnnotationTitle]}
	if mode, err := strconv.ParseUint(d.Annotations[AnnotationMode], 8, 32); err == nil {
		l.Mode, l.HasMode = fs.FileMode(mode)&fs.ModePerm, true
	}
	if name := cmp.Or(d.Annotations[annotationPath], d.Annotations[annotationEarlyPath]); name != "" {
		l.Name = name
		l.readMetadata(cmp.Or(d.Annotations[annotationMetadata], d.Annotations[annotationEarlyMetadata]))
	}
	kind, params, _ := mime.ParseMediaType(d.MediaType)
	switch {
	case d.Annotations[AnnotationUnpack] == "true" && l.Name != "":
		l.Packed, l.Base = true, l.Name
	case isModel(kind) && strings.Contains(kind, ".tar"):
		l.Packed, l.Base = true, "."
	case l.Name != "":
	case strings.HasPrefix(kind, typeOllama):
		l.Name = numbered(ollamaName(strings.TrimPrefix(kind, typeOllama), params), given)
	case chart != "" && (strings.HasPrefix(kind, typeHelmChart) || kind == typeEarlyHelmChart):
		l.Name = numbered(chart+".tgz", given)
	case chart != "" && strings.HasPrefix(kind, typeHelmProof):
		l.Name = numbered(chart+".tgz.prov", given)
	}
	return l
}

// isModel reports whether a media type is one of ModelPack or KitOps, whose archives have the paths of
// their files from the root of the model on.
func isModel(mediaType string) bool {
	return strings.HasPrefix(mediaType, typeModelPack) || strings.HasPrefix(mediaType, typeEarlyModelPack) ||
		strings.HasPrefix(mediaType, typeKitOps)
}

// maxMetadata is the number of elements that the JSON of an annotation may have which describes one file.
const maxMetadata = 100

// readMetadata takes the mode from ModelPack's description of a file. What can't be read says nothing.
func (l *Layer) readMetadata(text string) {
	var metadata struct {
		Mode *uint32 `json:"mode"`
	}
	if jsonlimit.Unmarshal([]byte(text), &metadata, maxMetadata) == nil && metadata.Mode != nil {
		l.Mode, l.HasMode = fs.FileMode(*metadata.Mode)&fs.ModePerm, true
	}
}

// ollamaName names a layer of Ollama's by its kind, and a tensor by its own name.
func ollamaName(kind string, params map[string]string) string {
	if name := params["name"]; name != "" {
		return kind + "/" + name
	}
	return kind
}

// numbered makes the second of a name another one.
func numbered(name string, given map[string]int) string {
	given[name]++
	if n := given[name]; n > 1 {
		return fmt.Sprintf("%s-%d", name, n)
	}
	return name
}

// maxChart is the number of elements that the config of a chart may have.
const maxChart = 10_000

// chartName returns the name and version of a chart: its config has them, and what Helm notes of it
// in the manifest.
func chartName(config []byte, annotations map[string]string) string {
	var c struct{ Name, Version string }
	if jsonlimit.Unmarshal(config, &c, maxChart) != nil || c.Name == "" || c.Version == "" {
		c.Name, c.Version = annotations[ocispec.AnnotationTitle], annotations[ocispec.AnnotationVersion]
	}
	if c.Name == "" || c.Version == "" {
		return "chart"
	}
	return c.Name + "-" + c.Version
}

// FileName returns the name that a layer has as one file: its own, or one that is made of its digest.
func (l Layer) FileName() string {
	if l.Name != "" && (!l.Packed || path.Clean(l.Name) != ".") {
		return l.Name
	}
	return strings.Replace(string(l.Digest), ":", "-", 1)
}

// Foreign reports whether a layer need not be in a registry.
func (l Layer) Foreign() bool { return manifest.IsForeign(l.Descriptor) }

// PlatformName returns a platform as os/architecture, with its variant where it has one; "" for none.
func PlatformName(p *ocispec.Platform) string {
	if p == nil || p.OS == "" && p.Architecture == "" {
		return ""
	}
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}
