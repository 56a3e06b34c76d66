package pieces

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// requireClean fails the test unless the closed store in dir has nothing in
// ingest/, and a check of it finds nothing wrong.
func requireClean(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("ingest/ has %s", e.Name())
	}
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// The test's own context has ended where this runs in a cleanup.
	if _, err := s.Check(context.Background(), func(p Problem) { t.Errorf("check: %s", p) }); err != nil {
		t.Fatal(err)
	}
}

// faults is a file system that counts what it is asked, and fails the
// operation of a given number; where it is dead, every one from there on.
type faults struct {
	backend.Disk
	mu    sync.Mutex
	ops   []string
	at    int // the number of the operation that fails, from 0; -1 for none
	dead  bool
	error error

	noLinks bool // a file system without hard links
}

func (f *faults) op(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.ops)
	f.ops = append(f.ops, name)
	if f.at >= 0 && (n == f.at || f.dead && n > f.at) {
		return &os.PathError{Op: name, Path: "injected", Err: f.error}
	}
	return nil
}

func (f *faults) Create(name string) (*os.File, error) {
	if err := f.op("create"); err != nil {
		return nil, err
	}
	return f.Disk.Create(name)
}

func (f *faults) Mark(name, marker string) error {
	if err := f.op("mark"); err != nil {
		return err
	}
	if f.noLinks {
		return backend.EmptyMarker(marker)
	}
	return f.Disk.Mark(name, marker)
}

func (f *faults) Sync(file *os.File) error {
	if err := f.op("sync"); err != nil {
		return err
	}
	return f.Disk.Sync(file)
}

func (f *faults) SyncDir(name string) error {
	if err := f.op("syncdir"); err != nil {
		return err
	}
	return f.Disk.SyncDir(name)
}

func (f *faults) Rename(from, to string) error {
	if err := f.op("rename"); err != nil {
		return err
	}
	return f.Disk.Rename(from, to)
}

func (f *faults) Remove(name string) error {
	if err := f.op("remove"); err != nil {
		return err
	}
	return f.Disk.Remove(name)
}

func openWith(t *testing.T, dir string, f *faults) *Store {
	t.Helper()
	s, err := open(dir, Options{}, f)
	if err != nil {
		t.Fatal(err)
	}
	s.failCommit = func() error { return f.op("commit") }
	f.ops = nil
	return s
}

// abandon leaves a store as a crash would: files stay as they are.
func (s *Store) abandon() {
	s.close(p2p.ErrClosed)
	s.sweeping.Wait()
	s.db.Close()
	s.guard.file.Close()
	s.guard.lock.Close()
}

// importArtifact stores data under a name and under a pinned task, in one
// ingest of two blobs.
func importArtifact(ctx context.Context, s *Store, name string, data []byte) (p2p.Task, error) {
	in, err := s.Ingest(ctx)
	if err != nil {
		return p2p.Task{}, err
	}
	defer in.Close()
	layer, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
	if err != nil {
		return p2p.Task{}, err
	}
	manifest, err := in.Add(strings.NewReader("manifest of "+string(layer.Digest)),
		p2p.AddOptions{Algorithm: digest.SHA512})
	if err != nil {
		return p2p.Task{}, err
	}
	task := p2p.Task{Tag: "t", Digest: layer.Digest}
	return task, in.Commit(p2p.Commit{
		Tasks: []p2p.NewTask{{Task: task},
			{Task: p2p.Task{Tag: "t", Digest: manifest.Digest},
				Manifest: &p2p.NewManifest{Refs: []digest.Digest{layer.Digest}}}},
		Names: []p2p.NewName{{Tag: "t", Name: name, Digest: manifest.Digest}},
	})
}

func cacheID(t *testing.T, s string) digest.CID {
	t.Helper()
	cid, err := digest.ParseCID(s)
	if err != nil {
		t.Fatal(err)
	}
	return cid
}

// countOps returns how many operations work takes on a store that has v0.
func countOps(t *testing.T, work func(*Store) error) int {
	t.Helper()
	f := &faults{at: -1}
	s := openWith(t, t.TempDir(), f)
	defer s.Close()
	if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
		t.Fatal(err)
	}
	f.ops = nil
	if err := work(s); err != nil {
		t.Fatal(err)
	}
	t.Logf("operations: %s", strings.Join(f.ops, " "))
	return len(f.ops)
}

