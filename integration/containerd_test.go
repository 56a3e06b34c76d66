package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// containerd is a containerd of a test's own. It runs no containers.
type containerd struct {
	*user
	socket string
}

// startContainerd starts a containerd that keeps everything below the user's
// directory, and ends with the test.
func (u *user) startContainerd() *containerd {
	t := u.t
	t.Helper()
	dir := filepath.Join(u.dir, "cd")
	c := &containerd{u, filepath.Join(dir, "s")}
	u.write("cd/config.toml", fmt.Appendf(nil, `
version = 2
root = "%[1]s/root"
state = "%[1]s/state"
temp = "%[1]s/temp"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.runtime.v1.linux", "io.containerd.monitor.v1.cgroups",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "%[1]s/s"
[ttrpc]
  address = "%[1]s/t"
[debug]
  address = "%[1]s/d"
`, dir))
	// It mounts what it unpacks: only it is to see that.
	wrap := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		wrap = []string{"unshare", "--user", "--map-root-user", "--mount"}
	}
	cmd := u.command(nil, append(wrap, u.program("containerd"), "--config", filepath.Join(dir, "config.toml")))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("containerd ends with %v:\n%s", err, &log)
		}
	})
	within(t, "containerd serves", func() bool {
		if len(ended) > 0 {
			t.Fatal("containerd does not start")
		}
		conn, err := net.Dial("unix", c.socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return c
}

func (c *containerd) ctr(args ...string) string {
	c.t.Helper()
	return c.run(append([]string{"ctr", "--address", c.socket}, args...)...)
}

func (c *containerd) pull(reference string, flags ...string) {
	c.t.Helper()
	c.ctr(append(append([]string{"images", "pull", "--snapshotter", "native"}, flags...), reference)...)
}

// requireContent fails the test unless containerd has this content.
func (c *containerd) requireContent(digests ...string) {
	c.t.Helper()
	for _, d := range digests {
		if got := c.ctr("content", "get", d); sha256Of([]byte(got)).String() != d {
			c.t.Errorf("containerd has %d other bytes under %s", len(got), d)
		}
	}
}

func TestContainerd(t *testing.T) {
	d, u := start(t)
	m := u.pushImage(d.host+"/images/app:v1", 1, 6<<20, 1000)
	digest := strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:v1"))
	c := u.startContainerd()

	// The first connection breaks in the middle of a layer: it goes on from there.
	r := record(t, d)
	var broken atomic.Bool
	r.meddle(func(answer *http.Response) {
		if answer.Request.Method == http.MethodGet &&
			strings.HasSuffix(answer.Request.URL.Path, m.Layers[0].Digest.String()) && !broken.Swap(true) {
			answer.Body = brokenBody{io.LimitReader(answer.Body, 4<<20), answer.Body}
		}
	})
	c.pull(r.host+"/images/app:v1", "--plain-http")
	r.requireCount(t, 1, `^GET /v2/images/app/blobs/.* 206 Range:bytes=\d+-$`)
	c.requireContent(digest, m.Config.Digest.String(), m.Layers[0].Digest.String(), m.Layers[1].Digest.String())
	if list := c.ctr("images", "ls"); !strings.Contains(list, digest) {
		t.Errorf("containerd has no image %s:\n%s", digest, list)
	}

	c.ctr("images", "tag", r.host+"/images/app:v1", r.host+"/pushed/app:v1")
	c.ctr("images", "push", "--plain-http", r.host+"/pushed/app:v1")
	u.prints(digest, "crane", "digest", d.host+"/pushed/app:v1")
	u.requireLayers("pushed/app", m)

	// An index, of which containerd takes the image for this platform.
	u.run("crane", "index", "append", "-m", d.host+"/images/app:v1", "-t", d.host+"/images/app:all")
	c.pull(d.host+"/images/app:all", "--plain-http", "--all-platforms")

	// What dfcache has imported is content for containerd, too.
	u.write("file.bin", content(100_000, 9))
	u.run("dfcache", "import", "-t", "models", "-i", "v1", "file.bin")
	c.ctr("content", "fetch", "--plain-http", d.host+"/models:v1")
	c.requireContent(sha256Of(content(100_000, 9)).String())
}

// TestContainerdMirror: containerd asks the daemon for images of docker.io
// before it asks anybody else, and goes on to the next where they are not here.
func TestContainerdMirror(t *testing.T) {
	d, u := start(t)
	upstream, _ := start(t)
	near := u.pushImage(d.host+"/library/near:v1", 1, 1<<20)
	far := u.pushImage(upstream.host+"/library/far:v1", 2, 1<<20)
	mirror, origin := record(t, d), record(t, upstream)
	for file, text := range map[string]string{
		"hosts/docker.io/hosts.toml": `server = "http://%[2]s"
[host."http://%[1]s"]
  capabilities = ["pull", "resolve"]
`,
		"home/.config/containers/registries.conf": `[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "%[1]s"
insecure = true
`,
	} {
		u.write(file, fmt.Appendf(nil, text, mirror.host, origin.host))
	}
	c := u.startContainerd()
	hosts := []string{"--hosts-dir", filepath.Join(u.dir, "hosts")}
	c.pull("docker.io/library/near:v1", hosts...)
	c.requireContent(near.Layers[0].Digest.String())
	if mirror.count(`^(HEAD|GET) /v2/library/near/.*[?&]ns=docker\.io 200`) < 4 { // tag, manifest, config, layer
		t.Error("the mirror was not asked")
	}
	origin.requireCount(t, 0, `.`)
	c.pull("docker.io/library/far:v1", hosts...)
	c.requireContent(far.Layers[0].Digest.String())
	mirror.requireCount(t, 0, `/v2/library/far/.* 200`)

	// CRI-O and Podman have the same library as skopeo, and its configuration.
	before := mirror.count(`.`)
	u.skopeo("docker://docker.io/library/near:v1", "oci:layout:v1")
	if mirror.count(`^GET /v2/library/near/(manifests|blobs)/[^?]* 200`) < 3 || mirror.count(`.`) == before {
		t.Error("the mirror was not asked by skopeo")
	}
}

// brokenBody is a body that ends with an error after what its Reader has.
type brokenBody struct {
	io.Reader
	io.Closer
}

func (b brokenBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
