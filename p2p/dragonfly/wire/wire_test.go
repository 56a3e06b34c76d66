package wire

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// No two tasks have the same texts in a row.
func TestTaskNames(t *testing.T) {
	seen := map[string]p2p.Task{}
	for _, tag := range []string{"", "a", "ab", "abc", "bc", "c", "0", "00"} {
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			for _, text := range []string{"x", "y"} {
				task := p2p.Task{Tag: tag, Digest: alg.FromString(text)}
				key := URL(task) + Meta(task).GetTag()
				if other, found := seen[key]; found {
					t.Errorf("%s and %s are both %s", task, other, key)
				}
				seen[key] = task
			}
		}
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("x")}
	if want := "d7y:/sha256%3A" + task.Digest.Encoded(); URL(task) != want {
		t.Errorf("the URL of %s is %s; Dragonfly's dfcache has %s", task, URL(task), want)
	}
}

// daemon answers everything as it is told to.
type daemon struct {
	dfdaemonv1.UnimplementedDaemonServer
	pieces  int
	message string
}

func (d *daemon) StatTask(context.Context, *dfdaemonv1.StatTaskRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (d *daemon) GetPieceTasks(context.Context, *commonv1.PieceTaskRequest) (*commonv1.PiecePacket, error) {
	if d.message != "" {
		return nil, status.Error(codes.Unknown, d.message)
	}
	p := &commonv1.PiecePacket{}
	for range d.pieces {
		p.PieceInfos = append(p.PieceInfos, &commonv1.PieceInfo{})
	}
	return p, nil
}

// serve has a server answer with d, and returns a connection with it.
func serve(t *testing.T, server *grpc.Server, d *daemon) dfdaemonv1.DaemonClient {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	dfdaemonv1.RegisterDaemonServer(server, d)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	conn, err := Dial("unix:" + socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		<-served
	})
	return dfdaemonv1.NewDaemonClient(conn)
}

// What comes from outside is bounded, whoever asks.
func TestLimits(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := serve(t, NewServer(), &daemon{})
	ask := func(ctx context.Context, meta *commonv1.UrlMeta) error {
		_, err := client.StatTask(ctx, &dfdaemonv1.StatTaskRequest{Url: "d7y:/x", UrlMeta: meta})
		return err
	}
	if err := ask(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if err := ask(ctx, &commonv1.UrlMeta{
		Tag: strings.Repeat("x", 64<<10)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a long request: %v", err)
	}
	many := map[string]string{}
	for i := range maxQuestion + 1 {
		many[string(rune('a'+i))] = ""
	}
	if err := ask(ctx, &commonv1.UrlMeta{Header: many}); err == nil ||
		!strings.Contains(err.Error(), "too many elements") {
		t.Errorf("a request of many elements: %v", err)
	}
	if err := ask(metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("x", 16<<10)), nil); err == nil {
		t.Error("a request with long headers is answered")
	}

	for what, d := range map[string]*daemon{
		"many elements":            {pieces: maxElements + 1},
		"long headers of an error": {message: strings.Repeat("x", maxHeaders)},
	} {
		_, err := serve(t, grpc.NewServer(), d).GetPieceTasks(ctx, &commonv1.PieceTaskRequest{})
		if err == nil || strings.Contains(err.Error(), "xxxx") {
			t.Errorf("an answer of %s is taken", what)
		}
	}
	if _, err := serve(t, grpc.NewServer(), &daemon{pieces: maxElements}).GetPieceTasks(ctx,
		&commonv1.PieceTaskRequest{}); err != nil {
		t.Error(err)
	}
}
