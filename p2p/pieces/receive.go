package pieces

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// Receiver takes in a blob whose parts come in any order, where they stay: into the file that becomes
// the blob's. What has come from the beginning on is hashed beside what follows. WriteAt may be
// called from several goroutines, beside one that calls the others.
type Receiver struct {
	in *ingest
	w  *writer
	f  *os.File // of w; it is closed with w, whoever writes to it then
}

// Receive begins to take in a blob. ctx bounds all of it. The caller closes the Receiver.
func (s *Store) Receive(ctx context.Context, want digest.Digest) (*Receiver, error) {
	in := &ingest{ctx: ctx, s: s, added: map[digest.Digest]*addition{}}
	if _, err := in.Create(p2p.AddOptions{Want: want}); err != nil {
		return nil, err
	}
	r := &Receiver{in: in, w: in.open}
	r.w.mu.Lock()
	if a := r.w.a; a != nil {
		r.f = a.f
	}
	r.w.mu.Unlock()
	if r.f == nil { // there is no room for it, and it is here
		return nil, fmt.Errorf("%w (%v)", p2p.ErrNoSpace, in.Close())
	}
	return r, nil
}

// WriteAt implements [io.WriterAt].
func (r *Receiver) WriteAt(p []byte, off int64) (int, error) {
	n, err := r.f.WriteAt(p, off)
	return n, r.failure(err)
}

// ReadAt implements [io.ReaderAt].
func (r *Receiver) ReadAt(p []byte, off int64) (int, error) { return r.f.ReadAt(p, off) }

// Truncate says how long the content is to be.
func (r *Receiver) Truncate(size int64) error { return r.failure(r.f.Truncate(size)) }

// failure is err, or why nothing more can be taken in.
func (r *Receiver) failure(err error) error {
	if err == nil {
		return nil
	}
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	return DiskError(cmp.Or(r.w.err, context.Cause(r.w.ctx), err))
}

// Advance says that all bytes up to end have come, and has them hashed. It waits until those are
// that were told of before.
func (r *Receiver) Advance(end int64) error {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	if r.w.err != nil || end <= r.w.end {
		return r.w.err
	}
	if err := r.in.s.begin(r.w.ctx); err != nil {
		return err
	}
	defer r.in.s.end()
	if err := r.w.took(end, nil); err != nil {
		_, r.w.err = added(r.w.ctx, nil, err)
	}
	return r.w.err
}

// Restart says that what has come may be overwritten: it is hashed anew, as Advance says.
func (r *Receiver) Restart() {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	r.w.hashing.Wait()
	r.w.recorder, r.w.end, r.w.flushed = digest.NewRecorder(r.w.opts.HashWith()), 0, 0
}

// Commit stores the content, of which all bytes were told of by Advance, and makes c visible. Nobody
// writes any more. Where it is something else than what was wanted, the error matches
// [digest.ErrMismatch], and the Receiver can only be closed.
func (r *Receiver) Commit(c p2p.Commit) error {
	if _, err := r.w.Finish(); err != nil {
		return err
	}
	return r.in.Commit(c)
}

// Close drops what was not committed.
func (r *Receiver) Close() error { return r.in.Close() }

var (
	_ io.WriterAt = (*Receiver)(nil)
	_ io.ReaderAt = (*Receiver)(nil)
)
