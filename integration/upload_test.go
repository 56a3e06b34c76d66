package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// beginUpload begins an upload in a repository and returns its location.
func (d *daemon) beginUpload(t *testing.T, repository string) string {
	t.Helper()
	answer, body := d.ask(t, http.MethodPost, "/v2/"+repository+"/blobs/uploads/", nil)
	if answer.StatusCode != http.StatusAccepted {
		t.Fatalf("begin an upload: %s %s", answer.Status, body)
	}
	return answer.Header.Get("Location")
}

// require sends a request and fails the test unless the answer has this status.
func (d *daemon) require(t *testing.T, status int, method, path string, body []byte, headers ...string) http.Header {
	t.Helper()
	answer, got := d.ask(t, method, path, bytes.NewReader(body), headers...)
	if answer.StatusCode != status {
		t.Fatalf("%s %s: %s, want %d: %s", method, path, answer.Status, status, got)
	}
	return answer.Header
}

// breakOff begins to send a chunk of size bytes, and hangs up after data.
func (d *daemon) breakOff(t *testing.T, method, path string, data []byte, size int) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.Replace(d.host, "localhost", "127.0.0.1", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// Whose connection it is can be told only while it is open: nothing is sent before the
	// registry asks for it.
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n",
		method, path, d.host, size); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "100") {
		t.Fatalf("%s %s: %q, %v; want to be asked for more", method, path, line, err)
	}
	if _, err := conn.Write(data); err != nil {
		t.Fatal(err)
	}
}

// ingested returns how many bytes of unfinished content the daemon has on disk.
func (d *daemon) ingested(t *testing.T) (n int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(d.home, "data", "ingest", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil { // it may be gone by now
			n += info.Size()
		}
	}
	return n
}

// TestResumedUpload: a chunk breaks off in the middle, more than once. The
// client asks how far it came and goes on from there.
func TestResumedUpload(t *testing.T) {
	d, u := start(t)
	data := content(5<<20, 1)
	location := d.beginUpload(t, "models")
	sent := 0
	for _, n := range []int{2, 1 << 20, 70_001, 2 << 20} {
		d.breakOff(t, http.MethodPatch, location, data[sent:sent+n], len(data)-sent)
		sent += n
		within(t, "what was sent has arrived", func() bool {
			got := d.require(t, http.StatusNoContent, http.MethodGet, location, nil)
			location = got.Get("Location")
			return got.Get("Range") == fmt.Sprintf("0-%d", sent-1)
		})
		// Anywhere else it does not go on, and that changes nothing.
		for _, off := range []int{0, sent - 1, sent + 1} {
			if off == sent {
				continue
			}
			header := fmt.Sprintf("%d-%d", off, off+9)
			answer := d.require(t, http.StatusRequestedRangeNotSatisfiable, http.MethodPatch, location,
				data[off:off+10], "Content-Range", header)
			if got := answer.Get("Range"); got != fmt.Sprintf("0-%d", sent-1) {
				t.Errorf("a chunk at %d is refused with Range %s", off, got)
			}
		}
	}
	d.require(t, http.StatusAccepted, http.MethodPatch, location, data[sent:sent+1000],
		"Content-Range", fmt.Sprintf("%d-%d", sent, sent+999))
	sent += 1000
	d.require(t, http.StatusCreated, http.MethodPut, location+"?digest="+sha256Of(data).String(), data[sent:],
		"Content-Range", fmt.Sprintf("%d-%d", sent, len(data)-1))
	u.run("oras", "blob", "fetch", d.host+"/models@"+sha256Of(data).String(), "-o", "out")
	u.has("out", data)
	if s := u.stat("models", sha256Of(data).String()); s.Size != int64(len(data)) || !s.Local {
		t.Errorf("stat: %+v", s)
	}
	d.require(t, http.StatusNotFound, http.MethodGet, location, nil)

	// What broke off in the one request that has all of it can be sent again.
	other := content(1<<20, 2)
	location = d.beginUpload(t, "models")
	put := location + "?digest=" + sha256Of(other).String()
	d.breakOff(t, http.MethodPut, put, other[:500_000], len(other))
	d.require(t, http.StatusCreated, http.MethodPut, put, other)
	if got := u.export("models", sha256Of(other).String()); !bytes.Equal(got, other) {
		t.Errorf("the export has %d bytes", len(got))
	}
}

