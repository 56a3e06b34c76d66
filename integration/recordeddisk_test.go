package integration

import (
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// recordedDisk is a disk in memory that notes what is written to it, and when that is flushed. It is a
// file of a FUSE file system, for a loop device.
type recordedDisk struct {
	fs.Inode
	file string // where it is

	before map[int64]*[sector]byte // what is not only zeros, at first

	mu    sync.Mutex
	pages map[int64]*[sector]byte // and now
	log   []diskWrite
}

// sector is what a disk writes all or nothing of.
const sector = 4096

// diskWrite is a write, or, without data, a flush: all writes before it are on the disk for good.
type diskWrite struct {
	at   int64
	data []byte
}

// newRecordedDisk returns a disk that begins as an image. It is there until the test ends.
func newRecordedDisk(t *testing.T, image string) *recordedDisk {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatal("needs FUSE, which a container may lack: ", err)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := &recordedDisk{}
	if r.pages, err = readPages(f); err != nil {
		t.Fatal(err)
	}
	r.before = clonePages(r.pages)
	dir := t.TempDir()
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMount: true, MaxWrite: 1 << 20},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, r, fs.StableAttr{Mode: syscall.S_IFREG}), false)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The kernel lets go of it some while after what was mounted on it has gone.
		within(t, "the disk can be unmounted", func() bool {
			err = server.Unmount()
			if err != nil {
				t.Log("unmount the disk: ", err)
				time.Sleep(100 * time.Millisecond)
			}
			return err == nil
		})
	})
	r.file = filepath.Join(dir, "disk")
	return r
}

// readPages reads what is not only zeros of an image.
func readPages(f *os.File) (map[int64]*[sector]byte, error) {
	pages := map[int64]*[sector]byte{}
	for at := int64(0); ; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		if err != nil {
			return pages, nil // no more
		}
		end, err := f.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		for at = data / sector * sector; at < end; at += sector {
			page := new([sector]byte)
			if _, err := f.ReadAt(page[:], at); err != nil && err != io.EOF {
				return nil, err
			}
			if *page != [sector]byte{} {
				pages[at] = page
			}
		}
	}
}

func clonePages(pages map[int64]*[sector]byte) map[int64]*[sector]byte {
	clone := make(map[int64]*[sector]byte, len(pages))
	for at, page := range pages {
		p := *page
		clone[at] = &p
	}
	return clone
}

// put writes to pages.
func put(pages map[int64]*[sector]byte, at int64, data []byte) {
	for len(data) > 0 {
		start := at / sector * sector
		page := pages[start]
		if page == nil {
			page = new([sector]byte)
			pages[start] = page
		}
		n := copy(page[at-start:], data)
		at, data = at+int64(n), data[n:]
	}
}

func (r *recordedDisk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, imageSize
	return 0
}

func (r *recordedDisk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (r *recordedDisk) Read(
	_ context.Context, _ fs.FileHandle, dest []byte, off int64,
) (fuse.ReadResult, syscall.Errno) {
	r.mu.Lock()
	defer r.mu.Unlock()
	dest = dest[:max(0, min(int64(len(dest)), imageSize-off))]
	clear(dest)
	for at := off; at < off+int64(len(dest)); {
		start := at / sector * sector
		if page := r.pages[start]; page != nil {
			copy(dest[at-off:], page[at-start:])
		}
		at = start + sector
	}
	return fuse.ReadResultData(dest), 0
}

func (r *recordedDisk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	r.mu.Lock()
	defer r.mu.Unlock()
	data = append([]byte(nil), data...)
	put(r.pages, off, data)
	r.log = append(r.log, diskWrite{off, data})
	return uint32(len(data)), 0
}

func (r *recordedDisk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, diskWrite{})
	return 0
}

// position is how much has happened.
func (r *recordedDisk) position() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.log)
}

// cut writes to image what the disk has when the power is cut at a position: of what was
// not flushed some sectors are there, and others not.
func (r *recordedDisk) cut(image string, position int, random *rand.Rand) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	flushed := position
	for flushed > 0 && r.log[flushed-1].data != nil {
		flushed--
	}
	pages := clonePages(r.before)
	kept := random.IntN(5) // of four: none, some, most, all
	for i, w := range r.log[:position] {
		for at := w.at; at < w.at+int64(len(w.data)); {
			end := min(at/sector*sector+sector, w.at+int64(len(w.data)))
			if i < flushed || random.IntN(4) < kept {
				put(pages, at, w.data[at-w.at:end-w.at])
			}
			at = end
		}
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(imageSize); err != nil {
		return err
	}
	for at, page := range pages {
		if _, err := f.WriteAt(page[:], at); err != nil {
			return err
		}
	}
	return nil
}
