package digest

import (
	"bytes"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"sync"
)

// The bounds of a piece's length in bytes. Both are multiples of the block
// length of every SHA-2 function, so that at a piece boundary the hash state
// is the chaining value alone.
const (
	MinPieceLength = 64 << 10
	MaxPieceLength = 4 << 20
)

// piecesPerBlob is the number of pieces that a blob has at least, where the
// bounds of a piece's length allow it.
const piecesPerBlob = 1024

// PieceLength returns the length in bytes of the pieces of a blob of size
// bytes: the largest power of two that still makes 1024 pieces, within
// [MinPieceLength] and [MaxPieceLength]. It is a function of the size alone so
// that every peer cuts a blob alike.
func PieceLength(size int64) int64 {
	length := int64(MinPieceLength)
	for length < MaxPieceLength && size/piecesPerBlob >= 2*length {
		length *= 2
	}
	return length
}

// castagnoli is made when it is first needed, not at every start of a program.
var castagnoli = sync.OnceValue(func() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) })

// CRC32C returns the checksum that guards stored bytes against bit rot.
func CRC32C(p []byte) uint32 { return AddCRC32C(0, p) }

// AddCRC32C returns the CRC32C of what has the CRC32C crc, followed by p.
func AddCRC32C(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli(), p) }

// Table describes the pieces of one blob: the CRC32C of each and the hash
// state at each boundary between two. Its fields are not to be changed once it
// is built; it is then safe for concurrent use.
type Table struct {
	Digest      Digest
	Size        int64    // of the blob, in bytes
	PieceLength int64    // of every piece but the last, in bytes
	CRC         []uint32 // CRC32C of each piece
	Chain       []byte   // the hash states at the boundaries, one after the other; nil where unknown
}

// Pieces returns the number of pieces. An empty blob has none.
func (t *Table) Pieces() int { return pieceCount(t.Size, t.PieceLength) }

func pieceCount(size, length int64) int { return int((size + length - 1) / length) }

// Bounds returns where piece i starts and ends in the blob.
func (t *Table) Bounds(i int) (start, end int64) {
	start = int64(i) * t.PieceLength
	return start, min(start+t.PieceLength, t.Size)
}

// CheckPiece compares piece i with its CRC32C. The error is a [CorruptError].
func (t *Table) CheckPiece(i int, p []byte) error {
	return t.CheckSum(i, int64(len(p)), CRC32C(p))
}

// CheckSum compares the length of piece i in bytes, and its CRC32C, with what they are to
// be. The error is a [CorruptError].
func (t *Table) CheckSum(i int, length int64, crc uint32) error {
	start, end := t.Bounds(i)
	if length != end-start {
		return &CorruptError{t.Digest, i, fmt.Sprintf("%d of %d bytes are missing", end-start-length, end-start)}
	}
	if crc != t.CRC[i] {
		return &CorruptError{t.Digest, i, fmt.Sprintf("CRC32C is %08x, recorded was %08x", crc, t.CRC[i])}
	}
	return nil
}

// errBrokenLink says that a piece does not lead from one state of the chain to the next.
var errBrokenLink = errors.New("piece and hash chain do not fit")

// VerifyPiece proves piece i against the digest of the whole blob, given that
// every other link of the chain is proven too. A failure wraps [ErrMismatch]:
// either the piece or the chain is not of this blob.
func (t *Table) VerifyPiece(i int, p []byte) error {
	v, err := t.Verifier(i)
	if err != nil {
		return err
	}
	v.Write(p)
	_, err = v.Verify()
	return err
}

// Verifier hashes a piece as it arrives, to verify it as [Table.VerifyPiece]
// does. It is not safe for concurrent use.
type Verifier struct {
	t    *Table
	i    int
	h    hash.Hash
	crc  uint32
	size int64
}

