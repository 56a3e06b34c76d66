package swarm

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// Arriving is a blob that comes from peers, piece by piece. It implements
// [p2p.ArrivingBlob]. It is safe for concurrent use.
type Arriving struct {
	v    *digest.Verified
	d    *arrival
	file *os.File
	stop func() bool

	notices *int // the key of d.notices

	// Guarded by d.mu.
	table *digest.Table // with the checksums of the pieces in given
	given *schedule.Set // pieces that were handed out
	err   error         // why nothing can be read any more

	closing sync.Once
}

var _ p2p.ArrivingBlob = (*Arriving)(nil)

// newArriving returns a reader of what d fetches. d.mu is held.
func newArriving(d *arrival) (*Arriving, error) {
	file, err := d.partial.File()
	if err != nil {
		return nil, err
	}
	table := *d.table
	table.CRC = make([]uint32, table.Pieces())
	a := &Arriving{d: d, file: file, table: &table, given: schedule.NewSet(table.Pieces())}
	a.v = digest.NewArriving(file, a.table, a.await)
	return a, nil
}

// check ends a reader that was given what is not true. d.mu is held.
func (a *Arriving) check(table *digest.Table, have *schedule.Set) {
	if table.Size != a.table.Size || a.given.Clone().AndNot(have).Count() > 0 {
		a.err = fmt.Errorf("blob %s: %w: a peer has sent wrong content of what was read of it: read it again",
			a.d.digest, digest.ErrMismatch)
	}
}

// fail ends a reader.
func (a *Arriving) fail(err error) {
	a.d.mu.Lock()
	if a.err == nil {
		a.err = err
	}
	a.d.changed()
	a.d.mu.Unlock()
	a.release()
}

// await waits for piece i.
func (a *Arriving) await(ctx context.Context, i int) error {
	d := a.d
	return a.until(ctx, func() bool {
		if !a.given.Has(i) && d.have.Has(i) {
			a.table.CRC[i] = d.table.CRC[i]
			a.given.Add(i)
		}
		return a.given.Has(i)
	})
}

// until waits until ok, which is called with d.mu held, returns true. It fails
// where nothing can be read any more.
func (a *Arriving) until(ctx context.Context, ok func() bool) error {
	d := a.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		switch {
		case a.err != nil:
			return a.err
		case ok():
			return nil
		case d.err != nil:
			return d.err
		}
		if err := d.waitChange(ctx); err != nil {
			return err
		}
	}
}

// whole waits until the whole is proven.
func (a *Arriving) whole(ctx context.Context) error {
	return a.until(ctx, func() bool { return a.d.proven })
}

// Stored implements [front.Arriving].
func (a *Arriving) Stored(ctx context.Context) error {
	if err := a.whole(ctx); err != nil {
		return err
	}
	select {
	case <-a.d.ended:
		return a.d.storeErr
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Size implements [p2p.Blob].
func (a *Arriving) Size() int64 { return a.table.Size }

// ReadAt implements [io.ReaderAt].
func (a *Arriving) ReadAt(p []byte, off int64) (int, error) {
	if off >= 0 && off < a.Size() && len(p) > 0 {
		a.wantBytes(off, int64(len(p)))
	}
	return a.v.ReadAt(p, off)
}

// CopyRange implements [p2p.Blob].
func (a *Arriving) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(int64)) error {
	if off == 0 && n == a.Size() {
		if n > 0 {
			a.Want(0, 0) // so that it begins; all in order would harm the swarm
		}
		return a.v.CopyWhole(ctx, w, a.whole, progress)
	}
	if off >= 0 && n > 0 && off < a.Size() {
		a.wantBytes(off, n)
	}
	return a.v.CopyRange(ctx, w, off, n, progress)
}

func (a *Arriving) wantBytes(off, n int64) {
	end := min(off+n, a.Size())
	a.Want(int(off/a.table.PieceLength), int((end-1)/a.table.PieceLength))
}

// Want implements [p2p.ArrivingBlob].
func (a *Arriving) Want(first, last int) {
	d := a.d
	d.mu.Lock()
	there := true
	for i := first; i <= last && there; i++ {
		there = d.have.Has(i)
	}
	table := d.table
	d.mu.Unlock()
	if there || first < 0 || last < first || last >= table.Pieces() {
		return
	}
	d.first(table, first, last)
}

// File implements [p2p.FileBlob].
func (a *Arriving) File() *os.File { return a.file }

// Table implements [p2p.FileBlob].
func (a *Arriving) Table() *digest.Table { return a.table }

// Arrived implements [p2p.ArrivingBlob].
func (a *Arriving) Arrived(ctx context.Context) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		d := a.d
		told := schedule.NewSet(a.table.Pieces())
		for told.Count() < told.Len() {
			var have *schedule.Set
			err := a.until(ctx, func() bool {
				have = d.have
				return have.Len() == told.Len() && have.Clone().AndNot(told).Count() > 0
			})
			if err != nil {
				yield(0, err)
				return
			}
			for i := range have.All() {
				if told.Has(i) {
					continue
				}
				if err := a.await(ctx, i); err != nil {
					yield(0, err)
					return
				}
				told.Add(i)
				if !yield(i, nil) {
					return
				}
			}
		}
		if err := a.whole(ctx); err != nil {
			yield(0, err)
		}
	}
}

// Sources implements [p2p.Blob].
func (a *Arriving) Sources() []p2p.Source {
	a.d.mu.Lock()
	defer a.d.mu.Unlock()
	var all []p2p.Source
	for p, n := range a.d.taken {
		all = append(all, a.d.source(p, n))
	}
	slices.SortFunc(all, func(a, b p2p.Source) int { return strings.Compare(a.Peer, b.Peer) })
	return all
}

// release takes the reader away from its download.
func (a *Arriving) release() {
	a.closing.Do(func() {
		d := a.d
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.readers, a)
		delete(d.notices, a.notices)
		d.stopIfUnwanted()
	})
}

// Close closes the reader. A download that nobody else waits for ends; what has
// arrived is kept.
func (a *Arriving) Close() error {
	a.stop()
	a.fail(fmt.Errorf("blob %s: %w", a.d.digest, os.ErrClosed))
	return a.file.Close()
}

// partialSource is a blob that is arriving, as the source of an upload.
type partialSource struct {
	d     *arrival
	file  *os.File
	table *digest.Table
}

func (s *partialSource) have() (*schedule.Set, <-chan struct{}) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.table != s.table || s.d.err != nil {
		return schedule.NewSet(s.table.Pieces()), nil // it goes by another chain now, or is over
	}
	if s.d.have.Full() {
		return s.d.have, nil
	}
	return s.d.have, s.d.more
}

func (s *partialSource) bytes() io.ReaderAt { return s.file }

func (s *partialSource) close() error { return s.file.Close() }
