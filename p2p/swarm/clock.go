package swarm

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxSkew is how much the clocks of two hosts may differ before that is told.
const maxSkew = 5 * time.Second

// clock tells the time by the clocks of this host and of the connected peers. It is safe for
// concurrent use: mu guards what the clocks have agreed on.
type clock struct {
	own     func() time.Time // this host's
	network Network
	peers   *peerTable

	mu       sync.Mutex
	agreed   time.Duration // how far most clocks were ahead of this host's when it showed agreedAt
	agreedAt reading
}

// now returns the time by most of the clocks of this host and of the connected peers;
// of two, by the one that is behind. While no peer is connected it is that of this host's
// clock, set right by as much as it was wrong when the last ones were, however it has been
// set since. What is imported and moved here is dated by it: a clock that is far ahead does
// not win, after a first time, what is done at once on hosts that can't see each other.
func (c *clock) now() time.Time {
	own := readingOf(c.own())
	ahead := []time.Duration{0}
	for _, p := range c.network.Connected() {
		if skew, known := c.peers.get(p).skew(own); known {
			ahead = append(ahead, skew)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case len(ahead) > 1:
		slices.Sort(ahead)
		c.agreed, c.agreedAt = ahead[(len(ahead)-1)/2], own
	case !c.agreedAt.shows.IsZero():
		c.agreed, c.agreedAt = c.agreed-own.setSince(c.agreedAt), own
	}
	if c.agreed.Abs() <= maxSkew {
		return own.shows // clocks that are in step are not the same
	}
	return own.shows.Add(c.agreed)
}

// whose says which clock seems to be wrong.
func (c *clock) whose(skew time.Duration) string {
	if off := c.now().Sub(c.own()); off.Abs() > maxSkew {
		return "of this host: most peers agree on another time"
	}
	if len(c.network.Connected()) > 1 {
		return "of that peer: most others agree with this host"
	}
	return "one of the two"
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
