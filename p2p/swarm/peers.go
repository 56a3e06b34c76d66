package swarm

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Mode says what a daemon does for others and for its own callers.
type Mode string

// The modes.
const (
	Full       Mode = "full"        // fetches and serves
	SeedOnly   Mode = "seed-only"   // serves what was imported or pushed here, and fetches nothing
	NeverServe Mode = "never-serve" // fetches, and serves nothing
)

const (
	// shunFor is how long a peer that was caught with a lie is asked for
	// nothing. It doubles with each further one, up to maxShun.
	shunFor = 10 * time.Minute
	maxShun = 24 * time.Hour
	// maxPeers bounds how many peers are remembered; those that were seen last stay.
	maxPeers = 4096
	// maxQuestions is how many questions to one peer are under way; others wait.
	maxQuestions = 64
	// maxOwed bounds the deletes that are kept for a peer that does not answer.
	maxOwed = 1024
)

// peerTable is what is known of other peers. It is safe for concurrent use.
type peerTable struct {
	now func() time.Time

	mu  sync.Mutex
	all map[peer.ID]*peerEntry
}

func newPeerTable() *peerTable {
	return &peerTable{now: time.Now, all: map[peer.ID]*peerEntry{}}
}

// peerEntry is what is known of one.
type peerEntry struct {
	now func() time.Time

	mu      sync.Mutex
	said    *hello    // nil where it has not been asked yet
	failed  time.Time // when its direct addresses could not be reached
	address string    // where it was reached last
	latency time.Duration
	seen    time.Time
	gave    int64
	took    int64
	faults  int
	reason  string
	shunned time.Time // until when

	foreign   string        // why it can't be understood, or ""
	ahead     time.Duration // how far its clock is ahead of this host's, give or take doubt
	doubt     time.Duration
	timed     reading         // of this host's clock when that was so; zero where it is not known
	toldSkew  bool            // that it is much has been logged
	moves     int             // it has been asked for as many of the names that were moved here
	instances []string        // runs of it, the one that was there last at the end
	twins     time.Time       // when it was last seen that two hosts are this peer
	silent    time.Time       // since when it does not answer; zero where it does
	probing   bool            // it is asked in the background whether it does
	owed      []pieces.Delete // what it is told when it does
	asked     chan struct{}   // holds a token for every question under way
}

// get returns the entry of a peer, a new one where there is none.
func (t *peerTable) get(p peer.ID) *peerEntry {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.all[p]
	if e == nil {
		if len(t.all) >= maxPeers {
			t.dropOldest()
		}
		e = &peerEntry{now: t.now, seen: t.now(), asked: make(chan struct{}, maxQuestions)}
		t.all[p] = e
	}
	return e
}

func (t *peerTable) dropOldest() {
	var oldest peer.ID
	var when time.Time
	for p, e := range t.all {
		e.mu.Lock()
		seen := e.seen
		e.mu.Unlock()
		if oldest == "" || seen.Before(when) {
			oldest, when = p, seen
		}
	}
	delete(t.all, oldest)
}

// known returns all peers.
func (t *peerTable) known() []peer.ID {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.all))
}

// silent returns how many peers do not answer.
func (t *peerTable) silent() (n int) {
	for _, p := range t.known() {
		if t.get(p).silence() > 0 {
			n++
		}
	}
	return n
}

func (e *peerEntry) introduce(h *hello) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.said, e.failed, e.seen = h, time.Time{}, e.now()
}

// direct returns what the peer has said of itself, and when it could not be
// reached so.
func (e *peerEntry) direct() (*hello, time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.said, e.failed
}

func (e *peerEntry) reached(address string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.address, e.seen = address, e.now()
}

func (e *peerEntry) unreached() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failed = e.now()
}

// answered notes how long an answer took.
func (e *peerEntry) answered(took time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen, e.silent = e.now(), time.Time{}
	if e.latency == 0 {
		e.latency = took
	}
	e.latency += (took - e.latency) / 8
}

func (e *peerEntry) addGave(n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.gave += n
}

func (e *peerEntry) addTook(n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.took += n
	e.seen = e.now()
}

// fault notes that the peer was caught with a lie, and has it shunned.
func (e *peerEntry) fault(reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.faults++
	e.reason = reason
	e.shunned = e.now().Add(min(shunFor<<min(e.faults-1, 10), maxShun))
}

func (e *peerEntry) isShunned() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.foreign != "" || e.now().Before(e.shunned)
}

// heard notes that the peer answers, or fails at once: either way nobody waits for it.
func (e *peerEntry) heard() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.silent = time.Time{}
}

// quiet notes that the peer has not answered in time. It reports whether that is news.
func (e *peerEntry) quiet() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	news := e.silent.IsZero()
	if news {
		e.silent = e.now()
	}
	return news
}

// silence returns for how long the peer has been silent; 0 where it is not.
func (e *peerEntry) silence() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.silent.IsZero() {
		return 0
	}
	return max(e.now().Sub(e.silent), 1)
}

// beginProbe reports whether nobody asks the peer in the background yet. The caller
// does, then, and calls endProbe.
func (e *peerEntry) beginProbe() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	was := e.probing
	e.probing = true
	return !was
}

func (e *peerEntry) endProbe() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.probing = false
}

// owe keeps deletes that the peer is to be told of when it answers again. Where there are
// too many, it is told of them when it is met again.
func (e *peerEntry) owe(deletes []pieces.Delete) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.owed = append(e.owed, deletes[:min(len(deletes), maxOwed-len(e.owed))]...)
}

// takeOwed returns what was kept, and forgets it.
func (e *peerEntry) takeOwed() []pieces.Delete {
	e.mu.Lock()
	defer e.mu.Unlock()
	owed := e.owed
	e.owed = nil
	return owed
}

func (e *peerEntry) mode() Mode {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.said == nil {
		return ""
	}
	return e.said.Mode
}

func (e *peerEntry) lastAddress() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.address
}

// seenSince reports whether the peer was seen within a span of time.
func (e *peerEntry) seenSince(span time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now().Sub(e.seen) < span
}

// describe says what is known of a peer.
func (e *peerEntry) describe(info peer.AddrInfo, connected bool) p2p.Peer {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := p2p.Peer{
		ID: info.ID.String(), State: p2p.PeerAway,
		Gave: e.gave, Took: e.took, Latency: e.latency, LastSeen: e.seen,
		Faults: e.faults, Reason: e.reason,
	}
	if connected {
		p.State, p.LastSeen = p2p.PeerConnected, e.now()
	}
	if e.now().Before(e.shunned) {
		p.State = p2p.PeerShunned
	}
	if connected && !e.silent.IsZero() {
		p.LastSeen = e.seen
		if p.Reason == "" {
			p.Reason = fmt.Sprintf("it has not answered for %s, and nobody waits for it",
				e.now().Sub(e.silent).Round(time.Second))
		}
	}
	if e.foreign != "" {
		p.State, p.Reason = p2p.PeerForeign, e.foreign
	}
	if !e.twins.IsZero() && e.now().Sub(e.twins) <= twinFor {
		p.State, p.Reason = p2p.PeerCloned, "two hosts have this identity: peer.key was copied"
	}
	if !e.timed.shows.IsZero() {
		p.Ahead = e.ahead
	}
	if e.said != nil {
		p.Mode, p.Version = string(e.said.Mode), e.said.Version
	}
	if e.address != "" {
		p.Addresses = append(p.Addresses, e.address)
	}
	for _, a := range info.Addrs {
		p.Addresses = append(p.Addresses, a.String())
	}
	return p
}
