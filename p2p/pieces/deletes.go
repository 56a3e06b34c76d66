package pieces

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Version is one import of a task, or one move of a name, on whatever host that
// was. Each is later than all that the host and its reachable peers knew of it,
// whatever their clocks say (a hybrid logical clock): so those are in order that
// could see each other.
type Version struct {
	At time.Time
	// After is the latest version or delete that was known when this one was
	// made. It is zero where that is not known: earlier programs did not keep it.
	After time.Time
}

// LastStamp is the latest date that there is: peers refuse later ones.
var LastStamp = time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC)

// beginning is the After of a version before which nothing was known.
var beginning = time.Unix(0, 0).UTC()

// Unseen reports whether a later version of something else was made by a host that did not know of v.
func (v Version) Unseen(later Version) bool {
	return !later.After.IsZero() && later.After.Before(v.At)
}

// Delete is what a swarm remembers of a delete, so that peers who were away
// are told of it, and so that nobody brings back what they still hold: a
// tombstone.
type Delete struct {
	Tag string
	CID digest.CID
	// All deletes everything under the tag. CID is the zero value then. Deletes of what it covers
	// are not remembered beside it.
	All bool
	// At is the newest version that could be seen where the delete was made.
	// It covers that, and all versions up to After; where that is zero, all up
	// to At. See Covers.
	At, After time.Time
	// Seen are further versions that could be seen there. They are not remembered:
	// a host that has one of them is told of the delete by the one that made it.
	Seen []time.Time
	// Made is when it was made, by the clock of this host: it is remembered for
	// some time from then on.
	Made time.Time
	// Limit is the latest date that a clock can have come to when it was made. A date
	// that was in the future then covers nothing more when that time has come. Zero: now.
	Limit time.Time
	// Force deletes a task that others refer to.
	Force bool
	// NameOnly deletes a name and keeps what it pointed to.
	NameOnly bool
	// Soft deletes a task only where it is a copy that came from peers, and
	// nothing holds it: what went together with the name that was deleted.
	Soft bool
}

// MaxAhead is how far the clock of a host may be ahead without a delete by it
// covering less than what it names.
const MaxAhead = time.Hour

// MaxSeen bounds Delete.Seen.
const MaxSeen = 16

// Covers reports whether a version goes with the delete: it was seen by whoever
// made that, or is older than what was known there. A date beyond limit is that of
// a clock that was wrong: what is dated earlier need not be older.
func (d Delete) Covers(v time.Time, limit time.Time) bool {
	if d.At.IsZero() || v.Equal(d.At) || slices.ContainsFunc(d.Seen, v.Equal) {
		return !d.At.IsZero()
	}
	upTo := timeOr(d.After, d.At)
	return !v.After(upTo) && (!upTo.After(limit) || v.After(limit))
}

// timeOr returns the first of two times, or the second where that is zero.
func timeOr(a, b time.Time) time.Time {
	if a.IsZero() {
		return b
	}
	return a
}

func latest(all ...time.Time) time.Time { return slices.MaxFunc(all, time.Time.Compare) }

// Last returns the latest date up to limit that what is imported again has to come after.
func (d Delete) Last(limit time.Time) time.Time {
	for _, t := range []time.Time{d.At, timeOr(d.After, d.At)} {
		if !t.After(limit) {
			return t
		}
	}
	return time.Time{}
}

// See adds to what the delete covers a version, or what another delete covers.
func (d *Delete) See(v Version) {
	after := timeOr(v.After, v.At)
	if len(d.Seen) < MaxSeen && !v.At.IsZero() && !slices.ContainsFunc(d.Seen, v.At.Equal) {
		d.Seen = append(d.Seen, v.At)
	}
	switch {
	case v.At.IsZero():
		return
	case v.At.After(d.At):
		if !d.At.IsZero() {
			after = latest(after, d.At, timeOr(d.After, d.At))
		}
		d.At = v.At
	case v.At.Before(d.At):
		after = latest(after, v.At, timeOr(d.After, d.At))
	default:
		after = latest(after, timeOr(d.After, d.At))
	}
	d.After = after
}

// softMark ends the key of a soft delete, which is kept beside the other one of
// the same cid: neither says what the other does.
const softMark = "soft"

func (d Delete) key() []byte {
	switch {
	case d.All:
		return key(d.Tag)
	case d.Soft:
		return key(d.Tag, d.CID.String(), softMark)
	}
	return key(d.Tag, d.CID.String())
}

