// Package client opens the store of a running dfdaemon. It is apart from package
// blobstore so that a program with an embedded store does not link gRPC.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package client

import (
	"context"

	"google.golang.org/grpc/stats"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// Option changes how a store is dialled.
type Option = rpc.DialOption

// WithStatsHandler passes h to gRPC on the way to the dfdaemon: the hook for
// OpenTelemetry and metrics.
func WithStatsHandler(h stats.Handler) Option { return rpc.WithStatsHandler(h) }

// WithServerUID accepts a dfdaemon that runs as uid, besides root and the
// caller's own user.
func WithServerUID(uid uint32) Option { return rpc.WithServerUID(uid) }

// Dial opens the store of the dfdaemon that listens on the unix socket at
// path. Where none answers, or one of a user that is not trusted with it
// ([WithServerUID]), it fails with [blobstore.ErrUnavailable]. ctx bounds the
// connecting only. The caller closes the Store.
func Dial(ctx context.Context, path string, opts ...Option) (*blobstore.Store, error) {
	engine, err := rpc.Dial(ctx, path, opts...)
	if err != nil {
		return nil, err
	}
	return blobstore.New(engine), nil
}