// works are what faults are injected into. Each leaves v0 either as it was, or
// moved or deleted, and says so by its error.
var works = map[string]func(t *testing.T, s *Store) error{
	"import": func(t *testing.T, s *Store) error {
		_, err := importArtifact(t.Context(), s, "v1", []byte("new"))
		return err
	},
	"move": func(t *testing.T, s *Store) error {
		_, err := importArtifact(t.Context(), s, "v0", []byte("new"))
		return err
	},
	"fetch": func(t *testing.T, s *Store) error {
		p, err := fetchPartial(t, s, []byte("new"))
		if err != nil {
			return err
		}
		task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("new")}
		if err := p.Commit(t.Context(), p2p.Commit{
			Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred, Origin: time.Now()}}}); err != nil {
			return err
		}
		_, err = importArtifact(t.Context(), s, "v1", []byte("new"))
		return err
	},
	"delete for all": func(t *testing.T, s *Store) error {
		_, _, err := s.DeleteForAll(t.Context(), "t", cacheID(t, "v0"), p2p.DeleteOptions{}, nil)
		return err
	},
	"delete": func(t *testing.T, s *Store) error {
		_, err := s.Delete(t.Context(), "t", cacheID(t, "v0"), p2p.DeleteOptions{})
		return err
	},
}

// requireOutcome fails the test unless what an operation said is what is there.
func requireOutcome(t *testing.T, s *Store, work string, failed bool) {
	t.Helper()
	resolve := func(name string) error {
		info, err := s.Stat(t.Context(), "t", cacheID(t, name), p2p.StatOptions{})
		task := info.Task
		if err != nil {
			return err
		}
		for d, data := range map[digest.Digest]string{
			digest.SHA256.FromString("old"): "old", digest.SHA256.FromString("new"): "new"} {
			manifest := "manifest of " + string(d)
			if task.Digest == digest.SHA512.FromString(manifest) {
				enginetest.RequireContent(t, s, task, []byte(manifest))
				enginetest.RequireContent(t, s, p2p.Task{Tag: "t", Digest: d}, []byte(data))
				if want := map[bool]string{
					true: "old", false: "new"}[name == "v0" && (failed || work != "move")]; data != want {
					t.Errorf("%s has the %s content", name, data)
				}
				return nil
			}
		}
		t.Errorf("%s points to %s", name, task)
		return nil
	}
	v0, v1 := resolve("v0"), resolve("v1")
	if gone := !failed && strings.HasPrefix(work, "delete"); errors.Is(v0, p2p.ErrNotFound) != gone {
		t.Errorf("v0: %v", v0)
	}
	if there := !failed && (work == "import" || work == "fetch"); (v1 == nil) != there {
		t.Errorf("v1: %v", v1)
	}
}

// TestOrder: what makes an acknowledged import durable happens, and in this order.
func TestOrder(t *testing.T) {
	f := &faults{at: -1}
	dir := t.TempDir()
	made, err := open(dir, Options{}, f)
	if err != nil {
		t.Fatal(err)
	}
	made.Close()
	// blobs/ and what is beside it; the metadata, which gets its name when it is whole; the image layout
	if got, want := strings.Join(f.ops, " "),
		"syncdir syncdir sync rename syncdir create rename create rename syncdir"; got != want {
		t.Errorf("a new store does: %s; want: %s", got, want)
	}
	s := openWith(t, dir, f)
	defer s.Close()
	task := enginetest.Import(t, s, "t", []byte("data"))
	// content, fsync, marker, rename into blobs/, fsync of blobs/, transaction, marker gone
	if got, want := strings.Join(f.ops, " "), "create sync mark rename syncdir commit remove"; got != want {
		t.Errorf("an import does: %s; want: %s", got, want)
	}
	f.ops = nil
	if _, err := s.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// task gone, records gone, out of blobs/, blocks freed
	if got, want := strings.Join(f.ops, " "), "commit commit rename remove"; got != want {
		t.Errorf("a delete does: %s; want: %s", got, want)
	}
	// After that there is nothing to make up for at the next start.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f.ops = nil
	again, err := open(s.dir, Options{}, f)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if len(f.ops) > 0 {
		t.Errorf("the next start does: %s", strings.Join(f.ops, " "))
	}
}

