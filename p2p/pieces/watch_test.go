package pieces

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// mirror is what a store has, by what it has told: the keys of blobs, tasks and names.
type mirror struct {
	t    testing.TB
	s    *Store
	has  map[Subject]map[string]bool
	told []Change
	many bool // changes share transactions
}

var subjects = map[Subject][]byte{SubjectBlob: bucketBlobs, SubjectTask: bucketTasks, SubjectName: bucketNames}

// watch begins with a store that has nothing.
func watch(t testing.TB, s *Store) (m *mirror, stop func()) {
	m = &mirror{t: t, s: s, has: map[Subject]map[string]bool{}}
	for subject := range subjects {
		m.has[subject] = map[string]bool{}
	}
	return m, s.Watch(m.changed)
}

func (m *mirror) changed(changes []Change) {
	m.told = append(m.told, changes...)
	for _, c := range changes {
		k := string(c.Task.Digest)
		switch c.Subject {
		case SubjectPartial:
			continue
		case SubjectTask:
			k = string(taskKey(c.Task))
		case SubjectName:
			k = string(key(c.Task.Tag, c.Name))
		}
		had := m.has[c.Subject][k]
		if had == (c.Event == Added) {
			m.t.Errorf("told of %+v, which was there before: %v", c, had)
		}
		m.has[c.Subject][k] = c.Event != Removed
	}
	if !m.many {
		m.check() // it is durable, and nothing else is
	}
}

// check compares what was told with what there is.
func (m *mirror) check() {
	err := m.s.db.View(func(tx *bbolt.Tx) error {
		for subject, bucket := range subjects {
			var is, was []string
			scan(tx, bucket, nil, func(k, _ []byte) bool {
				is = append(is, string(k))
				return true
			})
			for k, here := range m.has[subject] {
				if here {
					was = append(was, k)
				}
			}
			if slices.Sort(was); !slices.Equal(is, was) {
				m.t.Errorf("there are the %ss %q, told of were %q", subject, is, was)
			}
		}
		return nil
	})
	if err != nil {
		m.t.Error(err)
	}
}

// mirrored is a store of which all changes are compared with what it tells.
type mirrored struct {
	*Store
	mirror *mirror
	once   sync.Once
}

func (m *mirrored) Close() error {
	m.once.Do(m.mirror.check)
	return m.Store.Close()
}

