package artifact

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/dfcache/dfcache/digest"
)

// What an archive may have and become: all names are in memory, and a small one must not fill a disk. Only
// tests change it.
var (
	maxEntries    = 1 << 18
	maxEntryNames = 64 << 20 // bytes of all names
	// A gzip of zeros has a thousandth of their size. Up to so many bytes that is nobody's
	// harm; beyond, an archive may become maxCompression times its own size.
	minUnpacked int64 = 4 << 30
)

const maxCompression = 200

// ErrPacked is what the error of an archive matches that can't be unpacked, besides
// [digest.ErrInvalid]: it can be had as it is.
var ErrPacked = errors.New("can't be unpacked")

// packedError says what is wrong with an archive.
type packedError struct{ text string }

func (e packedError) Error() string {
	return fmt.Sprintf("%v: %v: %s", digest.ErrInvalid, ErrPacked, e.text)
}

func (e packedError) Unwrap() []error { return []error{digest.ErrInvalid, ErrPacked} }

func packed(format string, args ...any) error { return packedError{fmt.Sprintf(format, args...)} }

// unpacking is one archive on its way into a directory.
type unpacking struct {
	ctx     context.Context
	root    *os.Root
	place   Place
	tree    Tree
	made    map[string]bool // files
	entries int
	names   int   // bytes of their names
	left    int64 // bytes that files may still have: holes in them are not in the archive
}

// Unpack unpacks the archive that src has, of size bytes, where place says, below root. Only files
// and directories are made: their modes are set for files; what is returned are the modes of the
// directories, and the symbolic links, which are to be made when nothing is written any more.
// Nothing is written through a link, and nothing outside root. Where the layer states the digest of
// the archive's content, that is checked: another one is a [digest.MismatchError]. What is wrong
// with the archive matches [ErrPacked] and [digest.ErrInvalid].
func Unpack(ctx context.Context, root *os.Root, place Place, src io.Reader, size int64) (Tree, error) {
	limit := max(minUnpacked, size*maxCompression)
	u := &unpacking{ctx: ctx, root: root, place: place, made: map[string]bool{}, left: limit,
		tree: Tree{map[string]fs.FileMode{}, map[string]string{}}}
	content, err := decompress(src)
	if err != nil {
		return Tree{}, u.about(err)
	}
	in := &limited{ctx: ctx, src: content, left: limit}
	var want digest.Digest
	if text := place.Annotations[AnnotationDigest]; text != "" {
		if want, err = digest.Parse(text); err != nil {
			return Tree{}, u.about(packed("the digest of its content is stated as %.100q", text))
		}
		in.hash = want.Algorithm().Hash()
	}
	if err := u.all(in); err != nil {
		return Tree{}, u.about(err)
	}
	if in.hash != nil {
		if got := digest.Digest(fmt.Sprintf("%s:%x", want.Algorithm(), in.hash.Sum(nil))); got != want {
			return Tree{}, u.about(&digest.MismatchError{Want: want, Got: got})
		}
	}
	return u.tree, nil
}

// about says which archive an error is of.
func (u *unpacking) about(err error) error {
	return fmt.Errorf("archive %.200q of the artifact: %w", u.place.FileName(), err)
}

// decompress reads an archive: a tar, or a gzip of one. Media types say nothing reliable about that.
func decompress(src io.Reader) (io.Reader, error) {
	in := bufio.NewReaderSize(src, 256<<10)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		content, err := gzip.NewReader(in)
		if err != nil {
			return nil, packed("%v", err)
		}
		return content, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return nil, packed("it is compressed with zstd")
	}
	return in, nil
}

// limited reads no more than so many bytes, and hashes them.
type limited struct {
	ctx  context.Context
	src  io.Reader
	left int64
	hash hash.Hash // or nil
}

var errTooLarge = packed("it would become too large for its size")

func (l *limited) Read(p []byte) (int, error) {
	if l.ctx.Err() != nil {
		return 0, context.Cause(l.ctx)
	}
	n, err := l.src.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, errTooLarge
	}
	if l.hash != nil {
		l.hash.Write(p[:n])
	}
	return n, err
}

// all unpacks everything.
func (u *unpacking) all(in io.Reader) error {
	archive := tar.NewReader(in)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return broken(err)
		}
		u.entries, u.names, u.left = u.entries+1, u.names+len(h.Name)+len(h.Linkname), u.left-h.Size
		if u.entries > maxEntries || u.names > maxEntryNames {
			return packed("it has more than %d entries, or too long names", maxEntries)
		}
		if u.left < 0 {
			return errTooLarge
		}
		if err := u.one(h, archive); err != nil {
			return err
		}
	}
	// What is behind the end counts for the digest.
	_, err := io.Copy(io.Discard, in)
	return broken(err)
}

// broken says of an archive that can't be read that it is the archive.
func broken(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrHeader) ||
		errors.Is(err, gzip.ErrChecksum) || errors.Is(err, tar.ErrFieldTooLong) ||
		strings.HasPrefix(fmt.Sprint(err), "flate: ") {
		return packed("%v", err)
	}
	return err
}

// one unpacks one entry.
func (u *unpacking) one(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := u.pathOf(h.Name)
	if err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	if h.Typeflag == tar.TypeDir {
		if name == "." {
			return nil // it is there, with the mode that its owner wants
		}
		if err := u.root.MkdirAll(name, 0o777); err != nil {
			return inTheWay(err)
		}
		u.tree.Directories[name] = mode
		return nil
	}
	if name == "." {
		return packed("%.200q in it is no directory", h.Name)
	}
	if u.made[name] || u.tree.Links[name] != "" {
		return packed("it has %.200q twice", h.Name)
	}
	if err := u.root.MkdirAll(path.Dir(name), 0o777); err != nil {
		return inTheWay(err)
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		u.made[name] = true
		return u.file(name, mode, content)
	case tar.TypeLink:
		target, err := u.pathOf(h.Linkname)
		if err != nil {
			return err
		}
		if !u.made[target] {
			return packed("%.200q in it is a link to %.200q, which is no file before it", h.Name, h.Linkname)
		}
		u.made[name] = true
		return inTheWay(u.root.Link(target, name))
	case tar.TypeSymlink:
		if err := checkLink(name, h.Linkname); err != nil {
			return err
		}
		u.tree.Links[name] = h.Linkname
		return nil
	}
	return packed("%.200q in it is neither file, directory nor link", h.Name)
}

// pathOf returns where an entry goes below the root.
func (u *unpacking) pathOf(name string) (string, error) {
	clean, ok := path.Clean(name), true
	if base := path.Clean(u.place.Base); base != "." {
		if clean == base {
			clean = "."
		} else {
			clean, ok = strings.CutPrefix(clean, base+"/")
		}
	}
	clean = path.Join(u.place.Path, clean)
	if !ok || name == "" || len(clean) > maxName || path.IsAbs(name) || !filepath.IsLocal(path.Clean(name)) ||
		!filepath.IsLocal(clean) || strings.ContainsRune(name, 0) {
		return "", packed("its entry %.200q leads out of the directory", name)
	}
	return clean, nil
}

// file makes a file.
func (u *unpacking) file(name string, mode fs.FileMode, content io.Reader) error {
	out, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return inTheWay(err)
	}
	_, err = io.Copy(out, content)
	if err == nil {
		err = out.Chmod(OwnerReads(mode))
	} else {
		err = broken(err)
	}
	return errors.Join(err, out.Close())
}

// OwnerReads adds to the permissions of a file that its owner can read it.
func OwnerReads(mode fs.FileMode) fs.FileMode { return mode | 0o400 }
