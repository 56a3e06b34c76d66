package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// The exit codes of dfcache that these tests expect.
const (
	notFound    = 3
	corrupt     = 8
	unreachable = 11
)

// late waits for a moment, which leaves the processor to the daemons, and reports whether
// what a test waits for takes too long.
func (l *lan) late() bool {
	time.Sleep(10 * time.Millisecond)
	if deadline, ok := l.t.Deadline(); ok && time.Until(deadline) < time.Minute {
		return true
	}
	if l.started.IsZero() {
		l.started = time.Now()
	}
	return time.Since(l.started) > 2*time.Minute
}

// file makes a file of n bytes and returns its name and digest.
func (l *lan) file(n int, seed uint64) (name string, data []byte, cid string) {
	l.t.Helper()
	data = content(n, seed)
	name = filepath.Join(tempHome(l.t), "file.bin")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		l.t.Fatal(err)
	}
	return name, data, digest.SHA256.FromBytes(data).String()
}

// export exports a file on the host, which has to be data.
func (h *host) export(data []byte, args ...string) {
	t := h.lan.t
	t.Helper()
	out := filepath.Join(tempHome(t), "out")
	h.ok(append([]string{"export", "-O", out}, args...)...)
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("host %d: exported are %d bytes that are not the %d that were imported: %v", h.n, len(got), len(data),
			err)
	}
}

// meet waits until every host that runs a daemon is connected with so many others.
func (l *lan) meet(n int) {
	l.t.Helper()
	for _, h := range l.hosts {
		if h.daemon == nil || h.cmd.ProcessState != nil {
			continue
		}
		for {
			var peers []struct{ State string }
			if err := json.Unmarshal([]byte(h.ok("peers", "--format", "json")), &peers); err != nil {
				l.t.Fatal(err)
			}
			connected := 0
			for _, p := range peers {
				if p.State == "connected" {
					connected++
				}
			}
			if connected >= n {
				break
			}
			if l.late() {
				l.t.Fatalf("host %d is connected with %d others, want %d", h.n, connected, n)
			}
		}
	}
}

// Two hosts on one network and a key: nothing else has to be set up.
func TestSwarmOfTwo(t *testing.T) {
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.start()
	b.start()
	l.meet(1)
	name, data, cid := l.file(3_000_000, 1)
	a.ok("import", "-t", "models", "-i", "v1", name)
	a.ok("import", "-i", cid, name)

	for _, args := range [][]string{{"-t", "models", "-i", "v1"}, {"-i", cid}} {
		out := b.ok(append([]string{"stat"}, args...)...)
		if !strings.Contains(out, "local:     no") || !strings.Contains(out, "peers:     1 (1 whole)") {
			t.Errorf("stat on the other host says:\n%s", out)
		}
		if code, says := b.fails(append([]string{"stat", "-l"}, args...)...); code != notFound {
			t.Errorf("stat -l on the other host: exit status %d: %s", code, says)
		}
		if code, says := b.fails(append([]string{"export", "-l", "-O", filepath.Join(b.home, "x")},
			args...)...); code != notFound {
			t.Errorf("export -l on the other host: exit status %d: %s", code, says)
		}
		b.export(data, args...)
		if out := b.eventually(append([]string{"stat", "-l"}, args...)...); !strings.Contains(out, "local:     yes") {
			t.Errorf("stat -l after the export says:\n%s", out)
		}
	}
	// What it has now it can serve on, without the first host.
	a.kill()
	b.export(data, "-t", "models", "-i", "v1")
	if code, says := b.fails("stat", "-i", "sha256:"+strings.Repeat("0", 64)); code != unreachable && code != notFound {
		t.Errorf("stat without any peer: exit status %d: %s", code, says)
	}
	a.start()
	l.meet(1)
	if code, says := b.fails("stat", "-i", "sha256:"+strings.Repeat("0", 64)); code != notFound {
		t.Errorf("stat of what nobody has: exit status %d: %s", code, says)
	}

	// A delete on one is one on both.
	out := b.ok("delete", "-t", "models", "-i", "v1")
	if !strings.Contains(out, "1") {
		t.Errorf("delete says:\n%s", out)
	}
	a.gone("-l", "-t", "models", "-i", "v1")
	b.gone("-t", "models", "-i", "v1")
	a.ok("stat", "-l", "-i", cid)
}

// A daemon with another key, or none, sees nothing.
func TestSwarmIsPrivate(t *testing.T) {
	l := newLAN(t, 3)
	a, b, c := l.hosts[0], l.hosts[1], l.hosts[2]
	other := filepath.Join(tempHome(t), "other.key")
	if out, err := exec.Command(dfdaemon, "swarm", "key", "new", other).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	a.start()
	b.start("--swarm-key", other, "--bootstrap", a.address())
	c.start("--bootstrap", a.address()) // so that we know when there was time to meet
	name, data, cid := l.file(100_000, 2)
	a.ok("import", "-i", cid, name)
	c.eventually("stat", "-i", cid)
	c.export(data, "-i", cid)
	if code, says := b.fails("stat", "-i", cid); code != unreachable {
		t.Errorf("with another key: exit status %d: %s", code, says)
	}
	b.fails("delete", "-i", cid)
	a.ok("stat", "-l", "-i", cid)
	if out := b.ok("peers"); strings.Contains(out, "connected") {
		t.Errorf("with another key the peers are:\n%s", out)
	}
}