// TestFaults lets every single operation fail, one after the other: what
// failed is not there, what succeeded is, and the store goes on.
func TestFaults(t *testing.T) {
	for name, work := range works {
		n := countOps(t, func(s *Store) error { return work(t, s) })
		for at := range n {
			for _, fault := range []error{syscall.EIO, syscall.ENOSPC} {
				if testing.Short() && fault == syscall.EIO {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/%v", name, at, fault), func(t *testing.T) {
					dir := t.TempDir()
					f := &faults{at: -1, error: fault}
					s := openWith(t, dir, f)
					if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
						t.Fatal(err)
					}
					f.ops, f.at = nil, at
					err := work(t, s)
					op := f.ops[at]
					if err != nil && !errors.Is(err, fault) {
						t.Errorf("%s fails, and the error is %v", op, err)
					}
					if errors.Is(err, syscall.ENOSPC) && !errors.Is(err, p2p.ErrNoSpace) {
						t.Errorf("error is %v; want one of space", err)
					}
					if err == nil && (op == "sync" || op == "syncdir" || op == "create" || op == "mark") {
						t.Errorf("%s fails, and nobody is told", op)
					}
					requireOutcome(t, s, name, err != nil)
					_, again := importArtifact(t.Context(), s, "v2", []byte("more"))
					if broken := op == "commit" &&
						fault == syscall.EIO; broken != errors.Is(again, p2p.ErrFailed) ||
						!broken && again != nil {
						t.Errorf("an import after a failed %s: %v", op, again)
					}
					if err := s.Close(); err != nil && op != "commit" {
						t.Errorf("close: %v", err)
					}
					s, reopened := Open(dir, Options{})
					if reopened != nil {
						t.Fatal(reopened)
					}
					requireOutcome(t, s, name, err != nil)
					s.Close()
					requireClean(t, dir)
				})
			}
		}
	}
}

// TestCrash stops the world at every single operation, and opens the store again.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for name, work := range works {
		n := countOps(t, func(s *Store) error { return work(t, s) })
		for i := range 2 * n {
			at, noLinks := i/2, i%2 == 1
			t.Run(fmt.Sprintf("%s/%d/%v", name, at, noLinks), func(t *testing.T) {
				dir := t.TempDir()
				f := &faults{at: -1, dead: true, error: syscall.EIO, noLinks: noLinks}
				s := openWith(t, dir, f)
				if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
					t.Fatal(err)
				}
				f.ops, f.at = nil, at
				err := work(t, s)
				s.abandon()
				s, reopened := Open(dir, Options{})
				if reopened != nil {
					t.Fatal(reopened)
				}
				requireOutcome(t, s, name, err != nil)
				s.Close()
				requireClean(t, dir)
			})
		}
	}
}

// TestDeletedFilesGo: what nothing holds any more makes room at once, whatever has let go of it.
func TestDeletedFilesGo(t *testing.T) {
	for name, work := range map[string]func(t *testing.T, s *Store) error{
		"delete": works["delete"], "delete for all": works["delete for all"], "move": works["move"],
		"delete by a peer": func(t *testing.T, s *Store) error {
			_, err := s.ApplyDelete(t.Context(),
				Delete{Tag: "t", CID: cacheID(t, "v0"), At: time.Now().Add(time.Second)})
			return err
		},
		"end of a lease": func(t *testing.T, s *Store) error {
			manifest := p2p.Task{Tag: "t",
				Digest: digest.SHA512.FromString("manifest of " + string(digest.SHA256.FromString("old")))}
			if err := errors.Join(asked(t, s, manifest), works["delete"](t, s)); err != nil {
				return err
			}
			s.endAll(manifest)
			return s.releaseSpared()
		},
	} {
		s := newStore(t)
		if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
			t.Fatal(err)
		}
		if err := work(t, s); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(s.bytes.Path(digest.SHA256.FromString("old"))); !backend.IsMissing(err) {
			t.Errorf("%s: its file is still there (%v)", name, err)
		}
	}
}

// TestCrashOfARecovery stops the opening itself.
func TestCrashOfARecovery(t *testing.T) {
	for at := range 16 {
		dir := t.TempDir()
		f := &faults{at: -1, dead: true, error: syscall.EIO}
		s := openWith(t, dir, f)
		if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
			t.Fatal(err)
		}
		// The records are gone, the files are not; and an import got as far as its markers.
		f.ops, f.at = nil, 2
		if _, err := s.Delete(t.Context(), "t", cacheID(t, "v0"), p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		s.abandon()
		marked := digest.SHA256.FromString("marked").Encoded()
		for _, name := range []string{"ingest/aaaa", "ingest/bbbb.sha256." + digest.SHA256.FromString("old").Encoded(),
			"ingest/cccc.sha256." + marked, "blobs/sha256/" + marked} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		dying := &faults{at: at, dead: true, error: syscall.EIO}
		if s, err := open(dir, Options{}, dying); err == nil {
			s.abandon()
		}
		requireCleanAfterOpen(t, dir)
		if t.Failed() {
			t.Fatalf("after a recovery that was stopped at operation %d of: %s", at, strings.Join(dying.ops, " "))
		}
	}
}

