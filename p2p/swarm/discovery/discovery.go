package discovery

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ipfs/go-cid"
	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/discovery/mdns"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/net/gostream"
	libp2pswarm "github.com/libp2p/go-libp2p/p2p/net/swarm"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/libp2p/go-libp2p/x/rate"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	tablePrefix  = "/dfcache"
	httpProtocol = "/dfcache/http/1"
)

// Options say who this host is and where it looks for others. The zero value of
// each field but the first two is usable.
type Options struct {
	// Identity is the ed25519 key of this host (see LoadIdentity), and Key the
	// one of the swarm. Both are required.
	Identity crypto.PrivKey
	Key      Key

	// Listen is the TCP addresses to listen at, as IP:PORT, or :PORT for all of
	// IPv4 and, where there is such, IPv6. The default is :65002. Port 0 takes any.
	Listen []string

	// Bootstrap is where to look for peers: multiaddrs that end in /p2p/ID (with
	// /ip4, /ip6, /dns4, /dns6 or /dns), /dnsaddr multiaddrs, or HOST or
	// HOST:PORT with a name or an IP address and DefaultPiecePort as default.
	// All addresses of a name are asked, and it is resolved again and again.
	Bootstrap []string

	// PeersFile names a file with more bootstrap entries, one a line, with
	// comments after #. It is read again when it changes, and need not exist.
	PeersFile string

	// Resolve asks the peer at an IP:PORT of a bootstrap entry who it is and
	// where it listens. Without it only multiaddrs can be entries.
	Resolve func(ctx context.Context, hostport string) (peer.AddrInfo, error)

	// MDNS looks for peers on the local network, and tells them of this one.
	MDNS bool

	// NAT is for a host behind a router: it has that map the port, and punches
	// holes through it to peers that this host reaches over a relay.
	NAT bool

	// NoRelay has this host relay nothing for peers that can't reach each other.
	NoRelay bool

	// MaxPeers is above how many connections some are closed. Default 256.
	MaxPeers int

	// StateFile names the file that keeps the addresses of peers for the next
	// run. Without one, they are not kept.
	StateFile string

	// Validity is how long what a peer announces is believed. It is announced
	// again after half of it. Default 20 minutes. All peers should have the same.
	Validity time.Duration

	// MaxRecords bounds what other peers announced and this one remembers.
	// Default 1,000,000. The oldest go first.
	MaxRecords int

	// Log takes what happens. Default: nothing is logged.
	Log *slog.Logger

	tick time.Duration // the unit of all intervals between attempts; tests shorten it
}

// Network is this host's part of the swarm. It implements swarm.Network. All
// methods are safe for concurrent use.
type Network struct {
	opts  Options
	log   *slog.Logger
	host  host.Host
	table *dht.IpfsDHT
	keys  *keySet

	records      *records
	announcer    *announcer
	bootstrapper *bootstrapper
	relays       *relays
	listener     net.Listener
	book         *book
	wake         chan struct{} // has maintain look at once
	askSoon      atomic.Bool   // has maintain ask somebody for peers
	trouble      trouble
	asking       sync.Mutex // kept while a twin is asked for

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	up        map[peer.ID]bool // connected, and those in onConnect were told
	onConnect []func(peer.ID)

	// Of maintain alone, and of Close after it.
	saveFailed bool
	mdns       mdns.Service
	mdnsAddrs  []multiaddr.Multiaddr
	mdnsNext   time.Time
	mdnsFailed bool
}

