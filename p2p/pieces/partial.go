package pieces

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
	"github.com/dfcache/dfcache/p2p/source"
)

// Partial is a blob that arrives in pieces, in any order, and is not one of the
// store yet. Nothing that has not been verified is written, and nothing is
// believed of what an earlier process has left: it is verified again. It is
// safe for concurrent use.
type Partial struct {
	s    *Store
	d    digest.Digest
	f    *os.File // nil when it is committed or closed
	read *os.File // the same, for reading, whatever it is called by now; until Close

	seeded bool // it began with all that the store has of the blob

	writing sync.Mutex // so that no piece is written that was verified with another table than the one in use

	mu       sync.Mutex
	table    *digest.Table // nil until Use
	held     []bool
	count    int // of held
	a        *addition
	promised int64    // bytes that are missing
	tags     []string // whose it is
}

// leftover is what has arrived of a blob that nobody fetches.
type leftover struct {
	size int64    // on disk
	tags []string // whose it is
}

// ErrStale says that a piece was verified with a hash chain that is not used any more.
var ErrStale = errors.New("the hash chain has been replaced")

// Partial opens what there is of a blob that is not in the store yet, or begins
// with nothing. A blob can have one Partial open at a time. The caller closes
// it, which keeps what has arrived, or commits or removes it.
func (s *Store) Partial(ctx context.Context, d digest.Digest) (*Partial, error) {
	if _, err := digest.Parse(string(d)); err != nil {
		return nil, err
	}
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	p := &Partial{s: s, d: d}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.partials[d] != nil {
		return nil, fmt.Errorf("partial blob %s: it is open already", d)
	}
	f, err := s.bytes.OpenPartial(d)
	if err != nil {
		return nil, DiskError(err)
	}
	if p.read, err = reopen(f); err != nil {
		f.Close()
		return nil, DiskError(err)
	}
	s.partials[d] = p
	p.f = f
	p.a = &addition{f: f, size: s.unopened[d].size}
	delete(s.unopened, d)
	return p, nil
}

// Want records under which tags the blob is wanted: what has arrived goes with the last
// of them, see [Store.ReleasePartial].
func (p *Partial) Want(tags []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tags = slices.Sorted(slices.Values(tags))
	if p.f == nil {
		return nil
	}
	return DiskError(p.s.noteTags(p.d, p.tags))
}

func (s *Store) noteTags(d digest.Digest, tags []string) error {
	b, err := json.Marshal(tags)
	if err != nil {
		return err
	}
	return s.bytes.SetNote(d, backend.NoteTags, b)
}

// seed takes what the store has of the blob, where that is damaged and nothing
// has arrived yet: then only what is damaged has to.
func (p *Partial) seed(ctx context.Context) error {
	if info, err := p.f.Stat(); err != nil || info.Size() > 0 {
		return err
	}
	in, err := p.s.bytes.Open(p.d)
	if err != nil {
		if backend.IsMissing(err) {
			return nil
		}
		return err
	}
	defer in.Close()
	copied, err := copyFile(p.f, in, 0, func(int64) error { return context.Cause(ctx) })
	if !copied && err == nil {
		_, err = source.Copy(io.NewOffsetWriter(p.f, 0), source.Guard(ctx, in))
	}
	p.seeded = err == nil
	return DiskError(err)
}

// Saved returns the piece table that was used last, or the one that the store
// has, or nil. It is a hint, as one from a peer is.
func (p *Partial) Saved() *digest.Table {
	if t := p.s.notedTable(p.d); t != nil {
		return t
	}
	if t, err := p.s.table(p.d); err == nil && t.PieceLength == digest.PieceLength(t.Size) {
		return t
	}
	return nil
}

// notedTable returns the piece table that is noted of a partial blob, or nil.
func (s *Store) notedTable(d digest.Digest) *digest.Table {
	if b, err := s.bytes.Note(d, backend.NoteTable); err == nil {
		if t, err := digest.DecodeTable(d, b); err == nil {
			return t
		}
	}
	return nil
}

