package digest

import (
	"bytes"
	"context"
	"encoding"
	"errors"
	"hash"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func content(n int, seed byte) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

func TestParseCID(t *testing.T) {
	hex64, hex96, hex128 := strings.Repeat("0a", 32), strings.Repeat("0a", 48), strings.Repeat("0a", 64)
	for _, good := range []string{
		"sha256:" + hex64, "sha384:" + hex96, "sha512:" + hex128,
		"testid", "v1.2.3", "_", "A-b.c_D", strings.Repeat("x", 128), "latest",
	} {
		c, err := ParseCID(good)
		if err != nil {
			t.Errorf("%s: %v", good, err)
			continue
		}
		if c.String() != good || c.IsZero() || (c.Digest() != "") == (c.CacheID() != "") ||
			(c.Digest() != "") != strings.Contains(good, ":") {
			t.Errorf("%s: parsed as digest %q, cache ID %q", good, c.Digest(), c.CacheID())
		}
	}
	for bad, reason := range map[string]string{
		"":                                    "empty",
		"sha256:xxxxxx":                       "not a hex digit",
		"sha256:":                             "has 64 hex digits, found 0",
		"sha256:abcdef":                       "has 64 hex digits, found 6",
		"sha256:" + hex128:                    "has 64 hex digits, found 128",
		"sha512:" + hex64:                     "has 128 hex digits, found 64",
		"sha256:" + strings.ToUpper(hex64):    "lower-case",
		"SHA256:" + hex64:                     "unknown algorithm",
		"md5:d41d8cd98f00b204e9800998ecf8427": "unknown algorithm",
		":" + hex64:                           "unknown algorithm",
		"sha256:" + hex64 + ":x":              "not a hex digit",
		"sha256: " + hex64:                    "not a hex digit",
		".hidden":                             "OCI tag name",
		"-x":                                  "OCI tag name",
		"a b":                                 "OCI tag name",
		"a/b":                                 "OCI tag name",
		"é":                                   "OCI tag name",
		"a\x00":                               "OCI tag name",
		strings.Repeat("x", 129):              "128",
	} {
		_, err := ParseCID(bad)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: error is %v; want one that has %q", bad, err, reason)
		}
	}
}

// The lengths at which the pieces change.
var sizes = []int{
	0, 1, MinPieceLength - 1, MinPieceLength, MinPieceLength + 1, 2 * MinPieceLength,
	2048*MinPieceLength - 1, 2048 * MinPieceLength, 2048*MinPieceLength + 1,
	4096*MinPieceLength - 1, 4096 * MinPieceLength, 4096*MinPieceLength + 1,
}

func TestPieceLength(t *testing.T) {
	for size, want := range map[int64]int64{
		0: 64 << 10, 1: 64 << 10, 128<<20 - 1: 64 << 10, 128 << 20: 128 << 10, 256<<20 - 1: 128 << 10,
		400 << 20: 256 << 10, 4<<30 - 1: 2 << 20, 4 << 30: 4 << 20, 1 << 40: 4 << 20,
	} {
		if got := PieceLength(size); got != want {
			t.Errorf("pieces of a blob of %d bytes have %d bytes, want %d", size, got, want)
		}
	}
}

