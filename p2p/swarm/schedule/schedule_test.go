package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// grants returns what is granted now, as "peer:piece".
func grants(u *Uploads, have *Set) (all []string, turns []*Turn) {
	for {
		t, ok := u.Grant(have)
		if !ok {
			return all, turns
		}
		all = append(all, fmt.Sprintf("%s:%d", t.peer, t.Piece()))
		turns = append(turns, t)
	}
}

func TestUploads(t *testing.T) {
	full := FullSet(4)
	u := NewUploads(4, 2)
	for range 2 {
		u.Ask("a", full)
	}
	u.Ask("b", full)
	// A peer that was sent nothing comes first; the piece is the one sent least often.
	got, turns := grants(u, full)
	if !slices.Equal(got, []string{"a:0", "b:1"}) || u.Waiting() != 1 {
		t.Fatalf("granted are %v", got)
	}
	if got, _ := grants(u, full); len(got) > 0 {
		t.Errorf("granted are %v without a slot", got)
	}
	u.End(turns[1], true)
	if got, _ := grants(u, full); !slices.Equal(got, []string{"a:2"}) {
		t.Errorf("granted are %v", got)
	}
	// What was not sent is not counted.
	u.End(turns[0], false)
	if u.Sent(0) != 0 || u.Sent(1) != 1 {
		t.Errorf("sent are %d, %d", u.Sent(0), u.Sent(1))
	}
	// Nothing of what is wanted: the turn is over, and takes no slot.
	none := u.Ask("c", setOf(4, 3))
	if got, _ := grants(u, setOf(4, 0, 1)); !slices.Equal(got, []string{"c:-1"}) || none.Piece() != -1 {
		t.Errorf("granted are %v", got)
	}
	gone := u.Ask("d", full)
	if !u.Leave(gone) || u.Leave(gone) {
		t.Error("a peer that leaves is told twice that it waited, or never")
	}
	if got, _ := grants(u, full); len(got) > 0 {
		t.Errorf("granted are %v to one that left", got)
	}
}

// Of two that are sent as much, the one that lacks more comes first.
func TestUploadsToTheLast(t *testing.T) {
	u := NewUploads(4, 1)
	u.Ask("ahead", setOf(4, 0))
	u.Ask("behind", FullSet(4))
	if got, _ := grants(u, FullSet(4)); !slices.Equal(got, []string{"behind:0"}) {
		t.Errorf("granted are %v", got)
	}
}

func wants(d *Download) (all []Request) {
	for {
		r, ok := d.Next()
		if !ok {
			return all
		}
		all = append(all, r)
	}
}

func TestDownload(t *testing.T) {
	d := NewDownload(6, setOf(6, 5), Limits{Requests: 4, PerSource: 2})
	if len(wants(d)) > 0 {
		t.Error("it asks without a source")
	}
	d.SetSource("a", FullSet(6))
	first := wants(d)
	// Two of three of what is free, then two of three of the rest.
	if len(first) != 2 || first[0].Source != "a" || !first[0].Want.Equal(setOf(6, 0, 1, 3, 4)) ||
		!first[1].Want.Equal(setOf(6, 2)) {
		t.Fatalf("of one source it asks %v", first)
	}
	d.SetSource("b", setOf(6, 0, 1))
	if second := wants(d); len(second) > 0 && second[0].Want.Intersects(setOf(6, 0, 1, 2, 3, 4)) && d.free.Count() > 0 {
		t.Fatalf("of the other it asks for what is claimed: %v", second)
	} else {
		for _, r := range second {
			d.Cancel(r.ID)
		}
	}
	// What is answered frees the rest of the claim.
	if !d.Answered(first[0].ID, 0, FullSet(6)) {
		t.Error("the first answer is of no use")
	}
	second := wants(d)
	if len(second) != 1 || second[0].Source != "b" || !second[0].Want.Equal(setOf(6, 1)) {
		t.Fatalf("of the other it asks %v", second)
	}
	if d.Answered(first[1].ID, 5, FullSet(6)) {
		t.Error("what is held is of use")
	}
	d.Cancel(second[0].ID)
	d.Cancel(first[1].ID)
	if useless := d.Done(first[0].ID); len(useless) > 0 || !d.Held().Has(0) || d.Missing().Has(0) {
		t.Errorf("after the first piece: useless are %v", useless)
	}
	// Pieces that readers wait for come first, and alone.
	d.Prefer(setOf(6, 3))
	if r := wants(d); !r[0].Want.Equal(setOf(6, 3)) {
		t.Errorf("preferred is %v", r[0].Want)
	}
	d.RemoveSource("a")
	d.RemoveSource("b")
	if r := wants(d); len(r) > 0 {
		t.Errorf("it asks %v of sources that are gone", r)
	}
}

