package registry_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// streamed hides the length of a body: it is sent with Transfer-Encoding chunked.
func streamed(data []byte) io.Reader { return struct{ io.Reader }{bytes.NewReader(data)} }

// TestPushInEveryWay: what the clients do, for each of the algorithms, with and
// without saying which it will be.
func TestPushInEveryWay(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := start(t, registry.Options{})
	patch := func(path string, body any, header ...string) string {
		t.Helper()
		return s.do("PATCH", path, body, header...).want(http.StatusAccepted, "Content-Length", "0").header.Get(
			"Location")
	}
	seed := byte(0)
	for _, n := range []int{0, 1000, 300_000} {
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			for _, begin := range []string{"", "?digest-algorithm=" + alg.String(), "?digest-algorithm=sha256"} {
				for name, push := range map[string]func(path, query string, data []byte) *answer{
					"oras and containerd: PUT": func(path, query string, data []byte) *answer {
						return s.do("PUT", path+query, data, "Content-Type", "application/octet-stream")
					},
					"PUT as a stream": func(path, query string, data []byte) *answer {
						return s.do("PUT", path+query, streamed(data))
					},
					"crane: PATCH, PUT": func(path, query string, data []byte) *answer {
						return s.do("PUT", patch(path, data)+query, nil)
					},
					"Docker: PATCH as a stream, PUT": func(path, query string, data []byte) *answer {
						return s.do("PUT", patch(path, streamed(data))+query, nil)
					},
					"regctl: chunks with ranges, PUT": func(path, query string, data []byte) *answer {
						for off := 0; off < len(data); off += len(data)/3 + 1 {
							chunk := data[off:min(len(data), off+len(data)/3+1)]
							path = patch(path, chunk, "Content-Range", fmt.Sprintf("%d-%d", off, off+len(chunk)-1),
								"Content-Type", "application/octet-stream")
						}
						return s.do("PUT", path+query, nil)
					},
					"the last chunk in the PUT": func(path, query string, data []byte) *answer {
						half := len(data) / 2
						path = patch(path, data[:half])
						var header []string
						if half > 0 {
							header = []string{"Content-Range", fmt.Sprintf("%d-%d", half, len(data)-1)}
						}
						return s.do("PUT", path+query, data[half:], header...)
					},
				} {
					seed++
					data := content(n, seed)
					d := alg.FromBytes(data)
					path := s.do("POST", "/v2/a/blobs/uploads/"+begin, nil).want(http.StatusAccepted).header.Get(
						"Location")
					query := "?digest=" + strings.Replace(d.String(), ":", "%3A", 1)
					push(path, query, data).want(http.StatusCreated, "Location", "/v2/a/blobs/"+d.String(),
						"Docker-Content-Digest", d.String(), "Content-Length", "0")
					s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
					s.do("GET", path, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
					if t.Failed() {
						t.Fatalf("%s of %d bytes, %s, begun with %q", name, n, alg, begin)
					}
				}
			}
		}
	}
}

