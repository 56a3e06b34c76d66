package registry

import (
	"net/url"
	"strings"
)

// endpoint is what the path of a request leads to.
type endpoint int

const (
	endpointNone      endpoint = iota
	endpointBase               // /v2/
	endpointCatalog            // /v2/_catalog
	endpointTags               // /v2/<name>/tags/list
	endpointReferrers          // /v2/<name>/referrers/<digest>
	endpointManifest           // /v2/<name>/manifests/<reference>
	endpointBlob               // /v2/<name>/blobs/<digest>
	endpointUploads            // /v2/<name>/blobs/uploads/
	endpointUpload             // /v2/<name>/blobs/uploads/<session>
)

// target is what a path names. Only its form has been looked at: name may not
// be one of a repository.
type target struct {
	endpoint  endpoint
	name      string // of the repository
	reference string // a tag, a digest or an upload session
}

// parsePath reads the path of a URL. It looks from its end, because the name of
// a repository may have any words in it: "a/blobs/uploads" is one.
func parsePath(u *url.URL) target {
	// Where a slash is sent encoded, it is not one that separates. No name has such.
	if strings.Contains(strings.ToLower(u.RawPath), "%2f") {
		return target{}
	}
	rest, ok := strings.CutPrefix(u.Path, "/v2/")
	switch {
	case u.Path == "/v2", ok && rest == "":
		return target{endpoint: endpointBase}
	case !ok:
		return target{}
	case rest == "_catalog":
		return target{endpoint: endpointCatalog}
	}
	rest, last := cutLast(rest)
	name, kind := cutLast(rest)
	switch {
	case kind == "tags" && last == "list":
		return target{endpointTags, name, ""}
	case kind == "referrers":
		return target{endpointReferrers, name, last}
	case kind == "manifests":
		return target{endpointManifest, name, last}
	case kind == "blobs" && last == "uploads": // without the slash at its end
		return target{endpointUploads, name, ""}
	case kind == "blobs":
		return target{endpointBlob, name, last}
	}
	if name, parent := cutLast(name); kind == "uploads" && parent == "blobs" {
		if last == "" {
			return target{endpointUploads, name, ""}
		}
		return target{endpointUpload, name, last}
	}
	return target{}
}

// cutLast cuts the last element off a path.
func cutLast(path string) (rest, last string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

// The paths that are sent to clients. They begin with a slash: some clients
// take other relative ones for the name of a host.

func blobPath(name, digest string) string { return "/v2/" + name + "/blobs/" + digest }

func manifestPath(name, digest string) string { return "/v2/" + name + "/manifests/" + digest }

func uploadPath(name, session string) string { return "/v2/" + name + "/blobs/uploads/" + session }
