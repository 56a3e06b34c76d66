// Package connpool bounds how many connections there are, by whom they are from: a host, or a user,
// that has many takes nothing from one that has few.
//
// It promises no compatibility.
package connpool

import (
	"io"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Pool is a bounded set of connections. It is safe for concurrent use.
type Pool struct {
	limit int

	mu    sync.Mutex
	count int
	added uint64
	of    map[string][]*conn // of each, the oldest first; never empty
}

type conn struct {
	number uint64 // in the order in which they came
	close  func()
}

// New returns a pool for up to limit connections, at least one.
func New(limit int) *Pool { return &Pool{limit: max(limit, 1), of: map[string][]*conn{}} }

// Limit returns how many connections there may be.
func (p *Pool) Limit() int { return p.limit }

// Push takes in a connection of a client, in any case. Where there are too many then, the
// oldest one of the client with most is thrown out: its close is called, before Push
// returns. The caller calls leave when its connection is not to count any more; it does nothing after
// the first time, or when the connection was thrown out.
func (p *Pool) Push(who string, close func()) (leave func()) {
	leave, thrown := p.push(who, close)
	if thrown != nil {
		thrown()
	}
	return leave
}

func (p *Pool) push(who string, close func()) (leave, thrown func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	leave = p.add(who, close)
	if p.count > p.limit {
		thrown = p.throwOut(p.most())
	}
	return leave, thrown
}

// Offer is Push for connections that are worth keeping: where there are too many,
// it takes one in only from somebody who has fewer than another, of whom the oldest is thrown out, and else
// reports false.
func (p *Pool) Offer(who string, close func()) (leave func(), ok bool) {
	leave, thrown, ok := p.offer(who, close)
	if thrown != nil {
		thrown()
	}
	return leave, ok
}

func (p *Pool) offer(who string, close func()) (leave, thrown func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.count >= p.limit {
		most := p.most()
		if len(p.of[most]) <= len(p.of[who])+1 {
			return func() {}, nil, false
		}
		thrown = p.throwOut(most)
	}
	return p.add(who, close), thrown, true
}

func (p *Pool) add(who string, close func()) (leave func()) {
	p.added++
	c := &conn{p.added, close}
	p.of[who] = append(p.of[who], c)
	p.count++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, other := range p.of[who] {
			if other == c {
				p.remove(who, i)
				return
			}
		}
	}
}

// most returns the client with most connections, of several that with the oldest.
func (p *Pool) most() (who string) {
	for w, conns := range p.of {
		best := p.of[who]
		if len(conns) > len(best) || len(conns) == len(best) && conns[0].number < best[0].number {
			who = w
		}
	}
	return who
}

func (p *Pool) throwOut(who string) (thrown func()) {
	thrown = p.of[who][0].close
	p.remove(who, 0)
	return thrown
}

func (p *Pool) remove(who string, i int) {
	conns := p.of[who]
	copy(conns[i:], conns[i+1:])
	conns[len(conns)-1] = nil
	p.of[who] = conns[:len(conns)-1]
	if len(p.of[who]) == 0 {
		delete(p.of, who)
	}
	p.count--
}

// Len returns how many connections there are.
func (p *Pool) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// Share returns limit, or less where the process can have few descriptors: one in part of them. (Go has
// raised their number to the highest that the process may have.)
func Share(limit, part int) int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return limit
	}
	return int(min(uint64(limit), max(files.Cur/uint64(part), 1)))
}

// Host returns from whom a connection is that has proven nothing: an IPv4
// address, or a network of IPv6 of 64 bits, which one host has as a rule. Of an address that is
// not of TCP it is the whole.
func Host(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	ip := ap.Addr().Unmap()
	if ip.Is6() {
		if network, err := ip.WithZone("").Prefix(64); err == nil {
			return network.String()
		}
	}
	return ip.String()
}

// Listen returns a listener of what l accepts, with at most limit connections open, by [Pool.Push]
// and [Host]: for doors that ask nobody for a proof.
func Listen(l net.Listener, limit int) net.Listener { return listener{l, New(limit)} }

type listener struct {
	net.Listener
	pool *Pool
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return counted{c, l.pool.Push(Host(c.RemoteAddr()), func() { c.Close() })}, nil
}

// counted is a connection in a pool, until it is closed.
type counted struct {
	net.Conn
	leave func()
}

// ReadFrom has the kernel copy from a file where it can.
func (c counted) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

// NetConn returns the connection itself.
func (c counted) NetConn() net.Conn { return c.Conn }

func (c counted) Close() error {
	c.leave()
	return c.Conn.Close()
}
