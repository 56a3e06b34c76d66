package swarm

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
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
// that meet again compare what they remember, so that one that was away is told of it.

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

// deletes tells peers of deletes, does those that peers tell of, and knows what is not to be had
// from peers any more. It is safe for concurrent use: only applied needs a lock, and has its own.
type deletes struct {
	store     *pieces.Store
	network   Network
	peers     *peerTable
	client    *client
	questions *questions
	forget    func([]pieces.Delete) // ends what is under way with what was deleted
	now       func() time.Time      // of this host's clock
	remember  time.Duration         // how long deletes are remembered
	log       *slog.Logger

	ctx     context.Context // ends with the swarm
	told    chan toldDelete // what is to be told to peers
	applied applied
}

// tellOthers tells peers of deletes, and returns what they have done. It takes tellTimeout at
// most; a peer that is known to be silent is not waited for, and told when it answers.
func (ds *deletes) tellOthers(ctx context.Context, deletes []pieces.Delete) (all []front.Told) {
	ctx, cancel := context.WithTimeoutCause(ctx, tellTimeout, errNoAnswer)
	defer cancel()
	var mu sync.Mutex
	var telling sync.WaitGroup
	slots := make(chan struct{}, maxTelling)
	asked := map[peer.ID]bool{ds.network.Self(): true}
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
				results, err = ds.tellOne(ctx, p, deletes)
				<-slots
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
			one := told{front.Told{Peer: p.ID.String(), Address: ds.peers.get(p.ID).lastAddress(),
				Newer: map[digest.CID]pieces.Version{}, Found: map[digest.CID]bool{}}}
			if err != nil {
				one.Failed = err.Error()
			}
			for i, r := range results {
				one.add(deletes[i], r)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, one.Told)
		})
	}
	connected := ds.network.Connected()
	for _, p := range connected {
		tell(peer.AddrInfo{ID: p})
	}
	// Of all under a tag nobody has announced that it is there: those that are told tell the others.
	if first := deletes[0]; len(connected) > 0 && !first.All {
		key := nameKey(first.Tag, first.CID.CacheID())
		if first.CID.CacheID() == "" {
			key = taskKey(p2p.Task{Tag: first.Tag, Digest: first.CID.Digest()})
		}
		ds.questions.eachAnnounced(ctx, key, tell)
	}
	for _, p := range ds.peers.known() {
		if ds.peers.get(p).seenSince(awayFor) {
			tell(ds.network.Addresses(p))
		}
	}
	telling.Wait()
	return all
}

// told is what a peer has made of deletes.
type told struct{ front.Told }

// add adds what the peer has made of one of them.
func (t *told) add(d pieces.Delete, r deleteResult) {
	t.Removed = t.Removed || r.Found || r.Removed > 0
	switch {
	case d.Soft:
		return // it goes with another one
	case r.Refused != "":
		t.Failed = r.Refused
	case !r.Newer.IsZero():
		t.Failed = "it has been imported or moved there again, at " + r.Newer.Format(time.RFC3339)
		t.Newer[d.CID] = pieces.Version{At: r.Newer, After: r.NewerAfter}
	}
	if r.Found {
		t.Found[d.CID] = true
	}
}

// tellOne tells one peer of deletes, as tellNow does; one that is silent when it answers
// again.
func (ds *deletes) tellOne(ctx context.Context, p peer.AddrInfo, deletes []pieces.Delete) ([]deleteResult, error) {
	var results []deleteResult
	silence := ds.peers.get(p.ID).silence()
	err := fmt.Errorf("%w: it has been silent for %s, and is told when it answers", errNoAnswer,
		silence.Round(time.Millisecond))
	if silence == 0 {
		results, err = ds.tellNow(ctx, p, deletes)
	}
	if errors.Is(err, errNoAnswer) {
		ds.peers.get(p.ID).owe(deletes)
		ds.questions.suspect(p.ID, true)
	}
	return results, err
}

