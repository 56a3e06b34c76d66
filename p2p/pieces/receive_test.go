package pieces

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// requireNothingIncoming fails the test where anything of an ingest has been left.
func requireNothingIncoming(t *testing.T, s *Store) {
	t.Helper()
	if left, err := filepath.Glob(filepath.Join(s.Dir(), "ingest", "*")); err != nil || len(left) > 0 {
		t.Errorf("there is left %q, %v", left, err)
	}
	if n := s.incoming.Load(); n != 0 {
		t.Errorf("%d bytes are counted as coming in", n)
	}
}

// What comes in any order, and is written over while it is hashed, is stored as it was at the end, and
// nothing else is.
func TestReceive(t *testing.T) {
	s := newStore(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<17) // 2 MiB
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	commit := p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepPinned}}}
	receive := func() *Receiver {
		t.Helper()
		r, err := s.Receive(t.Context(), task.Digest)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	write := func(r *Receiver, content []byte) {
		t.Helper()
		parts := slices.Collect(slices.Chunk(content, 100_000))
		for i := len(parts) - 1; i >= 0; i-- {
			if _, err := r.WriteAt(parts[i], int64(i)*100_000); err != nil {
				t.Fatal(err)
			}
		}
	}
	wrong := bytes.ToUpper(data)

	r := receive()
	write(r, wrong)
	if err := r.Advance(int64(len(wrong))); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(commit); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("commit of something else: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	requireNothingIncoming(t, s)

	r = receive()
	write(r, append(wrong, "more"...))
	if err := r.Advance(1 << 20); err != nil {
		t.Fatal(err)
	}
	r.Restart()
	if err := r.Truncate(int64(len(data))); err != nil {
		t.Fatal(err)
	}
	write(r, data)
	for _, end := range []int64{1000, 1 << 20, 1000, int64(len(data))} {
		if err := r.Advance(end); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Commit(commit); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	requireNothingIncoming(t, s)
	blob, err := s.Open(t.Context(), task, p2p.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	var got bytes.Buffer
	if err := blob.CopyRange(t.Context(), &got, 0, blob.Size(), nil); err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("stored are %d bytes, %v", got.Len(), err)
	}
}

// A Receiver that is given up, or whose store closes, leaves nothing.
func TestReceiveGivenUp(t *testing.T) {
	s := newStore(t)
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := s.Receive(ctx, digest.SHA256.FromString("data"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteAt([]byte("data"), 0); err != nil {
		t.Fatal(err)
	}
	cancel(gone)
	if err := r.Advance(4); !errors.Is(err, gone) {
		t.Errorf("advance: %v, want %v", err, gone)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	requireNothingIncoming(t, s)
	if r, err = s.Receive(t.Context(), digest.SHA256.FromString("data")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.WriteAt([]byte("data"), 0); err == nil {
		t.Error("it is written to a store that is closed")
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	requireNothingIncoming(t, s)
}
