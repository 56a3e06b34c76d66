package dragonflyapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
)

// Server serves a store to Dragonfly's dfcache. It is safe for concurrent use.
type Server struct {
	grpc *grpc.Server
}

// maxConns is how many connections callers may have at once; the oldest goes when there are more.
const maxConns = 256

// NewServer returns a server of store. The caller closes the store after Shutdown.
func NewServer(store *blobstore.Store, log *slog.Logger) *Server {
	s := &Server{wire.NewServer(grpc.Creds(localCredentials{}), grpc.UnaryInterceptor(admit),
		grpc.StreamInterceptor(admitStream))}
	dfdaemonv1.RegisterDaemonServer(s.grpc, &daemon{store: store, log: log})
	return s
}

// Serve answers those who connect to l, a unix socket, until Shutdown; then it
// returns nil. It closes l.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(connpool.Listen(l, max(connpool.Share(maxConns, 16), 8))); !errors.Is(err,
		grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Shutdown lets calls that run end, takes no others, and returns when they have.
// When ctx ends before, they are cut off, and its cause is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		s.grpc.Stop()
		<-ended
		return context.Cause(ctx)
	}
}

// daemon implements Dragonfly's service.
type daemon struct {
	dfdaemonv1.UnimplementedDaemonServer
	store *blobstore.Store
	log   *slog.Logger
}

// request is what all calls about a task have.
type request interface {
	GetUrl() string
	GetUrlMeta() *commonv1.UrlMeta
}

// open returns the repository and the cid of a request.
func (d *daemon) open(req request) (r *blobstore.Repository, cid string, err error) {
	text, err := parseURL(req.GetUrl())
	if err != nil {
		return nil, "", err
	}
	if cid, err = given.CID(text); err != nil {
		return nil, "", err
	}
	meta := req.GetUrlMeta()
	if meta.GetRange() != "" {
		return nil, "", fmt.Errorf("range %q: %w: only whole files are cached", meta.GetRange(), blobstore.ErrInvalid)
	}
	tag, err := given.Tag(meta.GetTag())
	if err != nil {
		return nil, "", err
	}
	r, err = d.store.Repository(tag)
	return r, cid, err
}

// parseURL returns what was given for a cid, of which a client has made a URL.
func parseURL(raw string) (string, error) {
	escaped, ok := strings.CutPrefix(raw, wire.Scheme)
	if !ok {
		return "", fmt.Errorf("URL %q: %w: want %s and a cid: other files are not cached here", raw,
			blobstore.ErrInvalid, wire.Scheme)
	}
	cid, err := url.QueryUnescape(escaped)
	if err == nil && cid == "" {
		err = errors.New("there is no cid in it")
	}
	if err != nil {
		return "", fmt.Errorf("URL %q: %w: %w", raw, blobstore.ErrInvalid, err)
	}
	return cid, nil
}

