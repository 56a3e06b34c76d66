package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// session is an upload session. One request at a time uses it: the one that has
// put something into turn. All fields below that are its.
type session struct {
	id   string
	name string // of the repository
	who  string // has begun it, as clientOf says
	ctx  context.Context
	end  context.CancelCauseFunc
	turn chan struct{} // of capacity 1

	alg  digest.Algorithm // that the client said it would use, or ""
	used time.Time        // when a request last ended
	over bool             // it has been committed, cancelled or given up

	failed atomic.Pointer[problem] // why what has come is lost; nil where it is not

	in atomic.Pointer[blobstore.Upload] // nil until bytes come; a request without a turn may look how many
}

// Why the context of a session ended.
var (
	errShutdown  = errors.New("the registry is shutting down")
	errCancelled = errors.New("the upload was cancelled")
	errOver      = errors.New("the upload is over")
	errCrowded   = errors.New("there are too many requests, and this client has most of them")
)

// size returns how many bytes have come.
func (u *session) size() int64 {
	if in := u.in.Load(); in != nil {
		return in.Size()
	}
	return 0
}

// state sets the headers that say how far the upload is.
func (u *session) state(header http.Header) {
	header.Set("Location", uploadPath(u.name, u.id))
	// An upload that has nothing has to say the same as one with a byte.
	header.Set("Range", "0-"+strconv.FormatInt(max(0, u.size()-1), 10))
	header.Set("Docker-Upload-UUID", u.id)
}

func errUnknownUpload(t target) *problem {
	return newProblem(http.StatusNotFound, codeBlobUploadUnknown,
		"there is no upload %.40q in repository %s: it was finished, cancelled, or idle for too long: begin a new one",
		t.reference, t.name)
}

func errClosed() *problem {
	return newProblem(http.StatusServiceUnavailable, codeUnknown, "%v: try again later", errShutdown).with(
		"Retry-After", "5")
}

// beginUpload makes a session. It is cheap: nothing is stored before bytes come.
// Where there are too many, one that nobody uses makes room.
func (h *Handler) beginUpload(r *request, alg digest.Algorithm) (*session, error) {
	u := &session{id: rand.Text(), name: r.name, who: clientOf(r.Request), alg: alg, turn: make(chan struct{}, 1),
		used: time.Now()}
	for {
		spare, err := h.addUpload(u)
		if err != nil || spare == nil {
			return u, err
		}
		h.giveUp(spare, "upload given up for another")
		<-spare.turn
	}
}

// addUpload adds a session, or returns one that is to be given up for it before, with its turn.
func (h *Handler) addUpload(u *session) (spare *session, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.ctx.Err() != nil:
		return nil, errClosed()
	case len(h.uploads) < h.opts.MaxUploads:
		u.ctx, u.end = context.WithCancelCause(h.ctx)
		h.uploads[u.id] = u
		return nil, nil
	}
	if spare = h.spareUpload(u.who); spare == nil {
		return nil, newProblem(http.StatusTooManyRequests, codeTooManyRequests,
			"there are %d uploads already: try again later", len(h.uploads)).with("Retry-After", "10")
	}
	return spare, nil
}

// spareUpload returns, with its turn, the session of the client that has most which nobody
// has used for longest. One without a byte comes first; one with some has to have been idle for
// a while, or to be another client's, which has more than the one that asks. It returns nil where there is
// none. The caller has h.mu.
func (h *Handler) spareUpload(who string) (spare *session) {
	count, most := map[string]int{}, 0
	for _, u := range h.uploads {
		count[u.who]++
		most = max(most, count[u.who])
	}
	better := func(u *session) bool {
		empty := u.in.Load() == nil
		inUse := !empty && time.Since(u.used) < h.opts.StallTimeout
		switch {
		case count[u.who] < most, inUse && count[who]+1 >= most, u.over:
			return false
		case spare == nil:
			return true
		}
		if spareEmpty := spare.in.Load() == nil; empty != spareEmpty {
			return empty
		}
		return u.used.Before(spare.used)
	}
	for _, u := range h.uploads {
		select {
		case u.turn <- struct{}{}:
		default:
			continue // in use
		}
		drop := u
		if better(u) {
			spare, drop = u, spare
		}
		if drop != nil {
			<-drop.turn
		}
	}
	return spare
}

// giveUp ends a session that nobody uses, whose turn the caller has.
func (h *Handler) giveUp(u *session, why string) {
	size := u.size()
	h.drop(u)
	h.log.Info(why, "repository", u.name, "upload", u.id, "client", u.who, "received", size,
		"idle", time.Since(u.used).Round(time.Second))
}

