package swarm

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

var (
	hostileRuns = flag.Int("swarm.hostile", 50, "how many swarms with hostile peers are run")
	hostileSeed = flag.Uint64("swarm.seed", 1, "seed of the first of them")
)

// A lie is what a hostile peer does with the requests for one blob, of which it
// has all. It answers others as an honest one does.
type lie struct {
	name string
	make func(r *mathrand.Rand, task p2p.Task, data []byte, honest http.Handler) http.Handler
}

var lies = []lie{
	{"wrong bytes", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		if b := answer.Body.Bytes(); len(b) > 100 {
			b[len(b)-1-r.IntN(50)] ^= byte(1 + r.IntN(255))
		}
		send(w, answer)
	})},
	{"short body", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		answer.Body.Truncate(r.IntN(answer.Body.Len() + 1))
		answer.Header().Del("Content-Length")
		send(w, answer)
	})},
	{"body that breaks off", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		w.Header().Set("Content-Length", strconv.Itoa(answer.Body.Len()))
		w.Write(answer.Body.Bytes()[:r.IntN(answer.Body.Len())])
		panic(http.ErrAbortHandler)
	})},
	{"long body", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		answer.Body.Write(make([]byte, 1+r.IntN(100_000)))
		answer.Header().Del("Content-Length")
		send(w, answer)
	})},
	{"noise", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		b := make([]byte, r.IntN(1000))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		w.Write(b)
	})},
	{"another piece", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		if b := answer.Body.Bytes(); len(b) > pieceReplyHeader {
			b[5] ^= 1
		}
		send(w, answer)
	})},
	{"no pieces", func(_ *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			req, err := parsePieceRequest(body)
			if err != nil {
				return
			}
			b, _ := (&pieceReply{piece: -1, have: schedule.FullSet(req.want.Len())}).append(nil)
			w.Write(b)
		})
	}},
	{"refuses", func(r *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		code := []int{400, 403, 404, 409, 429, 500, 503}[r.IntN(7)]
		return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", code) })
	}},
	{"stalls", func(r *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		path := []string{pathPieces, pathLinks}[r.IntN(2)]
		return instead(honest, path, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		})
	}},
	{"stalls in the middle", onPieces(func(r *mathrand.Rand, w http.ResponseWriter, answer *httptest.ResponseRecorder) {
		w.Header().Set("Content-Length", strconv.Itoa(answer.Body.Len()))
		w.Write(answer.Body.Bytes()[:r.IntN(answer.Body.Len())])
		http.NewResponseController(w).Flush()
		<-answerContext(w).Done()
	})},
	{"forged chain", forger(func(r *mathrand.Rand, table *digest.Table, data []byte) (*digest.Table, []byte) {
		// One state is another one.
		forged := *table
		forged.Chain = bytes.Clone(table.Chain)
		forged.Chain[r.IntN(len(forged.Chain))] ^= 1
		return &forged, data
	})},
	{"other content", forger(func(r *mathrand.Rand, table *digest.Table, data []byte) (*digest.Table, []byte) {
		// Everything fits together, but for the last piece.
		other := bytes.Clone(data)
		other[r.IntN(len(other)-digest.MinPieceLength)] ^= 1
		forged := tableOf(table.Digest, other)
		forged.Digest = table.Digest
		return forged, other
	})},
	{"other content in part", forger(func(r *mathrand.Rand, table *digest.Table, data []byte) (*digest.Table, []byte) {
		// From some piece on the true chain goes on.
		other := bytes.Clone(data)
		at := r.IntN(len(other) - digest.MinPieceLength)
		other[at] ^= 1
		forged := tableOf(table.Digest, other)
		forged.Digest = table.Digest
		from := int64(at)/table.PieceLength + 1 + int64(r.IntN(3))
		if size := len(table.Chain) / (table.Pieces() - 1); from*int64(size) < int64(len(table.Chain)) {
			copy(forged.Chain[from*int64(size):], table.Chain[from*int64(size):])
		}
		return forged, other
	})},
	{"another size", forger(func(r *mathrand.Rand, table *digest.Table, data []byte) (*digest.Table, []byte) {
		other := data[:len(data)-1-r.IntN(len(data)/2)]
		forged := tableOf(table.Digest, other)
		forged.Digest = table.Digest
		return forged, other
	})},
	{"nothing at all", forger(func(_ *mathrand.Rand, table *digest.Table, _ []byte) (*digest.Table, []byte) {
		return &digest.Table{Digest: table.Digest, PieceLength: digest.MinPieceLength}, nil
	})},
	{"hints to nobody", func(r *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		return editStates(honest, func(t *taskState) {
			t.Hints = append(t.Hints, hint{"12D3KooWnobody", []string{"/ip4/127.0.0.1/tcp/1"}}, hint{"", nil})
		})
	}},
	{"nonsense in answers", func(r *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		return edit(honest, pathFind, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			b := answer.Body.Bytes()
			b[r.IntN(len(b))] ^= byte(1 + r.IntN(255))
			w.Write(b)
		})
	}},
}

