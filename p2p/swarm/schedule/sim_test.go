package schedule

import (
	"maps"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strconv"
)

// A simulated swarm: one seed with the whole blob, and peers that want it. Each
// peer has a link of the same bandwidth B in either direction. It has no
// clock but its own, and integers throughout: a swarm always comes out the same.
//
// A piece is sent in chunks. An uplink carries one chunk at a time, of its
// uploads in turn; so does a downlink, in the order in which they came. Of a piece
// only window chunks are on their way at a time, so that an uploader spends its
// bandwidth on others while a downloader has no room, as TCP does. A chunk is on
// its way for as long as a message, besides.
const (
	chunks    = 16
	chunkTime = 1000 // of a chunk on a link, in ticks
)

// circumstances of a swarm.
type circumstances struct {
	peers  int // besides the seed
	pieces int
	knows  int    // how many others a peer looks for, at random; it knows those that found it, too. 0 is for all
	seed   uint64 // of what is random

	slots   int // 0 for the default
	limits  Limits
	policy  policy // who picks the piece
	latency int64  // S/B over this is how long a message takes; 0 for 5000
	slow    int    // so many peers have a tenth of the bandwidth
	leaves  bool   // the seed leaves when it has sent every piece once
	stagger int64  // the last peer comes after this many hundredths of S/B, the others evenly before
}

// policy is who picks the piece. All but the first are for comparison.
type policy int

const (
	uploaderPicks policy = iota
	uploaderPicksTiesRandom
	downloaderPicksRandom
	downloaderPicksFirst
)

// whole is S/B in ticks.
func (c circumstances) whole() int64 { return int64(c.pieces) * chunks * chunkTime }

// bound is how long it takes at least, in S/B: while a piece is in fewer than
// all hands, their number can at most double with every piece sent.
func (c circumstances) bound() float64 {
	return 1 + float64(bits.Len(uint(c.peers))-1)/float64(c.pieces)
}

type swarm struct {
	circumstances
	rand  *rand.Rand
	now   int64
	count uint64
	lanes []*lane
	nodes []*node // the seed first

	window     int
	unfinished int
	chunks     int   // that have arrived, needed or not
	messages   int   // besides requests that are answered with a piece
	left       int64 // when the seed left
}

// simulate runs a swarm until every peer has the blob, or nothing happens any
// more.
func simulate(c circumstances) *swarm {
	if c.slots == 0 {
		c.slots = Slots
	}
	if c.latency == 0 {
		c.latency = 5000
	}
	w := &swarm{circumstances: c, rand: rand.New(rand.NewPCG(c.seed, 0)), unfinished: c.peers}
	w.window = 2 + int(2*c.whole()/c.latency/chunkTime)
	for i := range c.peers + 1 {
		n := &node{
			swarm: w, index: i, name: strconv.Itoa(i), chunkTime: chunkTime,
			download: NewDownload(c.pieces, nil, c.limits), uploads: NewUploads(c.pieces, c.slots),
			coming: map[int]*transfer{}, turns: map[*Turn]*transfer{}, listens: map[*node]bool{},
		}
		if i == 0 {
			n.download = NewDownload(c.pieces, FullSet(c.pieces), c.limits)
		} else if i <= c.slow {
			n.chunkTime *= 10
		}
		w.nodes = append(w.nodes, n)
	}
	w.introduce()
	w.nodes[0].here = true
	w.arrive(1)
	w.run()
	return w
}

// introduce makes nodes know each other.
func (w *swarm) introduce() {
	for i, n := range w.nodes {
		if w.knows == 0 || w.knows >= w.peers {
			for _, m := range w.nodes[i+1:] {
				n.knows, m.knows = append(n.knows, m), append(m.knows, n)
			}
			continue
		}
		for found := 0; found < w.knows; {
			m := w.nodes[w.rand.IntN(len(w.nodes))]
			if m != n && !slices.Contains(n.knows, m) {
				n.knows, m.knows = append(n.knows, m), append(m.knows, n)
				found++
			}
		}
	}
	for _, n := range w.nodes {
		w.rand.Shuffle(len(n.knows), func(i, j int) { n.knows[i], n.knows[j] = n.knows[j], n.knows[i] })
	}
}

// arrive lets peer i and those after it come.
func (w *swarm) arrive(i int) {
	w.nodes[i].arrive()
	if i < w.peers {
		w.after(w.whole()*w.stagger/int64(100*w.peers), event{do: func() { w.arrive(i + 1) }})
	}
}

// event is a chunk that has left an uplink, one that has left a downlink, or
// anything else.
type event struct {
	at       int64
	count    uint64 // for those at the same time
	up, down *node
	do       func()
}

// lane has the events that come after the same delay, which are in order as
// they are.
type lane struct {
	delay  int64
	events []event
	next   int
}

func (w *swarm) after(delay int64, e event) {
	w.count++
	e.at, e.count = w.now+delay, w.count
	i := slices.IndexFunc(w.lanes, func(l *lane) bool { return l.delay == delay })
	if i < 0 {
		i = len(w.lanes)
		w.lanes = append(w.lanes, &lane{delay: delay})
	}
	w.lanes[i].events = append(w.lanes[i].events, e)
}

