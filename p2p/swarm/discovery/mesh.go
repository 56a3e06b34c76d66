package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/dfcache/dfcache/p2p/jsonlimit"
)

const (
	peersProtocol = "/dfcache/peers/1"
	peersTimeout  = 10 * time.Second

	maxPeersMessage = 64 << 10 // bytes
	maxPeersTold    = 64
	maxAddrs        = 16 // of one peer

	// fullMesh is with how many peers this one is connected if it knows as
	// many: all of a small swarm.
	fullMesh = 64
	// maxKnown bounds the peers that are remembered.
	maxKnown = 1024
	// forgetAfter is how long an absent peer is looked for.
	forgetAfter = 24 * time.Hour
)

// book remembers peers and where they are. Safe for concurrent use.
type book struct {
	mu    sync.Mutex
	peers map[peer.ID]*known
	dirty bool // has changed since it was saved
}

type known struct {
	addrs    []multiaddr.Multiaddr
	seen     time.Time // last heard of as alive
	tried    time.Time
	failures int // in sequence
	dialing  bool
}

// saved is a peer in the state file.
type saved struct {
	Peer peer.AddrInfo
	Seen time.Time
}

// add notes that info was alive at the time seen. Its addresses come before those
// known, or, with replace, instead of them.
func (b *book) add(info peer.AddrInfo, seen time.Time, replace bool) {
	if len(info.Addrs) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	k := b.peers[info.ID]
	if k == nil {
		if len(b.peers) >= maxKnown {
			b.evict()
		}
		k = &known{}
		b.peers[info.ID] = k
	}
	addrs := slices.Clone(info.Addrs)
	if !replace {
		addrs = distinct(append(addrs, k.addrs...))
	}
	addrs = addrs[:min(len(addrs), maxAddrs)]
	b.dirty = b.dirty || !slices.EqualFunc(addrs, k.addrs, multiaddr.Multiaddr.Equal)
	k.addrs = addrs
	if seen.After(k.seen) {
		k.seen = seen
	}
}

// evict removes the peer that was away the longest.
func (b *book) evict() {
	var oldest peer.ID
	for p, k := range b.peers {
		if oldest == "" || k.seen.Before(b.peers[oldest].seen) {
			oldest = p
		}
	}
	delete(b.peers, oldest)
}

// alive notes that peers are connected, and forgets those that were away too long.
func (b *book) alive(connected []peer.ID, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range connected {
		if k := b.peers[p]; k != nil {
			k.seen, k.failures = now, 0
		}
	}
	for p, k := range b.peers {
		if now.Sub(k.seen) > forgetAfter {
			delete(b.peers, p)
			b.dirty = true
		}
	}
}

// due returns up to n peers of which it is time to try them: at once, and after a
// failure with growing pauses of tick, 2 tick, 4 tick and so on, up to limit. The
// caller must call tried for each.
func (b *book) due(now time.Time, n int, tick, limit time.Duration, connected func(peer.ID) bool) []peer.AddrInfo {
	b.mu.Lock()
	defer b.mu.Unlock()
	var infos []peer.AddrInfo
	for p, k := range b.peers { // in random order
		if len(infos) >= n {
			break
		}
		wait := min(tick<<min(max(k.failures-1, 0), 16), limit)
		if k.failures == 0 {
			wait = 10 * tick // it may have too many peers, and hang up on us
		}
		if k.dialing || connected(p) || now.Sub(k.tried) < wait {
			continue
		}
		k.dialing = true
		infos = append(infos, peer.AddrInfo{ID: p, Addrs: slices.Clone(k.addrs)})
	}
	return infos
}

// tried notes the outcome of an attempt.
func (b *book) tried(p peer.ID, now time.Time, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	k := b.peers[p]
	if k == nil {
		return
	}
	k.dialing = false
	k.tried = now
	if err == nil {
		k.failures = 0
	} else {
		k.failures++
	}
}

func (b *book) addrs(p peer.ID) []multiaddr.Multiaddr {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.peers[p]; k != nil {
		return slices.Clone(k.addrs)
	}
	return nil
}

// load adds the peers of a state file. There need not be one.
func (b *book) load(path string) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var peers []saved
	if err := json.Unmarshal(data, &peers); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, s := range peers {
		if s.Peer.ID.Validate() == nil {
			b.add(s.Peer, s.Seen, false)
		}
	}
	return nil
}

func (b *book) save(path string) error {
	b.mu.Lock()
	peers := make([]saved, 0, len(b.peers))
	for p, k := range b.peers {
		peers = append(peers, saved{peer.AddrInfo{ID: p, Addrs: slices.Clone(k.addrs)}, k.seen})
	}
	b.dirty = false
	b.mu.Unlock()
	slices.SortFunc(peers, func(x, y saved) int { return y.Seen.Compare(x.Seen) })
	data, err := json.MarshalIndent(peers, "", "\t")
	if err != nil {
		return err
	}
	return replace(path, append(data, '\n'))
}

func (b *book) isDirty() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.dirty
}

