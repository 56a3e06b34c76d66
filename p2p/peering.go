package p2p

import (
	"context"
	"fmt"

	"github.com/dfcache/dfcache/digest"
)

// Peering is an [Engine] that knows the peers it trades with.
type Peering interface {
	// Replicate makes n other peers hold what cid names under tag, with all
	// that it refers to, and returns their IDs when they do. It fails with
	// ErrUnreachable where there are not so many peers that can, and says how
	// many did.
	Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error)

	// Peers describes the peers that are known, the connected ones first.
	Peers(ctx context.Context) ([]Peer, error)
}

// Replicate makes n peers of an engine hold what cid names, as [Peering] has it. An
// engine without peers fails with [ErrUnreachable], and with what a Stat fails with.
func Replicate(ctx context.Context, e Engine, tag string, cid digest.CID, n int) ([]string, error) {
	if p, ok := e.(Peering); ok {
		return p.Replicate(ctx, tag, cid, n)
	}
	if _, err := e.Stat(ctx, tag, cid, StatOptions{Scope: Local}); err != nil || n <= 0 {
		return nil, err
	}
	return nil, fmt.Errorf("replicate %s: %w: this store is not part of a swarm", Describe(tag, cid), ErrUnreachable)
}

// Peers describes the peers of an engine, as [Peering] has it: one without peers has none.
func Peers(ctx context.Context, e Engine) ([]Peer, error) {
	if p, ok := e.(Peering); ok {
		return p.Peers(ctx)
	}
	return nil, context.Cause(ctx)
}
