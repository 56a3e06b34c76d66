package swarm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// maxFollowedSize is the size in bytes of a manifest that is read to tell a peer of what
// it refers to.
const maxFollowedSize = 64 << 10

func (a *api) serveFind(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	var req findRequest
	done, err := a.readJSON(w, r, &req)
	defer done()
	if err != nil {
		return err
	}
	if len(req.Tasks)+len(req.Names)+len(req.Referrers) > maxFind {
		return fmt.Errorf("%w: more than %d questions", errMessage, maxFind)
	}
	reply := findReply{
		Tasks:     make([]*taskState, len(req.Tasks)),
		Names:     make([]*nameState, len(req.Names)),
		Referrers: make([][]digest.Digest, len(req.Referrers)),
		Twin:      a.meetings.twinOf(from),
	}
	ctx := r.Context()
	for i, t := range req.Tasks {
		if reply.Tasks[i], err = a.answerTask(ctx, p2p.Task(t), from, req.Lease); err != nil {
			return err
		}
	}
	for i, n := range req.Names {
		if reply.Names[i], err = a.answerName(ctx, n, protocolOf(r)); err != nil {
			return err
		}
		if state := reply.Names[i]; state != nil && req.Follow {
			if reply.Followed, err = a.follow(ctx, reply.Followed, p2p.Task{Tag: n.Tag, Digest: state.Digest},
				from); err != nil {
				return err
			}
		}
	}
	for i, t := range req.Referrers {
		if a.opts.Mode == NeverServe {
			break
		}
		if reply.Referrers[i], err = a.referrers(ctx, p2p.Task(t)); err != nil {
			return err
		}
	}
	return writeJSON(w, &reply)
}

// answerTask says what this daemon has of a task, or nil.
func (a *api) answerTask(ctx context.Context, task p2p.Task, from peer.ID, lease bool) (*taskState, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	going := false
	if lease {
		err := a.store.Lease(ctx, task)
		if going = errors.Is(err, p2p.ErrNotFound); err != nil && !going {
			return nil, err
		}
	}
	state, err := a.taskState(ctx, task, from)
	if state != nil && going && state.whole() {
		return nil, nil // it is being deleted, or is not in the store yet
	}
	return state, err
}

// answerName says what this daemon knows of a name, or nil, to a peer that speaks a version of the
// protocol.
func (a *api) answerName(ctx context.Context, name nameRef, version int) (*nameState, error) {
	state, err := a.names.state(ctx, name.Tag, name.Name)
	if state == nil || err != nil {
		return nil, err
	}
	if a.opts.Mode == NeverServe {
		// What it stands for could not be had here.
		*state = nameState{Deleted: state.Deleted, DeletedAfter: state.DeletedAfter, DeletedAge: state.DeletedAge}
	}
	if version == 1 {
		// It would refuse the whole answer for a date that is far ahead.
		if now := a.opts.Now(); state.Updated.After(now.Add(maxAheadOld)) {
			state.Updated = now
		}
		if state.Deleted.After(a.store.Limit()) {
			state.Deleted = time.Time{}
		}
	}
	return state, nil
}

// taskState says what this daemon has of a task, or nil.
func (a *api) taskState(ctx context.Context, task p2p.Task, asker peer.ID) (*taskState, error) {
	if a.opts.Mode == NeverServe {
		return nil, nil
	}
	var state *taskState
	info, err := a.store.StatForPeers(ctx, task)
	switch {
	case err == nil:
		state = &taskState{
			Size: info.Size, MediaType: info.MediaType, Manifest: info.IsManifest,
			Pinned: info.Keep == p2p.KeepPinned, Origin: info.Origin, After: info.After, Lacks: len(info.Lacks) > 0,
		}
		if state.Referred, err = a.store.Referenced(ctx, task); err != nil {
			return nil, err
		}
	case errors.Is(err, p2p.ErrNotFound):
		if d := a.downloads.of(task); d != nil {
			state = d.state(task)
		}
	case errors.Is(err, digest.ErrCorrupt):
		a.log.Error("a blob is damaged, and not served", "task", task.String(), "error", err)
	default:
		return nil, err
	}
	if state == nil {
		return nil, nil
	}
	for _, p := range a.uploads.askers(task.Digest, asker) {
		if info := a.network.Addresses(p); len(info.Addrs) > 0 {
			state.Hints = append(state.Hints, hintOf(info))
		}
	}
	return state, nil
}

// follow adds to all what this daemon has of a task that a name leads to, and, where that is
// a manifest, of what it refers to.
func (a *api) follow(ctx context.Context, all []followed, task p2p.Task, asker peer.ID) ([]followed, error) {
	if task.Digest == "" || len(all) == maxFollowed {
		return all, nil
	}
	state, err := a.taskState(ctx, task, asker)
	if state == nil || err != nil {
		return all, err
	}
	all = append(all, followed{taskRef(task), *state})
	if !state.Manifest || state.Size > maxFollowedSize {
		return all, nil
	}
	info, err := a.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if err != nil || info.Manifest == nil {
		return all, nil // it has gone just now
	}
	m, err := manifest.Read(info.Manifest.Content)
	if err != nil {
		return all, nil
	}
	refs := m.References(false).Refs
	for _, d := range refs[:min(len(refs), maxFollowed-len(all))] {
		ref := p2p.Task{Tag: task.Tag, Digest: d}
		state, err := a.taskState(ctx, ref, asker)
		if err != nil {
			return nil, err
		}
		if state != nil {
			all = append(all, followed{taskRef(ref), *state})
		}
	}
	return all, nil
}

// referrers lists what refers to a task here.
func (a *api) referrers(ctx context.Context, task p2p.Task) ([]digest.Digest, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	all := []digest.Digest{}
	for e, err := range a.store.List(ctx, p2p.Query{Tag: &task.Tag, RefersTo: task.Digest}) {
		if err != nil {
			return nil, err
		}
		if e.IsManifest && len(all) < maxReferrers {
			all = append(all, e.Task.Digest)
		}
	}
	return all, nil
}