// complete sets defaults, and fails for what can't be right.
func (o *Options) complete() error {
	if o.Identity == nil || o.Key == (Key{}) {
		return errors.New("a swarm needs an identity and a swarm key; make one with: dfdaemon swarm key new")
	}
	if o.MaxPeers == 0 {
		o.MaxPeers = 256
	}
	if o.Validity == 0 {
		o.Validity = 20 * time.Minute
	}
	if o.MaxRecords == 0 {
		o.MaxRecords = 1_000_000
	}
	if o.tick == 0 {
		o.tick = time.Second
	}
	if o.MaxPeers < 0 || o.Validity < 0 || o.MaxRecords < 0 {
		return errors.New("the largest number of peers, that of records, and their validity must not be negative")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// New joins the swarm, or begins one: it listens, and goes on looking for peers
// until Close. It fails for options that cannot be right, as a bootstrap entry
// that is none, and if it cannot listen (syscall.EADDRINUSE), but not for lack of
// peers.
func New(opts Options) (_ *Network, err error) {
	if err := opts.complete(); err != nil {
		return nil, err
	}
	n := &Network{
		opts: opts, log: opts.Log, keys: &keySet{},
		book: &book{peers: map[peer.ID]*known{}},
		wake: make(chan struct{}, 1),
		up:   map[peer.ID]bool{},
	}
	n.relays = &relays{n: n, outside: map[peer.ID]*reservation{}, direct: map[peer.ID]*retry{}}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.bootstrapper, err = newBootstrapper(n); err != nil {
		return nil, err
	}
	if opts.StateFile != "" {
		if err := n.book.load(opts.StateFile); err != nil {
			n.log.Warn("cannot use the saved addresses of peers; going on without", "error", err)
		}
	}
	if n.host, err = n.newHost(); err != nil {
		return nil, err
	}
	if err := n.relays.start(); err != nil {
		return nil, fmt.Errorf("start relaying: %w", err)
	}
	n.records = newRecords(n.Self(), n.keys, opts.MaxRecords, opts.Validity, time.Now)
	if n.table, err = n.newTable(); err != nil {
		return nil, fmt.Errorf("start the table of keys: %w", err)
	}
	if n.announcer, err = newAnnouncer(n.Self(), n.keys, n.table, opts.Validity); err != nil {
		return nil, fmt.Errorf("start announcing: %w", err)
	}
	l, err := gostream.Listen(n.host, httpProtocol)
	if err != nil {
		return nil, err
	}
	n.listener = listener{l}
	n.host.SetStreamHandler(peersProtocol, n.tellPeers)
	if err := n.start(); err != nil {
		return nil, err
	}
	return n, nil
}

// start starts what goes on until Close.
func (n *Network) start() error {
	sub, err := subscribe(n.host.EventBus())
	if err != nil {
		return err
	}
	n.wg.Go(func() { n.watch(n.ctx, sub) })
	n.wg.Go(func() { n.announcer.run(n.ctx) })
	for range 4 {
		n.wg.Go(func() { n.announcer.hurry(n.ctx) })
	}
	n.wg.Go(func() { n.maintain(n.ctx) })
	n.wg.Go(func() { n.bootstrapper.run(n.ctx) })
	poke(n.wake)
	return nil
}

// newTable makes the table in which peers announce keys.
func (n *Network) newTable() (*dht.IpfsDHT, error) {
	return dht.New(tableHost{n.host},
		dht.ProtocolPrefix(tablePrefix),
		dht.Mode(dht.ModeServer),
		dht.DisableValues(),
		dht.ProviderDatastore(n.records),
		dht.ProviderManagerOpts(
			kadrecords.Cache(noCache{}),
			kadrecords.CleanupInterval(0), // records clean up themselves
			kadrecords.ProvideValidity(n.opts.Validity),
			kadrecords.ProviderAddrTTL(n.opts.Validity),
		))
}

func (n *Network) newHost() (host.Host, error) {
	addrs, err := listenAddrs(n.opts.Listen)
	if err != nil {
		return nil, err
	}
	conns, err := connmgr.NewConnManager(max(n.mesh(), n.opts.MaxPeers*3/4), n.opts.MaxPeers)
	if err != nil {
		return nil, err
	}
	resources, err := newResources(n.opts.MaxPeers)
	if err != nil {
		return nil, errors.Join(err, conns.Close())
	}
	options := []libp2p.Option{
		libp2p.Identity(n.opts.Identity),
		libp2p.PrivateNetwork(n.opts.Key.psk()),
		libp2p.ListenAddrs(addrs...),
		libp2p.Security(libp2ptls.ID, libp2ptls.New),
		libp2p.DefaultMuxers,
		libp2p.ConnectionManager(conns),
		libp2p.ResourceManager(resources),
		libp2p.AddrsFactory(func(addrs []multiaddr.Multiaddr) []multiaddr.Multiaddr {
			return slices.Concat(publicOf(addrs), n.relays.addrs())
		}),
		libp2p.WithDialTimeout(dialTimeout),
		libp2p.UserAgent("dfcache"),
		libp2p.DisableMetrics(),
	}
	if n.opts.NAT {
		options = append(options, libp2p.NATPortMap(),
			libp2p.Transport(func(u transport.Upgrader, r network.ResourceManager) (*puncher, error) {
				shared, err := tcp.NewTCPTransport(newUpgrader(u), r, nil, tcp.WithConnectionTimeout(dialTimeout))
				other, otherErr := newTCP(u, r)
				return &puncher{shared, other, n.relays}, errors.Join(err, otherErr)
			}))
	} else {
		options = append(options, libp2p.Transport(newTCP))
	}
	h, err := libp2p.New(options...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for peers: %w", err), conns.Close(), resources.Close())
	}
	return h, nil
}

// newTCP returns a transport that does not share the port at which it listens. To share
// it serves to punch holes. It also lets two daemons listen at the same one, without an
// error, and each get half of the connections.
func newTCP(u transport.Upgrader, r network.ResourceManager) (*tcp.TcpTransport, error) {
	return tcp.NewTCPTransport(newUpgrader(u), r, nil, tcp.WithConnectionTimeout(dialTimeout), tcp.DisableReuseport())
}

// newResources bounds connections to a multiple of maxPeers, and other resources
// by memory as libp2p does, but nothing by address: all hosts behind a router,
// and all daemons in a test, have the same. Connections that are not proven yet
// have a smaller bound before (see upgrader), which lets in those that come.
func newResources(maxPeers int) (network.ResourceManager, error) {
	limits := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&limits)
	conns := rcmgr.LimitVal(4 * max(maxPeers, 64))
	all := rcmgr.ResourceLimits{Conns: conns, ConnsInbound: conns, ConnsOutbound: conns}
	partial := rcmgr.PartialLimitConfig{System: all, Transient: all}
	partial.Transient.FD = 4 * maxUnproven
	return rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(partial.Build(limits.AutoScale())),
		rcmgr.WithLimitPerSubnet([]rcmgr.ConnLimitPerSubnet{}, []rcmgr.ConnLimitPerSubnet{}),
		rcmgr.WithConnRateLimiters(&rate.Limiter{}),
		rcmgr.WithMetricsDisabled())
}