// TestWatch: everything that changes is told, once, with the reason.
func TestWatch(t *testing.T) {
	s := newStore(t)
	m, stop := watch(t, s)
	words := map[digest.Digest]string{}
	remember := func(task p2p.Task, word string) p2p.Task {
		words[task.Digest] = word
		words[digest.SHA512.FromString("manifest of "+string(task.Digest))] = "manifest-" + word
		return task
	}
	// told compares what was told since the last time, in any order.
	told := func(want ...string) {
		t.Helper()
		var got []string
		for _, c := range m.told {
			what := words[c.Task.Digest]
			if c.Subject == SubjectName {
				what = c.Name + "->" + what
			}
			got = append(got, fmt.Sprintf("%s %s %s: %s", c.Event, c.Subject, what, c.Reason))
		}
		m.told = nil
		slices.Sort(got)
		if slices.Sort(want); !slices.Equal(got, want) {
			t.Errorf("told was\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	artifact := func(name, data string) p2p.Task {
		t.Helper()
		task, err := importArtifact(t.Context(), s, name, []byte(data))
		do(err)
		return remember(task, data)
	}

	one := artifact("v1", "one")
	told("added blob one: imported", "added blob manifest-one: imported", "added task one: imported",
		"added task manifest-one: imported", "added name v1->manifest-one: imported")
	artifact("v1", "one")
	told()
	artifact("v1", "two")
	told("added blob two: imported", "added blob manifest-two: imported", "added task two: imported",
		"added task manifest-two: imported", "moved name v1->manifest-two: imported",
		"removed task manifest-one: moved", "removed task one: unreferenced",
		"removed blob manifest-one: unreferenced", "removed blob one: unreferenced")
	_, err := s.Delete(t.Context(), "t", digest.FromDigest(one.Digest), p2p.DeleteOptions{})
	if !errors.Is(err, p2p.ErrNotFound) {
		t.Fatal(err)
	}
	told()

	// The same bytes, of peers and under another tag.
	two := remember(p2p.Task{Tag: "u", Digest: digest.SHA256.FromString("two")}, "two")
	do(fetched(t, s, two, []byte("two"), time.Unix(1, 0)))
	told("added task two: fetched")
	_, err = s.Delete(t.Context(), "t", cacheID(t, "v1"), p2p.DeleteOptions{})
	do(err)
	told("removed name v1->manifest-two: deleted", "removed task manifest-two: deleted",
		"removed task two: unreferenced",
		"removed blob manifest-two: unreferenced")

	// A digest goes with the names that point to it.
	artifact("v1", "one")
	artifact("v2", "one")
	m.told = nil
	manifest := p2p.Task{Tag: "t", Digest: digest.SHA512.FromString("manifest of " + string(one.Digest))}
	deleteTask(t, s, manifest)
	told("removed name v1->manifest-one: deleted", "removed name v2->manifest-one: deleted",
		"removed task manifest-one: deleted",
		"removed task one: unreferenced", "removed blob manifest-one: unreferenced", "removed blob one: unreferenced")

	// A manifest is replaced, and what it refers to is deleted by force.
	artifact("v1", "one")
	m.told = nil
	in, err := s.Ingest(t.Context())
	do(err)
	do(in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: manifest, Manifest: &p2p.NewManifest{}}}}))
	do(in.Close())
	told("removed task one: unreferenced", "removed blob one: unreferenced")
	artifact("v1", "one")
	told("added blob one: imported", "added task one: imported")
	_, err = s.Delete(t.Context(), "t", digest.FromDigest(one.Digest), p2p.DeleteOptions{Force: true})
	do(err)
	told("removed task one: deleted", "removed blob one: unreferenced")

	// A delete by a peer, of which part was told before.
	_, err = s.ApplyDelete(t.Context(), Delete{
		Tag: "t", CID: cacheID(t, "v1"), At: time.Now().Add(time.Minute), Made: time.Now()})
	do(err)
	told("removed name v1->manifest-one: deleted", "removed task manifest-one: deleted",
		"removed blob manifest-one: unreferenced")

	// What a client has asked for, and does not come back for.
	artifact("v1", "one")
	m.told = nil
	do(asked(t, s, one))
	_, err = s.Delete(t.Context(), "t", cacheID(t, "v1"), p2p.DeleteOptions{})
	do(err)
	told("removed name v1->manifest-one: deleted", "removed task manifest-one: deleted",
		"removed blob manifest-one: unreferenced")
	s.endAll(one)
	do(s.releaseSpared())
	told("removed task one: expired", "removed blob one: unreferenced")

	// Damage goes by, or is mended.
	path := s.bytes.Path(two.Digest)
	write := func(content string) {
		t.Helper()
		damage(t, path, func([]byte) []byte { return []byte(content) })
	}
	write("tow")
	for range 2 {
		if err := s.Recheck(t.Context(), two.Digest); !errors.Is(err, digest.ErrCorrupt) {
			t.Fatal(err)
		}
	}
	if m.told[0].Detail == "" {
		t.Error("it is not told what is damaged")
	}
	told("damaged blob two: read")
	write("two")
	for range 2 {
		do(s.Recheck(t.Context(), two.Digest))
	}
	told("mended blob two: read")
	write("tow")
	pushed(t, s, "two")
	told("damaged blob two: read", "mended blob two: imported", "added task two: imported")

	// What fails is not told.
	s.failCommit = func() error { s.failCommit = nil; return &os.PathError{Op: "write", Err: syscall.ENOSPC} }
	if _, err := importArtifact(t.Context(), s, "v1", []byte("one")); !errors.Is(err, p2p.ErrNoSpace) {
		t.Fatal(err)
	}
	told()
	in, err = s.Ingest(t.Context())
	do(err)
	err = in.Commit(p2p.Commit{
		Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "v", Digest: two.Digest}}},
		Names: []p2p.NewName{{Tag: "v", Name: "v1", Digest: one.Digest}},
	})
	if !errors.Is(err, p2p.ErrNotFound) {
		t.Fatal(err)
	}
	do(in.Close())
	told()

	// What had arrived of a blob.
	data := randomContent(2*digest.MinPieceLength, 1)
	three := remember(p2p.Task{Tag: "t", Digest: tableOf(t, data).Digest}, "three")
	for _, c := range []struct {
		end  func(p *Partial)
		want string
	}{
		{func(p *Partial) { do(p.Remove()) }, "removed partial three: dropped"},
		{func(p *Partial) { do(p.Close()); do(s.DropPartials(time.Now().Add(time.Hour))) },
			"removed partial three: expired"},
		{func(p *Partial) { do(p.Want([]string{"t"})); do(p.Close()); do(s.ReleasePartial(three)) },
			"removed partial three: deleted"},
		{func(p *Partial) { do(p.Close()); s.dropOldestPartial() }, "removed partial three: room"},
		{func(p *Partial) {
			if err := p.Commit(t.Context(),
				p2p.Commit{Names: []p2p.NewName{{Tag: "t", Name: "v3", Digest: one.Digest}}}); !errors.Is(
				err, p2p.ErrNotFound) {
				t.Error(err)
			}
			do(p.Close())
		}, "removed partial three: dropped"},
	} {
		p, err := fetchPartial(t, s, data)
		do(err)
		c.end(p)
		told(c.want)
	}
	p, err := s.Partial(t.Context(), three.Digest)
	do(err)
	do(p.Close())
	told() // nothing had arrived

	stop()
	artifact("v1", "one")
	told()
}

// TestWatchMany: what is told is in the order of what happens, whoever changes things at the same time.
func TestWatchMany(t *testing.T) {
	s := newStore(t)
	m, stop := watch(t, s)
	defer stop()
	m.many = true
	var all sync.WaitGroup
	for worker := range uint64(4) {
		random := rand.New(rand.NewPCG(worker, 1))
		all.Go(func() {
			for range 25 {
				name := fmt.Sprint("v", random.IntN(3))
				if random.IntN(3) == 0 {
					if _, err := s.Delete(t.Context(), "t", cacheID(t, name), p2p.DeleteOptions{}); err != nil &&
						!errors.Is(err, p2p.ErrNotFound) {
						t.Error(err)
					}
				} else if _, err := importArtifact(t.Context(), s, name, fmt.Append(nil, random.IntN(4))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	m.check()
}
