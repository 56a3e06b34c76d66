package swarm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// onClock runs a test of how long things take, on a clock that stands still while anything can
// be done: it takes what it is to take, however busy the machine is.
func onClock(t *testing.T, test func(*testing.T, *hub)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := newHub()
		h.noTCP = true
		test(t, h)
	})
}

// took fails the test where do does not take exactly so long.
func took(t *testing.T, what string, want time.Duration, do func()) {
	t.Helper()
	start := time.Now()
	do()
	if got := time.Since(start); got != want {
		t.Errorf("%s took %s, want %s", what, got, want)
	}
}

// A peer goes silent: what a question costs, before that is known and after.
func TestCostOfSilence(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	onClock(t, func(t *testing.T, h *hub) {
		a, b, c := h.start(t), h.start(t), h.start(t)
		a.push(t, "models", "v1", "", []byte("mine"))
		theirs := c.push(t, "models", "v2", "", []byte("theirs"))
		stat := func(what, cid string, want error, limit time.Duration) {
			t.Helper()
			took(t, what, limit, func() {
				if _, err := a.Stat(t.Context(), "models", cidOf(t, cid),
					p2p.StatOptions{Manifest: true}); !errors.Is(err, want) {
					t.Errorf("%s: %v, want %v", what, err, want)
				}
			})
		}
		absent := digest.SHA256.FromString("nowhere").String()
		stat("a name that is here, with all there", "v1", nil, 0)
		h.hang(b.id, true)
		stat("a name that is here", "v1", nil, newerTimeout)
		time.Sleep(a.opts.LookupTimeout + time.Second)
		if a.peers.get(b.id).silence() == 0 {
			t.Error("a peer that has not answered for half a second is not asked whether it does")
		}
		for range 3 {
			stat("a name that is here", "v1", nil, 0)
			stat("a digest elsewhere", theirs.Digest.String(), nil, 0)
			// What was announced is looked for a little longer.
			stat("what is nowhere", absent, p2p.ErrNotFound, announcedGrace)
		}
		if n := a.questions.late.count(); n > 10 {
			t.Errorf("%d questions are under way", n)
		}
		h.hang(b.id, false)
		time.Sleep(2 * maxProbePause)
		if a.peers.get(b.id).silence() > 0 {
			t.Error("a peer that answers again is taken for silent")
		}

		// A question to one peer costs as much, and says as much.
		h.hang(b.id, true)
		took(t, "a question to one peer", a.opts.LookupTimeout, func() {
			if _, err := a.questions.find(t.Context(), b.id, &findRequest{}); !errors.Is(err, errNoAnswer) {
				t.Errorf("error is %v, want %v", err, errNoAnswer)
			}
		})
		stat("a name that is here, after it", "v1", nil, 0)
	})
}

// Of those that have announced something and are not connected any more, a silent one is waited
// for once.
func TestCostOfSilentAnnouncers(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		a, b := h.start(t), h.start(t)
		h.start(t)
		data := content(1000, 1)
		task := b.add(t, "", data)
		b.Close()
		h.mu.Lock()
		h.ghosts[b.id] = true
		h.mu.Unlock()
		h.mu.Lock()
		h.providers[taskKey(task)][b.id] = true
		h.mu.Unlock()
		stat := func(want time.Duration) {
			t.Helper()
			took(t, "what only a ghost has", want, func() {
				if _, err := a.Stat(t.Context(), "", digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err,
					p2p.ErrNotFound) {
					t.Errorf("%v", err)
				}
			})
		}
		stat(a.opts.LookupTimeout)
		stat(0)
	})
}

// slowed has a peer send the bodies of its answers of some length through f.
func slowed(path string, f func(w http.ResponseWriter, r *http.Request, body []byte)) func(*Options) {
	return func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return edit(honest, path, func(w http.ResponseWriter, r *http.Request, answer *httptest.ResponseRecorder) {
				if answer.Body.Len() < 1000 {
					send(w, answer)
					return
				}
				f(w, r, answer.Body.Bytes())
			})
		}
	}
}

