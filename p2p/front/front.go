// Package front is the engine of a dfdaemon: the store of this host in front, and behind it
// a row of sources, where what is not here is found and fetched from.
//
// A [Source] finds, fetches, offers and forgets; it keeps nothing. The [Engine] looks in the
// store first, and then asks the sources: side by side for what they know, one after the other
// for content. All that comes from them comes in by one path: proven by a hash chain, piece
// by piece, into a partial blob ([Engine.Complete]), or as a whole ([Engine.Take]); then it is
// committed with what is known of it, and served on from there.
//
// It promises no compatibility.
package front

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"strings"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Engine is a store with sources behind it. It implements [p2p.Engine] and [p2p.Peering], and
// is safe for concurrent use.
type Engine struct {
	store   *pieces.Store
	sources []Source
	log     *slog.Logger

	ctx     context.Context // of what Once runs; ends with Close
	cancel  context.CancelCauseFunc
	running sync.WaitGroup // what Once runs

	callMu sync.Mutex
	calls  sync.WaitGroup
	closed bool

	mu   sync.Mutex
	once map[digest.Digest]*once
}

var (
	_ p2p.Engine  = (*Engine)(nil)
	_ p2p.Peering = (*Engine)(nil)
)

var errClosed = fmt.Errorf("engine: %w", p2p.ErrClosed)

// New returns an engine over store, which it takes over: it closes it. log gets what an
// operator should know; nil is to be silent.
func New(store *pieces.Store, log *slog.Logger) *Engine {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{store: store, log: log, once: map[digest.Digest]*once{}}
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	return e
}

// Add adds a source at the end of the row. It is called before the engine is used, once for
// each, and hands the source over: the Engine closes it.
func (e *Engine) Add(s Source) { e.sources = append(e.sources, s) }

// Store returns the store of this host, which stays the engine's.
func (e *Engine) Store() *pieces.Store { return e.store }

// Begin announces a call, of this engine or of what a source serves others, for which Close waits.
// Where it returns nil, the caller calls [Engine.End]. The error matches [p2p.ErrClosed] where the
// engine is closed.
func (e *Engine) Begin(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	e.callMu.Lock()
	defer e.callMu.Unlock()
	if e.closed {
		return errClosed
	}
	e.calls.Add(1)
	return nil
}

// End ends what [Engine.Begin] has announced.
func (e *Engine) End() { e.calls.Done() }

// Close ends what is on its way, waits for calls under way, and closes the sources and the
// store.
func (e *Engine) Close() error {
	e.callMu.Lock()
	closed := e.closed
	e.closed = true
	e.callMu.Unlock()
	if closed {
		return nil
	}
	e.cancel(errClosed)
	for _, s := range e.sources {
		s.Stop()
	}
	e.calls.Wait()
	e.running.Wait()
	var errs []error
	for _, s := range e.sources {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, e.store.Close())...)
}

// Health asks those sources that can be asked whether they answer. The error is of the first
// one that does not, and matches [p2p.ErrUnavailable].
func (e *Engine) Health(ctx context.Context) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	for _, s := range e.sources {
		if s, ok := s.(interface{ Health(context.Context) error }); ok {
			if err := s.Health(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// List implements [p2p.Engine]: it lists the store.
func (e *Engine) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return e.store.List(ctx, q)
}

// Replicate implements [p2p.Peering], by the first source that has peers it can ask.
func (e *Engine) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	for _, s := range e.sources {
		if s, ok := s.(p2p.Peering); ok {
			return s.Replicate(ctx, tag, cid, n)
		}
	}
	providers, err := p2p.Replicate(ctx, e.store, tag, cid, n)
	if len(e.sources) > 0 && errors.Is(err, p2p.ErrUnreachable) {
		err = fmt.Errorf("replicate %s: %w: %w by %s: export it on the hosts that are to have it",
			p2p.Describe(tag, cid), p2p.ErrUnreachable, errors.ErrUnsupported, e.called())
	}
	return providers, err
}

// Peers implements [p2p.Peering].
func (e *Engine) Peers(ctx context.Context) (all []p2p.Peer, err error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	for _, s := range e.sources {
		if s, ok := s.(p2p.Peering); ok {
			peers, err := s.Peers(ctx)
			if err != nil {
				return nil, err
			}
			all = append(all, peers...)
		}
	}
	return all, nil
}

// names returns the source that knows names, or nil.
func (e *Engine) names() Names {
	for _, s := range e.sources {
		if n, ok := s.(Names); ok {
			return n
		}
	}
	return nil
}

// called names the sources in messages.
func (e *Engine) called() string {
	var names []string
	for _, s := range e.sources {
		names = append(names, s.Name())
	}
	return strings.Join(names, " and ")
}

// isMissing reports whether an error of the store says that it does not have
// something, or not any more.
func isMissing(err error) bool {
	return errors.Is(err, p2p.ErrNotFound) || errors.Is(err, digest.ErrCorrupt)
}

// isAway reports whether an error of a source says that it does not have something, or that
// it can't say.
func isAway(err error) bool {
	return errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable) || errors.Is(err, p2p.ErrUnavailable)
}
