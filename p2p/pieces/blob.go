package pieces

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// Blob is an open blob. It implements [p2p.FileBlob].
type Blob struct {
	*digest.Verified
	s       *Store
	f       *os.File
	damaged bool // as far as it was known when it was opened
}

var _ p2p.FileBlob = (*Blob)(nil)

// File implements [p2p.FileBlob].
func (b *Blob) File() *os.File { return b.f }

// Sources implements [p2p.Blob]: the blob was here.
func (b *Blob) Sources() []p2p.Source { return nil }

// Close closes the blob.
func (b *Blob) Close() error { return b.f.Close() }

// Open implements [p2p.Engine]. The result is a [*Blob].
func (s *Store) Open(ctx context.Context, task p2p.Task, _ p2p.Scope) (p2p.Blob, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	if err := task.Validate(); err != nil {
		return nil, err
	}
	if err := s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, task) }); err != nil {
		return nil, err
	}
	blob, err := s.openBlob(task.Digest)
	if err != nil {
		return nil, err
	}
	s.touch(task)
	return blob, nil
}

// OpenForPeers opens a task's blob as Open does, but is not a use of it.
func (s *Store) OpenForPeers(ctx context.Context, task p2p.Task) (*Blob, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	if err := s.view(func(tx *bbolt.Tx) error { return holdsTask(tx, task) }); err != nil {
		return nil, err
	}
	return s.openBlob(task.Digest)
}

// Has reports whether a blob is here, whatever tag it is under.
func (s *Store) Has(ctx context.Context, d digest.Digest) (held bool, err error) {
	if err := s.begin(ctx); err != nil {
		return false, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		held = has(tx, bucketBlobs, key(d))
		return nil
	})
	return held, err
}

// HasTask reports whether a task is here. It changes nothing, and may be called while a
// watcher waits.
func (s *Store) HasTask(task p2p.Task) (held bool, err error) {
	if err := s.begin(context.Background()); err != nil {
		return false, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		held = has(tx, bucketTasks, taskKey(task))
		return nil
	})
	return held, err
}

// Referenced reports whether another task, under the same tag, refers to a task and keeps it from being
// deleted.
func (s *Store) Referenced(ctx context.Context, task p2p.Task) (referenced bool, err error) {
	if err := s.begin(ctx); err != nil {
		return false, err
	}
	defer s.end()
	err = s.view(func(tx *bbolt.Tx) error {
		parents, err := s.blocking(tx, task)
		referenced = len(parents) > 0
		return err
	})
	return referenced, err
}

func holdsTask(tx *bbolt.Tx, task p2p.Task) error {
	if !has(tx, bucketTasks, taskKey(task)) {
		return fmt.Errorf("%s: %w", task, p2p.ErrNotFound)
	}
	return nil
}

// openBlob opens a blob, whoever holds it. Damage of which is known does not keep
// it from that: what is good of it can be read.
func (s *Store) openBlob(d digest.Digest) (_ *Blob, err error) {
	defer func() { s.met(err) }()
	table, damaged, err := s.tableAndDamage(d)
	if err != nil {
		return nil, err
	}
	f, err := s.bytes.Open(d)
	if errors.Is(err, backend.ErrNotRegular) {
		return nil, errNoRegularFile(d)
	}
	if err != nil && !backend.IsMissing(err) {
		return nil, fmt.Errorf("open blob %s: %w", d, DiskError(err))
	}
	if err == nil {
		var info os.FileInfo
		if info, err = f.Stat(); err == nil {
			err = checkSize(table, info.Size())
		}
		if err == nil && table.PieceLength != digest.PieceLength(table.Size) {
			table, err = s.cutAnew(f, table)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		return &Blob{Verified: digest.NewVerified(f, table), s: s, f: f, damaged: damaged}, nil
	}
	if _, err := s.table(d); err != nil {
		return nil, err // it was deleted just now
	}
	return nil, errNoFile(d)
}

// cutAnew makes the piece table of a blob again, which an earlier version has
// made with other pieces than all peers have now.
func (s *Store) cutAnew(f *os.File, old *digest.Table) (*digest.Table, error) {
	r := digest.NewRecorder(old.Digest.Algorithm())
	if err := record(context.Background(), r, io.NewSectionReader(f, 0, old.Size), nil); err != nil {
		return nil, err
	}
	table, err := r.Table()
	if err != nil {
		return nil, err
	}
	if table.Digest != old.Digest {
		return nil, &digest.CorruptError{
			Digest: old.Digest, Piece: -1, Reason: "its content has the digest " + table.Digest.String()}
	}
	b, err := table.AppendBinary(nil)
	if err != nil {
		return nil, err
	}
	return table, s.update(func(tx *bbolt.Tx) error {
		k := key(table.Digest)
		if !has(tx, bucketTables, k) {
			return nil // it was deleted just now; the reader can read on
		}
		return putValue(tx, bucketTables, k, b)
	})
}

// checkSize compares the size of a blob's file with the one recorded.
func checkSize(table *digest.Table, size int64) error {
	if size == table.Size {
		return nil
	}
	return &digest.CorruptError{
		Digest: table.Digest,
		Piece:  int(min(size, table.Size) / table.PieceLength),
		Reason: fmt.Sprintf("its file has %d bytes, recorded were %d", size, table.Size),
	}
}

func errNoRegularFile(d digest.Digest) error {
	return &digest.CorruptError{Digest: d, Piece: -1, Reason: "what is in the place of its file is not a regular file"}
}

func errNoFile(d digest.Digest) error {
	return &digest.CorruptError{Digest: d, Piece: -1, Reason: "its file is missing"}
}

func (s *Store) table(d digest.Digest) (table *digest.Table, err error) {
	table, _, err = s.tableAndDamage(d)
	return table, err
}

// tableAndDamage returns a blob's piece table, and whether it is known to be damaged.
func (s *Store) tableAndDamage(d digest.Digest) (table *digest.Table, damaged bool, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		damaged = has(tx, bucketDamaged, key(d))
		v := value(tx, bucketTables, key(d))
		if v == nil {
			return fmt.Errorf("blob %s: %w", d, p2p.ErrNotFound)
		}
		table, err = digest.DecodeTable(d, v)
		return err
	})
	return table, damaged, err
}
