package swarm

import "sync"

// late counts goroutines that nobody waits for but Close. Its zero value is ready for use.
type late struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n falls to 0; nil while nobody waits
}

// run runs f in a goroutine.
func (l *late) run(f func()) {
	l.mu.Lock()
	l.n++
	l.mu.Unlock()
	go func() {
		defer func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.n--; l.n == 0 && l.none != nil {
				close(l.none)
				l.none = nil
			}
		}()
		f()
	}()
}

// count returns how many there are.
func (l *late) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// wait waits until there is none.
func (l *late) wait() {
	l.mu.Lock()
	if l.n == 0 {
		l.mu.Unlock()
		return
	}
	if l.none == nil {
		l.none = make(chan struct{})
	}
	none := l.none
	l.mu.Unlock()
	<-none
}
