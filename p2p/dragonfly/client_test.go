package dragonfly

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
)

// What Dragonfly says becomes what the engine interface promises.
func TestErrors(t *testing.T) {
	detailed := func(code commonv1.Code) error {
		st, err := status.New(codes.Unknown, "some text").WithDetails(
			&commonv1.GrpcDfError{Code: code, Message: "some text"})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	other := errors.New("any other")
	c := &client{socket: "/run/s"}
	for _, test := range []struct {
		err, want error
		says      string
	}{
		{status.Error(codes.Unknown, "[1404]task not found"), p2p.ErrNotFound, "[1404]task not found"},
		{detailed(commonv1.Code_PeerTaskNotFound), p2p.ErrNotFound, "some text"},
		{detailed(commonv1.Code_RequestTimeOut), wire.ErrAway, "no answer within 1m0s"},
		{status.Error(codes.Unknown, "[1504]timeout"), wire.ErrAway, "no answer within 1m0s"},
		{status.Error(codes.DeadlineExceeded, "too late"), wire.ErrAway, "no answer within 1m0s"},
		{status.Error(codes.Unavailable,
			`connection error: desc = "transport: Error while dialing: dial unix /run/s: connect: refused"`),
			wire.ErrAway, "dial unix /run/s: connect: refused: see that it runs"},
		{status.Error(codes.Unavailable,
			`connection error: desc = "transport: Error while dialing: dial unix /run/s: connect: permission denied"`),
			wire.ErrAway, "as root"},
		{status.Error(codes.Unavailable,
			`connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:8002: connect: refused"`),
			wire.ErrAway, "does not reach its scheduler"},
		{status.Error(codes.Canceled, "EOF"), wire.ErrAway, "EOF"},
		{status.Error(codes.Unknown, "[4000]no peer gave it"), wire.ErrAway, "[4000]no peer gave it"},
		{detailed(commonv1.Code_SchedTaskStatusError), wire.ErrAway, "some text"},
		{status.Error(codes.Unknown, "[4000]write /var/lib/dragonfly/x: no space left on device"), p2p.ErrNoSpace,
			"/var/lib/dragonfly/x"},
		{status.Error(codes.Unknown, "[1400]output exists"), other, "at /run/s: [1400]output exists"},
		{status.Error(codes.Unknown, "[x]y"), other, "[x]y"},
		{status.Error(codes.Unknown, "[1404"), other, "[1404"},
		{status.Error(codes.Unknown, "1404]"), other, "1404]"},
		{status.Error(codes.Unimplemented, "unknown method"), other, "unknown method"},
		{errors.New("bare"), other, "bare"},
	} {
		err := c.call(t.Context(), "stat x", time.Minute, wire.ErrAway, func(context.Context) error { return test.err })
		if err == nil || !strings.Contains(err.Error(), test.says) ||
			!strings.HasPrefix(err.Error(), "stat x: Dragonfly's dfdaemon at /run/s: ") {
			t.Errorf("%v becomes %v; want %q in it", test.err, err, test.says)
		}
		for _, kind := range []error{p2p.ErrNotFound, wire.ErrAway, p2p.ErrUnreachable, p2p.ErrNoSpace} {
			is := test.want == kind || test.want == wire.ErrAway && kind == p2p.ErrUnreachable
			if errors.Is(err, kind) != is {
				t.Errorf("%v becomes %v; is it %q? want %t", test.err, err, kind, is)
			}
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(other)
	if err := c.call(ctx, "stat x", time.Minute, wire.ErrAway,
		func(ctx context.Context) error { return status.FromContextError(ctx.Err()).Err() }); !errors.Is(err, other) {
		t.Errorf("a context that has ended gives %v", err)
	}
}
