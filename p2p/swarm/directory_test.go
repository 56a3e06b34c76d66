package swarm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front/fronttest"
)

// A directory of files beside the swarm: what either has is had, and what came from the directory
// goes to peers.
func TestDirectoryBeside(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	dir := t.TempDir()
	b.Add(fronttest.New(b.Engine, dir))
	put := func(d digest.Digest, data []byte) {
		t.Helper()
		path := filepath.Join(dir, d.Algorithm().String(), d.Encoded())
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	theirs, file := content(300_000, 1), content(400_000, 2)
	task := a.add(t, "t", theirs)
	other := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(file)}
	put(other.Digest, file)
	b.want(t, task, theirs)
	b.want(t, other, file)
	a.want(t, other, file)
	name := a.push(t, "t", "v1", "", []byte("layer"))
	if info, err := b.holdName(t, "t", "v1"); err != nil || info.Task != name {
		t.Errorf("a name of the swarm: %+v, %v", info, err)
	}

	// A file that is not what it is called is passed over, in either order.
	more := content(500_000, 3)
	lie := a.add(t, "t", more)
	put(lie.Digest, content(500_000, 4))
	b.want(t, lie, more)

	// Providers are those of both.
	info, err := b.Stat(t.Context(), "t", digest.FromDigest(other.Digest), p2p.StatOptions{Providers: true})
	if err != nil || *info.Providers != (p2p.Providers{Asked: 2, Some: 2, Whole: 2}) {
		t.Errorf("stat: %+v, %v", info.Providers, err)
	}
	// A delete is for the swarm. The directory has it still, which is no other peer.
	deleted, err := b.Delete(t.Context(), "t", digest.FromDigest(other.Digest), p2p.DeleteOptions{})
	if err != nil || deleted.Tasks != 1 || deleted.Reached != 1 || deleted.Removed != 1 || len(deleted.Missed) != 0 {
		t.Errorf("delete: %+v, %v", deleted, err)
	}
	a.gone(t, "t", string(other.Digest))
}
