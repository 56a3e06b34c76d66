package pieces

import "sync"

// batch lets callers that arrive while one is at work share the next run: one
// fsync or one transaction then serves them all. There is no delay and no
// goroutine: the first to come after a run makes the next one for everybody.
type batch[T any] struct {
	mu      sync.Mutex
	waiting []*job[T]
	running sync.Mutex
}

// job is one caller's part of a run.
type job[T any] struct {
	value T
	err   error
	done  bool
}

// do has run called with a list that value is part of, by this goroutine or by
// another one, and returns what run left in the job's err.
func (b *batch[T]) do(value T, run func([]*job[T])) error {
	j := &job[T]{value: value}
	b.mu.Lock()
	b.waiting = append(b.waiting, j)
	b.mu.Unlock()

	b.running.Lock()
	defer b.running.Unlock()
	if j.done {
		return j.err
	}
	b.mu.Lock()
	jobs := b.waiting
	b.waiting = nil
	b.mu.Unlock()
	run(jobs)
	for _, j := range jobs {
		j.done = true
	}
	return j.err
}
