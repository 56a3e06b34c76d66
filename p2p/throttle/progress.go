package throttle

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// MinRate is how many bytes a second a source has to send, on average over the
// span of a [Progress].
const MinRate = 1 << 10

// ErrStalled says that a source has sent nothing, or less than [MinRate], for too long.
var ErrStalled = errors.New("it sent nothing, or next to nothing, for too long")

// Progress demands that a source sends bytes: at least [MinRate] on average in every
// span of time that it is waited for. One byte now and then is no progress. Time that
// passes outside of Await, while this host waits for its own limits, its disk or its
// memory, is not the source's. It is safe for concurrent use.
type Progress struct {
	ctx context.Context
	end context.CancelCauseFunc

	mu      sync.Mutex
	slow    chan struct{} // closed where isSlow
	span    time.Duration
	came    int64         // bytes, since the span began
	waited  time.Duration // since it began, but for what goes on
	waiting int           // calls of Await
	since   time.Time     // when the first of them began
	timer   *time.Timer   // fires while one is under way, at times when nothing is due
	isSlow  bool
}

// NewProgress returns a Progress with a context that ends with ctx, and with the cause
// [ErrStalled] where the source does not keep to it. The caller calls Stop.
func NewProgress(ctx context.Context, span time.Duration) *Progress {
	p := &Progress{slow: make(chan struct{}), span: span}
	p.ctx, p.end = context.WithCancelCause(ctx)
	return p
}

// Context returns the context for what is done with the source.
func (p *Progress) Context() context.Context { return p.ctx }

// Slow returns a channel that is closed when half of a span has passed without the bytes
// of a whole one: time to ask another source, too. It stays closed; after a [Progress.Restart]
// there is another one.
func (p *Progress) Slow() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slow
}

// Stop ends the context, and lets go of the timer.
func (p *Progress) Stop() {
	p.end(nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
}

// Restart begins a new span of another length.
func (p *Progress) Restart(span time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.span = span
	if p.isSlow {
		p.isSlow, p.slow = false, make(chan struct{})
	}
	p.begin()
}

// begin begins a new span. p.mu is held.
func (p *Progress) begin() {
	p.came, p.waited, p.since = 0, 0, time.Now()
	p.arm()
}

// arm sets the timer to the next moment at which something is due. p.mu is held.
func (p *Progress) arm() {
	if p.waiting == 0 || p.ctx.Err() != nil {
		return
	}
	due := p.span
	if !p.isSlow {
		due = p.span / 2
	}
	due -= p.waited + time.Since(p.since)
	if p.timer == nil {
		p.timer = time.AfterFunc(due, p.look)
	} else {
		p.timer.Reset(due)
	}
}

// look looks at the clock.
func (p *Progress) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == 0 {
		return
	}
	waited := p.waited + time.Since(p.since)
	if !p.isSlow && waited >= p.span/2 {
		p.isSlow = true
		close(p.slow)
	}
	if waited >= p.span {
		p.end(ErrStalled)
	}
	p.arm()
}

// Await calls f, which waits for the source and returns how many bytes have come. It
// returns what f does.
func (p *Progress) Await(f func() (int, error)) (int, error) {
	p.mu.Lock()
	if p.waiting++; p.waiting == 1 {
		p.since = time.Now()
		p.arm()
	}
	p.mu.Unlock()
	n, err := f()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting--; p.waiting == 0 {
		p.waited += time.Since(p.since)
	}
	if p.came += int64(n); n > 0 && p.came >= int64(p.span.Seconds()*MinRate) {
		p.begin()
	}
	return n, err
}

// Reader returns a reader of what the source sends. It awaits each Read of r, and lets
// the bytes pass l, which may be nil, when they have come.
func (p *Progress) Reader(r io.Reader, l *rate.Limiter) io.Reader { return &reader{p, r, l} }

type reader struct {
	p *Progress
	r io.Reader
	l *rate.Limiter
}

func (r *reader) Read(b []byte) (int, error) {
	b = b[:Step(r.l, len(b))]
	n, err := r.p.Await(func() (int, error) { return r.r.Read(b) })
	if e := Wait(r.p.ctx, r.l, n); e != nil && err == nil {
		err = e
	}
	return n, err
}
