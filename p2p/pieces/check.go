package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// Kinds of problems that a check finds.
const (
	KindCorrupt  = "corrupt"  // a piece is not what was stored
	KindMissing  = "missing"  // a blob's file is not there
	KindStray    = "stray"    // a file is not a blob of the store
	KindMetadata = "metadata" // records contradict each other or are damaged
)

// Problem is something that a check found to be wrong.
type Problem struct {
	Kind   string        `json:"kind"`
	Digest digest.Digest `json:"digest,omitempty"` // the blob it is about, where it is about one
	Piece  int           `json:"piece"`            // the piece, counted from 0; -1 where it is not about one
	Path   string        `json:"path,omitempty"`   // the file it is about
	Detail string        `json:"detail"`
}

// String says what was found, on one line.
func (p Problem) String() string {
	s := p.Kind + ":"
	if p.Digest != "" {
		s += " blob " + string(p.Digest)
	} else if p.Path != "" {
		s += " " + p.Path
	}
	if p.Piece >= 0 {
		s += fmt.Sprintf(" piece %d", p.Piece)
	}
	return s + ": " + p.Detail
}

// Summary says what a check has looked at.
type Summary struct {
	Blobs    int   `json:"blobs"`    // blobs read
	Bytes    int64 `json:"bytes"`    // bytes read
	Problems int   `json:"problems"` // problems reported
}

// Check reads every blob and compares it with its digest and each piece with
// its checksum, compares the records with each other and with the files that
// are there, and reports what is wrong, one problem at a time. It changes
// nothing. The error says that the check itself could not go on.
func (s *Store) Check(ctx context.Context, report func(Problem)) (Summary, error) {
	if err := s.begin(ctx); err != nil {
		return Summary{}, err
	}
	defer s.end()
	c := checker{s: s, ctx: ctx, report: report}
	err := c.metadata()
	if err == nil {
		err = c.blobs()
	}
	if err == nil {
		err = c.strays()
	}
	return c.sum, s.checkError(err)
}

func (s *Store) checkError(err error) error {
	if err != nil {
		return fmt.Errorf("check store %s: %w", s.dir, err)
	}
	return nil
}

// CheckDir checks the store in dir as [Store.Check] does, without opening it: it
// leaves the directory as it is, with what an interruption has left, which
// opening the store would remove, and needs no right to write. Where the metadata
// is damaged it reports that, and compares each file with its name. The error
// matches [fs.ErrNotExist] where there is no store, and [p2p.ErrUnavailable]
// where a process has it open.
func CheckDir(ctx context.Context, dir string, report func(Problem)) (sum Summary, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return sum, fmt.Errorf("check store: %w", err)
	}
	s := &Store{dir: dir, log: slog.New(slog.DiscardHandler), guard: guard{failed: make(chan struct{})}}
	s.bytes = backend.NewDir(dir, backend.Disk{}, s.log)
	if _, err := os.Stat(s.path("blobs")); backend.IsMissing(err) {
		return sum, fmt.Errorf("check store: there is none in %s: %w", dir, fs.ErrNotExist)
	} else if err != nil {
		return sum, s.checkError(err)
	}
	if s.guard.lock, err = backend.OpenRegular(s.path("lock")); err == nil {
		defer s.guard.lock.Close()
		err = lockFile(s.guard.lock, unix.LOCK_SH)
	}
	if err != nil && !backend.IsMissing(err) {
		return sum, s.checkError(err)
	}
	if err := s.checkMeta(); err != nil {
		return sum, s.checkError(err)
	}
	path := s.path("meta.db")
	version, err := checkMetaFile(path)
	c := checker{s: s, ctx: ctx, report: report}
	if errors.Is(err, digest.ErrCorrupt) {
		c.damaged = true
		c.foundMetadata("%v", err)
		return c.sum, s.checkError(c.files())
	}
	if err != nil {
		return sum, s.checkError(err)
	}
	if version < formatVersion {
		// What is looked at is a copy in this program's format.
		tmp, err := os.MkdirTemp("", "dfcache-check-")
		if err != nil {
			return sum, s.checkError(err)
		}
		defer os.RemoveAll(tmp)
		copied := filepath.Join(tmp, "meta.db")
		if err := writeMeta(copied, path, version); err != nil {
			return sum, s.checkError(err)
		}
		path = copied
	}
	if s.db, err = openBolt(path, true); err != nil {
		return sum, s.checkError(err)
	}
	defer s.db.Close()
	if s.guard.file, err = backend.OpenRegular(path); err != nil {
		return sum, s.checkError(err)
	}
	defer s.guard.file.Close()
	return s.Check(ctx, report)
}

