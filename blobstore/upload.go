package blobstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Upload takes in a blob that arrives in parts, as a registry's clients send
// it. Bytes are written and hashed as they come. It is not safe for concurrent
// use, but for Size and Close.
type Upload struct {
	r      *Repository
	in     p2p.Ingest
	cancel context.CancelCauseFunc
	ctx    context.Context

	parts  chan part     // what the engine reads
	added  chan struct{} // closed when the engine has read everything, or failed
	blob   p2p.Added     // what it has then
	addErr error         // or why it failed

	mu   sync.Mutex
	size int64

	committing sync.Mutex // held while the ingest is committed or closed
	closing    sync.Once
	closed     error
}

// part is bytes on their way to the engine, which says when it has them.
type part struct {
	p    []byte
	done chan<- struct{}
}

var errUploadOver = errors.New("the upload is over")

// NewUpload begins an upload. ctx bounds all of it. alg is the algorithm of the
// digest that is expected at its end, sha256 where it is ""; another one costs
// a second pass over the bytes then. The caller closes the upload; closing the
// store waits for that.
func (r *Repository) NewUpload(ctx context.Context, alg digest.Algorithm) (*Upload, error) {
	if alg != "" {
		if _, err := digest.ParseAlgorithm(alg.String()); err != nil {
			return nil, fmt.Errorf("upload: %w", err)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		cancel(nil)
		return nil, toOCI(fmt.Errorf("upload: %w", err))
	}
	u := &Upload{r: r, in: in, ctx: ctx, cancel: cancel, parts: make(chan part), added: make(chan struct{})}
	go func() {
		defer close(u.added)
		u.blob, u.addErr = in.Add(&partReader{parts: u.parts, ctx: ctx}, p2p.AddOptions{Algorithm: alg})
		if u.addErr != nil {
			u.cancel(u.addErr) // whoever has a part for it need not wait
		}
	}()
	return u, nil
}

// partReader reads the parts of an upload one after the other. A Read ends with
// the upload's context.
type partReader struct {
	parts <-chan part
	ctx   context.Context
	now   part
}

func (r *partReader) Read(p []byte) (int, error) {
	if len(r.now.p) == 0 {
		select {
		case next, more := <-r.parts:
			if !more {
				return 0, io.EOF
			}
			r.now = next
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
	n := copy(p, r.now.p)
	if r.now.p = r.now.p[n:]; len(r.now.p) == 0 {
		r.now.done <- struct{}{}
	}
	return n, nil
}

// SetReadDeadline says that a Read can be interrupted, so that the engine reads
// without a goroutine in between. It is called when the context has ended,
// which interrupts by itself.
func (r *partReader) SetReadDeadline(time.Time) error { return nil }

// uploadBuffers are what parts pass through.
var uploadBuffers = sync.Pool{New: func() any { return new([1 << 20]byte) }}

// Append takes in src to its end and returns how many bytes that were. That the
// last of them find no room may come out only with the next Append or Commit. Where
// reading src fails, what came before stays, and another Append can go on after
// it; the error is that of src. When the upload is over, or its context ends,
// Append fails as soon as src gives something; it does not interrupt a Read.
func (u *Upload) Append(src io.Reader) (int64, error) {
	space := uploadBuffers.Get().(*[1 << 20]byte)
	done := make(chan struct{}, 1)
	var taken int64
	for {
		n, err := src.Read(space[:])
		if u.ctx.Err() != nil {
			return taken, u.err()
		}
		if n > 0 {
			select {
			case u.parts <- part{space[:n], done}:
			case <-u.ctx.Done():
				return taken, u.err()
			}
			select {
			case <-done:
			case <-u.ctx.Done():
				return taken, u.err() // the engine may still be reading from the buffer: it is not used again
			}
			taken += int64(n)
			u.mu.Lock()
			u.size += int64(n)
			u.mu.Unlock()
		}
		switch {
		case errors.Is(err, io.EOF):
			uploadBuffers.Put(space)
			return taken, nil
		case err != nil:
			uploadBuffers.Put(space)
			return taken, err
		}
	}
}

func (u *Upload) err() error {
	return toOCI(fmt.Errorf("upload: %w", context.Cause(u.ctx)))
}

// Size returns how many bytes have been taken in.
func (u *Upload) Size() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.size
}

// Commit stores what was taken in under want, durably, or fails with
// [ErrMismatch] where it has another digest. The upload is over either way.
func (u *Upload) Commit(want digest.Digest) (ocispec.Descriptor, error) {
	defer u.Close()
	if err := checkTarget(ocispec.Descriptor{Digest: want}); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := u.commit(want); err != nil {
		return ocispec.Descriptor{}, toOCI(fmt.Errorf("upload: %w", err))
	}
	return ocispec.Descriptor{MediaType: blobMediaType, Digest: want, Size: u.blob.Size}, nil
}

func (u *Upload) commit(want digest.Digest) error {
	u.committing.Lock()
	defer u.committing.Unlock()
	if u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	close(u.parts)
	if <-u.added; u.addErr != nil {
		return u.addErr
	}
	if got := u.blob.Digest; got.Algorithm() != want.Algorithm() {
		if _, err := u.in.Rehash(got, want); err != nil {
			return err
		}
	} else if got != want {
		return fmt.Errorf("nothing was stored: %w", &digest.MismatchError{Want: want, Got: got})
	}
	return u.in.Commit(u.r.blobCommit(want, blobMediaType, nil))
}

// Close drops what has not been committed. It may be called at any time, more
// than once, and after Commit.
func (u *Upload) Close() error {
	u.closing.Do(func() {
		u.cancel(errUploadOver)
		<-u.added
		u.committing.Lock()
		defer u.committing.Unlock()
		u.closed = u.in.Close()
	})
	return u.closed
}
