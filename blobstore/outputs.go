package blobstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/dirs"
)

// makeParents makes the directories that lead to path. It returns what removes those that were not
// there, as far as nothing is in them.
func makeParents(path string, opts ExportOptions) (undo func(), err error) {
	var made []string // the deepest first
	for dir := filepath.Dir(filepath.Clean(path)); ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			break
		}
		made = append(made, dir)
	}
	undo = func() {
		for _, dir := range made {
			if os.Remove(dir) != nil {
				return
			}
		}
	}
	if len(made) == 0 {
		return undo, nil
	}
	err = dirs.Make(made[0], 0o777)
	for _, dir := range made {
		if err == nil && !opts.NoSync {
			err = syncDir(filepath.Dir(dir))
		}
	}
	if err != nil {
		undo()
		return nil, fmt.Errorf("output: %w", err)
	}
	return undo, nil
}

// hasContent reports whether what open opens is a file of size bytes with the digest d.
func hasContent(ctx context.Context, open func() (*os.File, error), d digest.Digest, size int64) bool {
	f, err := open()
	if err != nil {
		return false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() != size {
		return false
	}
	verifier := d.Verifier()
	_, err = io.Copy(verifier, contextReader{ctx, f})
	return err == nil && verifier.Verified()
}

// contextReader reads until its context ends.
type contextReader struct {
	context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if r.Err() != nil {
		return 0, context.Cause(r)
	}
	return r.Reader.Read(p)
}

// openRegular opens a file for reading, and waits for nobody who writes to a pipe.
func openRegular(path string) (*os.File, error) {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	return os.Open(path)
}

// hasAll reports whether the directory at path has all files in their places, and the rest of the tree; other
// files may be there, too. Whatever is packed it does not have.
func hasAll(ctx context.Context, path string, places []artifact.Place, tree artifact.Tree) bool {
	root, err := os.OpenRoot(path)
	if err != nil {
		return false
	}
	defer root.Close()
	for _, p := range places {
		if p.Unpack || !hasContent(ctx, func() (*os.File, error) { return openIn(root, p.Path) }, p.Digest, p.Size) {
			return false
		}
	}
	return hasTree(root, tree)
}

// openIn is openRegular below root; a link is none.
func openIn(root *os.Root, name string) (*os.File, error) {
	if info, err := root.Lstat(name); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	return root.Open(name)
}

// hasTree reports whether there are the directories and links of a tree below root.
func hasTree(root *os.Root, tree artifact.Tree) bool {
	for dir := range tree.Directories {
		if info, err := root.Stat(dir); err != nil || !info.IsDir() {
			return false
		}
	}
	for name, target := range tree.Links {
		if got, err := root.Readlink(name); err != nil || got != target {
			return false
		}
	}
	return true
}

// isIn reports whether the directory at path has all that has been filled into temp.
func (c *filling) isIn(ctx context.Context, temp, path string) bool {
	root, err := os.OpenRoot(path)
	if err != nil {
		return false
	}
	defer root.Close()
	for _, name := range c.names {
		if !sameContent(ctx, filepath.Join(temp, name), root, name) {
			return false
		}
	}
	return hasTree(root, c.tree)
}

// sameContent reports whether two files have the same bytes.
func sameContent(ctx context.Context, path string, root *os.Root, name string) bool {
	a, err := os.Open(path)
	if err != nil {
		return false
	}
	defer a.Close()
	b, err := openIn(root, name)
	if err != nil {
		return false
	}
	defer b.Close()
	var blocks [2][64 << 10]byte
	for {
		n, err := io.ReadFull(contextReader{ctx, a}, blocks[0][:])
		m, _ := io.ReadFull(b, blocks[1][:])
		if !bytes.Equal(blocks[0][:n], blocks[1][:m]) {
			return false
		}
		if err != nil {
			return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		}
	}
}
