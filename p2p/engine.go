// Package p2p holds the words that dfcache's layers share, and the interface
// between them: what the OCI side ([github.com/dfcache/dfcache/blobstore]) asks
// of whatever holds and finds content, the [Engine].
//
// A blob is immutable bytes under one digest; it is stored once however many
// tags hold it. A tag is a namespace; in the registry view it is a repository.
// A [Task] is a blob under a tag: what is looked up, fetched and deleted. A
// name is a cache ID under a tag, and points to a task.
//
// Two engines exist: package pieces keeps blobs in a directory of this
// machine, and package rpc reaches a dfdaemon over its socket. Both pass the
// suite in package enginetest.
package p2p

import (
	"context"
	"io"
	"iter"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// Engine holds content and answers for it. It is what blobstore needs from a
// dfdaemon, or from a store in its own process. All methods are safe for
// concurrent use, and return promptly with the cause of ctx when ctx ends.
//
// Errors that a caller can act on match, by errors.Is, [ErrNotFound],
// [ErrReferenced], [digest.ErrInvalid], [digest.ErrMismatch],
// [digest.ErrCorrupt], [ErrNoSpace], [ErrUnavailable], [ErrClosed] or the
// context's own errors.
type Engine interface {
	// Resolve returns the task that cid names under tag: the task of the
	// digest itself, or the one that the cache ID points to. It fails with
	// ErrNotFound where the tag holds no such task.
	Resolve(ctx context.Context, tag string, cid digest.CID, scope Scope) (Task, error)

	// Stat describes a task, or fails with ErrNotFound. It is not a use of
	// the blob: Info.LastUsed stays.
	Stat(ctx context.Context, task Task, scope Scope) (Info, error)

	// Open opens a task's blob for reading. The blob stays readable until it
	// is closed, even when it is deleted meanwhile. The caller closes it.
	Open(ctx context.Context, task Task, scope Scope) (Blob, error)

	// Ingest begins to take in new content. ctx bounds the whole ingest, not
	// only this call. The caller closes it.
	Ingest(ctx context.Context) (Ingest, error)

	// Delete removes what cid names under tag. A cache ID goes with
	// everything that only it held. A digest goes with the names that point
	// to it and what only it held; where another task refers to it, Delete
	// fails with ErrReferenced unless force is set. Bytes are freed when no
	// tag holds the blob any more. It fails with ErrNotFound where there is
	// nothing of that name.
	Delete(ctx context.Context, tag string, cid digest.CID, force bool) (Deleted, error)

	// List yields what the engine holds itself, in order of tag; within a tag
	// first names, then tasks, each in order. With a nil tag it lists every
	// tag. The sequence ends after the first error.
	List(ctx context.Context, tag *string) iter.Seq2[Entry, error]

	// Close lets go of everything the engine holds open. Calls under way end
	// first; later ones fail with ErrClosed.
	Close() error
}

// Scope says how far a lookup may go.
type Scope int

const (
	Network Scope = iota // here, then the peers
	Local                // never leaves this host
)

// Info describes a task.
type Info struct {
	Task        Task
	Size        int64     // of the blob, in bytes
	PieceLength int64     // of every piece but the last, in bytes
	Pieces      int       // in all; an empty blob has none
	Held        int       // pieces held by this engine; all of them unless a download is under way
	MediaType   string    // as given when the task was committed
	Pinned      bool      // imported or kept for its own sake, not only as part of another task
	Imported    time.Time // when the task was committed here
	LastUsed    time.Time // when the blob was last opened here; zero where never
}

// Local reports whether the whole blob is held by this engine.
func (i Info) Local() bool { return i.Held == i.Pieces }

// Blob is an open blob. Every byte it hands out has been verified: damage
// gives a [digest.CorruptError], never wrong data. ReadAt and CopyTo are safe
// for concurrent use.
type Blob interface {
	io.ReaderAt
	io.Closer

	// Size returns the blob's size in bytes.
	Size() int64

	// CopyTo writes the whole blob to w and calls progress, where it is not
	// nil, with the count of bytes written so far.
	CopyTo(ctx context.Context, w io.Writer, progress func(written int64)) error
}

// Ingest takes in new content: any number of Adds, then one Commit. Until the
// commit nothing of it can be seen, and Close, a crash or the end of the
// context leave nothing behind. It is not safe for concurrent use. After an
// error it can only be closed.
type Ingest interface {
	// Add copies src up to its end, hashes it on the way, and returns its
	// digest and size. A regular *os.File is read from its current offset
	// on, in the kernel where that can be, and its offset is left undefined.
	Add(src io.Reader, opts AddOptions) (Added, error)

	// Commit makes everything in c durable and visible, in one step: when it
	// returns nil, it survives kill -9 and a power cut. Content that was
	// added and that c gives no task is dropped. It may be called once.
	Commit(c Commit) error

	// Close drops what was not committed. It is safe to call after Commit,
	// and more than once.
	Close() error
}

// AddOptions says what an Add should do.
type AddOptions struct {
	// Want is the digest that the content has to have, or "" for any. Other
	// content fails with a [digest.MismatchError].
	Want digest.Digest
	// Algorithm is the algorithm to hash with where Want is "", by default sha256.
	Algorithm digest.Algorithm
	// Progress, where it is not nil, is called now and then with the count
	// of bytes taken in so far, from one goroutine at a time.
	Progress func(taken int64)
}

// Added is content that an ingest has taken in.
type Added struct {
	Digest digest.Digest
	Size   int64 // in bytes
}

// Commit is what an ingest makes visible. Every blob in it was added by the
// same ingest or is held by the engine under some tag already.
type Commit struct {
	Tasks []NewTask
	Names []NewName
}

// NewTask is a task to commit. A task that exists is kept: it gets what is
// new here, stays pinned when it was, and keeps its time of import.
type NewTask struct {
	Task      Task
	MediaType string
	// Pinned keeps the task for its own sake. One that is not pinned goes
	// when the last name or task that leads to it goes.
	Pinned bool
	// Refs are the digests, under the same tag, that this task's content
	// refers to: a manifest's config and layers. They need not be held.
	Refs []digest.Digest
}

// NewName is a name to commit. A name that exists is moved, and what only it
// held before is let go.
type NewName struct {
	Tag    string
	Name   string        // a cache ID
	Digest digest.Digest // of a task that is held under Tag, or committed together with the name
}

// Deleted says what a Delete did.
type Deleted struct {
	Tasks int   // tasks removed, here
	Freed int64 // bytes freed here, because no tag held them any more
}

// Entry is one line of a List: a name where Name is not "", else a task.
type Entry struct {
	Info
	Name string
	// Total is the size in bytes of the blob and of all it refers to, as far as it is held.
	Total int64
}
