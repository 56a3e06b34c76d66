package registry

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
)

// Options are how a Handler works. The zero value has the defaults.
type Options struct {
	// Log gets every request: at debug level, at info what changes the store,
	// at warn what fails. The default is to be silent.
	Log *slog.Logger
	// UploadTimeout is how long an upload session that has bytes can be idle until it
	// ends, by default a quarter of an hour. It ends before where another needs its room, and
	// it has been idle for StallTimeout.
	UploadTimeout time.Duration
	// EmptyTimeout is the same for a session without a byte, by default two minutes,
	// or UploadTimeout where that is less.
	EmptyTimeout time.Duration
	// MaxUploads is the number of upload sessions at once, by default 1000. Where there
	// are more, an idle one of the client that has most makes room. A
	// client for whom there is none is told to come back later.
	MaxUploads int
	// MaxRequests is the number of requests at once, by default 512. Where there are
	// more, the oldest of the client that has most is broken off for one of a client that has
	// fewer, and others are told to come back later.
	MaxRequests int
	// StallTimeout is how long a client can take to send a byte, or to receive
	// 128 KiB, until it is cut off, by default a minute.
	StallTimeout time.Duration
	// Scratch is the directory for documents of more than 32 KiB while a client
	// sends or receives them, by default that of temporary files. Nothing is left in it.
	Scratch string
}

// Handler serves a store as a registry. It is safe for concurrent use.
type Handler struct {
	store    *blobstore.Store
	opts     Options
	log      *slog.Logger
	requests *connpool.Pool      // those that are answered
	parsed   *semaphore.Weighted // bytes of manifests that are taken in
	indexes  *semaphore.Weighted // lists of referrers that are made

	ctx     context.Context // of all upload sessions
	stop    context.CancelCauseFunc
	sweeper sync.WaitGroup

	mu      sync.Mutex
	uploads map[string]*session
}

// New returns a Handler that serves store, which stays the caller's to close,
// after the Handler. The caller closes the Handler.
func New(store *blobstore.Store, opts Options) *Handler {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.UploadTimeout <= 0 {
		opts.UploadTimeout = 15 * time.Minute
	}
	if opts.EmptyTimeout <= 0 {
		opts.EmptyTimeout = min(2*time.Minute, opts.UploadTimeout)
	}
	if opts.MaxUploads <= 0 {
		opts.MaxUploads = 1000
	}
	if opts.MaxRequests <= 0 {
		opts.MaxRequests = 512
	}
	if opts.StallTimeout <= 0 {
		opts.StallTimeout = time.Minute
	}
	if opts.Scratch == "" {
		opts.Scratch = os.TempDir()
	}
	h := &Handler{
		requests: connpool.New(opts.MaxRequests),
		parsed:   semaphore.NewWeighted(maxParsed),
		indexes:  semaphore.NewWeighted(maxIndexes),
		store:    store, opts: opts, log: opts.Log,
		uploads: map[string]*session{},
	}
	h.ctx, h.stop = context.WithCancelCause(context.Background())
	h.sweeper.Go(h.sweep)
	return h
}

// Close ends all upload sessions, also those that a request is using, and waits
// for that. Requests for uploads are refused from then on. It always returns nil.
func (h *Handler) Close() error {
	h.stop(errShutdown)
	h.sweeper.Wait()
	return nil
}

// request is a request and what is known of it.
type request struct {
	*http.Request
	target
	repo *blobstore.Repository // of target.name, where the endpoint has one
	body *body

	// For the log: what was done to the store, where something was, and whether
	// the client had gone before there was an answer.
	change string
	digest digest.Digest
	gone   bool
}

// handlerFunc answers a request. An error is sent by its caller, where nothing
// has been sent.
type handlerFunc func(h *Handler, w *response, r *request) error

// handlers are what answers a method at an endpoint.
var handlers = map[endpoint]map[string]handlerFunc{
	endpointBase:      {"GET": (*Handler).base, "HEAD": (*Handler).base},
	endpointCatalog:   {"GET": (*Handler).catalog, "HEAD": (*Handler).catalog},
	endpointTags:      {"GET": (*Handler).tags, "HEAD": (*Handler).tags},
	endpointReferrers: {"GET": (*Handler).referrers, "HEAD": (*Handler).referrers},
	endpointManifest: {
		"GET": (*Handler).getManifest, "HEAD": (*Handler).headManifest,
		"PUT": (*Handler).putManifest, "DELETE": (*Handler).deleteManifest,
	},
	endpointBlob:    {"GET": (*Handler).getBlob, "HEAD": (*Handler).headBlob, "DELETE": (*Handler).deleteBlob},
	endpointUploads: {"GET": (*Handler).listUploads, "POST": (*Handler).postUpload},
	endpointUpload: {
		"GET": (*Handler).getUpload, "HEAD": (*Handler).getUpload,
		"PATCH": (*Handler).patchUpload, "PUT": (*Handler).putUpload, "DELETE": (*Handler).deleteUpload,
	},
}

