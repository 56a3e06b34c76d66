package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// Open hands a blob over.
func (s *service) Open(stream openServer) error {
	req, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("open: %w: the call ends before it says what", digest.ErrInvalid)
	}
	if err != nil {
		return err
	}
	task, scope, err := parseOpen(req)
	if err != nil {
		return err
	}
	ctx := stream.Context()
	var notices chan string
	if req.GetNotices() {
		ctx, notices = withNotices(ctx)
	}
	blob, err := openNoticing(notices, stream, func() (p2p.Blob, error) { return s.engine.Open(ctx, task, scope) })
	if err != nil {
		return err
	}
	defer blob.Close()
	file, ok := blob.(p2p.FileBlob)
	if !ok {
		memory, err := copyToMemory(ctx, blob, task.Digest)
		if err != nil {
			return fmt.Errorf("open %s: %w", task, err)
		}
		defer memory.file.Close()
		file = memory
	}
	if err := checkReadOnly(file.File()); err != nil {
		return fmt.Errorf("open %s: %w", task, err)
	}
	if err := authOf(ctx).channel.send(ctx, req.GetDescriptorId(), file.File()); err != nil {
		return fmt.Errorf("open %s: %w", task, err)
	}
	if arriving, ok := blob.(p2p.ArrivingBlob); ok {
		return announce(stream, arriving, notices)
	}
	for _, m := range openMessages(file.Table()) {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// openNoticing calls open, and passes notices on meanwhile.
func openNoticing(notices <-chan string, stream openServer, open func() (p2p.Blob, error)) (blob p2p.Blob, err error) {
	if notices == nil {
		return open()
	}
	err = noticing(notices, func() (err error) {
		blob, err = open()
		return err
	}, func(text string) error { return stream.Send(&pb.OpenReply{Notice: text}) })
	return blob, err
}

// checkReadOnly makes sure that a client can't write to a blob through its file.
func checkReadOnly(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var flags int
	if controlErr := raw.Control(func(fd uintptr) {
		flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0)
	}); controlErr != nil {
		return controlErr
	}
	if err != nil {
		return err
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		return errors.New("the blob's file is open for writing: it can't be handed over")
	}
	return nil
}

// copied is a blob of an engine that has no files, with one.
type copied struct {
	p2p.Blob
	file  *os.File
	table *digest.Table
}

var _ p2p.FileBlob = (*copied)(nil)

// File implements [p2p.FileBlob].
func (c *copied) File() *os.File { return c.file }

// Table implements [p2p.FileBlob].
func (c *copied) Table() *digest.Table { return c.table }

// copyToMemory copies a blob to a file without a name, in memory, that nobody can
// write to any more. The caller closes it.
func copyToMemory(ctx context.Context, blob p2p.Blob, d digest.Digest) (_ *copied, err error) {
	fd, err := unix.MemfdCreate("dfcache", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("copy to memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "copy in memory")
	defer f.Close()
	recorder := digest.NewRecorder(d.Algorithm())
	if err := blob.CopyRange(ctx, io.MultiWriter(f, recorder), 0, blob.Size(), nil); err != nil {
		return nil, err
	}
	c := &copied{Blob: blob}
	if c.table, err = recorder.Table(); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS,
		unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("seal the copy in memory: %w", err)
	}
	// The process that gets the descriptor may only read.
	if c.file, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
		return nil, fmt.Errorf("copy in memory: %w", err)
	}
	return c, nil
}
