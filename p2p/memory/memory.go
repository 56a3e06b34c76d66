// Package memory is an engine that keeps blobs in memory, for tests and as the
// example of an engine: all of the contract of [p2p.Engine], in the simplest way
// that keeps it. One lock guards everything. It has no peers, and what it holds
// ends with it.
//
// It promises no compatibility.
package memory

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Options of a store. Its zero value has the defaults.
type Options struct {
	// Lease is how long what a client was told is here is kept for what refers
	// to it: an hour.
	Lease time.Duration
}

// Store is an engine in memory. It is safe for concurrent use.
type Store struct {
	lease time.Duration

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	calls  sync.WaitGroup // under way; begun under mu, and not when closed

	mu     sync.Mutex
	closed bool
	blobs  map[digest.Digest]*blob
	tags   map[string]*tag
}

var _ p2p.Engine = (*Store)(nil)

// tag is a namespace, with what is held under it.
type tag struct {
	tasks map[digest.Digest]*task
	names map[string]name
	lost  map[digest.Digest]bool // parts of manifests that are known to be missing
}

type blob struct {
	table *digest.Table
	data  []byte
	used  time.Time
}

// task is a blob under a tag.
type task struct {
	blob      *blob
	mediaType string
	pinned    bool
	loose     bool // kept until something holds it
	manifest  *p2p.NewManifest
	origin    time.Time
	after     time.Time
	imported  time.Time
	leases    []time.Time // when each ends
}

type name struct {
	digest    digest.Digest
	updated   time.Time
	described []byte
}

// New returns an empty store.
func New(opts Options) *Store {
	s := &Store{lease: opts.Lease, blobs: map[digest.Digest]*blob{}, tags: map[string]*tag{}}
	if s.lease == 0 {
		s.lease = time.Hour
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// begin announces a call, and takes the lock; end lets go of both. Where it fails, it has neither.
func (s *Store) begin(ctx context.Context) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	return nil
}

// enter announces a call.
func (s *Store) enter(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("store in memory: %w", p2p.ErrClosed)
	}
	s.calls.Add(1)
	return nil
}

func (s *Store) end() {
	s.mu.Unlock()
	s.calls.Done()
}

// Close implements [p2p.Engine]. Blobs that are open can still be read.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(fmt.Errorf("store in memory: %w", p2p.ErrClosed))
	s.calls.Wait()
	return nil
}

// Hold implements [p2p.Holder]: what is here is held, and there is nothing elsewhere.
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

// Verify implements [p2p.Holder]: memory is not damaged.
func (s *Store) Verify(ctx context.Context, task p2p.Task) error {
	return s.Hold(ctx, task.Tag, digest.FromDigest(task.Digest))
}

// Mend implements [p2p.Holder].
func (s *Store) Mend(ctx context.Context, task p2p.Task) error { return s.Verify(ctx, task) }

// at returns the part of the store under a tag, or an empty one that is not of it.
func (s *Store) at(tagName string) *tag {
	if t := s.tags[tagName]; t != nil {
		return t
	}
	return &tag{tasks: map[digest.Digest]*task{}, names: map[string]name{}, lost: map[digest.Digest]bool{}}
}

// find returns the task that cid names.
func (s *Store) find(tagName string, cid digest.CID) (digest.Digest, *task, error) {
	t, d := s.at(tagName), cid.Digest()
	if d == "" {
		d = t.names[cid.CacheID()].digest
	}
	if t.tasks[d] == nil {
		return "", nil, fmt.Errorf("%s: %w", p2p.Describe(tagName, cid), p2p.ErrNotFound)
	}
	return d, t.tasks[d], nil
}

// Stat implements [p2p.Engine].
func (s *Store) Stat(ctx context.Context, tagName string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer s.end()
	if err := opts.Validate(tagName, cid); err != nil {
		return p2p.Info{}, err
	}
	d, found, err := s.find(tagName, cid)
	if err != nil {
		return p2p.Info{}, err
	}
	if opts.Lease && cid.Digest() != "" && len(found.live()) == 0 {
		found.leases = []time.Time{time.Now().Add(s.lease)}
	}
	info := s.info(tagName, d)
	if id := cid.CacheID(); id != "" {
		info.Description = slices.Clone(s.at(tagName).names[id].described)
	}
	if opts.Manifest && found.manifest != nil {
		info.Manifest = &p2p.Manifest{Content: slices.Clone(found.blob.data)}
		for i, ref := range found.manifest.Refs {
			if i == p2p.MaxRefs || opts.ContentOnly {
				break
			}
			if s.at(tagName).tasks[ref] != nil {
				info.Manifest.Refs = append(info.Manifest.Refs, s.info(tagName, ref))
			}
		}
	}
	return info, nil
}

