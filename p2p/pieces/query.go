package pieces

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

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

// statAttempts is how often a Stat looks again when what it found is deleted
// under its hands.
const statAttempts = 10

// Stat implements [p2p.Engine]. Where the blob's file is missing or has another
// size, the error is a [digest.CorruptError]; its bytes are not read, but for a
// manifest that is asked for, and where damage is known.
//
//nolint:cyclop // one transaction answers all that was asked
func (s *Store) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (_ p2p.Info, err error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer s.end()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Info{}, err
	}
	if opts.Lease && cid.Digest() != "" {
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		if err := s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, task) }); err != nil {
			return p2p.Info{}, err
		}
		// First the lease, then another look: so what is found is held.
		if !s.lend(task) {
			return p2p.Info{}, errGoing(task)
		}
		defer func() {
			if err != nil {
				s.takeBack(task)
			}
		}()
	}
	for attempt := 1; ; attempt++ {
		info, refs, damage, err := s.lookUp(tag, cid, opts.Manifest && !opts.ContentOnly)
		if err != nil {
			return p2p.Info{}, err
		}
		if info.IsManifest && opts.Manifest && opts.ContentOnly && opts.MaxContent > 0 && info.Size > opts.MaxContent {
			info.Manifest, err = &p2p.Manifest{}, s.checkBlob(ctx, info, damage, opts)
		} else if info.IsManifest && opts.Manifest {
			info.Manifest, err = s.manifest(info.Task.Digest, refs)
		} else {
			err = s.checkBlob(ctx, info, damage, opts)
		}
		if err == nil {
			return info, nil
		}
		// It may have been deleted, or the name moved, just now.
		if !errors.Is(err, p2p.ErrNotFound) || attempt == statAttempts {
			return p2p.Info{}, err
		}
	}
}

// StatForPeers describes a task for peers. Of a blob that is damaged they may have
// what is good.
func (s *Store) StatForPeers(ctx context.Context, task p2p.Task) (p2p.Info, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer s.end()
	cid := digest.FromDigest(task.Digest)
	if err := p2p.ValidateRef(task.Tag, cid); err != nil {
		return p2p.Info{}, err
	}
	info, _, _, err := s.lookUp(task.Tag, cid, false)
	if err == nil {
		err = s.checkFile(info)
	}
	return info, err
}

// lookUp describes what cid names and, where refs are wanted, those tasks that it
// refers to and that are not known to be damaged. It tells of damage apart.
func (s *Store) lookUp(tag string, cid digest.CID, withRefs bool) (info p2p.Info, refs []p2p.Info, damage, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		task, err := resolve(tx, tag, cid)
		if err != nil {
			return err
		}
		var record taskRecord
		if info, record, err = s.info(tx, task); err != nil {
			return err
		}
		if name := cid.CacheID(); name != "" {
			named, _, err := get[nameRecord](tx, bucketNames, key(tag, name))
			if err != nil {
				return err
			}
			info.Description = named.Described
		}
		damage = damageOf(tx, task.Digest)
		info.Lacks = lacks(tx, task)
		if !withRefs {
			return nil
		}
		for _, d := range record.Refs[:min(len(record.Refs), p2p.MaxRefs)] {
			ref, _, err := s.info(tx, p2p.Task{Tag: tag, Digest: d})
			if errors.Is(err, p2p.ErrNotFound) || err == nil && damageOf(tx, d) != nil {
				continue
			}
			if err != nil {
				return err
			}
			refs = append(refs, ref)
		}
		return nil
	})
	return info, refs, damage, err
}

// checkBlob looks whether a blob is as it should be, as far as that can be known without
// reading it. One of which damage is known is read again: it may be whole by now, or be
// damaged elsewhere. Only a client that asks in order to push it is not kept waiting for that.
func (s *Store) checkBlob(ctx context.Context, info p2p.Info, damage error, opts p2p.StatOptions) error {
	err := s.checkFile(info)
	if err != nil || damage == nil || opts.Lease {
		return cmp.Or(err, damage)
	}
	return s.Recheck(ctx, info.Task.Digest)
}