func requireCleanAfterOpen(t *testing.T, dir string) {
	t.Helper()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	requireClean(t, dir)
}

func newStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func damage(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if changed := f(data); changed != nil {
		if err := os.WriteFile(path, changed, 0o444); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamage: damage is told, named, found by a check, and healed by importing again.
func TestDamage(t *testing.T) {
	const size = 5*digest.MinPieceLength + 100
	for name, c := range map[string]struct {
		damage func([]byte) []byte
		piece  int
		kind   string
	}{
		"flipped bit":  {func(p []byte) []byte { p[3*digest.MinPieceLength+7] ^= 1; return p }, 3, KindCorrupt},
		"missing byte": {func(p []byte) []byte { return p[:size-1] }, 5, KindCorrupt},
		"one more":     {func(p []byte) []byte { return append(p, 0) }, 5, KindCorrupt},
		"cut short":    {func(p []byte) []byte { return p[:10] }, 0, KindCorrupt},
		"empty":        {func(p []byte) []byte { return []byte{} }, 0, KindCorrupt},
		"no file":      {func(p []byte) []byte { return nil }, -1, KindMissing},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			data := enginetest.Content(size, 1)
			task := enginetest.Import(t, s, "t", data)
			damage(t, s.bytes.Path(task.Digest), c.damage)
			// To see that, nobody has to read it, but for what its size does not tell.
			if err := asked(t, s, task); errors.Is(err, digest.ErrCorrupt) == (name == "flipped bit") {
				t.Errorf("stat before it was read: %v", err)
			}

			var out bytes.Buffer
			blob, err := s.Open(t.Context(), task, p2p.Local)
			if err == nil {
				err = blob.CopyRange(t.Context(), &out, 0, blob.Size(), nil)
				blob.Close()
			}
			corrupt, ok := errors.AsType[*digest.CorruptError](err)
			if !ok || corrupt.Digest != task.Digest || corrupt.Piece != c.piece {
				t.Errorf("reading: %v; want damage in piece %d", err, c.piece)
			}
			if !bytes.HasPrefix(data, out.Bytes()) {
				t.Error("wrong bytes were handed out")
			}
			// Met once, it is remembered.
			if _, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest),
				p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
				t.Errorf("stat: %v", err)
			}
			var found []Problem
			if _, err := s.Check(t.Context(), func(p Problem) { found = append(found, p) }); err != nil {
				t.Fatal(err)
			}
			if len(found) == 0 || found[0].Kind != c.kind || found[0].Digest != task.Digest {
				t.Errorf("check finds %v", found)
			}

			for _, again := range []func() p2p.Task{
				func() p2p.Task { return enginetest.Import(t, s, "t", data) },
				func() p2p.Task { return importFile(t, s, data, task.Digest) },
			} {
				again()
				if err := asked(t, s, task); err != nil {
					t.Errorf("stat, when it has come again: %v", err)
				}
				enginetest.RequireContent(t, s, task, data)
				damage(t, s.bytes.Path(task.Digest), c.damage)
			}
			enginetest.Import(t, s, "t", data)
			s.Close()
			requireClean(t, s.dir)
		})
	}
}

