package artifact

import (
	"fmt"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Choice says which layers of a manifest are wanted. The zero value is for whoever wants all, as
// long as all are files.
type Choice struct {
	All      bool     // also those without a name
	Names    []string // of files, or digests of layers
	Platform string   // of the manifest in an index: os/architecture, or os/architecture/variant
}

// Given reports whether anything was chosen.
func (c Choice) Given() bool { return c.All || len(c.Names) > 0 || c.Platform != "" }

// ChoiceError says that somebody has to choose. It matches [digest.ErrInvalid].
type ChoiceError struct {
	What      string   // is wrong, in words
	Platforms []string // of an index
	Files     []string // of other manifests: names, or digests where there are none
}

// maxListed is how many files or platforms an error names.
const maxListed = 20

func (e *ChoiceError) Error() string {
	list := e.Files
	if len(e.Platforms) > 0 {
		list = e.Platforms
	}
	var b strings.Builder
	for _, name := range list[:min(len(list), maxListed)] {
		fmt.Fprintf(&b, "\n  %.200s", strings.Trim(fmt.Sprintf("%q", name), `"`))
	}
	if more := len(list) - maxListed; more > 0 {
		fmt.Fprintf(&b, "\n  and %d more", more)
	}
	return fmt.Sprintf("%v: %s:%s", digest.ErrInvalid, e.What, b.String())
}

// Unwrap makes the error match [digest.ErrInvalid].
func (e *ChoiceError) Unwrap() error { return digest.ErrInvalid }

// names returns what the layers can be chosen by.
func names(layers []Layer) []string {
	var all []string
	for _, l := range layers {
		if l.Name == "" {
			all = append(all, string(l.Digest))
		} else {
			all = append(all, l.Name)
		}
	}
	return all
}

// Choose returns the layers that were chosen, those of one name and one content once, and whether
// they belong into a directory: that is so for all but one file. The error is a [*ChoiceError]
// where some would be left out that nobody has chosen to, and matches [digest.ErrInvalid].
func (l *Layout) Choose(c Choice) (chosen []Layer, directory bool, err error) {
	switch {
	case len(c.Names) > 0:
		for _, name := range c.Names {
			layer, err := l.find(name)
			if err != nil {
				return nil, false, err
			}
			chosen = append(chosen, layer)
		}
	case c.All, l.tree, len(l.Layers) == 1:
		chosen = slices.Clone(l.Layers)
	case len(l.Layers) == 0:
		return nil, false, fmt.Errorf("manifest: %w: it is not of files, but a manifest without layers",
			digest.ErrInvalid)
	default:
		named := 0
		for _, layer := range l.Layers {
			if layer.Name != "" || layer.Packed {
				named++
			}
		}
		if named < len(l.Layers) {
			what := fmt.Sprintf("%d of its %d layers are files that have names: choose", named, len(l.Layers))
			if named == 0 {
				what = fmt.Sprintf("it is not of files, but an image of %d layers without file names: choose",
					len(l.Layers))
			}
			return nil, false, &ChoiceError{What: what, Files: names(l.Layers)}
		}
		chosen = slices.Clone(l.Layers)
	}
	chosen = once(chosen)
	directory = c.All && len(c.Names) == 0 || l.tree && len(c.Names) == 0 || len(chosen) != 1
	return chosen, directory, nil
}

// find returns the layer of a name, or of a digest.
func (l *Layout) find(name string) (Layer, error) {
	var found []Layer
	for _, layer := range l.Layers {
		if string(layer.Digest) == name || layer.Name != "" && path.Clean(layer.Name) == path.Clean(name) {
			found = append(found, layer)
		}
	}
	switch found = once(found); {
	case len(found) == 0:
		return Layer{}, &ChoiceError{What: fmt.Sprintf("it has no file %.200q: it has", name), Files: names(l.Layers)}
	case len(found) > 1 && string(found[0].Digest) != name:
		var digests []string
		for _, layer := range found {
			digests = append(digests, string(layer.Digest))
		}
		return Layer{}, &ChoiceError{What: fmt.Sprintf("it has several files %.200q: choose by digest", name),
			Files: digests}
	}
	return found[0], nil
}

// once drops what has the same name and the same content as one before it.
func once(layers []Layer) []Layer {
	type key struct {
		name   string
		digest digest.Digest
	}
	seen := map[key]bool{}
	return slices.DeleteFunc(layers, func(l Layer) bool {
		k := key{"", l.Digest}
		if l.Name != "" {
			k.name = path.Clean(l.Name)
		}
		if seen[k] {
			return true
		}
		seen[k] = true
		return false
	})
}

// ChoosePlatform returns the manifest of an index that is for a platform. Without one, or where none
// or several are for it, the error is a [*ChoiceError].
func ChoosePlatform(index *manifest.Manifest, platform string) (ocispec.Descriptor, error) {
	var platforms []string
	var matching []ocispec.Descriptor
	for _, d := range index.Manifests {
		name := PlatformName(d.Platform)
		if name == "" {
			name = string(d.Digest)
		}
		platforms = append(platforms, name)
		if platform == name || platform == string(d.Digest) || strings.HasPrefix(name, platform+"/") &&
			strings.Count(platform, "/") == 1 {
			matching = append(matching, d.Descriptor)
		}
	}
	what := ""
	exact := slices.DeleteFunc(slices.Clone(matching),
		func(d ocispec.Descriptor) bool { return PlatformName(d.Platform) != platform })
	switch {
	case platform == "":
		what = "it is an index of several manifests: choose a platform"
	case len(matching) == 0:
		what = fmt.Sprintf("the index has nothing for the platform %.200q: it has", platform)
	case len(matching) == 1:
		return matching[0], nil
	case len(exact) == 1:
		return exact[0], nil
	default:
		what = fmt.Sprintf("the index has several manifests for the platform %.200q: choose one of", platform)
	}
	return ocispec.Descriptor{}, &ChoiceError{What: what, Platforms: platforms}
}
