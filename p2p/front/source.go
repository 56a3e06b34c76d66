package front

import (
	"context"
	"iter"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Source is a place beyond this host where content can be: a swarm of peers, a
// Dragonfly, later a registry. It finds, fetches, offers and forgets; what is kept is
// decided by the [Engine]. Its methods are called side by side, and end with ctx.
//
// A source that can do more implements [Names], [Referrers], [Arrivals] or [p2p.Peering].
type Source interface {
	// Name is what the source is called in messages.
	Name() string

	// Find describes a task that the source has. The error matches [p2p.ErrNotFound]
	// where it has it not, and [p2p.ErrUnreachable] or [p2p.ErrUnavailable] where it
	// can't say. With Providers, Found.Info.Providers is set beside these errors, too.
	Find(ctx context.Context, task p2p.Task, opts FindOptions) (Found, error)

	// Fetch begins to bring a task's blob here, or what is damaged of the one that is
	// here, and returns the blob as it arrives; or nil, when it may be stored now: the
	// Engine looks, and asks again where it is not. The source has it verified, and kept,
	// by [Engine.Take] or [Engine.Complete]. A blob that arrives implements [Arriving].
	Fetch(ctx context.Context, task p2p.Task, damaged bool) (p2p.Blob, error)

	// Offer tells the source what was committed here, by callers of the Engine. Its error
	// is that of the commit, which has been made: a caller may commit the same again.
	Offer(ctx context.Context, c p2p.Commit) error

	// See asks what there is to be deleted of what cid names. held says whether the
	// store has it. The error ends the delete before it has begun. It is not asked where all
	// under a tag is to be deleted.
	See(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions, held bool) (Seen, error)

	// Forget tells the source what was deleted here, and returns what that has come to.
	Forget(ctx context.Context, d Deletion) []Told

	// Stop ends what is under way. Close, after that and when no call is under way any
	// more, lets go of everything.
	Stop()
	Close() error
}

// FindOptions says what a Find is to tell.
type FindOptions struct {
	Content   bool // of what can be a manifest its content, verified, without keeping it
	Named     bool // a name led to the task: it is a manifest, whatever peers say
	Refs      bool // with Content, also of what the manifest refers to
	Providers bool // Info.Providers, for which all are asked
	Lease     bool // as [p2p.StatOptions] has it, of those that are asked
}

// Found is what a source says of a task.
type Found struct {
	// Info is Remote. With Content, Info.Manifest has the content of what can be a manifest; what
	// it is, the Engine reads in it.
	Info  p2p.Info
	Whole bool // all of it is there
	// Opaque says that the source knows no more than that it has the task, and perhaps
	// its size: what could be a manifest has to be fetched to know.
	Opaque bool
}

// Names is a [Source] that knows what cache IDs stand for, and of deletes of them.
type Names interface {
	// Resolve says what a name stands for, of all that this host and the source know. It
	// is the store's own where here is set. The error matches [p2p.ErrNotFound] where
	// the name is nowhere, or has been deleted.
	Resolve(ctx context.Context, tag, name string) (n p2p.NewName, here bool, err error)

	// LedTo returns the names of peers that have led to a task lately, for them to be held with the
	// task, as they were.
	LedTo(ctx context.Context, task p2p.Task) []p2p.NewName

	// After returns names that are about to be moved here, with NewName.After as the
	// source knows it.
	After(ctx context.Context, names []p2p.NewName) []p2p.NewName
}

// Referrers is a [Source] that knows what refers to a task.
type Referrers interface {
	// Referrers yields the manifests that refer to task, with their content, but for those
	// that have says are here. What can't be fetched is left out, and logged.
	Referrers(ctx context.Context, task p2p.Task, have func(p2p.Task) bool) iter.Seq2[p2p.Info, error]
}

// Arrivals is a [Source] whose blobs can be seen while they arrive.
type Arrivals interface {
	// Arriving describes a task as far as it has arrived.
	Arriving(task p2p.Task) (p2p.Info, bool)
	// Await waits until a task of which all has arrived is in the store. It returns at
	// once where that is not so.
	Await(ctx context.Context, task p2p.Task) error
}

// Arriving is a blob that a source brings here.
type Arriving interface {
	p2p.Blob
	// Stored waits until the blob is in the store.
	Stored(ctx context.Context) error
}

// Seen is what a source has of what is to be deleted.
type Seen struct {
	Found    bool             // it has something of it, whatever its version
	Versions []pieces.Version // of what peers have of it, for the delete to cover
	Answered int              // peers that have said what they have
	Silent   int              // and that have not
	Err      error            // why it can't say; reported where nothing else has it
}

// Deletion is what was deleted on this host.
type Deletion struct {
	Tag   string
	Tasks []p2p.Task // that are not here any more, or were not: those that were named, then
	Held  bool       // whether the store had any of it
	// Deletes are what the store remembers of it, the one that was asked for first.
	Deletes []pieces.Delete
}

// Told is what a peer has made of a delete. A source without peers speaks of itself.
type Told struct {
	Peer    string // its ID
	Address string // where it was last seen, or ""
	Removed bool   // it had something of it, and has it no more
	Failed  string // why it was not done, or ""
	// Newer is what it has that the delete does not cover: of each cid that was to be deleted,
	// or, under the zero value of a cid, of all under the tag.
	Newer map[digest.CID]pieces.Version
	Found map[digest.CID]bool // what it had, of what was to be deleted
}
