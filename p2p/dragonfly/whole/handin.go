package whole

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
func HandIn(
	ctx context.Context, store *pieces.Store, tasks []p2p.Task, hand func(context.Context, p2p.Task) error,
) error {
	seen := map[p2p.Task]bool{}
	for _, task := range tasks {
		if err := handIn(ctx, store, task, hand, seen); err != nil {
			return fmt.Errorf(
				"it is stored on this host, but Dragonfly has not got all of it: %w; then import it again", err)
		}
	}
	return nil
}

func handIn(
	ctx context.Context, store *pieces.Store, task p2p.Task, hand func(context.Context, p2p.Task) error,
	seen map[p2p.Task]bool,
) error {
	if seen[task] {
		return nil
	}
	seen[task] = true
	info, err := store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true})
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
		if err := handIn(ctx, store, ref.Task, hand, seen); err != nil {
			return err
		}
	}
	return nil
}

// HandInBlob calls hand with a task's blob, where it is here. Where it is not any more
// afterwards it calls takeBack: it was deleted meanwhile, in the network perhaps before
// it got there.
func HandInBlob(
	ctx context.Context, store *pieces.Store, task p2p.Task, hand func(*pieces.Blob) error, takeBack func() error,
) error {
	blob, err := store.OpenForPeers(ctx, task)
	if errors.Is(err, p2p.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	err = hand(blob)
	if _, gone := store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest),
		p2p.StatOptions{Scope: p2p.Local}); errors.Is(gone, p2p.ErrNotFound) {
		return takeBack()
	}
	return err
}

// SweepEvery calls hand for every task of the store, once and again after each interval, and when
// something comes from now, until ctx ends. An error that matches [p2p.ErrUnavailable] ends a sweep.
func SweepEvery(
	ctx context.Context, store *pieces.Store, log *slog.Logger, interval time.Duration, now <-chan struct{},
	hand func(ctx context.Context, task p2p.Task) error,
) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := sweep(ctx, store, log, hand); err != nil && ctx.Err() == nil {
			log.Warn("Dragonfly has not been told of all that is here: it will be", "error", err)
		}
		select {
		case <-tick.C:
		case <-now:
		case <-ctx.Done():
			return
		}
	}
}

// Soon has a sweep begin at once that waits for something from now, or another one follow the one
// that is under way.
func Soon(now chan<- struct{}) {
	select {
	case now <- struct{}{}:
	default: // one is to come already
	}
}

func sweep(
	ctx context.Context, store *pieces.Store, log *slog.Logger, hand func(context.Context, p2p.Task) error,
) error {
	pace := rate.NewLimiter(sweepRate, 1)
	for entry, err := range store.List(ctx, p2p.Query{}) {
		if err == nil && entry.Name == "" {
			err = pace.Wait(ctx)
		}
		if err != nil {
			return err
		}
		if entry.Name != "" {
			continue
		}
		err = hand(ctx, entry.Task)
		if errors.Is(err, p2p.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			log.Warn("a file was not handed to Dragonfly", "task", entry.Task.String(), "error", err)
		}
	}
	return nil
}

// Providers says who has a task, of one that was asked: the network as a whole. err is
// what it has answered, nil where it has the task.
func Providers(ctx context.Context, log *slog.Logger, task p2p.Task, err error) (*p2p.Providers, error) {
	switch {
	case err == nil:
		return &p2p.Providers{Asked: 1, Some: 1, Whole: 1}, nil
	case errors.Is(err, p2p.ErrNotFound):
		return &p2p.Providers{Asked: 1}, nil
	case context.Cause(ctx) != nil:
		return nil, err
	}
	log.Warn("Dragonfly does not say who has a task", "task", task.String(), "error", err)
	return &p2p.Providers{Asked: 1, Silent: 1}, nil
}
