package whole

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// sweepRate is how many tasks a second a sweep takes at most.
const sweepRate = 50

// HandIn calls hand for each task, and for all that it refers to, as far as that is
// here: an earlier commit may have failed to, and whoever pushes again leaves out what
// is here.
func (e *Engine) HandIn(ctx context.Context, tasks []p2p.Task, hand func(context.Context, p2p.Task) error) error {
	seen := map[p2p.Task]bool{}
	for _, task := range tasks {
		if err := e.handIn(ctx, task, hand, seen); err != nil {
			return fmt.Errorf("it is stored on this host, but Dragonfly has not got all of it: %w; then import it again", err)
		}
	}
	return nil
}

func (e *Engine) handIn(ctx context.Context, task p2p.Task, hand func(context.Context, p2p.Task) error, seen map[p2p.Task]bool) error {
	if seen[task] {
		return nil
	}
	seen[task] = true
	info, err := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local, Manifest: true})
	if errors.Is(err, p2p.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	if err := hand(ctx, task); err != nil {
		return err
	}
	if info.Manifest == nil {
		return nil
	}
	for _, ref := range info.Manifest.Refs {
		if err := e.handIn(ctx, ref.Task, hand, seen); err != nil {
			return err
		}
	}
	return nil
}

// HandInBlob calls hand with a task's blob, where it is here. Where it is not any more
// afterwards it calls takeBack: it was deleted meanwhile, in the network perhaps before
// it got there.
func (e *Engine) HandInBlob(ctx context.Context, task p2p.Task, hand func(*pieces.Blob) error, takeBack func() error) error {
	blob, err := e.store.OpenForPeers(ctx, task)
	if errors.Is(err, p2p.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	err = hand(blob)
	if _, gone := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local}); errors.Is(gone, p2p.ErrNotFound) {
		return takeBack()
	}
	return err
}

// SweepEvery calls hand for every task of the store, once and again after each interval,
// until ctx ends. It says how many sweeps there were before, without one that found
// the network away: an error that matches [p2p.ErrUnavailable] ends a sweep.
func (e *Engine) SweepEvery(ctx context.Context, interval time.Duration, hand func(ctx context.Context, task p2p.Task, sweep int) error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := 0; ; n++ {
		err := e.sweep(ctx, func(task p2p.Task) error { return hand(ctx, task, n) })
		if err != nil && ctx.Err() == nil {
			e.opts.Log.Warn("Dragonfly has not been told of all that is here: it will be", "error", err)
			n = -1 // it may be another one when it answers
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (e *Engine) sweep(ctx context.Context, hand func(p2p.Task) error) error {
	pace := rate.NewLimiter(sweepRate, 1)
	for entry, err := range e.store.List(ctx, p2p.Query{}) {
		if err == nil && entry.Name == "" {
			err = pace.Wait(ctx)
		}
		if err != nil {
			return err
		}
		if entry.Name != "" {
			continue
		}
		err = hand(entry.Task)
		if errors.Is(err, p2p.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			e.opts.Log.Warn("a file was not handed to Dragonfly", "task", entry.Task.String(), "error", err)
		}
	}
	return nil
}

// HoldersOf says who has a task, of one that was asked: the network as a whole. err is
// what it has answered, nil where it has the task.
func (e *Engine) HoldersOf(ctx context.Context, task p2p.Task, err error) (*p2p.Holders, error) {
	switch {
	case err == nil:
		return &p2p.Holders{Asked: 1, Some: 1, Whole: 1}, nil
	case errors.Is(err, p2p.ErrNotFound):
		return &p2p.Holders{Asked: 1}, nil
	case context.Cause(ctx) != nil:
		return nil, err
	}
	e.opts.Log.Warn("Dragonfly does not say who has a task", "task", task.String(), "error", err)
	return &p2p.Holders{Asked: 1, Silent: 1}, nil
}
