package blobstore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
)

// MaxManifest is the largest manifest in bytes that is stored and read: the
// limit that the OCI distribution specification asks every registry for.
const MaxManifest = p2p.MaxManifest

// maxDescriptors is how many descriptors a manifest that is stored as one has at most: each is a
// record of its own, all of which one transaction writes.
const maxDescriptors = 10_000

// checkCount refuses a manifest with more descriptors. The error matches [ErrInvalid].
func checkCount(descriptors int) error {
	if descriptors > maxDescriptors {
		return fmt.Errorf("manifest: %w: it refers to %d blobs, the limit is %d", ErrInvalid, descriptors, maxDescriptors)
	}
	return nil
}

// maxManifestElements is how many elements a manifest has at most, annotations, URLs and
// what is not known here included; see package jsonlimit. It bounds what is made of 4 MiB
// to a few times that.
const maxManifestElements = 1 << 18

// The media types of manifests that are not in the image specification.
const (
	mediaTypeDockerManifest   = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerList       = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaTypeArtifactManifest = "application/vnd.oci.artifact.manifest.v1+json" // of OCI 1.1's release candidates
)

// isManifestType reports whether content of this media type is a manifest,
// which tells what it refers to.
func isManifestType(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
		mediaTypeDockerManifest, mediaTypeDockerList, mediaTypeArtifactManifest:
		return true
	}
	return false
}

// isForeign reports whether a layer is one that need not be in a registry:
// https://github.com/opencontainers/image-spec/blob/v1.1.1/layer.md#non-distributable-layers.
func isForeign(d ocispec.Descriptor) bool {
	return len(d.URLs) > 0 || strings.Contains(d.MediaType, ".nondistributable.") || strings.Contains(d.MediaType, ".foreign.")
}

// manifest is what all kinds of manifests have between them: an image has a
// config and layers, an index manifests, an artifact of the release candidates blobs.
type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType"`
	Config        *descriptor       `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Manifests     []descriptor      `json:"manifests"`
	Blobs         []descriptor      `json:"blobs"`
	Subject       *descriptor       `json:"subject"`
	Annotations   map[string]string `json:"annotations"`
}

// descriptor is one that has a digest. It is checked as soon as it is read:
// a manifest has room for a million that have none.
type descriptor struct{ ocispec.Descriptor }

// UnmarshalJSON implements [json.Unmarshaler].
func (d *descriptor) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &d.Descriptor); err != nil {
		return err
	}
	if _, err := digest.Parse(string(d.Digest)); err != nil {
		return fmt.Errorf("descriptor of type %.80q: %w", d.MediaType, err)
	}
	return nil
}

// ParseManifest returns what a manifest refers to: all it is made of, and its
// subject; Needs is empty. mediaType is what the manifest is stored as, or "" for
// what it says of itself. Errors match [ErrInvalid]. It is for engines that fetch
// manifests from elsewhere.
func ParseManifest(mediaType string, content []byte) (*p2p.NewManifest, error) {
	m, err := parseManifest(content)
	if err != nil {
		return nil, err
	}
	if _, err := m.mediaTypeOf(mediaType); err != nil {
		return nil, err
	}
	if err := checkCount(len(m.children())); err != nil {
		return nil, err
	}
	return m.refs(false), nil
}

// DetectManifest returns the media type of content that is a manifest by its own
// account, and what it refers to as [ParseManifest] does; "" and nil where it is
// none. It is for engines that fetch content from where nobody says what it is.
func DetectManifest(content []byte) (mediaType string, refs *p2p.NewManifest) {
	m, err := parseManifest(content)
	if err != nil || m.SchemaVersion != 2 && m.MediaType != mediaTypeArtifactManifest {
		return "", nil
	}
	// In the two kinds of OCI's own the media type may be missing.
	if m.MediaType == "" && m.Manifests == nil && (m.Config == nil || m.Layers == nil) {
		return "", nil
	}
	if mediaType, err = m.mediaTypeOf(""); err != nil || !isManifestType(mediaType) || checkCount(len(m.children())) != nil {
		return "", nil
	}
	return mediaType, m.refs(false)
}

// parseManifest reads a manifest. Errors match [ErrInvalid].
func parseManifest(data []byte) (*manifest, error) {
	if len(data) > MaxManifest {
		return nil, fmt.Errorf("manifest: %w: it has %d bytes, the limit is %d", ErrInvalid, len(data), MaxManifest)
	}
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return nil, fmt.Errorf("manifest: %w: it is not a JSON object", ErrInvalid)
	}
	var m manifest
	if err := jsonlimit.Unmarshal(data, &m, maxManifestElements); err != nil {
		// What is wrong may be quoted, at any length.
		return nil, fmt.Errorf("manifest: %w: it is not the JSON of one: %.300s", ErrInvalid, err)
	}
	return &m, nil
}

// children returns what the manifest is made of, but for its subject.
func (m *manifest) children() []ocispec.Descriptor {
	var all []ocispec.Descriptor
	if m.Config != nil {
		all = append(all, m.Config.Descriptor)
	}
	for _, d := range slices.Concat(m.Layers, m.Manifests, m.Blobs) {
		all = append(all, d.Descriptor)
	}
	return all
}

// refs returns the manifest as an engine keeps it. With check, what has to be
// there is named.
func (m *manifest) refs(check bool) *p2p.NewManifest {
	refs := &p2p.NewManifest{}
	seen := map[digest.Digest]bool{}
	for _, d := range m.children() {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		refs.Refs = append(refs.Refs, d.Digest)
		if check && !isForeign(d) {
			refs.Needs = append(refs.Needs, d.Digest)
		}
	}
	if m.Subject != nil {
		refs.Subject = m.Subject.Digest
	}
	return refs
}

// artifactType returns the type that the referrers API gives for the manifest.
func (m *manifest) artifactType() string {
	if m.ArtifactType == "" && m.Config != nil {
		return m.Config.MediaType
	}
	return m.ArtifactType
}

// mediaTypeOf returns the media type of a manifest: what was given, without
// parameters, else what is in it, else that of an image or an index. Two that
// differ are an error.
func (m *manifest) mediaTypeOf(given string) (string, error) {
	given, _, _ = strings.Cut(given, ";")
	given = strings.TrimSpace(given)
	found := given
	switch {
	case given != "" && m.MediaType != "" && !strings.EqualFold(m.MediaType, given):
		return "", fmt.Errorf("manifest: %w: it is pushed as %.80q, but says that it is %.80q", ErrInvalid, given, m.MediaType)
	case given != "":
	case m.MediaType != "":
		found = m.MediaType
	case m.Manifests != nil:
		found = ocispec.MediaTypeImageIndex
	default:
		found = ocispec.MediaTypeImageManifest
	}
	return found, checkMediaType(found)
}

// maxMediaType is the length of the longest media type in bytes, by RFC 6838.
const maxMediaType = 255

// checkMediaType reports a media type that can't be passed on.
func checkMediaType(s string) error {
	visible := func(r rune) bool { return ' ' <= r && r <= '~' }
	if len(s) > maxMediaType || strings.IndexFunc(s, func(r rune) bool { return !visible(r) }) >= 0 {
		return fmt.Errorf("media type %.80q: %w: %w: it has at most %d characters, of printable ASCII", s, errdef.ErrInvalidMediaType, ErrInvalid, maxMediaType)
	}
	return nil
}
