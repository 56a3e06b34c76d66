// Package digest holds what dfcache knows about content: how it is named, how
// it is proven, and how bit rot is found.
//
// A file is named by a [CID]: an OCI digest ("sha256:<64 hex digits>"), which
// says what the bytes are, or a cache ID ("v1.2"), which is a name for one.
// Both follow the OCI image and distribution specifications.
//
// # Hash chains
//
// SHA-2 is a chain: the state after piece i is the state before piece i+1. A
// [Recorder] that hashes a blob once keeps the state at every piece boundary
// beside a CRC32C of every piece. The result, a [Table], then allows
//
//   - any single piece to be proven against the digest of the whole blob, in any
//     order and on any core ([Table.VerifyPiece]): hashing starts from the state
//     before the piece and has to end at the state after it, and the last
//     piece has to end at the digest itself. When every link holds, so does the
//     digest of the whole;
//   - a flipped or missing byte on disk to be found at the speed of memory
//     ([Table.CheckPiece], [Verified]).
//
// A chain that somebody else sends is a hint and nothing more: a forged one
// can't end at the true digest.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package digest
