package p2p

import (
	"io"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// Ingest takes in new content, any number of times, then there is one Commit. Until the
// commit nothing of it can be seen, and Close, a crash or the end of the
// context leave nothing behind. It is not safe for concurrent use, but for Room. After an
// error it can only be closed.
type Ingest interface {
	// Add copies src up to its end, hashes it on the way, and returns its
	// digest and size. A regular *os.File is read from its current offset
	// on, in the kernel where that can be, and its offset is left undefined.
	// Where it is written to meanwhile, the error matches [ErrChanged].
	Add(src io.Reader, opts AddOptions) (Added, error)

	// Create begins to take in content that is written by the caller, as it comes. There is
	// one at a time: until it is finished, all calls of the ingest fail but Room and Close, which
	// drops it.
	Create(opts AddOptions) (Writer, error)

	// Room fails with an error that matches [ErrNoSpace] where an Add of n bytes more would:
	// what is too much can be refused before it is sent. It keeps no room. An
	// engine that can't tell returns nil.
	Room(n int64) error

	// Rehash adds what was added under the digest d once more, under want, a
	// digest of another algorithm: without taking it in again. After that it
	// may no longer be there under d. Other content fails with a
	// [digest.MismatchError].
	Rehash(d, want digest.Digest) (Added, error)

	// Commit makes everything in c durable and visible, in one step: when it
	// returns nil, it survives kill -9 and a power cut. Content that was
	// added and that c gives no task is dropped. It may be called once.
	Commit(c Commit) error

	// Close drops what was not committed. It is safe to call after Commit,
	// and more than once.
	Close() error
}

// Writer takes in one piece of content for an [Ingest]. It ends with that, and has the same
// errors as an Add; after one both can only be closed. It is not safe for concurrent use.
type Writer interface {
	// Write takes in p, which stays the caller's, and hashes it in time. It waits for nothing but
	// the engine. That the last bytes find no room may come out only with the next call.
	io.Writer

	// Finish says that this is all, and returns its digest and size: it is what an Add returns. It may
	// be called once.
	Finish() (Added, error)
}

// AddOptions says how content is to be taken in.
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
	// Expect is what has to hold here, when the commit is made and before it: else it fails with
	// [ErrMoved].
	Expect []Expectation
}

// Expectation is what a cid is to stand for on this host.
type Expectation struct {
	Tag string
	CID digest.CID
	// Digest is that of the task that the name points to, or of the manifest that CID is the digest
	// of; "" where there is no such name, or no such manifest.
	Digest digest.Digest
}

// NewTask is a task to commit. A task that exists is kept: it gets what is
// new here, is kept no shorter than before, and keeps its time of import.
type NewTask struct {
	Task Task
	// MediaType is the type of the content. A manifest keeps the one that it came with, and so does
	// what a name points to: a commit with another one fails with digest.ErrInvalid, unless the task
	// has an Origin, or a blob is committed and no name: then it changes nothing.
	MediaType string
	Keep      Keep
	// Origin is when the task was imported or pushed first, where that was on
	// another host. The default is now, or later where an import or a delete is
	// known that is dated later.
	Origin time.Time
	// After is Info.After of the same host, where there is an Origin.
	After time.Time
	// Manifest, where it is not nil, says that the content is a manifest, and
	// what it refers to.
	Manifest *NewManifest
}

// NewManifest says what a manifest to commit refers to, under its own tag.
type NewManifest struct {
	// Refs are the digests of what it is made of: config, layers, manifests
	// of an index. It holds them. They need not be there.
	Refs []digest.Digest
	// Needs are those of Refs without which the commit fails, with
	// a [MissingRefError].
	Needs []digest.Digest
	// Subject is the digest of the manifest that this one is about, or "". It
	// need not be there. Where it is, it holds this one: both go together.
	Subject digest.Digest
}