// TestWrongUpload: what does not have its digest is not stored.
func TestWrongUpload(t *testing.T) {
	d, u := startWithUser(t)
	data := content(1<<20, 1)
	wrong := "?digest=" + sha256Of(content(1<<20, 2)).String()
	d.require(t, http.StatusBadRequest, http.MethodPost, "/v2/models/blobs/uploads/"+wrong, data)
	d.require(t, http.StatusBadRequest, http.MethodPut, d.beginUpload(t, "models")+wrong, data)
	location := d.beginUpload(t, "models")
	d.require(t, http.StatusAccepted, http.MethodPatch, location, data)
	d.require(t, http.StatusBadRequest, http.MethodPut, location+wrong, nil)
	if blobs := d.blobs(t); len(blobs) > 0 || d.ingested(t) > 0 {
		t.Errorf("there is %v", blobs)
	}
	if list := u.list("models"); len(list) > 0 {
		t.Errorf("there is %v", list)
	}
}

// TestCancelledUpload: an upload that its client cancels leaves nothing, also
// while a chunk is on its way.
func TestCancelledUpload(t *testing.T) {
	d, _ := startWithUser(t)
	location := d.beginUpload(t, "models")
	d.require(t, http.StatusAccepted, http.MethodPatch, location, content(1<<20, 1))
	within(t, "the chunk is on disk", func() bool { return d.ingested(t) == 1<<20 })
	d.require(t, http.StatusNoContent, http.MethodDelete, location, nil)
	d.require(t, http.StatusNotFound, http.MethodGet, location, nil)
	d.require(t, http.StatusNotFound, http.MethodDelete, location, nil)
	d.require(t, http.StatusNotFound, http.MethodPatch, location, []byte("more"))
	d.require(t, http.StatusNotFound, http.MethodPut, location+"?digest="+sha256Of(content(1<<20, 1)).String(), nil)

	location = d.beginUpload(t, "models")
	body, end := io.Pipe()
	patched := make(chan int, 1)
	go func() {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPatch, "http://"+d.host+location, body)
		if err == nil {
			var answer *http.Response
			if answer, err = direct.Do(r); err == nil {
				answer.Body.Close()
				patched <- answer.StatusCode
				return
			}
		}
		patched <- -1 // the connection was cut
	}()
	if _, err := end.Write(content(300_000, 2)); err != nil {
		t.Fatal(err)
	}
	within(t, "the chunk is on its way", func() bool { return d.ingested(t) > 0 })
	d.require(t, http.StatusNoContent, http.MethodDelete, location, nil)
	if code := <-patched; code != http.StatusNotFound && code != -1 {
		t.Errorf("the chunk of a cancelled upload is answered with %d", code)
	}
	end.Close()
	if n := d.ingested(t); n > 0 {
		t.Errorf("%d bytes are left", n)
	}
}

// TestExpiredUpload: what a client has given up is removed after a while.
func TestExpiredUpload(t *testing.T) {
	d, u := start(t, "--registry-upload-timeout", "100ms")
	location := d.beginUpload(t, "models")
	d.require(t, http.StatusAccepted, http.MethodPatch, location, content(1<<20, 1))
	within(t, "the upload has expired", func() bool { return d.ingested(t) == 0 })
	d.require(t, http.StatusNotFound, http.MethodPatch, location, []byte("more"))
	u.write("model.bin", content(1<<20, 1))
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
}

// TestUploadOfDeadDaemon: an upload ends with its daemon, and what it had sent is removed.
func TestUploadOfDeadDaemon(t *testing.T) {
	d, u := start(t)
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		location := d.beginUpload(t, "models")
		d.require(t, http.StatusAccepted, http.MethodPatch, location, content(1<<20, 1))
		d.stop(t, signal)
		if left := d.ingested(t); (left > 0) != (signal == syscall.SIGKILL) {
			t.Errorf("after %v there are %d bytes", signal, left)
		}
		*d = *startDaemon(t, d.home)
		requireNoIngest(t, filepath.Join(d.home, "data"))
		d.require(t, http.StatusNotFound, http.MethodGet, location, nil)
	}
	u.write("model.bin", content(1<<20, 1))
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
}