// deletesBucket returns where a delete with the key k is.
func deletesBucket(k []byte) []byte {
	if bytes.IndexByte(k, 0) < 0 {
		return bucketCleared
	}
	return bucketDeletes
}

// deleteRecord is a Delete as it is stored. The rest of it is in the key.
type deleteRecord struct {
	At       time.Time `json:"at"`
	After    time.Time `json:"after,omitzero"`
	Made     time.Time `json:"made,omitzero"` // zero: At
	Limit    time.Time `json:"limit,omitzero"`
	Force    bool      `json:"force,omitempty"`
	NameOnly bool      `json:"nameOnly,omitempty"`
	Number   uint64    `json:"number"` // in bucketDeleteLog
}

// delete returns what a record under the key k says.
func (r deleteRecord) delete(k []byte) (Delete, error) {
	parts := strings.Split(string(k), "\x00")
	if len(parts) == 1 {
		return Delete{Tag: parts[0], All: true, At: r.At, After: r.At, Made: timeOr(r.Made, r.At), Limit: r.Limit}, nil
	}
	cid, err := digest.ParseCID(parts[1])
	if err != nil {
		return Delete{}, fmt.Errorf("%w: delete %q in the metadata: %w", digest.ErrCorrupt, k, err)
	}
	return Delete{
		Tag: parts[0], CID: cid, At: r.At, After: r.After, Made: timeOr(r.Made, r.At), Limit: r.Limit,
		Force: r.Force, NameOnly: r.NameOnly, Soft: len(parts) > 2,
	}, nil
}

// getDelete returns what is known of a delete.
func getDelete(tx *bbolt.Tx, k []byte) (d Delete, record deleteRecord, found bool, err error) {
	record, found, err = get[deleteRecord](tx, deletesBucket(k), k)
	if err == nil && found {
		d, err = record.delete(k)
	}
	return d, record, found, err
}

// deleted returns all that is known to be deleted of cid, with all else of the tag or without.
func deleted(tx *bbolt.Tx, tag, cid string) (d Delete, found bool, err error) {
	d, _, found, err = getDelete(tx, key(tag, cid))
	if err != nil {
		return d, false, err
	}
	all, _, cleared, err := getDelete(tx, key(tag))
	if err != nil || !cleared {
		return d, found, err
	}
	if !found {
		all.All = false
		all.CID, err = digest.ParseCID(cid)
		return all, true, err
	}
	d.See(Version{all.At, all.After})
	d.Made, d.Limit = latest(d.Made, all.Made), latest(d.Limit, all.Limit)
	return d, true, nil
}

// errDeleted says that peers have deleted what is to be taken from one of them.
var errDeleted = fmt.Errorf("%w: it has been deleted", p2p.ErrNotFound)

// NewerName reports whether a name that was pointed to a at the time atA counts
// before one that was pointed to b at atB: the later one does, and of two at the
// same time the one with the greater digest, so that all peers agree.
func NewerName(a digest.Digest, atA time.Time, b digest.Digest, atB time.Time) bool {
	return cmp.Or(atA.Compare(atB), cmp.Compare(a, b)) > 0
}

// stamp returns the version of what is committed. Where given has no time it is
// imported or moved here: now, and later than before, than what given came after,
// and than the last delete. Else it is a copy of what a peer has, and fails where
// that was deleted; where before is later, that stays.
func (s *Store) stamp(tx *bbolt.Tx, tag, cid string, given, before Version) (Version, error) {
	gone, found, err := deleted(tx, tag, cid)
	if err != nil {
		return given, err
	}
	if given.At.IsZero() {
		now := s.swarmTime()
		known := latest(beginning, given.After, before.At, gone.Last(s.Limit()))
		if !now.After(known) {
			now = known.Add(1)
		}
		if s.Covers(gone, now) {
			now = gone.At.Add(1)
		}
		if now.After(LastStamp) {
			now = LastStamp // of a peer that lies; a delete helps
		}
		return Version{now, known}, nil
	}
	covered := func(v Version) bool { return v.At.IsZero() || s.Covers(gone, v.At) }
	if found && covered(given) && covered(before) {
		return given, fmt.Errorf("%q under tag %q: %w", cid, tag, errDeleted)
	}
	if before.At.After(given.At) {
		return before, nil
	}
	return given, nil
}

// Limit returns the latest date that a clock can have come to. What is dated later is
// in order among itself, and takes nothing from what is not.
func (s *Store) Limit() time.Time { return s.swarmTime().Add(MaxAhead) }

