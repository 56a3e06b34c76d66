// Package memory keeps the memory of a daemon's process within what its control group
// allows, and gives back what a load has left.
package memory

import (
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"
)

// share is how much of what the control group allows Go's heap may take before the
// garbage collector works harder: the rest is for the kernel's buffers and mapped files.
const share = 0.75

// Limit has the garbage collector keep the process below what its control group allows,
// and returns that limit in bytes: 0 where there is none, or where GOMEMLIMIT says another.
func Limit() int64 {
	if os.Getenv("GOMEMLIMIT") != "" {
		return 0
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	limit := controlGroupLimit("/sys/fs/cgroup", string(groups))
	if limit == 0 {
		return 0
	}
	limit = int64(share * float64(limit))
	debug.SetMemoryLimit(limit)
	return limit
}

// controlGroupLimit returns the least number of bytes that the control groups of a process,
// as /proc/PID/cgroup has them, or those around them, allow; 0 is no limit. It knows both versions.
func controlGroupLimit(root, groups string) int64 {
	least := int64(math.MaxInt64)
	for line := range strings.Lines(groups) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		dir, file := root, "memory.max"
		if parts[1] == "memory" {
			dir, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		} else if parts[1] != "" {
			continue
		}
		for path := filepath.Clean("/" + parts[2]); ; path = filepath.Dir(path) {
			text, err := os.ReadFile(filepath.Join(dir, path, file))
			if err == nil {
				// Version 1 has a number beyond all memory where there is no limit, version 2 a word.
				if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 &&
					n < 1<<50 {
					least = min(least, n)
				}
			}
			if path == "/" {
				break
			}
		}
	}
	if least == math.MaxInt64 {
		return 0
	}
	return least
}

const (
	// interval is how often it is looked whether there is something to give back. Where
	// nothing came of it, it is tried less often, down to once in maxInterval: what
	// is in use can only be told from what is not by collecting garbage.
	interval    = 2 * time.Second
	maxInterval = 16 * time.Second
	// spare is how many bytes of heap a process may keep for what comes next. A process that has
	// allocated half of that since the last look is busy, and keeps all.
	spare = 32 << 20
)

// GiveBack returns memory to the operating system that a load has left, within seconds of
// its end: Go alone takes minutes. It ends when stop is called, which waits for it.
func GiveBack() (stop func()) {
	end := make(chan struct{})
	var working sync.WaitGroup
	working.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		before, pause, tried := read(), interval, time.Time{}
		for {
			select {
			case <-tick.C:
			case <-end:
				return
			}
			now := read()
			switch busy := now.allocated-before.allocated > spare/2; {
			case busy:
				pause = interval
			case now.held > spare && time.Since(tried) >= pause:
				runtime.GC() // pools let go of what they have with the second one
				debug.FreeOSMemory()
				after := read()
				if pause = min(2*pause, maxInterval); now.held-after.held > spare/2 {
					pause = interval
				}
				now, tried = after, time.Now()
			}
			before = now
		}
	})
	return sync.OnceFunc(func() {
		close(end)
		working.Wait()
	})
}

// usage is what a process has, in bytes.
type usage struct {
	held      int64 // of the heap, not given back to the operating system
	allocated int64 // since the process began
}

func read() usage {
	samples := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(samples)
	n := func(i int) int64 { return int64(samples[i].Value.Uint64()) }
	return usage{held: n(0) + n(1) + n(2), allocated: n(3)}
}
