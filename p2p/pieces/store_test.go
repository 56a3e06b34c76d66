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
		return s
	})
}