// addPeer puts a peer in the book, if it is another one, and has it dialled.
func (n *Network) addPeer(info peer.AddrInfo) {
	if info.ID == n.Self() || info.ID.Validate() != nil {
		return
	}
	n.book.add(info, time.Now(), false)
	poke(n.wake)
}

// mesh is with how many peers this one wants to be connected at least.
func (n *Network) mesh() int { return min(fullMesh, max(1, n.opts.MaxPeers*3/4)) }

// maintain keeps the mesh together until ctx ends.
func (n *Network) maintain(ctx context.Context) {
	tick := time.NewTicker(n.opts.tick)
	defer tick.Stop()
	slots := make(chan struct{}, parallel)
	var lastSave time.Time
	n.tendMDNS(time.Now())
	for ticks := 0; ; {
		ticked := false
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-tick.C:
			ticked = true
			ticks++
		}
		connected, now := n.Connected(), time.Now()
		n.book.alive(connected, now)
		n.relays.tend(ctx, now)
		if ticked {
			n.relays.connectDirectly(ctx, now)
			n.announcer.tick()
			n.tendMDNS(now)
			if ticks%10 == 0 {
				for _, p := range n.table.RoutingTable().ListPeers() {
					if !n.connected(p) {
						n.book.add(n.host.Peerstore().PeerInfo(p), now, false)
					}
				}
			}
			// A new peer is asked at once (see onEvent). Somebody is asked now and
			// then, since those who came at the same time were not known yet.
			if len(connected) > 0 && len(connected) < n.mesh() &&
				(ticks%60 == 0 || n.askSoon.CompareAndSwap(true, false)) {
				p := connected[rand.IntN(len(connected))]
				n.spawn(func() { n.ask(ctx, p) })
			}
			if n.opts.StateFile != "" &&
				(n.book.isDirty() && now.Sub(lastSave) > 10*n.opts.tick || now.Sub(lastSave) > 300*n.opts.tick) {
				lastSave = now
				_ = n.saveState() // which logs it
			}
		}
		if len(connected) < n.mesh() {
			limit := 300 * n.opts.tick
			if len(connected) == 0 {
				limit = 30 * n.opts.tick
			}
			for _, info := range n.book.due(now, parallel-len(slots), n.opts.tick, limit, n.connected) {
				slots <- struct{}{}
				n.spawn(func() {
					ctx, cancel := context.WithTimeout(ctx, dialTimeout)
					defer cancel()
					err := n.Connect(ctx, info)
					n.book.tried(info.ID, time.Now(), err)
					n.log.Debug("dialled a known peer", "peer", info.ID, "error", err)
					<-slots
					poke(n.wake)
				})
			}
		}
	}
}

func (n *Network) saveState() error {
	for _, p := range n.Connected() { // some may be too new to be in the book
		n.book.add(n.told(p), time.Now(), false)
	}
	err := n.book.save(n.opts.StateFile)
	if failed := err != nil; failed != n.saveFailed {
		n.saveFailed = failed
		if failed {
			n.log.Warn("cannot save the addresses of peers; a restart will need a bootstrap", "error", err)
		}
	}
	return err
}

// watch follows connections until ctx ends.
func (n *Network) watch(ctx context.Context, sub event.Subscription) {
	defer sub.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-sub.Out():
			n.onEvent(ctx, e)
		}
	}
}

func subscribe(bus event.Bus) (event.Subscription, error) {
	return bus.Subscribe([]any{
		new(event.EvtPeerIdentificationCompleted), new(event.EvtPeerIdentificationFailed),
		new(event.EvtPeerConnectednessChanged),
	}, eventbus.BufSize(512))
}

// onEvent must not block: those who emit events wait.
func (n *Network) onEvent(ctx context.Context, e any) {
	var p peer.ID
	switch e := e.(type) {
	case event.EvtPeerIdentificationCompleted: // only now its addresses and protocols are known
		p = e.Peer
		n.book.add(n.told(p), time.Now(), true)
		n.relays.identified(e)
	case event.EvtPeerIdentificationFailed: // the other end may have refused this one's certificate
		n.trouble.note(e.Reason)
		return
	case event.EvtPeerConnectednessChanged:
		if e.Connectedness == network.Connected || e.Connectedness == network.Limited {
			return
		}
		p = e.Peer
		n.mu.Lock()
		delete(n.up, p)
		n.mu.Unlock()
		n.log.Debug("peer disconnected", "peer", p)
		if len(n.Connected()) == 0 {
			poke(n.bootstrapper.alone)
		}
		poke(n.wake)
	}
	// After the loss, too: the event may be late, and the peer back.
	if !n.connected(p) {
		return
	}
	n.mu.Lock()
	was := n.up[p]
	n.up[p] = true
	callbacks := slices.Clone(n.onConnect)
	n.mu.Unlock()
	if was {
		return
	}
	n.log.Debug("peer connected", "peer", p)
	for _, f := range callbacks {
		n.spawn(func() { f(p) })
	}
	if len(n.Connected()) < n.mesh() {
		n.askSoon.Store(true)
		n.spawn(func() { n.ask(ctx, p) })
	}
}

