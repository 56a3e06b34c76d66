package pieces

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

func requireFailed(t *testing.T, s *Store, want error) {
	t.Helper()
	select {
	case <-s.Failed():
	default:
		t.Fatal("the store does not say that it failed")
	}
	if err := s.Failure(); !errors.Is(err, want) {
		t.Errorf("the failure is %v, want %v", err, want)
	}
}

// TestUnreadableMetadata: what can't be read any more, as an unreadable sector can't,
// is an error of each call, and not the end of the process. A file that was cut off gives the same fault.
func TestUnreadableMetadata(t *testing.T) {
	for _, left := range []int64{0, 2 * int64(os.Getpagesize())} {
		dir, content, _ := richStore(t)
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(s.path("meta.db"), left); err != nil {
			t.Fatal(err)
		}
		for task := range content {
			for range 2 {
				if _, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest),
					p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
					t.Errorf("stat: %v", err)
				}
			}
		}
		if _, err := importArtifact(t.Context(), s, "later", []byte("later")); !errors.Is(err, digest.ErrCorrupt) {
			t.Errorf("import: %v", err)
		}
		requireFailed(t, s, digest.ErrCorrupt)
		closed := make(chan error, 1)
		go func() { closed <- s.Close() }()
		select {
		case <-closed:
		case <-time.After(time.Minute):
			t.Fatal("the store does not close")
		}
		if _, err := Open(dir, Options{}); !errors.Is(err, digest.ErrCorrupt) ||
			!strings.Contains(err.Error(), "from a copy") {
			t.Errorf("open: %v", err)
		}
	}
}

