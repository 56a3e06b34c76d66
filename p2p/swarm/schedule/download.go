package schedule

import (
	"iter"
	"slices"
)

// Download is a downloader's side of one blob: what is asked of whom. It is
// not safe for concurrent use.
type Download struct {
	limits   Limits
	held     *Set
	missing  *Set
	free     *Set    // missing, and claimed by no request
	claims   []uint8 // how many requests claim each piece
	prefer   *Set
	sources  []*source // those first that were asked longest ago
	requests []*request
	lastID   int
}

// Limits are how much a Download has under way at a time. What is 0 is the
// constant of the same name.
type Limits struct {
	Requests  int
	PerSource int
}

// source is a peer that has pieces, or will have some.
type source struct {
	id       string
	have     *Set // as far as is known
	requests int
	slow     int // of these
	mute     int // of the slow ones: not answered
}

type request struct {
	Request
	source *source
	claim  *Set // Want, and then only what was answered
	piece  int  // what was answered, or -1
	slow   bool // its claim does not count
}

// Request is to be sent to a source: any one of the pieces in Want is asked for.
type Request struct {
	ID     int // of this request among those of its Download
	Source string
	Want   *Set // not empty; it must not be changed
}

// NewDownload returns the Download of a blob of n pieces, of which those in
// held, which may be nil, are here already.
func NewDownload(n int, held *Set, limits Limits) *Download {
	if limits.Requests == 0 {
		limits.Requests = Requests
	}
	if limits.PerSource == 0 {
		limits.PerSource = PerSource
	}
	d := &Download{limits: limits, held: NewSet(n), missing: FullSet(n), claims: make([]uint8, n)}
	if held != nil {
		d.held.Or(held)
		d.missing.AndNot(held)
	}
	d.free = d.missing.Clone()
	return d
}

// SetSource says which pieces a source has.
func (d *Download) SetSource(id string, have *Set) {
	s := d.find(id)
	if s == nil {
		s = &source{id: id}
		d.sources = append(d.sources, s)
	}
	s.have = have.Clone()
}

// RemoveSource says that a source is gone, or has failed. It is not asked again
// unless it is set again. Requests to it go on until they are done or cancelled.
func (d *Download) RemoveSource(id string) {
	d.sources = slices.DeleteFunc(d.sources, func(s *source) bool { return s.id == id })
}

// Prefer says which pieces should come before all others: those that readers
// wait for. It replaces what was said before; nil is for none.
func (d *Download) Prefer(pieces *Set) { d.prefer = pieces }

// Next returns a request that is to be sent now, and claims what it wants. Call
// it until it reports false, and again whenever something has changed.
func (d *Download) Next() (Request, bool) {
	if d.underWay() >= d.limits.Requests || d.Complete() {
		return Request{}, false
	}
	useful := 0
	for _, s := range d.sources {
		if s.have.Intersects(d.missing) {
			useful++
		}
	}
	if useful == 0 {
		return Request{}, false
	}
	if d.prefer != nil {
		first := d.prefer.Clone().And(d.free)
		if s := d.choose(first, useful); s != nil {
			one := NewSet(first.Len())
			for i := range first.And(s.have).All() {
				one.Add(i)
				break
			}
			return d.ask(s, one), true
		}
	}
	if s := d.choose(d.free, useful); s != nil {
		return d.ask(s, share(d.free.Clone().And(s.have))), true
	}
	if d.free.Count() > 0 {
		return Request{}, false
	}
	// Each of the last pieces is asked of another source, too.
	for _, s := range d.sources {
		if s.requests > 0 {
			continue
		}
		last := NewSet(d.missing.Len())
		for i := range d.missing.All() {
			if d.claims[i] < copies && s.have.Has(i) {
				last.Add(i)
			}
		}
		if last.Count() > 0 {
			return d.ask(s, last), true
		}
	}
	return Request{}, false
}

// choose returns the source of one of the pieces that has the fewest requests, no more
// than its share among so many useful ones, and of several the one that was asked longest
// ago; nil where there is none.
func (d *Download) choose(pieces *Set, useful int) *source {
	var best *source
	limit := max(1, d.limits.PerSource/useful)
	for _, s := range d.sources {
		if s.slow > 0 && useful > 1 {
			continue
		}
		if n := s.requests - s.mute; n < limit && s.have.Intersects(pieces) {
			best, limit = s, n
		}
	}
	return best
}

// share returns two of every three pieces in s, the first among them. The more
// there are in a want set, the better the source can choose. The others are for
// requests that are sent to others before it has chosen.
func share(s *Set) *Set {
	out, k := NewSet(s.Len()), 0
	for i := range s.All() {
		if k++; k%3 != 0 {
			out.Add(i)
		}
	}
	return out
}

