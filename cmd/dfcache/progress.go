package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// hasTerminal reports whether a progress bar would be seen.
func (a *app) hasTerminal() bool { return !a.noTTY && term.IsTerminal(int(a.stderr.Fd())) }

// progress begins to show how far a copy is: by a bar on a terminal, else by a line now and then.
// size is asked once for its bytes, -1 where they are not known. It
// returns what is to be told the count of bytes done, and what ends it.
func (a *app) progress(
	ctx context.Context, label string, size func(context.Context) int64,
) (set func(done int64), end func()) {
	if !a.hasTerminal() {
		var done atomic.Int64
		total := sync.OnceValue(func() int64 { return size(ctx) })
		return done.Store, nowAndThen(ctx, a.stderr, func() string {
			text := fmt.Sprintf("dfcache: %s: %s", label, human(done.Load()))
			if all := total(); all > 0 {
				text += fmt.Sprintf(" of %s (%d %%)", human(all), int64(float64(done.Load())/float64(all)*100))
			}
			return text
		})
	}
	bar := progressbar.NewOptions64(size(ctx),
		progressbar.OptionSetWriter(a.stderr),
		progressbar.OptionSetDescription(label),
		progressbar.OptionShowBytes(true),
		progressbar.OptionShowCount(),
		progressbar.OptionUseIECUnits(true),
		progressbar.OptionSetWidth(20),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine of its own
		// It is also the time before there is a bar at all: most operations
		// are over by then.
		progressbar.OptionThrottle(300*time.Millisecond),
	)
	bar.Reset() // starts the clock
	return func(done int64) { _ = bar.Set64(done) }, func() { _ = bar.Clear() }
}

// lineInterval is the time between two lines that say how far something is.
const lineInterval = 10 * time.Second

// nowAndThen writes lines to w until end is called or ctx ends. Nothing waits for them to be read.
func nowAndThen(ctx context.Context, w io.Writer, line func() string) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		tick := time.NewTicker(lineInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if text := line(); ctx.Err() == nil {
				fmt.Fprintln(w, text)
			}
		}
	}()
	return cancel
}
