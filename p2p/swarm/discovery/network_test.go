package discovery_test

import (
	"github.com/dfcache/dfcache/p2p/swarm"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
)

var _ swarm.Network = (*discovery.Network)(nil)
