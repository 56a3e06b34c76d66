package pieces

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Delete is what a swarm remembers of a delete, so that peers who were away
// learn of it, and so that nobody brings back what they still hold: a
// tombstone. It covers what was imported, or named, no later than At.
type Delete struct {
	Tag string
	CID digest.CID
	At  time.Time
	// Force deletes a task that others refer to.
	Force bool
	// NameOnly deletes a name and keeps what it pointed to.
	NameOnly bool
	// Soft deletes a task only where it is a copy that came from peers, and
	// nothing holds it: what went together with the name that was deleted.
	Soft bool
}

// softMark ends the key of a soft delete, which is kept beside the other one of
// the same cid: neither says what the other does.
const softMark = "soft"

func (d Delete) key() []byte {
	if d.Soft {
		return key(d.Tag, d.CID.String(), softMark)
	}
	return key(d.Tag, d.CID.String())
}

// deleteRecord is a Delete as it is stored. The rest of it is in the key.
type deleteRecord struct {
	At       time.Time `json:"at"`
	Force    bool      `json:"force,omitempty"`
	NameOnly bool      `json:"nameOnly,omitempty"`
	Number   uint64    `json:"number"` // in bucketDeleteLog
}

// errDeleted says that peers have deleted what is to be taken from one of them.
var errDeleted = fmt.Errorf("%w: it has been deleted", p2p.ErrNotFound)

// NewerName reports whether a name that was pointed to a at the time atA counts
// before one that was pointed to b at atB: the later one does, and of two at the
// same time the one with the greater digest, so that all peers agree.
func NewerName(a digest.Digest, atA time.Time, b digest.Digest, atB time.Time) bool {
	return cmp.Or(atA.Compare(atB), cmp.Compare(a, b)) > 0
}

// origin returns the origin of a task that is committed. What an import or a
// push makes is newer than any delete that is known.
func origin(tx *bbolt.Tx, n p2p.NewTask, before, now time.Time) (time.Time, error) {
	return stamp(tx, n.Task.Tag, string(n.Task.Digest), n.Origin, before, now)
}

// updated returns when a name that is committed was pointed to its task.
func updated(tx *bbolt.Tx, n p2p.NewName, before, now time.Time) (time.Time, error) {
	at, err := stamp(tx, n.Tag, n.Name, n.Updated, time.Time{}, now)
	if err == nil && n.Updated.IsZero() && !at.After(before) {
		at = before.Add(1)
	}
	return at, err
}

// stamp returns the later of before and given, where given is not zero; where it
// is, a time from now on that is later than the last delete. It fails where what
// is given was deleted since.
func stamp(tx *bbolt.Tx, tag, cid string, given, before, now time.Time) (time.Time, error) {
	gone, found, err := get[deleteRecord](tx, bucketDeletes, key(tag, cid))
	if err != nil {
		return given, err
	}
	if given.IsZero() {
		if found && !now.After(gone.At) {
			now = gone.At.Add(1)
		}
		given = now
	} else if found && !given.After(gone.At) && !before.After(gone.At) {
		return given, fmt.Errorf("%q under tag %q: %w", cid, tag, errDeleted)
	}
	if before.After(given) {
		return before, nil
	}
	return given, nil
}

// Deleted returns when the swarm has deleted cid under tag, as far as it is
// known here, and whether by force; zero where it has not.
func (s *Store) Deleted(ctx context.Context, tag string, cid digest.CID) (at time.Time, force bool, err error) {
	if err := s.begin(ctx); err != nil {
		return at, false, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		record, found, err := get[deleteRecord](tx, bucketDeletes, key(tag, cid.String()))
		if found {
			at, force = record.At, record.Force
		}
		return err
	})
	return at, force, err
}

// DeleteResult says what a delete did.
type DeleteResult struct {
	p2p.Deleted
	Found bool // there was something of that name
	News  bool // the delete was not known before
}

