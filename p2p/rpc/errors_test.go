package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

func TestErrorsCrossTheSocket(t *testing.T) {
	other := digest.SHA256.FromString("other")
	mismatch := &digest.MismatchError{Want: someTask.Digest, Got: other}
	corrupt := &digest.CorruptError{Digest: other, Piece: 7, Reason: "a flipped bit"}
	_, invalid := digest.ParseCID("sha256:xxxxxx")
	for name, test := range map[string]struct {
		err  error
		code codes.Code
		is   []error // besides what is listed, none of the kinds
	}{
		"not found": {fmt.Errorf("%s: %w", someTask, p2p.ErrNotFound), codes.NotFound, []error{p2p.ErrNotFound}},
		"referenced": {fmt.Errorf("%s: %w by x", someTask, p2p.ErrReferenced), codes.FailedPrecondition,
			[]error{p2p.ErrReferenced}},
		"missing ref": {fmt.Errorf("%s: %w: x", someTask, p2p.ErrMissingRef), codes.FailedPrecondition,
			[]error{p2p.ErrMissingRef}},
		"no space":    {fmt.Errorf("write: %w", p2p.ErrNoSpace), codes.ResourceExhausted, []error{p2p.ErrNoSpace}},
		"unavailable": {fmt.Errorf("store: %w", p2p.ErrUnavailable), codes.Unavailable, []error{p2p.ErrUnavailable}},
		"unreachable": {fmt.Errorf("stat: %w: all 3 bootstrap peers are away", p2p.ErrUnreachable), codes.Unavailable,
			[]error{p2p.ErrUnreachable}},
		"closed":     {fmt.Errorf("store: %w", p2p.ErrClosed), codes.Unavailable, []error{p2p.ErrClosed}},
		"invalid":    {invalid, codes.InvalidArgument, []error{digest.ErrInvalid}},
		"permission": {fmt.Errorf("open: %w", syscall.EACCES), codes.PermissionDenied, []error{fs.ErrPermission}},
		"unsupported": {fmt.Errorf("x: %w", errors.ErrUnsupported), codes.Unimplemented,
			[]error{errors.ErrUnsupported}},
		"mismatch": {fmt.Errorf("add: %w", mismatch), codes.InvalidArgument, []error{digest.ErrMismatch}},
		"bare mismatch": {
			fmt.Errorf("piece 3: %w", digest.ErrMismatch), codes.InvalidArgument, []error{digest.ErrMismatch},
		},
		"corrupt": {fmt.Errorf("open: %w", corrupt), codes.DataLoss, []error{digest.ErrCorrupt}},
		"timeout": {fmt.Errorf("peers: %w", context.DeadlineExceeded), codes.DeadlineExceeded,
			[]error{context.DeadlineExceeded}},
		"canceled": {fmt.Errorf("peers: %w", context.Canceled), codes.Canceled, []error{context.Canceled}},
		"two kinds": {
			fmt.Errorf("%w: %w", p2p.ErrUnavailable, fs.ErrPermission), codes.PermissionDenied,
			[]error{p2p.ErrUnavailable, fs.ErrPermission},
		},
		"none": {errors.New("bbolt: page 7 is odd"), codes.Internal, nil},
		"not UTF-8": {fmt.Errorf("open \xff.db: %w", p2p.ErrUnavailable), codes.Unavailable,
			[]error{p2p.ErrUnavailable}},
	} {
		t.Run(name, func(t *testing.T) {
			if code := status.Code(toStatus(test.err)); code != test.code {
				t.Errorf("code %s, want %s", code, test.code)
			}
			h := &hooked{Engine: newStore(t.TempDir())}
			h.stat = func(context.Context, p2p.StatOptions) (p2p.Info, error) { return p2p.Info{}, test.err }
			c := pair(t, h)
			_, got := stat(t.Context(), c, someTask)
			if got == nil {
				t.Fatal("no error")
			}
			if want := strings.ToValidUTF8(test.err.Error(), "\uFFFD"); got.Error() != want {
				t.Errorf("message\n%s\nwant\n%s", got, want)
			}
			for _, k := range kinds {
				want := false
				for _, is := range test.is {
					want = want || is == k.err
				}
				if errors.Is(got, k.err) != want {
					t.Errorf("errors.Is(err, %q) is %t", k.err, !want)
				}
			}
			var gotMismatch *digest.MismatchError
			if errors.As(test.err, new(*digest.MismatchError)) &&
				(!errors.As(got, &gotMismatch) || *gotMismatch != *mismatch) {
				t.Errorf("mismatch %v", gotMismatch)
			}
			var gotCorrupt *digest.CorruptError
			if errors.As(test.err, new(*digest.CorruptError)) &&
				(!errors.As(got, &gotCorrupt) || *gotCorrupt != *corrupt) {
				t.Errorf("corrupt %v", gotCorrupt)
			}
		})
	}
}

// The metadata of an error is the daemon's: whatever it is, it gives an error.
func TestStrangeDetails(t *testing.T) {
	st, _ := status.FromError(toStatus(&digest.CorruptError{Digest: someTask.Digest, Piece: -1, Reason: "gone"}))
	err := fromStatus(st)
	var corrupt *digest.CorruptError
	if !errors.As(err, &corrupt) || corrupt.Piece != -1 {
		t.Errorf("got %v", err)
	}
	if err := fromStatus(status.New(codes.NotFound, "not ours")); err != nil {
		t.Errorf("an error of gRPC itself: %v", err)
	}
	c := &Client{socket: "/run/d.sock"}
	for code, want := range map[codes.Code]error{
		codes.Unavailable:      p2p.ErrUnavailable,
		codes.Canceled:         p2p.ErrUnavailable,
		codes.DeadlineExceeded: context.DeadlineExceeded,
		codes.Unimplemented:    errors.ErrUnsupported,
	} {
		err := c.callError(t.Context(), status.Error(code, "text of gRPC"))
		if !errors.Is(err, want) || strings.Contains(err.Error(), "rpc error") {
			t.Errorf("%s: %v", code, err)
		}
	}
	if err := c.callError(t.Context(), status.Error(codes.ResourceExhausted, "too large")); err == nil ||
		err.Error() != "dfdaemon at /run/d.sock: too large" {
		t.Errorf("got %v", err)
	}
}
