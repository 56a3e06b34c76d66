package artifact

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"strconv"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
)

// TreeType is the artifact type of files that were imported together. Each is a layer, with its path
// as the title and its mode in [AnnotationMode]. What else there is the manifest has in
// [AnnotationTree].
const TreeType = "application/vnd.dfcache.tree.v1"

// AnnotationTree has the directories and symbolic links of a tree, as JSON:
//
//	{"directories": {"bin": "0755"}, "links": {"bin/latest": "v2"}}
const AnnotationTree = "io.github.dfcache.tree"

// maxTree is the number of elements that the JSON of a tree may have.
const maxTree = 1 << 17

// MaxFiles is how many files a tree can have: a manifest refers to no more blobs, one of which is its config.
const MaxFiles = p2p.MaxManifestRefs - 1

// treeJSON is the form of a tree in its annotation.
type treeJSON struct {
	Directories map[string]string `json:"directories,omitempty"`
	Links       map[string]string `json:"links,omitempty"`
}

// Tree returns the directories and links that the manifest has besides its files. Errors match
// [digest.ErrInvalid].
func (l *Layout) Tree() (Tree, error) {
	text := l.annotations[AnnotationTree]
	if text == "" || !l.tree {
		return Tree{}, nil
	}
	var form treeJSON
	if err := jsonlimit.Unmarshal([]byte(text), &form, maxTree); err != nil {
		return Tree{}, fmt.Errorf("annotation %s: %w: %.200v", AnnotationTree, digest.ErrInvalid, err)
	}
	t := Tree{map[string]fs.FileMode{}, map[string]string{}}
	for name, text := range form.Directories {
		mode, err := strconv.ParseUint(text, 8, 32)
		if err != nil {
			return Tree{}, fmt.Errorf("annotation %s: %w: mode %.20q of a directory", AnnotationTree, digest.ErrInvalid,
				text)
		}
		if err := checkName(name); err != nil {
			return Tree{}, err
		}
		t.Directories[path.Clean(name)] = fs.FileMode(mode) & fs.ModePerm
	}
	for name, target := range form.Links {
		if err := checkName(name); err != nil {
			return Tree{}, err
		}
		t.Links[path.Clean(name)] = target
	}
	return t, nil
}

// File is a file of a new tree.
type File struct {
	Name   string
	Mode   fs.FileMode
	Digest digest.Digest
	Size   int64
}

// New returns the manifest of a tree. Equal trees make equal bytes: files have to be in order. Errors match
// [digest.ErrInvalid].
func New(files []File, t Tree) ([]byte, error) {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: TreeType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{},
	}
	for _, f := range files {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: "application/octet-stream", Digest: f.Digest, Size: f.Size,
			Annotations: map[string]string{ocispec.AnnotationTitle: f.Name, AnnotationMode: octal(f.Mode)},
		})
	}
	if len(t.Directories)+len(t.Links) > 0 {
		form := treeJSON{Directories: map[string]string{}, Links: t.Links}
		for name, mode := range t.Directories {
			form.Directories[name] = octal(mode)
		}
		text, err := json.Marshal(form)
		if err != nil {
			return nil, err
		}
		m.Annotations = map[string]string{AnnotationTree: string(text)}
	}
	data, err := json.Marshal(m)
	if err == nil && len(data) > p2p.MaxManifest {
		err = fmt.Errorf("manifest: %w: with all names it would have %d bytes, the limit is %d: import an archive of "+
			"the files", digest.ErrInvalid, len(data), p2p.MaxManifest)
	}
	return data, err
}

// octal prints permissions.
func octal(mode fs.FileMode) string { return fmt.Sprintf("%04o", mode.Perm()) }
