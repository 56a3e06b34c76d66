package memory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/source"
)

// ingest is content that was added and not committed yet. It implements
// [p2p.Ingest].
type ingest struct {
	s     *Store
	ctx   context.Context
	added map[digest.Digest]*blob
	open  bool // something was created and is not finished
	done  bool
}

// Ingest implements [p2p.Engine].
func (s *Store) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	return &ingest{s: s, ctx: ctx, added: map[digest.Digest]*blob{}}, nil
}

// Room implements [p2p.Ingest]: what memory there is can't be told.
func (in *ingest) Room(int64) error { return nil }

// Close implements [p2p.Ingest].
func (in *ingest) Close() error {
	in.done, in.added = true, nil
	return nil
}

// begin announces a call of the ingest, without the lock: what comes may take long.
func (in *ingest) begin() error {
	switch {
	case in.open:
		return errors.New("what the ingest takes in is not finished")
	case in.done:
		return errors.New("the ingest is committed or closed already")
	}
	return in.s.enter(in.ctx)
}

// Add implements [p2p.Ingest].
func (in *ingest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	if err := in.begin(); err != nil {
		return p2p.Added{}, err
	}
	defer in.s.calls.Done()
	if err := opts.Validate(); err != nil {
		return p2p.Added{}, err
	}
	if err := source.Check(src); err != nil {
		return p2p.Added{}, err
	}
	ctx, cancel := context.WithCancelCause(in.ctx)
	defer cancel(nil)
	defer context.AfterFunc(in.s.ctx, func() { cancel(context.Cause(in.s.ctx)) })()
	file, err := source.New(src)
	if err != nil {
		return p2p.Added{}, err
	}
	w := newWriter(opts)
	if err := read(ctx, w, src); err != nil {
		return p2p.Added{}, err
	}
	b, err := w.finish(ctx, file)
	return in.keep(b, err)
}

