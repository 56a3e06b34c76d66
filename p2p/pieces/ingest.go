package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/source"
)

// ingest implements [p2p.Ingest].
type ingest struct {
	ctx   context.Context
	s     *Store
	added map[digest.Digest]*addition
	open  *writer // what was created and is not finished, or nil
	done  bool
}

// addition is content whose digest is known. The blob is held.
type addition struct {
	table *digest.Table
	f     *os.File // the copy that has come in; nil where the blob is in the store
	size  int64    // of f in bytes, as counted in incoming; 0 once it is counted in stored
	name  string   // of f; "" once it is among the blobs
	claim string   // what says that the copy may be among the blobs, and no record of it; or ""
}

// Ingest implements [p2p.Engine].
func (s *Store) Ingest(ctx context.Context) (p2p.Ingest, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	return &ingest{ctx: ctx, s: s, added: map[digest.Digest]*addition{}}, nil
}

// begin begins a call of the ingest. It is followed by the store's end.
func (in *ingest) begin() error {
	switch {
	case in.open != nil:
		return errors.New("what the ingest takes in is not finished")
	case in.done:
		return errors.New("the ingest is committed or closed already")
	}
	return in.s.begin(in.ctx)
}

// bound returns a context for an addition that is told of by opts, and what ends it. It ends with the
// ingest's, and with the store.
func (in *ingest) bound(opts *p2p.AddOptions) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(in.ctx)
	stop := context.AfterFunc(in.s.closing, func() { cancel(context.Cause(in.s.closing)) })
	if progress := opts.Progress; progress != nil {
		// It is called in another goroutine, where a panic would end the process.
		opts.Progress = func(taken int64) {
			defer func() {
				if v := recover(); v != nil {
					cancel(fmt.Errorf("what is told of the progress panicked: %v", v))
				}
			}()
			progress(taken)
		}
	}
	return ctx, func(cause error) {
		stop()
		cancel(cause)
	}
}

// added is what there is to be said of an addition.
func added(ctx context.Context, a *addition, err error) (p2p.Added, error) {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		// Whatever broke off broke off because of this.
		err = cause
	}
	if err != nil {
		return p2p.Added{}, DiskError(err)
	}
	return p2p.Added{Digest: a.table.Digest, Size: a.table.Size}, nil
}

// Add implements [p2p.Ingest]. A Read of src that blocks does not keep it from
// returning when the context ends: pipes and connections are interrupted by
// their SetReadDeadline, any other reader is left to a goroutine that ends when
// the Read returns.
func (in *ingest) Add(src io.Reader, opts p2p.AddOptions) (p2p.Added, error) {
	if err := in.begin(); err != nil {
		return p2p.Added{}, err
	}
	defer in.s.end()
	if err := opts.Validate(); err != nil {
		return p2p.Added{}, err
	}
	if err := source.Check(src); err != nil {
		return p2p.Added{}, err
	}
	ctx, cancel := in.bound(&opts)
	defer cancel(nil)
	a, err := in.add(ctx, cancel, src, opts)
	return added(ctx, a, err)
}

func (in *ingest) add(
	ctx context.Context, cancel context.CancelCauseFunc, src io.Reader, opts p2p.AddOptions,
) (*addition, error) {
	file, err := source.New(src)
	if err != nil {
		return nil, err
	}
	if file != nil && opts.Want != "" {
		if a, err := in.compare(ctx, file, opts); a != nil || err != nil {
			return a, err
		}
	}
	w, err := in.create(ctx, cancel, opts)
	if err != nil {
		return nil, err
	}
	if err = w.takeAll(src, file); err == nil {
		return w.finish(file)
	}
	err = errors.Join(err, w.drop())
	if file != nil && errors.Is(DiskError(err), p2p.ErrNoSpace) {
		// There is no room for a copy, but none is needed for what is here already.
		if a, err := in.held(ctx, file, opts); a != nil || err != nil {
			return a, err
		}
	}
	return nil, err
}

func match(want digest.Digest, t *digest.Table) error {
	if t.Digest != want {
		return fmt.Errorf("nothing was stored: %w", &digest.MismatchError{Want: want, Got: t.Digest})
	}
	return nil
}