func record(t *testing.T, alg Algorithm, data []byte, step int) *Table {
	t.Helper()
	r := NewRecorder(alg)
	for len(data) > 0 {
		n := min(step, len(data))
		if _, err := r.Write(data[:n]); err != nil {
			t.Fatal(err)
		}
		data = data[n:]
	}
	table, err := r.Table()
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestRecorder(t *testing.T) {
	for _, size := range sizes {
		if size > 2048*MinPieceLength+1 && size%MinPieceLength == 0 {
			continue // a byte less and a byte more are enough of so much
		}
		if testing.Short() && size > 8<<20 {
			continue
		}
		data := content(size, 1)
		table := record(t, SHA256, data, 1<<20)
		if table.Digest != SHA256.FromBytes(data) || table.Size != int64(size) ||
			table.PieceLength != PieceLength(int64(size)) {
			t.Errorf("%d bytes: table is for %s, %d bytes, pieces of %d", size, table.Digest, table.Size,
				table.PieceLength)
		}
		for i := range table.Pieces() {
			start, end := table.Bounds(i)
			if want := crc32.Checksum(data[start:end], crc32.MakeTable(crc32.Castagnoli)); table.CRC[i] != want {
				t.Fatalf("%d bytes: CRC32C of piece %d is %08x, want %08x", size, i, table.CRC[i], want)
			}
			if err := table.VerifyPiece(i, data[start:end]); err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
		}
	}
}

func TestRecorderSteps(t *testing.T) {
	data := content(5*MinPieceLength+77, 1)
	for _, alg := range []Algorithm{SHA256, SHA384, SHA512} {
		want, _ := record(t, alg, data, len(data)).AppendBinary(nil)
		for _, step := range []int{1000, MinPieceLength - 1, MinPieceLength, MinPieceLength + 1} {
			table := record(t, alg, data, step)
			if got, _ := table.AppendBinary(nil); !bytes.Equal(got, want) {
				t.Errorf("%s: written in steps of %d bytes the table differs", alg, step)
			}
			if table.Digest != alg.FromBytes(data) {
				t.Errorf("%s: digest is %s", alg, table.Digest)
			}
		}
	}
}

func TestVerifyPieceFindsLies(t *testing.T) {
	data := content(4*MinPieceLength, 1)
	for _, alg := range []Algorithm{SHA256, SHA384, SHA512} {
		table := record(t, alg, data, 1<<20)
		piece := func(i int) []byte {
			start, end := table.Bounds(i)
			return bytes.Clone(data[start:end])
		}
		for i := range table.Pieces() {
			wrong := piece(i)
			wrong[len(wrong)/2] ^= 1
			if err := table.VerifyPiece(i, wrong); !errors.Is(err, ErrMismatch) {
				t.Errorf("%s: piece %d with a flipped bit: %v", alg, i, err)
			}
			if err := table.VerifyPiece(i, piece(i)[1:]); !errors.Is(err, ErrMismatch) {
				t.Errorf("%s: piece %d one byte short: %v", alg, i, err)
			}
		}
		if err := table.VerifyPiece(0, piece(1)); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: piece 1 in place of piece 0: %v", alg, err)
		}
		// A forged chain may fit forged pieces, but some link does not hold.
		forged := *table
		forged.Chain = bytes.Clone(table.Chain)
		forged.Chain[stateSize(alg)] ^= 1
		failed := 0
		for i := range table.Pieces() {
			if forged.VerifyPiece(i, piece(i)) != nil {
				failed++
			}
		}
		if failed != 2 {
			t.Errorf("%s: a forged state breaks %d links, want the two beside it", alg, failed)
		}
		forged.Chain = nil
		if err := forged.VerifyPiece(0, piece(0)); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: without a chain: %v", alg, err)
		}
	}
}

func TestSelfTest(t *testing.T) {
	if err := SelfTest(); err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string]func(Algorithm) hash.Hash{
		"no state at all":       func(a Algorithm) hash.Hash { return struct{ hash.Hash }{a.Hash()} },
		"a state of other form": func(a Algorithm) hash.Hash { return longState{a.Hash(), 1} },
		"a state that is wrong": func(a Algorithm) hash.Hash { return longState{a.Hash(), 0} },
	} {
		if err := testStates(broken); err == nil {
			t.Errorf("%s passes the self-test", name)
		}
	}
}

// longState is a hash whose state has more bytes, or, with 0, wrong ones.
type longState struct {
	hash.Hash
	more int
}

func (h longState) AppendBinary(b []byte) ([]byte, error) {
	b, err := h.Hash.(encoding.BinaryAppender).AppendBinary(b)
	for i := range b[4:40] {
		b[4+i] ^= 0x55
	}
	return append(b, make([]byte, h.more)...), err
}

func (h longState) UnmarshalBinary(b []byte) error {
	return h.Hash.(encoding.BinaryUnmarshaler).UnmarshalBinary(b)
}

func TestCombineCRC(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		a, b := content(r.IntN(5000), 1), content(r.IntN(5000), 2)
		if got, want := combineCRC(CRC32C(a), CRC32C(b),
			int64(len(b))), CRC32C(append(bytes.Clone(a), b...)); got != want {
			t.Fatalf("%d and %d bytes: %08x, want %08x", len(a), len(b), got, want)
		}
	}
}