// listenAddrs parses addresses to listen at. It tries each, since libp2p is
// content when one of many works.
func listenAddrs(listen []string) (addrs []multiaddr.Multiaddr, err error) {
	if len(listen) == 0 {
		listen = []string{":65002"}
	}
	var all []string
	optional := map[string]bool{}
	for _, s := range listen {
		if !strings.HasPrefix(s, ":") {
			all = append(all, s)
			continue
		}
		all = append(all, "0.0.0.0"+s, "[::]"+s)
		optional["[::]"+s] = true
	}
	for _, s := range all {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return nil, fmt.Errorf("listen address %q: %w; write IP:PORT", s, err)
		}
		ap = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		ipNetwork := "tcp4"
		if ap.Addr().Is6() {
			ipNetwork = "tcp6"
		}
		l, err := net.Listen(ipNetwork, ap.String())
		if optional[s] && err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			continue // no IPv6 here
		}
		if err != nil {
			return nil, fmt.Errorf("listen for peers: %w", err)
		}
		if err := l.Close(); err != nil {
			return nil, err
		}
		m, err := manet.FromNetAddr(net.TCPAddrFromAddrPort(ap))
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, m)
	}
	return addrs, nil
}

// spawn runs f in a goroutine that Close waits for, or not at all after Close.
func (n *Network) spawn(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.wg.Go(f)
	}
}

// Self returns the ID of this peer.
func (n *Network) Self() peer.ID { return n.host.ID() }

// Connected returns the peers that there is a connection with now.
func (n *Network) Connected() []peer.ID {
	return slices.DeleteFunc(n.host.Network().Peers(), func(p peer.ID) bool { return !n.connected(p) })
}

func (n *Network) connected(p peer.ID) bool {
	c := n.host.Network().Connectedness(p)
	return c == network.Connected || c == network.Limited
}

