package blobstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Description says what a cid names, whatever that is: a file, an artifact of files, an image, or an
// index of these.
type Description struct {
	// File is as Stat has it. Files are all layers, those without a name, too, where there is more than one.
	File
	// Kind is "file", "artifact", "image" or "index".
	Kind         string
	MediaType    string // of what the cid leads to
	ArtifactType string // of a manifest; of an image the type of its config
	// Layers says more of Files, of each in its place; or of the one that File is.
	Layers []LayerDetails
	// Platforms are the manifests of an index.
	Platforms []Platform
	// Referrers are the manifests that are about this one, at most 1000. A file that is named by its digest has none.
	Referrers []ocispec.Descriptor
}

// LayerDetails says of a layer what its manifest says.
type LayerDetails struct {
	MediaType string
	Mode      fs.FileMode // permissions, where HasMode
	HasMode   bool
	Packed    bool // an archive, which an export unpacks
}

// Platform is a manifest of an index.
type Platform struct {
	Name         string // os/architecture or os/architecture/variant, "" where it is for none
	Digest       digest.Digest
	MediaType    string
	ArtifactType string
	Size         int64 // in bytes, of its layers; -1 where that is not known
	Local        bool  // whether all of it is on this host
}

const (
	// maxPlatforms is how many manifests of an index are looked into.
	maxPlatforms = 64
	// maxReferrers is how many referrers are told.
	maxReferrers = 1000
)

// Describe says what is known of what cid names, or fails as Stat does. Of what only the swarm has, it
// reads manifests, and nothing is kept but what refers to a manifest that is on this host.
//
// It asks this host, and, unless l.Local is set, the swarm.
func (r *Repository) Describe(ctx context.Context, cid string, l Lookup) (Description, error) {
	f, err := r.stat(ctx, cid, l, request{describe: true})
	if err == nil && f.manifest == nil {
		err = r.readManifest(ctx, f, l)
	}
	if err != nil {
		return Description{}, fmt.Errorf("stat: %w", err)
	}
	d := Description{File: f.File, Kind: "file", MediaType: f.mediaType}
	if f.manifest == nil {
		return d, nil
	}
	d.Kind, d.ArtifactType = string(f.layout.Kind), f.manifest.TypeOfArtifact()
	for _, layer := range f.layers {
		d.Layers = append(d.Layers, LayerDetails{layer.MediaType, layer.Mode, layer.HasMode, layer.Packed})
	}
	if f.layout.Kind == artifact.KindIndex {
		if err := r.describeIndex(ctx, &d, f, l); err != nil {
			return Description{}, fmt.Errorf("stat: %w", err)
		}
	}
	if err := r.describeReferrers(ctx, &d, f.about, l); err != nil {
		return Description{}, fmt.Errorf("stat: %w", err)
	}
	return d, nil
}

// readManifest reads the manifest that a digest is of, where it is one. What is known of its own
// bytes stays as it is.
func (r *Repository) readManifest(ctx context.Context, f *found, l Lookup) error {
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(f.Digest),
		p2p.StatOptions{Scope: l.scope(), Manifest: true, ContentOnly: true})
	if err != nil || info.Manifest == nil {
		return err
	}
	if f.manifest, err = manifest.Read(info.Manifest.Content); err != nil {
		return err
	}
	f.about, f.layout = f.Digest, artifact.Read(f.manifest, r.namingConfig(ctx, f.manifest, p2p.Local))
	return nil
}

// describeIndex says what is known of the manifests of an index.
func (r *Repository) describeIndex(ctx context.Context, d *Description, f *found, l Lookup) error {
	byName := d.Manifest != ""
	if byName {
		d.Local = f.here
	}
	for i, child := range f.manifest.Manifests {
		p := Platform{Name: artifact.PlatformName(child.Platform), Digest: child.Digest, MediaType: child.MediaType,
			ArtifactType: child.ArtifactType, Size: -1}
		if i < maxPlatforms {
			part, err := r.describePlatform(ctx, child.Descriptor, l)
			switch {
			case err == nil:
				p.Size, p.Local = part.Size, part.Local
				if byName {
					d.Size, d.Pieces, d.Held = d.Size+part.Size, d.Pieces+part.Pieces, d.Held+part.Held
				}
			case !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrUnreachable) && !errors.Is(err, ErrInvalid) &&
				!errors.Is(err, ErrCorrupt):
				return err
			}
		}
		d.Local = d.Local && (p.Local || !byName)
		d.Platforms = append(d.Platforms, p)
	}
	if byName && l.Providers {
		var err error
		d.Providers, err = r.providers(ctx, d.Digest)
		return err
	}
	return nil
}

