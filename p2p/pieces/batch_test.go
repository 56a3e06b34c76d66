package pieces

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// TestBatchShares: those who come while a run is under way share the next one.
func TestBatchShares(t *testing.T) {
	var b batch[int]
	var runs [][]int
	began, release := make(chan struct{}), make(chan struct{})
	run := func(jobs []*job[int]) {
		var values []int
		for _, j := range jobs {
			values = append(values, j.value)
		}
		runs = append(runs, values)
		if len(runs) == 1 {
			close(began)
			<-release
		}
	}
	var all sync.WaitGroup
	all.Go(func() { b.do(0, 1, run) })
	<-began
	const late = 10
	for i := range late {
		all.Go(func() { b.do(1+i, 1, run) })
	}
	for waiting := 0; waiting < late; runtime.Gosched() {
		b.mu.Lock()
		waiting = len(b.waiting)
		b.mu.Unlock()
	}
	close(release)
	all.Wait()
	if len(runs) != 2 || len(runs[0]) != 1 || len(runs[1]) != late {
		t.Errorf("runs were of %v; want one of the first, and one of all others", runs)
	}
}

// TestBatchIsBounded: a run takes in what its limit allows, and one heavy job; what is light
// does not wait for the other heavy ones.
func TestBatchIsBounded(t *testing.T) {
	b := batch[string]{limit: 10}
	for _, j := range []job[string]{{value: "heavy 1", weight: 50}, {value: "heavy 2", weight: 11},
		{value: "six", weight: 6}, {value: "five", weight: 5}, {value: "four", weight: 4}} {
		j.done = make(chan struct{})
		b.waiting = append(b.waiting, &j)
	}
	var runs []string
	run := func(jobs []*job[string]) {
		run := ""
		for _, j := range jobs {
			run += j.value + ","
		}
		runs = append(runs, run)
	}
	if err := b.do("last", 1, run); err != nil {
		t.Fatal(err)
	}
	if want := []string{"heavy 1,six,four,", "heavy 2,five,last,"}; !slices.Equal(runs, want) {
		t.Errorf("the runs are of %q, want %q", runs, want)
	}
}

// TestLightChangesDoNotWait: a small import is there before the large manifests that came first,
// but for the one that is under way.
func TestLightChangesDoNotWait(t *testing.T) {
	s := newStore(t)
	var refs []digest.Digest
	for i := range 2 * updateLimit {
		refs = append(refs, digest.SHA256.FromString(fmt.Sprint(i)))
	}
	s.updates.mu.Lock()
	s.updates.running = make(chan struct{}, 1)
	s.updates.mu.Unlock()
	s.updates.running <- struct{}{} // a change is under way
	// Nothing is committed after the first change until the small import is there.
	small, looked := make(chan struct{}), make(chan struct{})
	changes := 0
	s.failCommit = func() error {
		if changes++; changes > 1 {
			<-looked
		}
		return nil
	}
	const manifests = 8
	var all sync.WaitGroup
	commit := func(content string, refs []digest.Digest) {
		all.Go(func() {
			in, err := s.Ingest(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer in.Close()
			added, err := in.Add(strings.NewReader(content), p2p.AddOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			if err := in.Commit(p2p.Commit{
				Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: added.Digest},
					Manifest: &p2p.NewManifest{Refs: refs}}}}); err != nil {
				t.Error(err)
			}
			if refs == nil {
				close(small)
			}
		})
	}
	waiting := func(n int) {
		for {
			s.updates.mu.Lock()
			there := len(s.updates.waiting)
			s.updates.mu.Unlock()
			if there == n {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	for i := range manifests {
		commit(fmt.Sprint("manifest ", i), refs)
	}
	waiting(manifests)
	commit("small", nil)
	waiting(manifests + 1)
	<-s.updates.running
	select {
	case <-small:
	case <-time.After(15 * time.Second):
		t.Error("the small import waits for all")
	}
	there := 0
	for i := range manifests {
		if _, err := s.Stat(t.Context(), "t", digest.FromDigest(digest.SHA256.FromString(fmt.Sprint("manifest ", i))),
			p2p.StatOptions{}); err == nil {
			there++
		}
	}
	if there > 1 {
		t.Errorf("the small import was there only with %d of the manifests", there)
	}
	close(looked)
	all.Wait()
}

// TestWeightOfDeletes: a delete that lets go of much is no light change, nor is a move of a name
// away from it.
func TestWeightOfDeletes(t *testing.T) {
	s := newStore(t)
	var refs []digest.Digest
	for i := range 2 * updateLimit {
		refs = append(refs, digest.SHA256.FromString(fmt.Sprint(i)))
	}
	commit := func(content, name string, m *p2p.NewManifest) digest.Digest {
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Error(err)
			return ""
		}
		defer in.Close()
		added, err := in.Add(strings.NewReader(content), p2p.AddOptions{})
		if err == nil {
			err = in.Commit(p2p.Commit{
				Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: added.Digest}, Manifest: m,
					Keep: p2p.KeepReferred}},
				Names: []p2p.NewName{{Tag: "t", Name: name, Digest: added.Digest}},
			})
		}
		if err != nil {
			t.Error(err)
		}
		return added.Digest
	}
	named := func(name string) digest.CID {
		cid, err := digest.ParseCID(name)
		if err != nil {
			t.Fatal(err)
		}
		return cid
	}
	for what, change := range map[string]func() error{
		"delete of the name": func() error {
			_, err := s.Delete(t.Context(), "t", named("v1"), p2p.DeleteOptions{})
			return err
		},
		"delete for all": func() error {
			_, _, err := s.DeleteForAll(t.Context(), "t", named("v1"), p2p.DeleteOptions{}, nil)
			return err
		},
		"delete of a peer": func() error {
			_, err := s.ApplyDelete(t.Context(), Delete{Tag: "t", CID: named("v1"), At: time.Now(), Made: time.Now()})
			return err
		},
		"move of the name": func() error { commit("other", "v1", nil); return nil },
	} {
		commit("manifest", "v1", &p2p.NewManifest{Refs: refs})
		s.updates.mu.Lock()
		s.updates.running = make(chan struct{}, 1)
		s.updates.mu.Unlock()
		s.updates.running <- struct{}{} // a change is under way
		ended := make(chan error, 1)
		go func() { ended <- change() }()
		weight := 0
		for weight == 0 {
			s.updates.mu.Lock()
			if len(s.updates.waiting) > 0 {
				weight = s.updates.waiting[0].weight
			}
			s.updates.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		if weight < len(refs) {
			t.Errorf("a %s of a manifest that refers to %d has weight %d", what, len(refs), weight)
		}
		<-s.updates.running
		if err := <-ended; err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}
