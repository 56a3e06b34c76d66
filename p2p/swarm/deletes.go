package swarm

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// A delete is told to every peer that is connected or has announced what is
// deleted; each tells those that it is connected with, and remembers it. Peers
// that meet again compare what they remember, so that who was away learns of it.

const (
	// deleteTimeout is how long a peer may take to do a delete.
	deleteTimeout = 10 * time.Second
	// awayFor is how long a peer that has gone is named among those that a
	// delete has not reached.
	awayFor = 24 * time.Hour
	// maxTelling is how many peers are told something at once.
	maxTelling = 16
)

// Delete implements [p2p.Engine].
func (s *Swarm) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if err := s.begin(ctx); err != nil {
		return p2p.Deleted{}, err
	}
	defer s.calls.Done()
	if cid.Digest() != "" && !opts.Force {
		if err := s.checkReferred(ctx, p2p.Task{Tag: tag, Digest: cid.Digest()}); err != nil {
			return p2p.Deleted{}, err
		}
	}
	result, deletes, err := s.store.DeleteForAll(ctx, tag, cid, opts)
	if err != nil {
		return p2p.Deleted{}, err
	}
	s.forget(deletes)
	found := s.tellOthers(ctx, deletes, &result.Deleted)
	if !found && !result.Found {
		err := fmt.Errorf("%s: %w here or on %d peers", p2p.Describe(tag, cid), p2p.ErrNotFound, result.Reached)
		return result.Deleted, cmp.Or(context.Cause(ctx), err)
	}
	return result.Deleted, nil
}

// checkReferred refuses what another task refers to on some peer, before it is
// deleted on others.
func (s *Swarm) checkReferred(ctx context.Context, task p2p.Task) error {
	if err := task.Validate(); err != nil {
		return err
	}
	lookupCtx, cancel := s.within(ctx)
	defer cancel()
	l := s.lookup(lookupCtx, &findRequest{Tasks: []taskRef{taskRef(task)}}, taskKey(task), true)
	defer l.end()
	for a := range l.answers {
		if state := a.reply.Tasks[0]; state != nil && state.Referred {
			return fmt.Errorf("%s: %w: by other content on peer %s (%s): delete that first, or force it", task, p2p.ErrReferenced, a.peer, s.peers.get(a.peer).lastAddress())
		}
	}
	return context.Cause(ctx)
}

// forget ends what is under way with what has been deleted here.
func (s *Swarm) forget(deletes []pieces.Delete) {
	var keys []Key
	for _, d := range deletes {
		if name := d.CID.CacheID(); name != "" {
			keys = append(keys, nameKey(d.Tag, name))
			continue
		}
		task := p2p.Task{Tag: d.Tag, Digest: d.CID.Digest()}
		if held, err := s.store.Stat(s.ctx, task.Tag, d.CID, p2p.StatOptions{Scope: p2p.Local}); err == nil && held.Origin.After(d.At) {
			continue // it has come back since
		}
		keys = append(keys, taskKey(task))
		if down := s.downloadOf(task); down != nil && !d.Soft {
			down.deleted(task, d.At)
		}
	}
	s.network.Withdraw(keys...)
}

// deleted ends a download of what has been deleted meanwhile.
func (d *download) deleted(task p2p.Task, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if info := d.tasks[task]; !info.Origin.IsZero() && !info.Origin.After(at) && len(d.tasks) == 1 && !d.proven {
		d.cancel(fmt.Errorf("%s: %w: it has been deleted", task, p2p.ErrNotFound))
	}
}

// tellOthers tells peers of deletes, and notes in result what they did. It
// reports whether one of them had what the first is about.
func (s *Swarm) tellOthers(ctx context.Context, deletes []pieces.Delete, result *p2p.Deleted) (found bool) {
	first := deletes[0]
	targets := map[peer.ID]peer.AddrInfo{}
	for _, p := range s.network.Connected() {
		targets[p] = peer.AddrInfo{ID: p}
	}
	if len(targets) > 0 {
		key := nameKey(first.Tag, first.CID.CacheID())
		if first.CID.CacheID() == "" {
			key = taskKey(p2p.Task{Tag: first.Tag, Digest: first.CID.Digest()})
		}
		lookupCtx, cancel := s.within(ctx)
		for p := range s.network.Providers(lookupCtx, key) {
			if _, known := targets[p.ID]; !known {
				targets[p.ID] = p
			}
		}
		cancel()
	}
	for _, p := range s.peers.known() {
		_, known := targets[p]
		if e := s.peers.get(p); !known && p != s.network.Self() && e.seenSince(awayFor) {
			targets[p] = s.network.Addresses(p)
		}
	}
	var mu sync.Mutex
	var telling sync.WaitGroup
	slots := make(chan struct{}, maxTelling)
	for _, p := range targets {
		slots <- struct{}{}
		telling.Go(func() {
			defer func() { <-slots }()
			results, err := s.tellNow(ctx, p, deletes)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && results[0].Refused != "" {
				err = errors.New(results[0].Refused)
			}
			if err != nil {
				result.Missed = append(result.Missed, p2p.Missed{Peer: p.ID.String(), Address: s.peers.get(p.ID).lastAddress(), Reason: err.Error()})
				return
			}
			result.Reached++
			found = found || results[0].Found
			removed := 0
			for _, r := range results {
				removed += r.Removed
			}
			if removed > 0 {
				result.Removed++
			}
		})
	}
	telling.Wait()
	slices.SortFunc(result.Missed, func(a, b p2p.Missed) int { return cmp.Compare(a.Peer, b.Peer) })
	return found
}