// send has a message do something at the other end.
func (w *swarm) send(do func()) { w.after(w.whole()/w.latency, event{do: do}) }

func (w *swarm) run() {
	for w.unfinished > 0 {
		var first *lane
		for _, l := range w.lanes {
			if l.next < len(l.events) && (first == nil || before(&l.events[l.next], &first.events[first.next])) {
				first = l
			}
		}
		if first == nil {
			return
		}
		e := first.events[first.next]
		first.events[first.next] = event{}
		if first.next++; first.next == 1<<16 {
			first.events = slices.Clone(first.events[first.next:])
			first.next = 0
		}
		w.now = e.at
		switch {
		case e.up != nil:
			e.up.chunkSent()
		case e.down != nil:
			e.down.chunkReceived()
		default:
			e.do()
		}
	}
}

func before(a, b *event) bool { return a.at < b.at || a.at == b.at && a.count < b.count }

// times returns how long each peer took, in S/B, the quickest first.
func (w *swarm) times() []float64 {
	var times []float64
	for _, n := range w.nodes[1:] {
		times = append(times, float64(n.done-n.came)/float64(w.whole()))
	}
	slices.Sort(times)
	return times
}

// time returns how long the last peer took, in S/B.
func (w *swarm) time() float64 { return w.times()[w.peers-1] }

// surplus returns how many pieces a peer received in vain.
func (w *swarm) surplus() float64 {
	return float64(w.chunks)/float64(chunks*w.peers) - float64(w.pieces)
}

// node is the seed or a peer.
type node struct {
	swarm      *swarm
	index      int
	name       string
	chunkTime  int64
	knows      []*node
	here       bool
	came, done int64

	download *Download
	uploads  *Uploads
	coming   map[int]*transfer // by the ID of its request
	turns    map[*Turn]*transfer

	listens   map[*node]bool // to whom
	listeners []listener

	sending   []*transfer
	turn      int       // of sending
	uplink    *transfer // whose chunk is on it
	downlink  *transfer
	downQueue []*transfer // whose chunks wait for it
}

// transfer is a request and the piece that answers it.
type transfer struct {
	from, to  *node
	request   Request
	turn      *Turn
	piece     int // -1 until it is answered
	toSend    int // chunks
	toReceive int
	onTheWay  int
	cancelled bool
}

func (n *node) arrive() {
	n.here, n.came = true, n.swarm.now
	for _, m := range n.knows {
		if !m.here {
			continue
		}
		n.download.SetSource(m.name, m.download.Held())
		if !m.download.Complete() {
			m.download.SetSource(n.name, n.download.Held())
			m.act()
		}
	}
	n.act()
}

func (n *node) peer(name string) *node {
	i, _ := strconv.Atoi(name)
	return n.swarm.nodes[i]
}

// act does all that the download wants done now.
func (n *node) act() {
	for {
		r, ok := n.download.Next()
		if !ok {
			break
		}
		n.ask(r)
	}
	for source, want := range n.download.Idle() {
		m := n.peer(source)
		if n.listens[m] {
			continue
		}
		n.listens[m] = true
		n.swarm.messages++
		n.swarm.send(func() {
			m.listeners = append(m.listeners, listener{n, want})
			m.tell()
		})
	}
}

// listener is a peer that is to be told when there is one of the pieces that it wants.
type listener struct {
	node *node
	want *Set
}

// tell tells the listeners what is there.
func (n *node) tell() {
	n.listeners = slices.DeleteFunc(n.listeners, func(l listener) bool {
		if n.here && !l.want.Intersects(n.download.Held()) {
			return false
		}
		have := n.download.Held().Clone()
		n.swarm.send(func() {
			l.node.listens[n] = false
			if n.here {
				l.node.download.SetSource(n.name, have)
			}
			l.node.act()
		})
		return true
	})
}

func (n *node) ask(r Request) {
	if p := n.swarm.policy; p == downloaderPicksRandom || p == downloaderPicksFirst {
		r.Want = n.pick(r, p)
	}
	t := &transfer{from: n.peer(r.Source), to: n, request: r, piece: -1}
	n.coming[r.ID] = t
	n.swarm.send(t.asked)
}

// pick makes a request one for a single piece that the downloader picks.
func (n *node) pick(request Request, policy policy) *Set {
	d := n.download
	r := d.request(request.ID)
	from := d.free.Clone().And(r.source.have)
	if from.Count() == 0 {
		from = r.Want
	}
	k := 0
	if policy == downloaderPicksRandom {
		k = n.swarm.rand.IntN(from.Count())
	}
	d.release(r)
	r.claim = NewSet(from.Len())
	r.claim.Add(slices.Collect(from.All())[k])
	r.Want = r.claim
	d.claim(r)
	return r.Want
}

