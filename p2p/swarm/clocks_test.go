package swarm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// testClock is one that is wrong by so much.
type testClock struct{ ahead atomic.Int64 }

func (c *testClock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *testClock) set(ahead time.Duration) { c.ahead.Store(int64(ahead)) }

// with gives a peer this clock.
func (c *testClock) with(o *Options) { o.Now = c.now }

const year = 365 * 24 * time.Hour

// skews are how far clocks are ahead in tests.
var skews = []time.Duration{4 * time.Second, 5 * time.Minute, year, -4 * time.Second, -5 * time.Minute, -year}

// record is a log that tests look into.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) with(o *Options) { o.Log = slog.New(slog.NewTextHandler(r, nil)) }

func (r *record) has(s string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Contains(r.text.String(), s)
}

// wantName asks for a name on all of these peers.
func wantName(t *testing.T, what, tag, name string, want p2p.Task, peers ...*testPeer) {
	t.Helper()
	for i, p := range peers {
		info, err := p.statName(t, tag, name, p2p.StatOptions{Manifest: true})
		if err != nil || info.Task != want {
			t.Errorf("%s: on host %d %s is %s, %v; want %s", what, i, name, info.Task, err, want)
		}
	}
}

func wantNoName(t *testing.T, what, tag, name string, peers ...*testPeer) {
	t.Helper()
	for i, p := range peers {
		if info, err := p.statName(t, tag, name, p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("%s: on host %d %s is %s, %v; want %v", what, i, name, info.Task, err, p2p.ErrNotFound)
		}
	}
}

// The last import, move or delete is the last one, whatever the clocks say.
func TestClocksTogether(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for _, skew := range skews {
		t.Run(skew.String(), func(t *testing.T) {
			h := newHub()
			var wrong testClock
			wrong.set(skew)
			a, b, c := h.start(t), h.start(t), h.start(t, wrong.with)
			layer := func(s string) []byte { return []byte(s + skew.String()) }

			first := c.push(t, "m", "v1", "", layer("first"))
			wantName(t, "imported by the wrong clock", "m", "v1", first, a, b, c)
			second := a.push(t, "m", "v1", "", layer("second"))
			wantName(t, "moved by a right one", "m", "v1", second, a, b, c)
			if info, err := a.statName(t, "m", "v1", p2p.StatOptions{Scope: p2p.Local}); err != nil ||
				info.Task != second {
				t.Errorf("on that host alone: %v, %v", info.Task, err)
			}
			third := c.push(t, "m", "v1", "", layer("third"))
			wantName(t, "moved by the wrong one", "m", "v1", third, a, b, c)

			b.delete(t, "m", "v1", p2p.DeleteOptions{})
			wantNoName(t, "deleted by a right one", "m", "v1", a, b, c)
			fourth := c.push(t, "m", "v1", "", layer("fourth"))
			wantName(t, "imported again by the wrong one", "m", "v1", fourth, a, b, c)
			c.delete(t, "m", "v1", p2p.DeleteOptions{})
			wantNoName(t, "deleted by the wrong one", "m", "v1", a, b, c)
			fifth := a.push(t, "m", "v1", "", layer("fifth"))
			wantName(t, "imported again by a right one", "m", "v1", fifth, a, b, c)

			// The same by digest.
			data := content(1000, uint64(skew))
			for i, steps := range [][2]*testPeer{{c, a}, {a, c}, {c, c}} {
				task := steps[0].add(t, "d", data)
				steps[1].delete(t, "d", string(task.Digest), p2p.DeleteOptions{})
				for _, p := range []*testPeer{a, b, c} {
					if _, err := p.store.Stat(t.Context(), "d", digest.FromDigest(task.Digest),
						p2p.StatOptions{Scope: p2p.Local}); !errors.Is(err, p2p.ErrNotFound) {
						t.Errorf("step %d: deleted, it is there: %v", i, err)
					}
				}
			}
			task := a.add(t, "d", data)
			for _, p := range []*testPeer{b, c} {
				p.want(t, task, data)
			}
		})
	}
}

