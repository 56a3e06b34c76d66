package swarm

import (
	"bytes"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// onRequests answers requests for pieces as parsed.
func onRequests(honest http.Handler, f func(w http.ResponseWriter, req *pieceRequest)) http.Handler {
	return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		req, err := parsePieceRequest(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f(w, req)
	})
}

// TestLies: of what a source can't have sent in good faith each is a reason to exclude it. It is
// shunned then: nothing more is asked of it, of this blob or of another. What it told falsely comes from
// another one, and nothing of the lie is kept.
func TestLies(t *testing.T) {
	const size = 8*digest.MinPieceLength + 1000
	data := content(size, 50)
	table := tableOf(digest.SHA256.FromBytes(data), data)
	// give sends an answer with a piece.
	give := func(w http.ResponseWriter, piece int) {
		b, _ := (&pieceReply{piece: piece, have: schedule.FullSet(table.Pieces())}).append(nil)
		start, end := table.Bounds(piece)
		w.Write(append(b, data[start:end]...))
	}
	first := func(s *schedule.Set) int {
		for i := range s.All() {
			return i
		}
		return -1
	}
	pieces := func(f func(w http.ResponseWriter, answer []byte)) func(http.Handler) http.Handler {
		return func(honest http.Handler) http.Handler {
			return edit(honest, pathPieces,
				func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
					f(w, answer.Body.Bytes())
				})
		}
	}
	replied := func(reply []byte) func(http.Handler) http.Handler {
		return func(honest http.Handler) http.Handler {
			return onRequests(honest, func(w http.ResponseWriter, _ *pieceRequest) { w.Write(reply) })
		}
	}
	linked := func(b []byte) func(http.Handler) http.Handler {
		return func(honest http.Handler) http.Handler {
			return instead(honest, pathLinks, func(w http.ResponseWriter, _ *http.Request) { w.Write(b) })
		}
	}
	forged := forger(func(_ *mathrand.Rand, table *digest.Table, data []byte) (*digest.Table, []byte) {
		other := bytes.Clone(data)
		other[0] ^= 1
		forged := tableOf(table.Digest, other)
		forged.Digest = table.Digest
		return forged, other
	})
	chain := links{table.Size, table.Chain}.append(nil)
	for name, lie := range map[string]struct {
		make func(honest http.Handler) http.Handler
		why  string
	}{
		"a byte of the piece": {pieces(func(w http.ResponseWriter, b []byte) {
			b[len(b)-1] ^= 1
			w.Write(b)
		}), "do not fit"},
		"more than the piece": {pieces(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
			w.Write(append(b, 0))
		}), "another length"},
		"less than the piece": {pieces(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)-1))
			w.Write(b[:len(b)-1])
		}), "another length"},
		"less than the piece, without saying how much": {pieces(func(w http.ResponseWriter, b []byte) {
			w.Write(b[:len(b)-1])
			http.NewResponseController(w).Flush()
		}), "another length"},
		"less than an answer": {replied([]byte{pieceVersion, 0, 0}), "another length"},
		"a piece that was not asked for": {func(honest http.Handler) http.Handler {
			return onRequests(honest, func(w http.ResponseWriter, req *pieceRequest) {
				give(w, first(schedule.FullSet(table.Pieces()).AndNot(req.want)))
			})
		}, "not asked for"},
		"a piece where it is to tell news": {func(honest http.Handler) http.Handler {
			nothing := make([]byte, (table.Pieces()+7)/8)
			h := editStates(honest, func(s *taskState) { s.Held = nothing })
			return onRequests(h, func(w http.ResponseWriter, req *pieceRequest) {
				if req.news {
					give(w, first(req.want))
				}
			})
		}, "not asked for"},
		"a piece that there is not": {replied(
			append([]byte{pieceVersion, flagPiece | flagWhole, 0, 0, 0, byte(table.Pieces())}, make([]byte, 8)...)),
			"malformed"},
		"another version": {replied(make([]byte, pieceReplyHeader)), "malformed"},
		"a set of another length": {replied(append([]byte{pieceVersion, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}, 0)),
			"malformed"},
		"hints that are none": {replied(
			append([]byte{pieceVersion, flagWhole, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, '{')), "malformed"},
		"a chain that is too short": {linked(chain[:len(chain)-1]), "malformed"},
		"a chain that is too long":  {linked(append(chain, 0)), "malformed"},
		"no chain":                  {linked(chain[:7]), "another length"},
		"a chain of other content": {func(honest http.Handler) http.Handler {
			return forged(mathrand.New(mathrand.NewPCG(4, 1)),
				subject{task: p2p.Task{Digest: table.Digest}, data: data}, honest)
		}, "do not fit"},
		"that it is empty": {func(honest http.Handler) http.Handler {
			return editStates(honest, func(s *taskState) { s.Size, s.Held = 0, nil })
		}, "it is not empty"},
	} {
		t.Run(name, func(t *testing.T) {
			onClock(t, func(t *testing.T, h *hub) {
				b := h.start(t)
				var asked atomic.Int64
				liar := h.start(t, func(o *Options) {
					o.tamper = func(honest http.Handler) http.Handler {
						lying := lie.make(honest)
						return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							if peerOf(r) == b.id &&
								(r.URL.Path == pathFind || r.URL.Path == pathLinks || r.URL.Path == pathPieces) &&
								asked.Add(1) > 1000 {
								io.Copy(io.Discard, r.Body)
								<-r.Context().Done() // so that time goes on, although others ask without a pause
								return
							}
							lying.ServeHTTP(w, r)
						})
					}
				})
				task := liar.add(t, "", data)
				other := liar.add(t, "", content(1000, 51))
				err := b.wantEnd(t, t.Context(), task, p2p.ErrUnreachable)
				p := b.peerOn(t, liar.id)
				if p.Faults == 0 || p.State != p2p.PeerShunned || !strings.Contains(p.Reason, lie.why) {
					t.Fatalf("the liar is %+v after %v; want it shunned for %q", p, err, lie.why)
				}
				n := asked.Load()
				c := h.start(t)
				c.add(t, "", data)
				c.add(t, "", content(1000, 51))
				b.want(t, task, data)
				b.want(t, other, content(1000, 51))
				if more := asked.Load() - n; more > 0 {
					t.Errorf("it was asked %d times afterwards", more)
				}
				b.wantStored(t, task)
			})
		})
	}
}
