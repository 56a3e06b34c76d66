package swarm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// frost holds back whatever a peer answers, as long as it lasts.
type frost struct {
	mu   sync.Mutex
	over chan struct{} // nil: there is none
}

func (f *frost) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = make(chan struct{})
}

func (f *frost) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.over)
	f.over = nil
}

func (f *frost) on(o *Options) {
	before := o.tamper
	o.tamper = func(honest http.Handler) http.Handler {
		if before != nil {
			honest = before(honest)
		}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			f.mu.Lock()
			over := f.over
			f.mu.Unlock()
			if over != nil {
				select {
				case <-over:
				case <-r.Context().Done():
				}
			}
			honest.ServeHTTP(w, r)
		})
	}
}

// patient gives a peer this patience: three times that.
func patient(d time.Duration) func(*Options) {
	return func(o *Options) { o.StallTimeout, o.LookupTimeout = d, d }
}

// slowly makes a peer send its pieces a byte at a time.
func slowly(o *Options) {
	o.tamper = func(honest http.Handler) http.Handler {
		trickle := func(w http.ResponseWriter, r *http.Request, answer *httptest.ResponseRecorder) {
			if answer.Body.Len() < 1000 {
				send(w, answer)
				return
			}
			for _, b := range answer.Body.Bytes() {
				w.Write([]byte{b})
				http.NewResponseController(w).Flush()
				select {
				case <-time.After(20 * time.Millisecond):
				case <-r.Context().Done():
					return
				}
			}
		}
		return edit(edit(honest, pathPieces, trickle), pathBlob, trickle)
	}
}

// wantEnd reads a task, which has to fail with kind, long before a minute is over.
func (p *testPeer) wantEnd(t *testing.T, ctx context.Context, task p2p.Task, kind error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	_, err := p.read(ctx, task)
	if !errors.Is(err, kind) || ctx.Err() != nil {
		t.Fatalf("the read ends with %v, want %v", err, kind)
	}
	return err
}

func (p *testPeer) wantNoPartials(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		left, err := os.ReadDir(p.dir + "/partial")
		if err == nil && len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left are %v, %v", left, err)
		}
		<-time.After(time.Millisecond)
	}
}

// A download whose only source falls silent ends, whoever else is connected, and says
// meanwhile what it waits for.
func TestSilentSource(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	g, f := newGate(10), new(frost)
	a, b := h.start(t, g.through, f.on), h.start(t, patient(time.Second))
	h.start(t)
	data := content(gateSize, 30)
	task := a.add(t, "", data)
	var mu sync.Mutex
	var told []string
	ctx := p2p.WithNotice(t.Context(), func(text string) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, text)
	})
	blob := b.open(t, ctx, task)
	defer blob.Close()
	arrive(t, blob, 10)
	f.begin()
	err := b.wantEnd(t, ctx, task, p2p.ErrUnreachable)
	if !strings.Contains(err.Error(), "10 of 32 pieces have arrived, and are kept") ||
		!strings.Contains(err.Error(), a.id.String()) {
		t.Errorf("the error is: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(told) == 0 || !strings.Contains(told[0], "waiting for peer "+a.id.String()) {
		t.Errorf("told was %q", told)
	}
	f.end()
	g.open()
	b.want(t, task, data)
}

// A peer that is silent for longer than it may be is asked again: nothing is held against it.
func TestStallIsNoVerdict(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	g, f := newGate(10), new(frost)
	a, b := h.start(t, g.through, f.on), h.start(t, func(o *Options) { o.StallTimeout = 300 * time.Millisecond })
	data := content(gateSize, 31)
	task := a.add(t, "", data)
	blob := b.open(t, t.Context(), task)
	defer blob.Close()
	arrive(t, blob, 10)
	f.begin()
	<-time.After(3 * time.Second)
	g.open()
	f.end()
	b.want(t, task, data)
	peers, err := b.Peers(t.Context())
	if err != nil || len(peers) != 1 || peers[0].Faults != 0 {
		t.Errorf("after a stall the peers are %+v, %v", peers, err)
	}
}

