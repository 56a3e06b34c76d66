package registry_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

func TestUnknownPaths(t *testing.T) {
	s := start(t, registry.Options{})
	for _, path := range []string{
		"/", "/v1/", "/v3/", "/v22/", "/V2/", "/v2/a", "/v2/a/", "/v2/a/tags", "/v2/a/tags/", "/v2/a/tags/list/",
		"/v2/a/b/c/d", "/v2/_catalog/", "/v2/_catalog/x", "/v2/a/uploads/", "/v2/a/uploads/x", "/metrics",
		"/v2/a/tags%2Flist",
		"/v2/a%2Fb/tags/list", "/v2/a%2fb/tags/list", "/v2/a/manifests%2Fv1", "/v2/x/blobs/uploads/a/b",
	} {
		for _, method := range []string{"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "TRACE"} {
			s.do(method, path, nil).fails(http.StatusNotFound, "UNSUPPORTED")
		}
	}
}

func TestMethods(t *testing.T) {
	s := start(t, registry.Options{})
	d := digest.SHA256.FromString("x").String()
	all := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"}
	for path, allow := range map[string]string{
		"/v2/":                   "GET, HEAD",
		"/v2/_catalog":           "GET, HEAD",
		"/v2/a/tags/list":        "GET, HEAD",
		"/v2/a/referrers/" + d:   "GET, HEAD",
		"/v2/a/manifests/v1":     "DELETE, GET, HEAD, PUT",
		"/v2/a/blobs/" + d:       "DELETE, GET, HEAD",
		"/v2/a/blobs/uploads/":   "GET, POST",
		"/v2/a/blobs/uploads/id": "DELETE, GET, HEAD, PATCH, PUT",
	} {
		for _, method := range all {
			a := s.do(method, path, nil)
			if strings.Contains(allow, method) {
				if a.status == http.StatusMethodNotAllowed {
					t.Errorf("%s %s is refused", method, path)
				}
				continue
			}
			a.fails(http.StatusMethodNotAllowed, "UNSUPPORTED", "Allow", allow)
		}
	}
}