// A delete covers what its maker could see, and a move that could not be seen
// loses or wins by the same rule everywhere, and nothing of it is lost.
func TestClocksApart(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for _, skew := range skews {
		if !t.Run(skew.String(), func(t *testing.T) {
			h := newHub()
			var wrong testClock
			var logA, logC record
			wrong.set(skew)
			a, b, c := h.start(t, logA.with), h.start(t), h.start(t, wrong.with, logC.with)
			all := []*testPeer{a, b, c}
			layer := func(s string) []byte { return []byte(s + skew.String()) }
			old := a.push(t, "m", "old", "", layer("old"))
			wantName(t, "before", "m", "old", old, all...)
			eventually(t, "it does not know what time others have",
				func() bool { return time.Until(c.clock.now()).Abs() < maxSkew })
			h.setCut(func(x, y peer.ID) bool { return (x == c.id) != (y == c.id) })

			// What the other side deletes of its own, or had never had, stays here.
			data := content(1000, uint64(skew))
			c.push(t, "m", "v1", "", layer("theirs"))
			c.delete(t, "m", "v1", p2p.DeleteOptions{})
			gone := c.add(t, "d", data)
			c.delete(t, "d", string(gone.Digest), p2p.DeleteOptions{})
			mine := a.push(t, "m", "v1", "", layer("mine"))
			task := a.add(t, "d", data)

			// A name that both move, neither knowing of the other. They have met: the clock that
			// is far ahead does not win.
			y := c.push(t, "m", "both", "", layer("c's"))
			<-time.After(20 * time.Millisecond)
			x := a.push(t, "m", "both", "", layer("a's"))
			h.setCut(nil)
			want, loser, other, lost, log := x, c, a, y, &logC
			if 0 < skew && skew < maxSkew {
				want, loser, other, lost, log = y, a, c, x, &logA
			}
			eventually(t, "it was not told where it lost", func() bool {
				return log.has("could not see each other") &&
					strings.Contains(loser.peerOn(t, other.id).Reason, string(want.Digest))
			})
			if got := loser.peerOn(t, b.id).Reason; got != "" {
				t.Errorf("of a peer that has not moved it is said %q", got)
			}
			wantName(t, "after they met", "m", "v1", mine, all...)
			for _, p := range all {
				p.want(t, task, data)
			}
			wantName(t, "moved on both sides", "m", "both", want, all...)
			if _, err := loser.holdName(t, "m", "both"); err != nil {
				t.Fatal(err)
			}
			if info, err := loser.store.Stat(t.Context(), "m", digest.FromDigest(lost.Digest),
				p2p.StatOptions{Scope: p2p.Local, Manifest: true}); err != nil || len(info.Manifest.Refs) != 1 {
				t.Errorf("what lost is %+v, %v; want it to be kept where it was imported", info, err)
			}
			if got := loser.peerOn(t, other.id).Reason; got != "" {
				t.Errorf("it has the name as it counts, and says %q", got)
			}
			for _, p := range all { // and from then on the last one counts again
				wantName(t, "moved after that", "m", "both", p.push(t, "m", "both", "", layer(p.id.String())), all...)
			}
			c.delete(t, "m", "old", p2p.DeleteOptions{})
			wantNoName(t, "what it could see it deletes", "m", "old", all...)
		}) {
			return // the others would take as long to fail
		}
	}
}

// What is done here is dated by the time that others have, while they are there and when
// they are away, and however the clock of this host is set meanwhile.
func TestTimeOfOthers(t *testing.T) {
	for _, away := range []bool{false, true} {
		h := newHub()
		var wrong testClock
		var log record
		wrong.set(year)
		a, b := h.start(t), h.start(t)
		c := h.start(t, wrong.with, log.with)
		right := func() bool { return time.Until(c.clock.now()).Abs() < maxSkew }
		eventually(t, "it does not know what time others have", func() bool { // of two it would be the one behind
			return log.has("clocks of this host and of a peer differ") && log.has(a.id.String()) &&
				log.has(b.id.String())
		})
		h.setCut(func(x, y peer.ID) bool { return away })
		if !right() {
			t.Errorf("away %v: its time is %v", away, c.clock.now())
		}
		for _, ahead := range []time.Duration{0, -year} {
			if wrong.set(ahead); !right() {
				t.Errorf("away %v: its clock was set to %v, and its time is %v", away, ahead, c.clock.now())
			}
		}
	}
}

