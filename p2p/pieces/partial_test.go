package pieces

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

func randomContent(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// tableOf makes the piece table of data.
func tableOf(t testing.TB, data []byte) *digest.Table {
	t.Helper()
	r := digest.NewRecorder(digest.SHA256)
	r.Write(data)
	table, err := r.Table()
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// fetchPartial fills a Partial with all of data.
func fetchPartial(t testing.TB, s *Store, data []byte) (*Partial, error) {
	t.Helper()
	table := tableOf(t, data)
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		return nil, err
	}
	if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	for i := range table.Pieces() {
		if err := receive(p, table, data, i); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

func receive(p *Partial, table *digest.Table, data []byte, i int) error {
	start, end := table.Bounds(i)
	return p.Receive(i, bytes.NewReader(data[start:end]), make([]byte, table.PieceLength))
}

func held(p *Partial) (all []int) {
	for i := range p.Table().Pieces() {
		if p.Held(i) {
			all = append(all, i)
		}
	}
	return all
}

func TestPartial(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	data := randomContent(5*digest.MinPieceLength+1000, 1)
	table := tableOf(t, data)
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Partial(t.Context(), table.Digest); err == nil {
		t.Error("a second one could be opened")
	}
	if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{4, 1, 5} {
		if err := receive(p, table, data, i); err != nil {
			t.Fatal(err)
		}
	}
	// What is wrong is told and not written.
	start, _ := table.Bounds(2)
	wrong := bytes.Clone(data[start : start+digest.MinPieceLength])
	wrong[7] ^= 1
	if err := p.Receive(2, bytes.NewReader(wrong), make([]byte, len(wrong))); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("a wrong piece: %v, want %v", err, digest.ErrMismatch)
	}
	if err := p.Receive(2, bytes.NewReader(wrong[:10]), make([]byte, len(wrong))); !errors.Is(err,
		io.ErrUnexpectedEOF) {
		t.Errorf("a short piece: %v", err)
	}
	if got := held(p); !slices.Equal(got, []int{1, 4, 5}) || p.Complete() {
		t.Errorf("held are %v", got)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// A later process finds it, and believes nothing of it.
	name := filepath.Join(dir, "partial", "sha256."+table.Digest.Encoded())
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte{data[4*digest.MinPieceLength] ^ 1}, 4*digest.MinPieceLength)
	f.Close()
	if s, err = Open(dir, Options{}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if p, err = s.Partial(t.Context(), table.Digest); err != nil {
		t.Fatal(err)
	}
	saved := p.Saved()
	if saved == nil || saved.Size != table.Size || !bytes.Equal(saved.Chain, table.Chain) {
		t.Fatalf("the table that was saved is %+v", saved)
	}
	if err := p.Use(t.Context(), saved.Size, saved.Chain); err != nil {
		t.Fatal(err)
	}
	if got := held(p); !slices.Equal(got, []int{1, 5}) {
		t.Errorf("held are %v, want those that were not damaged", got)
	}
	for i := range table.Pieces() {
		if err := receive(p, table, data, i); err != nil {
			t.Fatal(err)
		}
	}
	task := p2p.Task{Tag: "t", Digest: table.Digest}
	if err := p.Commit(t.Context(), p2p.Commit{
		Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred, Origin: time.Now()}}}); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireContent(t, s, task, data)
	// A reader that came while it was committed reads what it has become, until it is closed.
	read, err := p.File()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if got, err := io.ReadAll(read); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read are %d bytes, %v", len(got), err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := p.File(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a file of a closed one: %v, want %v", err, os.ErrClosed)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "partial")); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if n := s.incoming.Load(); n != 0 {
		t.Errorf("%d bytes are counted as incoming, want none", n)
	}
}