// Of several sources the one is asked that was asked longest ago, and none for what it does not
// have any more.
func TestSourcesTakeTurns(t *testing.T) {
	d := NewDownload(1000, nil, Limits{Requests: 1})
	for _, id := range []string{"a", "b", "c"} {
		d.SetSource(id, FullSet(1000))
	}
	for _, want := range []string{"a", "b", "c", "a"} {
		r, _ := d.Next()
		if r.Source != want {
			t.Errorf("asked is %s, want %s", r.Source, want)
		}
		d.Cancel(r.ID)
	}
	d = NewDownload(1000, nil, Limits{Requests: 6, PerSource: 6})
	have := FullSet(1000)
	for _, id := range []string{"a", "b", "c"} {
		d.SetSource(id, have)
	}
	have.Remove(0) // the caller's own
	var asked []string
	all := wants(d)
	for _, r := range all {
		asked = append(asked, r.Source)
	}
	if want := []string{"a", "b", "c", "a", "b", "c"}; !slices.Equal(asked, want) || !all[0].Want.Has(0) {
		t.Errorf("asked are %v, want %v; the first for %v", asked, want, list(all[0].Want))
	}
	for _, r := range all[1:] {
		d.Cancel(r.ID)
	}
	// A source that is behind with one request is asked for nothing else where there are others.
	d.Slow(all[0].ID)
	for _, r := range wants(d) {
		if r.Source == "a" {
			t.Errorf("a slow source is asked for %v", list(r.Want))
		}
	}
	// Alone it is.
	d.RemoveSource("b")
	d.RemoveSource("c")
	for len(d.requests) > 1 {
		d.Cancel(d.requests[1].ID)
	}
	if r := wants(d); len(r) == 0 {
		t.Error("the only source is asked for nothing, since it is slow")
	}
}

// An answer is of use where its piece was asked for, and is not there yet.
func TestAnswersOfNoUse(t *testing.T) {
	d := NewDownload(6, nil, Limits{Requests: 2, PerSource: 2})
	d.SetSource("a", FullSet(6))
	all := wants(d)
	if d.Answered(all[1].ID, 0, FullSet(6)) || !all[0].Want.Has(0) {
		t.Errorf("piece 0 is of use, though %v were asked for", list(all[1].Want))
	}
	d.Slow(all[0].ID)
	d.SetSource("b", FullSet(6))
	other := wants(d)
	if len(other) != 1 || !d.Answered(other[0].ID, 0, FullSet(6)) {
		t.Fatalf("of the other one it asks %v", other)
	}
	d.Done(other[0].ID)
	if d.Answered(all[0].ID, 0, FullSet(6)) {
		t.Error("a piece that is held is of use")
	}
	if d.Answered(-1, 1, FullSet(6)) {
		t.Error("the answer to nothing is of use")
	}
}

