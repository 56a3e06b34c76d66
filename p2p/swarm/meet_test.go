package swarm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// eventually waits for what comes by itself.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// peerOn returns what one peer tells of another one, or a zero Peer.
func (p *testPeer) peerOn(t *testing.T, id peer.ID) p2p.Peer {
	t.Helper()
	all, err := p.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if one.ID == id.String() {
			return one
		}
	}
	return p2p.Peer{}
}

// Clocks that differ are told of, on both sides, and when they do no more.
func TestSkewIsTold(t *testing.T) {
	for _, skew := range skews {
		h := newHub()
		var wrong testClock
		var logA record
		wrong.set(skew)
		a, c := h.start(t, logA.with), h.start(t, wrong.with)
		tells := skew.Abs() > maxSkew
		eventually(t, "the clocks were not compared", func() bool {
			return (a.peerOn(t, c.id).Ahead-skew).Abs() < 3*time.Second &&
				(c.peerOn(t, a.id).Ahead+skew).Abs() < 3*time.Second
		})
		if tells {
			eventually(t, "it was not logged",
				func() bool { return logA.has("clocks of this host and of a peer differ") })
			wrong.set(0)
			a.meetings.meetAll()
			if !logA.has("the clock of a peer is right again") || a.peerOn(t, c.id).Ahead.Abs() > time.Minute {
				t.Error("that it is right again was not noticed")
			}
		}
		a.Close()
		c.Close()
	}
}

// A daemon that does not tell its clock is known by the date of its answers.
func TestSkewOfAnOldPeer(t *testing.T) {
	h := newHub()
	a := h.start(t)
	c := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return edit(honest, pathHello,
				func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
					w.Header().Set("Date", time.Now().Add(-year).UTC().Format(http.TimeFormat))
					w.Write(without(answer.Body.Bytes(), "clock", "protocol", "oldestProtocol", "instance"))
				})
		}
	})
	eventually(t, "its clock is not known", func() bool { return (a.peerOn(t, c.id).Ahead + year).Abs() < time.Minute })
}

// without returns a JSON object without some of its fields.
func without(b []byte, fields ...string) []byte {
	var m map[string]any
	if json.Unmarshal(b, &m) != nil {
		return b
	}
	for _, f := range fields {
		delete(m, f)
	}
	b, _ = json.Marshal(m)
	return b
}

// asFirst makes a peer of one that speaks version 1 of the protocol: it tells nothing
// that came later, and refuses what that version did.
func asFirst(o *Options) {
	o.tamper = func(honest http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del(headerProtocol)
			r.Header.Del(headerInstance)
			answer := httptest.NewRecorder()
			answer.Body = new(bytes.Buffer)
			switch r.URL.Path {
			case pathHello, pathFind:
				honest.ServeHTTP(answer, r)
				var v any
				if json.Unmarshal(answer.Body.Bytes(), &v) == nil {
					b, _ := json.Marshal(strip(v))
					answer.Body = bytes.NewBuffer(b)
				}
				answer.Header().Del("Content-Length")
				send(w, answer)
			default:
				honest.ServeHTTP(w, r)
			}
		})
	}
}

// strip takes out what version 1 did not have.
func strip(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for _, f := range []string{"after", "deletedAfter", "deletedAge", "letGo", "protocol", "oldestProtocol",
			"clock", "instance", "newer", "newerAfter", "age", "seen"} {
			delete(v, f)
		}
		for k := range v {
			v[k] = strip(v[k])
		}
	case []any:
		for i := range v {
			v[i] = strip(v[i])
		}
	}
	return v
}

