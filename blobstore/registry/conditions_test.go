package registry_test

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

func quoted(d digest.Digest) string { return `"` + d.String() + `"` }

// TestConditions: what is to be changed is changed where the conditions of the request hold for it.
func TestConditions(t *testing.T) {
	s := start(t, registry.Options{})
	first, second := s.image("a", nil, []byte("1")), s.image("a", nil, []byte("2"))
	one, two := digest.SHA256.FromBytes(first), digest.SHA256.FromBytes(second)
	s.pushManifest("a", "keeps", s.image("a", nil, []byte("1"), []byte("2"))) // what these refer to
	const v1 = "/v2/a/manifests/v1"
	none := quoted(digest.SHA256.FromString("none"))
	for i, c := range []struct {
		method, path string
		content      []byte
		status       int
		header       []string
	}{
		{"PUT", v1, first, 412, []string{"If-Match", "*"}}, // there is nothing yet
		{"PUT", v1, first, 412, []string{"If-Match", quoted(one)}},
		{"DELETE", v1, nil, 412, []string{"If-Match", "*"}},
		{"DELETE", v1, nil, 404, []string{"If-None-Match", "*"}},
		{"PUT", v1, first, 201, []string{"If-None-Match", "*"}},
		{"PUT", v1, second, 412, []string{"If-None-Match", "*"}},
		{"PUT", v1, second, 412, []string{"If-None-Match", quoted(one)}},
		{"PUT", v1, second, 412, []string{"If-None-Match", none + ",W/" + quoted(one)}},
		{"PUT", v1, second, 412, []string{"If-Match", quoted(two)}},
		{"PUT", v1, second, 412, []string{"If-Match", "W/" + quoted(one)}}, // a weak tag says nothing of bytes
		{"PUT", v1, second, 412, []string{"If-Match", quoted(one), "If-None-Match", "*"}},
		{"PUT", v1, first, 201, []string{"If-Match", quoted(one)}},
		{"PUT", v1, first, 201, []string{"If-Match", "*", "If-None-Match", none}},
		{"PUT", v1, second, 201, []string{"If-Match", none + " ,, " + quoted(one)}},
		{"PUT", v1, first, 201, []string{"If-Match", none, "If-Match", quoted(two)}}, // in two lines
		{"DELETE", v1, nil, 412, []string{"If-Match", quoted(two)}},
		{"DELETE", v1, nil, 412, []string{"If-None-Match", "*"}},
		{"GET", v1, nil, 412, []string{"If-Match", quoted(two)}},
		{"GET", v1, nil, 200, []string{"If-Match", quoted(one)}},
		{"HEAD", v1, nil, 412, []string{"If-Match", quoted(two)}},
		{"GET", v1, nil, 304, []string{"If-None-Match", "W/" + quoted(one)}},
		{"DELETE", v1, nil, 202, []string{"If-Match", quoted(one)}},
		// By digest: a manifest is there or not.
		{"PUT", "/v2/a/manifests/" + one.String(), first, 412, []string{"If-None-Match", "*"}},
		{"PUT", "/v2/a/manifests/" + one.String() + "?tag=x", first, 412, []string{"If-None-Match", "*"}},
		{"PUT", "/v2/a/manifests/" + one.String() + "?tag=x", first, 201, []string{"If-Match", quoted(one)}},
		{"DELETE", "/v2/a/manifests/" + one.String(), nil, 412, []string{"If-Match", quoted(two)}},
		{"DELETE", "/v2/a/manifests/" + one.String(), nil, 202, []string{"If-Match", quoted(one)}},
		{"PUT", "/v2/a/manifests/" + one.String(), first, 412, []string{"If-Match", "*"}},
		{"PUT", "/v2/a/manifests/" + one.String(), first, 201, []string{"If-None-Match", "*"}},
		// What is no list is not passed over.
		{"PUT", v1, first, 400, []string{"If-None-Match", one.String()}},
		{"PUT", v1, first, 400, []string{"If-Match", ""}},
		{"PUT", v1, first, 400, []string{"If-Match", `"a" "b"`}},
		{"PUT", v1, first, 400, []string{"If-Match", `"a`}},
		{"PUT", v1, first, 400, []string{"If-Match", `*, "a"`}},
		{"DELETE", v1, nil, 400, []string{"If-Match", "w/" + quoted(one)}},
		{"PUT", v1, first, 412, []string{"If-Match", `"a,b", "` + one.String() + `,"`}},
		// Nothing is changed that is wrong for another reason.
		{"PUT", v1, []byte("{}"), 400, []string{"If-None-Match", "*"}},
		{"GET", v1, nil, 404, []string{"If-Match", "*"}},
		{"GET", "/v2/a/manifests/keeps", nil, 200, []string{"If-None-Match", "malformed"}},
		{"GET", "/v2/a/manifests/keeps", nil, 400, []string{"If-Match", "malformed"}},
	} {
		a := s.do(c.method, c.path, c.content, c.header...)
		if a.status != c.status {
			t.Fatalf("%d: %s %s with %q is %d, want %d: %s", i, c.method, c.path, c.header, a.status, c.status, a.body)
		}
		if c.status == 412 {
			a.fails(http.StatusPreconditionFailed, "DENIED")
		}
	}
	blob := s.pushBlob("a", []byte("blob"))
	path := "/v2/a/blobs/" + blob.String()
	s.do("GET", path, nil, "If-Match", none).fails(http.StatusPreconditionFailed, "DENIED")
	s.do("GET", path, nil, "If-Match", quoted(blob)).want(http.StatusOK)
	s.do("DELETE", path, nil, "If-Match", none).fails(http.StatusPreconditionFailed, "DENIED")
	s.do("DELETE", path, nil, "If-None-Match", quoted(blob)).fails(http.StatusPreconditionFailed, "DENIED")
	s.do("DELETE", path, nil, "If-Match", quoted(blob)).want(http.StatusAccepted)
	s.do("DELETE", path, nil, "If-Match", "*").fails(http.StatusPreconditionFailed, "DENIED")
}

