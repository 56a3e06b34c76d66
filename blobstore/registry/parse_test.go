package registry

import (
	"math"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestParsePath(t *testing.T) {
	for path, want := range map[string]target{
		"/v2":                                    {endpointBase, "", ""},
		"/v2/":                                   {endpointBase, "", ""},
		"/v2/_catalog":                           {endpointCatalog, "", ""},
		"/v2/a/tags/list":                        {endpointTags, "a", ""},
		"/v2/tags/list":                          {endpointTags, "", ""},
		"/v2/a/b/tags/list":                      {endpointTags, "a/b", ""},
		"/v2/tags/list/tags/list":                {endpointTags, "tags/list", ""},
		"/v2/a/manifests/v1":                     {endpointManifest, "a", "v1"},
		"/v2/a/manifests/":                       {endpointManifest, "a", ""},
		"/v2/a/manifests/manifests/manifests":    {endpointManifest, "a/manifests", "manifests"},
		"/v2/a/manifests/list":                   {endpointManifest, "a", "list"},
		"/v2/a/manifests/tags/list":              {endpointTags, "a/manifests", ""},
		"/v2/a/referrers/sha256:x":               {endpointReferrers, "a", "sha256:x"},
		"/v2/a/blobs/sha256:x":                   {endpointBlob, "a", "sha256:x"},
		"/v2/a/blobs/":                           {endpointBlob, "a", ""},
		"/v2/a/blobs/uploads":                    {endpointUploads, "a", ""},
		"/v2/a/blobs/uploads/":                   {endpointUploads, "a", ""},
		"/v2/a/blobs/uploads/x":                  {endpointUpload, "a", "x"},
		"/v2/a/blobs/uploads/blobs/uploads/":     {endpointUploads, "a/blobs/uploads", ""},
		"/v2/a/blobs/uploads/blobs/uploads/x":    {endpointUpload, "a/blobs/uploads", "x"},
		"/v2/a/blobs/uploads/blobs/sha256:x":     {endpointBlob, "a/blobs/uploads", "sha256:x"},
		"/v2/a/blobs/uploads/manifests/v1":       {endpointManifest, "a/blobs/uploads", "v1"},
		"/v2/a/blobs/uploads/referrers/sha256:x": {endpointReferrers, "a/blobs/uploads", "sha256:x"},
		"/v2/a//manifests/v1":                    {endpointManifest, "a/", "v1"},
		"/v2/../manifests/v1":                    {endpointManifest, "..", "v1"},
		"/v2/a%2Fb/manifests/v1":                 {},
		"/v2/a/manifests/v%2f1":                  {},
		"/v2/a/b":                                {},
		"/v2x/":                                  {},
		"/":                                      {},
		"":                                       {},
	} {
		u, err := url.Parse(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := parsePath(u); got != want {
			t.Errorf("%s is %+v, want %+v", path, got, want)
		}
	}
}

// pathOf is the inverse of parsePath.
func pathOf(t target) string {
	switch t.endpoint {
	case endpointBase:
		return "/v2/"
	case endpointCatalog:
		return "/v2/_catalog"
	case endpointTags:
		return "/v2/" + t.name + "/tags/list"
	case endpointReferrers:
		return "/v2/" + t.name + "/referrers/" + t.reference
	case endpointManifest:
		return manifestPath(t.name, t.reference)
	case endpointBlob:
		return blobPath(t.name, t.reference)
	case endpointUploads, endpointUpload:
		return uploadPath(t.name, t.reference)
	}
	return ""
}

func FuzzParsePath(f *testing.F) {
	for _, path := range []string{"/v2/", "/v2/_catalog", "/v2/a/tags/list", "/v2/a/blobs/uploads/x",
		"/v2/a/manifests/manifests/v1", "/v2/a//referrers/x"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got := parsePath(&url.URL{Path: path})
		if got.endpoint == endpointNone {
			if got != (target{}) {
				t.Errorf("%q leads to nothing, but has %+v", path, got)
			}
			return
		}
		if strings.Contains(got.reference, "/") {
			t.Errorf("%q has the reference %q", path, got.reference)
		}
		if again := parsePath(&url.URL{Path: pathOf(got)}); again != got {
			t.Errorf("%q is %+v, and that is the path %q, which is %+v", path, got, pathOf(got), again)
		}
	})
}

var (
	simpleRanges = regexp.MustCompile(`^bytes=[0-9]{0,18}-[0-9]{0,18}(,[0-9]{0,18}-[0-9]{0,18})*$`)
	lastNothing  = regexp.MustCompile(`[=,]-0+(,|$)`)
)

// FuzzParseRange compares with net/http, where both are to do the same.
func FuzzParseRange(f *testing.F) {
	for _, header := range []string{"", "bytes=0-1", "bytes=5-", "bytes=-5", "bytes=5-0", "bytes=-", "bytes=1-2,3-4",
		"x=1-2", "bytes=99999999999999999999-", "bytes=5-6,1-2,0-0", "bytes=0-1,100-", "bytes=0-8,1-9", "bytes=,1-2,",
		"bytes=1-2,x", "bytes=0-1,3-2"} {
		f.Add(header, int64(10))
		f.Add(header, int64(0))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		ranges, err := parseRanges(header, size)
		if err != nil && (len(ranges) > 0 || size == 0) || len(ranges) > maxRanges {
			t.Errorf("%q of %d: %d ranges, %v", header, size, len(ranges), err)
		}
		for left, rest := size, ranges; len(rest) > 0; rest = rest[1:] {
			r := rest[0]
			if left -= r.n; r.off < 0 || r.n <= 0 || r.off > size-r.n || left < 0 {
				t.Errorf("%q of %d: %v", header, size, ranges)
			}
		}
		// Of nothing, and of the last 0 bytes, net/http sends parts.
		if size == 0 || size > 1000 || !simpleRanges.MatchString(header) || lastNothing.MatchString(header) ||
			strings.Count(header, ",") >= maxRanges {
			return
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Range", header)
		w := httptest.NewRecorder()
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(strings.Repeat("x", int(size))))
		want := http.StatusOK
		switch {
		case err != nil:
			want = http.StatusRequestedRangeNotSatisfiable
		case len(ranges) > 0:
			want = http.StatusPartialContent
		}
		if w.Code != want {
			t.Errorf("%q of %d: net/http sends %d, not %d", header, size, w.Code, want)
		}
		if w.Code != http.StatusPartialContent {
			return
		}
		sent := []string{w.Header().Get("Content-Range")}
		_, params, err := mime.ParseMediaType(w.Header().Get("Content-Type"))
		if err == nil && params["boundary"] != "" {
			sent = nil
			parts := multipart.NewReader(w.Body, params["boundary"])
			for part, err := parts.NextPart(); err == nil; part, err = parts.NextPart() {
				sent = append(sent, part.Header.Get("Content-Range"))
			}
		}
		for i, one := range sent {
			if len(sent) != len(ranges) || one != ranges[i].contentRange(size) {
				t.Errorf("%q of %d: net/http sends %q, not %v", header, size, sent, ranges)
				break
			}
		}
	})
}

var contentRange = regexp.MustCompile(`^[0-9]+-[0-9]+$`)

func FuzzParseContentRange(f *testing.F) {
	for _, header := range []string{"", "0-0", "0-1023", "5-4", "-", "bytes 0-1/2",
		"99999999999999999999-99999999999999999999", "0-9223372036854775807",
		"9223372036854775806-9223372036854775806"} {
		f.Add(header)
	}
	f.Fuzz(func(t *testing.T, header string) {
		off, n, ok := parseContentRange(header)
		if !ok {
			if off != 0 || n != 0 {
				t.Errorf("%q is refused, but is %d from %d on", header, n, off)
			}
			first, last, _ := strings.Cut(header, "-")
			a, err1 := strconv.ParseInt(first, 10, 64)
			b, err2 := strconv.ParseInt(last, 10, 64)
			if contentRange.MatchString(header) && err1 == nil && err2 == nil && a <= b && b < math.MaxInt64 {
				t.Errorf("%q is refused", header)
			}
			return
		}
		if !contentRange.MatchString(header) || off < 0 || n < 1 || off > math.MaxInt64-n {
			t.Errorf("%q is %d from %d on", header, n, off)
		}
	})
}