func TestTableCoding(t *testing.T) {
	for _, alg := range []Algorithm{SHA256, SHA384, SHA512} {
		for _, size := range []int{0, 1, MinPieceLength, 5*MinPieceLength + 1} {
			table := record(t, alg, content(size, 1), 1<<20)
			data, err := table.AppendBinary(nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := DecodeTable(table.Digest, data)
			if err != nil {
				t.Fatal(err)
			}
			again, _ := got.AppendBinary(nil)
			if !bytes.Equal(again, data) || got.Digest != table.Digest || got.Size != table.Size {
				t.Errorf("%s of %d bytes: decoding and encoding changes the table", alg, size)
			}
			for i := range data {
				wrong := bytes.Clone(data)
				wrong[i] ^= 0x10
				if _, err := DecodeTable(table.Digest, wrong); !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s of %d bytes: with byte %d changed: %v", alg, size, i, err)
				}
				if _, err := DecodeTable(table.Digest, data[:i]); !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s of %d bytes: cut at %d: %v", alg, size, i, err)
				}
			}
		}
	}
}

func TestVerifiedFindsDamage(t *testing.T) {
	data := content(5*MinPieceLength+99, 1)
	table := record(t, SHA256, data, 1<<20)
	for name, damage := range map[string]func([]byte) []byte{
		"a flipped bit":  func(p []byte) []byte { p[2*MinPieceLength+5] ^= 4; return p },
		"a byte missing": func(p []byte) []byte { return append(p[:2*MinPieceLength+5], p[2*MinPieceLength+6:]...) },
		"cut short":      func(p []byte) []byte { return p[:2*MinPieceLength+1] },
	} {
		v := NewVerified(bytes.NewReader(damage(bytes.Clone(data))), table)
		var out bytes.Buffer
		err := v.CopyRange(t.Context(), &out, 0, v.Size(), nil)
		if e, ok := errors.AsType[*CorruptError](err); !ok || e.Piece != 2 || e.Digest != table.Digest {
			t.Errorf("%s: copy: %v; want a corrupt piece 2", name, err)
		}
		if !bytes.HasPrefix(data, out.Bytes()) {
			t.Errorf("%s: copy: wrong bytes were written", name)
		}
		for _, n := range []int{1, 100, len(data) - 10} {
			p := make([]byte, n)
			got, err := v.ReadAt(p, 10)
			if !bytes.Equal(p[:got], data[10:10+got]) {
				t.Errorf("%s: reading %d bytes gives wrong ones", name, n)
			}
			if n > 3*MinPieceLength && !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: reading %d bytes: %v", name, n, err)
			}
		}
		p := bytes.Repeat([]byte{0xee}, MinPieceLength)
		if n, err := v.ReadAt(p, 2*MinPieceLength); n != 0 || !errors.Is(err, ErrCorrupt) ||
			bytes.Contains(p, data[2*MinPieceLength:2*MinPieceLength+4]) {
			t.Errorf("%s: reading the damaged piece gives %d bytes, %v", name, n, err)
		}
	}
}

