// Package wire is how Dragonfly's v1 API names tasks and tells of errors, for all who
// call it and answer it.
//
// It promises no compatibility.
package wire

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/grpclimit"
)

// Scheme begins the URL that Dragonfly's dfcache makes of a cid; the cid follows,
// escaped as in a query.
const Scheme = "d7y:/"

// URL and Meta name a task to Dragonfly, as its own dfcache does. The tag is the one that was given
// there, where it was (see package given).
//
// Dragonfly knows a task by the hash of both texts in a row, without a separator, so
// that the cid "a" under the tag "bc" is the cid "ab" under the tag "c". No two tasks
// of ours meet like that: our cid is always a full digest, never a name, so that the
// URL of one algorithm has one length, and begins with the algorithm. Two
// texts that are the same begin with the same algorithm, are cut at the same place, and
// so have the same digest and the same tag, the empty one too.
func URL(t p2p.Task) string { return Scheme + url.QueryEscape(t.Digest.String()) }

// Meta is the other part of a task's name: see [URL].
func Meta(t p2p.Task) *commonv1.UrlMeta { return &commonv1.UrlMeta{Tag: given.Text(t.Tag)} }

// maxElements is how many elements (see package grpclimit) a message of Dragonfly may have that
// is an answer, and maxQuestion one that asks.
const (
	maxElements = 1 << 16
	maxQuestion = 1 << 10
)

const (
	// maxHeaders is how many bytes the headers of an answer may have, errors among them.
	maxHeaders = 256 << 10
	// maxStreams is how many calls may be under way over one connection with a server.
	maxStreams = 256
)

// Dial returns a connection to what a target of gRPC names, which is made when it is
// used, without TLS. One that was lost is made again within a second. The caller closes it.
func Dial(target string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	retry := backoff.DefaultConfig
	retry.BaseDelay, retry.MaxDelay = 100*time.Millisecond, time.Second
	return grpc.NewClient(target, append([]grpc.DialOption{
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(grpclimit.Codec(maxElements))),
	}, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: time.Second}))...)...)
}

// DialSocket is [Dial] for a unix socket.
func DialSocket(socket string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	conn, err := Dial("passthrough:///dfdaemon", append(opts, grpc.WithContextDialer(dial))...)
	if err != nil {
		return nil, fmt.Errorf("connect with Dragonfly's dfdaemon at %s: %w", socket, err)
	}
	return conn, nil
}

// OnReturn calls do whenever the other end of a connection answers that was away before, until
// ctx ends. It goes on connecting meanwhile.
func OnReturn(ctx context.Context, conn *grpc.ClientConn, do func()) {
	away := false
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Idle: // also where a server has closed what nobody used for a while
			conn.Connect()
		case connectivity.TransientFailure:
			away = true
		case connectivity.Ready:
			if away {
				do()
			}
			away = false
		}
		if !conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// NewServer returns a server, with limits on what comes from others: a request has 64 KiB at most
// and few elements, a connection has to be one of gRPC within 10 seconds.
func NewServer(opts ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(64 << 10), grpc.MaxHeaderListSize(16 << 10),
		grpc.ForceServerCodecV2(grpclimit.Codec(maxQuestion)),
		grpc.MaxConcurrentStreams(maxStreams), grpc.ConnectionTimeout(10 * time.Second),
	}, opts...)...)
}

// Call does a call within limit. Where it fails, it returns what the other side says, and
// whether that is no answer in time; or the cause, where ctx has ended.
func Call(
	ctx context.Context, limit time.Duration, do func(context.Context) error,
) (st *status.Status, late bool, err error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	failed := do(limited)
	if failed == nil {
		return nil, false, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return nil, false, cause
	}
	st = status.Convert(failed)
	return st, limited.Err() != nil || st.Code() == codes.DeadlineExceeded, nil
}

// Silent returns what it means for a caller that Dragonfly's dfdaemon did not answer a
// call, an error that matches away and begins with at; or nil where st is an answer.
func Silent(at string, st *status.Status, late bool, limit time.Duration, away error) error {
	switch {
	case late:
		return fmt.Errorf("%s: %w: no answer within %s: see its log, and whether its scheduler runs", at, away, limit)
	// cancelled by the other side: the caller's context has not ended
	case st.Code() != codes.Unavailable && st.Code() != codes.Canceled:
		return nil
	}
	advice := "see that it runs, and that this is its socket"
	if strings.Contains(st.Message(), "permission denied") {
		advice = "this user may not use its socket: run this dfdaemon as root, or as the user of Dragonfly's"
	} else if strings.Contains(st.Message(), "dial tcp") { // an error of its own
		advice = "it runs, but does not reach its scheduler"
	}
	return fmt.Errorf("%s: %w: %s: %s", at, away, Reason(st), advice)
}

// ErrAway says that there is no way to what may be on other hosts. It matches
// [p2p.ErrUnreachable] and [p2p.ErrUnavailable].
var ErrAway = fmt.Errorf("%w: %w", p2p.ErrUnreachable, p2p.ErrUnavailable)

// Full reports whether Dragonfly says that its disk is full: it has no code for that. In Go and in
// Rust the words are those of the C library, but for an upper case letter.
func Full(st *status.Status) bool {
	return strings.Contains(strings.ToLower(st.Message()), unix.ENOSPC.Error())
}

// Error returns an error in the form in which Dragonfly's servers send them: of no kind
// that gRPC has, with a code of their own in the message, [1404], and in a detail.
func Error(code commonv1.Code, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	st := status.Newf(codes.Unknown, "[%d]%s", code, message)
	if detailed, err := st.WithDetails(&commonv1.GrpcDfError{Code: code, Message: message}); err == nil {
		st = detailed
	}
	return st.Err()
}

// Code returns the code that Dragonfly gives an error, as [Error] has it; 0 where there
// is none.
func Code(st *status.Status) commonv1.Code {
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

// Reason returns why a call did not get through, without what gRPC says around it.
func Reason(st *status.Status) string {
	if _, why, found := strings.Cut(st.Message(), "transport: Error while dialing: "); found {
		return strings.TrimSuffix(why, `"`)
	}
	return st.Message()
}