// TestDamageThatGoesBy: damage that was met, as of a bad cable, is forgotten when the whole has been
// read and is as it was, and not when a part of it is. A manifest is told of it as long as it is there.
func TestDamageThatGoesBy(t *testing.T) {
	s := newStore(t)
	data := enginetest.Content(3*digest.MinPieceLength, 1)
	layer := pushed(t, s, string(data))
	manifest := pushed(t, s, "manifest", layer)
	path := s.bytes.Path(layer.Digest)
	flip := func() {
		t.Helper()
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		if _, err := f.ReadAt(b[:], digest.MinPieceLength); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{b[0] ^ 1}, digest.MinPieceLength); err != nil {
			t.Fatal(err)
		}
	}
	read := func(n int64) error {
		blob, err := s.Open(t.Context(), layer, p2p.Local)
		if err != nil {
			t.Fatal(err)
		}
		defer blob.Close()
		return blob.CopyRange(t.Context(), io.Discard, 0, n, nil)
	}
	known := func(want bool) {
		t.Helper()
		if err := asked(t, s, layer); errors.Is(err, digest.ErrCorrupt) != want {
			t.Errorf("stat: %v, want damage: %v", err, want)
		}
		info, err := s.Stat(t.Context(), "t", digest.FromDigest(manifest.Digest), p2p.StatOptions{})
		if err != nil || (len(info.Lacks) == 1) != want {
			t.Errorf("the manifest lacks %v, %v; want damage: %v", info.Lacks, err, want)
		}
	}
	flip()
	if err := read(int64(len(data))); !errors.Is(err, digest.ErrCorrupt) {
		t.Fatal(err)
	}
	known(true)
	index := pushed(t, s, "index", manifest) // one that comes now is told, too
	if info, err := s.Stat(t.Context(), "t", digest.FromDigest(index.Digest), p2p.StatOptions{}); err != nil ||
		len(info.Lacks) != 1 {
		t.Errorf("what refers to that lacks %v, %v", info.Lacks, err)
	}
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(strings.NewReader("another manifest"), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	parts := []digest.Digest{layer.Digest}
	err = in.Commit(p2p.Commit{Tasks: []p2p.NewTask{
		{Task: p2p.Task{Tag: "t", Digest: added.Digest}, Manifest: &p2p.NewManifest{Refs: parts, Needs: parts}}}})
	if !errors.Is(err, p2p.ErrMissingRef) {
		t.Errorf("a manifest that needs what is damaged: %v, want %v", err, p2p.ErrMissingRef)
	}
	flip()
	if err := read(digest.MinPieceLength); err != nil {
		t.Fatal(err)
	}
	known(true)
	if err := read(int64(len(data))); err != nil {
		t.Fatal(err)
	}
	known(false)

	// A reader that goes on in a damaged file that was replaced does not harm the new one.
	damage(t, path, func(p []byte) []byte { p[7] ^= 1; return p })
	old, err := s.Open(t.Context(), layer, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	pushed(t, s, string(data))
	if err := old.CopyRange(t.Context(), io.Discard, 0, int64(len(data)), nil); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("the damaged file: %v", err)
	}
	known(false)
}

