package digest

import (
	"fmt"
	"hash"
	"hash/crc32"
)

// Recorder hashes a blob as it is written and makes the [Table] of its pieces
// on the way, at the cost of the hash alone. The size need not be known before:
// a Recorder starts with the shortest pieces and joins neighbours when there
// are too many, so that it ends with the pieces that [PieceLength] gives. Up to
// 8 GiB its memory is constant; past that it keeps 36 to 68 bytes for each 4 MiB.
//
// A Recorder is not safe for concurrent use.
type Recorder struct {
	alg    Algorithm
	h      hash.Hash
	size   int64
	length int64 // of a piece, for now
	crc    uint32
	crcs   []uint32
	chain  []byte
}

// NewRecorder returns a Recorder for one of the algorithms that [ParseAlgorithm] accepts.
func NewRecorder(alg Algorithm) *Recorder {
	return &Recorder{alg: alg, h: alg.Hash(), length: MinPieceLength}
}

// Size returns the number of bytes written so far.
func (r *Recorder) Size() int64 { return r.size }

// Write hashes p. It never fails.
func (r *Recorder) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		// A piece is closed when the byte after it arrives, so that the last
		// one, which ends at the digest, is never taken for one in the middle.
		if r.size > 0 && r.size%r.length == 0 {
			if err := r.closePiece(); err != nil {
				return total - len(p), err
			}
		}
		n := min(int64(len(p)), r.length-r.size%r.length)
		r.h.Write(p[:n])
		r.crc = crc32.Update(r.crc, castagnoli(), p[:n])
		r.size += n
		p = p[n:]
	}
	return total, nil
}

// closePiece records the piece that ends here.
func (r *Recorder) closePiece() error {
	var err error
	if r.chain, err = appendState(r.chain, r.h); err != nil {
		return err
	}
	r.crcs, r.crc = append(r.crcs, r.crc), 0
	if len(r.crcs) == 2*piecesPerBlob && r.length < MaxPieceLength {
		r.join()
	}
	return nil
}

// join makes one piece of every two.
func (r *Recorder) join() {
	n := stateSize(r.alg)
	half := len(r.crcs) / 2
	for i := range half {
		r.crcs[i] = combineCRC(r.crcs[2*i], r.crcs[2*i+1], r.length)
		copy(r.chain[i*n:(i+1)*n], r.chain[(2*i+1)*n:])
	}
	r.crcs, r.chain = r.crcs[:half], r.chain[:half*n]
	r.length *= 2
}

// Table returns the table of what has been written. The Recorder must not be
// written to after that.
func (r *Recorder) Table() (*Table, error) {
	if r.size > int64(len(r.crcs))*r.length {
		r.crcs, r.crc = append(r.crcs, r.crc), 0
	}
	if r.size == 2*piecesPerBlob*r.length && r.length < MaxPieceLength {
		// The chain has no state for the end of the last piece, and join does
		// not need one: it keeps the state after each pair, the last of which is the digest.
		r.chain = append(r.chain, make([]byte, stateSize(r.alg))...)
		r.join()
		r.chain = r.chain[:len(r.chain)-stateSize(r.alg)]
	}
	t := &Table{
		Digest:      Digest(fmt.Sprintf("%s:%x", r.alg, r.h.Sum(nil))),
		Size:        r.size,
		PieceLength: r.length,
		CRC:         r.crcs,
		Chain:       r.chain,
	}
	if t.PieceLength != PieceLength(t.Size) || len(t.CRC) != t.Pieces() {
		return nil, fmt.Errorf("piece table of %s: %d pieces of %d bytes do not fit %d bytes", t.Digest, len(t.CRC),
			t.PieceLength, t.Size)
	}
	return t, nil
}

// combineCRC returns the CRC32C of two runs of bytes, one after the other,
// from the CRC32C of each and the length of the second: a multiplication by
// x^(8*length) modulo the polynomial, as crc32_combine of zlib does it.
func combineCRC(first, second uint32, length int64) uint32 {
	power := uint32(1 << 31) // x^0
	square := uint32(1 << 30)
	for n := uint64(length) * 8; n > 0; n >>= 1 {
		if n&1 == 1 {
			power = multiplyCRC(square, power)
		}
		square = multiplyCRC(square, square)
	}
	return multiplyCRC(power, first) ^ second
}

// multiplyCRC multiplies two polynomials modulo that of CRC32C. The highest
// bit is the coefficient of x^0.
func multiplyCRC(a, b uint32) uint32 {
	var product uint32
	for bit := uint32(1 << 31); bit != 0; bit >>= 1 {
		if a&bit != 0 {
			product ^= b
		}
		if b&1 == 1 {
			b = b>>1 ^ crc32.Castagnoli
		} else {
			b >>= 1
		}
	}
	return product
}