// info describes a task that is there.
func (s *Store) info(tagName string, d digest.Digest) p2p.Info {
	t := s.at(tagName)
	k := t.tasks[d]
	info := p2p.Info{
		Task: p2p.Task{Tag: tagName, Digest: d}, Size: k.blob.table.Size, PieceLength: k.blob.table.PieceLength,
		Pieces: k.blob.table.Pieces(), Held: k.blob.table.Pieces(),
		MediaType: k.mediaType, IsManifest: k.manifest != nil, Origin: k.origin, After: k.after, Imported: k.imported,
		LastUsed: k.blob.used,
	}
	switch {
	case k.pinned:
		info.Keep = p2p.KeepPinned
	case k.loose:
		info.Keep = p2p.KeepUntilReferred
	}
	t.lacks(d, map[digest.Digest]bool{}, &info.Lacks)
	return info
}

// lacks adds what a manifest, and those that it refers to, are known to be without.
func (t *tag) lacks(d digest.Digest, seen map[digest.Digest]bool, lacks *[]digest.Digest) {
	k := t.tasks[d]
	if k == nil || k.manifest == nil || seen[d] {
		return
	}
	seen[d] = true
	for _, ref := range k.manifest.Refs {
		switch {
		case len(*lacks) == p2p.MaxRefs:
			return
		case t.tasks[ref] != nil:
			t.lacks(ref, seen, lacks)
		case t.lost[ref] && !slices.Contains(*lacks, ref):
			*lacks = append(*lacks, ref)
		}
	}
}

// live returns the leases that have not ended.
func (k *task) live() []time.Time {
	now := time.Now()
	k.leases = slices.DeleteFunc(k.leases, func(end time.Time) bool { return !end.After(now) })
	return k.leases
}

// Open implements [p2p.Engine].
func (s *Store) Open(ctx context.Context, task p2p.Task, _ p2p.Scope) (p2p.Blob, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	if err := task.Validate(); err != nil {
		return nil, err
	}
	_, k, err := s.find(task.Tag, digest.FromDigest(task.Digest))
	if err != nil {
		return nil, err
	}
	k.blob.used = time.Now()
	return newReader(k.blob), nil
}

// referring returns the tasks that refer to d.
func (t *tag) referring(d digest.Digest) (referring []digest.Digest) {
	for h, k := range t.tasks {
		if k.manifest != nil && slices.Contains(k.manifest.Refs, d) {
			referring = append(referring, h)
		}
	}
	slices.Sort(referring)
	return referring
}

// isHeld reports whether a name, another task or its subject keeps a task.
func (t *tag) isHeld(d digest.Digest) bool {
	k := t.tasks[d]
	return len(t.namesOf(d)) > 0 || len(t.referring(d)) > 0 ||
		k.manifest != nil && k.manifest.Subject != "" && t.tasks[k.manifest.Subject] != nil
}

func (t *tag) namesOf(d digest.Digest) (names []string) {
	for id, n := range t.names {
		if n.digest == d {
			names = append(names, id)
		}
	}
	slices.Sort(names)
	return names
}

// Delete implements [p2p.Engine].
func (s *Store) Delete(
	ctx context.Context, tagName string, cid digest.CID, opts p2p.DeleteOptions,
) (p2p.Deleted, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer s.end()
	if err := opts.Validate(tagName, cid); err != nil {
		return p2p.Deleted{}, err
	}
	if opts.Expect != nil {
		if err := s.expect(p2p.Expectation{Tag: tagName, CID: cid, Digest: *opts.Expect}); err != nil {
			return p2p.Deleted{}, err
		}
	}
	t := s.at(tagName)
	var gone p2p.Deleted
	if opts.All {
		clear(t.names)
		for d := range t.tasks {
			if t.tasks[d] != nil {
				s.remove(t, &gone, d)
			}
		}
		s.tidy(tagName)
		return gone, nil
	}
	var left []digest.CID
	for _, c := range opts.CIDs(cid) {
		if _, _, err := s.find(tagName, c); err != nil {
			gone.NotFound = append(gone.NotFound, c)
		} else {
			left = append(left, c)
		}
	}
	if len(left) == 0 {
		return gone, fmt.Errorf("%s: %w", p2p.Describe(tagName, cid), p2p.ErrNotFound)
	}
	before, blobs := t.clone(), maps.Clone(s.blobs)
	for len(left) > 0 {
		var again []digest.CID // what is referred to goes after what refers to it
		var referenced error
		for _, c := range left {
			if err := s.deleteOne(tagName, t, c, opts, &gone); err != nil {
				again, referenced = append(again, c), err
			}
		}
		if len(again) == len(left) {
			s.tags[tagName], s.blobs = before, blobs
			return p2p.Deleted{}, referenced
		}
		left = again
	}
	s.tidy(tagName)
	return gone, nil
}

