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

// Add implements [p2p.Ingest].
func (in *ingest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	if err := in.s.begin(in.ctx); err != nil {
		return p2p.Added{}, err
	}
	in.s.mu.Unlock() // the source may take long
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
	b, err := read(ctx, src, opts.HashWith(), opts.Progress)
	if err != nil {
		return p2p.Added{}, err
	}
	if err := file.Unchanged(ctx, b.table.Digest, b.table.Size); err != nil {
		return p2p.Added{}, err
	}
	if opts.Want != "" && b.table.Digest != opts.Want {
		return p2p.Added{}, &digest.MismatchError{Want: opts.Want, Got: b.table.Digest}
	}
	in.added[b.table.Digest] = b
	return p2p.Added{Digest: b.table.Digest, Size: b.table.Size}, nil
}

// read reads all of a source, in a goroutine, for which nobody waits when ctx has
// ended and nothing interrupts the source.
func read(ctx context.Context, src io.Reader, alg digest.Algorithm, progress func(int64)) (*blob, error) {
	type result struct {
		b   *blob
		err error
	}
	results := make(chan result, 1)
	interrupt := source.Interruptor(src)
	if interrupt != nil {
		defer context.AfterFunc(ctx, interrupt)()
	}
	go func() {
		b, err := readAll(source.Guard(ctx, src), alg, progress)
		results <- result{b, err}
	}()
	var r result
	select {
	case r = <-results:
	case <-ctx.Done():
		if interrupt != nil {
			<-results
		}
		return nil, context.Cause(ctx)
	}
	if cause := context.Cause(ctx); r.err != nil && cause != nil {
		r.err = cause
	}
	return r.b, r.err
}

func readAll(src io.Reader, alg digest.Algorithm, progress func(int64)) (*blob, error) {
	recorder := digest.NewRecorder(alg)
	b := &blob{}
	buf := make([]byte, 256<<10)
	for {
		n, err := src.Read(buf)
		recorder.Write(buf[:n])
		b.data = append(b.data, buf[:n]...)
		if progress != nil && n > 0 {
			progress(int64(len(b.data)))
		}
		if errors.Is(err, io.EOF) {
			b.table, err = recorder.Table()
			return b, err
		}
		if err != nil {
			return nil, fmt.Errorf("read the source: %w", err)
		}
	}
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
	if err := s.begin(in.ctx); err != nil {
		return err
	}
	defer s.end()
	if in.done {
		return errors.New("commit: the ingest is committed or closed already")
	}
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
func (in *ingest) check(c p2p.Commit) error {
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
		if n.Manifest != nil && b.table.Size > p2p.MaxManifest {
			return fmt.Errorf("manifest %s: %w: it has %d bytes, at most %d are allowed", n.Task, digest.ErrInvalid, b.table.Size, p2p.MaxManifest)
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
				if t.tasks[need] == nil && len(t.holders(need)) > 0 {
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
	}
	return nil
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
		k = &task{blob: s.blobs[d], imported: now, origin: n.Origin, after: n.After, loose: n.Keep == p2p.KeepLoose}
		if k.origin.IsZero() {
			k.origin = now
		}
		t.tasks[d] = k
	}
	if n.MediaType != "" {
		k.mediaType = n.MediaType
	}
	if n.Keep == p2p.KeepLoose {
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

// adopt says that something holds a task now: whoever was told of it has come.
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
	t.names[n.Name] = name{n.Digest, n.Updated}
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