// read has w take in a source to its end, in a goroutine, for which nobody waits when ctx has
// ended and nothing interrupts the source.
func read(ctx context.Context, w *writer, src io.Reader) error {
	results := make(chan error, 1)
	interrupt := source.Interruptor(src)
	if interrupt != nil {
		defer context.AfterFunc(ctx, interrupt)()
	}
	go func() {
		_, err := source.Copy(w, source.Guard(ctx, src))
		results <- err
	}()
	var err error
	select {
	case err = <-results:
	case <-ctx.Done():
		if interrupt != nil {
			<-results
		}
		return context.Cause(ctx)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	if err != nil {
		return fmt.Errorf("read the source: %w", err)
	}
	return nil
}

// keep makes a blob, unless there is an error, part of the ingest.
func (in *ingest) keep(b *blob, err error) (p2p.Added, error) {
	if err != nil {
		return p2p.Added{}, err
	}
	in.added[b.table.Digest] = b
	return p2p.Added{Digest: b.table.Digest, Size: b.table.Size}, nil
}

// writer takes in content.
type writer struct {
	opts     p2p.AddOptions
	recorder *digest.Recorder
	data     bytes.Buffer
}

func newWriter(opts p2p.AddOptions) *writer {
	return &writer{opts: opts, recorder: digest.NewRecorder(opts.HashWith())}
}

// Write implements [io.Writer].
func (w *writer) Write(p []byte) (int, error) {
	w.data.Write(p)
	if w.opts.Progress != nil {
		w.opts.Progress(int64(w.data.Len()))
	}
	return w.recorder.Write(p)
}

// finish returns a blob with what was written, from a file where that is not nil.
func (w *writer) finish(ctx context.Context, file *source.File) (*blob, error) {
	table, err := w.recorder.Table()
	if err == nil {
		err = file.Unchanged(ctx, table.Digest, table.Size)
	}
	if err != nil {
		return nil, err
	}
	if want := w.opts.Want; want != "" && table.Digest != want {
		return nil, &digest.MismatchError{Want: want, Got: table.Digest}
	}
	return &blob{table: table, data: w.data.Bytes()}, nil
}

// created is a writer that the caller has. It implements [p2p.Writer].
type created struct {
	*writer
	in  *ingest
	err error // why nothing more can be taken in
}

// Create implements [p2p.Ingest].
func (in *ingest) Create(opts p2p.AddOptions) (p2p.Writer, error) {
	if err := in.begin(); err != nil {
		return nil, err
	}
	defer in.s.calls.Done()
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	in.open = true
	return &created{writer: newWriter(opts), in: in}, nil
}

// begin announces a call of the writer.
func (c *created) begin() error {
	if c.err == nil && c.in.done {
		c.err = p2p.ErrClosed
	}
	if c.err == nil {
		c.err = c.in.s.enter(c.in.ctx)
	}
	return c.err
}

// Write implements [io.Writer].
func (c *created) Write(p []byte) (int, error) {
	if err := c.begin(); err != nil {
		return 0, err
	}
	defer c.in.s.calls.Done()
	return c.writer.Write(p)
}

// Finish implements [p2p.Writer].
func (c *created) Finish() (p2p.Added, error) {
	if err := c.begin(); err != nil {
		return p2p.Added{}, err
	}
	defer c.in.s.calls.Done()
	b, err := c.finish(c.in.ctx, nil)
	if c.err = err; err == nil {
		c.in.open, c.err = false, errors.New("the content is finished already")
	}
	return c.in.keep(b, err)
}

// Rehash implements [p2p.Ingest].
func (in *ingest) Rehash(d, want digest.Digest) (p2p.Added, error) {
	if _, err := digest.Parse(string(want)); err != nil {
		return p2p.Added{}, err
	}
	b := in.added[d]
	if b == nil {
		return p2p.Added{}, fmt.Errorf("rehash %s: %w: it was not added", d, p2p.ErrNotFound)
	}
	return in.Add(bytes.NewReader(b.data), p2p.AddOptions{Want: want})
}

// Commit implements [p2p.Ingest].
func (in *ingest) Commit(c p2p.Commit) error {
	s := in.s
	if err := in.begin(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.end()
	if err := c.Validate(); err != nil {
		return err
	}
	if err := in.check(c); err != nil {
		return err
	}
	in.done = true
	for _, n := range c.Tasks {
		s.put(n, in.added[n.Task.Digest])
	}
	var gone p2p.Deleted
	for _, n := range c.Names {
		s.point(n, &gone)
	}
	for _, n := range c.Tasks {
		s.settle(n)
	}
	return nil
}

// check looks whether everything is there that a commit speaks of.
//
//nolint:cyclop // a list of rules
func (in *ingest) check(c p2p.Commit) error {
	for _, e := range c.Expect {
		if err := in.s.expect(e); err != nil {
			return err
		}
	}
	committed := map[p2p.Task]bool{}
	for _, n := range c.Tasks {
		committed[n.Task] = true
		b := in.added[n.Task.Digest]
		if b == nil {
			b = in.s.blobs[n.Task.Digest]
		}
		if b == nil {
			return fmt.Errorf("commit %s: %w: it was not added, and is not here", n.Task, p2p.ErrNotFound)
		}
		k, named := in.s.at(n.Task.Tag).tasks[n.Task.Digest], pointsTo(c, n.Task)
		if k != nil && n.Origin.IsZero() && (n.Manifest != nil || k.manifest == nil && named) {
			if err := in.s.checkType(n.Task, n.MediaType); err != nil {
				return err
			}
		}
		if n.Manifest != nil && b.table.Size > p2p.MaxManifest {
			return fmt.Errorf("manifest %s: %w: it has %d bytes, at most %d are allowed", n.Task, digest.ErrInvalid,
				b.table.Size, p2p.MaxManifest)
		}
	}
	for _, n := range c.Tasks {
		if n.Manifest == nil {
			continue
		}
		t := in.s.at(n.Task.Tag)
		for _, need := range n.Manifest.Needs {
			var lacks []digest.Digest
			t.lacks(need, map[digest.Digest]bool{}, &lacks)
			if t.tasks[need] == nil && !committed[p2p.Task{Tag: n.Task.Tag, Digest: need}] || len(lacks) > 0 {
				if t.tasks[need] == nil && len(t.referring(need)) > 0 {
					t.lost[need] = true
				}
				return &p2p.MissingRefError{Manifest: n.Task.Digest, Missing: need}
			}
		}
	}
	for _, n := range c.Names {
		task := p2p.Task{Tag: n.Tag, Digest: n.Digest}
		if in.s.at(n.Tag).tasks[n.Digest] == nil && !committed[task] {
			return fmt.Errorf("name %s: %w: there is no %s", n.Name, p2p.ErrNotFound, task)
		}
		if err := in.s.checkType(task, n.MediaType); err != nil {
			return err
		}
	}
	return nil
}

// expect fails where a cid stands for something else than is expected.
func (s *Store) expect(e p2p.Expectation) error {
	t, is := s.at(e.Tag), e.CID.Digest()
	if id := e.CID.CacheID(); id != "" {
		is = t.names[id].digest
	} else if k := t.tasks[is]; k == nil || k.manifest == nil {
		is = ""
	}
	if is != e.Digest {
		return fmt.Errorf("%s: %w", p2p.Describe(e.Tag, e.CID), p2p.ErrMoved)
	}
	return nil
}

// pointsTo reports whether a commit points a name to a task.
func pointsTo(c p2p.Commit, t p2p.Task) bool {
	return slices.ContainsFunc(c.Names, func(n p2p.NewName) bool { return n.Tag == t.Tag && n.Digest == t.Digest })
}

// checkType refuses another media type for a manifest, and for what a name points to.
func (s *Store) checkType(t p2p.Task, mediaType string) error {
	k := s.at(t.Tag).tasks[t.Digest]
	if k == nil || mediaType == "" || k.mediaType == "" || k.mediaType == mediaType ||
		k.manifest == nil && len(s.at(t.Tag).namesOf(t.Digest)) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w: it is here as %q, and can't be %q too", t, digest.ErrInvalid, k.mediaType, mediaType)
}

// put makes a task, or adds to one that is there.
func (s *Store) put(n p2p.NewTask, added *blob) {
	d := n.Task.Digest
	if s.blobs[d] == nil {
		s.blobs[d] = added
	}
	t := s.at(n.Task.Tag)
	s.tags[n.Task.Tag] = t
	delete(t.lost, d)
	k, now := t.tasks[d], time.Now()
	if k == nil {
		k = &task{blob: s.blobs[d], imported: now, origin: n.Origin, after: n.After,
			loose: n.Keep == p2p.KeepUntilReferred}
		if k.origin.IsZero() {
			k.origin = now
		}
		t.tasks[d] = k
	}
	if n.MediaType != "" && (k.mediaType == "" || n.Manifest != nil && k.manifest == nil ||
		k.manifest == nil && len(t.namesOf(d)) == 0) {
		k.mediaType = n.MediaType
	}
	if n.Keep == p2p.KeepUntilReferred {
		k.leases = append(k.live(), now.Add(s.lease))
	}
	if n.Keep == p2p.KeepPinned {
		k.pinned, k.loose = true, false
	}
	if n.Manifest == nil {
		return
	}
	var before []digest.Digest
	if k.manifest != nil {
		before = k.manifest.Refs
	}
	k.manifest = &p2p.NewManifest{Refs: slices.Clone(n.Manifest.Refs), Subject: n.Manifest.Subject}
	for _, ref := range k.manifest.Refs {
		t.adopt(ref)
	}
	s.letGo(t, new(p2p.Deleted), before...)
}

// adopt says that something holds a task now: the client that was told of it has come.
func (t *tag) adopt(d digest.Digest) {
	if k := t.tasks[d]; k != nil {
		k.loose = false
		if live := k.live(); len(live) > 0 {
			k.leases = live[1:]
		}
	}
}

// point points a name to a task, and lets go of what it pointed to.
func (s *Store) point(n p2p.NewName, gone *p2p.Deleted) {
	t := s.at(n.Tag)
	old, moved := t.names[n.Name]
	if n.Updated.IsZero() {
		n.Updated = time.Now()
	} else if moved && old.updated.After(n.Updated) {
		return
	} else {
		n.KeepOld = true
	}
	if n.MediaType != "" && t.tasks[n.Digest].manifest == nil {
		t.tasks[n.Digest].mediaType = n.MediaType
	}
	described := slices.Clone(n.Description)
	if n.Description == nil && old.digest == n.Digest {
		described = old.described
	} else if string(n.Description) == "{}" {
		described = nil
	}
	t.names[n.Name] = name{n.Digest, n.Updated, described}
	t.adopt(n.Digest)
	if !moved || old.digest == n.Digest {
		return
	}
	if n.KeepOld {
		s.keepLoose(t, old.digest)
	} else {
		s.letGo(t, gone, old.digest)
	}
}

// settle looks what holds a task already that was committed: what refers to it,
// and its subject, which it was for. What is about it is held by it.
func (s *Store) settle(n p2p.NewTask) {
	t, d := s.at(n.Task.Tag), n.Task.Digest
	if t.isHeld(d) {
		t.tasks[d].loose = false
	}
	for other, k := range t.tasks {
		if k.manifest == nil || k.manifest.Subject == "" {
			continue
		}
		if k.manifest.Subject == d || other == d && t.tasks[k.manifest.Subject] != nil {
			t.adopt(other)
		}
	}
}