// What two hosts have moved is told when they meet, also where one was started again
// since, and nobody looks the name up.
func TestConflictsOfEarlierRuns(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	var log record
	a, b := h.start(t), h.start(t, log.with)
	h.setCut(func(x, y peer.ID) bool { return true })
	b.push(t, "m", "v1", "", []byte("there"))
	for i := range maxFind + 10 { // some more
		b.push(t, "m", fmt.Sprint("n", i), "", []byte("there"))
	}
	a.push(t, "m", "v1", "", []byte("here"))
	a.push(t, "m", "n0", "", []byte("here"))
	b.Close()
	h.setCut(nil)
	b.restart(t, h)
	eventually(t, "it was not told", func() bool {
		return log.has("v1 under tag m") && log.has("n0 under tag m") &&
			strings.Contains(b.peerOn(t, a.id).Reason, "; and 1 more, see the log")
	})
}

// Of the names that were moved, the last ones are remembered.
func TestMovesAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a := h.start(t)
	task := a.push(t, "m", "old", "", []byte("layer"))
	var c p2p.Commit
	for i := range maxMoves + 300 { // more than are read at once
		c.Names = append(c.Names, p2p.NewName{Tag: "m", Name: fmt.Sprint("n", i), Digest: task.Digest,
			Updated: time.Now().Add(time.Duration(i+1) * time.Second)})
	}
	if err := a.commit(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	a.Close()
	a.restart(t, h)
	<-a.names.recalled
	for _, more := range []int{0, 1, maxMoves} {
		for i := range more {
			a.names.moves.add(nameRef{"m", fmt.Sprint("more", i/2)})
		}
		names, number := a.names.moves.since(0)
		if want := min(maxMoves, maxMoves-more+(more+1)/2); len(names) != want ||
			slices.Contains(names, nameRef{"m", "old"}) ||
			more == 0 && !slices.Contains(names, nameRef{"m", fmt.Sprint("n", maxMoves+299)}) {
			t.Errorf("%d more: %d names are remembered, want the last %d", more, len(names), want)
		}
		if names, _ := a.names.moves.since(number - min(more, 1)); len(names) != min(more, 1) {
			t.Errorf("%d more: since the last one there are %v", more, names)
		}
	}
}

// A host that was a year ahead, alone: what it has is seen, moved and deleted as
// anything else when its clock is right, and its deletes kill nothing they did not see.
func TestClockRepaired(t *testing.T) {
	for _, skew := range []time.Duration{year, -year} {
		t.Run(skew.String(), func(t *testing.T) {
			h := newHub()
			var wrong testClock
			wrong.set(skew)
			a, b, c := h.start(t), h.start(t), h.start(t, wrong.with)
			all := []*testPeer{a, b, c}
			h.setCut(func(x, y peer.ID) bool { return (x == c.id) != (y == c.id) })
			v1 := c.push(t, "m", "v1", "", []byte("one"))
			c.push(t, "m", "v2", "", []byte("two"))
			for range 3 { // moved again and again, and deleted: all dated by that clock
				c.push(t, "m", "v3", "", []byte("three, there"))
				c.delete(t, "m", "v3", p2p.DeleteOptions{})
			}
			data := content(1000, 1)
			task := c.add(t, "d", data)
			v3 := a.push(t, "m", "v3", "", []byte("three"))
			wrong.set(0)
			c.Close()
			h.setCut(nil)
			c.restart(t, h)

			wantName(t, "seen", "m", "v1", v1, all...)
			b.want(t, task, data)
			wantName(t, "moved", "m", "v1", a.push(t, "m", "v1", "", []byte("one more")), all...)
			wantName(t, "not deleted", "m", "v3", v3, all...)
			a.delete(t, "m", "v2", p2p.DeleteOptions{})
			wantNoName(t, "deleted", "m", "v2", all...)
			a.delete(t, "d", string(task.Digest), p2p.DeleteOptions{})
			for _, p := range all {
				p.gone(t, "d", string(task.Digest))
			}
			wantName(t, "imported again", "m", "v2", b.push(t, "m", "v2", "", []byte("two more")), all...)
			task = b.add(t, "d", data)
			for _, p := range all {
				p.want(t, task, data)
			}
		})
	}
}

