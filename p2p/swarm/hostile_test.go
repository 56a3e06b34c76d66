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
	hostileRuns = flag.Int("swarm.hostile", 8, "how many swarms with hostile peers are run")
	hostileSeed = flag.Uint64("swarm.seed", 1, "seed of the first of them")
)

// A lie is what a hostile peer does with the requests for one subject, of which it
// has all. It answers others as an honest one does.
type lie struct {
	name string
	make func(r *mathrand.Rand, about subject, honest http.Handler) http.Handler
}

// subject is what is lied about: a file, and the name that leads to it. The name stood for
// another manifest of it before, and was deleted.
type subject struct {
	task    p2p.Task
	data    []byte
	deleted []pieces.Delete // of the name, and of what went with it
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
	{"no pieces", func(_ *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
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
	{"refuses", func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
		code := []int{400, 403, 404, 409, 429, 500, 503}[r.IntN(7)]
		return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", code) })
	}},
	{"stalls", func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
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
	{"hints to nobody", func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
		return editStates(honest, func(t *taskState) {
			t.Hints = append(t.Hints, hint{"12D3KooWnobody", []string{"/ip4/127.0.0.1/tcp/1"}}, hint{"", nil})
		})
	}},
	{"nonsense in answers", func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
		return edit(honest, pathFind, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			b := answer.Body.Bytes()
			b[r.IntN(len(b))] ^= byte(1 + r.IntN(255))
			w.Write(b)
		})
	}},
}

// nameLies are about names, manifests and deletes.
var nameLies = []lie{
	{"a name of earlier", onNames(func(r *mathrand.Rand, about subject) nameState {
		return nameState{Digest: about.task.Digest, Updated: before(about, r)}
	})},
	{"a name of later", onNames(func(r *mathrand.Rand, about subject) nameState {
		at := later(r)
		if at.Equal(pieces.LastStamp) {
			at = at.Add(-1) // nothing can be later: see TestLastStamp
		}
		return nameState{Digest: about.task.Digest, Updated: at}
	})},
	{"a name that was deleted", onNames(func(r *mathrand.Rand, about subject) nameState {
		return nameState{Digest: about.task.Digest, Updated: about.deleted[0].At, After: about.deleted[0].After}
	})},
	{"a delete of later", onNames(func(r *mathrand.Rand, about subject) nameState {
		return nameState{Deleted: later(r)}
	})},
	{"a delete of what came after it", onNames(func(r *mathrand.Rand, about subject) nameState {
		return nameState{Deleted: before(about, r), DeletedAfter: later(r)}
	})},
	{"deletes once more", onDeletes(func(_ *mathrand.Rand, about subject) []pieces.Delete { return about.deleted })},
	{"deletes of later", onDeletes(func(r *mathrand.Rand, about subject) (all []pieces.Delete) {
		for _, d := range about.deleted {
			d.At, d.After = time.Now().Add(2*pieces.MaxAhead), time.Time{}
			all = append(all, d)
		}
		return all
	})},
	{"deletes of what came after them", onDeletes(func(r *mathrand.Rand, about subject) (all []pieces.Delete) {
		for _, d := range about.deleted {
			d.After = later(r)
			all = append(all, d)
		}
		return all
	})},
	{"deletes of another tag", onDeletes(func(r *mathrand.Rand, about subject) (all []pieces.Delete) {
		for _, d := range about.deleted {
			d.Tag, d.At, d.After, d.Soft, d.Force = "other", time.Now(), time.Time{}, false, true
			all = append(all, d)
		}
		return all
	})},
	{"another manifest", onManifests(func(r *mathrand.Rand, w http.ResponseWriter, b []byte) {
		b[r.IntN(len(b))] ^= byte(1 + r.IntN(255))
		w.Write(b)
	})},
	{"a manifest and more", onManifests(func(r *mathrand.Rand, w http.ResponseWriter, b []byte) {
		w.Write(append(b, make([]byte, 1+r.IntN(10_000))...))
	})},
	{"a manifest that breaks off", onManifests(func(r *mathrand.Rand, w http.ResponseWriter, b []byte) {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		w.Write(b[:r.IntN(len(b))])
		panic(http.ErrAbortHandler)
	})},
	{"a part of a manifest", onManifests(
		func(r *mathrand.Rand, w http.ResponseWriter, b []byte) { w.Write(b[:r.IntN(len(b))]) })},
}

// before returns a time before the name was deleted.
func before(about subject, r *mathrand.Rand) time.Time {
	return about.deleted[0].At.Add(-time.Duration(1 + r.Int64N(int64(year))))
}

// later returns a time that is later than now.
func later(r *mathrand.Rand) time.Time {
	return []time.Time{
		time.Now().Add(30 * time.Minute), time.Now().Add(2 * time.Hour), time.Now().Add(year),
		time.Now().Add(100 * year), pieces.LastStamp.Add(-1), pieces.LastStamp,
	}[r.IntN(6)]
}

// onNames tells this of the name, whatever is known of it.
func onNames(state func(*mathrand.Rand, subject) nameState) func(*mathrand.Rand, subject, http.Handler) http.Handler {
	return func(r *mathrand.Rand, about subject, honest http.Handler) http.Handler {
		n := state(r, about)
		return edit(honest, pathFind, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			var reply findReply
			json.Unmarshal(answer.Body.Bytes(), &reply)
			for i := range reply.Names {
				reply.Names[i] = &n
			}
			json.NewEncoder(w).Encode(reply)
		})
	}
}

