package cluster

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// maxSums is of how many pieces the MD5s are remembered: 4 MiB of them, for 1 TiB of
// small files, and up to 4 TiB of large ones.
const maxSums = 256 << 10

// sums computes the MD5s of the pieces of blobs, and remembers them.
type sums struct {
	computing chan struct{} // holds one while a piece is read: one at a time, whoever asks

	mu    sync.Mutex
	of    map[digest.Digest][][]byte // nil: not computed yet
	count int                        // pieces in of
}

func newSums() *sums {
	return &sums{computing: make(chan struct{}, 1), of: map[digest.Digest][][]byte{}}
}

// piece returns the MD5 of a piece, of which every byte is verified on the way.
func (s *sums) piece(ctx context.Context, d digest.Digest, blob *pieces.Blob, i int) ([]byte, error) {
	if sum := s.known(d, i); sum != nil {
		return sum, nil
	}
	select {
	case s.computing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.computing }()
	if sum := s.known(d, i); sum != nil { // meanwhile
		return sum, nil
	}
	size := blob.Size()
	start := int64(i) * pieceSize(size)
	h := md5.New()
	if err := blob.CopyRange(ctx, h, start, min(pieceSize(size), size-start), nil); err != nil {
		return nil, err
	}
	sum := h.Sum(nil)
	s.remember(d, pieceCount(size), i, sum)
	return sum, nil
}

func (s *sums) known(d digest.Digest, i int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if of := s.of[d]; i < len(of) {
		return of[i]
	}
	return nil
}

// remember remembers the sum of piece i of a blob that has n.
func (s *sums) remember(d digest.Digest, n, i int, sum []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of[d] == nil {
		s.of[d] = make([][]byte, n)
		s.count += n
	}
	s.of[d][i] = sum
	for other, of := range s.of { // in no order: any will do
		if s.count <= maxSums {
			break
		}
		if other != d {
			delete(s.of, other)
			s.count -= len(of)
		}
	}
}

// sign returns Dragonfly's sum over all MD5s of a blob, or "" where they are not all known.
func (s *sums) sign(d digest.Digest) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := s.of[d]
	h := sha256.New()
	for _, sum := range of {
		if sum == nil {
			return ""
		}
		h.Write([]byte(hex.EncodeToString(sum)))
	}
	if len(of) == 0 {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}
