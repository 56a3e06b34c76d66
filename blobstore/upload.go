package blobstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/source"
)

// Upload takes in a blob that arrives in parts, as a registry's clients send
// it. Bytes are written and hashed as they come. It is not safe for concurrent
// use, but for Size and Close.
type Upload struct {
	r      *Repository
	ctx    context.Context
	cancel context.CancelCauseFunc
	size   atomic.Int64 // bytes that were taken in

	mu sync.Mutex // held while the engine has to do with it
	in p2p.Ingest
	w  p2p.Writer

	closing sync.Once
	closed  error
}

var errUploadOver = errors.New("the upload is over")

// NewUpload begins an upload. ctx bounds all of it. alg is the algorithm of the
// digest that is expected at its end, sha256 where it is ""; another one costs
// a second pass over the bytes then. The caller closes the upload; it is over when
// the store is closed.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) NewUpload(ctx context.Context, alg digest.Algorithm) (*Upload, error) {
	if alg != "" {
		if _, err := digest.ParseAlgorithm(alg.String()); err != nil {
			return nil, fmt.Errorf("upload: %w", err)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	u := &Upload{r: r, ctx: ctx, cancel: cancel}
	err := u.begin(alg)
	if err != nil {
		cancel(nil)
		return nil, toOCI(fmt.Errorf("upload: %w", err))
	}
	return u, nil
}

func (u *Upload) begin(alg digest.Algorithm) (err error) {
	if u.in, err = u.r.engine.Ingest(u.ctx); err != nil {
		return err
	}
	if u.w, err = u.in.Create(p2p.AddOptions{Algorithm: alg}); err != nil {
		return errors.Join(err, u.in.Close())
	}
	return nil
}

// Append takes in src to its end and returns how many bytes that were. That the
// last of them find no room may come out only with the next Append or Commit. Where
// reading src fails, what came before stays, and another Append can go on after
// it; the error is that of src. When the upload is over, or its context ends,
// Append fails: at once, where src has a SetReadDeadline method as connections
// have, else as soon as src gives something.
func (u *Upload) Append(src io.Reader) (int64, error) {
	if err := source.Check(src); err != nil {
		return 0, fmt.Errorf("upload: %w", err)
	}
	if u.ctx.Err() != nil {
		return 0, u.err()
	}
	if interrupt := source.Interruptor(src); interrupt != nil {
		defer context.AfterFunc(u.ctx, interrupt)()
	}
	n, err := source.Copy(taking{u}, source.Guard(u.ctx, src))
	if u.ctx.Err() != nil {
		err = u.err()
	}
	return n, err
}

// taking is what an upload's parts are written to.
type taking struct{ u *Upload }

// Write has the engine take in p, unless the upload is over: it may end while a part is read.
func (t taking) Write(p []byte) (int, error) {
	u := t.u
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	n, err := u.w.Write(p)
	u.size.Add(int64(n))
	if err != nil {
		u.cancel(err)
	}
	return n, err
}

func (u *Upload) err() error {
	return toOCI(fmt.Errorf("upload: %w", context.Cause(u.ctx)))
}

// Room fails with [ErrNoSpace] where n more bytes would have no room.
func (u *Upload) Room(n int64) error { return u.in.Room(n) }

// Size returns how many bytes have been taken in.
func (u *Upload) Size() int64 { return u.size.Load() }

// Commit stores what was taken in under want, durably, or fails with
// [ErrMismatch] where it has another digest. The upload is over either way.
func (u *Upload) Commit(want digest.Digest) (ocispec.Descriptor, error) {
	defer u.Close()
	if err := checkTarget(ocispec.Descriptor{Digest: want}); err != nil {
		return ocispec.Descriptor{}, err
	}
	added, err := u.commit(want)
	if err != nil {
		return ocispec.Descriptor{}, toOCI(fmt.Errorf("upload: %w", err))
	}
	return ocispec.Descriptor{MediaType: blobMediaType, Digest: want, Size: added.Size}, nil
}

func (u *Upload) commit(want digest.Digest) (p2p.Added, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ctx.Err() != nil {
		return p2p.Added{}, context.Cause(u.ctx)
	}
	added, err := u.w.Finish()
	if err != nil {
		return p2p.Added{}, err
	}
	if got := added.Digest; got.Algorithm() != want.Algorithm() {
		if added, err = u.in.Rehash(got, want); err != nil {
			return p2p.Added{}, err
		}
	} else if got != want {
		return p2p.Added{}, fmt.Errorf("nothing was stored: %w", &digest.MismatchError{Want: want, Got: got})
	}
	return added, u.in.Commit(u.r.blobCommit(want, blobMediaType, nil))
}

// Close drops what has not been committed. It may be called at any time, more
// than once, and after Commit.
func (u *Upload) Close() error {
	u.closing.Do(func() {
		u.cancel(errUploadOver)
		u.mu.Lock()
		defer u.mu.Unlock()
		u.closed = u.in.Close()
	})
	return u.closed
}
