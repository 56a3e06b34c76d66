package main

import (
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// hasTerminal reports whether a progress bar would be seen.
func (a *app) hasTerminal() bool { return !a.noTTY && term.IsTerminal(int(a.stderr.Fd())) }

// progress begins to show how far a copy of total bytes is; -1 is an unknown
// total. It returns what is to be told the count of bytes done, which is nil
// where nothing is shown, and what takes the bar away at the end.
func (a *app) progress(label string, total int64) (set func(done int64), end func()) {
	if !a.hasTerminal() {
		return nil, func() {}
	}
	bar := progressbar.NewOptions64(total,
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
