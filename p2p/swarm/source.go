package swarm

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// What the engine in front of the swarm sees of it.
var (
	_ front.Source    = (*Swarm)(nil)
	_ front.Names     = (*Swarm)(nil)
	_ front.Referrers = (*Swarm)(nil)
	_ front.Arrivals  = (*Swarm)(nil)
	_ p2p.Peering     = (*Swarm)(nil)
)

// Name implements [front.Source].
func (s *Swarm) Name() string { return "the swarm" }

// Find implements [front.Source].
func (s *Swarm) Find(ctx context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	if s.opts.Mode == SeedOnly {
		return front.Found{}, fmt.Errorf("%s: %w", task, errSeedOnly)
	}
	ask := s.statTask
	if opts.Named {
		ask = s.statNamed
	}
	info, from, err := ask(ctx, task, p2p.StatOptions{Providers: opts.Providers, Lease: opts.Lease})
	found := front.Found{Info: info, Whole: from != ""}
	// Whether it is a manifest is for its content to say, not for the peer that answered first.
	mayBe := info.IsManifest || from != "" && (opts.Named || info.Size <= p2p.MaxManifest)
	if err != nil || !opts.Content || !mayBe {
		return found, err
	}
	content, err := s.fetchManifest(ctx, task, from)
	if err != nil && ctx.Err() == nil && !info.IsManifest && info.Size > p2p.MaxManifest {
		return found, nil // nobody says otherwise
	}
	if err != nil {
		return found, err
	}
	found.Info.Manifest = &p2p.Manifest{Content: content}
	if opts.Refs && !opts.Providers && from != "" {
		found.Info.Manifest.Refs = s.refsOf(ctx, from, found.Info)
	}
	return found, nil
}

// refsOf asks a peer what it has of what a manifest refers to.
func (s *Swarm) refsOf(ctx context.Context, from peer.ID, info p2p.Info) (refs []p2p.Info) {
	_, parsed := manifest.Describe(info.MediaType, info.Manifest.Content)
	if parsed == nil || len(parsed.Refs) == 0 {
		return nil
	}
	var tasks []taskRef
	for _, d := range parsed.Refs[:min(len(parsed.Refs), p2p.MaxRefs)] {
		tasks = append(tasks, taskRef{Tag: info.Task.Tag, Digest: d})
	}
	for i, state := range s.statesOf(ctx, from, tasks) {
		if state != nil {
			refs = append(refs, infoOf(p2p.Task(tasks[i]), state))
		}
	}
	return refs
}