// tableOf makes the piece table of data with the algorithm of d.
func tableOf(d digest.Digest, data []byte) *digest.Table {
	r := digest.NewRecorder(d.Algorithm())
	r.Write(data)
	t, err := r.Table()
	if err != nil {
		panic(err)
	}
	return t
}

// send sends an answer that was recorded.
func send(w http.ResponseWriter, answer *httptest.ResponseRecorder) {
	w.WriteHeader(answer.Code)
	w.Write(answer.Body.Bytes())
}

type withContext struct {
	http.ResponseWriter
	ctx context.Context
}

func (w withContext) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func answerContext(w http.ResponseWriter) context.Context { return w.(withContext).ctx }

// instead answers requests to a path.
func instead(honest http.Handler, path string, f http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == path {
			f(w, r)
		} else {
			honest.ServeHTTP(w, r)
		}
	})
}

// edit changes the honest answers to a path.
func edit(honest http.Handler, path string, f func(http.ResponseWriter, *http.Request, *httptest.ResponseRecorder)) http.Handler {
	return instead(honest, path, func(w http.ResponseWriter, r *http.Request) {
		answer := httptest.NewRecorder()
		honest.ServeHTTP(answer, r)
		if answer.Code != http.StatusOK || answer.Body.Len() == 0 {
			send(w, answer)
			return
		}
		f(withContext{w, r.Context()}, r, answer)
	})
}

// editStates changes what a peer says that it has.
func editStates(honest http.Handler, f func(*taskState)) http.Handler {
	return edit(honest, pathFind, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
		var reply findReply
		json.Unmarshal(answer.Body.Bytes(), &reply)
		for _, t := range reply.Tasks {
			if t != nil {
				f(t)
			}
		}
		json.NewEncoder(w).Encode(reply)
	})
}

// onPieces changes the honest answers that have pieces.
func onPieces(f func(*mathrand.Rand, http.ResponseWriter, *httptest.ResponseRecorder)) func(*mathrand.Rand, p2p.Task, []byte, http.Handler) http.Handler {
	return func(r *mathrand.Rand, _ p2p.Task, _ []byte, honest http.Handler) http.Handler {
		var mu sync.Mutex
		seed := r.Uint64()
		return edit(honest, pathPieces, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			mu.Lock()
			seed++
			mine := mathrand.New(&lockedSource{src: mathrand.NewPCG(seed, 0)})
			mu.Unlock()
			f(mine, w, answer)
		})
	}
}

