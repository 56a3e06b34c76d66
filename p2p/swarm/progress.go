package swarm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// The clock of a download: whether it makes progress, when it ends without, and what it says.
// All of it belongs to the loop of the download.

const (
	// tickInterval is how often a download looks at the clock.
	tickInterval = 200 * time.Millisecond
	// maxGap is how long a download may not have looked at the clock: what is longer is
	// time in which this process was stopped, or busy, and nobody is to blame for it.
	maxGap = time.Second
	// noticeAfter is how long nothing may move before those who wait are told why, and
	// noticeInterval how often.
	noticeAfter    = 3 * time.Second
	noticeInterval = 10 * time.Second
)

// patience is how long a download goes on without any progress.
func (d *download) patience() time.Duration {
	return 3 * max(d.s.opts.StallTimeout, d.s.opts.LookupTimeout)
}

// tick looks at the clock.
func (d *download) tick() error {
	now := time.Now()
	if gap := now.Sub(d.ticked); !d.ticked.IsZero() && gap > maxGap {
		d.progress, d.lastPiece = d.progress.Add(gap), d.lastPiece.Add(gap)
	}
	d.ticked = now
	d.measure(now)
	d.label()
	d.wake(now)
	for id, r := range d.requests {
		select {
		case <-r.pace.Slow():
			d.sched.Slow(id)
		default:
		}
	}
	usable := d.usable()
	if !d.searching && (now.After(d.nextSearch) || usable == 0 && now.Sub(d.searched) > searchPause) {
		d.search()
	}
	if err := d.hopeless(usable); err != nil {
		return err
	}
	d.doubt(now)
	return d.wait(now)
}

// wake has sources asked again that have rested.
func (d *download) wake(now time.Time) {
	for _, src := range d.sources {
		if src.paused && now.After(src.away) {
			src.paused = false
			d.offer(src)
		}
	}
}

// usable returns how many sources can be asked for something.
func (d *download) usable() (n int) {
	for _, src := range d.sources {
		if !src.ended() && !src.paused && (d.sched == nil || !src.stated || src.chain == d.active) {
			n++
		}
	}
	return n
}

// hopeless returns why nothing more is to be had, as far as searches have shown; nil where
// something may be. usable is how many sources can be asked.
func (d *download) hopeless(usable int) error {
	ended, asking := 0, false
	for _, src := range d.sources {
		asking = asking || src.asking
		if src.ended() {
			ended++
		}
	}
	if d.searching || asking {
		return nil
	}
	// The chain of one piece is known from its size: what has only that has begun no more than
	// what has none.
	begun := d.sched != nil && (d.sched.Held().Len() > 1 || d.sched.Held().Count() > 0)
	idle := len(d.requests) == 0
	switch {
	case !begun && d.missed != nil && usable == 0 && idle && !d.connected():
		return d.missed // nobody has it, or the one that had it a moment ago is gone
	case d.sched == nil && d.searches > 0 && d.noRoom != nil:
		return d.noRoom
	case ended > 0 && ended == len(d.sources) && idle && d.searched.After(d.lastEnd):
		// Where there is nothing to be had any more of those who had it, one search shows
		// whether there are others.
		return d.over()
	}
	return nil
}

// doubt tries another hash chain where the one in use has brought nothing for a while.
func (d *download) doubt(now time.Time) {
	quiet := 3 * d.s.opts.StallTimeout
	if len(d.requests) == 0 {
		quiet = min(quietFor, d.s.opts.StallTimeout)
	}
	if d.sched == nil || now.Sub(d.lastPiece) <= quiet {
		return
	}
	if other, ok := d.otherChain(); ok {
		d.s.log.Warn("the peers that have one hash chain of a blob do not give all of it: trying another chain",
			"digest", d.digest)
		d.activate(other)
	}
}

