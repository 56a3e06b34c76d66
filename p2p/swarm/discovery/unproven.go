package discovery

import (
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/transport"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/dfcache/dfcache/p2p/connpool"
)

const (
	// maxUnproven is how many connections may be open of which the other end has not proven yet
	// that it is of the swarm, and who it is; provingTimeout is how long that may take.
	maxUnproven    = 128
	provingTimeout = 10 * time.Second
)

// upgrader has the connections that are accepted, and not proven yet, in a pool of their own: a host that
// has no key can't keep out one that has. libp2p has one pool for all, and refuses those that
// comes when it is full.
type upgrader struct {
	transport.Upgrader
	unproven *connpool.Pool
}

func newUpgrader(u transport.Upgrader) upgrader { return upgrader{u, connpool.New(maxUnproven)} }

// UpgradeGatedMaListener implements [transport.Upgrader].
func (u upgrader) UpgradeGatedMaListener(t transport.Transport, l transport.GatedMaListener) transport.Listener {
	accepting := &accepting{GatedMaListener: l, unproven: u.unproven, leave: map[string]func(){}}
	return provenListener{u.Upgrader.UpgradeGatedMaListener(t, accepting), accepting}
}

// accepting puts what is accepted into the pool.
type accepting struct {
	transport.GatedMaListener
	unproven *connpool.Pool

	mu    sync.Mutex
	leave map[string]func() // by the address of the other end, as long as a connection is in the pool
}

// Accept implements [transport.GatedMaListener].
func (a *accepting) Accept() (manet.Conn, network.ConnManagementScope, error) {
	c, scope, err := a.GatedMaListener.Accept()
	if err != nil {
		return nil, nil, err
	}
	late := time.AfterFunc(provingTimeout, func() { c.Close() })
	from := c.RemoteMultiaddr().String()
	leave := a.unproven.Push(connpool.Host(c.RemoteAddr()), func() { c.Close() })
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leave[from] = func() {
		late.Stop()
		leave()
	}
	return unproven{c, a, from}, scope, nil
}

// proven takes a connection out of the pool.
func (a *accepting) proven(from string) {
	a.mu.Lock()
	leave := a.leave[from]
	delete(a.leave, from)
	a.mu.Unlock()
	if leave != nil {
		leave()
	}
}

// unproven is a connection in the pool; when it is closed it is not.
type unproven struct {
	manet.Conn
	a    *accepting
	from string
}

func (c unproven) Close() error {
	err := c.Conn.Close()
	c.a.proven(c.from)
	return err
}

// provenListener has only connections that are proven.
type provenListener struct {
	transport.Listener
	accepting *accepting
}

// Accept implements [transport.Listener].
func (l provenListener) Accept() (transport.CapableConn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.accepting.proven(c.RemoteMultiaddr().String())
	return c, nil
}
