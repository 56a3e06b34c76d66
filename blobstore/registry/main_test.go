package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a registry under test.
type server struct {
	*testing.T
	dir     string // of the store
	store   *blobstore.Store
	handler *registry.Handler
	http    *httptest.Server
	log     *records
}

// start starts a registry over an empty store.
func start(t *testing.T, opts registry.Options) *server {
	t.Helper()
	dir := t.TempDir()
	store, err := blobstore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, store, opts)
	s.dir = dir
	return s
}

func startOn(t *testing.T, store *blobstore.Store, opts registry.Options) *server {
	t.Helper()
	s := &server{T: t, store: store, log: &records{arrived: make(chan struct{}, 1)}}
	opts.Log = slog.New(s.log)
	s.handler = registry.New(store, opts)
	s.http = httptest.NewServer(s.handler)
	// Nothing is followed: the registry never sends a redirect.
	s.http.Client().CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	t.Cleanup(func() {
		s.http.Close()
		s.handler.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// answer is what a request got.
type answer struct {
	*testing.T
	what   string
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

// do sends a request. Headers are pairs of key and value.
func (s *server) do(method, path string, body any, header ...string) *answer {
	s.Helper()
	a, err := s.try(method, path, body, header...)
	if err != nil {
		s.Fatal(err)
	}
	return a
}

func (s *server) try(method, path string, body any, header ...string) (*answer, error) {
	var src io.Reader
	switch body := body.(type) {
	case nil:
	case []byte:
		src = bytes.NewReader(body)
	case string:
		src = strings.NewReader(body)
	case io.Reader: // of unknown length
		src = body
	default:
		panic(fmt.Sprintf("body is a %T", body))
	}
	ctx, cancel := context.WithTimeout(s.Context(), 2*time.Minute) // no answer is a failure, too
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, s.http.URL+path, src)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	resp, err := s.http.Client().Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return newAnswer(s.T, method, method+" "+path, resp), nil
}

// newAnswer reads an answer.
func newAnswer(t *testing.T, method, what string, resp *http.Response) *answer {
	a := &answer{T: t, what: what, status: resp.StatusCode, header: resp.Header}
	var body bytes.Buffer
	if method != http.MethodHead {
		body.Grow(int(max(0, resp.ContentLength)) + bytes.MinRead) // the race detector takes its time to copy
	}
	_, a.err = body.ReadFrom(resp.Body)
	a.body = body.Bytes()
	return a
}

// want checks status and headers: pairs of key and value, where "" means that
// there is none.
func (a *answer) want(status int, header ...string) *answer {
	a.Helper()
	if a.err != nil {
		a.Errorf("%s: reading the body: %v", a.what, a.err)
	}
	if a.status != status {
		a.Fatalf("%s: status %d, want %d: %s", a.what, a.status, status, a.body)
	}
	for i := 0; i < len(header); i += 2 {
		if got := strings.Join(a.header.Values(header[i]), ", "); got != header[i+1] {
			a.Errorf("%s: %s is %q, want %q", a.what, header[i], got, header[i+1])
		}
	}
	if got := a.header.Get("Docker-Distribution-Api-Version"); got != "registry/2.0" {
		a.Errorf("%s: Docker-Distribution-API-Version is %q", a.what, got)
	}
	if a.header.Get("Content-Encoding") != "" {
		a.Errorf("%s: the body is encoded", a.what)
	}
	if len(a.header.Values("Content-Length")) == 0 && status != http.StatusNoContent &&
		status != http.StatusNotModified {
		a.Errorf("%s: there is no Content-Length", a.what)
	}
	return a
}

// content checks the body.
func (a *answer) content(want []byte) *answer {
	a.Helper()
	if !bytes.Equal(a.body, want) {
		a.Errorf("%s: the body has %d bytes, want %d others", a.what, len(a.body), len(want))
	}
	return a
}

// fails checks that the answer is an error of the specification.
func (a *answer) fails(status int, code string, header ...string) *answer {
	a.Helper()
	a.want(status, append([]string{"Content-Type", "application/json"}, header...)...)
	if strings.HasPrefix(a.what, "HEAD ") {
		if len(a.body) != 0 {
			a.Errorf("%s has a body", a.what)
		}
		return a
	}
	e := a.problem()
	if e.Code != code || e.Message == "" {
		a.Errorf("%s: error %q (%s), want code %s", a.what, e.Code, e.Message, code)
	}
	return a
}

type problem struct {
	Code, Message string
	Detail        json.RawMessage
}

func (a *answer) problem() problem {
	a.Helper()
	var body struct{ Errors []problem }
	decoder := json.NewDecoder(bytes.NewReader(a.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&body); err != nil || len(body.Errors) != 1 {
		a.Errorf("%s: body is no error of the specification: %s (%v)", a.what, a.body, err)
		return problem{}
	}
	return body.Errors[0]
}

// contains checks that the error's message says something.
func (a *answer) contains(texts ...string) {
	a.Helper()
	for _, text := range texts {
		if message := a.problem().Message; !strings.Contains(message, text) {
			a.Errorf("%s: the message %q does not say %q", a.what, message, text)
		}
	}
}

// lists checks the names in the body.
func (a *answer) lists(key string, want ...string) *answer {
	a.Helper()
	a.want(http.StatusOK, "Content-Type", "application/json")
	var body map[string]json.RawMessage
	var got []string
	if err := json.Unmarshal(a.body, &body); err != nil {
		a.Fatalf("%s: %v", a.what, err)
	}
	if err := json.Unmarshal(body[key], &got); err != nil || got == nil || !slices.Equal(got, want) {
		a.Errorf("%s: %s, want %s %q", a.what, a.body, key, want)
	}
	return a
}

// next returns the path where a list goes on, or "".
func (a *answer) next() string {
	a.Helper()
	link := a.header.Get("Link")
	if link == "" {
		return ""
	}
	path, ok := strings.CutSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
	if !ok || !strings.HasPrefix(path, "/v2/") {
		a.Errorf("%s: Link is %q", a.what, link)
	}
	return path
}

// pushBlob stores a blob, in two requests as most clients do.
func (s *server) pushBlob(name string, data []byte) digest.Digest {
	s.Helper()
	return s.pushBlobAs(name, data, digest.SHA256.FromBytes(data))
}

func (s *server) pushBlobAs(name string, data []byte, d digest.Digest) digest.Digest {
	s.Helper()
	s.do("PUT", s.begin(name)+"?digest="+d.String(), data).
		want(http.StatusCreated, "Location", "/v2/"+name+"/blobs/"+d.String(), "Docker-Content-Digest", d.String(),
			"Content-Length", "0")
	return d
}

// begin begins an upload and returns its path.
func (s *server) begin(name string) string {
	s.Helper()
	a := s.do("POST", "/v2/"+name+"/blobs/uploads/", nil).want(
		http.StatusAccepted, "Range", "0-0", "Content-Length", "0")
	location := a.header.Get("Location")
	if !strings.HasPrefix(location, "/v2/"+name+"/blobs/uploads/") ||
		!strings.HasSuffix(location, "/"+a.header.Get("Docker-Upload-Uuid")) {
		s.Fatalf("Location is %q, Docker-Upload-UUID %q", location, a.header.Get("Docker-Upload-Uuid"))
	}
	return location
}

// image returns the manifest of an image whose blobs are pushed.
func (s *server) image(name string, edit func(*ocispec.Manifest), layers ...[]byte) []byte {
	s.Helper()
	config := []byte("{}")
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: s.pushBlob(name, config),
			Size: int64(len(config))},
		Layers: []ocispec.Descriptor{},
	}
	for _, layer := range layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayer, Digest: s.pushBlob(name, layer), Size: int64(len(layer))})
	}
	if edit != nil {
		edit(&m)
	}
	return encode(s.T, m)
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	var data bytes.Buffer
	encoder := json.NewEncoder(&data)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		t.Fatal(err)
	}
	return bytes.TrimSpace(data.Bytes())
}

