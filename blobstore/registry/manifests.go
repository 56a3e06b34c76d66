package registry

import (
	"mime"
	"net/http"
	"strings"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// headManifest says whether there is a manifest, and all that it refers to, as far as
// it was not lost: a client that is told so does not push that.
func (h *Handler) headManifest(w *response, r *request) error {
	if _, err := manifestReference(r); err != nil {
		return err
	}
	found, err := r.repo.ManifestExists(r.Context(), r.reference)
	if err != nil {
		return err
	}
	w.describe(found)
	done, err := w.isAnswered(r, found.Digest)
	if err == nil && !done {
		w.WriteHeader(http.StatusOK)
	}
	return err
}

// getManifest sends a manifest.
func (h *Handler) getManifest(w *response, r *request) error {
	if _, err := manifestReference(r); err != nil {
		return err
	}
	m, err := r.repo.ManifestContent(r.Context(), r.reference, true, maxWaiting)
	if err != nil {
		return err
	}
	w.describe(m.Descriptor)
	if done, err := w.isAnswered(r, m.Digest); done || err != nil {
		return err
	}
	if m.Content == nil && m.Size > 0 {
		content, err := r.repo.OpenBlob(r.Context(), m.Digest)
		if err != nil {
			return err
		}
		defer content.Close()
		return content.CopyRange(r.Context(), w.writer(r.Request), 0, m.Size)
	}
	return h.sendDocument(w, r, m.MediaType, m.Content)
}

// manifestReference reads the reference of a manifest. What can't be a tag names
// nothing, and can't be pushed.
func manifestReference(r *request) (digest.CID, error) {
	cid, err := digest.ParseCID(r.reference)
	switch {
	case err == nil:
		return cid, nil
	case strings.Contains(r.reference, ":"):
		return cid, newProblem(http.StatusBadRequest, codeDigestInvalid, "%v", err)
	case r.Method == http.MethodPut:
		return cid, noTag(http.StatusBadRequest, codeManifestInvalid, r.reference)
	}
	return cid, noTag(http.StatusNotFound, codeManifestUnknown, r.reference)
}

// noTag says that something can't be a tag.
func noTag(status int, code, tag string) *problem {
	return newProblem(status, code, "tag %.140q is none: want letters, digits, \"_\", and after the first character "+
		"\".\" and \"-\", 128 at most", tag)
}

// putManifest stores a manifest and points tags to it.
func (h *Handler) putManifest(w *response, r *request) error {
	cid, err := manifestReference(r)
	if err != nil {
		return err
	}
	opts := blobstore.ManifestOptions{Digest: cid.Digest(), Tags: r.URL.Query()["tag"], CheckRefs: true}
	for _, tag := range opts.Tags {
		if id, err := digest.ParseCID(tag); err != nil || id.CacheID() == "" {
			return noTag(http.StatusBadRequest, codeManifestInvalid, tag)
		}
	}
	if name := cid.CacheID(); name != "" {
		if len(opts.Tags) > 0 {
			return newProblem(http.StatusBadRequest, codeUnsupported,
				"tags are parameters where a manifest is pushed by digest, not by tag")
		}
		opts.Tags = []string{name}
	}
	if opts.MediaType, err = manifestType(r.Header.Get("Content-Type")); err != nil {
		return err
	}
	content, done, err := h.readManifest(r)
	if err != nil {
		return err
	}
	defer done()
	var m blobstore.Manifest
	err = h.change(r, func(expect *blobstore.Standing) error {
		opts.Expect = expect
		m, err = r.repo.PushManifest(r.Context(), content, opts)
		return err
	})
	if err != nil {
		return err
	}
	if m.Subject != "" {
		w.Header().Set("OCI-Subject", m.Subject.String())
	}
	if cid.CacheID() == "" {
		for _, tag := range opts.Tags {
			w.Header().Add("OCI-Tag", tag)
		}
	}
	if text := h.store.ClockWarning(r.Context()); text != "" && len(opts.Tags) > 0 {
		// as the specification has it, for clients to print
		w.Header().Set("Warning", `299 - "`+strings.ReplaceAll(text, `"`, "'")+`"`)
	}
	r.change, r.digest = "manifest pushed", m.Digest
	w.created(manifestPath(r.name, m.Digest.String()), m.Digest)
	return nil
}

// manifestType reads the Content-Type of a manifest. Its parameters are
// dropped; "" leaves it to the manifest.
func manifestType(header string) (string, error) {
	if header == "" {
		return "", nil
	}
	mediaType, _, err := mime.ParseMediaType(header)
	switch {
	case err != nil:
		return "", newProblem(http.StatusBadRequest, codeManifestInvalid, "Content-Type %.80q: %v", header, err)
	case strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.v1+"):
		return "", newProblem(http.StatusBadRequest, codeUnsupported,
			"manifests of Docker's schema 1 are not supported: push with a newer client")
	}
	return mediaType, nil
}

// deleteManifest removes a tag, or a manifest with the tags that point to it.
func (h *Handler) deleteManifest(w *response, r *request) error {
	cid, err := manifestReference(r)
	if err != nil {
		return err
	}
	r.change = "tag deleted"
	if r.digest = cid.Digest(); r.digest != "" {
		r.change = "manifest deleted"
	}
	err = h.change(r, func(expect *blobstore.Standing) error {
		return r.repo.DeleteManifest(r.Context(), r.reference, expect)
	})
	if err != nil {
		return err
	}
	w.sendEmpty(http.StatusAccepted)
	return nil
}
