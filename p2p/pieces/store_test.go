package pieces

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
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