// Verifier returns a Verifier for piece i. It fails where t has no hash chain.
func (t *Table) Verifier(i int) (*Verifier, error) {
	alg := t.Digest.Algorithm()
	n := stateSize(alg)
	if i < 0 || i >= t.Pieces() {
		return nil, fmt.Errorf("piece %d of %s: %w: it has %d pieces", i, t.Digest, ErrInvalid, t.Pieces())
	}
	if len(t.Chain) != ChainSize(alg, t.Size) {
		return nil, fmt.Errorf("piece %d of %s: %w: there is no hash chain to verify it with", i, t.Digest, ErrMismatch)
	}
	h := alg.Hash()
	if i > 0 {
		start, _ := t.Bounds(i)
		if err := setState(h, t.Chain[(i-1)*n:i*n], start); err != nil {
			return nil, fmt.Errorf("piece %d of %s: %w", i, t.Digest, err)
		}
	}
	return &Verifier{t: t, i: i, h: h}, nil
}

// Write hashes the next bytes of the piece. It never fails.
func (v *Verifier) Write(p []byte) (int, error) {
	v.crc = crc32.Update(v.crc, castagnoli(), p)
	v.size += int64(len(p))
	return v.h.Write(p)
}

// Verify says whether what was written is the piece, and returns its CRC32C. A
// failure wraps [ErrMismatch].
func (v *Verifier) Verify() (crc uint32, err error) {
	t, i := v.t, v.i
	start, end := t.Bounds(i)
	if v.size != end-start {
		return 0, fmt.Errorf("piece %d of %s: %w: it has %d bytes, want %d", i, t.Digest, ErrMismatch, v.size,
			end-start)
	}
	alg := t.Digest.Algorithm()
	n := stateSize(alg)
	ok := false
	if i == t.Pieces()-1 {
		ok = Digest(alg.String()+":"+alg.Encode(v.h.Sum(nil))) == t.Digest
	} else {
		state, err := appendState(nil, v.h)
		if err != nil {
			return 0, fmt.Errorf("piece %d of %s: %w", i, t.Digest, err)
		}
		ok = bytes.Equal(state, t.Chain[i*n:(i+1)*n])
	}
	if !ok {
		return 0, fmt.Errorf("piece %d of %s: %w: %w", i, t.Digest, ErrMismatch, errBrokenLink)
	}
	return v.crc, nil
}

// ChainSize returns the length in bytes of the hash chain of a blob of size bytes.
func ChainSize(alg Algorithm, size int64) int {
	return stateSize(alg) * max(pieceCount(size, PieceLength(size))-1, 0)
}

// stateSize returns the length in bytes of a hash's chaining value.
func stateSize(alg Algorithm) int {
	if alg == SHA256 {
		return 32
	}
	return 64
}

// A marshaled SHA-2 state is a magic of four bytes, the chaining value, the
// block that is not full yet, and the count of bytes hashed, in 8 bytes. At a
// piece boundary the block is empty and the count is the offset, so the
// chaining value is all there is to keep. [SelfTest] guards this.
const magicSize, countSize = 4, 8

func appendState(b []byte, h hash.Hash) ([]byte, error) {
	m, ok := h.(encoding.BinaryAppender)
	if !ok {
		return nil, fmt.Errorf("hash state of %T can't be read", h)
	}
	var space [256]byte
	all, err := m.AppendBinary(space[:0])
	if err != nil {
		return nil, fmt.Errorf("hash state: %w", err)
	}
	// Half of a block is the chaining value: 32 of 64 bytes, 64 of 128.
	n := h.BlockSize() / 2
	if len(all) != magicSize+n+h.BlockSize()+countSize {
		return nil, fmt.Errorf("hash state of %T has an unknown form (%d bytes)", h, len(all))
	}
	return append(b, all[magicSize:magicSize+n]...), nil
}

// setState makes h what it was after offset bytes, when its chaining value was state.
func setState(h hash.Hash, state []byte, offset int64) error {
	m, ok := h.(interface {
		encoding.BinaryAppender
		encoding.BinaryUnmarshaler
	})
	if !ok {
		return fmt.Errorf("hash state of %T can't be set", h)
	}
	h.Reset()
	var space [256]byte
	all, err := m.AppendBinary(space[:0])
	if err != nil {
		return fmt.Errorf("hash state: %w", err)
	}
	copy(all[magicSize:], state)
	binary.BigEndian.PutUint64(all[len(all)-countSize:], uint64(offset))
	if err := m.UnmarshalBinary(all); err != nil {
		return fmt.Errorf("hash state: %w", err)
	}
	return nil
}

