package swarm

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// api answers the requests of peers. It is safe for concurrent use, and has no lock: what it
// answers from has.
type api struct {
	opts      *Options
	front     *front.Engine
	store     *pieces.Store
	network   Network
	peers     *peerTable
	instance  *Instance
	meetings  *meetings
	names     *names
	deletes   *deletes
	downloads *downloads
	uploads   *uploads
	inbox     *inbox
	mend      func(p2p.Task) // has a blob mended that is damaged
	advertise []string       // where peers connect for pieces
	metrics   *metrics
	log       *slog.Logger
}

// handler serves the peer API. The peer that asks has proven itself by then.
func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(method, path string, h func(http.ResponseWriter, *http.Request, peer.ID) error) {
		mux.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
			from := peerOf(r)
			if from == "" {
				http.Error(w, "not a peer", http.StatusForbidden)
				return
			}
			a.meetings.introduced(from, r)
			if err := h(w, r, from); err != nil {
				a.refuse(w, r, from, err)
			}
		})
	}
	handle("GET", pathHello, a.serveHello)
	handle("POST", pathFind, a.serveFind)
	handle("GET", pathBlob, a.serveBlob)
	handle("GET", pathLinks, a.serveLinks)
	handle("POST", pathPieces, a.servePieces)
	handle("GET", pathDeletes, a.serveDeletes)
	handle("POST", pathDeletes, a.takeDeletes)
	handle("POST", pathReplicate, a.serveReplicate)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			// It has to come in this time even where nobody reads it: the server does, in the end.
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(sendTimeout))
		}
		mux.ServeHTTP(w, r)
	})
}

// refuse answers with an error.
func (a *api) refuse(w http.ResponseWriter, r *http.Request, from peer.ID, err error) {
	code := http.StatusInternalServerError
	text := err.Error()
	if e, ok := errors.AsType[*statusError](err); ok {
		code, text = e.code, e.text
	} else if errors.Is(err, p2p.ErrBusy) {
		code = http.StatusServiceUnavailable
	} else if errors.Is(err, p2p.ErrNotFound) || errors.Is(err, digest.ErrCorrupt) {
		code = http.StatusNotFound // what is damaged is not here; the store has logged it
	} else if errors.Is(err, digest.ErrInvalid) || errors.Is(err, errMessage) {
		code = http.StatusBadRequest
	}
	if code >= 500 && r.Context().Err() == nil {
		a.log.Warn("a peer's request failed", "peer", from.String(), "path", r.URL.Path, "error", err.Error())
	} else {
		a.log.Debug("a peer's request was refused", "peer", from.String(), "path", r.URL.Path, "error", err.Error())
	}
	if len(w.Header()) > 0 {
		panic(http.ErrAbortHandler) // the answer has begun: all that is left is to cut it off
	}
	if code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(sendTimeout))
	http.Error(w, text, code)
}

// readBody reads what a peer sends, of up to limit bytes. The caller calls done as for
// [inbox.read].
func (a *api) readBody(w http.ResponseWriter, r *http.Request, limit int) (b []byte, done func(), err error) {
	b, done, err = a.inbox.read(r.Context(), r.Body, limit)
	if err == nil { // from here on the server watches whether the peer goes away
		http.NewResponseController(w).SetReadDeadline(time.Time{})
	}
	return b, done, err
}

// readJSON reads a message. The caller calls done as for [inbox.read].
func (a *api) readJSON(w http.ResponseWriter, r *http.Request, m message) (done func(), err error) {
	limit, _ := m.bounds()
	b, done, err := a.readBody(w, r, limit)
	if err == nil {
		err = decodeJSON(b, m)
	}
	return done, err
}

func writeJSON(w http.ResponseWriter, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(sendTimeout))
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(b)
	return err
}

func parseTaskQuery(r *http.Request) (p2p.Task, error) {
	q := r.URL.Query()
	t := p2p.Task{Tag: q.Get("tag"), Digest: digest.Digest(q.Get("digest"))}
	return t, t.Validate()
}

// serveHello says who this daemon is.
func (a *api) serveHello(w http.ResponseWriter, _ *http.Request, from peer.ID) error {
	h := hello{
		ID: a.network.Self().String(), Pieces: a.advertise,
		Plain: a.opts.Plain, Mode: a.opts.Mode, Version: a.opts.Version, Twin: a.meetings.twinOf(from),
		Protocol: protocol, OldestProtocol: oldestProtocol, Clock: a.opts.Now().UTC(), Instance: a.instance.id,
	}
	for _, addr := range a.network.Addresses(a.network.Self()).Addrs {
		h.Addrs = append(h.Addrs, addr.String())
	}
	return writeJSON(w, &h)
}

