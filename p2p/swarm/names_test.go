package swarm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// push stores a manifest of files under a name, and the files, as an import does.
func (p *testPeer) push(t testing.TB, tag, name string, subject digest.Digest, files ...[]byte) p2p.Task {
	t.Helper()
	return p.pushNamed(t, p2p.NewName{Tag: tag, Name: name}, subject, files...)
}

// pushNamed does what push does, with a name that says what becomes of the one before.
func (p *testPeer) pushNamed(t testing.TB, name p2p.NewName, subject digest.Digest, files ...[]byte) p2p.Task {
	t.Helper()
	tag := name.Tag
	in, err := p.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	add := func(b []byte) digest.Digest {
		added, err := in.Add(bytes.NewReader(b), p2p.AddOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return added.Digest
	}
	m := struct { // an image without a config
		SchemaVersion int                  `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Layers        []ocispec.Descriptor `json:"layers"`
		Subject       *ocispec.Descriptor  `json:"subject,omitempty"`
	}{SchemaVersion: 2, MediaType: ocispec.MediaTypeImageManifest}
	if subject != "" {
		m.Subject = &ocispec.Descriptor{MediaType: m.MediaType, Digest: subject}
	}
	refs := p2p.NewManifest{Subject: subject}
	var c p2p.Commit
	for _, f := range files {
		d := add(f)
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: "application/octet-stream", Digest: d, Size: int64(len(f))})
		refs.Refs = append(refs.Refs, d)
		c.Tasks = append(c.Tasks, p2p.NewTask{
			Task: p2p.Task{Tag: tag, Digest: d}, MediaType: "application/octet-stream"})
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: tag, Digest: add(b)}
	c.Tasks = append(c.Tasks, p2p.NewTask{Task: task, MediaType: m.MediaType, Manifest: &refs})
	if name.Name != "" {
		name.Digest = task.Digest
		c.Names = []p2p.NewName{name}
	}
	if err := in.Commit(c); err != nil {
		t.Fatal(err)
	}
	return task
}

func cidOf(t testing.TB, s string) digest.CID {
	t.Helper()
	cid, err := digest.ParseCID(s)
	if err != nil {
		t.Fatal(err)
	}
	return cid
}

// statName asks for a name.
func (p *testPeer) statName(t testing.TB, tag, name string, opts p2p.StatOptions) (p2p.Info, error) {
	t.Helper()
	return p.Stat(t.Context(), tag, cidOf(t, name), opts)
}

func (p *testPeer) holdName(t testing.TB, tag, name string) (p2p.Info, error) {
	t.Helper()
	return p.HoldManifest(t.Context(), tag, cidOf(t, name), p2p.StatOptions{})
}

func TestNames(t *testing.T) {
	h := newHub()
	var log record
	a, b, c := h.start(t), h.start(t, log.with), h.start(t)
	first := a.push(t, "models", "v1", "", []byte("one"), []byte("two"))

	info, err := b.statName(t, "models", "v1", p2p.StatOptions{Manifest: true})
	if err != nil {
		t.Fatal(err)
	}
	if info.Task != first || !info.Remote || info.Local() || !info.IsManifest || info.Manifest == nil ||
		len(info.Manifest.Refs) != 2 || info.Manifest.Refs[0].Size != 3 || !info.Manifest.Refs[0].Remote {
		t.Errorf("the name on another host is %+v", info)
	}
	if _, err := b.statName(t, "models", "v1", p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("it was kept where nobody asked for that: %v", err)
	}

	// Kept, it is served on when the first host has gone, with its layers.
	if info, err = b.holdName(t, "models", "v1"); err != nil || info.Remote {
		t.Fatalf("kept: %+v, %v", info, err)
	}
	layer := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes([]byte("one"))}
	b.want(t, layer, []byte("one"))
	if info := b.wantStored(t, layer); info.Keep != p2p.KeepReferred {
		t.Errorf("the layer is kept by %v, want by its manifest", info.Keep)
	}
	a.Close()
	if info, err = c.statName(t, "models", "v1", p2p.StatOptions{Manifest: true}); err != nil || info.Task != first {
		t.Errorf("from the second host: %+v, %v", info, err)
	}
	c.want(t, layer, []byte("one"))

	// The newest counts, wherever it was pointed there.
	second := c.push(t, "models", "v1", "", []byte("three"))
	if info, err = b.statName(t, "models", "v1", p2p.StatOptions{Manifest: true}); err != nil || info.Task != second {
		t.Errorf("after it was moved elsewhere: %+v, %v", info, err)
	}
	if info, err = b.statName(t, "models", "v1", p2p.StatOptions{Scope: p2p.Local}); err != nil || info.Task != first {
		t.Errorf("on this host alone: %+v, %v, want what it was here", info, err)
	}
	if info, err = b.holdName(t, "models", "v1"); err != nil || info.Task != second {
		t.Errorf("after it was moved elsewhere: %+v, %v", info, err)
	}
	c.Close()
	if info, err = b.statName(t, "models", "v1", p2p.StatOptions{Manifest: true}); err != nil || info.Task != second {
		t.Errorf("alone again: %+v, %v", info, err)
	}
	if log.has("could not see each other") {
		t.Error("moves that came one after the other are taken for others")
	}
}

// A reader of a name that was moved on another host takes nothing away that was put
// in on this one. What a registry's client moves away from stays on every host; what
// an import replaces is let go where it is a copy.
func TestReadTakesNothingAway(t *testing.T) {
	for _, keepOld := range []bool{true, false} {
		h := newHub()
		a, b, c := h.start(t), h.start(t), h.start(t)
		name := p2p.NewName{Tag: "models", Name: "v1", KeepOld: keepOld}
		one, two := []byte("one"), []byte("two")
		first := b.pushNamed(t, name, "", one)
		layer := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(one)}
		read := func(p *testPeer) {
			t.Helper()
			if _, err := p.holdName(t, "models", "v1"); err != nil {
				t.Fatal(err)
			}
		}
		read(c)
		c.want(t, layer, one)
		c.wantStored(t, layer)

		second := a.pushNamed(t, name, "", two)
		for _, p := range []*testPeer{b, c} {
			read(p)
			if info, err := p.statName(t, "models", "v1", p2p.StatOptions{Scope: p2p.Local}); err != nil ||
				info.Task != second {
				t.Errorf("the name that was read is %+v, %v", info, err)
			}
		}
		if info := b.wantStored(t, first); info.Keep != p2p.KeepUntilReferred {
			t.Errorf("keepOld %t: what was put in here is kept by %v, want as loose", keepOld, info.Keep)
		}
		b.wantStored(t, layer)
		if keepOld {
			c.wantStored(t, first)
			c.wantStored(t, layer)
		} else {
			c.gone(t, "models", string(first.Digest))
			c.gone(t, "models", string(layer.Digest))
		}

		// The rule goes with the name, from host to host.
		a.Close()
		d := h.start(t)
		read(d)
		n, err := d.store.Name(t.Context(), "models", "v1")
		if err != nil || n.Digest != second.Digest || n.KeepOld != keepOld {
			t.Errorf("told at second hand, the name is %+v, %v", n, err)
		}
	}
}

// What is pushed here, and only held by what came from a peer, is not taken away with it.
func TestReadSparesWhatACopyHolds(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	shared := []byte("shared")
	first := a.push(t, "models", "v1", "", shared)
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(shared)}
	in, err := b.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(shared), p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred}}}); err != nil {
		t.Fatal(err)
	}
	read := func() {
		t.Helper()
		if _, err := b.holdName(t, "models", "v1"); err != nil {
			t.Fatal(err)
		}
	}
	read()
	b.wantStored(t, first)
	a.push(t, "models", "v1", "", []byte("another"))
	read()
	b.gone(t, "models", string(first.Digest))
	b.wantStored(t, task)
}

func TestReferrersFollow(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	image := a.push(t, "models", "v1", "", []byte("layer"))
	signature := a.push(t, "models", "", image.Digest, []byte("signature"))
	tag := "models"
	list := func(fromPeers bool) (all []digest.Digest) {
		if fromPeers {
			if err := b.HoldReferrers(t.Context(), image); err != nil {
				t.Fatal(err)
			}
		}
		for e, err := range b.List(t.Context(), p2p.Query{Tag: &tag, RefersTo: image.Digest}) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, e.Task.Digest)
		}
		return all
	}
	if got := list(false); len(got) != 0 {
		t.Errorf("here there are %v", got)
	}
	if got := list(true); !slices.Equal(got, []digest.Digest{signature.Digest}) {
		t.Errorf("from peers there are %v, want %s", got, signature.Digest)
	}
	a.Close()
	if got := list(true); !slices.Equal(got, []digest.Digest{signature.Digest}) {
		t.Errorf("later there are %v, want %s", got, signature.Digest)
	}
}

func TestStatProviders(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	data := content(100_000, 3)
	task := a.add(t, "", data)
	cid := digest.FromDigest(task.Digest)
	providers := func(p *testPeer, want p2p.Providers) {
		t.Helper()
		info, err := p.Stat(t.Context(), "", cid, p2p.StatOptions{Providers: true})
		if err != nil || info.Providers == nil || *info.Providers != want {
			t.Errorf("holders are %+v, %v; want %+v", info.Providers, err, want)
		}
	}
	providers(a, p2p.Providers{Asked: 2})
	providers(b, p2p.Providers{Some: 1, Whole: 1, Asked: 2})
	b.want(t, task, data)
	b.wantStored(t, task)
	providers(a, p2p.Providers{Some: 1, Whole: 1, Asked: 2})
	providers(c, p2p.Providers{Some: 2, Whole: 2, Asked: 2})
}

// deleted runs a delete.
func (p *testPeer) delete(t testing.TB, tag, cid string, opts p2p.DeleteOptions) p2p.Deleted {
	t.Helper()
	deleted, err := p.Delete(t.Context(), tag, cidOf(t, cid), opts)
	if err != nil {
		t.Fatalf("delete %s: %v", cid, err)
	}
	return deleted
}

// gone waits until a peer does not have a task any more.
func (p *testPeer) gone(t testing.TB, tag, cid string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := p.store.Stat(t.Context(), tag, cidOf(t, cid), p2p.StatOptions{Scope: p2p.Local})
		if errors.Is(err, p2p.ErrNotFound) {
			return
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%s is still there: %v", cid, err)
		}
		<-time.After(time.Millisecond)
	}
}

func TestDeleteEverywhere(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	data := content(300_000, 4)
	task := a.add(t, "models", data)
	kept := a.add(t, "other", data)
	b.want(t, task, data)
	b.wantStored(t, task)
	deleted := c.delete(t, "models", string(task.Digest), p2p.DeleteOptions{})
	if deleted.Tasks != 0 || deleted.Reached != 2 || deleted.Removed != 2 || len(deleted.Missed) != 0 {
		t.Errorf("deleted is %+v, want 2 reached, and removed on both", deleted)
	}
	for _, p := range []*testPeer{a, b, c} {
		p.gone(t, "models", string(task.Digest))
	}
	b.want(t, kept, data) // what another tag holds stays
	if _, err := b.read(t.Context(), task); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("after the delete: %v, want %v", err, p2p.ErrNotFound)
	}
	if _, err := c.Delete(t.Context(), "models", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); !errors.Is(err,
		p2p.ErrNotFound) {
		t.Errorf("once more: %v, want %v", err, p2p.ErrNotFound)
	}
	// It can be imported again, and is everywhere again.
	c.add(t, "models", data)
	a.want(t, task, data)
	b.want(t, task, data)
}

// A name that goes while another one leads to the same is something that was removed.
func TestDeleteOneOfTwoNames(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	for _, name := range []string{"v1", "v2"} {
		a.push(t, "models", name, "", []byte("the layer"))
		if _, err := b.holdName(t, "models", name); err != nil {
			t.Fatal(err)
		}
	}
	deleted := a.delete(t, "models", "v1", p2p.DeleteOptions{})
	if deleted.Tasks != 0 || deleted.Reached != 1 || deleted.Removed != 1 {
		t.Errorf("deleted is %+v, want the name removed on one peer", deleted)
	}
}

func TestDeleteName(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	layer := []byte("the layer")
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
	manifest := a.push(t, "models", "v1", "", layer)
	if _, err := b.holdName(t, "models", "v1"); err != nil {
		t.Fatal(err)
	}
	b.want(t, task, layer)
	b.wantStored(t, task)
	deleted := a.delete(t, "models", "v1", p2p.DeleteOptions{})
	if deleted.Tasks != 2 || deleted.Reached != 1 || deleted.Removed != 1 {
		t.Errorf("deleted is %+v", deleted)
	}
	for _, p := range []*testPeer{a, b} {
		p.gone(t, "models", "v1")
		p.gone(t, "models", string(manifest.Digest))
		p.gone(t, "models", string(task.Digest))
	}
	if _, err := b.statName(t, "models", "v1", p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("the name: %v, want %v", err, p2p.ErrNotFound)
	}
	a.push(t, "models", "v1", "", layer)
	if _, err := b.statName(t, "models", "v1", p2p.StatOptions{}); err != nil {
		t.Errorf("the name that is back: %v", err)
	}
}

// A peer that was away is told of a delete when it returns, and gives nobody what was deleted.
func TestDeleteWhileAway(t *testing.T) {
	h := newHub()
	a, b, c, d := h.start(t), h.start(t), h.start(t), h.start(t)
	data := content(300_000, 5)
	task := a.add(t, "models", data)
	for _, p := range []*testPeer{b, c} {
		p.want(t, task, data)
		p.wantStored(t, task)
	}
	// b is cut off; c has stopped.
	h.setCut(func(x, y peer.ID) bool { return x == b.id || y == b.id })
	c.Close()
	deleted := a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{})
	if deleted.Tasks != 1 || deleted.Reached != 1 || deleted.Removed != 0 || len(deleted.Missed) != 2 {
		t.Errorf("deleted is %+v, want two missed", deleted)
	}
	h.setCut(nil)
	b.gone(t, "models", string(task.Digest))
	c.restart(t, h)
	c.gone(t, "models", string(task.Digest))
	if _, err := d.read(t.Context(), task); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("after all have met again: %v, want %v", err, p2p.ErrNotFound)
	}
}

// A peer that has missed a delete is told of it by the one that it offers what was deleted.
func TestDeleteIsToldToWhoMissedIt(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(1000, 8)
	task := b.add(t, "models", data)
	seen := pieces.Version{At: b.wantStored(t, task).Origin}
	id := digest.FromDigest(task.Digest)
	if _, _, err := a.store.DeleteForAll(t.Context(), "models", id, p2p.DeleteOptions{},
		map[digest.CID][]pieces.Version{id: {seen}}); err != nil {
		t.Fatal(err)
	}
	b.wantStored(t, task)
	if _, err := a.read(t.Context(), task); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("after the delete: %v, want %v", err, p2p.ErrNotFound)
	}
	b.gone(t, "models", string(task.Digest))
}

// What was deleted does not come back from a peer that goes on telling of it.
func TestDeletedStaysDeleted(t *testing.T) {
	h := newHub()
	a := h.start(t)
	manifest := a.push(t, "models", "v1", "", []byte("layer"))
	task := a.add(t, "models", []byte("a blob"))
	name, err := a.names.state(t.Context(), "models", "v1")
	if err != nil {
		t.Fatal(err)
	}
	state, err := a.api.taskState(t.Context(), task, "")
	if err != nil {
		t.Fatal(err)
	}
	state.Referred = true // which only force deletes
	h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return edit(honest, pathFind,
				func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
					var reply findReply
					json.Unmarshal(answer.Body.Bytes(), &reply)
					for i := range reply.Names {
						reply.Names[i] = name
					}
					for i := range reply.Tasks {
						reply.Tasks[i] = state
					}
					writeJSON(w, &reply)
				})
		}
	})
	wantName(t, "before it is deleted", "models", "v1", manifest, a)
	a.delete(t, "models", "v1", p2p.DeleteOptions{})
	a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{Force: true})
	wantNoName(t, "deleted", "models", "v1", a, h.start(t))
	if info, err := a.Stat(t.Context(), "models", digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err,
		p2p.ErrNotFound) {
		t.Errorf("deleted by force: %+v, %v; want %v", info, err, p2p.ErrNotFound)
	}
}

// A delete is told on by those that are told of it.
func TestDeleteIsToldOn(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	data := content(1000, 9)
	task := a.add(t, "models", data)
	c.want(t, task, data)
	c.wantStored(t, task)
	h.setCut(func(x, y peer.ID) bool { return x == a.id && y == c.id || x == c.id && y == a.id })
	if deleted := a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{}); deleted.Reached != 1 {
		t.Errorf("deleted is %+v, want %s to be reached", deleted, b.id)
	}
	c.gone(t, "models", string(task.Digest))
}

// A delete covers what comes to be on a peer after that was asked what it has.
func TestDeleteIsToldTwice(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return instead(honest, pathFind,
				func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, &findReply{Tasks: make([]*taskState, 1)}) })
		}
	})
	data := content(1000, 10)
	task := a.add(t, "models", data)
	b.add(t, "models", data)
	if deleted := a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{}); deleted.Removed != 1 ||
		len(deleted.Missed) != 0 {
		t.Errorf("deleted is %+v, want it to be removed from %s", deleted, b.id)
	}
}

// What was fetched while the delete could not be known goes, too: it is not newer.
func TestDeleteOutlivesCopies(t *testing.T) {
	h := newHub()
	a, b, c := h.start(t), h.start(t), h.start(t)
	data := content(100_000, 6)
	task := a.add(t, "models", data)
	b.want(t, task, data)
	b.wantStored(t, task)
	apart := func(x, y peer.ID) bool { return (x == a.id) != (y == a.id) }
	h.setCut(apart)
	a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{})
	c.want(t, task, data)
	c.wantStored(t, task)
	h.setCut(nil)
	b.gone(t, "models", string(task.Digest))
	c.gone(t, "models", string(task.Digest))

	// What was imported anew meanwhile stays.
	h.setCut(apart)
	c.add(t, "models", data)
	h.setCut(nil)
	a.want(t, task, data)
	b.want(t, task, data)
}

// What a manifest is, its content says: a peer that tells something else is not believed.
func TestKindIsOfTheContent(t *testing.T) {
	for told, lie := range map[string]func(*taskState){
		"a blob":              func(s *taskState) { s.MediaType, s.Manifest = "application/octet-stream", false },
		"a blob of no type":   func(s *taskState) { s.MediaType, s.Manifest = "", false },
		"a large blob":        func(s *taskState) { s.MediaType, s.Manifest, s.Size = "a/b", false, 1<<40 },
		"one of no type":      func(s *taskState) { s.MediaType = "" },
		"one of text":         func(s *taskState) { s.MediaType = "text/plain" },
		"an index":            func(s *taskState) { s.MediaType = ocispec.MediaTypeImageIndex },
		"one of a bad type":   func(s *taskState) { s.MediaType = "a/b\r\nX: y" },
		"one of another size": func(s *taskState) { s.Size++ },
	} {
		t.Run(told, func(t *testing.T) {
			h := newHub()
			var manifest p2p.Task
			a := h.start(t, func(o *Options) {
				o.tamper = func(honest http.Handler) http.Handler {
					return edit(honest, pathFind,
						func(w http.ResponseWriter, r *http.Request, answer *httptest.ResponseRecorder) {
							var reply findReply
							json.Unmarshal(answer.Body.Bytes(), &reply)
							for _, state := range reply.Tasks {
								if state != nil && state.Size > 100 { // the manifest
									lie(state)
								}
							}
							writeJSON(w, &reply)
						})
				}
			})
			layer := []byte("layer")
			manifest = a.push(t, "models", "v1", "", layer)
			want := func(what string, info p2p.Info, err error) {
				t.Helper()
				if err != nil || info.Task != manifest || !info.IsManifest ||
					info.MediaType != ocispec.MediaTypeImageManifest ||
					info.Manifest == nil || len(info.Manifest.Content) != int(info.Size) ||
					len(info.Manifest.Refs) != 1 {
					t.Errorf("%s: %+v, %v", what, info, err)
				}
			}
			b := h.start(t)
			info, err := b.statName(t, "models", "v1", p2p.StatOptions{Manifest: true})
			want("looked at", info, err)
			info, err = b.HoldManifest(t.Context(), "models", cidOf(t, "v1"), p2p.StatOptions{})
			want("kept", info, err)
			info, err = b.statName(t, "models", "v1", p2p.StatOptions{Manifest: true, Scope: p2p.Local})
			if err != nil || info.MediaType != ocispec.MediaTypeImageManifest || info.Manifest == nil {
				t.Errorf("stored: %+v, %v", info, err)
			}
			b.want(t, p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}, layer)
			if told != "a large blob" {
				h.setCut(func(x, y peer.ID) bool { return x == b.id || y == b.id }) // it tells the truth
				info, err = h.start(t).HoldManifest(
					t.Context(), "models", digest.FromDigest(manifest.Digest), p2p.StatOptions{})
				want("named by its digest, and kept", info, err)
			}
		})
	}
}

func TestDeleteRefused(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	layer := []byte("the layer")
	b.push(t, "models", "v1", "", layer)
	task := p2p.Task{Tag: "models", Digest: digest.SHA256.FromBytes(layer)}
	a.want(t, task, layer)
	a.wantStored(t, task)
	if _, err := a.Delete(t.Context(), "models", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); !errors.Is(err,
		p2p.ErrReferenced) {
		t.Errorf("error is %v, want %v", err, p2p.ErrReferenced)
	}
	a.wantStored(t, task)
	b.wantStored(t, task)

	// One that is told of it later refuses, too; the host that has deleted it can have it again.
	h.setCut(func(x, y peer.ID) bool { return true })
	a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{})
	h.setCut(nil)
	a.want(t, task, layer)
	a.wantStored(t, task)
	b.wantStored(t, task)
	deleted := a.delete(t, "models", string(task.Digest), p2p.DeleteOptions{Force: true})
	if deleted.Reached != 1 || deleted.Removed != 1 {
		t.Errorf("by force, deleted is %+v", deleted)
	}
	b.gone(t, "models", string(task.Digest))
}

func TestReplicate(t *testing.T) {
	h := newHub()
	a := h.start(t)
	manifest := a.push(t, "models", "v1", "", content(1_000_000, 7), []byte("config"))
	if _, err := a.Replicate(t.Context(), "models", cidOf(t, "v1"), 1); !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("alone: %v, want %v", err, p2p.ErrUnreachable)
	}
	b, c := h.start(t), h.start(t)
	h.start(t, func(o *Options) { o.Mode = SeedOnly })
	done, err := a.Replicate(t.Context(), "models", cidOf(t, "v1"), 2)
	if err != nil || len(done) != 2 {
		t.Fatalf("replicated to %v, %v", done, err)
	}
	a.Close()
	for _, p := range []*testPeer{b, c} {
		info, err := p.statName(t, "models", "v1", p2p.StatOptions{Scope: p2p.Local, Manifest: true})
		if err != nil || info.Task != manifest || len(info.Manifest.Refs) != 2 {
			t.Errorf("a replica is %+v, %v", info, err)
		}
	}
	done, err = b.Replicate(t.Context(), "models", cidOf(t, "v1"), 3)
	if !errors.Is(err, p2p.ErrUnreachable) || len(done) != 1 {
		t.Errorf("more than there are: %v, %v, want 1 and %v", done, err, p2p.ErrUnreachable)
	}
}

// A delete that comes twice, from another peer first, tells the one that makes it what it did.
func TestDeleteComesTwice(t *testing.T) {
	h := newHub()
	a := h.start(t)
	task := a.add(t, "t", content(1000, 1))
	d := pieces.Delete{Tag: "t", CID: digest.FromDigest(task.Digest), At: time.Now().UTC()}
	for i := range 3 {
		again := d
		again.At = d.At.In(time.FixedZone("elsewhere", 3600))
		result, err := a.deletes.apply(t.Context(), again, "peer")
		if err != nil || !result.Found || result.Tasks != 1 || result.News != (i == 0) {
			t.Errorf("time %d: %+v, %v", i, result, err)
		}
	}
	for i := range 2 * maxApplied {
		a.deletes.applied.do(pieces.Delete{Tag: fmt.Sprint(i)},
			func() (pieces.DeleteResult, error) { return pieces.DeleteResult{News: true}, nil })
	}
	if n := len(a.deletes.applied.results); n > maxApplied {
		t.Errorf("the results of %d deletes are remembered, want at most %d", n, maxApplied)
	}
}
