package memory

import (
	"context"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// List implements [p2p.Engine]. It lists what there is when it begins.
func (s *Store) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) {
		entries, err := s.entries(ctx, q)
		for _, e := range entries {
			if err = context.Cause(ctx); err != nil {
				break
			}
			if !yield(e, nil) {
				return
			}
		}
		if err != nil {
			yield(p2p.Entry{}, err)
		}
	}
}

func (s *Store) entries(ctx context.Context, q p2p.Query) (entries []p2p.Entry, err error) {
	if err := q.Validate(); err != nil {
		return nil, err
	}
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	if q.Kind == p2p.KindPartials {
		return nil, nil
	}
	for _, name := range slices.Sorted(maps.Keys(s.tags)) {
		t := s.tags[name]
		switch {
		case q.Tag != nil && name != *q.Tag:
		case q.Kind != p2p.KindTags:
			entries = append(entries, s.entriesOf(name, q)...)
		case (q.After == "" || name > q.After) && (q.Has == "" || t.tasks[q.Has] != nil):
			entries = append(entries, p2p.Entry{Info: p2p.Info{Task: p2p.Task{Tag: name}}})
		}
	}
	return entries, nil
}

// entriesOf returns the names and tasks of one tag.
func (s *Store) entriesOf(tagName string, q p2p.Query) (entries []p2p.Entry) {
	t := s.tags[tagName]
	total := func(d digest.Digest) (bytes int64, used time.Time) {
		seen := map[digest.Digest]bool{}
		t.walk(d, seen)
		for d := range seen {
			bytes += t.tasks[d].blob.table.Size
			if u := t.tasks[d].blob.used; u.After(used) {
				used = u
			}
		}
		return bytes, used
	}
	if q.RefersTo == "" {
		for _, id := range slices.Sorted(maps.Keys(t.names)) {
			if q.Kind == p2p.KindNames && q.After != "" && id <= q.After {
				continue
			}
			e := p2p.Entry{Info: s.info(tagName, t.names[id].digest), Name: id}
			if q.Kind == p2p.KindAll {
				e.Total, e.LastUsed = total(e.Task.Digest)
			}
			entries = append(entries, e)
		}
	}
	if q.Kind == p2p.KindNames {
		return entries
	}
	for _, d := range slices.Sorted(maps.Keys(t.tasks)) {
		m := t.tasks[d].manifest
		if q.RefersTo != "" && (m == nil || m.Subject != q.RefersTo && !slices.Contains(m.Refs, q.RefersTo)) {
			continue
		}
		e := p2p.Entry{Info: s.info(tagName, d)}
		if q.RefersTo == "" {
			e.Total, _ = total(d)
		}
		entries = append(entries, e)
	}
	return entries
}

// walk collects a task and all that it refers to and that is here.
func (t *tag) walk(d digest.Digest, seen map[digest.Digest]bool) {
	k := t.tasks[d]
	if k == nil || seen[d] {
		return
	}
	seen[d] = true
	if k.manifest != nil {
		for _, ref := range k.manifest.Refs {
			t.walk(ref, seen)
		}
	}
}