// Use says what the blob's size and hash chain are. Pieces that are there, also
// in a damaged blob of the store, are verified with that; others are dropped, and
// have to arrive anew. It may be called again, with another chain.
func (p *Partial) Use(ctx context.Context, size int64, chain []byte) error {
	t := &digest.Table{Digest: p.d, Size: size, PieceLength: digest.PieceLength(size), Chain: chain}
	if size < 0 || len(chain) != digest.ChainSize(p.d.Algorithm(), size) {
		return fmt.Errorf("partial blob %s: %w: a hash chain of %d bytes does not fit %d bytes", p.d, digest.ErrInvalid,
			len(chain), size)
	}
	if empty := p.d.Algorithm().FromBytes(nil); size == 0 && empty != p.d {
		// there is no piece that could tell
		return fmt.Errorf("partial blob %s: %w: it is not empty", p.d, digest.ErrMismatch)
	}
	t.CRC = make([]uint32, t.Pieces())
	if err := p.promise(size); err != nil {
		return fmt.Errorf("a blob of %d bytes: %w", size, err)
	}
	if err := p.seed(ctx); err != nil {
		return err
	}
	p.writing.Lock()
	p.mu.Lock()
	p.table, p.held, p.count = t, make([]bool, t.Pieces()), 0
	p.mu.Unlock()
	p.writing.Unlock()
	if info, err := p.f.Stat(); err != nil {
		return err
	} else if info.Size() > size {
		if err := p.f.Truncate(size); err != nil {
			return DiskError(err)
		}
	}
	if err := p.verify(ctx, t); err != nil {
		return err
	}
	if t.Pieces() < 2 {
		return nil // there is nothing that it would save
	}
	b, err := t.AppendBinary(nil)
	if err != nil {
		return err
	}
	return DiskError(p.s.bytes.SetNote(p.d, backend.NoteTable, b))
}

// promise sets aside room for what is missing of a blob of size bytes.
func (p *Partial) promise(size int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	missing := max(0, size-p.a.size)
	if err := p.s.promise(missing - p.promised); err != nil {
		return err
	}
	p.promised = missing
	return nil
}

// unpromise takes back what was set aside. p.mu is held.
func (p *Partial) unpromise(n int64) {
	n = min(n, p.promised)
	p.promised -= n
	p.s.promised.Add(-n)
}

