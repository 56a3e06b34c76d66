package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/dragonfly/cluster/clustertest"
	"github.com/dfcache/dfcache/p2p/dragonfly/dragonflytest"
	"github.com/dfcache/dfcache/p2p/dragonfly/persistent/persistenttest"
)

// dragonflyHost is a dfdaemon with Dragonfly for its network.
type dragonflyHost struct {
	*daemon
	t *testing.T
}

func startOnDragonfly(t *testing.T, flags ...string) dragonflyHost {
	t.Helper()
	return dragonflyHost{startDaemonWith(t, tempHome(t), append(flags, "--swarm-key", "off")), t}
}

func (h dragonflyHost) ok(args ...string) string {
	h.t.Helper()
	out, says, code := h.run(h.t, nil, args...)
	if code != 0 {
		h.t.Fatalf("dfcache %v: exit status %d\n%s%s", args, code, out, says)
	}
	return out
}

// add imports content by its digest, under the tag models, and returns that.
func (h dragonflyHost) add(content []byte) string {
	h.t.Helper()
	name := filepath.Join(h.home, "file")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		h.t.Fatal(err)
	}
	cid := digest.SHA256.FromBytes(content).String()
	h.ok("import", "-t", "models", "-i", cid, name)
	return cid
}

func (h dragonflyHost) requireExport(cid string, content []byte) {
	h.t.Helper()
	name := filepath.Join(h.home, "export")
	h.ok("export", "-t", "models", "-i", cid, "-O", name, "--overwrite")
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, content) {
		h.t.Errorf("export of %s: %d bytes, %v", cid, len(got), err)
	}
}

// What one host imports, another exports, through the Dragonfly beside each of them.
func TestDragonflyBeside(t *testing.T) {
	var upstream dragonflytest.Cluster
	one, two := upstream.Start(t), upstream.Start(t)
	a := startOnDragonfly(t, "--engine", "dragonfly", "--dragonfly-daemon", one.Socket)
	b := startOnDragonfly(t, "--engine", "dragonfly", "--dragonfly-daemon", two.Socket)
	content := bytes.Repeat([]byte("content "), 1<<17)
	b.requireExport(a.add(content), content)
}

// The same with the newer one, which speaks the API v2.
func TestDragonflyPersistent(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	upstream := persistenttest.StartCluster(t)
	flags := []string{"--engine", "dragonfly-v2", "--dragonfly-schedulers", upstream.Addr, "--dragonfly-daemon"}
	a := startOnDragonfly(t, append(flags, upstream.Start(t).Socket)...)
	b := startOnDragonfly(t, append(flags, upstream.Start(t).Socket)...)
	content := bytes.Repeat([]byte("content "), 1<<20)
	cid := a.add(content)
	b.requireExport(cid, content)
	a.ok("delete", "-t", "models", "-i", cid)
	b.ok("delete", "-t", "models", "-i", cid)
	if left := upstream.States(); len(left) > 0 {
		t.Errorf("Dragonfly has %v", left)
	}
}

// What one host imports, another exports, and so does a daemon of Dragonfly; and the reverse.
func TestDragonflyCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	schedulers := clustertest.StartScheduler(t)
	flags := []string{"--engine", "dragonfly-cluster", "--dragonfly-schedulers", schedulers.Addr,
		"--dragonfly-advertise", "127.0.0.1",
		"--dragonfly-peer-listen", "127.0.0.1:0", "--dragonfly-upload-listen", "127.0.0.1:0"}
	a, b := startOnDragonfly(t, flags...), startOnDragonfly(t, flags...)
	peer := clustertest.StartPeer(t, schedulers, "peer", clustertest.Honest)
	content := bytes.Repeat([]byte("content "), 1<<20)
	cid := a.add(content)
	b.requireExport(cid, content)
	if got, err := peer.Export(t.Context(), cid, "models"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("export by Dragonfly: %d bytes, %v", len(got), err)
	}

	content = bytes.Repeat([]byte("another "), 1<<20)
	cid = digest.SHA256.FromBytes(content).String()
	if err := peer.Import(t.Context(), cid, "models", content); err != nil {
		t.Fatal(err)
	}
	a.requireExport(cid, content)
}

// A host whose disk is too small for what it fetches says so, keeps nothing of it, and goes on.
func TestDragonflyDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: needs a mount namespace")
	}
	newer, schedulers := persistenttest.StartCluster(t), clustertest.StartScheduler(t)
	for engine, flags := range map[string]func() []string{
		"dragonfly-v2": func() []string {
			return []string{"--dragonfly-schedulers", newer.Addr, "--dragonfly-daemon", newer.Start(t).Socket}
		},
		"dragonfly-cluster": func() []string {
			return []string{"--dragonfly-schedulers", schedulers.Addr, "--dragonfly-advertise", "127.0.0.1",
				"--dragonfly-peer-listen", "127.0.0.1:0", "--dragonfly-upload-listen", "127.0.0.1:0"}
		},
	} {
		t.Run(engine, func(t *testing.T) {
			a := startOnDragonfly(t, append(flags(), "--engine", engine)...)
			home := tempHome(t)
			data := filepath.Join(home, "data")
			if err := os.Mkdir(data, 0o750); err != nil {
				t.Fatal(err)
			}
			b := dragonflyHost{startDaemonWith(
				t, home, append(flags(), "--engine", engine, "--swarm-key", "off"), onSmallDisk(data, 16)...), t}
			big, small := content(20<<20, 1), content(1<<20, 2)
			_, says, code := b.run(t, nil, "export", "-t", "models", "-i", a.add(big), "-O", filepath.Join(home, "out"))
			if code != 7 || !strings.Contains(says, "free some space") {
				t.Errorf("exit status %d, %s", code, says)
			}
			b.requireExport(a.add(small), small)
		})
	}
}