// TestPushesAreLimited: blobs and unfinished uploads together take no more than
// --max-size. An upload that does not fit stays, with what it has, until its client ends it.
func TestPushesAreLimited(t *testing.T) {
	d, u := start(t, "--max-size", "4MiB")
	first, second, large := content(2<<20, 1), content(1<<20, 2), content(5<<19, 3)
	u.write("first.bin", first)
	u.write("second.bin", second)
	u.write("large.bin", large)
	u.run("oras", "push", d.host+"/models:v1", "first.bin")
	u.fails("no space left", "oras", "push", d.host+"/models:v2", "large.bin")
	location := d.beginUpload(t, "models")
	d.require(t, http.StatusAccepted, http.MethodPatch, location, large[:3<<19])
	u.fails("no space left", "oras", "push", d.host+"/models:v2", "second.bin") // the upload has the room
	// A chunk may be taken in when it has just arrived. The upload is refused at its end then.
	answer, body := d.ask(t, http.MethodPatch, location, bytes.NewReader(large[3<<19:]))
	if answer.StatusCode == http.StatusAccepted {
		answer, body = d.ask(t, http.MethodPut, location+"?digest="+sha256Of(large).String(), nil)
	}
	if answer.StatusCode != http.StatusInsufficientStorage {
		t.Errorf("an upload that does not fit: %s %s", answer.Status, body)
	}
	d.require(t, http.StatusNoContent, http.MethodDelete, location, nil)
	within(t, "what did not fit is gone", func() bool { return d.ingested(t) == 0 })
	u.run("oras", "push", d.host+"/models:v2", "second.bin")
	u.fails("no space left", "dfcache", "import", "-i", "v3", "large.bin")
	u.run("dfcache", "delete", "-t", "models", "-i", "v1")
	u.run("oras", "push", d.host+"/models:v3", "large.bin")
	u.run("oras", "pull", d.host+"/models:v3", "-o", "out")
	u.has("out/large.bin", large)
}

