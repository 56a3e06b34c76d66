package blobstore

import (
	"encoding/json"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// ArtifactType is the artifact type of the manifest that an import under a
// cache ID makes.
const ArtifactType = "application/vnd.dfcache.file.v1"

// blobMediaType is the media type of content that nothing is known about.
const blobMediaType = "application/octet-stream"

// newManifest returns the manifest of an artifact of one file, the form in
// which `oras push` stores a file: an empty config and one layer that has the
// file's name as its title. Equal input gives equal bytes, so that importing
// the same file again changes nothing.
func newManifest(file p2p.Added, title string) ([]byte, error) {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers: []ocispec.Descriptor{{
			MediaType:   blobMediaType,
			Digest:      file.Digest,
			Size:        file.Size,
			Annotations: map[string]string{ocispec.AnnotationTitle: title},
		}},
	}
	return json.Marshal(m)
}

// titleOf returns what a file of this name is called inside an artifact: its
// last element, which is also what can't leave the directory it is extracted in.
func titleOf(name, fallback string) string {
	title := strings.ToValidUTF8(filepath.Base(name), "_")
	if name == "" || title == "." || title == ".." || title == string(filepath.Separator) {
		return fallback
	}
	return title
}

// artifactFiles returns the layers that are files of an artifact: its only layer, or
// those that have a title, as `oras pull` takes them.
func artifactFiles(m *manifest.Manifest) ([]ocispec.Descriptor, error) {
	layers := slices.Concat(m.Layers, m.Blobs)
	if len(layers) == 1 {
		return []ocispec.Descriptor{layers[0].Descriptor}, nil
	}
	var files []ocispec.Descriptor
	for _, l := range layers {
		if l.Annotations[ocispec.AnnotationTitle] != "" {
			files = append(files, l.Descriptor)
		}
	}
	if len(files) > 0 {
		return files, nil
	}
	what := fmt.Sprintf("an image of %d layers without file names: name a layer by its digest instead, or pull it "+
		"with a registry client", len(layers))
	switch {
	case len(m.Manifests) > 0:
		what = "an index of several manifests: name one of them by its tag, or a layer by its digest"
	case len(layers) == 0:
		what = "a manifest without layers"
	}
	return nil, fmt.Errorf("manifest: %w: it is not of files, but %s", ErrInvalid, what)
}

// maxTitle is the length of the longest title in bytes that can be a path.
const maxTitle = 4095

// checkTitle reports a title that does not name a file below the directory
// that an artifact is exported to.
func checkTitle(title string) error {
	if len(title) > maxTitle {
		return fmt.Errorf("file %.40q of the artifact: %w: its name has %d bytes, at most %d are possible", title,
			ErrInvalid, len(title), maxTitle)
	}
	if !filepath.IsLocal(title) || path.Clean(title) == "." || strings.ContainsRune(title, 0) {
		return fmt.Errorf("file %q of the artifact: %w: its name leads out of the directory", title, ErrInvalid)
	}
	return nil
}
