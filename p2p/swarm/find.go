package swarm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// maxFollowedSize is the size in bytes of a manifest that is read to tell a peer of what
// it refers to.
const maxFollowedSize = 64 << 10

// statTask asks the network for a task.
func (s *Swarm) statTask(
	ctx context.Context, task p2p.Task, opts p2p.StatOptions,
) (info p2p.Info, from peer.ID, err error) {
	lookupCtx, cancel := s.questions.within(ctx)
	defer cancel()
	l := s.questions.lookup(lookupCtx, &findRequest{Tasks: []taskRef{taskRef(task)}, Lease: opts.Lease},
		taskKey(task), false)
	counted := &p2p.Providers{}
	found := false
	for a := range l.answers {
		state := a.reply.Tasks[0]
		if !s.deletes.accept(ctx, a.peer, task, state) {
			continue
		}
		s.recent.put(task, a.peer, state)
		counted.Some++
		if state.whole() {
			counted.Whole++
		}
		if !found || state.whole() && from == "" {
			info = infoOf(task, state)
			if state.whole() {
				from = a.peer
			}
		}
		found = true
		if !opts.Providers && from != "" {
			break
		}
	}
	if !found {
		if err := context.Cause(ctx); err != nil {
			l.end()
			return info, "", err
		}
		missed := l.missed(task.String())
		counted.Asked, counted.Silent = l.end()
		return p2p.Info{Providers: counted}, "", missed
	}
	counted.Asked, counted.Silent = l.end()
	if opts.Providers {
		info.Providers = counted
	}
	return info, from, nil
}

// statNamed is statTask for what a name has just led to: a peer that has told of the name is not
// asked once more where one of them has all of it.
func (s *Swarm) statNamed(
	ctx context.Context, task p2p.Task, opts p2p.StatOptions,
) (info p2p.Info, from peer.ID, err error) {
	if !opts.Providers {
		for _, h := range s.recent.of(task) {
			if h.state.whole() {
				return infoOf(task, h.state), h.peer, nil
			}
		}
	}
	return s.statTask(ctx, task, opts)
}

// statesOf says what a peer has of tasks, as it has just told, or, where it has not of all of
// them, as it is asked. nil stands for what it does not have.
func (s *Swarm) statesOf(ctx context.Context, p peer.ID, tasks []taskRef) []*taskState {
	states := make([]*taskState, len(tasks))
	all := true
	for i, t := range tasks {
		for _, h := range s.recent.of(p2p.Task(t)) {
			if h.peer == p {
				states[i] = h.state
			}
		}
		all = all && states[i] != nil
	}
	if all {
		return states
	}
	reply, err := s.questions.find(ctx, p, &findRequest{Tasks: tasks})
	if err != nil {
		return states
	}
	for i, state := range reply.Tasks {
		if !s.deletes.accept(ctx, p, p2p.Task(tasks[i]), state) {
			reply.Tasks[i] = nil
		}
	}
	return reply.Tasks
}

// recent remembers for a moment what peers have said that they have of tasks, so that what
// a lookup has just told is not asked again: by the Stat of a name for what that leads to, and
// by the Open that follows. What a peer does not have it does not remember: that may be there
// the moment after.
type recent struct {
	mu    sync.Mutex
	tasks map[p2p.Task][]provider
	bytes int                // of all states
	led   map[p2p.Task]leads // which names have led to tasks that were not held
}

func newRecent() *recent {
	return &recent{tasks: map[p2p.Task][]provider{}, led: map[p2p.Task]leads{}}
}

// leads is a name that has led to a task, and a peer that has all of that, where it is known.
type leads struct {
	name p2p.NewName
	provider
}

// provider is a peer that has said what it has of a task.
type provider struct {
	peer  peer.ID
	state *taskState
	at    time.Time
}

const (
	recentFor      = 2 * time.Second
	maxRecent      = 1024 // tasks
	maxRecentBytes = 8 << 20
	// ledFor is how long it is remembered which name has led to a task: whoever holds that
	// then has fetched the file before.
	ledFor = 10 * time.Minute
)

func (r *recent) put(t p2p.Task, p peer.ID, state *taskState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(h provider) bool { return h.peer == p })
	if len(r.tasks) >= maxRecent || r.bytes+state.bytes() > maxRecentBytes {
		clear(r.tasks)
		r.bytes = 0
	}
	if all := r.tasks[t]; len(all) < maxSources {
		r.tasks[t] = append(all, provider{p, state, time.Now()})
		r.bytes += state.bytes()
	}
}

// of returns what is remembered of a task.
func (r *recent) of(t p2p.Task) []provider {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(h provider) bool { return time.Since(h.at) > recentFor })
	return slices.Clone(r.tasks[t])
}

// take returns what is remembered of a task, and forgets it.
func (r *recent) take(t p2p.Task) []provider {
	all := r.of(t)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(t, func(provider) bool { return true })
	return all
}

