package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// store is an engine for tests: files in a directory, everything else in memory.
type store struct {
	dir     string
	ingests atomic.Int32 // open
	adds    atomic.Int32 // begun

	mu     sync.Mutex
	tables map[digest.Digest]*digest.Table
	tasks  map[p2p.Task]p2p.NewTask
	names  map[p2p.Task]p2p.NewName // the digest is that of nothing: a name is not one
}

func newStore(dir string) *store {
	return &store{
		dir:    dir,
		tables: make(map[digest.Digest]*digest.Table),
		tasks:  make(map[p2p.Task]p2p.NewTask),
		names:  make(map[p2p.Task]p2p.NewName),
	}
}

// waitIdle waits until no ingest is open.
func (s *store) waitIdle(t *testing.T) {
	t.Helper()
	eventually(t, "ingests are closed", func() bool { return s.ingests.Load() == 0 })
}

var imported = time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.UTC)

func (s *store) path(d digest.Digest) string { return filepath.Join(s.dir, d.Encoded()) }

func nameKey(tag, name string) p2p.Task { return p2p.Task{Tag: tag, Digest: digest.Digest(name)} }

func (s *store) info(t p2p.Task) p2p.Info {
	table := s.tables[t.Digest]
	return p2p.Info{
		Task: t, Size: table.Size, PieceLength: table.PieceLength,
		Pieces: table.Pieces(), Held: table.Pieces(),
		MediaType: s.tasks[t].MediaType, IsManifest: s.tasks[t].Manifest != nil, Keep: s.tasks[t].Keep,
		Imported: imported,
	}
}

func (s *store) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if name, ok := s.names[nameKey(tag, cid.CacheID())]; ok {
		task.Digest = name.Digest
	}
	if _, ok := s.tasks[task]; !ok {
		return p2p.Info{}, fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
	}
	info := s.info(task)
	if !opts.Manifest || !info.IsManifest {
		return info, nil
	}
	content, err := os.ReadFile(s.path(task.Digest))
	if err != nil {
		return p2p.Info{}, err
	}
	info.Manifest = &p2p.Manifest{Content: content}
	for _, ref := range s.tasks[task].Manifest.Refs {
		if ref := (p2p.Task{Tag: tag, Digest: ref}); s.tasks[ref].Task == ref {
			info.Manifest.Refs = append(info.Manifest.Refs, s.info(ref))
		}
	}
	return info, nil
}

type storeBlob struct {
	*digest.Verified
	f *os.File
}

var _ p2p.FileBlob = (*storeBlob)(nil)

func (b *storeBlob) File() *os.File { return b.f }
func (b *storeBlob) Close() error   { return b.f.Close() }

func (b *storeBlob) Sources() []p2p.Source { return nil }

func (s *store) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.tasks[task]; !ok {
		return nil, fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	f, err := os.Open(s.path(task.Digest))
	if err != nil {
		return nil, err
	}
	return &storeBlob{digest.NewVerified(f, s.tables[task.Digest]), f}, nil
}

func (s *store) Delete(ctx context.Context, tag string, cid digest.CID, _ p2p.DeleteOptions) (p2p.Deleted, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	task := p2p.Task{Tag: tag, Digest: cid.Digest()}
	if _, ok := s.tasks[task]; !ok {
		return p2p.Deleted{}, fmt.Errorf("%s: %w", p2p.Describe(tag, cid), p2p.ErrNotFound)
	}
	delete(s.tasks, task)
	return p2p.Deleted{Tasks: 1, Freed: s.tables[task.Digest].Size}, os.Remove(s.path(task.Digest))
}

// List knows nothing of a query but its tag.
func (s *store) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	return func(yield func(p2p.Entry, error) bool) {
		s.mu.Lock()
		var entries []p2p.Entry
		for key, name := range s.names {
			if q.Tag == nil || key.Tag == *q.Tag {
				info := s.info(p2p.Task{Tag: key.Tag, Digest: name.Digest})
				entries = append(entries, p2p.Entry{Info: info, Name: name.Name, Total: 2 * info.Size})
			}
		}
		for task := range s.tasks {
			if q.Tag == nil || task.Tag == *q.Tag {
				info := s.info(task)
				entries = append(entries, p2p.Entry{Info: info, Total: info.Size})
			}
		}
		s.mu.Unlock()
		slices.SortFunc(entries, func(a, b p2p.Entry) int {
			return cmp.Or(cmp.Compare(a.Task.Tag, b.Task.Tag), cmp.Compare(b.Name, a.Name),
				cmp.Compare(a.Task.Digest, b.Task.Digest))
		})
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (s *store) Hold(context.Context, string, digest.CID) error { return nil }

func (s *store) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return s.Stat(ctx, tag, cid, opts)
}

func (s *store) HoldReferrers(context.Context, p2p.Task) error { return nil }

func (s *store) Verify(context.Context, p2p.Task) error { return nil }

func (s *store) Mend(context.Context, p2p.Task) error { return nil }

func (s *store) Close() error { return nil }

type storeIngest struct {
	s      *store
	ctx    context.Context
	added  map[digest.Digest]string
	tables map[digest.Digest]*digest.Table
	closed bool
}

func (s *store) Ingest(ctx context.Context) (p2p.Ingest, error) {
	s.ingests.Add(1)
	return &storeIngest{s: s, ctx: ctx, added: make(map[digest.Digest]string),
		tables: make(map[digest.Digest]*digest.Table)}, nil
}