// swarmTime returns the time by which versions are dated and judged.
func (s *Store) swarmTime() time.Time {
	if f := s.believed.Load(); f != nil {
		return (*f)().UTC()
	}
	return s.now()
}

// Believe has f tell the time by which what is imported and moved is dated, and the
// dates of others are judged, in place of the clock of this host.
func (s *Store) Believe(f func() time.Time) { s.believed.Store(&f) }

// Deleted returns what the swarm has deleted of cid under tag, as far as it is
// known here. It covers nothing where it has not.
func (s *Store) Deleted(ctx context.Context, tag string, cid digest.CID) (d Delete, err error) {
	if err := s.begin(ctx); err != nil {
		return d, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) (err error) {
		d, _, err = deleted(tx, tag, cid.String())
		return err
	})
	return d, err
}

// Covers reports whether a delete covers a version, as seen from here.
func (s *Store) Covers(d Delete, version time.Time) bool {
	return d.Covers(version, timeOr(d.Limit, s.Limit()))
}

// DeleteResult says what a delete did.
type DeleteResult struct {
	p2p.Deleted
	Found bool       // there was something of that name
	News  bool       // the delete was not known before
	Newer Version    // what is here and is not covered by it; zero: nothing
	Gone  []p2p.Task // tasks that went
}

// DeleteForAll does what [Store.Delete] does, and remembers it: the Deletes that
// it returns are for the peers, those that were asked for first. seen is what they have said that
// they have, for the delete to cover it, too; with All under the zero value of a cid. Where neither
// they nor this store have it, there is nothing to delete, and to remember.
func (s *Store) DeleteForAll(
	ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions, seen map[digest.CID][]Version,
) (result DeleteResult, deletes []Delete, err error) {
	if err := opts.Validate(tag, cid); err != nil {
		return result, nil, err
	}
	if err := s.begin(ctx); err != nil {
		return result, nil, err
	}
	defer s.end()
	removed, err := s.remove(tag, cid, opts, func(tx *bbolt.Tx, removed *removal) (err error) {
		result = DeleteResult{News: true}
		if opts.All {
			deletes, result.Found, err = s.clear(tx, removed, tag, seen[digest.CID{}])
		} else {
			deletes, result.Found, err = s.deleteForAll(tx, removed, tag, cid, opts, seen)
		}
		return err
	})
	if err != nil {
		return DeleteResult{}, nil, err
	}
	result.Deleted, result.Gone = removed.deleted(), removed.tasks
	return result, deletes, nil
}

func (s *Store) deleteForAll(
	tx *bbolt.Tx, removed *removal, tag string, cid digest.CID, opts p2p.DeleteOptions, seen map[digest.CID][]Version,
) (deletes []Delete, found bool, err error) {
	cids := opts.CIDs(cid)
	asked := map[digest.CID]bool{}
	var last time.Time
	for _, cid := range cids {
		asked[cid] = true
		d := Delete{Tag: tag, CID: cid, Made: s.now(), Limit: s.Limit(), Force: opts.Force, NameOnly: opts.NameOnly}
		for _, v := range seen[cid] {
			d.See(v)
		}
		version, err := versionOf(tx, tag, cid)
		if err == nil {
			d.See(version)
		} else if !errors.Is(err, p2p.ErrNotFound) {
			return nil, false, err
		}
		if d.At.IsZero() {
			continue
		}
		before, _, _, err := getDelete(tx, d.key())
		if err != nil {
			return nil, false, err
		}
		d.See(Version{before.At, before.After})
		deletes, last = append(deletes, d), latest(last, d.At)
	}
	if found, err = removed.deleteEach(tx, tag, cid, opts); err != nil || len(deletes) == 0 {
		return nil, found, err
	}
	order := map[digest.CID]int{} // peers do them in the same one
	for i, c := range removed.order {
		order[c] = i + 1
	}
	slices.SortStableFunc(deletes, func(a, b Delete) int { return order[a.CID] - order[b.CID] })
	for i, t := range removed.tasks {
		if c := digest.FromDigest(t.Digest); !asked[c] {
			at := latest(last, removed.origins[i]) // all copies up to then
			deletes = append(deletes,
				Delete{Tag: tag, CID: c, At: at, After: at, Made: s.now(), Limit: s.Limit(), Soft: true})
		}
	}
	for _, d := range deletes {
		if _, _, err := s.remember(tx, d); err != nil {
			return nil, false, err
		}
	}
	return deletes, found, nil
}