// DeleteForAll does what [Store.Delete] does, and remembers it: the Deletes that
// it returns are for the peers. It succeeds where nothing of that name is here,
// as a peer may have it.
func (s *Store) DeleteForAll(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (result DeleteResult, deletes []Delete, err error) {
	if err := validateDelete(tag, cid, opts); err != nil {
		return result, nil, err
	}
	if err := s.begin(ctx); err != nil {
		return result, nil, err
	}
	defer s.end()
	var removed removal
	err = s.update(func(tx *bbolt.Tx) error {
		removed, result = removal{}, DeleteResult{News: true}
		d := Delete{Tag: tag, CID: cid, At: time.Now().UTC(), Force: opts.Force, NameOnly: opts.NameOnly}
		version, err := versionOf(tx, tag, cid)
		if err == nil && version.After(d.At) {
			d.At = version // made by a clock that is ahead of ours
		}
		if err == nil {
			err = removed.delete(tx, tag, cid, opts)
		}
		if err != nil && !errors.Is(err, p2p.ErrNotFound) {
			return err
		}
		result.Found = err == nil
		deletes = []Delete{d}
		for _, t := range removed.tasks {
			if c := digest.FromDigest(t.Digest); c != cid {
				deletes = append(deletes, Delete{Tag: tag, CID: c, At: d.At, Soft: true})
			}
		}
		for _, d := range deletes {
			if _, err := remember(tx, d); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return DeleteResult{}, nil, err
	}
	if removed.loose > 0 {
		s.dropLoose()
	}
	result.Deleted = removed.deleted()
	return result, deletes, nil
}

// ApplyDelete does a delete that a peer has told of: it removes what is here,
// unless it is newer, and remembers the delete. Where another task refers to
// it, and the delete is not forced, it does neither and the error matches
// [p2p.ErrReferenced].
func (s *Store) ApplyDelete(ctx context.Context, d Delete) (result DeleteResult, err error) {
	opts := p2p.DeleteOptions{Force: d.Force, NameOnly: d.NameOnly}
	if err := validateDelete(d.Tag, d.CID, opts); err != nil {
		return result, err
	}
	if err := s.begin(ctx); err != nil {
		return result, err
	}
	defer s.end()
	var removed removal
	err = s.update(func(tx *bbolt.Tx) (err error) {
		removed, result = removal{}, DeleteResult{}
		if result.News, err = remember(tx, d); err != nil || !result.News {
			return err
		}
		version, err := versionOf(tx, d.Tag, d.CID)
		if err == nil && !version.After(d.At) {
			if d.Soft {
				err = removed.soft(tx, p2p.Task{Tag: d.Tag, Digest: d.CID.Digest()})
			} else if err = removed.delete(tx, d.Tag, d.CID, opts); err == nil {
				result.Found = true
			}
		}
		if errors.Is(err, p2p.ErrNotFound) {
			return nil
		}
		return err
	})
	if err != nil {
		return DeleteResult{}, err
	}
	if removed.loose > 0 {
		s.dropLoose()
	}
	result.Deleted = removed.deleted()
	return result, nil
}

func validateDelete(tag string, cid digest.CID, opts p2p.DeleteOptions) error {
	if err := validateRef(tag, cid); err != nil {
		return err
	}
	if opts.NameOnly && cid.CacheID() == "" {
		return fmt.Errorf("%s: %w: it is a digest, want the name that is to be deleted", cid, digest.ErrInvalid)
	}
	return nil
}

// versionOf returns when what cid names was imported or named.
func versionOf(tx *bbolt.Tx, tag string, cid digest.CID) (time.Time, error) {
	if name := cid.CacheID(); name != "" {
		record, found, err := get[nameRecord](tx, bucketNames, key(tag, name))
		if err == nil && !found {
			err = fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
		}
		return record.Updated, err
	}
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err == nil && !found {
		err = fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	return record.origin(), err
}

// soft removes a task that came from peers and that nothing holds.
func (r *removal) soft(tx *bbolt.Tx, t p2p.Task) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found || record.Pinned || !record.Fetched || record.held(tx, t) {
		return err
	}
	return r.remove(tx, t)
}

// remember notes a delete, unless one that covers it is known.
func remember(tx *bbolt.Tx, d Delete) (news bool, err error) {
	k := d.key()
	before, found, err := get[deleteRecord](tx, bucketDeletes, k)
	if err != nil {
		return false, err
	}
	if found {
		if !d.At.After(before.At) {
			return false, nil
		}
		if err := forget(tx, k, before); err != nil {
			return false, err
		}
	}
	number, err := tx.Bucket(bucketDeleteLog).NextSequence()
	if err != nil {
		return false, err
	}
	record := deleteRecord{At: d.At.UTC(), Force: d.Force, NameOnly: d.NameOnly, Number: number}
	if err := put(tx, bucketDeletes, k, record); err != nil {
		return false, err
	}
	if err := addToSum(tx, k, record); err != nil {
		return false, err
	}
	return true, putValue(tx, bucketDeleteLog, binary.BigEndian.AppendUint64(nil, number), k)
}

// forget takes out a delete.
func forget(tx *bbolt.Tx, k []byte, record deleteRecord) error {
	if err := addToSum(tx, k, record); err != nil { // a second time: that takes it out
		return err
	}
	return removeKeys(tx, bucketDeletes, k, bucketDeleteLog, binary.BigEndian.AppendUint64(nil, record.Number))
}

// addToSum adds a delete to the sum over all, which does not depend on their
// order: two stores with the same sum know the same.
func addToSum(tx *bbolt.Tx, k []byte, r deleteRecord) error {
	sum := make([]byte, sha256.Size)
	copy(sum, value(tx, bucketMeta, keyDeletes))
	one := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%t%t", k, r.At.UnixNano(), r.Force, r.NameOnly))
	for i := range sum {
		sum[i] ^= one[i]
	}
	return putValue(tx, bucketMeta, keyDeletes, sum)
}

// DeletesSum returns a sum over all deletes that are known. Where that of a
// peer is the same, it knows the same.
func (s *Store) DeletesSum(ctx context.Context) (sum [sha256.Size]byte, err error) {
	if err := s.begin(ctx); err != nil {
		return sum, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		copy(sum[:], value(tx, bucketMeta, keyDeletes))
		return nil
	})
	return sum, err
}

// Deletes returns up to limit deletes that were learned of after the one with
// the number after, in that order, and the number of the last one.
func (s *Store) Deletes(ctx context.Context, after uint64, limit int) (deletes []Delete, last uint64, err error) {
	if err := s.begin(ctx); err != nil {
		return nil, 0, err
	}
	defer s.end()
	last = after
	err = s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketDeleteLog).Cursor()
		for n, k := c.Seek(binary.BigEndian.AppendUint64(nil, after+1)); n != nil && len(deletes) < limit; n, k = c.Next() {
			k, _ = mustUnseal(bucketDeleteLog, n, k)
			record, _, err := get[deleteRecord](tx, bucketDeletes, k)
			if err != nil {
				return err
			}
			last = binary.BigEndian.Uint64(n)
			parts := strings.Split(string(k), "\x00")
			cid, err := digest.ParseCID(parts[1])
			if err != nil {
				return fmt.Errorf("%w: delete %q in the metadata: %w", digest.ErrCorrupt, k, err)
			}
			deletes = append(deletes, Delete{parts[0], cid, record.At, record.Force, record.NameOnly, len(parts) > 2})
		}
		return nil
	})
	return deletes, last, err
}

