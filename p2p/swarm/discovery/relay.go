package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	// maxRelays is how many peers relay to this host, if it needs any.
	maxRelays = 2
	// maxCircuits bounds the connections that are relayed from and to one peer.
	maxCircuits = fullMesh
	// relayBuffer is in bytes, two for each connection that is relayed.
	relayBuffer = 32 << 10
	// relayTag names what keeps connections with relays from being closed.
	relayTag = "dfcache relay"
)

// relays keeps this host reachable where a router lets nobody connect with it:
// peers that it has connected with relay to it. It has reservations with them, and
// tells others of those.
//
// libp2p can do that itself, for hosts in the Internet: it waits for several peers
// to find out that a host can't be reached, and takes only relays at public
// addresses. Here, a peer that sees this host at an address that it does not have is
// outside of its router, and so can relay, wherever it is.
type relays struct {
	n       *Network
	service *relay.Relay // nil where this host does not relay for others
	updated event.Emitter
	punch   *holepunch.Service // nil unless Options.NAT, and until the router's address is known
	asking  sync.WaitGroup     // requests for reservations, which end with the host

	mu      sync.Mutex
	outside map[peer.ID]*reservation // connected peers that can relay
	seen    []multiaddr.Multiaddr    // where peers see the port that this host listens at, or saw it last
	direct  map[peer.ID]*retry       // of connections with peers that there is only a relay to
}

// retry says when something is tried again.
type retry struct {
	next  time.Time
	pause time.Duration
}

// reservation is what a peer keeps that relays to this host, or may.
type reservation struct {
	over  network.Conn        // it ends with it
	seen  multiaddr.Multiaddr // where the peer sees the port that this host listens at; nil: it sees another one
	until time.Time           // zero: there is none
	next  time.Time           // when to ask for it, again
	asks  bool
}

// start begins to relay for others, unless this host is not to. All that is relayed
// is between members of the swarm, so no connection has a limit, as it has in libp2p.
func (r *relays) start() (err error) {
	if r.updated, err = r.n.host.EventBus().Emitter(new(event.EvtAutoRelayAddrsUpdated),
		eventbus.Stateful); err != nil {
		return err
	}
	if r.n.opts.NoRelay {
		return nil
	}
	limits := relay.DefaultResources()
	limits.Limit = nil
	limits.MaxReservations = r.n.opts.MaxPeers
	// All hosts behind a router have the same address.
	limits.MaxReservationsPerIP, limits.MaxReservationsPerASN = limits.MaxReservations, limits.MaxReservations
	limits.MaxCircuits, limits.BufferSize = maxCircuits, relayBuffer
	r.service, err = relay.New(r.n.host, relay.WithResources(limits))
	return err
}

// identified notes whether a peer can relay to this host.
func (r *relays) identified(e event.EvtPeerIdentificationCompleted) {
	if !r.isOutside(e.Conn, e.ObservedAddr) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.outside[e.Peer]; p == nil || p.over.IsClosed() {
		res := &reservation{over: e.Conn}
		if r.isListening(e.Conn.LocalMultiaddr()) {
			res.seen = e.ObservedAddr
		}
		r.outside[e.Peer] = res
		poke(r.n.wake)
	}
	if r.n.opts.NAT && r.punch == nil {
		r.startPunching()
	}
}

// startPunching has libp2p punch holes: when a peer comes over a relay, both try to
// connect at once, so that their routers take each other's packets for answers.
//
// libp2p.EnableHolePunching would do the same later: it looks for an address of this
// host's router, of a public kind, every few seconds, and by then the peers are
// connected over relays, which it does not look at again. The caller holds mu.
func (r *relays) startPunching() {
	host, ok := r.n.host.(interface{ IDService() identify.IDService })
	if !ok {
		return
	}
	var err error
	if r.punch, err = holepunch.NewService(r.n.host, host.IDService(), r.seenAt); err != nil {
		r.n.log.Warn("cannot punch holes through the router", "error", err)
	}
}

// seenAt returns the addresses that this host has outside of its router.
func (r *relays) seenAt() []multiaddr.Multiaddr {
	r.mu.Lock()
	defer r.mu.Unlock()
	var addrs []multiaddr.Multiaddr
	for _, res := range r.outside {
		if res.seen != nil {
			addrs = append(addrs, res.seen)
		}
	}
	if len(addrs) > 0 {
		r.seen = distinct(addrs)
	}
	return r.seen
}

