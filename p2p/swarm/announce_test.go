package swarm

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// wantAnnounced waits until a peer announces what it lists, and nothing else.
func (p *testPeer) wantAnnounced(t *testing.T, h *hub, n int) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		surplus, missing := map[Key]bool{}, map[Key]string{}
		h.mu.Lock()
		for k, who := range h.providers {
			if who[p.id] {
				surplus[k] = true
			}
		}
		h.mu.Unlock()
		entries := 0
		for e, err := range p.store.List(t.Context(), p2p.Query{}) {
			if err != nil {
				t.Fatal(err)
			}
			entries++
			k, what := taskKey(e.Task), e.Task.String()
			if e.Name != "" {
				k, what = nameKey(e.Task.Tag, e.Name), e.Name
			}
			if !surplus[k] {
				missing[k] = what
			}
			delete(surplus, k)
		}
		if entries == n && len(surplus)+len(missing) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("there are %d entries, want %d; %d more keys are announced, and %v is not", entries, n,
				len(surplus), missing)
		}
		<-time.After(time.Millisecond)
	}
}

// TestAnnouncements: what is announced is what is here, however it came and went.
func TestAnnouncements(t *testing.T) {
	h := newHub()
	a := h.start(t)
	for i := range 50 {
		a.push(t, "", "v1", "", fmt.Append(nil, "file ", i))
	}
	a.wantAnnounced(t, h, 3) // a name, a manifest, a file
	// A manifest takes with it what is about it; the delete of a file by force takes only that.
	task := a.push(t, "", "v2", "", []byte("file 2"))
	a.push(t, "", "", task.Digest, []byte("signature"))
	a.wantAnnounced(t, h, 8)
	a.delete(t, "", string(digest.SHA256.FromString("file 49")), p2p.DeleteOptions{Force: true})
	a.wantAnnounced(t, h, 7)
	a.delete(t, "", string(task.Digest), p2p.DeleteOptions{})
	a.wantAnnounced(t, h, 2)
	a.Close()
	a.restart(t, h)
	a.wantAnnounced(t, h, 2)

	never := h.start(t, func(o *Options) { o.Mode = NeverServe })
	never.push(t, "", "v3", "", []byte("secret"))
	if _, err := never.read(t.Context(), a.add(t, "", []byte("other"))); err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, who := range h.providers {
		if who[never.id] {
			t.Error("a daemon that serves nothing announces what it has")
		}
	}
}

// TestAnnouncementOfDownload: what is fetched is announced before it is here, until that comes to nothing.
func TestAnnouncementOfDownload(t *testing.T) {
	h := newHub()
	g := newGate(1)
	a, b := h.start(t, g.through), h.start(t)
	data := content(gateSize, 8)
	task := a.add(t, "", data)
	announced := func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.providers[taskKey(task)][b.id]
	}
	blob := b.open(t, t.Context(), task)
	arrive(t, blob, 1)
	if !announced() {
		t.Error("what is being fetched is not announced")
	}
	blob.Close() // nobody waits for it any more
	b.wantAnnounced(t, h, 0)
	g.open()
	b.want(t, task, data)
	b.wantStored(t, task)
	b.wantAnnounced(t, h, 1)

	// What is here stays announced when it is damaged and can't be mended.
	damage(t, b.dir, task.Digest, 5)
	a.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.Mend(ctx, task); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("mended by nobody: %v", err)
	}
	b.wantAnnounced(t, h, 1)
}