// TestRecordDamagedWhileOpen: a record that is not what was written is an error when it is
// met, whoever asks, and nothing is stored on top of it.
func TestRecordDamagedWhileOpen(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	enginetest.Import(t, s, "t", []byte("other"))
	path := s.path("meta.db")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	record := []byte(`{"size":4}`)
	for at := next(data, record, -1); at >= 0; at = next(data, record, at) {
		if _, err := f.WriteAt([]byte{'5'}, int64(at+len(record)-2)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Stat(t.Context(), "t", digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err,
		digest.ErrCorrupt) {
		t.Errorf("stat: %v", err)
	}
	if _, err := s.Stat(t.Context(), "t", digest.FromDigest(digest.SHA256.FromString("other")),
		p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("stat of something else, after that: %v", err)
	}
	if _, err := importArtifact(t.Context(), s, "v", []byte("new")); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("import: %v", err)
	}
	requireFailed(t, s, digest.ErrCorrupt)
}

// TestDamageInATransaction: memory that can't be read, and a record that is damaged, are errors
// also when a transaction is under way already.
func TestDamageInATransaction(t *testing.T) {
	dir, _, _ := richStore(t)
	good, err := os.ReadFile(filepath.Join(dir, "meta.db"))
	if err != nil {
		t.Fatal(err)
	}
	readAll := func(tx *bbolt.Tx) error {
		for _, bucket := range allBuckets {
			scan(tx, bucket, nil, func(_, _ []byte) bool { return true })
		}
		return nil
	}
	for name, damage := range map[string]func(path string) error{
		"cut off": func(path string) error { return os.Truncate(path, 0) },
		"changed": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			record := []byte(`{"size":`)
			for at := next(good, record, -1); at >= 0; at = next(good, record, at) {
				if _, err := f.WriteAt([]byte("["), int64(at)); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		for _, writes := range []bool{false, true} {
			if err := os.WriteFile(filepath.Join(dir, "meta.db"), good, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			run := s.view
			if writes {
				run = s.update
			}
			err = run(func(tx *bbolt.Tx) error { return errors.Join(damage(s.path("meta.db")), readAll(tx)) })
			if !errors.Is(err, digest.ErrCorrupt) {
				t.Errorf("%s, while it is written to %v: %v", name, writes, err)
			}
			requireFailed(t, s, digest.ErrCorrupt)
			s.Close()
		}
	}
}

// TestFlippedWhileOpen: what a flip hides from a store that is open, a page or a key that leads to a
// record, is noticed by reading all again, which it does of its own accord.
func TestFlippedWhileOpen(t *testing.T) {
	dir, content, names := richStore(t)
	path := filepath.Join(dir, "meta.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	var bits []int // of keys, and of what tells where they are
	for i, kind := range pageKinds(t, good) {
		if kind != "branch" && kind != "leaf" {
			continue
		}
		// bbolt copies a bucket inside of a page to the heap, where -race ends
		// the program as soon as it reads past the copy. Elsewhere, what it
		// reads there is no key with a right sum.
		var fatal map[int]bool
		if kind == "leaf" {
			fatal = inlineStructure(good[i*page : (i+1)*page])
		}
		used := len(bytes.TrimRight(good[i*page:(i+1)*page], "\x00"))
		for n := 0; n < 20; {
			if bit := rand.IntN(8 * used); !fatal[bit/8] {
				bits = append(bits, i*page*8+bit)
				n++
			}
		}
	}
	hidden := 0
	for _, bit := range bits {
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir, Options{recheck: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{good[bit/8] ^ 1<<(bit%8)}, int64(bit/8)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		for name := range names {
			if _, err := s.Stat(t.Context(), "t", cacheID(t, name), p2p.StatOptions{}); errors.Is(err,
				p2p.ErrNotFound) {
				hidden++
			}
		}
		if _, err := s.recheckMeta(t.Context()); err != nil {
			requireFailed(t, s, digest.ErrCorrupt)
		} else {
			requireAll(t, s, content, names)
		}
		s.Close()
		if t.Failed() {
			t.Fatalf("after a flip of bit %d", bit)
		}
	}
	t.Logf("%d flips, by which %d names seemed not to be there", len(bits), hidden)

	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(dir, Options{recheck: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := slices.Index(pageKinds(t, good), "branch")*page + pageHeader
	if _, err := f.WriteAt([]byte{good[at] ^ 1}, int64(at)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Failed():
		requireFailed(t, s, digest.ErrCorrupt)
	case <-time.After(20 * time.Second):
		t.Error("it was not noticed")
	}
}

// TestRecheckWhileWritten: to read all again finds nothing wrong while others change the metadata.
func TestRecheckWhileWritten(t *testing.T) {
	dir, _, _ := richStore(t)
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.db.NoSync = true
	ctx, cancel := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	for w := range 2 {
		writing.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				err := s.update(func(tx *bbolt.Tx) error {
					k := fmt.Appendf(nil, "%d %d", w, i%50)
					if i%3 == 0 {
						return removeKeys(tx, bucketUsed, k)
					}
					return putValue(tx, bucketUsed, k, make([]byte, 100*(i%50)))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	n := 0
	for range 200 {
		checked, err := s.recheckMeta(t.Context())
		if err != nil {
			t.Error(err)
			break
		}
		if checked {
			n++
		}
	}
	cancel()
	writing.Wait()
	t.Logf("it was read %d times", n)
	if n == 0 {
		t.Error("it was not read once")
	}
}

// next returns where part is in data behind at, or -1.
func next(data, part []byte, at int) int {
	if i := bytes.Index(data[at+1:], part); i >= 0 {
		return at + 1 + i
	}
	return -1
}

// TestMapFails: where the system can't map the file when it grows, that change fails, and
// nothing else does.
func TestMapFails(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	s.db.MmapFlags = unix.MAP_HUGETLB // which this file system has not
	err := s.update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketTables, []byte("large"), make([]byte, 1<<20))
	})
	if !errors.Is(err, p2p.ErrUnavailable) || !strings.Contains(err.Error(), "mmap") {
		t.Fatalf("a change that needs more space mapped: %v", err)
	}
	enginetest.RequireContent(t, s, task, []byte("data"))
	if _, err := importArtifact(t.Context(), s, "v", make([]byte, 1<<20)); err != nil {
		t.Errorf("import: %v", err)
	}
	if err := s.Failure(); err != nil {
		t.Error(err)
	}
}

// TestDirectoryReplaced: what is imported while another directory is in the place of the one
// that was opened, or another process has it open without locks, is not acknowledged.
func TestDirectoryReplaced(t *testing.T) {
	copyTree := func(t *testing.T, from, to string) {
		t.Helper()
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}
	for name, replace := range map[string]func(t *testing.T, s *Store, backup string){
		"another directory": func(t *testing.T, s *Store, backup string) {
			if err := os.Rename(s.dir, s.dir+".away"); err != nil {
				t.Fatal(err)
			}
			copyTree(t, backup, s.dir)
		},
		"no directory": func(t *testing.T, s *Store, _ string) {
			if err := os.Rename(s.dir, s.dir+".away"); err != nil {
				t.Fatal(err)
			}
		},
		"another file": func(t *testing.T, s *Store, backup string) {
			if err := os.Rename(filepath.Join(backup, "meta.db"), s.path("meta.db")); err != nil {
				t.Fatal(err)
			}
		},
		"the file written over": func(t *testing.T, s *Store, backup string) {
			old, err := os.ReadFile(filepath.Join(backup, "meta.db"))
			if err == nil {
				err = os.WriteFile(s.path("meta.db"), old, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"another process": func(t *testing.T, s *Store, _ string) {
			// A file system without locks: what is held is given up.
			if err := unix.Flock(int(s.guard.lock.Fd()), unix.LOCK_UN); err != nil {
				t.Fatal(err)
			}
			other := &Store{dir: s.dir, guard: guard{failed: make(chan struct{})}}
			if err := other.takeLock(""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { other.guard.lock.Close() })
		},
		"another lock": func(t *testing.T, s *Store, _ string) {
			if err := errors.Join(os.Remove(s.path("lock")),
				os.WriteFile(s.path("lock"), []byte(s.guard.token), 0o640)); err != nil {
				t.Fatal(err)
			}
		},
		"a later file": func(t *testing.T, s *Store, backup string) {
			other, err := Open(backup, Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 5 {
				enginetest.Import(t, other, "t", fmt.Append(nil, i))
			}
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
			later, err := os.ReadFile(filepath.Join(backup, "meta.db"))
			if err == nil {
				err = os.WriteFile(s.path("meta.db"), later, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		open := func(t *testing.T) (s *Store, backup string) {
			dir := filepath.Join(t.TempDir(), "data")
			s, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			enginetest.Import(t, s, "t", []byte("before"))
			backup = t.TempDir()
			copyTree(t, dir, backup)
			enginetest.Import(t, s, "t", []byte("after"))
			return s, backup
		}
		t.Run(name, func(t *testing.T) {
			s, backup := open(t)
			replace(t, s, backup)
			content := func() []byte {
				all, err := io.ReadAll(io.NewSectionReader(s.guard.file, 0, 1<<40))
				if err != nil {
					t.Fatal(err)
				}
				return all
			}
			before := content()
			if _, err := s.Stat(t.Context(), "t", digest.FromDigest(digest.SHA256.FromString("after")),
				p2p.StatOptions{}); name == "the file written over" && !errors.Is(err, p2p.ErrUnavailable) {
				t.Errorf("what is not in the file any more: %v", err)
			}
			if _, err := importArtifact(t.Context(), s, "v", []byte("later")); err == nil {
				t.Fatal("it was acknowledged")
			}
			if !bytes.Equal(content(), before) {
				t.Error("the metadata was written to")
			}
			err := s.update(func(tx *bbolt.Tx) error { return nil })
			if !errors.Is(err, p2p.ErrUnavailable) {
				t.Errorf("a change: %v", err)
			}
			requireFailed(t, s, p2p.ErrUnavailable)
		})
		if strings.Contains(name, "file") {
			continue // bbolt has it mapped
		}
		t.Run(name+", during a change", func(t *testing.T) {
			s, backup := open(t)
			err := s.update(func(tx *bbolt.Tx) error {
				replace(t, s, backup)
				return nil
			})
			if !errors.Is(err, p2p.ErrUnavailable) {
				t.Errorf("the change: %v", err)
			}
			requireFailed(t, s, p2p.ErrUnavailable)
		})
	}
	s := newStore(t)
	if err := s.committed(int(s.guard.last.Load().txid) + 1); !errors.Is(err, p2p.ErrUnavailable) {
		t.Errorf("a change that is not in the file: %v", err)
	}
}