// Time in which the receiver is stopped is not the source's.
func TestReceiverSleeps(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	g := newGate(10)
	a, b := h.start(t, g.through), h.start(t, patient(300*time.Millisecond))
	data := content(gateSize, 32)
	task := a.add(t, "", data)
	blob := b.open(t, t.Context(), task)
	defer blob.Close()
	arrive(t, blob, 10)
	b.downloadBy(blob).post(func() { time.Sleep(3 * time.Second) })
	g.open()
	requireRest(t, blob, data)
}

// A source that sends a byte now and then holds nothing up that others have. Alone it is
// given up.
func TestSlowSource(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	data := content(10*digest.MinPieceLength, 33)
	slow := []*testPeer{h.start(t, slowly), h.start(t, slowly), h.start(t, slowly)}
	b, c := h.start(t, patient(time.Second)), h.start(t)
	var task p2p.Task
	for _, p := range slow {
		task = p.add(t, "", data)
	}
	b.wantEnd(t, t.Context(), task, p2p.ErrUnreachable)
	c.add(t, "", data)
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if got, err := b.read(ctx, task); err != nil || !bytes.Equal(got, data) {
		t.Errorf("with one that is not slow: %d bytes, %v", len(got), err)
	}
}

// What the only one that has a blob can't give is said at once.
func TestDamagedAtTheOnlySource(t *testing.T) {
	for _, size := range []int{1 << 20, 1000} {
		h := newHub()
		long := patient(time.Minute)
		a, b := h.start(t, long), h.start(t, long)
		h.start(t, long)
		task := a.add(t, "", content(size, 34))
		damage(t, a.dir, task.Digest, int64(size/3))
		err := b.wantEnd(t, t.Context(), task, p2p.ErrUnreachable)
		if !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), a.id.String()) {
			t.Errorf("the error is: %v", err)
		}
	}
}

// So is it where all who had it have lost it, and what has arrived goes.
func TestLostMeanwhile(t *testing.T) {
	for name, lose := range map[string]func(a *testPeer, task p2p.Task) error{
		// As where a name has moved on: nobody is told.
		"deleted": func(a *testPeer, task p2p.Task) error {
			_, err := a.store.Delete(t.Context(), "", digest.FromDigest(task.Digest), p2p.DeleteOptions{})
			return err
		},
		"its file removed": func(a *testPeer, task p2p.Task) error {
			return os.Remove(blobFile(a.dir, task.Digest))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub()
			g := newGate(10)
			long := patient(time.Minute)
			a, b := h.start(t, long, g.through), h.start(t, long)
			h.start(t, long)
			task := a.add(t, "", content(gateSize, 35))
			blob := b.open(t, t.Context(), task)
			defer blob.Close()
			arrive(t, blob, 10)
			if err := lose(a, task); err != nil {
				t.Fatal(err)
			}
			g.open()
			b.wantEnd(t, t.Context(), task, p2p.ErrNotFound)
			b.wantNoPartials(t)
		})
	}
}

// A peer that has just said that it has a blob, and is gone before any of it came, is not waited for.
func TestGoneBeforeItBegins(t *testing.T) {
	for _, size := range []int{1000, gateSize} { // of one piece, and of many
		h := newHub()
		a, b := h.start(t), h.start(t, patient(time.Second))
		task := a.add(t, "", content(size, 37))
		if _, err := b.Stat(t.Context(), "", digest.FromDigest(task.Digest), p2p.StatOptions{}); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if err := b.wantEnd(t, t.Context(), task, p2p.ErrUnreachable); !strings.Contains(err.Error(),
			"none is connected") {
			t.Errorf("it was waited for: %v", err)
		}
	}
}

