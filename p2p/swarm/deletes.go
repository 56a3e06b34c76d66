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
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// A delete is told to every peer that is connected or has announced what is
// deleted; each tells those that it is connected with, and remembers it. Peers
// that meet again compare what they remember, so that one that was away learns of it.

const (
	// deleteTimeout is how long a peer may take to do a delete.
	deleteTimeout = 10 * time.Second
	// awayFor is how long a peer that has gone is named among those that a
	// delete has not reached.
	awayFor = 24 * time.Hour
	// maxTelling is how many peers are told something at once.
	maxTelling = 64
	// tellTimeout is how long a delete waits for peers in all.
	tellTimeout = 2 * deleteTimeout
)

// Forget implements [front.Source].
func (s *Swarm) Forget(ctx context.Context, d front.Deletion) []front.Told {
	if len(d.Deletes) == 0 {
		return nil
	}
	s.forget(d.Deletes)
	return s.tellOthers(ctx, d.Deletes)
}

// See implements [front.Source]: it asks peers what they have of what is to be deleted. It
// refuses what another task refers to on some peer, before it is deleted on others, unless that
// is forced.
func (s *Swarm) See(
	ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions, _ bool,
) (seen front.Seen, err error) {
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	req, key := &findRequest{Tasks: []taskRef{taskRef(task)}}, taskKey(task)
	if name := cid.CacheID(); name != "" {
		req, key = &findRequest{Names: []nameRef{{tag, name}}}, nameKey(tag, name)
	}
	lookupCtx, cancel := s.questions.within(ctx)
	defer cancel()
	l := s.questions.lookup(lookupCtx, req, key, true)
	defer l.end()
	for a := range l.answers {
		seen.Answered++
		if cid.CacheID() != "" {
			if n := a.reply.Names[0]; n != nil && n.Digest != "" {
				seen.Versions = append(seen.Versions, n.version())
			}
			continue
		}
		state := a.reply.Tasks[0]
		if state == nil {
			continue
		}
		if state.Referred && !opts.Force {
			return seen, fmt.Errorf("%s: %w: by other content on peer %s (%s): delete that first, or force it", task,
				p2p.ErrReferenced, a.peer, s.peers.get(a.peer).lastAddress())
		}
		seen.Versions = append(seen.Versions, pieces.Version{At: state.Origin, After: state.After})
	}
	_, seen.Silent = l.end()
	return seen, context.Cause(ctx)
}

// forget ends what is under way with what has been deleted here.
func (s *Swarm) forget(deletes []pieces.Delete) {
	for _, d := range deletes {
		if d.CID.CacheID() != "" {
			s.releaseLost(d.Tag)
			continue
		}
		task := p2p.Task{Tag: d.Tag, Digest: d.CID.Digest()}
		if held, err := s.store.Stat(s.ctx, task.Tag, d.CID, p2p.StatOptions{Scope: p2p.Local}); err == nil &&
			!s.store.Covers(d, held.Origin) {
			continue // it has come back since
		}
		if down := s.downloadOf(task); down != nil && !d.Soft {
			down.deleted(task, d)
		}
		if err := s.store.ReleasePartial(task); err != nil {
			s.log.Warn("what has arrived of a deleted blob could not be removed", "task", task.String(), "error", err)
		}
	}
}

// releaseLost removes what has arrived under a tag of which a name was deleted, where nobody
// fetches it and no peer has it any more: what it led to is not known here.
func (s *Swarm) releaseLost(tag string) {
	left := func() (all []p2p.Task) {
		for _, a := range s.store.Arriving() {
			if !a.Open && a.Task.Tag == tag {
				all = append(all, a.Task)
			}
		}
		return all
	}
	if len(left()) == 0 || s.begin(s.ctx) != nil {
		return
	}
	defer s.calls.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.releasing[tag] {
		return
	}
	s.releasing[tag] = true
	s.background.Go(func() {
		select {
		case <-time.After(lostAfter):
		case <-s.ctx.Done():
			return
		}
		s.mu.Lock()
		delete(s.releasing, tag)
		s.mu.Unlock()
		for _, task := range left() {
			if _, _, err := s.statTask(s.ctx, task, p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
				continue
			}
			if err := s.store.ReleasePartial(task); err != nil {
				s.log.Warn("what has arrived of a deleted blob could not be removed", "task", task.String(),
					"error", err)
			}
		}
	})
}

