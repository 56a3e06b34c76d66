package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

func TestBlob(t *testing.T) {
	s := start(t, registry.Options{})
	for i, n := range []int{0, 1, 511, 512, 513, 70_000, 5 << 20} {
		data := content(n, byte(i))
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			d := s.pushBlobAs("a/b", data, alg.FromBytes(data))
			path := "/v2/a/b/blobs/" + d.String()
			headers := []string{
				"Content-Type", "application/octet-stream", "Content-Length", size(data), "Accept-Ranges", "bytes",
				"Docker-Content-Digest", d.String(), "Etag", `"` + d.String() + `"`, "Content-Range", "",
			}
			s.do("GET", path, nil).want(http.StatusOK, headers...).content(data)
			s.do("HEAD", path, nil).want(http.StatusOK, headers...).content(nil)
		}
	}
}

func TestBlobIsAbsent(t *testing.T) {
	s := start(t, registry.Options{})
	d := digest.SHA256.FromString("absent")
	s.pushBlob("other", []byte("absent"))
	for _, method := range []string{"GET", "HEAD", "DELETE"} {
		a := s.do(method, "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
		if method != "HEAD" {
			a.contains(d.String(), "repository a")
		}
		for _, bad := range []string{"sha256:baddigeststring", "sha1:" + d.Encoded()[:40], "x", d.String() + "0",
			"SHA256:" + d.Encoded(), "sha256%3A"} {
			s.do(method, "/v2/a/blobs/"+bad, nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
		}
	}
	// A colon may be sent encoded.
	s.do("GET", "/v2/other/blobs/sha256%3A"+d.Encoded(), nil).want(http.StatusOK).content([]byte("absent"))
}

// TestBlobOfAnyKind: what dfcache imported is a blob, and so is a manifest.
func TestBlobOfAnyKind(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(1000, 1)
	for tag, name := range map[string]string{"models": "models", "": "dfcache/default"} {
		repo, err := s.store.Repository(tag)
		if err != nil {
			t.Fatal(err)
		}
		f, err := repo.Import(t.Context(), "v1", bytes.NewReader(data), blobstore.ImportOptions{Title: "model.bin"})
		if err != nil {
			t.Fatal(err)
		}
		s.do("GET", "/v2/"+name+"/blobs/"+f.Digest.String(), nil).want(http.StatusOK).content(data)
		m := s.do("GET", "/v2/"+name+"/manifests/v1", nil).want(
			http.StatusOK, "Docker-Content-Digest", f.Manifest.String())
		s.do("GET", "/v2/"+name+"/blobs/"+f.Manifest.String(), nil).
			want(http.StatusOK, "Content-Type", "application/octet-stream").content(m.body)
		s.do("GET", "/v2/"+name+"/manifests/"+f.Digest.String(), nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	}
}

func TestRange(t *testing.T) {
	s := start(t, registry.Options{})
	const n = 300_000 // several pieces
	data := content(n, 1)
	d := s.pushBlob("a", data)
	path := "/v2/a/blobs/" + d.String()
	for _, c := range []struct {
		header   string
		off, end int // of what is wanted; 0, 0 is 416
	}{
		{"bytes=500-1499", 500, 1500},
		{"bytes=500-", 500, n},
		{"bytes=-500", n - 500, n},
		{"bytes=0-0", 0, 1},
		{"bytes=0-", 0, n},
		{"bytes=299999-299999", n - 1, n},
		{"bytes=299999-", n - 1, n},
		{"bytes=200000-500000", 200_000, n},
		{"bytes=200000-99999999999999999999999", 200_000, n},
		{"bytes=-300000", 0, n},
		{"bytes=-400000", 0, n},
		{"bytes=-99999999999999999999999", 0, n},
		{"bytes= 1-2 ", 1, 3},
		{"BYTES=1-2", 1, 3},
		{"bytes=65535-65536", 65535, 65537},
		{"bytes=500-0", 0, 0},
		{"bytes=300000-", 0, 0},
		{"bytes=300000-400000", 0, 0},
		{"bytes=99999999999999999999999-", 0, 0},
		{"bytes=-0", 0, 0},
		{"bytes=-", 0, 0},
		{"bytes=", 0, 0},
		{"bytes=x-y", 0, 0},
		{"bytes=1-y", 0, 0},
		{"bytes=+1-2", 0, 0},
		{"bytes=1--2", 0, 0},
		{"bytes=--2", 0, 0},
		{"bytes=5", 0, 0},
	} {
		a := s.do("GET", path, nil, "Range", c.header)
		if c.end == 0 {
			a.fails(http.StatusRequestedRangeNotSatisfiable, "SIZE_INVALID", "Content-Range", "bytes */300000",
				"Docker-Content-Digest", "")
			continue
		}
		a.want(http.StatusPartialContent, "Content-Range", contentRange(c.off, c.end, n),
			"Content-Length", size(data[c.off:c.end]),
			"Accept-Ranges", "bytes", "Docker-Content-Digest", d.String(), "Content-Type",
			"application/octet-stream").content(data[c.off:c.end])
	}
	// The whole is an answer to more bytes than there are, and to what is not understood.
	for _, header := range []string{"bytes=0-,0-0", "bytes=0-200000,100000-", "lines=1-2", "1-2", "",
		"bytes=0-0" + strings.Repeat(",0-0", 1024)} {
		s.do("GET", path, nil, "Range", header).want(http.StatusOK, "Content-Range", "").content(data)
	}
	// The range is for what If-Range names only, and for GET only.
	s.do("GET", path, nil, "Range", "bytes=1-2", "If-Range", `"`+d.String()+`"`).want(
		http.StatusPartialContent).content(data[1:3])
	s.do("GET", path, nil, "Range", "bytes=1-2", "If-Range", `"other"`).want(http.StatusOK).content(data)
	s.do("HEAD", path, nil, "Range", "bytes=1-2").want(http.StatusOK, "Content-Length", size(data))
	// Of an empty blob there are no ranges.
	empty := s.pushBlob("a", nil)
	s.do("GET", "/v2/a/blobs/"+empty.String(), nil, "Range", "bytes=0-5").want(
		http.StatusOK, "Content-Length", "0").content(nil)
}

// TestRanges: several ranges come in one answer, in the order in which they were asked for.
func TestRanges(t *testing.T) {
	s := start(t, registry.Options{})
	const n = 300_000 // several pieces
	data := content(n, 1)
	path := "/v2/a/blobs/" + s.pushBlob("a", data).String()
	type part struct{ off, end int }
	many, manyParts := "bytes=0-1", []part{{0, 2}}
	for i := 1; i < 1024; i++ {
		many += fmt.Sprintf(",%d-%d", 100*i, 100*i+1)
		manyParts = append(manyParts, part{100 * i, 100*i + 2})
	}
	for header, want := range map[string][]part{
		"bytes=0-1,5-6":                          {{0, 2}, {5, 7}},
		"bytes=5-6, 0-1 ,-3":                     {{5, 7}, {0, 2}, {n - 3, n}},
		"bytes=10-20,15-25,10-20":                {{10, 21}, {15, 26}, {10, 21}},
		"bytes=65000-140000,200000-":             {{65_000, 140_001}, {200_000, n}},
		"bytes=0-0,400000-500000,299999-400000,": {{0, 1}, {n - 1, n}},
		many:                                     manyParts,
	} {
		a := s.do("GET", path, nil, "Range", header).want(http.StatusPartialContent, "Content-Range", "",
			"Accept-Ranges", "bytes")
		if a.header.Get("Content-Length") != size(a.body) {
			t.Errorf("%.50s: Content-Length is %s for %d bytes", header, a.header.Get("Content-Length"), len(a.body))
		}
		mediaType, params, err := mime.ParseMediaType(a.header.Get("Content-Type"))
		if err != nil || mediaType != "multipart/byteranges" {
			t.Fatalf("%.50s: %s, %v", header, mediaType, err)
		}
		parts := multipart.NewReader(bytes.NewReader(a.body), params["boundary"])
		for i, p := range want {
			got, err := parts.NextPart()
			if err != nil {
				t.Fatalf("%.50s: part %d: %v", header, i, err)
			}
			body, err := io.ReadAll(got)
			if err != nil || !bytes.Equal(body, data[p.off:p.end]) || got.Header.Get("Content-Range") !=
				contentRange(p.off, p.end, n) || got.Header.Get("Content-Type") != "application/octet-stream" {
				t.Errorf("%.50s: part %d: %v, %d bytes, %v", header, i, got.Header, len(body), err)
			}
		}
		if _, err := parts.NextPart(); err != io.EOF {
			t.Errorf("%.50s: one part more: %v", header, err)
		}
	}
	// One that is left is answered as one; nothing that is left, and what is no range, is refused.
	s.do("GET", path, nil, "Range", "bytes=1-2,300000-").want(
		http.StatusPartialContent, "Content-Range", contentRange(1, 3, n)).content(data[1:3])
	for _, header := range []string{"bytes=300000-,400000-", "bytes=0-1,x", "bytes=0-1,5-4", "bytes=,"} {
		s.do("GET", path, nil, "Range", header).fails(http.StatusRequestedRangeNotSatisfiable, "SIZE_INVALID",
			"Content-Range", "bytes */300000")
	}
}

// TestDamagedRange: what a range is in is verified before any of it is sent.
func TestDamagedRange(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(300_000, 1)
	d := s.pushBlob("a", data)
	s.damage(d) // in its last piece
	a, err := s.try("GET", "/v2/a/blobs/"+d.String(), nil, "Range", "bytes=0-9,270000-270010,20-29")
	if err == nil && a.err == nil {
		t.Errorf("damage is sent as %d with %d bytes", a.status, len(a.body))
	}
	if err == nil && bytes.Contains(a.body, data[270_000:270_011]) {
		t.Error("bytes of a damaged piece are sent")
	}
}

func contentRange(off, end, n int) string {
	return "bytes " + itoa(off) + "-" + itoa(end-1) + "/" + itoa(n)
}

func TestNotModified(t *testing.T) {
	s := start(t, registry.Options{})
	d := s.pushBlob("a", []byte("data"))
	m := s.pushManifest("a", "v1", s.image("a", nil))
	for path, d := range map[string]digest.Digest{
		"/v2/a/blobs/" + d.String(): d, "/v2/a/manifests/v1": m, "/v2/a/manifests/" + m.String(): m} {
		etag := `"` + d.String() + `"`
		for _, method := range []string{"GET", "HEAD"} {
			for _, header := range []string{etag, "W/" + etag, "*", `"x", ` + etag, `"x",W/` + etag + `,"y"`} {
				s.do(method, path, nil, "If-None-Match", header).want(
					http.StatusNotModified, "Etag", etag, "Docker-Content-Digest", d.String()).content(nil)
			}
			for _, header := range []string{`"x"`, d.String(), ""} {
				s.do(method, path, nil, "If-None-Match", header).want(http.StatusOK, "Etag", etag)
			}
		}
	}
}

// TestNoCompression: a client that would accept an encoding gets the bytes as they are.
func TestNoCompression(t *testing.T) {
	s := start(t, registry.Options{})
	data := bytes.Repeat([]byte("a"), 100_000)
	d := s.pushBlob("a", data)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil, "Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5").
		want(http.StatusOK, "Content-Length", size(data)).content(data)
}

func TestDeleteBlob(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(100_000, 1)
	d := s.pushBlob("a", data)
	s.pushBlob("b", data)
	s.do("DELETE", "/v2/a/blobs/"+d.String(), nil).want(http.StatusAccepted, "Content-Length", "0")
	s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
	s.do("DELETE", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN")
	s.do("GET", "/v2/b/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
}

// TestDeleteOfWhatIsReferredTo: it is refused with the reason, until nothing refers to it.
func TestDeleteOfWhatIsReferredTo(t *testing.T) {
	s := start(t, registry.Options{})
	layer := []byte("layer")
	d := digest.SHA256.FromBytes(layer)
	m := s.pushManifest("a", "v1", s.image("a", nil, layer))
	s.do("DELETE", "/v2/a/blobs/"+d.String(), nil).fails(
		http.StatusMethodNotAllowed, "DENIED", "Allow", "GET, HEAD").contains("referred to", "v1")
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(layer)
	s.do("DELETE", "/v2/a/manifests/"+m.String(), nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).fails(http.StatusNotFound, "BLOB_UNKNOWN") // it went with the manifest
}

// damage flips the last bit of a stored blob.
func (s *server) damage(d digest.Digest) {
	s.Helper()
	path := filepath.Join(s.dir, "blobs", d.Algorithm().String(), d.Encoded())
	data, err := os.ReadFile(path)
	if err != nil {
		s.Fatal(err)
	}
	data[len(data)-1] ^= 1
	if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444)); err != nil {
		s.Fatal(err)
	}
}

// TestDamagedBlob: a client gets no wrong byte, and hears of it.
func TestDamagedBlob(t *testing.T) {
	s := start(t, registry.Options{})
	small, large := content(1000, 1), content(1<<20, 2)
	for _, data := range [][]byte{small, large} {
		s.pushBlob("a", data)
		s.damage(digest.SHA256.FromBytes(data))
	}
	// Nothing has been sent when a blob of one piece turns out damaged.
	d := digest.SHA256.FromBytes(small)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).
		fails(http.StatusInternalServerError, "UNKNOWN", "Etag", "", "Docker-Content-Digest", "", "Content-Range", "",
			"Accept-Ranges", "").contains("damaged")
	isOf := func(d digest.Digest) func(record) bool {
		return func(r record) bool {
			return r.level.String() == "WARN" && r.attrs["path"] == "/v2/a/blobs/"+d.String()
		}
	}
	if r := s.log.wait(t, isOf(d)); r.attrs["error"] == "" {
		t.Errorf("the log does not say what is wrong: %v", r)
	}
	// Of a larger one the good pieces have been sent.
	d = digest.SHA256.FromBytes(large)
	a := s.do("GET", "/v2/a/blobs/"+d.String(), nil)
	if !errors.Is(a.err, io.ErrUnexpectedEOF) || a.status != http.StatusOK || !bytes.HasPrefix(large, a.body) ||
		len(a.body) == 0 {
		t.Errorf("status %d, %d bytes, %v; want whole pieces, then a broken connection", a.status, len(a.body), a.err)
	}
	s.log.wait(t, isOf(d))
	s.do("GET", "/v2/a/blobs/"+d.String(), nil, "Range", "bytes=0-99").want(http.StatusPartialContent).content(
		large[:100])
	s.do("GET", "/v2/a/blobs/"+d.String(), nil, "Range", "bytes=-1").fails(
		http.StatusInternalServerError, "UNKNOWN", "Content-Range", "")
	// What is pushed again is good again.
	s.do("DELETE", "/v2/a/blobs/"+d.String(), nil).want(http.StatusAccepted)
	s.pushBlob("a", large)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(large)
}

// TestDamagedManifest: it is not sent either.
func TestDamagedManifest(t *testing.T) {
	s := start(t, registry.Options{})
	d := s.pushManifest("a", "v1", s.image("a", nil))
	s.damage(d)
	for _, reference := range []string{"v1", d.String()} {
		s.do("GET", "/v2/a/manifests/"+reference, nil).fails(
			http.StatusInternalServerError, "UNKNOWN", "Etag", "").contains("damaged")
		s.do("HEAD", "/v2/a/manifests/"+reference, nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
	}
	// It comes again, and when it is damaged it can be deleted.
	s.pushManifest("a", "v1", s.image("a", nil))
	s.do("GET", "/v2/a/manifests/v1", nil).want(http.StatusOK)
	s.damage(d)
	s.do("DELETE", "/v2/a/manifests/"+d.String(), nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN")
}

func TestMount(t *testing.T) {
	s := start(t, registry.Options{})
	data := content(100_000, 1)
	d := s.pushBlob("from/here", data)
	s.pushBlob("dfcache/default", []byte("of the empty tag"))
	inDefault := digest.SHA256.FromString("of the empty tag")
	raw, encoded := d.String(), "sha256%3A"+d.Encoded()
	for i, query := range []string{
		"mount=" + raw + "&from=from/here",
		"mount=" + encoded + "&from=from%2Fhere",
		"from=from%2Fhere&mount=" + encoded + "&origin=example.com",
		"mount=" + raw + "&from=to2", // it has it by now
		"mount=" + raw,               // too
	} {
		name := "to" + itoa(min(i, 2))
		s.do("POST", "/v2/"+name+"/blobs/uploads/?"+query, nil).
			want(http.StatusCreated, "Location", "/v2/"+name+"/blobs/"+raw, "Docker-Content-Digest", raw,
				"Content-Length", "0")
		s.do("GET", "/v2/"+name+"/blobs/"+raw, nil).want(http.StatusOK).content(data)
	}
	s.do("POST", "/v2/x/blobs/uploads/?mount="+inDefault.String()+"&from=dfcache/default", nil).want(http.StatusCreated)
	s.do("POST", "/v2/dfcache/default/blobs/uploads/?mount="+raw+"&from=from/here", nil).want(http.StatusCreated)
	// It is a blob of its own there.
	s.do("DELETE", "/v2/from/here/blobs/"+raw, nil).want(http.StatusAccepted)
	s.do("GET", "/v2/to0/blobs/"+raw, nil).want(http.StatusOK).content(data)
	// Where there is nothing to mount, an upload begins.
	for _, query := range []string{
		"mount=" + raw + "&from=from/here", "mount=" + raw + "&from=nobody", "mount=" + raw + "&from=Not..Valid",
	} {
		a := s.do("POST", "/v2/new/blobs/uploads/?"+query, nil).want(http.StatusAccepted, "Range", "0-0")
		s.do("PUT", a.header.Get("Location")+"?digest="+encoded, data).want(
			http.StatusCreated, "Docker-Content-Digest", raw)
		s.do("DELETE", "/v2/new/blobs/"+raw, nil).want(http.StatusAccepted)
	}
	// Without a source, what any repository has.
	s.do("POST", "/v2/new/blobs/uploads/?mount="+raw, nil).want(http.StatusCreated)
	s.do("GET", "/v2/new/blobs/"+raw, nil).want(http.StatusOK).content(data)
	s.do("POST", "/v2/new/blobs/uploads/?mount="+digest.SHA256.FromString("nowhere").String(), nil).want(
		http.StatusAccepted)
	s.do("POST", "/v2/new/blobs/uploads/?mount=sha256:bad&from=to", nil).fails(http.StatusBadRequest, "DIGEST_INVALID")
}

func TestLogOfChanges(t *testing.T) {
	s := start(t, registry.Options{})
	d := s.pushBlob("a", []byte("data"))
	s.do("POST", "/v2/b/blobs/uploads/?from=a&mount="+d.String(), nil).want(http.StatusCreated)
	s.do("POST", "/v2/a/blobs/uploads/?digest="+digest.SHA256.FromString("x").String(), "x").want(http.StatusCreated)
	m := s.pushManifest("a", "v1", s.image("a", nil))
	s.do("DELETE", "/v2/a/manifests/v1", nil).want(http.StatusAccepted)
	s.do("DELETE", "/v2/a/manifests/"+m.String(), nil).want(http.StatusAccepted)
	s.do("DELETE", "/v2/b/blobs/"+d.String(), nil).want(http.StatusAccepted)
	s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK)
	s.http.Close() // every request is logged by now
	var changes []string
	for _, r := range s.log.all {
		for _, key := range []string{"method", "path", "status", "sent", "received", "duration", "remote"} {
			if r.attrs[key] == "" {
				t.Errorf("no %s in %v", key, r)
			}
		}
		switch r.level.String() {
		case "INFO":
			if r.message != "tag deleted" && r.attrs["digest"] == "" || r.attrs["repository"] == "" {
				t.Errorf("not said what was changed: %v", r)
			}
			changes = append(changes, r.message)
		case "DEBUG":
		default:
			t.Errorf("unexpected: %v", r)
		}
	}
	want := []string{"blob pushed", "blob mounted", "blob pushed", "blob pushed", "manifest pushed", "tag deleted",
		"manifest deleted", "blob deleted"}
	if !slices.Equal(changes, want) {
		t.Errorf("changes are logged as %q, want %q", changes, want)
	}
}
