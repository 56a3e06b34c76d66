package blobstore_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// keeper is a repository whose content has short names.
type keeper struct {
	*blobstore.Repository
	t     *testing.T
	names map[digest.Digest]string
}

func newKeeper(t *testing.T, r *blobstore.Repository) *keeper {
	return &keeper{r, t, map[digest.Digest]string{ocispec.DescriptorEmptyJSON.Digest: "{}"}}
}

// blob pushes a blob whose name is its text.
func (k *keeper) blob(text string) ocispec.Descriptor {
	k.t.Helper()
	pushBlobs(k.t, k.Repository, text)
	k.names[blob(text).Digest] = text
	return blob(text)
}

// manifest pushes an image with a name, and with tags.
func (k *keeper) manifest(name string, m ocispec.Manifest, tags ...string) ocispec.Descriptor {
	k.t.Helper()
	m.Annotations = map[string]string{"name": name}
	d := mustPushManifest(k.t, k.Repository, image(m), tags...).Descriptor
	k.names[d.Digest] = name
	return content.NewDescriptorFromBytes(d.MediaType, image(m))
}

func (k *keeper) index(name string, manifests []ocispec.Descriptor, tags ...string) ocispec.Descriptor {
	k.t.Helper()
	data, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests, Annotations: map[string]string{"name": name}})
	if err != nil {
		k.t.Fatal(err)
	}
	d := mustPushManifest(k.t, k.Repository, data, tags...).Descriptor
	k.names[d.Digest] = name
	return content.NewDescriptorFromBytes(d.MediaType, data)
}

// file imports a file with its text as content.
func (k *keeper) file(cid, text string) blobstore.File {
	k.t.Helper()
	f := mustImport(k.t, k.Repository, cid, []byte(text), "")
	k.names[f.Digest] = text
	if f.Manifest != "" {
		k.names[f.Manifest] = "manifest of " + text
	}
	return f
}

func (k *keeper) remove(cid string) {
	k.t.Helper()
	if _, err := k.Remove(k.t.Context(), cid, blobstore.DeleteOptions{}); err != nil {
		k.t.Errorf("remove: %v", err)
	}
}

func (k *keeper) delete(d ocispec.Descriptor) {
	k.t.Helper()
	if err := k.Delete(k.t.Context(), d); err != nil {
		k.t.Errorf("delete: %v", err)
	}
}

func (k *keeper) untag(tag string) {
	k.t.Helper()
	if err := k.Untag(k.t.Context(), tag); err != nil {
		k.t.Errorf("untag: %v", err)
	}
}

// require fails the test unless the repository holds just this: tags as
// "tag=content", content by its name.
func (k *keeper) require(want ...string) {
	k.t.Helper()
	var got []string
	for e, err := range k.List(k.t.Context()) {
		if err != nil {
			k.t.Fatal(err)
		}
		name, known := k.names[e.Task.Digest]
		if !known {
			name = e.Task.Digest.String()
		}
		if e.Name != "" {
			name = e.Name + "=" + name
		}
		got = append(got, name)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		k.t.Errorf("the repository has %q, want %q", got, want)
	}
}

