package swarm

import (
	"context"
	"iter"
	"net"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Key is what peers announce and look up: the hash of a task or of a name.
type Key = [32]byte

// Network finds other peers of the swarm, and reaches them. Package discovery
// implements it with libp2p. It is safe for concurrent use.
type Network interface {
	// Self returns the ID of this peer.
	Self() peer.ID

	// Connected returns the peers that there is a connection with now.
	Connected() []peer.ID

	// Addresses returns where p may be reached, the likeliest first: what it
	// has told and where it was seen. It is empty where nothing is known.
	Addresses(p peer.ID) peer.AddrInfo

	// Connect makes a connection with a peer, unless there is one.
	Connect(ctx context.Context, p peer.AddrInfo) error

	// Providers yields peers that have announced key, as they are found, each
	// once and never this one. It ends when there are no more, or with ctx.
	// What it yields are hints: an announcement outlives what it announces.
	Providers(ctx context.Context, key Key) iter.Seq[peer.AddrInfo]

	// Announce tells the swarm that this peer provides keys, soon and then
	// again and again, until they are withdrawn. It returns at once.
	Announce(keys ...Key)

	// Withdraw ends announcing keys.
	Withdraw(keys ...Key)

	// Dial opens a stream to p over the connection with it, however that is
	// routed. It is proven to be p, and of this swarm. The one that closes it has read what
	// it was to read.
	Dial(ctx context.Context, p peer.ID) (net.Conn, error)

	// Listener accepts what others Dial. The string of a connection's
	// RemoteAddr is the ID of the peer. It is closed with the network.
	Listener() net.Listener

	// OnConnect calls f, from a goroutine of the network, for every peer that
	// is connected now or later, whenever it was not before.
	OnConnect(f func(peer.ID))

	// Trouble says why peers that were found can't be connected with, where that
	// is what somebody has to mend, as a clock; nil where it is not known.
	Trouble() error

	// Close ends all connections.
	Close() error
}
