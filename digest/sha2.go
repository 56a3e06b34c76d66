package digest

import (
	"encoding/binary"
	"errors"
	"hash"
	"math/big"
	"math/bits"
	"slices"
	"sync"
)

// sha2 is SHA-256, SHA-384 or SHA-512 as FIPS 180-4 describes them, in the plain
// way: it stands in where the state of Go's own can't be read ([SelfTest]). Its
// marshaled form is the one that Go's have.
type sha2 struct {
	alg   Algorithm
	state [8]uint64 // of SHA-256 in the low halves
	block []byte    // that is not full yet
	count uint64    // of bytes hashed
}

func newSHA2(alg Algorithm) hash.Hash {
	h := &sha2{alg: alg}
	h.Reset()
	return h
}

// constants are the fractional parts of roots of primes that FIPS 180-4, 4.2 and
// 5.3, has: 64 bits each. Those of SHA-256 are their high halves.
var constants = sync.OnceValue(func() (c struct {
	k              []uint64
	sha512, sha384 [8]uint64
}) {
	c.k = make([]uint64, 80)
	prime := int64(1)
	for i := range c.k {
		for prime++; !big.NewInt(prime).ProbablyPrime(0); prime++ {
		}
		if i < 16 {
			root := new(big.Int).Lsh(big.NewInt(prime), 128)
			first := root.Sqrt(root).Uint64()
			if i < 8 {
				c.sha512[i] = first
			} else {
				c.sha384[i-8] = first
			}
		}
		// The cube root of prime<<192 lies between 1<<64 and 1<<68.
		cube := new(big.Int).Lsh(big.NewInt(prime), 192)
		root := new(big.Int)
		for bit := 67; bit >= 0; bit-- {
			root.SetBit(root, bit, 1)
			if power := new(big.Int).Exp(root, big.NewInt(3), nil); power.Cmp(cube) > 0 {
				root.SetBit(root, bit, 0)
			}
		}
		c.k[i] = new(big.Int).And(root, new(big.Int).SetUint64(1<<64-1)).Uint64()
	}
	return c
})

func (h *sha2) Reset() {
	c := constants()
	h.block, h.count = h.block[:0], 0
	switch h.alg {
	case SHA256:
		for i, v := range c.sha512 {
			h.state[i] = v >> 32
		}
	case SHA384:
		h.state = c.sha384
	default:
		h.state = c.sha512
	}
}

func (h *sha2) BlockSize() int { return 2 * stateSize(h.alg) }

func (h *sha2) Size() int { return h.alg.Size() }

func (h *sha2) Write(p []byte) (int, error) {
	n := len(p)
	h.count += uint64(n)
	for len(p) > 0 {
		if len(h.block) == 0 && len(p) >= h.BlockSize() {
			h.compress(p[:h.BlockSize()])
			p = p[h.BlockSize():]
			continue
		}
		part := min(len(p), h.BlockSize()-len(h.block))
		h.block = append(h.block, p[:part]...)
		p = p[part:]
		if len(h.block) == h.BlockSize() {
			h.compress(h.block)
			h.block = h.block[:0]
		}
	}
	return n, nil
}

// Sum pads a copy, as 5.1 says, and appends its hash.
func (h *sha2) Sum(b []byte) []byte {
	end := &sha2{alg: h.alg, state: h.state, block: slices.Clone(h.block)}
	lengthSize := h.BlockSize() / 8
	zeros := (2*h.BlockSize() - len(h.block) - 1 - lengthSize) % h.BlockSize()
	padding := append([]byte{0x80}, make([]byte, zeros+lengthSize-8)...)
	end.Write(binary.BigEndian.AppendUint64(padding, h.count<<3)) // of fewer than 2 EiB
	return append(b, end.appendState(nil)[:h.Size()]...)
}

func (h *sha2) appendState(b []byte) []byte {
	for _, v := range h.state {
		if h.alg == SHA256 {
			b = binary.BigEndian.AppendUint32(b, uint32(v))
		} else {
			b = binary.BigEndian.AppendUint64(b, v)
		}
	}
	return b
}