// testStates reports whether the states of hashes can be read and set.
func testStates(hashes func(Algorithm) hash.Hash) error {
	for _, alg := range []Algorithm{SHA256, SHA384, SHA512} {
		data := make([]byte, 3*alg.Hash().BlockSize()+1)
		for i := range data {
			data[i] = byte(i * 7)
		}
		first, second := data[:len(data)/3], data[len(data)/3:]
		h := hashes(alg)
		h.Write(first)
		state, err := appendState(nil, h)
		if err != nil {
			return fmt.Errorf("hash self-test: %s: %w", alg, err)
		}
		h = hashes(alg)
		if err := setState(h, state, int64(len(first))); err != nil {
			return fmt.Errorf("hash self-test: %s: %w", alg, err)
		}
		h.Write(second)
		if got, want := Digest(alg.String()+":"+alg.Encode(h.Sum(nil))), alg.FromBytes(data); got != want {
			return fmt.Errorf("hash self-test: %s: with a state that was set the digest is %s, want %s", alg, got, want)
		}
	}
	return nil
}

// SelfTest reports whether the states of Go's SHA-2 can be read and set as hash
// chains need it: nothing of this package works without. It takes microseconds,
// once in a process.
func SelfTest() error { return statesOfGo() }

var statesOfGo = sync.OnceValue(func() error { return testStates(Algorithm.Hash) })

// tableVersion is the first byte of an encoded table.
const tableVersion = 1

// tableHeader is the length of what stands before the checksums in an encoded
// table: version, three bytes of zero, piece length, size.
const tableHeader = 1 + 3 + 4 + 8

// AppendBinary appends the form in which a table is stored, described in
// docs/format.md, to b. The digest is not part of it: it is the key that the
// table is stored under.
func (t *Table) AppendBinary(b []byte) ([]byte, error) {
	start := len(b)
	b = append(b, tableVersion, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(t.PieceLength))
	b = binary.LittleEndian.AppendUint64(b, uint64(t.Size))
	for _, c := range t.CRC {
		b = binary.LittleEndian.AppendUint32(b, c)
	}
	b = append(b, t.Chain...)
	return binary.LittleEndian.AppendUint32(b, CRC32C(b[start:])), nil
}

// DecodeTable decodes what [Table.AppendBinary] made of the table of the blob
// d. Its pieces may be longer than [PieceLength] has them now: earlier versions
// made them so. It does not keep b. An error is a [CorruptError] for the whole blob.
func DecodeTable(d Digest, b []byte) (*Table, error) {
	damaged := func(format string, args ...any) error {
		return &CorruptError{d, -1, "piece table: " + fmt.Sprintf(format, args...)}
	}
	if len(b) < tableHeader+4 {
		return nil, damaged("%d bytes are too few", len(b))
	}
	if b[0] != tableVersion {
		return nil, damaged("unknown version %d: it was written by a newer dfcache", b[0])
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if got := CRC32C(body); got != sum {
		return nil, damaged("CRC32C is %08x, recorded was %08x", got, sum)
	}
	length := int64(binary.LittleEndian.Uint32(body[4:]))
	size := int64(binary.LittleEndian.Uint64(body[8:]))
	if size < 0 || length < MinPieceLength || length > MaxPieceLength || length&(length-1) != 0 {
		return nil, damaged("pieces of %d bytes do not fit a blob of %d bytes", length, size)
	}
	body = body[tableHeader:]
	pieces, state := pieceCount(size, length), stateSize(d.Algorithm())
	// The count of pieces is bounded by the bytes at hand before it is used to allocate.
	if pieces > len(body)/4 || len(body) != 4*pieces+state*max(pieces-1, 0) {
		return nil, damaged("%d bytes do not fit %d pieces", len(b), pieces)
	}
	t := &Table{Digest: d, Size: size, PieceLength: length, CRC: make([]uint32, pieces)}
	for i := range t.CRC {
		t.CRC[i] = binary.LittleEndian.Uint32(body[4*i:])
	}
	t.Chain = bytes.Clone(body[4*pieces:])
	return t, nil
}
