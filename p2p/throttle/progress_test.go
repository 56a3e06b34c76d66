package throttle

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// source sends n bytes after each pause.
type source struct {
	ctx   context.Context
	pause time.Duration
	n     int
}

func (s source) Read(p []byte) (int, error) {
	select {
	case <-time.After(s.pause):
		return min(len(p), s.n), nil
	case <-s.ctx.Done():
		return 0, context.Cause(s.ctx)
	}
}

func TestProgress(t *testing.T) {
	const span = 10 * time.Second
	for name, test := range map[string]struct {
		pause   time.Duration
		n       int
		rate    int64
		stalled time.Duration // 0: not within an hour
	}{
		"nothing":             {pause: 2 * time.Hour, n: 1, stalled: span},
		"a byte now and then": {pause: 2 * time.Second, n: 1, stalled: span},
		"just enough":         {pause: time.Second, n: MinRate * 5 / 4},
		"enough, in bursts":   {pause: span - time.Second, n: MinRate * 10},
		"our own limit":       {pause: time.Millisecond, n: 64, rate: 100},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := NewProgress(t.Context(), span)
				defer p.Stop()
				limit := New(test.rate)
				r := p.Reader(source{p.Context(), test.pause, test.n}, limit)
				start := time.Now()
				var err error
				for buf := make([]byte, 1<<20); err == nil && time.Since(start) < time.Hour; {
					_, err = r.Read(buf)
				}
				if test.stalled == 0 {
					if err != nil {
						t.Fatalf("after %s: %v", time.Since(start), err)
					}
					return
				}
				if !errors.Is(err, ErrStalled) || time.Since(start) != test.stalled {
					t.Fatalf("after %s: %v; want %v after %s", time.Since(start), err, ErrStalled, test.stalled)
				}
			})
		})
	}
}

func TestProgressIsSlowBeforeItStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProgress(t.Context(), 10*time.Second)
		defer p.Stop()
		start := time.Now()
		go p.Reader(source{p.Context(), time.Hour, 1}, nil).Read(make([]byte, 1))
		<-p.Slow()
		if got := time.Since(start); got != 5*time.Second {
			t.Errorf("slow after %s", got)
		}
		<-p.Context().Done()
		if got := time.Since(start); got != 10*time.Second {
			t.Errorf("stalled after %s", got)
		}
		p.Restart(10 * time.Second)
		select {
		case <-p.Slow():
			t.Error("it is slow from the start of a new span")
		default:
		}
	})
}

// What this host does with what has come is not the source's fault; and an answer may
// be given more time than what follows it.
func TestProgressCountsOnlyWhatIsAwaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProgress(t.Context(), 30*time.Second)
		defer p.Stop()
		wait := func(d time.Duration) {
			p.Await(func() (int, error) { time.Sleep(d); return 0, nil })
		}
		wait(29 * time.Second)
		p.Restart(10 * time.Second)
		time.Sleep(time.Hour)
		wait(9 * time.Second)
		time.Sleep(time.Hour)
		if err := p.Context().Err(); err != nil {
			t.Fatal(err)
		}
		wait(2 * time.Second)
		if err := context.Cause(p.Context()); !errors.Is(err, ErrStalled) {
			t.Fatal(err)
		}
		if n, err := p.Reader(io.LimitReader(zeros{}, 3), nil).Read(make([]byte, 5)); n != 3 || err != nil {
			t.Fatal(n, err)
		}
	})
}

// However many wait for the source at once, the span is that since the first of them began.
func TestProgressOfSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProgress(t.Context(), 10*time.Second)
		defer p.Stop()
		start := time.Now()
		for range 3 {
			go p.Await(func() (int, error) { <-p.Context().Done(); return 0, nil })
			time.Sleep(4 * time.Second)
		}
		if err := context.Cause(p.Context()); !errors.Is(err, ErrStalled) {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

// What our own limit makes wait is read a little at a time, and ends with the context.
func TestProgressWithinALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p := NewProgress(ctx, time.Second)
		defer p.Stop()
		r := p.Reader(zeros{}, New(1000))
		b := make([]byte, 1<<20)
		start := time.Now()
		if n, err := r.Read(b); n > 1000 || err != nil || time.Since(start) != 0 {
			t.Errorf("read are %d bytes, %v after %s", n, err, time.Since(start))
		}
		if err := Wait(ctx, r.(*reader).l, 15<<10); err != nil {
			t.Fatal(err)
		}
		start = time.Now()
		time.AfterFunc(time.Second/2, cancel)
		if _, err := r.Read(b); !errors.Is(err, context.Canceled) || time.Since(start) != time.Second/2 {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		// More than may pass at once passes in parts.
		start = time.Now()
		if err := Wait(t.Context(), New(1<<20), 10<<20); err != nil || time.Since(start) < 9*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
