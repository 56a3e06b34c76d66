package rpc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
	"github.com/dfcache/dfcache/p2p/source"
)

// progressInterval is the least time between two messages of progress.
const progressInterval = 100 * time.Millisecond

// Ingest takes in content.
func (s *service) Ingest(stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply]) (err error) {
	ctx := stream.Context()
	var said notices
	ingest, err := s.engine.Ingest(p2p.WithNotice(ctx, said.add))
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := ingest.Close(); closeErr != nil {
			s.log.WarnContext(ctx, "an ingest could not be cleaned up", "error", closeErr)
		}
	}()
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil // the client gave up
		}
		if err != nil {
			return err
		}
		switch r := req.GetRequest().(type) {
		case *pb.IngestRequest_Add_:
			if err := s.add(stream, ingest, r.Add); err != nil {
				return err
			}
		case *pb.IngestRequest_Rehash_:
			if err := s.rehash(stream, ingest, r.Rehash); err != nil {
				return err
			}
		case *pb.IngestRequest_Commit_:
			return s.commit(stream, ingest, r.Commit, &said)
		default:
			return fmt.Errorf("ingest: %w: neither an add nor a rehash nor a commit: the client is newer than the "+
				"daemon", digest.ErrInvalid)
		}
	}
}

// add answers one Add of an ingest.
func (s *service) add(
	stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, req *pb.IngestRequest_Add,
) error {
	ctx := stream.Context()
	opts, err := parseAdd(req)
	if err != nil {
		return err
	}
	fd, err := authOf(ctx).channel.take(ctx, req.GetDescriptorId())
	if err != nil {
		return fmt.Errorf("the file to add: %w", err)
	}
	src, err := openSource(fd, req.GetOffset())
	if err != nil {
		return err
	}
	defer src.Close()
	last := time.Now()
	opts.Progress = func(taken int64) {
		if now := time.Now(); now.Sub(last) >= progressInterval {
			last = now
			// Where the stream is over, so is ctx, and with it the ingest.
			_ = stream.Send(&pb.IngestReply{
				Reply: &pb.IngestReply_Progress_{Progress: &pb.IngestReply_Progress{Bytes: taken}}})
		}
	}
	added, err := ingest.Add(src, opts)
	if err != nil {
		return err
	}
	return stream.Send(addedMessage(added))
}

// rehash answers one Rehash of an ingest.
func (s *service) rehash(
	stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, req *pb.IngestRequest_Rehash,
) error {
	d, want, err := parseRehash(req)
	if err != nil {
		return err
	}
	added, err := ingest.Rehash(d, want)
	if err != nil {
		return err
	}
	return stream.Send(addedMessage(added))
}

// openSource makes a file of a descriptor that a client sent, which it takes
// over. It is what the client has open, so that its own rights decided what it
// can be; here it has to be something that ends, and that the engine can
// interrupt, by its SetReadDeadline: a pipe that nobody writes to. A regular file
// has no deadline, and needs none.
//
// A regular file whose content may depend on who reads it is refused: here it would be read
// with the daemon's rights. A client reads it itself.
//
// A regular file shares its offset with the client. It is set here because the
// engine reads from where the file stands; the client waits meanwhile.
func openSource(fd int, offset int64) (f *os.File, err error) {
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	refuse := func(what string) (*os.File, error) {
		return nil, fmt.Errorf("what is to be added: %w: %s", digest.ErrInvalid, what)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("what is to be added: %w", err)
	}
	if flags&unix.O_PATH != 0 || flags&unix.O_ACCMODE == unix.O_WRONLY {
		return refuse("it is not open for reading")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("what is to be added: %w", err)
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		switch plain, err := source.IsPlain(fd); {
		case err != nil:
			return nil, fmt.Errorf("what is to be added: %w", err)
		case !plain:
			return refuse("its file system may show it otherwise to the daemon than to its reader, as /proc does: " +
				"send what it has through a pipe")
		}
		if _, err := unix.Seek(fd, offset, io.SeekStart); err != nil {
			return nil, fmt.Errorf("what is to be added: seek to %d: %w", offset, err)
		}
	case unix.S_IFIFO:
		if offset != 0 {
			return refuse("a pipe has no offset")
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("what is to be added: %w", err)
		}
	case unix.S_IFDIR:
		return refuse("it is a directory, not a file or a pipe")
	case unix.S_IFSOCK:
		return refuse("it is a socket, not a file or a pipe")
	default:
		return refuse("it is a device, not a file or a pipe")
	}
	return os.NewFile(uintptr(fd), "client's file"), nil
}

// commit answers the Commit of an ingest, of which part is the first part.
func (s *service) commit(
	stream grpc.BidiStreamingServer[pb.IngestRequest, pb.IngestReply], ingest p2p.Ingest, part *pb.IngestRequest_Commit,
	said *notices,
) error {
	parser := commitParser{room: s.commits}
	defer parser.end()
	for {
		if err := parser.add(part); err != nil {
			return err
		}
		if !part.GetMore() {
			break
		}
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if part = req.GetCommit(); part == nil {
			return fmt.Errorf("ingest: %w: a commit that has more to come is followed by something else",
				digest.ErrInvalid)
		}
	}
	if err := ingest.Commit(parser.commit); err != nil {
		return err
	}
	ctx := stream.Context()
	s.log.InfoContext(ctx, "committed", "uid", authOf(ctx).caller.uid, "tasks", len(parser.commit.Tasks),
		"names", len(parser.commit.Names))
	return stream.Send(&pb.IngestReply{
		Reply: &pb.IngestReply_Committed_{Committed: &pb.IngestReply_Committed{Notices: said.all()}}})
}

// maxNotices is how many notices one answer has at most.
const maxNotices = 16

// notices are what an engine has told of a call.
type notices struct {
	mu    sync.Mutex
	texts []string
}

func (n *notices) add(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.texts) < maxNotices {
		n.texts = append(n.texts, valid(text))
	}
}

func (n *notices) all() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.texts
}
