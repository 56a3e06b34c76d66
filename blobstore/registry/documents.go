package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"

	"golang.org/x/sync/semaphore"
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
	// maxIndexes is how many lists of referrers are made at once: manifests are read for them.
	maxIndexes = 8
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

// document is what is to be sent: in memory, or in a file where it is long. The caller closes it.
type document struct {
	h    *Handler
	buf  bytes.Buffer
	file *os.File // nil: it is in buf
	size int64
}

// Write implements [io.Writer].
func (d *document) Write(p []byte) (n int, err error) {
	if d.file == nil && d.size+int64(len(p)) > maxWaiting {
		if d.file, err = d.h.scratch(); err == nil {
			_, err = d.file.Write(d.buf.Bytes())
		}
		if err != nil {
			return 0, err
		}
		d.buf = bytes.Buffer{}
	}
	if d.file != nil {
		n, err = d.file.Write(p)
	} else {
		n, err = d.buf.Write(p)
	}
	d.size += int64(n)
	return n, err
}

func (d *document) close() {
	if d.file != nil {
		d.file.Close()
	}
}

// sendDocument answers with a document of this type.
func (h *Handler) sendDocument(w *response, r *request, mediaType string, content []byte) error {
	if w.headOnly {
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		w.begin()
		return nil
	}
	d := &document{h: h}
	defer d.close()
	if _, err := d.Write(content); err != nil {
		return err
	}
	content = nil // it is not kept while the client reads
	return d.send(w, r, mediaType)
}

// send answers with a document of this type.
func (d *document) send(w *response, r *request, mediaType string) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.FormatInt(d.size, 10))
	if d.file == nil || w.headOnly {
		_, err := w.Write(d.buf.Bytes())
		return err
	}
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	rest := &io.LimitedReader{R: d.file, N: d.size}
	var err error
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

// acquire waits for room for a manifest, or a list of them.
func (h *Handler) acquire(r *request, room *semaphore.Weighted, n int64) error {
	ctx, cancel := context.WithTimeout(r.Context(), h.opts.StallTimeout)
	defer cancel()
	err := room.Acquire(ctx, n)
	if err != nil && r.Context().Err() == nil {
		err = newProblem(http.StatusServiceUnavailable, codeUnknown,
			"there are too many large manifests, or lists of them, at once: try again later").with("Retry-After", "5")
	}
	return err
}

// readManifest reads the body of a request, up to the largest manifest. Only a few are in
// memory at once: the caller calls done when it is one less.
func (h *Handler) readManifest(r *request) (content []byte, done func(), err error) {
	tooLarge := newProblem(http.StatusRequestEntityTooLarge, codeManifestInvalid,
		"a manifest can have %d bytes at most", blobstore.MaxManifest)
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
		n, err := io.Copy(f, io.MultiReader(
			bytes.NewReader(content), io.LimitReader(r.body, blobstore.MaxManifest+1-size)))
		if err != nil {
			return nil, nil, bodyProblem(r, err)
		}
		if n > blobstore.MaxManifest {
			return nil, nil, tooLarge
		}
		content, size = nil, n
	}
	if err := h.acquire(r, h.parsed, size); err != nil {
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