// Any peer can be the bootstrap, and none has to stay up.
func TestSwarmBootstrap(t *testing.T) {
	l := newLAN(t, 4)
	a, b, c, d := l.hosts[0], l.hosts[1], l.hosts[2], l.hosts[3]
	a.start("--mdns=false")
	b.start("--mdns=false", "--bootstrap", a.address())
	c.start("--mdns=false", "--bootstrap", a.address()+":65003")
	l.meet(2)
	name, data, cid := l.file(200_000, 3)
	b.ok("import", "-i", cid, name)
	a.kill()
	c.export(data, "-i", cid)
	// A late joiner knows only one that is not the first.
	file := filepath.Join(d.home, "peers.txt")
	if err := os.WriteFile(file, []byte("# the others\n"+c.address()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.start("--mdns=false", "--peers-file", file)
	l.meet(2)
	d.export(data, "-i", cid)
	// It comes back without being told whom to ask.
	d.kill()
	d.start("--mdns=false")
	l.meet(2)
}

// IPv6 alone will do.
func TestSwarmIPv6(t *testing.T) {
	l := newLAN(t, 2)
	for _, h := range l.hosts {
		l.ip("-n", h.netns, "addr", "del", h.address()+"/24", "dev", "eth0")
	}
	a, b := l.hosts[0], l.hosts[1]
	a.start("--mdns=false")
	b.start("--mdns=false", "--bootstrap", "[fd77::1]:65003")
	l.meet(1)
	name, data, cid := l.file(200_000, 4)
	a.ok("import", "-i", cid, name)
	b.export(data, "-i", cid)
}

// A registry client pulls on a host that never saw the push.
func TestSwarmRegistry(t *testing.T) {
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.start()
	b.start()
	l.meet(1)
	there, here := a.user(), b.user()
	data := content(3_000_000, 5)
	there.write("file.bin", data)
	there.run("oras", "push", a.daemon.host+"/models:v2", "file.bin:application/octet-stream")
	there.run("oras", "attach", "--artifact-type", "application/x-signature", a.daemon.host+"/models:v2", "file.bin")

	out := here.run("oras", "discover", b.daemon.host+"/models:v2")
	if !strings.Contains(out, "application/x-signature") {
		t.Errorf("discover on the other host says:\n%s", out)
	}
	here.run("oras", "tag", b.daemon.host+"/models:v2", "stable")
	there.run("oras", "resolve", a.daemon.host+"/models:stable")
	here.run("oras", "pull", b.daemon.host+"/models:v2")
	if got, err := os.ReadFile(filepath.Join(here.dir, "file.bin")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was pulled on the other host is not what was pushed: %v", err)
	}
	b.eventually("stat", "-l", "-t", "models", "-i", "v2")

	// A client that looks a tag up, and then asks for the manifest by its digest, as crane is told to here
	// and containerd does, has pulled the tag; one that only looks it up has not.
	for _, tag := range []string{"looked", "pulled"} {
		there.run("oras", "push", a.daemon.host+"/names:"+tag, "file.bin:application/x-"+tag)
	}
	here.run("crane", "digest", b.daemon.host+"/names:looked")
	digest := strings.TrimSpace(here.run("crane", "digest", b.daemon.host+"/names:pulled"))
	here.run("crane", "manifest", b.daemon.host+"/names@"+digest)
	if out := here.run("oras", "repo", "tags", b.daemon.host+"/names"); strings.TrimSpace(out) != "pulled" {
		t.Errorf("the other host has the tags %q, want the one that was pulled", out)
	}
	image := there.pushImage(a.daemon.host+"/images/app:v1", 1, 1000)
	here.startContainerd().pull(b.daemon.host+"/images/app:v1", "--plain-http")
	if out := here.run("oras", "repo", "tags", b.daemon.host+"/images/app"); strings.TrimSpace(out) != "v1" {
		t.Errorf("after ctr pull the other host has the tags %q", out)
	}

	// A reader of a tag that was moved on another host takes nothing away from it.
	here.write("one.txt", []byte("one"))
	there.write("two.txt", []byte("two"))
	here.run("oras", "push", b.daemon.host+"/moved:v1", "one.txt")
	first := strings.TrimSpace(here.run("oras", "resolve", b.daemon.host+"/moved:v1"))
	there.run("oras", "push", a.daemon.host+"/moved:v1", "two.txt")
	here.run("oras", "pull", b.daemon.host+"/moved:v1")
	here.has("two.txt", []byte("two"))
	here.run("oras", "pull", "-o", "before", b.daemon.host+"/moved@"+first)
	here.has("before/one.txt", []byte("one"))

	a.kill()
	b.export(data, "-t", "models", "-i", "v2")
	here.requireLayers("images/app", image)
	here.run("crane", "manifest", b.daemon.host+"/images/app:v1")
}

// A network that falls apart and heals: both halves work on, and are told of each
// other's deletes and names.
func TestSwarmPartition(t *testing.T) {
	l := newLAN(t, 3)
	a, b, c := l.hosts[0], l.hosts[1], l.hosts[2]
	for _, h := range l.hosts {
		h.start("--lookup-timeout", "1s")
	}
	l.meet(2)
	one, first, _ := l.file(100_000, 6)
	two, second, _ := l.file(100_000, 7)
	a.ok("import", "-t", "models", "-i", "v1", one)
	c.export(first, "-t", "models", "-i", "v1")
	c.eventually("stat", "-l", "-t", "models", "-i", "v1")
	c.plug(false)
	a.ok("delete", "-t", "models", "-i", "v1")
	a.ok("import", "-t", "models", "-i", "v2", two)
	b.export(second, "-t", "models", "-i", "v2")
	c.export(first, "-t", "models", "-i", "v1") // it can't know
	c.plug(true)
	c.gone("-l", "-t", "models", "-i", "v1")
	c.eventually("stat", "-t", "models", "-i", "v2")
	c.export(second, "-t", "models", "-i", "v2")
}

// Sources are killed in the middle, and so is the host that fetches: nothing is lost, and
// little is fetched twice.
func TestSwarmKilled(t *testing.T) {
	l := newLAN(t, 3)
	a, b, c := l.hosts[0], l.hosts[1], l.hosts[2]
	slow := []string{"--upload-rate", "8MiB", "--stall-timeout", "2s"}
	a.start(slow...)
	b.start(slow...)
	c.start(slow...)
	l.meet(2)
	name, data, cid := l.file(24<<20, 8)
	a.ok("import", "-i", cid, name)
	b.ok("import", "-i", cid, name)

	var exporting sync.WaitGroup
	exporting.Go(func() {
		out := filepath.Join(tempHome(t), "out")
		_, _, code := c.run(t, nil, "export", "-i", cid, "-O", out)
		if _, err := os.Stat(out); code == 0 || err == nil {
			t.Errorf("an export whose daemon was killed: exit status %d, %v", code, err)
		}
	})
	c.arrived(4 << 20)
	a.kill()
	c.arrived(8 << 20)
	c.kill()
	exporting.Wait()
	c.start(slow...)
	l.meet(1)
	out := filepath.Join(tempHome(t), "out")
	var result struct {
		Sources []struct{ Bytes int64 } `json:"sources"`
	}
	if err := json.Unmarshal([]byte(c.ok("export", "-i", cid, "-O", out, "--format", "json")), &result); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("exported are %d bytes, %v", len(got), err)
	}
	var fetched int64
	for _, s := range result.Sources {
		fetched += s.Bytes
	}
	if fetched > 17<<20 {
		t.Errorf("%d bytes were fetched after the restart, want less: 8 MiB had arrived", fetched)
	}
	c.eventually("stat", "-l", "-i", cid)
	c.stop(t, 15)
	requireFsck(t, c.home)
}

// A file that is damaged on the disk is mended from another host while it is
// exported, and pulled.
func TestSwarmMends(t *testing.T) {
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.start()
	b.start()
	l.meet(1)
	name, data, cid := l.file(3_000_000, 9)
	a.ok("import", "-t", "models", "-i", "v1", name)
	b.export(data, "-t", "models", "-i", "v1")
	b.eventually("stat", "-l", "-t", "models", "-i", "v1")
	harm := func() {
		path := filepath.Join(b.home, "data", "blobs", "sha256", strings.TrimPrefix(cid, "sha256:"))
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("damage"), 1_000_000); err != nil {
			t.Fatal(err)
		}
	}
	harm()
	if code, says := b.fails("export", "-l", "-t", "models", "-i", "v1", "-O",
		filepath.Join(b.home, "x")); code != corrupt {
		t.Errorf("export -l of a damaged file: exit status %d: %s", code, says)
	}
	b.export(data, "-t", "models", "-i", "v1")
	harm()
	u := b.user()
	u.run("oras", "pull", b.daemon.host+"/models:v1")
	if got, err := os.ReadFile(filepath.Join(u.dir, "file.bin")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("pulled are %d bytes, %v", len(got), err)
	}
	b.stop(t, 15)
	requireFsck(t, b.home)
}

func TestSwarmReplicas(t *testing.T) {
	l := newLAN(t, 3)
	for _, h := range l.hosts {
		h.start()
	}
	l.meet(2)
	name, data, _ := l.file(1_000_000, 9)
	l.hosts[0].ok("import", "-t", "models", "-i", "v1", "--replicas", "2", name)
	l.hosts[0].kill()
	for _, h := range l.hosts[1:] {
		h.export(data, "-l", "-t", "models", "-i", "v1")
	}
	code, says := l.hosts[1].fails("import", "-t", "models", "-i", "v2", "--replicas", "5", name)
	if code != unreachable || !strings.Contains(says, "stored") {
		t.Errorf("more replicas than there are hosts: exit status %d: %s", code, says)
	}
	l.hosts[1].ok("stat", "-l", "-t", "models", "-i", "v2")
}
