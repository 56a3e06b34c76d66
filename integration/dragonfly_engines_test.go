package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/dragonfly/cluster/clustertest"
	"github.com/dfcache/dfcache/p2p/dragonfly/dragonflytest"
)

// dragonflyHost is a dfdaemon with Dragonfly for its network.
type dragonflyHost struct {
	*daemon
	t *testing.T
}

func startOnDragonfly(t *testing.T, flags ...string) dragonflyHost {
	t.Helper()
	return dragonflyHost{startDaemonWith(t, tempHome(t), append([]string{"--swarm-key", "off"}, flags...)), t}
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

// What one host imports, another exports, and so does a daemon of Dragonfly; and the reverse.
func TestDragonflyCluster(t *testing.T) {
	schedulers := clustertest.StartScheduler(t)
	flags := []string{"--engine", "dragonfly-cluster", "--dragonfly-schedulers", schedulers.Addr, "--dragonfly-advertise", "127.0.0.1",
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
