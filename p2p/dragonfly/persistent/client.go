package persistent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"
	"time"

	commonv2 "d7y.io/api/v2/pkg/apis/common/v2"
	dfdaemonv2 "d7y.io/api/v2/pkg/apis/dfdaemon/v2"
	schedulerv2 "d7y.io/api/v2/pkg/apis/scheduler/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/throttle"
)

const (
	// service is what Dragonfly's dfdaemon calls the API that is used here in its health checks.
	service = "dfdaemon.v2.DfdaemonDownload"
	// maxMessage bounds an answer: a piece has 64 MiB at most.
	maxMessage = 65 << 20
	// maxPieces is how many pieces a task can have: 4 TiB of the smallest that Dragonfly makes.
	maxPieces = 1 << 20
	// hostID is who asks a scheduler, for its log.
	hostID = "dfcache"
)

// content is what the ID of a task is calculated from. No two tasks of ours have the
// same: a digest has no slash, and the tag is all that follows it.
func content(t p2p.Task) string { return "dfcache/" + t.Digest.String() + "/" + t.Tag }

// taskID is the ID that Dragonfly calculates from [content], since September 2025; it
// was a CRC-32 before.
func taskID(t p2p.Task) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(content(t)))) }

// errKnown says that an upload was refused because the scheduler knows the task already.
var errKnown = errors.New("its scheduler has this task already")

// client calls Dragonfly's dfdaemon, and schedulers for what that has no call for. Each
// call has a limit of our own.
type client struct {
	socket     string
	conn       *grpc.ClientConn
	daemon     dfdaemonv2.DfdaemonDownloadClient
	schedulers []scheduler
}

type scheduler struct {
	address string
	conn    *grpc.ClientConn
	api     schedulerv2.SchedulerClient
}

func newClient(socket string, schedulers []string) (*client, error) {
	socket, err := filepath.Abs(socket)
	if err != nil {
		return nil, err
	}
	conn, err := wire.DialSocket(socket, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, err
	}
	c := &client{socket: socket, conn: conn, daemon: dfdaemonv2.NewDfdaemonDownloadClient(conn)}
	for _, address := range schedulers {
		conn, err := wire.Dial("dns:///" + address)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("connect with Dragonfly's scheduler at %s: %w", address, err), c.close())
		}
		c.schedulers = append(c.schedulers, scheduler{address, conn, schedulerv2.NewSchedulerClient(conn)})
	}
	return c, nil
}

func (c *client) close() error {
	err := c.conn.Close()
	for _, s := range c.schedulers {
		err = errors.Join(err, s.conn.Close())
	}
	return err
}

// health asks whether the daemon answers, and knows the API v2.
func (c *client) health(ctx context.Context, limit time.Duration) error {
	return c.call(ctx, "health", limit, p2p.ErrUnavailable, func(ctx context.Context) error {
		answer, err := healthpb.NewHealthClient(c.conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		if code := status.Code(err); code == codes.NotFound || code == codes.Unimplemented {
			return status.Error(codes.Unavailable, "it answers, but not with the API v2")
		}
		if err == nil && answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			return status.Errorf(codes.Unavailable, "it is %s", answer.GetStatus())
		}
		return err
	})
}

// stat asks what the scheduler knows of a task. The error matches [p2p.ErrNotFound]
// where that is nothing, and away where there was no answer.
func (c *client) stat(
	ctx context.Context, t p2p.Task, away error, limit time.Duration,
) (task *commonv2.PersistentCacheTask, err error) {
	err = c.call(ctx, "stat "+t.String(), limit, away, func(ctx context.Context) (err error) {
		task, err = c.daemon.StatPersistentCacheTask(ctx, &dfdaemonv2.StatPersistentCacheTaskRequest{TaskId: taskID(t)})
		return err
	})
	return task, err
}

// upload has the daemon take the file at a path, of which it may keep a hard link. The
// error matches errKnown where the scheduler has the task already.
func (c *client) upload(ctx context.Context, t p2p.Task, path string, ttl, limit time.Duration) error {
	text := content(t)
	var task *commonv2.PersistentCacheTask
	err := c.call(ctx, "import "+t.String(), limit, p2p.ErrUnavailable, func(ctx context.Context) (err error) {
		task, err = c.daemon.UploadPersistentCacheTask(ctx, &dfdaemonv2.UploadPersistentCacheTaskRequest{
			ContentForCalculatingTaskId: &text, Path: path, PersistentReplicaCount: 1, Ttl: durationpb.New(ttl),
			Timeout: durationpb.New(limit),
		})
		return err
	})
	if err == nil && task.GetId() != taskID(t) {
		err = fmt.Errorf("import %s: Dragonfly's dfdaemon at %s has given it the ID %q, where %s was to be expected: "+
			"it is older than September 2025: update it",
			t, c.socket, task.GetId(), taskID(t))
		// Else it would know the content the next time, and an import seem to succeed.
		if failed := c.deleteID(ctx, task.GetId()); failed != nil {
			err = fmt.Errorf("%w (and it keeps what it has got: %w)", err, failed)
		}
	}
	return err
}

// limits say how long a download may take.
type limits struct {
	all   time.Duration
	stall time.Duration // without anything, or with next to nothing
	end   time.Duration // for Dragonfly to end when all has come, which keeps it then
}

