//go:build !testclock

package main

import "time"

// now is the clock by which imports, moves and deletes are dated.
var now = time.Now