func TestPushInOneRequest(t *testing.T) {
	s := start(t, registry.Options{})
	for i, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		for j, n := range []int{0, 1000, 3 << 20} {
			for k, body := range []func([]byte) any{
				func(data []byte) any { return data },
				func(data []byte) any { return streamed(data) },
			} {
				data := content(n, byte(100*i+10*j+k))
				d := alg.FromBytes(data)
				s.do("POST", "/v2/a/blobs/uploads/?digest="+d.String(), body(data)).
					want(http.StatusCreated, "Location", "/v2/a/blobs/"+d.String(), "Docker-Content-Digest", d.String())
				s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
			}
		}
	}
	d := digest.SHA256.FromString("x")
	s.do("POST", "/v2/b/blobs/uploads/?digest="+d.String(), "y").fails(http.StatusBadRequest, "DIGEST_INVALID")
	s.do("POST", "/v2/b/blobs/uploads/?digest="+d.String(), streamed([]byte("y"))).fails(
		http.StatusBadRequest, "DIGEST_INVALID")
	s.do("POST", "/v2/b/blobs/uploads/?digest="+d.String(), nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
	s.do("POST", "/v2/b/blobs/uploads/?digest=sha256:x", "x").fails(http.StatusBadRequest, "DIGEST_INVALID")
	s.do("POST", "/v2/b/blobs/uploads/?digest=", "x").fails(http.StatusBadRequest, "DIGEST_INVALID")
	s.do("HEAD", "/v2/b/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
}

// TestBeginWithoutSlash: some clients leave it out, and send what means nothing here.
func TestBeginUpload(t *testing.T) {
	s := start(t, registry.Options{})
	s.do("POST", "/v2/a/blobs/uploads", nil).want(http.StatusAccepted)
	s.do("POST", "/v2/a/blobs/uploads/", "{}", "Content-Type", "application/json").want(http.StatusAccepted)
	s.do("POST", "/v2/a/blobs/uploads/?digest-algorithm=md5", nil).fails(
		http.StatusBadRequest, "DIGEST_INVALID").contains("sha512")
	if a, b := s.begin("a"), s.begin("a"); a == b {
		t.Errorf("two uploads are both %s", a)
	}
}

func TestWrongDigest(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(100_000, 1)
	wrong := digest.SHA256.FromString("other")
	for _, d := range []digest.Digest{wrong, digest.SHA512.FromString("other")} {
		for name, push := range map[string]func(path string) *answer{
			"PUT": func(path string) *answer { return s.do("PUT", path+"?digest="+d.String(), data) },
			"PUT as a stream": func(path string) *answer {
				return s.do("PUT", path+"?digest="+d.String(), streamed(data))
			},
			"PATCH, PUT": func(path string) *answer {
				s.do("PATCH", path, data).want(http.StatusAccepted)
				return s.do("PUT", path+"?digest="+d.String(), nil)
			},
		} {
			path := s.begin("a")
			push(path).fails(http.StatusBadRequest, "DIGEST_INVALID")
			s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
			s.do("HEAD", "/v2/a/blobs/"+digest.SHA256.FromBytes(data).String(), nil).fails(
				http.StatusNotFound, "BLOB_UNKNOWN")
			s.do("GET", path, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN") // it is over
			if t.Failed() {
				t.Fatal(name)
			}
		}
	}
	// A digest that is none leaves the upload as it is.
	path := s.begin("a")
	s.do("PATCH", path, data).want(http.StatusAccepted)
	for _, query := range []string{"", "?digest=", "?digest=sha256:baddigeststring",
		"?digest=md5:d41d8cd98f00b204e9800998ecf8427e"} {
		s.do("PUT", path+query, nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
	}
	s.do("PUT", path+"?digest="+digest.SHA256.FromBytes(data).String(), nil).want(http.StatusCreated)
}

// TestPushOfWhatIsThere: it is stored once, and wrong content is still refused.
func TestPushOfWhatIsThere(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(3<<20, 1)
	d := s.pushBlob("a", data)
	wrong := bytes.Clone(data)
	wrong[0] ^= 1
	for range 2 {
		s.do("PUT", s.begin("a")+"?digest="+d.String(), data).want(
			http.StatusCreated, "Docker-Content-Digest", d.String())
		s.do("PUT", s.begin("a")+"?digest="+d.String(), streamed(data)).want(
			http.StatusCreated, "Docker-Content-Digest", d.String())
		s.do("POST", "/v2/a/blobs/uploads/?digest="+d.String(), data).want(
			http.StatusCreated, "Docker-Content-Digest", d.String())
	}
	for _, body := range []any{wrong, streamed(wrong), data[1:], append(bytes.Clone(data), 0)} {
		s.do("PUT", s.begin("a")+"?digest="+d.String(), body).fails(http.StatusBadRequest, "DIGEST_INVALID")
	}
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
}

func TestChunksOutOfOrder(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(3000, 1)
	d := digest.SHA256.FromBytes(data)
	path := s.begin("a")
	refused := func(method, query string, from, to int, last string) {
		t.Helper()
		s.do(method, path+query, data[from:to], "Content-Range", fmt.Sprintf("%d-%d", from, to-1)).
			fails(http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "Range", "0-"+last, "Location", path)
		s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-"+last, "Location", path)
	}
	refused("PATCH", "", 1000, 2000, "0")
	s.do("PATCH", path, data[:1000], "Content-Range", "0-999").want(
		http.StatusAccepted, "Range", "0-999", "Location", path)
	refused("PATCH", "", 0, 1000, "999")
	refused("PATCH", "", 2000, 3000, "999")
	refused("PUT", "?digest="+d.String(), 2000, 3000, "999")
	refused("PUT", "?digest="+d.String(), 999, 3000, "999")
	for _, bad := range []string{"bytes 1000-1999/3000",
		"1000-", "-1999", "1999-1000", "x", "1000-1999/3000", "1000–1999", "-", "1000-99999999999999999999"} {
		s.do("PATCH", path, data[1000:2000], "Content-Range", bad).fails(http.StatusBadRequest, "BLOB_UPLOAD_INVALID")
	}
	for _, r := range []string{"1000-1998", "1000-2000"} {
		s.do("PATCH", path, data[1000:2000], "Content-Range", r).fails(http.StatusBadRequest, "SIZE_INVALID")
	}
	s.do("HEAD", path, nil).want(http.StatusNoContent,
		"Range", "0-999", "Docker-Upload-Uuid", path[strings.LastIndex(path, "/")+1:])
	s.do("PATCH", path, data[1000:2000], "Content-Range", "1000-1999").want(http.StatusAccepted, "Range", "0-1999")
	s.do("PUT", path+"?digest="+d.String(), data[2000:], "Content-Range", "2000-2999").want(
		http.StatusCreated, "Docker-Content-Digest", d.String())
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
}

// TestStreamWithRange: the length of such a chunk shows when it has come.
func TestStreamWithRange(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(3000, 1)
	path := s.begin("a")
	s.do("PATCH", path, streamed(data[:1000]), "Content-Range", "0-999").want(http.StatusAccepted, "Range", "0-999")
	s.do("PATCH", path, streamed(data[1000:1500]), "Content-Range", "1000-1999").fails(
		http.StatusBadRequest, "SIZE_INVALID")
	s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-1499")
	s.do("PATCH", path, streamed(data[1500:]), "Content-Range", "1500-1999").fails(
		http.StatusBadRequest, "SIZE_INVALID")
	s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-1999")
	d := digest.SHA256.FromBytes(data)
	s.do("PUT", path+"?digest="+d.String(), streamed(data[2000:]), "Content-Range", "2000-2999").want(
		http.StatusCreated)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
}

func TestCancelUpload(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(2000, 1)
	for _, sent := range [][]byte{nil, data} {
		path := s.begin("a")
		if sent != nil {
			s.do("PATCH", path, sent).want(http.StatusAccepted)
		}
		s.do("DELETE", path, nil).want(http.StatusNoContent)
		for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
			s.do(method, path+"?digest="+digest.SHA256.FromBytes(data).String(), nil).fails(
				http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
		}
	}
	s.do("HEAD", "/v2/a/blobs/"+digest.SHA256.FromBytes(data).String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
}

// TestUploadOfAnotherRepository: a session can be used in its repository only.
func TestUploadOfAnotherRepository(t *testing.T) {
	s := start(t, registry.Options{})
	path := s.begin("a")
	other := strings.Replace(path, "/v2/a/", "/v2/b/", 1)
	d := digest.SHA256.FromString("x")
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		s.do(method, other+"?digest="+d.String(), []byte("x")).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
		s.do(method, "/v2/a/blobs/uploads/nonsense?digest="+d.String(), []byte("x")).fails(
			http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
	}
	s.do("PUT", path+"?digest="+d.String(), []byte("x")).want(http.StatusCreated)
}

// TestTooManyUploads: sessions that nobody uses make room for others, those of the client with most, and
// first those without a byte.
func TestTooManyUploads(t *testing.T) {
	s := start(t, registry.Options{MaxUploads: 3})
	known := func(path string, is bool) {
		t.Helper()
		status := http.StatusNotFound
		if is {
			status = http.StatusNoContent
		}
		s.do("GET", path, nil).want(status)
	}
	empty, filled, later := s.begin("a"), s.begin("b"), s.begin("c")
	s.do("PATCH", filled, []byte("data")).want(http.StatusAccepted)
	next := s.begin("a")
	known(empty, false)
	for _, path := range []string{filled, later, next} {
		known(path, true)
		s.do("PATCH", path, []byte("more")).want(http.StatusAccepted)
	}
	// All have something now, and are of the client that asks.
	a := s.do("POST", "/v2/a/blobs/uploads/", nil).fails(http.StatusTooManyRequests, "TOOMANYREQUESTS")
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	other := func(method, path, body string, status int) (location string) {
		t.Helper()
		w := httptest.NewRecorder()
		s.handler.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body))) // from 192.0.2.1
		if w.Code != status {
			t.Errorf("another client: %s: %d %s, want %d", method, w.Code, w.Body, status)
		}
		return w.Header().Get("Location")
	}
	// Another client gets the place of the one that was idle for longest.
	its := other("POST", "/v2/a/blobs/uploads/", "", http.StatusAccepted)
	known(filled, false)
	known(later, true)
	known(next, true)
	// A client with more gets nothing of one with fewer, also where that is empty; nor does one with as many.
	s.do("POST", "/v2/a/blobs/uploads/", nil).fails(http.StatusTooManyRequests, "TOOMANYREQUESTS")
	known(its, true)
	other("PATCH", its, "data", http.StatusAccepted)
	other("POST", "/v2/a/blobs/uploads/", "", http.StatusTooManyRequests)
	// What is empty goes before what has been idle for longer.
	s.do("DELETE", its, nil).want(http.StatusNoContent)
	empty = s.begin("a")
	other("POST", "/v2/a/blobs/uploads/", "", http.StatusAccepted)
	known(empty, false)
	known(later, true)
	known(next, true)
	// What needs no session goes on.
	d := digest.SHA256.FromString("x")
	s.do("POST", "/v2/a/blobs/uploads/?digest="+d.String(), "x").want(http.StatusCreated)
}

// TestListUploads: what is unfinished can be found, and cancelled.
func TestListUploads(t *testing.T) {
	s := start(t, registry.Options{})
	s.do("GET", "/v2/a/blobs/uploads/", nil).want(http.StatusOK).content([]byte(`{"uploads":[]}`))
	path := s.begin("a")
	s.begin("b")
	s.do("PATCH", path, []byte("data")).want(http.StatusAccepted)
	s.do("GET", "/v2/a/blobs/uploads/", nil).want(http.StatusOK, "Content-Type", "application/json").
		content([]byte(`{"uploads":[{"location":"` + path + `","received":4,"busy":false,"idle":0}]}`))
	if n, received := s.handler.Uploads(); n != 2 || received != 4 {
		t.Errorf("%d uploads have %d bytes", n, received)
	}
	s.do("DELETE", path, nil).want(http.StatusNoContent)
	s.do("GET", "/v2/a/blobs/uploads/", nil).want(http.StatusOK).content([]byte(`{"uploads":[]}`))
}

// TestRefusedBeforeSending: what has no room is refused before any of it is read.
func TestRefusedBeforeSending(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{MaxSize: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, blobstore.New(engine), registry.Options{})
	d := digest.SHA256.FromString("x").String()
	for _, length := range []int{2<<20 + 1, 1 << 60} {
		for _, r := range [][2]string{{"POST", "/v2/a/blobs/uploads/?digest=" + d},
			{"PUT", s.begin("a") + "?digest=" + d}, {"PATCH", s.begin("a")}} {
			c := s.dial()
			// A client that waits to be asked for the body is not.
			fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n",
				r[0], r[1], length)
			c.answer(r[0]).fails(http.StatusInsufficientStorage, "DENIED")
		}
	}
	// A client that sends at once is answered before it has sent anything of the body, whatever it speaks.
	secure := httptest.NewUnstartedServer(s.handler)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	for version, server := range map[int]*httptest.Server{1: s.http, 2: secure} {
		for _, r := range [][2]string{{"POST", "/v2/a/blobs/uploads/?digest=" + d},
			{"PUT", s.begin("a") + "?digest=" + d}, {"PATCH", s.begin("a")}} {
			for _, expect := range []string{"", "100-continue"} {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				nothing, feed := io.Pipe()
				defer feed.Close()
				request, err := http.NewRequestWithContext(ctx, r[0], server.URL+r[1], nothing)
				if err != nil {
					t.Fatal(err)
				}
				request.ContentLength = 2<<20 + 1
				request.Header.Set("Expect", expect)
				answer, err := server.Client().Do(request)
				if err != nil {
					t.Fatalf("%s by HTTP/%d: %v", r[0], version, err)
				}
				answer.Body.Close()
				if answer.StatusCode != http.StatusInsufficientStorage &&
					(r[0] == "POST" || answer.StatusCode != http.StatusNotFound) || answer.ProtoMajor != version {
					t.Errorf("%s by HTTP/%d: %s by %s", r[0], version, answer.Status, answer.Proto)
				}
			}
		}
	}
	s.pushBlob("a", content(2<<20, 1)) // nothing is left of them
}