// AppendBinary implements [encoding.BinaryAppender].
func (h *sha2) AppendBinary(b []byte) ([]byte, error) {
	b = h.appendState(append(b, make([]byte, magicSize)...))
	b = append(b, h.block...)
	b = append(b, make([]byte, h.BlockSize()-len(h.block))...)
	return binary.BigEndian.AppendUint64(b, h.count), nil
}

// UnmarshalBinary implements [encoding.BinaryUnmarshaler].
func (h *sha2) UnmarshalBinary(b []byte) error {
	if len(b) != magicSize+stateSize(h.alg)+h.BlockSize()+countSize {
		return errors.New("not the state of this hash")
	}
	b = b[magicSize:]
	for i := range h.state {
		if h.alg == SHA256 {
			h.state[i] = uint64(binary.BigEndian.Uint32(b[4*i:]))
		} else {
			h.state[i] = binary.BigEndian.Uint64(b[8*i:])
		}
	}
	b = b[stateSize(h.alg):]
	h.count = binary.BigEndian.Uint64(b[h.BlockSize():])
	h.block = append(h.block[:0], b[:h.count%uint64(h.BlockSize())]...)
	return nil
}

// compress hashes one block: 6.2.2 and 6.4.2.
func (h *sha2) compress(p []byte) {
	if h.alg == SHA256 {
		h.compress32(p)
	} else {
		h.compress64(p)
	}
}

func (h *sha2) compress32(p []byte) {
	var w [64]uint32
	for i := range 16 {
		w[i] = binary.BigEndian.Uint32(p[4*i:])
	}
	for i := 16; i < len(w); i++ {
		x, y := w[i-15], w[i-2]
		w[i] = w[i-16] + w[i-7] + (bits.RotateLeft32(x, -7) ^ bits.RotateLeft32(x, -18) ^ x>>3) + (bits.RotateLeft32(y, -17) ^ bits.RotateLeft32(y, -19) ^ y>>10)
	}
	k, s := (*[64]uint64)(constants().k), &h.state
	a, b, c, d, e, f, g, z := uint32(s[0]), uint32(s[1]), uint32(s[2]), uint32(s[3]), uint32(s[4]), uint32(s[5]), uint32(s[6]), uint32(s[7])
	for i := range w {
		t := z + (bits.RotateLeft32(e, -6) ^ bits.RotateLeft32(e, -11) ^ bits.RotateLeft32(e, -25)) + (e&f ^ ^e&g) + uint32(k[i]>>32) + w[i]
		u := (bits.RotateLeft32(a, -2) ^ bits.RotateLeft32(a, -13) ^ bits.RotateLeft32(a, -22)) + (a&b ^ a&c ^ b&c)
		a, b, c, d, e, f, g, z = t+u, a, b, c, d+t, e, f, g
	}
	for i, v := range [...]uint32{a, b, c, d, e, f, g, z} {
		s[i] = uint64(uint32(s[i]) + v)
	}
}

func (h *sha2) compress64(p []byte) {
	var w [80]uint64
	for i := range 16 {
		w[i] = binary.BigEndian.Uint64(p[8*i:])
	}
	for i := 16; i < len(w); i++ {
		x, y := w[i-15], w[i-2]
		w[i] = w[i-16] + w[i-7] + (bits.RotateLeft64(x, -1) ^ bits.RotateLeft64(x, -8) ^ x>>7) + (bits.RotateLeft64(y, -19) ^ bits.RotateLeft64(y, -61) ^ y>>6)
	}
	k, s := (*[80]uint64)(constants().k), &h.state
	a, b, c, d, e, f, g, z := s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
	for i := range w {
		t := z + (bits.RotateLeft64(e, -14) ^ bits.RotateLeft64(e, -18) ^ bits.RotateLeft64(e, -41)) + (e&f ^ ^e&g) + k[i] + w[i]
		u := (bits.RotateLeft64(a, -28) ^ bits.RotateLeft64(a, -34) ^ bits.RotateLeft64(a, -39)) + (a&b ^ a&c ^ b&c)
		a, b, c, d, e, f, g, z = t+u, a, b, c, d+t, e, f, g
	}
	for i, v := range [...]uint64{a, b, c, d, e, f, g, z} {
		s[i] += v
	}
}
