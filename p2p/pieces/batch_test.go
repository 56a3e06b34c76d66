package pieces

import (
	"runtime"
	"sync"
	"testing"
)

// TestBatchShares: those who come while a run is under way share the next one.
func TestBatchShares(t *testing.T) {
	var b batch[int]
	var runs [][]int
	began, release := make(chan struct{}), make(chan struct{})
	run := func(jobs []*job[int]) {
		var values []int
		for _, j := range jobs {
			values = append(values, j.value)
		}
		runs = append(runs, values)
		if len(runs) == 1 {
			close(began)
			<-release
		}
	}
	var all sync.WaitGroup
	all.Go(func() { b.do(0, run) })
	<-began
	const late = 10
	for i := range late {
		all.Go(func() { b.do(1+i, run) })
	}
	for waiting := 0; waiting < late; runtime.Gosched() {
		b.mu.Lock()
		waiting = len(b.waiting)
		b.mu.Unlock()
	}
	close(release)
	all.Wait()
	if len(runs) != 2 || len(runs[0]) != 1 || len(runs[1]) != late {
		t.Errorf("runs were of %v; want one of the first, and one of all others", runs)
	}
}