// TestRoomOfAbortedUploads: what an upload that broke off has is let go when another needs the
// room, or its place, and not before. It runs with a clock of its own.
func TestRoomOfAbortedUploads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		engine, err := pieces.Open(t.TempDir(), pieces.Options{MaxSize: 100})
		if err != nil {
			t.Fatal(err)
		}
		store := blobstore.New(engine)
		defer store.Close()
		h := registry.New(store, registry.Options{StallTimeout: time.Minute, MaxUploads: 3})
		defer h.Close()
		do := func(status int, method, path string, body []byte) http.Header {
			t.Helper()
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, bytes.NewReader(body)))
			if w.Code != status {
				t.Errorf("%s %s: %d %s, want %d", method, path, w.Code, w.Body, status)
			}
			return w.Header()
		}
		data := content(50, 1)
		push := "/v2/a/blobs/uploads/?digest=" + digest.SHA256.FromBytes(data).String()
		begin := func() string { return do(http.StatusAccepted, "POST", "/v2/a/blobs/uploads/", nil).Get("Location") }
		broken, later, empty := begin(), begin(), begin()
		do(http.StatusAccepted, "PATCH", broken, content(30, 2))
		time.Sleep(time.Second)
		do(http.StatusAccepted, "PATCH", later, content(30, 3))
		time.Sleep(58 * time.Second)
		do(http.StatusInsufficientStorage, "POST", push, data) // they may go on
		do(http.StatusNoContent, "GET", broken, nil)
		time.Sleep(2 * time.Second)
		do(http.StatusCreated, "POST", push, data)
		do(http.StatusNotFound, "GET", broken, nil)
		do(http.StatusNoContent, "GET", later, nil) // one is enough
		do(http.StatusNoContent, "GET", empty, nil) // it has nothing to give
		// For a chunk without room what has been idle is given up. Its own upload stays, for a smaller one.
		do(http.StatusInsufficientStorage, "PATCH", empty, content(80, 4))
		do(http.StatusNoContent, "GET", empty, nil)
		do(http.StatusNoContent, "DELETE", empty, nil)
		// It gives up its place, too, to the same client.
		broken = begin()
		do(http.StatusAccepted, "PATCH", broken, content(10, 3))
		for range 2 {
			time.Sleep(time.Second)
			do(http.StatusAccepted, "PATCH", begin(), content(10, 3))
		}
		time.Sleep(57 * time.Second)
		do(http.StatusTooManyRequests, "POST", "/v2/a/blobs/uploads/", nil)
		time.Sleep(2 * time.Second)
		begin()
		do(http.StatusNotFound, "GET", broken, nil)
	})
}