// TestKeep says what keeps content, and with what it goes.
func TestKeep(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for name, test := range map[string]func(k *keeper){
		"a file imported under a cache ID goes with it": func(k *keeper) {
			k.file("v1", "file")
			k.require("v1=manifest of file", "manifest of file", "file", "{}")
			k.remove("v1")
			k.require()
		},
		"a file imported anew under its cache ID lets the old one go": func(k *keeper) {
			k.file("v1", "old")
			k.file("v1", "new")
			k.require("v1=manifest of new", "manifest of new", "new", "{}")
		},
		"a file imported under two cache IDs goes with the last": func(k *keeper) {
			k.file("v1", "file")
			f := mustImport(k.t, k.Repository, "v2", []byte("file"), "other title")
			k.names[f.Manifest] = "other manifest"
			k.remove("v1")
			k.require("v2=other manifest", "other manifest", "file", "{}")
			k.remove("v2")
			k.require()
		},
		"a file imported under its digest stays": func(k *keeper) {
			f := k.file("", "file")
			k.file("v1", "file")
			k.manifest("image", ocispec.Manifest{Config: blob("file")}, "v2")
			k.remove("v1")
			k.remove("v2")
			k.require("file")
			k.remove(f.Digest.String())
			k.require()
		},
		"a blob stays until a manifest refers to it": func(k *keeper) {
			config, layer := k.blob("config"), k.blob("layer")
			k.blob("other")
			k.require("config", "layer", "other")
			k.manifest("image", ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{layer}}, "v1")
			k.manifest("image 2", ocispec.Manifest{Config: config}, "v2")
			k.require("v1=image", "v2=image 2", "image", "image 2", "config", "layer", "other")
			k.remove("v1")
			k.require("v2=image 2", "image 2", "config", "other")
			k.remove("v2")
			k.require("other")
			k.delete(blob("other"))
			k.require()
		},
		"a blob that comes after the manifest goes with it too": func(k *keeper) {
			k.manifest("image", ocispec.Manifest{Config: blob("config"), Layers: []ocispec.Descriptor{blob("layer")}},
				"v1")
			k.blob("config")
			k.require("v1=image", "image", "config")
			k.remove("v1")
			k.require()
		},
		"an uploaded blob is as one that is pushed": func(k *keeper) {
			u := newUpload(k.t, k.Repository, "")
			mustAppend(k.t, u, []byte("config"))
			if _, err := u.Commit(blob("config").Digest); err != nil {
				k.t.Fatal(err)
			}
			k.names[blob("config").Digest] = "config"
			k.require("config")
			k.manifest("image", ocispec.Manifest{Config: blob("config")}, "v1")
			k.remove("v1")
			k.require()
		},
		"a manifest that is pushed by digest stays": func(k *keeper) {
			m := k.manifest("image", ocispec.Manifest{Config: k.blob("config")})
			k.require("image", "config")
			if err := k.Tag(k.t.Context(), m, "v1"); err != nil {
				k.t.Fatal(err)
			}
			k.require("v1=image", "image", "config")
			k.remove("v1") // it had a holder, and this was the last
			k.require()
		},
		"a manifest stays when it loses its tag through OCI": func(k *keeper) {
			k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1", "v2")
			k.untag("v1")
			k.require("v2=image", "image", "config")
			k.untag("v2")
			k.require("image", "config")
			k.manifest("image", ocispec.Manifest{Config: blob("config")}, "v3")
			k.require("v3=image", "image", "config")
			k.remove("v3")
			k.require()
		},
		"a tag that moves through OCI lets nothing go": func(k *keeper) {
			first := k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
			k.manifest("image 2", ocispec.Manifest{Config: k.blob("config 2")}, "v1")
			k.require("v1=image 2", "image", "image 2", "config", "config 2")
			if err := k.Tag(k.t.Context(), first, "v1"); err != nil {
				k.t.Fatal(err)
			}
			k.require("v1=image", "image", "image 2", "config", "config 2")
		},
		"an import takes a tag, and what only that held goes": func(k *keeper) {
			k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
			k.file("v1", "file")
			k.require("v1=manifest of file", "manifest of file", "file", "{}")
		},
		"a push takes a cache ID, and the file stays": func(k *keeper) {
			k.file("v1", "file")
			k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
			k.require("v1=image", "image", "config", "manifest of file", "file", "{}")
		},
		"an index holds its manifests": func(k *keeper) {
			a := k.manifest("a", ocispec.Manifest{Config: k.blob("config")})
			b := k.manifest("b", ocispec.Manifest{
				Config: blob("config"), Layers: []ocispec.Descriptor{k.blob("layer")}}, "b")
			k.index("index", []ocispec.Descriptor{a, b}, "v1")
			k.untag("b")
			k.index("outer", []ocispec.Descriptor{content.NewDescriptorFromBytes("", nil), a}, "outer")
			k.require("v1=index", "outer=outer", "index", "outer", "a", "b", "config", "layer")
			k.remove("v1")
			k.require("outer=outer", "outer", "a", "config")
			k.remove("outer")
			k.require()
		},
		"a tagged manifest outlives its index": func(k *keeper) {
			a := k.manifest("a", ocispec.Manifest{Config: k.blob("config")}, "a")
			k.index("index", []ocispec.Descriptor{a}, "v1")
			k.remove("v1")
			k.require("a=a", "a", "config")
		},
		"what is about a manifest goes with it": func(k *keeper) {
			m := k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
			sbom := k.manifest("sbom", ocispec.Manifest{
				Config: k.blob("{}"), Subject: &m, Layers: []ocispec.Descriptor{k.blob("text")}})
			k.manifest("signature", ocispec.Manifest{Config: blob("{}"), Subject: &sbom})
			k.manifest("tagged", ocispec.Manifest{Config: blob("{}"), Subject: &m}, "about")
			k.require("v1=image", "about=tagged", "image", "sbom", "signature", "tagged", "config", "text", "{}")
			k.remove("v1")
			k.require("about=tagged", "tagged", "{}")
		},
		"what is about a manifest can go alone": func(k *keeper) {
			m := k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
			sbom := k.manifest("sbom", ocispec.Manifest{Config: k.blob("{}"), Subject: &m})
			k.delete(sbom)
			k.require("v1=image", "image", "config")
		},
		"what is about a manifest may come first": func(k *keeper) {
			data := image(ocispec.Manifest{Config: blob("config"), Annotations: map[string]string{"name": "image"}})
			subject := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, data)
			k.manifest("sbom", ocispec.Manifest{Config: k.blob("{}"), Subject: &subject})
			k.require("sbom", "{}")
			k.manifest("image", ocispec.Manifest{Config: k.blob("config")})
			k.require("image", "config", "sbom", "{}")
			k.delete(subject)
			k.require()
		},
		"a digest goes with the tags that point to it": func(k *keeper) {
			m := k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1", "v2")
			k.delete(m)
			k.require()
			f := k.file("v3", "file")
			k.remove(f.Manifest.String())
			k.require()
		},
		"what a manifest refers to is not deleted but by force": func(k *keeper) {
			m := k.manifest("image", ocispec.Manifest{
				Config: k.blob("config"), Layers: []ocispec.Descriptor{k.blob("layer")}}, "v1")
			k.index("index", []ocispec.Descriptor{m}, "outer")
			for _, d := range []ocispec.Descriptor{blob("layer"), m} {
				if _, err := k.Remove(k.t.Context(), d.Digest.String(), blobstore.DeleteOptions{}); !errors.Is(err,
					blobstore.ErrReferenced) {
					k.t.Errorf("remove: %v", err)
				}
				if err := k.Delete(k.t.Context(), d); !errors.Is(err, blobstore.ErrReferenced) {
					k.t.Errorf("delete: %v", err)
				}
			}
			k.require("v1=image", "outer=index", "index", "image", "config", "layer")
			if _, err := k.Remove(k.t.Context(), blob("layer").Digest.String(),
				blobstore.DeleteOptions{Force: true}); err != nil {
				k.t.Error(err)
			}
			k.require("v1=image", "outer=index", "index", "image", "config")
			k.remove("v1")
			k.remove("outer")
			k.require()
		},
		"a tag of a blob holds it": func(k *keeper) {
			d := k.blob("text")
			if err := k.Tag(k.t.Context(), d, "v1"); err != nil {
				k.t.Fatal(err)
			}
			k.untag("v1")
			k.require("text")
			if err := k.Tag(k.t.Context(), d, "v1"); err != nil {
				k.t.Fatal(err)
			}
			k.remove("v1")
			k.require()
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			eachStoreWithoutLeases(t, func(t *testing.T, s *blobstore.Store) {
				for _, tag := range []string{"", "t"} {
					test(newKeeper(t, repository(t, s, tag)))
				}
			})
		})
	}
}