func TestLastPieces(t *testing.T) {
	d := NewDownload(2, nil, Limits{Requests: 4, PerSource: 1})
	d.SetSource("a", FullSet(2))
	d.SetSource("b", FullSet(2))
	first := wants(d)
	for i, r := range first {
		if !d.Answered(r.ID, i, FullSet(2)) {
			t.Fatal("an answer is of no use")
		}
	}
	d.SetSource("c", FullSet(2))
	last := wants(d)
	if len(last) != 1 || last[0].Source != "c" || !last[0].Want.Full() || !d.Answered(last[0].ID, 0, FullSet(2)) {
		t.Fatalf("of a third source it asks %v", last)
	}
	if useless := d.Done(last[0].ID); !slices.Equal(useless, []int{first[0].ID}) {
		t.Errorf("useless are %v, want the first request", useless)
	}
	d.Cancel(first[0].ID)
	d.Done(first[1].ID)
	if !d.Complete() || len(wants(d)) > 0 {
		t.Error("it goes on when it has everything")
	}
}

func TestIdle(t *testing.T) {
	d := NewDownload(3, nil, Limits{})
	d.SetSource("empty", NewSet(3))
	d.SetSource("full", FullSet(3))
	idle := map[string]*Set{}
	for id, want := range d.Idle() {
		idle[id] = want
	}
	if len(idle) != 1 || !idle["empty"].Full() {
		t.Errorf("idle are %v", idle)
	}
	// A source that is asked for something, or can be, is not idle.
	d.SetSource("part", setOf(3, 0))
	d.RemoveSource("full")
	d.RemoveSource("empty")
	for range d.Idle() {
		t.Error("one that has what is wanted is idle")
	}
	wants(d)
	for range d.Idle() {
		t.Error("one that is asked for something is idle")
	}
}

// requireSound fails the test where what a Download counts is not what its requests are.
func (d *Download) requireSound(t *testing.T, seed uint64) {
	t.Helper()
	claims, slow := make([]uint8, d.missing.Len()), map[*source]int{}
	under := map[*source]int{}
	for _, r := range d.requests {
		under[r.source]++
		if r.slow {
			slow[r.source]++
			continue
		}
		for i := range r.claim.All() {
			claims[i]++
		}
	}
	if !slices.Equal(claims, d.claims) {
		t.Fatalf("seed %d: claimed are %v, want %v", seed, d.claims, claims)
	}
	free := d.missing.Clone()
	for i, n := range claims {
		if n > 0 {
			free.Remove(i)
		}
	}
	if !free.Equal(d.free) {
		t.Fatalf("seed %d: free are %v, want %v", seed, list(d.free), list(free))
	}
	for _, s := range d.sources {
		if s.requests != under[s] || s.slow != slow[s] {
			t.Fatalf("seed %d: %s has %d requests, %d of them slow, want %d, %d", seed, s.id, s.requests, s.slow,
				under[s], slow[s])
		}
	}
}