// What has not all arrived is no blob of the store, and what nobody fetches any more goes after a while.
func TestPartialIsNoBlob(t *testing.T) {
	s := newStore(t)
	data := randomContent(3*digest.MinPieceLength, 8)
	table := tableOf(t, data)
	begin := func() *Partial {
		t.Helper()
		p, err := s.Partial(t.Context(), table.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.Use(t.Context(), table.Size, table.Chain), receive(p, table, data, 0),
			receive(p, table, data, 2)); err != nil {
			t.Fatal(err)
		}
		return p
	}
	task := p2p.Task{Tag: "t", Digest: table.Digest}
	if err := begin().Commit(t.Context(),
		p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Origin: time.Now()}}}); !errors.Is(err, digest.ErrInvalid) ||
		isHere(t, s, task) {
		t.Errorf("commit of two pieces of three: %v", err)
	}
	if err := begin().Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.DropPartials(time.Now().Add(time.Minute)); err != nil || s.hasUnopened() {
		t.Errorf("it is still there (%v)", err)
	}
	requireEmpty(t, s.path("partial"))
}

// Another chain has everything verified again.
func TestPartialOtherChain(t *testing.T) {
	s := newStore(t)
	data := randomContent(4*digest.MinPieceLength, 2)
	table := tableOf(t, data)
	forged := bytes.Clone(table.Chain)
	forged[32] ^= 1 // the state between pieces 1 and 2
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Remove()
	if err := p.Use(t.Context(), table.Size, forged); err != nil {
		t.Fatal(err)
	}
	for i, fits := range []bool{true, false, false, true} {
		if err := receive(p, table, data, i); (err == nil) != fits {
			t.Errorf("piece %d with the forged chain: %v", i, err)
		}
	}
	if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
		t.Fatal(err)
	}
	if got := held(p); !slices.Equal(got, []int{0, 3}) {
		t.Errorf("held are %v with the true chain, want 0 and 3", got)
	}
	for _, c := range []struct {
		size  int64
		chain []byte
	}{{-1, nil}, {table.Size, table.Chain[1:]}, {0, table.Chain}} {
		if err := p.Use(t.Context(), c.size, c.chain); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("size %d and a chain of %d bytes: %v, want %v", c.size, len(c.chain), err, digest.ErrInvalid)
		}
	}
	if err := p.Use(t.Context(), 0, nil); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("an empty blob of this digest: %v, want %v", err, digest.ErrMismatch)
	}
}

