package blobstore

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// open opens a blob for reading. Where it turns out to be damaged here, peers
// mend it, unless scope is only this host, and reading goes on; else the engine is told,
// which may be in another process. ctx bounds that, too.
func (r *Repository) open(ctx context.Context, d digest.Digest, scope p2p.Scope) (p2p.Blob, error) {
	blob, err := r.engine.Open(ctx, r.task(d), scope)
	if err != nil {
		return nil, err
	}
	mend := r.engine.Mend
	if scope == p2p.Local {
		mend = r.engine.Verify
	}
	return &mending{now: blob, open: func() (p2p.Blob, error) {
		if err := mend(ctx, r.task(d)); err != nil {
			return nil, err
		}
		return r.engine.Open(ctx, r.task(d), p2p.Local)
	}}, nil
}

// mending is a blob that is mended when damage is met.
type mending struct {
	open func() (p2p.Blob, error)

	mu     sync.Mutex
	now    p2p.Blob
	before p2p.Blob // that was damaged, or nil
}

func (m *mending) blob() p2p.Blob {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// mend returns the blob without the damage that has been met in another one; or
// that damage, where no peer could help.
func (m *mending) mend(damaged p2p.Blob, damage error) (p2p.Blob, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now != damaged {
		return m.now, nil // somebody else has had it mended
	}
	if m.before != nil {
		return nil, damage // once is enough: this disk can't be trusted
	}
	whole, err := m.open()
	if err != nil {
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnreachable) || errors.Is(err, ErrCorrupt) {
			return nil, damage
		}
		return nil, errors.Join(damage, err)
	}
	m.before, m.now = m.now, whole
	return whole, nil
}

// Size implements [p2p.Blob].
func (m *mending) Size() int64 { return m.blob().Size() }

// Sources implements [p2p.Blob].
func (m *mending) Sources() []p2p.Source { return m.blob().Sources() }

// ReadAt implements [io.ReaderAt].
func (m *mending) ReadAt(p []byte, off int64) (int, error) {
	blob := m.blob()
	n, err := blob.ReadAt(p, off)
	if !errors.Is(err, ErrCorrupt) {
		return n, err
	}
	whole, err := m.mend(blob, err)
	if err != nil {
		return n, err
	}
	rest, err := whole.ReadAt(p[n:], off+int64(n))
	return n + rest, err
}

// CopyRange implements [p2p.Blob].
func (m *mending) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(int64)) error {
	blob := m.blob()
	var done int64
	note := func(written int64) {
		done = written
		if progress != nil {
			progress(written)
		}
	}
	err := blob.CopyRange(ctx, w, off, n, note)
	if !errors.Is(err, ErrCorrupt) {
		return err
	}
	whole, err := m.mend(blob, err)
	if err != nil {
		return err
	}
	copied := done
	return whole.CopyRange(ctx, w, off+copied, n-copied, func(written int64) { note(copied + written) })
}

// Close implements [p2p.Blob].
func (m *mending) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.now.Close()
	if m.before != nil {
		err = errors.Join(err, m.before.Close())
	}
	return err
}