// tellNow tells one peer of deletes. The results are as many. It may take deleteTimeout,
// as long as the peer answers other questions in time.
func (ds *deletes) tellNow(ctx context.Context, p peer.AddrInfo, deletes []pieces.Delete) ([]deleteResult, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	half := ds.questions.timeout / 2
	alive := time.AfterFunc(half, func() {
		ctx, stop := context.WithTimeoutCause(ctx, half, errNoAnswer)
		defer stop()
		if _, err := ds.client.hello(ctx, p.ID); err != nil {
			cancel(errNoAnswer)
		}
	})
	defer alive.Stop()
	limit := time.AfterFunc(deleteTimeout, func() { cancel(throttle.ErrStalled) })
	defer limit.Stop()
	if len(p.Addrs) > 0 {
		if err := ds.network.Connect(ctx, p); err != nil {
			return nil, fmt.Errorf("it is away: %w", cmp.Or(context.Cause(ctx), err))
		}
	}
	var all []deleteResult
	for part := range slices.Chunk(deletes, maxDeletes) {
		var req deletesRequest
		for _, d := range part {
			req.Deletes = append(req.Deletes, deleteMessageOf(d, ds.now()))
		}
		var result deletesResult
		if err := ds.client.call(ctx, ds.client.streams, p.ID, http.MethodPost, pathDeletes, &req,
			&result); err != nil {
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

// tell tells a peer of a delete, soon.
func (ds *deletes) tell(to peer.ID, d pieces.Delete) { ds.enqueue(toldDelete{delete: d, to: to}) }

// enqueue drops what there is no room for: peers compare what they remember
// whenever they meet.
func (ds *deletes) enqueue(t toldDelete) {
	select {
	case ds.told <- t:
	default:
	}
}

// tellAll passes on what peers are to be told.
func (ds *deletes) tellAll() {
	slots := make(chan struct{}, maxTelling)
	var telling sync.WaitGroup
	defer telling.Wait()
	for {
		var t toldDelete
		select {
		case t = <-ds.told:
		case <-ds.ctx.Done():
			return
		}
		targets := []peer.ID{t.to}
		if t.to == "" {
			targets = ds.network.Connected()
		}
		for _, p := range targets {
			if p == t.not {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ds.ctx.Done():
				return
			}
			telling.Go(func() {
				defer func() { <-slots }()
				if _, err := ds.tellOne(ds.ctx, peer.AddrInfo{ID: p}, []pieces.Delete{t.delete}); err != nil {
					ds.log.Debug("a peer could not be told of a delete", "peer", p.String(), "error", err)
				}
			})
		}
	}
}

// apply does what a peer tells of, and passes it on where it is news.
func (ds *deletes) apply(ctx context.Context, d pieces.Delete, from peer.ID) (pieces.DeleteResult, error) {
	result, err := ds.applied.do(d, func() (pieces.DeleteResult, error) { return ds.store.ApplyDelete(ctx, d) })
	if err != nil {
		ds.log.Warn("a delete by a peer was not done", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(),
			"error", err)
		return result, err
	}
	if !result.News && !result.Found {
		return result, nil
	}
	ds.forget([]pieces.Delete{d})
	if result.News {
		ds.enqueue(toldDelete{delete: d, not: from})
	}
	if result.Tasks > 0 || result.Found {
		ds.log.Info("deleted by a peer", "what", p2p.Describe(d.Tag, d.CID), "peer", from.String(),
			"tasks", result.Tasks, "freed", result.Freed)
	}
	return result, nil
}

// applied remembers what the last deletes have done here. A delete comes from the
// host that makes it, and may have come from another peer just before: the one that makes it
// is to be told what it did.
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

// compare does the deletes that a peer remembers, where it does not remember the same as this daemon.
func (ds *deletes) compare(ctx context.Context, p peer.ID) error {
	sum, err := ds.store.DeletesSum(ctx)
	if err != nil {
		return err
	}
	for after := uint64(0); ; {
		query := url.Values{"after": {strconv.FormatUint(after, 10)}, "sum": {hex.EncodeToString(sum[:])}}
		var reply deletesReply
		if err := ds.client.callQuery(ctx, ds.client.streams, p, http.MethodGet, pathDeletes, query, nil,
			&reply); err != nil {
			return err
		}
		if len(reply.Deletes) > maxDeletes {
			return fmt.Errorf("%w: more than %d deletes", errMessage, maxDeletes)
		}
		for _, m := range reply.Deletes {
			d, err := m.parse(ds.now())
			if err != nil {
				ds.log.Debug("a peer told of a delete that is none", "peer", p.String(), "error", err)
				continue
			}
			if ds.now().Sub(d.Made) > ds.remember {
				continue // it was forgotten here
			}
			if _, err := ds.apply(ctx, d, p); err != nil && !errors.Is(err, p2p.ErrReferenced) {
				return err
			}
		}
		if reply.Same || reply.Next <= after {
			return nil
		}
		after = reply.Next
	}
}

// accept reports whether what a peer has of a task counts. What was deleted
// does not; the peer has missed that, and is told. But what another task refers
// to there, which only force deletes, is as good as new.
func (ds *deletes) accept(ctx context.Context, from peer.ID, task p2p.Task, state *taskState) bool {
	if state == nil {
		return false
	}
	d, err := ds.store.Deleted(ctx, task.Tag, digest.FromDigest(task.Digest))
	if err != nil || !ds.store.Covers(d, state.Origin) {
		return err == nil
	}
	if state.Referred && !d.Force {
		state.Origin, state.After = d.At.Add(1), d.At
		return true
	}
	ds.tell(from, d)
	return false
}

// forget ends what is under way with what has been deleted here.
func (s *Swarm) forget(deletes []pieces.Delete) {
	for _, d := range deletes {
		if d.All {
			s.forgetAll(d)
			continue
		}
		if d.CID.CacheID() != "" {
			s.releaseLost(d.Tag)
			continue
		}
		task := p2p.Task{Tag: d.Tag, Digest: d.CID.Digest()}
		if held, err := s.store.Stat(s.ctx, task.Tag, d.CID, p2p.StatOptions{Scope: p2p.Local}); err == nil &&
			!s.store.Covers(d, held.Origin) {
			continue // it has come back since
		}
		if down := s.downloads.of(task); down != nil && !d.Soft {
			down.deleted(task, d)
		}
		s.releasePartial(task)
	}
}

// releasePartial removes what has arrived of a blob that was deleted.
func (s *Swarm) releasePartial(task p2p.Task) {
	if err := s.store.ReleasePartial(task); err != nil {
		s.log.Warn("what has arrived of a deleted blob could not be removed", "task", task.String(), "error", err)
	}
}

// forgetAll is forget for all under a tag.
func (s *Swarm) forgetAll(d pieces.Delete) {
	s.downloads.mu.Lock()
	under := slices.Collect(maps.Values(s.downloads.all))
	s.downloads.mu.Unlock()
	for _, one := range under {
		for _, task := range one.wanted() {
			if task.Tag == d.Tag {
				one.deleted(task, d)
			}
		}
	}
	for _, a := range s.store.Arriving() {
		if a.Task.Tag == d.Tag {
			s.releasePartial(a.Task)
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
			if _, _, err := s.statTask(s.ctx, task, p2p.StatOptions{}); errors.Is(err, p2p.ErrNotFound) {
				s.releasePartial(task)
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