// asked is at the uploader.
func (t *transfer) asked() {
	m, w := t.from, t.from.swarm
	if !m.here {
		w.send(func() {
			t.to.download.RemoveSource(m.name)
			t.cancel()
			t.to.act()
		})
		return
	}
	t.turn = m.uploads.Ask(t.to.name, t.request.Want)
	m.turns[t.turn] = t
	m.grant()
}

// grant answers the requests whose turn it is.
func (n *node) grant() {
	w := n.swarm
	for n.here {
		turn, ok := n.uploads.Grant(n.download.Held())
		if !ok {
			return
		}
		t := n.turns[turn]
		if w.policy == uploaderPicksTiesRandom && turn.piece >= 0 {
			n.uploads.sent[turn.piece]--
			turn.piece = slices.Collect(n.breakTie(t.request.Want).All())[0]
			n.uploads.sent[turn.piece]++
		}
		t.piece = turn.Piece()
		have := n.download.Held().Clone()
		if t.piece >= 0 {
			t.toSend, t.toReceive = chunks, chunks
			n.sending = append(n.sending, t)
			n.sendChunk()
			if w.leaves && n.index == 0 && !slices.Contains(n.uploads.sent, 0) {
				n.leave()
			}
		} else {
			w.messages++
		}
		w.send(func() {
			if t.cancelled {
				return
			}
			if t.piece < 0 {
				delete(t.to.coming, t.request.ID)
			}
			if !t.to.download.Answered(t.request.ID, t.piece, have) && t.piece >= 0 {
				t.cancel()
			}
			t.to.act()
		})
	}
}

// breakTie returns one of the pieces in want that were sent least often.
func (n *node) breakTie(want *Set) *Set {
	var least []int
	for i := range want.Clone().And(n.download.Held()).All() {
		if len(least) > 0 && n.uploads.Sent(i) < n.uploads.Sent(least[0]) {
			least = nil
		}
		if len(least) == 0 || n.uploads.Sent(i) == n.uploads.Sent(least[0]) {
			least = append(least, i)
		}
	}
	one := NewSet(want.Len())
	if len(least) > 0 {
		one.Add(least[n.swarm.rand.IntN(len(least))])
	}
	return one
}

// leave ends what the seed does, but for the pieces that it is sending.
func (n *node) leave() {
	n.here, n.swarm.left = false, n.swarm.now
	n.tell()
	for turn, t := range n.turns {
		if n.uploads.Leave(turn) {
			n.swarm.send(func() {
				t.cancel()
				t.to.act()
			})
		}
	}
	for _, m := range n.knows {
		n.swarm.send(func() {
			m.download.RemoveSource(n.name)
			m.act()
		})
	}
}

// cancel ends a transfer from the downloader's side.
func (t *transfer) cancel() {
	t.cancelled = true
	delete(t.to.coming, t.request.ID)
	t.to.download.Cancel(t.request.ID)
	t.to.swarm.send(func() { t.from.end(t, false) })
}

// end ends a transfer at the uploader, unless it has ended.
func (n *node) end(t *transfer, sent bool) {
	i := slices.Index(n.sending, t)
	if i < 0 {
		if t.turn != nil && n.uploads.Leave(t.turn) {
			delete(n.turns, t.turn)
		}
		return
	}
	n.sending = slices.Delete(n.sending, i, i+1)
	if n.turn > i {
		n.turn--
	}
	n.uploads.End(t.turn, sent)
	n.grant()
}

// sendChunk puts the next chunk on the uplink.
func (n *node) sendChunk() {
	if n.uplink != nil {
		return
	}
	for k := range n.sending {
		i := (n.turn + k) % len(n.sending)
		if t := n.sending[i]; t.onTheWay < n.swarm.window {
			t.onTheWay++
			n.uplink, n.turn = t, i+1
			n.swarm.after(n.chunkTime, event{up: n})
			return
		}
	}
}

func (n *node) chunkSent() {
	t := n.uplink
	n.uplink = nil
	n.swarm.send(func() {
		t.to.downQueue = append(t.to.downQueue, t)
		t.to.receiveChunk()
	})
	if t.toSend--; t.toSend == 0 {
		n.end(t, true)
	}
	n.sendChunk()
}

// receiveChunk takes the next chunk from the downlink.
func (n *node) receiveChunk() {
	if n.downlink == nil && len(n.downQueue) > 0 {
		n.downlink, n.downQueue = n.downQueue[0], n.downQueue[1:]
		n.swarm.after(n.chunkTime, event{down: n})
	}
}

func (n *node) chunkReceived() {
	t := n.downlink
	n.downlink = nil
	n.swarm.chunks++
	n.receiveChunk()
	t.onTheWay--
	t.from.sendChunk()
	if t.toReceive--; t.toReceive > 0 || t.cancelled {
		return
	}
	delete(n.coming, t.request.ID)
	for _, id := range n.download.Done(t.request.ID) {
		n.coming[id].cancel()
	}
	n.tell()
	n.act()
	if n.download.Complete() {
		n.finish()
	}
}

func (n *node) finish() {
	n.done = n.swarm.now
	n.swarm.unfinished--
	for _, id := range slices.Sorted(maps.Keys(n.coming)) {
		n.coming[id].cancel()
	}
}