// ServeHTTP implements [http.Handler]. It has to get paths as they were sent:
// an [http.ServeMux] before it would answer some with a redirect. Where the
// connection has to be cut, it panics with [http.ErrAbortHandler].
func (h *Handler) ServeHTTP(hw http.ResponseWriter, hr *http.Request) {
	start := time.Now()
	w := newResponse(hw, hr, h.opts.StallTimeout)
	r := &request{Request: hr, target: parsePath(hr.URL), body: w.request}
	var failure error
	defer func() {
		r.body.finish()
		h.logRequest(w, r, start, failure)
	}()
	header := w.Header()
	// A client that pushes has a say in types and content: no browser is to act on it.
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Security-Policy", "default-src 'none'; sandbox")
	end, failure := h.begin(w, r)
	if failure == nil {
		defer end()
		failure = h.serve(w, r)
	}
	r.gone = hr.Context().Err() != nil
	if failure == nil {
		return
	}
	if w.status != 0 {
		panic(http.ErrAbortHandler) // the client must not take it for whole
	}
	problemOf(failure, r.target).send(w)
}

func (h *Handler) serve(w *response, r *request) error {
	if loopback.IsCrossSite(r.Request) {
		return newProblem(http.StatusForbidden, codeDenied, "requests of web pages of other sites are refused")
	}
	if r.endpoint == endpointNone {
		return newProblem(http.StatusNotFound, codeUnsupported, "there is no such path in the API of the OCI "+
			"distribution specification: want /v2/, then the name of a repository, then what is asked for")
	}
	methods := handlers[r.endpoint]
	handle, ok := methods[r.Method]
	if !ok {
		var allow []string
		for method := range methods {
			allow = append(allow, method)
		}
		slices.Sort(allow)
		list := strings.Join(allow, ", ")
		return newProblem(http.StatusMethodNotAllowed, codeUnsupported,
			"%.20q is not a method of this path, use one of %s", r.Method, list).with("Allow", list)
	}
	if r.endpoint != endpointBase && r.endpoint != endpointCatalog {
		tag, err := blobstore.TagOf(r.name)
		if err == nil {
			r.repo, err = h.store.Repository(tag)
		}
		if err != nil {
			return newProblem(http.StatusBadRequest, codeNameInvalid, "%.260q can't be the name of a repository: want "+
				"components of a-z and 0-9, joined within by \".\", \"_\", \"__\" or dashes, separated by \"/\", "+
				"%d characters at most", r.name, p2p.MaxTag).because(err)
		}
	}
	return handle(h, w, r)
}

// base says that this is a registry.
func (h *Handler) base(w *response, r *request) error {
	return h.sendDocument(w, r, "application/json", []byte("{}"))
}

// logRequest logs a request and what became of it.
func (h *Handler) logRequest(w *response, r *request, start time.Time, failure error) {
	level, message := slog.LevelDebug, "request"
	switch {
	case failure == nil && r.change != "":
		level, message = slog.LevelInfo, r.change
	case failure == nil, r.gone, w.err != nil: // well, or nobody waits for it
	case errors.Is(failure, blobstore.ErrUnreachable): // a 404, too, and the operator's to mend
		level = slog.LevelWarn
	case w.status == http.StatusNotFound, w.status == http.StatusRequestedRangeNotSatisfiable: // clients ask, and learn
	default:
		level = slog.LevelWarn
	}
	if !h.log.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", r.URL.Path),
		slog.Int("status", w.status),
		slog.Int64("sent", w.sent),
		slog.Int64("received", r.body.received),
		slog.Duration("duration", time.Since(start)),
		slog.String("remote", r.RemoteAddr),
	}
	if r.change != "" {
		attrs = append(attrs, slog.String("repository", r.name), slog.Any("digest", r.digest))
	}
	if failure != nil {
		// What the client was told, and behind that what it was not.
		attrs = append(attrs, slog.Any("error", failure))
		if p, ok := errors.AsType[*problem](failure); ok && p.cause != nil {
			attrs = append(attrs, slog.Any("cause", p.cause))
		}
	}
	h.log.LogAttrs(r.Context(), level, message, attrs...)
}

// parseDigest reads a digest that a client sent.
func parseDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil {
		return "", newProblem(http.StatusBadRequest, codeDigestInvalid, "%v", err)
	}
	return d, nil
}