// makeRoom returns nil as soon as room does, which says whether there is room for what comes.
// Where there is none, it gives up what is unfinished and nobody has used for a while, the
// longest first.
func (h *Handler) makeRoom(room func() error) error {
	err := room()
	if !errors.Is(err, blobstore.ErrNoSpace) {
		return err
	}
	idle := map[*session]time.Time{}
	all := slices.DeleteFunc(h.allUploads(), func(u *session) bool {
		select {
		case u.turn <- struct{}{}:
			idle[u] = u.used
			<-u.turn
			return u.size() == 0
		default:
			return true
		}
	})
	slices.SortFunc(all, func(a, b *session) int { return idle[a].Compare(idle[b]) })
	for _, u := range all {
		select {
		case u.turn <- struct{}{}:
		default:
			continue
		}
		if !u.over && time.Since(u.used) >= h.opts.StallTimeout {
			h.giveUp(u, "upload given up for want of room")
			err = room()
		}
		<-u.turn
		if !errors.Is(err, blobstore.ErrNoSpace) {
			break
		}
	}
	return err
}

// findUpload returns the session that a request names.
func (h *Handler) findUpload(t target) (*session, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if u := h.uploads[t.reference]; u != nil && u.name == t.name {
		return u, nil
	}
	return nil, errUnknownUpload(t)
}

