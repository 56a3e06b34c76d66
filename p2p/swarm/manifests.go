package swarm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// manifestCache has the manifests that were fetched last and not kept, so that
// one that is looked at and then kept is not fetched twice.
type manifestCache struct {
	mu    sync.Mutex
	order []digest.Digest // the oldest first
	all   map[digest.Digest][]byte
	bytes int
}

// maxCached bounds the bytes in a manifestCache.
const maxCached = 2 * p2p.MaxManifest

func newManifestCache() *manifestCache {
	return &manifestCache{all: map[digest.Digest][]byte{}}
}

func (c *manifestCache) get(d digest.Digest) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all[d]
}

func (c *manifestCache) put(d digest.Digest, content []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all[d] != nil {
		return
	}
	c.all[d] = content
	c.order = append(c.order, d)
	for c.bytes += len(content); c.bytes > maxCached; c.order = c.order[1:] {
		c.bytes -= len(c.all[c.order[0]])
		delete(c.all, c.order[0])
	}
}

// fetchManifest gets the content of a manifest from a peer that has all of it, or from
// another one where that is slow or fails, and proves it. It does not keep it.
func (s *Swarm) fetchManifest(ctx context.Context, task p2p.Task, from peer.ID) ([]byte, error) {
	if content := s.manifests.get(task.Digest); content != nil {
		return content, nil
	}
	if from == "" {
		return nil, fmt.Errorf("%s: %w: no peer has all of it", task, p2p.ErrNotFound)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		content []byte
		err     error
	}
	results := make(chan result)
	under := 0
	ask := func(p peer.ID) (slow <-chan struct{}) {
		under++
		pace := throttle.NewProgress(ctx, s.opts.LookupTimeout)
		s.background.Go(func() {
			defer pace.Stop()
			content, err := s.client.blob(pace, p, task, p2p.MaxManifest)
			switch {
			case err == nil || ctx.Err() != nil:
			case errors.Is(err, digest.ErrMismatch):
				s.caught(p, task.Digest, err)
				err = fmt.Errorf("fetch manifest %s from peer %s: %w", task, p, err)
			default:
				if context.Cause(pace.Context()) != nil {
					s.questions.suspect(p, false)
				}
				err = fmt.Errorf("fetch manifest %s from peer %s: %w: %v", task, p, p2p.ErrUnreachable, err)
			}
			select {
			case results <- result{content, err}:
			case <-ctx.Done():
			}
		})
		return pace.Slow()
	}
	slow := ask(from)
	asked := map[peer.ID]bool{from: true}
	patience := time.NewTimer(s.opts.StallTimeout)
	defer patience.Stop()
	next := func() {
		patience.Reset(s.opts.StallTimeout)
		slow = nil
		if other := s.wholeProvider(ctx, task, asked); other != "" {
			asked[other] = true
			slow = ask(other)
		}
	}
	for {
		select {
		case r := <-results:
			if r.err == nil {
				s.manifests.put(task.Digest, r.content)
				return r.content, nil
			}
			if under--; under == 0 {
				if next(); under == 0 {
					return nil, r.err
				}
			}
		case <-slow:
			next()
		case <-patience.C: // it comes, and takes its time: others may be faster
			next()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// wholeProvider returns a peer that has all of a task, but for some; "" where there is none.
func (s *Swarm) wholeProvider(ctx context.Context, task p2p.Task, not map[peer.ID]bool) peer.ID {
	l := s.questions.lookup(ctx, &findRequest{Tasks: []taskRef{taskRef(task)}}, taskKey(task), false)
	defer l.end()
	for a := range l.answers {
		if state := a.reply.Tasks[0]; !not[a.peer] && s.deletes.accept(ctx, a.peer, task, state) && state.whole() {
			return a.peer
		}
	}
	return ""
}

// Replicate implements [p2p.Peering].
func (s *Swarm) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	info, err := s.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local})
	if err != nil || n <= 0 {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	candidates := s.candidates(ctx, info.Task)
	type result struct {
		peer peer.ID
		err  error
	}
	results := make(chan result)
	var done []string
	var failed error
	under := 0
	for len(done) < n {
		for under < n-len(done) && len(candidates) > 0 {
			p := candidates[0]
			candidates = candidates[1:]
			under++
			s.background.Go(func() {
				query := url.Values{"tag": {tag}, "cid": {cid.String()}}
				err := s.client.callQuery(ctx, s.client.streams, p, http.MethodPost, pathReplicate, query, nil, nil)
				select {
				case results <- result{p, err}:
				case <-ctx.Done():
				}
			})
		}
		if under == 0 {
			err := fmt.Errorf("replicate %s: %w that can hold it: %d of %d do", p2p.Describe(tag, cid),
				p2p.ErrUnreachable, len(done), n)
			if failed != nil {
				err = fmt.Errorf("%w: %w", err, failed)
			}
			return done, err
		}
		select {
		case r := <-results:
			under--
			if r.err == nil {
				done = append(done, r.peer.String())
			} else {
				failed = fmt.Errorf("peer %s: %w", r.peer, r.err)
				s.log.Warn("a peer does not hold what it was asked to", "what", p2p.Describe(tag, cid),
					"peer", r.peer.String(), "error", r.err)
			}
		case <-ctx.Done():
			return done, context.Cause(ctx)
		case <-s.ctx.Done():
			return done, context.Cause(s.ctx)
		}
	}
	return done, nil
}

// candidates returns the peers that may hold a task, those first that do already.
func (s *Swarm) candidates(ctx context.Context, task p2p.Task) []peer.ID {
	l := s.questions.lookup(ctx, &findRequest{Tasks: []taskRef{taskRef(task)}}, taskKey(task), true)
	var first, others []peer.ID
	for a := range l.answers {
		switch e := s.peers.get(a.peer); {
		case a.reply.Tasks[0] != nil && a.reply.Tasks[0].whole():
			first = append(first, a.peer)
		case e.mode() == Full, e.mode() == "":
			others = append(others, a.peer)
		}
	}
	l.end()
	return append(first, others...)
}
