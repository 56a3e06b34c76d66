package cluster

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// maxSums is of how many pieces the MD5s are remembered: 4 MiB of them, for 1 TiB of
// small files, and up to 4 TiB of large ones.
const maxSums = 256 << 10

// sums computes the MD5s of the pieces of blobs, and remembers them.
type sums struct {
	computing chan struct{} // holds one while a blob is read: one at a time

	mu    sync.Mutex
	of    map[digest.Digest][][]byte
	count int // pieces in of
}

func newSums() *sums {
	return &sums{computing: make(chan struct{}, 1), of: map[digest.Digest][][]byte{}}
}

// pieces returns the MD5s of a blob's pieces, of which every byte is verified on the way.
func (s *sums) pieces(ctx context.Context, d digest.Digest, blob *pieces.Blob) ([][]byte, error) {
	if known, ok := s.known(d); ok {
		return known, nil
	}
	select {
	case s.computing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.computing }()
	if known, ok := s.known(d); ok { // meanwhile
		return known, nil
	}
	size := blob.Size()
	c := &cutter{size: pieceSize(size), hash: md5.New()}
	if err := blob.CopyRange(ctx, c, 0, size, nil); err != nil {
		return nil, err
	}
	if c.filled > 0 {
		c.cut()
	}
	s.remember(d, c.sums)
	return c.sums, nil
}

func (s *sums) known(d digest.Digest) ([][]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.of[d]
	return known, ok
}

func (s *sums) remember(d digest.Digest, of [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	weight := func(of [][]byte) int { return max(len(of), 1) }
	s.of[d] = of
	s.count += weight(of)
	for other, of := range s.of { // in no order: any will do
		if s.count <= maxSums {
			break
		}
		if other != d {
			delete(s.of, other)
			s.count -= weight(of)
		}
	}
}

// sign is Dragonfly's sum over all MD5s of a task.
func sign(sums [][]byte) string {
	h := sha256.New()
	for _, sum := range sums {
		h.Write([]byte(hex.EncodeToString(sum)))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// cutter cuts what is written to it into pieces, and sums each.
type cutter struct {
	size   int64 // of a piece
	filled int64 // of the current one
	hash   hash.Hash
	sums   [][]byte
}

func (c *cutter) Write(p []byte) (int, error) {
	written := len(p)
	for len(p) > 0 {
		n := min(int64(len(p)), c.size-c.filled)
		c.hash.Write(p[:n])
		p = p[n:]
		if c.filled += n; c.filled == c.size {
			c.cut()
		}
	}
	return written, nil
}

func (c *cutter) cut() {
	c.sums = append(c.sums, c.hash.Sum(nil))
	c.hash.Reset()
	c.filled = 0
}