// TestTooManyRequests: a client that reads nothing does not keep out others.
func TestTooManyRequests(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := start(t, registry.Options{MaxRequests: 4, StallTimeout: time.Hour})
	data := content(32<<20, 1) // more than the buffers on the way take
	d := s.pushBlob("a", data)
	s.log.wait(t, func(r record) bool { return r.attrs["status"] == "201" }) // that request is over
	var stalled []*conn
	for range 4 {
		c := s.dial()
		c.send("GET", "/v2/a/blobs/"+d.String(), 0, nil)
		if _, err := c.in.Peek(1); err != nil {
			t.Fatal(err)
		}
		stalled = append(stalled, c)
	}
	a := s.do("GET", "/v2/", nil).fails(http.StatusTooManyRequests, "TOOMANYREQUESTS")
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, httptest.NewRequest("GET", "/v2/", nil)) // from 192.0.2.1
	if w.Code != http.StatusOK {
		t.Errorf("another client: %d %s", w.Code, w.Body)
	}
	// It ends though its client reads nothing.
	s.log.wait(t, func(r record) bool { return r.message == "request" && r.attrs["path"] == "/v2/a/blobs/"+d.String() })
	if a := stalled[0].answer("GET"); a.err == nil {
		t.Error("the oldest request of the client with most goes on")
	}
	for _, c := range stalled[1:] {
		c.answer("GET").want(http.StatusOK).content(data)
	}
	for s.do("GET", "/v2/", nil).status == http.StatusTooManyRequests {
		time.Sleep(time.Millisecond) // they are over when their last byte is on its way
	}
}

// TestIdleConnections: of connections that wait for a request, the oldest makes room; one with a
// request does not.
func TestIdleConnections(t *testing.T) {
	s := start(t, registry.Options{})
	path := s.begin("a")
	s.http.Close()
	connections := registry.NewConnections(1)
	s.http = httptest.NewUnstartedServer(s.handler)
	s.http.Config.ConnContext, s.http.Config.ConnState = connections.Context, connections.State
	s.http.Start()
	busy := s.dial()
	busy.expectContinue("PATCH", path, 4)
	first, second := s.dial(), s.dial()
	if _, err := first.in.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest that is idle stays: %v", err)
	}
	io.WriteString(busy, "data")
	busy.answer("PATCH").want(http.StatusAccepted, "Range", "0-3")
	// Now it is idle, too, and the newest.
	if _, err := second.in.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("what is idle for longer stays: %v", err)
	}
	busy.send("GET", "/v2/", 0, nil)
	busy.answer("GET").want(http.StatusOK)
}

// waiting is an engine that has what it is asked for only when its caller gives up.
type waiting struct{ p2p.Engine }

func (waiting) Open(ctx context.Context, _ p2p.Task, _ p2p.Scope) (p2p.Blob, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}
func (waiting) Close() error { return nil }

// TestTooManyWaiting: what makes room waits for nothing any more, whether it sends or not.
func TestTooManyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := registry.New(blobstore.New(waiting{}), registry.Options{MaxRequests: 2})
		defer h.Close()
		var answered atomic.Int32
		var asking sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		get := func(from string) {
			asking.Go(func() {
				r := httptest.NewRequestWithContext(
					ctx, "GET", "/v2/a/blobs/"+digest.SHA256.FromString("x").String(), nil)
				r.RemoteAddr = from
				h.ServeHTTP(httptest.NewRecorder(), r)
				answered.Add(1)
			})
			synctest.Wait()
		}
		get("192.0.2.1:1")
		get("192.0.2.1:2")
		get("192.0.2.2:1")
		if n := answered.Load(); n != 1 {
			t.Errorf("%d of 3 requests have ended, want the oldest of the client with two", n)
		}
		cancel()
		asking.Wait()
	})
}

// TestNoSpace: the client hears that the disk is full, and what came is let go.
func TestNoSpace(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{MaxSize: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, blobstore.New(engine), registry.Options{})
	data := content(3<<20, 1)
	d := digest.SHA256.FromBytes(data)
	for name, push := range map[string]func() *answer{
		"POST":      func() *answer { return s.do("POST", "/v2/a/blobs/uploads/?digest="+d.String(), data) },
		"PUT":       func() *answer { return s.do("PUT", s.begin("a")+"?digest="+d.String(), data) },
		"a stream":  func() *answer { return s.do("PUT", s.begin("a")+"?digest="+d.String(), streamed(data)) },
		"the chunk": func() *answer { return s.do("PATCH", s.begin("a"), data) },
	} {
		push().fails(http.StatusInsufficientStorage, "DENIED").contains("no space left", "disk")
		if t.Failed() {
			t.Fatal(name)
		}
		s.pushBlob("a", content(1<<20, 2)) // there is room for this
	}
}

