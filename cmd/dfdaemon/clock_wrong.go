//go:build testclock

package main

import (
	"os"
	"time"
)

// now is a clock that is wrong by DFDAEMON_TEST_CLOCK, such as -5m: tests of several
// daemons build the program with the tag testclock. What libraries date is not.
var now = func() func() time.Time {
	ahead, _ := time.ParseDuration(os.Getenv("DFDAEMON_TEST_CLOCK"))
	return func() time.Time { return time.Now().Add(ahead) }
}()
