package pieces

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// pushed stores data as a registry's client does.
func pushed(t *testing.T, s *Store, data string, refs ...p2p.Task) p2p.Task {
	t.Helper()
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(bytes.NewReader([]byte(data)), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := p2p.NewTask{Task: p2p.Task{Tag: "t", Digest: added.Digest}, Keep: p2p.KeepUntilReferred}
	for _, ref := range refs {
		if n.Manifest == nil {
			n.Manifest = &p2p.NewManifest{}
		}
		n.Manifest.Refs = append(n.Manifest.Refs, ref.Digest)
	}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}}); err != nil {
		t.Fatal(err)
	}
	return n.Task
}

func deleteTask(t *testing.T, s *Store, task p2p.Task) {
	t.Helper()
	if _, err := s.Delete(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func asked(t *testing.T, s *Store, task p2p.Task) error {
	_, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Lease: true})
	return err
}

func isHere(t *testing.T, s *Store, task p2p.Task) bool {
	t.Helper()
	return holds(t, s, task.Tag, digest.FromDigest(task.Digest))
}

// What was stored for a client is held when the store is opened again, and no longer
// than a lease lasts.
func TestLeaseLasts(t *testing.T) {
	for _, lasts := range []time.Duration{time.Hour, time.Nanosecond} {
		dir := t.TempDir()
		s, err := Open(dir, Options{Lease: lasts})
		if err != nil {
			t.Fatal(err)
		}
		layer, other := pushed(t, s, "layer"), pushed(t, s, "other")
		manifest := pushed(t, s, "manifest", layer, other)
		pushed(t, s, "layer")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err = Open(dir, Options{Lease: lasts}); err != nil {
			t.Fatal(err)
		}
		if err := asked(t, s, other); err != nil {
			t.Fatal(err)
		}
		deleteTask(t, s, manifest)
		for _, task := range []p2p.Task{layer, other} {
			if here := isHere(t, s, task); here != (lasts == time.Hour) {
				t.Errorf("a lease of %v: %s is here: %v", lasts, task, here)
			}
		}
		s.Close()
	}
}

// A clock that is set while the store is open, or before it is opened again, ends no
// lease, and makes none longer than that.
func TestLeaseOutlivesSetClocks(t *testing.T) {
	for _, jump := range []time.Duration{365 * 24 * time.Hour, -365 * 24 * time.Hour} {
		var ahead time.Duration
		dir := t.TempDir()
		reopen := func(lease time.Duration) *Store {
			t.Helper()
			s, err := Open(dir, Options{Lease: lease, Now: func() time.Time { return time.Now().Add(ahead) }})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			return s
		}
		s := reopen(time.Hour)
		layer, before, since := pushed(t, s, "layer"), pushed(t, s, "asked before"), pushed(t, s, "asked since")
		manifest := pushed(t, s, "manifest", layer, before, since)
		pushed(t, s, "layer")
		if err := asked(t, s, before); err != nil {
			t.Fatal(err)
		}
		ahead = jump
		if err := asked(t, s, since); err != nil {
			t.Fatal(err)
		}
		deleteTask(t, s, manifest)
		for _, task := range []p2p.Task{layer, before, since} {
			if !isHere(t, s, task) {
				t.Errorf("the clock was set by %v, and %s is gone", jump, task)
			}
		}
		manifest = pushed(t, s, "manifest", layer)
		pushed(t, s, "layer")
		s.Close()

		if ahead = min(0, -jump); ahead < 0 { // the lease seems to last for a year
			s = reopen(time.Hour)
			manifest2 := pushed(t, s, "manifest 2", layer)
			pushed(t, s, "layer")
			deleteTask(t, s, manifest)
			deleteTask(t, s, manifest2)
			if !isHere(t, s, layer) {
				t.Error("the clock was set back before the store was opened, and the layer is gone")
			}
			pushed(t, s, "manifest", layer)
			s.Close()
		}
		s = reopen(time.Nanosecond)
		deleteTask(t, s, manifest)
		if isHere(t, s, layer) {
			t.Errorf("the clock was set by %v, and a lease has no end", jump)
		}
		s.Close()
	}
}

