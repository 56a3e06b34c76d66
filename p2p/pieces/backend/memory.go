package backend

import (
	"crypto/rand"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
)

// Memory is a backend whose files are in memory, and gone with the process. Each takes a descriptor,
// until it is removed or nothing refers to the Memory any more. It is for tests, and the example of
// what a backend has to do.
type Memory struct {
	mu       sync.Mutex
	incoming map[string]*os.File
	claims   map[string]digest.Digest
	blobs    map[digest.Digest]*os.File
	partials map[digest.Digest]*memoryPartial
}

type memoryPartial struct {
	f     *os.File
	notes map[Note][]byte
}

var _ Backend = (*Memory)(nil)

// NewMemory returns a backend that has nothing.
func NewMemory() *Memory {
	return &Memory{
		incoming: map[string]*os.File{}, claims: map[string]digest.Digest{},
		blobs: map[digest.Digest]*os.File{}, partials: map[digest.Digest]*memoryPartial{},
	}
}

// newFile makes a file, and opens it a second time for the caller, who closes that.
func newFile() (mine, theirs *os.File, err error) {
	fd, err := unix.MemfdCreate("dfcache", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	mine = os.NewFile(uintptr(fd), "memory")
	if theirs, err = again(mine, os.O_RDWR); err != nil {
		mine.Close()
	}
	return mine, theirs, err
}

// again opens a file once more, with an offset of its own.
func again(f *os.File, flag int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flag, 0)
}

// take removes what m has of k, and fails where that is nothing.
func take[K comparable, V any](m map[K]V, k K) (v V, err error) {
	v, found := m[k]
	if !found {
		return v, &fs.PathError{Op: "find", Path: fmt.Sprint(k), Err: fs.ErrNotExist}
	}
	delete(m, k)
	return v, nil
}

// Prepare implements [Backend].
func (b *Memory) Prepare(bool) error { return nil }

// Free implements [Backend]: it is not known.
func (b *Memory) Free() (n int64, known bool) { return 0, false }

// Scratch implements [Backend].
func (b *Memory) Scratch() string { return os.TempDir() }

// Create implements [Incoming].
func (b *Memory) Create() (name string, f *os.File, err error) {
	mine, f, err := newFile()
	if err != nil {
		return "", nil, err
	}
	return b.receive(mine), f, nil
}

// receive makes a file incoming content.
func (b *Memory) receive(f *os.File) (name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	name = rand.Text()
	b.incoming[name] = f
	return name
}

// Sync implements [Incoming].
func (b *Memory) Sync(*os.File) error { return nil }

// Put implements [Incoming]. Nobody can write to the file any more.
func (b *Memory) Put(name string, d digest.Digest) (claim string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f, err := take(b.incoming, name)
	if err != nil {
		return "", err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS,
		unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		b.incoming[name] = f
		return "", os.NewSyscallError("fcntl", err)
	}
	if before := b.blobs[d]; before != nil {
		before.Close()
	}
	b.blobs[d], b.claims[name] = f, d
	return name, nil
}

// Discard implements [Incoming].
func (b *Memory) Discard(name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, err := take(b.claims, name); err == nil {
		return nil
	}
	f, err := take(b.incoming, name)
	if err != nil {
		return err
	}
	return f.Close()
}

// Claims implements [Incoming].
func (b *Memory) Claims() ([]digest.Digest, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Values(b.claims)), nil
}

// Clean implements [Incoming].
func (b *Memory) Clean() (n int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.incoming {
		f.Close()
	}
	n = len(b.incoming) + len(b.claims)
	clear(b.incoming)
	clear(b.claims)
	return n, nil
}

// Open implements [Blobs].
func (b *Memory) Open(d digest.Digest) (*os.File, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.blobs[d]
	if f == nil {
		return nil, fs.ErrNotExist
	}
	return again(f, os.O_RDONLY)
}

// Stat implements [Blobs].
func (b *Memory) Stat(d digest.Digest) (fs.FileInfo, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.blobs[d]
	if f == nil {
		return nil, fs.ErrNotExist
	}
	return f.Stat()
}

// Take implements [Blobs].
func (b *Memory) Take(d digest.Digest) (name string, err error) {
	b.mu.Lock()
	f, err := take(b.blobs, d)
	b.mu.Unlock()
	if err != nil {
		return "", err
	}
	return b.receive(f), nil
}

// Flush implements [Blobs].
func (b *Memory) Flush(digest.Algorithm) error { return nil }

// Blobs implements [Blobs].
func (b *Memory) Blobs() iter.Seq2[Entry, error] {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := slices.Collect(maps.Keys(b.blobs))
	return func(yield func(Entry, error) bool) {
		for _, d := range all {
			if !yield(Entry{d, b.Path(d)}, nil) {
				return
			}
		}
	}
}

// Path implements [Blobs].
func (b *Memory) Path(d digest.Digest) string { return "memory/" + string(d) }

// OpenPartial implements [Partials].
func (b *Memory) OpenPartial(d digest.Digest) (*os.File, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.partials[d]; p != nil {
		return again(p.f, os.O_RDWR)
	}
	mine, f, err := newFile()
	if err == nil {
		b.partials[d] = &memoryPartial{mine, map[Note][]byte{}}
	}
	return f, err
}

// StatPartial implements [Partials].
func (b *Memory) StatPartial(d digest.Digest) (Partial, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.partials[d]
	if p == nil {
		return Partial{}, fs.ErrNotExist
	}
	info, err := p.f.Stat()
	if err != nil {
		return Partial{}, err
	}
	return partialOf(d, info), nil
}

// Note implements [Partials].
func (b *Memory) Note(d digest.Digest, n Note) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.partials[d]; p != nil && p.notes[n] != nil {
		return p.notes[n], nil
	}
	return nil, fs.ErrNotExist
}

// SetNote implements [Partials].
func (b *Memory) SetNote(d digest.Digest, n Note, content []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.partials[d]
	if p == nil {
		return fs.ErrNotExist
	}
	p.notes[n] = content
	return nil
}

// TakePartial implements [Partials].
func (b *Memory) TakePartial(d digest.Digest) (name string, err error) {
	b.mu.Lock()
	p, err := take(b.partials, d)
	b.mu.Unlock()
	if err != nil {
		return "", err
	}
	return b.receive(p.f), nil
}

// RemovePartial implements [Partials].
func (b *Memory) RemovePartial(d digest.Digest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, err := take(b.partials, d)
	if err != nil {
		return err
	}
	return p.f.Close()
}

// Partials implements [Partials].
func (b *Memory) Partials() (all []Partial, err error) {
	b.mu.Lock()
	keys := slices.Collect(maps.Keys(b.partials))
	b.mu.Unlock()
	for _, d := range keys {
		p, err := b.StatPartial(d)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}