type checker struct {
	s      *Store
	ctx    context.Context
	report func(Problem)
	sum    Summary

	damaged bool // the metadata is: what it does not know may have been in it
}

func (c *checker) found(p Problem) {
	c.sum.Problems++
	c.report(p)
}

func (c *checker) foundMetadata(format string, args ...any) {
	c.damaged = true
	c.found(Problem{Kind: KindMetadata, Piece: -1, Path: c.s.path("meta.db"), Detail: fmt.Sprintf(format, args...)})
}

// metadata checks that every record that points to another one finds it. The pages, and each
// record, were checked when the file was opened.
func (c *checker) metadata() error {
	err := c.s.view(func(tx *bbolt.Tx) error {
		exists := func(bucket []byte, parts ...string) bool { return has(tx, bucket, key(parts...)) }
		scan(tx, bucketTasks, nil, func(k, _ []byte) bool {
			tag, d := firstPart(k), lastPart(k)
			if _, _, err := get[taskRecord](tx, bucketTasks, k); err != nil {
				c.foundMetadata("%v", err)
			}
			if !exists(bucketBlobs, d) || !exists(bucketTables, d) {
				c.foundMetadata("task %q has no blob %s", tag, d)
			}
			if !exists(bucketHolders, d, tag) {
				c.foundMetadata("task %q is not among the holders of %s", tag, d)
			}
			return c.ctx.Err() == nil
		})
		scan(tx, bucketNames, nil, func(k, _ []byte) bool {
			tag, name := firstPart(k), lastPart(k)
			record, _, err := get[nameRecord](tx, bucketNames, k)
			if err != nil {
				c.foundMetadata("%v", err)
			} else if !exists(bucketTasks, tag, string(record.Digest)) {
				c.foundMetadata("name %s of tag %q points to %s, which it does not hold", name, tag, record.Digest)
			}
			return c.ctx.Err() == nil
		})
		// What is indexed has to exist.
		for _, index := range []struct {
			name   []byte
			record func(parts []string) bool
		}{
			{bucketHolders, func(p []string) bool { return exists(bucketTasks, p[1], p[0]) }},
			{bucketNamed, func(p []string) bool { return exists(bucketNames, p[0], p[2]) }},
			{bucketParents, func(p []string) bool { return exists(bucketTasks, p[0], p[2]) }},
			{bucketReferrers, func(p []string) bool { return exists(bucketTasks, p[0], p[2]) }},
			{bucketSpared, func(p []string) bool { return exists(bucketTasks, p[0], p[1]) }},
			{bucketLost, func(p []string) bool { return exists(bucketTasks, p[0], p[1]) }},
			{bucketDamaged, func(p []string) bool { return exists(bucketBlobs, p[0]) }},
			{bucketTables, func(p []string) bool { return exists(bucketBlobs, p[0]) }},
		} {
			scan(tx, index.name, nil, func(k, _ []byte) bool {
				if !index.record(append(strings.Split(string(k), "\x00"), "", "")) {
					c.foundMetadata("%s has %q, of which there is no record", index.name, k)
				}
				return c.ctx.Err() == nil
			})
		}
		var stored int64
		scan(tx, bucketBlobs, nil, func(k, _ []byte) bool {
			blob, _, err := get[blobRecord](tx, bucketBlobs, k)
			if err != nil {
				c.foundMetadata("%v", err)
			}
			stored += blob.Size
			if !hasAny(tx, bucketHolders, prefix(string(k))) && !exists(bucketLoose, string(k)) {
				c.foundMetadata("blob %s is held by no tag", k)
			}
			return c.ctx.Err() == nil
		})
		if counted := storedBytes(tx); counted != stored && c.ctx.Err() == nil {
			c.foundMetadata("the blobs have %d bytes, counted were %d", stored, counted)
		}
		return context.Cause(c.ctx)
	})
	if errors.Is(err, digest.ErrCorrupt) {
		c.foundMetadata("%v", err)
		return nil
	}
	return err
}

// blobs reads every blob.
func (c *checker) blobs() error {
	for last := []byte(nil); ; {
		var next []byte
		err := c.s.view(func(tx *bbolt.Tx) error {
			next = append(next, after(tx.Bucket(bucketBlobs).Cursor(), last)...)
			return nil
		})
		if err != nil || next == nil {
			return err
		}
		if err := c.blob(digest.Digest(next)); err != nil {
			return err
		}
		last = next
	}
}

