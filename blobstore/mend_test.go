package blobstore_test

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/peertest"
)

// What is damaged here is mended by a peer, while it is read.
func TestMend(t *testing.T) {
	eachPeer(t, func(t *testing.T, e *peertest.Engine, r, theirs *blobstore.Repository) {
		data := bytesOf(1_000_000, 1)
		f := mustImport(t, theirs, "v1", data, "file")
		mustImport(t, r, "v1", data, "file")
		ways := map[string]func() ([]byte, error){
			"ExportFile": func() ([]byte, error) {
				got, _, err := exportedTo(t, r, "v1", blobstore.Lookup{})
				return got, err
			},
			"Export": func() ([]byte, error) {
				var out bytes.Buffer
				var last int64
				_, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{Progress: func(n int64) {
					if n <= last {
						t.Errorf("progress is %d after %d", n, last)
					}
					last = n
				}})
				if last != int64(out.Len()) {
					t.Errorf("progress ends at %d of %d bytes", last, out.Len())
				}
				return out.Bytes(), err
			},
			"Fetch": func() ([]byte, error) {
				in, err := r.Fetch(t.Context(),
					ocispec.Descriptor{MediaType: "application/octet-stream", Digest: f.Digest, Size: f.Size})
				if err != nil {
					return nil, err
				}
				defer in.Close()
				return io.ReadAll(struct{ io.Reader }{in})
			},
			"ReadAt from many": func() ([]byte, error) {
				in, err := r.Open(t.Context(), "v1", blobstore.Lookup{})
				if err != nil {
					return nil, err
				}
				defer in.Close()
				var reading sync.WaitGroup
				got, errs := make([]byte, in.Size()), make([]error, 4)
				for i := range errs {
					reading.Go(func() {
						part := got[i*len(got)/4 : (i+1)*len(got)/4]
						_, errs[i] = in.ReadAt(part, int64(i*len(got)/4))
					})
				}
				reading.Wait()
				return got, errors.Join(errs...)
			},
		}
		for name, read := range ways {
			for _, at := range []int64{0, 300_000, 999_999} {
				e.Damage(t, f.Digest, at)
				if got, _, err := exportedTo(t, r, "v1", local); !errors.Is(err, blobstore.ErrCorrupt) {
					t.Errorf("byte %d, on this host alone: %d bytes, %v", at, len(got), err)
				}
				if got, err := read(); err != nil || !bytes.Equal(got, data) {
					t.Errorf("byte %d, %s: %d bytes, %v", at, name, len(got), err)
				}
				if n := e.Calls("mend"); n != 1 {
					t.Errorf("byte %d, %s: a peer was asked %d times", at, name, n)
				}
				if got, _, err := exportedTo(t, r, "v1", local); err != nil || !bytes.Equal(got, data) {
					t.Errorf("byte %d, %s: what is here then: %d bytes, %v", at, name, len(got), err)
				}
			}
		}
		e.Damage(t, f.Digest, 7)
		e.Part()
		for name, read := range ways {
			if got, err := read(); !errors.Is(err, blobstore.ErrCorrupt) {
				t.Errorf("%s without a peer: %d bytes, %v", name, len(got), err)
			}
		}
	})
}
