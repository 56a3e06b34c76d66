// Package loopback says who on this host is at the other end of a TCP
// connection, and whether a request was meant for this host.
//
// A unix socket has rights; a port of 127.0.0.1 has none, and every user of the host can
// connect to it. But the kernel knows whose sockets the two ends of a connection
// are, when both are on this host, and tells it in /proc/net/tcp. So a server can have the
// rule of a unix socket at a port that every HTTP client can use.
//
// It promises no compatibility.
package loopback

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrUnknown says that the other end of a connection is not on this host, in this
// network namespace, or is closed already.
var ErrUnknown = errors.New("who is at the other end of the connection is not known")

type connKey struct{}

// ConnContext is for [http.Server.ConnContext], so that [User] and [IsOwner] know the connection
// of a request.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, sync.OnceValues(func() (int, error) { return userOf(c) }))
}

// User returns the user ID of whoever sent the request. It looks once for each
// connection. It fails with [ErrUnknown], also where the server of the request has no
// [ConnContext].
func User(r *http.Request) (uid int, err error) {
	user, ok := r.Context().Value(connKey{}).(func() (int, error))
	if !ok {
		return 0, ErrUnknown
	}
	return user()
}

// IsOwner reports whether whoever sent the request is the user of this process, or root.
func IsOwner(r *http.Request) bool {
	uid, err := User(r)
	return err == nil && (uid == os.Geteuid() || uid == 0)
}

// IsNamed reports whether a Host header names this host as localhost or by a loopback
// address. A web page that gives its own name the address 127.0.0.1, to have a browser
// take a server of this host for part of the page, can't do that (DNS rebinding).
func IsNamed(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") { // RFC 6761
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && ip.Unmap().IsLoopback()
}

// IsCrossSite reports whether a browser sent a request for a page of another site, whatever
// the method: that a page can't see the answer does not keep the request from having an effect.
func IsCrossSite(r *http.Request) bool {
	asked := *r
	asked.Method = http.MethodPost // GET and HEAD are never refused
	return crossOrigin.Check(&asked) != nil
}

var crossOrigin = http.NewCrossOriginProtection()

// ForOwner hands to next what the user of this process or root asks for, on this host and by
// a name of this host. The rest is told that what is served is not for it. The server wants
// [ConnContext].
func ForOwner(what string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !IsNamed(r.Host):
			http.Error(w, what+" are served to requests to localhost or a loopback address only",
				http.StatusMisdirectedRequest)
		case IsCrossSite(r):
			http.Error(w, what+" are not for web pages of other sites", http.StatusForbidden)
		case !IsOwner(r):
			http.Error(w, what+" are for the user who runs the program, and for root on the same host",
				http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// attempts is how often a socket is looked for: the kernel's list is not of one
// moment, and can miss one while others come and go.
const attempts = 3

// userOf returns who has the other end of c.
func userOf(c net.Conn) (int, error) {
	if wrapped, ok := c.(interface{ NetConn() net.Conn }); ok { // TLS
		c = wrapped.NetConn()
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return 0, ErrUnknown
	}
	theirs, ours := addrOf(c.RemoteAddr()), addrOf(c.LocalAddr())
	for range attempts {
		uid, err := find(theirs, ours)
		if errors.Is(err, ErrUnknown) {
			continue
		}
		if err != nil {
			return 0, err
		}
		// While our end is open no other connection can have the same two addresses, so
		// what was found was the other end of this one.
		if !isOpen(tcp) || uid == overflow() {
			return 0, ErrUnknown
		}
		return uid, nil
	}
	return 0, ErrUnknown
}

func addrOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := tcp.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// overflow is the number that the kernel gives all users who have none in the user namespace of
// this process; -1 where all have one, and it is that of a user.
var overflow = sync.OnceValue(func() int {
	all, err := os.ReadFile("/proc/self/uid_map")
	if err == nil && slices.Equal(strings.Fields(string(all)), []string{"0", "0", "4294967295"}) {
		return -1
	}
	text, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if uid, parseErr := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && parseErr == nil {
		return uid
	}
	return 65534
})

// isOpen reports whether the kernel still has the connection.
func isOpen(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	open := false
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), syscall.IPPROTO_TCP, unix.TCP_INFO)
		open = err == nil && info.State != closed
	})
	return err == nil && open
}

// closed is the state of a TCP socket, of include/net/tcp_states.h, that has no connection any more.
const closed = 7

// find returns the user of the socket that has these two addresses.
func find(local, remote netip.AddrPort) (int, error) {
	for name, mapped := range map[string]bool{"/proc/net/tcp": false, "/proc/net/tcp6": true} {
		if !mapped && !local.Addr().Is4() {
			continue
		}
		uid, err := findIn(name, format(local, mapped), format(remote, mapped))
		if !errors.Is(err, ErrUnknown) && !errors.Is(err, fs.ErrNotExist) { // a host may have no IPv6
			return uid, err
		}
	}
	return 0, ErrUnknown
}

// findIn looks in one of the kernel's lists.
func findIn(name, local, remote string) (int, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// sl local remote st queues timer retransmits uid timeout inode …
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[1] != local || fields[2] != remote {
			continue
		}
		// A socket that its process has closed has no inode, and says that it is root's.
		if fields[9] == "0" {
			return 0, ErrUnknown
		}
		uid, err := strconv.Atoi(fields[7])
		if err != nil {
			return 0, fmt.Errorf("%s: user %q of a socket: %w", name, fields[7], err)
		}
		return uid, nil
	}
	if err := lines.Err(); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return 0, ErrUnknown
}

// format returns an address as the kernel writes it: words of 32 bits in the order of bytes
// of this machine, in hexadecimal.
func format(at netip.AddrPort, as6 bool) string {
	ip := at.Addr().AsSlice()
	if as6 {
		all := at.Addr().As16()
		ip = all[:]
	}
	var b strings.Builder
	for ; len(ip) > 0; ip = ip[4:] {
		fmt.Fprintf(&b, "%08X", binary.NativeEndian.Uint32(ip))
	}
	fmt.Fprintf(&b, ":%04X", at.Port())
	return b.String()
}
