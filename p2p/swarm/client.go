package swarm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/throttle"
)

func parseAddr(s string) (multiaddr.Multiaddr, error) { return multiaddr.NewMultiaddr(s) }

// client speaks the peer API with others.
type client struct {
	security *security
	network  Network
	peers    *peerTable
	inbox    *inbox
	instance *Instance
	now      func() time.Time // of this host's clock
	http     *http.Client     // for blobs: over connections of its own where that can be, else over libp2p
	streams  *http.Client     // for words: over the libp2p connection that is there
	late     late             // connections that nobody waits for to close
}

const (
	// idleTimeout is how long a connection is kept that nothing is asked on.
	idleTimeout = 90 * time.Second
	// directTimeout is how long the addresses of a peer are tried, and nextAddress
	// after what time the next one is, too. A lost SYN is sent again within it, and
	// it leaves room in a lookup for the way over libp2p.
	directTimeout = 2 * time.Second
	nextAddress   = 200 * time.Millisecond
	// retryDirect is how long a peer whose addresses can't be reached is talked
	// to over libp2p before they are tried again.
	retryDirect = time.Minute
	// dialTimeout bounds how long a connection may take that nobody may wait for
	// any more: the caller has not to.
	dialTimeout = 10 * time.Second
	// maxStreams is how many connections over libp2p there are with a peer, those
	// counted that are being made.
	maxStreams = 256
)

func newClient(
	security *security, network Network, peers *peerTable, instance *Instance, now func() time.Time,
) *client {
	c := &client{security: security, network: network, peers: peers, inbox: newInbox(), instance: instance, now: now}
	transport := func(dial func(context.Context, peer.ID) (net.Conn, error), most int) *http.Client {
		return &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				host, _, err := net.SplitHostPort(address)
				if err != nil {
					return nil, err
				}
				id, err := peer.Decode(host)
				if err != nil {
					return nil, err
				}
				// It ends by itself: http goes on with it when the request is given up.
				ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, errNoAnswer)
				defer cancel()
				conn, err := dial(ctx, id)
				if err != nil {
					return nil, err
				}
				return &prompt{Conn: conn, late: &c.late}, nil
			},
			MaxConnsPerHost:     most,
			MaxIdleConnsPerHost: 8,
			IdleConnTimeout:     idleTimeout,
			DisableCompression:  true,
			ReadBufferSize:      64 << 10,
			WriteBufferSize:     16 << 10,
		}}
	}
	c.http = transport(c.dial, 0)
	c.streams = transport(network.Dial, maxStreams)
	return c
}

// close closes what is idle. What was given up is closed with the network at the latest.
func (c *client) close() {
	c.http.CloseIdleConnections()
	c.streams.CloseIdleConnections()
}

// prompt is a connection whose Close does not wait for the other end, as that of a
// stream may, or one of TLS: http closes a connection when a request on it is given
// up, and the one that gave it up waits for that.
type prompt struct {
	net.Conn
	late *late
	once sync.Once
}

// Close ends Reads and Writes at once, and closes the connection soon.
func (c *prompt) Close() error {
	c.once.Do(func() {
		c.Conn.SetDeadline(time.Unix(1, 0))
		c.late.run(func() { c.Conn.Close() })
	})
	return nil
}

// hostOf is a peer in a URL: host names are not case-sensitive, so it is not in base58.
func hostOf(p peer.ID) string { return peer.ToCid(p).String() }