// What was only asked for, and is held by nothing any more, goes when its lease ends;
// what was pushed since stays.
func TestLeaseEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := newStore(t)
	layer, other := pushed(t, s, "layer"), pushed(t, s, "other")
	manifest := pushed(t, s, "manifest", layer, other)
	for _, task := range []p2p.Task{layer, other} {
		if err := asked(t, s, task); err != nil {
			t.Fatal(err)
		}
	}
	deleteTask(t, s, manifest)
	pushed(t, s, "other")
	for _, here := range []bool{true, false} {
		if err := s.releaseSpared(); err != nil {
			t.Fatal(err)
		}
		if isHere(t, s, layer) != here || !isHere(t, s, other) {
			t.Errorf("the layer that was asked for is here: %v, want %v; what was pushed: %v", isHere(t, s, layer),
				here, isHere(t, s, other))
		}
		s.takeBack(layer)
		s.takeBack(other)
	}
	if _, err := os.Stat(s.bytes.Path(layer.Digest)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its file: %v, want none", err)
	}

	// Many go in several transactions.
	var all []p2p.Task
	for i := range listBatch + 1 {
		all = append(all, pushed(t, s, fmt.Sprint("layer ", i)))
	}
	manifest = pushed(t, s, "manifest of many", all...)
	for _, task := range all {
		if err := asked(t, s, task); err != nil {
			t.Fatal(err)
		}
	}
	deleteTask(t, s, manifest)
	for _, task := range all {
		s.endAll(task)
	}
	for _, want := range []int{1, 0} {
		if err := s.releaseSpared(); err != nil {
			t.Fatal(err)
		}
		if n := len(slices.DeleteFunc(all, func(task p2p.Task) bool { return !isHere(t, s, task) })); n != want {
			t.Errorf("%d are left, want %d", n, want)
		}
		all = all[:want]
	}

	quick, err := Open(t.TempDir(), Options{Lease: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer quick.Close()
	layer = pushed(t, quick, "layer")
	manifest = pushed(t, quick, "manifest", layer)
	if err := asked(t, quick, layer); err != nil {
		t.Fatal(err)
	}
	deleteTask(t, quick, manifest)
	for deadline := time.Now().Add(20 * time.Second); isHere(t, quick, layer); {
		if time.Now().After(deadline) {
			t.Fatal("the layer is still here")
		}
	}
	// Nor does what has ended take room.
	for range 2 {
		<-time.After(25 * time.Millisecond)
		if err := asked(t, quick, pushed(t, quick, time.Now().String())); err != nil {
			t.Fatal(err)
		}
	}
	quick.mu.Lock()
	defer quick.mu.Unlock()
	if n := len(quick.lent.tasks); n != 1 {
		t.Errorf("%d tasks have leases in memory, want 1", n)
	}
}

// Deletes of which peers tell end no lease but that of what is deleted.
func TestLeaseOutlivesDeletesOfPeers(t *testing.T) {
	s := newStore(t)
	layer := pushed(t, s, "layer")
	manifest := pushed(t, s, "manifest", layer)
	pushed(t, s, "layer")
	later := time.Now().Add(time.Minute)
	apply := func(d Delete) {
		t.Helper()
		d.Tag = "t"
		if _, err := s.ApplyDelete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	apply(Delete{CID: digest.FromDigest(manifest.Digest), At: later, Force: true})
	if isHere(t, s, manifest) || !isHere(t, s, layer) {
		t.Error("the manifest is still here, or its layer is not")
	}
	apply(Delete{CID: digest.FromDigest(layer.Digest), At: later})
	if isHere(t, s, layer) {
		t.Error("the layer is still here")
	}

	// A copy that came from a peer, and of which somebody was told, stays where only what
	// it belonged to was deleted.
	copied := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("copied")}
	if err := fetched(t, s, copied, []byte("copied"), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := asked(t, s, copied); err != nil {
		t.Fatal(err)
	}
	apply(Delete{CID: digest.FromDigest(copied.Digest), At: later, Soft: true})
	if !isHere(t, s, copied) {
		t.Error("a copy went of which somebody was told")
	}
}

// A manifest that has come without its parts tells which of them were deleted by force.
func TestLacksByDeletesOfPeers(t *testing.T) {
	s := newStore(t)
	layer := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("layer")}
	manifest := pushed(t, s, "manifest", layer)
	for _, force := range []bool{false, true} {
		if _, err := s.ApplyDelete(t.Context(),
			Delete{Tag: "t", CID: digest.FromDigest(layer.Digest), At: time.Now(), Force: force}); err != nil {
			t.Fatal(err)
		}
		info, err := s.Stat(t.Context(), "t", digest.FromDigest(manifest.Digest), p2p.StatOptions{})
		if err != nil || slices.Equal(info.Lacks, []digest.Digest{layer.Digest}) != force {
			t.Errorf("force %v: it lacks %v, %v", force, info.Lacks, err)
		}
	}
}

// Whoever is told that something is here while it is deleted finds it.
func TestLeaseDuringDelete(t *testing.T) {
	s := newStore(t)
	layer := pushed(t, s, "layer")
	for range 10 {
		manifest := pushed(t, s, "manifest", layer)
		var asking sync.WaitGroup
		told := make([]error, 8)
		for i := range told {
			asking.Go(func() { told[i] = asked(t, s, layer) })
		}
		deleteTask(t, s, manifest)
		asking.Wait()
		for _, err := range told {
			if err == nil && !isHere(t, s, layer) {
				t.Fatal("what somebody was told of is gone")
			}
			if err != nil && !errors.Is(err, p2p.ErrNotFound) {
				t.Fatal(err)
			}
		}
		s.endAll(layer)
		pushed(t, s, "layer")
	}
}

// A daemon that asks for its client is told that what is about to go is not here.
func TestLeaseOfWhatGoes(t *testing.T) {
	s := newStore(t)
	layer := pushed(t, s, "layer")
	if s.isLent(layer) { // and so it goes
		t.Fatal("it has a lease")
	}
	for what, ask := range map[string]func() error{
		"Stat":  func() error { return asked(t, s, layer) },
		"Lease": func() error { return s.Lease(t.Context(), layer) },
	} {
		if err := ask(); !errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("%s: %v, want %v", what, err, p2p.ErrNotFound)
		}
	}
	s.removed() // or not
	if err := s.Lease(t.Context(), layer); err != nil {
		t.Error(err)
	}

	// Nobody has a lease who is told that it is damaged.
	damaged := pushed(t, s, "damaged")
	if err := os.Remove(s.bytes.Path(damaged.Digest)); err != nil {
		t.Fatal(err)
	}
	if err := asked(t, s, damaged); !errors.Is(err, digest.ErrCorrupt) || s.lentNow(damaged) {
		t.Errorf("what is damaged: %v, and it has a lease: %v", err, s.lentNow(damaged))
	}
}