// TestModel does anything in any order. A source is never asked for what it does not
// have, nor for what is held or coming but for the last pieces, and what is slow; the limits
// hold; and there is always something to do until all is there.
func TestModel(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 1 + r.IntN(100)
		d := NewDownload(n, nil, Limits{Requests: 1 + r.IntN(8), PerSource: 1 + r.IntN(4)})
		have := map[string]*Set{}
		open := map[int]Request{}
		coming := map[int]int{} // request -> piece
		for step := 0; !d.Complete(); step++ {
			if step > 100*n+1000 {
				t.Fatalf("seed %d: stuck with %d of %d pieces", seed, d.Held().Count(), n)
			}
			for {
				req, ok := d.Next()
				d.requireSound(t, seed)
				if !ok {
					break
				}
				if n := d.underWay(); n > d.limits.Requests {
					t.Fatalf("seed %d: %d requests are under way", seed, n)
				}
				for i := range req.Want.All() {
					if d.claims[i] > copies {
						t.Fatalf("seed %d: piece %d is asked for %d times", seed, i, d.claims[i])
					}
				}
				if req.Want.Count() == 0 || req.Want.Clone().AndNot(have[req.Source]).Count() > 0 ||
					req.Want.Intersects(d.Held()) {
					t.Fatalf("seed %d: asked of %s is %v", seed, req.Source, req.Want)
				}
				open[req.ID] = req
			}
			switch k := r.IntN(11); {
			case k == 0 || len(have) == 0:
				id := fmt.Sprint(r.IntN(5))
				s := NewSet(n)
				for i := range n {
					if r.IntN(3) > 0 {
						s.Add(i)
					}
				}
				if r.IntN(2) == 0 {
					s = FullSet(n)
				}
				have[id] = s
				d.SetSource(id, s)
			case k == 1 && len(have) > 1:
				for id := range have {
					delete(have, id)
					d.RemoveSource(id)
					break
				}
			case k < 6:
				for id, req := range open {
					delete(open, id)
					s := have[req.Source]
					if s == nil || r.IntN(5) == 0 {
						d.Cancel(id)
						break
					}
					// By now it has some more, and some less.
					s = s.Clone()
					for range r.IntN(3) {
						s.Add(r.IntN(n))
						s.Remove(r.IntN(n))
					}
					if d.request(id).source == d.find(req.Source) { // and not gone, and back, meanwhile
						have[req.Source] = s
					}
					piece := -1
					if both := req.Want.Clone().And(s); both.Count() > 0 {
						piece = slices.Collect(both.All())[r.IntN(both.Count())]
					}
					switch {
					case d.Answered(id, piece, s):
						coming[id] = piece
					case piece >= 0:
						d.Cancel(id)
					}
					break
				}
			case k == 6 && len(d.requests) > 0:
				d.Slow(d.requests[r.IntN(len(d.requests))].ID)
			default:
				for id := range coming {
					delete(coming, id)
					if r.IntN(8) == 0 {
						d.Cancel(id)
						break
					}
					for _, useless := range d.Done(id) {
						d.Cancel(useless)
						delete(coming, useless)
						delete(open, useless)
					}
					break
				}
			}
		}
	}
}

// What one source is slow with is asked of another, and comes from the one that is first.
func TestSlow(t *testing.T) {
	d := NewDownload(2, nil, Limits{Requests: 2, PerSource: 4})
	d.SetSource("a", FullSet(2))
	slow := wants(d)
	d.Answered(slow[0].ID, 0, FullSet(2))
	slow = append(slow, wants(d)...)
	if len(slow) != 2 {
		t.Fatalf("asked are %v", slow)
	}
	d.SetSource("b", FullSet(2))
	if got := wants(d); len(got) > 0 {
		t.Fatalf("more is under way than may be: %v", got)
	}
	for _, r := range slow {
		d.Slow(r.ID)
		d.Slow(r.ID)
	}
	got := wants(d)
	if len(got) == 1 {
		d.Answered(got[0].ID, 0, FullSet(2))
		got = append(got, wants(d)...)
	}
	if len(got) != 2 || got[0].Source != "b" || got[1].Source != "b" {
		t.Fatalf("with one slow source it asks %v", got)
	}
	if useless := d.Done(got[0].ID); !slices.Equal(useless, []int{slow[0].ID}) {
		t.Errorf("of no use are %v", useless)
	}
	d.Cancel(slow[0].ID)
	// The slow one is faster with the other piece in the end.
	if !d.Answered(slow[1].ID, 1, FullSet(2)) {
		t.Error("there is no use for what a slow source sends")
	}
	if useless := d.Done(slow[1].ID); !slices.Equal(useless, []int{got[1].ID}) || !d.Complete() {
		t.Errorf("of no use are %v, complete is %t", useless, d.Complete())
	}
	d.Cancel(got[1].ID)
	for _, s := range d.sources {
		if s.requests != 0 || s.slow != 0 {
			t.Errorf("%s has %d requests, %d slow ones, at the end", s.id, s.requests, s.slow)
		}
	}
}
