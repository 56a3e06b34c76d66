package blobstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

type readFunc func(p []byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// deadlined is a reader that claims that its Read can be interrupted.
type deadlined struct{ io.Reader }

func (deadlined) SetReadDeadline(time.Time) error { panic("no deadlines") }

// entries are the ways in which a caller's reader comes into a store.
var entries = map[string]func(ctx context.Context, s *blobstore.Store, src io.Reader) error{
	"Import": func(ctx context.Context, s *blobstore.Store, src io.Reader) error {
		r, err := s.Repository("t")
		if err == nil {
			_, err = r.Import(ctx, "v1", src, blobstore.ImportOptions{})
		}
		return err
	},
	"Import of a digest": func(ctx context.Context, s *blobstore.Store, src io.Reader) error {
		r, err := s.Repository("t")
		if err == nil {
			_, err = r.Import(ctx, string(digest.SHA256.FromBytes([]byte("content"))), src, blobstore.ImportOptions{})
		}
		return err
	},
	"Push": func(ctx context.Context, s *blobstore.Store, src io.Reader) error {
		r, err := s.Repository("t")
		if err == nil {
			err = r.Push(ctx, ocispec.Descriptor{MediaType: "application/octet-stream",
				Digest: digest.SHA256.FromBytes([]byte("content")), Size: 7}, src)
		}
		return err
	},
	"PushReference of a manifest": func(ctx context.Context, s *blobstore.Store, src io.Reader) error {
		r, err := s.Repository("t")
		if err == nil {
			err = r.PushReference(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest,
				Digest: digest.SHA256.FromBytes([]byte("content")), Size: 7}, src, "v1")
		}
		return err
	},
	"Append": func(ctx context.Context, s *blobstore.Store, src io.Reader) error {
		r, err := s.Repository("t")
		if err != nil {
			return err
		}
		u, err := r.NewUpload(ctx, "")
		if err != nil {
			return err
		}
		defer u.Close()
		_, err = u.Append(src)
		return err
	},
}

// TestBadReaders: a reader of a caller that is none, panics, or lies is an error of the call
// that it was given to.
func TestBadReaders(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		panics := readFunc(func([]byte) (int, error) { panic("it broke") })
		for what, c := range map[string]struct {
			src  io.Reader
			says string
			is   error
		}{
			"nil":                     {nil, "no reader", blobstore.ErrInvalid},
			"a nil pointer":           {(*bytes.Reader)(nil), "the reader panicked", nil},
			"a nil file":              {(*os.File)(nil), "invalid argument", nil},
			"panics":                  {panics, "the reader panicked: it broke", nil},
			"panics, with a deadline": {deadlined{panics}, "the reader panicked: it broke", nil},
			"panics after some": {
				io.MultiReader(strings.NewReader("con"), panics), "the reader panicked: it broke", nil},
			"claims too much": {
				readFunc(func(p []byte) (int, error) { return len(p) + 1, nil }), "the reader claims", nil},
			"claims less than nothing": {
				readFunc(func([]byte) (int, error) { return -1, nil }), "the reader claims", nil},
			"lies, and has a deadline": {
				deadlined{readFunc(func([]byte) (int, error) { return -1, nil })}, "the reader claims", nil},
			"the writing end of a pipe": {writingEnd(t), "bad file descriptor", nil},
		} {
			for name, give := range entries {
				err := give(t.Context(), s, c.src)
				if err == nil || !strings.Contains(err.Error(), c.says) || c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("%s of one that is %s: %v, want %q", name, what, err, c.says)
				}
			}
		}
		r, err := s.Repository("t")
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(t.Name(), "Open") { // else it is Import itself that calls it
			_, err := r.Import(t.Context(), "v1", strings.NewReader("content"),
				blobstore.ImportOptions{Progress: func(int64) { panic("it broke") }})
			if err == nil || !strings.Contains(err.Error(), "panicked: it broke") {
				t.Errorf("progress that panics: %v", err)
			}
		}
		for _, err := range s.List(t.Context()) {
			t.Errorf("something is stored (%v)", err)
		}
		if _, err := r.Import(t.Context(), "v1", strings.NewReader("content"), blobstore.ImportOptions{}); err != nil {
			t.Errorf("a good one after all these: %v", err)
		}
		if _, err := r.Export(t.Context(), "v1", nil, blobstore.ExportOptions{}); !errors.Is(err,
			blobstore.ErrInvalid) {
			t.Errorf("export to no writer: %v", err)
		}
	})
}

func writingEnd(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return w
}

// TestCloseWhileReaderHangs: closing a store does not wait for a reader that gives
// nothing, and ends whoever waits for it.
func TestCloseWhileReaderHangs(t *testing.T) {
	for name, give := range entries {
		if name == "PushReference of a manifest" {
			continue // it is read before the store has to do with it
		}
		for kind, open := range stores {
			t.Run(name+" "+kind, func(t *testing.T) {
				s := open(t)
				hang, reads := make(chan struct{}), make(chan struct{}, 2)
				src := readFunc(func([]byte) (int, error) {
					reads <- struct{}{}
					<-hang
					return 0, io.EOF
				})
				ended := make(chan error, 1)
				go func() { ended <- give(context.Background(), s, src) }()
				<-reads
				waits := time.AfterFunc(10*time.Second, func() {
					t.Error("closing the store waits for the reader")
					close(hang)
				})
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
				if !waits.Stop() {
					return
				}
				if name == "Append" {
					close(hang) // it is read in the call itself
				}
				// Of an Append that has read all the end may be heard of at the next one only.
				if err := <-ended; !errors.Is(err, blobstore.ErrClosed) && (err != nil || name != "Append") {
					t.Errorf("got %v", err)
				}
				if name != "Append" {
					close(hang)
				}
			})
		}
	}
}

// TestCancelWhilePipeHangs: a pipe that this process was started with can't be
// interrupted, and does not keep a call from ending with its context either.
func TestCancelWhilePipeHangs(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		for name, give := range entries {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			_ = r.Fd() // it blocks from now on
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			if name == "Append" {
				time.AfterFunc(20*time.Millisecond, func() { w.Close() }) // it is read in the call itself
			}
			waits := time.AfterFunc(10*time.Second, func() {
				t.Errorf("%s waits for the pipe", name)
				w.Close()
			})
			if err := give(ctx, s, r); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
			stopped := waits.Stop()
			w.Close()
			r.Close()
			if !stopped {
				return
			}
		}
	})
}