// A daemon and one of the release before do everything with each other.
func TestReleaseBefore(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a, old := h.start(t), h.start(t, asFirst)
	both := []*testPeer{a, old}
	var last p2p.Task
	for i, p := range []*testPeer{old, a, old, a} {
		data := content(300_000, uint64(i))
		wantName(t, "moved", "m", "v1", p.push(t, "m", "v1", "", data), both...)
		task := p2p.Task{Tag: "m", Digest: digest.SHA256.FromBytes(data)}
		for _, other := range both {
			other.want(t, task, data)
		}
		both[i%2].delete(t, "m", "v1", p2p.DeleteOptions{})
		wantNoName(t, "deleted", "m", "v1", both...)
		last = p.push(t, "m", "v1", "", data)
		wantName(t, "imported again", "m", "v1", last, both...)
	}
	for _, p := range []peer.ID{old.id} {
		if got := a.peerOn(t, p); got.State != p2p.PeerConnected || got.Faults != 0 {
			t.Errorf("the peer is %+v", got)
		}
	}
	if err := a.commit(t.Context(), p2p.Commit{
		Names: []p2p.NewName{{Tag: "m", Name: "ahead", Digest: last.Digest,
			Updated: time.Now().Add(2 * time.Hour)}}}); err != nil {
		t.Fatal(err)
	}
	// A date that the other would refuse with all that comes along is not told to it.
	if _, err := a.deletes.apply(t.Context(),
		mustParse(t, deleteMessage{Tag: "m", CID: "far", At: time.Now().Add(2 * time.Hour)}), old.id); err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]int{"": 0, "2": 1} {
		r := httptest.NewRequest(http.MethodGet, pathDeletes+"?after=0", nil)
		r.Header.Set(headerProtocol, version)
		w := httptest.NewRecorder()
		if err := a.api.serveDeletes(w, r, old.id); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(w.Body.String(), `"far"`); got != want {
			t.Errorf("one of version %q is told of it %d times, want %d: %s", version, got, want, w.Body)
		}
		r = httptest.NewRequest(http.MethodPost, pathFind, strings.NewReader(`{"names":[{"tag":"m","name":"ahead"}]}`))
		r.Header.Set(headerProtocol, version)
		w = httptest.NewRecorder()
		if err := a.api.serveFind(w, r, old.id); err != nil {
			t.Fatal(err)
		}
		reply := findReply{to: findRequest{Names: make([]nameRef, 1)}}
		if err := decodeJSON(w.Body.Bytes(), &reply); err != nil {
			t.Fatal(err)
		}
		if far := reply.Names[0].Updated.After(time.Now().Add(time.Hour)); far != (version == "2") {
			t.Errorf("one of version %q is told that a name was moved at %v", version, reply.Names[0].Updated)
		}
	}
}

// TestMessagesOfTheFirstVersion reads what a daemon of version 1 has sent, recorded.
func TestMessagesOfTheFirstVersion(t *testing.T) {
	var h hello
	var find findReply
	find.to.Names, find.to.Tasks = make([]nameRef, 2), make([]taskRef, 2)
	var deletes deletesReply
	for text, m := range map[string]message{
		`{"id":"12D3KooWQvd3cBBkb1xHmJ4rCJmK6yJgsPoKFJTWNSvCxsXrsg9A","addrs":["/ip4/127.0.0.1/tcp/41001"],"pieces":["127.0.0.1:41002"],"plain":false,"mode":"full","version":"v0.1.0"}`:                                                                                                                                                                                            &h,
		`{"tasks":[{"size":6,"mediaType":"application/octet-stream","pinned":true,"origin":"2026-11-30T01:02:03.000000004Z"},null],"names":[{"digest":"sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae","updated":"2026-11-30T01:02:03.000000004Z","deleted":"0001-01-01T00:00:00Z"},{"updated":"0001-01-01T00:00:00Z","deleted":"2026-11-30T01:02:03Z"}]}`: &find,
		`{"same":false,"deletes":[{"tag":"m","cid":"v1","at":"2026-11-30T01:02:03.000000004Z"},{"tag":"m","cid":"v2","at":"2026-11-30T01:02:03Z","nameOnly":true}],"next":0}`:                                                                                                                                                                                                       &deletes,
	} {
		if err := decodeJSON([]byte(text), m); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	e := newPeerTable().get("p")
	if why, _ := e.speaks(&h); why != "" {
		t.Error(why)
	}
	if v := find.Names[0].version(); v.At.IsZero() || !v.After.IsZero() || find.Names[1].deleted().At.IsZero() {
		t.Errorf("names are %+v", find.Names)
	}
	at := time.Date(2026, 11, 30, 1, 2, 3, 4, time.UTC)
	for _, m := range deletes.Deletes {
		d := mustParse(t, m)
		if !d.Covers(at.Add(-time.Minute), at.Add(time.Hour)) || d.Covers(at.Add(time.Second), at.Add(time.Hour)) ||
			!d.Made.Equal(d.At) {
			t.Errorf("a delete is %+v", d)
		}
	}
}

// A peer that can't be understood is asked for nothing, and both versions are named.
func TestForeignPeer(t *testing.T) {
	for _, c := range []struct {
		from, to int
		want     string
	}{
		{protocol + 1, protocol + 2, "upgrade the dfdaemon of this host"},
		{-1, -1, ""}, // as 1
	} {
		h := newHub()
		var log record
		a := h.start(t, log.with)
		b := h.start(t, func(o *Options) {
			o.Version = "v7.7"
			o.tamper = func(honest http.Handler) http.Handler {
				return edit(honest, pathHello,
					func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
						var m map[string]any
						json.Unmarshal(answer.Body.Bytes(), &m)
						m["protocol"], m["oldestProtocol"] = c.to, c.from
						b, _ := json.Marshal(m)
						w.Write(b)
					})
			}
		})
		task := b.add(t, "m", content(1000, 1))
		if c.want == "" {
			a.want(t, task, content(1000, 1))
			a.Close()
			b.Close()
			continue
		}
		eventually(t, "it is not known to be foreign",
			func() bool { return a.peerOn(t, b.id).State == p2p.PeerForeign })
		_, err := a.read(t.Context(), task)
		for _, text := range []string{c.want, "v7.7", "version 3 to 4", "this one 1 to 2"} {
			if !errors.Is(err, p2p.ErrUnreachable) || !strings.Contains(err.Error(), text) ||
				!strings.Contains(a.peerOn(t, b.id).Reason, text) {
				t.Errorf("error is %v, the reason %q; want %q", err, a.peerOn(t, b.id).Reason, text)
			}
		}
		if !log.has("can't be understood") {
			t.Error("it was not logged")
		}
	}
}