// TestFullStoreIsSaid: a client that asks how an upload is that found no room hears that, not that there is none:
// what has come before is there, or why it is lost.
func TestFullStoreIsSaid(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{MaxSize: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, blobstore.New(engine), registry.Options{})
	data := content(3<<20, 1)
	d := digest.SHA256.FromBytes(data).String()
	full := func(a *answer) {
		t.Helper()
		a.fails(http.StatusInsufficientStorage, "DENIED").contains("no space left")
	}

	// Whose length says it before.
	upload := s.begin("a")
	full(s.do("PUT", upload+"?digest="+d, data))
	full(s.do("PUT", upload+"?digest="+d, data))
	s.do("DELETE", upload, nil).want(http.StatusNoContent)
	upload = s.begin("a")
	s.do("PATCH", upload, data[:1<<20]).want(http.StatusAccepted)
	full(s.do("PATCH", upload, data[1<<20:]))
	s.do("GET", upload, nil).want(http.StatusNoContent, "Range", "0-1048575")
	full(s.do("PUT", upload+"?digest="+d, data[1<<20:]))
	short := digest.SHA256.FromBytes(data[:1<<20])
	s.do("PUT", upload+"?digest="+short.String(), nil).want(http.StatusCreated)
	s.do("DELETE", "/v2/a/blobs/"+short.String(), nil).want(http.StatusAccepted)

	// Whose end nobody knows.
	upload = s.begin("a")
	s.do("PATCH", upload, streamed(data)) // that the last of it found no room may come out with the next
	full(s.do("PUT", upload+"?digest="+d, nil))
	full(s.do("GET", upload, nil))
	full(s.do("PATCH", upload, data[:10]))
	full(s.do("PUT", upload+"?digest="+d, nil))
	if _, received := s.handler.Uploads(); received != 0 {
		t.Errorf("what is lost has %d bytes still", received)
	}
	s.pushBlob("a", data[:2<<20]) // nothing of it is in the way
	s.do("DELETE", upload, nil).want(http.StatusNoContent)
	s.do("GET", upload, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
}

// What is here needs no room: it can be pushed to another repository of a full store.
func TestPushOfHeldWithoutRoom(t *testing.T) {
	engine, err := pieces.Open(t.TempDir(), pieces.Options{MaxSize: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, blobstore.New(engine), registry.Options{})
	data := content(3<<19, 1)
	d := s.pushBlob("a", data)
	for repository, path := range map[string]string{"b": "/v2/b/blobs/uploads/", "c": s.begin("c")} {
		method := map[string]string{"b": "POST", "c": "PUT"}[repository]
		s.do(method, path+"?digest="+d.String(), content(3<<19, 2)).fails(http.StatusBadRequest, "DIGEST_INVALID")
		if method == "PUT" {
			path = s.begin("c") // the one before is over
		}
		s.do(method, path+"?digest="+d.String(), data).want(http.StatusCreated)
		s.do("GET", "/v2/"+repository+"/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
	}
	other := digest.SHA256.FromBytes(content(3<<19, 2))
	s.do("POST", "/v2/b/blobs/uploads/?digest="+other.String(), content(3<<19, 2)).fails(
		http.StatusInsufficientStorage, "DENIED")
}

// failing is an engine that fails.
type failing struct {
	p2p.Engine
	err error
}

func (f failing) Stat(context.Context, string, digest.CID, p2p.StatOptions) (p2p.Info, error) {
	return p2p.Info{}, f.err
}
func (f failing) Open(context.Context, p2p.Task, p2p.Scope) (p2p.Blob, error) { return nil, f.err }
func (f failing) Ingest(context.Context) (p2p.Ingest, error)                  { return nil, f.err }
func (f failing) Delete(context.Context, string, digest.CID, p2p.DeleteOptions) (p2p.Deleted, error) {
	return p2p.Deleted{}, f.err
}
func (f failing) List(context.Context, p2p.Query) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) { yield(p2p.Entry{}, f.err) }
}
func (f failing) HoldManifest(context.Context, string, digest.CID, p2p.StatOptions) (p2p.Info, error) {
	return p2p.Info{}, f.err
}
func (f failing) HoldReferrers(context.Context, p2p.Task) error { return f.err }
func (f failing) Close() error                                  { return nil }

// TestInternalErrors: the log has them, the client does not.
func TestInternalErrors(t *testing.T) {
	d := digest.SHA256.FromString("x").String()
	for _, c := range []struct {
		err    error
		status int
	}{
		{errors.New("open /srv/secret/path: input/output error"), http.StatusInternalServerError},
		{fmt.Errorf("/srv/secret/path: %w", p2p.ErrUnavailable), http.StatusServiceUnavailable},
		{fmt.Errorf("/srv/secret/path: %w", p2p.ErrClosed), http.StatusServiceUnavailable},
		{fmt.Errorf("/srv/secret/path: %w", p2p.ErrNoSpace), http.StatusInsufficientStorage},
		{fmt.Errorf("/srv/secret/path: %w", digest.ErrCorrupt), http.StatusInternalServerError},
	} {
		s := startOn(t, blobstore.New(failing{err: c.err}), registry.Options{})
		for _, r := range []struct{ method, path, body string }{
			{"GET", "/v2/_catalog", ""},
			{"GET", "/v2/a/tags/list", ""},
			{"GET", "/v2/a/referrers/" + d, ""},
			{"GET", "/v2/a/manifests/v1", ""},
			{"HEAD", "/v2/a/manifests/v1", ""},
			{"PUT", "/v2/a/manifests/v1", "{}"},
			{"DELETE", "/v2/a/manifests/v1", ""},
			{"DELETE", "/v2/a/manifests/" + d, ""},
			{"GET", "/v2/a/blobs/" + d, ""},
			{"HEAD", "/v2/a/blobs/" + d, ""},
			{"DELETE", "/v2/a/blobs/" + d, ""},
			{"POST", "/v2/a/blobs/uploads/?digest=" + d, "x"},
			{"POST", "/v2/a/blobs/uploads/?from=b&mount=" + d, ""},
			{"PATCH", s.begin("a"), "x"},
			{"PUT", s.begin("a") + "?digest=" + d, "x"},
		} {
			a := s.do(r.method, r.path, r.body)
			if errors.Is(c.err, digest.ErrCorrupt) && (r.method == "HEAD" || strings.Contains(r.path, "mount=")) {
				// Whoever asks whether it is there is to send it.
				a.want(map[string]int{"HEAD": http.StatusNotFound, "POST": http.StatusAccepted}[r.method])
				continue
			}
			code := "UNKNOWN"
			if c.status == http.StatusInsufficientStorage {
				code = "DENIED"
			}
			a.fails(c.status, code)
			if strings.Contains(string(a.body), "secret") {
				t.Errorf("%s %s: the answer tells internals: %s", r.method, r.path, a.body)
			}
			path, _, _ := strings.Cut(r.path, "?")
			logged := s.log.wait(t, func(l record) bool {
				return l.attrs["method"] == r.method && l.attrs["path"] == path && l.attrs["status"] == itoa(c.status)
			})
			if logged.level.String() != "WARN" || !strings.Contains(logged.String(), c.err.Error()) {
				t.Errorf("%s %s: logged is %v", r.method, r.path, logged)
			}
		}
	}
}

// dial opens a connection to the registry.
func (s *server) dial() *conn {
	s.Helper()
	c, err := net.Dial("tcp", s.http.Listener.Addr().String())
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second)) // no answer is a failure, too
	return &conn{s.T, c, bufio.NewReader(c)}
}

