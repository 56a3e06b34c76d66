package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A host behind a router that lets nothing in gives and gets files over the
// connection that it makes itself.
func TestNATOne(t *testing.T) {
	t.Parallel()
	l := newLAN(t, 1)
	public, private := l.hosts[0], l.addPrivate(anyPort)
	public.start("--mdns=false")
	private.start("--mdns=false", "--bootstrap", public.address())
	l.meet(1)
	name, data, cid := l.file(3_000_000, 1)
	private.ok("import", "-t", "models", "-i", "v1", name)
	if out := public.ok("stat", "-t", "models", "-i", "v1"); !strings.Contains(out, "peers:     1 (1 whole)") {
		t.Errorf("stat on the public host says:\n%s", out)
	}
	public.export(data, "-t", "models", "-i", "v1")
	// It is reached through the connection that it has made, not at its port for pieces.
	if out := public.ok("peers"); !strings.Contains(out, " 10.77.0.2:") || strings.Contains(out, ":65003") {
		t.Errorf("the public host has made a connection of its own with the private one:\n%s", out)
	}
	public.ok("delete", "-t", "models", "-i", "v1")
	private.gone("-l", "-t", "models", "-i", "v1")

	public.ok("import", "-i", cid, name)
	private.export(data, "-i", cid)
	private.ok("delete", "-i", cid)
	public.gone("-l", "-i", cid)
}

// Two hosts behind routers of their own exchange files over one that both reach.
// Nothing has to be set for that but where to start.
func TestNATRelay(t *testing.T) {
	t.Parallel()
	l := newLAN(t, 1)
	public, a, b := l.hosts[0], l.addPrivate(anyPort), l.addPrivate(anyPort)
	public.start("--mdns=false")
	a.start("--mdns=false", "--bootstrap", public.address())
	b.start("--mdns=false", "--bootstrap", public.address())
	l.meet(2)
	name, data, cid := l.file(16<<20, 2) // libp2p's own relays carry 128 KiB
	a.ok("import", "-t", "models", "-i", "v1", name)
	b.export(data, "-t", "models", "-i", "v1", "--timeout", "30s")
	b.ok("delete", "-t", "models", "-i", "v1")
	a.gone("-l", "-t", "models", "-i", "v1")
	b.ok("import", "-i", cid, name)

	// Without the relay they can't reach each other, and say so.
	public.kill()
	for {
		out := a.ok("peers")
		if !strings.Contains(out, "connected") {
			break
		}
		if l.late() {
			t.Fatalf("without the relay the peers are:\n%s", out)
		}
	}
	code, says := a.fails("export", "-i", cid, "-O", filepath.Join(a.home, "x"))
	if code != unreachable || !strings.Contains(says, "no peer can be reached") {
		t.Errorf("export without the relay: exit status %d: %s", code, says)
	}
	// It comes back, and they find each other again.
	public.start("--mdns=false")
	l.meet(2)
	a.export(data, "-i", cid)
}

// A firewall that changes no addresses can't be noticed: --nat tells of it.
func TestNATFirewall(t *testing.T) {
	t.Parallel()
	l := newLAN(t, 1)
	public, a, b := l.hosts[0], l.addPrivate(sameAddress), l.addPrivate(sameAddress)
	public.start("--mdns=false")
	for _, h := range []*host{a, b} {
		l.ip("-n", public.netns, "route", "add", fmt.Sprintf("192.168.%d.0/24", h.n), "via", h.address())
		h.start("--mdns=false", "--nat", "--bootstrap", public.address())
	}
	l.meet(2)
	name, data, cid := l.file(1_000_000, 3)
	a.ok("import", "-i", cid, name)
	b.export(data, "-i", cid)
}

// With --nat the hosts punch holes through their routers, and need the one that
// both reach only to meet.
func TestNATPunch(t *testing.T) {
	t.Parallel()
	l := newLAN(t, 1)
	public, a, b := l.hosts[0], l.addPrivate(samePort), l.addPrivate(samePort)
	public.start("--mdns=false")
	for _, h := range []*host{a, b} {
		h.start("--mdns=false", "--nat", "--bootstrap", public.address())
	}
	l.requireDirect(public, a, b)
}

// A router that opens a port when it is asked (UPnP) lets others in, those too that can't
// punch holes. It has a public address: with another one the port would be of no use.
func TestNATMapped(t *testing.T) {
	t.Parallel()
	l := newNetwork(t, "44.77.0.", 1)
	public, a, b := l.hosts[0], l.addPrivate(samePort), l.addPrivate(anyPort)
	a.openPorts()
	public.start("--mdns=false")
	a.start("--mdns=false", "--nat", "--bootstrap", public.address())
	b.start("--mdns=false", "--bootstrap", public.address())
	l.requireDirect(public, a, b)
}

// requireDirect fails the test unless two hosts that have met over a third connect with
// each other, and exchange a file without it.
func (l *lan) requireDirect(relay, a, b *host) {
	l.t.Helper()
	l.meet(2)
	name, data, cid := l.file(1_000_000, 4)
	a.ok("import", "-i", cid, name)
	b.awaitConnection(a)
	relay.kill()
	b.export(data, "-i", cid)
}

// openPorts has the host's router open ports on request.
func (h *host) openPorts() {
	t := h.lan.t
	t.Helper()
	if _, err := exec.LookPath("miniupnpd"); err != nil {
		t.Fatalf("%v: install the package miniupnpd-nftables", err)
	}
	router := fmt.Sprintf("%s-r%d", h.lan.name, h.n)
	h.lan.ip("netns", "exec", router, "nft", `
		table inet router {
			chain ports { }
			chain in_ports { type nat hook prerouting priority dstnat; }
			chain out_ports { }
			chain through { jump ports; }
		}`)
	conf := filepath.Join(h.home, "router.conf")
	if err := os.WriteFile(conf, []byte("ext_ifname=eth0\nlistening_ip=eth1\nsecure_mode=yes\n"+
		"upnp_table_name=router\nupnp_nat_table_name=router\nupnp_forward_chain=ports\nupnp_nat_chain=in_ports\nupnp_nat_postrouting_chain=out_ports\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", router, "miniupnpd", "-d", "-f", conf,
		"-P", filepath.Join(h.home, "router.pid"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("the router says:\n%s", &log)
		}
	})
}

// awaitConnection waits until there is a TCP connection from one host to the other.
func (h *host) awaitConnection(to *host) {
	t := h.lan.t
	t.Helper()
	for {
		args := append(h.in(), "ss", "-Htn", "state", "established", "dst", to.address())
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
		if len(out) > 0 {
			return
		}
		if h.lan.late() {
			t.Fatalf("host %d has no connection with host %d:\n%s", h.n, to.n, h.ok("peers"))
		}
	}
}
