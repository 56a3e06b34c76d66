package source

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

// patchy gives so many bytes with each Read, and notes for how many there was room.
type patchy struct {
	gives []int
	err   error // at the end
	rooms []int
}

func (p *patchy) Read(b []byte) (int, error) {
	p.rooms = append(p.rooms, len(b))
	if len(p.gives) == 0 {
		return 0, p.err
	}
	n := p.gives[0]
	p.gives = p.gives[1:]
	return n, nil
}

// TestCopy: a source gets a long buffer only after it has filled a short one.
func TestCopy(t *testing.T) {
	src := &patchy{gives: []int{100, 4 << 10, 64 << 10, 1 << 20, 1 << 20, 0, 7}, err: io.EOF}
	n, err := Copy(io.Discard, src)
	if want := int64(100 + 4<<10 + 64<<10 + 2<<20 + 7); err != nil || n != want {
		t.Errorf("%d bytes, %v; want %d", n, err, want)
	}
	if want := []int{4 << 10, 4 << 10, 64 << 10, 1 << 20, 1 << 20, 1 << 20, 4 << 10, 4 << 10}; !slices.Equal(src.rooms,
		want) {
		t.Errorf("room for %v, want %v", src.rooms, want)
	}
	broken := errors.New("it broke")
	if n, err := Copy(io.Discard, &patchy{gives: []int{5}, err: broken}); n != 5 || err != broken {
		t.Errorf("a source that breaks: %d, %v", n, err)
	}
	r, w := io.Pipe()
	r.CloseWithError(broken)
	if n, err := Copy(w, bytes.NewReader(make([]byte, 100_000))); n != 0 || err != broken {
		t.Errorf("a writer that breaks: %d, %v", n, err)
	}
	if longInUse.Load() != 0 {
		t.Errorf("%d long buffers are not given back", longInUse.Load())
	}
}

// TestBuffer: there are only so many long buffers, however many are asked for.
func TestBuffer(t *testing.T) {
	var all [][]byte
	for i := range 2 * maxLongBuffers {
		b := Buffer(1 << 20)
		if want := len(longBuffer{}); i < maxLongBuffers && len(b) != want {
			t.Errorf("buffer %d has %d bytes, want %d", i, len(b), want)
		}
		if want := len(shortBuffer{}); i >= maxLongBuffers && len(b) != want {
			t.Errorf("buffer %d has %d bytes, want %d", i, len(b), want)
		}
		all = append(all, b)
	}
	for i, b := range all {
		Release(b[:i]) // the beginning of one will do
	}
	if n := longInUse.Load(); n != 0 {
		t.Errorf("%d long buffers are in use when all are given back", n)
	}
}
