// Package fronttest has the simplest source that there is, to begin another one with: a directory
// of files. Tests add it to engines.
//
// It promises no compatibility.
package fronttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/front"
)

// Directory is a source that is a directory of files, each named by its digest, as in the
// directory "blobs" of an OCI image layout: ALGORITHM/HEX. Under which tag something is wanted
// is the same to it. Nothing is written there, and nothing there is believed.
type Directory struct {
	front *front.Engine
	dir   string
}

var _ front.Source = (*Directory)(nil)

// New returns a directory as a source of an engine, for [front.Engine.Add].
func New(f *front.Engine, dir string) *Directory { return &Directory{front: f, dir: dir} }

func (d *Directory) path(digest digest.Digest) string {
	return filepath.Join(d.dir, digest.Algorithm().String(), digest.Encoded())
}

// Name implements [front.Source].
func (d *Directory) Name() string { return "directory " + d.dir }

// Find implements [front.Source]. What a file is, nothing says but its content: it is Opaque.
func (d *Directory) Find(_ context.Context, task p2p.Task, opts front.FindOptions) (front.Found, error) {
	found := front.Found{Whole: true, Opaque: true}
	if opts.Providers {
		found.Info.Providers = &p2p.Providers{Asked: 1}
	}
	info, err := os.Stat(d.path(task.Digest))
	if err != nil {
		return found, d.failed(task, err)
	}
	table := digest.Table{Size: info.Size(), PieceLength: digest.PieceLength(info.Size())}
	found.Info.Task, found.Info.Remote, found.Info.Keep = task, true, p2p.KeepUntilReferred
	found.Info.Size, found.Info.PieceLength, found.Info.Pieces = table.Size, table.PieceLength, table.Pieces()
	found.Opaque = table.Size <= p2p.MaxManifest
	if opts.Providers {
		found.Info.Providers.Some, found.Info.Providers.Whole = 1, 1
	}
	return found, nil
}

// failed says in the engine's words why a file can't be had.
func (d *Directory) failed(task p2p.Task, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w in %s", task, p2p.ErrNotFound, d.dir)
	}
	return fmt.Errorf("%s: %w: %w", task, p2p.ErrUnavailable, err)
}

// Fetch implements [front.Source]: the engine verifies the file, and keeps a copy. However many
// want it, it is read once.
func (d *Directory) Fetch(ctx context.Context, task p2p.Task, _ bool) (p2p.Blob, error) {
	return nil, d.front.Once(ctx, task, func(ctx context.Context) error {
		f, err := os.Open(d.path(task.Digest))
		if err != nil {
			return d.failed(task, err)
		}
		defer f.Close()
		if err := d.front.Take(ctx, task, f); err != nil {
			return fmt.Errorf("fetch %s from %s: %w", task, d.dir, err)
		}
		return nil
	})
}

// Offer implements [front.Source]: the directory takes nothing.
func (d *Directory) Offer(context.Context, p2p.Commit) error { return nil }

// See implements [front.Source]: what is there stays there.
func (d *Directory) See(context.Context, string, digest.CID, p2p.DeleteOptions, bool) (front.Seen, error) {
	return front.Seen{}, nil
}

// Forget implements [front.Source].
func (d *Directory) Forget(context.Context, front.Deletion) []front.Told { return nil }

// Stop implements [front.Source]: what reads is ended by the engine.
func (d *Directory) Stop() {}

// Close implements [front.Source].
func (d *Directory) Close() error { return nil }
