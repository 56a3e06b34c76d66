package front

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Open implements [p2p.Engine]. A blob that is here is a [*pieces.Blob], one that is not
// what a source gives.
func (e *Engine) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	blob, missing := e.store.Open(ctx, task, p2p.Local)
	if scope == p2p.Local || !isMissing(missing) || len(e.sources) == 0 {
		return blob, missing
	}
	blob, err := e.fetch(ctx, task, false)
	if err != nil {
		return nil, instead(missing, err)
	}
	return blob, nil
}

// maxAttempts bounds how often a blob is asked for that is said to be stored, and is not.
const maxAttempts = 16

// fetch returns a blob that is not here, or is damaged, as it arrives from a source. With
// damaged, what is here is not believed, and nil says that it was mended meanwhile.
func (e *Engine) fetch(ctx context.Context, task p2p.Task, damaged bool) (p2p.Blob, error) {
	if err := task.Validate(); err != nil {
		return nil, err
	}
	for range maxAttempts {
		if !damaged {
			blob, err := e.open(ctx, task)
			if err != nil || blob != nil {
				return blob, err
			}
		}
		blob, err := e.fetchOnce(ctx, task, damaged)
		if err != nil || blob != nil || damaged {
			return blob, err
		}
	}
	return nil, fmt.Errorf("fetch %s: %w: it goes as often as it comes", task, p2p.ErrNotFound)
}

// open opens what is here by now, under this tag or another one. It returns nil where it has to
// be fetched.
func (e *Engine) open(ctx context.Context, task p2p.Task) (p2p.Blob, error) {
	blob, err := e.store.Open(ctx, task, p2p.Local)
	if err == nil {
		return blob, nil
	}
	if !isMissing(err) {
		return nil, err
	}
	if has, err := e.store.Has(ctx, task.Digest); err != nil || !has {
		return nil, err
	}
	found, err := e.find(ctx, task, FindOptions{})
	if err != nil {
		return nil, err
	}
	// A blob that is damaged here is fetched as if it were not.
	if err := e.adopt(ctx, found); err != nil {
		if errors.Is(err, digest.ErrCorrupt) {
			err = nil
		}
		return nil, err
	}
	return e.store.Open(ctx, task, p2p.Local)
}

// fetchOnce asks the sources for a blob, that first which says that it has all of it, and
// the next where one fails.
func (e *Engine) fetchOnce(ctx context.Context, task p2p.Task, damaged bool) (p2p.Blob, error) {
	sources := e.sources
	if len(sources) > 1 {
		sources = e.ordered(ctx, task)
	}
	var failed []error
	for _, s := range sources {
		blob, err := s.Fetch(ctx, task, damaged)
		if err == nil {
			return blob, nil
		}
		failed = append(failed, err)
		if ctx.Err() != nil || errors.Is(err, p2p.ErrNoSpace) {
			break // no other one can help
		}
	}
	return nil, errors.Join(failed...)
}

// ordered returns the sources in the order in which they are asked for a blob.
func (e *Engine) ordered(ctx context.Context, task p2p.Task) []Source {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := e.ask(ctx, task, FindOptions{})
	ranked := map[Source]int{}
	for range e.sources {
		a := <-answers
		if ranked[a.source] = a.rank(); ranked[a.source] == hasAll {
			break
		}
	}
	rankOf := func(s Source) int {
		if n, ok := ranked[s]; ok {
			return n
		}
		return hasSome // it has not answered yet
	}
	ordered := slices.Clone(e.sources)
	slices.SortStableFunc(ordered, func(a, b Source) int { return rankOf(a) - rankOf(b) })
	return ordered
}

// stored waits until a blob that was fetched is in the store, and closes it. It may be nil.
func stored(ctx context.Context, blob p2p.Blob) error {
	if blob == nil {
		return nil
	}
	var err error
	if a, ok := blob.(Arriving); ok {
		err = a.Stored(ctx)
	}
	return errors.Join(err, blob.Close())
}

// Hold implements [p2p.Holder].
func (e *Engine) Hold(ctx context.Context, tag string, cid digest.CID) error {
	return e.hold(ctx, tag, cid, map[digest.Digest]bool{})
}

// hold leaves out what it has seen.
func (e *Engine) hold(ctx context.Context, tag string, cid digest.CID, seen map[digest.Digest]bool) error {
	info, err := e.HoldManifest(ctx, tag, cid, p2p.StatOptions{ContentOnly: true})
	if err != nil || seen[info.Task.Digest] {
		return err
	}
	seen[info.Task.Digest] = true
	if info.Manifest == nil {
		return e.holdBlob(ctx, info.Task)
	}
	m, err := manifest.Read(info.Manifest.Content)
	if err != nil {
		return nil
	}
	for _, d := range m.References(false).Refs {
		// What a manifest refers to may never have been there: layers that
		// are not distributed.
		if err := e.hold(ctx, tag, digest.FromDigest(d), seen); err != nil && !errors.Is(err, p2p.ErrNotFound) {
			return err
		}
	}
	return nil
}

func (e *Engine) holdBlob(ctx context.Context, task p2p.Task) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	_, err := e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{Scope: p2p.Local})
	if !errors.Is(err, p2p.ErrNotFound) {
		return err
	}
	blob, err := e.fetch(ctx, task, false)
	if err != nil {
		return err
	}
	return stored(ctx, blob)
}

// HoldReferrers implements [p2p.Holder].
func (e *Engine) HoldReferrers(ctx context.Context, task p2p.Task) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	if err := task.Validate(); err != nil {
		return err
	}
	have := func(t p2p.Task) bool {
		_, err := e.store.Stat(ctx, t.Tag, digest.FromDigest(t.Digest), p2p.StatOptions{Scope: p2p.Local})
		return !errors.Is(err, p2p.ErrNotFound)
	}
	for _, s := range e.sources {
		s, ok := s.(Referrers)
		if !ok {
			continue
		}
		for info, err := range s.Referrers(ctx, task, have) {
			if err == nil {
				refs := e.describe(&info, info.Manifest.Content)
				err = e.keep(ctx, info, info.Manifest.Content, refs, nil)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Verify implements [p2p.Holder].
func (e *Engine) Verify(ctx context.Context, task p2p.Task) error { return e.store.Verify(ctx, task) }

// Mend implements [p2p.Holder]. What is good of the blob is not fetched where a source knows
// its hash chain.
func (e *Engine) Mend(ctx context.Context, task p2p.Task) error {
	if err := e.Begin(ctx); err != nil {
		return err
	}
	defer e.End()
	if len(e.sources) == 0 {
		return e.store.Mend(ctx, task)
	}
	// The reader that has met the damage may be another process.
	if err := e.store.Verify(ctx, task); !errors.Is(err, digest.ErrCorrupt) {
		return err
	}
	blob, err := e.fetch(ctx, task, true)
	if err == nil {
		err = stored(ctx, blob)
	}
	if err != nil {
		return fmt.Errorf("mend %s: %w", task, err)
	}
	e.log.Info("a damaged blob was mended", "task", task.String())
	return nil
}
