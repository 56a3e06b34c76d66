package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Stat implements [p2p.Engine]. Where a source says nothing but that it has a task, what could
// be a manifest is fetched, as by Open, and then described.
func (e *Engine) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return e.stat(ctx, tag, cid, opts, false)
}

// HoldManifest implements [p2p.Holder].
func (e *Engine) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return e.stat(ctx, tag, cid, opts, true)
}

// stat describes what cid names, and keeps the name and its manifest where hold is set.
func (e *Engine) stat(
	ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions, hold bool,
) (info p2p.Info, err error) {
	if err := e.Begin(ctx); err != nil {
		return p2p.Info{}, err
	}
	defer e.End()
	if err := opts.Validate(tag, cid); err != nil {
		return p2p.Info{}, err
	}
	switch {
	case opts.Scope == p2p.Local || len(e.sources) == 0:
		return e.statLocal(ctx, tag, cid, opts)
	case cid.CacheID() == "":
		task := p2p.Task{Tag: tag, Digest: cid.Digest()}
		var ledBy []p2p.NewName
		if names := e.names(); names != nil && hold {
			ledBy = names.LedTo(ctx, task)
		}
		info, err = e.statDigest(ctx, task, opts, ledBy, hold)
	default:
		info, err = e.statName(ctx, tag, cid, opts, hold)
	}
	if err == nil && opts.Lease && len(info.Lacks) > 0 && !info.Remote {
		info.Lacks = e.lacking(ctx, info)
	}
	return info, err
}

// localOnly returns the same options for what is here alone.
func localOnly(opts p2p.StatOptions) p2p.StatOptions {
	opts.Scope, opts.Providers = p2p.Local, false
	return opts
}

// statLocal describes what is here, or has begun to arrive.
func (e *Engine) statLocal(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	info, err := e.store.Stat(ctx, tag, cid, opts)
	if errors.Is(err, p2p.ErrNotFound) && cid.Digest() != "" {
		for _, s := range e.sources {
			if s, ok := s.(Arrivals); ok {
				if info, ok := s.Arriving(p2p.Task{Tag: tag, Digest: cid.Digest()}); ok {
					return info, nil
				}
			}
		}
	}
	return info, err
}

// statName describes what a name stands for.
func (e *Engine) statName(
	ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions, hold bool,
) (p2p.Info, error) {
	if names := e.names(); names != nil {
		n, here, err := names.Resolve(ctx, tag, cid.CacheID())
		if err != nil {
			return p2p.Info{}, err
		}
		if !here {
			return e.statDigest(ctx, p2p.Task{Tag: tag, Digest: n.Digest}, opts, []p2p.NewName{n}, hold)
		}
	}
	// It may be moved right now: the store has the last word on what is here.
	info, err := e.store.Stat(ctx, tag, cid, localOnly(opts))
	if damage, ok := errors.AsType[*digest.CorruptError](err); ok {
		info.Task = p2p.Task{Tag: tag, Digest: damage.Digest}
	} else if errors.Is(err, p2p.ErrNotFound) && e.names() == nil {
		return info, fmt.Errorf("%w on this host, and %s knows no names: ask for the digest", err, e.called())
	} else if err != nil || !opts.Providers {
		return info, err
	}
	return e.statDigest(ctx, info.Task, opts, nil, hold)
}

// statDigest describes a task, and keeps its manifest where hold is set. ledBy are the
// names that led to it and are not here.
//
//nolint:cyclop // what is here and what is elsewhere are set against each other case by case
func (e *Engine) statDigest(
	ctx context.Context, task p2p.Task, opts p2p.StatOptions, ledBy []p2p.NewName, hold bool,
) (p2p.Info, error) {
	info, missing := e.statLocal(ctx, task.Tag, digest.FromDigest(task.Digest), localOnly(opts))
	here := missing == nil
	// What is damaged here may be whole elsewhere.
	if !here && !isMissing(missing) {
		return info, missing
	}
	if !here || opts.Providers {
		found, err := e.find(ctx, task, FindOptions{
			Content: !here && opts.Manifest, Named: len(ledBy) > 0, Refs: !opts.ContentOnly, Providers: opts.Providers,
			Lease: opts.Lease,
		})
		switch {
		case err == nil && here, here && isAway(err):
			info.Providers = found.Info.Providers
		case err == nil && found.Opaque:
			if info, err = e.statFetched(ctx, task, opts); err != nil {
				return info, instead(missing, err)
			}
			info.Providers = found.Info.Providers
		case err == nil:
			info = found.Info
		default:
			return info, instead(missing, err)
		}
	}
	if !opts.Manifest || info.Manifest == nil {
		return info, nil
	}
	if info.Remote {
		refs := e.describe(&info, info.Manifest.Content)
		if hold {
			if err := e.keep(ctx, info, info.Manifest.Content, refs, ledBy); err != nil {
				return info, err
			}
			info.Remote, info.Held = false, info.Pieces
		}
		if refs == nil {
			info.Manifest = nil
			return info, nil
		}
	} else if hold && len(ledBy) > 0 {
		if err := e.commit(ctx, nil, p2p.Commit{Names: ledBy}); err != nil {
			return info, err
		}
	}
	if !opts.ContentOnly && (!here || opts.Providers) {
		e.describeRefs(ctx, &info, opts)
	}
	return info, nil
}

