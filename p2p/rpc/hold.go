package rpc

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// The calls of [p2p.Holder], on both sides of the socket. They may take long, and tell
// meanwhile what they wait for.

// withNotices returns a context whose notices come out of a channel. One that is not read in
// time is dropped for a later one.
func withNotices(ctx context.Context) (context.Context, chan string) {
	notices := make(chan string, 1)
	return p2p.WithNotice(ctx, func(text string) {
		select {
		case notices <- valid(text):
		default:
		}
	}), notices
}

// noticing calls do, and passes notices on to send meanwhile. Where send fails, the call is
// over, and do ends.
func noticing(notices <-chan string, do func() error, send func(text string) error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	for {
		select {
		case text := <-notices:
			_ = send(text)
		case err := <-done:
			return err
		}
	}
}

func holdNoticing(stream grpc.ServerStreamingServer[pb.Notice], do func(ctx context.Context) error) error {
	ctx, notices := withNotices(stream.Context())
	return noticing(notices, func() error { return do(ctx) },
		func(text string) error { return stream.Send(&pb.Notice{Text: text}) })
}

func (s *service) Hold(req *pb.HoldRequest, stream grpc.ServerStreamingServer[pb.Notice]) error {
	cid, err := parseName(req.GetTag(), req.GetCid())
	if err != nil {
		return err
	}
	return holdNoticing(stream, func(ctx context.Context) error { return s.engine.Hold(ctx, req.GetTag(), cid) })
}

func (s *service) HoldManifest(ctx context.Context, req *pb.StatRequest) (*pb.StatReply, error) {
	cid, opts, err := parseStat(req)
	if err != nil {
		return nil, err
	}
	info, err := s.engine.HoldManifest(ctx, req.GetTag(), cid, opts)
	if err != nil {
		return nil, err
	}
	return statMessage(info), nil
}

func (s *service) HoldReferrers(req *pb.TaskRequest, stream grpc.ServerStreamingServer[pb.Notice]) error {
	return holdTask(req, stream, s.engine.HoldReferrers)
}

func (s *service) Verify(req *pb.TaskRequest, stream grpc.ServerStreamingServer[pb.Notice]) error {
	return holdTask(req, stream, s.engine.Verify)
}

func (s *service) Mend(req *pb.TaskRequest, stream grpc.ServerStreamingServer[pb.Notice]) error {
	return holdTask(req, stream, s.engine.Mend)
}

func holdTask(
	req *pb.TaskRequest, stream grpc.ServerStreamingServer[pb.Notice], do func(context.Context, p2p.Task) error,
) error {
	task, err := parseTask(req.GetTask())
	if err != nil {
		return err
	}
	return holdNoticing(stream, func(ctx context.Context) error { return do(ctx, task) })
}

// Hold implements [p2p.Holder].
func (c *Client) Hold(ctx context.Context, tag string, cid digest.CID) error {
	if err := p2p.ValidateRef(tag, cid); err != nil {
		return err
	}
	req := &pb.HoldRequest{Tag: tag, Cid: cid.String()}
	return c.await(ctx, func(ctx context.Context, d pb.DaemonClient) (grpc.ServerStreamingClient[pb.Notice], error) {
		return d.Hold(ctx, req)
	})
}

// HoldManifest implements [p2p.Holder].
func (c *Client) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return c.stat(ctx, tag, cid, opts, pb.DaemonClient.HoldManifest)
}

// HoldReferrers implements [p2p.Holder].
func (c *Client) HoldReferrers(ctx context.Context, task p2p.Task) error {
	return c.awaitTask(ctx, task, pb.DaemonClient.HoldReferrers)
}

// Verify implements [p2p.Holder].
func (c *Client) Verify(ctx context.Context, task p2p.Task) error {
	return c.awaitTask(ctx, task, pb.DaemonClient.Verify)
}

// Mend implements [p2p.Holder].
func (c *Client) Mend(ctx context.Context, task p2p.Task) error {
	return c.awaitTask(ctx, task, pb.DaemonClient.Mend)
}

func (c *Client) awaitTask(
	ctx context.Context, task p2p.Task, call func(pb.DaemonClient, context.Context, *pb.TaskRequest,
		...grpc.CallOption) (grpc.ServerStreamingClient[pb.Notice], error),
) error {
	if err := task.Validate(); err != nil {
		return err
	}
	return c.await(ctx, func(ctx context.Context, d pb.DaemonClient) (grpc.ServerStreamingClient[pb.Notice], error) {
		return call(d, ctx, &pb.TaskRequest{Task: taskMessage(task)})
	})
}

// await makes a call, and passes its notices on until it ends.
func (c *Client) await(
	ctx context.Context, call func(context.Context, pb.DaemonClient) (grpc.ServerStreamingClient[pb.Notice], error),
) error {
	s, end, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := call(running, s.daemon)
	notice := p2p.NoticeOf(ctx)
	for err == nil {
		var m *pb.Notice
		if m, err = stream.Recv(); err == nil && notice != nil {
			notice(m.GetText())
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return c.callError(ctx, err)
}
