package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/dragonflyapi"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// upstreamServer answers Dragonfly's own dfcache.
type upstreamServer struct {
	listener net.Listener
	server   *dragonflyapi.Server
}

// listenUpstream listens for Dragonfly's dfcache. It returns nil where that is off.
func (o *options) listenUpstream(store *blobstore.Store, log *slog.Logger) (*upstreamServer, error) {
	if o.dragonflySocket == "" || o.dragonflySocket == "off" {
		return nil, nil
	}
	l, err := rpc.ListenShared(o.dragonflySocket)
	if errors.Is(err, fs.ErrExist) {
		// Not to be taken for an output that exists.
		return nil, fmt.Errorf("%w: %v", p2p.ErrUnavailable, err)
	}
	if err != nil {
		return nil, err
	}
	return &upstreamServer{l, dragonflyapi.NewServer(store, log)}, nil
}

func (s *upstreamServer) serve() error { return s.server.Serve(s.listener) }