// compare takes a shortcut where the wanted blob is in the store and the source
// is a regular file: nothing is copied, both are read and checked. It returns
// nil and no error, with the source as it was, where the shortcut leads nowhere.
func (in *ingest) compare(ctx context.Context, file *source.File, opts p2p.AddOptions) (*addition, error) {
	in.s.hold(opts.Want)
	blob, err := in.s.openBlob(opts.Want)
	if err != nil {
		return nil, in.s.letGo(opts.Want, false)
	}
	defer blob.Close()
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	var checking sync.WaitGroup
	var damage error
	checking.Go(func() {
		if damage = blob.CopyRange(reading, io.Discard, 0, blob.Size(), nil); damage != nil {
			cancel() // there is no use in reading the source to its end
		}
	})
	recorder := digest.NewRecorder(opts.Want.Algorithm())
	err = record(reading, recorder, io.NewSectionReader(file, file.Start, 1<<63-1-file.Start), opts.Progress)
	if err != nil {
		cancel()
	}
	checking.Wait()
	if err != nil || damage != nil {
		return nil, in.s.letGo(opts.Want, false)
	}
	t, err := recorder.Table()
	if err == nil {
		err = file.Unchanged(ctx, t.Digest, t.Size)
	}
	if err == nil {
		err = match(opts.Want, t)
	}
	if err != nil {
		return nil, errors.Join(err, in.s.letGo(opts.Want, false))
	}
	return in.register(&addition{table: t}), nil
}

// recognizes reports whether the store has a blob, intact, and no room for another copy: what comes
// is compared with it then, and not written. The blob is held.
func (in *ingest) recognizes(ctx context.Context, d digest.Digest) (bool, error) {
	info, err := in.s.bytes.Stat(d) // most of what comes is not here, or has room
	if err != nil || in.s.Room(info.Size()) == nil {
		return false, nil
	}
	in.s.hold(d)
	if !in.s.intact(ctx, d) {
		return false, in.s.letGo(d, false)
	}
	return true, nil
}

// held is for a file that there is no room to copy: it makes the blob with the same
// content part of the ingest. It returns nil and no error where there is none.
func (in *ingest) held(ctx context.Context, file *source.File, opts p2p.AddOptions) (*addition, error) {
	table, err := tableFrom(ctx, opts.HashWith(), io.NewSectionReader(file, file.Start, 1<<63-1-file.Start),
		opts.Progress)
	if err != nil {
		return nil, err
	}
	opts.Want = table.Digest
	return in.compare(ctx, file, opts)
}

// tableFrom reads src to its end, and returns the table of what it has.
func tableFrom(ctx context.Context, alg digest.Algorithm, src io.Reader, progress func(int64)) (*digest.Table, error) {
	recorder := digest.NewRecorder(alg)
	if err := record(ctx, recorder, src, progress); err != nil {
		return nil, err
	}
	return recorder.Table()
}

// record feeds a recorder.
func record(ctx context.Context, recorder *digest.Recorder, src io.Reader, progress func(int64)) error {
	buf := source.Buffer(0)
	defer source.Release(buf)
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := src.Read(buf)
		if _, err := recorder.Write(buf[:n]); err != nil {
			return err
		}
		if progress != nil {
			progress(recorder.Size())
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// intact reports whether a blob is in the store, and every piece of it is as recorded.
func (s *Store) intact(ctx context.Context, d digest.Digest) bool {
	blob, err := s.openBlob(d)
	if errors.Is(err, p2p.ErrNotFound) {
		return false
	}
	if err == nil {
		defer blob.Close()
		err = blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
	}
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("a stored blob is damaged; it is replaced by what is imported now", "digest", d, "error", err)
		}
		return false
	}
	return true
}

// account counts the bytes that a's file has now, or refuses them where the
// store has no room.
func (s *Store) account(a *addition, size int64) error {
	s.incoming.Add(size - a.size)
	a.size = size
	for s.hasUnopened() {
		// What nobody fetches any more makes room, before there is none for the next chunk.
		free, known := s.bytes.Free()
		if s.underLimit(0) == nil && (!known || free >= 2*chunk) || !s.dropOldestPartial() {
			break
		}
	}
	return s.underLimit(0)
}

