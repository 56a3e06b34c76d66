package registry

import (
	"errors"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strconv"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// blobMediaType is the type of all blobs: what they are is said where a
// manifest refers to them.
const blobMediaType = "application/octet-stream"

// describe sets the headers that tell of content.
func (w *response) describe(d ocispec.Descriptor) {
	h := w.Header()
	h.Set("Content-Type", d.MediaType)
	h.Set("Content-Length", strconv.FormatInt(d.Size, 10))
	h.Set("Docker-Content-Digest", d.Digest.String())
	h.Set("Etag", etag(d.Digest))
}

func etag(d digest.Digest) string { return `"` + d.String() + `"` }

// headBlob says whether there is a blob.
func (h *Handler) headBlob(w *response, r *request) error {
	d, err := parseDigest(r.reference)
	if err != nil {
		return err
	}
	found, err := r.repo.Blob(r.Context(), d)
	if err != nil {
		return err
	}
	found.MediaType = blobMediaType
	w.describe(found)
	w.Header().Set("Accept-Ranges", "bytes")
	done, err := w.isAnswered(r, d)
	if err == nil && !done {
		w.WriteHeader(http.StatusOK)
	}
	return err
}

// getBlob sends a blob or a range of it.
func (h *Handler) getBlob(w *response, r *request) error {
	d, err := parseDigest(r.reference)
	if err != nil {
		return err
	}
	content, err := r.repo.OpenBlob(r.Context(), d)
	if err != nil {
		return err
	}
	defer content.Close()
	found := ocispec.Descriptor{MediaType: blobMediaType, Digest: d, Size: content.Size()}
	w.describe(found)
	w.Header().Set("Accept-Ranges", "bytes")
	if done, err := w.isAnswered(r, d); done || err != nil {
		return err
	}
	header := r.Header.Get("Range")
	if match := r.Header.Get("If-Range"); match != "" && match != etag(d) {
		header = ""
	}
	ranges, err := parseRanges(header, found.Size)
	if err != nil {
		return newProblem(http.StatusRequestedRangeNotSatisfiable, codeSizeInvalid,
			"range %.80q has nothing of the blob's %d bytes, or is malformed: ask for bytes=<first>-<last>, "+
				"bytes=<first>- or bytes=-<count>", header, found.Size).
			with("Content-Range", "bytes */"+strconv.FormatInt(found.Size, 10))
	}
	if len(ranges) > 1 {
		return sendRanges(w, r, content, ranges)
	}
	whole := byteRange{0, found.Size}
	if len(ranges) == 1 {
		whole = ranges[0]
		w.success = http.StatusPartialContent
		w.Header().Set("Content-Length", strconv.FormatInt(whole.n, 10))
		w.Header().Set("Content-Range", whole.contentRange(found.Size))
	}
	if err := content.CopyRange(r.Context(), w.writer(r.Request), whole.off, whole.n); err != nil {
		return err
	}
	w.begin() // nothing was written of an empty blob
	return nil
}

// sendRanges sends several ranges of a blob, each as a part of its own, in the order that they were
// asked for.
func sendRanges(w *response, r *request, content *blobstore.Reader, ranges []byteRange) error {
	header := func(one byteRange) textproto.MIMEHeader {
		return textproto.MIMEHeader{
			"Content-Type": {blobMediaType}, "Content-Range": {one.contentRange(content.Size())}}
	}
	// All but the bytes of the ranges, to know the length.
	var frame countingWriter
	parts := multipart.NewWriter(&frame)
	var sum int64
	for _, one := range ranges {
		_, _ = parts.CreatePart(header(one)) // counting does not fail
		sum += one.n
	}
	_ = parts.Close()
	boundary := parts.Boundary()

	w.success = http.StatusPartialContent
	w.Header().Set("Content-Length", strconv.FormatInt(int64(frame)+sum, 10))
	w.Header().Set("Content-Type", "multipart/byteranges; boundary="+boundary)
	out := w.writer(r.Request)
	parts = multipart.NewWriter(out)
	if err := parts.SetBoundary(boundary); err != nil {
		return err
	}
	for _, one := range ranges {
		if _, err := parts.CreatePart(header(one)); err != nil {
			return err
		}
		if err := content.CopyRange(r.Context(), out, one.off, one.n); err != nil {
			return err
		}
	}
	return parts.Close()
}

// countingWriter counts what is written to it.
type countingWriter int64

// Write implements [io.Writer].
func (w *countingWriter) Write(p []byte) (int, error) {
	*w += countingWriter(len(p))
	return len(p), nil
}

// deleteBlob removes a blob from the repository. A manifest goes with its tags and what is attached to
// it: that is deleted as one, or not at all.
func (h *Handler) deleteBlob(w *response, r *request) error {
	d, err := parseDigest(r.reference)
	if err != nil {
		return err
	}
	c, err := parseConditions(r.Header)
	if err != nil {
		return err
	}
	if c != (conditions{}) {
		// What a digest stands for is there or not, and does not change.
		is := d
		if _, err := r.repo.Resolve(r.Context(), r.reference); errors.Is(err, blobstore.ErrNotFound) {
			is = ""
		}
		if !c.matches(is) || c.isKnown(is) {
			return errCondition(is)
		}
	}
	err = r.repo.DeleteBlob(r.Context(), d)
	if errors.Is(err, blobstore.ErrMoved) {
		return newProblem(http.StatusMethodNotAllowed, codeUnsupported,
			"%s is a manifest: delete it at %s", d, manifestPath(r.name, d.String())).with("Allow", "GET, HEAD")
	}
	if err != nil {
		return err
	}
	r.change, r.digest = "blob deleted", d
	w.sendEmpty(http.StatusAccepted)
	return nil
}

// sendEmpty answers without a body.
func (w *response) sendEmpty(status int) {
	if status != http.StatusNoContent {
		w.Header().Set("Content-Length", "0")
	}
	w.WriteHeader(status)
}

// created answers that content is stored, and where.
func (w *response) created(path string, d digest.Digest) {
	w.Header().Set("Location", path)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.sendEmpty(http.StatusCreated)
}
