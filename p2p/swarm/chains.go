package swarm

import (
	"errors"
	"fmt"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// The hash chains that the sources of a download say the blob has, of which one is in use.
// All of it belongs to the loop of the download.

const (
	// maxTries is how often one hash chain is gone by.
	maxTries = 3
	// quietFor is how long a download may make no progress with one hash chain
	// while there are sources that have another.
	quietFor = 2 * time.Second
)

// chain is a size and a hash chain that some sources say the blob has.
type chain struct {
	links
	tried time.Time // when it was chosen last
	tries int       // how often
	came  int64     // bytes that had arrived with it at the last progress
}

// noteChain notes the chain of a source.
func (d *download) noteChain(src *source, l links) {
	src.stated, src.chain, src.failed, src.paused = true, l.hash(d.digest), 0, false
	if d.chains[src.chain] == nil {
		if len(d.chains) >= maxSources {
			d.exclude(src)
			return
		}
		d.chains[src.chain] = &chain{links: l}
	}
	switch {
	case d.sched == nil:
	case src.chain == d.active:
		d.offer(src)
	default:
		d.sched.RemoveSource(string(src.id))
		d.dispute()
	}
}

// choose begins with the chain that most sources have.
func (d *download) choose() {
	if best, ok := d.otherChain(); ok {
		d.activate(best)
	}
}

// otherChain returns the chain to try next: of those that a source has, one that
// was not tried, and of several the one that most whole sources have.
func (d *download) otherChain() (linksHash, bool) {
	votes := map[linksHash]int{}
	for _, src := range d.sources {
		if src.stated && !src.excluded && !src.gone && (d.sched == nil || src.chain != d.active) {
			votes[src.chain]++
			if src.have.Full() {
				votes[src.chain] += maxSources
			}
		}
	}
	var best linksHash
	found := false
	for h, n := range votes {
		a, b := d.chains[h], d.chains[best]
		if a == nil || a.tries == maxTries {
			continue
		}
		if !found || a.tried.Before(b.tried) || a.tried.Equal(b.tried) && n > votes[best] {
			best, found = h, true
		}
	}
	return best, found
}

// activate goes on with a chain: what has arrived is verified with it.
func (d *download) activate(h linksHash) {
	c := d.chains[h]
	c.tried, c.tries, c.came = time.Now(), c.tries+1, 0
	for _, r := range d.requests {
		r.cancel(errUseless)
	}
	clear(d.requests)
	if err := d.partial.Use(d.ctx, c.size, c.chain); err != nil {
		if d.ctx.Err() != nil {
			return
		}
		err = fmt.Errorf("fetch %s: %w", d.digest, err)
		if errors.Is(err, p2p.ErrNoSpace) && (d.sched == nil || c.size != d.chains[d.active].size) {
			// The size may be a lie: another chain may fit.
			d.noRoom, c.tries = err, maxTries
			return
		}
		if !errors.Is(err, digest.ErrMismatch) && !errors.Is(err, digest.ErrInvalid) {
			d.cancel(err)
			return
		}
		delete(d.chains, h)
		for _, src := range d.sources {
			if src.stated && src.chain == h {
				d.caught(src, err)
			}
		}
		return
	}
	table := d.partial.Table()
	have := schedule.NewSet(table.Pieces())
	for i := range table.Pieces() {
		if d.partial.Held(i) {
			have.Add(i)
		}
	}
	first := d.sched == nil
	d.active = h

	d.sched = schedule.NewDownload(table.Pieces(), have, schedule.Limits{Requests: d.s.opts.MaxRequests})
	d.prefer = schedule.NewSet(table.Pieces())
	for _, src := range d.sources {
		src.failed, src.paused, src.dry = 0, false, false
		d.offer(src)
	}
	d.progress, d.lastPiece = time.Now(), time.Now()
	d.label()
	d.dispute()
	d.work(table, h, have)
	if first && d.s.opts.Mode == Full {
		d.s.network.Announce(d.keys()...)
	}
	if !first {
		d.s.uploads.drop(d.digest)
	}
}

// dispute has the pieces fetched first that tell which of two chains is false:
// from the last state in which they differ only one leads on.
func (d *download) dispute() {
	mine := d.chains[d.active]
	for h, other := range d.chains {
		if h == d.active || other.size != mine.size {
			continue
		}
		size := digest.ChainSize(d.digest.Algorithm(), mine.size)
		n := d.sched.Held().Len()
		if n < 2 {
			continue
		}
		state := size / (n - 1)
		for i := n - 2; i >= 0; i-- {
			if string(mine.chain[i*state:(i+1)*state]) != string(other.chain[i*state:(i+1)*state]) {
				d.preferRange(i, i+1)
				break
			}
		}
	}
}

// preferRange has pieces fetched before others.
func (d *download) preferRange(from, to int) {
	for i := from; i <= to; i++ {
		d.prefer.Add(i)
	}
	d.prefer.AndNot(d.sched.Held())
	d.sched.Prefer(d.prefer)
}