// TestHeldWhereThereIsNoRoom: what is here can come again where there is no room for more, and
// nothing else can in its name.
func TestHeldWhereThereIsNoRoom(t *testing.T) {
	data := enginetest.Content(100_000, 1)
	s, err := Open(t.TempDir(), Options{MaxSize: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := enginetest.Import(t, s, "t", data).Digest
	for how, add := range map[string]func(in p2p.Ingest, data []byte) error{
		"read": func(in p2p.Ingest, data []byte) error {
			_, err := in.Add(bytes.NewReader(data), p2p.AddOptions{Want: want})
			return err
		},
		"written": func(in p2p.Ingest, data []byte) error {
			w, err := in.Create(p2p.AddOptions{Want: want})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
			_, err = w.Finish()
			return err
		},
	} {
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := add(in, data); err != nil {
			t.Errorf("what is here, %s: %v", how, err)
		}
		if err := add(in, data[1:]); !errors.Is(err, digest.ErrMismatch) {
			t.Errorf("something else, %s: %v, want %v", how, err, digest.ErrMismatch)
		}
		in.Close()
	}
	if len(s.holds) > 0 {
		t.Errorf("%v are held after that", s.holds)
	}
}

func importFile(t *testing.T, s *Store, data []byte, want digest.Digest) p2p.Task {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(f, p2p.AddOptions{Want: want})
	if err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: added.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
		t.Fatal(err)
	}
	return task
}

// TestImportOfHeldBlobCopiesNothing: the digest is known and held, so the
// source is only compared.
func TestImportOfHeldBlobCopiesNothing(t *testing.T) {
	f := &faults{at: -1}
	s := openWith(t, t.TempDir(), f)
	defer s.Close()
	data := enginetest.Content(100_000, 1)
	task := enginetest.Import(t, s, "t", data)
	f.ops = nil
	importFile(t, s, data, task.Digest)
	if got := strings.Join(f.ops, " "); got != "commit" {
		t.Errorf("operations: %s; want the commit alone", got)
	}
}

func TestStray(t *testing.T) {
	s := newStore(t)
	enginetest.Import(t, s, "t", []byte("data"))
	stray := s.bytes.Path(digest.SHA256.FromString("never imported"))
	if err := os.WriteFile(stray, []byte("never imported"), 0o444); err != nil {
		t.Fatal(err)
	}
	var found []Problem
	sum, err := s.Check(t.Context(), func(p Problem) { found = append(found, p) })
	if err != nil || len(found) != 1 || found[0].Kind != KindStray || found[0].Path != stray ||
		sum != (Summary{Blobs: 1, Bytes: 4, Problems: 1}) {
		t.Errorf("check: %+v, %+v, %v", sum, found, err)
	}
}

// TestCheckFindsContradictions removes records one by one.
func TestCheckFindsContradictions(t *testing.T) {
	for _, bucket := range [][]byte{bucketBlobs, bucketTables, bucketHolders, bucketTasks} {
		s := newStore(t)
		if _, err := importArtifact(t.Context(), s, "v0", []byte("data")); err != nil {
			t.Fatal(err)
		}
		err := s.update(func(tx *bbolt.Tx) error {
			k, _ := tx.Bucket(bucket).Cursor().First()
			return removeKeys(tx, bucket, k)
		})
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		if _, err := s.Check(t.Context(), func(p Problem) { found++ }); err != nil || found == 0 {
			t.Errorf("without a record in %s the check finds %d problems (%v)", bucket, found, err)
		}
	}
}

func TestLock(t *testing.T) {
	s := newStore(t)
	_, err := Open(s.dir, Options{})
	if !errors.Is(err, p2p.ErrUnavailable) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) ||
		!strings.Contains(err.Error(), s.dir) {
		t.Errorf("error is %v; want one that names process and directory", err)
	}
	s.Close()
	again, err := Open(s.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// TestLockNamesAddress: whoever finds the store locked is told where it can be reached.
func TestLockNamesAddress(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{Address: "/run/some.sock"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "/run/some.sock") {
		t.Errorf("error is %v; want one that has the address", err)
	}
}

// TestLostMetadata: blobs without the metadata are no empty store.
func TestLostMetadata(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	s.Close()
	meta := filepath.Join(s.dir, "meta.db")
	for name, lose := range map[string]func() error{
		"missing": func() error { return os.Remove(meta) },
		"empty":   func() error { return os.WriteFile(meta, nil, 0o600) },
	} {
		if err := lose(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(s.dir, Options{}); !errors.Is(err, digest.ErrCorrupt) ||
			!strings.Contains(err.Error(), meta) {
			t.Errorf("%s: error is %v; want one about the metadata", name, err)
		}
		if _, err := os.Stat(s.bytes.Path(task.Digest)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestExisting: to look at a store does not make one.
func TestExisting(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir, Options{Existing: true}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the directory has %v (%v)", left, err)
	}
	requireCleanAfterOpen(t, dir)
}

func TestUnknownVersion(t *testing.T) {
	s := newStore(t)
	err := s.update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketMeta, []byte("version"), binary.BigEndian.AppendUint32(nil, formatVersion+1))
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(s.dir, Options{}); !errors.Is(err, p2p.ErrUnavailable) ||
		!strings.Contains(err.Error(), "version") {
		t.Errorf("error is %v; want one about the version", err)
	}
}

// TestDamagedMetadata writes over pages of meta.db: no panic, and no success that is none.
func TestDamagedMetadata(t *testing.T) {
	s := newStore(t)
	tasks := map[p2p.Task][]byte{}
	for i := range 10 {
		data := fmt.Appendf(nil, "data %d", i)
		tasks[enginetest.Import(t, s, "t", data)] = data
	}
	s.Close()
	path := filepath.Join(s.dir, "meta.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	for off := 0; off < len(good); off += page {
		fill := []byte{0, 0xff}[off/page%2]
		bad := bytes.Clone(good)
		copy(bad[off:off+page], bytes.Repeat([]byte{fill}, page))
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(s.dir, Options{})
		if err != nil {
			continue
		}
		for task, data := range tasks {
			blob, err := s.Open(t.Context(), task, p2p.Local)
			if err != nil {
				continue
			}
			var out bytes.Buffer
			if err := blob.CopyRange(t.Context(), &out, 0, blob.Size(), nil); err == nil &&
				!bytes.Equal(out.Bytes(), data) {
				t.Errorf("page %d filled with %#x: %s has other content", off/page, fill, task)
			}
			blob.Close()
		}
		for range s.List(t.Context(), p2p.Query{}) {
		}
		s.Check(t.Context(), func(Problem) {})
		s.Close()
	}
}

// TestOpenDoesNotWalk: what opening costs does not depend on how much there is.
func TestOpenDoesNotWalk(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	cost := func(n int) uint64 {
		s := newStore(t)
		s.db.NoSync = true
		err := s.update(func(tx *bbolt.Tx) error {
			for i := range n {
				d := string(digest.SHA256) + fmt.Sprintf(":%064x", i)
				err := errors.Join(
					putValue(tx, bucketBlobs, []byte(d), []byte(`{"size":1}`)),
					putValue(tx, bucketTables, []byte(d), make([]byte, 24)),
					putValue(tx, bucketTasks, key("t", d), []byte(`{"imported":"2026-01-01T00:00:00Z"}`)),
					putValue(tx, bucketHolders, key(d, "t"), nil))
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		var before, after runtime.MemStats
		f := &faults{at: -1}
		runtime.GC()
		runtime.ReadMemStats(&before)
		s, err = open(s.dir, Options{}, f)
		runtime.ReadMemStats(&after)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if len(f.ops) > 0 {
			t.Errorf("opening a store of %d blobs does: %s", n, strings.Join(f.ops, " "))
		}
		return after.Mallocs - before.Mallocs
	}
	few, many := cost(10), cost(50_000)
	if many > few+1000 {
		t.Errorf("opening a store of 50000 blobs allocates %d objects, one of 10 blobs %d", many, few)
	}
}

// TestUpdatesShare: an update that fails takes none of the others with it.
func TestUpdatesShare(t *testing.T) {
	s := newStore(t)
	errOdd := errors.New("odd")
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			err := s.update(func(tx *bbolt.Tx) error {
				if err := putValue(tx, bucketLoose, fmt.Appendf(nil, "%d", i), nil); err != nil {
					return err
				}
				if i%2 == 1 {
					return errOdd
				}
				return nil
			})
			if want := map[int]error{0: nil, 1: errOdd}[i%2]; !errors.Is(err, want) {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	all.Wait()
	err := s.update(func(tx *bbolt.Tx) error {
		for i := range 100 {
			k := fmt.Appendf(nil, "%d", i)
			if there := value(tx, bucketLoose, k) != nil; there != (i%2 == 0) {
				t.Errorf("record %d is there: %v", i, there)
			}
			if err := removeKeys(tx, bucketLoose, k); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestModes(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	task := enginetest.Import(t, s, "t", []byte("data"))
	info, err := os.Stat(s.bytes.Path(task.Digest))
	if err != nil || info.Mode() != 0o444 {
		t.Errorf("the blob's mode is %v (%v), want 0444", info.Mode(), err)
	}
}

// TestLastUsedSurvives: the time of last use is written when the store is closed.
func TestLastUsedSurvives(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	enginetest.RequireContent(t, s, task, []byte("data"))
	before, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
	if err != nil || before.LastUsed.IsZero() {
		t.Fatalf("%+v, %v", before, err)
	}
	s.Close()
	s, err = Open(s.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	after, err := s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
	if err != nil || !after.LastUsed.Equal(before.LastUsed) {
		t.Errorf("last used was %v, is %v (%v)", before.LastUsed, after.LastUsed, err)
	}
}

// TestProcFile: files that claim to be empty are read to their true end.
func TestProcFile(t *testing.T) {
	s := newStore(t)
	f, err := os.Open("/proc/self/limits")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want, err := io.ReadAll(f)
	if err != nil || len(want) == 0 {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	added, err := in.Add(f, p2p.AddOptions{})
	if err != nil || added.Size != int64(len(want)) {
		t.Errorf("added %d bytes, want %d (%v)", added.Size, len(want), err)
	}
}

// FuzzRecords reads whatever may stand in the metadata: errors, no panic.
func FuzzRecords(f *testing.F) {
	d := string(digest.SHA256.FromString("data"))
	f.Add([]byte(`{"imported":"2026-01-01T00:00:00Z","refs":["`+d+`"]}`), []byte(`{"digest":"`+d+`"}`),
		[]byte(`{"size":4}`), []byte{0, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte(`{`), []byte(`[]`), []byte(`null`), []byte{})
	f.Add([]byte(`{"refs":["x","sha256:",null]}`), []byte(`{"digest":"x"}`), []byte(`{"size":-1}`), []byte{1})
	dir := f.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	s.db.NoSync = true
	task := p2p.Task{Tag: "t", Digest: digest.Digest(d)}
	f.Fuzz(func(t *testing.T, taskRecord, nameRecord, blobRecord, used []byte) {
		err := s.update(func(tx *bbolt.Tx) error {
			return errors.Join(
				putValue(tx, bucketTasks, taskKey(task), taskRecord),
				putValue(tx, bucketNames, key("t", "v1"), nameRecord),
				putValue(tx, bucketBlobs, key(d), blobRecord),
				putValue(tx, bucketTables, key(d), blobRecord),
				putValue(tx, bucketUsed, taskKey(task), used))
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Stat(t.Context(), task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
		s.Stat(t.Context(), "t", cacheID(t, "v1"), p2p.StatOptions{Manifest: true})
		if blob, err := s.Open(t.Context(), task, p2p.Local); err == nil {
			blob.Close()
		}
		for range s.List(t.Context(), p2p.Query{}) {
		}
		if _, err := s.Check(t.Context(), func(Problem) {}); err != nil {
			t.Error(err)
		}
		s.Delete(t.Context(), "t", cacheID(t, "v1"), p2p.DeleteOptions{})
		s.Delete(t.Context(), "t", digest.FromDigest(task.Digest), p2p.DeleteOptions{Force: true})
	})
}

// cut is a file system on which a power cut undoes what took names out of blobs/ and was not
// synced.
type cut struct {
	*faults
	t      *testing.T
	undo   map[string][]func() // by directory
	synced func()              // called, once, when a directory is on the disk, before that is told
}

func (c *cut) Rename(from, to string) error {
	dir := filepath.Dir(from)
	if filepath.Base(filepath.Dir(dir)) != "blobs" {
		return c.faults.Rename(from, to)
	}
	kept := filepath.Join(c.t.TempDir(), filepath.Base(from))
	if err := os.Link(from, kept); err != nil && !backend.IsMissing(err) {
		c.t.Error(err)
	}
	err := c.faults.Rename(from, to)
	if err == nil {
		c.undo[dir] = append(c.undo[dir], func() {
			if err := os.Link(kept, from); err != nil && !os.IsExist(err) {
				c.t.Error(err)
			}
		})
	}
	return err
}

func (c *cut) SyncDir(name string) error {
	err := c.faults.SyncDir(name)
	if err == nil {
		delete(c.undo, name)
	}
	if synced := c.synced; synced != nil {
		c.synced = nil
		synced()
	}
	return err
}

// TestPowerCutAfterDelete: a file that was moved away, and comes back with the power, is known
// to be one that was deleted.
func TestPowerCutAfterDelete(t *testing.T) {
	remove := func(t *testing.T, s *Store, name string) {
		t.Helper()
		if _, err := s.Delete(t.Context(), "t", cacheID(t, name), p2p.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for name, work := range map[string]func(t *testing.T, s *Store, f *cut){
		"deleted while names are synced": func(t *testing.T, s *Store, f *cut) {
			f.synced = func() { remove(t, s, "v0") }
			if _, err := importArtifact(t.Context(), s, "v1", []byte("new")); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := s.update(func(*bbolt.Tx) error { return nil }); err != nil {
					t.Fatal(err)
				}
			}
		},
		"deleted": func(t *testing.T, s *Store, _ *cut) {
			remove(t, s, "v0")
			// Changes that come later take what is gone off the list.
			for range 2 {
				if err := s.update(func(*bbolt.Tx) error { return nil }); err != nil {
					t.Fatal(err)
				}
			}
		},
		"not committed": func(t *testing.T, s *Store, f *cut) {
			s.failCommit = func() error { s.failCommit = nil; return &os.PathError{Op: "write", Err: syscall.ENOSPC} }
			if _, err := importArtifact(t.Context(), s, "v1", []byte("new")); !errors.Is(err, p2p.ErrNoSpace) {
				t.Fatal(err)
			}
		},
		"not committed, at the start": func(t *testing.T, s *Store, f *cut) {
			f.ops, f.at, f.dead, f.error = nil, 8, true, syscall.EIO // when its two files are in blobs/
			if _, err := importArtifact(t.Context(), s, "v1", []byte("new")); !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
			if got, want := strings.Join(f.ops[:8],
				" "), "create create sync sync mark rename mark rename"; got != want {
				t.Fatalf("operations: %s; want: %s", got, want)
			}
			s.abandon()
			f.at = -1
			again, err := open(s.dir, Options{}, s.files)
			if err != nil {
				t.Fatal(err)
			}
			again.abandon()
		},
		"closed": func(t *testing.T, s *Store, _ *cut) {
			remove(t, s, "v0")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		},
		"deleted at the start": func(t *testing.T, s *Store, f *cut) {
			f.ops, f.at, f.dead, f.error = nil, 2, true, syscall.EIO // before the files go
			remove(t, s, "v0")
			s.abandon()
			f.at = -1
			again, err := open(s.dir, Options{}, s.files)
			if err != nil {
				t.Fatal(err)
			}
			if err := again.update(func(*bbolt.Tx) error { return nil }); err != nil {
				t.Fatal(err)
			}
			again.abandon()
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			f := &cut{faults: &faults{at: -1}, t: t, undo: map[string][]func(){}}
			s, err := open(dir, Options{}, f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
				t.Fatal(err)
			}
			work(t, s, f)
			s.abandon()
			for _, undo := range f.undo {
				for _, u := range undo {
					u()
				}
			}
			requireCleanAfterOpen(t, dir)
		})
	}
}
