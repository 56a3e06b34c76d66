package pieces

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/source"
)

// writer is content that an ingest is taking in. It implements [p2p.Writer]. What is written is
// hashed beside what follows.
type writer struct {
	in       *ingest
	opts     p2p.AddOptions
	ctx      context.Context
	cancel   context.CancelCauseFunc
	recorder *digest.Recorder
	hashing  sync.WaitGroup // has the recorder
	over     func()         // nothing is left to drop: the store need not wait any more

	mu      sync.Mutex // held by all that is done with it: the store may close meanwhile
	a       *addition  // without a file where the store recognizes what is wanted; nil when it is dropped
	end     int64      // bytes that were taken in
	hole    bool       // the last of them are a hole, which the file does not have yet
	flushed int64      // of these, those of which write-back has begun
	err     error      // why nothing more can be taken in
}

var errFinished = errors.New("the content is finished already")

// Create implements [p2p.Ingest].
func (in *ingest) Create(opts p2p.AddOptions) (p2p.Writer, error) {
	if err := in.begin(); err != nil {
		return nil, err
	}
	defer in.s.end()
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := in.bound(&opts)
	w, err := in.create(ctx, cancel, opts)
	if err != nil {
		_, err = added(ctx, nil, err)
		cancel(nil)
		return nil, err
	}
	w.mu.Lock() // it may be dropped at once
	defer w.mu.Unlock()
	in.s.writing.Add(1)
	stop := context.AfterFunc(in.s.closing, func() {
		if err := w.quit(context.Cause(in.s.closing), false); err != nil {
			in.s.log.Warn("what was being taken in could not be removed; the next start will", "error", err)
		}
	})
	w.over = sync.OnceFunc(func() {
		stop()
		in.s.writing.Done()
	})
	in.open = w
	return w, nil
}

// create begins to take in content. The caller finishes or drops it.
func (in *ingest) create(ctx context.Context, cancel context.CancelCauseFunc, opts p2p.AddOptions) (*writer, error) {
	w := &writer{in: in, opts: opts, ctx: ctx, cancel: cancel, a: &addition{},
		recorder: digest.NewRecorder(opts.HashWith())}
	if opts.Want != "" {
		if recognized, err := in.recognizes(ctx, opts.Want); recognized || err != nil {
			return w, err
		}
	}
	var err error
	if w.a.name, w.a.f, err = in.s.bytes.Create(); err != nil {
		return nil, err
	}
	return w, nil
}

// Write implements [io.Writer].
func (w *writer) Write(p []byte) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return 0, w.err
	}
	if w.err = w.in.s.begin(w.ctx); w.err != nil {
		return 0, w.err
	}
	defer w.in.s.end()
	if n, err = w.take(p); err != nil {
		_, w.err = added(w.ctx, nil, errors.Join(err, w.drop()))
	}
	return n, w.err
}

// Finish implements [p2p.Writer].
func (w *writer) Finish() (p2p.Added, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return p2p.Added{}, w.err
	}
	if w.err = w.in.s.begin(w.ctx); w.err != nil {
		return p2p.Added{}, w.err
	}
	defer w.in.s.end()
	defer w.over()
	defer w.cancel(nil)
	a, err := w.finish(nil)
	done, err := added(w.ctx, a, err)
	if w.err = err; err == nil {
		w.err, w.in.open = errFinished, nil
	}
	return done, err
}

// abandon drops what is not finished, when the ingest is closed; open says that the store is not.
func (w *writer) abandon(open bool) error {
	w.in.open = nil
	return w.quit(p2p.ErrClosed, open)
}

// quit drops what is not finished, for the reason why.
func (w *writer) quit(why error, open bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = why
	}
	defer w.over()
	defer w.cancel(nil)
	if !open && w.a != nil && w.a.f == nil {
		return nil // with the store, all that is held has been let go
	}
	return w.drop()
}

// takeAll takes in src up to its end, in the kernel where it is a file and that can be.
func (w *writer) takeAll(src io.Reader, file *source.File) error {
	if file != nil && w.a.f != nil {
		copied, err := copyFile(w.a.f, file.File, file.Start, func(end int64) error { return w.took(end, nil) })
		if copied || err != nil {
			return err
		}
	}
	if file != nil {
		from := file.Start + w.end // a part may be copied
		src = io.NewSectionReader(file, from, 1<<63-1-from)
	} else {
		var done func()
		src, done = interruptible(w.ctx, src)
		defer done()
	}
	var failed error
	_, err := source.Copy(source.WriterFunc(func(p []byte) (n int, err error) {
		n, failed = w.take(p)
		return n, failed
	}), src)
	if err != nil && failed == nil {
		err = fmt.Errorf("read the source: %w", err)
	}
	return err
}