// lead remembers that a name of peers leads to a task.
func (r *recent) lead(name p2p.NewName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.led) >= maxRecent {
		clear(r.led)
	}
	task := p2p.Task{Tag: name.Tag, Digest: name.Digest}
	l := leads{name, provider{at: time.Now()}}
	for _, h := range r.tasks[task] {
		if h.state.whole() {
			state := *h.state
			state.Hints = nil
			l.peer, l.state = h.peer, &state
			break
		}
	}
	r.led[task] = l
}

// LedTo implements [front.Names]. It returns the name that has led to a task, and forgets it;
// nil where there is none, or one of the two has been deleted since. It is the name as it was:
// it is to be held with the task, for which nobody need be asked once more, and says nothing of
// what the name stands for now.
func (s *Swarm) LedTo(ctx context.Context, task p2p.Task) *p2p.NewName {
	s.recent.mu.Lock()
	l, found := s.recent.led[task]
	delete(s.recent.led, task)
	s.recent.mu.Unlock()
	if !found || time.Since(l.at) > ledFor {
		return nil
	}
	gone, err := s.nameState(ctx, task.Tag, l.name.Name)
	if err != nil || gone != nil && s.store.Covers(gone.gone(s.store.Limit()), l.name.Updated) {
		return nil
	}
	if l.state != nil {
		if !s.deletes.accept(ctx, l.peer, task, l.state) {
			return nil
		}
		s.recent.put(task, l.peer, l.state)
	}
	return &l.name
}

// remove forgets providers of a task. r.mu is held.
func (r *recent) remove(t p2p.Task, which func(provider) bool) {
	var left []provider
	for _, h := range r.tasks[t] {
		if which(h) {
			r.bytes -= h.state.bytes()
		} else {
			left = append(left, h)
		}
	}
	if r.tasks[t] = left; left == nil {
		delete(r.tasks, t)
	}
}

// infoOf describes a task of which only a peer has told.
func infoOf(task p2p.Task, state *taskState) p2p.Info {
	table := digest.Table{Size: state.Size, PieceLength: digest.PieceLength(state.Size)}
	info := p2p.Info{
		Task: task, Size: state.Size, PieceLength: table.PieceLength, Pieces: table.Pieces(), Remote: true,
		MediaType: state.MediaType, IsManifest: state.Manifest, Origin: state.Origin, After: state.After,
		Keep: p2p.KeepUntilReferred,
	}
	if state.Pinned {
		info.Keep = p2p.KeepPinned
	}
	if state.Lacks {
		info.Lacks = []digest.Digest{task.Digest} // of which part of it, nothing is said
	}
	return info
}

// taskState says what this daemon has of a task, or nil.
func (s *Swarm) taskState(ctx context.Context, task p2p.Task, asker peer.ID) (*taskState, error) {
	if s.opts.Mode == NeverServe {
		return nil, nil
	}
	var state *taskState
	info, err := s.store.StatForPeers(ctx, task)
	switch {
	case err == nil:
		state = &taskState{
			Size: info.Size, MediaType: info.MediaType, Manifest: info.IsManifest,
			Pinned: info.Keep == p2p.KeepPinned, Origin: info.Origin, After: info.After, Lacks: len(info.Lacks) > 0,
		}
		if state.Referred, err = s.store.Referenced(ctx, task); err != nil {
			return nil, err
		}
	case errors.Is(err, p2p.ErrNotFound):
		if d := s.downloadOf(task); d != nil {
			state = d.state(task)
		}
	case errors.Is(err, digest.ErrCorrupt):
		s.log.Error("a blob is damaged, and not served", "task", task.String(), "error", err)
	default:
		return nil, err
	}
	if state == nil {
		return nil, nil
	}
	for _, p := range s.uploads.askers(task.Digest, asker) {
		if info := s.network.Addresses(p); len(info.Addrs) > 0 {
			state.Hints = append(state.Hints, hintOf(info))
		}
	}
	return state, nil
}

// follow adds to all what this daemon has of a task that a name leads to, and, where that is
// a manifest, of what it refers to.
func (s *Swarm) follow(ctx context.Context, all []followed, task p2p.Task, asker peer.ID) ([]followed, error) {
	if task.Digest == "" || len(all) == maxFollowed {
		return all, nil
	}
	state, err := s.taskState(ctx, task, asker)
	if state == nil || err != nil {
		return all, err
	}
	all = append(all, followed{taskRef(task), *state})
	if !state.Manifest || state.Size > maxFollowedSize {
		return all, nil
	}
	info, err := s.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if err != nil || info.Manifest == nil {
		return all, nil // it has gone just now
	}
	_, m := manifest.Describe(info.MediaType, info.Manifest.Content)
	if m == nil {
		return all, nil
	}
	for _, d := range m.Refs[:min(len(m.Refs), maxFollowed-len(all))] {
		ref := p2p.Task{Tag: task.Tag, Digest: d}
		state, err := s.taskState(ctx, ref, asker)
		if err != nil {
			return nil, err
		}
		if state != nil {
			all = append(all, followed{taskRef(ref), *state})
		}
	}
	return all, nil
}

