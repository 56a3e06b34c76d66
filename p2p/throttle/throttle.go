// Package throttle bounds how many bytes move in a second, for all who move them: from above,
// by a limiter, and from below, by a [Progress].
//
// It promises no compatibility.
package throttle

import (
	"context"

	"golang.org/x/time/rate"
)

// New returns a limiter of bytes in a second; nil, which is no limit, where that is not
// above 0.
func New(perSecond int64) *rate.Limiter {
	if perSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(perSecond), int(max(min(perSecond/20, 256<<10), 16<<10)))
}

// Step returns how many bytes to move at a time, of n: what may pass within about a second, so
// that the other end sees them come, and this one is not held up for long.
func Step(l *rate.Limiter, n int) int {
	if l == nil {
		return n
	}
	return min(n, l.Burst(), max(int(l.Limit()), 1))
}

// Wait waits until n bytes may pass l, which may be nil, or ctx ends.
func Wait(ctx context.Context, l *rate.Limiter, n int) error {
	for l != nil && n > 0 {
		part := min(n, l.Burst())
		if err := l.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
