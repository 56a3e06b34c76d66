package enginetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// create begins content of an ingest, which is closed with the test.
func create(t *testing.T, ctx context.Context, e p2p.Engine, opts p2p.AddOptions) (p2p.Ingest, p2p.Writer) {
	t.Helper()
	in, err := e.Ingest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	w, err := in.Create(opts)
	if err != nil {
		t.Fatal(err)
	}
	return in, w
}

func write(t *testing.T, w io.Writer, data []byte) {
	t.Helper()
	if n, err := w.Write(data); n != len(data) || err != nil {
		t.Fatalf("write of %d bytes: %d, %v", len(data), n, err)
	}
}

// testCreate: what is written is as what is read.
func testCreate(t *testing.T, e p2p.Engine) {
	for i, size := range sizes() {
		data := Content(size, uint64(i))
		for alg, opts := range map[digest.Algorithm]p2p.AddOptions{
			digest.SHA256: {},
			digest.SHA512: {Algorithm: digest.SHA512},
			digest.SHA384: {Want: digest.SHA384.FromBytes(data)},
		} {
			last := int64(0)
			opts.Progress = func(n int64) {
				if n < last || n > int64(size) {
					t.Errorf("progress goes from %d to %d of %d", last, n, size)
				}
				last = n
			}
			in, w := create(t, t.Context(), e, opts)
			part := make([]byte, max(size/3, 1))
			for rest := data; len(rest) > 0; rest = rest[min(len(part), len(rest)):] {
				write(t, w, part[:copy(part, rest)])
				clear(part) // it is the caller's
				write(t, w, nil)
			}
			added, err := w.Finish()
			if want := (p2p.Added{Digest: alg.FromBytes(data), Size: int64(size)}); err != nil || added != want {
				t.Fatalf("finish: %+v, %v; want %+v", added, err, want)
			}
			if last != int64(size) {
				t.Errorf("progress ends at %d of %d", last, size)
			}
			if _, err := w.Finish(); err == nil {
				t.Error("it can be finished twice")
			}
			task := p2p.Task{Tag: "t", Digest: added.Digest}
			requireMissing(t, e, task)
			if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}); err != nil {
				t.Fatal(err)
			}
			RequireContent(t, e, task, data)
		}
	}
}

// testCreateSeveral: one ingest takes in one after the other, however each of them comes.
func testCreateSeveral(t *testing.T, e p2p.Engine) {
	in, w := create(t, t.Context(), e, p2p.AddOptions{})
	write(t, w, []byte("first"))
	one, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	two, err := in.Add(bytes.NewReader([]byte("second")), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if w, err = in.Create(p2p.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	write(t, w, []byte("first"))
	again, err := w.Finish()
	if err != nil || again != one {
		t.Fatalf("the same again: %+v, %v", again, err)
	}
	other := digest.SHA512.FromString("first")
	if _, err := in.Rehash(one.Digest, other); err != nil {
		t.Fatal(err)
	}
	var c p2p.Commit
	for _, d := range []digest.Digest{other, two.Digest} {
		c.Tasks = append(c.Tasks, p2p.NewTask{Task: p2p.Task{Tag: "t", Digest: d}})
	}
	if err := in.Commit(c); err != nil {
		t.Fatal(err)
	}
	RequireContent(t, e, c.Tasks[0].Task, []byte("first"))
	RequireContent(t, e, c.Tasks[1].Task, []byte("second"))
}

// testCreateMismatch: other content than what is wanted is not added.
func testCreateMismatch(t *testing.T, e p2p.Engine) {
	held := Import(t, e, "t", []byte("held"))
	for _, want := range []digest.Digest{digest.SHA256.FromString("something else"), held.Digest} {
		in, w := create(t, t.Context(), e, p2p.AddOptions{Want: want})
		write(t, w, []byte("data"))
		_, err := w.Finish()
		got := digest.SHA256.FromString("data")
		if mismatch, ok := errors.AsType[*digest.MismatchError](err); !ok || mismatch.Want != want ||
			mismatch.Got != got {
			t.Errorf("finish: %v; want a mismatch of %s", err, want)
		}
		if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "t", Digest: got}}}}); err == nil {
			t.Error("the ingest can be committed after that")
		}
		requireMissing(t, e, p2p.Task{Tag: "t", Digest: got})
	}
	RequireContent(t, e, held, []byte("held"))
	in, err := e.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = in.Create(p2p.AddOptions{Want: "md5:0"})
	requireError(t, "create for a digest that is none", err, digest.ErrInvalid)
}

// testCreateUnfinished: nothing is done with an ingest until what it takes in is finished, and
// nothing is left of that when it is closed.
func testCreateUnfinished(t *testing.T, e p2p.Engine) {
	data := Content(digest.MinPieceLength+1, 1)
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromBytes(data)}
	for what, do := range map[string]func(p2p.Ingest) error{
		"an add": func(in p2p.Ingest) error {
			_, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
			return err
		},
		"a create":  func(in p2p.Ingest) error { _, err := in.Create(p2p.AddOptions{}); return err },
		"a rehash":  func(in p2p.Ingest) error { _, err := in.Rehash(task.Digest, task.Digest); return err },
		"a commit":  func(in p2p.Ingest) error { return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task}}}) },
		"no commit": func(in p2p.Ingest) error { return errors.New("nothing was done") },
	} {
		in, w := create(t, t.Context(), e, p2p.AddOptions{})
		write(t, w, data)
		if err := in.Room(1); err != nil {
			t.Errorf("room while something is taken in: %v", err)
		}
		if err := do(in); err == nil {
			t.Errorf("%s works before what was created is finished", what)
		}
		for range 2 {
			if err := in.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		if _, err := w.Write(data); err == nil {
			t.Error("more is taken in after the ingest is closed")
		}
		if _, err := w.Finish(); err == nil {
			t.Error("it can be finished after the ingest is closed")
		}
		requireMissing(t, e, task)
	}
	if left := list(t, e, nil); len(left) > 0 {
		t.Errorf("%q is left", left)
	}
}

// testCreateCancelled: it ends with the ingest's context.
func testCreateCancelled(t *testing.T, e p2p.Engine) {
	cause := errors.New("enough")
	for what, end := range map[string]func(p2p.Writer) error{
		"write":  func(w p2p.Writer) error { _, err := w.Write([]byte("more")); return err },
		"finish": func(w p2p.Writer) error { _, err := w.Finish(); return err },
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		in, w := create(t, ctx, e, p2p.AddOptions{})
		write(t, w, []byte("data"))
		cancel(cause)
		requireError(t, what+" after the context has ended", end(w), cause)
		if err := end(w); err == nil {
			t.Errorf("a second %s works", what)
		}
		if err := in.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		requireMissing(t, e, p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")})
	}
}

// testCreateClosed: an engine does not wait for what is not finished.
func testCreateClosed(t *testing.T, e p2p.Engine) {
	in, w := create(t, t.Context(), e, p2p.AddOptions{})
	write(t, w, []byte("data"))
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := w.Write([]byte("more"))
	requireError(t, "write", err, p2p.ErrClosed)
	if _, err := w.Finish(); err == nil {
		t.Error("it can be finished after that")
	}
	in.Close()
}