// How a download ends, and after what time, with a source that behaves in one of the ways in
// which sources do. The peers have a stall timeout of 5 s, and so give up after 15 s.
func TestSourcesOfAllKinds(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	const size, stall = 4 * digest.MinPieceLength, 5 * time.Second
	// times calls f with how many requests for pieces there have been.
	times := func(f func(n int64, honest http.Handler, w http.ResponseWriter, r *http.Request)) func(*Options) {
		var n atomic.Int64
		return func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body) // else the server does not notice when the other end goes
					r.Body = io.NopCloser(bytes.NewReader(body))
					f(n.Add(1), honest, w, r)
				})
			}
		}
	}
	// within reports whether less than this has passed since it was first asked.
	within := func(limit time.Duration) func() bool {
		var began atomic.Pointer[time.Time]
		return func() bool {
			now := time.Now()
			began.CompareAndSwap(nil, &now)
			return now.Sub(*began.Load()) < limit
		}
	}
	code := func(code int, until time.Duration) func(*Options) {
		early := within(until)
		return times(func(_ int64, honest http.Handler, w http.ResponseWriter, r *http.Request) {
			if early() {
				http.Error(w, "not now", code)
				return
			}
			honest.ServeHTTP(w, r)
		})
	}
	// dead never answers what comes within a time.
	dead := func(until time.Duration) func(*Options) {
		early := within(until)
		return times(func(_ int64, honest http.Handler, w http.ResponseWriter, r *http.Request) {
			if early() {
				<-r.Context().Done()
				return
			}
			honest.ServeHTTP(w, r)
		})
	}
	var asked atomic.Int64
	for name, test := range map[string]struct {
		size    int
		source  func(*Options)
		reader  func(*Options)
		end     error
		atMost  time.Duration
		atLeast time.Duration
	}{
		"honest": {},
		"its own limit": {size: digest.MinPieceLength, source: func(o *Options) { o.UploadRate = 1500 },
			atLeast: 30 * time.Second, atMost: time.Minute},
		"our own limit": {size: digest.MinPieceLength, reader: func(o *Options) { o.DownloadRate = 1500 },
			atLeast: 30 * time.Second, atMost: time.Minute},
		"busy for a while": {source: code(http.StatusServiceUnavailable, 8*time.Second), atLeast: 8 * time.Second,
			atMost: 9 * time.Second},
		"in trouble for a while": {source: code(http.StatusInternalServerError, 8*time.Second),
			atLeast: 8 * time.Second, atMost: 13 * time.Second},
		"never gives anything": {source: times(func(_ int64, _ http.Handler, w http.ResponseWriter, _ *http.Request) {
			asked.Add(1)
			http.Error(w, "not now", http.StatusInternalServerError)
		}), end: p2p.ErrUnreachable, atMost: 3*stall + time.Second},
		"never answers": {source: times(func(_ int64, _ http.Handler, _ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}), end: p2p.ErrUnreachable, atLeast: 3 * stall, atMost: 3*stall + time.Second},
		"breaks off after a little": {source: times(
			func(n int64, honest http.Handler, w http.ResponseWriter, r *http.Request) {
				answer := httptest.NewRecorder()
				honest.ServeHTTP(answer, r)
				w.Header().Set("Content-Length", answer.Header().Get("Content-Length"))
				w.Write(answer.Body.Bytes()[:min(answer.Body.Len(), 100+int(n))])
				panic(http.ErrAbortHandler)
			}), end: p2p.ErrUnreachable, atMost: 3*stall + time.Second},
		"stops in the middle, at first": {
			source: times(func(n int64, honest http.Handler, w http.ResponseWriter, r *http.Request) {
				if n > 10 {
					honest.ServeHTTP(w, r)
					return
				}
				answer := httptest.NewRecorder()
				honest.ServeHTTP(answer, r)
				w.Header().Set("Content-Length", answer.Header().Get("Content-Length"))
				w.Write(answer.Body.Bytes()[:answer.Body.Len()/2])
				http.NewResponseController(w).Flush()
				<-r.Context().Done()
			}), atLeast: stall, atMost: 6 * stall},
		"its first connections are dead": {
			source: dead(5 * time.Second), atLeast: 5 * time.Second, atMost: 10 * time.Second},
		"a byte more each time": {source: times(
			func(n int64, honest http.Handler, w http.ResponseWriter, r *http.Request) {
				answer := httptest.NewRecorder()
				honest.ServeHTTP(answer, r)
				if answer.Code != http.StatusOK || answer.Body.Len() < 1000 {
					send(w, answer)
					return
				}
				w.Header().Set("Content-Length", answer.Header().Get("Content-Length"))
				w.Write(answer.Body.Bytes()[:100+n])
				http.NewResponseController(w).Flush()
				<-r.Context().Done()
			}), end: p2p.ErrUnreachable, atMost: 4 * stall},
	} {
		t.Run(name, func(t *testing.T) {
			onClock(t, func(t *testing.T, h *hub) {
				none := func(*Options) {}
				for _, f := range []*func(*Options){&test.source, &test.reader} {
					if *f == nil {
						*f = none
					}
				}
				if test.size == 0 {
					test.size = size
				}
				a, b := h.start(t, test.source), h.start(t, test.reader)
				h.start(t)
				data := content(test.size, 1)
				task := a.add(t, "", data)
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				start := time.Now()
				got, err := b.read(ctx, task)
				took := time.Since(start)
				if !errors.Is(err, test.end) || err == nil && !bytes.Equal(got, data) {
					t.Errorf("read are %d bytes, %v; want %v", len(got), err, test.end)
				}
				if took < test.atLeast || took > test.atMost {
					t.Errorf("that took %s, want %s to %s", took, test.atLeast, test.atMost)
				}
				if peers, err := b.Peers(t.Context()); err != nil || peers[0].Faults+peers[1].Faults > 0 {
					t.Errorf("a fault is held against somebody: %+v, %v", peers, err)
				}
			})
		})
	}
	if n := asked.Load(); n == 0 || n > 60 {
		t.Errorf("a source that gives nothing was asked %d times in 15 s", n)
	}
}

