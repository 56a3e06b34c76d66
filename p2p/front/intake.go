package front

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// All that comes from sources comes in here. What is kept of it is decided here, too.

// newTask is how a task is kept that a source has described.
func newTask(info p2p.Info) p2p.NewTask {
	n := p2p.NewTask{Task: info.Task, MediaType: info.MediaType, Keep: p2p.KeepUntilReferred, Origin: info.Origin,
		After: info.After}
	if info.Keep == p2p.KeepPinned {
		n.Keep = p2p.KeepPinned
	}
	if n.Origin.IsZero() {
		n.Origin = time.Unix(0, 1).UTC() // never now: that is for what is imported here
	}
	return n
}

// opaqueTask is how a task is kept of which a source has said no more than that it has it. content
// is nil where it is too long for a manifest.
func opaqueTask(task p2p.Task, content []byte) p2p.NewTask {
	n := p2p.NewTask{Task: task, Keep: p2p.KeepUntilReferred, Origin: time.Now()} // nobody knows when it was imported
	n.MediaType, n.Manifest = manifest.Detect(content)
	return n
}

// describe puts right what a source has told of a task with what its content, which is proven,
// says of itself. It returns what that refers to, or nil where it is no manifest.
func (e *Engine) describe(info *p2p.Info, content []byte) (refs *p2p.NewManifest) {
	told, toldManifest := info.MediaType, info.IsManifest
	if toldManifest {
		info.MediaType, refs = manifest.Describe(told, content)
	} else if detected, found := manifest.Detect(content); found != nil {
		info.MediaType, refs = detected, found
	}
	info.IsManifest = refs != nil
	table := digest.Table{Size: int64(len(content)), PieceLength: digest.PieceLength(int64(len(content)))}
	info.Size, info.PieceLength, info.Pieces = table.Size, table.PieceLength, table.Pieces()
	if info.MediaType != told || info.IsManifest != toldManifest {
		e.log.Warn("content is not what a peer says it is", "task", info.Task.String(), "told", told,
			"is", info.MediaType, "manifest", info.IsManifest)
	}
	return refs
}

// commit commits c, and with it the content of its first task, which is verified, where src is
// not nil.
func (e *Engine) commit(ctx context.Context, src io.Reader, c p2p.Commit) error {
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if src != nil {
		if _, err := in.Add(src, p2p.AddOptions{Want: c.Tasks[0].Task.Digest}); err != nil {
			return err
		}
	}
	return in.Commit(c)
}

// keep stores content that was found, with what it refers to, and the names that led to it. refs
// and names may be nil.
func (e *Engine) keep(
	ctx context.Context, info p2p.Info, content []byte, refs *p2p.NewManifest, names []p2p.NewName,
) error {
	n := newTask(info)
	n.Manifest = refs
	c := p2p.Commit{Tasks: []p2p.NewTask{n}, Names: names}
	return e.commit(ctx, bytes.NewReader(content), c)
}

// adopt makes a task of a blob that is here under another tag.
func (e *Engine) adopt(ctx context.Context, found Found) error {
	info := found.Info
	var content []byte
	var err error
	if info.IsManifest || found.Opaque {
		if content, err = e.readBlob(ctx, info.Task.Digest); err != nil {
			return err
		}
	}
	var n p2p.NewTask
	if found.Opaque {
		n = opaqueTask(info.Task, content)
	} else {
		var refs *p2p.NewManifest
		if info.IsManifest {
			refs = e.describe(&info, content)
		}
		n = newTask(info)
		n.Manifest = refs
	}
	c := p2p.Commit{Tasks: []p2p.NewTask{n}}
	if err := e.commit(ctx, nil, c); err != nil {
		return err
	}
	for _, s := range e.sources { // as none has brought it, none knows
		if err := s.Offer(ctx, c); err != nil {
			e.log.Warn("a source was not told of what is here now", "task", n.Task.String(), "source", s.Name(),
				"error", err)
		}
	}
	return nil
}

