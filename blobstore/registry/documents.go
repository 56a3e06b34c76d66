package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/blobstore"
)

const (
	// maxWaiting is how many bytes of a document, a manifest or a list, are in memory while a
	// client takes its time to send or to receive it. A longer one waits in a file.
	maxWaiting = 32 << 10
	// maxParsed is how many bytes of manifests are taken in at once: to parse one takes
	// some times its size.
	maxParsed = 4 * blobstore.MaxManifest
)

// scratch makes a file that goes when it is closed.
func (h *Handler) scratch() (*os.File, error) {
	f, err := os.OpenFile(h.opts.Scratch, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	// Some file systems have no files without a name.
	if f, err = os.CreateTemp(h.opts.Scratch, "document-"); err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sendDocument answers with a document of this type.
func (h *Handler) sendDocument(w *response, r *request, mediaType string, document []byte) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(document)))
	if len(document) <= maxWaiting || w.headOnly {
		_, err := w.Write(document)
		return err
	}
	f, err := h.scratch()
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(document); err != nil {
		return err
	}
	size := int64(len(document))
	document = nil // it is not kept while the client reads
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	rest := &io.LimitedReader{R: f, N: size}
	if to, ok := w.writer(r.Request).(io.ReaderFrom); ok {
		_, err = to.ReadFrom(rest)
	} else {
		_, err = io.Copy(w, rest)
	}
	if err == nil && rest.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// readManifest reads the body of a request, up to the largest manifest. Only a few are in
// memory at once: the caller calls done when it is one less.
func (h *Handler) readManifest(r *request) (content []byte, done func(), err error) {
	tooLarge := newProblem(http.StatusRequestEntityTooLarge, codeManifestInvalid, "a manifest can have %d bytes at most", blobstore.MaxManifest)
	if r.ContentLength > blobstore.MaxManifest {
		return nil, nil, tooLarge
	}
	content, err = io.ReadAll(io.LimitReader(r.body, maxWaiting))
	if err != nil {
		return nil, nil, bodyProblem(r, err)
	}
	size := int64(len(content))
	var f *os.File
	if size == maxWaiting {
		if f, err = h.scratch(); err != nil {
			return nil, nil, err
		}
		defer f.Close()
		n, err := io.Copy(f, io.MultiReader(bytes.NewReader(content), io.LimitReader(r.body, blobstore.MaxManifest+1-size)))
		if err != nil {
			return nil, nil, bodyProblem(r, err)
		}
		if n > blobstore.MaxManifest {
			return nil, nil, tooLarge
		}
		content, size = nil, n
	}
	ctx, cancel := context.WithTimeout(r.Context(), h.opts.StallTimeout)
	defer cancel()
	if err := h.parsed.Acquire(ctx, size); err != nil {
		if r.Context().Err() == nil {
			err = newProblem(http.StatusServiceUnavailable, codeUnknown, "there are too many large manifests at once: try again later").with("Retry-After", "5")
		}
		return nil, nil, err
	}
	done = func() { h.parsed.Release(size) }
	if f != nil {
		content = make([]byte, size)
		if _, err := f.ReadAt(content, 0); err != nil {
			done()
			return nil, nil, err
		}
	}
	return content, done, nil
}
