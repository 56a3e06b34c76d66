package rpc_test

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/memory"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// TestEngine runs the suite of every engine against a client of a server over
// the engine that dfdaemon has.
func TestEngine(t *testing.T) {
	runSuite(t, func(t *testing.T) p2p.Engine {
		store, err := pieces.Open(t.TempDir(), pieces.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return store
	})
}

// An engine that has no files serves as any other: of what is opened a copy is handed over.
func TestEngineInMemory(t *testing.T) {
	runSuite(t, func(*testing.T) p2p.Engine { return memory.New(memory.Options{}) })
}

func runSuite(t *testing.T, open func(*testing.T) p2p.Engine) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		store := open(t)
		socket := filepath.Join(t.TempDir(), "run", "s")
		l, err := rpc.Listen(socket)
		if err != nil {
			t.Fatal(err)
		}
		server := rpc.NewServer(store, slog.New(slog.DiscardHandler))
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		t.Cleanup(func() {
			// The test's own context has ended by now.
			if err := errors.Join(server.Shutdown(t.Context()), <-served, store.Close()); err != nil {
				t.Logf("stop the server: %v", err)
			}
		})
		client, err := rpc.Dial(t.Context(), socket)
		if err != nil {
			t.Fatal(err)
		}
		return client
	})
}
