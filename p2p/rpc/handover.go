package rpc

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

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
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("seal the copy in memory: %w", err)
	}
	// Who gets the descriptor may only read.
	if c.file, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
		return nil, fmt.Errorf("copy in memory: %w", err)
	}
	return c, nil
}