// onDeletes tells every peer that it meets of deletes.
func onDeletes(
	deletes func(*mathrand.Rand, subject) []pieces.Delete,
) func(*mathrand.Rand, subject, http.Handler) http.Handler {
	return func(r *mathrand.Rand, about subject, honest http.Handler) http.Handler {
		reply := deletesReply{}
		for _, d := range deletes(r, about) {
			reply.Deletes = append(reply.Deletes, deleteMessageOf(d, time.Now()))
		}
		return instead(honest, pathDeletes,
			func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(reply) })
	}
}

// onManifests changes manifests.
func onManifests(
	f func(*mathrand.Rand, http.ResponseWriter, []byte),
) func(*mathrand.Rand, subject, http.Handler) http.Handler {
	return func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
		return edit(honest, pathBlob, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			f(r, w, answer.Body.Bytes())
		})
	}
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
func edit(
	honest http.Handler, path string, f func(http.ResponseWriter, *http.Request, *httptest.ResponseRecorder),
) http.Handler {
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
func onPieces(
	f func(*mathrand.Rand, http.ResponseWriter, *httptest.ResponseRecorder),
) func(*mathrand.Rand, subject, http.Handler) http.Handler {
	return func(r *mathrand.Rand, _ subject, honest http.Handler) http.Handler {
		var mu sync.Mutex
		seed := r.Uint64()
		return edit(honest, pathPieces, func(w http.ResponseWriter, _ *http.Request,
			answer *httptest.ResponseRecorder) {
			mu.Lock()
			seed++
			mine := mathrand.New(&lockedSource{src: mathrand.NewPCG(seed, 0)})
			mu.Unlock()
			f(mine, w, answer)
		})
	}
}

// forger serves other links than the true ones, and pieces that fit them as far as they can.
func forger(
	forge func(*mathrand.Rand, *digest.Table, []byte) (*digest.Table, []byte),
) func(*mathrand.Rand, subject, http.Handler) http.Handler {
	return func(r *mathrand.Rand, about subject, honest http.Handler) http.Handler {
		d := about.task.Digest
		table, forged := forge(r, tableOf(d, about.data), about.data)
		l := links{table.Size, table.Chain}
		hash := l.hash(d)
		lastStalls := r.IntN(2) == 0
		h := instead(honest, pathLinks, func(w http.ResponseWriter, r *http.Request) { w.Write(l.append(nil)) })
		h = editStates(h, func(t *taskState) {
			if !t.Manifest {
				t.Size, t.Held = table.Size, nil
			}
		})
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
// a file lie about it, and about the name that leads to it. With one honest source the
// file arrives under its name, nothing wrong is stored, and nobody else is taken for a liar;
// and what the honest ones have stays where it is.
func TestHostile(t *testing.T) {
	var failed atomic.Bool
	runs := *hostileRuns
	if testing.Short() {
		runs = min(runs, 3)
	}
	for run := range runs {
		seed := *hostileSeed + uint64(run)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			if failed.Load() {
				return // one is enough to look at
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
	about := subject{task: p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(data)}, data: data}
	first := h.start(t, short)
	first.push(t, "models", "v1", "", []byte("of before"))
	first.delete(t, "models", "v1", p2p.DeleteOptions{})
	var err error
	if about.deleted, _, err = first.store.Deletes(t.Context(), 0, maxDeletes); err != nil || len(about.deleted) < 3 {
		t.Fatalf("there are %d deletes, %v", len(about.deleted), err)
	}
	gone := about.deleted[0]
	about.deleted = append(about.deleted,
		pieces.Delete{Tag: about.task.Tag, CID: digest.FromDigest(about.task.Digest), At: gone.At, Made: gone.Made,
			Soft: true})
	honest := []*testPeer{first}
	if r.IntN(2) == 0 {
		honest = append(honest, h.start(t, short))
	}
	var told []string
	var liars []*testPeer
	for range len(honest) + r.IntN(2) {
		l, n := lies[r.IntN(len(lies))], nameLies[r.IntN(len(nameLies))]
		told = append(told, l.name, n.name)
		liars = append(liars, h.start(t, short, func(o *Options) {
			o.tamper = func(handler http.Handler) http.Handler {
				tell := func(l lie, handler http.Handler) http.Handler {
					return l.make(mathrand.New(&lockedSource{src: mathrand.NewPCG(r.Uint64(), 1)}), about, handler)
				}
				return tell(l, tell(n, handler))
			}
		}))
	}
	t.Logf("seed %d: %d honest, lies: %q, %d bytes", seed, len(honest), told, len(data))
	var manifest p2p.Task
	for _, p := range append(honest, liars...) { // what comes last counts
		manifest = p.push(t, "models", "v1", "", data)
	}
	var reading sync.WaitGroup
	readers := make([]*testPeer, 1+r.IntN(2))
	for i := range readers {
		b := h.start(t, short)
		readers[i] = b
		reading.Go(func() {
			// A reader that was given what was proven wrong reads again.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for attempt := 1; ; attempt++ {
				info, err := b.HoldManifest(ctx, "models", cidOf(t, "v1"), p2p.StatOptions{})
				if err == nil && info.Task != manifest {
					t.Errorf("seed %d: the name leads to %s, want %s", seed, info.Task, manifest)
					return
				}
				var got []byte
				if err == nil {
					got, err = b.read(ctx, about.task)
				}
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
			b.wantStored(t, about.task)
			_, err := b.store.Check(ctx, func(p pieces.Problem) { t.Errorf("seed %d: stored: %s", seed, p) })
			if err != nil {
				t.Error(err)
			}
		})
	}
	reading.Wait()
	fair := append(honest, readers...)
	for _, p := range fair {
		info, err := p.statName(t, "models", "v1", p2p.StatOptions{Scope: p2p.Local, Manifest: true})
		if err != nil || info.Task != manifest || info.Manifest == nil || len(info.Manifest.Refs) != 1 {
			t.Errorf("seed %d: in the end the name is %+v, %v", seed, info, err)
		}
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
