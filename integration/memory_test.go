package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// lean returns a dfdaemon without the race detector, which takes many times the memory.
var lean = sync.OnceValues(func() (string, error) {
	if !raceEnabled {
		return dfdaemon, nil
	}
	path := dfdaemon + "-lean"
	out, err := exec.Command("go", "build", "-o", path, "../cmd/dfdaemon").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
})

// startLean starts a daemon whose memory is measured. wrap is a command that runs it.
func startLean(t *testing.T, flags []string, wrap ...string) *daemon {
	t.Helper()
	program, err := lean()
	if err != nil {
		t.Fatal(err)
	}
	// The daemon's own path is what startDaemonWith adds: exec drops it.
	script := []string{"sh", "-c", `program=$1; shift 2; exec "$program" "$@"`, "sh", program}
	return startDaemonWith(t, tempHome(t), flags, append(wrap, script...)...)
}

// memory returns a line of the daemon's status, in MiB: VmRSS is what it has now, VmHWM the most it had.
func (d *daemon) memory(t *testing.T, line string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(text, line+":"); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			if err != nil {
				t.Fatal(err)
			}
			return n >> 10
		}
	}
	t.Fatalf("the daemon's status has no %s", line)
	return 0
}

// within the daemon's memory, in MiB, a load has to stay, and with idle of it, it
// has to come out.
const (
	memoryBound = 200
	memoryIdle  = 100
)

// requireMemory fails the test if the daemon took too much memory at any time, or does not
// give it back, now that the load is over.
func (d *daemon) requireMemory(t *testing.T, bound int) {
	t.Helper()
	most := d.memory(t, "VmHWM")
	t.Logf("%d MiB at most", most)
	if most >= bound {
		t.Errorf("the daemon took %d MiB, want less than %d", most, bound)
	}
	within(t, fmt.Sprintf("it takes less than %d MiB again", memoryIdle),
		func() bool { return d.memory(t, "VmRSS") < memoryIdle })
}

// dialRegistry opens a connection to the registry that takes as little as it can.
func (d *daemon) dialRegistry(t *testing.T) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.Replace(d.host, "localhost", "127.0.0.1", 1))
	if err != nil {
		t.Fatal(err)
	}
	c := conn.(*net.TCPConn)
	if err := c.SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	return c
}

// stalled sends n requests, each with the body, which is not copied, on a connection of its
// own, and reads the beginning of each answer where one is to come. What it returns hangs up.
func (d *daemon) stalled(t *testing.T, n int, answered bool, body []byte, request func(i int) string) (hangUp func()) {
	t.Helper()
	conns := make([]*net.TCPConn, n)
	for i := range conns {
		conns[i] = d.dialRegistry(t)
		t.Cleanup(func() { conns[i].Close() })
		if _, err := io.WriteString(conns[i], request(i)); err != nil {
			t.Fatal(err)
		}
		if _, err := conns[i].Write(body); err != nil {
			t.Fatal(err)
		}
	}
	if answered {
		for i, c := range conns {
			c.SetReadDeadline(time.Now().Add(time.Minute))
			line := make([]byte, len("HTTP/1.1 200"))
			if _, err := io.ReadFull(c, line); err != nil || string(line) != "HTTP/1.1 200" {
				t.Fatalf("connection %d: %s, %v", i, line, err)
			}
		}
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
	}
}

// pushed pushes a blob, and returns its digest.
func (d *daemon) pushed(t *testing.T, repository string, data []byte) digest.Digest {
	t.Helper()
	sum := sha256Of(data)
	d.require(t, http.StatusCreated, http.MethodPost, "/v2/"+repository+"/blobs/uploads/?digest="+sum.String(), data)
	return sum
}

// TestMemoryOfStalledReaders: whoever asks for a large blob and reads nothing of it costs
// the daemon next to nothing.
func TestMemoryOfStalledReaders(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	sum := d.pushed(t, "models", content(64<<20, 1))
	hangUp := d.stalled(t, 300, true, nil, func(int) string {
		return "GET /v2/models/blobs/" + sum.String() + " HTTP/1.1\r\nHost: " + d.host + "\r\n\r\n"
	})
	time.Sleep(time.Second / 2) // until all of them are stuck
	hangUp()
	d.requireMemory(t, memoryBound)
}