// dial connects to a peer: directly, or else through libp2p.
func (c *client) dial(ctx context.Context, p peer.ID) (net.Conn, error) {
	entry := c.peers.get(p)
	h, failed := entry.direct()
	if h == nil {
		var err error
		if h, err = c.hello(ctx, p); err != nil {
			return nil, err
		}
	}
	var errs []error
	addresses := directAddresses(h, c.network.Addresses(p))
	if len(addresses) > 0 && time.Since(failed) > retryDirect {
		conn, address, err := c.dialAny(ctx, addresses, h.Plain && c.security.plain, p)
		if err == nil {
			entry.reached(address)
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		entry.unreached()
		errs = append(errs, err)
	}
	conn, err := c.network.Dial(ctx, p)
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	address := ""
	if dialled, ok := conn.(interface{ Via() string }); ok {
		address = dialled.Via()
	}
	entry.reached(address)
	return conn, nil
}

// dialAny connects with p at the first of its addresses that answers, and returns
// which one that is. None has to wait for the ones before it to fail: a router may
// drop what is sent to them.
func (c *client) dialAny(
	ctx context.Context, addresses []string, plain bool, p peer.ID,
) (conn net.Conn, address string, err error) {
	ctx, cancel := context.WithTimeout(ctx, directTimeout)
	defer cancel()
	var mu sync.Mutex
	var errs []error
	var dials sync.WaitGroup
	for i, a := range addresses {
		dials.Go(func() {
			select {
			case <-time.After(time.Duration(i) * nextAddress):
			case <-ctx.Done():
				return
			}
			made, err := c.dialDirect(ctx, a, plain, p)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				errs = append(errs, err)
			case conn != nil:
				made.Close()
			default:
				conn, address = made, a
				cancel()
			}
		})
	}
	dials.Wait()
	if conn == nil {
		return nil, "", errors.Join(append(errs, context.Cause(ctx))...)
	}
	return conn, address, nil
}

// dialDirect makes a connection to an address. It is proven to be p, or, with
// an empty p, some member of the swarm.
func (c *client) dialDirect(ctx context.Context, address string, plain bool, p peer.ID) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, directTimeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	conn, _, err := c.security.secure(ctx, raw, true, plain, p)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return conn, nil
}

// directAddresses returns where a peer may take connections for pieces, the
// likeliest first: where it says itself, or, where it says any address, at those where
// libp2p knows it.
func directAddresses(h *hello, info peer.AddrInfo) []string {
	var all []string
	add := func(a string) {
		if !slices.Contains(all, a) && len(all) < 8 {
			all = append(all, a)
		}
	}
	for _, pieces := range h.Pieces {
		ap, err := netip.ParseAddrPort(pieces)
		if err != nil {
			continue
		}
		if !ap.Addr().IsUnspecified() {
			add(ap.String())
			continue
		}
		for _, m := range info.Addrs {
			if _, err := m.ValueForProtocol(multiaddr.P_CIRCUIT); err == nil {
				continue // the address of a relay
			}
			if ip, err := manet.ToIP(m); err == nil {
				add(net.JoinHostPort(ip.String(), strconv.Itoa(int(ap.Port()))))
			}
		}
	}
	return all
}

// hello asks a peer who it is, over libp2p, and remembers it.
func (c *client) hello(ctx context.Context, p peer.ID) (*hello, error) {
	var h hello
	start := c.now()
	if err := c.call(ctx, c.streams, p, http.MethodGet, pathHello, nil, &h); err != nil {
		return nil, err
	}
	e := c.peers.get(p)
	e.clocked(&h, start, c.now())
	e.introduce(&h)
	return &h, nil
}

// NewResolver returns a function that asks the one that takes connections for pieces
// at an address (host:port) which peer it is. It fails where that is not of the
// swarm with this secret, and where it is another host with this identity.
func NewResolver(
	identity crypto.PrivKey, secret []byte, plain bool, instance *Instance,
) (func(ctx context.Context, address string) (peer.AddrInfo, error), error) {
	security, err := newSecurity(identity, secret, plain)
	if err != nil {
		return nil, err
	}
	c := &client{security: security, peers: newPeerTable(), inbox: newInbox(), instance: instance, now: time.Now}
	return c.resolve, nil
}

func (c *client) resolve(ctx context.Context, address string) (peer.AddrInfo, error) {
	var h hello
	ask := func(plain bool) error {
		once := &http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return c.dialDirect(ctx, address, plain, "")
			},
		}}
		return c.call(ctx, once, "", http.MethodGet, pathHello, nil, &h)
	}
	err := ask(false)
	if err != nil && c.security.plain && ctx.Err() == nil {
		err = ask(true)
	}
	if err != nil {
		return peer.AddrInfo{}, fmt.Errorf("ask %s which peer it is: %w", address, err)
	}
	info, err := hint{h.ID, h.Addrs}.addrInfo()
	if err == nil && info.ID == c.security.id && h.Instance != c.instance.id {
		c.instance.found(address)
		err = errTwin
	}
	return info, err
}

