// Package manifest reads manifests: those of OCI's images, indexes and artifacts, and of Docker's.
// It stands below the engines, which store what a manifest refers to together with it.
//
// It promises no compatibility.
package manifest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
)

// maxElements is how many elements a manifest has at most, annotations, URLs and
// what is not known here included; see package jsonlimit. It bounds what is made of 4 MiB
// to a few times that.
const maxElements = 1 << 18

// The media types of manifests that are not in the image specification.
const (
	typeDockerImage = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerList  = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeArtifact    = "application/vnd.oci.artifact.manifest.v1+json" // of OCI 1.1's release candidates
)

// IsType reports whether content of this media type is a manifest.
func IsType(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
		typeDockerImage, typeDockerList, typeArtifact:
		return true
	}
	return false
}

// IsForeign reports whether a layer is one that need not be in a registry:
// https://github.com/opencontainers/image-spec/blob/v1.1.1/layer.md#non-distributable-layers.
func IsForeign(d ocispec.Descriptor) bool {
	return len(d.URLs) > 0 || strings.Contains(d.MediaType, ".nondistributable.") ||
		strings.Contains(d.MediaType, ".foreign.")
}

// Manifest is what all kinds of manifests have between them: an image has a
// config and layers, an index manifests, an artifact of the release candidates blobs.
type Manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType"`
	Config        *Descriptor       `json:"config"`
	Layers        []Descriptor      `json:"layers"`
	Manifests     []Descriptor      `json:"manifests"`
	Blobs         []Descriptor      `json:"blobs"`
	Subject       *Descriptor       `json:"subject"`
	Annotations   map[string]string `json:"annotations"`

	members map[string]bool // the names of those of the object, where Accept has read it
}

// Descriptor is a descriptor that has a digest. That is checked as soon as it is read:
// a manifest has room for a million that have none.
type Descriptor struct{ ocispec.Descriptor }

// UnmarshalJSON implements [json.Unmarshaler].
func (d *Descriptor) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &d.Descriptor); err != nil {
		return err
	}
	if _, err := digest.Parse(string(d.Digest)); err != nil {
		return fmt.Errorf("descriptor of type %.80q: %w", d.MediaType, err)
	}
	return nil
}

// Parse returns what a manifest refers to that is to be stored: all it is made of, and its subject;
// Needs is empty. mediaType is what it comes as, or "" for what it says of itself. Errors match
// [digest.ErrInvalid].
func Parse(mediaType string, content []byte) (*p2p.NewManifest, error) {
	m, err := Accept(content)
	if err != nil {
		return nil, err
	}
	if mediaType, err = m.TypeAs(mediaType); err != nil {
		return nil, err
	}
	if err := CheckType(mediaType); err != nil {
		return nil, err
	}
	return m.References(false), nil
}

// Detect returns the media type of content that is a manifest by its own account, and what it
// refers to as [Parse] does; "" and nil where it is none.
func Detect(content []byte) (mediaType string, refs *p2p.NewManifest) {
	m, err := Accept(content)
	if err != nil {
		return "", nil
	}
	if mediaType = m.detect(); mediaType == "" {
		return "", nil
	}
	return mediaType, m.References(false)
}

// Describe returns the media type to store content under that somebody says is a manifest of the
// type told, and what it refers to as [Parse] does. Where that can't be its type, what the content
// says of itself counts. Of content that is no manifest, told and nil come back.
func Describe(told string, content []byte) (mediaType string, refs *p2p.NewManifest) {
	m, err := Accept(content)
	if err != nil {
		return told, nil
	}
	if mediaType, err = m.TypeAs(told); err != nil || CheckType(mediaType) != nil {
		if mediaType = m.detect(); mediaType == "" {
			return told, nil
		}
	}
	return mediaType, m.References(false)
}

// detect returns the media type of a manifest that can be nothing else; "" where it may be.
func (m *Manifest) detect() string {
	// In the two kinds of OCI's own the media type may be missing.
	if m.MediaType == "" && m.unnamed() == "" {
		return ""
	}
	mediaType, err := m.TypeAs("")
	if err != nil || !IsType(mediaType) || mediaType != typeArtifact && m.SchemaVersion != schemaVersion {
		return ""
	}
	return mediaType
}