// isListening reports whether this host listens at the port of an address.
func (r *relays) isListening(addr multiaddr.Multiaddr) bool {
	port, err := addr.ValueForProtocol(multiaddr.P_TCP)
	return err == nil && slices.ContainsFunc(r.n.host.Network().ListenAddresses(), func(l multiaddr.Multiaddr) bool {
		at, err := l.ValueForProtocol(multiaddr.P_TCP)
		return err == nil && at == port
	})
}

// puncher dials from the port that this host listens at where a hole is punched, and
// where that port has to be seen to know its address outside of the router. Else it dials
// from any port.
//
// The router remembers for two minutes what was dialled in vain: Linux forwards what the
// other side then dials to make the hole, and so it arrives where nobody dials yet, at the
// listener. That answers with other sequence numbers than the router has seen, which
// it drops, and keeps the port from being dialled from for a minute.
type puncher struct {
	*tcp.TcpTransport
	anyPort *tcp.TcpTransport
	relays  *relays
}

// Dial implements [transport.Transport].
func (t *puncher) Dial(ctx context.Context, addr multiaddr.Multiaddr, p peer.ID) (transport.CapableConn, error) {
	return t.DialWithUpdates(ctx, addr, p, nil)
}

// DialWithUpdates implements [transport.DialUpdater].
func (t *puncher) DialWithUpdates(
	ctx context.Context, addr multiaddr.Multiaddr, p peer.ID, updates chan<- transport.DialUpdate,
) (transport.CapableConn, error) {
	if punches, _, _ := network.GetSimultaneousConnect(ctx); punches || t.relays.isUnseen(p) {
		return t.TcpTransport.DialWithUpdates(ctx, addr, p, updates)
	}
	return t.anyPort.DialWithUpdates(ctx, addr, p, updates)
}

// isUnseen reports whether p should see the port that this host listens at: nobody does,
// and p itself seems to be reachable.
func (r *relays) isUnseen(p peer.ID) bool {
	if slices.ContainsFunc(r.n.host.Peerstore().Addrs(p), isRelayed) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, res := range r.outside {
		if res.seen != nil && !res.over.IsClosed() {
			return false
		}
	}
	return true
}

