package peertest

import (
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

// What stands in for a swarm is as one.
func TestArriving(t *testing.T) {
	e := New(t)
	data := enginetest.Content(3*digest.MinPieceLength+1, 1)
	blob, err := e.Open(t.Context(), enginetest.Import(t, e.Peer, "t", data), p2p.Network)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	enginetest.RequireArriving(t, blob.(p2p.ArrivingBlob), data)
}
