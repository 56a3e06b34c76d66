package pieces

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		s, err := Open(t.TempDir(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { requireClean(t, s.dir) })
		m, _ := watch(t, s)
		m.many = true
		return &mirrored{Store: s, mirror: m}
	})
}

// A store works the same wherever its bytes lie.
func TestEngineInMemory(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		dir, bytes := t.TempDir(), backend.NewMemory()
		open := func() *Store {
			s, err := Open(dir, Options{Backend: bytes})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		t.Cleanup(func() {
			if n, err := bytes.Clean(); n > 0 || err != nil {
				t.Errorf("%d files or claims are left, %v", n, err)
			}
			s := open()
			defer s.Close()
			if _, err := s.Check(context.Background(), func(p Problem) { t.Errorf("check: %s", p) }); err != nil {
				t.Error(err)
			}
			for _, name := range []string{"blobs", "ingest", "partial"} {
				if _, err := os.Stat(s.path(name)); !backend.IsMissing(err) {
					t.Errorf("in the directory of the metadata there is %s: %v", name, err)
				}
			}
		})
		s := open()
		m, _ := watch(t, s)
		m.many = true
		return &mirrored{Store: s, mirror: m}
	})
}

// A reader of a manifest's content alone is not kept waiting for what it refers to.
func TestStatContentOnly(t *testing.T) {
	s := openWith(t, t.TempDir(), &faults{at: -1})
	defer s.Close()
	task, err := importArtifact(t.Context(), s, "v1", []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	for _, only := range []bool{false, true} {
		info, err := s.Stat(t.Context(), task.Tag, cacheID(t, "v1"), p2p.StatOptions{Manifest: true, ContentOnly: only})
		if err != nil || info.Manifest == nil || (len(info.Manifest.Refs) == 0) != only {
			t.Errorf("content only %v: %+v, %v", only, info.Manifest, err)
		}
	}
}

// TestCloseDropsUnfinished: what is still being taken in when the store is closed is gone then,
// whenever the ingest is closed, or never.
func TestCloseDropsUnfinished(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var writers []p2p.Writer
	for range 8 {
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		w, err := in.Create(p2p.AddOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
		writers = append(writers, w)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "ingest")); err != nil || len(left) > 0 {
		t.Errorf("what is left is %v, %v", left, err)
	}
	for _, w := range writers {
		if _, err := w.Write([]byte("more")); !errors.Is(err, p2p.ErrClosed) {
			t.Errorf("write after that: %v", err)
		}
	}
}