// serveBlob sends a small blob at once: a manifest.
func (a *api) serveBlob(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	if a.opts.Mode == NeverServe {
		return errNeverServe
	}
	task, err := parseTaskQuery(r)
	if err != nil {
		return err
	}
	blob, err := a.store.Open(r.Context(), task, p2p.Local)
	if err != nil {
		return err
	}
	defer blob.Close()
	if blob.Size() > p2p.MaxManifest {
		return fmt.Errorf("%w: %s has %d bytes: ask for its pieces", errMessage, task, blob.Size())
	}
	b := make([]byte, blob.Size())
	if _, err := io.ReadFull(io.NewSectionReader(blob, 0, blob.Size()), b); err != nil {
		return err
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	return a.send(r.Context(), w, b, a.peers.get(from))
}

// serveLinks sends the size and the hash chain of a blob.
func (a *api) serveLinks(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	task, err := parseTaskQuery(r)
	if err != nil {
		return err
	}
	up, done, err := a.upload(r.Context(), task)
	if err != nil {
		return err
	}
	defer done()
	b := links{up.table.Size, up.table.Chain}.append(nil)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	return a.send(r.Context(), w, b, a.peers.get(from))
}

// upload returns the upload of a task's blob. The caller calls done.
func (a *api) upload(ctx context.Context, task p2p.Task) (*upload, func(), error) {
	if a.opts.Mode == NeverServe {
		return nil, nil, errNeverServe
	}
	// A peer that asks has to name a tag that the blob is under here.
	_, err := a.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local})
	d := a.downloads.of(task)
	if err != nil && d == nil {
		return nil, nil, err
	}
	return a.uploads.use(task.Digest, func() (*upload, error) {
		if err == nil {
			blob, err := a.store.OpenForPeers(ctx, task)
			if err != nil {
				return nil, err
			}
			table := blob.Table()
			return &upload{
				links: links{table.Size, table.Chain}.hash(task.Digest), table: table,
				src: stored{blob, schedule.FullSet(table.Pieces())},
			}, nil
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.table == nil {
			return nil, fmt.Errorf("%s: %w: nothing of it is here yet", task, p2p.ErrNotFound)
		}
		file, err := d.partial.File()
		if err != nil {
			return nil, err
		}
		return &upload{links: d.links, table: d.table, src: &partialSource{d.arrival, file, d.table}}, nil
	})
}

// servePieces answers one request for a piece.
func (a *api) servePieces(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	task, err := parseTaskQuery(r)
	if err != nil {
		return err
	}
	body, read, err := a.readBody(w, r, pieceRequestHeader+maxPieces/8)
	if err != nil {
		return err
	}
	req, err := parsePieceRequest(body)
	read()
	if err != nil {
		return err
	}
	ctx := r.Context()
	up, done, err := a.upload(ctx, task)
	if err != nil {
		return err
	}
	defer done()
	if up.links != req.links {
		return &statusError{http.StatusConflict, fmt.Sprintf("%x", up.links)}
	}
	if req.want.Len() != up.table.Pieces() {
		return fmt.Errorf("%w: it has %d pieces", errMessage, up.table.Pieces())
	}
	reply := pieceReply{piece: -1}
	for _, p := range up.askedBy(from) {
		if info := a.network.Addresses(p); len(info.Addrs) > 0 {
			reply.hints = append(reply.hints, hintOf(info))
		}
	}
	if req.news {
		up.news(ctx, req.want)
		return a.answer(w, up, &reply, 0)
	}
	for {
		piece, release, err := a.uploads.pick(ctx, up, from, req.want)
		if err != nil {
			return err
		}
		if piece < 0 {
			release(false)
			return a.answer(w, up, &reply, 0)
		}
		if done, err := a.servePiece(ctx, w, up, task, piece, &reply, from); done {
			release(err == nil)
			return err
		}
		release(false)
	}
}

// servePiece sends a piece, of which the last part goes out only where the whole is as it
// was stored. It reports false where the piece is damaged and another one is to be sent:
// where nothing of it has been sent yet.
func (a *api) servePiece(
	ctx context.Context, w http.ResponseWriter, up *upload, task p2p.Task, piece int, reply *pieceReply, from peer.ID,
) (done bool, err error) {
	start, end := up.table.Bounds(piece)
	buf, err := a.uploads.buffers.get(ctx, int(min(end-start, a.uploads.chunk)))
	if err != nil {
		return true, err
	}
	defer a.uploads.buffers.put(buf)
	entry := a.peers.get(from)
	crc := uint32(0)
	for at := start; at < end; at += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), end-at)]
		n, err := up.src.bytes().ReadAt(part, at)
		if errors.Is(err, io.EOF) {
			err = nil // it may come with the last bytes; what is missing, the check tells
		}
		crc = digest.AddCRC32C(crc, part[:n])
		if got := at + int64(n); err == nil && (n < len(part) || got == end) {
			err = up.table.CheckSum(piece, got-start, crc)
		}
		if err != nil {
			a.log.Error("a piece is damaged, and not served", "task", task.String(), "piece", piece, "error", err)
			if up.broken(piece) {
				a.mend(task)
			}
			return at > start, err
		}
		if at == start {
			reply.piece = piece
			if err := a.answer(w, up, reply, end-start); err != nil {
				return true, err
			}
		}
		if err := a.send(ctx, w, part, entry); err != nil {
			return true, err
		}
	}
	return true, nil
}

