package swarm

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
)

const (
	// maxAsked is how many connected peers one lookup asks directly. A swarm
	// of no more is searched so alone; a larger one through what is announced.
	maxAsked = 64
	// maxSearches is how many searches for announcements are under way; others wait.
	maxSearches = 128
	// maxProviders is how many peers that have announced something are asked.
	maxProviders = 20
	// announcedGrace is how long a lookup goes on looking for announcements
	// when all connected peers have answered.
	announcedGrace = 500 * time.Millisecond
)

// questions asks peers what they have, and finds out which of them do not answer. It is safe for
// concurrent use, and has no lock: what is known of each peer has one, and so has each lookup.
type questions struct {
	network  Network
	peers    *peerTable
	client   *client
	security *security     // knows why peers could not prove themselves
	deletes  *deletes      // tells a peer that answers again what it has missed
	timeout  time.Duration // of a question, and of a lookup
	log      *slog.Logger

	ctx        context.Context // ends with the swarm
	background *sync.WaitGroup // counts lookups
	late       late            // questions and searches, which may outlive the call that asked
	searches   chan struct{}   // holds a token for every search for announcements
}

// taskKey is what a provider of a task announces.
func taskKey(t p2p.Task) Key {
	return sha256.Sum256([]byte("dfcache announce task\x00" + t.Tag + "\x00" + string(t.Digest)))
}

// nameKey is what a provider of a name announces.
func nameKey(tag, name string) Key {
	return sha256.Sum256([]byte("dfcache announce name\x00" + tag + "\x00" + name))
}

// errNoAnswer says that a peer has not answered within the lookup timeout, or is not
// waited for because it has not before.
var errNoAnswer = errors.New("no answer in time")

// answer is what a peer has answered in a lookup.
type answer struct {
	peer  peer.ID
	reply *findReply
	err   error
	gone  bool // only announced, and can't be reached
}

// lookup asks peers at once. Its answers come in the order in which they come.
type lookup struct {
	q       *questions
	answers chan answer // closed at the end
	ctx     context.Context
	cancel  context.CancelFunc
	began   time.Time

	// Of run.
	seen    map[peer.ID]bool
	waiting map[peer.ID]bool // for their answers; true where it is connected
	replies chan answer      // has room for all

	mu     sync.Mutex
	asked  int
	silent int
	failed error // of a peer that was silent
}

// lookup asks all connected peers, or some of them where there are many, and
// those that have announced key, until all have answered, the timeout is over, or ctx ends.
// Where quick is set and all connected peers are asked, announcements are not looked for.
// A peer that is known to be silent counts as one that has not answered, and is not
// waited for; not are peers that are not asked. Nor is what a question waits for underneath.
// The caller reads the answers up to the end, or calls end or missed.
func (q *questions) lookup(ctx context.Context, req *findRequest, key Key, quick bool, not ...peer.ID) *lookup {
	l := &lookup{
		q: q, answers: make(chan answer), began: time.Now(),
		seen: map[peer.ID]bool{q.network.Self(): true}, waiting: map[peer.ID]bool{},
		replies: make(chan answer, maxAsked+maxProviders),
	}
	for _, p := range not {
		l.seen[p] = true
	}
	l.ctx, l.cancel = q.within(ctx)
	q.background.Go(func() {
		defer close(l.answers)
		defer l.cancel()
		l.run(req, key, quick)
	})
	return l
}

func (l *lookup) run(req *findRequest, key Key, quick bool) {
	small := l.askConnected(req)
	var announced <-chan peer.AddrInfo
	var grace <-chan time.Time
	if len(l.waiting) > 0 && !(small && quick) {
		announced = l.q.announced(l.ctx, key)
	}
	for providers := 0; len(l.waiting) > 0 || announced != nil; {
		if small && announced != nil && grace == nil && !l.waitsForConnected() {
			grace = time.After(announcedGrace)
		}
		select {
		case a := <-l.replies:
			l.take(a)
		case p, more := <-announced:
			if more && !l.skip(p.ID) && l.q.peers.get(p.ID).silence() == 0 {
				l.ask(p, req)
				providers++
			}
			if !more || providers == maxProviders {
				announced = nil
			}
		case <-grace:
			announced = nil
		case <-l.ctx.Done():
			l.giveUp()
			return
		}
	}
}

// askConnected asks connected peers. It reports whether all of them are asked.
func (l *lookup) askConnected(req *findRequest) (all bool) {
	peers := l.q.network.Connected()
	rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
	for _, p := range peers {
		if len(l.seen) > maxAsked {
			break
		}
		if l.skip(p) {
			continue
		}
		if silence := l.q.peers.get(p).silence(); silence > 0 {
			l.note(fmt.Errorf("peer %s: %w: it has been silent for %s", p, errNoAnswer,
				silence.Round(time.Millisecond)))
			continue
		}
		l.ask(peer.AddrInfo{ID: p}, req)
	}
	return len(peers) <= maxAsked
}

// take passes an answer on.
func (l *lookup) take(a answer) {
	delete(l.waiting, a.peer)
	if a.gone {
		return // an announcement that has outlived its peer
	}
	l.note(a.err)
	if a.err != nil {
		l.q.log.Debug("a peer did not answer", "peer", a.peer.String(), "error", a.err)
		return
	}
	select {
	case l.answers <- a:
	case <-l.ctx.Done():
	}
}