// CheckHealth says that the daemon is there.
func (d *daemon) CheckHealth(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// StatTask says whether a file is there: all of it, where only this host counts.
func (d *daemon) StatTask(ctx context.Context, req *dfdaemonv1.StatTaskRequest) (*emptypb.Empty, error) {
	return d.answer(ctx, "stat", req, func(ctx context.Context, r *blobstore.Repository, cid string) error {
		f, err := r.Stat(ctx, cid, blobstore.Lookup{Local: req.GetLocalOnly()})
		if err == nil && req.GetLocalOnly() && !f.Local {
			err = fmt.Errorf("%s: %w: %d of %d pieces are here", cid, blobstore.ErrNotFound, f.Held, f.Pieces)
		}
		return err
	})
}

// ImportTask imports the file at a path.
func (d *daemon) ImportTask(ctx context.Context, req *dfdaemonv1.ImportTaskRequest) (*emptypb.Empty, error) {
	return d.answer(ctx, "import", req, func(ctx context.Context, r *blobstore.Repository, cid string) error {
		f, err := openFile(req.GetPath())
		if err != nil {
			return err
		}
		defer f.Close()
		opts := blobstore.ImportOptions{Title: filepath.Base(req.GetPath())}
		if given.IsHashed(cid) {
			text, err := parseURL(req.GetUrl())
			if err != nil {
				return err
			}
			opts.Annotations = map[string]string{given.Annotation: strings.ToValidUTF8(text, "\uFFFD")}
		}
		ctx = p2p.WithNotice(ctx, func(text string) {
			d.log.Warn("an import by Dragonfly's dfcache", "url", req.GetUrl(), "tag", req.GetUrlMeta().GetTag(),
				"notice", text)
		})
		_, err = r.Import(ctx, cid, f, opts)
		return err
	})
}

// openFile opens a regular file. It does not wait for the other end of a pipe.
func openFile(path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("path %q: %w: it is not absolute", path, blobstore.ErrInvalid)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return nil, fmt.Errorf("%w: %w: try again", blobstore.ErrBusy, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blobstore.ErrInvalid, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("path %q: %w: it is not a regular file", path, blobstore.ErrInvalid)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ExportTask writes a file to a path where there is none yet: a fresh one, that is
// not shared with the store.
func (d *daemon) ExportTask(ctx context.Context, req *dfdaemonv1.ExportTaskRequest) (*emptypb.Empty, error) {
	return d.answer(ctx, "export", req, func(ctx context.Context, r *blobstore.Repository, cid string) error {
		output := req.GetOutput()
		if !filepath.IsAbs(output) {
			return fmt.Errorf("output %q: %w: it is not absolute", output, blobstore.ErrInvalid)
		}
		if _, err := os.Lstat(output); err == nil {
			return fmt.Errorf("output %s: %w: remove it, or choose another one", output, fs.ErrExist)
		}
		if timeout := time.Duration(req.GetTimeout()); timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		_, err := r.ExportFile(ctx, cid, output, blobstore.ExportOptions{
			Lookup:   blobstore.Lookup{Local: req.GetLocalOnly()},
			Progress: slowed(ctx, req.GetLimit()),
		})
		if err != nil || os.Geteuid() != 0 || req.GetUid() == 0 && req.GetGid() == 0 {
			return err
		}
		return chown(output, int(req.GetUid()), int(req.GetGid()))
	})
}

// slowed returns what keeps a copy at so many bytes in a second; nil for no limit.
func slowed(ctx context.Context, perSecond float64) func(written int64) {
	if !(perSecond > 0) {
		return nil
	}
	limit := rate.NewLimiter(rate.Limit(perSecond), max(1, int(min(perSecond, 1<<20))))
	var before int64
	return func(written int64) {
		for n := int(written - before); n > 0; {
			part := min(n, limit.Burst())
			if limit.WaitN(ctx, part) != nil { // it would take longer than ctx lasts
				<-ctx.Done()
				return
			}
			n -= part
		}
		before = written
	}
}

// chown gives what was exported to whom it is for.
func chown(output string, uid, gid int) error {
	return filepath.WalkDir(output, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
}

// DeleteTask deletes a file, here and on the peers. As with Dragonfly, what is not there is no error,
// and nor is a digest that a cache ID has led to since: it goes with that.
func (d *daemon) DeleteTask(ctx context.Context, req *dfdaemonv1.DeleteTaskRequest) (*emptypb.Empty, error) {
	return d.answer(ctx, "delete", req, func(ctx context.Context, r *blobstore.Repository, cid string) error {
		_, err := r.Remove(ctx, cid, blobstore.DeleteOptions{Unpin: true})
		if errors.Is(err, blobstore.ErrNotFound) {
			err = nil
		}
		return err
	})
}

// answer has do done, and makes of its error one that Dragonfly's clients read.
func (d *daemon) answer(
	ctx context.Context, what string, req request,
	do func(ctx context.Context, r *blobstore.Repository, cid string) error,
) (*emptypb.Empty, error) {
	r, cid, err := d.open(req)
	if err == nil {
		err = do(ctx, r, cid)
	}
	if err != nil {
		text := asGiven(req, cid, err.Error())
		d.log.Warn("Dragonfly's dfcache got an error", "call", what, "url", req.GetUrl(),
			"tag", req.GetUrlMeta().GetTag(), "error", text)
		return nil, dfError(err, text)
	}
	return &emptypb.Empty{}, nil
}

// asGiven puts into a message what a client has given for cid and tag, in place of what that is in the store.
func asGiven(req request, cid, message string) string {
	if text, err := parseURL(req.GetUrl()); err == nil && cid != "" && text != cid {
		message = strings.ReplaceAll(message, cid, strconv.Quote(text))
	}
	tag := req.GetUrlMeta().GetTag()
	if mapped, err := given.Tag(tag); err == nil && mapped != tag {
		message = strings.ReplaceAll(message, mapped, strconv.Quote(tag))
	}
	return message
}

// dfError is an error as Dragonfly's servers send it, with the message text.
func dfError(err error, text string) error {
	code := commonv1.Code_UnknownError
	switch {
	case errors.Is(err, blobstore.ErrNotFound):
		code = commonv1.Code_PeerTaskNotFound
	case errors.Is(err, blobstore.ErrInvalid), errors.Is(err, blobstore.ErrMismatch), errors.Is(err, fs.ErrExist),
		errors.Is(err, p2p.ErrReferenced):
		code = commonv1.Code_BadRequest
	case errors.Is(err, context.DeadlineExceeded):
		code = commonv1.Code_RequestTimeOut
	}
	return wire.Error(code, "%s", text)
}
