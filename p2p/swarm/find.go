package swarm

import (
	"context"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// statTask asks the network for a task.
func (s *Swarm) statTask(
	ctx context.Context, task p2p.Task, opts p2p.StatOptions,
) (info p2p.Info, from peer.ID, err error) {
	l := s.questions.lookup(ctx, &findRequest{Tasks: []taskRef{taskRef(task)}, Lease: opts.Lease},
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