// download writes a task's content to w, piece by piece as they come, and returns how many bytes there
// are: as many as the scheduler knows of, unless Dragonfly's dfdaemon says otherwise, for which there
// has to be room.
//
//nolint:cyclop // what each answer means stands in one place
func (c *client) download(
	ctx context.Context, t p2p.Task, w io.WriterAt, size int64, room func(int64) error, l limits,
) (int64, error) {
	stall := l.stall
	err := c.call(ctx, "export "+t.String(), l.all, wire.ErrAway, func(ctx context.Context) error {
		progress := throttle.NewProgress(ctx, stall)
		defer progress.Stop()
		stream, err := c.daemon.DownloadPersistentCacheTask(
			progress.Context(), &dfdaemonv2.DownloadPersistentCacheTaskRequest{
				TaskId: taskID(t), Persistent: true, NeedPieceContent: true, Timeout: durationpb.New(l.all),
			})
		if err != nil {
			return err
		}
		got := int64(0)
		seen := map[uint32]bool{}
		for {
			var answer *dfdaemonv2.DownloadPersistentCacheTaskResponse
			_, err := progress.Await(func() (n int, err error) {
				answer, err = stream.Recv()
				return len(answer.GetDownloadPieceFinishedResponse().GetPiece().GetContent()), err
			})
			if got == size && ctx.Err() == nil && (err != nil || progress.Context().Err() != nil) {
				return nil
			}
			if errors.Is(context.Cause(progress.Context()), throttle.ErrStalled) {
				return status.Errorf(codes.Aborted,
					"it has sent nothing for %s, or next to nothing: %d bytes of %d have come", stall, got, size)
			}
			if errors.Is(err, io.EOF) { // it ends so, too, where a piece failed
				return status.Errorf(codes.Aborted, "it has ended after %d bytes of %d", got, size)
			}
			if err != nil {
				return err
			}
			if start := answer.GetDownloadPersistentCacheTaskStartedResponse(); start != nil {
				if told := start.GetContentLength(); told != uint64(size) {
					if told > math.MaxInt64 || len(seen) > 0 {
						return status.Errorf(codes.Aborted, "it says that there are %d bytes, and before that %d",
							told, size)
					}
					size = int64(told)
					if err := room(size); err != nil {
						return &ownError{err}
					}
				}
				continue
			}
			piece := answer.GetDownloadPieceFinishedResponse().GetPiece()
			offset, data := int64(piece.GetOffset()), piece.GetContent()
			if len(data) == 0 || offset < 0 || offset > size-int64(len(data)) || piece.GetNumber() >= maxPieces {
				return status.Errorf(codes.Aborted, "it has sent piece %d with %d bytes from %d on, of %d in all",
					piece.GetNumber(), len(data), offset, size)
			}
			if seen[piece.GetNumber()] {
				continue
			}
			seen[piece.GetNumber()] = true
			if got += int64(len(data)); got > size {
				return status.Errorf(codes.Aborted, "it has sent more than the %d bytes that there are", size)
			}
			if _, err := w.WriteAt(data, offset); err != nil {
				return &ownError{pieces.DiskError(err)}
			}
			if got == size {
				progress.Restart(l.end)
			}
		}
	})
	return size, err
}

// ownError is a failure that is not Dragonfly's.
type ownError struct{ error }

func (e *ownError) Unwrap() error { return e.error }

// delete has Dragonfly delete a task, as deleteID does.
func (c *client) delete(ctx context.Context, t p2p.Task) error {
	if err := c.deleteID(ctx, taskID(t)); err != nil {
		return fmt.Errorf("delete %s: %w", t, err)
	}
	return nil
}

// deleteID has the first scheduler that answers delete a task, on every host that it
// reaches. One that it does not know is no error. Schedulers of a cluster have one memory.
func (c *client) deleteID(ctx context.Context, id string) error {
	var all error
	for _, s := range c.schedulers {
		st, late, err := wire.Call(ctx, deleteTimeout, func(ctx context.Context) error {
			_, err := s.api.DeletePersistentCacheTask(
				ctx, &schedulerv2.DeletePersistentCacheTaskRequest{HostId: hostID, TaskId: id})
			return err
		})
		switch {
		case st == nil:
			return err
		case st.Code() == codes.NotFound:
			return nil
		case late:
			all = errors.Join(all, fmt.Errorf(
				"scheduler %s: %w: no answer within %s", s.address, p2p.ErrUnavailable, deleteTimeout))
		default:
			all = errors.Join(all, fmt.Errorf("scheduler %s: %w: %s", s.address, p2p.ErrUnavailable, wire.Reason(st)))
		}
	}
	return all
}

// call does a call of the daemon within limit, and says what its error is: away where
// the daemon does not answer. What went wrong it tells in words only.
func (c *client) call(
	ctx context.Context, what string, limit time.Duration, away error, do func(context.Context) error,
) error {
	var own *ownError
	st, late, err := wire.Call(ctx, limit, func(ctx context.Context) error {
		err := do(ctx)
		errors.As(err, &own)
		return err
	})
	if own != nil {
		return fmt.Errorf("%s: %w", what, own.error)
	}
	if st == nil {
		return err
	}
	at := fmt.Sprintf("%s: Dragonfly's dfdaemon at %s", what, c.socket)
	text := st.Message()
	switch {
	case st.Code() == codes.NotFound, strings.Contains(text, "persistent cache task") &&
		strings.Contains(text, "not found"):
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNotFound, text)
	case strings.Contains(text, "cannot upload"):
		return fmt.Errorf("%s: %w: %s", at, errKnown, text)
	case wire.Full(st):
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNoSpace, text)
	case st.Code() == codes.Unimplemented:
		return fmt.Errorf("%s: %w: it has no such call: this needs the API v2 of Dragonfly's dfdaemon in Rust", at,
			away)
	}
	if err := wire.Silent(at, st, late, limit, away); err != nil {
		return err
	}
	if errors.Is(away, p2p.ErrUnreachable) || strings.Contains(text, "schedulers not found") {
		return fmt.Errorf("%s: %w: %s: see its log", at, away, text)
	}
	return fmt.Errorf("%s: %s", at, text)
}
