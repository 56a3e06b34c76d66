package storagetest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// newRemote returns a repository of a registry, through oras-go's own client.
// The registry refuses a manifest that refers to what it does not have.
func newRemote(t *testing.T) *remote.Repository {
	t.Helper()
	r := &fakeRegistry{blobs: map[string][]byte{}, manifests: map[string]fakeManifest{}}
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	repo, err := remote.NewRepository(strings.TrimPrefix(server.URL, "http://") + "/some/repository")
	if err != nil {
		t.Fatal(err)
	}
	repo.PlainHTTP = true
	repo.Client = &auth.Client{Client: server.Client()}
	return repo
}

// fakeRegistry is the least of a registry that a copy to and from it needs.
type fakeRegistry struct {
	mu        sync.Mutex
	blobs     map[string][]byte       // by digest
	manifests map[string]fakeManifest // by digest and tag
}

type fakeManifest struct {
	mediaType string
	data      []byte
}

// ServeHTTP implements [http.Handler].
func (f *fakeRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	kind, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/some/repository/"), "/")
	switch {
	case kind == "blobs" && r.Method == http.MethodPost:
		w.Header().Set("Location", r.URL.Path+"session")
		w.WriteHeader(http.StatusAccepted)
	case kind == "blobs" && r.Method == http.MethodPut:
		want := r.URL.Query().Get("digest")
		if got := digest.Digest(want).Algorithm().FromBytes(body).String(); got != want {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", "it is "+got)
			return
		}
		f.blobs[want] = body
		w.WriteHeader(http.StatusCreated)
	case kind == "manifests" && r.Method == http.MethodPut:
		f.putManifest(w, r, name, body)
	case kind == "blobs" && f.blobs[name] != nil:
		send(w, "application/octet-stream", f.blobs[name])
	case kind == "manifests" && f.manifests[name].data != nil:
		send(w, f.manifests[name].mediaType, f.manifests[name].data)
	case kind == "referrers":
		f.sendReferrers(w, name)
	default:
		fail(w, http.StatusNotFound, "NAME_UNKNOWN", "it is not here")
	}
}

func send(w http.ResponseWriter, mediaType string, data []byte) {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(data).String())
	w.Write(data)
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

func (f *fakeRegistry) putManifest(w http.ResponseWriter, r *http.Request, reference string, body []byte) {
	var m struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
		Subject   *ocispec.Descriptor
	}
	if err := json.Unmarshal(body, &m); err != nil {
		fail(w, http.StatusBadRequest, "MANIFEST_INVALID", err.Error())
		return
	}
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, d := range append(m.Layers, m.Manifests...) {
		known := f.blobs[d.Digest.String()] != nil || f.manifests[d.Digest.String()].data != nil
		if !known && !strings.Contains(d.MediaType, ".nondistributable.") {
			fail(w, http.StatusNotFound, "MANIFEST_BLOB_UNKNOWN", d.Digest.String()+" is not here")
			return
		}
	}
	if m.Subject != nil {
		w.Header().Set("OCI-Subject", m.Subject.Digest.String())
	}
	stored := fakeManifest{r.Header.Get("Content-Type"), body}
	f.manifests[digest.FromBytes(body).String()] = stored
	f.manifests[reference] = stored
	w.WriteHeader(http.StatusCreated)
}

func (f *fakeRegistry) sendReferrers(w http.ResponseWriter, subject string) {
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	for reference, stored := range f.manifests {
		var m ocispec.Manifest
		if err := json.Unmarshal(stored.data, &m); err != nil || m.Subject == nil ||
			m.Subject.Digest.String() != subject || !strings.Contains(reference, ":") {
			continue
		}
		index.Manifests = append(index.Manifests, ocispec.Descriptor{
			MediaType: stored.mediaType, Digest: digest.Digest(reference), Size: int64(len(stored.data)),
			ArtifactType: m.ArtifactType, Annotations: m.Annotations,
		})
	}
	data, err := json.Marshal(index)
	if err != nil {
		fail(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	send(w, ocispec.MediaTypeImageIndex, data)
}
