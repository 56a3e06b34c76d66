// Package source knows what can be different about a file that is added from one moment, or one
// reader, to the next.
//
// It promises no compatibility.
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// plain are the file systems on which a regular file has the same content for all who
// read it through one descriptor, whoever they are. Others need not: procfs and sysfs hide from users what they show to
// root, which is decided when it is read, and what FUSE has behind it is told which user reads. A kind that is not
// known is taken for one of these.
var plain = map[uint32]bool{
	unix.BCACHEFS_SUPER_MAGIC:  true,
	unix.BTRFS_SUPER_MAGIC:     true,
	unix.CEPH_SUPER_MAGIC:      true,
	unix.CIFS_SUPER_MAGIC:      true,
	unix.CRAMFS_MAGIC:          true,
	unix.EROFS_SUPER_MAGIC_V1:  true,
	unix.EXFAT_SUPER_MAGIC:     true,
	unix.EXT4_SUPER_MAGIC:      true, // ext2 and ext3, too
	unix.F2FS_SUPER_MAGIC:      true,
	unix.HUGETLBFS_MAGIC:       true,
	unix.ISOFS_SUPER_MAGIC:     true,
	unix.MSDOS_SUPER_MAGIC:     true,
	unix.NFS_SUPER_MAGIC:       true,
	unix.NILFS_SUPER_MAGIC:     true,
	unix.OCFS2_SUPER_MAGIC:     true,
	unix.OVERLAYFS_SUPER_MAGIC: true,
	unix.RAMFS_MAGIC:           true,
	unix.SMB2_SUPER_MAGIC:      true,
	unix.SQUASHFS_MAGIC:        true,
	unix.TMPFS_MAGIC:           true,
	unix.UDF_SUPER_MAGIC:       true,
	unix.V9FS_MAGIC:            true,
	unix.XFS_SUPER_MAGIC:       true,
	0x2fc12fc1:                 true, // ZFS
	0x3153464a:                 true, // JFS
}

// IsPlain reports whether the content of a descriptor does not depend on who reads it.
func IsPlain(fd int) (bool, error) {
	var fs unix.Statfs_t
	for {
		err := unix.Fstatfs(fd, &fs)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && plain[uint32(fs.Type)], os.NewSyscallError("fstatfs", err)
	}
}

// File is a regular file that is added, as it was before it was read.
type File struct {
	*os.File
	Start  int64 // the offset from which on it is added
	before unix.Stat_t
}

// New looks at src before it is read. It returns nil where that is no regular file.
func New(src io.Reader) (*File, error) {
	f, ok := src.(*os.File)
	if !ok {
		return nil, nil
	}
	s := &File{File: f}
	if err := s.stat(&s.before); err != nil {
		return nil, err
	}
	if s.before.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil
	}
	var err error
	s.Start, err = f.Seek(0, io.SeekCurrent)
	return s, err
}

// stat looks at the file, not at a path.
func (s *File) stat(to *unix.Stat_t) error {
	raw, err := s.File.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), to) })
	return os.NewSyscallError("fstat", errors.Join(controlErr, err))
}

// Unchanged fails with [p2p.ErrChanged] where the file has changed since [New], so that
// the size bytes with the digest d that were read of it may be what it never was. A nil File has
// no such thing.
//
// A change of the times alone may be one of the name or the mode, or have come when all was read: the
// content is then what was read, if it still is. What was only appended to is said to be so.
func (s *File) Unchanged(ctx context.Context, d digest.Digest, size int64) error {
	if s == nil {
		return nil
	}
	var now unix.Stat_t
	if err := s.stat(&now); err != nil {
		return err
	}
	if sameContent(s.before, now) {
		return nil
	}
	read, err := hash(ctx, d.Algorithm(), io.NewSectionReader(s.File, s.Start, size))
	if err != nil {
		return err
	}
	same := read == d
	var later unix.Stat_t
	if err := s.stat(&later); err != nil {
		return err
	}
	const advice = "import it when nobody writes to it, or a copy"
	switch {
	case same && s.before.Size == now.Size && sameContent(now, later):
		return nil
	case same && later.Size > s.before.Size:
		return fmt.Errorf("%w: it was only appended to, and has %d bytes where it had %d; nothing was stored: %s, or "+
			"what it has now with 'head -c %d FILE | dfcache import -'", p2p.ErrChanged, later.Size, s.before.Size,
			advice, later.Size)
	case later.Size < s.before.Size:
		return fmt.Errorf("%w: it was cut from %d bytes to %d; nothing was stored: %s", p2p.ErrChanged, s.before.Size,
			later.Size, advice)
	}
	return fmt.Errorf("%w: it was written to; nothing was stored: %s", p2p.ErrChanged, advice)
}

// sameContent reports whether nothing says that a file was written to between two looks.
func sameContent(a, b unix.Stat_t) bool {
	return a.Size == b.Size && a.Mtim == b.Mtim && a.Ctim == b.Ctim
}

// hash returns the digest of what r has.
func hash(ctx context.Context, alg digest.Algorithm, r io.Reader) (digest.Digest, error) {
	recorder := digest.NewRecorder(alg)
	buf := make([]byte, 256<<10)
	for {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		n, err := r.Read(buf)
		if _, err := recorder.Write(buf[:n]); err != nil {
			return "", err
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
	}
	t, err := recorder.Table()
	if err != nil {
		return "", err
	}
	return t.Digest, nil
}
