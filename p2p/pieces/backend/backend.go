// Package backend has the bytes of a store: blobs, what comes in, and parts of what
// is to come. What they are called, and by whom they are kept, is package pieces'.
// [Dir] has them in a directory, [Memory] in memory.
//
// It promises no compatibility.
package backend

import (
	"errors"
	"io/fs"
	"iter"
	"os"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// Backend is where the bytes of one store lie. Bytes are files that have a descriptor, which a
// store hands to other processes. It is safe for concurrent use; the same blob, and the same
// partial one, is changed by one caller at a time.
type Backend interface {
	// Prepare makes what is not there yet. Where existing is set, it fails with [fs.ErrNotExist]
	// and makes nothing where there has never been a store.
	Prepare(existing bool) error

	// Free returns how many bytes there is room for, where that is known.
	Free() (n int64, known bool)

	// Scratch returns a directory for what is short-lived. Clean removes what is left in it.
	Scratch() string

	Incoming
	Blobs
	Partials
}

// Incoming is content on its way in, or out. It has a name that the backend gives it.
type Incoming interface {
	// Create makes an empty file, for reading and writing. The caller closes it.
	Create() (name string, f *os.File, err error)

	// Sync makes durable what a file of Create has.
	Sync(f *os.File) error

	// Put makes incoming content the blob of d, in place of one that is there. Until the claim that it
	// returns is discarded, Claims has d: the blob may be there and no record of it. There may be a
	// claim even where it fails. Flush makes it durable.
	Put(name string, d digest.Digest) (claim string, err error)

	// Discard frees incoming content, or a claim.
	Discard(name string) error

	// Claims returns the blobs that were claimed, in this run or another one.
	Claims() ([]digest.Digest, error)

	// Clean discards what an earlier run has left, and returns how much that was. It comes before
	// everything else that changes anything, but for what is done with Claims.
	Clean() (n int, err error)
}

// Blobs are complete, and never change.
type Blobs interface {
	// Open opens a blob for reading only. It fails with [fs.ErrNotExist] where there is none, and
	// with [ErrNotRegular] where something else is in its place. The caller closes it.
	Open(d digest.Digest) (*os.File, error)

	// Stat describes what Open opens, and fails as that does.
	Stat(d digest.Digest) (fs.FileInfo, error)

	// Take makes a blob incoming content, to be discarded: what frees many bytes takes time. Where
	// there is none it fails with [fs.ErrNotExist].
	Take(d digest.Digest) (name string, err error)

	// Flush makes durable which blobs of an algorithm are there.
	Flush(alg digest.Algorithm) error

	// Blobs yields what is there, in no order.
	Blobs() iter.Seq2[Entry, error]

	// Path says where a blob is, for people.
	Path(d digest.Digest) string
}

// Entry is something that is among the blobs.
type Entry struct {
	Digest digest.Digest // not a valid one where it is something else
	Path   string
}

// Partials are blobs of which a part has arrived, with notes about each.
type Partials interface {
	// OpenPartial opens what there is of a blob, for reading and writing, and makes it where there
	// is nothing. The caller closes it.
	OpenPartial(d digest.Digest) (*os.File, error)

	// StatPartial describes a partial blob. It fails with [fs.ErrNotExist] where there is none.
	StatPartial(d digest.Digest) (Partial, error)

	// Note returns a note about a partial blob. It fails with [fs.ErrNotExist] where there is none.
	Note(d digest.Digest, n Note) ([]byte, error)

	// SetNote replaces a note, or leaves it as it is.
	SetNote(d digest.Digest, n Note, content []byte) error

	// TakePartial makes a partial blob incoming content, and removes what is noted.
	TakePartial(d digest.Digest) (name string, err error)

	// RemovePartial removes a partial blob, with what is noted.
	RemovePartial(d digest.Digest) error

	// Partials returns all partial blobs.
	Partials() ([]Partial, error)
}

// Partial is a blob of which a part has arrived.
type Partial struct {
	Digest  digest.Digest
	Bytes   int64     // that it takes up
	Changed time.Time // when something has arrived last
}

// Note is what is noted about a partial blob.
type Note string

// Notes.
const (
	NoteTable Note = "table" // its piece table
	NoteTags  Note = "tags"  // under which tags it is wanted, as JSON
)

// ErrNotRegular says that something else is in the place of a regular file.
var ErrNotRegular = errors.New("it is not a regular file")
