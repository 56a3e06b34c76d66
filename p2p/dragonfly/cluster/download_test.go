package cluster

import (
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// full is a file on a disk that is full.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

// That this host can't write is no peer's fault.
func TestCopyTo(t *testing.T) {
	if _, err := copyTo(full{}, strings.NewReader("data")); !errors.Is(err, p2p.ErrNoSpace) || isPeersFault(err) {
		t.Errorf("to a full disk: %v", err)
	}
	if _, err := copyTo(io.Discard, iotest.ErrReader(syscall.ECONNRESET)); !errors.Is(err, p2p.ErrUnreachable) ||
		!isPeersFault(err) {
		t.Errorf("from a peer that resets: %v", err)
	}
}

// What a peer tells is believed only where the pieces can be those of one file: then none
// is written over another, and each has so many bytes that they can't be sent one by one to hold a
// fetch up.
func TestChecker(t *testing.T) {
	const mib = 1 << 20
	type told struct {
		number      int32
		start, size int64
	}
	three := []told{{0, 0, 4 * mib}, {2, 8 * mib, mib}, {1, 4 * mib, 4 * mib}} // in any order
	for what, c := range map[string]struct {
		known, length int64
		total         int32
		pieces        []told
		refused       int // of the pieces; -1 for what is told of all; 9 for nothing
	}{
		"three":                        {9 * mib, 9 * mib, 3, three, 9},
		"of an unknown length":         {-1, 9 * mib, 3, three, 9},
		"the last first":               {-1, 9 * mib, 3, []told{three[1], three[0], three[2]}, 9},
		"one":                          {10, 10, 1, []told{{0, 0, 10}}, 9},
		"none":                         {-1, 0, 0, nil, 9},
		"another length":               {9*mib + 1, 9 * mib, 3, nil, -1},
		"too many":                     {-1, 2 * maxTotal, maxTotal + 1, nil, -1},
		"more pieces than bytes":       {-1, 2, 3, nil, -1},
		"bytes without pieces":         {-1, 1, 0, nil, -1},
		"more than pieces can hold":    {-1, 3*maxPieceSize + 1, 3, nil, -1},
		"no such piece":                {-1, 9 * mib, 3, []told{{3, 9 * mib, 1}}, 0},
		"a piece before the first":     {-1, 9 * mib, 3, []told{{-1, 0, 4 * mib}}, 0},
		"a mark in place of a number":  {-1, 9 * mib, 3, []told{{endOfPiece, 0, 4 * mib}}, 0},
		"no bytes":                     {-1, 9 * mib, 3, []told{{0, 0, 0}}, 0},
		"behind the end":               {-1, 9 * mib, 3, []told{{2, 9 * mib, mib}}, 0},
		"beyond the end":               {-1, 9 * mib, 3, []told{{2, 8 * mib, mib + 1}}, 0},
		"not up to the end":            {-1, 9 * mib, 3, []told{{2, 8 * mib, mib - 1}}, 0},
		"at the end, and not the last": {-1, 9 * mib, 3, []told{{1, 4 * mib, 5 * mib}}, 0},
		"from the end of numbers":      {-1, 9 * mib, 3, []told{{1, -5, 4 * mib}}, 0},
		"another size":                 {-1, 9 * mib, 3, []told{{0, 0, 4 * mib}, {1, 3 * mib, 3 * mib}}, 1},
		"over another":                 {-1, 9 * mib, 3, []told{{0, 0, 4 * mib}, {1, 2 * mib, 4 * mib}}, 1},
		"a last one over others":       {-1, 9 * mib, 3, []told{{0, 0, 4 * mib}, {2, 6 * mib, 3 * mib}}, 1},
		"too large":                    {-1, 2 * maxPieceSize, 2, []told{{0, 0, maxPieceSize + 1}}, 0},
		"too small":                    {-1, 2 * (minPieceSize - 1), 2, []told{{0, 0, minPieceSize - 1}}, 0},
	} {
		check := checker{layout: layout{length: c.known}, seen: map[int32]bool{}}
		refused := 9
		if err := check.packet(&commonv1.PiecePacket{ContentLength: c.length, TotalPiece: c.total}); err != nil {
			refused = -1
		}
		for i, p := range c.pieces {
			if refused == 9 && check.piece(&commonv1.PieceInfo{
				PieceNum: p.number, RangeStart: uint64(p.start), RangeSize: uint32(p.size)}) != nil {
				refused = i
			}
		}
		if refused != c.refused || check.complete() != (c.refused == 9) {
			t.Errorf("%s: refused is %d, want %d; complete: %t", what, refused, c.refused, check.complete())
		}
	}
	check := checker{layout: layout{length: -1}, seen: map[int32]bool{}}
	if err := check.piece(&commonv1.PieceInfo{RangeSize: 10}); err == nil {
		t.Error("a piece of nobody knows how many is taken")
	}
	if err := check.packet(&commonv1.PiecePacket{ContentLength: -1, TotalPiece: -1}); err != nil || check.complete() {
		t.Errorf("of a peer that does not know yet: %v", err)
	}
	for i, total := range []int32{3, 4} {
		if err := check.packet(&commonv1.PiecePacket{
			ContentLength: 9 * mib, TotalPiece: total}); (err != nil) != (i == 1) {
			t.Errorf("%d pieces: %v", total, err)
		}
	}
	if err := check.piece(&commonv1.PieceInfo{RangeSize: 4 * mib, PieceStyle: 7}); err == nil {
		t.Error("a piece of another style is taken")
	}
}

// What peers tell of that are fetched from at once is the same content, cut in the same way:
// else one would write over what another has given.
func TestConflicts(t *testing.T) {
	store, err := pieces.Open(t.TempDir(), pieces.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	e := front.New(store, nil)
	in, err := e.Receive(t.Context(), p2p.Task{Digest: digest.SHA256.FromString("x")})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	d := &download{claims: map[span]*claim{}, e: &Source{front: e}, in: in,
		have: map[span]string{}, users: map[*attempt]bool{}}
	one, other := new(attempt), new(attempt)
	use := func(a *attempt, size int64, want error) {
		t.Helper()
		if err := d.use(a, layout{9 << 20, size}); !errors.Is(err, want) {
			t.Errorf("use: %v, want %v", err, want)
		}
	}
	first := &commonv1.PieceInfo{RangeSize: 4 << 20, PieceMd5: "a"}
	has := func(sum string, want bool, wantErr error) {
		t.Helper()
		first.PieceMd5 = sum
		if here, err := d.has(first); here != want || !errors.Is(err, wantErr) {
			t.Errorf("has %s: %t, %v; want %t, %v", sum, here, err, want, wantErr)
		}
	}
	use(one, 4<<20, nil)
	d.have[spanOf(first)] = "a"
	use(other, 1<<20, errConflict)
	has("a", true, nil)
	has("b", false, nil) // one that is alone may change its mind
	use(other, 4<<20, nil)
	has("a", true, nil)
	has("b", false, errConflict)
	d.leave(one)
	other.watch = newWatchdog(t.Context(), time.Hour)
	defer other.watch.stop()
	c, err := d.claim(t.Context(), other, first)
	if c == nil || err != nil {
		t.Fatal(c, err)
	}
	has("a", false, nil) // it is written over
	d.release(c, first)
	d.leave(other)
	use(other, 1<<20, nil)
	has("a", false, nil)
}
