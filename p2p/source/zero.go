package source

import "bytes"

// HoleLength is how many bytes of zeros are worth a hole in a file, at most: they are looked at by as many.
const HoleLength = 64 << 10

// minHole is how many bytes are worth a hole, at least: file systems have them in pages.
const minHole = 4 << 10

var zeros [HoleLength]byte

// IsZero reports whether p has nothing but zeros, and enough of them for a hole in a file. Where it begins with
// anything else, it looks no further.
func IsZero(p []byte) bool {
	if len(p) < minHole {
		return false
	}
	for len(p) > HoleLength {
		if !bytes.Equal(p[:HoleLength], zeros[:]) {
			return false
		}
		p = p[HoleLength:]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