// Addresses returns where p may be reached, the likeliest first: where this host
// has reached it, the address that it came from with the ports that it told, what
// it told, and what is remembered of it or others told. It is empty where nothing
// is known.
func (n *Network) Addresses(p peer.ID) peer.AddrInfo {
	if p == n.Self() {
		return peer.AddrInfo{ID: p, Addrs: n.host.Addrs()}
	}
	info := n.told(p)
	info.Addrs = distinct(append(info.Addrs, n.book.addrs(p)...))
	return info
}

// told is Addresses without what is remembered.
func (n *Network) told(p peer.ID) peer.AddrInfo {
	told := n.host.Peerstore().Addrs(p)
	var reached, seen []multiaddr.Multiaddr
	for _, c := range n.host.Network().ConnsToPeer(p) {
		if remote := c.RemoteMultiaddr(); c.Stat().Direction == network.DirOutbound {
			reached = append(reached, remote)
		} else {
			seen = append(seen, seenAt(remote, told)...)
		}
	}
	return peer.AddrInfo{ID: p, Addrs: distinct(slices.Concat(reached, seen, told))}
}

// Connect makes a connection with a peer, unless there is one. Without addresses
// it uses those that Addresses has, or asks the other peers.
func (n *Network) Connect(ctx context.Context, p peer.AddrInfo) error {
	if p.ID == n.Self() {
		return errors.New("a peer cannot connect with itself")
	}
	if n.connected(p.ID) {
		return nil
	}
	if len(p.Addrs) == 0 {
		p = n.Addresses(p.ID)
	}
	if len(p.Addrs) == 0 {
		found, err := n.table.FindPeer(ctx, p.ID)
		if err != nil {
			return fmt.Errorf("find peer %s: %w", p.ID, err)
		}
		p = found
	}
	// The caller knows when to try again; libp2p's own pause grows to 5 minutes.
	if s, ok := n.host.Network().(*libp2pswarm.Swarm); ok {
		s.Backoff().Clear(p.ID)
	}
	if err := n.host.Connect(network.WithAllowLimitedConn(ctx, httpProtocol), p); err != nil {
		n.trouble.note(err)
		return fmt.Errorf("connect with peer %s: %w; is it up, and has it the same swarm key?", p.ID, oneLine{err})
	}
	return nil
}

// oneLine is an error of libp2p, which has a line for each address that was tried, as one line.
type oneLine struct{ error }

func (e oneLine) Error() string { return strings.ReplaceAll(e.error.Error(), "\n  *", ";") }
func (e oneLine) Unwrap() error { return e.error }

// Providers yields peers that have announced key, as they are found, each once
// and never this one. It ends when there are no more, or with ctx. What it yields
// are hints: an announcement outlives what it announces.
func (n *Network) Providers(ctx context.Context, key [32]byte) iter.Seq[peer.AddrInfo] {
	return func(yield func(peer.AddrInfo) bool) {
		ctx, cancel := context.WithCancel(ctx)
		found := n.table.FindProvidersAsync(ctx, cid.NewCidV1(cid.Raw, multihashOf(key)), 0)
		defer func() {
			cancel()
			for range found { // so that the search has ended, too
			}
		}()
		seen := map[peer.ID]bool{n.Self(): true}
		for p := range found {
			if seen[p.ID] {
				continue // again, with addresses that it had not before
			}
			seen[p.ID] = true
			if len(p.Addrs) == 0 {
				p = n.Addresses(p.ID)
			}
			if !yield(p) {
				return
			}
		}
	}
}

// Announce tells the swarm that this peer provides keys, soon and then again and
// again, until they are withdrawn. It returns at once.
func (n *Network) Announce(keys ...[32]byte) { n.announcer.announce(keys...) }

// Withdraw ends announcing keys.
func (n *Network) Withdraw(keys ...[32]byte) { n.announcer.withdraw(keys...) }

// Dial opens a stream to p over the connection with it, be it relayed, or over a
// new one. It is proven to be p, and of this swarm. To close it is to break it off:
// what the other end has not read by then may be lost.
func (n *Network) Dial(ctx context.Context, p peer.ID) (net.Conn, error) {
	c, err := gostream.Dial(network.WithAllowLimitedConn(ctx, httpProtocol), n.host, p, httpProtocol)
	if err != nil {
		return nil, fmt.Errorf("open a stream to peer %s: %w", p, oneLine{err})
	}
	if s, ok := c.(stream); ok {
		return dialled{s}, nil
	}
	return c, nil
}