// TestVerifiedCopyWithoutMemory: where other copies have all the memory there is, the
// same comes out, and what has changed since it was checked does not.
func TestVerifiedCopyWithoutMemory(t *testing.T) {
	kept.Add(maxKept)
	defer kept.Add(-maxKept)
	data := content(40*MinPieceLength+99, 1)
	table := record(t, SHA256, data, 1<<20)
	source := bytes.Clone(data)
	v := NewVerified(bytes.NewReader(source), table)
	for _, r := range [][2]int64{{0, v.Size()}, {1, 1}, {MinPieceLength - 1, 2},
		{3*MinPieceLength + 5, 20 * MinPieceLength}, {v.Size() - 1, 1}} {
		var out bytes.Buffer
		if err := v.CopyRange(t.Context(), &out, r[0], r[1], nil); err != nil ||
			!bytes.Equal(out.Bytes(), data[r[0]:r[0]+r[1]]) {
			t.Errorf("copy of %d bytes from %d on: %d bytes, %v", r[1], r[0], out.Len(), err)
		}
	}
	// The first MiB has been checked when its first block is written.
	var out bytes.Buffer
	changing := writerFunc(func(p []byte) (int, error) {
		source[3*MinPieceLength] ^= 1
		return out.Write(p)
	})
	err := v.CopyRange(t.Context(), changing, 0, v.Size(), nil)
	if e, ok := errors.AsType[*CorruptError](err); !ok || e.Piece != 3 ||
		!bytes.Equal(out.Bytes(), data[:3*MinPieceLength]) {
		t.Errorf("copy of what changes: %d bytes, %v; want a corrupt piece 3, and what is before it", out.Len(), err)
	}
	if n := kept.Load(); n != maxKept {
		t.Errorf("%d blocks are kept in memory, want none but those of others", n-maxKept)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

type brokenReaderAt struct{}

var errBroken = errors.New("broken disk")

func (brokenReaderAt) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

func TestVerifiedReadError(t *testing.T) {
	table := record(t, SHA256, content(100, 1), 100)
	if _, err := NewVerified(brokenReaderAt{}, table).ReadAt(make([]byte, 1), 0); !errors.Is(err, errBroken) ||
		errors.Is(err, ErrCorrupt) {
		t.Errorf("error is %v; want that of the disk, and not one of corruption", err)
	}
}

func TestVerifiedReader(t *testing.T) {
	for _, size := range []int{0, 1, 3*MinPieceLength + 1} {
		data := content(size, 1)
		v := NewVerified(bytes.NewReader(data), record(t, SHA256, data, 1<<20))
		if err := iotest.TestReader(io.NewSectionReader(v, 0, v.Size()), data); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestVerifiedCopyStops(t *testing.T) {
	data := content(20*MinPieceLength, 1)
	v := NewVerified(bytes.NewReader(data), record(t, SHA256, data, 1<<20))
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	n := 0
	err := v.CopyRange(ctx, io.Discard, 0, v.Size(), func(int64) {
		if n++; n == 2 {
			cancel(cause)
		}
	})
	if !errors.Is(err, cause) || n > 2 {
		t.Errorf("copy ends after %d pieces with %v", n, err)
	}
}

func TestVerifiedCopyRangeStalledPipe(t *testing.T) {
	data := content(4*MinPieceLength, 1) // more than a pipe holds
	v := NewVerified(bytes.NewReader(data), record(t, SHA256, data, 1<<20))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- v.CopyRange(ctx, w, 0, v.Size(), nil) }()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil { // it is writing
		t.Fatal(err)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("copy to a pipe that nobody reads: %v", err)
	}
}

func FuzzParseCID(f *testing.F) {
	for _, s := range []string{"", "testid", "sha256:xxxxxx", "sha256:" + strings.Repeat("0a", 32),
		"sha512:" + strings.Repeat("A0", 64), "a:b:c", "é", "x\x00y", strings.Repeat("v", 200)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseCID(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if again, err := ParseCID(c.String()); err != nil || again != c || c.String() != s {
			t.Errorf("%q: parsed as %v, which parses as %v (%v)", s, c, again, err)
		}
		if d := c.Digest(); d != "" && d.Validate() != nil {
			t.Errorf("%q: %v", s, d.Validate())
		}
		if strings.ContainsAny(s, "/\x00 ") {
			t.Errorf("%q was accepted", s)
		}
	})
}

func FuzzDecodeTable(f *testing.F) {
	for _, size := range []int{0, 1, 3*MinPieceLength + 1} {
		r := NewRecorder(SHA256)
		r.Write(content(size, 1))
		table, err := r.Table()
		if err != nil {
			f.Fatal(err)
		}
		data, _ := table.AppendBinary(nil)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d := SHA256.FromString("any")
		table, err := DecodeTable(d, data)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error is %v", err)
			}
			// Past the checksum, which fuzzing does not find by itself.
			if len(data) < tableHeader {
				return
			}
			body := bytes.Clone(data)
			body[0] = tableVersion
			sum := CRC32C(body)
			body = append(body, byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
			if table, err = DecodeTable(d, body); err != nil {
				return
			}
		}
		for i := range table.Pieces() {
			start, end := table.Bounds(i)
			if end-start > MaxPieceLength || start >= end || end > table.Size {
				t.Fatalf("piece %d is from %d to %d of %d", i, start, end, table.Size)
			}
		}
		if _, err := DecodeTable(d, must(table.AppendBinary(nil))); err != nil {
			t.Errorf("encoded again it can't be decoded: %v", err)
		}
	})
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
