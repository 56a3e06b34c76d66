package swarm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// A name that two hosts move, neither knowing of the other, stands for what was moved
// later by the dates of both. A host that looks it up notices that, and so do the two hosts
// when they meet: each asks those that it meets for the names that it has moved since it
// last did. Where a host has lost, its log and Peers say so.

const (
	maxConflicts = 1024 // that are remembered
	maxMoves     = 1024 // names that were moved last, of which others are asked
)

// moves are the names that were moved here last.
type moves struct {
	mu     sync.Mutex
	names  []nameRef // the oldest first
	number int       // how many there have been, those counted that were dropped
}

// add notes names that have been moved.
func (m *moves) add(names ...nameRef) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names = append(m.names, names...)
	m.number += len(names)
	if n := len(m.names) - maxMoves; n > 0 {
		m.names = slices.Delete(m.names, 0, n)
	}
}

// since returns those that have been moved since there were so many, each once, and how
// many there are now.
func (m *moves) since(number int) (names []nameRef, now int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := map[nameRef]bool{}
	for _, n := range slices.Backward(m.names[max(0, len(m.names)-(m.number-number)):]) {
		if !seen[n] {
			names = append(names, n)
		}
		seen[n] = true
	}
	return names, m.number
}

// recall notes the names that were moved last before this daemon was started.
func (ns *names) recall() {
	defer close(ns.recalled)
	latest, err := ns.store.LatestNames(ns.ctx, maxMoves)
	if err != nil && ns.ctx.Err() == nil {
		ns.log.Warn("it could not be found out which names were moved last", "error", err)
	}
	for _, n := range slices.Backward(latest) {
		ns.moves.add(nameRef{n.Tag, n.Name})
	}
}

// compare asks a peer for what was moved here since it was last asked, to tell of
// what both have moved.
func (ns *names) compare(ctx context.Context, p peer.ID) error {
	select {
	case <-ns.recalled:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	e := ns.peers.get(p)
	names, number := ns.moves.since(e.comparedUpTo())
	for part := range slices.Chunk(names, maxFind) {
		reply, err := ns.client.find(ctx, p, &findRequest{Names: part})
		if err != nil {
			return err
		}
		for i, theirs := range reply.Names {
			mine, err := ns.state(ctx, part[i].Tag, part[i].Name)
			if err != nil {
				return err
			}
			if mine == nil || theirs == nil || mine.Digest == "" || theirs.Digest == "" {
				continue
			}
			limit := ns.store.Limit()
			ns.newest(part[i], []pieces.Delete{mine.gone(limit), theirs.gone(limit)},
				[]resolved{mine.resolved(""), theirs.resolved(p)})
		}
	}
	e.compared(number)
	return nil
}

// resolved returns what the name stands for, by the peer that has said so, or "".
func (n *nameState) resolved(from peer.ID) resolved {
	return resolved{n.Digest, n.version(), n.LetGo, from}
}

func (e *peerEntry) comparedUpTo() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.moves
}

func (e *peerEntry) compared(upTo int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.moves = upTo
}

// conflicts remembers of which moves of names, made by hosts that did not know of each
// other, has been told.
type conflicts struct {
	mu   sync.Mutex
	told map[[2]resolved]bool
	lost map[nameRef][2]resolved // where this host has lost: what counts, and what does not
}

// tell logs, once, that of two moves of a name one counts, though the host that made it did not
// know of the other.
func (c *conflicts) tell(log *slog.Logger, name nameRef, best, other resolved) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pair := [2]resolved{{digest: best.digest, version: best.version}, {digest: other.digest, version: other.version}}
	if c.told[pair] {
		return
	}
	if c.told == nil || len(c.told) >= maxConflicts {
		c.told, c.lost = map[[2]resolved]bool{}, map[nameRef][2]resolved{}
	}
	c.told[pair] = true
	if other.from == "" {
		c.lost[name] = [2]resolved{best, other}
	}
	where := func(r resolved) string {
		if r.from == "" {
			return "this host"
		}
		return "peer " + r.from.String()
	}
	log.Warn("a name was moved on two hosts that could not see each other: the later date counts, and what the "+
		"other one pointed to stays where it is until it is deleted",
		"name", name.String(), "counts", best.digest, "at", best.version.At, "on", where(
			best), "instead of", other.digest, "dated", other.version.At, "of", where(other))
}

// with says which names this host has lost to a peer, and still has as it moved them; ""
// where there is none.
func (c *conflicts) with(ctx context.Context, store *pieces.Store, p peer.ID) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first string
	var at time.Time
	n := 0
	for name, pair := range c.lost {
		best, mine := pair[0], pair[1]
		if best.from != p {
			continue
		}
		now, err := store.Name(ctx, name.Tag, name.Name)
		if errors.Is(err, p2p.ErrNotFound) ||
			err == nil && (now.Digest != mine.digest || !now.Updated.Equal(mine.version.At)) {
			delete(c.lost, name)
			continue
		}
		if n++; mine.version.At.After(at) {
			first, at = fmt.Sprintf("%s was moved there and here while neither could see the other: there it is %s, "+
				"which counts, here %s", name, best.digest, mine.digest), mine.version.At
		}
	}
	if n > 1 {
		first += fmt.Sprintf("; and %d more, see the log", n-1)
	}
	return first
}