// Room implements [p2p.Ingest].
func (in *ingest) Room(n int64) error { return in.s.Room(n) }

// Rehash implements [p2p.Ingest].
func (in *ingest) Rehash(d, want digest.Digest) (p2p.Added, error) {
	if err := in.begin(); err != nil {
		return p2p.Added{}, err
	}
	defer in.s.end()
	if _, err := digest.Parse(string(want)); err != nil {
		return p2p.Added{}, err
	}
	a := in.added[d]
	if a == nil {
		return p2p.Added{}, fmt.Errorf("rehash %s: it was not added: %w", d, p2p.ErrNotFound)
	}
	a, err := in.rehash(a, want)
	return added(in.ctx, a, err)
}

func (in *ingest) rehash(a *addition, want digest.Digest) (*addition, error) {
	if a.f == nil {
		// Its file is that of the blob, which stays.
		blob, err := in.s.openBlob(a.table.Digest)
		if err != nil {
			return nil, err
		}
		defer blob.Close()
		opts := p2p.AddOptions{Want: want}
		ctx, cancel := in.bound(&opts)
		defer cancel(nil)
		return in.add(ctx, cancel, blob.f, opts)
	}
	table, err := tableFrom(in.ctx, want.Algorithm(), io.NewSectionReader(a.f, 0, a.table.Size), nil)
	if err == nil {
		err = match(want, table)
	}
	if err != nil {
		return nil, err
	}
	delete(in.added, a.table.Digest)
	if err := in.s.letGo(a.table.Digest, false); err != nil {
		return nil, errors.Join(err, a.discard(in.s))
	}
	a.table = table
	return in.keep(a)
}

// keep makes a copy part of the ingest, or drops it where the store has the same, intact.
func (in *ingest) keep(a *addition) (*addition, error) {
	in.s.hold(a.table.Digest)
	var err error
	if in.added[a.table.Digest] != nil || in.s.intact(in.ctx, a.table.Digest) {
		err = a.discard(in.s)
		a.f = nil
	} else if err = in.s.underLimit(0); err != nil {
		err = errors.Join(err, a.discard(in.s))
	}
	if err != nil {
		return nil, errors.Join(err, in.s.letGo(a.table.Digest, false))
	}
	return in.register(a), nil
}

// register makes an addition, whose blob is held, part of the ingest.
func (in *ingest) register(a *addition) *addition {
	if before := in.added[a.table.Digest]; before != nil {
		_ = in.s.letGo(a.table.Digest, false) // one hold is enough, so this is not the last
		return before
	}
	in.added[a.table.Digest] = a
	return a
}

// discard removes an addition's copy.
func (a *addition) discard(s *Store) error {
	s.incoming.Add(-a.size)
	a.size = 0
	return errors.Join(a.f.Close(), s.bytes.Discard(a.name))
}

// Commit implements [p2p.Ingest].
func (in *ingest) Commit(c p2p.Commit) error {
	if err := in.begin(); err != nil {
		return err
	}
	defer in.s.end()
	if err := c.Validate(); err != nil {
		return err
	}
	wanted := map[digest.Digest]bool{}
	for _, n := range c.Tasks {
		wanted[n.Task.Digest] = true
	}
	var fresh []*addition
	for d, a := range in.added {
		if wanted[d] && a.f != nil {
			fresh = append(fresh, a)
		}
	}
	err := in.publish(fresh)
	var removed removal
	if err == nil {
		err = in.s.updateMuch(in.s.weigh(c), func(tx *bbolt.Tx) error {
			removed = in.s.newRemoval()
			if err := removed.commit(tx, c, fresh); err != nil {
				return err
			}
			return removed.noteLoose(tx)
		})
	}
	if err != nil {
		// Files that are in place already go when the ingest is closed.
		if errors.Is(err, p2p.ErrMissingRef) {
			in.s.missed(c)
		}
		return DiskError(err)
	}
	in.done = true
	in.s.endLeases(removed.ended)
	for _, a := range fresh {
		in.s.incoming.Add(-a.size)
		a.size = 0
		if err := in.s.bytes.Discard(a.claim); err != nil {
			in.s.log.Warn("could not give up a claim; the next start will", "error", err)
		}
		a.claim = ""
	}
	if len(removed.loose) > 0 {
		in.s.dropLoose()
	}
	return nil
}