// conn is a connection on which requests are written by hand.
type conn struct {
	*testing.T
	net.Conn
	in *bufio.Reader
}

// send sends the head of a request, and the first bytes of its body.
func (c *conn) send(method, path string, length int, body []byte) {
	c.Helper()
	if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", method, path,
		length, body); err != nil {
		c.Fatal(err)
	}
}

// answer reads an answer.
func (c *conn) answer(method string) *answer {
	c.Helper()
	resp, err := http.ReadResponse(c.in, &http.Request{Method: method})
	if err != nil {
		c.Fatal(err)
	}
	defer resp.Body.Close()
	return newAnswer(c.T, method, method+" by hand", resp)
}

// TestResumeAfterBreak: the client whose connection broke comes back at once,
// asks how much has come, and goes on.
func TestResumeAfterBreak(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(1<<20, 1)
	d := digest.SHA256.FromBytes(data)
	for _, method := range []string{"PATCH", "PUT"} {
		path := s.begin("a")
		s.do("PATCH", path, data[:1000]).want(http.StatusAccepted)
		c := s.dial()
		c.expectContinue(method, path+"?digest="+d.String(), len(data)-1000)
		c.Write(data[1000:500_000])
		c.Close()
		a := s.do("GET", path, nil).want(http.StatusNoContent)
		for {
			var has int
			if _, err := fmt.Sscanf(a.header.Get("Range"), "0-%d", &has); err != nil || has < 999 || has >= 500_000 {
				t.Fatalf("Range is %q", a.header.Get("Range"))
			}
			has++
			a = s.do("PATCH", path, data[has:700_000], "Content-Range", fmt.Sprintf("%d-699999", has))
			// What was on its way when the client asked has come since: it is told how far that goes.
			if a.status != http.StatusRequestedRangeNotSatisfiable {
				break
			}
		}
		a.want(http.StatusAccepted, "Range", "0-699999")
		s.do("PUT", path+"?digest="+d.String(), data[700_000:]).want(http.StatusCreated)
		s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
		s.do("DELETE", "/v2/a/blobs/"+d.String(), nil).want(http.StatusAccepted)
	}
	// A PUT of the whole that breaks off leaves the session, with nothing.
	path := s.begin("a")
	c := s.dial()
	c.expectContinue("PUT", path+"?digest="+d.String(), len(data))
	c.Write(data[:500_000])
	c.Close()
	s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-0")
	s.do("PUT", path+"?digest="+d.String(), data).want(http.StatusCreated)
}

// TestShortBody: a client that ends a body early and still listens hears of it.
func TestShortBody(t *testing.T) {
	s := start(t, registry.Options{})
	path := s.begin("a")
	for _, c := range []struct{ method, path, status string }{
		{"PATCH", path, "0-99"},
		{"POST", "/v2/a/blobs/uploads/?digest=" + digest.SHA256.FromString("x").String(), ""},
		{"PUT", s.begin("a") + "?digest=" + digest.SHA256.FromString("x").String(), "0-0"},
		{"PUT", "/v2/a/manifests/v1", ""},
	} {
		conn := s.dial()
		conn.send(c.method, c.path, 1000, content(100, 1))
		if err := conn.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		conn.answer(c.method).fails(http.StatusBadRequest, "SIZE_INVALID")
		if path, _, _ := strings.Cut(c.path, "?"); c.status != "" {
			s.do("GET", path, nil).want(http.StatusNoContent, "Range", c.status)
		}
	}
}

// TestStalledSender: a client that sends nothing any more is cut off.
func TestStalledSender(t *testing.T) {
	s := start(t, registry.Options{StallTimeout: 100 * time.Millisecond})
	patch := s.begin("a")
	for _, c := range []struct{ method, path, status string }{
		{"PATCH", patch, "0-99"},
		{"POST", "/v2/a/blobs/uploads/?digest=" + digest.SHA256.FromString("x").String(), ""},
		{"PUT", s.begin("a") + "?digest=" + digest.SHA256.FromString("x").String(), "0-0"},
		{"PUT", "/v2/a/manifests/v1", ""},
	} {
		conn := s.dial()
		conn.send(c.method, c.path, 1000, content(100, 1))
		conn.answer(c.method).fails(http.StatusRequestTimeout, "BLOB_UPLOAD_INVALID")
		if n, err := conn.in.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Error("the connection goes on")
		}
		if path, _, _ := strings.Cut(c.path, "?"); c.status != "" {
			s.do("GET", path, nil).want(http.StatusNoContent, "Range", c.status)
		}
	}
	// So is one that sends a body nobody wants.
	conn := s.dial()
	conn.send("PUT", "/v2/a/blobs/uploads/unknown?digest=x", 1<<20, content(100, 1))
	conn.answer("PUT").fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
	if n, err := conn.in.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("the connection goes on")
	}
}

