package swarm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// The sources of a download: the peers that have something of the blob, and what becomes of those that fail.
// All of it belongs to the loop of the download.

const (
	// maxSources is how many peers one download asks.
	maxSources = 32
	// searchInterval is how often a download looks for further sources.
	searchInterval = 15 * time.Second
	// searchPause is the time between two searches when no source can be asked.
	searchPause = time.Second
	// maxFailed is how often in a row a source may fail before it makes room for another.
	maxFailed = 5
)

// source is a peer that has pieces.
type source struct {
	id       peer.ID
	task     p2p.Task
	size     int64 // of the blob, as it says
	have     *schedule.Set
	stated   bool // chain is what it has said
	chain    linksHash
	asking   bool      // for its chain
	news     bool      // a request for news is under way
	failed   int       // in a row
	paused   bool      // after a failure
	away     time.Time // until when
	problem  error     // of the last failure
	dry      bool      // it has nothing that is missing, and expects nothing
	gone     bool      // it has said that it does not have the blob any more
	excluded bool      // for good, as far as this blob goes
}

// ended reports whether there is nothing to be had from a source, nor will be as far as it knows.
func (s *source) ended() bool { return s.dry || s.gone || s.excluded }

// search looks for further sources, and asks those again that had no more to give.
func (d *download) search() {
	d.searching, d.searched = true, time.Now()
	d.searches++
	d.nextSearch = time.Now().Add(min(searchInterval, 100*time.Millisecond<<min(d.searches, 8)))
	tasks := d.wanted()
	var known []peer.ID // which tell what they have with every answer
	for id, src := range d.sources {
		if !src.gone && !src.paused {
			known = append(known, id)
		}
	}
	d.calls.Go(func() {
		var missed error
		for _, t := range tasks {
			l := d.s.questions.lookup(d.ctx, &findRequest{Tasks: []taskRef{taskRef(t)}}, taskKey(t), false, known...)
			found := false // that those known have it counts as long as they can be asked: see hopeless
			for a := range l.answers {
				if state := a.reply.Tasks[0]; d.s.deletes.accept(d.ctx, a.peer, t, state) {
					found = true
					d.post(func() { d.addSource(a.peer, t, state) })
				} else {
					d.post(func() { d.hasNothing(a.peer) })
				}
			}
			if found {
				l.end()
			} else {
				missed = l.missed(t.String())
			}
		}
		d.post(func() {
			d.searching = false
			d.missed = missed
		})
	})
}

// addSource takes in what a peer says that it has.
func (d *download) addSource(p peer.ID, t p2p.Task, state *taskState) {
	have, err := state.pieces()
	if err != nil {
		return
	}
	_ = d.addTask(infoOf(t, state)) // when it is over, that is known already
	src := d.sources[p]
	if src == nil {
		if len(d.sources) >= maxSources && !d.makePlace() {
			return
		}
		src = &source{id: p}
		d.sources[p] = src
	}
	if src.excluded || src.dry {
		return // what it says of itself in general, it can't give: it is asked for news
	}
	src.gone = false
	if src.size != state.Size {
		src.stated = false
	}
	src.task, src.size, src.have = t, state.Size, have
	d.offer(src)
	for _, h := range state.Hints {
		d.follow(h)
	}
}

// makePlace forgets a source that gives nothing.
func (d *download) makePlace() bool {
	for id, src := range d.sources {
		if src.ended() && !src.excluded || src.failed > maxFailed {
			if d.sched != nil {
				d.sched.RemoveSource(string(id))
			}
			delete(d.sources, id)
			return true
		}
	}
	return false
}

// recall begins with those that have told of a task just now. For a small blob no others
// are looked for at once.
func (d *download) recall(t p2p.Task) {
	told := d.s.recent.take(t)
	for _, h := range told {
		state := *h.state
		state.Hints = nil
		d.addSource(h.peer, t, &state)
		if state.Size <= smallBlob {
			d.nextSearch = time.Now().Add(tickInterval)
		}
	}
	for _, h := range told { // by now it is known which need not be asked
		for _, hint := range h.state.Hints {
			d.follow(hint)
		}
	}
}

// hasNothing notes that a peer has just said so.
func (d *download) hasNothing(p peer.ID) {
	maps.DeleteFunc(d.nothing, func(_ peer.ID, said time.Time) bool { return time.Since(said) > searchPause })
	d.nothing[p] = time.Now()
}

// follow asks a peer that another one has named, unless a search asks it, or it has just
// said that it has nothing.
func (d *download) follow(h hint) {
	info, err := h.addrInfo()
	if err != nil || info.ID == d.s.network.Self() || d.hinted[info.ID] || d.sources[info.ID] != nil ||
		len(d.sources)+len(d.hinted) >= 2*maxSources || d.s.peers.get(info.ID).isShunned() {
		return
	}
	if time.Since(d.nothing[info.ID]) <= searchPause {
		return
	}
	if connected := d.s.network.Connected(); (d.searching || time.Now().After(d.nextSearch)) &&
		len(connected) <= maxAsked && slices.Contains(connected, info.ID) {
		return
	}
	d.hinted[info.ID] = true
	t := d.wanted()[0]
	d.calls.Go(func() {
		ctx, cancel := d.s.questions.within(d.ctx)
		defer cancel()
		var state *taskState
		if err := d.s.network.Connect(ctx, info); err == nil {
			if reply, err := d.s.client.find(ctx, info.ID, &findRequest{Tasks: []taskRef{taskRef(t)}}); err == nil {
				state = reply.Tasks[0]
			}
		}
		has := d.s.deletes.accept(ctx, info.ID, t, state)
		d.post(func() {
			delete(d.hinted, info.ID)
			if has {
				d.addSource(info.ID, t, state)
			} else {
				d.hasNothing(info.ID)
			}
		})
	})
}

