package blobstore

import (
	"encoding/json"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/p2p"
)

// ArtifactType is the artifact type of the manifest that an import under a
// cache ID makes.
const ArtifactType = "application/vnd.dfcache.file.v1"

// blobMediaType is the media type of content that nothing is known about.
const blobMediaType = "application/octet-stream"

// newManifest returns the manifest of an artifact of one file, the form in
// which `oras push` stores a file: an empty config and one layer that has the
// file's name as its title. Equal input gives equal bytes, so that importing
// the same file again changes nothing. Of its mode only one thing counts: the
// rest is not the file's, but depends on who has made it where.
func newManifest(file p2p.Added, title string, opts ImportOptions) ([]byte, error) {
	annotations := map[string]string{ocispec.AnnotationTitle: title}
	if opts.Executable {
		annotations[artifact.AnnotationMode] = "0755"
	}
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers: []ocispec.Descriptor{{
			MediaType:   blobMediaType,
			Digest:      file.Digest,
			Size:        file.Size,
			Annotations: annotations,
		}},
		Annotations: opts.Annotations,
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
