package pieces

import "sync"

// batch lets callers that arrive while one is at work share the next run: one
// fsync or one transaction then serves them all. There is no delay and no
// goroutine: the first to come after a run makes the next one for everybody.
type batch[T any] struct {
	// limit is how much one run takes in: jobs of that weight together, and
	// one heavier one. 0 is no limit.
	limit int

	mu      sync.Mutex
	waiting []*job[T]
	running chan struct{} // has an element while one is at work
}

// job is one caller's part of a run.
type job[T any] struct {
	value  T
	weight int
	err    error
	done   chan struct{} // closed when it was part of a run
}

// do has run called with a list that value is part of, by this goroutine or by
// another one, and returns what run left in the job's err.
func (b *batch[T]) do(value T, weight int, run func([]*job[T])) error {
	j := &job[T]{value: value, weight: weight, done: make(chan struct{})}
	b.mu.Lock()
	if b.running == nil {
		b.running = make(chan struct{}, 1)
	}
	b.waiting = append(b.waiting, j)
	b.mu.Unlock()
	for {
		select {
		case <-j.done:
			return j.err
		case b.running <- struct{}{}:
		}
		b.runOnce(run)
	}
}

// runOnce makes one run, for whoever waits.
func (b *batch[T]) runOnce(run func([]*job[T])) {
	defer func() { <-b.running }()
	jobs := b.take()
	if len(jobs) == 0 {
		return
	}
	run(jobs)
	for _, j := range jobs {
		close(j.done)
	}
}

// take returns the jobs of the next run, in the order in which they came. What is light does not
// wait for all that is heavy.
func (b *batch[T]) take() (jobs []*job[T]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var left []*job[T]
	total, heavy := 0, false
	for _, j := range b.waiting {
		switch {
		case b.limit == 0 || total+j.weight <= b.limit:
			total += j.weight
			jobs = append(jobs, j)
		case j.weight > b.limit && !heavy:
			heavy = true
			jobs = append(jobs, j)
		default:
			left = append(left, j)
		}
	}
	b.waiting = left
	return jobs
}