// stream is what gostream.Dial returns.
type stream interface {
	net.Conn
	CloseWrite() error
	Reset() error
}

// dialled is a stream whose Close does not wait until the other end has agreed to the
// protocol, which takes 10 seconds with one that has gone silent.
type dialled struct{ stream }

// Close breaks the stream off.
func (c dialled) Close() error { return c.Reset() }

// Via says by which address of the network the peer is reached: its own, or that of the relay between.
func (c dialled) Via() string {
	if s, ok := c.stream.(interface{ Conn() network.Conn }); ok {
		return describeAddress(s.Conn().RemoteMultiaddr())
	}
	return ""
}

// describeAddress is an address as people write one: HOST:PORT.
func describeAddress(a multiaddr.Multiaddr) string {
	isPeer := func(c multiaddr.Component) bool { return c.Protocol().Code == multiaddr.P_P2P }
	direct, _ := multiaddr.SplitFunc(a, isPeer)
	text := a.String()
	if _, at, err := manet.DialArgs(direct); err == nil {
		text = at
	}
	if isRelayed(a) {
		text += " (a relay)"
	}
	return text
}

// Listener accepts what others Dial. The string of a connection's RemoteAddr is
// the ID of the peer. It is closed with the network.
func (n *Network) Listener() net.Listener { return n.listener }

type listener struct{ net.Listener }

// Accept implements net.Listener: the error after Close is net.ErrClosed, as
// servers expect.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if errors.Is(err, context.Canceled) {
		err = net.ErrClosed
	}
	return c, err
}

// OnConnect calls f, from a goroutine of the network, for every peer that is
// connected now or later, whenever it was not before. Close waits for f, which
// must not call it.
func (n *Network) OnConnect(f func(peer.ID)) {
	n.mu.Lock()
	n.onConnect = append(n.onConnect, f)
	up := make([]peer.ID, 0, len(n.up))
	for p := range n.up {
		up = append(up, p)
	}
	n.mu.Unlock()
	for _, p := range up {
		n.spawn(func() { f(p) })
	}
}

// Close ends all connections, and saves what is known of peers. Calls after the
// first do nothing.
func (n *Network) Close() error {
	n.mu.Lock()
	was := n.closed
	n.closed = true
	n.mu.Unlock()
	if was {
		return nil
	}
	n.cancel()
	if n.listener != nil {
		n.listener.Close()
	}
	n.wg.Wait()
	var errs []error
	if n.mdns != nil {
		errs = append(errs, n.mdns.Close())
	}
	if n.announcer != nil {
		errs = append(errs, n.announcer.sweep.Close())
		if n.opts.StateFile != "" {
			errs = append(errs, n.saveState())
		}
	}
	if n.table != nil {
		errs = append(errs, n.table.Close())
	}
	if n.host != nil {
		errs = append(errs, n.relays.close(), n.host.Close())
	}
	n.relays.asking.Wait()
	return errors.Join(errs...)
}

// tendMDNS starts the search on the local network, again when the addresses of
// this host have changed, and again after a while when it failed.
func (n *Network) tendMDNS(now time.Time) {
	if !n.opts.MDNS || now.Before(n.mdnsNext) {
		return
	}
	n.mdnsNext = now.Add(10 * n.opts.tick)
	h := &mdnsHost{Host: n.host}
	addrs, err := h.Network().InterfaceListenAddresses()
	if err == nil && n.mdns != nil && slices.EqualFunc(addrs, n.mdnsAddrs, multiaddr.Multiaddr.Equal) {
		return
	}
	if n.mdns != nil {
		n.mdns.Close()
		n.mdns = nil
	}
	if err == nil {
		service := mdns.NewMdnsService(h, n.opts.Key.service(), found{n})
		if err = service.Start(); err == nil {
			h.told.Store(true)
			n.mdns, n.mdnsAddrs = service, addrs
		} else {
			service.Close()
		}
	}
	if failed := err != nil; failed != n.mdnsFailed {
		n.mdnsFailed = failed
		if failed {
			n.log.Warn("cannot look for peers on the local network; will try again", "error", err)
		}
	}
}