// schemaVersion is the one that manifests have today. 1 is that of Docker's first ones.
const schemaVersion = 2

// unnamed returns the media type of a manifest that does not say it, and can be of one kind only:
// a program that reads it goes by what is in it.
func (m *Manifest) unnamed() string {
	switch {
	case m.SchemaVersion != schemaVersion:
	case m.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case m.Config != nil && m.Layers != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}

// Read reads a manifest that is stored. What an earlier version has stored stays readable, so it is
// lenient where [Accept] is not. Errors match [digest.ErrInvalid].
func Read(data []byte) (*Manifest, error) {
	if len(data) > p2p.MaxManifest {
		return nil, fmt.Errorf("manifest: %w: it has %d bytes, the limit is %d", digest.ErrInvalid, len(data),
			p2p.MaxManifest)
	}
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return nil, fmt.Errorf("manifest: %w: it is not a JSON object", digest.ErrInvalid)
	}
	var m Manifest
	if err := jsonlimit.Unmarshal(data, &m, maxElements); err != nil {
		// What is wrong may be quoted, at any length.
		return nil, fmt.Errorf("manifest: %w: it is not the JSON of one: %.300s", digest.ErrInvalid, reason(err))
	}
	return &m, nil
}

// Accept reads a manifest that is to be stored: the door that all of them pass, whether they are
// pushed, imported or fetched from a peer. It refuses what two programs could read in two ways, as
// what is checked here would not be what others see, and what has more descriptors than an engine
// stores: each is a record of its own, all of which one transaction writes. Members that are not
// known are left alone. [Manifest.TypeAs] says what it is. Errors match [digest.ErrInvalid].
func Accept(data []byte) (*Manifest, error) {
	m, err := Read(data)
	if err != nil {
		return nil, err
	}
	if m.members, err = checkMembers(data); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", digest.ErrInvalid, err)
	}
	if n := len(m.Children()); n > p2p.MaxManifestRefs {
		return nil, fmt.Errorf("manifest: %w: it refers to %d blobs, the limit is %d", digest.ErrInvalid, n,
			p2p.MaxManifestRefs)
	}
	all := m.Children()
	if m.Subject != nil {
		all = append(all, m.Subject.Descriptor)
	}
	for _, d := range all {
		// A client may take what is embedded for the blob.
		if len(d.Data) > 0 && (int64(len(d.Data)) != d.Size || d.Digest.Algorithm().FromBytes(d.Data) != d.Digest) {
			return nil, fmt.Errorf("manifest: %w: the data embedded for %s is something else", digest.ErrInvalid,
				d.Digest)
		}
	}
	return m, nil
}

// reason says what is wrong with JSON, without the names that types have in Go.
func reason(err error) string {
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Sprintf("%q can't be a %s", e.Field, e.Value)
	}
	return strings.TrimPrefix(err.Error(), "json: ")
}

// Children returns what the manifest is made of, but for its subject.
func (m *Manifest) Children() []ocispec.Descriptor {
	var all []ocispec.Descriptor
	if m.Config != nil {
		all = append(all, m.Config.Descriptor)
	}
	for _, d := range slices.Concat(m.Layers, m.Manifests, m.Blobs) {
		all = append(all, d.Descriptor)
	}
	return all
}

// References returns what the manifest refers to, as an engine stores it. With needs, what has to
// be there is named: all but its subject, and layers that need not be in a registry.
func (m *Manifest) References(needs bool) *p2p.NewManifest {
	refs := &p2p.NewManifest{}
	seen := map[digest.Digest]bool{}
	for _, d := range m.Children() {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		refs.Refs = append(refs.Refs, d.Digest)
		if needs && !IsForeign(d) {
			refs.Needs = append(refs.Needs, d.Digest)
		}
	}
	if m.Subject != nil {
		refs.Subject = m.Subject.Digest
	}
	return refs
}

// TypeOfArtifact returns the type that the referrers API gives for the manifest.
func (m *Manifest) TypeOfArtifact() string {
	if m.ArtifactType == "" && m.Config != nil {
		return m.Config.MediaType
	}
	return m.ArtifactType
}

