package swarm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// tally counts what a peer asks others with pathFind.
type tally struct {
	mu    sync.Mutex
	asker peer.ID
	asked map[peer.ID]map[string]int // by who was asked what
}

// count has what this peer is asked counted.
func (q *tally) count(o *Options) {
	self, _ := peer.IDFromPrivateKey(o.Identity)
	tamper := o.tamper
	o.tamper = func(honest http.Handler) http.Handler {
		if tamper != nil {
			honest = tamper(honest)
		}
		return instead(honest, pathFind, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			q.mu.Lock()
			if peerOf(r) == q.asker {
				if q.asked[self] == nil {
					q.asked[self] = map[string]int{}
				}
				q.asked[self][string(body)]++
			}
			q.mu.Unlock()
			honest.ServeHTTP(w, r)
		})
	}
}

// of forgets what was asked, and counts from here on what a peer asks.
func (q *tally) of(asker peer.ID) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.asker, q.asked = asker, map[peer.ID]map[string]int{}
}

// ofEarlier is a peer of a release that does not tell what a name leads to.
func ofEarlier(o *Options) {
	o.tamper = func(honest http.Handler) http.Handler {
		return edit(honest, pathFind, func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
			var reply findReply
			json.Unmarshal(answer.Body.Bytes(), &reply)
			reply.Followed = nil
			writeJSON(w, &reply)
		})
	}
}

// export exports a name as dfcache does, and compares it.
func (p *testPeer) export(t *testing.T, tag, name string, data []byte) {
	t.Helper()
	r, err := blobstore.New(p).Repository(tag)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "exported")
	if _, err := r.ExportFile(t.Context(), name, path, blobstore.ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("exported are %d bytes, %v; want the %d of the file", len(got), err, len(data))
	}
}

// importAs imports a file under a name as dfcache does.
func (p *testPeer) importAs(t *testing.T, tag, name string, data []byte) {
	t.Helper()
	r, err := blobstore.New(p).Repository(tag)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Import(t.Context(), name, bytes.NewReader(data), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
}

// An export by name asks each peer once what the name stands for, and has of what that leads
// to; and then those that have not told of the file, where that is large, once for it.
func TestQuestionsOfAnExport(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		var q tally
		all := make([]*testPeer, 20)
		for i := range all {
			all[i] = h.start(t, q.count)
		}
		small, large := content(1000, 1), content(smallBlob+1, 2)
		for name, data := range map[string][]byte{"small": small, "everywhere": large} {
			all[0].importAs(t, "models", name, data)
		}
		for _, p := range all[1:] {
			p.export(t, "models", "everywhere", large)
		}
		all[0].importAs(t, "other", "large", large)
		for _, test := range []struct {
			tag, name string
			data      []byte
			want      int // questions of each peer
		}{
			{"models", "small", small, 1},
			{"other", "large", large, 2},
			{"models", "everywhere", large, 1},
		} {
			b := h.start(t)
			q.of(b.id)
			b.export(t, test.tag, test.name, test.data)
			if len(q.asked) != len(all) {
				t.Errorf("%s: %d peers were asked, want %d", test.name, len(q.asked), len(all))
			}
			sum := 0
			for p, asked := range q.asked {
				if len(asked) > test.want {
					t.Errorf("%s: peer %s was asked %d questions, want at most %d: %v", test.name, p, len(asked),
						test.want, asked)
				}
				for question, n := range asked {
					if n > 1 {
						t.Errorf("%s: peer %s was asked %d times: %s", test.name, p, n, question)
					}
					sum += n
				}
			}
			t.Logf("%s: %d questions", test.name, sum)
			b.Close()
		}
	})
}

// A peer that does not tell what a name leads to is asked.
func TestQuestionsToEarlierPeers(t *testing.T) {
	h := newHub()
	a := h.start(t, ofEarlier)
	data := content(1000, 1)
	a.importAs(t, "models", "v1", data)
	var q tally
	for range 3 {
		h.start(t, q.count)
	}
	b := h.start(t)
	q.of(b.id)
	b.export(t, "models", "v1", data)
	a.Close()
	h.start(t).export(t, "models", "v1", data)
}