// TestNames: every name of the specification is one, whatever words are in it.
func TestNames(t *testing.T) {
	s := start(t, registry.Options{})
	words := []string{"blobs", "manifests", "tags", "uploads", "referrers", "list", "v2"}
	var names []string
	for _, a := range words {
		names = append(names, a)
		for _, b := range words {
			names = append(names, "x/"+a+"/"+b)
		}
	}
	names = append(names, "blobs/uploads/manifests/v1", "a/blobs/uploads/tags/list", "dfcache/default",
		"a.b/c_d/e__f/g---h", strings.Repeat("a", 255))
	data := []byte("data")
	for _, name := range names {
		d := s.pushBlob(name, data)
		m := s.image(name, nil)
		manifest := s.pushManifest(name, "list", m)
		s.do("GET", "/v2/"+name+"/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
		s.do("GET", "/v2/"+name+"/manifests/list", nil).want(http.StatusOK).content(m)
		s.do("GET", "/v2/"+name+"/tags/list", nil).lists("tags", "list")
		s.do("GET", "/v2/"+name+"/referrers/"+manifest.String(), nil).referrers()
		path := s.begin(name)
		s.do("PATCH", path, data).want(http.StatusAccepted)
		s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-3")
		s.do("DELETE", path, nil).want(http.StatusNoContent)
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

func TestBadNames(t *testing.T) {
	s := start(t, registry.Options{})
	d := digest.SHA256.FromString("x").String()
	for _, name := range []string{
		"A", "a/B", "-a", "a-", "a..b", "a___b", "a._b", "a//b", "/a", "a/", "a/../b", "..", ".", "../../etc", "a%00b",
		"%2e%2e", "%2E%2E/a", "a%20b",
		"a%5cb", "a:b", "a@b", "%C3%A4", "a%25", "a%3Fb", "_catalog/a", strings.Repeat("a", 256), "~", "a%0d%0aX:%20y",
	} {
		for _, r := range []struct{ method, path string }{
			{"GET", "/tags/list"},
			{"GET", "/manifests/v1"},
			{"PUT", "/manifests/v1"},
			{"HEAD", "/blobs/" + d},
			{"GET", "/blobs/" + d},
			{"GET", "/referrers/" + d},
			{"POST", "/blobs/uploads/"},
			{"PATCH", "/blobs/uploads/x"},
		} {
			s.do(r.method, "/v2/"+name+r.path, nil).fails(http.StatusBadRequest, "NAME_INVALID")
		}
	}
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) == 0 {
		t.Fatalf("%v, %v", entries, err)
	}
}

// TestRequestsByHand: what a Go client would not send.
func TestRequestsByHand(t *testing.T) {
	s := start(t, registry.Options{})
	for request, status := range map[string]int{
		"GET /v2/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n":  404,
		"GET /v2/../v2/a/tags/list HTTP/1.1\r\nHost: x\r\n\r\n": 400,
		"GET //v2/a/tags/list HTTP/1.1\r\nHost: x\r\n\r\n":      404,
		"GET /v2//tags/list HTTP/1.1\r\nHost: x\r\n\r\n":        400,
		"GET /v2/a/./tags/list HTTP/1.1\r\nHost: x\r\n\r\n":     400,
		"GET http://other/v2/ HTTP/1.1\r\nHost: x\r\n\r\n":      200,
		"GET * HTTP/1.1\r\nHost: x\r\n\r\n":                     404,
		"GET /v2/a/manifests/v1%zz HTTP/1.1\r\nHost: x\r\n\r\n": 400,
		"GET /v2/ HTTP/1.1\r\n\r\n":                             400,
		"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 2<<20) +
			"\r\n\r\n": 431,
		"GET /v2/" + strings.Repeat("a/", 1<<19) +
			"tags/list HTTP/1.1\r\nHost: x\r\n\r\n": 400,
		"PATCH /v2/a/blobs/uploads/x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n": 400,
		"PATCH /v2/a/blobs/uploads/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: " +
			"3\r\n\r\n0\r\n\r\n": 404,
		"PUT /v2/a/manifests/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n": 400,
	} {
		c := s.dial()
		if _, err := fmt.Fprint(c, request); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(c.in, nil)
		if err != nil {
			t.Errorf("%.100q: %v", request, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("%.100q: status %d, want %d", request, resp.StatusCode, status)
		}
		c.Close()
	}
	s.do("GET", "/v2/", nil).want(http.StatusOK)
}

// TestOtherOrigins: pages of other origins get nothing, can change nothing, and can't have anything
// fetched from peers: the browser has the rights of its user.
func TestOtherOrigins(t *testing.T) {
	s := start(t, registry.Options{})
	d := s.pushBlob("a", []byte("data"))
	for _, header := range [][]string{{"Sec-Fetch-Site", "cross-site"}, {"Origin", "https://example.com"},
		{"Origin", "null"}} {
		for _, r := range []struct{ method, path string }{
			{"POST", "/v2/a/blobs/uploads/"}, {"PUT", "/v2/a/manifests/v1"}, {"PATCH", "/v2/a/blobs/uploads/x"},
			{"DELETE", "/v2/a/blobs/" + d.String()},
			{"GET", "/v2/a/blobs/" + d.String()}, {"GET", "/v2/"}, {"OPTIONS", "/v2/"},
		} {
			s.do(r.method, r.path, nil, header...).fails(http.StatusForbidden, "DENIED")
		}
		s.do("HEAD", "/v2/a/blobs/"+d.String(), nil, header...).want(
			http.StatusForbidden, "Access-Control-Allow-Origin", "")
	}
	s.do("GET", "/v2/a/blobs/"+d.String(), nil, "Sec-Fetch-Site", "none").want(http.StatusOK)
	s.do("DELETE", "/v2/a/blobs/"+d.String(), nil, "Sec-Fetch-Site", "same-origin").want(http.StatusAccepted)
}

// TestNoScripts: what is pushed as a web page is none in a browser.
func TestNoScripts(t *testing.T) {
	s := start(t, registry.Options{})
	s.do("PUT", "/v2/a/manifests/v1", []byte(`{"x":"<script>alert(1)</script>"}`), "Content-Type", "text/html").want(
		http.StatusCreated)
	s.do("GET", "/v2/a/manifests/v1", nil).
		want(http.StatusOK, "Content-Type", "text/html", "X-Content-Type-Options", "nosniff", "Content-Security-Policy",
			"default-src 'none'; sandbox")
}

// TestHTTP2 goes the way of TLS, where bytes do not stay in the kernel.
func TestTLS(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		s := start(t, registry.Options{})
		s.http.Close()
		s.http = httptest.NewUnstartedServer(s.handler)
		s.http.EnableHTTP2 = http2
		s.http.StartTLS()
		t.Cleanup(s.http.Close)
		for _, n := range []int{0, 1, 1000, 3 << 20} {
			data := content(n, 1)
			d := s.pushBlob("a", data)
			s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK, "Content-Length", size(data)).content(data)
			if n > 1 {
				s.do("GET", "/v2/a/blobs/"+d.String(), nil, "Range", "bytes=1-").want(
					http.StatusPartialContent).content(data[1:])
			}
		}
		s.pushManifest("a", "v1", s.image("a", nil))
		s.do("HEAD", "/v2/a/manifests/v1", nil).want(http.StatusOK).content(nil)
		s.do("HEAD", "/v2/a/manifests/v2", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
		// A damaged blob is broken off here, too.
		data := content(1<<20, 2)
		d := s.pushBlob("a", data)
		s.damage(d)
		if a := s.do("GET", "/v2/a/blobs/"+d.String(), nil); a.err == nil {
			t.Errorf("HTTP/2 %v: a damaged blob was sent: %d bytes", http2, len(a.body))
		}
		// Nobody waits for the timeout of a request that is cancelled.
		path := s.begin("a")
		body := &gate{reading: make(chan struct{}), done: make(chan struct{})}
		sent := make(chan *answer, 1)
		go func() {
			a, err := s.try("PATCH", path, body)
			if err != nil {
				t.Error(err)
			}
			sent <- a
		}()
		<-body.reading
		s.do("DELETE", path, nil).want(http.StatusNoContent)
		if a := <-sent; a != nil && a.status != http.StatusNotFound {
			t.Errorf("PATCH: %d %s", a.status, a.body)
		}
		body.Close()
	}
}

// gate is a body that gives one byte, and then nothing until it is closed.
type gate struct {
	reading chan struct{} // closed when more is wanted
	done    chan struct{}
	given   bool
	once    sync.Once
}

func (g *gate) Read(p []byte) (int, error) {
	if !g.given {
		g.given = true
		return copy(p, "x"), nil
	}
	close(g.reading)
	<-g.done
	return 0, errors.New("closed")
}

func (g *gate) Close() error {
	g.once.Do(func() { close(g.done) })
	return nil
}

// FuzzServe: no path and no header makes the registry fail, or redirect.
func FuzzServe(f *testing.F) {
	store, err := blobstore.Open(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	defer store.Close()
	h := registry.New(store, registry.Options{MaxUploads: 1 << 30})
	defer h.Close()
	d := digest.SHA256.FromString("").String()
	for _, path := range []string{
		"/v2/", "/v2/a/tags/list?n=1&last=x", "/v2/_catalog?n=0", "/v2/a/../b/manifests/v1", "/v2/a%2Fb/blobs/x",
		"/v2/a/blobs/" + d, "/v2/a/manifests/sha256:x?tag=a",
		"/v2/a/blobs/uploads/?mount=" + d + "&from=b", "/v2/a/blobs/uploads/?digest=" + d,
		"/v2/a/referrers/" + d + "?artifactType=x", "/v2/%00/tags/list",
	} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
			f.Add(method, path, "bytes=0-1", "0-1", "")
		}
	}
	f.Fuzz(func(t *testing.T, method, path, header, contentRange, body string) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			return
		}
		r := httptest.NewRequest("GET", "/", strings.NewReader(body))
		r.Method, r.URL = method, u
		r.Header.Set("Range", header)
		r.Header.Set("Content-Range", contentRange)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= 500 || w.Code/100 == 3 {
			t.Errorf("%q %q: %d %s", method, path, w.Code, w.Body)
		}
		if w.Code >= 400 && method != "HEAD" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%q %q: %d with the body %s", method, path, w.Code, w.Body)
		}
		// What is sent is well-formed, whatever came.
		var raw strings.Builder
		w.Result().Write(&raw)
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(raw.String())), r)
		if err != nil {
			t.Fatalf("%q %q: %v in %q", method, path, err, raw.String())
		}
		resp.Body.Close()
	})
}