// instead returns the error of what is not here for the reason missing, and that sources have
// failed to give: damage, where nobody else has it either.
func instead(missing, err error) error {
	if errors.Is(missing, digest.ErrCorrupt) && isAway(err) {
		return missing
	}
	return err
}

// statFetched fetches a task, of which a source knows no more than that it has it, and
// describes it.
func (e *Engine) statFetched(ctx context.Context, task p2p.Task, opts p2p.StatOptions) (p2p.Info, error) {
	blob, err := e.fetch(ctx, task, false)
	if err != nil {
		return p2p.Info{}, err
	}
	if err := stored(ctx, blob); err != nil {
		return p2p.Info{}, err
	}
	return e.store.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), localOnly(opts))
}

// describeRefs completes what is known of what a manifest refers to: first what is here,
// then what a source has told with the manifest.
func (e *Engine) describeRefs(ctx context.Context, info *p2p.Info, opts p2p.StatOptions) {
	parsed, err := manifest.Read(info.Manifest.Content)
	if err != nil {
		return
	}
	refs := parsed.References(false).Refs
	told := map[digest.Digest]p2p.Info{}
	for _, ref := range info.Manifest.Refs {
		told[ref.Task.Digest] = ref
	}
	info.Manifest.Refs = nil
	for _, d := range refs[:min(len(refs), p2p.MaxRefs)] {
		task := p2p.Task{Tag: info.Task.Tag, Digest: d}
		ref, err := e.statLocal(ctx, task.Tag, digest.FromDigest(d), p2p.StatOptions{Scope: p2p.Local})
		known := err == nil
		if !known {
			ref, known = told[d]
		}
		if opts.Providers {
			if found, err := e.find(ctx, task, FindOptions{Providers: true}); err == nil || known {
				if !known {
					ref = found.Info
				}
				ref.Providers, known = found.Info.Providers, true
			}
		}
		if known {
			info.Manifest.Refs = append(info.Manifest.Refs, ref)
		}
	}
}

// lacking returns what is lost of a manifest here and that no source has.
func (e *Engine) lacking(ctx context.Context, info p2p.Info) []digest.Digest {
	for _, d := range info.Lacks {
		found, err := e.find(ctx, p2p.Task{Tag: info.Task.Tag, Digest: d}, FindOptions{})
		if err != nil || !found.Whole || len(found.Info.Lacks) > 0 {
			return info.Lacks
		}
	}
	return nil
}

// find asks all sources for a task, side by side. The first that has all of it is believed;
// with Providers, all of them are heard.
func (e *Engine) find(ctx context.Context, task p2p.Task, opts FindOptions) (Found, error) {
	if len(e.sources) == 1 {
		return e.sources[0].Find(ctx, task, opts)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := e.ask(ctx, task, opts)
	var best Found
	var providers *p2p.Providers
	var failed []error
	known := false
	for range e.sources {
		a := <-answers
		providers = addProviders(providers, a.found.Info.Providers)
		if a.err != nil {
			failed = append(failed, a.err)
			continue
		}
		if !known || a.found.Whole && !best.Whole {
			best, known = a.found, true
		}
		if best.Whole && !opts.Providers {
			break
		}
	}
	best.Info.Providers = providers
	if !known {
		return best, errors.Join(failed...)
	}
	return best, nil
}

// answer is what a source has said of a task.
type answer struct {
	source Source
	found  Found
	err    error
}

// What a source is good for, the best first.
const (
	hasAll = iota
	hasSome
	hasNone
)

func (a answer) rank() int {
	switch {
	case a.err != nil:
		return hasNone
	case a.found.Whole:
		return hasAll
	}
	return hasSome
}

// ask asks all sources for a task, side by side. There is one answer of each; the caller ends ctx
// when it waits for no more.
func (e *Engine) ask(ctx context.Context, task p2p.Task, opts FindOptions) <-chan answer {
	answers := make(chan answer, len(e.sources))
	for _, s := range e.sources {
		e.running.Go(func() {
			found, err := s.Find(ctx, task, opts)
			answers <- answer{s, found, err}
		})
	}
	return answers
}

func addProviders(a, b *p2p.Providers) *p2p.Providers {
	if a == nil || b == nil {
		return cmp.Or(a, b)
	}
	return &p2p.Providers{Some: a.Some + b.Some, Whole: a.Whole + b.Whole, Asked: a.Asked + b.Asked,
		Silent: a.Silent + b.Silent}
}