// TestMemoryOfStalledStreams is the same for the streams of HTTP/2: of one connection,
// and of ten. Streams that the daemon does not allow wait at the client.
func TestMemoryOfStalledStreams(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	u := newUser(t, &daemon{})
	u.certificates()
	d := startLean(t, []string{"--registry-cert", filepath.Join(u.dir, "server.crt"),
		"--registry-key", filepath.Join(u.dir, "server.key")})
	data := content(64<<20, 1)
	url, sum := "https://"+d.host+"/v2/models/blobs/", sha256Of(data).String()
	// Of one connection 240 streams are let in, of ten as many as there may be requests: 512.
	for _, load := range []struct{ connections, bound int }{{1, memoryBound}, {10, 256}} {
		t.Run(strconv.Itoa(load.connections), func(t *testing.T) {
			ctx, hangUp := context.WithCancel(t.Context())
			var asking sync.WaitGroup
			for i := range load.connections {
				client := streams()
				defer client.CloseIdleConnections()
				if i == 0 {
					answer, err := client.Post(url+"uploads/?digest="+sum, "", bytes.NewReader(data))
					if err != nil || answer.StatusCode != http.StatusCreated {
						t.Fatal(answer, err)
					}
					answer.Body.Close()
				}
				for range 240 {
					asking.Go(func() {
						r, _ := http.NewRequestWithContext(ctx, http.MethodGet, url+sum, nil)
						if answer, err := client.Do(r); err == nil {
							<-ctx.Done()
							answer.Body.Close()
						}
					})
				}
			}
			time.Sleep(2 * time.Second) // until as many are stuck as can be
			hangUp()
			asking.Wait()
			d.requireMemory(t, load.bound)
		})
	}
}

// streams returns a client that has all its requests on one connection of HTTP/2, and
// takes in little of the answers that nobody reads.
func streams() *http.Client {
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		Protocols:       new(http.Protocols),
		HTTP2:           &http.HTTP2Config{StrictMaxConcurrentRequests: true, MaxReceiveBufferPerStream: 64 << 10},
	}
	transport.Protocols.SetHTTP2(true)
	return &http.Client{Transport: transport}
}

// TestMemoryOfStalledManifests: answers that are made in memory do not stay there while
// nobody reads them.
func TestMemoryOfStalledManifests(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	manifest := []byte(
		fmt.Sprintf(
			`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"annotations":{"a":%q}}`, strings.Repeat("x", 4<<20-200)))
	d.require(t, http.StatusCreated, http.MethodPut, "/v2/models/manifests/v1", manifest)
	hangUp := d.stalled(t, 300, true, nil, func(int) string {
		return "GET /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host + "\r\n\r\n"
	})
	hangUp()
	d.requireMemory(t, memoryBound)
}

// TestMemoryOfStalledReferrers: neither do lists that are made of many manifests, and few are made at once.
func TestMemoryOfStalledReferrers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	subject := d.pushed(t, "models", []byte("{}"))
	for i := range 5 {
		manifest := []byte(
			fmt.Sprintf(
				`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"subject":{"mediaType":"a/b","digest":%q,"size":2},"annotations":{"a":%q}}`,
				subject, strings.Repeat(strconv.Itoa(i), 1<<20)))
		d.require(t, http.StatusCreated, http.MethodPut, "/v2/models/manifests/"+sha256Of(manifest).String(), manifest)
	}
	hangUp := d.stalled(t, 40, true, nil, func(int) string {
		return "GET /v2/models/referrers/" + subject.String() + " HTTP/1.1\r\nHost: " + d.host + "\r\n\r\n"
	})
	hangUp()
	d.requireMemory(t, memoryBound)
}

// TestMemoryOfHeldManifests: a manifest of which the end does not come waits elsewhere.
func TestMemoryOfHeldManifests(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	const size = 4 << 20
	head := fmt.Sprintf("PUT /v2/models/manifests/v1 HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", d.host, size)
	body := bytes.Repeat([]byte(" "), size-10)
	hangUp := d.stalled(t, 500, false, body, func(int) string { return head })
	hangUp()
	d.requireMemory(t, memoryBound)
}