// What one source is slow with comes from another, before the slow one is given up.
func TestSlowIsAskedOfOthers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	onClock(t, func(t *testing.T, h *hub) {
		a := h.start(t, slowed(pathPieces, func(w http.ResponseWriter, r *http.Request, body []byte) {
			for _, b := range body {
				w.Write([]byte{b})
				http.NewResponseController(w).Flush()
				select {
				case <-time.After(time.Second):
				case <-r.Context().Done():
					return
				}
			}
		}))
		b, c := h.start(t, func(o *Options) { o.MaxRequests = 1 }), h.start(t)
		data := content(gateSize, 33)
		task := a.add(t, "", data)
		blob := b.open(t, t.Context(), task)
		defer blob.Close()
		blob.Want(0, 0)
		time.Sleep(time.Second)
		c.add(t, "", data)
		start := time.Now()
		b.want(t, task, data)
		if took := time.Since(start); took >= b.opts.StallTimeout-time.Second {
			t.Errorf("beside a slow source that took %s", took)
		}
	})
}

// When the only source goes, or has lost the file, another one that has it by then is found
// at once, however long the download has been going on.
func TestAnotherSourceIsFound(t *testing.T) {
	for name, lose := range map[string]func(*testing.T, *testPeer, p2p.Task){
		"gone": func(t *testing.T, a *testPeer, _ p2p.Task) { a.Close() },
		"lost": func(t *testing.T, a *testPeer, task p2p.Task) {
			if _, err := a.store.Delete(t.Context(), "", digest.FromDigest(task.Digest),
				p2p.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			onClock(t, func(t *testing.T, h *hub) {
				a, b, c := h.start(t, func(o *Options) { o.UploadRate = 16 << 10 }), h.start(t), h.start(t)
				data := content(gateSize, 35)
				task := a.add(t, "", data)
				blob := b.open(t, t.Context(), task)
				defer blob.Close()
				blob.Want(0, 0)
				time.Sleep(time.Minute)
				lose(t, a, task)
				c.add(t, "", data)
				start := time.Now()
				requireRest(t, blob, data)
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("from another source it took %s", took)
				}
			})
		})
	}
}

// Time in which there is no memory for pieces here is not the sources'.
func TestWaitForMemory(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		a, b := h.start(t), h.start(t)
		data := content(gateSize, 36)
		task := a.add(t, "", data)
		if err := b.buffers.room.Acquire(t.Context(), b.Swarm.opts.Memory); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(10*time.Minute, func() { b.buffers.room.Release(b.Swarm.opts.Memory) })
		start := time.Now()
		b.want(t, task, data)
		if took := time.Since(start); took < 10*time.Minute {
			t.Errorf("without memory it took %s", took)
		}
	})
}

// So it is with what is sent: pieces have so much memory together, and a peer that asks waits for it.
func TestUploadsWaitForMemory(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		a, b := h.start(t), h.start(t)
		data := content(gateSize, 36)
		task := a.add(t, "", data)
		if err := a.uploads.buffers.room.Acquire(t.Context(), a.Swarm.opts.Memory); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(4*time.Second, func() { a.uploads.buffers.room.Release(a.Swarm.opts.Memory) })
		took(t, "a download from a source without memory", 4*time.Second, func() { b.want(t, task, data) })
	})
}