// weigh says how much work a commit is for the transaction: a manifest refers to others, and one
// that a name is taken from lets go of all that it refers to.
func (s *Store) weigh(c p2p.Commit) int {
	n := len(c.Tasks) + len(c.Names)
	for _, t := range c.Tasks {
		if t.Manifest != nil {
			n += len(t.Manifest.Refs)
		}
	}
	_ = s.view(func(tx *bbolt.Tx) error { // what fails here fails there, too
		for _, name := range c.Names {
			old, _, err := get[nameRecord](tx, bucketNames, key(name.Tag, name.Name))
			if err != nil {
				return err
			}
			task, _, err := get[taskRecord](tx, bucketTasks, taskKey(p2p.Task{Tag: name.Tag, Digest: old.Digest}))
			if err != nil {
				return err
			}
			n += len(task.Refs)
		}
		return nil
	})
	return n
}

// publish puts the copies of additions where blobs are, durably.
func (in *ingest) publish(fresh []*addition) error {
	for _, a := range fresh {
		if err := in.s.bytes.Sync(a.f); err != nil {
			return fmt.Errorf("write to disk: %w", err)
		}
		if err := context.Cause(in.ctx); err != nil {
			return err
		}
	}
	algorithms := map[digest.Algorithm]bool{}
	for _, a := range fresh {
		d := a.table.Digest
		algorithms[d.Algorithm()] = true
		var err error
		if a.claim, err = in.s.bytes.Put(a.name, d); err != nil {
			return err
		}
		a.name = ""
	}
	for alg := range algorithms {
		if err := in.s.syncBlobs(alg); err != nil {
			return fmt.Errorf("write to disk: %w", err)
		}
	}
	return nil
}

// syncBlobs makes durable which blobs are there, for all who want it now.
func (s *Store) syncBlobs(alg digest.Algorithm) error {
	return s.flushes[alg].do(struct{}{}, 1, func(jobs []*job[struct{}]) {
		s.mu.Lock()
		moved := slices.DeleteFunc(slices.Collect(maps.Keys(s.moved)),
			func(d digest.Digest) bool { return d.Algorithm() != alg })
		s.mu.Unlock()
		err := s.bytes.Flush(alg)
		if err == nil {
			s.mu.Lock()
			for _, d := range moved {
				delete(s.moved, d)
				s.cleared[d] = true
			}
			s.mu.Unlock()
		}
		for _, j := range jobs {
			j.err = err
		}
	})
}

// commit is what has to be known of a commit for each part of it.
type commit struct {
	tasks map[p2p.Task]bool // that it makes or completes
	named map[p2p.Task]bool // that it points a name to
}