// verify finds out which pieces are there.
func (p *Partial) verify(ctx context.Context, t *digest.Table) (err error) {
	buf := make([]byte, t.PieceLength)
	var counted int64
	for from := int64(0); from < t.Size; {
		start, end := int64(0), t.Size
		if !p.seeded {
			// What is a hole has not arrived: a piece of zeros has an end.
			if start, end, err = dataFrom(p.f, from); err != nil {
				return fmt.Errorf("partial blob %s: %w", p.d, err)
			}
		}
		if start >= t.Size {
			break
		}
		for i := int(start / t.PieceLength); i < t.Pieces(); i++ {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			begin, stop := t.Bounds(i)
			if begin >= end {
				break
			}
			from = stop
			piece := buf[:stop-begin]
			if n, err := p.f.ReadAt(piece, begin); n < len(piece) && err != nil {
				continue
			}
			v, err := t.Verifier(i)
			if err != nil {
				return err
			}
			v.Write(piece)
			if crc, err := v.Verify(); err == nil {
				p.hold(t, i, crc)
				counted += stop - begin
			}
		}
		from = max(from, end)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unpromise(p.promised)
	if err := p.s.account(p.a, counted); err != nil {
		return err
	}
	missing := max(0, t.Size-counted)
	if err := p.s.promise(missing); err != nil {
		return err
	}
	p.promised = missing
	return nil
}

// hold notes that a piece is there.
func (p *Partial) hold(t *digest.Table, i int, crc uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.table != t {
		return false
	}
	if !p.held[i] {
		t.CRC[i] = crc
		p.held[i] = true
		p.count++
	}
	return true
}

// pageLength is how many bytes of a piece of zeros are written: as many as most file systems keep together.
const pageLength = 4 << 10

// receiveChunk is how much of a piece is read before it is hashed: what is
// hashed should still be near the processor.
const receiveChunk = 128 << 10

// Receive reads piece i from r, into buf, which holds a piece, verifies it, and
// writes it. It reads the piece's length and no more. What is not the piece
// fails with an error that matches [digest.ErrMismatch], and errors of r are
// returned as they are.
func (p *Partial) Receive(i int, r io.Reader, buf []byte) error {
	p.mu.Lock()
	t := p.table
	p.mu.Unlock()
	v, err := t.Verifier(i)
	if err != nil {
		return err
	}
	start, end := t.Bounds(i)
	if int64(len(buf)) < end-start {
		return ErrStale // it holds a piece of the table before
	}
	piece := buf[:end-start]
	for done := 0; done < len(piece); {
		n, err := io.ReadFull(r, piece[done:min(len(piece), done+receiveChunk)])
		v.Write(piece[done : done+n])
		done += n
		if err != nil {
			return err
		}
	}
	crc, err := v.Verify()
	if err != nil {
		return err
	}
	p.writing.Lock()
	defer p.writing.Unlock()
	p.mu.Lock()
	stale := p.table != t
	there := !stale && p.held[i] // another table may have fewer pieces
	if !stale && !there {
		p.unpromise(end - start)
		err = p.s.account(p.a, p.a.size+end-start)
	}
	p.mu.Unlock()
	switch {
	case stale:
		return ErrStale
	case there || err != nil:
		return err
	}
	at := start
	// What else is there may be damaged, or of another chain.
	if source.IsZero(piece) && unix.Fallocate(int(p.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start,
		max(end-start-pageLength, 1)) == nil {
		// The rest can be a hole; without its end it would be one that has not arrived.
		at = end - pageLength
	}
	if _, err := p.f.WriteAt(piece[at-start:], at); err != nil {
		return DiskError(err)
	}
	if !p.hold(t, i, crc) {
		return ErrStale
	}
	return nil
}

// Table returns the piece table in use, or nil. Of the checksums those of the
// pieces that are held are set.
func (p *Partial) Table() *digest.Table {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table
}

// Held reports whether piece i has arrived.
func (p *Partial) Held(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return i >= 0 && i < len(p.held) && p.held[i]
}

// Complete reports whether all pieces have arrived: the blob is proven then.
func (p *Partial) Complete() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table != nil && p.count == len(p.held)
}

// File opens the blob's file for reading, as far as it is there, until the
// Partial is closed: then it fails with [os.ErrClosed]. The caller closes it.
func (p *Partial) File() (f *os.File, err error) {
	f, err = reopen(p.read)
	return f, DiskError(err)
}

// reopen opens a file once more, for reading.
func reopen(f *os.File) (again *os.File, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	if controlErr := raw.Control(func(fd uintptr) {
		again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	}); controlErr != nil {
		return nil, os.ErrClosed
	}
	return again, err
}

// Commit makes a complete blob one of the store, durably, with the tasks of c.
// After it the Partial can only be read ([Partial.File]), and closed.
func (p *Partial) Commit(ctx context.Context, c p2p.Commit) (err error) {
	if err := p.s.begin(ctx); err != nil {
		return errors.Join(err, p.Close())
	}
	defer p.s.end()
	if p.f == nil {
		return fmt.Errorf("partial blob %s: it is closed", p.d)
	}
	if !p.Complete() {
		return errors.Join(fmt.Errorf("partial blob %s: %w: it is not complete", p.d, digest.ErrInvalid), p.Close())
	}
	in := &ingest{ctx: ctx, s: p.s, added: map[digest.Digest]*addition{}}
	defer func() { err = errors.Join(err, in.Close()) }()
	a := p.a
	a.table = p.Table()
	err = p.f.Chmod(0o444)
	if err == nil {
		a.name, err = p.s.bytes.TakePartial(p.d)
	}
	if err != nil {
		return errors.Join(DiskError(err), p.Close())
	}
	p.f = nil // it is the ingest's
	p.forget(0)
	defer func(size int64) {
		if err != nil {
			p.s.tellPartial(p.d, size, ReasonDropped)
		}
	}(a.size)
	if _, err := in.keep(a); err != nil {
		return DiskError(err)
	}
	return in.Commit(c)
}

// Close closes the Partial and keeps what has arrived.
func (p *Partial) Close() error {
	p.read.Close() // it was only read; a second time it says that it is closed
	if p.f == nil {
		return nil
	}
	if info, err := p.f.Stat(); err == nil && info.Size() == 0 {
		return p.Remove()
	}
	err := p.f.Close()
	p.f = nil
	p.forget(p.a.size)
	return err
}

// Remove closes the Partial and removes what has arrived.
func (p *Partial) Remove() error {
	p.read.Close()
	if p.f == nil {
		return nil
	}
	err := errors.Join(p.f.Close(), p.s.bytes.RemovePartial(p.d))
	p.f = nil
	p.s.incoming.Add(-p.a.size)
	p.forget(0)
	p.s.tellPartial(p.d, p.a.size, ReasonDropped)
	return err
}

// forget lets the blob have another Partial. size is what it has on disk.
func (p *Partial) forget(size int64) {
	p.mu.Lock()
	p.unpromise(p.promised)
	tags := p.tags
	p.mu.Unlock()
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	delete(p.s.partials, p.d)
	if size > 0 {
		p.s.unopened[p.d] = leftover{size, tags}
	}
}

// findPartials counts what earlier processes have left of partial blobs.
func (s *Store) findPartials() error {
	all, err := s.bytes.Partials()
	for _, p := range all {
		left := leftover{size: p.Bytes}
		if b, err := s.bytes.Note(p.Digest, backend.NoteTags); err == nil {
			_ = json.Unmarshal(b, &left.tags) // what can't be read is nobody's
		}
		s.unopened[p.Digest] = left
		s.incoming.Add(p.Bytes)
	}
	return err
}

// DropPartials removes what has arrived of blobs that nobody has open and of
// which nothing has arrived since a time.
func (s *Store) DropPartials(since time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for d := range s.unopened {
		info, err := s.bytes.StatPartial(d)
		if err == nil && !info.Changed.Before(since) {
			continue
		}
		errs = append(errs, s.dropPartial(d, ReasonExpired))
	}
	return errors.Join(errs...)
}

// dropPartial removes what has arrived of a blob that nobody fetches. s.mu is held.
func (s *Store) dropPartial(d digest.Digest, why Reason) error {
	if err := s.bytes.RemovePartial(d); err != nil && !backend.IsMissing(err) {
		return err
	}
	size := s.unopened[d].size
	s.incoming.Add(-size)
	delete(s.unopened, d)
	s.tellPartial(d, size, why)
	return nil
}

func (s *Store) hasUnopened() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.unopened) > 0
}

