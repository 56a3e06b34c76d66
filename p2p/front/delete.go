package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Delete implements [p2p.Engine]. It covers what this host and the peers of the sources have
// when it is called, as they say, and what is older than that.
//
//nolint:cyclop // what each source says counts for one result
func (e *Engine) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := e.Begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer e.End()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Deleted{}, err
	}
	seen, err := e.see(ctx, tag, cid, opts)
	if err != nil {
		return p2p.Deleted{}, err
	}
	var all p2p.Deleted
	told := map[string][]Told{} // by peer
	found := seen.Found
	// A peer that was not asked, or has imported it since, says so, and is told once more.
	for range 2 {
		d := Deletion{Tag: tag, CID: cid}
		deleted, err := e.deleteHere(ctx, opts, seen.Versions, &d)
		if err != nil {
			return p2p.Deleted{}, err
		}
		all.Tasks, all.Freed, found = all.Tasks+deleted.Tasks, all.Freed+deleted.Freed, found || d.Held
		if !d.Held && !seen.Found && len(d.Deletes) == 0 {
			break
		}
		var newer []pieces.Version
		now := map[string][]Told{}
		for _, s := range e.sources {
			for _, one := range s.Forget(ctx, d) {
				if !one.Newer.At.IsZero() {
					newer = append(newer, one.Newer)
				}
				for _, before := range told[one.Peer] {
					one.Found, one.Removed = one.Found || before.Found, one.Removed || before.Removed
				}
				now[one.Peer] = append(now[one.Peer], one)
			}
		}
		maps.Copy(told, now)
		if len(newer) == 0 {
			break
		}
		seen.Versions = append(seen.Versions, newer...)
	}
	for _, one := range slices.Concat(slices.Collect(maps.Values(told))...) {
		found = found || one.Found
		if one.Removed {
			all.Removed++
		}
		if one.Failed != "" {
			all.Missed = append(all.Missed, p2p.Missed{Peer: one.Peer, Address: one.Address, Reason: one.Failed})
		} else {
			all.Reached++
		}
	}
	slices.SortFunc(all.Missed, func(a, b p2p.Missed) int { return cmp.Compare(a.Peer, b.Peer) })
	if !found {
		return all, cmp.Or(context.Cause(ctx), seen.Err,
			e.nothing(tag, cid, max(seen.Answered, all.Reached), seen.Silent))
	}
	return all, nil
}

// nothing is the error of a delete of what is nowhere.
func (e *Engine) nothing(tag string, cid digest.CID, answered, silent int) error {
	if e.names() == nil { // there are no peers to speak of
		return fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
	}
	err := fmt.Errorf("%s: %w here or on %d peers", p2p.Describe(tag, cid), p2p.ErrNotFound, answered)
	if silent > 0 {
		err = fmt.Errorf("%w; %d more did not answer", err, silent)
	}
	return err
}

// see asks the sources what there is to be deleted.
func (e *Engine) see(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (all Seen, err error) {
	_, err = e.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local})
	if err != nil && !isMissing(err) {
		return all, err
	}
	held := !errors.Is(err, p2p.ErrNotFound)
	for _, s := range e.sources {
		seen, err := s.See(ctx, tag, cid, opts, held)
		if err != nil {
			return all, err
		}
		all.Found = all.Found || seen.Found
		all.Versions = append(all.Versions, seen.Versions...)
		all.Answered += seen.Answered
		all.Silent += seen.Silent
		all.Err = cmp.Or(all.Err, seen.Err)
	}
	return all, nil
}

// deleteHere deletes what the store has. With a source that knows names it is remembered, for
// peers that are away.
func (e *Engine) deleteHere(
	ctx context.Context, opts p2p.DeleteOptions, seen []pieces.Version, d *Deletion,
) (p2p.Deleted, error) {
	if e.names() != nil {
		result, deletes, err := e.store.DeleteForAll(ctx, d.Tag, d.CID, opts, seen...)
		d.Held, d.Deletes = result.Found, deletes
		for _, one := range deletes {
			if one.CID.CacheID() == "" {
				d.Tasks = append(d.Tasks, p2p.Task{Tag: one.Tag, Digest: one.CID.Digest()})
			}
		}
		return result.Deleted, err
	}
	deleted, tasks, err := e.store.DeleteTasks(ctx, d.Tag, d.CID, opts)
	d.Held, d.Tasks = err == nil, tasks
	if errors.Is(err, p2p.ErrNotFound) {
		err = nil
		if d.CID.Digest() != "" {
			d.Tasks = []p2p.Task{{Tag: d.Tag, Digest: d.CID.Digest()}}
		}
	}
	return deleted, err
}