// TestConditionsOfMany: of many who change the same, those win whose conditions held when they did.
func TestConditionsOfMany(t *testing.T) {
	s := start(t, registry.Options{})
	base := s.image("a", nil)
	each := func(change func(manifest []byte) int, want int32) {
		t.Helper()
		var won atomic.Int32
		var all sync.WaitGroup
		for i := range 12 {
			manifest := []byte(strings.TrimSuffix(string(base), "}") + `,"annotations":{"i":"` + itoa(i) + `"}}`)
			all.Go(func() {
				switch status := change(manifest); status {
				case http.StatusCreated, http.StatusAccepted:
					won.Add(1)
				case http.StatusPreconditionFailed:
				default:
					t.Errorf("status %d", status)
				}
			})
		}
		all.Wait()
		if won.Load() != want {
			t.Errorf("%d have won, want %d", won.Load(), want)
		}
	}
	change := func(method, path string, content []byte, header ...string) int {
		a, err := s.try(method, path, content, header...)
		if err != nil {
			t.Error(err)
			return 0
		}
		return a.status
	}
	for range 5 {
		each(func(m []byte) int { return change("PUT", "/v2/a/manifests/v1", m, "If-None-Match", "*") }, 1)
		now := s.do("HEAD", "/v2/a/manifests/v1", nil).header.Get("Etag")
		s.pushManifest("a", "v1", base)
		each(func(m []byte) int { return change("PUT", "/v2/a/manifests/v1", m, "If-Match", now) }, 0)
		now = s.do("HEAD", "/v2/a/manifests/v1", nil).header.Get("Etag")
		each(func(m []byte) int { return change("PUT", "/v2/a/manifests/v1", m, "If-Match", now) }, 1)
		now = s.do("HEAD", "/v2/a/manifests/v1", nil).header.Get("Etag")
		each(func([]byte) int { return change("DELETE", "/v2/a/manifests/v1", nil, "If-Match", now) }, 1)
		// The same bytes: who comes first creates them.
		d := digest.SHA256.FromBytes(base)
		s.do("DELETE", "/v2/a/manifests/"+d.String(), nil).want(http.StatusAccepted)
		each(func([]byte) int {
			return change("PUT", "/v2/a/manifests/"+d.String(), base, "If-None-Match", "*")
		}, 1)
	}
}

// TestConditionsWithPeers: what only a peer has is there, too.
func TestConditionsWithPeers(t *testing.T) {
	eachPeer(t, func(s *server, _ *peertest.Engine, theirs *server) {
		theirs.pushManifest("a", "v1", theirs.image("a", nil, []byte("1")))
		mine := s.image("a", nil, []byte("2"))
		s.do("PUT", "/v2/a/manifests/v1", mine, "If-None-Match", "*").fails(http.StatusPreconditionFailed, "DENIED")
		s.do("PUT", "/v2/a/manifests/v1", mine, "If-Match", quoted(digest.SHA256.FromBytes(mine))).fails(
			http.StatusPreconditionFailed, "DENIED")
		now := theirs.do("HEAD", "/v2/a/manifests/v1", nil).header.Get("Etag")
		s.do("PUT", "/v2/a/manifests/v1", mine, "If-Match", now).want(http.StatusCreated)
	})
}

// TestDeleteManifestAsBlob: at the endpoint of blobs a manifest is not deleted, with all that goes with it.
func TestDeleteManifestAsBlob(t *testing.T) {
	eachPeer(t, func(s *server, _ *peertest.Engine, theirs *server) {
		for name, at := range map[string]*server{"here": s, "peer": theirs} {
			d := at.pushManifest(name, "v1", at.image(name, nil))
			s.do("DELETE", "/v2/"+name+"/blobs/"+d.String(), nil).fails(http.StatusMethodNotAllowed, "UNSUPPORTED",
				"Allow", "GET, HEAD").contains("manifest")
			at.do("GET", "/v2/"+name+"/manifests/v1", nil).want(http.StatusOK, "Docker-Content-Digest", d.String())
		}
	})
}
