package blobstore_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/digest"
)

// pushIndex pushes an image, and an index of it, of a manifest that is nowhere, and of one that is none.
func pushIndex(t *testing.T, r *blobstore.Repository) (img, index blobstore.Manifest) {
	t.Helper()
	pushBlobs(t, r, "one", "three", "{}")
	foreign := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerNonDistributable, //nolint:staticcheck // such exist
		Digest:    digest.SHA256.FromString("foreign"), Size: 70_000, URLs: []string{"https://example.com/foreign"}}
	config := blob("{}")
	config.MediaType = ocispec.MediaTypeImageConfig
	img = mustPushManifest(t, r, image(ocispec.Manifest{Config: config,
		Layers: []ocispec.Descriptor{blob("one"), blob("three"), foreign}}), "image")
	children := []ocispec.Descriptor{img.Descriptor, blob("nowhere")}
	for i := range children {
		children[i].MediaType = ocispec.MediaTypeImageManifest
		children[i].Platform = &ocispec.Platform{OS: "linux", Architecture: []string{"amd64", "arm64"}[i]}
		children[i].ArtifactType, children[i].Annotations = "", nil
	}
	data, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex,
		"manifests": children})
	if err != nil {
		t.Fatal(err)
	}
	return img, mustPushManifest(t, r, data, "index")
}

// TestDescribe: what only a peer has is described as what is here, and nothing of it is kept.
func TestDescribe(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		img, index := pushIndex(t, theirs)
		for where, r := range map[string]*blobstore.Repository{"here": theirs, "on a peer": r} {
			here := where == "here"
			d, err := r.Describe(t.Context(), "image", blobstore.Lookup{Providers: !here})
			if err != nil || d.Kind != "image" || d.MediaType != ocispec.MediaTypeImageManifest ||
				d.Manifest != img.Digest || d.Size != 70_008 || d.Pieces != 4 || len(d.Files) != 3 ||
				len(d.Layers) != 3 || d.Local ||
				d.Files[0].Local != here || d.Files[2].Size != 70_000 || d.Files[2].Local {
				t.Errorf("%s: the image is %+v, %v", where, d, err)
			}
			d, err = r.Describe(t.Context(), "index", blobstore.Lookup{Providers: !here})
			if err != nil || d.Kind != "index" || d.Manifest != index.Digest || d.Size != 70_008 ||
				len(d.Platforms) != 2 || d.Platforms[0].Name != "linux/amd64" || d.Platforms[0].Size != 70_008 ||
				d.Platforms[1].Size != -1 || d.Local {
				t.Errorf("%s: the index is %+v, %v", where, d, err)
			}
			if !here && (d.Providers == nil || d.Providers.Whole != 1) {
				t.Errorf("%s: the index has the providers %+v", where, d.Providers)
			}
			d, err = r.Describe(t.Context(), string(index.Digest), blobstore.Lookup{})
			if err != nil || d.Kind != "index" || d.Size != index.Size || len(d.Platforms) != 2 || d.Local != here {
				t.Errorf("%s: by its digest the index is %+v, %v", where, d, err)
			}
		}
		for entry, err := range r.List(t.Context()) {
			t.Errorf("a description keeps %v, %v", entry, err)
		}
		if _, err := r.Describe(t.Context(), "none", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrNotFound) {
			t.Errorf("what nobody has: %v", err)
		}
		if _, err := r.Describe(t.Context(), "image", local); !errors.Is(err, blobstore.ErrNotFound) {
			t.Errorf("what is not here: %v", err)
		}
	})
}

// TestExportPlatform: a manifest of an index on a peer is exported from there.
func TestExportPlatform(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		pushIndex(t, theirs)
		one := string(blob("one").Digest)
		for platform, err := range map[string]error{"": blobstore.ErrInvalid, "linux/riscv64": blobstore.ErrInvalid,
			"linux/arm64": blobstore.ErrNotFound, "linux/amd64": nil} {
			var out strings.Builder
			_, got := r.Export(t.Context(), "index", &out,
				blobstore.ExportOptions{Platform: platform, Files: []string{one}})
			choice, chosen := errors.AsType[*artifact.ChoiceError](got)
			if !errors.Is(got, err) || got == nil && out.String() != "one" || chosen != (err == blobstore.ErrInvalid) ||
				chosen && len(choice.Platforms) != 2 {
				t.Errorf("platform %q: %q, %v", platform, &out, got)
			}
		}
	})
}

// TestDescribeReferrers: what refers to a manifest is told, also where only a peer knows of it.
func TestDescribeReferrers(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		img, _ := pushIndex(t, theirs)
		subject := img.Descriptor
		subject.Annotations, subject.ArtifactType = nil, ""
		ref := mustPushManifest(t, theirs, image(ocispec.Manifest{ArtifactType: "application/x.sig", Config: blob("{}"),
			Layers: []ocispec.Descriptor{}, Subject: &subject, Annotations: map[string]string{"by": "me"}}))
		pushIndex(t, r)
		if d, err := r.Describe(t.Context(), "image", local); err != nil || len(d.Referrers) != 0 {
			t.Errorf("on this host: %+v, %v", d.Referrers, err)
		}
		for _, cid := range []string{"image", string(img.Digest)} {
			d, err := r.Describe(t.Context(), cid, blobstore.Lookup{})
			if err != nil || len(d.Referrers) != 1 || d.Referrers[0].Digest != ref.Digest ||
				d.Referrers[0].ArtifactType != "application/x.sig" || d.Referrers[0].Annotations["by"] != "me" {
				t.Errorf("%s has the referrers %+v, %v", cid, d.Referrers, err)
			}
		}
	})
}