// checkFile looks whether the blob's file is there and has the right size. An
// error that is [p2p.ErrNotFound] says that the blob has been deleted meanwhile.
func (s *Store) checkFile(info p2p.Info) (err error) {
	d := info.Task.Digest
	defer func() { s.met(err) }()
	file, err := s.bytes.Stat(d)
	if errors.Is(err, backend.ErrNotRegular) {
		return errNoRegularFile(d)
	}
	if err == nil {
		return checkSize(&digest.Table{Digest: d, Size: info.Size, PieceLength: info.PieceLength}, file.Size())
	}
	if !backend.IsMissing(err) {
		return err
	}
	if _, err := s.table(d); err != nil {
		return err
	}
	return errNoFile(d)
}

// manifest reads a manifest. Of refs it leaves out what is not in place.
func (s *Store) manifest(d digest.Digest, refs []p2p.Info) (*p2p.Manifest, error) {
	blob, err := s.openBlob(d)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	if blob.Size() > p2p.MaxManifest {
		return nil, fmt.Errorf("manifest %s: %w: it has %d bytes, the limit is %d", d, digest.ErrInvalid, blob.Size(),
			p2p.MaxManifest)
	}
	m := &p2p.Manifest{Content: make([]byte, blob.Size())}
	if _, err := io.ReadFull(io.NewSectionReader(blob, 0, blob.Size()), m.Content); err != nil {
		return nil, err
	}
	for _, ref := range refs {
		if s.checkFile(ref) == nil {
			m.Refs = append(m.Refs, ref)
		}
	}
	return m, nil
}

func (s *Store) info(tx *bbolt.Tx, task p2p.Task) (p2p.Info, taskRecord, error) {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err != nil {
		return p2p.Info{}, record, err
	}
	if !found {
		return p2p.Info{}, record, fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	blob, found, err := get[blobRecord](tx, bucketBlobs, key(task.Digest))
	if err != nil {
		return p2p.Info{}, record, err
	}
	if !found {
		return p2p.Info{}, record, &digest.CorruptError{
			Digest: task.Digest, Piece: -1, Reason: "it has no record in the metadata"}
	}
	table := digest.Table{Size: blob.Size, PieceLength: digest.PieceLength(blob.Size)}
	return p2p.Info{
		Task:        task,
		Size:        table.Size,
		PieceLength: table.PieceLength,
		Pieces:      table.Pieces(),
		Held:        table.Pieces(),
		MediaType:   record.MediaType,
		IsManifest:  record.isManifest(),
		Keep:        record.keep(),
		Origin:      record.origin(),
		After:       record.After,
		Imported:    record.Imported,
		LastUsed:    s.lastUsed(tx, task),
	}, record, nil
}

func (s *Store) lastUsed(tx *bbolt.Tx, task p2p.Task) time.Time {
	s.mu.Lock()
	at, found := s.used[task]
	s.mu.Unlock()
	if found {
		return at.UTC()
	}
	return decodeTime(value(tx, bucketUsed, taskKey(task)))
}

// Delete implements [p2p.Engine].
func (s *Store) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	result, err := s.DeleteTasks(ctx, tag, cid, opts)
	if err == nil && !result.Found && !opts.All {
		return p2p.Deleted{}, notFound(tag, opts.CIDs(cid))
	}
	return result.Deleted, err
}

// notFound is the error of a delete of what is not here.
func notFound(tag string, cids []digest.CID) error {
	err := fmt.Errorf("%s: %w", p2p.Describe(tag, cids[0]), p2p.ErrNotFound)
	if len(cids) > 1 {
		err = fmt.Errorf("%w; nor are the %d others", err, len(cids)-1)
	}
	return err
}

// DeleteTasks does what [Store.Delete] does, and tells more of it. That nothing was found is no
// error.
func (s *Store) DeleteTasks(
	ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions,
) (result DeleteResult, err error) {
	if err := s.begin(ctx); err != nil {
		return result, err
	}
	defer s.end()
	if err := opts.Validate(tag, cid); err != nil {
		return result, err
	}
	if opts.Unpin && cid.Digest() != "" {
		result.Found, err = s.Unpin(ctx, p2p.Task{Tag: tag, Digest: cid.Digest()})
		if result.Found || err != nil {
			return result, err
		}
	}
	removed, err := s.remove(tag, cid, opts, func(tx *bbolt.Tx, removed *removal) (err error) {
		if opts.All {
			result.Found, err = removed.deleteAll(tx, tag, nil)
			return err
		}
		result.Found, err = removed.deleteEach(tx, tag, cid, opts)
		return err
	})
	if err != nil {
		return DeleteResult{}, err
	}
	result.Deleted, result.Gone = removed.deleted(), removed.tasks
	return result, nil
}