// commit writes the records of a commit.
//
//nolint:cyclop,funlen // the steps of one transaction, in their order
func (r *removal) commit(tx *bbolt.Tx, c p2p.Commit, fresh []*addition) error {
	for _, e := range c.Expect {
		if err := expect(tx, e); err != nil {
			return err
		}
	}
	all := commit{tasks: map[p2p.Task]bool{}, named: map[p2p.Task]bool{}}
	r.came = ReasonFetched
	for _, n := range c.Tasks {
		all.tasks[n.Task] = true
		if n.Origin.IsZero() {
			r.came = ReasonImported
		}
	}
	for _, n := range c.Names {
		all.named[p2p.Task{Tag: n.Tag, Digest: n.Digest}] = true
		if n.Updated.IsZero() {
			r.came = ReasonImported
		}
	}
	for _, a := range fresh {
		table, err := a.table.AppendBinary(nil)
		if err != nil {
			return err
		}
		k := key(a.table.Digest)
		before, found, err := get[blobRecord](tx, bucketBlobs, k) // of one that is damaged
		if err != nil {
			return err
		}
		event := Added
		if found {
			event = Mended
		}
		r.s.note(Change{Event: event, Subject: SubjectBlob, Reason: r.came, Task: p2p.Task{Digest: a.table.Digest},
			Size: a.table.Size})
		if err := countBytes(tx, a.table.Size-before.Size); err != nil {
			return err
		}
		if err := put(tx, bucketBlobs, k, blobRecord{Size: a.table.Size}); err != nil {
			return err
		}
		if err := putValue(tx, bucketTables, k, table); err != nil {
			return err
		}
		if err := removeKeys(tx, bucketDamaged, k); err != nil {
			return err
		}
	}
	type lost struct {
		task p2p.Task
		why  Reason
	}
	var released, told []lost // what was let go, here and by a peer
	for _, n := range c.Tasks {
		if !has(tx, bucketBlobs, key(n.Task.Digest)) {
			return fmt.Errorf("commit %s: blob: %w", n.Task, p2p.ErrNotFound)
		}
		children, err := r.addTask(tx, n, &all)
		if err != nil {
			return err
		}
		for _, d := range children {
			child := lost{p2p.Task{Tag: n.Task.Tag, Digest: d}, ReasonUnreferenced}
			if n.Origin.IsZero() {
				released = append(released, child)
			} else {
				told = append(told, child)
			}
		}
	}
	for _, n := range c.Tasks {
		if err := checkManifest(tx, n); err != nil {
			return err
		}
	}
	for _, n := range c.Names {
		t := p2p.Task{Tag: n.Tag, Digest: n.Digest}
		if !has(tx, bucketTasks, taskKey(t)) {
			return fmt.Errorf("name %s: %s: %w", n.Name, t, p2p.ErrNotFound)
		}
		before, err := r.setName(tx, n)
		if err != nil {
			return err
		}
		switch old := (p2p.Task{Tag: n.Tag, Digest: before}); {
		case before == "":
		case n.KeepOld:
			if err := loosen(tx, old); err != nil {
				return err
			}
		case n.Updated.IsZero():
			released = append(released, lost{old, ReasonMoved})
		default:
			told = append(told, lost{old, ReasonMoved})
		}
	}
	for _, l := range released {
		if all.tasks[l.task] {
			continue
		}
		if err := r.release(tx, l.task, l.why); err != nil {
			return err
		}
	}
	for _, l := range told {
		if all.tasks[l.task] {
			continue
		}
		if err := r.releaseCopies(tx, l.task, l.why); err != nil {
			return err
		}
	}
	return nil
}

// checkManifest checks a manifest of a commit, when all tasks of that are there.
func checkManifest(tx *bbolt.Tx, n p2p.NewTask) error {
	if n.Manifest == nil {
		return nil
	}
	blob, _, err := get[blobRecord](tx, bucketBlobs, key(n.Task.Digest))
	if err != nil {
		return err
	}
	if blob.Size > p2p.MaxManifest {
		return fmt.Errorf("manifest %s: %w: it has %d bytes, the limit is %d", n.Task, digest.ErrInvalid, blob.Size,
			p2p.MaxManifest)
	}
	if len(n.Manifest.Needs) == 0 {
		return nil
	}
	if err := missingRef(tx, n); err != nil {
		return err
	}
	return forgive(tx, n.Task) // what it can be without, it can have lost
}

// Close implements [p2p.Ingest].
func (in *ingest) Close() error {
	in.done = true
	open := in.s.begin(context.Background()) == nil
	if open {
		defer in.s.end()
	}
	var errs []error
	if in.open != nil {
		errs = append(errs, in.open.abandon(open))
	}
	for d, a := range in.added {
		if a.f != nil {
			errs = append(errs, a.f.Close())
			in.s.incoming.Add(-a.size)
			if a.name != "" {
				errs = append(errs, in.s.bytes.Discard(a.name))
			}
		}
		if !open {
			continue // opening the store again does the rest
		}
		err := in.s.letGo(d, a.claim != "")
		if err == nil && a.claim != "" {
			// Without its claim nobody would know of a file that comes back.
			err = in.s.syncMoved()
		}
		if err == nil && a.claim != "" {
			err = in.s.bytes.Discard(a.claim)
		}
		errs = append(errs, err)
	}
	clear(in.added)
	return errors.Join(errs...)
}