// Two hosts with one identity are told, by a peer that knows both.
func TestTwins(t *testing.T) {
	h := newHub()
	var log, logA record
	a, b := h.start(t, logA.with), h.start(t, log.with)
	ask := func(id peer.ID, instance string) *hello {
		r := httptest.NewRequest(http.MethodGet, pathHello, nil)
		r.Header.Set(headerInstance, instance)
		b.meetings.introduced(id, r)
		w := httptest.NewRecorder()
		if err := b.api.serveHello(w, r, id); err != nil {
			t.Fatal(err)
		}
		var m hello
		if err := decodeJSON(w.Body.Bytes(), &m); err != nil {
			t.Fatal(err)
		}
		return &m
	}
	// One that is started again and again is none. It is not a, which says when it meets b which run it is.
	for _, run := range []string{"1", "1", "2", "2", "3"} {
		if ask("restarted", run).Twin != "" {
			t.Errorf("run %s has a twin", run)
		}
	}
	for i := range 3 * maxInstances {
		ask("often", fmt.Sprint(i))
	}
	if n := len(b.peers.get("often").instances); n > maxInstances {
		t.Errorf("%d runs of a peer are remembered, want at most %d", n, maxInstances)
	}
	for _, run := range []string{"a", "b", "a"} {
		if ask("long", strings.Repeat(run, 65)).Twin != "" {
			t.Error("a name that no run has is taken for one")
		}
	}
	ask(a.id, "1")
	ask(a.id, "2")
	if ask(a.id, "1").Twin == "" || ask(a.id, "2").Twin == "" || b.peerOn(t, a.id).State != p2p.PeerCloned ||
		!log.has("two hosts have the same identity") {
		t.Errorf("that two take turns is not told: %+v", b.peerOn(t, a.id))
	}
	if err := a.meetings.meet(t.Context(), b.id); err != nil {
		t.Fatal(err)
	}
	if got := a.peerOn(t, a.id); got.State != p2p.PeerCloned || !strings.Contains(got.Reason, "peer.key") ||
		!logA.has("identity of this one") {
		t.Errorf("the host itself says %+v", got)
	}
	if b.instance.found(strings.Repeat("x", maxJSON)); len(b.instance.other()) > 1024 {
		t.Errorf("where its twin is is said with %d bytes", len(b.instance.other()))
	}
}

// A host that asks at the address of its twin is told, and so is the twin.
func TestTwinAtAnAddress(t *testing.T) {
	h := newHub()
	var log record
	a := h.start(t, log.with)
	own, other := a.instance, NewInstance()
	for _, in := range []*Instance{own, other} {
		resolve, err := NewResolver(a.key, a.opts.Secret, false, in)
		if err != nil {
			t.Fatal(err)
		}
		_, err = resolve(t.Context(), a.Addresses()[0])
		if twin := in == other; errors.Is(err, errTwin) != twin || log.has("identity of this one") != twin ||
			(in.other() != "") != twin {
			t.Errorf("twin %t: %v, the log of the one that is asked: %t", twin, err, log.has("identity of this one"))
		}
	}
	if got := a.peerOn(t, a.id); got.State != p2p.PeerCloned {
		t.Errorf("the host itself says %+v", got)
	}
}

func mustParse(t *testing.T, m deleteMessage) pieces.Delete {
	t.Helper()
	return mustParseAt(t, m, time.Now())
}

func mustParseAt(t *testing.T, m deleteMessage, now time.Time) pieces.Delete {
	t.Helper()
	d, err := m.parse(now)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