// answer sends the answer to a request, after which a piece of so many bytes follows.
func (a *api) answer(w http.ResponseWriter, up *upload, reply *pieceReply, length int64) error {
	reply.have, _ = up.there()
	header, err := reply.append(nil)
	if err != nil {
		return err
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(sendTimeout))
	w.Header().Set("Content-Length", fmt.Sprint(int64(len(header))+length))
	_, err = w.Write(header)
	return err
}

// send sends bytes of a blob, a little at a time: over a slow link, or within a low limit of our own,
// all of it may take long, and the other end is to see that it comes.
func (a *api) send(ctx context.Context, w http.ResponseWriter, b []byte, to *peerEntry) error {
	limit := a.uploads.limiter
	step := throttle.Step(limit, sendStep)
	c := http.NewResponseController(w)
	for len(b) > 0 {
		part := b[:min(len(b), step)]
		b = b[len(part):]
		if err := throttle.Wait(ctx, limit, len(part)); err != nil {
			return err
		}
		c.SetWriteDeadline(time.Now().Add(sendTimeout))
		n, err := w.Write(part)
		to.addTook(int64(n))
		a.metrics.sent.Add(float64(n))
		if err == nil && step < sendStep {
			err = c.Flush()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *api) serveDeletes(w http.ResponseWriter, r *http.Request, _ peer.ID) error {
	q := r.URL.Query()
	after, err := strconv.ParseUint(q.Get("after"), 10, 64)
	if err != nil {
		return fmt.Errorf("%w: after: %w", errMessage, err)
	}
	sum, err := a.store.DeletesSum(r.Context())
	if err != nil {
		return err
	}
	if after == 0 && q.Get("sum") == hex.EncodeToString(sum[:]) {
		return writeJSON(w, &deletesReply{Same: true})
	}
	deletes, next, err := a.store.Deletes(r.Context(), after, maxDeletes)
	if err != nil {
		return err
	}
	reply := deletesReply{Deletes: []deleteMessage{}}
	if len(deletes) == maxDeletes {
		reply.Next = next
	}
	for _, d := range deletes {
		if protocolOf(r) == 1 && d.At.After(a.opts.Now().Add(maxAheadOld)) {
			continue // it would be told of none that come after this one
		}
		reply.Deletes = append(reply.Deletes, deleteMessageOf(d, a.opts.Now()))
	}
	return writeJSON(w, &reply)
}

func (a *api) takeDeletes(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	var req deletesRequest
	done, err := a.readJSON(w, r, &req)
	defer done()
	if err != nil {
		return err
	}
	if len(req.Deletes) > maxDeletes {
		return fmt.Errorf("%w: more than %d deletes", errMessage, maxDeletes)
	}
	var result deletesResult
	for _, m := range req.Deletes {
		d, err := m.parse(a.opts.Now())
		if err != nil {
			return err
		}
		applied, err := a.deletes.apply(r.Context(), d, from)
		one := deleteResult{Found: applied.Found, Removed: applied.Tasks, Newer: applied.Newer.At,
			NewerAfter: applied.Newer.After}
		if err != nil {
			one.Refused = err.Error()
		}
		result.Results = append(result.Results, one)
	}
	return writeJSON(w, &result)
}

func (a *api) serveReplicate(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	q := r.URL.Query()
	cid, err := digest.ParseCID(q.Get("cid"))
	if err != nil {
		return err
	}
	if err := p2p.ValidateTag(q.Get("tag")); err != nil {
		return err
	}
	if a.opts.Mode != Full {
		return &statusError{http.StatusForbidden, "this daemon is " + string(a.opts.Mode)}
	}
	if err := a.front.Hold(r.Context(), q.Get("tag"), cid); err != nil {
		return err
	}
	a.log.Info("holds what a peer has asked to", "what", p2p.Describe(q.Get("tag"), cid), "peer", from.String())
	return writeJSON(w, struct{}{})
}