func (i *storeIngest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	i.s.adds.Add(1)
	f, err := os.CreateTemp(i.s.dir, "ingest-")
	if err != nil {
		return p2p.Added{}, err
	}
	defer f.Close()
	alg := cmp.Or(opts.Algorithm, digest.SHA256)
	if opts.Want != "" {
		alg = opts.Want.Algorithm()
	}
	recorder := digest.NewRecorder(alg)
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		recorder.Write(buf[:n])
		if _, err := f.Write(buf[:n]); err != nil {
			return p2p.Added{}, err
		}
		if opts.Progress != nil {
			opts.Progress(recorder.Size())
		}
		if err == io.EOF {
			break
		}
		if err == nil {
			err = context.Cause(i.ctx)
		}
		if err != nil {
			os.Remove(f.Name())
			return p2p.Added{}, err
		}
	}
	table, err := recorder.Table()
	if err != nil {
		return p2p.Added{}, err
	}
	if opts.Want != "" && opts.Want != table.Digest {
		os.Remove(f.Name())
		return p2p.Added{}, fmt.Errorf("add: %w", &digest.MismatchError{Want: opts.Want, Got: table.Digest})
	}
	i.added[table.Digest], i.tables[table.Digest] = f.Name(), table
	return p2p.Added{Digest: table.Digest, Size: table.Size}, nil
}

func (i *storeIngest) Create(p2p.AddOptions) (p2p.Writer, error) { return nil, errors.ErrUnsupported }

func (i *storeIngest) Room(n int64) error {
	if n > 1<<40 {
		return p2p.ErrNoSpace
	}
	return nil
}

func (i *storeIngest) Rehash(d, want digest.Digest) (p2p.Added, error) {
	f, err := os.Open(i.added[d])
	if err != nil {
		return p2p.Added{}, err
	}
	defer f.Close()
	return i.Add(struct{ io.Reader }{f}, p2p.AddOptions{Want: want})
}

func (i *storeIngest) Commit(c p2p.Commit) error {
	i.s.mu.Lock()
	defer i.s.mu.Unlock()
	for _, t := range c.Tasks {
		if name, ok := i.added[t.Task.Digest]; ok {
			if err := os.Rename(name, i.s.path(t.Task.Digest)); err != nil {
				return err
			}
			delete(i.added, t.Task.Digest)
			i.s.tables[t.Task.Digest] = i.tables[t.Task.Digest]
		} else if i.s.tables[t.Task.Digest] == nil {
			return fmt.Errorf("%s: %w: it was not added", t.Task, digest.ErrInvalid)
		}
		i.s.tasks[t.Task] = t
	}
	for _, n := range c.Names {
		i.s.names[nameKey(n.Tag, n.Name)] = n
	}
	return nil
}

func (i *storeIngest) Close() error {
	if i.closed {
		return nil
	}
	i.closed = true
	defer i.s.ingests.Add(-1)
	var errs []error
	for _, name := range i.added {
		errs = append(errs, os.Remove(name))
	}
	return errors.Join(errs...)
}

// hooked is an engine of which a test replaces some methods.
type hooked struct {
	p2p.Engine
	stat      func(ctx context.Context, opts p2p.StatOptions) (p2p.Info, error)
	open      func(ctx context.Context, task p2p.Task) (p2p.Blob, error)
	ingest    func(ctx context.Context) (p2p.Ingest, error)
	delete    func(opts p2p.DeleteOptions) (p2p.Deleted, error)
	list      func(q p2p.Query) iter.Seq2[p2p.Entry, error]
	hold      func(ctx context.Context, what string, task p2p.Task) error
	replicate func(ctx context.Context, task p2p.Task, n int) ([]string, error)
	peers     func() ([]p2p.Peer, error)
}

func (h *hooked) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	if h.stat == nil {
		return h.Engine.Stat(ctx, tag, cid, opts)
	}
	return h.stat(ctx, opts)
}

func (h *hooked) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	if h.open == nil {
		return h.Engine.Open(ctx, task, scope)
	}
	return h.open(ctx, task)
}

func (h *hooked) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if h.ingest == nil {
		return h.Engine.Ingest(ctx)
	}
	return h.ingest(ctx)
}

func (h *hooked) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	if h.delete == nil {
		return h.Engine.Delete(ctx, tag, cid, opts)
	}
	return h.delete(opts)
}

func (h *hooked) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	if h.list == nil {
		return h.Engine.List(ctx, q)
	}
	return h.list(q)
}

func (h *hooked) Hold(ctx context.Context, tag string, cid digest.CID) error {
	return h.hold(ctx, "hold", p2p.Task{Tag: tag, Digest: cid.Digest()})
}

func (h *hooked) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return p2p.Info{Task: p2p.Task{Tag: tag, Digest: cid.Digest()}}, h.hold(
		ctx, fmt.Sprintf("hold the manifest %+v", opts), p2p.Task{Tag: tag, Digest: cid.Digest()})
}

func (h *hooked) HoldReferrers(ctx context.Context, task p2p.Task) error {
	return h.hold(ctx, "hold the referrers", task)
}

func (h *hooked) Verify(ctx context.Context, task p2p.Task) error { return h.hold(ctx, "verify", task) }

func (h *hooked) Mend(ctx context.Context, task p2p.Task) error { return h.hold(ctx, "mend", task) }

func (h *hooked) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if h.replicate == nil {
		return p2p.Replicate(ctx, h.Engine, tag, cid, n)
	}
	return h.replicate(ctx, p2p.Task{Tag: tag, Digest: cid.Digest()}, n)
}

func (h *hooked) Peers(ctx context.Context) ([]p2p.Peer, error) {
	if h.peers == nil {
		return p2p.Peers(ctx, h.Engine)
	}
	return h.peers()
}
