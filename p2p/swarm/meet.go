package swarm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sys/unix"
)

// When peers meet, and now and then afterwards, each asks the other who it is: which
// version of this protocol it speaks, what time it has, and whether somebody else
// says to be this very peer.

const (
	// protocol is the version of what peers say to each other. It is raised whenever
	// a peer of before would misunderstand what is said, or could not answer, and
	// then oldestProtocol says whom this one still understands.
	//
	//	1  had no number
	//	2  After of versions and deletes, Age of deletes, clock and instance in hello
	protocol       = 2
	oldestProtocol = 1

	headerProtocol = "Dfcache-Protocol" // of a request: protocol of the peer that asks
	headerInstance = "Dfcache-Instance" // of a request: which run of it asks

	// helloInterval is how often connected peers are asked again.
	helloInterval = 5 * time.Minute
	// maxSkew is how much the clocks of two hosts may differ before that is told.
	maxSkew = 5 * time.Second
	// twinFor is how long it is told that there is another host with the same identity.
	twinFor = time.Hour
)

// Instance is one run of a daemon. By it a daemon, and its peers, tell it from
// another host that has a copy of its identity. It is safe for concurrent use.
type Instance struct {
	id string

	mu   sync.Mutex
	log  *slog.Logger
	twin string    // where the other one is
	seen time.Time // when it was heard of last
}

// NewInstance returns a new one.
func NewInstance() *Instance { return &Instance{id: rand.Text(), log: slog.New(slog.DiscardHandler)} }

// errTwin says that another host has the identity of this one.
var errTwin = errors.New("it has the identity of this host: peer.key was copied from one to the other; stop one of " +
	"the two dfdaemons, remove its peer.key, and start it again")

// found notes that another host has the same identity; not where that is "".
func (in *Instance) found(where string) {
	if where == "" {
		return
	}
	where = where[:min(len(where), 1024)] // who tells is another peer
	in.mu.Lock()
	defer in.mu.Unlock()
	news := time.Since(in.seen) > twinFor
	in.twin, in.seen = where, time.Now()
	if news {
		in.log.Error("another host is in the swarm with the identity of this one", "at", where, "error", errTwin)
	}
}

// other returns where the other host is, or "".
func (in *Instance) other() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	if time.Since(in.seen) > twinFor {
		return ""
	}
	return in.twin
}

// says is what the header of every request says of who sends it.
func (in *Instance) says(h http.Header) {
	h.Set(headerProtocol, strconv.Itoa(protocol))
	h.Set(headerInstance, in.id)
}

// protocolOf returns which version of the protocol who sends a request speaks.
func protocolOf(r *http.Request) int {
	n, err := strconv.Atoi(r.Header.Get(headerProtocol))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// maxAheadOld is how far ahead of its own clock a peer of version 1 believes dates.
const maxAheadOld = time.Hour

// meet asks a peer who it is.
func (s *Swarm) meet(ctx context.Context, p peer.ID) error {
	h, err := s.client.hello(ctx, p)
	if err != nil {
		return err
	}
	s.instance.found(h.Twin)
	s.now() // to have it when no peer is connected any more
	e := s.peers.get(p)
	if why, news := e.speaks(h); news {
		s.log.Warn("a peer can't be understood, and is asked for nothing", "peer", p.String(), "reason", why)
	}
	switch skew, news := e.skewed(); {
	case news && skew == 0:
		s.log.Info("the clock of a peer is right again", "peer", p.String())
	case news:
		s.log.Warn("the clocks of this host and of a peer differ: keep both in step, such as by NTP",
			"peer", p.String(), "address", e.lastAddress(), "ahead", skew.Round(
				time.Millisecond).String(), "whose", s.whose(skew))
	}
	return nil
}

// greet asks a peer that has been met who it is, what was deleted, and for names that
// were moved here.
func (s *Swarm) greet(p peer.ID) {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	err := s.meet(ctx, p)
	if err == nil && s.peers.get(p).misunderstood() == "" {
		err = s.deletes.compare(ctx, p)
		if err == nil {
			err = s.names.compare(ctx, p)
		}
	}
	if err != nil && s.ctx.Err() == nil {
		s.log.Debug("could not ask a peer what was deleted and moved", "peer", p.String(), "error", err)
	}
}

// whose says which clock seems to be wrong.
func (s *Swarm) whose(skew time.Duration) string {
	if off := s.now().Sub(s.opts.Now()); off.Abs() > maxSkew {
		return "of this host: most peers agree on another time"
	}
	if len(s.network.Connected()) > 1 {
		return "of that peer: most others agree with this host"
	}
	return "one of the two"
}

// meetAll asks all connected peers again.
func (s *Swarm) meetAll() {
	slots := make(chan struct{}, maxTelling)
	var meeting sync.WaitGroup
	defer meeting.Wait()
	for _, p := range s.network.Connected() {
		select {
		case slots <- struct{}{}:
		case <-s.ctx.Done():
			return
		}
		meeting.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(s.ctx, s.opts.StallTimeout)
			defer cancel()
			err := s.meet(ctx, p)
			if err == nil && s.peers.get(p).misunderstood() == "" {
				err = s.names.compare(ctx, p)
			}
			if err != nil && s.ctx.Err() == nil {
				s.log.Debug("a peer does not say who it is", "peer", p.String(), "error", err)
			}
		})
	}
}

