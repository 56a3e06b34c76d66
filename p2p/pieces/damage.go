package pieces

import (
	"context"
	"errors"
	"io"
	"os"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// What is known to be wrong with what the records say is here. Damage of a blob is
// noted when a read meets it, and forgotten when the content comes again, or when
// the whole has been read and is as it was. A manifest is told of each of its children
// that is damaged, or was deleted by force, and so is what refers to the manifest:
// so it costs nothing to know that all of a manifest is here.

// damageRecord is a [digest.CorruptError] as it is stored.
type damageRecord struct {
	Piece  int    `json:"piece"`
	Reason string `json:"reason"`
}

// damageOf returns what is known to be wrong with a blob, or nil.
func damageOf(tx *bbolt.Tx, d digest.Digest) error {
	record, found, err := get[damageRecord](tx, bucketDamaged, key(d))
	if err != nil || !found {
		return err
	}
	return &digest.CorruptError{Digest: d, Piece: record.Piece, Reason: record.Reason}
}

// met notes damage, where err is that. What reads can go on without: where it
// can't be noted, it is met again.
func (s *Store) met(err error) {
	damage, ok := errors.AsType[*digest.CorruptError](err)
	if !ok || s.begin(context.Background()) != nil {
		return
	}
	defer s.end()
	k := key(damage.Digest)
	news := false
	err = s.view(func(tx *bbolt.Tx) error {
		news = has(tx, bucketBlobs, k) && !has(tx, bucketDamaged, k)
		return nil
	})
	if err == nil && news {
		err = s.update(func(tx *bbolt.Tx) error {
			if !has(tx, bucketBlobs, k) {
				return nil // it has been deleted
			}
			for _, tag := range lastParts(tx, bucketHolders, prefix(string(damage.Digest))) {
				if err := lose(tx, p2p.Task{Tag: tag, Digest: damage.Digest}); err != nil {
					return err
				}
			}
			if !has(tx, bucketDamaged, k) {
				s.note(Change{Event: Damaged, Subject: SubjectBlob, Reason: ReasonRead,
					Task: p2p.Task{Digest: damage.Digest}, Detail: damage.Error()})
			}
			return put(tx, bucketDamaged, k, damageRecord{Piece: damage.Piece, Reason: damage.Reason})
		})
	}
	if err != nil {
		s.log.Warn("it could not be noted that a blob is damaged", "digest", damage.Digest, "error", err)
	} else if news {
		s.log.Error("a blob is damaged: it is not here until its content comes again", "digest", damage.Digest,
			"error", damage)
	}
}

// sound forgets damage of a blob that has been read and is as it was.
func (s *Store) sound(d digest.Digest) {
	if s.begin(context.Background()) != nil {
		return
	}
	defer s.end()
	err := s.update(func(tx *bbolt.Tx) error {
		if has(tx, bucketDamaged, key(d)) {
			s.note(Change{Event: Mended, Subject: SubjectBlob, Reason: ReasonRead, Task: p2p.Task{Digest: d}})
		}
		return removeKeys(tx, bucketDamaged, key(d))
	})
	if err != nil {
		s.log.Warn("it could not be noted that a blob is whole again", "digest", d, "error", err)
	}
}

// Recheck reads a blob of which somebody says that it is damaged. The error is a
// [digest.CorruptError] where it is, and that is remembered.
func (s *Store) Recheck(ctx context.Context, d digest.Digest) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	blob, err := s.openBlob(d)
	if err != nil {
		return err
	}
	defer blob.Close()
	return blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
}

// ReadAt implements [io.ReaderAt].
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.Verified.ReadAt(p, off)
	b.met(err)
	return n, err
}

// CopyRange implements [p2p.Blob].
func (b *Blob) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(int64)) error {
	err := b.Verified.CopyRange(ctx, w, off, n, progress)
	if err == nil && b.damaged && n == b.Size() {
		b.s.sound(b.Table().Digest)
	}
	b.met(err)
	return err
}

// met notes damage that a read has met, unless the blob has been replaced since it
// was opened.
func (b *Blob) met(err error) {
	if !errors.Is(err, digest.ErrCorrupt) {
		return
	}
	mine, err1 := b.f.Stat()
	now, err2 := b.s.bytes.Stat(b.Table().Digest)
	if err1 == nil && err2 == nil && os.SameFile(mine, now) {
		b.s.met(err)
	}
}