// found is told of peers by mDNS.
type found struct{ n *Network }

func (f found) HandlePeerFound(info peer.AddrInfo) {
	f.n.log.Debug("found a peer on the local network", "peer", info.ID)
	info.Addrs = publicOf(info.Addrs)
	if info.ID == f.n.Self() {
		f.n.askTwin(info.Addrs)
		return
	}
	f.n.addPeer(info)
}

// askTwin has Options.Resolve ask who is where mDNS has found this very peer, as far as
// that is not this host: it tells both where another one has the same identity. No
// connection would: libp2p makes none with a host that has its own.
func (n *Network) askTwin(addrs []multiaddr.Multiaddr) {
	mine, err := n.host.Network().InterfaceListenAddresses()
	if err != nil || n.opts.Resolve == nil || !n.asking.TryLock() {
		return
	}
	defer n.asking.Unlock()
	n.mu.Lock()
	closed := n.closed
	if !closed {
		n.wg.Add(1)
	}
	n.mu.Unlock()
	if closed {
		return
	}
	defer n.wg.Done()
	ctx, cancel := context.WithTimeout(n.ctx, 2*dialTimeout)
	defer cancel()
	asked := 0
	for _, a := range addrs {
		ip, err := manet.ToIP(a)
		if err != nil || multiaddr.Contains(mine, a) || asked == maxTwinAddrs {
			continue
		}
		asked++
		at := net.JoinHostPort(ip.String(), strconv.Itoa(DefaultPiecePort))
		if _, err := n.opts.Resolve(ctx, at); err != nil {
			n.log.Debug("this peer was found at another address of the local network", "address", at, "error", err)
		}
	}
}

// maxTwinAddrs is at how many addresses a twin is asked for: what mDNS finds, anybody
// on the local network may have said.
const maxTwinAddrs = 4

// mdnsHost does not tell the network of loopback addresses, which mDNS else does.
type mdnsHost struct {
	host.Host
	told atomic.Bool // the network has been told of this host
}

// ID is none once the network has been told of it: the service leaves out what it finds
// of its own ID, and another host that has the same is to be found.
func (h *mdnsHost) ID() peer.ID {
	if h.told.Load() {
		return ""
	}
	return h.Host.ID()
}

func (h *mdnsHost) Network() network.Network { return mdnsNetwork{h.Host.Network()} }

type mdnsNetwork struct{ network.Network }

func (n mdnsNetwork) InterfaceListenAddresses() ([]multiaddr.Multiaddr, error) {
	addrs, err := n.Network.InterfaceListenAddresses()
	return publicOf(addrs), err
}

// troubleFor is how long it is told why a peer could not be connected with.
const troubleFor = 5 * time.Minute

// trouble is why peers that were found can't be connected with.
type trouble struct {
	mu  sync.Mutex
	err error
	at  time.Time
}

// note keeps an error that comes of clocks, which libp2p says in many words.
func (t *trouble) note(err error) {
	if why := clockError(err); why != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.err, t.at = why, time.Now()
	}
}

// Trouble says why peers that were found can't be connected with, where that is what
// somebody has to mend: a clock. It returns nil where it is not known.
func (n *Network) Trouble() error {
	n.trouble.mu.Lock()
	defer n.trouble.mu.Unlock()
	if time.Since(n.trouble.at) > troubleFor {
		return nil
	}
	return n.trouble.err
}

// clockError returns what an error of a connection says of the clocks of both ends,
// or nil. Certificates are valid from an hour before a daemon has started.
func clockError(err error) error {
	if err == nil {
		return nil
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired ||
		strings.Contains(err.Error(), "not yet valid") {
		return errors.New("a peer was found, but its certificate is not yet valid here: the clock of this host is " +
			"behind, or that of the peer is ahead, by more than an hour: set it right")
	}
	if strings.Contains(err.Error(), "bad certificate") {
		return errors.New("a peer was found, but it refuses the certificate of this host: the clock of this host is " +
			"ahead, or that of the peer is behind, by more than an hour: set it right, and start the dfdaemon again")
	}
	return nil
}
