package artifact

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dfcache/dfcache/digest"
)

// Source is a file on this host that becomes part of an artifact.
type Source struct {
	Name string // in the artifact
	Path string // on this host
	Size int64  // when it was seen
}

// Scan returns what an artifact of these files and directories has: files in order of name, and
// what else there is. What is in a directory that is alone has its path below that; of several,
// each has its own name before that. Symbolic links in a directory stay links, and have to lead to
// something in it; paths themselves are followed. Errors that the caller can mend match
// [digest.ErrInvalid].
func Scan(paths []string) ([]Source, Tree, error) {
	s := scan{tree: Tree{map[string]fs.FileMode{}, map[string]string{}}, names: map[string]string{}}
	for _, p := range paths {
		name := ""
		if info, err := os.Stat(p); err != nil {
			return nil, Tree{}, fmt.Errorf("input: %w", err)
		} else if len(paths) > 1 || !info.IsDir() {
			abs, err := filepath.Abs(p)
			if err != nil {
				return nil, Tree{}, fmt.Errorf("input: %w", err)
			}
			if name = filepath.Base(abs); name == "/" {
				return nil, Tree{}, fmt.Errorf("input %s: %w: it has no name of its own", p, digest.ErrInvalid)
			}
		}
		if err := s.add(p, name); err != nil {
			return nil, Tree{}, err
		}
	}
	slices.SortFunc(s.files, func(a, b Source) int { return strings.Compare(a.Name, b.Name) })
	return s.files, s.tree, nil
}

type scan struct {
	files []Source
	tree  Tree
	names map[string]string // of what was given, with the path that it was given by
}

// add adds what is at p under name, "" for what has the names below it.
func (s *scan) add(p, name string) error {
	if before, ok := s.names[name]; ok {
		return fmt.Errorf("input %s: %w: %s has the same name", p, digest.ErrInvalid, before)
	}
	s.names[name] = p
	info, err := os.Stat(p)
	if err != nil {
		return fmt.Errorf("input: %w", err)
	}
	if !info.IsDir() {
		return s.file(p, name, info)
	}
	root, err := os.OpenRoot(p)
	if err != nil {
		return fmt.Errorf("input: %w", err)
	}
	defer root.Close()
	return filepath.WalkDir(p+"/.", func(at string, e fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("input: %w", err)
		}
		below, err := filepath.Rel(p, at)
		if err != nil {
			return fmt.Errorf("input: %w", err)
		}
		in := path.Join(name, below)
		if in == "." || in == "" {
			return nil
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("input: %w", err)
		}
		return s.entry(root, at, in, below, info)
	})
}

// entry adds what a directory has.
func (s *scan) entry(root *os.Root, at, name, below string, info fs.FileInfo) error {
	if !utf8.ValidString(name) {
		return fmt.Errorf("input %q: %w: its name is not UTF-8, as a manifest is", at, digest.ErrInvalid)
	}
	if n := len(s.tree.Directories) + len(s.tree.Links); n > maxTree/2 {
		return fmt.Errorf("input: %w: there are more than %d directories and links", digest.ErrInvalid, maxTree/2)
	}
	switch {
	case info.IsDir():
		s.tree.Directories[name] = info.Mode().Perm()
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(at)
		if err != nil {
			return fmt.Errorf("input: %w", err)
		}
		if checkLink(below, target) != nil || !utf8.ValidString(target) || !stays(root, below) {
			return fmt.Errorf("input %s: %w: the link leads out of the directory, to %.200q", at, digest.ErrInvalid,
				target)
		}
		s.tree.Links[name] = target
	default:
		return s.file(at, name, info)
	}
	return nil
}

// file adds a file.
func (s *scan) file(at, name string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("input %s: %w: it is neither a file, a directory nor a link", at, digest.ErrInvalid)
	}
	if !utf8.ValidString(name) {
		return fmt.Errorf("input %q: %w: its name is not UTF-8, as a manifest is", at, digest.ErrInvalid)
	}
	if len(s.files) == MaxFiles {
		return fmt.Errorf("input: %w: there are more than %d files, which is the limit for one artifact: import an "+
			"archive of them", digest.ErrInvalid, MaxFiles)
	}
	s.files = append(s.files, Source{name, at, info.Size()})
	return nil
}