// ReleasePartial says that a task was deleted: what has arrived of its blob goes, where it is
// not wanted under another tag, and nobody fetches it.
func (s *Store) ReleasePartial(t p2p.Task) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	left, found := s.unopened[t.Digest]
	if !found || !slices.Contains(left.tags, t.Tag) {
		return nil
	}
	left.tags = slices.DeleteFunc(slices.Clone(left.tags), func(tag string) bool { return tag == t.Tag })
	if len(left.tags) == 0 {
		return s.dropPartial(t.Digest, ReasonDeleted)
	}
	s.unopened[t.Digest] = left
	return DiskError(s.noteTags(t.Digest, left.tags))
}

// Arriving is a blob of which a part has arrived.
type Arriving struct {
	Task  p2p.Task
	Size  int64 // of the whole, in bytes; 0 where that is not known
	Bytes int64 // that have arrived
	Open  bool  // it is being fetched
}

// Arriving returns the blobs of which a part has arrived, under every tag under which they
// are wanted.
func (s *Store) Arriving() (all []Arriving) {
	s.mu.Lock()
	unopened, open := maps.Clone(s.unopened), slices.Collect(maps.Values(s.partials))
	s.mu.Unlock()
	add := func(d digest.Digest, tags []string, a Arriving) {
		for _, tag := range tags {
			a.Task = p2p.Task{Tag: tag, Digest: d}
			all = append(all, a)
		}
	}
	for d, left := range unopened {
		a := Arriving{Bytes: left.size}
		if t := s.notedTable(d); t != nil {
			a.Size = t.Size
		}
		add(d, left.tags, a)
	}
	for _, p := range open {
		p.mu.Lock()
		a, tags := Arriving{Open: true}, p.tags
		if p.table != nil {
			a.Size, a.Bytes = p.table.Size, min(p.table.Size, int64(p.count)*p.table.PieceLength)
		}
		p.mu.Unlock()
		add(p.d, tags, a)
	}
	slices.SortFunc(all, func(a, b Arriving) int {
		return cmp.Or(cmp.Compare(a.Task.Tag, b.Task.Tag), cmp.Compare(a.Task.Digest, b.Task.Digest))
	})
	return all
}