// readBlob reads as much of a blob as a manifest may have, that is here under some tag.
func (e *Engine) readBlob(ctx context.Context, d digest.Digest) ([]byte, error) {
	for entry, err := range e.store.List(ctx, p2p.Query{Kind: p2p.KindTags, Has: d}) {
		if err != nil {
			return nil, err
		}
		blob, err := e.store.OpenForPeers(ctx, p2p.Task{Tag: entry.Task.Tag, Digest: d})
		if err != nil {
			return nil, err
		}
		defer blob.Close()
		if blob.Size() > p2p.MaxManifest {
			return nil, nil
		}
		content := make([]byte, blob.Size())
		_, err = io.ReadFull(io.NewSectionReader(blob, 0, blob.Size()), content)
		return content, err
	}
	return nil, fmt.Errorf("blob %s: %w", d, p2p.ErrNotFound)
}

// Complete stores a blob of which all pieces have come, and are proven by a hash chain, under
// the tasks that infos describe. The partial blob stays the caller's to close.
func (e *Engine) Complete(ctx context.Context, partial *pieces.Partial, size int64, infos []p2p.Info) error {
	var c p2p.Commit
	for _, info := range infos {
		var refs *p2p.NewManifest
		if info.IsManifest {
			content := make([]byte, min(size, p2p.MaxManifest))
			if err := readPartial(partial, content); err == nil {
				refs = e.describe(&info, content)
			}
		}
		n := newTask(info)
		n.Manifest = refs
		c.Tasks = append(c.Tasks, n)
	}
	return partial.Commit(ctx, c)
}

func readPartial(partial *pieces.Partial, p []byte) error {
	f, err := partial.File()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.ReadFull(f, p)
	return err
}

// Room reports whether the store has room for what is to be brought, of so many bytes, or of an
// unknown size where that is below 0: else the error matches [p2p.ErrNoSpace]. Sources ask before
// they begin.
func (e *Engine) Room(task p2p.Task, size int64) error {
	if err := e.store.Room(max(size, 0)); err != nil {
		return fmt.Errorf("fetch %s of %d bytes: %w", task, size, err)
	}
	return nil
}

// Take stores the content of a file that a source has brought whole, where it is what was
// asked for: the error matches [digest.ErrMismatch] where it is not. The content is
// copied: the file may be known by other names. The caller closes the file.
func (e *Engine) Take(ctx context.Context, task p2p.Task, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := e.Room(task, info.Size()); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	var src io.Reader = f
	var content []byte
	if info.Size() <= p2p.MaxManifest {
		// What is looked at is what is verified, whoever changes the file meanwhile.
		if content, err = io.ReadAll(io.LimitReader(f, p2p.MaxManifest+1)); err != nil {
			return err
		}
		src = bytes.NewReader(content)
	}
	return e.commit(ctx, src, p2p.Commit{Tasks: []p2p.NewTask{opaqueTask(task, content)}})
}

// Receiving is a blob that a source brings whole, in parts that come in any order. They are written
// where they stay.
type Receiving struct {
	*pieces.Receiver
	task p2p.Task
}

// Receive begins to take in a task's blob from a source. ctx bounds all of it. The caller closes what it
// returns.
func (e *Engine) Receive(ctx context.Context, task p2p.Task) (*Receiving, error) {
	r, err := e.store.Receive(ctx, task.Digest)
	if err != nil {
		return nil, err
	}
	return &Receiving{r, task}, nil
}

// Keep stores the content, of so many bytes, all of which have come, where it is what was asked for: the
// error matches [digest.ErrMismatch] where it is not. Nobody writes any more.
func (r *Receiving) Keep(size int64) error {
	if err := r.Advance(size); err != nil {
		return err
	}
	var content []byte
	if size <= p2p.MaxManifest {
		content = make([]byte, size)
		if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), content); err != nil {
			return err
		}
	}
	return r.Commit(p2p.Commit{Tasks: []p2p.NewTask{opaqueTask(r.task, content)}})
}

