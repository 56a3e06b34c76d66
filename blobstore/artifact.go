package blobstore

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// ArtifactType is the artifact type of the manifest that an import under a
// cache ID makes.
const ArtifactType = "application/vnd.dfcache.file.v1"

// MaxManifest is the largest manifest in bytes that is read: the limit that
// the OCI distribution specification asks every registry for.
const MaxManifest = 4 << 20

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

// onlyLayer returns the one file of the artifact whose manifest is data.
func onlyLayer(data []byte) (ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest: %w: %w", ErrInvalid, err)
	}
	if len(m.Layers) != 1 {
		return ocispec.Descriptor{}, fmt.Errorf("manifest: %w: it has %d layers, want the one of a single file: name a layer by its digest instead", ErrInvalid, len(m.Layers))
	}
	layer := m.Layers[0]
	if _, err := digest.Parse(string(layer.Digest)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest: layer: %w", err)
	}
	return layer, nil
}
