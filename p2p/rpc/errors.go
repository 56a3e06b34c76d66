package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// ErrNoDaemon is matched by the error of a [Dial] that found nothing listening
// on the socket: what a daemon that is not running looks like. It matches
// [p2p.ErrUnavailable] too.
var ErrNoDaemon = fmt.Errorf("%w: nothing listens there", p2p.ErrUnavailable)

// errorDomain marks the details that a dfdaemon gives its errors.
const errorDomain = "dfcache"

// kinds are the errors that cross the socket as themselves: errors.Is holds on
// both sides. Where an error is of several kinds, the first gives the status
// its code.
var kinds = []struct {
	reason string
	code   codes.Code
	err    error
}{
	{reasonMismatch, codes.InvalidArgument, digest.ErrMismatch},
	{reasonCorrupt, codes.DataLoss, digest.ErrCorrupt},
	{"NOT_FOUND", codes.NotFound, p2p.ErrNotFound},
	{"REFERENCED", codes.FailedPrecondition, p2p.ErrReferenced},
	{reasonMissingRef, codes.FailedPrecondition, p2p.ErrMissingRef},
	{"NO_SPACE", codes.ResourceExhausted, p2p.ErrNoSpace},
	{"CHANGED", codes.Aborted, p2p.ErrChanged},
	{"MOVED", codes.FailedPrecondition, p2p.ErrMoved},
	{"INVALID", codes.InvalidArgument, digest.ErrInvalid},
	{"PERMISSION", codes.PermissionDenied, fs.ErrPermission},
	{"CLOSED", codes.Unavailable, p2p.ErrClosed},
	{"UNREACHABLE", codes.Unavailable, p2p.ErrUnreachable},
	{"BUSY", codes.Unavailable, p2p.ErrBusy},
	{"UNAVAILABLE", codes.Unavailable, p2p.ErrUnavailable},
	{"FAILED", codes.Unavailable, p2p.ErrFailed},
	{"UNSUPPORTED", codes.Unimplemented, errors.ErrUnsupported},
	{"TIMEOUT", codes.DeadlineExceeded, context.DeadlineExceeded},
	{"CANCELED", codes.Canceled, context.Canceled},
}

const (
	// Of these there is more to tell than the message.
	reasonMismatch   = "DIGEST_MISMATCH"
	reasonCorrupt    = "CORRUPT"
	reasonMissingRef = "MISSING_REF"

	reasonInternal = "INTERNAL" // of an error of no kind
)

// toStatus makes a gRPC status of what an engine returned. Each kind that the
// error is of becomes a detail.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err // of gRPC itself: a message that is too large, for example
	}
	code := codes.Internal
	var details []protoadapt.MessageV1
	for _, k := range kinds {
		if !errors.Is(err, k.err) {
			continue
		}
		info := &errdetails.ErrorInfo{Reason: k.reason, Domain: errorDomain}
		switch k.reason {
		case reasonMismatch:
			if e, ok := errors.AsType[*digest.MismatchError](err); ok {
				info.Metadata = map[string]string{"want": valid(string(e.Want)), "got": valid(string(e.Got))}
			}
		case reasonCorrupt:
			if e, ok := errors.AsType[*digest.CorruptError](err); ok {
				info.Metadata = map[string]string{
					"digest": valid(string(e.Digest)),
					"piece":  strconv.Itoa(e.Piece),
					"reason": valid(e.Reason),
				}
			}
		case reasonMissingRef:
			if e, ok := errors.AsType[*p2p.MissingRefError](err); ok {
				info.Metadata = map[string]string{
					"manifest": valid(string(e.Manifest)), "missing": valid(string(e.Missing))}
			}
		}
		if len(details) == 0 {
			code = k.code
		}
		details = append(details, info)
	}
	if len(details) == 0 {
		details = append(details, &errdetails.ErrorInfo{Reason: reasonInternal, Domain: errorDomain})
	}
	st := status.New(code, valid(err.Error()))
	if detailed, detailErr := st.WithDetails(details...); detailErr == nil {
		st = detailed
	}
	return st.Err()
}

// remoteError is an error of the daemon: its message, and what it is.
type remoteError struct {
	message string
	is      []error
}

func (e *remoteError) Error() string   { return e.message }
func (e *remoteError) Unwrap() []error { return e.is }

// fromStatus rebuilds the error that [toStatus] made st of, or returns nil
// where st is gRPC's own.
func fromStatus(st *status.Status) error {
	ours := false
	e := &remoteError{message: st.Message()}
	for _, detail := range st.Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != errorDomain {
			continue
		}
		ours = true
		for _, k := range kinds {
			if k.reason != info.GetReason() {
				continue
			}
			e.is = append(e.is, withData(k.err, k.reason, info.GetMetadata()))
		}
	}
	if !ours {
		return nil
	}
	return e
}

// withData returns an error of a kind, with what the daemon has told of it.
func withData(kind error, reason string, data map[string]string) error {
	if len(data) == 0 {
		return kind
	}
	switch reason {
	case reasonMismatch:
		return &digest.MismatchError{Want: digest.Digest(data["want"]), Got: digest.Digest(data["got"])}
	case reasonCorrupt:
		piece, err := strconv.Atoi(data["piece"])
		if err != nil {
			piece = -1
		}
		return &digest.CorruptError{Digest: digest.Digest(data["digest"]), Piece: piece, Reason: data["reason"]}
	case reasonMissingRef:
		return &p2p.MissingRefError{Manifest: digest.Digest(data["manifest"]), Missing: digest.Digest(data["missing"])}
	}
	return kind
}

// callError turns the error of a call into what the engine interface promises.
// ctx is the caller's own.
func (c *Client) callError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	if remote := fromStatus(st); remote != nil {
		return remote
	}
	if c.isClosed() {
		return c.closedError()
	}
	switch st.Code() {
	case codes.Unavailable, codes.Canceled:
		// Canceled, with a context that has not ended: the connection was closed.
		return c.lostError(errors.New(st.Message()))
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	case codes.Unimplemented:
		return c.unknownCall()
	}
	return fmt.Errorf("dfdaemon at %s: %s", c.socket, st.Message())
}

// unknownCall says that the daemon is of another release.
func (c *Client) unknownCall() error {
	return fmt.Errorf("dfdaemon at %s does not know this call: install the same version of dfcache and dfdaemon: %w",
		c.socket, errors.ErrUnsupported)
}

// lostError says that the daemon went away in the middle.
func (c *Client) lostError(cause error) error {
	return fmt.Errorf("dfdaemon at %s went away: %w: %w: see its log, and start it again", c.socket, p2p.ErrUnavailable,
		cause)
}

func (c *Client) closedError() error {
	return fmt.Errorf("client of dfdaemon at %s: %w", c.socket, p2p.ErrClosed)
}
