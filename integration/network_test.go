package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// lan is a network of hosts that a test makes: network namespaces with a
// switch between them. It goes with the test.
type lan struct {
	t      *testing.T
	name   string // of what belongs to it
	prefix string // of its addresses: three numbers and a dot
	key    string // the swarm's key file
	hosts  []*host

	started time.Time // when it was first waited for something
}

// host is one of them: a network namespace, and a dfdaemon in it.
type host struct {
	*daemon
	lan   *lan
	n     int
	netns string
	home  string
}

var lans atomic.Int32

// newLAN makes a network of n hosts, 10.77.0.1 and on.
func newLAN(t *testing.T, n int) *lan {
	t.Helper()
	return newNetwork(t, "10.77.0.", n)
}

// newNetwork makes one with other addresses.
func newNetwork(t *testing.T, prefix string, n int) *lan {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("ip"); err != nil {
		t.Fatalf("%v: install the package iproute2", err)
	}
	l := &lan{t: t, name: fmt.Sprintf("df%d-%d", os.Getpid(), lans.Add(1)), prefix: prefix}
	l.key = filepath.Join(tempHome(t), "swarm.key")
	if out, err := exec.Command(dfdaemon, "swarm", "key", "new", l.key).CombinedOutput(); err != nil {
		t.Fatalf("make a swarm key: %v\n%s", err, out)
	}
	l.netns("switch")
	l.ip("-n", l.name+"-switch", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
	l.ip("-n", l.name+"-switch", "link", "set", "br0", "up")
	for i := range n {
		l.addHost(i + 1)
	}
	return l
}

// ip runs the command of that name.
func (l *lan) ip(args ...string) {
	l.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		l.t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// netns makes a network namespace.
func (l *lan) netns(name string) string {
	l.t.Helper()
	full := l.name + "-" + name
	l.ip("netns", "add", full)
	l.t.Cleanup(func() { exec.Command("ip", "netns", "del", full).Run() })
	l.ip("-n", full, "link", "set", "lo", "up")
	return full
}

func (l *lan) addHost(n int) *host {
	l.t.Helper()
	h := &host{lan: l, n: n, netns: l.netns(fmt.Sprintf("h%d", n)), home: tempHome(l.t)}
	l.attach(h.netns, n)
	l.hosts = append(l.hosts, h)
	return h
}

// attach connects a network namespace with the switch, by a device eth0.
func (l *lan) attach(netns string, n int) {
	l.t.Helper()
	port := fmt.Sprintf("p%d", n)
	l.ip("-n", l.name+"-switch", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", netns)
	l.ip("-n", l.name+"-switch", "link", "set", port, "master", "br0", "up")
	l.ip("-n", netns, "addr", "add", fmt.Sprintf("%s%d/24", l.prefix, n), "dev", "eth0")
	l.ip("-n", netns, "addr", "add", fmt.Sprintf("fd77::%d/64", n), "dev", "eth0", "nodad")
	l.ip("-n", netns, "link", "set", "eth0", "up")
}

// What a router does with what goes out.
const (
	sameAddress = "accept"                  // nothing
	samePort    = "masquerade"              // gives it its own address: holes can be punched
	anyPort     = "masquerade fully-random" // and another port for each connection: they can't
)

// addPrivate makes a host in a network of its own, 192.168.n.0/24, behind a
// router: what it connects with sees the address of the router, which lets no
// connection in. The address of such a host is that of its router.
func (l *lan) addPrivate(out string) *host {
	l.t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		l.t.Fatalf("%v: install the package nftables", err)
	}
	n := len(l.hosts) + 1
	h := &host{lan: l, n: n, netns: l.netns(fmt.Sprintf("h%d", n)), home: tempHome(l.t)}
	l.hosts = append(l.hosts, h)
	router := l.netns(fmt.Sprintf("r%d", n))
	l.attach(router, n)
	l.ip("-n", router, "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", h.netns)
	l.ip("-n", router, "addr", "add", fmt.Sprintf("192.168.%d.1/24", n), "dev", "eth1")
	l.ip("-n", router, "link", "set", "eth1", "up")
	l.ip("-n", h.netns, "addr", "add", fmt.Sprintf("192.168.%d.2/24", n), "dev", "eth0")
	l.ip("-n", h.netns, "link", "set", "eth0", "up")
	l.ip("-n", h.netns, "route", "add", "default", "via", fmt.Sprintf("192.168.%d.1", n))
	l.ip("netns", "exec", router, "nft", `
		table inet router {
			chain in {
				type filter hook input priority filter; policy drop;
				ct state established,related accept
				iifname "eth1" accept
				meta l4proto ipv6-icmp accept
			}
			chain through {
				type filter hook forward priority filter; policy drop;
				ct state established,related accept
				iifname "eth1" accept
			}
			chain out {
				type nat hook postrouting priority srcnat;
				oifname "eth0" `+out+`
			}
		}`)
	l.ip("netns", "exec", router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	return h
}

// plug connects a host with the network, or takes it off.
func (h *host) plug(in bool) {
	h.lan.t.Helper()
	state := "down"
	if in {
		state = "up"
	}
	h.lan.ip("-n", h.lan.name+"-switch", "link", "set", fmt.Sprintf("p%d", h.n), state)
}

func (h *host) address() string { return fmt.Sprintf("%s%d", h.lan.prefix, h.n) }

// in returns the command that runs another one on the host.
func (h *host) in() []string { return []string{"ip", "netns", "exec", h.netns} }

// user returns a user of the host, whose dfdaemon runs.
func (h *host) user() *user {
	u := newUser(h.lan.t, h.daemon)
	u.in = h.in()
	return u
}

// start starts the host's dfdaemon, which is stopped with the test.
func (h *host) start(flags ...string) {
	t := h.lan.t
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(h.home, "logs", "dfdaemon.log"))
			t.Logf("the log of host %d ends with:\n%s", h.n, log[max(0, len(log)-4000):])
		}
	})
	h.daemon = startDaemonWith(t, h.home, append([]string{"--swarm-key", h.lan.key}, flags...), h.in()...)
}

