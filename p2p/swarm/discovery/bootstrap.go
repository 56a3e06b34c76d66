package discovery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	madns "github.com/multiformats/go-multiaddr-dns"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/dfcache/dfcache/p2p/secret"
)

// DefaultPiecePort is the port of a bootstrap entry that names none: the one
// on which peers serve pieces, and tell who they are.
const DefaultPiecePort = 65003

// maxPeersFile is the largest peers file that is read, in bytes.
const maxPeersFile = 1 << 20

// dialTimeout bounds one attempt to reach one peer.
const dialTimeout = 10 * time.Second

// parallel is how many peers are dialled or asked at the same time.
const parallel = 8

// entry is one place to look for peers: addr, or host and port.
type entry struct {
	addr       multiaddr.Multiaddr
	host, port string
}

func (e entry) String() string {
	if e.addr != nil {
		return e.addr.String()
	}
	return net.JoinHostPort(e.host, e.port)
}

var hostname = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?$`)

// parseEntry parses a bootstrap entry. See Options.Bootstrap.
func parseEntry(s string) (entry, error) {
	bad := func(format string, args ...any) (entry, error) {
		return entry{}, fmt.Errorf("bootstrap entry %q: %w; write HOST, HOST:PORT or /ip4/ADDRESS/tcp/PORT/p2p/ID", s,
			fmt.Errorf(format, args...))
	}
	if strings.ContainsFunc(s, unicode.IsSpace) {
		return bad("it has a space in it")
	}
	if strings.HasPrefix(s, "/") {
		m, err := multiaddr.NewMultiaddr(s)
		if err != nil {
			return bad("%w", err)
		}
		if info, err := peer.AddrInfoFromP2pAddr(m); err != nil && m[0].Protocol().Code != multiaddr.P_DNSADDR {
			return bad("it does not end in /p2p/ID")
		} else if err == nil && len(info.Addrs) == 0 {
			return bad("it has no address")
		}
		return entry{addr: m}, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, strconv.Itoa(DefaultPiecePort)
		if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
			host = s[1 : len(s)-1]
		}
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
		return bad("the port must be a number from 1 to 65535")
	} else {
		port = strconv.FormatUint(p, 10)
	}
	name := host
	if ip, err := netip.ParseAddr(host); err == nil {
		name = ip.Zone() // of fe80::1%eth0
	} else if host == "" {
		return bad("it has no host")
	}
	if name != "" && (len(name) > 253 || !hostname.MatchString(name)) {
		return bad("%q is neither a host name nor an IP address", host)
	}
	return entry{host: host, port: port}, nil
}

// parsePeersFile parses one entry a line. What follows a # is a comment.
func parsePeersFile(data []byte) ([]entry, error) {
	var entries []entry
	line := 0
	for text := range strings.Lines(string(data)) {
		line++
		text, _, _ = strings.Cut(text, "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		e, err := parseEntry(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// bootstrapper tries its entries for ever.
type bootstrapper struct {
	n       *Network
	entries []entry // of the options
	alone   chan struct{}

	content []byte  // of the peers file
	listed  []entry // in it
	fileErr string

	mu      sync.Mutex
	failing map[string]bool    // entries that failed at the last try
	ids     map[string]peer.ID // who answered at a host:port
}

func newBootstrapper(n *Network) (*bootstrapper, error) {
	b := &bootstrapper{n: n, alone: make(chan struct{}, 1), failing: map[string]bool{}, ids: map[string]peer.ID{}}
	for _, s := range n.opts.Bootstrap {
		e, err := parseEntry(s)
		if err != nil {
			return nil, err
		}
		b.entries = append(b.entries, e)
	}
	if err := b.readFile(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if n.opts.Resolve == nil {
		for _, e := range append(b.entries, b.listed...) {
			if e.addr == nil {
				return nil, fmt.Errorf("bootstrap entry %q: without Options.Resolve only multiaddrs can be used", e)
			}
		}
	}
	return b, nil
}

// readFile reads the peers file if it has changed. After an error the entries
// are what they were, except that those of a file that is gone are, too. It logs
// an error that is not the last one.
func (b *bootstrapper) readFile() error {
	path := b.n.opts.PeersFile
	if path == "" {
		return nil
	}
	data, _, err := secret.ReadPublic(path, maxPeersFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		b.listed, b.content = nil, nil
	case err != nil:
	case b.content == nil || !bytes.Equal(data, b.content):
		var listed []entry
		if listed, err = parsePeersFile(data); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
			break
		}
		b.listed, b.content = listed, append([]byte{}, data...)
		b.n.log.Info("read the peers file", "path", path, "entries", len(listed))
	}
	text := ""
	if err != nil {
		err = fmt.Errorf("peers file: %w", err)
		text = err.Error()
	}
	if text != "" && text != b.fileErr {
		b.n.log.Warn("cannot use the peers file; will look again", "error", err)
	}
	b.fileErr = text
	return err
}

// run tries all entries until ctx ends: about every second at first, then every
// 15, while there is no peer; every minute when there are some, every 10 when
// there are plenty. Names are resolved each time.
func (b *bootstrapper) run(ctx context.Context) {
	tick := b.n.opts.tick
	wait := tick
	poll := time.NewTicker(5 * tick)
	defer poll.Stop()
	for {
		var wg sync.WaitGroup
		for _, e := range append(b.entries[:len(b.entries):len(b.entries)], b.listed...) {
			wg.Go(func() { b.report(ctx, e, b.try(ctx, e)) })
		}
		wg.Wait()

		switch n := len(b.n.Connected()); {
		case n == 0:
			wait = min(wait*3/2, 15*tick)
		case n < b.n.mesh():
			wait = 60 * tick
		default:
			wait = 600 * tick
		}
		next := time.NewTimer(jitter(wait))
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				next.Stop()
				return
			case <-next.C:
				waiting = false
			case <-b.alone:
				wait = tick
				next.Reset(jitter(wait)) // not at once, for those who hang up on us
			case <-poll.C:
				before := b.content
				_ = b.readFile() // which logs it
				waiting = bytes.Equal(before, b.content)
			}
		}
		next.Stop()
	}
}

// report logs whether e works, when that has changed.
func (b *bootstrapper) report(ctx context.Context, e entry, err error) {
	if ctx.Err() != nil {
		return
	}
	b.mu.Lock()
	was := b.failing[e.String()]
	b.failing[e.String()] = err != nil
	b.mu.Unlock()
	if err != nil && !was {
		b.n.log.Warn("no peer found by a bootstrap entry; will go on trying", "entry", e.String(), "error", err)
	} else if err == nil && was {
		b.n.log.Info("found a peer by a bootstrap entry that had failed", "entry", e.String())
	}
}

// try connects with the peers of e. It returns nil if there is a connection with
// one of them afterwards, or if this host is the only one.
func (b *bootstrapper) try(ctx context.Context, e entry) error {
	ctx, cancel := context.WithTimeout(ctx, 6*dialTimeout)
	defer cancel()
	if e.addr == nil {
		return b.tryHost(ctx, e)
	}
	addrs := []multiaddr.Multiaddr{e.addr}
	if _, err := peer.AddrInfoFromP2pAddr(e.addr); err != nil { // a /dnsaddr
		if addrs, err = madns.DefaultResolver.Resolve(ctx, e.addr); err != nil {
			return err
		}
	}
	infos, err := peer.AddrInfosFromP2pAddrs(addrs...)
	if err != nil {
		return err
	}
	return tryEach(infos, func(info peer.AddrInfo) error { return b.connect(ctx, info) })
}

func (b *bootstrapper) tryHost(ctx context.Context, e entry) error {
	ips, err := net.DefaultResolver.LookupHost(ctx, e.host)
	if err != nil {
		return err
	}
	rand.Shuffle(len(ips), func(i, j int) { ips[i], ips[j] = ips[j], ips[i] })
	if len(b.n.Connected()) >= b.n.mesh() {
		ips = ips[:min(len(ips), parallel)] // to find out of another swarm of the same key
	}
	return tryEach(ips, func(ip string) error {
		at := net.JoinHostPort(ip, e.port)
		b.mu.Lock()
		id, known := b.ids[at]
		b.mu.Unlock()
		if known && (id == b.n.Self() || b.n.connected(id)) {
			return nil // no need to ask again who is there
		}
		askCtx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		info, err := b.n.opts.Resolve(askCtx, at)
		if err != nil {
			b.n.trouble.note(err)
			return fmt.Errorf("ask %s who it is: %w", at, err)
		}
		b.mu.Lock()
		if len(b.ids) >= maxKnown {
			maps.DeleteFunc(b.ids, func(string, peer.ID) bool { return rand.IntN(2) == 0 })
		}
		b.ids[at] = info.ID
		b.mu.Unlock()
		if parsed, err := netip.ParseAddr(ip); err == nil {
			// It may not know the address that the outside has for it.
			reached, err := manet.FromIP(parsed.WithZone("").AsSlice())
			if err == nil {
				info.Addrs = distinct(append(info.Addrs, seenAt(reached, info.Addrs)...))
			}
		}
		return b.connect(ctx, info)
	})
}

func (b *bootstrapper) connect(ctx context.Context, info peer.AddrInfo) error {
	if info.ID == b.n.Self() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return b.n.Connect(ctx, info)
}

// tryEach calls f for all items, some at a time. It returns nil if one of them
// succeeded, or else the first few errors.
func tryEach[T any](items []T, f func(T) error) error {
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, parallel)
	for _, item := range items {
		slots <- struct{}{}
		wg.Go(func() {
			err := f(item)
			mu.Lock()
			errs = append(errs, err)
			mu.Unlock()
			<-slots
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err == nil {
			return nil
		}
	}
	if len(errs) == 0 {
		return errors.New("it names no peer")
	}
	return errors.Join(errs[:min(len(errs), 3)]...)
}

// jitter returns d, give or take a quarter.
func jitter(d time.Duration) time.Duration {
	return d*3/4 + rand.N(d/2+1)
}
