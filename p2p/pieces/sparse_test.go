package pieces

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

// allocated returns how many bytes a file has on its disk.
func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// sparseFile makes a file of size bytes that has something at some places.
func sparseFile(t *testing.T, size int64, at ...int64) (*os.File, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range at {
		if _, err := f.WriteAt([]byte("something"), off); err != nil {
			t.Fatal(err)
		}
	}
	content := make([]byte, size)
	if _, err := f.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return f, content
}

// TestSparse: a file's holes are holes in the store, too, and so are zeros that come by a pipe.
func TestSparse(t *testing.T) {
	s := newStore(t)
	const size = 20<<20 + 5000
	got := make([]byte, size+1)
	for name, at := range map[string][]int64{
		"nothing":              {},
		"a beginning":          {0},
		"an end":               {size - 9},
		"the middle":           {10 << 20},
		"this and that":        {0, 1 << 20, 9<<20 + 5, size - 9},
		"something every page": {0, 4 << 10, 8 << 10, 16 << 10},
	} {
		f, content := sparseFile(t, size, append(at, int64(len(name))<<13)...)
		want := digest.SHA256.FromBytes(content)
		for door, add := range map[string]func(in p2p.Ingest) (p2p.Added, error){
			"a file": func(in p2p.Ingest) (p2p.Added, error) { return in.Add(f, p2p.AddOptions{}) },
			"a pipe": func(in p2p.Ingest) (p2p.Added, error) {
				return in.Add(struct{ io.Reader }{f}, p2p.AddOptions{})
			},
			"a writer": func(in p2p.Ingest) (p2p.Added, error) {
				w, err := in.Create(p2p.AddOptions{})
				if err != nil {
					return p2p.Added{}, err
				}
				if _, err := io.Copy(w, struct{ io.Reader }{f}); err != nil {
					return p2p.Added{}, err
				}
				return w.Finish()
			},
		} {
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			in, err := s.Ingest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			added, err := add(in)
			if err != nil || added.Digest != want || added.Size != size {
				t.Fatalf("%s from %s: %+v, %v", name, door, added, err)
			}
			if off, err := f.Seek(0, io.SeekCurrent); door == "a file" && (off != 0 || err != nil) {
				t.Errorf("%s from %s: the offset is moved to %d, %v", name, door, off, err)
			}
			task := p2p.Task{Tag: "t", Digest: want}
			if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}}); err != nil {
				t.Fatal(err)
			}
			if err := in.Close(); err != nil { // or it holds the blob, which the next door would find
				t.Fatal(err)
			}
			blob, err := s.bytes.Open(want)
			if err != nil {
				t.Fatal(err)
			}
			if n := allocated(t, blob); n > 2<<20 {
				t.Errorf("%s from %s takes %d bytes of the disk", name, door, n)
			}
			if n, err := blob.ReadAt(got, 0); err != io.EOF || !bytes.Equal(got[:n], content) {
				t.Errorf("%s from %s: other content, %v", name, door, err)
			}
			blob.Close()
			if _, err := s.Delete(t.Context(), "t", digest.FromDigest(want), p2p.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestLongPieces: from 128 MiB on pieces are longer, and are read as others are.
func TestLongPieces(t *testing.T) {
	s := newStore(t)
	data := make([]byte, 128<<20+1)
	for _, at := range []int{0, 128<<10 - 5, 100 << 20, len(data) - 9} {
		copy(data[at:], "something")
	}
	task := enginetest.Import(t, s, "t", data)
	info, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
	if err != nil || info.PieceLength != 128<<10 || task.Digest != digest.SHA256.FromBytes(data) {
		t.Errorf("a blob of %d bytes is %+v, %v", len(data), info, err)
	}
	enginetest.RequireContent(t, s, task, data)
}

// TestSparseFrom: a file with holes is added from where it stands.
func TestSparseFrom(t *testing.T) {
	s := newStore(t)
	const size = 3 << 20
	for _, start := range []int64{1, 1 << 20, 2<<20 + 100, size - 1, size, size + 1} {
		f, content := sparseFile(t, size, 2<<20)
		if _, err := f.Seek(start, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		added, err := in.Add(f, p2p.AddOptions{})
		if want := digest.SHA256.FromBytes(content[min(start, size):]); err != nil || added.Digest != want {
			t.Errorf("from %d on: %+v, %v", start, added, err)
		}
		in.Close()
	}
}

// TestPartialZeros: pieces of zeros that come from peers take next to nothing of the disk. They
// can be read before what follows has come, and are there when the store is opened again.
func TestPartialZeros(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	data := make([]byte, 8<<20+100)
	data[5<<20] = 1
	table := tableOf(t, data)
	open := func() *Partial {
		t.Helper()
		p, err := s.Partial(t.Context(), table.Digest)
		if err == nil {
			err = p.Use(t.Context(), table.Size, table.Chain)
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := open()
	last := table.Pieces() - 1
	for i := range last {
		if err := receive(p, table, data, i); err != nil {
			t.Fatal(err)
		}
		start, end := table.Bounds(i)
		piece := make([]byte, end-start)
		if _, err := p.f.ReadAt(piece, start); err != nil || !bytes.Equal(piece, data[start:end]) {
			t.Fatalf("piece %d is not what came: %v", i, err)
		}
	}
	if n := allocated(t, p.f); n > 2<<20 {
		t.Errorf("%d bytes of the disk", n)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir, Options{}); err != nil {
		t.Fatal(err)
	}
	p = open()
	defer p.Close()
	if n := len(held(p)); n != last {
		t.Errorf("%d pieces are there, of %d that have come", n, last)
	}
	if err := receive(p, table, data, last); err != nil || !p.Complete() {
		t.Errorf("the last piece: %v", err)
	}
	if got, err := io.ReadAll(io.NewSectionReader(p.f, 0, 1<<62)); err != nil || !bytes.Equal(got, data) {
		t.Errorf("other content, %v", err)
	}
}

// TestMendSparse: of a blob with holes that is damaged, only what is damaged has to come again.
func TestMendSparse(t *testing.T) {
	s := newStore(t)
	f, content := sparseFile(t, 4<<20, 1<<20, 3<<20)
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	added, err := in.Add(f, p2p.AddOptions{})
	if err == nil {
		err = in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{
			Task: p2p.Task{Tag: "t", Digest: added.Digest}, Keep: p2p.KeepPinned}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.dir, "blobs", "sha256", added.Digest.Encoded())
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	blob, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = blob.WriteAt([]byte("damage"), 1<<20)
		if err == nil {
			_, err = blob.WriteAt([]byte("damage in a hole"), 2<<20)
		}
		blob.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	table := tableOf(t, content)
	p, err := s.Partial(t.Context(), added.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 2 { // the second time with another chain, for all that it knows
		if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
			t.Fatal(err)
		}
		if n := len(held(p)); n != table.Pieces()-2 {
			t.Errorf("%d pieces are there, of %d of which two are damaged", n, table.Pieces())
		}
	}
	for i := range table.Pieces() {
		if err := receive(p, table, content, i); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := io.ReadAll(io.NewSectionReader(p.f, 0, 1<<62)); err != nil || !bytes.Equal(got, content) {
		t.Errorf("what was mended has other content, %v", err)
	}
}