// A peer that asks for pieces and does not take them holds up nobody for long: so many pieces are sent at
// once, and each part of one has its time.
func TestUploadsTakeTurns(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		a, b, c := h.start(t, func(o *Options) { o.MaxUploads = 1 }), h.start(t), h.start(t)
		data := content(gateSize, 37)
		table := tableOf(digest.SHA256.FromBytes(data), data)
		task := a.add(t, "", data)
		held := askFor(t, b, a, task, table, 0)
		defer held.Body.Close()
		start := time.Now()
		other := askFor(t, c, a, task, table, 0)
		defer other.Body.Close()
		if waited := time.Since(start); waited < sendTimeout || waited > sendTimeout+time.Second {
			t.Errorf("a second piece is sent after %s, want %s", waited, sendTimeout)
		}
	})
}

// A member that begins something and does not go on is closed within seconds.
func TestUnfinishedRequests(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		a, b := h.start(t), h.start(t)
		data := content(gateSize, 38)
		task := a.add(t, "", data)
		const head, half = "Host: peer\r\n", "Content-Length: 100\r\n\r\nhalf"
		for name, test := range map[string]struct {
			sent  string
			after time.Duration
		}{
			"nothing":     {"", 20 * time.Second},
			"half a head": {"GET " + pathHello + " HTTP/1.1\r\n" + head, 20 * time.Second},
			"half a body": {
				"POST " + pathPieces + "?" + taskQuery(task).Encode() + " HTTP/1.1\r\n" + head + half, sendTimeout},
			"half of a body that is of no use": {
				"POST " + pathReplicate + " HTTP/1.1\r\n" + head + half, sendTimeout},
			"half of a body to where nobody asks": {"POST / HTTP/1.1\r\n" + head + half, sendTimeout},
			"no other one": {
				"GET " + pathHello + " HTTP/1.1\r\n" + head + "\r\n", 2 * idleTimeout},
			"a reader only": {
				"GET " + pathBlob + "?" + taskQuery(task).Encode() + " HTTP/1.1\r\n" + head + "\r\n", 0},
		} {
			c, err := b.network.Dial(t.Context(), a.id)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, test.sent); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if test.after == 0 {
				time.Sleep(sendTimeout + time.Second) // and it reads nothing
			}
			c.SetReadDeadline(time.Now().Add(time.Hour))
			n, err := io.Copy(io.Discard, c) // what is answered, if anything, too
			if took := time.Since(start); err != nil || n > gateSize/2 || test.after > 0 && took != test.after {
				t.Errorf("%s: %d bytes, %v, closed after %s, want %s", name, n, err, took, test.after)
			}
			c.Close()
		}
	})
}

// A peer that waits for news gets an answer in time, whether there is any or not.
func TestNewsInTime(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		g := newGate(1)
		a, b, c := h.start(t, g.through), h.start(t), h.start(t)
		data := content(gateSize, 39)
		table := tableOf(digest.SHA256.FromBytes(data), data)
		task := a.add(t, "", data)
		blob := b.open(t, t.Context(), task)
		defer blob.Close()
		arrive(t, blob, 1)
		req := pieceRequest{links: links{table.Size, table.Chain}.hash(task.Digest), news: true,
			want: schedule.NewSet(table.Pieces())}
		req.want.Add(table.Pieces() - 1)
		took(t, "no news", maxNewsWait, func() {
			resp, err := c.client.do(t.Context(), c.client.streams, b.id, http.MethodPost, pathPieces, taskQuery(task),
				req.append(nil))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if reply, err := readPieceReply(resp.Body, table.Pieces()); err != nil || reply.piece >= 0 ||
				reply.have.Intersects(req.want) {
				t.Errorf("the answer is %+v, %v", reply, err)
			}
		})
	})
}

// A source that answers at once, again and again, and gives nothing, is not asked without a pause.
func TestNothingAtOnce(t *testing.T) {
	for name, has := range map[string]bool{"has all": true, "has nothing": false} {
		t.Run(name, func(t *testing.T) {
			onClock(t, func(t *testing.T, h *hub) {
				var asked atomic.Int64
				data := content(gateSize, 40)
				a := h.start(t, func(o *Options) {
					o.tamper = func(honest http.Handler) http.Handler {
						if !has {
							honest = editStates(honest, func(s *taskState) { s.Held = make([]byte, gatePieces/8) })
						}
						return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) {
							io.Copy(io.Discard, r.Body)
							if asked.Add(1) > 1000 {
								<-r.Context().Done() // so that time goes on
								return
							}
							have := schedule.NewSet(gatePieces)
							if has {
								have = schedule.FullSet(gatePieces)
							}
							b, _ := (&pieceReply{piece: -1, have: have}).append(nil)
							w.Write(b)
						})
					}
				})
				b := h.start(t)
				b.wantEnd(t, t.Context(), a.add(t, "", data), p2p.ErrUnreachable)
				if n := asked.Load(); n > 60 {
					t.Errorf("it was asked %d times", n)
				}
			})
		})
	}
}