// TestMemoryOfUnfinishedPushes: neither does a push that stops in the middle keep much.
func TestMemoryOfUnfinishedPushes(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	hangUp := d.stalled(t, 256, false, content(2<<20, 1), func(i int) string {
		method, path := "POST", "/v2/models/blobs/uploads/?digest="+digest.SHA256.FromString(strconv.Itoa(i)).String()
		if i%2 == 0 {
			method, path = "PATCH", d.beginUpload(t, "models")
		}
		return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", method, path, d.host, 1<<30)
	})
	hangUp()
	d.requireMemory(t, memoryBound)
}

// TestMemoryOfParallelPushes is of pushes that all go on.
func TestMemoryOfParallelPushes(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	d := startLean(t, nil)
	d.pushMany(t, 20)
	d.requireMemory(t, 128)
}

// pushMany pushes blobs of 40 MiB, all at once. Their bytes go to the connection as they
// are: each copy would take the race detector long.
func (d *daemon) pushMany(t *testing.T, n int) (sums []digest.Digest) {
	t.Helper()
	data := content(40<<20, 1)
	var pushing sync.WaitGroup
	for i := range n {
		own := bytes.Clone(data[:64])
		own[0] = byte(i)
		h := digest.SHA256.Hash()
		h.Write(own)
		h.Write(data[64:])
		sum := digest.Digest("sha256:" + digest.SHA256.Encode(h.Sum(nil)))
		sums = append(sums, sum)
		conn := d.dialRegistry(t)
		pushing.Go(func() {
			defer conn.Close()
			fmt.Fprintf(conn, "POST /v2/models/blobs/uploads/?digest=%s HTTP/1.1\r\nHost: %s\r\nContent-Length: "+
				"%d\r\n\r\n%s", sum, d.host, len(data), own)
			_, writeErr := conn.Write(data[64:])
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Errorf("push %d: %v, %v", i, err, writeErr)
				return
			}
			defer answer.Body.Close()
			if said, _ := io.ReadAll(answer.Body); answer.StatusCode != http.StatusCreated {
				t.Errorf("push %d: %s %s", i, answer.Status, said)
			}
		})
	}
	pushing.Wait()
	return sums
}

// TestMemoryInSmallContainer: in a control group of 128 MiB, pushes and pulls go on until
// they are done.
func TestMemoryInSmallContainer(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const limit = 128 << 20
	group, kills := newControlGroup(t, limit)
	d := startLean(t, nil, "sh", "-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(group, "cgroup.procs"))
	sums := d.pushMany(t, 20)
	var pulling sync.WaitGroup
	for i, sum := range sums {
		pulling.Go(func() {
			answer, err := direct.Get("http://" + d.host + "/v2/models/blobs/" + sum.String())
			if err != nil {
				t.Errorf("pull %d: %v", i, err)
				return
			}
			defer answer.Body.Close()
			v := sum.Verifier()
			if _, err := io.Copy(v, answer.Body); err != nil || !v.Verified() {
				t.Errorf("pull %d: %v", i, err)
			}
		})
	}
	pulling.Wait()
	if n := kills(); n != 0 {
		t.Errorf("%d processes were killed for want of memory", n)
	}
	d.requireMemory(t, 128)
}

// newControlGroup makes a control group whose processes may take limit bytes of memory, of
// version 2 or 1, whichever the machine has. kills says how many were killed in it.
func newControlGroup(t *testing.T, limit int) (dir string, kills func() int) {
	t.Helper()
	name := fmt.Sprintf("dfcache-test-%d", os.Getpid())
	var failed []error
	for _, version := range []struct{ root, limit, events string }{
		{"/sys/fs/cgroup", "memory.max", "memory.events"},
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control"},
	} {
		dir := filepath.Join(version.root, name)
		_, err := os.Stat(filepath.Join(version.root, "cgroup.procs"))
		if err == nil {
			err = os.Mkdir(dir, 0o755)
		}
		if err == nil {
			t.Cleanup(func() { os.Remove(dir) }) // when the daemon in it has ended
			err = os.WriteFile(filepath.Join(dir, version.limit), []byte(strconv.Itoa(limit)), 0)
		}
		if err != nil {
			failed = append(failed, err)
			continue
		}
		return dir, func() (n int) {
			events, err := os.ReadFile(filepath.Join(dir, version.events))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(events)) {
				fmt.Sscanf(line, "oom_kill %d", &n)
			}
			return n
		}
	}
	t.Fatalf("this test needs root and a control group of memory: %v", errors.Join(failed...))
	return "", nil
}