// remove makes a change that removes what cid names, or more of the tag by opts.
func (s *Store) remove(
	tag string, cid digest.CID, opts p2p.DeleteOptions, f func(*bbolt.Tx, *removal) error,
) (removed removal, err error) {
	err = s.free(s.weighDelete(tag, cid, opts), func(tx *bbolt.Tx) error {
		removed = s.newRemoval()
		if err := f(tx, &removed); err != nil {
			return err
		}
		return removed.noteLoose(tx)
	})
	if err == nil && len(removed.loose) > 0 {
		s.dropLoose()
	}
	return removed, err
}

// Unpin takes the pin from a task that another one refers to, and reports whether one does.
func (s *Store) Unpin(ctx context.Context, t p2p.Task) (referred bool, err error) {
	if err := s.begin(ctx); err != nil {
		return false, err
	}
	defer s.end()
	err = s.free(1, func(tx *bbolt.Tx) error {
		record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
		referred = found && hasAny(tx, bucketParents, prefix(t.Tag, string(t.Digest)))
		if err != nil || !referred || !record.Pinned {
			return err
		}
		record.Pinned = false
		return put(tx, bucketTasks, taskKey(t), record)
	})
	return referred && err == nil, err
}

// weighDelete says how much work it is for the transaction to delete what cid names: a manifest lets
// go of all that it refers to.
func (s *Store) weighDelete(tag string, cid digest.CID, opts p2p.DeleteOptions) int {
	if opts.All {
		return updateLimit
	}
	records := 0
	_ = s.view(func(tx *bbolt.Tx) error { // what fails here fails there, too
		for _, cid := range opts.CIDs(cid) {
			records++
			task, err := resolve(tx, tag, cid)
			if err != nil {
				continue
			}
			record, _, err := get[taskRecord](tx, bucketTasks, taskKey(task))
			if err != nil {
				return err
			}
			records += len(record.Refs)
		}
		return nil
	})
	return records
}

// deleteEach removes what several cids name, as far as it is here, and reports whether something
// was. What is referred to goes after what refers to it.
func (r *removal) deleteEach(
	tx *bbolt.Tx, tag string, cid digest.CID, opts p2p.DeleteOptions,
) (found bool, err error) {
	if opts.Expect != nil {
		if err := expect(tx, p2p.Expectation{Tag: tag, CID: cid, Digest: *opts.Expect}); err != nil {
			return false, err
		}
	}
	var here []digest.CID
	for _, cid := range opts.CIDs(cid) {
		switch _, err := resolve(tx, tag, cid); {
		case errors.Is(err, p2p.ErrNotFound):
			r.missing = append(r.missing, cid)
		case err != nil:
			return false, err
		default:
			here = append(here, cid)
		}
	}
	for left := here; len(left) > 0; {
		var again []digest.CID
		var referenced error
		for _, cid := range left {
			err := r.delete(tx, tag, cid, opts)
			if errors.Is(err, p2p.ErrReferenced) {
				again, referenced = append(again, cid), err
			} else if err != nil && !errors.Is(err, p2p.ErrNotFound) { // it went with another one
				return true, err
			} else {
				r.order = append(r.order, cid)
			}
		}
		if len(again) == len(left) {
			return true, referenced
		}
		left = again
	}
	return len(here) > 0, nil
}

