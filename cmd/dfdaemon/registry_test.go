package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

// client leaves no connections behind.
func client(t *testing.T) *http.Client {
	transport := &http.Transport{ExpectContinueTimeout: time.Hour}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// pushing is a request with a body that a test writes.
type pushing struct {
	body   *io.PipeWriter
	result chan int // the status, or 0
}

// push begins a push of content and returns when the registry reads it. first
// has been sent then.
func (r *running) push(method, url, first string) *pushing {
	r.t.Helper()
	body, w := io.Pipe()
	p := &pushing{body: w, result: make(chan int, 1)}
	r.t.Cleanup(func() { w.CloseWithError(errors.New("the test is over")) })
	reads := make(chan struct{})
	ctx := httptrace.WithClientTrace(r.t.Context(), &httptrace.ClientTrace{Got100Continue: func() { close(reads) }})
	request, err := http.NewRequestWithContext(ctx, method, r.registry+url, body)
	if err != nil {
		r.t.Fatal(err)
	}
	request.Header.Set("Expect", "100-continue")
	request.Header.Set("Content-Type", "application/octet-stream")
	c := client(r.t)
	go func() {
		response, err := c.Do(request)
		if err != nil {
			body.CloseWithError(err)
			p.result <- 0
			return
		}
		response.Body.Close()
		body.CloseWithError(errors.New(response.Status))
		p.result <- response.StatusCode
	}()
	select {
	case <-reads:
	case status := <-p.result:
		r.t.Fatalf("%s %s: status %d", method, url, status)
	}
	if _, err := io.WriteString(w, first); err != nil {
		r.t.Fatal(err)
	}
	return p
}

// wantFailed checks, after the daemon's end, that the push did not outlive it.
func (p *pushing) wantFailed(t *testing.T) {
	t.Helper()
	p.body.CloseWithError(errors.New("the test is over")) // net/http waits for it
	if status := <-p.result; status != 0 && status < 400 {
		t.Errorf("the push has status %d", status)
	}
}

// begin begins an upload session and returns its path.
func (r *running) begin() string {
	r.t.Helper()
	response, err := client(r.t).Post(r.registry+"/v2/models/blobs/uploads/", "", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	response.Body.Close()
	path := response.Header.Get("Location")
	if response.StatusCode != http.StatusAccepted || !strings.HasPrefix(path, "/") {
		r.t.Fatalf("begin of an upload: %s, Location %q", response.Status, path)
	}
	return path
}

const twoParts = "first, second"

var twoPartsURL = "/v2/models/blobs/uploads/?digest=" + digest.SHA256.FromBytes([]byte(twoParts)).String()

// A push that is running when the daemon is told to stop is let end. An upload
// session that no request uses is not waited for.
func TestGracefulStopOfPush(t *testing.T) {
	r := launch(t, "--shutdown-timeout", "0")
	idle := r.begin()
	if status := func() int {
		p := r.push("PATCH", idle, "half of something")
		p.body.Close()
		return <-p.result
	}(); status != http.StatusAccepted {
		t.Fatalf("PATCH: %d", status)
	}
	p := r.push("POST", twoPartsURL, "first, ")
	r.signal()
	r.waitLog("msg=stop ")
	if _, err := io.WriteString(p.body, "second"); err != nil {
		t.Fatal(err)
	}
	p.body.Close()
	if status := <-p.result; status != http.StatusCreated {
		t.Errorf("status %d", status)
	}
	r.wantExit(0)
	r.wantStored(len(twoParts))
}

// So is a pull.
func TestGracefulStopOfPull(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	r := launch(t, "--shutdown-timeout", "0")
	content := bytes.Repeat([]byte("more than fits into the buffers of a connection. "), 1<<20)
	want := digest.SHA256.FromBytes(content)
	p := r.push("POST", "/v2/models/blobs/uploads/?digest="+want.String(), "")
	if _, err := p.body.Write(content); err != nil {
		t.Fatal(err)
	}
	p.body.Close()
	if status := <-p.result; status != http.StatusCreated {
		t.Fatalf("push: status %d", status)
	}
	response, err := client(t).Get(r.registry + "/v2/models/blobs/" + want.String())
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	r.signal()
	r.waitLog("msg=stop ")
	got, err := io.ReadAll(response.Body)
	if err != nil || digest.SHA256.FromBytes(got) != want {
		t.Errorf("%d of %d bytes came, %v", len(got), len(content), err)
	}
	r.wantExit(0)
}

func TestSecondSignalDuringPush(t *testing.T) {
	r := launch(t, "--shutdown-timeout", "0")
	p := r.push("POST", twoPartsURL, "first, ")
	r.signal()
	r.waitLog("msg=stop ")
	r.signal()
	r.wantExit(130)
	p.wantFailed(t)
	r.wantStored(0)
}

func TestShutdownTimeoutDuringPush(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	r := launch(t, "--shutdown-timeout", "10ms")
	p := r.push("PATCH", r.begin(), "first, ")
	r.signal()
	r.wantExit(5)
	p.wantFailed(t)
	r.wantStored(0)
}

// An upload that nobody goes on with is dropped.
func TestUploadTimeout(t *testing.T) {
	r := launch(t, "--registry-upload-timeout", "20ms")
	session := r.begin()
	r.waitLog(`msg="upload expired"`)
	response, err := client(t).Get(r.registry + session)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusNotFound {
		t.Errorf("the upload is still there: %s", response.Status)
	}
	r.signal()
	r.wantExit(0)
}

// Where nobody has said where the registry is to be, another one there is no
// reason to fail.
func TestDefaultAddressTaken(t *testing.T) {
	const address = "127.0.0.1:65001"
	// Any daemon that runs here will do, too.
	if l, err := net.Listen("tcp", address); err == nil {
		defer l.Close()
	} else if !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatal(err)
	}
	t.Setenv("DFDAEMON_REGISTRY", "") // as if it was not set
	r := launch(t)
	r.signal()
	r.wantExit(0)
	if r.registry != "off" {
		t.Errorf("the registry is %s", r.registry)
	}
	const want = "dfdaemon: warning: going on without a registry: listen tcp4 " + address +
		": bind: address already in use: choose another address with --registry, or --registry off\n"
	if !strings.Contains(r.stderr.String(), want) {
		t.Errorf("stderr: %s", &r.stderr)
	}
}

// A request's header is bounded.
func TestLongHeader(t *testing.T) {
	r := launch(t)
	for size, want := range map[int]int{
		maxHeader / 2: http.StatusOK, 2 * maxHeader: http.StatusRequestHeaderFieldsTooLarge} {
		request, err := http.NewRequest("GET", r.registry+"/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-Long", strings.Repeat("x", size))
		response, err := client(t).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("a header of %d bytes: %s", size, response.Status)
		}
	}
	r.signal()
	r.wantExit(0)
}