// answering has a peer answer one path with a message of the test.
func answering(path string, message any) func(*Options) {
	return func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return instead(honest, path, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, message) })
		}
	}
}

// A delete as earlier daemons tell it, dated by a clock that is far ahead, deletes
// nothing, and does not keep anybody from importing again.
func TestDeleteFromTheFuture(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	v1 := a.push(t, "m", "v1", "", []byte("one"))
	for _, ahead := range []time.Duration{2 * time.Hour, year, 100 * year} {
		d, err := deleteMessage{Tag: "m", CID: "v1", At: time.Now().Add(ahead)}.parse(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.deletes.apply(t.Context(), d, b.id); err != nil {
			t.Fatal(err)
		}
		wantName(t, fmt.Sprint(ahead), "m", "v1", v1, a, b)
		v1 = b.push(t, "m", "v1", "", fmt.Append(nil, ahead))
		wantName(t, fmt.Sprint("moved after ", ahead), "m", "v1", v1, a, b)
	}
	a.delete(t, "m", "v1", p2p.DeleteOptions{})
	wantNoName(t, "deleted", "m", "v1", a, b)
}

// Nor does it when that time comes.
func TestDeleteFromTheFutureLater(t *testing.T) {
	h := newHub()
	var time1, time2 testClock
	a, b := h.start(t, time1.with), h.start(t, time2.with)
	before := a.push(t, "m", "before", "", []byte("one"))
	for _, name := range []string{"before", "after", "between"} {
		if _, err := a.deletes.apply(t.Context(),
			mustParse(t, deleteMessage{Tag: "m", CID: name, At: time.Now().Add(10 * time.Hour)}), b.id); err != nil {
			t.Fatal(err)
		}
	}
	after := a.push(t, "m", "after", "", []byte("two"))
	var between p2p.Task
	for _, later := range []time.Duration{90 * time.Minute, 11 * time.Hour, 20 * 24 * time.Hour} {
		time1.set(later)
		time2.set(later)
		// A clock may have been read while the other one was not set yet: by what that
		// seems to say of time, deletes would be told with a wrong age.
		eventually(t, "the clocks do not agree", func() bool {
			a.meetings.meetAll()
			b.meetings.meetAll()
			return a.clock.now().Sub(a.Swarm.opts.Now()).Abs()+b.clock.now().Sub(b.Swarm.opts.Now()).Abs() < time.Minute
		})
		c := h.start(t, time2.with) // it is told of them now
		eventually(t, "the deletes are not told of", func() bool {
			all, _, err := c.store.Deletes(t.Context(), 0, maxDeletes)
			return err == nil && len(all) == 3
		})
		wantName(t, later.String(), "m", "before", before, a, b, c)
		wantName(t, later.String(), "m", "after", after, a, b, c)
		if between == (p2p.Task{}) {
			between = b.push(t, "m", "between", "", []byte("three"))
		}
		all, _, err := c.store.Deletes(t.Context(), 0, maxDeletes)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range all { // told once more
			if _, err := a.deletes.apply(t.Context(), mustParseAt(t, deleteMessageOf(d, c.opts.Now()), a.opts.Now()),
				c.id); err != nil {
				t.Fatal(err)
			}
		}
		wantName(t, later.String(), "m", "before", before, a, b, c)
		wantName(t, later.String(), "m", "after", after, a, b, c)
		wantName(t, later.String(), "m", "between", between, a, b, c)
		c.Close()
	}
}

// Dates that no clock can come to are refused in every message.
func TestStampsAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	far, before := time.Date(9500, 1, 1, 0, 0, 0, 0, time.UTC), time.Unix(-1, 0)
	then := time.Now().Add(-time.Hour) // nothing comes after what is later than it
	for _, at := range []time.Time{far, before} {
		for _, m := range []deleteMessage{
			{At: at}, {At: time.Now(), After: at}, {At: time.Now(), Seen: []time.Time{time.Now(), at}}} {
			m.CID = "v1"
			if _, err := m.parse(time.Now()); !errors.Is(err, errMessage) {
				t.Errorf("a delete %+v: %v", m, err)
			}
		}
	}
	for _, m := range []deleteMessage{
		{},
		{At: time.Now(), Age: -1},
		{At: time.Now(), Age: maxAge + 1},
		{At: time.Now(), Seen: make([]time.Time, pieces.MaxSeen+1)},
		{At: then, After: time.Now()},
	} {
		m.CID = "v1"
		if _, err := m.parse(time.Now()); !errors.Is(err, errMessage) {
			t.Errorf("a delete %+v: %v", m, err)
		}
	}
	h := newHub()
	for _, at := range []time.Time{far, before} {
		for _, v := range []deleteResult{
			{Newer: at}, {Newer: time.Now(), NewerAfter: at}, {Newer: then, NewerAfter: time.Now()}} {
			liar := h.start(t, answering(pathDeletes, deletesResult{Results: []deleteResult{v}}))
			a := h.start(t)
			task := a.add(t, "d", content(1000, 1))
			deleted := a.delete(t, "d", string(task.Digest), p2p.DeleteOptions{})
			d, err := a.store.Deleted(t.Context(), "d", digest.FromDigest(task.Digest))
			if err != nil || checkStamps(d.At, d.After) != nil || d.At.After(time.Now().Add(time.Hour)) ||
				len(deleted.Missed) != 1 {
				t.Errorf("a peer says %+v: the delete is %+v, %v, and %+v", v, d, err, deleted)
			}
			liar.Close()
			a.Close()
		}
		e := newPeerTable().get("p")
		for _, h := range []*hello{{Clock: at}, {date: at.UTC().Format(http.TimeFormat)}} {
			e.clocked(h, time.Now(), time.Now())
			if skew, known := e.skew(readingOf(time.Now())); known {
				t.Errorf("a peer says that it is %v, and is believed to be %v ahead", at, skew)
			}
		}
	}
	for i, reply := range []findReply{
		{Names: []*nameState{{Digest: digest.SHA256.FromString("x"), Updated: far}}},
		{Names: []*nameState{{Digest: digest.SHA256.FromString("x"), Updated: time.Now(), After: far}}},
		{Names: []*nameState{{Digest: digest.SHA256.FromString("x")}}},
		{Names: []*nameState{{Deleted: far}}},
		{Names: []*nameState{{Deleted: time.Now(), DeletedAfter: far}}},
		{Tasks: []*taskState{{Origin: far}}},
		{Tasks: []*taskState{{Origin: time.Now(), After: far}}},
		{Names: []*nameState{{Digest: digest.SHA256.FromString("x"), Updated: then, After: time.Now()}}},
		{Names: []*nameState{{Deleted: then, DeletedAfter: time.Now()}}},
		{Tasks: []*taskState{{Origin: then, After: time.Now()}}},
	} {
		liar := h.start(t, answering(pathFind, reply))
		a := h.start(t)
		req := &findRequest{Names: make([]nameRef, len(reply.Names)), Tasks: make([]taskRef, len(reply.Tasks))}
		if _, err := a.client.find(t.Context(), liar.id, req); !errors.Is(err, errMessage) {
			t.Errorf("answer %d: %v, want %v", i, err, errMessage)
		}
		liar.Close()
		a.Close()
	}
}