// deleteOne deletes what cid names, if that is still there. Its error is that another task refers to it.
func (s *Store) deleteOne(
	tagName string, t *tag, cid digest.CID, opts p2p.DeleteOptions, gone *p2p.Deleted,
) error {
	d, _, err := s.find(tagName, cid)
	if err != nil {
		return nil // it went with another one
	}
	if id := cid.CacheID(); id != "" {
		delete(t.names, id)
		if opts.NameOnly {
			s.keepLoose(t, d)
		} else {
			s.letGo(t, gone, d)
		}
		return nil
	}
	referring := t.referring(d)
	if t.tasks[d].manifest != nil {
		referring = slices.DeleteFunc(referring, func(r digest.Digest) bool { return !t.canBeFound(r) })
	}
	if len(referring) > 0 && opts.Unpin {
		t.tasks[d].pinned = false
		return nil
	}
	if len(referring) > 0 && !opts.Force {
		return fmt.Errorf("delete %s: %w by %s (%v)", p2p.Describe(tagName, cid), p2p.ErrReferenced, referring[0],
			t.namesOf(referring[0]))
	}
	for _, id := range t.namesOf(d) {
		delete(t.names, id)
	}
	if len(t.referring(d)) > 0 {
		t.lost[d] = true
	}
	s.remove(t, gone, d)
	return nil
}

// clone returns a copy, for a change that may have to be taken back.
func (t *tag) clone() *tag {
	c := &tag{tasks: map[digest.Digest]*task{}, names: maps.Clone(t.names), lost: maps.Clone(t.lost)}
	for d, k := range t.tasks {
		k := *k
		c.tasks[d] = &k
	}
	return c
}

// canBeFound reports whether a task keeps what it refers to from being deleted where that is a manifest:
// it is pinned, about something, or pushed just now, or a name leads to it or to what refers to it.
func (t *tag) canBeFound(d digest.Digest) bool {
	k := t.tasks[d]
	return k.pinned || len(t.namesOf(d)) > 0 || len(k.live()) > 0 ||
		k.manifest != nil && k.manifest.Subject != "" && t.tasks[k.manifest.Subject] != nil ||
		slices.ContainsFunc(t.referring(d), t.canBeFound)
}

// keepLoose keeps what a name has pointed to, where nothing else holds it.
func (s *Store) keepLoose(t *tag, d digest.Digest) {
	if k := t.tasks[d]; k != nil && !k.pinned && !t.isHeld(d) {
		k.loose = true
	}
}

// letGo removes those of the tasks that nothing keeps any more.
func (s *Store) letGo(t *tag, gone *p2p.Deleted, digests ...digest.Digest) {
	for _, d := range digests {
		k := t.tasks[d]
		switch {
		case k == nil || k.pinned || k.loose || t.isHeld(d):
		case len(k.live()) > 0:
			k.loose = true
		default:
			s.remove(t, gone, d)
		}
	}
}

// remove removes a task, and lets go of what it holds: its parts, and what is about it.
func (s *Store) remove(t *tag, gone *p2p.Deleted, d digest.Digest) {
	k := t.tasks[d]
	delete(t.tasks, d)
	gone.Tasks++
	held := false
	for _, other := range s.tags {
		held = held || other.tasks[d] != nil
	}
	if !held {
		gone.Freed += k.blob.table.Size
		delete(s.blobs, d)
	}
	if k.manifest != nil {
		s.letGo(t, gone, k.manifest.Refs...)
	}
	var about []digest.Digest
	for other, k := range t.tasks {
		if k.manifest != nil && k.manifest.Subject == d {
			about = append(about, other)
		}
	}
	s.letGo(t, gone, about...)
}

// tidy forgets what is of no use any more under a tag.
func (s *Store) tidy(tagName string) {
	t := s.tags[tagName]
	if t == nil {
		return
	}
	maps.DeleteFunc(t.lost, func(d digest.Digest, _ bool) bool { return len(t.referring(d)) == 0 })
	if len(t.tasks) == 0 {
		delete(s.tags, tagName)
	}
}
