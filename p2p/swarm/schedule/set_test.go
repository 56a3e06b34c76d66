package schedule

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

func setOf(n int, pieces ...int) *Set {
	s := NewSet(n)
	for _, i := range pieces {
		s.Add(i)
	}
	return s
}

func list(s *Set) []int { return slices.Collect(s.All()) }

// TestSetModel does at random to sets what it does to maps.
func TestSetModel(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 63, 64, 65, 200} {
		r := rand.New(rand.NewPCG(1, uint64(n)))
		s, model := NewSet(n), map[int]bool{}
		for range 500 {
			i := r.IntN(n+20) - 10 // also such as there are not
			inside := i >= 0 && i < n
			if r.IntN(3) > 0 {
				if got, want := s.Add(i), inside && !model[i]; got != want {
					t.Fatalf("n=%d: Add(%d) = %v", n, i, got)
				}
				if inside {
					model[i] = true
				}
			} else {
				if got := s.Remove(i); got != model[i] {
					t.Fatalf("n=%d: Remove(%d) = %v", n, i, got)
				}
				delete(model, i)
			}
			if s.Has(i) != model[i] || s.Count() != len(model) || s.Full() != (len(model) == n) || s.Len() != n {
				t.Fatalf("n=%d: after %d: %v, want %v", n, i, list(s), model)
			}
		}
		var want []int
		for i := range n {
			if model[i] {
				want = append(want, i)
			}
		}
		if got := list(s); !slices.Equal(got, want) {
			t.Errorf("n=%d: All yields %v, want %v", n, got, want)
		}
		b, err := s.AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		if parsed, err := ParseSet(n, b); err != nil || !parsed.Equal(s) || parsed.Count() != s.Count() {
			t.Errorf("n=%d: parsed again: %v, %v", n, parsed, err)
		}
	}
}

func TestSetsTogether(t *testing.T) {
	const n = 130
	a, b := setOf(n, 0, 1, 64, 129), setOf(n, 1, 2, 64, 128)
	for _, test := range []struct {
		name string
		got  *Set
		want []int
	}{
		{"and", a.Clone().And(b), []int{1, 64}},
		{"and not", a.Clone().AndNot(b), []int{0, 129}},
		{"or", a.Clone().Or(b), []int{0, 1, 2, 64, 128, 129}},
	} {
		if got := list(test.got); !slices.Equal(got, test.want) || test.got.Count() != len(test.want) {
			t.Errorf("%s: %v of %d, want %v", test.name, got, test.got.Count(), test.want)
		}
	}
	if !a.Intersects(b) || a.Intersects(setOf(n, 3)) || !a.Equal(setOf(n, 0, 1, 64, 129)) || a.Equal(b) {
		t.Error("Intersects or Equal is wrong")
	}
	if got := FullSet(n); !got.Full() || got.Count() != n || got.Has(n) {
		t.Errorf("the full set has %d of %d", got.Count(), n)
	}
	for i := range a.All() {
		if i == 1 {
			break // All stops when told to
		}
	}
}

func TestParseSet(t *testing.T) {
	s, err := ParseSet(11, []byte{0b1000_0001, 0b101})
	if err != nil || !slices.Equal(list(s), []int{0, 7, 8, 10}) {
		t.Errorf("%v, %v", s, err)
	}
	for name, b := range map[string][]byte{
		"too short":  {1},
		"too long":   {1, 1, 0},
		"stray bits": {1, 0b1000},
	} {
		if s, err := ParseSet(11, b); err == nil {
			t.Errorf("%s: got %v", name, list(s))
		}
	}
}

func FuzzParseSet(f *testing.F) {
	f.Add(uint16(11), []byte{0x81, 5})
	f.Add(uint16(64), bytes.Repeat([]byte{0xff}, 8))
	f.Add(uint16(3), []byte{8})
	f.Fuzz(func(t *testing.T, n uint16, b []byte) {
		s, err := ParseSet(int(n), b)
		if err != nil {
			return
		}
		again, _ := s.AppendBinary(nil)
		if !bytes.Equal(again, b) || s.Count() != len(list(s)) || s.Full() != (s.Count() == int(n)) {
			t.Errorf("%d pieces, %x: %x, %d pieces", n, b, again, s.Count())
		}
		for i := range s.All() {
			if i < 0 || i >= int(n) {
				t.Errorf("piece %d of %d", i, n)
			}
		}
	})
}