// once is a blob that is brought whole, for all who want it.
type once struct {
	task    p2p.Task
	cancel  context.CancelCauseFunc
	waiting int           // callers; guarded by Engine.mu
	done    chan struct{} // closed when nothing of it is left
	err     error         // once done is closed
}

var errUnwanted = errors.New("nobody waits for it any more")

// Once runs bring, which brings a task's blob whole, for all who want the blob at the same
// time, until it is stored, or nobody waits for it any more.
func (e *Engine) Once(ctx context.Context, task p2p.Task, bring func(context.Context) error) error {
	for {
		o := e.join(task, bring)
		select {
		case <-o.done:
		case <-ctx.Done():
		}
		e.leave(o)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if o.task.Tag != task.Tag && o.err == nil {
			return nil // it is here now, under another tag
		}
		// It may have been for another tag, or have ended as this caller came.
		if o.task == task && !errors.Is(o.err, errUnwanted) {
			return o.err
		}
	}
}

// join returns the once of a task's blob, and begins one where there is none. The caller
// leaves it.
func (e *Engine) join(task p2p.Task, bring func(context.Context) error) *once {
	e.mu.Lock()
	defer e.mu.Unlock()
	o := e.once[task.Digest]
	if o == nil {
		o = &once{task: task, done: make(chan struct{})}
		var ctx context.Context
		ctx, o.cancel = context.WithCancelCause(e.ctx)
		e.once[task.Digest] = o
		e.running.Go(func() {
			if !e.whole(ctx, task) { // it may have come, or have been mended, just before
				o.err = bring(ctx)
			}
			o.cancel(nil)
			e.mu.Lock()
			delete(e.once, task.Digest)
			e.mu.Unlock()
			close(o.done)
		})
	}
	o.waiting++
	return o
}

// leave takes back a join. The last one ends what is under way.
func (e *Engine) leave(o *once) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if o.waiting--; o.waiting == 0 {
		o.cancel(errUnwanted)
	}
}

// whole reports whether a task is here, without damage.
func (e *Engine) whole(ctx context.Context, task p2p.Task) bool {
	blob, err := e.store.OpenForPeers(ctx, task)
	if err != nil {
		return false
	}
	defer blob.Close()
	return blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil) == nil
}

// Ingest implements [p2p.Engine]. Sources are told of what is committed before Commit returns.
func (e *Engine) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := e.Begin(ctx); err != nil {
		return nil, err
	}
	defer e.End()
	in, err := e.store.Ingest(ctx)
	if err != nil {
		return nil, err
	}
	return &ingest{in, ctx, e}, nil
}

// ingest offers what is committed.
type ingest struct {
	p2p.Ingest
	ctx context.Context
	e   *Engine
}

func (in *ingest) Commit(c p2p.Commit) error {
	e := in.e
	if err := e.Begin(in.ctx); err != nil {
		return err
	}
	defer e.End()
	for _, s := range e.sources {
		if err := awaitNeeds(in.ctx, s, c); err != nil {
			return err
		}
	}
	if names := e.names(); names != nil && len(c.Names) > 0 {
		c.Names = names.After(in.ctx, c.Names)
	}
	if err := in.Ingest.Commit(c); err != nil {
		return err
	}
	var errs []error
	for _, s := range e.sources {
		errs = append(errs, s.Offer(in.ctx, c))
	}
	return errors.Join(errs...)
}

// awaitNeeds waits for what a manifest needs, and has all arrived, to be stored: a client that
// has read it may build on it.
func awaitNeeds(ctx context.Context, s Source, c p2p.Commit) error {
	a, ok := s.(Arrivals)
	if !ok {
		return nil
	}
	for _, n := range c.Tasks {
		if n.Manifest == nil {
			continue
		}
		for _, d := range n.Manifest.Needs {
			if err := a.Await(ctx, p2p.Task{Tag: n.Task.Tag, Digest: d}); err != nil {
				return err
			}
		}
	}
	return nil
}
