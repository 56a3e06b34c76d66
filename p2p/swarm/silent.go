package swarm

import (
	"errors"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// A peer that vanishes without a word, as a host does whose network or power goes, stays
// connected until libp2p notices, and announced for longer. A peer that has not answered a
// question within the lookup timeout is silent: nobody waits for it any more, and it is
// asked in the background until it answers, or is gone.

const (
	// suspicious is how long a peer may take to answer before it is asked, in the
	// background, whether it does at all.
	suspicious = 250 * time.Millisecond
	// probePause is after what time a silent peer is asked again. It doubles up to
	// maxProbePause, or maxAwayPause for one that is not connected.
	probePause    = 250 * time.Millisecond
	maxProbePause = 10 * time.Second
	maxAwayPause  = 5 * time.Minute
	// forgetSilence is after what time a peer that is not connected is asked no more. By
	// then nobody believes what it has announced.
	forgetSilence = 20 * time.Minute
)

// suspect asks a peer in the background whether it answers, again and again until it
// does. silent says that it has not.
func (q *questions) suspect(p peer.ID, silent bool) {
	e := q.peers.get(p)
	if silent {
		q.markSilent(p)
	}
	if !e.beginProbe() {
		return
	}
	q.late.run(func() {
		defer e.endProbe()
		for pause := probePause; q.ping(p) != nil; pause *= 2 {
			q.markSilent(p)
			connected := slices.Contains(q.network.Connected(), p)
			if pause = min(pause, maxAwayPause); connected {
				pause = min(pause, maxProbePause)
			}
			select {
			case <-time.After(pause):
			case <-q.ctx.Done():
				return
			}
			if e.silence() > forgetSilence && !connected {
				break
			}
		}
		e.heard()
		for _, d := range e.takeOwed() {
			q.deletes.tell(p, d)
		}
	})
}

func (q *questions) markSilent(p peer.ID) {
	if e := q.peers.get(p); e.quiet() {
		q.log.Info("a peer does not answer: nobody waits for it until it does", "peer", p.String(),
			"address", e.lastAddress())
	}
}

// ping asks a peer whether it answers. The error is errNoAnswer where it does not; one
// that can't be reached, and is known to be so at once, answers so far.
func (q *questions) ping(p peer.ID) error {
	ctx, cancel := q.within(q.ctx)
	defer cancel()
	err := q.network.Connect(ctx, q.network.Addresses(p))
	if err == nil {
		_, err = q.client.hello(ctx, p)
	}
	if err != nil && ctx.Err() != nil && q.ctx.Err() == nil || errors.Is(err, errNoAnswer) {
		return errNoAnswer
	}
	return nil
}