// TestHostileRequests: whatever a request tries, the answer says no, the daemon
// goes on, and nothing has changed.
func TestHostileRequests(t *testing.T) {
	d, u := start(t)
	u.write("model.bin", []byte("model"))
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
	if err := os.WriteFile(filepath.Join(d.home, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := d.blobs(t)
	list := u.run("dfcache", "list")

	paths := []string{
		"/../../../../etc/passwd", "/v2/../secret", "/v2/..%2f..%2fsecret", "/v2/%2e%2e/%2e%2e/secret", "//etc/passwd",
		"/v2/../../secret/tags/list", "/v2/models/../../secret/manifests/v1", "/v2/models/manifests/../../secret",
		"/v2/models/manifests/..%2f..%2fsecret", "/v2/models/manifests/%2e%2e", "/v2/models/manifests/v1%00",
		"/v2/models/manifests/v1/../v1",
		"/v2/models/blobs/../../../../secret", "/v2/models/blobs/..", "/v2/models/blobs/sha256:../../../secret",
		"/v2/models/blobs/sha256:..%2f..%2f..%2fsecret", "/v2/models/blobs/sha256:" + strings.Repeat("A", 64),
		"/v2/models/blobs/sha256:",
		"/v2/models/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", "/v2/models/blobs/%73ha256:../x",
		"/v2/models/blobs/" + strings.Repeat("a", 20_000),
		"/v2/models/blobs/uploads/../../../secret", "/v2/models/blobs/uploads/..%2f..%2fsecret",
		"/v2/models/blobs/uploads/%00",
		"/v2/" + strings.Repeat("a/", 10_000) + "tags/list", "/v2/" + strings.Repeat("a", 300) + "/tags/list",
		"/v2/MODELS/manifests/v1", "/v2/models%20/manifests/v1", "/v2/models\\..\\secret/manifests/v1",
		"/v2/-models/manifests/v1",
		"/v2/models//manifests/v1", "/v2//models/manifests/v1", "/v2/models/./manifests/v1",
		"/v2/dfcache/default/../x/manifests/v1",
		"/v2/models/referrers/../manifests/v1", "/v2/models/tags/list/../../../secret", "/v2/_catalog/../../secret",
		"/secret", "/metrics", "/debug/pprof/", "/",
	}
	for _, path := range paths {
		for _, method := range []string{"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"} {
			status, body := d.raw(t, method+" "+path+" HTTP/1.1\r\nHost: "+d.host+
				"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			if status < 400 || status >= 500 || bytes.Contains(body, []byte("secret\"")) ||
				bytes.Contains(body, []byte("root:")) {
				t.Errorf("%s %.80s: %d %.200s", method, path, status, body)
			}
		}
	}

	digest := sha256Of([]byte("model")).String()
	requests := []struct {
		what   string
		status int
		text   string
	}{
		{"another host", 421, "GET /v2/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"},
		{"no host", 400, "GET /v2/ HTTP/1.1\r\n\r\n"},
		{"a page of another site", 403, "POST /v2/models/blobs/uploads/ HTTP/1.1\r\nHost: " + d.host +
			"\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n\r\n"},
		{"a page of another site, to delete", 403,
			"DELETE /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host + "\r\nSec-Fetch-Site: cross-site\r\n\r\n"},
		{"a page of another site, to read", 403,
			"GET /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host + "\r\nSec-Fetch-Site: cross-site\r\n\r\n"},
		{"a mount from a path", 202, "POST /v2/models/blobs/uploads/?mount=sha256:" + strings.Repeat("0", 64) +
			"&from=../../secret HTTP/1.1\r\nHost: " + d.host + "\r\nContent-Length: 0\r\n\r\n"},
		{"a mount of a path", 400, "POST /v2/models/blobs/uploads/?mount=../../secret&from=models HTTP/1.1\r\nHost: " +
			d.host + "\r\nContent-Length: 0\r\n\r\n"},
		{"a tag that is a path", 400, "PUT /v2/models/manifests/" + digest + "?tag=../../x HTTP/1.1\r\nHost: " +
			d.host + "\r\nContent-Length: 2\r\n\r\n{}"},
		{"large headers", 431, "GET /v2/ HTTP/1.1\r\nHost: " + d.host + "\r\nX: " + strings.Repeat("x", 100_000) +
			"\r\n\r\n"},
		{"no HTTP", 400, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"},
		{"two lengths", 400, "POST /v2/models/blobs/uploads/ HTTP/1.1\r\nHost: " + d.host +
			"\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nhello"},
		{"a manifest that is too large", 413,
			"PUT /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host + "\r\nContent-Length: 4194305\r\n\r\n"},
		{"a manifest of a size that is not said", 413, "PUT /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host +
			"\r\nTransfer-Encoding: chunked\r\n\r\n400001\r\n" + strings.Repeat(" ", 0x400001) + "\r\n0\r\n\r\n"},
		{"a manifest that is none", 400,
			"PUT /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host + "\r\nContent-Length: 4\r\n\r\nevil"},
		{"a manifest of nothing", 404, "PUT /v2/models/manifests/v1 HTTP/1.1\r\nHost: " + d.host +
			"\r\nContent-Length: 127\r\n\r\n" +
			fmt.Sprintf("%-127s", `{"schemaVersion":2,"config":{"digest":"sha256:`+strings.Repeat("0", 64)+`"}}`)},
		{"a chunk at an overflow", 400, "PATCH " + d.beginUpload(t, "models") + " HTTP/1.1\r\nHost: " + d.host +
			"\r\nContent-Range: 0-99999999999999999999\r\nContent-Length: 1\r\n\r\nx"},
		{"a range at an overflow", 416, "GET /v2/models/blobs/" + digest + " HTTP/1.1\r\nHost: " + d.host +
			"\r\nRange: bytes=99999999999999999999-\r\n\r\n"},
	}
	for _, r := range requests {
		if status, body := d.raw(t, r.text); status != r.status {
			t.Errorf("%s: %d, want %d: %.300s", r.what, status, r.status, body)
		}
	}
	if now := d.blobs(t); !slices.Equal(now, before) {
		t.Errorf("the blobs were %v and are %v", before, now)
	}
	if now := u.run("dfcache", "list"); now != list {
		t.Errorf("the list was\n%s\nand is\n%s", list, now)
	}
	u.run("oras", "pull", d.host+"/models:v1", "-o", "out")
	u.has("out/model.bin", []byte("model"))
}

// raw sends bytes to the daemon's registry, and returns the status and the body
// of the answer.
func (d *daemon) raw(t *testing.T, text string) (status int, body []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.Replace(d.host, "localhost", "127.0.0.1", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go io.WriteString(conn, text) // the daemon need not read all of it
	method, _, _ := strings.Cut(text, " ")
	answer, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Errorf("%.80q: %v", text, err)
		return 0, nil
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(answer.Body)
	if err != nil {
		t.Errorf("%.80q: %v", text, err)
	}
	return answer.StatusCode, body
}