// deleteAll removes what is under a tag, and reports whether something was. Where by is not nil,
// what it does not cover stays, and so does what that refers to.
func (r *removal) deleteAll(tx *bbolt.Tx, tag string, by *Delete) (found bool, err error) {
	covered := func(v Version) bool { return by == nil || r.s.Covers(*by, v.At) }
	for _, name := range lastParts(tx, bucketNames, prefix(tag)) {
		record, _, err := get[nameRecord](tx, bucketNames, key(tag, name))
		if err != nil {
			return found, err
		}
		if !covered(record.version()) {
			continue
		}
		found = true
		if err := r.dropName(tx, p2p.NewName{Tag: tag, Name: name, Digest: record.Digest}, ReasonDeleted); err != nil {
			return found, err
		}
	}
	// What refers to others goes before them, by as many rounds as that is deep.
	left := lastParts(tx, bucketTasks, prefix(tag))
	for {
		var again []string
		for _, d := range left {
			task := p2p.Task{Tag: tag, Digest: digest.Digest(d)}
			record, here, err := get[taskRecord](tx, bucketTasks, taskKey(task))
			if err != nil {
				return found, err
			}
			if !here || !covered(record.version()) {
				continue
			}
			if by != nil && record.held(tx, task) {
				again = append(again, d)
				continue
			}
			found = true
			if err := r.remove(tx, task, ReasonDeleted); err != nil {
				return found, err
			}
		}
		if len(again) == 0 || len(again) == len(left) {
			return found, nil
		}
		left = again
	}
}

// dropName removes a name, and leaves what it pointed to.
func (r *removal) dropName(tx *bbolt.Tx, n p2p.NewName, why Reason) error {
	if err := removeKeys(tx, bucketNames, key(n.Tag, n.Name), bucketNamed,
		key(n.Tag, string(n.Digest), n.Name)); err != nil {
		return err
	}
	r.noteName(Removed, why, n)
	return nil
}

// expect fails with [p2p.ErrMoved] where a cid stands for something else than is expected.
func expect(tx *bbolt.Tx, e p2p.Expectation) error {
	is := e.CID.Digest()
	if name := e.CID.CacheID(); name != "" {
		record, _, err := get[nameRecord](tx, bucketNames, key(e.Tag, name))
		if err != nil {
			return err
		}
		is = record.Digest
	} else {
		record, _, err := get[taskRecord](tx, bucketTasks, taskKey(p2p.Task{Tag: e.Tag, Digest: is}))
		if err != nil {
			return err
		}
		if !record.isManifest() {
			is = ""
		}
	}
	if is != e.Digest {
		return fmt.Errorf("%s: %w", p2p.Describe(e.Tag, e.CID), p2p.ErrMoved)
	}
	return nil
}

// delete removes what cid names.
func (r *removal) delete(tx *bbolt.Tx, tag string, cid digest.CID, opts p2p.DeleteOptions) error {
	task, err := resolve(tx, tag, cid)
	if err != nil {
		return err
	}
	if name := cid.CacheID(); name != "" {
		if err := r.dropName(tx, p2p.NewName{Tag: tag, Name: name, Digest: task.Digest}, ReasonDeleted); err != nil {
			return err
		}
		if opts.NameOnly {
			return loosen(tx, task)
		}
		return r.release(tx, task, ReasonDeleted)
	}
	if !opts.Force {
		parents, err := r.s.blocking(tx, task)
		if err != nil {
			return err
		}
		if len(parents) > 0 {
			return &p2p.ReferencedError{Task: task, By: describeParents(tx, tag, parents)}
		}
	}
	if err := lose(tx, task); err != nil {
		return err
	}
	return r.remove(tx, task, ReasonDeleted)
}

// blocking returns what refers to a task and keeps it from being deleted. Of what refers to a manifest
// that is what can be found: a client that keeps a list of manifests under a tag leaves each earlier list
// behind without one, for good, and nobody could delete what is in it.
func (s *Store) blocking(tx *bbolt.Tx, t p2p.Task) ([]string, error) {
	parents := lastParts(tx, bucketParents, prefix(t.Tag, string(t.Digest)))
	if len(parents) == 0 {
		return nil, nil
	}
	record, _, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !record.isManifest() {
		return parents, err
	}
	var found []string
	seen := map[string]bool{}
	for _, parent := range parents {
		can, err := s.canBeFound(tx, p2p.Task{Tag: t.Tag, Digest: digest.Digest(parent)}, seen)
		if err != nil {
			return nil, err
		}
		if can {
			found = append(found, parent)
		}
	}
	return found, nil
}

