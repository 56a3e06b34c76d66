package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// The error codes of the OCI distribution specification that are used here.
const (
	codeBlobUnknown         = "BLOB_UNKNOWN"
	codeBlobUploadInvalid   = "BLOB_UPLOAD_INVALID"
	codeBlobUploadUnknown   = "BLOB_UPLOAD_UNKNOWN"
	codeDigestInvalid       = "DIGEST_INVALID"
	codeManifestBlobUnknown = "MANIFEST_BLOB_UNKNOWN"
	codeManifestInvalid     = "MANIFEST_INVALID"
	codeManifestUnknown     = "MANIFEST_UNKNOWN"
	codeNameInvalid         = "NAME_INVALID"
	codeNameUnknown         = "NAME_UNKNOWN"
	codeSizeInvalid         = "SIZE_INVALID"
	codeDenied              = "DENIED"
	codeUnsupported         = "UNSUPPORTED"
	codeTooManyRequests     = "TOOMANYREQUESTS"

	// codeUnknown is for what is no fault of the client; the specification
	// has codes for those only.
	codeUnknown = "UNKNOWN"
)

// problem is an error as a client is told of it.
type problem struct {
	status  int
	code    string
	message string
	detail  any         // becomes JSON; nil is none
	header  http.Header // besides those that every answer has
	cause   error       // for the log
}

func (p *problem) Error() string { return p.code + ": " + p.message }

func (p *problem) Unwrap() error { return p.cause }

func newProblem(status int, code, format string, args ...any) *problem {
	return &problem{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// with adds a header.
func (p *problem) with(key, value string) *problem {
	if p.header == nil {
		p.header = http.Header{}
	}
	p.header.Set(key, value)
	return p
}

// because adds what the log should know.
func (p *problem) because(err error) *problem {
	p.cause = err
	return p
}

// problemOf says what a client is told of an error: the one place where errors
// of the store become status and code.
func problemOf(err error, t target) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	unknown, invalid := codeBlobUnknown, codeDigestInvalid
	if t.endpoint == endpointManifest {
		unknown, invalid = codeManifestUnknown, codeManifestInvalid
	}
	var p *problem
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		p = newProblem(http.StatusServiceUnavailable, codeUnknown, "the request was given up: try again")
	case errors.Is(err, blobstore.ErrBusy):
		// Here, or the peers that have it: before all that says that it is not there.
		p = newProblem(http.StatusServiceUnavailable, codeUnknown, "too much is under way: try again").with(
			"Retry-After", "1")
	case errors.Is(err, blobstore.ErrNoSpace):
		p = newProblem(http.StatusInsufficientStorage, codeDenied,
			"no space left: the disk of the registry, or its quota, is full: delete something there, then push again")
	case errors.Is(err, blobstore.ErrCorrupt):
		p = newProblem(http.StatusInternalServerError, codeUnknown,
			"what is stored here is damaged, and was not sent: push it again to repair it")
	case errors.Is(err, blobstore.ErrMismatch):
		p = newProblem(http.StatusBadRequest, codeDigestInvalid,
			"what was sent does not have the digest that was given: send it again")
		if m, ok := errors.AsType[*digest.MismatchError](err); ok {
			p.detail = map[string]string{"want": m.Want.String(), "got": m.Got.String()}
		}
	case errors.Is(err, blobstore.ErrMoved):
		p = newProblem(http.StatusPreconditionFailed, codeDenied, "others change %s all the time: try again",
			t.reference)
	case errors.Is(err, blobstore.ErrReferenced):
		// 405, not 409: what clients take for "can't be deleted".
		by := "other content"
		if e, ok := errors.AsType[*p2p.ReferencedError](err); ok {
			by = e.By
		}
		p = newProblem(http.StatusMethodNotAllowed, codeDenied, "%s is still referred to by %s: delete that first",
			t.reference, by).with("Allow", "GET, HEAD")
	case errors.Is(err, blobstore.ErrMissingRef):
		p = newProblem(http.StatusNotFound, codeManifestBlobUnknown, "%v: push that first", err)
		if m, ok := errors.AsType[*p2p.MissingRefError](err); ok {
			p.detail = map[string]string{"digest": m.Missing.String()}
		}
	case errors.Is(err, errdef.ErrSizeExceedsLimit):
		p = newProblem(http.StatusRequestEntityTooLarge, codeManifestInvalid, "a manifest can have %d bytes at most",
			blobstore.MaxManifest)
	case errors.Is(err, blobstore.ErrInvalid):
		p = newProblem(http.StatusBadRequest, invalid, "%v", err)
	case errors.Is(err, blobstore.ErrNotFound):
		p = newProblem(http.StatusNotFound, unknown, "%s is not in repository %s", t.reference, t.name)
	case errors.Is(err, blobstore.ErrUnreachable):
		// Not 503: a client that pushes asks first whether there is content, and has
		// to go on where this host is on its own; one that pulls through a mirror
		// looks elsewhere after a 404, and gives up or tries for long after a 503.
		p = newProblem(http.StatusNotFound, unknown,
			"%s is not on this host, in repository %s, and no peer could be asked for it", t.reference, t.name)
	case errors.Is(err, blobstore.ErrUnavailable), errors.Is(err, blobstore.ErrFailed),
		errors.Is(err, blobstore.ErrClosed):
		p = newProblem(http.StatusServiceUnavailable, codeUnknown,
			"the store can't be reached now: try again later").with("Retry-After", "5")
	default:
		p = newProblem(http.StatusInternalServerError, codeUnknown, "the registry has failed: its log says why")
	}
	return p.because(err)
}

// send answers a request with the problem. A client that is still sending gets
// the answer at once, and the time to read it: closing the connection on what it
// sends would reset it, and the answer be lost.
func (p *problem) send(w *response) {
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail,omitempty"`
	}
	body, err := json.Marshal(map[string][]entry{"errors": {{p.code, p.message, p.detail}}})
	if err != nil {
		body = nil // can't be: details are maps of strings
	}
	h := w.Header()
	// What was said about content that does not come.
	for _, key := range []string{"Etag", "Content-Range", "Accept-Ranges", "Docker-Content-Digest"} {
		h.Del(key)
	}
	for key, values := range p.header {
		h[key] = values
	}
	linger := !w.request.ended && w.control.EnableFullDuplex() == nil
	if linger {
		h.Set("Connection", "close")
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.status)
	_, _ = w.Write(body) // a client that does not take it in is gone
	if linger && w.control.Flush() == nil {
		w.request.discard()
	}
}