// TestOtherTagsKeep: bytes stay for as long as one tag holds them, and what one
// tag does is nothing to another.
func TestOtherTagsKeep(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		a, b := newKeeper(t, repository(t, s, "a")), newKeeper(t, repository(t, s, ""))
		for _, k := range []*keeper{a, b} {
			k.manifest("image", ocispec.Manifest{Config: k.blob("config")}, "v1")
		}
		deleted, err := a.Remove(t.Context(), "v1", blobstore.DeleteOptions{})
		if err != nil || deleted.Tasks != 2 || deleted.Freed != 0 {
			t.Errorf("removed under the first tag: %+v, %v", deleted, err)
		}
		a.require()
		b.require("v1=image", "image", "config")
		m, err := b.Manifest(t.Context(), "v1")
		if err != nil {
			t.Fatal(err)
		}
		deleted, err = b.Remove(t.Context(), "v1", blobstore.DeleteOptions{})
		if err != nil || deleted.Tasks != 2 || deleted.Freed != m.Size+int64(len("config")) {
			t.Errorf("removed under the last tag: %+v, %v", deleted, err)
		}
		b.require()
	})
}

// TestBothDoors: what was imported is an artifact to OCI tools, and the reverse.
func TestBothDoors(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "models")
		f := mustImport(t, r, "v1", []byte("imported"), "/some/where/model.bin")
		out := memory.New()
		d, err := oras.Copy(t.Context(), r, "v1", out, "", oras.DefaultCopyOptions)
		if err != nil || d.Digest != f.Manifest {
			t.Fatalf("copy out: %+v, %v", d, err)
		}
		layers, err := content.Successors(t.Context(), out, d)
		if err != nil || len(layers) != 2 {
			t.Fatalf("what was copied is made of %+v, %v", layers, err)
		}
		data, err := content.FetchAll(t.Context(), out, layers[1])
		if err != nil || string(data) != "imported" || layers[1].Annotations[ocispec.AnnotationTitle] != "model.bin" {
			t.Errorf("the file is %q, %+v, %v", data, layers[1], err)
		}

		layer, err := oras.PushBytes(t.Context(), out, "application/x-model", []byte("pushed"))
		if err != nil {
			t.Fatal(err)
		}
		layer.Annotations = map[string]string{ocispec.AnnotationTitle: "other.bin"}
		m, err := oras.PackManifest(t.Context(), out, oras.PackManifestVersion1_1,
			"application/x-artifact", oras.PackManifestOptions{Layers: []ocispec.Descriptor{layer}})
		if err != nil {
			t.Fatal(err)
		}
		if err := out.Tag(t.Context(), m, "v2"); err != nil {
			t.Fatal(err)
		}
		if _, err := oras.Copy(t.Context(), out, "v2", r, "", oras.DefaultCopyOptions); err != nil {
			t.Fatalf("copy in: %v", err)
		}
		for _, cid := range []string{"v2", layer.Digest.String()} {
			got, err := r.Stat(t.Context(), cid, blobstore.Lookup{})
			if err != nil || got.Digest != layer.Digest ||
				cid == "v2" && (got.Title != "other.bin" || got.Manifest != m.Digest) {
				t.Errorf("stat %s: %+v, %v", cid, got, err)
			}
			var text strings.Builder
			if _, err := r.Export(t.Context(), cid, &text, blobstore.ExportOptions{}); err != nil ||
				text.String() != "pushed" {
				t.Errorf("export %s: %q, %v", cid, text.String(), err)
			}
		}
		var listed []string
		for e, err := range r.List(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			listed = append(listed, fmt.Sprintf("%s %s", e.Name, e.MediaType))
		}
		if len(listed) != 2+5 { // names; two files, two manifests, one config
			t.Errorf("the list is %q", listed)
		}
	})
}