// A chain may be replaced, by one of another size, while a piece is verified with it.
func TestPartialChainReplaced(t *testing.T) {
	s := newStore(t)
	data := randomContent(4*digest.MinPieceLength, 2)
	table := tableOf(t, data)
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1, digest.MinPieceLength, 3 * digest.MinPieceLength, 1 << 30} {
		if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
			t.Fatal(err)
		}
		start, end := table.Bounds(3)
		replaced := readerFunc(func(b []byte) (int, error) {
			if err := p.Use(t.Context(), size, make([]byte, digest.ChainSize(digest.SHA256, size))); err != nil {
				t.Fatal(err)
			}
			return copy(b, data[start:end]), nil
		})
		if err := p.Receive(3, replaced, make([]byte, table.PieceLength)); !errors.Is(err, ErrStale) {
			t.Errorf("replaced by one of %d bytes: %v, want %v", size, err, ErrStale)
		}
		if got := held(p); len(got) > 0 {
			t.Errorf("of %d bytes it holds pieces %v", size, got)
		}
	}
	// A buffer of before the replacement is too small for the pieces of the chain in use.
	if err := p.Receive(0, bytes.NewReader(data), make([]byte, table.PieceLength)); !errors.Is(err, ErrStale) {
		t.Errorf("into a buffer that is too small: %v, want %v", err, ErrStale)
	}
	if err := p.Remove(); err != nil { // not deferred: a panic would wait for its own lock
		t.Error(err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func TestPartialConcurrently(t *testing.T) {
	s := newStore(t)
	data := randomContent(64*digest.MinPieceLength, 3)
	table := tableOf(t, data)
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
		t.Fatal(err)
	}
	var receiving sync.WaitGroup
	for w := range 4 {
		receiving.Go(func() {
			for i := range table.Pieces() {
				if i%2 == w%2 {
					if err := receive(p, table, data, i); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	receiving.Wait()
	task := p2p.Task{Tag: "t", Digest: table.Digest}
	if err := p.Commit(t.Context(), p2p.Commit{
		Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned, Origin: time.Now()}}}); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireContent(t, s, task, data)
}

// What does not fit is refused before it begins, and what fits is kept room for.
func TestPartialRoom(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{MaxSize: 5 * digest.MinPieceLength})
	if err != nil {
		t.Fatal(err)
	}
	data := randomContent(6*digest.MinPieceLength, 4)
	if _, err := fetchPartial(t, s, data); !errors.Is(err, p2p.ErrNoSpace) {
		t.Errorf("more than there is room for: %v, want %v", err, p2p.ErrNoSpace)
	}
	requireEmpty(t, filepath.Join(dir, "partial"))
	for _, beyond := range []int64{1 << 42, 1 << 50} { // of the disk
		s.maxSize = 0
		if err := s.Room(beyond); !errors.Is(err, p2p.ErrNoSpace) {
			t.Errorf("room for %d bytes: %v", beyond, err)
		}
	}
	s.maxSize = 5 * digest.MinPieceLength
	add := func() error {
		in, err := s.Ingest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		_, err = in.Add(bytes.NewReader(data[:2*digest.MinPieceLength]), p2p.AddOptions{})
		return err
	}
	data = data[:4*digest.MinPieceLength]
	table := tableOf(t, data)
	p, err := s.Partial(t.Context(), table.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Use(t.Context(), table.Size, table.Chain), p.Want([]string{"a", "b"}),
		receive(p, table, data, 1)); err != nil {
		t.Fatal(err)
	}
	if err := add(); !errors.Is(err, p2p.ErrNoSpace) {
		t.Errorf("beside what is to arrive: %v, want %v", err, p2p.ErrNoSpace)
	}
	for i := range 4 {
		if err := receive(p, table, data, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	other := tableOf(t, data[:2*digest.MinPieceLength])
	s.maxSize = 0
	if p, err = s.Partial(t.Context(), other.Digest); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Use(t.Context(), other.Size, other.Chain), receive(p, other, data, 0),
		p.Close()); err != nil {
		t.Fatal(err)
	}
	if n := s.promised.Load(); n != 0 {
		t.Errorf("%d bytes are set aside for nothing", n)
	}
	s.mu.Lock()
	err = s.dropPartial(other.Digest, ReasonRoom)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()

	// What is left of it is seen, and makes room for what comes.
	if s, err = Open(dir, Options{MaxSize: 5 * digest.MinPieceLength}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var listed []string
	for e, err := range s.List(t.Context(), p2p.Query{Kind: p2p.KindPartials}) {
		if err != nil || e.Task.Digest != table.Digest || e.Size != table.Size || e.Total != table.Size || e.Local() {
			t.Errorf("listed is %+v, %v", e, err)
		}
		listed = append(listed, e.Task.Tag)
	}
	if !slices.Equal(listed, []string{"a", "b"}) {
		t.Errorf("listed is what %q want", listed)
	}
	if err := s.DropPartials(time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if !s.hasUnopened() {
		t.Error("what has just arrived was dropped")
	}
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for _, n := range []int64{5*digest.MinPieceLength + 1, math.MaxInt64} {
		if err := in.Room(n); !errors.Is(err, p2p.ErrNoSpace) {
			t.Errorf("room for %d bytes: %v, want %v", n, err, p2p.ErrNoSpace)
		}
	}
	if !s.hasUnopened() {
		t.Error("what has arrived was dropped for what has no room even so")
	}
	if err := in.Room(5 * digest.MinPieceLength); err != nil {
		t.Errorf("beside what nobody waits for there is no room: %v", err)
	}
	requireEmpty(t, filepath.Join(dir, "partial"))
	if p, err = s.Partial(t.Context(), table.Digest); err != nil {
		t.Fatal(err)
	}
	if err := p.Use(t.Context(), table.Size, table.Chain); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := receive(p, table, data, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := add(); err != nil {
		t.Errorf("beside what nobody waits for: %v", err)
	}
	requireEmpty(t, filepath.Join(dir, "partial"))
	if p, err = fetchPartial(t, s, data); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.Close(), s.Room(2*digest.MinPieceLength)); err != nil {
		t.Errorf("room beside what nobody waits for: %v", err)
	}
	requireEmpty(t, filepath.Join(dir, "partial"))

	// On the disk there has to be room for all that is to arrive together.
	s.maxSize = 0
	free, _ := s.bytes.Free()
	if err := s.promise(free / 10 * 7); err != nil {
		t.Fatal(err)
	}
	if err := s.Room(free / 10 * 7); !errors.Is(err, p2p.ErrNoSpace) {
		t.Errorf("room twice for more than half of what is free: %v", err)
	}
	if err := s.promise(-(free / 10 * 7)); err != nil {
		t.Fatal(err)
	}
}

func requireEmpty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in %s are %v, %v", dir, left, err)
	}
}

// What has arrived of a blob goes with the last task that it was for.
func TestReleasePartial(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	data := randomContent(4*digest.MinPieceLength, 7)
	p, err := fetchPartial(t, s, data)
	if err != nil {
		t.Fatal(err)
	}
	d := p.Table().Digest
	if err := errors.Join(p.Want([]string{"b", "a"}), s.ReleasePartial(p2p.Task{Tag: "a", Digest: d}),
		p.Close()); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"other", "a", "b"} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err = Open(dir, Options{}); err != nil {
			t.Fatal(err)
		}
		if !s.hasUnopened() {
			t.Fatalf("it is gone before it was released under %s", tag)
		}
		if err := s.ReleasePartial(p2p.Task{Tag: tag, Digest: d}); err != nil {
			t.Fatal(err)
		}
	}
	defer s.Close()
	requireEmpty(t, filepath.Join(dir, "partial"))
	if n := s.incoming.Load(); n != 0 {
		t.Errorf("%d bytes are counted that are gone", n)
	}
}

func TestPartialCancelled(t *testing.T) {
	s := newStore(t)
	data := randomContent(4*digest.MinPieceLength, 5)
	p, err := fetchPartial(t, s, data)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	table := tableOf(t, data)
	if err := p.Use(ctx, table.Size, table.Chain); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want %v", err, context.Canceled)
	}
	if err := p.Remove(); err != nil {
		t.Error(err)
	}
}

// A table that an earlier version made, with longer pieces, is made anew.
func TestOlderTable(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := newStore(t)
	data := randomContent(40<<20, 6)
	task := enginetest.Import(t, s, "t", data)
	now, err := s.table(task.Digest)
	if err != nil {
		t.Fatal(err)
	}
	old := digest.Table{Digest: now.Digest, Size: now.Size, PieceLength: 2 * now.PieceLength}
	for i := range old.Pieces() {
		start, end := old.Bounds(i)
		old.CRC = append(old.CRC, digest.CRC32C(data[start:end]))
		if i < old.Pieces()-1 {
			old.Chain = append(old.Chain, now.Chain[(2*i+1)*32:(2*i+2)*32]...)
		}
	}
	b, err := old.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketTables, key(task.Digest), b)
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		blob, err := s.OpenForPeers(t.Context(), task)
		if err != nil {
			t.Fatal(err)
		}
		if got := blob.Table(); got.PieceLength != now.PieceLength || !bytes.Equal(got.Chain, now.Chain) {
			t.Errorf("the table has pieces of %d bytes, want %d", got.PieceLength, now.PieceLength)
		}
		blob.Close()
	}
	if again, err := s.table(task.Digest); err != nil || again.PieceLength != now.PieceLength {
		t.Errorf("stored is %+v, %v", again, err)
	}
	enginetest.RequireContent(t, s, task, data)

	// Not from what is damaged: its new table would say that all is well.
	if err := s.update(func(tx *bbolt.Tx) error {
		return putValue(tx, bucketTables, key(task.Digest), b)
	}); err != nil {
		t.Fatal(err)
	}
	damage(t, s.bytes.Path(task.Digest), func(p []byte) []byte { p[7] ^= 1; return p })
	if blob, err := s.OpenForPeers(t.Context(), task); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("what is damaged, and has an older table: %v", err)
		if err == nil {
			blob.Close()
		}
	}
}
