package swarm

import (
	"context"
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
func (s *Swarm) suspect(p peer.ID, silent bool) {
	e := s.peers.get(p)
	if silent {
		s.markSilent(p)
	}
	if !e.beginProbe() {
		return
	}
	s.late.run(func() {
		defer e.endProbe()
		for pause := probePause; s.ping(p) != nil; pause *= 2 {
			s.markSilent(p)
			connected := s.isConnected(p)
			if pause = min(pause, maxAwayPause); connected {
				pause = min(pause, maxProbePause)
			}
			select {
			case <-time.After(pause):
			case <-s.ctx.Done():
				return
			}
			if e.silence() > forgetSilence && !connected {
				break
			}
		}
		e.heard()
		for _, d := range e.takeOwed() {
			s.tell(p, d)
		}
	})
}

func (s *Swarm) markSilent(p peer.ID) {
	if e := s.peers.get(p); e.quiet() {
		s.log.Info("a peer does not answer: nobody waits for it until it does", "peer", p.String(),
			"address", e.lastAddress())
	}
}

// ping asks a peer whether it answers. The error is errNoAnswer where it does not; one
// that can't be reached, and is known to be so at once, answers so far.
func (s *Swarm) ping(p peer.ID) error {
	ctx, cancel := s.within(s.ctx)
	defer cancel()
	err := s.network.Connect(ctx, s.network.Addresses(p))
	if err == nil {
		_, err = s.client.hello(ctx, p)
	}
	if err != nil && ctx.Err() != nil && s.ctx.Err() == nil || errors.Is(err, errNoAnswer) {
		return errNoAnswer
	}
	return nil
}

func (s *Swarm) isConnected(p peer.ID) bool {
	return slices.Contains(s.network.Connected(), p)
}

// find asks one peer what it has.
func (s *Swarm) find(ctx context.Context, p peer.ID, req *findRequest) (reply *findReply, err error) {
	err = s.ask(ctx, p, func(ctx context.Context) error {
		reply, err = s.client.find(ctx, p, req)
		return err
	})
	return reply, err
}

// ask asks a peer within the lookup timeout. One that does not answer is silent then.
func (s *Swarm) ask(ctx context.Context, p peer.ID, do func(context.Context) error) error {
	ctx, cancel := s.within(ctx)
	defer cancel()
	err := do(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errNoAnswer) {
		s.suspect(p, true)
	}
	return err
}
