package swarm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// names finds out what names stand for, by what this daemon and its peers know of them, and notices
// where two hosts have moved one. It is safe for concurrent use: recent, moves and conflicts have a
// lock each.
type names struct {
	store     *pieces.Store
	peers     *peerTable
	client    *client
	questions *questions
	deletes   *deletes
	recent    *recent
	log       *slog.Logger

	ctx       context.Context // ends with the swarm
	moves     moves
	recalled  chan struct{} // closed when moves has those of earlier runs
	conflicts conflicts
}

// state says what this daemon knows of a name, or nil.
func (ns *names) state(ctx context.Context, tag, name string) (*nameState, error) {
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
	gone, err := ns.store.Deleted(ctx, tag, cid)
	if err != nil {
		return nil, err
	}
	state := nameState{Deleted: gone.At, DeletedAfter: gone.After}
	if !gone.Limit.IsZero() {
		state.DeletedAge = min(max(0, int64(ns.store.Limit().Sub(gone.Limit)/time.Second)), maxAge)
	}
	n, err := ns.store.Name(ctx, tag, name)
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
	letGo   bool    // the host that pointed it there let go of what it stood for before
	from    peer.ID // the peer that told; "" where it is known here
}

// resolve finds what a name stands for: of what this daemon and its peers know,
// the newest (see [pieces.NewerName]) that was not deleted since. It is this daemon's own where
// here is set.
func (ns *names) resolve(ctx context.Context, tag, name string) (n p2p.NewName, here bool, err error) {
	cid, err := digest.ParseCID(name)
	if err != nil {
		return n, false, err
	}
	mine, err := ns.state(ctx, tag, name)
	if err != nil {
		return n, false, err
	}
	timeout := ns.questions.timeout
	var all []resolved
	var gone []pieces.Delete
	add := func(n *nameState, from peer.ID) {
		if n != nil {
			gone = append(gone, n.gone(ns.store.Limit()))
		}
		if n != nil && n.Digest != "" {
			all = append(all, resolved{n.Digest, n.version(), n.LetGo, from})
		}
	}
	add(mine, "")
	known := len(all) > 0
	if known {
		// It is here: a peer that is slow to say that it is older is not waited for.
		timeout = min(timeout, newerTimeout)
	}
	lookupCtx, cancel := context.WithTimeoutCause(ctx, timeout, errNoAnswer)
	defer cancel()
	l := ns.questions.lookup(lookupCtx, &findRequest{Names: []nameRef{{tag, name}}, Follow: !known},
		nameKey(tag, name), known)
	var answers []answer
	for a := range l.answers {
		add(a.reply.Names[0], a.peer)
		answers = append(answers, a)
	}
	for _, a := range answers { // only now: one that did not answer may have taken long
		for _, f := range a.reply.Followed {
			if task := p2p.Task(f.taskRef); task.Tag == tag && ns.deletes.accept(ctx, a.peer, task, &f.State) {
				ns.recent.put(task, a.peer, &f.State)
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		l.end()
		return n, false, err
	}
	what := p2p.Describe(tag, cid)
	if len(all) == 0 {
		return n, false, l.missed(what)
	}
	l.end()
	best, found := ns.newest(nameRef{tag, name}, gone, all)
	if !found {
		return n, false, fmt.Errorf("%s: %w: it has been deleted", what, p2p.ErrNotFound)
	}
	n = p2p.NewName{Tag: tag, Name: name, Digest: best.digest, Updated: best.version.At, After: best.version.After,
		KeepOld: !best.letGo}
	if best.from != "" {
		ns.recent.lead(n)
	}
	return n, best.from == "", nil
}

// newerTimeout is how long peers are waited for to tell of a newer version of a
// name that is here.
const newerTimeout = 500 * time.Millisecond

// newest returns what of all that a name is said to stand for counts, unless all of it
// is gone. It tells where that was moved by a host that did not know of another one.
func (ns *names) newest(name nameRef, gone []pieces.Delete, all []resolved) (best resolved, found bool) {
	all = slices.DeleteFunc(all, func(r resolved) bool {
		return slices.ContainsFunc(gone, func(d pieces.Delete) bool { return ns.store.Covers(d, r.version.At) })
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
			ns.conflicts.tell(ns.log, name, best, r)
		}
	}
	return best, true
}

// after returns names that are to be moved with what they have to come after: see [Swarm.After].
func (ns *names) after(ctx context.Context, names []p2p.NewName) []p2p.NewName {
	names = slices.Clone(names)
	ctx, cancel := ns.questions.within(ctx)
	defer cancel()
	for i := range names {
		n := &names[i]
		mine, err := ns.state(ctx, n.Tag, n.Name)
		if err != nil {
			continue // the store will say why
		}
		l := ns.questions.lookup(ctx, &findRequest{Names: []nameRef{{n.Tag, n.Name}}}, nameKey(n.Tag, n.Name), true)
		for a := range l.answers {
			theirs := a.reply.Names[0]
			if theirs == nil {
				continue
			}
			if at := theirs.Updated; at.After(n.After) &&
				(mine == nil || !ns.store.Covers(mine.gone(ns.store.Limit()), at)) {
				n.After = at
			}
			if at := theirs.gone(ns.store.Limit()).Last(ns.store.Limit()); at.After(n.After) {
				n.After = at
			}
		}
		l.end()
	}
	return names
}

// ledTo returns the names that have led to a task: see [Swarm.LedTo].
func (ns *names) ledTo(ctx context.Context, task p2p.Task) (all []p2p.NewName) {
	for _, l := range ns.recent.takeLeads(task) {
		gone, err := ns.state(ctx, task.Tag, l.name.Name)
		if err != nil || gone != nil && ns.store.Covers(gone.gone(ns.store.Limit()), l.name.Updated) {
			continue
		}
		if l.state != nil {
			if !ns.deletes.accept(ctx, l.peer, task, l.state) {
				continue
			}
			ns.recent.put(task, l.peer, l.state)
		}
		all = append(all, l.name)
	}
	return all
}