// What a peer dates with the last date that there is keeps nobody from being understood, nor
// from deleting it and importing it again.
func TestLastStamp(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	data := content(1000, 1)
	task := p2p.Task{Tag: "m", Digest: digest.SHA256.FromBytes(data)}
	liar := h.start(t, func(o *Options) {
		o.tamper = func(honest http.Handler) http.Handler {
			return edit(honest, pathFind,
				func(w http.ResponseWriter, _ *http.Request, answer *httptest.ResponseRecorder) {
					var reply findReply
					json.Unmarshal(answer.Body.Bytes(), &reply)
					for i := range reply.Names {
						reply.Names[i] = &nameState{Digest: task.Digest, Updated: pieces.LastStamp}
					}
					for _, state := range reply.Tasks {
						if state != nil {
							state.Origin = pieces.LastStamp
						}
					}
					writeJSON(w, &reply)
				})
		}
	})
	liar.add(t, "m", data)
	b.want(t, task, data)
	b.wantStored(t, task)
	for _, again := range []string{"one", "two"} {
		b.push(t, "m", "v1", "", data, []byte(again))
		req := &findRequest{Tasks: []taskRef{taskRef(task)}, Names: []nameRef{{"m", "v1"}}}
		if reply, err := a.client.find(t.Context(), b.id, req); err != nil || reply.Tasks[0] == nil ||
			reply.Names[0].Digest == "" {
			t.Errorf("the peer that has imported it is not understood: %+v, %v", reply, err)
		}
	}
	for _, cid := range []string{"v1", string(task.Digest)} {
		if deleted := a.delete(t, "m", cid, p2p.DeleteOptions{Force: true}); len(deleted.Missed) != 0 {
			t.Errorf("deleted is %+v", deleted)
		}
		b.gone(t, "m", cid)
	}
	wantNoName(t, "deleted", "m", "v1", a, b)
	wantName(t, "imported again", "m", "v1", a.push(t, "m", "v1", "", data), a, b)
	liar.Close()
	b.want(t, task, data)
}