// What there is no room for is refused before it begins, by whom it is offered alone. Where it
// is a lie that it is so long, it is fetched.
func TestNoRoom(t *testing.T) {
	h := newHub()
	data := content(gateSize, 36)
	b := h.start(t)
	b.Close()
	b.maxSize = gateSize - 1
	b.restart(t, h)
	a := h.start(t)
	task := a.add(t, "", data)
	b.wantEnd(t, t.Context(), task, p2p.ErrNoSpace)
	b.wantNoPartials(t)
	peers, err := b.Peers(t.Context())
	if err != nil || len(peers) != 1 || peers[0].Gave != 0 {
		t.Errorf("peers are %+v, %v; want none that gave anything", peers, err)
	}

	b.Close()
	b.maxSize = gateSize + 1000
	b.restart(t, h)
	long := content(2*gateSize, 37)
	table := tableOf(digest.SHA256.FromBytes(long), long)
	l := links{table.Size, table.Chain}
	for range 3 {
		h.start(t, func(o *Options) {
			o.tamper = func(honest http.Handler) http.Handler {
				honest = instead(honest, pathLinks,
					func(w http.ResponseWriter, r *http.Request) { w.Write(l.append(nil)) })
				return edit(honest, pathFind,
					func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
						var reply findReply
						json.Unmarshal(answer.Body.Bytes(), &reply)
						for _, t := range reply.Tasks {
							if t != nil {
								t.Size = table.Size
							}
						}
						json.NewEncoder(w).Encode(reply)
					})
			}
		}).add(t, "", data)
	}
	b.want(t, task, data)
}

// A download ends when what it brings is deleted.
func TestDeletedWhileArriving(t *testing.T) {
	h := newHub()
	g := newGate(10)
	a, b, c := h.start(t, g.through), h.start(t, patient(time.Minute)), h.start(t)
	task := a.add(t, "models", content(gateSize, 38))
	blob := b.open(t, t.Context(), task)
	defer blob.Close()
	arrive(t, blob, 10)
	c.delete(t, "models", string(task.Digest), p2p.DeleteOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("what was deleted is waited for: %v", err)
	}
}

// A part of a blob goes when its task is deleted, or the name that led to it.
func TestPartialsGoWithTheirTask(t *testing.T) {
	for _, byName := range []bool{false, true} {
		h := newHub()
		g := newGate(10)
		a, b, c := h.start(t, g.through), h.start(t), h.start(t)
		data := content(gateSize, 38)
		task := a.add(t, "models", data)
		cid := digest.FromDigest(task.Digest)
		if byName {
			var err error
			if cid, err = digest.ParseCID("v1"); err != nil {
				t.Fatal(err)
			}
			in, err := a.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			manifest := []byte("manifest")
			added, err := in.Add(bytes.NewReader(manifest), p2p.AddOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.store.Delete(t.Context(), "models", digest.FromDigest(task.Digest),
				p2p.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := in.Commit(p2p.Commit{
				Tasks: []p2p.NewTask{
					{Task: task},
					{Task: p2p.Task{Tag: "models", Digest: added.Digest},
						Manifest: &p2p.NewManifest{Refs: []digest.Digest{task.Digest}}},
				},
				Names: []p2p.NewName{{Tag: "models", Name: "v1", Digest: added.Digest}},
			}); err != nil {
				t.Fatal(err)
			}
		}
		blob := b.open(t, t.Context(), task)
		arrive(t, blob, 10)
		d := b.downloadBy(blob)
		blob.Close()
		<-d.ended
		if left := b.store.Arriving(); len(left) != 1 || left[0].Task != task || left[0].Open ||
			left[0].Size != gateSize {
			t.Fatalf("what has arrived is %+v", left)
		}
		if _, err := c.Delete(t.Context(), "models", cid, p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		b.wantNoPartials(t)
	}
}

// A manifest is asked of others, too, where the first that has it is slow, or has lost it.
func TestSlowManifest(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	data := content(5000, 39)
	slow, slower, b, c := h.start(t, slowly), h.start(t, slowly), h.start(t, patient(time.Second)), h.start(t)
	var task p2p.Task
	for _, p := range []*testPeer{slow, slower, c} {
		task = p.add(t, "", data)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if got, err := b.fetchManifest(ctx, task, slow.id); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	other := c.add(t, "", content(5000, 40))
	if _, err := b.fetchManifest(ctx, other, slow.id); err != nil {
		t.Errorf("of what the first has not: %v", err)
	}
	c.Close()
	none := p2p.Task{Digest: digest.SHA256.FromString("none")}
	if _, err := b.fetchManifest(ctx, none, slow.id); err == nil {
		t.Error("what nobody has was fetched")
	}
}
