package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// buildWithClock builds a dfdaemon whose clock can be set wrong.
func buildWithClock(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "dfdaemon")
	args := []string{"build", "-tags", "testclock", "-o", name}
	if raceEnabled {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../cmd/dfdaemon")...).CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return name
}

// startWith starts another dfdaemon on a host, with more in its environment.
func (h *host) startWith(program, env string, flags ...string) {
	h.lan.t.Helper()
	wrap := append(h.in(), "env", env, "sh", "-c", `program=$1; shift 2; exec "$program" "$@"`, "sh", program)
	h.daemon = startDaemonWith(h.lan.t, h.home, append([]string{"--swarm-key", h.lan.key}, flags...), wrap...)
}

type peerOfHost struct {
	ID, State, Reason string
	Ahead             float64
}

func (h *host) peers() (peers []peerOfHost) {
	h.lan.t.Helper()
	if err := json.Unmarshal([]byte(h.ok("peers", "--format", "json")), &peers); err != nil {
		h.lan.t.Fatal(err)
	}
	return peers
}

// Real daemons whose clocks differ: whoever imports, moves or deletes last is last,
// and a host that is off is told.
func TestSwarmClocks(t *testing.T) {
	l := newLAN(t, 3)
	program := buildWithClock(t)
	a, ahead, behind := l.hosts[0], l.hosts[1], l.hosts[2]
	for h, clock := range map[*host]string{a: "0s", ahead: "5m", behind: "-8760h"} {
		h.startWith(program, "DFDAEMON_TEST_CLOCK="+clock, "--lookup-timeout", "1s")
	}
	l.meet(2)
	var all [6][]byte
	var names [6]string
	for i := range all {
		names[i], all[i], _ = l.file(1000, uint64(20+i))
	}
	want := func(data []byte) {
		t.Helper()
		for _, h := range l.hosts {
			h.export(data, "-t", "m", "-i", "v1")
		}
	}
	for i, h := range []*host{ahead, a, behind, ahead, behind, a} {
		if i == 2 || i == 5 {
			l.hosts[i%2+1].ok("delete", "-t", "m", "-i", "v1")
			for _, h := range l.hosts {
				h.gone("-t", "m", "-i", "v1")
			}
		}
		h.ok("import", "-t", "m", "-i", "v1", names[i])
		want(all[i])
	}
	if _, says, _ := a.run(t, nil, "stat", "-t", "m", "-i", "v1"); !strings.Contains(says,
		"warning: the clock of peer") {
		t.Errorf("stat says %q", says)
	}
	off := 0
	for _, p := range a.peers() {
		if p.Ahead > 290 && p.Ahead < 310 || p.Ahead < -364*24*3600 {
			off++
		}
	}
	if off != 2 {
		t.Errorf("the peers are %+v", a.peers())
	}

	// Apart: a delete takes what its maker could see, and no more.
	ahead.plug(false)
	ahead.ok("import", "-t", "m", "-i", "v2", names[0])
	ahead.ok("delete", "-t", "m", "-i", "v2")
	a.ok("import", "-t", "m", "-i", "v2", names[1])
	ahead.plug(true)
	ahead.eventually("stat", "-t", "m", "-i", "v2")
	for _, h := range l.hosts {
		h.export(all[1], "-t", "m", "-i", "v2")
	}
	a.ok("stat", "-l", "-t", "m", "-i", "v2")
}

// A machine that was cloned with its peer.key: the logs and dfcache peers of both say so,
// also where they find nobody but each other, and so do those of their peers.
func TestSwarmClone(t *testing.T) {
	l := newLAN(t, 3)
	a, b, clone := l.hosts[0], l.hosts[1], l.hosts[2]
	a.start()
	key, err := os.ReadFile(filepath.Join(a.home, "peer.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(clone.home, "peer.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	clone.start()
	for _, h := range []*host{a, clone, b} {
		if h == b {
			b.start()
		}
		for told := false; !told; {
			if h == b {
				for _, asks := range []*host{clone, a} { // a peer that both ask in turn knows it
					asks.run(t, nil, "stat", "-t", "m", "-i", "nothing")
				}
			}
			for _, p := range h.peers() {
				told = told || p.State == "cloned" && strings.Contains(p.Reason, "peer.key")
			}
			if l.late() {
				t.Fatalf("host %d has the peers %+v", h.n, h.peers())
			}
		}
		log, err := os.ReadFile(filepath.Join(h.home, "logs", "dfdaemon.log"))
		if err != nil || !strings.Contains(string(log), "peer.key was copied") {
			t.Errorf("the log of host %d does not say it: %v", h.n, err)
		}
	}
}