// describePlatform says what is known of a manifest of an index.
func (r *Repository) describePlatform(ctx context.Context, child ocispec.Descriptor, l Lookup) (*found, error) {
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(child.Digest),
		p2p.StatOptions{Scope: l.scope(), Manifest: true})
	if err != nil {
		return nil, err
	}
	f := &found{File: File{Digest: child.Digest}, here: info.Local()}
	if info.Manifest == nil {
		return nil, fmt.Errorf("%s: %w: it is no manifest", child.Digest, ErrInvalid)
	}
	// How many peers have each layer is more than anybody asks.
	l.Providers = false
	err = r.followManifest(ctx, f, info.Manifest, l, request{describe: true, look: true})
	f.Local = f.Local && info.Local()
	return f, err
}

// errEnough ends a list of referrers.
var errEnough = errors.New("enough")

// describeReferrers fills in what is about a manifest. Peers are asked for it where the manifest is on this
// host, and can keep what they tell.
func (r *Repository) describeReferrers(ctx context.Context, d *Description, about digest.Digest, l Lookup) error {
	subject := ocispec.Descriptor{Digest: about}
	find := r.predecessorsHere
	if !l.Local {
		if info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(about),
			p2p.StatOptions{Scope: p2p.Local}); err == nil && info.Local() {
			find = r.Predecessors
		}
	}
	candidates, err := find(ctx, subject)
	if err != nil {
		return err
	}
	err = r.referrersOf(ctx, subject, candidates, "", func(page []ocispec.Descriptor) error {
		d.Referrers = append(d.Referrers, page...)
		if len(d.Referrers) >= maxReferrers {
			d.Referrers = d.Referrers[:maxReferrers]
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// MarshalJSON makes an object that has all that a [File] has, and more.
func (d Description) MarshalJSON() ([]byte, error) {
	type layer struct {
		fileForm
		MediaType string  `json:"mediaType"`
		Mode      *string `json:"mode"`
		Packed    bool    `json:"packed"`
	}
	type platform struct {
		Platform     string        `json:"platform"`
		Digest       digest.Digest `json:"digest"`
		MediaType    string        `json:"mediaType"`
		ArtifactType string        `json:"artifactType"`
		Size         *int64        `json:"size"`
		Local        bool          `json:"local"`
	}
	type referrer struct {
		Digest       digest.Digest     `json:"digest"`
		Size         int64             `json:"size"`
		MediaType    string            `json:"mediaType"`
		ArtifactType string            `json:"artifactType"`
		Annotations  map[string]string `json:"annotations"`
	}
	form := struct {
		fileForm
		Kind         string     `json:"kind"`
		MediaType    string     `json:"mediaType"`
		ArtifactType string     `json:"artifactType"`
		Mode         *string    `json:"mode"` // of a single file
		Packed       bool       `json:"packed"`
		Files        []layer    `json:"files"`
		Platforms    []platform `json:"platforms"`
		Referrers    []referrer `json:"referrers"`
	}{d.File.form(), d.Kind, d.MediaType, d.ArtifactType, nil, false, []layer{}, []platform{}, []referrer{}}
	mode := func(l LayerDetails) *string {
		if !l.HasMode {
			return nil
		}
		text := fmt.Sprintf("%04o", l.Mode)
		return &text
	}
	for i, f := range d.Files {
		l := d.Layers[i]
		form.Files = append(form.Files, layer{f.form(), l.MediaType, mode(l), l.Packed})
	}
	if len(d.Files) == 0 && len(d.Layers) == 1 {
		form.Mode, form.Packed = mode(d.Layers[0]), d.Layers[0].Packed
	}
	for _, p := range d.Platforms {
		size := &p.Size
		if p.Size < 0 {
			size = nil
		}
		form.Platforms = append(form.Platforms, platform{p.Name, p.Digest, p.MediaType, p.ArtifactType, size, p.Local})
	}
	for _, ref := range d.Referrers {
		form.Referrers = append(form.Referrers, referrer{ref.Digest, ref.Size, ref.MediaType, ref.ArtifactType,
			ref.Annotations})
	}
	return json.Marshal(form)
}