// now returns the time by most of the clocks of this host and of the connected peers;
// of two, by the one that is behind. While no peer is connected it is that of this host's
// clock, set right by as much as it was wrong when the last ones were, however it has been
// set since. What is imported and moved here is dated by it: a clock that is far ahead does
// not win, after a first time, what is done at once on hosts that can't see each other.
func (s *Swarm) now() time.Time {
	own := readingOf(s.opts.Now())
	ahead := []time.Duration{0}
	for _, p := range s.network.Connected() {
		if skew, known := s.peers.get(p).skew(own); known {
			ahead = append(ahead, skew)
		}
	}
	s.agreedMu.Lock()
	defer s.agreedMu.Unlock()
	switch {
	case len(ahead) > 1:
		slices.Sort(ahead)
		s.agreed, s.agreedAt = ahead[(len(ahead)-1)/2], own
	case !s.agreedAt.shows.IsZero():
		s.agreed, s.agreedAt = s.agreed-own.setSince(s.agreedAt), own
	}
	if s.agreed.Abs() <= maxSkew {
		return own.shows // clocks that are in step are not the same
	}
	return own.shows.Add(s.agreed)
}

// reading is what a clock shows, and when that is, as what passes is measured.
type reading struct {
	shows time.Time
	at    time.Duration // since this host was started, the time that it was asleep counted
}

// readingOf returns that of a clock that shows a time now.
func readingOf(shows time.Time) reading {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // it does not fail
	return reading{shows.Round(0), time.Duration(t.Nano())}
}

// setSince returns by how much the clock has been set ahead since an earlier reading.
func (r reading) setSince(before reading) time.Duration {
	return r.shows.Sub(before.shows) - (r.at - before.at)
}

// introduced notes from which run of a peer a request comes.
func (s *Swarm) introduced(from peer.ID, r *http.Request) {
	instance := r.Header.Get(headerInstance)
	if from == s.network.Self() {
		if instance != s.instance.id {
			s.instance.found(r.RemoteAddr)
		}
		return
	}
	if len(instance) == 0 || len(instance) > 64 {
		return
	}
	if s.peers.get(from).runs(instance) {
		s.log.Error("two hosts have the same identity: peer.key was copied from one to the other; stop one of the "+
			"two dfdaemons, remove its peer.key, and start it again",
			"peer", from.String(), "at", s.addressesOf(from))
	}
}

// twinOf says where two hosts are that say to be the peer; "" where there is one.
func (s *Swarm) twinOf(p peer.ID) string {
	if p == s.network.Self() || !s.peers.get(p).isTwin() {
		return ""
	}
	return s.addressesOf(p)
}

// addressesOf says where a peer is.
func (s *Swarm) addressesOf(p peer.ID) string {
	var all []string
	for _, a := range s.network.Addresses(p).Addrs {
		if len(all) < 8 {
			all = append(all, a.String())
		}
	}
	if len(all) == 0 {
		return "an unknown address"
	}
	return strings.Join(all, " ")
}

// speaks says why a peer can't be understood, or "", and whether that is new.
func (e *peerEntry) speaks(h *hello) (why string, news bool) {
	from, to := max(h.OldestProtocol, 1), max(h.Protocol, 1)
	if from > protocol || to < oldestProtocol {
		older := "that peer"
		if from > protocol {
			older = "this host"
		}
		why = fmt.Sprintf("it speaks version %d to %d of the peers' protocol (dfdaemon %s), this one %d to %d: "+
			"upgrade the dfdaemon of %s", from, to, h.Version, oldestProtocol, protocol, older)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	news = why != "" && why != e.foreign
	e.foreign = why
	return why, news
}

func (e *peerEntry) misunderstood() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.foreign
}

// version returns that of the peer's dfdaemon, or "".
func (e *peerEntry) version() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.said == nil {
		return ""
	}
	return e.said.Version
}

// skew returns how far the clock of the peer is ahead of this one's, which is own, where
// that is known.
func (e *peerEntry) skew(own reading) (ahead time.Duration, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timed.shows.IsZero() {
		return 0, false
	}
	return e.ahead - own.setSince(e.timed), true
}

// skewed returns by how much the clock of the peer is wrong, 0 where that is too
// little to tell, and whether it has begun or ended to be.
func (e *peerEntry) skewed() (skew time.Duration, news bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ahead.Abs() > maxSkew+e.doubt {
		skew = e.ahead
	}
	news = (skew != 0) != e.toldSkew
	e.toldSkew = skew != 0
	return skew, news
}

// clocked notes what time the peer had, when this host's clock showed between start and end.
func (e *peerEntry) clocked(h *hello, start, end time.Time) {
	doubt := end.Sub(start) / 2
	at := h.Clock
	if at.IsZero() { // a daemon that does not tell; its HTTP does, in whole seconds
		date, err := http.ParseTime(h.date)
		if err != nil {
			return
		}
		at = date.Add(time.Second / 2)
		doubt += time.Second / 2
	}
	if checkStamps(at) != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ahead, e.doubt, e.timed = at.Sub(start.Add(end.Sub(start)/2)), doubt, readingOf(end)
}

// maxInstances is how many runs of a peer are remembered.
const maxInstances = 8

// runs notes which run of the peer is there. It reports whether it is new that there
// are two: one that was followed by another is there again.
func (e *peerEntry) runs(instance string) (twins bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.instances)
	if n > 0 && e.instances[n-1] == instance {
		return false
	}
	if i := slices.Index(e.instances, instance); i >= 0 {
		e.instances = append(slices.Delete(e.instances, i, i+1), instance)
		twins = e.now().Sub(e.twins) > twinFor
		e.twins = e.now()
		return twins
	}
	e.instances = append(e.instances[max(0, n-maxInstances+1):], instance)
	return false
}

func (e *peerEntry) isTwin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.twins.IsZero() && e.now().Sub(e.twins) <= twinFor
}