// takeTurn waits until no other request uses the session. A request whose
// connection is broken is over within the stall timeout, so that a client that
// comes back after a break can go on; it is not waited for longer.
func (h *Handler) takeTurn(ctx context.Context, u *session) error {
	timer := time.NewTimer(h.opts.StallTimeout + h.opts.StallTimeout/8)
	defer timer.Stop()
	select {
	case u.turn <- struct{}{}:
		return nil
	case <-timer.C:
		return newProblem(http.StatusConflict, codeBlobUploadInvalid,
			"another request is using this upload: wait until it ends, or cancel the upload")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// withUpload calls use with the session that a request names, for it alone.
func (h *Handler) withUpload(r *request, use func(*session) error) error {
	u, err := h.findUpload(r.target)
	if err != nil {
		return err
	}
	if err := h.takeTurn(r.Context(), u); err != nil {
		return err
	}
	defer func() {
		u.used = time.Now()
		<-u.turn
	}()
	if u.over || u.ctx.Err() != nil {
		return errUnknownUpload(r.target)
	}
	if p := u.failed.Load(); p != nil {
		return p
	}
	err = use(u)
	if err == nil {
		return nil
	}
	switch cause := context.Cause(u.ctx); {
	case errors.Is(cause, errCancelled): // and use was broken off
		return errUnknownUpload(r.target)
	case errors.Is(cause, errShutdown):
		return errClosed()
	}
	return err
}

// drop ends a session whose turn the caller has, with what has come.
func (h *Handler) drop(u *session) {
	u.over = true
	u.end(errOver)
	if in := u.in.Load(); in != nil {
		if err := in.Close(); err != nil {
			h.log.Warn("an upload could not be cleaned up", "repository", u.name, "error", err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.uploads, u.id)
}

func (h *Handler) allUploads() []*session {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []*session
	for _, u := range h.uploads {
		all = append(all, u)
	}
	return all
}

// sweep ends sessions that are idle for too long, and all of them when the
// handler is closed.
func (h *Handler) sweep() {
	tick := time.NewTicker(min(max(h.opts.EmptyTimeout/8, time.Millisecond), time.Minute))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-h.ctx.Done():
			for _, u := range h.allUploads() {
				u.turn <- struct{}{} // the request that has it is interrupted by the context
				h.drop(u)
				<-u.turn
			}
			return
		}
		for _, u := range h.allUploads() {
			select {
			case u.turn <- struct{}{}:
			default:
				continue // in use
			}
			timeout := h.opts.UploadTimeout
			if u.in.Load() == nil {
				timeout = h.opts.EmptyTimeout
			}
			if !u.over && time.Since(u.used) > timeout {
				h.giveUp(u, "upload expired")
			}
			<-u.turn
		}
	}
}

// postUpload mounts a blob, takes in one whole, or begins a session.
func (h *Handler) postUpload(w *response, r *request) error {
	query := r.URL.Query()
	if mount := query.Get("mount"); mount != "" {
		d, err := parseDigest(mount)
		if err != nil {
			return err
		}
		// Without a source any that has it will do: a client that may push may read
		// all of them. A source that can't be one holds nothing.
		from := query.Get("from")
		if _, err := blobstore.TagOf(from); err != nil && from != "" {
			from = r.name
		}
		err = r.repo.Mount(r.Context(), ocispec.Descriptor{MediaType: blobMediaType, Digest: d}, from, nil)
		if err == nil {
			r.change, r.digest = "blob mounted", d
			w.created(blobPath(r.name, d.String()), d)
			return nil
		}
		if !errors.Is(err, blobstore.ErrNotFound) {
			return err
		}
	} else if query.Has("digest") {
		d, err := parseDigest(query.Get("digest"))
		if err != nil {
			return err
		}
		if err := h.takeWhole(r.Context(), r, d); err != nil {
			return err
		}
		r.change, r.digest = "blob pushed", d
		w.created(blobPath(r.name, d.String()), d)
		return nil
	}
	var alg digest.Algorithm
	if hint := query.Get("digest-algorithm"); hint != "" {
		var err error
		if alg, err = digest.ParseAlgorithm(hint); err != nil {
			return newProblem(http.StatusBadRequest, codeDigestInvalid, "digest-algorithm: %v", err)
		}
	}
	u, err := h.beginUpload(r, alg)
	if err != nil {
		return err
	}
	u.state(w.Header())
	w.sendEmpty(http.StatusAccepted)
	return nil
}

// takeWhole stores a blob that arrives in one request. What is there already is taken
// in once more: it may be damaged, or be deleted meanwhile.
func (h *Handler) takeWhole(ctx context.Context, r *request, d digest.Digest) error {
	if r.ContentLength >= 0 {
		var err error
		err = h.makeRoom(func() error {
			if r.body.received == 0 { // what has no room fails before any of it is read, or it can't be tried again
				err = r.repo.PushBlob(ctx, d, r.ContentLength, r.body)
			}
			return err
		})
		return bodyProblem(r, err)
	}
	return bodyProblem(r, takeStream(ctx, r, d))
}

// takeStream stores a blob of unknown size.
func takeStream(ctx context.Context, r *request, d digest.Digest) error {
	in, err := r.repo.NewUpload(ctx, d.Algorithm())
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Append(r.body); err != nil {
		return err
	}
	_, err = in.Commit(d)
	return err
}

// bodyProblem makes a problem of an error that comes from reading the body.
func bodyProblem(r *request, err error) error {
	switch {
	case err == nil || r.body.err == nil:
		return err
	case r.body.stalled():
		return newProblem(http.StatusRequestTimeout, codeBlobUploadInvalid,
			"nothing came for too long: go on from what the upload has, or begin again").because(err)
	}
	return newProblem(http.StatusBadRequest, codeSizeInvalid,
		"the body ended before its length: go on from what the upload has, or begin again").because(err)
}

// listUploads lists the unfinished uploads of a repository, so that they can be cancelled. It is
// not of the specification.
func (h *Handler) listUploads(w *response, r *request) error {
	type entry struct {
		Location string `json:"location"`
		Received int64  `json:"received"`
		Busy     bool   `json:"busy"` // a request is using it
		Idle     int    `json:"idle"` // seconds
	}
	list := []entry{}
	for _, u := range h.allUploads() {
		if u.name != r.name {
			continue
		}
		e := entry{Location: uploadPath(u.name, u.id), Received: u.size(), Busy: true}
		select {
		case u.turn <- struct{}{}:
			e.Busy, e.Idle = false, int(time.Since(u.used).Seconds())
			<-u.turn
		default:
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b entry) int { return strings.Compare(a.Location, b.Location) })
	return h.sendValue(w, r, map[string][]entry{"uploads": list})
}

// Uploads returns how many unfinished uploads there are, and how many bytes they have.
func (h *Handler) Uploads() (count int, received int64) {
	for _, u := range h.allUploads() {
		count, received = count+1, received+u.size()
	}
	return count, received
}

// getUpload says how far an upload is. It does not wait for a request that is
// sending to it: a client that asks may be in doubt whether that one lives.
func (h *Handler) getUpload(w *response, r *request) error {
	u, err := h.findUpload(r.target)
	if err != nil {
		return err
	}
	if u.ctx.Err() != nil {
		return errUnknownUpload(r.target) // it is over, and about to be forgotten
	}
	if p := u.failed.Load(); p != nil {
		return p
	}
	u.state(w.Header())
	w.sendEmpty(http.StatusNoContent)
	return nil
}

// deleteUpload cancels an upload. A request that is sending to it is broken off.
func (h *Handler) deleteUpload(w *response, r *request) error {
	u, err := h.findUpload(r.target)
	if err != nil {
		return err
	}
	u.end(errCancelled)
	if err := h.takeTurn(r.Context(), u); err != nil {
		return err
	}
	defer func() { <-u.turn }()
	if u.over {
		return errUnknownUpload(r.target) // it was finished just now
	}
	h.drop(u)
	w.sendEmpty(http.StatusNoContent)
	return nil
}

// patchUpload takes in a chunk.
func (h *Handler) patchUpload(w *response, r *request) error {
	return h.withUpload(r, func(u *session) error {
		if err := h.takeChunk(r, u, u.alg); err != nil {
			return err
		}
		u.state(w.Header())
		w.sendEmpty(http.StatusAccepted)
		return nil
	})
}

// putUpload takes in the last chunk, where there is one, and ends the upload.
func (h *Handler) putUpload(w *response, r *request) error {
	return h.withUpload(r, func(u *session) error {
		d, err := parseDigest(r.URL.Query().Get("digest"))
		if err != nil {
			return err
		}
		if u.in.Load() == nil && r.ContentLength >= 0 && r.Header.Get("Content-Range") == "" {
			err = h.finishWhole(r, u, d)
		} else {
			err = h.finishChunks(r, u, d)
		}
		if err != nil {
			return err
		}
		r.change, r.digest = "blob pushed", d
		w.created(blobPath(r.name, d.String()), d)
		return nil
	})
}

// finishWhole ends an upload all of which is in one request. Where the request
// breaks off, the upload goes on with nothing.
func (h *Handler) finishWhole(r *request, u *session, d digest.Digest) error {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(u.ctx, func() { cancel(context.Cause(u.ctx)) })()
	err := h.takeWhole(ctx, r, d)
	if r.body.err == nil && !errors.Is(err, blobstore.ErrNoSpace) {
		h.dropAfter(u, err)
	}
	return err
}

// finishChunks takes in the last chunk and commits what has come.
func (h *Handler) finishChunks(r *request, u *session, d digest.Digest) error {
	if err := h.takeChunk(r, u, d.Algorithm()); err != nil {
		return err
	}
	_, err := u.in.Load().Commit(d)
	if err == nil || errors.Is(err, blobstore.ErrMismatch) {
		h.dropAfter(u, err)
	} else {
		h.fail(r, u, err)
	}
	return err
}

// fail notes that the store has failed, so that what has come to an upload is lost. The session stays until it
// is idle for too long: a client that asks how far it is hears that, and not that there is none.
func (h *Handler) fail(r *request, u *session, err error) {
	if u.ctx.Err() != nil {
		return // it was broken off by the request that ends it
	}
	u.failed.Store(problemOf(err, r.target))
	if in := u.in.Swap(nil); in != nil {
		if err := in.Close(); err != nil {
			h.log.Warn("an upload could not be cleaned up", "repository", u.name, "error", err)
		}
	}
}

// dropAfter ends a session that has been committed or has failed. One that was
// broken off is ended by the request that did that.
func (h *Handler) dropAfter(u *session, err error) {
	if err == nil || u.ctx.Err() == nil {
		h.drop(u)
	}
}

// takeChunk appends a request's body to an upload, whose bytes are hashed with
// alg where these are the first. What comes before the body breaks off is kept.
func (h *Handler) takeChunk(r *request, u *session, alg digest.Algorithm) error {
	var src io.Reader = r.body
	want := int64(-1)
	if header := r.Header.Get("Content-Range"); header != "" {
		off, n, ok := parseContentRange(header)
		switch {
		case !ok:
			return newProblem(http.StatusBadRequest, codeBlobUploadInvalid, "Content-Range %.80q is malformed: want "+
				"<first>-<last>, the offsets of the chunk's first and last byte", header)
		case off != u.size():
			p := newProblem(http.StatusRequestedRangeNotSatisfiable, codeBlobUploadInvalid,
				"the chunk begins at byte %d, but the upload has %d: go on from there", off, u.size())
			p.header = http.Header{}
			u.state(p.header)
			return p
		case r.ContentLength >= 0 && r.ContentLength != n:
			return newProblem(http.StatusBadRequest, codeSizeInvalid, "Content-Range says %d bytes, Content-Length %d",
				n, r.ContentLength)
		}
		// A body of unknown length may turn out longer.
		src, want = r.body.first(n), n
	}
	in := u.in.Load()
	if in == nil {
		var err error
		if in, err = r.repo.NewUpload(u.ctx, alg); err != nil {
			return err
		}
		u.in.Store(in)
	}
	if r.ContentLength > 0 {
		if err := h.makeRoom(func() error { return in.Room(r.ContentLength) }); err != nil {
			return err // what has come before stays
		}
	}
	taken, err := in.Append(src) // which ends with the session
	switch {
	case err != nil && r.body.err == nil:
		h.fail(r, u, err)
		return err
	case err != nil:
		h.log.Info("upload broke off", "repository", u.name, "upload", u.id, "client", u.who, "received", u.size(),
			"kept", h.opts.UploadTimeout)
		return bodyProblem(r, err)
	case want >= 0 && !exactly(r.body, taken, want):
		return newProblem(http.StatusBadRequest, codeSizeInvalid, "Content-Range says %d bytes, the body has another "+
			"number: go on from the %d that the upload has", want, u.size())
	}
	return nil
}

// exactly reports whether a body, of which taken bytes have been read, has want.
func exactly(b *body, taken, want int64) bool {
	if taken != want {
		return false
	}
	n, err := io.ReadFull(b, make([]byte, 1))
	return n == 0 && errors.Is(err, io.EOF)
}
