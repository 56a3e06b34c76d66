package dragonfly

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
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
	conn, err := wire.DialSocket(socket)
	if err != nil {
		return nil, err
	}
	return &client{socket, conn, dfdaemonv1.NewDaemonClient(conn)}, nil
}

func (c *client) close() error { return c.conn.Close() }

// health asks whether the daemon answers.
func (c *client) health(ctx context.Context, limit time.Duration) error {
	return c.call(ctx, "health", limit, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.CheckHealth(ctx, &emptypb.Empty{})
		return err
	})
}

// stat asks whether a task is there: in that daemon alone, or with a peer that its
// scheduler knows of. The error matches [p2p.ErrNotFound] where it is not, and
// [p2p.ErrUnreachable] where there was no answer.
func (c *client) stat(ctx context.Context, t p2p.Task, local bool, limit time.Duration) error {
	away := wire.ErrAway
	if local {
		away = p2p.ErrUnavailable
	}
	return c.call(ctx, "stat "+t.String(), limit, away, func(ctx context.Context) error {
		_, err := c.daemon.StatTask(ctx,
			&dfdaemonv1.StatTaskRequest{Url: wire.URL(t), UrlMeta: wire.Meta(t), LocalOnly: local})
		return err
	})
}

// importFile has the daemon import the file at a path. One that it has it leaves as it is.
func (c *client) importFile(ctx context.Context, t p2p.Task, path string, limit time.Duration) error {
	return c.call(ctx, "import "+t.String(), limit, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.ImportTask(ctx,
			&dfdaemonv1.ImportTaskRequest{
				Type: commonv1.TaskType_DfCache, Url: wire.URL(t), UrlMeta: wire.Meta(t), Path: path})
		return err
	})
}

// export has the daemon write a task's content to a path where there is nothing yet.
func (c *client) export(ctx context.Context, t p2p.Task, path string, limit time.Duration) error {
	err := c.call(ctx, "export "+t.String(), limit, wire.ErrAway, func(ctx context.Context) error {
		_, err := c.daemon.ExportTask(ctx, &dfdaemonv1.ExportTaskRequest{
			Url: wire.URL(t), UrlMeta: wire.Meta(t), Output: path,
			Timeout: uint64(limit.Nanoseconds()), Uid: int64(os.Geteuid()), Gid: int64(os.Getegid()),
		})
		return err
	})
	// Why peers did not give it, it tells with a code or without one.
	for _, kind := range []error{nil, p2p.ErrNotFound, p2p.ErrNoSpace, p2p.ErrUnavailable, context.Cause(ctx)} {
		if errors.Is(err, kind) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", wire.ErrAway, err)
}

// delete has the daemon delete a task of its own. One that it does not have is no error.
func (c *client) delete(ctx context.Context, t p2p.Task) error {
	return c.call(ctx, "delete", deleteTimeout, p2p.ErrUnavailable, func(ctx context.Context) error {
		_, err := c.daemon.DeleteTask(ctx, &dfdaemonv1.DeleteTaskRequest{Url: wire.URL(t), UrlMeta: wire.Meta(t)})
		return err
	})
}

// call does a call within limit, and says what its error is: away where the daemon
// does not answer.
func (c *client) call(
	ctx context.Context, what string, limit time.Duration, away error, do func(context.Context) error,
) error {
	st, late, err := wire.Call(ctx, limit, do)
	if st == nil {
		return err
	}
	at := fmt.Sprintf("%s: Dragonfly's dfdaemon at %s", what, c.socket)
	code := wire.Code(st)
	if code == commonv1.Code_PeerTaskNotFound {
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNotFound, st.Message())
	}
	if wire.Full(st) {
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNoSpace, st.Message())
	}
	if err := wire.Silent(at, st, late || code == commonv1.Code_RequestTimeOut, limit, away); err != nil {
		return err
	}
	// and above: of its scheduler and its sources
	if code >= commonv1.Code_ClientError && errors.Is(away, p2p.ErrUnreachable) {
		return fmt.Errorf("%s: %w: %s: see its log", at, away, st.Message())
	}
	return fmt.Errorf("%s: %s", at, st.Message())
}
