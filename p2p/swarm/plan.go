package swarm

import (
	"iter"
	"math/rand/v2"
	"slices"

	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

type planRequest struct {
	ID     int
	Source string
	Want   *schedule.Set
}

type planSource struct {
	id       string
	have     *schedule.Set
	failed   bool
	requests int
}

type planned struct {
	id    int
	src   *planSource
	want  *schedule.Set
	piece int
}

type plan struct {
	limit, perSource int
	held, missing    *schedule.Set
	claims           []int
	prefer           *schedule.Set
	sources          []*planSource
	requests         map[int]*planned
	next             int
}

func newPlan(n int, held *schedule.Set, limit, perSource int) *plan {
	return &plan{limit: limit, perSource: perSource, held: held.Clone(), missing: schedule.FullSet(n).AndNot(held), claims: make([]int, n), prefer: schedule.NewSet(n), requests: map[int]*planned{}}
}

func (d *plan) find(id string) *planSource {
	for _, s := range d.sources {
		if s.id == id {
			return s
		}
	}
	return nil
}

func (d *plan) SetSource(id string, have *schedule.Set) {
	s := d.find(id)
	if s == nil {
		s = &planSource{id: id}
		d.sources = append(d.sources, s)
	}
	s.have, s.failed = have.Clone(), false
}

func (d *plan) RemoveSource(id string) {
	d.sources = slices.DeleteFunc(d.sources, func(s *planSource) bool { return s.id == id })
}

func (d *plan) Prefer(first, last int) {
	for i := first; i <= last; i++ {
		d.prefer.Add(i)
	}
}

func (d *plan) free() *schedule.Set {
	f := d.missing.Clone()
	for i, n := range d.claims {
		if n > 0 {
			f.Remove(i)
		}
	}
	return f
}

func (d *plan) Next() (planRequest, bool) {
	if len(d.requests) >= d.limit || d.missing.Count() == 0 {
		return planRequest{}, false
	}
	free := d.free()
	usable := 0
	for _, s := range d.sources {
		if !s.failed && s.have.Intersects(d.missing) {
			usable++
		}
	}
	if usable == 0 {
		return planRequest{}, false
	}
	per := min(d.perSource, (d.limit+usable-1)/usable)
	if p := free.Clone().And(d.prefer); p.Count() > 0 {
		if s := d.choose(p, per); s != nil {
			w := schedule.NewSet(p.Len())
			for i := range p.And(s.have).All() {
				w.Add(i)
				break
			}
			return d.claim(s, w), true
		}
	}
	if s := d.choose(free, per); s != nil {
		avail := free.And(s.have)
		quota := max(1, (d.missing.Count()+d.limit-1)/d.limit)
		return d.claim(s, stride(avail, quota)), true
	}
	if free.Count() == 0 {
		// Each of the last pieces is asked of a second source.
		for _, src := range d.sources {
			if src.failed || src.requests > 0 {
				continue
			}
			again := schedule.NewSet(d.missing.Len())
			for i := range d.missing.All() {
				if d.claims[i] < 2 && src.have.Has(i) {
					again.Add(i)
				}
			}
			if again.Count() > 0 {
				return d.claim(src, again), true
			}
		}
	}
	return planRequest{}, false
}

func stride(avail *schedule.Set, quota int) *schedule.Set {
	n := avail.Count()
	if n <= quota {
		return avail
	}
	out := schedule.NewSet(avail.Len())
	step, k := n/quota, 0
	for i := range avail.All() {
		if k%step == 0 {
			out.Add(i)
		}
		k++
	}
	return out
}

func (d *plan) choose(of *schedule.Set, per int) *planSource {
	var best *planSource
	ties := 0
	for _, s := range d.sources {
		if s.failed || s.requests >= per || !s.have.Intersects(of) {
			continue
		}
		switch {
		case best == nil || s.requests < best.requests:
			best, ties = s, 1
		case s.requests == best.requests:
			if ties++; rand.IntN(ties) == 0 {
				best = s
			}
		}
	}
	return best
}

func (d *plan) claim(s *planSource, want *schedule.Set) planRequest {
	d.next++
	d.requests[d.next] = &planned{d.next, s, want, -1}
	s.requests++
	for i := range want.All() {
		d.claims[i]++
	}
	return planRequest{d.next, s.id, want.Clone()}
}

func (d *plan) unclaim(set *schedule.Set) {
	for i := range set.All() {
		d.claims[i]--
	}
}

func (d *plan) end(id int) *planned {
	r := d.requests[id]
	if r != nil {
		delete(d.requests, id)
		r.src.requests--
		d.unclaim(r.want)
	}
	return r
}

func (d *plan) Answer(id, piece int, have *schedule.Set) bool {
	r := d.requests[id]
	if r == nil {
		return false
	}
	r.src.have = have.Clone()
	if piece < 0 {
		d.end(id)
		return false
	}
	r.want.Remove(piece)
	d.unclaim(r.want)
	r.want = schedule.NewSet(r.want.Len())
	r.want.Add(piece)
	r.piece = piece
	return d.missing.Has(piece)
}

func (d *plan) Done(id int) (useless []int) {
	r := d.end(id)
	if r == nil || !d.held.Add(r.piece) {
		return nil
	}
	d.missing.Remove(r.piece)
	for _, o := range d.requests {
		if !o.want.Intersects(d.missing) {
			useless = append(useless, o.id)
		}
	}
	return useless
}

func (d *plan) Fail(id int) {
	if r := d.end(id); r != nil {
		r.src.failed = true
	}
}

func (d *plan) Cancel(id int)       { d.end(id) }
func (d *plan) Held() *schedule.Set { return d.held }
func (d *plan) Complete() bool      { return d.missing.Count() == 0 }

func (d *plan) Idle() iter.Seq2[string, *schedule.Set] {
	return func(yield func(string, *schedule.Set) bool) {
		for _, s := range d.sources {
			if s.failed || s.requests > 0 || s.have.Intersects(d.missing) || d.missing.Count() == 0 {
				continue
			}
			if !yield(s.id, d.missing.Clone().AndNot(s.have)) {
				return
			}
		}
	}
}

type sentCounts struct{ sent []uint32 }

func (u *sentCounts) Pick(want, have *schedule.Set) (int, bool) {
	best := -1
	for i := range want.All() {
		if have.Has(i) && (best < 0 || u.sent[i] < u.sent[best]) {
			best = i
		}
	}
	if best >= 0 {
		u.sent[best]++
	}
	return best, best >= 0
}

func (u *sentCounts) Undo(i int) { u.sent[i]-- }