// ask asks p with whom it is connected.
func (n *Network) ask(ctx context.Context, p peer.ID) {
	infos, err := n.askPeers(ctx, p)
	if err != nil {
		n.log.Debug("a peer did not tell its peers", "peer", p, "error", err)
	}
	for _, info := range infos {
		n.addPeer(info)
	}
}

func (n *Network) askPeers(ctx context.Context, p peer.ID) ([]peer.AddrInfo, error) {
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(ctx, peersProtocol), peersTimeout)
	defer cancel()
	s, err := n.host.NewStream(ctx, p, peersProtocol)
	if err != nil {
		return nil, err
	}
	defer s.Reset() // no effect after a Close
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	defer stop()
	if err := s.CloseWrite(); err != nil {
		return nil, err
	}
	infos, err := decodePeers(s)
	if err != nil {
		return nil, err
	}
	if !manet.IsIPLoopback(s.Conn().RemoteMultiaddr()) {
		for i := range infos {
			infos[i].Addrs = withoutLoopback(infos[i].Addrs)
		}
	}
	return infos, s.Close()
}

// tellPeers answers the protocol /dfcache/peers/1: to a peer that opens a stream it
// writes, as JSON, up to 64 of the peers that it is connected with.
func (n *Network) tellPeers(s network.Stream) {
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(peersTimeout)) // always works on yamux
	asker, loopback := s.Conn().RemotePeer(), manet.IsIPLoopback(s.Conn().RemoteMultiaddr())
	peers := n.Connected()
	rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
	var infos []peer.AddrInfo
	for _, p := range peers {
		if p == asker || len(infos) == maxPeersTold {
			continue
		}
		info := n.Addresses(p)
		if !loopback {
			info.Addrs = withoutLoopback(info.Addrs)
		}
		if info.Addrs = info.Addrs[:min(len(info.Addrs), maxAddrs)]; len(info.Addrs) > 0 {
			infos = append(infos, info)
		}
	}
	data := encodePeers(infos)
	if _, err := s.Write(data); err != nil {
		_ = s.Reset()
	}
}

// encodePeers returns the message of as many peers as fit in one.
func encodePeers(infos []peer.AddrInfo) []byte {
	for {
		data, err := json.Marshal(infos)
		if err == nil && len(data) <= maxPeersMessage {
			return data
		}
		infos = infos[:len(infos)/2] // of none it is 2 bytes
	}
}

func decodePeers(r io.Reader) ([]peer.AddrInfo, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxPeersMessage+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxPeersMessage {
		return nil, fmt.Errorf("the list of peers is longer than %d bytes", maxPeersMessage)
	}
	var infos []peer.AddrInfo
	if err := jsonlimit.Unmarshal(data, &infos, maxPeersTold*(maxAddrs+8)); err != nil {
		return nil, fmt.Errorf("list of peers: %w", err)
	}
	if len(infos) > maxPeersTold {
		return nil, fmt.Errorf("the list of peers has %d where %d are allowed", len(infos), maxPeersTold)
	}
	for _, info := range infos {
		if err := info.ID.Validate(); err != nil {
			return nil, fmt.Errorf("list of peers: %w", err)
		}
		if len(info.Addrs) > maxAddrs {
			return nil, fmt.Errorf("the list of peers has %d addresses of one where %d are allowed", len(info.Addrs),
				maxAddrs)
		}
	}
	return infos, nil
}

func withoutLoopback(addrs []multiaddr.Multiaddr) []multiaddr.Multiaddr {
	return slices.DeleteFunc(slices.Clone(addrs), manet.IsIPLoopback)
}

// distinct returns addrs without repetitions, in the order of the first ones.
func distinct(addrs []multiaddr.Multiaddr) []multiaddr.Multiaddr {
	var out []multiaddr.Multiaddr
	for _, a := range addrs {
		if !slices.ContainsFunc(out, a.Equal) {
			out = append(out, a)
		}
	}
	return out
}

// seenAt returns the addresses that a peer told with the IP address of at, where
// it really was, in place of what it believes its own to be. That of a relay says
// nothing of that.
func seenAt(at multiaddr.Multiaddr, told []multiaddr.Multiaddr) (addrs []multiaddr.Multiaddr) {
	if isRelayed(at) {
		return nil
	}
	ip, _ := multiaddr.SplitFirst(at)
	for _, t := range told {
		first, others := multiaddr.SplitFirst(t)
		if ip != nil && first != nil && first.Code() == ip.Code() && manet.IsThinWaist(t) && !isRelayed(t) {
			addrs = append(addrs, multiaddr.Join(ip, others))
		}
	}
	return addrs
}

// publicOf returns the addresses to tell others: no loopback ones, unless there
// are no others.
func publicOf(addrs []multiaddr.Multiaddr) []multiaddr.Multiaddr {
	if others := withoutLoopback(addrs); len(others) > 0 {
		return others
	}
	return addrs
}

// poke wakes the one that waits for c, which has a buffer of one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
