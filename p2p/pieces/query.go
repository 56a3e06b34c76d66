package pieces

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"os"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Resolve implements [p2p.Engine].
func (s *Store) Resolve(ctx context.Context, tag string, cid digest.CID, _ p2p.Scope) (p2p.Task, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Task{}, err
	}
	defer s.end()
	if err := validateRef(tag, cid); err != nil {
		return p2p.Task{}, err
	}
	var task p2p.Task
	err := s.view(func(tx *bbolt.Tx) (err error) {
		task, err = resolve(tx, tag, cid)
		return err
	})
	return task, err
}

// validateRef guards the methods that take a cid against a zero one and against a tag that is none.
func validateRef(tag string, cid digest.CID) error {
	if _, err := digest.ParseCID(cid.String()); err != nil {
		return err
	}
	return p2p.ValidateTag(tag)
}

func resolve(tx *bbolt.Tx, tag string, cid digest.CID) (p2p.Task, error) {
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if name := cid.CacheID(); name != "" {
		record, found, err := get[nameRecord](tx, bucketNames, key(tag, name))
		if err != nil {
			return p2p.Task{}, err
		}
		if !found {
			return p2p.Task{}, fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
		}
		task.Digest = record.Digest
	}
	return task, holdsTask(tx, task)
}

// Stat implements [p2p.Engine]. Where the blob's file is missing or has another
// size, the error is a [digest.CorruptError]; its bytes are not read.
func (s *Store) Stat(ctx context.Context, task p2p.Task, _ p2p.Scope) (p2p.Info, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer s.end()
	if err := task.Validate(); err != nil {
		return p2p.Info{}, err
	}
	var info p2p.Info
	err := s.view(func(tx *bbolt.Tx) (err error) {
		info, err = s.info(tx, task)
		return err
	})
	if err != nil {
		return p2p.Info{}, err
	}
	file, err := os.Stat(s.blobPath(task.Digest))
	switch {
	case err == nil:
		err = checkSize(&digest.Table{Digest: task.Digest, Size: info.Size, PieceLength: info.PieceLength}, file.Size())
	case isMissing(err):
		// It may have been deleted just now.
		if err = s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, task) }); err == nil {
			err = errNoFile(task.Digest)
		}
	}
	if err != nil {
		return p2p.Info{}, err
	}
	return info, nil
}

func (s *Store) info(tx *bbolt.Tx, task p2p.Task) (p2p.Info, error) {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err != nil {
		return p2p.Info{}, err
	}
	if !found {
		return p2p.Info{}, fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	blob, found, err := get[blobRecord](tx, bucketBlobs, key(task.Digest))
	if err != nil {
		return p2p.Info{}, err
	}
	if !found {
		return p2p.Info{}, &digest.CorruptError{Digest: task.Digest, Piece: -1, Reason: "it has no record in the metadata"}
	}
	table := digest.Table{Size: blob.Size, PieceLength: digest.PieceLength(blob.Size)}
	return p2p.Info{
		Task:        task,
		Size:        table.Size,
		PieceLength: table.PieceLength,
		Pieces:      table.Pieces(),
		Held:        table.Pieces(),
		MediaType:   record.MediaType,
		Pinned:      record.Pinned,
		Imported:    record.Imported,
		LastUsed:    s.lastUsed(tx, task),
	}, nil
}

func (s *Store) lastUsed(tx *bbolt.Tx, task p2p.Task) time.Time {
	s.mu.Lock()
	at, found := s.used[task]
	s.mu.Unlock()
	if found {
		return at.UTC()
	}
	return decodeTime(tx.Bucket(bucketUsed).Get(taskKey(task)))
}

// Delete implements [p2p.Engine].
func (s *Store) Delete(ctx context.Context, tag string, cid digest.CID, force bool) (p2p.Deleted, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer s.end()
	if err := validateRef(tag, cid); err != nil {
		return p2p.Deleted{}, err
	}
	var removed removal
	err := s.update(func(tx *bbolt.Tx) error {
		removed = removal{}
		task, err := resolve(tx, tag, cid)
		if err != nil {
			return err
		}
		if name := cid.CacheID(); name != "" {
			if err := removeKeys(tx, bucketNames, key(tag, name), bucketNamed, key(tag, string(task.Digest), name)); err != nil {
				return err
			}
			return removed.release(tx, task)
		}
		if parents := lastParts(tx, bucketParents, prefix(tag, string(task.Digest))); len(parents) > 0 && !force {
			return fmt.Errorf("%s: %w: %s: delete that first, or force it", task, p2p.ErrReferenced, describeParents(tx, tag, parents))
		}
		return removed.remove(tx, task)
	})
	if err != nil {
		return p2p.Deleted{}, err
	}
	if removed.loose > 0 {
		s.dropLoose()
	}
	return p2p.Deleted{Tasks: removed.tasks, Freed: removed.freed}, nil
}

// describeParents names what refers to a task: by its names where it has some.
func describeParents(tx *bbolt.Tx, tag string, parents []string) string {
	var said []string
	for _, parent := range parents {
		names := lastParts(tx, bucketNamed, prefix(tag, parent))
		if len(names) == 0 {
			names = []string{parent}
		}
		said = append(said, names...)
	}
	if len(said) > 3 {
		said = append(said[:3], fmt.Sprintf("%d more", len(said)-3))
	}
	return "by " + strings.Join(said, ", ")
}

// listBatch is how many entries are read in one transaction. A caller that is
// slow to take them does not keep a transaction open.
const listBatch = 256

// List implements [p2p.Engine].
func (s *Store) List(ctx context.Context, tag *string) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) {
		l := lister{s: s, ctx: ctx}
		if tag != nil {
			if err := p2p.ValidateTag(*tag); err != nil {
				yield(p2p.Entry{}, err)
				return
			}
			l.list(*tag, yield)
			return
		}
		for tag := l.nextTag(""); tag != nil; tag = l.nextTag(*tag + "\x01") {
			if !l.list(*tag, yield) {
				return
			}
		}
		if l.err != nil {
			yield(p2p.Entry{}, l.err)
		}
	}
}