// skip reports whether a peer is not to be asked, or was already.
func (l *lookup) skip(p peer.ID) bool {
	was := l.seen[p]
	l.seen[p] = true
	return was || l.q.peers.get(p).isShunned()
}

func (l *lookup) waitsForConnected() bool {
	for _, connected := range l.waiting {
		if connected {
			return true
		}
	}
	return false
}

// ask asks a peer, that is to be connected with before where there are addresses.
func (l *lookup) ask(p peer.AddrInfo, req *findRequest) {
	l.waiting[p.ID] = len(p.Addrs) == 0
	l.q.late.run(func() {
		a := answer{peer: p.ID}
		asked := l.q.peers.get(p.ID).asked
		select {
		case asked <- struct{}{}:
			defer func() { <-asked }()
		case <-l.ctx.Done():
			return
		}
		if len(p.Addrs) > 0 {
			a.err = l.q.network.Connect(l.ctx, p)
			a.gone = a.err != nil
		}
		if a.err == nil {
			a.reply, a.err = l.q.client.find(l.ctx, p.ID, req)
		}
		l.replies <- a
	})
}

// giveUp ends a lookup that still waits. A peer that has not answered for a whole lookup timeout
// is silent; and one that might be is asked once more, by nobody who waits.
func (l *lookup) giveUp() {
	took := time.Since(l.began)
	for p, connected := range l.waiting {
		if connected {
			l.note(errNoAnswer)
		}
		if took >= min(suspicious, l.q.timeout) {
			l.q.suspect(p, took >= l.q.timeout)
		}
	}
}

func (l *lookup) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked++
	if err != nil {
		l.silent++
		l.failed = err
	}
}

// end cancels what is left of a lookup and says how many were asked, and how
// many of them did not answer.
func (l *lookup) end() (asked, silent int) {
	l.cancel()
	for range l.answers {
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.asked, l.silent
}

// missed is the error of a lookup that has found nothing.
func (l *lookup) missed(what string) error {
	asked, silent := l.end()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case asked == 0:
		return l.q.explain(fmt.Errorf("%s is not here, and %w: none is connected", what, p2p.ErrUnreachable))
	case asked == silent:
		// Not wrapped: that a peer took too long is not to look as if the caller had.
		return l.q.explain(fmt.Errorf("%s is not here, and %w: none of %d answered: %v", what, p2p.ErrUnreachable,
			asked, l.failed))
	case silent > 0:
		return fmt.Errorf("%s: %w here or on %d peers; %d more did not answer", what, p2p.ErrNotFound, asked-silent,
			silent)
	}
	return fmt.Errorf("%s: %w here or on %d peers", what, p2p.ErrNotFound, asked)
}

// explain adds to the error of a lookup why peers that are known could not be asked.
func (q *questions) explain(err error) error {
	if !errors.Is(err, p2p.ErrUnreachable) {
		return err
	}
	for _, p := range q.network.Connected() {
		if why := q.peers.get(p).misunderstood(); why != "" {
			err = fmt.Errorf("%w; peer %s: %s", err, p, why)
			break
		}
	}
	if why := cmp.Or(q.network.Trouble(), q.security.trouble()); why != nil {
		err = fmt.Errorf("%w; %w", err, why)
	}
	return err
}

// eachAnnounced calls do for those that have announced key, as far as they are found within
// the lookup timeout. Where one of few peers is silent, for which a search may wait, it gets
// no longer than in a lookup.
func (q *questions) eachAnnounced(ctx context.Context, key Key, do func(peer.AddrInfo)) {
	limit := q.timeout
	if len(q.network.Connected()) <= maxAsked && q.peers.silent() > 0 {
		limit = min(limit, announcedGrace)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errNoAnswer)
	defer cancel()
	announced := q.announced(ctx, key)
	for {
		select {
		case p, more := <-announced:
			if !more {
				return
			}
			do(p)
		case <-ctx.Done():
			return
		}
	}
}

// announced returns those that have announced key as they are found. It is closed when
// there are no more, which may be later than ctx ends: a reader has an eye on that.
func (q *questions) announced(ctx context.Context, key Key) <-chan peer.AddrInfo {
	found := make(chan peer.AddrInfo)
	q.late.run(func() {
		defer close(found)
		select {
		case q.searches <- struct{}{}:
			defer func() { <-q.searches }()
		case <-ctx.Done():
			return
		}
		for p := range q.network.Providers(ctx, key) {
			select {
			case found <- p:
			case <-ctx.Done():
				return
			}
		}
	})
	return found
}

// within bounds a question.
func (q *questions) within(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, q.timeout, errNoAnswer)
}

// find asks one peer what it has, within the timeout. One that does not answer is silent then.
func (q *questions) find(ctx context.Context, p peer.ID, req *findRequest) (*findReply, error) {
	ctx, cancel := q.within(ctx)
	defer cancel()
	reply, err := q.client.find(ctx, p, req)
	if err != nil && errors.Is(context.Cause(ctx), errNoAnswer) {
		q.suspect(p, true)
	}
	return reply, err
}