// Deletes that are told again, in any order and to any peer, take nothing that was imported
// since, nor anything under another tag.
func TestReplayedDeletes(t *testing.T) {
	for _, skew := range []time.Duration{0, year, -year} {
		h := newHub()
		var wrong testClock
		wrong.set(skew)
		a, b := h.start(t), h.start(t, wrong.with)
		data := content(1000, 1)
		other := a.push(t, "other", "v1", "", data)
		for _, p := range []*testPeer{a, b, a} {
			p.push(t, "m", "v1", "", data)
			b.delete(t, "m", "v1", p2p.DeleteOptions{})
			a.delete(t, "m", string(p.add(t, "m", data).Digest), p2p.DeleteOptions{})
		}
		v1 := b.push(t, "m", "v1", "", data)
		all, _, err := a.store.Deletes(t.Context(), 0, maxDeletes)
		if err != nil || len(all) < 3 {
			t.Fatalf("there are %d deletes, %v", len(all), err)
		}
		for _, p := range []*testPeer{a, b} {
			for _, d := range slices.Backward(all) {
				if _, err := p.deletes.apply(t.Context(), mustParse(t, deleteMessageOf(d, time.Now())),
					"peer"); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, p := range []*testPeer{a, b} {
			wantName(t, "deleted before", "m", "v1", v1, p)
			wantName(t, "of another tag", "other", "v1", other, p)
			p.want(t, p2p.Task{Tag: "m", Digest: digest.SHA256.FromBytes(data)}, data)
		}
	}
}

// How long a delete is remembered does not depend on how old what it deletes is,
// nor on anybody's clock.
func TestDeleteIsRememberedSinceItWasMade(t *testing.T) {
	h := newHub()
	var clockA, clockB testClock
	clockA.set(-year)
	short := func(o *Options) { o.RememberDeletes = time.Hour }
	a, b := h.start(t, clockA.with, short), h.start(t, clockB.with, short)
	task := a.add(t, "d", content(1000, 1))
	clockA.set(0)
	c := h.start(t, short)
	c.want(t, task, content(1000, 1))
	c.wantStored(t, task)
	h.setCut(func(x, y peer.ID) bool { return (x == c.id) != (y == c.id) })
	a.delete(t, "d", string(task.Digest), p2p.DeleteOptions{})
	forget := func(p *testPeer) int {
		n, err := p.store.ForgetDeletes(context.Background(), p.opts.Now().Add(-p.opts.RememberDeletes))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := forget(a) + forget(b); n != 0 {
		t.Errorf("%d were forgotten at once", n)
	}
	h.setCut(nil)
	c.gone(t, "d", string(task.Digest))
	clockB.set(2 * time.Hour)
	if n := forget(b); n != 1 {
		t.Errorf("after its time %d were forgotten", n)
	}
	d, err := a.store.Deleted(t.Context(), "d", digest.FromDigest(task.Digest))
	if err != nil || time.Since(d.Made) > time.Minute || time.Since(d.At) < year/2 {
		t.Errorf("the delete is %+v, %v", d, err)
	}
}
