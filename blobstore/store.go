package blobstore

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Errors of this package, for errors.Is. Errors also match what [context.Cause]
// says where a context ended the operation, which is [context.DeadlineExceeded] or
// [context.Canceled] unless its owner gave another cause, and [fs.ErrExist] where
// an output exists.
var (
	ErrNotFound    = p2p.ErrNotFound    // the repository holds no such cid
	ErrInvalid     = digest.ErrInvalid  // a cid, a tag or another argument is malformed
	ErrMismatch    = digest.ErrMismatch // content is not what its digest promised; see [digest.MismatchError]
	ErrCorrupt     = digest.ErrCorrupt  // stored content is damaged; see [digest.CorruptError]
	ErrReferenced  = p2p.ErrReferenced  // other content refers to what was to be deleted
	ErrMissingRef  = p2p.ErrMissingRef  // a manifest refers to what is not there
	ErrNoSpace     = p2p.ErrNoSpace     // a disk or a quota is full
	ErrBusy        = p2p.ErrBusy        // there are not enough descriptors, for example: to be tried again
	ErrFailed      = p2p.ErrFailed      // the disk has failed: nothing more is stored until the store is opened again
	ErrUnavailable = p2p.ErrUnavailable // the daemon can't be reached, or another process holds the directory
	ErrUnreachable = p2p.ErrUnreachable // it is not on this host, and no peer could be asked
	ErrChanged     = p2p.ErrChanged     // a file was written to while it was imported
	ErrMoved       = p2p.ErrMoved       // what was to be changed is not what was expected
	ErrClosed      = p2p.ErrClosed      // the Store has been closed
)

// Store is a store of content, embedded in this process ([Open]) or reached
// through a dfdaemon (package client). It is safe for concurrent use.
type Store struct {
	engine p2p.Engine
}

// Option changes how an embedded Store is opened.
type Option func(*options)

type options struct {
	log *slog.Logger
}

// WithLogger makes the store log to l what an operator should know.
// The default is to be silent.
func WithLogger(l *slog.Logger) Option { return func(o *options) { o.log = l } }

// Open opens the store in the directory dir, in this process, and makes the
// directory if there is none. One process at a time can have it open: a second
// one, or a dfdaemon on the same directory, gets [ErrUnavailable]. The caller
// closes the Store.
func Open(dir string, opts ...Option) (*Store, error) {
	if dir == "" { // of a setting that is not set; the store would be in the working directory
		return nil, fmt.Errorf("open store: %w: its directory has no name", ErrInvalid)
	}
	var o options
	for _, f := range opts {
		f(&o)
	}
	engine, err := pieces.Open(dir, pieces.Options{Log: o.log})
	if err != nil {
		return nil, err
	}
	return New(engine), nil
}

// New returns a Store over any engine. Closing the Store closes the engine.
func New(engine p2p.Engine) *Store { return &Store{engine: engine} }

// Repository returns the part of the store under tag. The tag is "" or a
// repository name of the OCI distribution specification; otherwise the error
// matches [ErrInvalid]. A repository needs no creating: it is there while it
// holds something.
func (s *Store) Repository(tag string) (*Repository, error) {
	if err := p2p.ValidateTag(tag); err != nil {
		return nil, err
	}
	return &Repository{engine: s.engine, tag: tag}, nil
}

// Entry is one line of a list: a name where Name is not "", else a blob.
type Entry = p2p.Entry

// List yields everything the store holds on this host, in order of tag; within
// a tag first names, then blobs. It ends after the first error.
func (s *Store) List(ctx context.Context) iter.Seq2[Entry, error] {
	return s.engine.List(ctx, p2p.Query{})
}

// Partials yields the files of which only a part is on this host: they are being fetched, or
// nobody waits for them any more. Total of each is how many bytes of it there are. A
// daemon of a release that does not know them fails with [errors.ErrUnsupported].
func (s *Store) Partials(ctx context.Context) iter.Seq2[Entry, error] {
	return s.engine.List(ctx, p2p.Query{Kind: p2p.KindPartials})
}

type (
	// Peer is another dfdaemon.
	Peer = p2p.Peer
	// PeerState is how it stands with a peer.
	PeerState = p2p.PeerState
	// Providers is how many peers have a file.
	Providers = p2p.Providers
	// Source is a peer that gave bytes of a file.
	Source = p2p.Source
	// Missed is a peer that a Remove was not done on.
	Missed = p2p.Missed
)

// Peers describes the other dfdaemons that this host's knows, the connected ones
// first. An embedded store has none.
func (s *Store) Peers(ctx context.Context) ([]Peer, error) { return p2p.Peers(ctx, s.engine) }

// maxSkew is how much the clocks of two hosts may differ before that is told.
const maxSkew = 5 * time.Second

// ClockWarning says by how much the clocks of connected peers differ from that of this
// host: which of the moves of a name counts may depend on them. It returns "" where none
// does by more than 5 seconds, or where that is not known.
func (s *Store) ClockWarning(ctx context.Context) string {
	peers, err := s.Peers(ctx)
	if err != nil {
		return ""
	}
	var off, all int
	var worst Peer
	for _, p := range peers {
		if p.State != p2p.PeerConnected {
			continue
		}
		all++
		if p.Ahead.Abs() > maxSkew {
			off++
			if p.Ahead.Abs() > worst.Ahead.Abs() {
				worst = p
			}
		}
	}
	if off == 0 {
		return ""
	}
	ahead := "ahead of"
	if worst.Ahead < 0 {
		ahead = "behind"
	}
	return fmt.Sprintf("the clock of peer %s is %s %s that of this host (%d of %d peers differ by more than %s): "+
		"keep clocks in step, and see 'dfcache peers'",
		worst.ID, worst.Ahead.Abs().Round(time.Second), ahead, off, all, maxSkew)
}

// Close closes the Store. Operations under way end first, but for imports, pushes and uploads that
// still read their content: these fail with [ErrClosed], as a reader may give nothing for ever.
// Open [Reader]s stay readable, but for those of files that are still coming from peers.
func (s *Store) Close() error { return s.engine.Close() }