// Of a task that more were told of than are counted, nobody knows who has come back: it
// stays until the leases end.
func TestLeasesBeyondCount(t *testing.T) {
	s := newStore(t)
	stored, wanted := pushed(t, s, "stored"), pushed(t, s, "asked")
	first := pushed(t, s, "manifest", stored, wanted)
	for range maxLeases + 1 {
		pushed(t, s, "stored")
		if err := asked(t, s, wanted); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxLeases { // all but one come
		deleteTask(t, s, pushed(t, s, fmt.Sprint("manifest ", i), stored, wanted))
	}
	deleteTask(t, s, first)
	for _, task := range []p2p.Task{stored, wanted} {
		if !isHere(t, s, task) {
			t.Errorf("%s went, though one who was told of it has not come", task)
		}
	}
}

// What was spared for a client that only asked, and is held again, is not let go with the lease.
func TestSparedAndTaken(t *testing.T) {
	s := newStore(t)
	manifest := pushed(t, s, "manifest", pushed(t, s, "layer"))
	name := func() {
		t.Helper()
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if err :=
			in.Commit(p2p.Commit{Names: []p2p.NewName{{Tag: "t", Name: "v1", Digest: manifest.Digest}}}); err != nil {
			t.Fatal(err)
		}
	}
	unname := func(only bool) {
		t.Helper()
		if _, err := s.Delete(t.Context(), "t", cacheID(t, "v1"), p2p.DeleteOptions{NameOnly: only}); err != nil {
			t.Fatal(err)
		}
	}
	name()
	if err := asked(t, s, manifest); err != nil {
		t.Fatal(err)
	}
	unname(false)
	name()
	unname(true)
	s.endAll(manifest)
	if err := s.releaseSpared(); err != nil {
		t.Fatal(err)
	}
	if !isHere(t, s, manifest) {
		t.Error("a manifest went of which only the name was taken away")
	}
}

// Nor is what was spared, and then pushed, when all leases are over.
func TestSparedAndPushed(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	manifest := pushed(t, s, "manifest", pushed(t, s, "layer"))
	layer := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("layer")}
	if err := asked(t, s, layer); err != nil {
		t.Fatal(err)
	}
	deleteTask(t, s, manifest)
	pushed(t, s, "layer")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir, Options{Lease: time.Nanosecond}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.releaseSpared(); err != nil {
		t.Fatal(err)
	}
	if !isHere(t, s, layer) {
		t.Error("what was pushed went with the lease of the client that had asked before")
	}
}

