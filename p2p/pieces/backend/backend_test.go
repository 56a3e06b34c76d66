package backend_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// TestBackend: what a store relies on, whatever the bytes lie in.
func TestBackend(t *testing.T) {
	for name, open := range map[string]func() backend.Backend{
		"Dir": func() backend.Backend {
			return backend.NewDir(t.TempDir(), backend.Disk{}, slog.New(slog.DiscardHandler))
		},
		"Memory": func() backend.Backend { return backend.NewMemory() },
	} {
		t.Run(name, func(t *testing.T) {
			b := open()
			if err := b.Prepare(false); err != nil {
				t.Fatal(err)
			}
			testBackend(t, b)
		})
	}
	if err := backend.NewDir(t.TempDir(), backend.Disk{}, nil).Prepare(true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory without a store: %v", err)
	}
}

func testBackend(t *testing.T, b backend.Backend) {
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	incoming := func(content string) (name string) {
		t.Helper()
		name, f, err := b.Create()
		do(err)
		_, err = f.WriteString(content)
		do(errors.Join(err, b.Sync(f), f.Close()))
		return name
	}
	put := func(d digest.Digest, content string) (claim string) {
		t.Helper()
		claim, err := b.Put(incoming(content), d)
		do(errors.Join(err, b.Flush(d.Algorithm())))
		return claim
	}
	wantClaims := func(n int) {
		t.Helper()
		if claims, err := b.Claims(); err != nil || len(claims) != n {
			t.Errorf("claims: %v, %v; want %d", claims, err, n)
		}
	}
	read := func(f *os.File) string {
		t.Helper()
		content, err := io.ReadAll(f)
		do(err)
		return string(content)
	}
	one, two := digest.SHA256.FromString("one"), digest.SHA512.FromString("two")

	// There is nothing, until it is put there, and again when it is taken.
	if _, err := b.Open(one); !backend.IsMissing(err) {
		t.Errorf("opened, of nothing: %v", err)
	}
	if _, err := b.Stat(one); !backend.IsMissing(err) {
		t.Errorf("described, of nothing: %v", err)
	}
	if _, err := b.Take(one); !backend.IsMissing(err) {
		t.Errorf("taken, of nothing: %v", err)
	}
	claim := put(one, "one")
	put(two, "two")
	wantClaims(2)
	do(b.Discard(claim))
	wantClaims(1)
	f, err := b.Open(one)
	do(err)
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a blob can be written to")
	}
	info, err := b.Stat(one)
	do(err)
	if mine, err := f.Stat(); err != nil || !os.SameFile(mine, info) || info.Size() != 3 || !info.Mode().IsRegular() {
		t.Errorf("what is there is %+v, what is open %+v, %v", info, mine, err)
	}
	// Another file of the same blob is another file.
	do(b.Discard(put(one, "two")))
	if again, err := b.Stat(one); err != nil || os.SameFile(info, again) {
		t.Errorf("after another Put it is the same file: %v", err)
	}
	if content := read(f); content != "one" {
		t.Errorf("what was open is %q now", content)
	}
	found := map[digest.Digest]bool{}
	for e, err := range b.Blobs() {
		do(err)
		found[e.Digest] = true
		if e.Path != b.Path(e.Digest) {
			t.Errorf("%s is at %s, and at %s", e.Digest, e.Path, b.Path(e.Digest))
		}
	}
	if len(found) != 2 || !found[one] || !found[two] {
		t.Errorf("there are %v", found)
	}
	name, err := b.Take(one)
	do(err)
	if _, err := b.Open(one); !backend.IsMissing(err) {
		t.Errorf("opened, when it was taken: %v", err)
	}
	do(b.Discard(name))

	// What is left of an earlier run goes.
	incoming("three")
	if n, err := b.Clean(); err != nil || n != 2 { // and a claim
		t.Errorf("cleaned %d, %v", n, err)
	}
	wantClaims(0)

	// A blob that arrives in parts.
	if _, err := b.StatPartial(one); !backend.IsMissing(err) {
		t.Errorf("described, of nothing: %v", err)
	}
	p, err := b.OpenPartial(one)
	do(err)
	_, err = p.WriteAt([]byte("e"), 1<<20)
	do(errors.Join(err, p.Close(), b.SetNote(one, backend.NoteTags, []byte("[]")),
		b.SetNote(one, backend.NoteTags, []byte(`["t"]`))))
	if note, err := b.Note(one, backend.NoteTags); err != nil || !bytes.Equal(note, []byte(`["t"]`)) {
		t.Errorf("noted is %q, %v", note, err)
	}
	if _, err := b.Note(one, backend.NoteTable); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was not noted: %v", err)
	}
	all, err := b.Partials()
	if err != nil || len(all) != 1 || all[0].Digest != one || all[0].Bytes == 0 || all[0].Bytes > 1<<20 ||
		all[0].Changed.IsZero() {
		t.Errorf("partial blobs: %+v, %v", all, err)
	}
	p, err = b.OpenPartial(one)
	do(err)
	defer p.Close()
	if content := read(p); len(content) != 1<<20+1 {
		t.Errorf("of a partial blob there are %d bytes", len(content))
	}
	name, err = b.TakePartial(one)
	do(err)
	if _, err := b.Note(one, backend.NoteTags); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a note outlives its partial blob: %v", err)
	}
	_, err = b.Put(name, one)
	do(err)
	p, err = b.OpenPartial(two)
	do(err)
	do(errors.Join(p.Close(), b.SetNote(two, backend.NoteTable, nil), b.RemovePartial(two)))
	if all, err := b.Partials(); err != nil || len(all) != 0 {
		t.Errorf("partial blobs: %+v, %v", all, err)
	}
	if err := b.RemovePartial(two); !backend.IsMissing(err) {
		t.Errorf("removed, of nothing: %v", err)
	}
}