// canBeFound reports whether the task t is pinned, is about something that is here, was pushed by a client
// that may still give it a name, or whether a name leads to it or to what refers to it, however far. seen
// has the answers so far.
func (s *Store) canBeFound(tx *bbolt.Tx, t p2p.Task, seen map[string]bool) (can bool, err error) {
	if can, known := seen[string(t.Digest)]; known {
		return can, nil
	}
	record, _, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil {
		return false, err
	}
	can = record.Pinned || record.attached(tx, t) || len(s.live(record.Leases)) > 0 ||
		hasAny(tx, bucketNamed, prefix(t.Tag, string(t.Digest)))
	if !can {
		for _, parent := range lastParts(tx, bucketParents, prefix(t.Tag, string(t.Digest))) {
			can, err = s.canBeFound(tx, p2p.Task{Tag: t.Tag, Digest: digest.Digest(parent)}, seen)
			if can || err != nil {
				break
			}
		}
	}
	seen[string(t.Digest)] = can
	return can, err
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
	return strings.Join(said, ", ")
}

// listBatch is how many entries are read in one transaction. A caller that is
// slow to take them does not keep a transaction open.
const listBatch = 256

// List implements [p2p.Engine].
func (s *Store) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) {
		l := lister{s: s, ctx: ctx, q: q}
		if err := q.Validate(); err != nil {
			yield(p2p.Entry{}, err)
			return
		}
		if q.Kind == p2p.KindPartials {
			l.partials(yield)
			return
		}
		if q.Tag != nil {
			l.list(*q.Tag, yield)
			return
		}
		if q.Has != "" {
			l.holders(yield)
			return
		}
		from := ""
		if q.Kind == p2p.KindTags && q.After != "" {
			from = q.After + "\x01"
		}
		for tag := l.nextTag(from); tag != nil; tag = l.nextTag(*tag + "\x01") {
			if q.Kind == p2p.KindTags {
				if !yield(p2p.Entry{Info: p2p.Info{Task: p2p.Task{Tag: *tag}}}, nil) {
					return
				}
			} else if !l.list(*tag, yield) {
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
	q   p2p.Query
	err error
}

// partials yields what has arrived of blobs.
func (l *lister) partials(yield func(p2p.Entry, error) bool) {
	if err := l.s.begin(l.ctx); err != nil {
		yield(p2p.Entry{}, err)
		return
	}
	all := l.s.Arriving()
	l.s.end()
	for _, a := range all {
		if l.q.Tag != nil && a.Task.Tag != *l.q.Tag {
			continue
		}
		size := max(a.Size, a.Bytes)
		table := digest.Table{Size: size, PieceLength: digest.PieceLength(size)}
		info := p2p.Info{Task: a.Task, Size: size, PieceLength: table.PieceLength, Pieces: table.Pieces(),
			Keep: p2p.KeepUntilReferred}
		info.Held = min(int(a.Bytes/table.PieceLength), info.Pieces-1)
		if !yield(p2p.Entry{Info: info, Total: a.Bytes}, context.Cause(l.ctx)) {
			return
		}
	}
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

// holders yields the tags that have q.Has.
func (l *lister) holders(yield func(p2p.Entry, error) bool) {
	var tags []string
	l.read(func(tx *bbolt.Tx) error {
		tags = lastParts(tx, bucketHolders, prefix(string(l.q.Has)))
		return nil
	})
	if l.err != nil {
		yield(p2p.Entry{}, l.err)
	}
	for _, tag := range tags {
		if (l.q.After == "" || tag > l.q.After) && !yield(p2p.Entry{Info: p2p.Info{Task: p2p.Task{Tag: tag}}}, nil) {
			return
		}
	}
}

// list yields what is wanted of one tag. It reports whether to go on; where
// an error is the reason not to, it has yielded it.
func (l *lister) list(tag string, yield func(p2p.Entry, error) bool) bool {
	type part struct{ bucket, prefix, after []byte }
	all := prefix(tag)
	parts := []part{{bucketNames, all, all}, {bucketTasks, all, all}}
	if l.q.RefersTo != "" {
		to := prefix(tag, string(l.q.RefersTo))
		parts = []part{{bucketParents, to, to}, {bucketReferrers, to, to}}
	} else if l.q.Kind == p2p.KindNames {
		parts = []part{{bucketNames, all, key(tag, l.q.After)}}
	}
	for _, p := range parts {
		for last := p.after; last != nil; {
			var batch []p2p.Entry
			batch, last = l.batch(p.bucket, p.prefix, tag, last)
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

// batch returns the entries of those keys of bucket that start with all and
// come after last, and the key to go on after, or nil at the end.
func (l *lister) batch(bucket, all []byte, tag string, last []byte) (batch []p2p.Entry, next []byte) {
	l.read(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucket).Cursor()
		for k := after(c, last); bytes.HasPrefix(k, all); k, _ = c.Next() {
			if len(batch) == listBatch {
				return nil
			}
			next = bytes.Clone(k)
			if bytes.Equal(bucket, bucketReferrers) && has(tx, bucketParents, k) {
				continue // it was among those
			}
			e, err := l.entry(tx, bucket, tag, lastPart(k))
			if err != nil {
				return err
			}
			batch = append(batch, e)
		}
		next = nil
		return nil
	})
	return batch, next
}

func (l *lister) entry(tx *bbolt.Tx, bucket []byte, tag, part string) (e p2p.Entry, err error) {
	task := p2p.Task{Tag: tag, Digest: digest.Digest(part)}
	if bytes.Equal(bucket, bucketNames) {
		record, _, err := get[nameRecord](tx, bucketNames, key(tag, part))
		if err != nil {
			return e, err
		}
		e.Name, task.Digest = part, record.Digest
	}
	if e.Info, _, err = l.s.info(tx, task); err != nil {
		return e, err
	}
	if l.q.Kind == p2p.KindAll && l.q.RefersTo == "" {
		var used time.Time
		e.Total, used, err = l.s.total(tx, task, map[digest.Digest]bool{})
		if e.Name != "" {
			e.LastUsed = used
		}
	}
	return e, err
}

// total sums up the sizes of a task's blob and of all it refers to, as far as it
// is held, and tells when any of it was last used.
func (s *Store) total(tx *bbolt.Tx, task p2p.Task, seen map[digest.Digest]bool) (sum int64, used time.Time, err error) {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err != nil || !found || seen[task.Digest] {
		return 0, used, err
	}
	seen[task.Digest] = true
	blob, _, err := get[blobRecord](tx, bucketBlobs, key(task.Digest))
	if err != nil {
		return 0, used, err
	}
	sum, used = blob.Size, s.lastUsed(tx, task)
	for _, child := range record.Refs {
		n, at, err := s.total(tx, p2p.Task{Tag: task.Tag, Digest: child}, seen)
		if err != nil {
			return 0, used, err
		}
		sum += n
		if at.After(used) {
			used = at
		}
	}
	return sum, used, nil
}

// Hold implements [p2p.Holder]: a store on its own has nothing beyond it.
func (s *Store) Hold(ctx context.Context, tag string, cid digest.CID) error {
	_, err := s.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local})
	return err
}

// HoldManifest implements [p2p.Holder].
func (s *Store) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return s.Stat(ctx, tag, cid, opts)
}

// HoldReferrers implements [p2p.Holder].
func (s *Store) HoldReferrers(ctx context.Context, task p2p.Task) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	return task.Validate()
}

// Verify implements [p2p.Holder].
func (s *Store) Verify(ctx context.Context, task p2p.Task) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	if err := task.Validate(); err != nil {
		return err
	}
	if err := s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, task) }); err != nil {
		return err
	}
	return s.Recheck(ctx, task.Digest)
}

// Mend implements [p2p.Holder]: a store on its own can't make whole what is damaged.
func (s *Store) Mend(ctx context.Context, task p2p.Task) error {
	err := s.Verify(ctx, task)
	if errors.Is(err, digest.ErrCorrupt) {
		err = fmt.Errorf("mend %s: %w: %w", task, p2p.ErrUnreachable, err)
	}
	return err
}