// lister is the state of one List.
type lister struct {
	s   *Store
	ctx context.Context
	err error
}

// read runs f in a transaction of its own, as a call of its own.
func (l *lister) read(f func(tx *bbolt.Tx) error) {
	if l.err = l.s.begin(l.ctx); l.err != nil {
		return
	}
	defer l.s.end()
	l.err = l.s.view(f)
}

// nextTag returns the first tag whose keys do not sort before from, or nil. A
// tag has no byte below "-", so that "\x01" sorts behind the separator and
// before whatever may follow in a longer tag.
func (l *lister) nextTag(from string) (tag *string) {
	l.read(func(tx *bbolt.Tx) error {
		if k, _ := tx.Bucket(bucketTasks).Cursor().Seek([]byte(from)); k != nil {
			t := firstPart(k)
			tag = &t
		}
		return nil
	})
	return tag
}

// list yields names and tasks of one tag. It reports whether to go on; where
// an error is the reason not to, it has yielded it.
func (l *lister) list(tag string, yield func(p2p.Entry, error) bool) bool {
	for _, bucket := range [][]byte{bucketNames, bucketTasks} {
		for last := prefix(tag); last != nil; {
			var batch []p2p.Entry
			batch, last = l.batch(bucket, tag, last)
			for _, e := range batch {
				if !yield(e, nil) {
					return false
				}
			}
			if l.err != nil {
				yield(p2p.Entry{}, l.err)
				return false
			}
		}
	}
	return true
}

// batch returns the entries of bucket whose keys come after last, and the key
// to go on after, or nil at the end.
func (l *lister) batch(bucket []byte, tag string, last []byte) (batch []p2p.Entry, next []byte) {
	l.read(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucket).Cursor()
		for k := after(c, last); bytes.HasPrefix(k, prefix(tag)); k, _ = c.Next() {
			if len(batch) == listBatch {
				return nil
			}
			e, err := l.s.entry(tx, bucket, tag, lastPart(k))
			if err != nil {
				return err
			}
			batch, next = append(batch, e), bytes.Clone(k)
		}
		next = nil
		return nil
	})
	return batch, next
}

func (s *Store) entry(tx *bbolt.Tx, bucket []byte, tag, part string) (e p2p.Entry, err error) {
	task := p2p.Task{Tag: tag, Digest: digest.Digest(part)}
	if bytes.Equal(bucket, bucketNames) {
		record, _, err := get[nameRecord](tx, bucketNames, key(tag, part))
		if err != nil {
			return e, err
		}
		e.Name, task.Digest = part, record.Digest
	}
	if e.Info, err = s.info(tx, task); err != nil {
		return e, err
	}
	e.Total, err = total(tx, task, map[digest.Digest]bool{})
	return e, err
}

// total sums up the sizes of a task's blob and of all it refers to, as far as it is held.
func total(tx *bbolt.Tx, task p2p.Task, seen map[digest.Digest]bool) (int64, error) {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err != nil || !found || seen[task.Digest] {
		return 0, err
	}
	seen[task.Digest] = true
	blob, _, err := get[blobRecord](tx, bucketBlobs, key(task.Digest))
	if err != nil {
		return 0, err
	}
	sum := blob.Size
	for _, child := range record.Refs {
		n, err := total(tx, p2p.Task{Tag: task.Tag, Digest: child}, seen)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