// nameState says what this daemon knows of a name, or nil.
func (s *Swarm) nameState(ctx context.Context, tag, name string) (*nameState, error) {
	cid, err := digest.ParseCID(name)
	if err != nil {
		return nil, err
	}
	if cid.CacheID() == "" {
		return nil, fmt.Errorf("%w: name %s", errMessage, name)
	}
	if err := p2p.ValidateTag(tag); err != nil {
		return nil, err
	}
	gone, err := s.store.Deleted(ctx, tag, cid)
	if err != nil {
		return nil, err
	}
	state := nameState{Deleted: gone.At, DeletedAfter: gone.After}
	if !gone.Limit.IsZero() {
		state.DeletedAge = min(max(0, int64(s.store.Limit().Sub(gone.Limit)/time.Second)), maxAge)
	}
	n, err := s.store.Name(ctx, tag, name)
	switch {
	case err == nil:
		state.Digest, state.Updated, state.After, state.LetGo = n.Digest, n.Updated, n.After, !n.KeepOld
	case errors.Is(err, p2p.ErrNotFound):
		err = nil
	}
	if err != nil || state == (nameState{}) {
		return nil, err
	}
	return &state, nil
}

// resolved is what a name stands for.
type resolved struct {
	digest  digest.Digest
	version pieces.Version
	letGo   bool    // whoever pointed it there let go of what it stood for before
	from    peer.ID // who told; "" where it is known here
}

// resolve finds what a name stands for: of what this daemon and its peers know,
// the newest (see [pieces.NewerName]) that was not deleted since.
func (s *Swarm) resolve(ctx context.Context, tag, name string) (resolved, error) {
	cid, err := digest.ParseCID(name)
	if err != nil {
		return resolved{}, err
	}
	mine, err := s.nameState(ctx, tag, name)
	if err != nil {
		return resolved{}, err
	}
	timeout := s.opts.LookupTimeout
	var all []resolved
	var gone []pieces.Delete
	add := func(n *nameState, from peer.ID) {
		if n != nil {
			gone = append(gone, n.gone(s.store.Limit()))
		}
		if n != nil && n.Digest != "" {
			all = append(all, resolved{n.Digest, n.version(), n.LetGo, from})
		}
	}
	add(mine, "")
	here := len(all) > 0
	if here {
		// It is here: a peer that is slow to say that it is older is not waited for.
		timeout = min(timeout, newerTimeout)
	}
	lookupCtx, cancel := context.WithTimeoutCause(ctx, timeout, errNoAnswer)
	defer cancel()
	l := s.questions.lookup(lookupCtx, &findRequest{Names: []nameRef{{tag, name}}, Follow: !here},
		nameKey(tag, name), here)
	var answers []answer
	for a := range l.answers {
		add(a.reply.Names[0], a.peer)
		answers = append(answers, a)
	}
	for _, a := range answers { // only now: one that did not answer may have taken long
		for _, f := range a.reply.Followed {
			if task := p2p.Task(f.taskRef); task.Tag == tag && s.deletes.accept(ctx, a.peer, task, &f.State) {
				s.recent.put(task, a.peer, &f.State)
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		l.end()
		return resolved{}, err
	}
	what := p2p.Describe(tag, cid)
	if len(all) == 0 {
		return resolved{}, l.missed(what)
	}
	l.end()
	best, found := s.newest(nameRef{tag, name}, gone, all)
	if !found {
		return resolved{}, fmt.Errorf("%s: %w: it has been deleted", what, p2p.ErrNotFound)
	}
	return best, nil
}

// newest returns what of all that a name is said to stand for counts, unless all of it
// is gone. It tells where that was moved by a host that did not know of another one.
func (s *Swarm) newest(name nameRef, gone []pieces.Delete, all []resolved) (best resolved, found bool) {
	all = slices.DeleteFunc(all, func(r resolved) bool {
		return slices.ContainsFunc(gone, func(d pieces.Delete) bool { return s.store.Covers(d, r.version.At) })
	})
	if len(all) == 0 {
		return resolved{}, false
	}
	best = all[0]
	for _, r := range all[1:] {
		if pieces.NewerName(r.digest, r.version.At, best.digest, best.version.At) {
			best = r
		}
	}
	for _, r := range all {
		if r.digest != best.digest && r.version.Unseen(best.version) {
			s.conflicts.tell(s, name, best, r)
		}
	}
	return best, true
}

// newerTimeout is how long peers are waited for to tell of a newer version of a
// name that is here.
const newerTimeout = 500 * time.Millisecond

// referrers lists what refers to a task here.
func (s *Swarm) referrers(ctx context.Context, task p2p.Task) ([]digest.Digest, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	all := []digest.Digest{}
	for e, err := range s.store.List(ctx, p2p.Query{Tag: &task.Tag, RefersTo: task.Digest}) {
		if err != nil {
			return nil, err
		}
		if e.IsManifest && len(all) < maxReferrers {
			all = append(all, e.Task.Digest)
		}
	}
	return all, nil
}
