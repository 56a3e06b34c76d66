package swarm

import (
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func (p *testPeer) deleteAll(t *testing.T, tag string) p2p.Deleted {
	t.Helper()
	deleted, err := p.Delete(t.Context(), tag, digest.CID{}, p2p.DeleteOptions{All: true})
	if err != nil {
		t.Fatalf("delete all of %s: %v", tag, err)
	}
	return deleted
}

// remembered returns how many deletes a peer remembers.
func (p *testPeer) remembered(t *testing.T) int {
	t.Helper()
	deletes, _, err := p.store.Deletes(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return len(deletes)
}

// What is under a tag goes on all peers, also on one that was away, by one delete that
// is remembered in place of those before.
func TestDeleteAllEverywhere(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	mine, theirs, late := content(1000, 1), content(1000, 2), content(1000, 3)
	first := a.add(t, "models", mine)
	a.push(t, "models", "v1", "", []byte("the layer"))
	second := b.add(t, "models", theirs)
	b.push(t, "models", "v2", "", []byte("another layer"))
	kept := b.add(t, "other", mine)
	third := c.add(t, "models", late)
	a.add(t, "models", []byte("deleted before"))
	a.delete(t, "models", string(digest.SHA256.FromString("deleted before")), p2p.DeleteOptions{})
	h.setCut(func(x, y peer.ID) bool { return x == c.id || y == c.id })
	deleted := a.deleteAll(t, "models")
	if deleted.Tasks != 3 || deleted.Reached != 1 || deleted.Removed != 1 || len(deleted.Missed) != 1 {
		t.Errorf("deleted is %+v, want 3 here, and one peer of two", deleted)
	}
	for _, p := range []*testPeer{a, b} {
		for _, cid := range []string{string(first.Digest), string(second.Digest), "v1", "v2"} {
			p.gone(t, "models", cid)
		}
		if n := p.remembered(t); n != 1 {
			t.Errorf("%d deletes are remembered, want one", n)
		}
	}
	h.setCut(nil)
	c.gone(t, "models", string(third.Digest))
	wantNoName(t, "deleted with all", "models", "v1", a, b, c)
	c.want(t, kept, mine)
	// It can be imported again, and deleted by itself.
	c.add(t, "models", mine)
	a.want(t, first, mine)
	manifest := b.push(t, "models", "v1", "", []byte("the layer"))
	wantName(t, "pushed again", "models", "v1", manifest, a, b, c)
	b.delete(t, "models", "v1", p2p.DeleteOptions{})
	wantNoName(t, "deleted again", "models", "v1", a, b, c)
	a.want(t, first, mine)
}

// Where clocks differ, a delete of all covers what the others have all the same.
func TestDeleteAllAndClocks(t *testing.T) {
	h := newHub()
	a := h.start(t)
	b := h.start(t, func(o *Options) { o.Now = func() time.Time { return time.Now().Add(30 * time.Minute) } })
	b.push(t, "models", "v1", "", []byte("of half an hour later"))
	a.deleteAll(t, "models")
	b.gone(t, "models", "v1")
	wantNoName(t, "deleted with all", "models", "v1", a, b)
}

// A delete of all that a peer makes up for a far future takes away nothing that is dated as clocks
// are, now or later.
func TestDeleteAllFromTheFuture(t *testing.T) {
	h := newHub()
	a := h.start(t)
	kept := a.push(t, "models", "v1", "", []byte("the layer"))
	far := time.Now().Add(100 * 365 * 24 * time.Hour)
	if _, err := a.deletes.apply(t.Context(), pieces.Delete{Tag: "models", All: true, At: far, After: far,
		Made: time.Now()}, "liar"); err != nil {
		t.Fatal(err)
	}
	wantName(t, "after a delete of the future", "models", "v1", kept, a)
	manifest := a.push(t, "models", "v2", "", []byte("another layer"))
	wantName(t, "pushed after a delete of the future", "models", "v2", manifest, a, h.start(t))
}