// kill ends the daemon as a power cut would.
func (h *host) kill() {
	h.lan.t.Helper()
	h.stop(h.lan.t, syscall.SIGKILL)
}

// ok runs dfcache on the host and returns what it prints. It has to succeed.
func (h *host) ok(args ...string) string {
	t := h.lan.t
	t.Helper()
	out, errs, code := h.run(t, nil, args...)
	if code != 0 {
		t.Fatalf("host %d: dfcache %s: exit status %d\n%s%s", h.n, strings.Join(args, " "), code, out, errs)
	}
	return out
}

// fails runs dfcache on the host, which has to fail, and returns the exit code and what it says.
func (h *host) fails(args ...string) (code int, says string) {
	t := h.lan.t
	t.Helper()
	out, says, code := h.run(t, nil, args...)
	if code == 0 {
		t.Fatalf("host %d: dfcache %s succeeds:\n%s", h.n, strings.Join(args, " "), out)
	}
	return code, says
}

// eventually runs dfcache on the host until it succeeds, for what needs a
// moment: finding peers, learning of a delete.
func (h *host) eventually(args ...string) string {
	t := h.lan.t
	t.Helper()
	for {
		out, errs, code := h.run(t, nil, args...)
		if code == 0 {
			return out
		}
		if h.lan.late() {
			t.Fatalf("host %d: dfcache %s: exit status %d\n%s%s", h.n, strings.Join(args, " "), code, out, errs)
		}
	}
}

// gone runs dfcache stat on the host until it finds nothing.
func (h *host) gone(args ...string) {
	t := h.lan.t
	t.Helper()
	for {
		out, errs, code := h.run(t, nil, append([]string{"stat"}, args...)...)
		if code == notFound {
			return
		}
		if h.lan.late() {
			t.Fatalf("host %d: dfcache stat %s: exit status %d, want %d\n%s%s", h.n, strings.Join(args, " "), code,
				notFound, out, errs)
		}
	}
}