// listening returns a registry of a new store that listens at any port. The caller closes it.
func listening(t *testing.T, o registryOptions) *registryServer {
	t.Helper()
	store, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	root := newRoot()
	root.SetContext(t.Context())
	o.address, o.uploadTimeout = "127.0.0.1:0", time.Hour
	s, err := o.prepare(root)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if err := s.readFiles(log); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.listen(store, log, func(text string) { t.Error(text) }); !ok {
		t.Fatal(err)
	}
	return s
}

// What the daemon closes is closed: nothing of it listens, or runs, afterwards.
func TestClose(t *testing.T) {
	s := listening(t, registryOptions{})
	s.close()
	if c, err := net.Dial("tcp", s.listener.Addr().String()); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}

// How many requests one connection of HTTP/2 may have is bounded, and said.
func TestStreams(t *testing.T) {
	var o registryOptions
	o.cert, o.key = writeCertificate(t, t.TempDir(), "one")
	s := listening(t, o)
	served := make(chan error, 1)
	go func() { served <- s.serve() }()
	defer func() {
		s.close()
		<-served
	}()
	c, err := tls.Dial("tcp", s.listener.Addr().String(),
		&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	const settings, streams = 4, 3 // RFC 9113
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		t.Fatal(err)
	}
	header := make([]byte, 9)
	if _, err := io.ReadFull(c, header); err != nil || header[3] != settings {
		t.Fatalf("it begins with %x, %v", header, err)
	}
	values := make([]byte, binary.BigEndian.Uint32(append([]byte{0}, header[:3]...)))
	if _, err := io.ReadFull(c, values); err != nil {
		t.Fatal(err)
	}
	for ; len(values) >= 6; values = values[6:] {
		if binary.BigEndian.Uint16(values) == streams {
			if n := binary.BigEndian.Uint32(values[2:]); n != maxStreams {
				t.Errorf("%d requests at once, want %d", n, maxStreams)
			}
			return
		}
	}
	t.Error("the number of requests is not bounded")
}

func TestTLSVersion(t *testing.T) {
	certFile, keyFile := writeCertificate(t, t.TempDir(), "one")
	s := &registryServer{registryOptions: registryOptions{cert: certFile, key: keyFile}}
	s.rights.Read, s.rights.Write = registry.Anyone, registry.Anyone
	if err := s.readFiles(slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for version, ok := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		near, far := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			tls.Server(far, s.tls).Handshake()
			far.Close()
		}()
		c := tls.Client(near, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
		err := c.Handshake()
		if (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		near.Close()
		<-done
	}
}
