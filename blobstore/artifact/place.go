package artifact

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/dfcache/dfcache/digest"
)

// maxName is the length of the longest name in bytes that can be a path.
const maxName = 4095

// checkName reports a name that does not name a file below a directory.
func checkName(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("file %.40q of the artifact: %w: its name has %d bytes, at most %d are possible", name,
			digest.ErrInvalid, len(name), maxName)
	}
	if !filepath.IsLocal(name) || path.Clean(name) == "." || strings.ContainsRune(name, 0) {
		return fmt.Errorf("file %q of the artifact: %w: its name leads out of the directory", name, digest.ErrInvalid)
	}
	return nil
}

// Place is where a layer goes.
type Place struct {
	Layer
	// Path is that of the file, below the directory. Of an archive it is the
	// directory that it is unpacked in, "." for the output itself.
	Path   string
	Unpack bool
}

// Tree is what a directory has besides its files: paths are below it, and clean.
type Tree struct {
	Directories map[string]fs.FileMode // with their permissions
	Links       map[string]string      // symbolic links, with their targets
}

// Add adds what another tree has.
func (t *Tree) Add(other Tree) {
	if t.Directories == nil {
		t.Directories, t.Links = map[string]fs.FileMode{}, map[string]string{}
	}
	maps.Copy(t.Directories, other.Directories)
	maps.Copy(t.Links, other.Links)
}

// PlaceAll says where layers go, each below a directory, and checks that none leads out of it, and
// that none is in the way of another. Archives are unpacked, or stay what they are. An archive that is
// alone goes to the directory itself. Errors match [digest.ErrInvalid].
//
//nolint:cyclop // the rules of one layer after the other
func PlaceAll(layers []Layer, tree Tree, unpack, alone bool) ([]Place, error) {
	var places []Place
	taken := map[string]string{} // what is there: "" for directories
	take := func(name, what string) error {
		if was, ok := taken[name]; ok && (was != "" || what != "") {
			return fmt.Errorf("file %q of the artifact: %w: two files have this name", name, digest.ErrInvalid)
		}
		taken[name] = what
		return nil
	}
	for _, l := range layers {
		p := Place{Layer: l, Path: l.FileName(), Unpack: unpack && l.Packed}
		if p.Unpack {
			if p.Path = l.Base; alone {
				p.Path = "."
			}
		}
		if !p.Unpack || path.Clean(p.Path) != "." {
			if err := checkName(p.Path); err != nil {
				return nil, err
			}
		}
		p.Path = path.Clean(p.Path)
		what := "file"
		if p.Unpack {
			what = ""
		}
		if err := take(p.Path, what); err != nil {
			return nil, err
		}
		places = append(places, p)
	}
	for _, name := range slices.Sorted(maps.Keys(tree.Links)) {
		if err := checkLink(name, tree.Links[name]); err != nil {
			return nil, err
		}
		if err := take(name, "link"); err != nil {
			return nil, err
		}
	}
	for name := range tree.Directories {
		if err := take(name, ""); err != nil {
			return nil, err
		}
	}
	for name := range taken {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if taken[dir] != "" {
				return nil, fmt.Errorf("file %q of the artifact: %w: %q is a %s of it too", name, digest.ErrInvalid,
					dir, taken[dir])
			}
		}
	}
	return places, nil
}

// checkLink reports a symbolic link whose target is not below the directory that it is in itself.
func checkLink(name, target string) error {
	if target == "" || len(target) > maxName || path.IsAbs(target) || strings.ContainsRune(target, 0) ||
		!filepath.IsLocal(path.Join(path.Dir(name), target)) {
		return leaves(name, target)
	}
	return nil
}

func leaves(name, target string) error {
	return fmt.Errorf("link %q of the artifact: %w: its target %.200q leads out of the directory", name,
		digest.ErrInvalid, target)
}

// MakeLinks makes the links of a tree below root, where all else is already, and checks with the
// file system that none leaves it by way of another. Errors about the links match [digest.ErrInvalid].
func MakeLinks(root *os.Root, t Tree) error {
	names := slices.Sorted(maps.Keys(t.Links))
	for _, name := range names {
		if err := root.MkdirAll(path.Dir(name), 0o777); err != nil {
			return inTheWay(err)
		}
		if err := root.Symlink(t.Links[name], name); err != nil {
			return inTheWay(err)
		}
	}
	for _, name := range names {
		if !stays(root, name) {
			return leaves(name, t.Links[name])
		}
	}
	return nil
}

// stays reports whether a link, followed, stays below root: it may lead to nothing.
func stays(root *os.Root, name string) bool {
	_, err := root.Stat(name)
	return err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ELOOP) ||
		errors.Is(err, syscall.ENOTDIR) || errors.Is(err, fs.ErrPermission)
}

// inTheWay says of a part of an artifact which another part of it is in the way of that it is invalid: it
// is not the output that exists.
func inTheWay(err error) error {
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EISDIR) {
		return fmt.Errorf("%w: a part of the artifact is in the way of another: %v", digest.ErrInvalid, err)
	}
	return err
}

// ByDepth returns the directories of a tree, those that lead to others first.
func (t Tree) ByDepth() []string { return slices.Sorted(maps.Keys(t.Directories)) }
