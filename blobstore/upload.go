package blobstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

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
	in     p2p.Ingest
	cancel context.CancelCauseFunc
	ctx    context.Context

	parts  *parts        // what the engine reads
	added  chan struct{} // closed when the engine has read everything, or failed
	blob   p2p.Added     // what it has then
	addErr error         // or why it failed

	committing sync.Mutex // held while the ingest is committed or closed
	closing    sync.Once
	closed     error
}

var errUploadOver = errors.New("the upload is over")

// NewUpload begins an upload. ctx bounds all of it. alg is the algorithm of the
// digest that is expected at its end, sha256 where it is ""; another one costs
// a second pass over the bytes then. The caller closes the upload; it is over when
// the store is closed.
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
	u := &Upload{r: r, in: in, ctx: ctx, cancel: cancel, parts: &parts{ctx: ctx, next: make(chan part), ended: make(chan struct{})}, added: make(chan struct{})}
	go func() {
		defer close(u.added)
		u.blob, u.addErr = in.Add(u.parts, p2p.AddOptions{Algorithm: alg})
		if u.addErr != nil {
			u.cancel(u.addErr) // whoever has a part for it need not wait
		}
	}()
	return u, nil
}

// parts are the parts of an upload, which the engine reads one after the other,
// as if they were one. They pass through no buffer on the way.
type parts struct {
	ctx  context.Context // of the upload: a Read that waits for a part ends with it
	next chan part
	size atomic.Int64 // bytes that the engine has read

	ending sync.Once
	ended  chan struct{} // closed when nothing more is to be read

	reading sync.Mutex // held while a part is read
	mu      sync.Mutex // guards now
	now     part       // src is nil between two parts
}

// part is a source of bytes.
type part struct {
	src  io.Reader
	done chan<- error // gets why src gave no more: nil at its end
}

// Read implements [io.Reader]. It returns no bytes and no error where a part has
// ended, so that the engine keeps no memory for the next one, which may take long to come.
func (r *parts) Read(p []byte) (int, error) {
	r.reading.Lock()
	defer r.reading.Unlock()
	now := r.current()
	if now.src == nil {
		select {
		case next, more := <-r.next:
			if !more {
				return 0, io.EOF
			}
			now = next
			r.set(next)
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		case <-r.ended:
		}
	}
	select {
	case <-r.ended:
		return 0, os.ErrDeadlineExceeded
	default:
	}
	n, err := now.src.Read(p)
	if r.ctx.Err() != nil {
		n, err = 0, context.Cause(r.ctx)
	}
	r.size.Add(int64(n))
	if err == nil {
		return n, nil
	}
	r.set(part{})
	if errors.Is(err, io.EOF) {
		err = nil
	}
	now.done <- err
	return n, nil
}

func (r *parts) current() part {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

func (r *parts) set(p part) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = p
}

// takeBack has the engine read no more of a part. It waits for a Read that runs.
func (r *parts) takeBack() {
	r.reading.Lock()
	defer r.reading.Unlock()
	r.set(part{})
}

// SetReadDeadline says that a Read can be interrupted, so that the engine reads
// without a goroutine in between. It is called when there is nothing more to read: the
// upload's context has ended, or the store is closed.
func (r *parts) SetReadDeadline(time.Time) error {
	r.ending.Do(func() { close(r.ended) })
	if src, ok := r.current().src.(guarded); ok {
		src.interrupt()
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
	interrupt := source.Interruptor(src)
	src = source.Guard(u.ctx, src)
	from := guarded{src, interrupt}
	var feed func() error
	if interrupt == nil {
		r, w := io.Pipe()
		defer context.AfterFunc(u.ctx, func() { r.CloseWithError(context.Cause(u.ctx)) })()
		from = guarded{r, func() { r.CloseWithError(os.ErrDeadlineExceeded) }}
		feed = func() error {
			_, err := io.Copy(w, src)
			return w.CloseWithError(err)
		}
	}
	before := u.Size()
	done := make(chan error, 1)
	select {
	case u.parts.next <- part{from, done}:
	case <-u.ctx.Done():
		return 0, u.err()
	}
	if feed != nil {
		feed() // its error is what the engine reads
	}
	var err error
	select {
	case err = <-done:
	case <-u.added:
		u.parts.takeBack()
	}
	if u.ctx.Err() != nil {
		err = u.err()
	}
	return u.Size() - before, err
}

// guarded is a source whose Read can be interrupted, and does no harm.
type guarded struct {
	io.Reader
	interrupt func()
}

func (u *Upload) err() error {
	return toOCI(fmt.Errorf("upload: %w", context.Cause(u.ctx)))
}

// Room fails with [ErrNoSpace] where n more bytes would have no room.
func (u *Upload) Room(n int64) error { return u.in.Room(n) }

// Size returns how many bytes have been taken in.
func (u *Upload) Size() int64 { return u.parts.size.Load() }

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
	close(u.parts.next)
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
