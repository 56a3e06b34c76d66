package source

import "testing"

func TestIsZero(t *testing.T) {
	for _, n := range []int{minHole, minHole + 1, HoleLength - 1, HoleLength, HoleLength + 1, 3*HoleLength + 7} {
		p := make([]byte, n)
		if !IsZero(p) {
			t.Errorf("%d zeros are none", n)
		}
		for _, at := range []int{0, 1, n / 2, n - 1} {
			p[at] = 1
			if IsZero(p) {
				t.Errorf("of %d bytes, number %d is no zero", n, at)
			}
			p[at] = 0
		}
	}
	if IsZero(nil) || IsZero(make([]byte, minHole-1)) {
		t.Error("what is too short for a hole is one")
	}
}
