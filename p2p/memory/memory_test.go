package memory_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(*testing.T) p2p.Engine { return memory.New(memory.Options{}) })
}