// However often is asked, what is remembered of it is bounded.
func TestLeasesAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := newStore(t)
	absent := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("absent")}
	if err := asked(t, s, absent); !errors.Is(err, p2p.ErrNotFound) || len(s.lent.order) > 0 {
		t.Errorf("what is absent: %v, and %d leases", err, len(s.lent.order))
	}
	layer := pushed(t, s, "layer")
	for range maxLeases + 2 {
		pushed(t, s, "layer")
	}
	for range 3 * maxLeases {
		if err := asked(t, s, layer); err != nil {
			t.Fatal(err)
		}
	}
	err := s.view(func(tx *bbolt.Tx) error {
		record, _, err := get[taskRecord](tx, bucketTasks, taskKey(layer))
		if n := len(record.Leases); n != maxLeases {
			t.Errorf("the record has %d leases, want %d", n, maxLeases)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	other := pushed(t, s, "other")
	for i := range 3 * maxLent { // a client that is told in the end that it is not here, takes no room from others
		if !s.lend(layer) {
			t.Fatal("no lease is given")
		}
		s.takeBack(layer)
		if i == 0 {
			if err := asked(t, s, other); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !s.lentNow(other) {
		t.Error("a lease was ended to make room for none")
	}
	for range maxLent {
		if !s.lend(p2p.Task{Tag: "t", Digest: digest.SHA256.FromString(time.Now().String())}) {
			t.Fatal("no lease is given")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.lent.order); n > 2*maxLent {
		t.Errorf("%d leases are remembered, want at most %d", n, 2*maxLent)
	}
	n := 0
	for _, all := range s.lent.tasks {
		n += len(all)
	}
	if n > maxLent || n != s.lent.n {
		t.Errorf("there are %d leases in memory, want %d, and at most %d", n, s.lent.n, maxLent)
	}
	if n := len(s.lent.tasks[layer]); n > maxLeases {
		t.Errorf("of one task there are %d, want at most %d", n, maxLeases)
	}
}

// bring makes a commit, to which these contents belong.
func bring(t *testing.T, s *Store, c p2p.Commit, contents ...string) {
	t.Helper()
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for _, data := range contents {
		if _, err := in.Add(bytes.NewReader([]byte(data)), p2p.AddOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Commit(c); err != nil {
		t.Fatal(err)
	}
}

// A client that was told that something is here has not come back when a manifest or a name comes from a
// peer, nor when somebody imports the same with a manifest of their own.
func TestLeaseOutlivesWhatOthersBring(t *testing.T) {
	layer := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("layer")}
	manifest := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("manifest")}
	refs := &p2p.NewManifest{Refs: []digest.Digest{layer.Digest}}
	about := &p2p.NewManifest{Subject: manifest.Digest}
	now := time.Now()
	for name, c := range map[string]struct {
		told   string
		commit p2p.Commit
		delete digest.CID
	}{
		"a manifest from a peer": {"layer",
			p2p.Commit{Tasks: []p2p.NewTask{{Task: manifest, Manifest: refs, Keep: p2p.KeepReferred, Origin: now}}},
			digest.FromDigest(manifest.Digest)},
		"a manifest with the same": {"layer",
			p2p.Commit{Tasks: []p2p.NewTask{{Task: layer, Keep: p2p.KeepReferred},
				{Task: manifest, Manifest: refs, Keep: p2p.KeepReferred}}}, digest.FromDigest(manifest.Digest)},
		"a name from a peer": {"manifest",
			p2p.Commit{Names: []p2p.NewName{{Tag: "t", Name: "v1", Digest: manifest.Digest, Updated: now}}},
			cacheID(t, "v1")},
		"a subject from a peer": {"referrer",
			p2p.Commit{Tasks: []p2p.NewTask{{Task: manifest, Keep: p2p.KeepReferred, Origin: now}}},
			digest.FromDigest(manifest.Digest)},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			told := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString(c.told)}
			pushedNow := p2p.NewTask{Task: told, Keep: p2p.KeepUntilReferred}
			if c.told == "referrer" {
				pushedNow.Manifest = about
			}
			bring(t, s, p2p.Commit{Tasks: []p2p.NewTask{pushedNow}}, c.told)
			bring(t, s, c.commit, "layer", "manifest")
			if _, err := s.Delete(t.Context(), "t", c.delete, p2p.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			if !isHere(t, s, told) {
				t.Errorf("the %s went, of which its client was told", c.told)
			}
		})
	}
}

// What is pushed with its name, or is about something that is here, needs no lease, and goes
// with what holds it.
func TestWhatIsHeldHasNoLease(t *testing.T) {
	s := newStore(t)
	manifest := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("manifest")}
	pushed(t, s, "manifest") // by its digest first, as some clients do
	bring(t, s, p2p.Commit{
		Tasks: []p2p.NewTask{{Task: manifest, Manifest: &p2p.NewManifest{}, Keep: p2p.KeepUntilReferred}},
		Names: []p2p.NewName{{Tag: "t", Name: "v1", Digest: manifest.Digest}},
	}, "manifest")
	if _, err := s.Delete(t.Context(), "t", cacheID(t, "v1"), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if isHere(t, s, manifest) {
		t.Error("the manifest is still here, whose name was deleted")
	}
	subject := pushed(t, s, "subject")
	bring(
		t, s, p2p.Commit{Tasks: []p2p.NewTask{
			{Task: manifest, Manifest: &p2p.NewManifest{Subject: subject.Digest}, Keep: p2p.KeepUntilReferred}}},
		"manifest")
	deleteTask(t, s, subject)
	if isHere(t, s, manifest) {
		t.Error("the manifest is still here, and what it is about was deleted")
	}
}