// isOutside reports whether there is a router between this host and a peer, behind
// which this host is: the peer sees it at an address that it does not have. A router
// that lets nobody in may leave addresses as they are, as with IPv6. With Options.NAT
// one is believed to be before everybody who is not on a network of this host.
func (r *relays) isOutside(c network.Conn, observed multiaddr.Multiaddr) bool {
	relayed := func(c network.Conn) bool { return isRelayed(c.RemoteMultiaddr()) }
	if c.Stat().Direction != network.DirOutbound ||
		slices.ContainsFunc(r.n.host.Network().ConnsToPeer(c.RemotePeer()), relayed) {
		return false // it reached this host, or can't be reached itself but through a hole
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	has := func(matches func(*net.IPNet) bool) bool {
		return slices.ContainsFunc(own, func(a net.Addr) bool {
			n, ok := a.(*net.IPNet)
			return ok && matches(n)
		})
	}
	if ip, err := manet.ToIP(observed); err == nil && !has(func(n *net.IPNet) bool { return n.IP.Equal(ip) }) {
		return true
	}
	ip, err := manet.ToIP(c.RemoteMultiaddr())
	return r.n.opts.NAT && err == nil && !has(func(n *net.IPNet) bool { return n.Contains(ip) })
}

// tend asks for reservations, and renews them.
func (r *relays) tend(ctx context.Context, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var idle []peer.ID
	have, lost := 0, false
	for p, res := range r.outside {
		switch {
		case res.over.IsClosed():
			delete(r.outside, p)
			r.n.host.ConnManager().Unprotect(p, relayTag)
			lost = lost || !res.until.IsZero()
		case res.asks:
			have++
		case !res.until.IsZero():
			have++
			if now.After(res.next) {
				r.ask(ctx, p, res)
			}
		case now.After(res.next):
			idle = append(idle, p)
		}
	}
	if lost {
		r.asking.Go(r.tell)
	}
	// A host that has a relay itself can be reached by fewer.
	relayed := func(p peer.ID) int {
		if slices.ContainsFunc(r.n.host.Peerstore().Addrs(p), isRelayed) {
			return 1
		}
		return 0
	}
	slices.SortFunc(idle, func(p, q peer.ID) int { return cmp.Compare(relayed(p), relayed(q)) })
	for _, p := range idle[:min(len(idle), max(0, maxRelays-have))] {
		r.ask(ctx, p, r.outside[p])
	}
}

// connectDirectly tries again and again, with growing pauses, to do without relays. One that
// has dialled a peer in vain, and then over a relay, dials it once more: its router may
// have opened a port meanwhile. The one that was connected with punches a hole, which does not
// always come about when a peer comes, when libp2p tries.
func (r *relays) connectDirectly(ctx context.Context, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	swarm := r.n.host.Network()
	relayed := map[peer.ID]bool{}
	for _, p := range swarm.Peers() {
		conns := swarm.ConnsToPeer(p)
		is := func(d network.Direction) bool {
			return slices.ContainsFunc(conns, func(c network.Conn) bool { return c.Stat().Direction == d })
		}
		if slices.ContainsFunc(conns, func(c network.Conn) bool { return !isRelayed(c.RemoteMultiaddr()) }) {
			continue
		}
		relayed[p] = true
		again := r.direct[p]
		if again == nil {
			pause := 10 * r.n.opts.tick
			r.direct[p] = &retry{now.Add(pause), pause}
		}
		if again == nil || now.Before(again.next) {
			continue
		}
		again.pause = min(2*again.pause, 600*r.n.opts.tick)
		again.next = now.Add(again.pause)
		// Where both were connected with, one of them punches.
		punches := r.punch != nil && len(r.seen) > 0 && is(network.DirInbound) &&
			(!is(network.DirOutbound) || r.n.host.ID() < p)
		if punches {
			r.asking.Go(func() {
				err := r.punch.DirectConnect(p)
				r.n.log.Debug("tried again to punch a hole", "peer", p, "error", err)
			})
		}
		if is(network.DirOutbound) {
			r.asking.Go(func() {
				_, err := swarm.DialPeer(network.WithForceDirectDial(ctx, "it is connected over a relay"), p)
				r.n.log.Debug("tried again without a relay", "peer", p, "error", err)
			})
		}
	}
	for p := range r.direct {
		if !relayed[p] {
			delete(r.direct, p)
		}
	}
}

// ask asks p for a reservation. The caller holds mu.
func (r *relays) ask(ctx context.Context, p peer.ID, res *reservation) {
	res.asks = true
	r.asking.Go(func() {
		var until time.Time
		got, err := client.Reserve(ctx, r.n.host, peer.AddrInfo{ID: p})
		if err == nil {
			until = got.Expiration
		}
		r.n.log.Debug("asked a peer to relay", "peer", p, "error", err)
		r.mu.Lock()
		had, now := !res.until.IsZero(), time.Now()
		res.asks, res.until, res.next = false, until, now.Add(60*r.n.opts.tick)
		if err == nil {
			res.next = now.Add(until.Sub(now) / 2)
		}
		if err == nil && r.outside[p] == res {
			r.n.host.ConnManager().Protect(p, relayTag)
		}
		r.mu.Unlock()
		if (err == nil) != had {
			r.tell()
			// Peers that could not be reached may have got one by now, too.
			r.n.askSoon.Store(true)
		}
		poke(r.n.wake)
	})
}

// tell has libp2p look at the addresses of this host, and tell its peers.
func (r *relays) tell() {
	_ = r.updated.Emit(event.EvtAutoRelayAddrsUpdated{RelayAddrs: r.addrs()}) // fails after Close
}

// addrs returns where this host can be reached through others.
func (r *relays) addrs() (addrs []multiaddr.Multiaddr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, res := range r.outside {
		if res.until.IsZero() {
			continue
		}
		if circuit, err := multiaddr.NewMultiaddr(fmt.Sprintf("/p2p/%s/p2p-circuit", p)); err == nil {
			addrs = append(addrs, res.over.RemoteMultiaddr().Encapsulate(circuit))
		}
	}
	return addrs
}

// close ends relaying. Requests for reservations end with the host.
func (r *relays) close() error {
	var errs []error
	if r.punch != nil {
		errs = append(errs, r.punch.Close())
	}
	if r.service != nil {
		errs = append(errs, r.service.Close())
	}
	return errors.Join(errs...)
}

// isRelayed reports whether an address is one of a relay.
func isRelayed(a multiaddr.Multiaddr) bool {
	_, err := a.ValueForProtocol(multiaddr.P_CIRCUIT)
	return err == nil
}