// clear deletes all that is under a tag, here and, up to now, on peers. A version that is dated
// beyond what a clock can have come to is not of that order: a delete of its own names it.
func (s *Store) clear(
	tx *bbolt.Tx, removed *removal, tag string, seen []Version,
) (deletes []Delete, found bool, err error) {
	limit := s.Limit()
	all := Delete{Tag: tag, All: true, At: s.swarmTime(), Made: s.now(), Limit: limit}
	before, _, _, err := getDelete(tx, all.key())
	if err != nil {
		return nil, false, err
	}
	all.At = latest(all.At, before.At)
	deletes = []Delete{all}
	see := func(cid digest.CID, v Version) {
		switch {
		case !v.At.After(limit):
			deletes[0].At = latest(deletes[0].At, v.At)
		case !cid.IsZero():
			deletes = append(deletes, Delete{Tag: tag, CID: cid, At: v.At, After: v.After, Made: all.Made, Limit: limit,
				Force: cid.Digest() != ""})
		case len(deletes[0].Seen) < MaxSeen:
			deletes[0].Seen = append(deletes[0].Seen, v.At)
		}
	}
	for _, v := range seen {
		see(digest.CID{}, v)
	}
	if err := eachVersion(tx, tag, see); err != nil {
		return nil, false, err
	}
	if found, err = removed.deleteAll(tx, tag, nil); err != nil {
		return nil, found, err
	}
	for i := range deletes {
		deletes[i].After = timeOr(deletes[i].After, deletes[i].At)
		if _, _, err := s.remember(tx, deletes[i]); err != nil {
			return nil, found, err
		}
	}
	return deletes, found, nil
}

// ApplyDelete does a delete that a peer has told of: it removes what is here,
// unless it is newer, and remembers the delete. Where another task refers to
// it, and the delete is not forced, it does neither and the error matches
// [p2p.ErrReferenced].
func (s *Store) ApplyDelete(ctx context.Context, d Delete) (result DeleteResult, err error) {
	opts := p2p.DeleteOptions{Force: d.Force, NameOnly: d.NameOnly, All: d.All}
	if err := opts.Validate(d.Tag, d.CID); err != nil {
		return result, err
	}
	if err := s.begin(ctx); err != nil {
		return result, err
	}
	defer s.end()
	if d.Limit.IsZero() && !d.Made.IsZero() {
		d.Limit = s.Limit().Add(-max(0, s.now().Sub(d.Made)))
	}
	removed, err := s.remove(d.Tag, d.CID, opts, func(tx *bbolt.Tx, removed *removal) (err error) {
		result = DeleteResult{}
		var all Delete
		if all, result.News, err = s.remember(tx, d); err != nil {
			return err
		}
		all.Seen = d.Seen
		if d.All {
			if result.Found, err = removed.deleteAll(tx, d.Tag, &all); err == nil {
				result.Newer, err = latestOf(tx, d.Tag)
			}
			return err
		}
		version, err := versionOf(tx, d.Tag, d.CID)
		switch {
		case errors.Is(err, p2p.ErrNotFound):
			return nil
		case err != nil:
			return err
		case !s.Covers(all, version.At) && !s.Covers(d, version.At):
			result.Newer = version
			return nil
		case d.Soft:
			return removed.soft(tx, p2p.Task{Tag: d.Tag, Digest: d.CID.Digest()})
		}
		result.Found = true
		return removed.delete(tx, d.Tag, d.CID, opts)
	})
	if err != nil {
		return DeleteResult{}, err
	}
	result.Deleted, result.Gone = removed.deleted(), removed.tasks
	return result, nil
}

// latestOf returns the latest version of what is under a tag; the zero value where there is nothing.
func latestOf(tx *bbolt.Tx, tag string) (last Version, err error) {
	err = eachVersion(tx, tag, func(_ digest.CID, v Version) {
		if v.At.After(last.At) {
			last = v
		}
	})
	return last, err
}

// eachVersion calls f for each name and each task under a tag, with its version.
func eachVersion(tx *bbolt.Tx, tag string, f func(digest.CID, Version)) error {
	for _, bucket := range [][]byte{bucketNames, bucketTasks} {
		for _, part := range lastParts(tx, bucket, prefix(tag)) {
			cid, err := digest.ParseCID(part)
			if err != nil {
				return fmt.Errorf("%w: %q under tag %q in the metadata: %w", digest.ErrCorrupt, part, tag, err)
			}
			v, err := versionOf(tx, tag, cid)
			if err != nil {
				return err
			}
			f(cid, v)
		}
	}
	return nil
}