// pushManifest stores a manifest under a tag or its digest.
func (s *server) pushManifest(name, reference string, manifest []byte) digest.Digest {
	s.Helper()
	d := digest.SHA256.FromBytes(manifest)
	s.do("PUT", "/v2/"+name+"/manifests/"+reference, manifest, "Content-Type", ocispec.MediaTypeImageManifest).
		want(http.StatusCreated, "Location", "/v2/"+name+"/manifests/"+d.String(), "Docker-Content-Digest", d.String(),
			"Content-Length", "0")
	return d
}

// content returns n bytes that differ with the seed.
func content(n int, seed byte) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

func size(data []byte) string { return itoa(len(data)) }

func itoa(n int) string { return strconv.Itoa(n) }

// records is a log.
type records struct {
	mu      sync.Mutex
	all     []record
	arrived chan struct{} // gets a value after a record
}

type record struct {
	level   slog.Level
	message string
	attrs   map[string]string
}

func (l *records) Enabled(context.Context, slog.Level) bool { return true }
func (l *records) WithAttrs([]slog.Attr) slog.Handler       { panic("not used") }
func (l *records) WithGroup(string) slog.Handler            { panic("not used") }

func (l *records) Handle(_ context.Context, r slog.Record) error {
	e := record{r.Level, r.Message, map[string]string{}}
	r.Attrs(func(a slog.Attr) bool {
		e.attrs[a.Key] = a.Value.String()
		return true
	})
	l.mu.Lock()
	l.all = append(l.all, e)
	l.mu.Unlock()
	select {
	case l.arrived <- struct{}{}:
	default:
	}
	return nil
}

// wait returns the first record that match is true for, when it has come.
func (l *records) wait(t *testing.T, match func(record) bool) record {
	t.Helper()
	giveUp := time.After(30 * time.Second)
	for {
		l.mu.Lock()
		i := slices.IndexFunc(l.all, match)
		if i >= 0 {
			defer l.mu.Unlock()
			return l.all[i]
		}
		l.mu.Unlock()
		select {
		case <-l.arrived:
		case <-giveUp:
			t.Fatal("the log has no such record")
		}
	}
}

func (r record) String() string {
	text := r.level.String() + " " + r.message
	for _, key := range slices.Sorted(maps.Keys(r.attrs)) {
		text += " " + key + "=" + r.attrs[key]
	}
	return text
}