// lostAfter is how long peers have to do a delete before they are asked what is left.
const lostAfter = 2 * time.Second

// deleted ends a download of what has been deleted meanwhile, as far as it was for that.
func (d *download) deleted(task p2p.Task, by pieces.Delete) {
	covers := func(info p2p.Info) bool { return d.s.store.Covers(by, info.Origin) }
	if d.forget(task, covers, fmt.Errorf("%s: %w: it has been deleted", task, p2p.ErrNotFound)) {
		d.s.announcements.ended(task)
	}
}

// tellOthers tells peers of deletes, and returns what they have done. It takes tellTimeout at
// most; a peer that is known to be silent is not waited for, and told when it answers.
func (s *Swarm) tellOthers(ctx context.Context, deletes []pieces.Delete) (all []front.Told) {
	ctx, cancel := context.WithTimeoutCause(ctx, tellTimeout, errNoAnswer)
	defer cancel()
	var mu sync.Mutex
	var telling sync.WaitGroup
	slots := make(chan struct{}, maxTelling)
	asked := map[peer.ID]bool{s.network.Self(): true}
	tell := func(p peer.AddrInfo) {
		if asked[p.ID] {
			return
		}
		asked[p.ID] = true
		telling.Go(func() {
			var results []deleteResult
			var err error
			select {
			case slots <- struct{}{}:
				results, err = s.tellOne(ctx, p, deletes)
				<-slots
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
			one := front.Told{Peer: p.ID.String(), Address: s.peers.get(p.ID).lastAddress()}
			switch {
			case err != nil:
				one.Failed = err.Error()
			case results[0].Refused != "":
				one.Failed = results[0].Refused
			default:
				one.Newer = pieces.Version{At: results[0].Newer, After: results[0].NewerAfter}
				if !one.Newer.At.IsZero() {
					one.Failed = "it has been imported or moved there again, at " + one.Newer.At.Format(time.RFC3339)
				}
				one.Found = results[0].Found
				one.Removed = slices.ContainsFunc(results, func(r deleteResult) bool { return r.Removed > 0 })
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, one)
		})
	}
	connected := s.network.Connected()
	for _, p := range connected {
		tell(peer.AddrInfo{ID: p})
	}
	if len(connected) > 0 {
		first := deletes[0]
		key := nameKey(first.Tag, first.CID.CacheID())
		if first.CID.CacheID() == "" {
			key = taskKey(p2p.Task{Tag: first.Tag, Digest: first.CID.Digest()})
		}
		s.questions.eachAnnounced(ctx, key, tell)
	}
	for _, p := range s.peers.known() {
		if s.peers.get(p).seenSince(awayFor) {
			tell(s.network.Addresses(p))
		}
	}
	telling.Wait()
	return all
}

// tellOne tells one peer of deletes, as tellNow does; one that is silent when it answers
// again.
func (s *Swarm) tellOne(ctx context.Context, p peer.AddrInfo, deletes []pieces.Delete) ([]deleteResult, error) {
	var results []deleteResult
	silence := s.peers.get(p.ID).silence()
	err := fmt.Errorf("%w: it has been silent for %s, and is told when it answers", errNoAnswer,
		silence.Round(time.Millisecond))
	if silence == 0 {
		results, err = s.tellNow(ctx, p, deletes)
	}
	if errors.Is(err, errNoAnswer) {
		s.peers.get(p.ID).owe(deletes)
		s.questions.suspect(p.ID, true)
	}
	return results, err
}

// tellNow tells one peer of deletes. The results are as many. It may take deleteTimeout,
// as long as the peer answers other questions in time.
func (s *Swarm) tellNow(ctx context.Context, p peer.AddrInfo, deletes []pieces.Delete) ([]deleteResult, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	half := s.opts.LookupTimeout / 2
	alive := time.AfterFunc(half, func() {
		ctx, stop := context.WithTimeoutCause(ctx, half, errNoAnswer)
		defer stop()
		if _, err := s.client.hello(ctx, p.ID); err != nil {
			cancel(errNoAnswer)
		}
	})
	defer alive.Stop()
	limit := time.AfterFunc(deleteTimeout, func() { cancel(throttle.ErrStalled) })
	defer limit.Stop()
	if len(p.Addrs) > 0 {
		if err := s.network.Connect(ctx, p); err != nil {
			return nil, fmt.Errorf("it is away: %w", cmp.Or(context.Cause(ctx), err))
		}
	}
	var all []deleteResult
	for part := range slices.Chunk(deletes, maxDeletes) {
		var req deletesRequest
		for _, d := range part {
			req.Deletes = append(req.Deletes, deleteMessageOf(d, s.opts.Now()))
		}
		var result deletesResult
		if err := s.client.call(ctx, s.client.streams, p.ID, http.MethodPost, pathDeletes, &req, &result); err != nil {
			return nil, err
		}
		if len(result.Results) != len(part) {
			return nil, fmt.Errorf("%w: an answer to something else", errMessage)
		}
		for _, r := range result.Results {
			if err := checkVersions(pieces.Version{At: r.Newer, After: r.NewerAfter}); err != nil {
				return nil, err
			}
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

// deletes tells peers of deletes. It is safe for concurrent use.
type deletes struct {
	told chan toldDelete // what is to be told to peers
}

// tell tells a peer of a delete, soon.
func (d *deletes) tell(to peer.ID, del pieces.Delete) { d.enqueue(toldDelete{delete: del, to: to}) }

// enqueue drops what there is no room for: peers compare what they remember
// whenever they meet.
func (d *deletes) enqueue(t toldDelete) {
	select {
	case d.told <- t:
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
		case t = <-s.deletes.told:
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
				if _, err := s.tellOne(s.ctx, peer.AddrInfo{ID: p}, []pieces.Delete{t.delete}); err != nil {
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
		s.log.Warn("a delete by a peer was not done", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(),
			"error", err)
		return result, err
	}
	if !result.News && !result.Found {
		return result, nil
	}
	s.forget([]pieces.Delete{d})
	if result.News {
		s.deletes.enqueue(toldDelete{delete: d, not: from})
	}
	if result.Tasks > 0 || result.Found {
		s.log.Info("deleted by a peer", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(),
			"tasks", result.Tasks, "freed", result.Freed)
	}
	return result, nil
}

// applied remembers what the last deletes have done here. A delete comes from whoever
// makes it, and may have come from another peer just before: whoever makes it is to
// learn what it did.
type applied struct {
	mu      sync.Mutex
	results map[string]pieces.DeleteResult // by what the delete is
}

const maxApplied = 1024

func (a *applied) do(d pieces.Delete, apply func() (pieces.DeleteResult, error)) (pieces.DeleteResult, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	result, err := apply()
	if err != nil {
		return result, err
	}
	k := fmt.Sprint(d.Tag, " ", d.CID, " ", d.At.UnixNano(), " ", d.After.UnixNano(), d.Force, d.NameOnly, d.Soft)
	if !result.News {
		if before, ok := a.results[k]; ok && !result.Found {
			before.News = false
			return before, nil
		}
		return result, nil
	}
	if len(a.results) >= maxApplied {
		clear(a.results)
	}
	a.results[k] = result
	return result, nil
}

// greet asks a peer that has been met who it is, what was deleted, and for names that
// were moved here.
func (s *Swarm) greet(p peer.ID) {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	err := s.meet(ctx, p)
	if err == nil && s.peers.get(p).misunderstood() == "" {
		err = s.learnDeletes(ctx, p)
		if err == nil {
			err = s.compareNames(ctx, p)
		}
	}
	if err != nil && s.ctx.Err() == nil {
		s.log.Debug("could not ask a peer what was deleted and moved", "peer", p.String(), "error", err)
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
		if err := s.client.callQuery(ctx, s.client.streams, p, http.MethodGet, pathDeletes, query, nil,
			&reply); err != nil {
			return err
		}
		if len(reply.Deletes) > maxDeletes {
			return fmt.Errorf("%w: more than %d deletes", errMessage, maxDeletes)
		}
		for _, m := range reply.Deletes {
			d, err := m.parse(s.opts.Now())
			if err != nil {
				s.log.Debug("a peer told of a delete that is none", "peer", p.String(), "error", err)
				continue
			}
			if s.opts.Now().Sub(d.Made) > s.opts.RememberDeletes {
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