// ForgetDeletes forgets deletes from before a time.
func (s *Store) ForgetDeletes(ctx context.Context, before time.Time) (n int, err error) {
	if err := s.begin(ctx); err != nil {
		return 0, err
	}
	defer s.end()
	err = s.update(func(tx *bbolt.Tx) error {
		n = 0
		type old struct {
			k      []byte
			record deleteRecord
		}
		var olds []old
		var failed error
		scan(tx, bucketDeletes, nil, func(k, _ []byte) bool {
			var record deleteRecord
			record, _, failed = get[deleteRecord](tx, bucketDeletes, k)
			if failed == nil && record.At.Before(before) {
				olds = append(olds, old{bytes.Clone(k), record})
			}
			return failed == nil
		})
		for _, o := range olds {
			if err := forget(tx, o.k, o.record); err != nil {
				return err
			}
			n++
		}
		return failed
	})
	return n, err
}

// Name returns what a name points to here, since when, and how it was pointed
// there. It fails with [p2p.ErrNotFound] where there is none.
func (s *Store) Name(ctx context.Context, tag, name string) (n p2p.NewName, err error) {
	if err := s.begin(ctx); err != nil {
		return n, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		record, found, err := get[nameRecord](tx, bucketNames, key(tag, name))
		if err == nil && !found {
			err = fmt.Errorf("name %s under tag %q: %w", name, tag, p2p.ErrNotFound)
		}
		n = p2p.NewName{Tag: tag, Name: name, Digest: record.Digest, Updated: record.Updated, KeepOld: !record.LetGo}
		return err
	})
	return n, err
}
