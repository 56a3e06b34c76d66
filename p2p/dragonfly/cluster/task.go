package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"net/url"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
)

// taskID is the ID by which Dragonfly knows a task: the SHA-256, in hex, of the URL and
// the tag in a row. Digest, range and application of its UrlMeta, which would
// stand between and behind, are not used by its dfcache.
func taskID(t p2p.Task) string {
	return idOf(wire.URL(t), t.Tag)
}

// nameID is the ID by which Dragonfly knows a name, as it was given to its dfcache.
func nameID(tag, text string) string { return idOf(wire.Scheme+url.QueryEscape(text), tag) }

func idOf(url, tag string) string {
	sum := sha256.Sum256([]byte(url + given.Text(tag)))
	return hex.EncodeToString(sum[:])
}

// pieceSize is the size in bytes that Dragonfly gives the pieces of a file: 4 MiB up to
// 200 MiB, then 1 MiB more for each full 100 MiB above that, 15 MiB at most.
func pieceSize(length int64) int64 {
	const mib = 1 << 20
	if length <= 200*mib {
		return 4 * mib
	}
	return min((length/(100*mib)+2)*mib, 15*mib)
}

// pieceCount is the number of pieces of a file; none of an empty one.
func pieceCount(length int64) int {
	size := pieceSize(length)
	return int((length + size - 1) / size)
}

// pieceInfo describes piece i of a file.
func pieceInfo(length int64, i int, md5 []byte) *commonv1.PieceInfo {
	start := int64(i) * pieceSize(length)
	return &commonv1.PieceInfo{
		PieceNum:    int32(i),
		RangeStart:  uint64(start),
		RangeSize:   uint32(min(pieceSize(length), length-start)),
		PieceOffset: uint64(start),
		PieceMd5:    hex.EncodeToString(md5),
	}
}

// Marks that Dragonfly puts in place of a piece's number.
const (
	beginOfPiece = -1
	endOfPiece   = 1 << 30
)

// succeeded is the state of a task that can be fetched.
const succeeded = "Succeeded"

// available reports whether a task can be fetched from a peer that its scheduler knows.
func available(t *schedulerv1.Task) bool { return t.GetState() == succeeded && t.GetHasAvailablePeer() }