// versionOf returns the version of what cid names.
func versionOf(tx *bbolt.Tx, tag string, cid digest.CID) (Version, error) {
	if name := cid.CacheID(); name != "" {
		record, found, err := get[nameRecord](tx, bucketNames, key(tag, name))
		if err == nil && !found {
			err = fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
		}
		return record.version(), err
	}
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(task))
	if err == nil && !found {
		err = fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	return record.version(), err
}

// soft removes a task that came from peers and that nothing holds, and nobody was
// told of.
func (r *removal) soft(tx *bbolt.Tx, t p2p.Task) error {
	record, found, err := get[taskRecord](tx, bucketTasks, taskKey(t))
	if err != nil || !found || record.Pinned || !record.Fetched || record.held(tx, t) {
		return err
	}
	if spared, err := r.spare(tx, t, &record); spared || err != nil {
		return err
	}
	return r.remove(tx, t, ReasonDeleted)
}

// remember notes a delete, unless one that covers as much is known. It returns
// all that is known to be deleted of the same cid.
//
//nolint:cyclop // the steps of one transaction, in their order
func (s *Store) remember(tx *bbolt.Tx, d Delete) (all Delete, news bool, err error) {
	k := d.key()
	before, record, found, err := getDelete(tx, k)
	if err != nil {
		return d, false, err
	}
	if d.All {
		d.After, d.Force, d.NameOnly = d.At, false, false // it has no other sense
	} else {
		cleared, _, _, err := getDelete(tx, key(d.Tag))
		if err != nil {
			return d, false, err
		}
		if s.coversDelete(cleared, d) {
			return cleared, false, nil
		}
	}
	if found {
		all = before
		all.See(Version{d.At, d.After})
		all.Made = latest(before.Made, d.Made)
		all.Limit = latest(before.Limit, d.Limit)
		switch d.At.Compare(before.At) {
		case 1:
			all.Force, all.NameOnly = d.Force, d.NameOnly
		case 0:
			all.Force, all.NameOnly = before.Force || d.Force, before.NameOnly && d.NameOnly
		}
		if all.At.Equal(before.At) && all.After.Equal(timeOr(before.After, before.At)) && all.Force == before.Force &&
			all.NameOnly == before.NameOnly {
			return before, false, nil
		}
		if err := forget(tx, k, record); err != nil {
			return d, false, err
		}
		d = all
	}
	number, err := tx.Bucket(bucketDeleteLog).NextSequence()
	if err != nil {
		return d, false, err
	}
	record = deleteRecord{At: d.At.UTC(), After: d.After.UTC(), Made: d.Made.UTC(), Limit: d.Limit.UTC(),
		Force: d.Force, NameOnly: d.NameOnly, Number: number}
	if d.All {
		record.After = time.Time{} // At
	}
	if err := put(tx, deletesBucket(k), k, record); err != nil {
		return d, false, err
	}
	if err := addToSum(tx, k, record); err != nil {
		return d, false, err
	}
	if d.All {
		if err := s.forgetCovered(tx, d); err != nil {
			return d, false, err
		}
	}
	if gone := d.CID.Digest(); d.Force && gone != "" {
		// It may not be here, and what refers to it be.
		if err := lose(tx, p2p.Task{Tag: d.Tag, Digest: gone}); err != nil {
			return d, false, err
		}
	}
	return d, true, putValue(tx, bucketDeleteLog, binary.BigEndian.AppendUint64(nil, number), k)
}

// coversDelete reports whether a delete of all under a tag covers all that another one does.
func (s *Store) coversDelete(all, d Delete) bool {
	return s.Covers(all, d.At) && s.Covers(all, timeOr(d.After, d.At))
}

// forgetCovered takes out the deletes that a delete of all under a tag covers.
func (s *Store) forgetCovered(tx *bbolt.Tx, all Delete) error {
	var covered []oldDelete
	var failed error
	scan(tx, bucketDeletes, prefix(all.Tag), func(k, _ []byte) bool {
		var d Delete
		var record deleteRecord
		if d, record, _, failed = getDelete(tx, k); failed == nil && s.coversDelete(all, d) {
			covered = append(covered, oldDelete{bytes.Clone(k), record})
		}
		return failed == nil
	})
	for _, o := range covered {
		if err := forget(tx, o.k, o.record); err != nil {
			return err
		}
	}
	return failed
}

// oldDelete is a delete that is to be forgotten.
type oldDelete struct {
	k      []byte
	record deleteRecord
}