// interruptible returns a stream whose Read ends with ctx, and does no harm. The caller calls done.
func interruptible(ctx context.Context, src io.Reader) (_ io.Reader, done func()) {
	interrupt := source.Interruptor(src)
	src = source.Guard(ctx, src)
	if interrupt != nil {
		stop := context.AfterFunc(ctx, interrupt)
		return src, func() { stop() }
	}
	r, w := io.Pipe()
	go func() {
		_, err := source.Copy(w, src)
		w.CloseWithError(err)
	}()
	stop := context.AfterFunc(ctx, func() { r.CloseWithError(context.Cause(ctx)) })
	return r, func() {
		stop()
		r.Close()
	}
}

// take takes in p. What is hashed beside what follows is a copy: p stays the caller's.
func (w *writer) take(p []byte) (n int, err error) {
	for n < len(p) {
		part := source.Buffer(len(p) - n)
		part = part[:copy(part, p[n:])]
		if w.a.f != nil {
			if err := w.write(part); err != nil {
				source.Release(part)
				return n, err
			}
		}
		if err := w.took(w.end+int64(len(part)), part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, context.Cause(w.ctx)
}

// write writes part to the end of the file. Blocks of zeros become holes.
func (w *writer) write(part []byte) error {
	for off, data := 0, 0; off < len(part); {
		next := min(off+source.HoleLength, len(part))
		if hole := source.IsZero(part[off:next]); hole || next == len(part) {
			if !hole {
				off = next
			}
			if data < off {
				if _, err := w.a.f.WriteAt(part[data:off], w.end+int64(data)); err != nil {
					return err
				}
			}
			data, w.hole = next, hole
		}
		off = next
	}
	return nil
}

// took says that the content has bytes up to end, and has them hashed: part, a buffer that is given
// back then, or what the file has, where the kernel has copied them. It waits until all before them are.
func (w *writer) took(end int64, part []byte) error {
	w.end = end
	err := w.account()
	w.hashing.Wait()
	if err = cmp.Or(err, context.Cause(w.ctx)); err != nil {
		if part != nil {
			source.Release(part)
		}
		return err
	}
	w.hashing.Go(func() {
		if err := w.hash(end, part); err != nil {
			w.cancel(err)
			return
		}
		if w.opts.Progress != nil && w.ctx.Err() == nil {
			w.opts.Progress(end)
		}
	})
	return nil
}

// account counts what the file has, and has the disk begin with it.
func (w *writer) account() error {
	if w.a.f == nil {
		return nil
	}
	// What is small may be here already, as the empty configuration is: that shows when it is hashed.
	if err := w.in.s.account(w.a, w.end); err != nil && w.end > p2p.MaxManifest {
		return err
	}
	if w.end-w.flushed >= chunk {
		startWriteBack(w.a.f, w.flushed, w.end)
		w.flushed = w.end
	}
	return nil
}

// hash feeds the recorder up to end: with what passed through memory, or, where the
// kernel has copied, with what the file has then.
func (w *writer) hash(end int64, part []byte) error {
	if part != nil {
		defer source.Release(part)
		_, err := w.recorder.Write(part)
		return err
	}
	buf := source.Buffer(0)
	defer source.Release(buf)
	for w.recorder.Size() < end && w.ctx.Err() == nil {
		p := buf[:min(int64(len(buf)), end-w.recorder.Size())]
		if _, err := w.a.f.ReadAt(p, w.recorder.Size()); err != nil {
			return fmt.Errorf("read back what was copied: %w", err)
		}
		if _, err := w.recorder.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// finish makes what was taken in, from a file where that is not nil, part of the ingest, or drops it.
func (w *writer) finish(file *source.File) (*addition, error) {
	w.hashing.Wait()
	err := context.Cause(w.ctx)
	if err == nil && w.hole {
		err = w.a.f.Truncate(w.end)
	}
	if err == nil {
		w.a.table, err = w.recorder.Table()
	}
	if err == nil {
		err = file.Unchanged(w.ctx, w.a.table.Digest, w.a.table.Size)
	}
	if err == nil && w.opts.Want != "" {
		err = match(w.opts.Want, w.a.table)
	}
	if err != nil {
		return nil, errors.Join(err, w.drop())
	}
	a := w.a
	w.a = nil
	if a.f == nil {
		return w.in.register(a), nil
	}
	return w.in.keep(a)
}

// drop removes what was taken in.
func (w *writer) drop() error {
	w.hashing.Wait()
	a := w.a
	w.a = nil
	switch {
	case a == nil:
		return nil
	case a.f != nil:
		return a.discard(w.in.s)
	}
	return w.in.s.letGo(w.opts.Want, false)
}
