package blobstore

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// FuzzParseManifest: whatever a client sends as a manifest is refused with
// ErrInvalid, or all that is read out of it can be relied on.
func FuzzParseManifest(f *testing.F) {
	const layer = `{"mediaType":"a/b","digest":"sha256:853ff93762a06ddbf722c4ebe9ddd66d8f63ddaea97f521c3ecc20da7c976020","size":13`
	for _, text := range []string{
		"", "{}", " {}\n", "[]", "null", `"text"`, "{}{}", `{"layers":null}`, `{"layers":{}}`, `{"config":[]}`,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + layer +
			`},"layers":[` + layer + `}]}`,
		`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + layer + `},` + layer +
			`,"platform":{"os":"linux"}}]}`,
		`{"artifactType":"x","blobs":[` + layer + `}],"subject":` + layer + `},"annotations":{"a":"b"}}`,
		`{"layers":[` + layer + `,"annotations":{"org.opencontainers.image.title":"a/../../b"}},` + layer +
			`,"annotations":{"org.opencontainers.image.title":"c"}}]}`,
		`{"layers":[` + layer + `,"urls":["https://example.org"]}]}`,
		`{"subject":{"digest":"sha256:x"}}`, `{"layers":[{"digest":"md5:d41d8cd98f00b204e9800998ecf8427e"}]}`,
		`{"mediaType":"a/b\r\nX: y"}`, `{"LAYERS":[` + layer + `}]}`, `{"layers":[` + layer + `,"size":-1}]}`,
		`{"config":null,"subject":null}`,
		`{"schemaVersion":2,"config":` + layer + `},"layers":[],"manifests":[]}`,
		`{"schemaVersion":2,"config":` + layer + `},"layers":[],"layers":[],"layer` + "\u017f" + `":[]}`,
		`{"schemaVersion":2,"manifests":[` + layer + `,"Size":1,"data":"eA==","platform":{"os":"a","OS":"b"}}]}`,
	} {
		f.Add([]byte(text), "")
		f.Add([]byte(text), "application/vnd.oci.image.manifest.v1+json; charset=utf-8")
	}
	f.Fuzz(func(t *testing.T, data []byte, mediaType string) {
		m, err := manifest.Accept(data)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error is %v", err)
			}
			return
		}
		if !json.Valid(data) {
			t.Fatal("it is not JSON")
		}
		requireSame(t, data, m)
		refs := m.References(true)
		seen := map[digest.Digest]bool{}
		for _, d := range refs.Refs {
			if _, err := digest.Parse(string(d)); err != nil || seen[d] {
				t.Fatalf("it refers to %q, seen before: %t (%v)", d, seen[d], err)
			}
			seen[d] = true
		}
		for _, d := range refs.Needs {
			if !seen[d] {
				t.Fatalf("it needs %s and does not refer to it", d)
			}
		}
		if _, err := digest.Parse(string(refs.Subject)); refs.Subject != "" && err != nil {
			t.Fatal(err)
		}
		if len(m.References(false).Needs) != 0 || !slices.Equal(m.References(false).Refs, refs.Refs) {
			t.Fatal("without a check it refers to something else")
		}
		if kind, err := m.TypeAs(mediaType); err == nil && manifest.CheckType(kind) == nil {
			given, _, _ := strings.Cut(mediaType, ";")
			if given = strings.TrimSpace(given); kind == "" || strings.ContainsAny(kind, "\r\n\x00") ||
				given != "" && !strings.EqualFold(kind, given) || m.MediaType != "" && kind != m.MediaType {
				t.Fatalf("pushed as %q its media type is %q", mediaType, kind)
			}
		} else if err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("error is %v", err)
		}
		layers, _, err := artifact.Read(m, nil).Choose(artifact.Choice{})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error is %v", err)
			}
			return
		}
		requireNames(t, layers)
	})
}

// requireSame fails the test unless a parser that takes names as they are, and knows nothing of
// manifests, sees what m has.
func requireSame(t *testing.T, data []byte, m *manifest.Manifest) {
	var object map[string]any
	if err := json.Unmarshal(data, &object); err != nil {
		t.Fatal(err)
	}
	count := func(list any) int {
		all, _ := list.([]any)
		return len(all)
	}
	if count(object["layers"]) != len(m.Layers) || count(object["manifests"]) != len(m.Manifests) ||
		count(object["blobs"]) != len(m.Blobs) || (object["config"] != nil) != (m.Config != nil) ||
		(object["subject"] != nil) != (m.Subject != nil) {
		t.Fatalf("others read %v", object)
	}
	for i, d := range m.Layers {
		layer, _ := object["layers"].([]any)[i].(map[string]any)
		if layer["digest"] != string(d.Digest) {
			t.Fatalf("others read layer %d as %v", i, layer)
		}
	}
}

// requireNames fails the test unless the paths of files, where they get some,
// are all below a directory, and none is another's or its directory.
func requireNames(t *testing.T, layers []artifact.Layer) {
	places, err := artifact.PlaceAll(layers, artifact.Tree{}, false, false)
	if err != nil {
		if !errors.Is(err, ErrInvalid) {
			t.Fatalf("error is %v", err)
		}
		return
	}
	for i, place := range places {
		path := filepath.Join("/dir", place.Path)
		if !strings.HasPrefix(path, "/dir/") || strings.ContainsRune(path, 0) {
			t.Fatalf("title %q leads to %q", place.Name, path)
		}
		for j, other := range places {
			if i != j && strings.HasPrefix(path+"/", filepath.Join("/dir", other.Path)+"/") {
				t.Fatalf("the titles %q and %q are in each other's way", place.Name, other.Name)
			}
		}
	}
}

func FuzzTitles(f *testing.F) {
	for _, titles := range [][2]string{
		{"a", "b"}, {"a", "a/b"}, {"../x", ""}, {"/abs", "."}, {"a/../../x", ".."}, {"x\x00y", "a//b"},
		{"a/./b", "a/b/"}, {"...", "..a"}, {"\xff", " "},
	} {
		f.Add(titles[0], titles[1])
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		layer := func(title string) artifact.Layer {
			d := ocispec.Descriptor{Digest: digest.SHA256.FromString(title)}
			return artifact.Layer{Descriptor: d, Name: title}
		}
		requireNames(t, []artifact.Layer{layer(a), layer(b)})
	})
}

func FuzzReference(f *testing.F) {
	for _, text := range []string{
		"", "v1", "V1.0-rc_1", ".v1", "a/b", "a b", "sha256:x", "md5:d41d8cd98f00b204e9800998ecf8427e", "v1@sha256:x",
		"sha256:853ff93762a06ddbf722c4ebe9ddd66d8f63ddaea97f521c3ecc20da7c976020", "dfcache/default", "library/models",
		"a//b", "A", "../x", strings.Repeat("a", 300),
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		switch cid, err := parseReference(text); {
		case err == nil:
			if cid.String() != text || cid.IsZero() {
				t.Fatalf("reference %q is read as %q", text, cid)
			}
		case !errors.Is(err, ErrInvalid) ||
			!errors.Is(err, errdef.ErrInvalidReference) && !errors.Is(err, errdef.ErrMissingReference):
			t.Fatalf("reference %q: %v", text, err)
		}
		switch tag, err := TagOf(text); {
		case err == nil:
			if RepositoryName(tag) != text {
				t.Fatalf("repository %q has the tag %q, whose name is %q", text, tag, RepositoryName(tag))
			}
		case !errors.Is(err, ErrInvalid):
			t.Fatalf("repository %q: %v", text, err)
		}
	})
}
