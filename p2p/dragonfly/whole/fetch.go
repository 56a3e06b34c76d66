package whole

import (
	"context"
	"errors"
	"io"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// fetch is one blob that is on its way, for all who want it.
type fetch struct {
	task    p2p.Task
	cancel  context.CancelCauseFunc
	waiting int           // callers; guarded by Engine.mu
	done    chan struct{} // closed when nothing of it is left
	err     error         // once done is closed
}

var errUnwanted = errors.New("nobody waits for it any more")

// fetchMissing fetches what the store has not, for the reason missing. Where nobody else
// has it either, damage is what is reported.
func (e *Engine) fetchMissing(ctx context.Context, task p2p.Task, missing error) error {
	err := e.fetch(ctx, task)
	if errors.Is(missing, digest.ErrCorrupt) && (errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable)) {
		return missing
	}
	return err
}

// fetch brings a task's blob here from the network, or replaces it where it is damaged.
// It returns when the task is stored.
func (e *Engine) fetch(ctx context.Context, task p2p.Task) error {
	if err := task.Validate(); err != nil {
		return err
	}
	for {
		f := e.join(task)
		select {
		case <-f.done:
		case <-ctx.Done():
		}
		e.leave(f)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		// It may have been for another tag, or have ended as this caller came.
		if f.task == task && !errors.Is(f.err, errUnwanted) {
			return f.err
		}
	}
}

// join returns the fetch of a task's blob, and begins one where there is none. The
// caller leaves it.
func (e *Engine) join(task p2p.Task) *fetch {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.fetches[task.Digest]
	if f == nil {
		f = &fetch{task: task, done: make(chan struct{})}
		var ctx context.Context
		ctx, f.cancel = context.WithCancelCause(e.ctx)
		e.fetches[task.Digest] = f
		e.running.Go(func() {
			if !e.whole(ctx, task) { // it may have come, or have been mended, just before
				f.err = e.network.Bring(ctx, task)
			}
			f.cancel(nil)
			e.mu.Lock()
			delete(e.fetches, task.Digest)
			e.mu.Unlock()
			close(f.done)
		})
	}
	f.waiting++
	return f
}

// leave takes back a join. The last one ends the fetch.
func (e *Engine) leave(f *fetch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.waiting--; f.waiting == 0 {
		f.cancel(errUnwanted)
	}
}

// whole reports whether a task is here, without damage.
func (e *Engine) whole(ctx context.Context, task p2p.Task) bool {
	blob, err := e.store.OpenForPeers(ctx, task)
	if err != nil {
		return false
	}
	defer blob.Close()
	return blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil) == nil
}
