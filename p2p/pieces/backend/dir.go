package backend

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/dfcache/dfcache/digest"
)

// Dir is a backend in a directory, which others can read as an OCI image layout:
//
//	DIR/blobs/<alg>/<hex>   blobs, immutable, 0444
//	DIR/ingest/             what comes in, and claims: NAME.ALGORITHM.HEX
//	DIR/partial/            parts of blobs, and what is noted about them
type Dir struct {
	dir   string
	files Files
	log   *slog.Logger
}

var _ Backend = (*Dir)(nil)

// NewDir returns the backend in dir, an absolute path.
func NewDir(dir string, files Files, log *slog.Logger) *Dir { return &Dir{dir, files, log} }

// Algorithms are those that blobs may have.
var Algorithms = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}

func (b *Dir) path(elem ...string) string {
	return filepath.Join(append([]string{b.dir}, elem...)...)
}

// newName returns a name in ingest/ that nothing else has.
func (b *Dir) newName() string { return b.path("ingest", strings.ToLower(rand.Text())) }

// Prepare implements [Backend]. The directories are for owner and group only: a blob may be
// less public than the machine is.
func (b *Dir) Prepare(existing bool) error {
	if existing {
		if _, err := os.Stat(b.path("ingest")); err != nil {
			if IsMissing(err) {
				err = fs.ErrNotExist
			}
			return err
		}
	}
	parts := []string{b.path("ingest"), b.path("partial"), b.path("blobs")}
	for _, alg := range Algorithms {
		parts = append(parts, b.path("blobs", alg.String()))
	}
	made := false
	for _, dir := range parts {
		err := os.Mkdir(dir, 0o750)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		made = made || err == nil
	}
	if !made {
		return nil
	}
	return errors.Join(b.files.SyncDir(b.path("blobs")), b.files.SyncDir(b.dir))
}

// Free implements [Backend].
func (b *Dir) Free() (n int64, known bool) { return FreeOn(b.dir) }

// Scratch implements [Backend].
func (b *Dir) Scratch() string { return b.path("ingest") }

// Create implements [Incoming].
func (b *Dir) Create() (name string, f *os.File, err error) {
	name = b.newName()
	f, err = b.files.Create(name)
	return name, f, err
}

// Sync implements [Incoming].
func (b *Dir) Sync(f *os.File) error { return b.files.Sync(f) }

// Put implements [Incoming].
func (b *Dir) Put(name string, d digest.Digest) (claim string, err error) {
	marker := fmt.Sprintf("%s.%s.%s", name, d.Algorithm(), d.Encoded())
	if err := b.files.Mark(name, marker); err != nil {
		return "", err
	}
	if err := b.makeWay(d); err != nil {
		return marker, err
	}
	return marker, b.files.Rename(name, b.Path(d))
}

// makeWay moves a directory that somebody has put where the file of a blob
// belongs to a name of its own, which a check reports: what is in it is not ours.
func (b *Dir) makeWay(d digest.Digest) error {
	path := b.Path(d)
	info, err := os.Lstat(path)
	if IsMissing(err) || err == nil && !info.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	aside := path + ".displaced-" + filepath.Base(b.newName())
	b.log.Warn("a directory was where the file of a blob belongs; it was moved", "directory", path, "to", aside)
	return os.Rename(path, aside)
}

// Discard implements [Incoming].
func (b *Dir) Discard(name string) error { return b.files.Remove(name) }

// Claims implements [Incoming].
func (b *Dir) Claims() (claimed []digest.Digest, err error) {
	entries, err := os.ReadDir(b.path("ingest"))
	for _, e := range entries {
		if parts := strings.Split(e.Name(), "."); len(parts) == 3 {
			if d, err := digest.Parse(parts[1] + ":" + parts[2]); err == nil {
				claimed = append(claimed, d)
			}
		}
	}
	return claimed, ignoreMissing(err)
}

// Clean implements [Incoming].
func (b *Dir) Clean() (n int, err error) {
	entries, err := os.ReadDir(b.path("ingest"))
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if e.IsDir() {
			b.log.Warn("somebody has made a directory where content arrives; it is left as it is",
				"directory", b.path("ingest", e.Name()))
			continue
		}
		if err := ignoreMissing(b.files.Remove(b.path("ingest", e.Name()))); err != nil {
			return 0, err
		}
	}
	return len(entries), b.makeLayout()
}

