package p2p

import (
	"context"
	"io"
	"iter"
	"os"

	"github.com/dfcache/dfcache/digest"
)

// Blob is an open blob. Every byte it hands out has been verified: damage
// gives a [digest.CorruptError], never wrong data. ReadAt and CopyRange are safe
// for concurrent use.
//
// Of a blob that is still arriving from peers, reads wait for the pieces they
// want, and have them fetched first; a CopyRange of all of it writes the last
// piece only when the whole is proven against the digest. Should a peer have lied in such a
// way that this fails, reads end with an error that matches [digest.ErrMismatch];
// opened again, the blob is fetched from others.
type Blob interface {
	io.ReaderAt
	io.Closer

	// Size returns the blob's size in bytes.
	Size() int64

	// CopyRange writes the n bytes from off on to w, which have to be in the
	// blob, and calls progress, where it is not nil, with the count of bytes
	// written so far.
	CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(written int64)) error

	// Sources says from which peers the blob's bytes have come since it was
	// opened; nil where it was here.
	Sources() []Source
}

// Source is a peer that has given bytes of a blob.
type Source struct {
	Peer    string // its ID
	Address string // where it was reached
	Bytes   int64
}

// FileBlob is a [Blob] whose bytes are in a file, for another process to read them there
// by itself. An engine need not have such blobs: p2p/rpc copies others into memory.
//
// File and Table stay the blob's, and are not changed by the caller. A duplicate of the
// descriptor remains readable when the blob is closed, and when it is deleted.
type FileBlob interface {
	Blob

	// File returns the file with the blob's bytes from offset 0 on. It is open for reading
	// only, and by this blob alone: whoever has a duplicate can move its offset.
	File() *os.File

	// Table returns the blob's piece table: what is read in the file has to be checked with it.
	Table() *digest.Table
}

// ArrivingBlob is a [FileBlob] that comes from peers, piece by piece. What arrives is
// read in its file, which may have holes for the rest. Of its table Size and PieceLength are
// known from the beginning; CRC has an entry for each piece, which is set before Arrived
// yields that piece.
type ArrivingBlob interface {
	FileBlob

	// Arrived yields the index of every piece once, in any order, as it can be read: those
	// that are there first. The sequence ends when all are there and the whole is proven
	// against the digest, or after the error that ends the download: one that matches
	// [digest.ErrMismatch] where peers have lied, and the cause of ctx when ctx ends. The
	// caller may take its time with each piece: the download does not wait for it.
	Arrived(ctx context.Context) iter.Seq2[int, error]

	// Want has the pieces from first to last fetched before others, and does not wait for
	// them. It does nothing where one of them is not of the blob.
	Want(first, last int)
}
