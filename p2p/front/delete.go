package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// maxSeeing bounds of how many cids at once it is asked what there is to be deleted.
const maxSeeing = 16

// Delete implements [p2p.Engine]. It covers what this host and the peers of the sources have
// when it is called, as they say, and what is older than that.
//
//nolint:cyclop // the steps of one delete, in their order
func (e *Engine) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := e.Begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer e.End()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Deleted{}, err
	}
	if opts.Unpin && cid.Digest() != "" {
		if done, err := e.store.Unpin(ctx, p2p.Task{Tag: tag, Digest: cid.Digest()}); done || err != nil {
			return p2p.Deleted{}, err
		}
	}
	seen, err := e.see(ctx, tag, cid, opts)
	if err != nil {
		return p2p.Deleted{}, err
	}
	var all p2p.Deleted
	told := map[string][]Told{} // by peer
	// A peer that was not asked, or has imported it since, says so, and is told once more.
	for again := true; again; {
		d, deleted, err := e.deleteHere(ctx, tag, cid, opts, seen)
		if err != nil {
			return p2p.Deleted{}, err
		}
		opts.Expect = nil // it was so, and is not any more
		all.Tasks, all.Freed = all.Tasks+deleted.Tasks, all.Freed+deleted.Freed
		if len(seen.found) == 0 && len(d.Deletes) == 0 && !opts.All {
			break
		}
		first := len(told) == 0
		again = e.tell(ctx, d, seen, told) && first
	}
	for _, one := range slices.Concat(slices.Collect(maps.Values(told))...) {
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
	for _, c := range opts.CIDs(cid) {
		if !seen.found[c] {
			all.NotFound = append(all.NotFound, c)
		}
	}
	if !opts.All && len(seen.found) == 0 {
		return all, cmp.Or(context.Cause(ctx), seen.err,
			e.nothing(tag, all.NotFound, max(seen.answered, all.Reached), seen.silent))
	}
	return all, nil
}

// tell tells the sources of a delete, and notes in told what that has come to, and in seen what
// peers have had of it. It reports whether one of them has something that the delete does not cover.
func (e *Engine) tell(ctx context.Context, d Deletion, seen *sight, told map[string][]Told) (newer bool) {
	now := map[string][]Told{}
	for _, s := range e.sources {
		for _, one := range s.Forget(ctx, d) {
			for c, version := range one.Newer {
				newer = true
				seen.versions[c] = append(seen.versions[c], version)
			}
			for c := range one.Found {
				seen.found[c] = true
			}
			for _, before := range told[one.Peer] {
				one.Removed = one.Removed || before.Removed
			}
			now[one.Peer] = append(now[one.Peer], one)
		}
	}
	maps.Copy(told, now)
	return newer
}

// nothing is the error of a delete of what is nowhere.
func (e *Engine) nothing(tag string, cids []digest.CID, answered, silent int) error {
	what := p2p.Describe(tag, cids[0])
	if n := len(cids) - 1; n > 0 {
		what += fmt.Sprintf(", and %d more", n)
	}
	if e.names() == nil { // there are no peers to speak of
		return fmt.Errorf("%s: %w", what, p2p.ErrNotFound)
	}
	err := fmt.Errorf("%s: %w here or on %d peers", what, p2p.ErrNotFound, answered)
	if silent > 0 {
		err = fmt.Errorf("%w; %d more did not answer", err, silent)
	}
	return err
}

// sight is what there is to be deleted, here and at the sources.
type sight struct {
	found    map[digest.CID]bool
	versions map[digest.CID][]pieces.Version // of what peers have
	answered int                             // peers, of one cid
	silent   int
	err      error // why a source can't say
}

// see asks the sources what there is to be deleted. All that is under a tag is for each of them to
// know.
func (e *Engine) see(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (*sight, error) {
	all := &sight{found: map[digest.CID]bool{}, versions: map[digest.CID][]pieces.Version{}}
	var mu sync.Mutex
	asking, ctx := errgroup.WithContext(ctx)
	asking.SetLimit(maxSeeing)
	for _, c := range opts.CIDs(cid) {
		asking.Go(func() error {
			_, err := e.store.Stat(ctx, tag, c, p2p.StatOptions{Scope: p2p.Local})
			if err != nil && !isMissing(err) {
				return err
			}
			held := !errors.Is(err, p2p.ErrNotFound)
			for _, s := range e.sources {
				seen, err := s.See(ctx, tag, c, opts, held)
				if errors.Is(err, p2p.ErrReferenced) && held && len(opts.Also) > 0 {
					err = nil // by another one of these, maybe: the peer says when it is told
				}
				if err != nil {
					return err
				}
				mu.Lock()
				if held || seen.Found || len(seen.Versions) > 0 {
					all.found[c] = true
				}
				all.versions[c] = append(all.versions[c], seen.Versions...)
				all.answered, all.silent = max(all.answered, seen.Answered), max(all.silent, seen.Silent)
				all.err = cmp.Or(all.err, seen.Err)
				mu.Unlock()
			}
			return nil
		})
	}
	return all, asking.Wait()
}

// deleteHere deletes what the store has, and notes in seen what it had. With a source that knows
// names it is remembered, for peers that are away.
func (e *Engine) deleteHere(
	ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions, seen *sight,
) (d Deletion, deleted p2p.Deleted, err error) {
	var result pieces.DeleteResult
	if e.names() != nil {
		result, d.Deletes, err = e.store.DeleteForAll(ctx, tag, cid, opts, seen.versions)
	} else {
		result, err = e.store.DeleteTasks(ctx, tag, cid, opts)
	}
	if err != nil {
		return d, deleted, err
	}
	d.Tag, d.Held, d.Tasks = tag, result.Found, result.Gone
	missing := map[digest.CID]bool{}
	for _, c := range result.NotFound {
		if missing[c] = true; c.Digest() != "" {
			d.Tasks = append(d.Tasks, p2p.Task{Tag: tag, Digest: c.Digest()})
		}
	}
	for _, c := range opts.CIDs(cid) {
		if !missing[c] {
			seen.found[c] = true
		}
	}
	return d, result.Deleted, nil
}