// Nor is time in which this process is stopped.
func TestStopped(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		g := newGate(10)
		a, b := h.start(t, g.through), h.start(t)
		data := content(gateSize, 32)
		task := a.add(t, "", data)
		blob := b.open(t, t.Context(), task)
		defer blob.Close()
		arrive(t, blob, 10)
		time.Sleep(time.Second) // that they have come counts as progress
		b.downloadBy(blob).post(func() { time.Sleep(time.Hour) })
		b.downloadBy(blob).post(func() {})
		time.Sleep(10 * time.Second)
		g.open()
		requireRest(t, blob, data)
	})
}

// A source of which one request fails while another succeeds is asked for the rest.
func TestOneRequestFails(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		var asked atomic.Int64
		both := make(chan struct{})
		a := h.start(t, func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				return instead(honest, pathPieces, func(w http.ResponseWriter, r *http.Request) {
					switch asked.Add(1) {
					case 1:
						<-both
						http.Error(w, "not now", http.StatusInternalServerError)
						return
					case 2:
						close(both)
					}
					select {
					case <-time.After(10 * time.Millisecond):
					case <-r.Context().Done():
					}
					honest.ServeHTTP(w, r)
				})
			}
		})
		b := h.start(t)
		data := content(gateSize, 33)
		b.want(t, a.add(t, "", data), data)
	})
}

// requireRest reads all of a blob that has begun to arrive.
func requireRest(t *testing.T, blob *Arriving, data []byte) {
	t.Helper()
	var out bytes.Buffer
	if err := blob.CopyRange(t.Context(), &out, 0, blob.Size(), nil); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("read are %d bytes, %v", out.Len(), err)
	}
}

// A manifest takes the time that the source's link needs; a slow or silent source is not waited
// for where others have it.
func TestManifestsTakeTheirTime(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	onClock(t, func(t *testing.T, h *hub) {
		limited, b, c := h.start(t, func(o *Options) { o.UploadRate = 64 << 10 }), h.start(t), h.start(t)
		data := content(2<<20, 39)
		task := limited.add(t, "", data)
		if got, err := b.fetchManifest(t.Context(), task, limited.id); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		h.hang(c.id, true)
		other := limited.add(t, "", content(5000, 40))
		took(t, "a manifest of a silent peer", b.opts.LookupTimeout/2, func() {
			if _, err := b.fetchManifest(t.Context(), other, c.id); err != nil {
				t.Error(err)
			}
		})
	})
}

// What is not the manifest is not taken for it, however long it is, and a peer that sends it is shunned.
func TestForgedManifest(t *testing.T) {
	h := newHub()
	for _, times := range []int{1, 300} {
		a, b := h.start(t, func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				return instead(honest, pathBlob, func(w http.ResponseWriter, r *http.Request) {
					for range times {
						w.Write(make([]byte, 1<<20))
					}
				})
			}
		}), h.start(t)
		task := a.add(t, "", []byte("manifest"))
		n := allocated(func() {
			if got, err := b.fetchManifest(t.Context(), task, a.id); !errors.Is(err, digest.ErrMismatch) {
				t.Errorf("%d bytes, %v; want %v", len(got), err, digest.ErrMismatch)
			}
		})
		if n > times<<20+100<<20 { // what is sent is allocated here, too
			t.Errorf("%d bytes are allocated for a manifest", n)
		}
		if !b.peers.get(a.id).isShunned() {
			t.Error("a peer that forges manifests is not shunned")
		}
		c, manifest := h.start(t), []byte("manifest")
		a.Close()
		liar := h.start(t, func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				return instead(honest, pathBlob,
					func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, len(manifest))) })
			}
		})
		liar.add(t, "", manifest)
		c.add(t, "", manifest)
		if got, err := b.fetchManifest(t.Context(), task, liar.id); err != nil || !bytes.Equal(got, manifest) {
			t.Errorf("where another peer has the true one: %q, %v", got, err)
		}
		liar.Close()
		c.Close()
	}
}
