package dragonfly

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/p2p"
)

// client calls Dragonfly's dfdaemon. Each call has a limit of our own: without its
// scheduler Dragonfly lets callers wait for two minutes.
type client struct {
	socket string
	conn   *grpc.ClientConn
	daemon dfdaemonv1.DaemonClient
}

func newClient(socket string) (*client, error) {
	socket, err := filepath.Abs(socket)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	// A daemon that has been started again is noticed within a second.
	retry := backoff.DefaultConfig
	retry.BaseDelay, retry.MaxDelay = 100*time.Millisecond, time.Second
	conn, err := grpc.NewClient("passthrough:///dfdaemon", grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: time.Second}))
	if err != nil {
		return nil, fmt.Errorf("connect with Dragonfly's dfdaemon at %s: %w", socket, err)
	}
	return &client{socket, conn, dfdaemonv1.NewDaemonClient(conn)}, nil
}

func (c *client) close() error { return c.conn.Close() }

// taskURL and taskMeta name a task to Dragonfly, as its own dfcache does.
//
// Dragonfly knows a task by the hash of both texts in a row, without a separator, so
// that the cid "a" under the tag "bc" is the cid "ab" under the tag "c". No two tasks
// of ours meet like that: our cid is always a full digest, never a name, so that the
// URL of one algorithm has one length, and begins with the algorithm. Two
// texts that are the same begin with the same algorithm, are cut at the same place, and
// so have the same digest and the same tag, the empty one too.
func taskURL(t p2p.Task) string { return "d7y:/" + url.QueryEscape(t.Digest.String()) }

func taskMeta(t p2p.Task) *commonv1.UrlMeta { return &commonv1.UrlMeta{Tag: t.Tag} }

// health asks whether the daemon answers.
func (c *client) health(ctx context.Context, limit time.Duration) error {
	return c.call(ctx, "health", limit, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.CheckHealth(ctx, &emptypb.Empty{})
		return err
	})
}

// errAway says that there is no way to what may be on other hosts.
var errAway = fmt.Errorf("%w: %w", p2p.ErrUnreachable, p2p.ErrUnavailable)

// stat asks whether a task is there: in that daemon alone, or with a peer that its
// scheduler knows of. The error matches [p2p.ErrNotFound] where it is not, and
// [p2p.ErrUnreachable] where there was no answer.
func (c *client) stat(ctx context.Context, t p2p.Task, local bool, limit time.Duration) error {
	away := errAway
	if local {
		away = p2p.ErrUnavailable
	}
	return c.call(ctx, "stat "+t.String(), limit, away, func(ctx context.Context) error {
		_, err := c.daemon.StatTask(ctx, &dfdaemonv1.StatTaskRequest{Url: taskURL(t), UrlMeta: taskMeta(t), LocalOnly: local})
		return err
	})
}

// importFile has the daemon import the file at a path. One that it has it leaves as it is.
func (c *client) importFile(ctx context.Context, t p2p.Task, path string, limit time.Duration) error {
	return c.call(ctx, "import "+t.String(), limit, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.ImportTask(ctx, &dfdaemonv1.ImportTaskRequest{Type: commonv1.TaskType_DfCache, Url: taskURL(t), UrlMeta: taskMeta(t), Path: path})
		return err
	})
}

// export has the daemon write a task's content to a path where there is nothing yet.
func (c *client) export(ctx context.Context, t p2p.Task, path string, limit time.Duration) error {
	return c.call(ctx, "export "+t.String(), limit, errAway, func(ctx context.Context) error {
		_, err := c.daemon.ExportTask(ctx, &dfdaemonv1.ExportTaskRequest{
			Url: taskURL(t), UrlMeta: taskMeta(t), Output: path,
			Timeout: uint64(limit.Nanoseconds()), Uid: int64(os.Geteuid()), Gid: int64(os.Getegid()),
		})
		return err
	})
}

// delete has the daemon delete a task of its own. One that it does not have is no error.
func (c *client) delete(ctx context.Context, t p2p.Task) error {
	return c.call(ctx, "delete", deleteTimeout, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.DeleteTask(ctx, &dfdaemonv1.DeleteTaskRequest{Url: taskURL(t), UrlMeta: taskMeta(t)})
		return err
	})
}

// call does a call within limit, and says what its error is: away where the daemon
// does not answer.
func (c *client) call(ctx context.Context, what string, limit time.Duration, away error, do func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := do(limited)
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	st := status.Convert(err)
	at := fmt.Sprintf("%s: Dragonfly's dfdaemon at %s", what, c.socket)
	switch code := codeOf(st); {
	case code == commonv1.Code_PeerTaskNotFound:
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNotFound, st.Message())
	case limited.Err() != nil, st.Code() == codes.DeadlineExceeded, code == commonv1.Code_RequestTimeOut:
		return fmt.Errorf("%s: %w: no answer within %s: see its log, and whether its scheduler runs", at, away, limit)
	case st.Code() == codes.Unavailable, st.Code() == codes.Canceled: // cancelled by the other side: ctx has not ended
		return fmt.Errorf("%s: %w: %s: see that it runs, and that this is its socket", at, away, reason(st))
	}
	return fmt.Errorf("%s: %s", at, st.Message())
}

// reason returns why a call did not get through, without what gRPC says around it.
func reason(st *status.Status) string {
	if _, why, found := strings.Cut(st.Message(), "transport: Error while dialing: "); found {
		return strings.TrimSuffix(why, `"`)
	}
	return st.Message()
}

// codeOf returns the code that Dragonfly gives an error, in a detail and at the
// start of the message, [1404]; 0 where there is none.
func codeOf(st *status.Status) commonv1.Code {
	for _, detail := range st.Details() {
		if e, ok := detail.(*commonv1.GrpcDfError); ok {
			return e.GetCode()
		}
	}
	rest, ok := strings.CutPrefix(st.Message(), "[")
	number, _, closed := strings.Cut(rest, "]")
	n, err := strconv.ParseInt(number, 10, 32)
	if !ok || !closed || err != nil {
		return 0
	}
	return commonv1.Code(n)
}