// statusError is an answer that is a refusal.
type statusError struct {
	code int
	text string
}

// Is makes a refusal for now match [p2p.ErrBusy].
func (e *statusError) Is(target error) bool {
	return target == p2p.ErrBusy && (e.code == http.StatusServiceUnavailable || e.code == http.StatusTooManyRequests)
}

func (e *statusError) Error() string { return fmt.Sprintf("%d: %s", e.code, e.text) }

// do sends a request and returns the answer, which is 200. The caller closes its body.
func (c *client) do(
	ctx context.Context, over *http.Client, p peer.ID, method, path string, query url.Values, body []byte,
) (*http.Response, error) {
	host := "peer"
	if p != "" {
		host = hostOf(p)
	}
	u := url.URL{Scheme: "http", Host: host, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	c.instance.says(req.Header)
	if isIdempotent(path) {
		req.Header["Idempotency-Key"] = nil // a connection that was closed while idle is not a failure
	}
	resp, err := over.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return nil, &statusError{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	return resp, nil
}

// isIdempotent reports whether a POST may be sent twice.
func isIdempotent(path string) bool {
	return path == pathFind || path == pathPieces || path == pathDeletes
}

// call sends a message, where in is not nil, and decodes the answer into out.
func (c *client) call(
	ctx context.Context, over *http.Client, p peer.ID, method, path string, in any, out message,
) error {
	return c.callQuery(ctx, over, p, method, path, nil, in, out)
}

func (c *client) callQuery(
	ctx context.Context, over *http.Client, p peer.ID, method, path string, query url.Values, in any, out message,
) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	start := time.Now()
	resp, err := c.do(ctx, over, p, method, path, query, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if p != "" {
		c.peers.get(p).answered(time.Since(start))
	}
	if out == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { resp.Body.Close() })
	defer stop()
	limit, _ := out.bounds()
	b, done, err := c.inbox.read(ctx, resp.Body, limit)
	defer done()
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	if h, ok := out.(*hello); ok {
		h.date = resp.Header.Get("Date")
	}
	return decodeJSON(b, out)
}

// find asks a peer what it has. The answer is as long as the request.
func (c *client) find(ctx context.Context, p peer.ID, req *findRequest) (*findReply, error) {
	reply := findReply{to: *req}
	if err := c.call(ctx, c.streams, p, http.MethodPost, pathFind, req, &reply); err != nil {
		return nil, err
	}
	if err := reply.check(); err != nil {
		return nil, err
	}
	c.instance.found(reply.Twin)
	return &reply, nil
}

func taskQuery(t p2p.Task) url.Values {
	return url.Values{"tag": {t.Tag}, "digest": {t.Digest.String()}}
}

// blob gets a whole blob of at most limit bytes, within progress, and proves it.
func (c *client) blob(progress *throttle.Progress, p peer.ID, t p2p.Task, limit int64) ([]byte, error) {
	var resp *http.Response
	_, err := progress.Await(func() (_ int, err error) {
		resp, err = c.do(progress.Context(), c.http, p, http.MethodGet, pathBlob, taskQuery(t), nil)
		return 0, err
	})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(progress.Reader(resp.Body, nil), limit+1))
	if err != nil {
		return nil, err
	}
	if got := t.Digest.Algorithm().FromBytes(b); got != t.Digest {
		return nil, &digest.MismatchError{Want: t.Digest, Got: got}
	}
	return b, nil
}

// links gets the size and the hash chain of a blob.
func (c *client) links(pace *throttle.Progress, p peer.ID, t p2p.Task) (l links, err error) {
	var resp *http.Response
	if _, err := pace.Await(func() (_ int, err error) {
		resp, err = c.do(pace.Context(), c.http, p, http.MethodGet, pathLinks, taskQuery(t), nil)
		return 0, err
	}); err != nil {
		return links{}, err
	}
	defer resp.Body.Close()
	body := &counted{r: pace.Reader(resp.Body, nil)}
	l, err = readLinks(body, t.Digest)
	switch {
	case err == nil:
	case pace.Context().Err() != nil:
		err = context.Cause(pace.Context())
	case isShort(err):
		err = body.short()
	}
	return l, err
}