// A peer that has just said that it has nothing is not asked again whenever a source names it.
func TestNamedAgain(t *testing.T) {
	onClock(t, func(t *testing.T, h *hub) {
		var q tally
		g := newGate(10)
		a, b, c := h.start(t, g.through), h.start(t), h.start(t, q.count)
		q.of(b.id)
		data := content(gateSize, 34)
		blob := b.open(t, t.Context(), a.add(t, "", data))
		defer blob.Close()
		for range 10 {
			time.Sleep(time.Millisecond) // by then the search has ended, or the question
			b.downloadBy(blob).post(func() { b.downloadBy(blob).follow(hintOf(c.network.Addresses(c.id))) })
		}
		time.Sleep(time.Millisecond)
		q.mu.Lock()
		for question, n := range q.asked[c.id] {
			if n > 1 {
				t.Errorf("it was asked %d times: %s", n, question)
			}
		}
		q.mu.Unlock()
		g.open()
		requireRest(t, blob, data)
	})
}

// What was deleted, and a peer that has missed that leads to, is not taken from it: it is told.
func TestDeletedIsNotFollowed(t *testing.T) {
	h := newHub()
	layer := []byte("layer")
	a, b := h.start(t), h.start(t)
	a.push(t, "models", "v1", "", layer)
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
	d := pieces.Delete{Tag: task.Tag, CID: digest.FromDigest(task.Digest), At: time.Now().Add(time.Minute),
		Made: time.Now(), Force: true}
	if _, err := b.store.ApplyDelete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.names.resolve(t.Context(), "models", "v1"); err != nil {
		t.Fatal(err)
	}
	if told := b.recent.of(task); len(told) > 0 {
		t.Errorf("of what was deleted is remembered that %s has it", told[0].peer)
	}
	a.gone(t, "models", string(task.Digest))
}

// A name that has led to a manifest is held with that as it was: not where it was deleted
// since, and where it was moved since, what it was moved to counts.
func TestLedTo(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	look := func(name string, want p2p.Task) {
		t.Helper()
		info, err := b.statName(t, "models", name, p2p.StatOptions{Manifest: true})
		if err != nil || info.Task != want {
			t.Fatalf("%s is %s, %v; want %s", name, info.Task, err, want)
		}
	}
	hold := func(task p2p.Task) {
		t.Helper()
		if _, err := b.HoldManifest(t.Context(), task.Tag, digest.FromDigest(task.Digest),
			p2p.StatOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	local := p2p.StatOptions{Scope: p2p.Local}

	first := a.push(t, "models", "v1", "", []byte("first"))
	look("v1", first)
	second := a.push(t, "models", "v1", "", []byte("second"))
	a.pushNamed(t, p2p.NewName{Tag: "models", Name: "kept"}, "", []byte("first")) // or it would be gone
	hold(first)
	if info, err := b.statName(t, "models", "v1", local); err != nil || info.Task != first {
		t.Errorf("held is %s, %v; want %s", info.Task, err, first)
	}
	look("v1", second)
	hold(second)
	if info, err := b.statName(t, "models", "v1", local); err != nil || info.Task != second {
		t.Errorf("held is %s, %v; want %s", info.Task, err, second)
	}

	third := a.push(t, "models", "v2", "", []byte("third"))
	look("v2", third)
	a.delete(t, "models", "v2", p2p.DeleteOptions{NameOnly: true})
	hold(third)
	if info, err := b.statName(t, "models", "v2", local); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("a name that was deleted is %s, %v", info.Task, err)
	}
	// Several names can have led to one: all of them are held with it.
	same := a.push(t, "models", "v3", "", []byte("same"))
	for _, name := range []string{"v4", "v5"} {
		a.pushNamed(t, p2p.NewName{Tag: "models", Name: name}, "", []byte("same"))
	}
	look("v3", same)
	look("v4", same)
	hold(same)
	for name, want := range map[string]bool{"v3": true, "v4": true, "v5": false} {
		if info, err := b.statName(t, "models", name, local); (err == nil && info.Task == same) != want {
			t.Errorf("after a look at v3 and v4, %s is %s, %v", name, info.Task, err)
		}
	}
	for i := range 2 * maxLed {
		b.recent.lead(p2p.NewName{Tag: "models", Name: fmt.Sprint(i), Digest: same.Digest})
	}
	if n := len(b.recent.led[same]); n > maxLed {
		t.Errorf("of %d names of one manifest is remembered what they have led to, want at most %d", n, maxLed)
	}
	for i := range 2 * maxRecent {
		b.recent.lead(p2p.NewName{Tag: fmt.Sprint(i)})
	}
	if n := len(b.recent.led); n > maxRecent {
		t.Errorf("of %d names is remembered what they have led to, want at most %d", n, maxRecent)
	}
}
