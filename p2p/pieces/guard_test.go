package pieces

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
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
				if _, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
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
		if _, err := Open(dir, Options{}); !errors.Is(err, digest.ErrCorrupt) || !strings.Contains(err.Error(), "from a copy") {
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
	for at := 0; ; at++ {
		i := bytes.Index(data[at:], record)
		if i < 0 {
			break
		}
		at += i
		if _, err := f.WriteAt([]byte{'5'}, int64(at+len(record)-2)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Stat(t.Context(), "t", digest.FromDigest(task.Digest), p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("stat: %v", err)
	}
	if _, err := importArtifact(t.Context(), s, "v", []byte("new")); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("import: %v", err)
	}
	requireFailed(t, s, digest.ErrCorrupt)
}

// TestMapFails: where the system can't map the file when it grows, that change fails, and
// nothing else does.
func TestMapFails(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	s.db.MmapFlags = unix.MAP_HUGETLB // which this file system has not
	err := s.update(func(tx *bbolt.Tx) error { return putValue(tx, bucketTables, []byte("large"), make([]byte, 1<<20)) })
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
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			s, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			enginetest.Import(t, s, "t", []byte("before"))
			backup := t.TempDir()
			copyTree(t, dir, backup)
			enginetest.Import(t, s, "t", []byte("after"))
			replace(t, s, backup)
			if _, err := importArtifact(t.Context(), s, "v", []byte("later")); err == nil {
				t.Fatal("it was acknowledged")
			}
			err = s.update(func(tx *bbolt.Tx) error { return nil })
			if !errors.Is(err, p2p.ErrUnavailable) {
				t.Errorf("a change: %v", err)
			}
			requireFailed(t, s, p2p.ErrUnavailable)
		})
	}
}
