package registry

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/p2p/connpool"
)

// userKey is the key of the user of a request's context, who has logged in.
type userKey struct{}

// clientOf says who sent a request, for bounds of which each client is to have a share: the
// user who has logged in, else the user of this host, else the host: an IPv4 address, or a network of IPv6.
func clientOf(r *http.Request) string {
	if name, ok := r.Context().Value(userKey{}).(string); ok {
		return "user " + name
	}
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && ap.Addr().Unmap().IsLoopback() {
		if uid, err := loopback.User(r); err == nil {
			return fmt.Sprintf("uid %d", uid)
		}
	}
	return "host " + connpool.Host(address(r.RemoteAddr))
}

// address is an address as text.
type address string

func (a address) Network() string { return "tcp" }
func (a address) String() string  { return string(a) }

// Connections bounds how many connections of a server are idle, so that they do not use up the
// descriptors of the process. One that waits for its first request, or for the next, can be closed at any
// time: where there are too many, the oldest of the client that has most of them is. How many
// requests there are is bounded by the [Handler]. It is safe for concurrent use.
type Connections struct {
	idle *connpool.Pool

	mu  sync.Mutex
	all map[net.Conn]*connection
}

// connection is one of a server.
type connection struct {
	idle  *connpool.Pool
	who   string
	close func()

	mu    sync.Mutex
	leave func() // ends being idle; nil where it is not
}

// connectionKey is the key of a request's connection in its context.
type connectionKey struct{}

// NewConnections returns a Connections of which up to limit may be idle.
func NewConnections(limit int) *Connections {
	return &Connections{idle: connpool.New(limit), all: map[net.Conn]*connection{}}
}

// Context is for [http.Server.ConnContext].
func (c *Connections) Context(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, c.of(conn))
}

// of returns what is known of a connection. The server asks for its context before it says that it is new.
func (c *Connections) of(conn net.Conn) *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.all[conn]
	if known == nil {
		known = &connection{idle: c.idle, who: connpool.Host(conn.RemoteAddr()), close: func() { closeNow(conn) }}
		c.all[conn] = known
	}
	return known
}

// State is for [http.Server.ConnState].
func (c *Connections) State(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew, http.StateIdle:
		c.of(conn).rest()
	case http.StateHijacked, http.StateClosed:
		c.of(conn).work()
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.all, conn)
	}
}

// closeNow closes a connection without a word: TLS would have one, for which it waits.
func closeNow(conn net.Conn) {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	conn.Close()
}

// rest says that the connection waits for a request.
func (c *connection) rest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leave == nil {
		c.leave = c.idle.Push(c.who, c.close)
	}
}

// work says that it does not: there is one.
func (c *connection) work() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leave != nil {
		c.leave()
		c.leave = nil
	}
}

// begin takes a request in, or refuses it where there are too many. The caller calls end
// with its answer. Where there are too many, a client that has fewer than another is let in, and the oldest request
// of the one that has most is broken off: one client that asks and reads nothing does not keep out the others.
func (h *Handler) begin(w *response, r *request) (end func(), err error) {
	if c, ok := r.Context().Value(connectionKey{}).(*connection); ok && c != nil {
		c.work()
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	leave, ok := h.requests.Offer(clientOf(r.Request), func() {
		cancel(errCrowded)
		w.cut()
	})
	if !ok {
		cancel(nil)
		return nil, newProblem(http.StatusTooManyRequests, codeTooManyRequests, "there are %d requests already, and "+
			"none of another client's that could be broken off: try again later", h.opts.MaxRequests).with(
			"Retry-After", "2")
	}
	r.Request = r.WithContext(ctx)
	return func() {
		leave()
		cancel(nil)
	}, nil
}
