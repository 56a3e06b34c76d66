// Package whole is what the sources that are a Dragonfly have in common: it knows blobs by
// their digests, and moves whole ones.
//
// The store in front of it has what Dragonfly does not: names, lists, manifests and what refers
// to them, and the proof of every byte. What Dragonfly can't do is an error, or is said in the
// result: it knows no names, its delete is of one host, and it copies nothing to other hosts on
// request.
//
// It promises no compatibility.
package whole

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// Name is what a Dragonfly is called in messages.
const Name = "Dragonfly"

// NotFoundYet says of what was stored that it is not known elsewhere.
const NotFoundYet = "other hosts of Dragonfly can't find it until its scheduler answers"

// Dir makes the directory "dragonfly" of a store anew, for what is not verified yet,
// without what an earlier source has left in it. Nobody but this user, and root, can
// enter it.
func Dir(store *pieces.Store) (string, error) {
	dir := filepath.Join(store.Dir(), "dragonfly")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return "", fmt.Errorf("directory for what comes from Dragonfly: %w", err)
	}
	return dir, nil
}

// Found is what Dragonfly's answer about a task says: its size, or -1 where that is not known,
// or err. What could be a manifest has to be fetched to know.
func Found(
	ctx context.Context, log *slog.Logger, task p2p.Task, size int64, err error, opts front.FindOptions,
) (front.Found, error) {
	table := digest.Table{Size: max(size, 0), PieceLength: digest.PieceLength(max(size, 0))}
	found := front.Found{
		Info: p2p.Info{Task: task, Size: table.Size, PieceLength: table.PieceLength, Pieces: table.Pieces(),
			Remote: true, Keep: p2p.KeepUntilReferred},
		Whole: true, Opaque: size <= p2p.MaxManifest,
	}
	if opts.Providers {
		providers, failed := Providers(ctx, log, task, err)
		if failed != nil {
			return found, failed
		}
		found.Info.Providers = providers
	}
	return found, err
}

// See says whether Dragonfly has something to delete of what the store does not have, as
// deletable says: it may have what was never here, or the rest of a delete that failed.
func See(
	ctx context.Context, tag string, cid digest.CID, held bool, deletable func(context.Context, p2p.Task) error,
) front.Seen {
	if held || cid.Digest() == "" {
		return front.Seen{}
	}
	err := deletable(ctx, p2p.Task{Tag: tag, Digest: cid.Digest()})
	return front.Seen{Found: err == nil, Err: err}
}

// Tasks returns the tasks that a commit has made, or given a name.
func Tasks(c p2p.Commit) []p2p.Task {
	tasks := map[p2p.Task]bool{}
	for _, n := range c.Tasks {
		tasks[n.Task] = true
	}
	for _, n := range c.Names {
		tasks[p2p.Task{Tag: n.Tag, Digest: n.Digest}] = true
	}
	return slices.Collect(maps.Keys(tasks))
}