// forget takes out a delete.
func forget(tx *bbolt.Tx, k []byte, record deleteRecord) error {
	if err := addToSum(tx, k, record); err != nil { // a second time: that takes it out
		return err
	}
	return removeKeys(tx, deletesBucket(k), k, bucketDeleteLog, binary.BigEndian.AppendUint64(nil, record.Number))
}

// addToSum adds a delete to the sum over all, which does not depend on their
// order: two stores with the same sum know the same.
func addToSum(tx *bbolt.Tx, k []byte, r deleteRecord) error {
	sum := make([]byte, sha256.Size)
	copy(sum, value(tx, bucketMeta, keyDeletes))
	text := fmt.Appendf(nil, "%s\x00%d\x00%t%t", k, r.At.UnixNano(), r.Force, r.NameOnly)
	if !r.After.IsZero() && !r.After.Equal(r.At) {
		text = fmt.Appendf(text, "\x00%d", r.After.UnixNano())
	}
	one := sha256.Sum256(text)
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

// Deletes returns up to limit deletes that came after the one with
// the number after, in that order, and the number of the last one.
func (s *Store) Deletes(ctx context.Context, after uint64, limit int) (deletes []Delete, last uint64, err error) {
	if err := s.begin(ctx); err != nil {
		return nil, 0, err
	}
	defer s.end()
	last = after
	err = s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketDeleteLog).Cursor()
		for n, k := c.Seek(binary.BigEndian.AppendUint64(nil, after+1)); n != nil &&
			len(deletes) < limit; n, k = c.Next() {
			k, _ = mustUnseal(bucketDeleteLog, n, k)
			d, _, _, err := getDelete(tx, k)
			if err != nil {
				return err
			}
			last = binary.BigEndian.Uint64(n)
			deletes = append(deletes, d)
		}
		return nil
	})
	return deletes, last, err
}

// ForgetDeletes forgets the deletes that were made before a time. What was made
// in the future, by a clock that was wrong, is remembered as if it were made now.
func (s *Store) ForgetDeletes(ctx context.Context, before time.Time) (n int, err error) {
	if err := s.begin(ctx); err != nil {
		return 0, err
	}
	defer s.end()
	err = s.free(1, func(tx *bbolt.Tx) error {
		n = 0
		var olds, ahead []oldDelete
		var failed error
		now := s.now()
		look := func(k, _ []byte) bool {
			var record deleteRecord
			_, record, _, failed = getDelete(tx, k)
			made := timeOr(record.Made, record.At)
			if failed == nil && made.Before(before) {
				olds = append(olds, oldDelete{bytes.Clone(k), record})
			} else if failed == nil && made.After(now) {
				ahead = append(ahead, oldDelete{bytes.Clone(k), record})
			}
			return failed == nil
		}
		if scan(tx, bucketDeletes, nil, look); failed == nil {
			scan(tx, bucketCleared, nil, look)
		}
		for _, o := range olds {
			if err := forget(tx, o.k, o.record); err != nil {
				return err
			}
			n++
		}
		for _, o := range ahead {
			o.record.Made = now
			if err := put(tx, deletesBucket(o.k), o.k, o.record); err != nil {
				return err
			}
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
		n = p2p.NewName{Tag: tag, Name: name, Digest: record.Digest, Updated: record.Updated, After: record.After,
			KeepOld: !record.LetGo}
		return err
	})
	return n, err
}

// LatestNames returns up to n names, those that were moved last, the last one first.
func (s *Store) LatestNames(ctx context.Context, n int) (latest []p2p.NewName, err error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	cut := func() {
		slices.SortFunc(latest, func(a, b p2p.NewName) int { return b.Updated.Compare(a.Updated) })
		latest = latest[:min(len(latest), n)]
	}
	for last := []byte{}; last != nil; cut() {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		err := s.view(func(tx *bbolt.Tx) error {
			c := tx.Bucket(bucketNames).Cursor()
			k := after(c, last)
			for last = nil; k != nil && last == nil; k, _ = c.Next() {
				record, _, err := get[nameRecord](tx, bucketNames, k)
				if err != nil {
					return err
				}
				latest = append(latest, p2p.NewName{Tag: firstPart(k), Name: lastPart(k), Digest: record.Digest,
					Updated: record.Updated, After: record.After, KeepOld: !record.LetGo})
				if len(latest) >= n+listBatch {
					last = bytes.Clone(k)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return latest, nil
}