// wait ends a download that has made no progress for too long, and tells those who wait
// why one makes none.
func (d *download) wait(now time.Time) error {
	still := now.Sub(d.progress)
	if still > d.patience() {
		err := fmt.Errorf("fetch %s: %w that gives it: %s: try again", d.digest, p2p.ErrUnreachable, d.standing(still))
		for _, src := range d.sources {
			if errors.Is(src.problem, p2p.ErrBusy) {
				return fmt.Errorf("%w (peer %s: %w)", err, d.s.nameOf(src.id), src.problem)
			}
		}
		return err
	}
	if still > min(noticeAfter, d.s.opts.StallTimeout) && now.Sub(d.noticed) > noticeInterval {
		d.noticed = now
		d.notify(fmt.Sprintf("%s: given up in %s", d.standing(still), (d.patience() - still).Round(time.Second)))
	}
	return nil
}

// connected reports whether a connection with one of the sources is there.
func (d *download) connected() bool {
	return slices.ContainsFunc(d.s.network.Connected(), func(p peer.ID) bool { return d.sources[p] != nil })
}

// measure notes progress: where more has arrived with the chain in use than ever since it was
// chosen, and by more than a byte now and then. Time in which this host is what is waited for counts
// as progress, too.
func (d *download) measure(now time.Time) {
	if d.held.Load() > 0 {
		d.progress = now
	}
	if d.sched == nil {
		return
	}
	c := d.chains[d.active]
	came := int64(d.sched.Held().Count()) * digest.PieceLength(c.size)
	for _, r := range d.requests {
		came += r.came.Load()
	}
	enough := int64(d.patience().Seconds() * throttle.MinRate)
	if d.s.limit != nil {
		enough = 1 // it may be slow by our own choice
	}
	if came-c.came >= max(enough, 1) {
		c.came, d.progress = came, now
	}
}

// over is how a download ends that nobody has anything for any more.
func (d *download) over() error {
	gone := 0
	var why error
	for _, src := range d.sources {
		switch {
		case src.gone:
			gone++
		case src.dry && why == nil:
			why = fmt.Errorf("peer %s has it, and lacks pieces of it: they are damaged there", d.s.nameOf(src.id))
		case src.problem != nil:
			why = fmt.Errorf("peer %s: %w", d.s.nameOf(src.id), src.problem)
		}
	}
	if gone == len(d.sources) && errors.Is(d.missed, p2p.ErrNotFound) {
		d.spoil()
		return fmt.Errorf("%w: it was deleted, or its name moved, while it was fetched", d.missed)
	}
	if why == nil {
		why = errors.New("those that had it do not have it any more")
	}
	return fmt.Errorf("fetch %s: %w that has the rest of it: %s: %w", d.digest, p2p.ErrUnreachable, d.arrivedSoFar(),
		why)
}

// arrivedSoFar says how much there is.
func (d *download) arrivedSoFar() string {
	if d.sched == nil {
		return "not even its size is known"
	}
	return fmt.Sprintf("%d of %d pieces have arrived, and are kept", d.sched.Held().Count(), d.sched.Held().Len())
}

// standing says how it stands with a download that makes no progress, and what it waits for.
func (d *download) standing(still time.Duration) string {
	var waits []string
	for _, src := range d.sources {
		switch {
		case src.ended():
		case src.paused && src.problem != nil:
			waits = append(waits, fmt.Sprintf("peer %s (%v)", d.s.nameOf(src.id), src.problem))
		default:
			waits = append(waits, "peer "+d.s.nameOf(src.id))
		}
	}
	slices.Sort(waits)
	if n := len(waits); n == 0 {
		waits = []string{"a peer that has it"}
	} else if n > maxNamed {
		waits = append(waits[:maxNamed], fmt.Sprintf("%d more", n-maxNamed))
	}
	return fmt.Sprintf("%s; nothing has come for %s: waiting for %s", d.arrivedSoFar(), still.Round(time.Second),
		strings.Join(waits, ", "))
}

// maxNamed is how many peers are named that are waited for.
const maxNamed = 3
