package rpc

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/grpclimit"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// TestRequestsOfManyElements: a request that is small and becomes large in memory is refused
// before it does.
func TestRequestsOfManyElements(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	c := pair(t, newStore(t.TempDir()))
	s, end, err := c.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	const n = maxRequest/2 - 100 // two bytes each
	for name, commit := range map[string]*pb.IngestRequest_Commit{
		"tasks": {Tasks: slices.Repeat([]*pb.NewTask{{}}, n)},
		"names": {Names: slices.Repeat([]*pb.NewName{{}}, n)},
		"refs":  {Tasks: []*pb.NewTask{{Manifest: &pb.NewTask_Manifest{Refs: make([]string, n)}}}},
	} {
		stream, err := s.daemon.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if err := stream.Send(&pb.IngestRequest{Request: &pb.IngestRequest_Commit_{Commit: commit}}); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		runtime.ReadMemStats(&after)
		if err == nil || !strings.Contains(err.Error(), grpclimit.ErrLimit.Error()) {
			t.Errorf("%s: %v", name, err)
		}
		// The client's message and the daemon's are both in it.
		if took := int(after.TotalAlloc - before.TotalAlloc); took > 8*maxRequest {
			t.Errorf("%s: %d bytes are allocated for a message of %d", name, took, 2*n)
		}
	}
}

// TestLongRequests: a request has a bound in bytes, and so have the headers of its call.
func TestLongRequests(t *testing.T) {
	c := pair(t, newStore(t.TempDir()))
	stream := rawIngest(t, c)
	long := &pb.IngestRequest_Add{Want: strings.Repeat("x", maxRequest)}
	if err := stream.Send(&pb.IngestRequest{Request: &pb.IngestRequest_Add_{Add: long}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request of more than %d bytes: %v", maxRequest, err)
	}
	for n, want := range map[int]bool{maxHeaders / 2: true, maxHeaders: false} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "long", strings.Repeat("x", n))
		_, err := c.current.daemon.Stat(ctx, &pb.StatRequest{Cid: string(someTask.Digest), Scope: pb.Scope_SCOPE_LOCAL})
		if answered := status.Code(err) == codes.NotFound; answered != want {
			t.Errorf("headers of %d bytes: %v", n, err)
		}
	}
}

// TestCommitsUnderWay: the parts of all commits have so much room together, and give it back.
func TestCommitsUnderWay(t *testing.T) {
	room := semaphore.NewWeighted(100)
	part := &pb.IngestRequest_Commit{Names: []*pb.NewName{{Tag: "t", Name: "v1", Digest: string(someTask.Digest)}},
		More: true}
	one, other := commitParser{room: room}, commitParser{room: room}
	if err := one.add(part); err != nil {
		t.Fatal(err)
	}
	if err := other.add(part); !errors.Is(err, p2p.ErrBusy) {
		t.Errorf("no room: %v", err)
	}
	other.end()
	one.end()
	another := commitParser{room: room}
	if err := another.add(part); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	another.end()
	if !room.TryAcquire(100) {
		t.Error("not all of the room was given back")
	}
}
