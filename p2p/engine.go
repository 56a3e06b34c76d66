// Package p2p holds the words that dfcache's layers share, and the interface
// between them: what the OCI side ([github.com/dfcache/dfcache/blobstore]) asks
// of whatever holds and finds content, the [Engine].
//
// A blob is immutable bytes under one digest; it is stored once however many
// tags hold it. A tag is a namespace; in the registry view it is a repository.
// A [Task] is a blob under a tag: what is looked up, fetched and deleted. A
// name is a cache ID under a tag, and points to a task.
//
// Package pieces is the engine that keeps blobs in a directory of this machine.
// Package swarm finds and trades them with other peers on top of that, packages
// dragonfly and persistent have a Dragonfly do so, and package cluster is a peer
// among Dragonfly's own. Package rpc reaches a dfdaemon over its socket. Package
// memory is the simplest, to begin another one with. All pass the suite in package
// enginetest.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package p2p

import (
	"context"
	"iter"
	"slices"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// Engine holds content and answers for it. It is what blobstore needs from a
// dfdaemon, or from a store in its own process. All methods are safe for
// concurrent use, and return promptly with the cause of ctx when ctx ends.
//
// Errors that a caller can act on match, by errors.Is, [ErrNotFound],
// [ErrReferenced], [ErrMissingRef], [ErrMoved], [digest.ErrInvalid], [digest.ErrMismatch],
// [digest.ErrCorrupt], [ErrNoSpace], [ErrUnavailable], [ErrUnreachable],
// [ErrClosed] or the context's own errors.
//
// Only calls with [Network] as their scope, Delete, and those of [Holder] ask peers.
type Engine interface {
	Holder

	// Stat describes what cid names under tag: the task of the digest itself,
	// or the one that the cache ID points to. Of a name that several peers
	// know, the newest counts. It fails with ErrNotFound where the tag holds
	// no such task, and with ErrUnreachable where it is not here and no peer
	// could be asked. It is not a use of the blob: Info.LastUsed stays.
	Stat(ctx context.Context, tag string, cid digest.CID, opts StatOptions) (Info, error)

	// Open opens a task's blob for reading. The blob stays readable until it
	// is closed, even when it is deleted meanwhile. One that is not here is
	// fetched from the peers that hold it, and kept; Open returns as soon as
	// its size is known. ctx bounds the call, and with it that fetch as far
	// as only this blob's readers wait for it. The caller closes it.
	Open(ctx context.Context, task Task, scope Scope) (Blob, error)

	// Ingest begins to take in new content. ctx bounds the whole ingest, not
	// only this call. The caller closes it.
	Ingest(ctx context.Context) (Ingest, error)

	// Delete removes what cid names under tag. A cache ID goes with
	// everything that only it held. A digest goes with the names that point
	// to it and what only it held; where another task refers to it, Delete
	// fails with ErrReferenced unless it is forced. It does not for a manifest that
	// only manifests refer to which nothing holds: to which no name leads, however
	// far, and that are not what a client has just pushed to give them one. The message says which task, by
	// the names that point to it, or by its digest where none does; of many it says some,
	// and of one that only a peer has, which peer. Bytes are freed when no
	// tag holds the blob any more. Peers do the same; those that are away do it
	// later. It fails with ErrNotFound where there is nothing of that name,
	// here or on any peer that was reached. Of several (DeleteOptions.Also), which go
	// all in one transaction, or, where it fails, none, it does so where none was found;
	// what they refer to of each other does not keep them.
	Delete(ctx context.Context, tag string, cid digest.CID, opts DeleteOptions) (Deleted, error)

	// List yields what the engine holds itself, in order of tag; within a tag
	// first names, then tasks, each in order. The sequence ends after the
	// first error.
	List(ctx context.Context, q Query) iter.Seq2[Entry, error]

	// Close lets go of everything the engine holds open. Calls under way end
	// first; later ones fail with ErrClosed.
	Close() error
}

// Holder brings to this host what is elsewhere, and keeps it. Of what is here already
// it changes nothing.
type Holder interface {
	// Hold makes this host hold what cid names under tag, with all that it refers to,
	// as far as that is anywhere: layers that are not distributed may be nowhere. It
	// returns when all of it is stored. It fails as Stat and Open do.
	Hold(ctx context.Context, tag string, cid digest.CID) error

	// HoldManifest makes this host hold the name, and the manifest that it points to,
	// but not yet what this refers to. It describes the manifest as a Stat with opts
	// does, of which Manifest and the scope Network are implied. Of a task that is no
	// manifest only the name is held, and that only where the task is here. With a digest
	// that the Stat of a name has led to, an engine may hold that name, too, as it was.
	HoldManifest(ctx context.Context, tag string, cid digest.CID, opts StatOptions) (Info, error)

	// HoldReferrers makes this host hold the manifests that refer to task and that
	// peers have. It fails with ErrUnreachable where no peer could be asked.
	HoldReferrers(ctx context.Context, task Task) error

	// Verify reads a task's blob whole, which some reader has found damaged. Damage
	// is the error, and is remembered: the blob counts as not here.
	Verify(ctx context.Context, task Task) error

	// Mend makes a task's blob whole that is damaged here, from what others have of
	// it, and returns when it is stored again; at once where it is whole. It fails
	// with ErrNotFound or ErrUnreachable where nobody has what is damaged.
	Mend(ctx context.Context, task Task) error
}

// Scope says how far a lookup may go.
type Scope int

// The scopes.
const (
	Network Scope = iota // here, then the peers
	Local                // never leaves this host
)

// StatOptions says what a Stat should tell.
type StatOptions struct {
	Scope Scope
	// Manifest asks for Info.Manifest, where the task is a manifest: enough to
	// follow a cache ID to its files in one call.
	Manifest bool
	// ContentOnly says that Info.Manifest.Refs is not needed, which takes longer the
	// more there are. An engine may tell them all the same.
	ContentOnly bool
	// MaxContent leaves it to Open to read a manifest of more bytes: an engine may
	// then leave Info.Manifest.Content nil. 0 is no limit.
	MaxContent int64
	// Providers asks for Info.Providers, for which every peer is asked. It needs
	// Network.
	Providers bool
	// Lease says that a client is told of a digest's task so that it need not send
	// it: for as long as an upload may take the task is kept until what refers to it
	// comes, and goes only where it is deleted itself. Of a name it says nothing.
	Lease bool
}

// Info describes a task.
type Info struct {
	Task        Task
	Size        int64     // of the blob, in bytes
	PieceLength int64     // of every piece but the last, in bytes
	Pieces      int       // in all; an empty blob has none
	Held        int       // pieces held by this engine; all of them unless a download is under way
	Remote      bool      // nothing of it is held by this engine: peers have told of it, and Size is their word
	MediaType   string    // as given when the task was committed
	IsManifest  bool      // committed as a manifest, with what it refers to
	Keep        Keep      // what keeps it
	Origin      time.Time // when it was imported or pushed, on whatever host that was
	// the latest import or delete of it that was known where it was done; zero where that is not known
	After    time.Time
	Imported time.Time // when the task was committed here; zero where it is not here
	LastUsed time.Time // when the blob was last opened here; zero where never

	// Description is NewName.Description where the Stat was of a name, and something was said on this
	// host. It is not told in a List.
	Description []byte
	// Lacks are those parts of a manifest that were deleted by force, or of which is
	// known that they are damaged, and that nobody has yet: at most MaxRefs. Content
	// that is not here because it has not come from peers yet is not among them.
	Lacks []digest.Digest
	// Manifest is nil unless it was asked for, and the task is a manifest.
	Manifest *Manifest
	// Providers is nil unless it was asked for.
	Providers *Providers
}

// Providers counts the other peers that have answered for a task.
type Providers struct {
	Some   int // hold it, or a part of it
	Whole  int // of these, hold all of it
	Asked  int // were asked
	Silent int // of these, did not answer in time
}

// Local reports whether the whole blob is held by this engine.
func (i Info) Local() bool { return !i.Remote && i.Held == i.Pieces }

// Manifest is the content of a manifest and what is known of what it refers to.
type Manifest struct {
	Content []byte // verified, at most MaxManifest bytes
	// Refs are what is held of the first MaxRefs tasks that it refers to, in its order.
	// What is known to be damaged is left out. Where peers have told of the manifest,
	// or all were asked ([StatOptions].Providers), what they hold is told, too: it is Remote.
	Refs []Info
}

const (
	// MaxManifest is the largest manifest in bytes: the limit that the OCI
	// distribution specification asks every registry for at least.
	MaxManifest = 4 << 20
	// MaxDescription is the longest description of a name in bytes.
	MaxDescription = 16 << 10
	// MaxRefs is how many of the tasks that a manifest refers to are looked up with it:
	// the first. Others are asked for one by one.
	MaxRefs = 256
)

// Keep says what keeps a task.
type Keep int

const (
	// KeepReferred is kept by the names that point to it, the tasks that refer to it, and
	// its subject. It goes with the last of them.
	KeepReferred Keep = iota
	// KeepUntilReferred is kept until something refers to it, and then as KeepReferred:
	// content that arrives before what refers to it.
	KeepUntilReferred
	// KeepPinned is kept for its own sake, until it is deleted.
	KeepPinned
)

// NewName is a name to commit. A name that exists is moved, and what only it
// held before is let go.
type NewName struct {
	Tag    string
	Name   string        // a cache ID
	Digest digest.Digest // of a task that is held under Tag, or committed together with the name
	// MediaType is what the task is taken for, or "" for what it is. Where that is another one the
	// commit fails, as with NewTask.MediaType.
	MediaType string
	// Description is what else is said of what the name points to: an object of JSON, of at most
	// MaxDescription bytes. A Stat of the name gives it back, until the name is moved. nil keeps what was
	// said where the name pointed to the same before; "{}" says nothing.
	Description []byte
	// Updated is when the name was pointed there, where that was on another
	// host: it is not moved if it has been pointed elsewhere later, and whatever
	// was put in on this host is kept, as with KeepOld: nobody here has moved the
	// name. The default is now, or later where an earlier move or a delete is known
	// that is dated later.
	Updated time.Time
	// After is the latest move or delete of the name that was known to whoever
	// points it there; zero where that is not known, or none was.
	After time.Time
	// KeepOld keeps what the name pointed to before, as KeepUntilReferred where
	// nothing else holds it. Hosts that are told of the move do so, too.
	KeepOld bool
}

// DeleteOptions says how to delete.
type DeleteOptions struct {
	// Force deletes a task that another one refers to.
	Force bool
	// NameOnly deletes a name and keeps what it pointed to, as KeepUntilReferred where
	// nothing else holds it.
	NameOnly bool
	// Expect, where it is not nil, is what the cid has to stand for on this host, as
	// Expectation.Digest says: else the delete fails with ErrMoved, and nothing is deleted anywhere. It
	// goes with one cid.
	Expect *digest.Digest
	// Also are further cids under the tag, up to MaxAlso, that go with the first one.
	Also []digest.CID
	// All deletes everything under the tag, in one transaction. The cid is the zero value then.
	All bool
	// Unpin has a digest that another task here refers to lose what pins it here, in place of a
	// failure: it goes with the last that refers to it. It is for a single cid.
	Unpin bool
}

// MaxAlso bounds DeleteOptions.Also.
const MaxAlso = 1000

// CIDs returns what is to be deleted, cid first, each once. It is empty with All.
func (o DeleteOptions) CIDs(cid digest.CID) []digest.CID {
	if o.All {
		return nil
	}
	seen := map[digest.CID]bool{}
	return slices.DeleteFunc(append([]digest.CID{cid}, o.Also...), func(c digest.CID) bool {
		again := seen[c]
		seen[c] = true
		return again
	})
}

// Deleted says what a Delete did.
type Deleted struct {
	Tasks   int      // tasks removed, here
	Freed   int64    // bytes freed here, because no tag held them any more
	Reached int      // other peers that were told, and do not hold it any more
	Removed int      // of these, that had something to remove
	Missed  []Missed // peers that were not reached, or refused
	// NotFound are those of several cids that were nowhere.
	NotFound []digest.CID
}

// Missed is a peer that a Delete was not done on.
type Missed struct {
	Peer    string // its ID
	Address string // where it was last seen, or ""
	Reason  string // why not
}

// Peer is another dfdaemon.
type Peer struct {
	ID        string // its libp2p peer ID
	Addresses []string
	State     PeerState
	Mode      string        // "full", "seed-only" or "never-serve"; "" where it has not told
	Gave      int64         // bytes of blobs it has given to this one
	Took      int64         // bytes of blobs it has taken from this one
	Latency   time.Duration // of a request and its answer, smoothed; 0 where unknown
	LastSeen  time.Time
	Faults    int    // lies it was caught with
	Reason    string // of the last fault, or of the state; or which names were moved there and here at once
	Version   string // of its dfdaemon; "" where it has not told
	// Ahead is how far its clock is ahead of this host's; below zero it is
	// behind. 0 where it is not known.
	Ahead time.Duration
}

// PeerState says how it stands with a peer.
type PeerState string

// The states of a peer.
const (
	PeerConnected PeerState = "connected"
	PeerAway      PeerState = "away"    // known, and not connected now
	PeerShunned   PeerState = "shunned" // caught with lies: it is asked for nothing for a while
	PeerForeign   PeerState = "foreign" // it speaks another version of the protocol, and is asked for nothing
	PeerCloned    PeerState = "cloned"  // two hosts have this identity; it may be that of this host itself
)

// Query says what to list. Its zero value lists everything.
type Query struct {
	// Tag is the only tag to list, or nil for all.
	Tag *string
	// Kind says which entries there are.
	Kind Kind
	// After leaves out what does not sort after it: tags with KindTags, else
	// names with KindNames. It has no meaning for other kinds.
	After string
	// RefersTo is a digest: only tasks under Tag that refer to it, or have it
	// as their subject, are listed, and no names. It is not for KindNames and KindTags.
	RefersTo digest.Digest
	// Has is a digest: only tags that have it are listed. It is for KindTags.
	Has digest.Digest
}

// Kind says which entries a List yields.
type Kind int

// The kinds of entries.
const (
	KindAll   Kind = iota // names and tasks
	KindNames             // names
	KindTags              // one entry for every tag, of which only Info.Task.Tag is set
	// blobs of which only a part is here: Info.Size is that of the whole, Total that of the part
	KindPartials
)

// Entry is one line of a List: a name where Name is not "", else a task. A name
// was last used when anything that it leads to was.
type Entry struct {
	Info
	Name string
	// Total is the size in bytes of the blob and of all it refers to, as far
	// as it is held. It is 0 with Query.RefersTo and with KindNames.
	Total int64
}
