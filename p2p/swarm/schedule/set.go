package schedule

import (
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// Set is a set of pieces of one blob, by their index. Sets that are put
// together are of the same blob. It is not safe for concurrent use.
type Set struct {
	n     int
	count int
	words []uint64 // piece i is bit i%64 of word i/64; there are no bits past n
}

// NewSet returns an empty set for a blob of n pieces.
func NewSet(n int) *Set {
	return &Set{n: n, words: make([]uint64, (n+63)/64)}
}

// FullSet returns the set of all n pieces of a blob.
func FullSet(n int) *Set {
	s := NewSet(n)
	for i := range s.words {
		s.words[i] = ^uint64(0)
	}
	if n%64 != 0 {
		s.words[n/64] = 1<<(n%64) - 1
	}
	s.count = n
	return s
}

// ParseSet reads what AppendBinary wrote of a set for n pieces. Any other
// length than that of n pieces is an error, as are bits past the last piece.
func ParseSet(n int, b []byte) (*Set, error) {
	if want := (n + 7) / 8; len(b) != want {
		return nil, fmt.Errorf("piece set of %d bytes: a blob of %d pieces has sets of %d", len(b), n, want)
	}
	s := NewSet(n)
	for i, v := range b {
		s.words[i/8] |= uint64(v) << (i % 8 * 8)
		s.count += bits.OnesCount8(v)
	}
	if n%8 != 0 && b[n/8]>>(n%8) != 0 {
		return nil, fmt.Errorf("piece set: bits past the last of %d pieces", n)
	}
	return s, nil
}

// AppendBinary appends the set to b as a bitmap: piece i is bit i%8, counted
// from the lowest, of byte i/8. It never fails.
func (s *Set) AppendBinary(b []byte) ([]byte, error) {
	for i := range (s.n + 7) / 8 {
		b = append(b, byte(s.words[i/8]>>(i%8*8)))
	}
	return b, nil
}

// Len returns the count of the blob's pieces, whether in the set or not.
func (s *Set) Len() int { return s.n }

// Count returns the count of pieces in the set.
func (s *Set) Count() int { return s.count }

// Full reports whether every piece is in the set.
func (s *Set) Full() bool { return s.count == s.n }

// Has reports whether piece i is in the set. No set has a piece that the blob
// has not.
func (s *Set) Has(i int) bool {
	return i >= 0 && i < s.n && s.words[i/64]&(1<<(i%64)) != 0
}

// Add adds piece i, and reports whether it is new. It does nothing for one
// that the blob has not.
func (s *Set) Add(i int) bool {
	if i < 0 || i >= s.n || s.Has(i) {
		return false
	}
	s.words[i/64] |= 1 << (i % 64)
	s.count++
	return true
}

// Remove takes piece i out, and reports whether it was there.
func (s *Set) Remove(i int) bool {
	if !s.Has(i) {
		return false
	}
	s.words[i/64] &^= 1 << (i % 64)
	s.count--
	return true
}

// All yields the pieces in the set in order. The set must not change meanwhile.
func (s *Set) All() iter.Seq[int] {
	return func(yield func(int) bool) {
		for w, word := range s.words {
			for ; word != 0; word &= word - 1 {
				if !yield(w*64 + bits.TrailingZeros64(word)) {
					return
				}
			}
		}
	}
}

// Intersects reports whether a piece is in both s and t.
func (s *Set) Intersects(t *Set) bool {
	for i, word := range s.words {
		if word&t.words[i] != 0 {
			return true
		}
	}
	return false
}

// Equal reports whether s and t have the same pieces.
func (s *Set) Equal(t *Set) bool {
	return s.n == t.n && slices.Equal(s.words, t.words)
}

// And takes everything out of s that is not in t, and returns s.
func (s *Set) And(t *Set) *Set {
	return s.merge(t, func(a, b uint64) uint64 { return a & b })
}

// AndNot takes everything out of s that is in t, and returns s.
func (s *Set) AndNot(t *Set) *Set {
	return s.merge(t, func(a, b uint64) uint64 { return a &^ b })
}

// Or adds everything to s that is in t, and returns s.
func (s *Set) Or(t *Set) *Set {
	return s.merge(t, func(a, b uint64) uint64 { return a | b })
}

func (s *Set) merge(t *Set, op func(a, b uint64) uint64) *Set {
	s.count = 0
	for i := range s.words {
		s.words[i] = op(s.words[i], t.words[i])
		s.count += bits.OnesCount64(s.words[i])
	}
	return s
}

// Clone returns a copy of s.
func (s *Set) Clone() *Set {
	return &Set{n: s.n, count: s.count, words: slices.Clone(s.words)}
}