func (d *Download) ask(s *source, want *Set) Request {
	d.lastID++
	r := &request{Request: Request{d.lastID, s.id, want}, source: s, claim: want, piece: -1}
	d.requests = append(d.requests, r)
	s.requests++
	if i := slices.Index(d.sources, s); i >= 0 {
		d.sources = append(slices.Delete(d.sources, i, i+1), s)
	}
	d.claim(r)
	return r.Request
}

// Answered says which piece is coming as the answer to a request, and what its
// source has. With -1 none is coming, and the request is over. It reports false
// where there is no use for the piece: it is held already, or was not asked for.
// Then the request should be cancelled.
func (d *Download) Answered(id, piece int, have *Set) bool {
	r := d.request(id)
	if r == nil {
		return false
	}
	r.source.have = have.Clone()
	if piece < 0 {
		d.end(id)
		return false
	}
	if !r.Want.Has(piece) || !d.missing.Has(piece) {
		return false
	}
	d.release(r)
	r.hurry()
	r.piece, r.claim = piece, NewSet(have.Len())
	r.claim.Add(piece)
	d.claim(r)
	return true
}

// hurry says that a request is not slow any more.
func (r *request) hurry() {
	if r.slow {
		r.slow = false
		r.source.slow--
		if r.piece < 0 {
			r.source.mute--
		}
	}
}

// Slow says that a request brings nothing, or hardly anything: what it wants is asked of
// other sources, too, and a request to them may take its place. It goes on; where there are
// others, its source is asked for nothing else meanwhile. Where there are none, the source is
// asked once more if it has not answered, since the connection may be dead; a piece that
// comes slowly would come at half the speed twice. Slow may be called again and again.
func (d *Download) Slow(id int) {
	r := d.request(id)
	if r == nil || r.slow || r.piece >= 0 && !d.isElsewhere(r) {
		return
	}
	d.release(r)
	r.slow = true
	r.source.slow++
	if r.piece < 0 {
		r.source.mute++
	}
}

// isElsewhere reports whether another source has something of what a request claims.
func (d *Download) isElsewhere(r *request) bool {
	return slices.ContainsFunc(d.sources,
		func(s *source) bool { return s.id != r.source.id && s.have.Intersects(r.claim) })
}

// Done ends a request: the piece that was Answered is here, and is proven. It
// returns the requests that are of no use any more, which should be cancelled.
func (d *Download) Done(id int) (useless []int) {
	r := d.end(id)
	if r == nil || r.piece < 0 || !d.held.Add(r.piece) {
		return nil
	}
	d.missing.Remove(r.piece)
	d.free.Remove(r.piece)
	for _, r := range d.requests {
		if !r.claim.Intersects(d.missing) {
			useless = append(useless, r.ID)
		}
	}
	return useless
}

// Cancel ends a request that brought nothing. Where its source has failed,
// RemoveSource follows.
func (d *Download) Cancel(id int) { d.end(id) }

// Idle yields the sources that have nothing that is missing and no request, with
// what is wanted of them: they should tell when they have some of it.
func (d *Download) Idle() iter.Seq2[string, *Set] {
	return func(yield func(string, *Set) bool) {
		if d.Complete() {
			return
		}
		for _, s := range d.sources {
			if s.requests > 0 || s.have.Full() || s.have.Intersects(d.free) {
				continue
			}
			want := d.missing.Clone().AndNot(s.have)
			if want.Count() > 0 && !yield(s.id, want) {
				return
			}
		}
	}
}

// Held returns the pieces that are held. It is the Download's own set: it
// changes with it, and must not be changed.
func (d *Download) Held() *Set { return d.held }

// Missing returns the pieces that are not held, as Held does.
func (d *Download) Missing() *Set { return d.missing }

// Complete reports whether every piece is held.
func (d *Download) Complete() bool { return d.held.Full() }

func (d *Download) end(id int) *request {
	r := d.request(id)
	if r == nil {
		return nil
	}
	d.requests = slices.DeleteFunc(d.requests, func(r *request) bool { return r.ID == id })
	r.source.requests--
	d.release(r)
	r.hurry()
	return r
}

// underWay counts the requests that are not slow.
func (d *Download) underWay() (n int) {
	for _, r := range d.requests {
		if !r.slow {
			n++
		}
	}
	return n
}

func (d *Download) claim(r *request) {
	for i := range r.claim.All() {
		d.claims[i]++
	}
	d.free.AndNot(r.claim)
}

func (d *Download) release(r *request) {
	if r.slow {
		return // it was released before
	}
	for i := range r.claim.All() {
		if d.claims[i]--; d.claims[i] == 0 && d.missing.Has(i) {
			d.free.Add(i)
		}
	}
}

func (d *Download) find(id string) *source {
	if i := slices.IndexFunc(d.sources, func(s *source) bool { return s.id == id }); i >= 0 {
		return d.sources[i]
	}
	return nil
}

func (d *Download) request(id int) *request {
	if i := slices.IndexFunc(d.requests, func(r *request) bool { return r.ID == id }); i >= 0 {
		return d.requests[i]
	}
	return nil
}