// TestStalledReceiver: a client that receives nothing any more is cut off.
func TestStalledReceiver(t *testing.T) {
	s := start(t, registry.Options{StallTimeout: 100 * time.Millisecond})
	data := content(32<<20, 1) // more than the buffers on the way take
	d := digest.SHA256.FromBytes(data)
	repo, err := s.store.Repository("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Import(t.Context(), d.String(), bytes.NewReader(data), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	c := s.dial()
	c.send("GET", "/v2/a/blobs/"+d.String(), 0, nil)
	r := s.log.wait(t, func(r record) bool { return r.attrs["method"] == "GET" })
	if r.attrs["error"] == "" || r.attrs["sent"] == itoa(len(data)) {
		t.Errorf("all was sent to a client that received nothing: %v", r)
	}
	if a := c.answer("GET"); a.err == nil || !bytes.HasPrefix(data, a.body) {
		t.Errorf("%d bytes, %v", len(a.body), a.err)
	}
}

// TestCancelWhileSending: the request that sends is broken off at once, not
// when it stalls.
func TestCancelWhileSending(t *testing.T) {
	s := start(t, registry.Options{StallTimeout: time.Hour})
	d := digest.SHA256.FromString("x")
	for _, c := range []struct {
		method string
		first  int // bytes that are sent before
	}{{"PATCH", 0}, {"PATCH", 10}, {"PUT", 0}, {"PUT", 10}} {
		path := s.begin("a")
		if c.first > 0 {
			s.do("PATCH", path, content(c.first, 1)).want(http.StatusAccepted)
		}
		conn := s.dial()
		conn.expectContinue(c.method, path+"?digest="+d.String(), 1000)
		s.do("DELETE", path, nil).want(http.StatusNoContent)
		conn.answer(c.method).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
		s.do("GET", path, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
	}
}

// expectContinue sends the head of a request and returns when its body is being read.
func (c *conn) expectContinue(method, path string, length int) {
	c.Helper()
	if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: "+
		"%d\r\n\r\n", method, path, length); err != nil {
		c.Fatal(err)
	}
	c.answer(method).status100()
}

func (a *answer) status100() {
	a.Helper()
	if a.status != http.StatusContinue {
		a.Fatalf("%s: status %d, want 100", a.what, a.status)
	}
}

// TestClose: it ends uploads under way, and those to come.
func TestClose(t *testing.T) {
	s := start(t, registry.Options{StallTimeout: time.Hour})
	d := digest.SHA256.FromString("x")
	idle, put, patch := s.begin("a"), s.begin("a"), s.begin("a")
	s.do("PATCH", idle, []byte("x")).want(http.StatusAccepted)
	putting, patching := s.dial(), s.dial()
	putting.expectContinue("PUT", put+"?digest="+d.String(), 1000)
	patching.expectContinue("PATCH", patch, 1000)
	if err := s.handler.Close(); err != nil {
		t.Error(err)
	}
	if n, received := s.handler.Uploads(); n != 0 {
		t.Errorf("%d uploads of %d bytes are left", n, received)
	}
	putting.answer("PUT").fails(http.StatusServiceUnavailable, "UNKNOWN")
	patching.answer("PATCH").fails(http.StatusServiceUnavailable, "UNKNOWN")
	s.do("GET", idle, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
	s.do("POST", "/v2/a/blobs/uploads/", nil).fails(http.StatusServiceUnavailable, "UNKNOWN")
	if err := s.handler.Close(); err != nil {
		t.Error(err)
	}
}

// TestExpiry runs with a clock of its own.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := blobstore.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		h := registry.New(store, registry.Options{UploadTimeout: time.Hour})
		defer h.Close()
		do := func(method, path, body string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
			return w
		}
		used, idle := do("POST", "/v2/a/blobs/uploads/", "").Header().Get("Location"), do(
			"POST", "/v2/a/blobs/uploads/", "").Header().Get("Location")
		do("PATCH", idle, "data")
		empty := do("POST", "/v2/a/blobs/uploads/", "").Header().Get("Location")
		do("PATCH", used, "data")
		time.Sleep(3 * time.Minute)
		if w := do("GET", empty, ""); w.Code != http.StatusNotFound {
			t.Errorf("an upload that has nothing goes on: %d", w.Code)
		}
		for range 3 {
			time.Sleep(50 * time.Minute)
			if w := do("PATCH", used, "data"); w.Code != http.StatusAccepted {
				t.Errorf("an upload that is used has expired: %d %s", w.Code, w.Body)
			}
		}
		if w := do("GET", idle, ""); w.Code != http.StatusNotFound {
			t.Errorf("an upload that is idle goes on: %d", w.Code)
		}
		time.Sleep(2 * time.Hour)
		if w := do("GET", used, ""); w.Code != http.StatusNotFound {
			t.Errorf("an upload that is idle goes on: %d", w.Code)
		}
	})
}

// TestSlowSender: a client that is slow, but does not stall, is not cut off, however long
// it takes. It runs with a clock of its own.
func TestSlowSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := blobstore.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		h := registry.New(store, registry.Options{StallTimeout: time.Minute, UploadTimeout: 5 * time.Minute})
		defer h.Close()
		pipes := newPipes()
		server := &http.Server{Handler: h}
		served := make(chan error, 1)
		go func() { served <- server.Serve(pipes) }()
		defer func() {
			server.Close()
			<-served
		}()
		for _, method := range []string{"POST", "PATCH"} {
			c := pipes.dial(t)
			data := content(100, 1)
			path, status := "/v2/a/blobs/uploads/?digest="+digest.SHA512.FromBytes(data).String(), http.StatusCreated
			if method == "PATCH" {
				c.send("POST", "/v2/a/blobs/uploads/", 0, nil)
				path, status = c.answer("POST").want(http.StatusAccepted).header.Get("Location"), http.StatusAccepted
			}
			c.send(method, path, len(data), nil)
			for i := range data {
				time.Sleep(50 * time.Second)
				if _, err := c.Write(data[i : i+1]); err != nil {
					t.Fatalf("cut off after %d bytes: %v", i, err)
				}
			}
			c.answer(method).want(status)
			// The same connection goes on, after a pause too.
			time.Sleep(time.Hour)
			c.send("GET", "/v2/", 0, nil)
			c.answer("GET").want(http.StatusOK)
			c.Close()
		}
	})
}

// TestSlowReceiver is the same for a client that receives.
func TestSlowReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := blobstore.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		h := registry.New(store, registry.Options{StallTimeout: time.Minute})
		defer h.Close()
		pipes := newPipes()
		server := &http.Server{Handler: h}
		served := make(chan error, 1)
		go func() { served <- server.Serve(pipes) }()
		defer func() {
			server.Close()
			<-served
		}()
		data := content(8<<20, 1)
		d := digest.SHA256.FromBytes(data)
		c := pipes.dial(t)
		c.send("POST", "/v2/a/blobs/uploads/?digest="+d.String(), len(data), data)
		c.answer("POST").want(http.StatusCreated)
		c.send("GET", "/v2/a/blobs/"+d.String(), 0, nil)
		resp, err := http.ReadResponse(c.in, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		for {
			time.Sleep(20 * time.Second)
			if _, err := io.CopyN(&got, resp.Body, 100_000); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("cut off after %d bytes: %v", got.Len(), err)
			}
		}
		if !bytes.Equal(got.Bytes(), data) {
			t.Errorf("got %d bytes, want others", got.Len())
		}
		c.Close()
	})
}

