package rpc_test

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// TestEngine runs the suite of every engine against a client of a server over
// the engine that dfdaemon has.
func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) p2p.Engine {
		store, err := pieces.Open(t.TempDir(), pieces.Options{})
		if err != nil {
			t.Fatal(err)
		}
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
