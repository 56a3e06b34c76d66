package pieces

import (
	"context"
	"os"
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

// Who wants a manifest's content only is not kept waiting for what it refers to.
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