// tellNow tells one peer of deletes. The results are as many.
func (s *Swarm) tellNow(ctx context.Context, p peer.AddrInfo, deletes []pieces.Delete) ([]deleteResult, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, deleteTimeout, errStalled)
	defer cancel()
	if len(p.Addrs) > 0 {
		if err := s.network.Connect(ctx, p); err != nil {
			return nil, fmt.Errorf("it is away: %w", err)
		}
	}
	var all []deleteResult
	for part := range slices.Chunk(deletes, maxDeletes) {
		var req deletesRequest
		for _, d := range part {
			req.Deletes = append(req.Deletes, deleteMessageOf(d))
		}
		var result deletesResult
		if err := s.client.call(ctx, s.client.streams, p.ID, http.MethodPost, pathDeletes, &req, &result); err != nil {
			return nil, err
		}
		if len(result.Results) != len(part) {
			return nil, fmt.Errorf("%w: an answer to something else", errMessage)
		}
		all = append(all, result.Results...)
	}
	return all, nil
}

// toldDelete is a delete that is to be told to a peer, or to all but that.
type toldDelete struct {
	delete pieces.Delete
	to     peer.ID
	not    peer.ID
}

// tell tells a peer of a delete, soon.
func (s *Swarm) tell(to peer.ID, d pieces.Delete) { s.enqueue(toldDelete{delete: d, to: to}) }

// enqueue drops what there is no room for: peers compare what they remember
// whenever they meet.
func (s *Swarm) enqueue(t toldDelete) {
	select {
	case s.told <- t:
	default:
	}
}

// tellAll passes on what peers are to be told.
func (s *Swarm) tellAll() {
	slots := make(chan struct{}, maxTelling)
	var telling sync.WaitGroup
	defer telling.Wait()
	for {
		var t toldDelete
		select {
		case t = <-s.told:
		case <-s.ctx.Done():
			return
		}
		targets := []peer.ID{t.to}
		if t.to == "" {
			targets = s.network.Connected()
		}
		for _, p := range targets {
			if p == t.not {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-s.ctx.Done():
				return
			}
			telling.Go(func() {
				defer func() { <-slots }()
				if _, err := s.tellNow(s.ctx, peer.AddrInfo{ID: p}, []pieces.Delete{t.delete}); err != nil {
					s.log.Debug("a peer could not be told of a delete", "peer", p.String(), "error", err)
				}
			})
		}
	}
}

// applyDelete does what a peer tells of, and passes it on where it is news.
func (s *Swarm) applyDelete(ctx context.Context, d pieces.Delete, from peer.ID) (pieces.DeleteResult, error) {
	result, err := s.applied.do(d, func() (pieces.DeleteResult, error) { return s.store.ApplyDelete(ctx, d) })
	if err != nil {
		s.log.Warn("a delete by a peer was not done", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(), "error", err)
		return result, err
	}
	if !result.News {
		return result, nil
	}
	s.forget([]pieces.Delete{d})
	s.enqueue(toldDelete{delete: d, not: from})
	if result.Tasks > 0 || result.Found {
		s.log.Info("deleted by a peer", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(), "tasks", result.Tasks, "freed", result.Freed)
	}
	return result, nil
}

// applied remembers what the last deletes have done here. A delete comes from whoever
// makes it, and may have come from another peer just before: whoever makes it is to
// learn what it did.
type applied struct {
	mu      sync.Mutex
	results map[pieces.Delete]pieces.DeleteResult
}

const maxApplied = 1024

func (a *applied) do(d pieces.Delete, apply func() (pieces.DeleteResult, error)) (pieces.DeleteResult, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	result, err := apply()
	if err != nil {
		return result, err
	}
	d.At = d.At.UTC().Round(0) // so that the same times are equal
	if !result.News {
		if before, ok := a.results[d]; ok {
			before.News = false
			return before, nil
		}
		return result, nil
	}
	if len(a.results) >= maxApplied {
		clear(a.results)
	}
	a.results[d] = result
	return result, nil
}

// syncDeletes learns of the deletes that a peer knows of, when it has been met.
func (s *Swarm) syncDeletes(p peer.ID) {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	err := s.learnDeletes(ctx, p)
	if err != nil && s.ctx.Err() == nil {
		s.log.Debug("could not ask a peer what was deleted", "peer", p.String(), "error", err)
	}
}

func (s *Swarm) learnDeletes(ctx context.Context, p peer.ID) error {
	sum, err := s.store.DeletesSum(ctx)
	if err != nil {
		return err
	}
	for after := uint64(0); ; {
		query := url.Values{"after": {strconv.FormatUint(after, 10)}, "sum": {hex.EncodeToString(sum[:])}}
		var reply deletesReply
		if err := s.client.callQuery(ctx, s.client.streams, p, http.MethodGet, pathDeletes, query, nil, &reply); err != nil {
			return err
		}
		if len(reply.Deletes) > maxDeletes {
			return fmt.Errorf("%w: more than %d deletes", errMessage, maxDeletes)
		}
		for _, m := range reply.Deletes {
			d, err := m.parse()
			if err != nil {
				return err
			}
			if time.Since(d.At) > s.opts.RememberDeletes {
				continue // it was forgotten here
			}
			if _, err := s.applyDelete(ctx, d, p); err != nil && !errors.Is(err, p2p.ErrReferenced) {
				return err
			}
		}
		if reply.Same || reply.Next <= after {
			return nil
		}
		after = reply.Next
	}
}
