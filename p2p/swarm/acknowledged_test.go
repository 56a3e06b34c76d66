package swarm

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// What a client here was told is there, since a peer has it, stays there for its manifest,
// whoever deletes what held it.
func TestLeaseAtAPeer(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	layer := []byte("the layer")
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
	manifest := a.push(t, "models", "v1", "", layer)
	info, err := b.Stat(t.Context(), "models", digest.FromDigest(task.Digest), p2p.StatOptions{Lease: true})
	if err != nil || !info.Remote {
		t.Fatalf("asked for the layer: %+v, %v", info, err)
	}
	a.delete(t, "models", "v1", p2p.DeleteOptions{})
	a.gone(t, "models", string(manifest.Digest))
	b.want(t, task, layer)
}

// A client that is told so while it is deleted there finds it.
func TestLeaseAtAPeerDuringDelete(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	for i := range 10 {
		layer := content(1000, uint64(i))
		task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
		manifest := a.push(t, "models", "", "", layer)
		var asking sync.WaitGroup
		told := make([]error, 8)
		for i := range told {
			asking.Go(func() {
				reply, err := b.client.find(
					t.Context(), a.id, &findRequest{Tasks: []taskRef{taskRef(task)}, Lease: true})
				if err == nil && reply.Tasks[0] == nil {
					err = p2p.ErrNotFound
				}
				told[i] = err
			})
		}
		if _, err := a.store.Delete(t.Context(), "models", digest.FromDigest(manifest.Digest),
			p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		asking.Wait()
		for _, err := range told {
			if err == nil {
				a.wantStored(t, task)
			} else if !errors.Is(err, p2p.ErrNotFound) {
				t.Fatal(err)
			}
		}
	}
}

// A manifest with a part that is damaged here is whole for a client while a peer has the
// part, and only then.
func TestLacksWhatNoPeerHas(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	layer := []byte("the layer")
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
	manifest := a.push(t, "models", "v1", "", layer)
	if _, err := b.holdName(t, "models", "v1"); err != nil {
		t.Fatal(err)
	}
	b.want(t, task, layer)
	b.wantStored(t, task)
	path := filepath.Join(b.store.Dir(), "blobs", "sha256", task.Digest.Encoded())
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("THE LAYER"), 0o444)); err != nil {
		t.Fatal(err)
	}
	if err := b.store.Recheck(t.Context(), task.Digest); !errors.Is(err, digest.ErrCorrupt) {
		t.Fatalf("checked again: %v", err)
	}
	lacks := func(want ...digest.Digest) {
		t.Helper()
		info, err := b.Stat(t.Context(), "models", digest.FromDigest(manifest.Digest), p2p.StatOptions{Lease: true})
		if err != nil || !slices.Equal(info.Lacks, want) {
			t.Errorf("the manifest lacks %v, %v; want %v", info.Lacks, err, want)
		}
	}
	lacks()
	a.Close()
	lacks(task.Digest)
	if _, err := b.Stat(t.Context(), "models", digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err,
		digest.ErrCorrupt) {
		t.Errorf("the layer: %v, want damage", err)
	}
}
