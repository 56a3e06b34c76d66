package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
	"github.com/dfcache/dfcache/p2p/throttle"
)

// The requests of a download for pieces.

// errUseless ends a request of which nothing is wanted any more.
var errUseless = errors.New("it has come from another peer")

// request is one for a piece that is under way.
type request struct {
	cancel context.CancelCauseFunc
	pace   *throttle.Progress
	came   atomic.Int64 // bytes of the piece
}

// request asks for a piece.
func (d *download) request(req schedule.Request) {
	src := d.sources[peer.ID(req.Source)]
	ctx, cancel := context.WithCancelCause(d.ctx)
	// A busy peer lets a request wait for its turn. One that has failed is asked soon again instead.
	turn := 3 * d.s.opts.StallTimeout
	if src.failed > 0 {
		turn = d.s.opts.StallTimeout
	}
	r := &request{cancel: cancel, pace: throttle.NewProgress(ctx, turn)}
	d.requests[req.ID] = r
	active, task, sched := d.active, src.task, d.sched
	d.calls.Go(func() {
		defer cancel(nil)
		defer r.pace.Stop()
		var have *schedule.Set
		piece, n, err := d.transfer(r, src.id, task, &pieceRequest{links: active, want: req.Want},
			func(reply *pieceReply) {
				have = reply.have
				d.post(func() {
					if d.sched != sched {
						return
					}
					src.have, src.dry = reply.have, false
					for _, h := range reply.hints {
						d.follow(h)
					}
					if !sched.Answered(req.ID, reply.piece, reply.have) && reply.piece >= 0 {
						cancel(errUseless)
					}
				})
			})
		d.post(func() {
			if d.requests[req.ID] == r {
				delete(d.requests, req.ID)
			}
			if d.sched == sched {
				d.done(req, src, have, piece, n, err)
			}
		})
	})
}

// done takes in how a request ended, and what the source had when it answered: by now it may
// have said that the blob has another size.
func (d *download) done(req schedule.Request, src *source, have *schedule.Set, piece int, n int64, err error) {
	switch {
	case err == nil && piece < 0:
		// It had none of them any more, or never. One that goes on saying that it
		// has some is not asked for ever.
		if req.Want.Intersects(have) {
			d.failed(src, errors.New("it has what is wanted, and sends none"))
		}
	case err == nil:
		src.failed = 0
		if src.paused { // another request had failed
			src.paused = false
			d.offer(src)
		}
		d.progress, d.lastPiece = time.Now(), time.Now()
		src.stated, src.chain = true, d.active // it has agreed
		useless := d.sched.Done(req.ID)
		d.arrived(src.id, piece, n)
		for _, id := range useless {
			if r := d.requests[id]; r != nil {
				r.cancel(errUseless)
			}
		}
	default:
		d.sched.Cancel(req.ID)
		if !errors.Is(err, pieces.ErrStale) {
			d.failed(src, err)
		}
	}
}

// errLength says that an answer is not as long as it was said to be.
var errLength = errors.New("the answer has another length than promised")

// transfer sends one request for a piece, and takes in what comes. It returns
// the piece, or -1, and how many bytes have come.
func (d *download) transfer(
	r *request, p peer.ID, task p2p.Task, req *pieceRequest, answered func(*pieceReply),
) (piece int, n int64, err error) {
	s := d.s
	ctx := r.pace.Context()
	explain := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	// What only waits goes over the connection that is there, instead of one
	// more that would have to be made.
	over := s.client.http
	if req.news {
		over = s.client.streams
	}
	start := time.Now()
	var resp *http.Response
	if _, err := r.pace.Await(func() (_ int, err error) {
		resp, err = s.client.do(ctx, over, p, http.MethodPost, pathPieces, taskQuery(task), req.append(nil))
		return 0, err
	}); err != nil {
		return -1, 0, explain(err)
	}
	defer resp.Body.Close()
	r.pace.Restart(s.opts.StallTimeout)
	body := &counted{r: r.pace.Reader(resp.Body, s.limit)}
	reply, err := readPieceReply(body, req.want.Len())
	if err != nil {
		if isShort(err) {
			err = body.short()
		}
		return -1, 0, explain(err)
	}
	if !req.news {
		s.peers.get(p).answered(time.Since(start))
	}
	if reply.piece >= 0 && (req.news || !req.want.Has(reply.piece)) {
		return -1, 0, fmt.Errorf("%w: piece %d, which was not asked for", errMessage, reply.piece)
	}
	answered(reply)
	if reply.piece < 0 {
		return -1, 0, nil
	}
	begin, end := d.partial.Table().Bounds(reply.piece)
	length := max(end-begin, 0) // a chain that replaces this one may have fewer pieces
	if resp.ContentLength >= 0 && resp.ContentLength != body.n+length {
		return -1, 0, fmt.Errorf("%w: %d bytes for a piece of %d", errLength, resp.ContentLength-body.n, length)
	}
	d.held.Add(1) // it is not the peer's fault when there is no memory
	buf, err := s.buffers.get(ctx, int(length))
	d.held.Add(-1)
	if err != nil {
		return -1, 0, explain(err)
	}
	defer s.buffers.put(buf)
	before := body.n
	body.came = &r.came
	err = d.partial.Receive(reply.piece, body, buf)
	n = body.n - before
	s.metrics.received.Add(float64(n))
	if isShort(err) {
		err = fmt.Errorf("%w: %d bytes of %d", body.short(), n, length)
	}
	if err != nil {
		return -1, n, explain(err)
	}
	s.peers.get(p).addGave(n)
	return reply.piece, n, nil
}

// errGone says that a connection has ended in the middle of an answer.
var errGone = errors.New("the connection broke off")

func isShort(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// counted counts what is read of a body.
type counted struct {
	r    io.Reader
	n    int64
	came *atomic.Int64 // counts, too, where it is not nil
	err  error         // of the last Read
}

func (c *counted) Read(p []byte) (n int, err error) {
	n, c.err = c.r.Read(p)
	c.n += int64(n)
	if c.came != nil {
		c.came.Add(int64(n))
	}
	return n, c.err
}

// short is why a body is too short: its sender has ended it so, or the connection broke off.
func (c *counted) short() error {
	if errors.Is(c.err, io.EOF) {
		return errLength
	}
	return errGone
}
