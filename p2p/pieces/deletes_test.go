package pieces

import (
	"errors"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

func fetched(t *testing.T, s *Store, task p2p.Task, data []byte, origin time.Time) error {
	t.Helper()
	p, err := fetchPartial(t, s, data)
	if err != nil {
		t.Fatal(err)
	}
	return p.Commit(t.Context(), p2p.Commit{
		Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred, Origin: origin}}})
}

func holds(t *testing.T, s *Store, tag string, cid digest.CID) bool {
	t.Helper()
	_, err := s.Stat(t.Context(), tag, cid, p2p.StatOptions{})
	if err != nil && !errors.Is(err, p2p.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestDeleteForAll(t *testing.T) {
	s := newStore(t)
	layer, err := importArtifact(t.Context(), s, "v0", []byte("old"))
	if err != nil {
		t.Fatal(err)
	}
	v0 := cacheID(t, "v0")
	result, deletes, err := s.DeleteForAll(t.Context(), "t", v0, p2p.DeleteOptions{}, nil)
	if err != nil || !result.Found || result.Tasks != 2 || len(deletes) != 3 || deletes[0].CID != v0 ||
		deletes[0].Soft || !deletes[1].Soft || !deletes[2].Soft {
		t.Fatalf("result is %+v, deletes are %+v, %v", result, deletes, err)
	}
	if result, _, err = s.DeleteForAll(t.Context(), "t", v0, p2p.DeleteOptions{}, nil); err != nil || result.Found {
		t.Errorf("once more: %+v, %v", result, err)
	}

	// A peer with the same artifact, and one with a copy of the layer that nothing holds.
	peer, copies := newStore(t), newStore(t)
	if _, err := importArtifact(t.Context(), peer, "v0", []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := fetched(t, copies, layer, []byte("old"), deletes[0].At.Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	taken := map[*Store]p2p.Deleted{}
	for _, d := range deletes {
		d.At = d.At.Add(time.Minute) // after what the peer has
		d.After = d.At               // which whoever deleted it could see
		for _, other := range []*Store{peer, copies} {
			result, err := other.ApplyDelete(t.Context(), d)
			if err != nil || !result.News {
				t.Errorf("apply %+v: %+v, %v", d, result, err)
			}
			taken[other] = p2p.Deleted{Tasks: taken[other].Tasks + result.Tasks,
				Freed: taken[other].Freed + result.Freed}
			if result, err := other.ApplyDelete(t.Context(), d); err != nil || result.News {
				t.Errorf("apply %+v again: %+v, %v", d, result, err)
			}
		}
	}
	if all := taken[peer]; all.Tasks != 2 || all.Freed <= 3 {
		t.Errorf("of an artifact of two blobs it says that there went %+v", all)
	}
	if all := taken[copies]; all.Tasks != 1 || all.Freed != 3 {
		t.Errorf("of a copy of three bytes it says that there went %+v", all)
	}
	if holds(t, peer, "t", v0) || holds(t, peer, "t", digest.FromDigest(layer.Digest)) ||
		holds(t, copies, "t", digest.FromDigest(layer.Digest)) {
		t.Error("it is still there")
	}
	a, err := peer.DeletesSum(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := copies.DeletesSum(t.Context()); err != nil || a != b || a == ([32]byte{}) {
		t.Errorf("stores that know the same have the sums %x and %x, %v", a, b, err)
	}
	if c, err := s.DeletesSum(t.Context()); err != nil || a == c {
		t.Errorf("a store that knows others has the same sum, %v", err)
	}
	all, last, err := peer.Deletes(t.Context(), 0, 2)
	if err != nil || len(all) != 2 || last != 2 || all[0].CID != v0 {
		t.Errorf("the first deletes are %+v, %d, %v", all, last, err)
	}
	if all, _, err = peer.Deletes(t.Context(), last, 2); err != nil || len(all) != 1 || !all[0].Soft {
		t.Errorf("the rest is %+v, %v", all, err)
	}

	// What is forgotten is, and leaves nothing.
	if n, err := peer.ForgetDeletes(t.Context(), time.Now().Add(2*time.Hour)); err != nil || n != 3 {
		t.Errorf("forgot %d, %v", n, err)
	}
	if sum, err := peer.DeletesSum(t.Context()); err != nil || sum != ([32]byte{}) {
		t.Errorf("the sum of nothing is %x, %v", sum, err)
	}
}

func TestDeleteAndOrigin(t *testing.T) {
	s := newStore(t)
	data := []byte("data")
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	cid := digest.FromDigest(task.Digest)
	now := time.Now().UTC()
	ahead := now.Add(10 * time.Minute) // by a clock that is ahead
	if _, err := s.ApplyDelete(t.Context(), Delete{Tag: "t", CID: cid, At: ahead}); err != nil {
		t.Fatal(err)
	}
	if d, err := s.Deleted(t.Context(), "t", cid); err != nil || !d.At.Equal(ahead) || d.Force {
		t.Errorf("it was deleted by %+v, %v", d, err)
	}
	// What is older does not come back from a peer.
	if err := fetched(t, s, task, data, ahead); !errors.Is(err, p2p.ErrNotFound) || holds(t, s, "t", cid) {
		t.Errorf("what was deleted is fetched: %v", err)
	}
	// What is imported here does, and is newer than the delete, whatever the clock says.
	enginetest.Import(t, s, "t", data)
	info, err := s.Stat(t.Context(), "t", cid, p2p.StatOptions{})
	if err != nil || !info.Origin.After(ahead) || info.After.Before(ahead) {
		t.Errorf("imported again: %+v, %v; want it to be later, and to know of the delete", info, err)
	}
	// A copy that a peer has of an earlier import does not make it older.
	if err := fetched(t, s, task, data, now.Add(-time.Minute)); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Stat(t.Context(), "t", cid, p2p.StatOptions{}); err != nil || !again.Origin.Equal(info.Origin) {
		t.Errorf("after an older copy came: %+v, %v; want %s", again, err, info.Origin)
	}
	// A copy of what was there before takes nothing of that back.
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Origin: ahead}}}); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Stat(t.Context(), "t", cid, p2p.StatOptions{}); err != nil || !again.Origin.Equal(info.Origin) {
		t.Errorf("with an older copy of it: %+v, %v", again, err)
	}
	if result, err := s.ApplyDelete(t.Context(), Delete{Tag: "t", CID: cid, At: ahead.Add(-time.Second)}); err != nil ||
		result.News || !holds(t, s, "t", cid) {
		t.Errorf("an older delete: %+v, %v", result, err)
	}
	// A copy has the origin of what it is a copy of.
	other := newStore(t)
	if err := fetched(t, other, task, data, info.Origin); err != nil {
		t.Fatal(err)
	}
	if copied, err := other.Stat(t.Context(), "t", cid, p2p.StatOptions{}); err != nil ||
		!copied.Origin.Equal(info.Origin) {
		t.Errorf("the copy is %+v, %v", copied, err)
	}
	// Soft deletes are for copies only.
	for store, gone := range map[*Store]bool{s: false, other: true} {
		if _, err := store.ApplyDelete(t.Context(),
			Delete{Tag: "t", CID: cid, At: info.Origin.Add(time.Minute), Soft: true}); err != nil {
			t.Fatal(err)
		}
		if holds(t, store, "t", cid) == gone {
			t.Errorf("after a soft delete it is there: %t", !gone)
		}
	}
}

// A delete takes what its maker saw, and what is older than all that was known there: not what is
// dated between, and by a date that no clock has come to nothing but what has such a one, too.
func TestDeleteCovers(t *testing.T) {
	now := time.Now().UTC()
	limit := now.Add(time.Hour)
	d := Delete{At: now, After: now.Add(-time.Minute), Seen: []time.Time{now.Add(-10 * time.Second)}}
	ahead := Delete{At: now.Add(2 * time.Hour)}
	for _, c := range []struct {
		d    Delete
		at   time.Duration
		want bool
	}{
		{d, 0, true}, {d, -10 * time.Second, true}, {d, -time.Minute, true}, {d, -time.Hour, true},
		{d, 1, false}, {d, -1, false}, {d, -30 * time.Second, false},
		{ahead, 2 * time.Hour, true}, {ahead, 90 * time.Minute, true},
		{ahead, 0, false}, {ahead, time.Hour, false}, {ahead, 3 * time.Hour, false},
		{Delete{}, 0, false},
	} {
		if got := c.d.Covers(now.Add(c.at), limit); got != c.want {
			t.Errorf("%+v covers what is dated %v from now: %v", c.d, c.at, got)
		}
	}
}

// Soft deletes are for copies: what was put in here, before it came from a peer or after that,
// stays.
func TestSoftDeletes(t *testing.T) {
	for _, fetchedFirst := range []bool{true, false} {
		s, err := Open(t.TempDir(), Options{Lease: time.Nanosecond})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}
		if fetchedFirst {
			if err := fetched(t, s, task, []byte("data"), time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		pushed(t, s, "data")
		if !fetchedFirst {
			if err := fetched(t, s, task, []byte("data"), time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.ApplyDelete(t.Context(),
			Delete{Tag: "t", CID: digest.FromDigest(task.Digest), At: time.Now().Add(time.Minute),
				Soft: true}); err != nil {
			t.Fatal(err)
		}
		if !holds(t, s, "t", digest.FromDigest(task.Digest)) {
			t.Errorf("what was pushed is gone (it was fetched first: %v)", fetchedFirst)
		}
	}
	// Nor does it take a copy that something refers to.
	s := newStore(t)
	part := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("part")}
	if err := fetched(t, s, part, []byte("part"), time.Now()); err != nil {
		t.Fatal(err)
	}
	bring(
		t, s, p2p.Commit{Tasks: []p2p.NewTask{
			{Task: p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("manifest")},
				Manifest: &p2p.NewManifest{Refs: []digest.Digest{part.Digest}}, Keep: p2p.KeepPinned}}}, "manifest")
	if _, err := s.ApplyDelete(t.Context(),
		Delete{Tag: "t", CID: digest.FromDigest(part.Digest), At: time.Now().Add(time.Minute),
			Soft: true}); err != nil {
		t.Fatal(err)
	}
	if !isHere(t, s, part) {
		t.Error("a part of what is pinned is gone")
	}
}

func TestNewerName(t *testing.T) {
	now := time.Now()
	a, b := digest.SHA256.FromString("a"), digest.SHA256.FromString("b")
	if a > b {
		a, b = b, a
	}
	for _, c := range []struct {
		d    digest.Digest
		at   time.Time
		than digest.Digest
		when time.Time
		want bool
	}{
		{a, now.Add(1), b, now, true},
		{a, now, b, now.Add(1), false},
		{b, now, a, now, true},
		{a, now, b, now, false},
		{a, now, a, now, false},
	} {
		if got := NewerName(c.d, c.at, c.than, c.when); got != c.want {
			t.Errorf("%s at %s counts before %s at %s: %t", c.d, c.at, c.than, c.when, got)
		}
	}
}

// A name from a peer does not replace a newer one; of two at one time all agree.
func TestNameFromPeer(t *testing.T) {
	s := newStore(t)
	one, two := enginetest.Import(t, s, "t", []byte("one")), enginetest.Import(t, s, "t", []byte("two"))
	set := func(d digest.Digest, at time.Time) error {
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		return in.Commit(p2p.Commit{Names: []p2p.NewName{{Tag: "t", Name: "v", Digest: d, Updated: at}}})
	}
	want := func(d digest.Digest) {
		t.Helper()
		if got, err := s.Name(t.Context(), "t", "v"); err != nil || got.Digest != d {
			t.Errorf("the name points to %s, %v; want %s", got.Digest, err, d)
		}
	}
	now := time.Now().UTC()
	for _, step := range []struct {
		d    digest.Digest
		at   time.Time
		want digest.Digest
	}{
		{one.Digest, now, one.Digest},
		{two.Digest, now.Add(-time.Second), one.Digest},
		{two.Digest, now.Add(time.Second), two.Digest},
		{one.Digest, now.Add(time.Second), max(one.Digest, two.Digest)},
		{two.Digest, now.Add(time.Second), max(one.Digest, two.Digest)},
		{one.Digest, time.Time{}, one.Digest}, // here and now: it is the newest
	} {
		if err := set(step.d, step.at); err != nil {
			t.Fatal(err)
		}
		want(step.want)
	}
	if _, _, err := s.DeleteForAll(t.Context(), "t", cacheID(t, "v"), p2p.DeleteOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	if err := set(one.Digest, now.Add(time.Second)); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("a name that was deleted comes from a peer: %v", err)
	}
}

// A delete of all under a tag covers what is dated before it, and no more, and the deletes that
// it covers are forgotten, whoever tells of them again.
func TestClear(t *testing.T) {
	s, peer := newStore(t), newStore(t)
	if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
		t.Fatal(err)
	}
	_, before, err := s.DeleteForAll(t.Context(), "t", cacheID(t, "v0"), p2p.DeleteOptions{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := importArtifact(t.Context(), s, "v1", []byte("one")); err != nil {
		t.Fatal(err)
	}
	result, deletes, err := s.DeleteForAll(t.Context(), "t", digest.CID{}, p2p.DeleteOptions{All: true}, nil)
	if err != nil || !result.Found || result.Deleted.Tasks != 2 || len(deletes) != 1 || !deletes[0].All {
		t.Fatalf("result is %+v, deletes are %+v, %v", result, deletes, err)
	}
	all := deletes[0]
	requireDeletes := func(of *Store) {
		t.Helper()
		if known, _, err := of.Deletes(t.Context(), 0, 100); err != nil || len(known) != 1 || !known[0].All {
			t.Errorf("known are the deletes %+v, %v", known, err)
		}
	}
	requireDeletes(s)
	for _, d := range before {
		if result, err := s.ApplyDelete(t.Context(), d); err != nil || result.News {
			t.Errorf("a delete that is covered: %+v, %v", result, err)
		}
	}
	requireDeletes(s)
	// Of a peer that has older and newer things, the older go.
	old, new := []byte("fetched long ago"), []byte("fetched just now")
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(new)}
	for data, at := range map[string]time.Time{
		string(old): all.At.Add(-time.Minute), string(new): all.At.Add(time.Minute)} {
		task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString(data)}
		if err := fetched(t, peer, task, []byte(data), at); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 {
		result, err := peer.ApplyDelete(t.Context(), all)
		if err != nil || result.News != (i == 0) || result.Found != (i == 0) ||
			!result.Newer.At.Equal(all.At.Add(time.Minute)) {
			t.Errorf("applied: %+v, %v", result, err)
		}
	}
	enginetest.RequireContent(t, peer, task, new)
	sums := [2][32]byte{}
	for i, of := range []*Store{s, peer} {
		if sums[i], err = of.DeletesSum(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if sums[0] != sums[1] {
		t.Error("two stores that know the same have different sums")
	}
	// What was deleted is not taken from a peer again, and can be put in again.
	if err := fetched(t, s, p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(old)}, old,
		all.At.Add(-time.Minute)); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("fetched again: %v", err)
	}
	enginetest.Import(t, s, "t", old)
	if _, err := importArtifact(t.Context(), s, "v1", []byte("one")); err != nil {
		t.Error(err)
	}
	if n, err := s.ForgetDeletes(t.Context(), time.Now().Add(time.Hour)); err != nil || n != 1 {
		t.Errorf("forgotten are %d, %v", n, err)
	}
	s.Close()
	requireClean(t, s.dir)
}