// blob reads one blob. It does not trust the checksums alone: it hashes.
func (c *checker) blob(d digest.Digest) error {
	path := c.s.bytes.Path(d)
	table, err := c.s.table(d)
	switch {
	case errors.Is(err, p2p.ErrNotFound):
		return nil // deleted meanwhile, or reported with its task
	case errors.Is(err, digest.ErrCorrupt):
		c.found(Problem{Kind: KindMetadata, Digest: d, Piece: -1, Path: path, Detail: err.Error()})
		return nil
	case err != nil:
		return err
	}
	f, err := c.s.bytes.Open(d)
	if errors.Is(err, backend.ErrNotRegular) {
		c.found(Problem{Kind: KindCorrupt, Digest: d, Piece: -1, Path: path,
			Detail: "what is in the place of its file is not a regular file"})
		return nil
	}
	if backend.IsMissing(err) {
		c.found(Problem{Kind: KindMissing, Digest: d, Piece: -1, Path: path, Detail: "its file is not there"})
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	c.sum.Blobs++
	recorder := digest.NewRecorder(d.Algorithm())
	buf := make([]byte, table.PieceLength)
	damaged := 0
	for i := range table.Pieces() {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		start, end := table.Bounds(i)
		n, err := f.ReadAt(buf[:end-start], start)
		c.sum.Bytes += int64(n)
		detail := ""
		if err != nil && !errors.Is(err, io.EOF) {
			detail = fmt.Sprintf("it can't be read: %v", err)
		} else if e, ok := errors.AsType[*digest.CorruptError](table.CheckPiece(i, buf[:n])); ok {
			detail = e.Reason
		}
		if detail != "" {
			damaged++
			c.found(Problem{Kind: KindCorrupt, Digest: d, Piece: i, Path: path, Detail: detail})
			continue
		}
		if _, err := recorder.Write(buf[:n]); err != nil {
			return err
		}
	}
	if damaged > 0 {
		return nil
	}
	t, err := recorder.Table()
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if t.Digest != d {
		c.found(Problem{Kind: KindCorrupt, Digest: d, Piece: -1, Path: path,
			Detail: fmt.Sprintf("its content is %s, though every piece is as recorded", t.Digest)})
	} else if info.Size() != table.Size {
		c.found(Problem{Kind: KindCorrupt, Digest: d, Piece: -1, Path: path,
			Detail: fmt.Sprintf("its file has %d bytes, recorded were %d", info.Size(), table.Size)})
	}
	return nil
}

// strays looks for files below blobs/ that no record knows, but for what an
// interruption has left: the next opening removes that.
func (c *checker) strays() error {
	left, err := c.s.leftovers()
	if err != nil {
		return err
	}
	expected := map[digest.Digest]bool{}
	for _, d := range left {
		expected[d] = true
	}
	for e, err := range c.s.bytes.Blobs() {
		if err == nil {
			err = context.Cause(c.ctx)
		}
		if err != nil {
			return err
		}
		known := expected[e.Digest]
		err = c.s.view(func(tx *bbolt.Tx) error {
			known = known || has(tx, bucketBlobs, key(e.Digest))
			return nil
		})
		if err != nil {
			return err
		}
		if !known {
			c.foundStray(e.Path)
		}
	}
	return nil
}

func (c *checker) foundStray(path string) {
	detail := "no record knows it: it can be removed"
	if c.damaged {
		detail = "no record knows it: leave it until the metadata is whole"
	}
	c.found(Problem{Kind: KindStray, Piece: -1, Path: path, Detail: detail})
}

// files compares each file with its name, for want of metadata.
func (c *checker) files() error {
	for e, err := range c.s.bytes.Blobs() {
		if err == nil {
			err = context.Cause(c.ctx)
		}
		if err == nil {
			err = c.file(e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) file(e backend.Entry) error {
	if _, err := digest.Parse(string(e.Digest)); err != nil {
		c.foundStray(e.Path)
		return nil
	}
	f, err := c.s.bytes.Open(e.Digest)
	if errors.Is(err, backend.ErrNotRegular) {
		c.foundStray(e.Path)
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	c.sum.Blobs++
	recorder := digest.NewRecorder(e.Digest.Algorithm())
	err = record(c.ctx, recorder, f, nil)
	c.sum.Bytes += recorder.Size()
	if cause := context.Cause(c.ctx); cause != nil {
		return cause
	}
	detail := ""
	if err != nil {
		detail = fmt.Sprintf("it can't be read: %v", err)
	} else if t, err := recorder.Table(); err != nil {
		return err
	} else if t.Digest != e.Digest {
		detail = fmt.Sprintf("its content is %s", t.Digest)
	}
	if detail != "" {
		c.found(Problem{Kind: KindCorrupt, Digest: e.Digest, Piece: -1, Path: e.Path, Detail: detail})
	}
	return nil
}
