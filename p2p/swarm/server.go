package swarm

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// handler serves the peer API. The peer that asks has proven itself by then.
func (s *Swarm) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(method, path string, h func(http.ResponseWriter, *http.Request, peer.ID) error) {
		mux.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
			from := peerOf(r)
			if from == "" {
				http.Error(w, "not a peer", http.StatusForbidden)
				return
			}
			s.meetings.introduced(from, r)
			if err := h(w, r, from); err != nil {
				s.refuse(w, r, from, err)
			}
		})
	}
	handle("GET", pathHello, s.serveHello)
	handle("POST", pathFind, s.serveFind)
	handle("GET", pathBlob, s.serveBlob)
	handle("GET", pathLinks, s.serveLinks)
	handle("POST", pathPieces, s.servePieces)
	handle("GET", pathDeletes, s.serveDeletes)
	handle("POST", pathDeletes, s.takeDeletes)
	handle("POST", pathReplicate, s.serveReplicate)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			// It has to come in this time even where nobody reads it: the server does, in the end.
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(sendTimeout))
		}
		mux.ServeHTTP(w, r)
	})
}

// refuse answers with an error.
func (s *Swarm) refuse(w http.ResponseWriter, r *http.Request, from peer.ID, err error) {
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
		s.log.Warn("a peer's request failed", "peer", from.String(), "path", r.URL.Path, "error", err.Error())
	} else {
		s.log.Debug("a peer's request was refused", "peer", from.String(), "path", r.URL.Path, "error", err.Error())
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
func (s *Swarm) readBody(w http.ResponseWriter, r *http.Request, limit int) (b []byte, done func(), err error) {
	b, done, err = s.inbox.read(r.Context(), r.Body, limit)
	if err == nil { // from here on the server watches whether the peer goes away
		http.NewResponseController(w).SetReadDeadline(time.Time{})
	}
	return b, done, err
}

// readJSON reads a message. The caller calls done as for [inbox.read].
func (s *Swarm) readJSON(w http.ResponseWriter, r *http.Request, m message) (done func(), err error) {
	limit, _ := m.bounds()
	b, done, err := s.readBody(w, r, limit)
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

func (s *Swarm) serveHello(w http.ResponseWriter, _ *http.Request, from peer.ID) error {
	h := s.hello()
	h.Twin = s.meetings.twinOf(from)
	return writeJSON(w, h)
}

// hello is what this daemon says of itself.
func (s *Swarm) hello() *hello {
	h := &hello{
		ID: s.network.Self().String(), Pieces: s.advertise,
		Plain: s.security.plain, Mode: s.opts.Mode, Version: s.opts.Version,
		Protocol: protocol, OldestProtocol: oldestProtocol, Clock: s.opts.Now().UTC(), Instance: s.instance.id,
	}
	for _, a := range s.network.Addresses(s.network.Self()).Addrs {
		h.Addrs = append(h.Addrs, a.String())
	}
	return h
}

func (s *Swarm) serveFind(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	var req findRequest
	done, err := s.readJSON(w, r, &req)
	defer done()
	if err != nil {
		return err
	}
	if len(req.Tasks)+len(req.Names)+len(req.Referrers) > maxFind {
		return fmt.Errorf("%w: more than %d questions", errMessage, maxFind)
	}
	reply := findReply{
		Tasks:     make([]*taskState, len(req.Tasks)),
		Names:     make([]*nameState, len(req.Names)),
		Referrers: make([][]digest.Digest, len(req.Referrers)),
		Twin:      s.meetings.twinOf(from),
	}
	ctx := r.Context()
	for i, t := range req.Tasks {
		if reply.Tasks[i], err = s.answerTask(ctx, p2p.Task(t), from, req.Lease); err != nil {
			return err
		}
	}
	for i, n := range req.Names {
		if reply.Names[i], err = s.answerName(ctx, n, protocolOf(r)); err != nil {
			return err
		}
		if state := reply.Names[i]; state != nil && req.Follow {
			if reply.Followed, err = s.follow(ctx, reply.Followed, p2p.Task{Tag: n.Tag, Digest: state.Digest},
				from); err != nil {
				return err
			}
		}
	}
	for i, t := range req.Referrers {
		if s.opts.Mode == NeverServe {
			break
		}
		if reply.Referrers[i], err = s.referrers(ctx, p2p.Task(t)); err != nil {
			return err
		}
	}
	return writeJSON(w, &reply)
}

// answerTask says what this daemon has of a task, or nil.
func (s *Swarm) answerTask(ctx context.Context, task p2p.Task, from peer.ID, lease bool) (*taskState, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	going := false
	if lease {
		err := s.store.Lease(ctx, task)
		if going = errors.Is(err, p2p.ErrNotFound); err != nil && !going {
			return nil, err
		}
	}
	state, err := s.taskState(ctx, task, from)
	if state != nil && going && state.whole() {
		return nil, nil // it is being deleted, or is not in the store yet
	}
	return state, err
}

// answerName says what this daemon knows of a name, or nil, to who speaks a version of the
// protocol.
func (s *Swarm) answerName(ctx context.Context, name nameRef, version int) (*nameState, error) {
	state, err := s.names.state(ctx, name.Tag, name.Name)
	if state == nil || err != nil {
		return nil, err
	}
	if s.opts.Mode == NeverServe {
		// What it stands for could not be had here.
		*state = nameState{Deleted: state.Deleted, DeletedAfter: state.DeletedAfter, DeletedAge: state.DeletedAge}
	}
	if version == 1 {
		// It would refuse the whole answer for a date that is far ahead.
		if now := s.opts.Now(); state.Updated.After(now.Add(maxAheadOld)) {
			state.Updated = now
		}
		if state.Deleted.After(s.store.Limit()) {
			state.Deleted = time.Time{}
		}
	}
	return state, nil
}

// serveBlob sends a small blob at once: a manifest.
func (s *Swarm) serveBlob(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	if s.opts.Mode == NeverServe {
		return errNeverServe
	}
	task, err := parseTaskQuery(r)
	if err != nil {
		return err
	}
	blob, err := s.store.Open(r.Context(), task, p2p.Local)
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
	return s.send(r.Context(), w, b, s.peers.get(from))
}

// serveLinks sends the size and the hash chain of a blob.
func (s *Swarm) serveLinks(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	task, err := parseTaskQuery(r)
	if err != nil {
		return err
	}
	up, done, err := s.upload(r.Context(), task)
	if err != nil {
		return err
	}
	defer done()
	b := links{up.table.Size, up.table.Chain}.append(nil)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	return s.send(r.Context(), w, b, s.peers.get(from))
}

func (s *Swarm) serveDeletes(w http.ResponseWriter, r *http.Request, _ peer.ID) error {
	q := r.URL.Query()
	after, err := strconv.ParseUint(q.Get("after"), 10, 64)
	if err != nil {
		return fmt.Errorf("%w: after: %w", errMessage, err)
	}
	sum, err := s.store.DeletesSum(r.Context())
	if err != nil {
		return err
	}
	if after == 0 && q.Get("sum") == hex.EncodeToString(sum[:]) {
		return writeJSON(w, &deletesReply{Same: true})
	}
	deletes, next, err := s.store.Deletes(r.Context(), after, maxDeletes)
	if err != nil {
		return err
	}
	reply := deletesReply{Deletes: []deleteMessage{}}
	if len(deletes) == maxDeletes {
		reply.Next = next
	}
	for _, d := range deletes {
		if protocolOf(r) == 1 && d.At.After(s.opts.Now().Add(maxAheadOld)) {
			continue // it would learn of none that come after this one
		}
		reply.Deletes = append(reply.Deletes, deleteMessageOf(d, s.opts.Now()))
	}
	return writeJSON(w, &reply)
}

func (s *Swarm) takeDeletes(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	var req deletesRequest
	done, err := s.readJSON(w, r, &req)
	defer done()
	if err != nil {
		return err
	}
	if len(req.Deletes) > maxDeletes {
		return fmt.Errorf("%w: more than %d deletes", errMessage, maxDeletes)
	}
	var result deletesResult
	for _, m := range req.Deletes {
		d, err := m.parse(s.opts.Now())
		if err != nil {
			return err
		}
		applied, err := s.deletes.apply(r.Context(), d, from)
		one := deleteResult{Found: applied.Found, Removed: applied.Tasks, Newer: applied.Newer.At,
			NewerAfter: applied.Newer.After}
		if err != nil {
			one.Refused = err.Error()
		}
		result.Results = append(result.Results, one)
	}
	return writeJSON(w, &result)
}

func (s *Swarm) serveReplicate(w http.ResponseWriter, r *http.Request, from peer.ID) error {
	q := r.URL.Query()
	cid, err := digest.ParseCID(q.Get("cid"))
	if err != nil {
		return err
	}
	if err := p2p.ValidateTag(q.Get("tag")); err != nil {
		return err
	}
	if s.opts.Mode != Full {
		return &statusError{http.StatusForbidden, "this daemon is " + string(s.opts.Mode)}
	}
	if err := s.front.Hold(r.Context(), q.Get("tag"), cid); err != nil {
		return err
	}
	s.log.Info("holds what a peer has asked to", "what", p2p.Describe(q.Get("tag"), cid), "peer", from.String())
	return writeJSON(w, struct{}{})
}
