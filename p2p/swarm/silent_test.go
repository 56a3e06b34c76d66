package swarm

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// within fails where do takes as long as a peer that hangs: for ever, in these tests.
func within(t *testing.T, what string, limit time.Duration, do func()) {
	t.Helper()
	done := make(chan struct{})
	start := time.Now()
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
		if took := time.Since(start); took > limit {
			t.Errorf("%s: took %s, want %s at most", what, took, limit)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: waits for a peer that hangs", what)
	}
}

// A peer that goes silent without a word costs a caller one lookup timeout at most,
// and then nothing.
func TestSilentPeer(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	quick := func(o *Options) { o.LookupTimeout = time.Second }
	a, b, c := h.start(t, quick), h.start(t, quick), h.start(t, quick)
	mine := a.push(t, "models", "v1", "", []byte("mine"))
	theirs := c.push(t, "models", "v2", "", []byte("theirs"))
	shared := b.add(t, "models", []byte("shared"))
	a.want(t, shared, []byte("shared"))
	a.wantStored(t, shared)
	absent := cidOf(t, digest.SHA256.FromBytes([]byte("nowhere")).String())
	h.hang(b.id, true)

	stat := func(what, cid string, want error, limit time.Duration) {
		within(t, what, limit, func() {
			_, err := a.Stat(t.Context(), "models", cidOf(t, cid), p2p.StatOptions{Manifest: true})
			if !errors.Is(err, want) {
				t.Errorf("%s: error is %v, want %v", what, err, want)
			}
			if errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: error is %v, as if the caller had given up", what, err)
			}
		})
	}
	stat("a name that is here", "v1", nil, 5*time.Second)
	stat("a digest that is here", mine.Digest.String(), nil, 5*time.Second)
	stat("what is nowhere", absent.String(), p2p.ErrNotFound, 6*time.Second)
	stat("a name that is nowhere", "v9", p2p.ErrNotFound, 6*time.Second)
	if a.peers.get(b.id).silence() == 0 {
		t.Fatal("the peer is not known to be silent")
	}
	// From here on nobody waits for it, but for searches, which are cut off.
	within(t, "everything, with a peer that is known to be silent", 15*time.Second, func() {
		for range 10 {
			stat("a name that is here", "v1", nil, 5*time.Second)
			stat("what is nowhere", absent.String(), p2p.ErrNotFound, 5*time.Second)
			stat("a name of another peer", "v2", nil, 5*time.Second)
		}
		a.want(t, theirs, readAll(t, c, theirs))
	})
	if peers, err := a.Peers(t.Context()); err != nil ||
		!strings.Contains(peers[0].Reason+peers[1].Reason, "has not answered") {
		t.Errorf("peers: %+v, %v", peers, err)
	}

	// A write is not held up, a delete says which peer was missed, and that one is told later.
	within(t, "a write", 5*time.Second, func() { a.push(t, "models", "v3", "", []byte("more")) })
	within(t, "a delete", 8*time.Second, func() {
		deleted := a.delete(t, "models", shared.Digest.String(), p2p.DeleteOptions{})
		if deleted.Reached != 1 || len(deleted.Missed) != 1 || deleted.Missed[0].Peer != b.id.String() {
			t.Errorf("deleted: %+v", deleted)
		}
	})
	h.hang(b.id, false)
	b.gone(t, "models", shared.Digest.String())
	within(t, "one that is back is heard", 25*time.Second, func() {
		for a.peers.get(b.id).silence() > 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
	})
	b.push(t, "models", "v4", "", []byte("of one that is back"))
	stat("a name of one that is back", "v4", nil, 5*time.Second)
}

// A delete waits neither for a peer that is known to be silent, nor for a search that does.
func TestDeleteWithSilentPeer(t *testing.T) {
	h := newHub()
	patient := func(o *Options) { o.LookupTimeout = 25 * time.Second }
	a, b, c := h.start(t, patient), h.start(t, patient), h.start(t, patient)
	task := a.add(t, "models", []byte("a blob"))
	c.want(t, task, []byte("a blob"))
	c.wantStored(t, task)
	h.hang(b.id, true)
	a.questions.markSilent(b.id)
	within(t, "a delete", 15*time.Second, func() {
		deleted := a.delete(t, "models", task.Digest.String(), p2p.DeleteOptions{})
		if deleted.Reached != 1 || deleted.Removed != 1 || len(deleted.Missed) != 1 ||
			deleted.Missed[0].Peer != b.id.String() {
			t.Errorf("deleted: %+v", deleted)
		}
		_, err := a.Delete(t.Context(), "models", cidOf(t, "nowhere"), p2p.DeleteOptions{})
		if !errors.Is(err, p2p.ErrNotFound) || !strings.Contains(err.Error(), "1 more did not answer") {
			t.Errorf("a delete of what may be on the silent one: %v", err)
		}
	})
}

func readAll(t *testing.T, p *testPeer, task p2p.Task) []byte {
	t.Helper()
	b, err := p.read(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A caller that goes away is not kept, and leaves nothing behind that grows: questions to a peer
// that hangs end with the caller that has asked them.
func TestGivenUpQuestions(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a, b := h.start(t), h.start(t)
	h.hang(b.id, true)
	cid := cidOf(t, digest.SHA256.FromBytes([]byte("nowhere")).String())
	within(t, "questions that are given up", 20*time.Second, func() {
		var asking sync.WaitGroup
		for range 500 {
			asking.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
				defer cancel()
				if _, err := a.Stat(ctx, "models", cid, p2p.StatOptions{}); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error is %v, want %v", err, context.DeadlineExceeded)
				}
			})
		}
		asking.Wait()
	})
	// What is left waits for the peer: the searches, and connections that can't be closed.
	within(t, "what is asked", 20*time.Second, func() {
		// searches, and the one that asks whether the peer is back
		for a.questions.late.count() > maxSearches+10 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
	})
	if n := a.client.late.count(); n > maxStreams {
		t.Errorf("%d connections are left", n)
	}
	within(t, "close", 20*time.Second, func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
}

// The close of a connection does not wait for the other end.
func TestPromptClose(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	h.hang(b.id, true)
	inner, err := a.network.Dial(t.Context(), b.id)
	if err != nil {
		t.Fatal(err)
	}
	conn := &prompt{Conn: inner, late: &a.client.late}
	read := make(chan error)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		read <- err
	}()
	within(t, "close", 20*time.Second, func() { conn.Close() })
	within(t, "read", 20*time.Second, func() {
		if err := <-read; err == nil {
			t.Error("read something")
		}
	})
	if n := a.client.late.count(); n == 0 {
		t.Error("the close is not counted")
	}
}