// lose notes for what refers to t, and for what refers to that, that t is not here as
// it should be.
func lose(tx *bbolt.Tx, t p2p.Task) error {
	for _, d := range lastParts(tx, bucketParents, prefix(t.Tag, string(t.Digest))) {
		k := key(t.Tag, d, string(t.Digest))
		if has(tx, bucketLost, k) {
			continue
		}
		if err := putValue(tx, bucketLost, k, nil); err != nil {
			return err
		}
		if err := lose(tx, p2p.Task{Tag: t.Tag, Digest: digest.Digest(d)}); err != nil {
			return err
		}
	}
	return nil
}

// missed notes, where a manifest of c is refused that is here already, what it lacks:
// its client has taken it for whole, and is to hear better when it comes again.
func (s *Store) missed(c p2p.Commit) {
	var lost []p2p.Task
	err := s.view(func(tx *bbolt.Tx) error {
		for _, n := range c.Tasks {
			if n.Manifest == nil || !has(tx, bucketTasks, taskKey(n.Task)) {
				continue
			}
			for _, d := range n.Manifest.Needs {
				if t := (p2p.Task{Tag: n.Task.Tag, Digest: d}); !has(tx, bucketTasks, taskKey(t)) {
					lost = append(lost, t)
				}
			}
		}
		return nil
	})
	if err == nil && len(lost) > 0 {
		err = s.update(func(tx *bbolt.Tx) error {
			for _, t := range lost {
				if err := lose(tx, t); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		s.log.Warn("it could not be noted what a manifest lacks", "error", err)
	}
}

// inherit notes for a manifest that was just linked what is lost of its children.
func inherit(tx *bbolt.Tx, t p2p.Task, children []digest.Digest) error {
	if !hasAny(tx, bucketLost, prefix(t.Tag)) {
		return nil
	}
	for _, d := range children {
		if !hasAny(tx, bucketLost, prefix(t.Tag, string(d))) {
			continue
		}
		if err := putValue(tx, bucketLost, key(t.Tag, string(t.Digest), string(d)), nil); err != nil {
			return err
		}
	}
	return nil
}

// forgive forgets what a manifest has lost.
func forgive(tx *bbolt.Tx, t p2p.Task) error {
	for _, d := range lastParts(tx, bucketLost, prefix(t.Tag, string(t.Digest))) {
		if err := removeKeys(tx, bucketLost, key(t.Tag, string(t.Digest), d)); err != nil {
			return err
		}
	}
	return nil
}

// lacks returns what a manifest has lost and is not here again, or what is lost of
// what it is made of; at most [p2p.MaxRefs].
func lacks(tx *bbolt.Tx, t p2p.Task) []digest.Digest {
	var missing []digest.Digest
	seen := map[string]bool{}
	var look func(d string)
	look = func(d string) {
		for _, child := range lastParts(tx, bucketLost, prefix(t.Tag, d)) {
			if seen[child] || len(missing) == p2p.MaxRefs {
				continue
			}
			seen[child] = true
			if !has(tx, bucketTasks, key(t.Tag, child)) || has(tx, bucketDamaged, key(child)) {
				missing = append(missing, digest.Digest(child))
			} else {
				look(child)
			}
		}
	}
	look(string(t.Digest))
	return missing
}

// missingRef returns an error for what a manifest needs that is not here, or not as
// it should be: its client has to send that first.
func missingRef(tx *bbolt.Tx, n p2p.NewTask) error {
	damaged, lost := hasAny(tx, bucketDamaged, nil), hasAny(tx, bucketLost, prefix(n.Task.Tag))
	for _, d := range n.Manifest.Needs {
		t := p2p.Task{Tag: n.Task.Tag, Digest: d}
		if !has(tx, bucketTasks, taskKey(t)) || damaged && has(tx, bucketDamaged, key(d)) ||
			lost && len(lacks(tx, t)) > 0 {
			return &p2p.MissingRefError{Manifest: n.Task.Digest, Missing: d}
		}
	}
	return nil
}
