package registry_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
)

// TestWords: answers are in the words of registries. They have no names of types in Go, nor what only
// dfcache has: a cid, a cache ID, the tag that is a repository, a delete by force.
func TestWords(t *testing.T) {
	s := start(t, registry.Options{})
	image := s.image("a", nil, []byte("layer"))
	d := s.pushManifest("a", "v1", image)
	s.do("PUT", "/v2/a/manifests/index", `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json",`+
		`"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"`+d.String()+`","size":`+
		itoa(len(image))+`}]}`).want(http.StatusCreated)
	long := strings.Repeat("x", 300)
	missing := digest.SHA256.FromString("missing").String()
	descriptor := func(fields string) string {
		return `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{` + fields + `},"layers":[]}`
	}
	for _, r := range []struct{ method, path, body string }{
		{"DELETE", "/v2/a/blobs/" + digest.SHA256.FromString("layer").String(), ""},
		{"DELETE", "/v2/a/manifests/" + d.String(), ""},
		{"DELETE", "/v2/a/manifests/" + missing, ""},
		{"GET", "/v2/a/manifests/.x", ""},
		{"PUT", "/v2/a/manifests/.x", string(image)},
		{"PUT", "/v2/a/manifests/" + long, string(image)},
		{"GET", "/v2/a/manifests/none", ""},
		{"GET", "/v2/a/manifests/sha256:x", ""},
		{"GET", "/v2/a/manifests/md5:" + strings.Repeat("0", 32), ""},
		{"GET", "/v2/a/blobs/x", ""},
		{"GET", "/v2/a/blobs/sha256:" + strings.Repeat("A", 64), ""},
		{"GET", "/v2/A/blobs/" + missing, ""},
		{"GET", "/v2/" + long + "/blobs/" + missing, ""},
		{"GET", "/v2/a..b/tags/list", ""},
		{"PUT", "/v2/a/manifests/" + d.String() + "?tag=.x", string(image)},
		{"PUT", "/v2/a/manifests/" + missing, string(image)},
		{"PUT", "/v2/a/manifests/v2", `[]`},
		{"PUT", "/v2/a/manifests/v2", `{`},
		{"PUT", "/v2/a/manifests/v2", `{"layers":1}`},
		{"PUT", "/v2/a/manifests/v2", `{"schemaVersion":"2"}`},
		{"PUT", "/v2/a/manifests/v2", `{"schemaVersion":2.5}`},
		{"PUT", "/v2/a/manifests/v2", `{"schemaVersion":2,"mediaType":7,"layers":[]}`},
		{"PUT", "/v2/a/manifests/v2", `{"schemaVersion":2,"annotations":{"a":1}}`},
		{"PUT", "/v2/a/manifests/v2", `{"schemaVersion":2,"layers":["x"]}`},
		{"PUT", "/v2/a/manifests/v2", descriptor(`"digest":"x","size":1`)},
		{"PUT", "/v2/a/manifests/v2", descriptor(`"digest":7,"size":1`)},
		{"PUT", "/v2/a/manifests/v2", descriptor(`"digest":"` + missing + `","size":"1"`)},
		{"PUT", "/v2/a/manifests/v2", descriptor(`"digest":"` + missing + `","size":1e99`)},
		{"PUT", "/v2/a/manifests/v2", descriptor(`"digest":"` + missing + `","size":1`)},
		{"POST", "/v2/a/blobs/uploads/?digest=x", "x"},
		{"POST", "/v2/a/blobs/uploads/?digest=" + missing, "x"},
		{"POST", "/v2/a/blobs/uploads/?mount=x&from=b", ""},
		{"POST", "/v2/a/blobs/uploads/?digest-algorithm=md5", ""},
		{"PUT", s.begin("a"), ""},
		{"GET", "/v2/a/blobs/uploads/none", ""},
		{"GET", "/v2/a/referrers/x", ""},
		{"GET", "/v2/a/tags/list?n=x", ""},
	} {
		a := s.do(r.method, r.path, r.body)
		if a.status < http.StatusBadRequest {
			t.Errorf("%s %s %s: %d", r.method, r.path, r.body, a.status)
		}
		text := strings.ToLower(string(a.body))
		for _, word := range []string{"go struct", "go value", "unmarshal", "int64", "json:", "cid", "cache id",
			"under tag", "force", "a tag is an oci", "--"} {
			if strings.Contains(text, word) {
				t.Errorf("%s %s %s: the answer has %q in it: %s", r.method, r.path, r.body, word, a.body)
			}
		}
	}
}