// TypeAs returns the media type of a manifest that [Accept] has read: the one place where that is
// decided. What the manifest says of itself counts; where it says nothing, what it was given as,
// without parameters; else what it can be by what it has. Where these contradict each other, or what
// is in it is of another kind, the error matches [digest.ErrInvalid] and says why.
func (m *Manifest) TypeAs(given string) (string, error) {
	given, _, _ = strings.Cut(given, ";")
	given = strings.TrimSpace(given)
	mediaType := cmp.Or(m.MediaType, given)
	if mediaType == "" {
		if mediaType = ocispec.MediaTypeImageManifest; m.members["manifests"] {
			mediaType = ocispec.MediaTypeImageIndex
		}
	}
	if given != "" && !strings.EqualFold(mediaType, given) {
		return "", fmt.Errorf("manifest: %w: it is pushed as %.80q, but says that it is %.80q", digest.ErrInvalid,
			given, m.MediaType)
	}
	if err := m.checkKind(mediaType); err != nil {
		return "", fmt.Errorf("manifest of type %.80q: %w: %w", mediaType, digest.ErrInvalid, err)
	}
	return mediaType, nil
}

// checkKind says what keeps a manifest from being of a media type.
//
//nolint:cyclop // a list of rules
func (m *Manifest) checkKind(mediaType string) error {
	image, index, artifact := m.Config != nil || m.Layers != nil, m.Manifests != nil, m.Blobs != nil
	switch {
	case image && index, index && artifact, artifact && image:
		return errors.New("it has more than one of layers or config, manifests, and blobs: which of them counts " +
			"is not the same for every client")
	case !IsType(mediaType) && IsType(strings.ToLower(mediaType)):
		return fmt.Errorf("it is written %s", strings.ToLower(mediaType))
	case !IsType(mediaType):
		if own := m.unnamed(); m.MediaType == "" && own != "" {
			return fmt.Errorf("by what is in it, it is %s: push it as that", own)
		}
		return nil
	case mediaType == typeArtifact:
		if image || index {
			return errors.New("it has layers, a config or manifests")
		}
		return nil
	case m.SchemaVersion != schemaVersion && m.SchemaVersion != 0:
		return fmt.Errorf("its schemaVersion is %d, want %d", m.SchemaVersion, schemaVersion)
	case m.members["fsLayers"]:
		return errors.New("it has fsLayers, as Docker's schema 1")
	case artifact:
		return errors.New("it has blobs")
	case isIndex(mediaType):
		if image || !m.members["manifests"] {
			return errors.New("an index has manifests, and no layers or config")
		}
	case index || m.Config == nil && !m.members["layers"]:
		return errors.New("an image has a config and layers, and no manifests")
	}
	return nil
}

// CheckRequired refuses a manifest of a known type without what the specification requires of it:
// schemaVersion, and of an image the config. Go's types leave the first 0 where nobody sets it, and
// oras-go's own stores take both. The error matches [digest.ErrInvalid].
func (m *Manifest) CheckRequired(mediaType string) error {
	switch {
	case !IsType(mediaType) || mediaType == typeArtifact:
	case m.SchemaVersion != schemaVersion:
		return fmt.Errorf("manifest of type %.80q: %w: its schemaVersion is %d, want %d", mediaType,
			digest.ErrInvalid, m.SchemaVersion, schemaVersion)
	case !isIndex(mediaType) && m.Config == nil:
		return fmt.Errorf("manifest of type %.80q: %w: it has no config", mediaType, digest.ErrInvalid)
	}
	return nil
}

// isIndex reports whether a media type is one of manifests that are made of manifests.
func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == typeDockerList
}

// maxType is the length of the longest media type in bytes, by RFC 6838.
const maxType = 255

// CheckType refuses a media type that can't be passed on. The error matches [digest.ErrInvalid].
func CheckType(mediaType string) error {
	visible := func(r rune) bool { return ' ' <= r && r <= '~' }
	if len(mediaType) > maxType || strings.ContainsFunc(mediaType, func(r rune) bool { return !visible(r) }) {
		return fmt.Errorf("media type %.80q: %w: it has at most %d characters, of printable ASCII", mediaType,
			digest.ErrInvalid, maxType)
	}
	return nil
}