// Fetch implements [front.Source]. The result is an [*Arriving].
func (s *Swarm) Fetch(ctx context.Context, task p2p.Task, _ bool) (p2p.Blob, error) {
	if s.opts.Mode == SeedOnly {
		return nil, fmt.Errorf("%s: %w", task, errSeedOnly)
	}
	d, err := s.download(ctx, task)
	if err != nil || d == nil {
		return nil, err // where there is none, one has just ended, maybe well
	}
	a, err := s.openTask(ctx, d, task)
	if err == nil {
		return a, nil
	}
	if !errors.Is(err, errSealed) {
		return nil, err
	}
	select {
	case <-d.ended:
		return nil, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Offer implements [front.Source]: peers are told of names that were moved.
func (s *Swarm) Offer(_ context.Context, c p2p.Commit) error {
	for _, n := range c.Names {
		s.names.moves.add(nameRef{n.Tag, n.Name})
	}
	return nil
}

// Resolve implements [front.Names].
func (s *Swarm) Resolve(ctx context.Context, tag, name string) (n p2p.NewName, here bool, err error) {
	if s.opts.Mode == SeedOnly {
		return n, true, nil
	}
	return s.names.resolve(ctx, tag, name)
}

// After implements [front.Names]: with what peers know of the names, a host that
// moves a name does it after all that can be seen of it, whatever the clocks say.
// A peer that does not answer in time does not keep a name from being moved.
func (s *Swarm) After(ctx context.Context, names []p2p.NewName) []p2p.NewName {
	return s.names.after(ctx, names)
}

// LedTo implements [front.Names]. It returns the names that have led to a task, and forgets them, but
// for those that have been deleted since, or where the task has. They are the names as they were: they
// are to be held with the task, for which nobody need be asked once more, and say nothing of what the
// names stand for now.
func (s *Swarm) LedTo(ctx context.Context, task p2p.Task) []p2p.NewName {
	return s.names.ledTo(ctx, task)
}

// Referrers implements [front.Referrers].
func (s *Swarm) Referrers(ctx context.Context, task p2p.Task, have func(p2p.Task) bool) iter.Seq2[p2p.Info, error] {
	return func(yield func(p2p.Info, error) bool) {
		if s.opts.Mode == SeedOnly {
			return
		}
		for d, from := range s.whoRefersTo(ctx, task) {
			t := p2p.Task{Tag: task.Tag, Digest: d}
			if have(t) {
				continue
			}
			info, err := s.fetchReferrer(ctx, t, from)
			if ctx.Err() != nil {
				yield(info, context.Cause(ctx))
				return
			}
			if err != nil {
				s.log.Warn("a manifest that refers to another one could not be fetched", "task", t.String(),
					"peer", from.String(), "error", err)
			} else if !yield(info, nil) {
				return
			}
		}
	}
}

// whoRefersTo asks peers for the manifests that refer to a task.
func (s *Swarm) whoRefersTo(ctx context.Context, task p2p.Task) map[digest.Digest]peer.ID {
	l := s.questions.lookup(ctx, &findRequest{Referrers: []taskRef{taskRef(task)}}, taskKey(task), true)
	defer l.end()
	from := map[digest.Digest]peer.ID{}
	for a := range l.answers {
		for _, d := range a.reply.Referrers[0] {
			if len(from) < maxReferrers {
				from[d] = a.peer
			}
		}
	}
	return from
}

// fetchReferrer fetches a manifest of which a peer has told, and does not keep it.
func (s *Swarm) fetchReferrer(ctx context.Context, task p2p.Task, from peer.ID) (p2p.Info, error) {
	reply, err := s.questions.find(ctx, from, &findRequest{Tasks: []taskRef{taskRef(task)}})
	if err != nil {
		return p2p.Info{}, err
	}
	state := reply.Tasks[0]
	if !s.deletes.accept(ctx, from, task, state) {
		return p2p.Info{}, fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	info := infoOf(task, state)
	content, err := s.fetchManifest(ctx, task, from)
	info.Manifest = &p2p.Manifest{Content: content}
	return info, err
}

// Arriving implements [front.Arrivals].
func (s *Swarm) Arriving(task p2p.Task) (p2p.Info, bool) {
	d := s.downloads.of(task)
	if d == nil {
		return p2p.Info{}, false
	}
	return d.info(task)
}

// Await implements [front.Arrivals].
func (s *Swarm) Await(ctx context.Context, task p2p.Task) error {
	d := s.downloads.of(task)
	if d == nil {
		return nil
	}
	d.mu.Lock()
	proven := d.proven
	d.mu.Unlock()
	if !proven {
		return nil
	}
	select {
	case <-d.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Forget implements [front.Source].
func (s *Swarm) Forget(ctx context.Context, d front.Deletion) []front.Told {
	if len(d.Deletes) == 0 {
		return nil
	}
	s.forget(d.Deletes)
	return s.deletes.tellOthers(ctx, d.Deletes)
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
	l := s.questions.lookup(ctx, req, key, true)
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
			return seen, &p2p.ReferencedError{Task: task,
				By: fmt.Sprintf("other content on peer %s (%s)", a.peer, s.peers.get(a.peer).lastAddress())}
		}
		seen.Versions = append(seen.Versions, pieces.Version{At: state.Origin, After: state.After})
	}
	_, seen.Silent = l.end()
	return seen, context.Cause(ctx)
}

// mendLater has a blob mended that nobody here waits for.
func (s *Swarm) mendLater(task p2p.Task) {
	if s.begin(s.ctx) != nil {
		return
	}
	defer s.calls.Done()
	s.background.Go(func() {
		if err := s.front.Mend(s.ctx, task); err != nil && s.ctx.Err() == nil {
			s.log.Error("a blob is damaged, and no peer could mend it: import the file again, or delete it",
				"task", task.String(), "error", err)
		}
	})
}