// makeLayout makes the two files that make the directory an OCI image layout,
// which other programs can read. What names stand for is in the metadata: the index
// has none.
func (b *Dir) makeLayout() error {
	made := false
	for name, content := range map[string]string{
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`,
		"index.json": `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`,
	} {
		if _, err := os.Stat(b.path(name)); !IsMissing(err) {
			continue
		}
		f, err := b.files.Create(b.path("ingest", name))
		if err != nil {
			return err
		}
		_, err = f.WriteString(content + "\n")
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if err := b.files.Rename(b.path("ingest", name), b.path(name)); err != nil {
			return err
		}
		made = true
	}
	if !made {
		return nil
	}
	return b.files.SyncDir(b.dir)
}

// Open implements [Blobs].
func (b *Dir) Open(d digest.Digest) (*os.File, error) { return OpenRegular(b.Path(d)) }

// Stat implements [Blobs].
func (b *Dir) Stat(d digest.Digest) (fs.FileInfo, error) {
	info, err := os.Stat(b.Path(d))
	if errors.Is(err, syscall.ELOOP) {
		return nil, ErrNotRegular
	}
	return info, requireRegular(info, err)
}

// Take implements [Blobs].
func (b *Dir) Take(d digest.Digest) (name string, err error) {
	if err := b.makeWay(d); err != nil {
		return "", err
	}
	name = b.newName()
	return name, b.files.Rename(b.Path(d), name)
}

// Flush implements [Blobs].
func (b *Dir) Flush(alg digest.Algorithm) error {
	return b.files.SyncDir(b.path("blobs", alg.String()))
}

// Blobs implements [Blobs].
func (b *Dir) Blobs() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for _, alg := range Algorithms {
			dir := b.path("blobs", alg.String())
			entries, err := os.ReadDir(dir)
			if ignoreMissing(err) != nil {
				yield(Entry{}, err)
				return
			}
			for _, e := range entries {
				if !yield(Entry{digest.Digest(alg.String() + ":" + e.Name()), filepath.Join(dir, e.Name())}, nil) {
					return
				}
			}
		}
	}
}

// Path implements [Blobs].
func (b *Dir) Path(d digest.Digest) string {
	return b.path("blobs", d.Algorithm().String(), d.Encoded())
}

func (b *Dir) partialPath(d digest.Digest) string {
	return b.path("partial", d.Algorithm().String()+"."+d.Encoded())
}

func (b *Dir) notePath(d digest.Digest, n Note) string { return b.partialPath(d) + "." + string(n) }

// OpenPartial implements [Partials].
func (b *Dir) OpenPartial(d digest.Digest) (*os.File, error) {
	return os.OpenFile(b.partialPath(d), os.O_RDWR|os.O_CREATE, 0o600)
}

// StatPartial implements [Partials].
func (b *Dir) StatPartial(d digest.Digest) (Partial, error) {
	info, err := os.Stat(b.partialPath(d))
	if err != nil {
		return Partial{}, err
	}
	return partialOf(d, info), nil
}

// partialOf describes the file of a partial blob, which may have holes.
func partialOf(d digest.Digest, info fs.FileInfo) Partial {
	p := Partial{Digest: d, Bytes: info.Size(), Changed: info.ModTime()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		p.Bytes = stat.Blocks * 512
	}
	return p
}

// Note implements [Partials].
func (b *Dir) Note(d digest.Digest, n Note) ([]byte, error) { return os.ReadFile(b.notePath(d, n)) }

// SetNote implements [Partials].
func (b *Dir) SetNote(d digest.Digest, n Note, content []byte) error {
	temporary := b.partialPath(d) + ".new"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return errors.Join(err, ignoreMissing(os.Remove(temporary)))
	}
	return os.Rename(temporary, b.notePath(d, n))
}

// TakePartial implements [Partials].
func (b *Dir) TakePartial(d digest.Digest) (name string, err error) {
	name = b.newName()
	if err := b.files.Rename(b.partialPath(d), name); err != nil {
		return "", err
	}
	_ = b.removeNotes(d) // of no use any more; what stays is removed as a partial
	return name, nil
}

// RemovePartial implements [Partials].
func (b *Dir) RemovePartial(d digest.Digest) error {
	return errors.Join(os.Remove(b.partialPath(d)), b.removeNotes(d))
}

func (b *Dir) removeNotes(d digest.Digest) error {
	return errors.Join(ignoreMissing(os.Remove(b.notePath(d, NoteTable))),
		ignoreMissing(os.Remove(b.notePath(d, NoteTags))))
}

// Partials implements [Partials]. It removes what belongs to none.
func (b *Dir) Partials() (all []Partial, err error) {
	entries, err := os.ReadDir(b.path("partial"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := b.path("partial", e.Name())
		if e.IsDir() {
			b.log.Warn("somebody has made a directory where content arrives; it is left as it is", "directory", path)
			continue
		}
		alg, rest, _ := strings.Cut(e.Name(), ".")
		hex, note, noted := strings.Cut(rest, ".")
		d, err := digest.Parse(alg + ":" + hex)
		switch {
		case err == nil && !noted && e.Type().IsRegular():
			p, err := b.StatPartial(d)
			if err != nil {
				return nil, err
			}
			all = append(all, p)
			continue
		case err == nil && noted && (Note(note) == NoteTable || Note(note) == NoteTags):
			if _, err := os.Stat(b.partialPath(d)); err == nil {
				continue
			}
		}
		if err := ignoreMissing(os.Remove(path)); err != nil {
			return nil, err
		}
	}
	return all, nil
}