// offer gives a source to the scheduler, where it has the chain in use, or may
// have it; and asks for its chain, where that is of interest.
func (d *download) offer(src *source) {
	if src.excluded || src.gone || src.paused {
		return
	}
	asked := 0
	for _, other := range d.sources {
		if other.asking || other.stated {
			asked++
		}
	}
	// The chain is taken from two sources, and from those that have another one.
	differs := d.sched != nil && src.have.Len() != d.sched.Held().Len()
	if chain := digest.ChainSize(d.digest.Algorithm(), src.size); !src.stated && chain == 0 {
		d.noteChain(src, links{size: src.size}) // of one piece there is nothing to ask
		return
	}
	if !src.stated && !src.asking && (d.sched == nil && asked < 4 || asked < 2 || differs) {
		d.askLinks(src)
	}
	if d.sched != nil && !differs && (!src.stated || src.chain == d.active) {
		d.sched.SetSource(string(src.id), src.have)
	}
}

// askLinks asks a source for its chain.
func (d *download) askLinks(src *source) {
	src.asking = true
	id, task := src.id, src.task
	d.calls.Go(func() {
		pace := throttle.NewProgress(d.ctx, d.s.opts.StallTimeout)
		defer pace.Stop()
		l, err := d.s.client.links(pace, id, task)
		d.post(func() {
			src.asking = false
			if err != nil {
				d.failed(src, err)
				return
			}
			d.noteChain(src, l)
		})
	})
}

// failed decides what becomes of a source after an error.
func (d *download) failed(src *source, err error) {
	if d.ctx.Err() != nil || errors.Is(err, errUseless) {
		return
	}
	src.problem = err
	var refused *statusError
	switch {
	case errors.Is(err, digest.ErrMismatch), errors.Is(err, errMessage), errors.Is(err, errLength):
		// It has said which chain it goes by, or how long the piece is, and does not hold to it.
		d.caught(src, err)
	case errors.Is(err, p2p.ErrNoSpace), errors.Is(err, os.ErrPermission):
		d.cancel(fmt.Errorf("fetch %s: %w", d.digest, err)) // it is ours
	case errors.As(err, &refused):
		d.refused(src, refused)
	default:
		// It may have gone, or be stopped or slow, or the network, or this host may have been: it may come back.
		d.pause(src, 200*time.Millisecond<<min(src.failed, 4))
		d.s.log.Debug("a source failed", "digest", d.digest, "peer", src.id.String(), "error", err)
	}
}

// refused takes in what a source does not want to do.
func (d *download) refused(src *source, e *statusError) {
	switch e.code {
	case http.StatusConflict:
		// It has another chain.
		if d.sched != nil {
			d.sched.RemoveSource(string(src.id))
		}
		var h linksHash
		if b, err := hex.DecodeString(e.text); err == nil && len(b) == len(h) {
			h = linksHash(b)
		}
		src.stated = d.chains[h] != nil && h != d.active
		src.chain, src.dry = h, false
		if !src.stated {
			d.pause(src, tickInterval) // and then it is asked which
		}
	case http.StatusNotFound:
		// It may have it again later, which a search tells.
		src.gone, d.lastEnd = true, time.Now()
		if d.sched != nil {
			d.sched.RemoveSource(string(src.id))
		}
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		d.pause(src, 500*time.Millisecond)
	default:
		if e.code >= 500 {
			d.pause(src, 200*time.Millisecond<<min(src.failed, 4))
			return
		}
		d.exclude(src)
	}
}

// pause leaves a source alone for a while.
func (d *download) pause(src *source, length time.Duration) {
	src.failed++
	src.paused, src.away = true, time.Now().Add(length)
	if d.sched != nil {
		d.sched.RemoveSource(string(src.id))
	}
}

// exclude asks a source for nothing more of this blob.
func (d *download) exclude(src *source) {
	src.excluded, d.lastEnd = true, time.Now()
	if d.sched != nil {
		d.sched.RemoveSource(string(src.id))
	}
}

// caught excludes a source that was caught, and has it shunned for a while.
func (d *download) caught(src *source, err error) {
	src.problem = err
	d.exclude(src)
	d.s.caught(src.id, d.digest, err)
}

// askNews asks a source to tell when it has one of the pieces that are wanted.
func (d *download) askNews(src *source, want *schedule.Set) {
	src.news = true
	id, task, active, sched := src.id, src.task, d.active, d.sched
	d.calls.Go(func() {
		r := &request{pace: throttle.NewProgress(d.ctx, maxNewsWait+d.s.opts.StallTimeout)}
		defer r.pace.Stop()
		var have *schedule.Set
		began := time.Now()
		_, _, err := d.transfer(r, id, task, &pieceRequest{links: active, news: true, want: want},
			func(reply *pieceReply) { have = reply.have })
		none := err == nil && (have == nil || !have.Intersects(want))
		// A peer that expects more keeps the request waiting.
		dry := none && time.Since(began) < maxNewsWait/2
		if none {
			// A peer that answers at once, again and again, is not to keep us busy.
			t := time.NewTimer(tickInterval)
			defer t.Stop()
			select {
			case <-t.C:
			case <-d.ctx.Done():
			}
		}
		d.post(func() {
			src.news = false
			if d.sched != sched {
				return
			}
			if err != nil {
				d.failed(src, err)
				return
			}
			src.failed, src.paused, src.have = 0, false, have
			if dry && !src.dry {
				d.lastEnd = time.Now()
			}
			src.dry = dry
			d.offer(src)
		})
	})
}
