package cluster

import (
	"context"
	"errors"
	"fmt"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
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

// fetch brings a task's blob here from peers, or replaces it where it is damaged. It
// returns when the task is stored.
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
		e.part(f)
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
// caller parts from it.
func (e *Engine) join(task p2p.Task) *fetch {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.fetches[task.Digest]
	if f == nil {
		f = &fetch{task: task, done: make(chan struct{})}
		var ctx context.Context
		ctx, f.cancel = context.WithCancelCause(e.ctx)
		e.fetches[task.Digest] = f
		e.background.Go(func() {
			f.err = e.bring(ctx, task)
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

// part takes back a join. The last one ends the fetch.
func (e *Engine) part(f *fetch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.waiting--; f.waiting == 0 {
		f.cancel(errUnwanted)
	}
}

// bring fetches a task's blob from peers, and stores it.
func (e *Engine) bring(ctx context.Context, task p2p.Task) error {
	if e.whole(ctx, task) {
		return nil // it has come, or has been mended, just before
	}
	found, err := e.lookup(ctx, task)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(ctx, e.opts.Timeout, fmt.Errorf("%w: it took longer than %s", wire.ErrAway, e.opts.Timeout))
	defer cancel()
	d, err := e.newDownload(limited, task, found.GetContentLength())
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, err)
	}
	err = d.run(limited)
	if err != nil && context.Cause(limited) != nil {
		err = context.Cause(limited)
	}
	if err == nil {
		// It may have been here before, damaged: schedulers may go on with the new peer only.
		if err := e.leave(ctx, d.id); err != nil {
			e.log.Debug("a scheduler goes on with a peer that is no more", "task", task.String(), "error", err)
		}
		e.hold(task, d.peerID) // before others hear of it
	}
	d.close(err)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", task, err)
	}
	return nil
}