// pipes are connections in memory, whose deadlines follow the test's clock.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	close sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) dial(t *testing.T) *conn {
	client, server := net.Pipe()
	p.conns <- server
	return &conn{t, client, bufio.NewReader(client)}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.close.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// TestOneRequestAtATime: chunks that are sent at the same time come one after
// the other, whole.
func TestOneRequestAtATime(t *testing.T) {
	s := start(t, registry.Options{})
	path := s.begin("a")
	const chunks, length = 16, 100_000
	var senders sync.WaitGroup
	for i := range chunks {
		senders.Go(func() {
			a, err := s.try("PATCH", path, bytes.Repeat([]byte{byte(i)}, length))
			if err != nil || a.status != http.StatusAccepted {
				t.Errorf("chunk %d: %v %v", i, a, err)
			}
		})
	}
	senders.Wait()
	s.do("GET", path, nil).want(http.StatusNoContent, "Range", "0-"+itoa(chunks*length-1))
	// The order is any: the digest is found by looking at what was stored.
	s.do("PUT", path+"?digest="+digest.SHA256.FromString("x").String(), nil).fails(
		http.StatusBadRequest, "DIGEST_INVALID")
}

// TestBusyUpload: a request that goes on for too long is not waited for, and
// how far it is can be asked at any time.
func TestBusyUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := blobstore.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		h := registry.New(store, registry.Options{StallTimeout: time.Minute})
		defer h.Close()
		serve := func(r *http.Request) *httptest.ResponseRecorder {
			t.Helper()
			w, served := httptest.NewRecorder(), make(chan struct{})
			go func() {
				defer close(served)
				h.ServeHTTP(w, r)
			}()
			select {
			case <-served:
			case <-time.After(time.Hour):
				t.Fatalf("%s waits for the other request", r.Method)
			}
			return w
		}
		path := serve(httptest.NewRequest("POST", "/v2/a/blobs/uploads/", nil)).Header().Get("Location")
		body, feed := io.Pipe()
		sender := httptest.NewRecorder()
		var sending sync.WaitGroup
		sending.Go(func() { h.ServeHTTP(sender, httptest.NewRequest("PATCH", path, body)) })
		synctest.Wait()
		status := func(want string) {
			t.Helper()
			start := time.Now()
			w := serve(httptest.NewRequest("GET", path, nil))
			if w.Code != http.StatusNoContent || w.Header().Get("Range") != want || time.Since(start) != 0 {
				t.Errorf("GET: %d %s after %s, want range %s at once", w.Code, w.Header(), time.Since(start), want)
			}
		}
		status("0-0")
		for _, method := range []string{"PATCH", "PUT"} {
			w := serve(httptest.NewRequest(method, path, nil))
			if w.Code != http.StatusConflict || !strings.Contains(w.Body.String(), "BLOB_UPLOAD_INVALID") {
				t.Errorf("%s: %d %s", method, w.Code, w.Body)
			}
		}
		// Whoever waits is served when it ends.
		var waiting sync.WaitGroup
		waiting.Go(func() {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("PATCH", path, strings.NewReader("and more")))
			if w.Code != http.StatusAccepted || w.Header().Get("Range") != "0-11" {
				t.Errorf("PATCH: %d %s", w.Code, w.Header())
			}
		})
		synctest.Wait()
		feed.Write([]byte("data"))
		synctest.Wait()
		status("0-3")
		feed.Close()
		sending.Wait()
		waiting.Wait()
		if sender.Code != http.StatusAccepted {
			t.Errorf("PATCH: %d %s", sender.Code, sender.Body)
		}
	})
}

// TestUploadRaces: whatever is done to one session at once, every answer is one
// that fits, and what is stored is right.
func TestUploadRaces(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(200_000, 1)
	d := digest.SHA256.FromBytes(data)
	for range 20 {
		path := s.begin("a")
		var users sync.WaitGroup
		use := func(method, query string, body any, allowed ...int) {
			users.Go(func() {
				a, err := s.try(method, path+query, body)
				if err != nil && !strings.Contains(err.Error(), "EOF") && !strings.Contains(err.Error(), "reset") &&
					!strings.Contains(err.Error(), "broken pipe") {
					t.Errorf("%s: %v", method, err)
				} else if err == nil && !slices.Contains(allowed, a.status) {
					t.Errorf("%s: %d %s", method, a.status, a.body)
				}
			})
		}
		for range 2 {
			use("PUT", "?digest="+d.String(), data, 201, 400, 404)
			use("PATCH", "", data, 202, 404)
			use("GET", "", nil, 204, 404)
			use("DELETE", "", nil, 204, 404)
		}
		users.Wait()
		s.do("GET", path, nil).fails(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN")
		if a := s.do("GET", "/v2/a/blobs/"+d.String(), nil); a.status == http.StatusOK {
			a.content(data)
		}
	}
}

// TestPushOfTheSameAtOnce: everybody who pushes the same is answered well.
func TestPushOfTheSameAtOnce(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(300_000, 1)
	d := digest.SHA256.FromBytes(data)
	manifest := s.image("a", nil)
	var pushers sync.WaitGroup
	for i := range 32 {
		pushers.Go(func() {
			switch i % 4 {
			case 0:
				s.expect(201, "POST", "/v2/a/blobs/uploads/?digest="+d.String(), data)
			case 1:
				s.expect(201, "PUT", s.begin("a")+"?digest="+d.String(), data)
			case 2:
				path := s.begin("a")
				s.expect(202, "PATCH", path, data)
				s.expect(201, "PUT", path+"?digest="+d.String(), nil)
			case 3:
				s.expect(201, "PUT", "/v2/a/manifests/v"+itoa(i%3), manifest)
			}
		})
	}
	pushers.Wait()
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
	for i := range 3 {
		s.do("GET", "/v2/a/manifests/v"+itoa(i), nil).want(http.StatusOK).content(manifest)
	}
}

func (s *server) expect(status int, method, path string, body any) {
	s.Helper()
	if a, err := s.try(method, path, body); err != nil || a.status != status {
		s.Errorf("%s %s: %v, %v; want %d", method, path, a, err, status)
	}
}