// forger serves other links than the true ones, and pieces that fit them as far as they can.
func forger(forge func(*mathrand.Rand, *digest.Table, []byte) (*digest.Table, []byte)) func(*mathrand.Rand, p2p.Task, []byte, http.Handler) http.Handler {
	return func(r *mathrand.Rand, task p2p.Task, data []byte, honest http.Handler) http.Handler {
		table, forged := forge(r, tableOf(task.Digest, data), data)
		l := links{table.Size, table.Chain}
		hash := l.hash(task.Digest)
		lastStalls := r.IntN(2) == 0
		h := instead(honest, pathLinks, func(w http.ResponseWriter, r *http.Request) { w.Write(l.append(nil)) })
		h = editStates(h, func(t *taskState) { t.Size, t.Held = table.Size, nil })
		return instead(h, pathPieces, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			req, err := parsePieceRequest(body)
			if err != nil || req.links != hash {
				http.Error(w, fmt.Sprintf("%x", hash), http.StatusConflict)
				return
			}
			reply := pieceReply{piece: -1, have: schedule.FullSet(table.Pieces())}
			for i := range req.want.All() {
				reply.piece = i
				start, end := table.Bounds(i)
				// What can't be right is not given, or given all the same.
				if lastStalls && table.VerifyPiece(i, forged[start:end]) != nil {
					<-r.Context().Done()
					return
				}
				b, _ := reply.append(nil)
				w.Write(append(b, forged[start:end]...))
				return
			}
			b, _ := reply.append(nil)
			w.Write(b)
		})
	}
}

// TestHostile runs swarms in which at least half of those who say that they have
// a blob lie about it. With one honest source the blob arrives, nothing wrong is
// stored, and nobody else is taken for a liar.
func TestHostile(t *testing.T) {
	var failed atomic.Bool
	for run := range *hostileRuns {
		seed := *hostileSeed + uint64(run)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			if failed.Load() {
				t.Skip("one before has failed")
			}
			hostile(t, seed)
			if t.Failed() {
				failed.Store(true)
			}
		})
	}
}

func hostile(t *testing.T, seed uint64) {
	r := mathrand.New(&lockedSource{src: mathrand.NewPCG(seed, 0)})
	short := func(o *Options) {
		o.StallTimeout = 300 * time.Millisecond
		o.LookupTimeout = 2 * time.Second
	}
	h := newHub()
	data := content(2*digest.MinPieceLength+r.IntN(4<<20), seed)
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(data)}
	honest := 1 + r.IntN(2)
	var fair []*testPeer
	for range honest {
		p := h.start(t, short)
		p.add(t, task.Tag, data)
		fair = append(fair, p)
	}
	var told []string
	for range honest + r.IntN(2) {
		l := lies[r.IntN(len(lies))]
		told = append(told, l.name)
		liar := h.start(t, short, func(o *Options) {
			o.tamper = func(handler http.Handler) http.Handler {
				return l.make(mathrand.New(&lockedSource{src: mathrand.NewPCG(r.Uint64(), 1)}), task, data, handler)
			}
		})
		liar.add(t, task.Tag, data)
	}
	t.Logf("seed %d: %d honest, lies: %q, %d bytes", seed, honest, told, len(data))
	var reading sync.WaitGroup
	for range 1 + r.IntN(2) {
		b := h.start(t, short)
		fair = append(fair, b)
		reading.Go(func() {
			// A reader that was given what was proven wrong reads again.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for attempt := 1; ; attempt++ {
				got, err := b.read(ctx, task)
				if err == nil && bytes.Equal(got, data) {
					break
				}
				if err == nil {
					t.Errorf("seed %d: wrong bytes were read to the end", seed)
					return
				}
				if attempt == 10 || ctx.Err() != nil {
					t.Errorf("seed %d: not read at attempt %d: %v", seed, attempt, err)
					return
				}
				t.Logf("seed %d: attempt %d: %v", seed, attempt, err)
			}
			b.wantStored(t, task)
			_, err := b.store.Check(ctx, func(p pieces.Problem) { t.Errorf("seed %d: stored: %s", seed, p) })
			if err != nil {
				t.Error(err)
			}
		})
	}
	reading.Wait()
	for _, p := range fair {
		for _, other := range fair {
			if seen := p.peerOn(t, other.id); seen.Faults > 0 {
				t.Errorf("seed %d: one that does not lie is said to: %s", seed, seen.Reason)
			}
		}
	}
}

// lockedSource is a source of random numbers for requests that come side by side.
type lockedSource struct {
	mu  sync.Mutex
	src mathrand.Source
}

func (l *lockedSource) Uint64() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.src.Uint64()
}
