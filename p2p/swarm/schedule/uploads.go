package schedule

import (
	"cmp"
	"math/bits"
	"slices"
)

// Uploads is an uploader's side of one blob: which peer is served now, and with which
// piece. It is not safe for concurrent use.
type Uploads struct {
	slots   int
	sending int
	sent    []int          // how often each piece was sent
	active  map[string]int // how many pieces each peer is sent now
	turns   []*Turn        // that wait, in the order in which they came
}

// Turn is a request that waits, or is served.
type Turn struct {
	peer  string
	want  *Set
	piece int // that was granted, or -1
}

// Piece returns the piece that was granted; -1 is none of those wanted, or that
// it is not the request's turn yet.
func (t *Turn) Piece() int { return t.piece }

// NewUploads returns the Uploads of a blob of n pieces of which none was sent
// yet. At most slots are sent at a time; see [Slots].
func NewUploads(n, slots int) *Uploads {
	return &Uploads{slots: slots, sent: make([]int, n), active: map[string]int{}}
}

// Ask has peer wait for its turn to be sent one of the pieces in want, which must
// not be changed any more. Call Grant after it.
func (u *Uploads) Ask(peer string, want *Set) *Turn {
	t := &Turn{peer, want, -1}
	u.turns = append(u.turns, t)
	return t
}

// Grant returns a request whose turn it is, where a slot is free: of the peer
// that is sent the fewest pieces now; of several, the one that wants the most, so
// that none lags behind; of several, the first. Its piece is the one of those in
// want and in have that was sent least often; of several the first, so that a
// lone reader gets the blob nearly in order. Where there is none the turn is over;
// else an End has to follow. Call it until it reports false whenever something has
// changed: after Ask, Leave and End.
func (u *Uploads) Grant(have *Set) (*Turn, bool) {
	if u.sending >= u.slots || len(u.turns) == 0 {
		return nil, false
	}
	t := slices.MinFunc(u.turns, func(a, b *Turn) int {
		return cmp.Or(cmp.Compare(u.active[a.peer], u.active[b.peer]), cmp.Compare(b.want.Count(), a.want.Count()))
	})
	u.remove(t)
	t.piece = u.pick(t.want, have)
	if t.piece >= 0 {
		u.sent[t.piece]++
		u.sending++
		u.active[t.peer]++
	}
	return t, true
}

func (u *Uploads) pick(want, have *Set) int {
	best := -1
	for w, word := range want.words {
		for word &= have.words[w]; word != 0; word &= word - 1 {
			if i := w*64 + bits.TrailingZeros64(word); best < 0 || u.sent[i] < u.sent[best] {
				best = i
			}
		}
	}
	return best
}

// Leave ends the waiting of a request. It reports false where it was granted, or over, before.
func (u *Uploads) Leave(t *Turn) bool {
	waits := slices.Contains(u.turns, t)
	u.remove(t)
	return waits
}

func (u *Uploads) remove(t *Turn) {
	u.turns = slices.DeleteFunc(u.turns, func(other *Turn) bool { return other == t })
}

// End says that the piece that was granted was sent, or was not after all.
func (u *Uploads) End(t *Turn, sent bool) {
	if !sent {
		u.sent[t.piece]--
	}
	u.sending--
	if u.active[t.peer]--; u.active[t.peer] == 0 {
		delete(u.active, t.peer)
	}
}

// Waiting returns how many requests wait for their turn.
func (u *Uploads) Waiting() int { return len(u.turns) }

// Sent returns how often piece i was sent.
func (u *Uploads) Sent(i int) int { return u.sent[i] }
