package storagetest

import (
	"bytes"
	"context"
	_ "crypto/sha256" // registers sha256 with go-digest
	_ "crypto/sha512" // registers sha384 and sha512 with go-digest
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
)

func (s *suite) testRoundTrip(t *testing.T, target oras.Target) {
	for seed, size := range []int{0, 1, 1000, 64 << 10, 1<<20 + 1, 5 << 20} {
		data := bytesOf(size, byte(seed))
		for _, alg := range algorithms {
			d := describe(data)
			d.Digest = alg.FromBytes(data)
			requireExists(t, target, d, false)
			mustPush(t, target, d, data)
			requireExists(t, target, d, true)
			for range 2 {
				RequireContent(t, target, d, data)
			}
		}
	}
}

// testReaders pushes from readers of all manners, and tries out what a fetched
// one can do.
func (s *suite) testReaders(t *testing.T, target oras.Target) {
	for i, wrap := range []func(io.Reader) io.Reader{
		func(r io.Reader) io.Reader { return r },
		func(r io.Reader) io.Reader { return struct{ io.Reader }{r} },
		iotest.DataErrReader, // the last bytes come with io.EOF
		iotest.HalfReader,
		iotest.OneByteReader,
		func(r io.Reader) io.Reader { return io.MultiReader(r, strings.NewReader("")) },
	} {
		data := bytesOf(3000, byte(i))
		d := describe(data)
		if err := target.Push(t.Context(), d, wrap(bytes.NewReader(data))); err != nil {
			t.Fatalf("push from reader %d: %v", i, err)
		}
		RequireContent(t, target, d, data)
		fetched, err := target.Fetch(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if r, ok := fetched.(io.ReadSeeker); ok {
			if err := iotest.TestReader(r, data); err != nil {
				t.Error(err)
			}
			if _, err := r.Seek(1000, io.SeekStart); err != nil {
				t.Error(err)
			}
		} else if _, err := io.CopyN(io.Discard, fetched, 1000); err != nil {
			t.Error(err)
		}
		var rest bytes.Buffer
		if _, err := io.Copy(&rest, fetched); err != nil || !bytes.Equal(rest.Bytes(), data[1000:]) {
			t.Errorf("copied %d bytes from offset 1000 on, %v", rest.Len(), err)
		}
		if err := fetched.Close(); err != nil {
			t.Error(err)
		}
	}
}

func (s *suite) testNotFound(t *testing.T, target oras.Target) {
	d := describe([]byte("hello, world"))
	requireExists(t, target, d, false)
	_, err := target.Fetch(t.Context(), d)
	requireError(t, "fetch", err, errdef.ErrNotFound)
	_, err = target.Resolve(t.Context(), "absent")
	requireError(t, "resolve a tag", err, errdef.ErrNotFound)
	_, err = target.Resolve(t.Context(), d.Digest.String())
	requireError(t, "resolve a digest", err, errdef.ErrNotFound)
	requireError(t, "tag", target.Tag(t.Context(), d, "new"), errdef.ErrNotFound)
	_, err = target.Resolve(t.Context(), "new")
	requireError(t, "resolve a tag that was refused", err, errdef.ErrNotFound)
	if target, ok := target.(content.Deleter); ok {
		requireError(t, "delete", target.Delete(t.Context(), d), errdef.ErrNotFound)
	}
	if target, ok := target.(content.Untagger); ok {
		requireError(t, "untag", target.Untag(t.Context(), "absent"), errdef.ErrNotFound)
	}
	if target, ok := target.(content.PredecessorFinder); ok {
		found, err := target.Predecessors(t.Context(), d)
		if err != nil || len(found) != 0 {
			t.Errorf("predecessors: %v, %v; want none", found, err)
		}
	}
	if target, ok := target.(registry.ReferenceFetcher); ok {
		for _, reference := range []string{"absent", d.Digest.String()} {
			_, _, err := target.FetchReference(t.Context(), reference)
			requireError(t, "fetch "+reference, err, errdef.ErrNotFound)
		}
	}
}

// unread is a reader that has to be left alone.
type unread struct{ t *testing.T }

func (r unread) Read([]byte) (int, error) {
	r.t.Error("the content of a push was read")
	return 0, errors.New("not to be read")
}

func (s *suite) testDuplicate(t *testing.T, target oras.Target) {
	data := []byte("hello, world")
	g := graph{}
	g.add("application/x-test", data)
	g.add("application/x-test", nil)
	g.image(g.nodes[0].Descriptor)
	g.index(g.nodes[2].Descriptor)
	g.push(t, target)
	for range 2 {
		for _, n := range g.nodes {
			requireError(t, "push again", target.Push(t.Context(), n.Descriptor, unread{t}), errdef.ErrAlreadyExists)
		}
	}
	g.requireHeld(t, target)
}

// badPush is a push that has to fail.
type badPush struct {
	what string
	d    ocispec.Descriptor
	src  io.Reader
	want error // nil for any
}

// badPushes returns pushes of data that have to fail. Where they do, d stays absent.
func badPushes(d ocispec.Descriptor, data []byte) []badPush {
	half := bytes.NewReader(data[:len(data)/2])
	other := bytes.Clone(data)
	other[0] ^= 1
	longer, shorter := d, d
	longer.Size++
	shorter.Size--
	negative, prefix := d, d
	negative.Size = -1
	prefix.Size, prefix.Digest = d.Size/2, digest.FromBytes(data[:d.Size/2])
	broken := errors.New("the source is broken")
	return []badPush{
		{"nothing", d, strings.NewReader(""), io.ErrUnexpectedEOF},
		{"short", d, half, io.ErrUnexpectedEOF},
		{"short for its descriptor", longer, bytes.NewReader(data), io.ErrUnexpectedEOF},
		{"long", d, io.MultiReader(bytes.NewReader(data), strings.NewReader("x")), content.ErrTrailingData},
		{"long, in one read", d, bytes.NewReader(append(bytes.Clone(data), "more"...)), content.ErrTrailingData},
		{"long for its descriptor", shorter, bytes.NewReader(data), nil}, // also not its digest
		{"long, with the digest of its beginning", prefix, bytes.NewReader(data), content.ErrTrailingData},
		{"other content", d, bytes.NewReader(other), content.ErrMismatchedDigest},
		{"a negative size", negative, bytes.NewReader(data), nil},
		{"a source that fails", d, io.MultiReader(bytes.NewReader(data[:3]), iotest.ErrReader(broken)), broken},
		{"a source that fails at once", d, iotest.ErrReader(broken), broken},
		{"a source that fails at its end", d, io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken)), nil},
	}
}

func (s *suite) testBadPush(t *testing.T, target oras.Target) {
	g := graph{}
	g.add("application/x-test", bytesOf(5000, 1))
	g.add(ocispec.MediaTypeImageLayerGzip, bytesOf(3<<20, 2))
	g.index()
	for _, n := range g.nodes {
		for _, c := range badPushes(n.Descriptor, n.data) {
			err := target.Push(t.Context(), c.d, c.src)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || errors.Is(err, errdef.ErrAlreadyExists) {
				t.Errorf("push of %s, with %s: %v; want %v", n.MediaType, c.what, err, c.want)
			}
			s.requireAbsent(t, target, c.d)
			s.requireAbsent(t, target, n.Descriptor)
		}
		mustPush(t, target, n.Descriptor, n.data)
		RequireContent(t, target, n.Descriptor, n.data)
	}
	empty := describe(nil)
	requireError(t, "push of more than nothing", target.Push(t.Context(), empty, strings.NewReader("x")),
		content.ErrTrailingData)
	s.requireAbsent(t, target, empty)
}

// requireAbsent fails the test unless nothing is there, as far as can be seen.
func (s *suite) requireAbsent(t *testing.T, target oras.Target, d ocispec.Descriptor) {
	t.Helper()
	requireExists(t, target, d, false)
	_, err := target.Fetch(t.Context(), d)
	requireError(t, "fetch of what was refused", err, errdef.ErrNotFound)
	_, err = target.Resolve(t.Context(), d.Digest.String())
	requireError(t, "resolve of what was refused", err, errdef.ErrNotFound)
}

func (s *suite) testBadManifest(t *testing.T, target oras.Target) {
	for i, mediaType := range []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, mediaTypeArtifact} {
		for _, text := range []string{"", "not JSON", "[]", `{"layers":`, `{"layers":{},"manifests":{},"blobs":{}}`} {
			data := []byte(text + strings.Repeat(" ", i)) // to be of its type only
			d := content.NewDescriptorFromBytes(mediaType, data)
			if err := target.Push(t.Context(), d, bytes.NewReader(data)); err == nil ||
				errors.Is(err, errdef.ErrAlreadyExists) {
				t.Errorf("push of %q as %s: %v", data, mediaType, err)
			}
			if !s.opts.KeepsBadManifests {
				s.requireAbsent(t, target, d)
			}
		}
	}
}

func (s *suite) testBadDigest(t *testing.T, target oras.Target) {
	data := []byte("hello, world")
	for _, bad := range []digest.Digest{
		"", "invalid-digest", "sha256:", "sha256:abc", "sha256:../../../../etc/passwd",
		digest.Digest("sha256:" + strings.Repeat("A", 64)), digest.Digest("sha256:" + strings.Repeat("a", 65)),
		digest.Digest("sha1:" + strings.Repeat("a", 40)), digest.Digest("md5:" + strings.Repeat("a", 32)),
	} {
		d := describe(data)
		d.Digest = bad
		invalid, absent := errdef.ErrInvalidDigest, errdef.ErrInvalidDigest
		if s.opts.UncheckedDigests {
			invalid, absent = nil, errdef.ErrNotFound
		}
		if err := target.Push(t.Context(), d, bytes.NewReader(data)); err == nil ||
			invalid != nil && !errors.Is(err, invalid) {
			t.Errorf("push as %q: %v", bad, err)
		}
		exists, err := target.Exists(t.Context(), d)
		if exists || !errors.Is(err, invalid) {
			t.Errorf("exists(%q) is %t, %v; want %v", bad, exists, err, invalid)
		}
		_, err = target.Fetch(t.Context(), d)
		requireError(t, "fetch", err, absent)
		requireError(t, "tag", target.Tag(t.Context(), d, "tag"), absent)
		if target, ok := target.(content.PredecessorFinder); ok {
			if found, err := target.Predecessors(t.Context(), d); err != nil || len(found) != 0 {
				t.Errorf("predecessors of %q: %v, %v", bad, found, err)
			}
		}
		if target, ok := target.(content.Deleter); ok {
			requireError(t, "delete", target.Delete(t.Context(), d), absent)
		}
		if target, ok := target.(registry.ReferencePusher); ok {
			requireError(t, "push with a tag", target.PushReference(t.Context(), d, bytes.NewReader(data), "tag"),
				absent)
		}
	}
}

// testOtherDescriptor asks for content by its digest, with another size and media type.
func (s *suite) testOtherDescriptor(t *testing.T, target oras.Target) {
	data := []byte("hello, world")
	d := describe(data)
	mustPush(t, target, d, data)
	for _, other := range []ocispec.Descriptor{
		{MediaType: "application/x-other", Digest: d.Digest, Size: d.Size},
		{MediaType: d.MediaType, Digest: d.Digest, Size: 3},
		{MediaType: d.MediaType, Digest: d.Digest, Size: 1 << 40},
		{Digest: d.Digest},
	} {
		requireExists(t, target, other, !s.opts.KeyedByDescriptor)
		if s.opts.KeyedByDescriptor {
			continue
		}
		requireError(t, "push", target.Push(t.Context(), other, unread{t}), errdef.ErrAlreadyExists)
		fetched, err := target.Fetch(t.Context(), other)
		if err != nil {
			t.Errorf("fetch as %+v: %v", other, err)
			continue
		}
		// Size is only what the caller believes: nothing is cut off or added.
		if got, err := io.ReadAll(fetched); err != nil || !bytes.Equal(got, data) {
			t.Errorf("fetch as %+v: %q, %v", other, got, err)
		}
		fetched.Close()
	}
	annotated := d
	annotated.Annotations = map[string]string{"a": "b"}
	requireExists(t, target, annotated, true)
	RequireContent(t, target, annotated, data)
}

// operations are calls that all have to fail when their context has ended.
func operations(target oras.Target, d ocispec.Descriptor, tag string) map[string]func(context.Context) error {
	absent := describe([]byte("absent"))
	ops := map[string]func(context.Context) error{
		"push": func(ctx context.Context) error {
			return target.Push(ctx, absent, strings.NewReader("absent"))
		},
		"push of what is there": func(ctx context.Context) error { return target.Push(ctx, d, strings.NewReader("")) },
		"exists":                func(ctx context.Context) error { _, err := target.Exists(ctx, d); return err },
		"fetch":                 func(ctx context.Context) error { _, err := target.Fetch(ctx, d); return err },
		"resolve":               func(ctx context.Context) error { _, err := target.Resolve(ctx, tag); return err },
		"tag":                   func(ctx context.Context) error { return target.Tag(ctx, d, "new") },
	}
	if target, ok := target.(content.Deleter); ok {
		ops["delete"] = func(ctx context.Context) error { return target.Delete(ctx, d) }
	}
	if target, ok := target.(content.Untagger); ok {
		ops["untag"] = func(ctx context.Context) error { return target.Untag(ctx, tag) }
	}
	if target, ok := target.(content.PredecessorFinder); ok {
		ops["predecessors"] = func(ctx context.Context) error { _, err := target.Predecessors(ctx, d); return err }
	}
	if target, ok := target.(registry.TagLister); ok {
		ops["tags"] = func(ctx context.Context) error {
			return target.Tags(ctx, "", func([]string) error { return nil })
		}
	}
	if target, ok := target.(registry.ReferrerLister); ok {
		ops["referrers"] = func(ctx context.Context) error {
			return target.Referrers(ctx, d, "", func([]ocispec.Descriptor) error { return nil })
		}
	}
	if target, ok := target.(registry.ReferenceFetcher); ok {
		ops["fetch by reference"] = func(ctx context.Context) error {
			_, _, err := target.FetchReference(ctx, tag)
			return err
		}
	}
	if target, ok := target.(registry.ReferencePusher); ok {
		ops["push with a tag"] = func(ctx context.Context) error {
			return target.PushReference(ctx, absent, strings.NewReader("absent"), "new")
		}
	}
	return ops
}

func (s *suite) testContextOver(t *testing.T, target oras.Target) {
	if s.opts.IgnoresContext {
		t.Skip("the store ignores contexts")
	}
	data := []byte("hello, world")
	d := describe(data)
	mustPush(t, target, d, data)
	mustTag(t, target, d, "tag")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	for what, op := range operations(target, d, "tag") {
		requireError(t, what, op(cancelled), context.Canceled)
		requireError(t, what, op(late), context.DeadlineExceeded)
	}
	RequireContent(t, target, d, data)
	requireResolves(t, target, "tag", d)
	_, err := target.Resolve(t.Context(), "new")
	requireError(t, "resolve of what was not tagged", err, errdef.ErrNotFound)
	s.requireAbsent(t, target, describe([]byte("absent")))
}

// stuckReader gives what it has, and then blocks until it is released.
type stuckReader struct {
	data    *bytes.Reader
	once    sync.Once
	stuck   chan struct{} // closed when it blocks
	release chan struct{}
}

func newStuckReader(data []byte) *stuckReader {
	return &stuckReader{data: bytes.NewReader(data), stuck: make(chan struct{}), release: make(chan struct{})}
}

func (r *stuckReader) Read(p []byte) (int, error) {
	n, err := r.data.Read(p)
	if err == nil {
		return n, nil
	}
	r.once.Do(func() { close(r.stuck) })
	<-r.release
	return 0, errors.New("released")
}

// testContextEndsInPush: a push whose source blocks ends with its context, and
// leaves nothing.
func (s *suite) testContextEndsInPush(t *testing.T, target oras.Target) {
	if s.opts.IgnoresContext {
		t.Skip("the store ignores contexts")
	}
	g := graph{}
	g.add("application/x-test", bytesOf(3<<20, 1))
	g.index()
	pushes := map[string]func(context.Context, ocispec.Descriptor, io.Reader) error{"Push": target.Push}
	if target, ok := target.(registry.ReferencePusher); ok {
		pushes["PushReference"] = func(ctx context.Context, d ocispec.Descriptor, src io.Reader) error {
			return target.PushReference(ctx, d, src, "tag")
		}
	}
	for name, push := range pushes {
		for _, n := range g.nodes {
			ctx, cancel := context.WithCancel(t.Context())
			src := newStuckReader(n.data[:len(n.data)/2])
			ended := make(chan error)
			go func() { ended <- push(ctx, n.Descriptor, src) }()
			<-src.stuck
			cancel()
			requireError(t, name, <-ended, context.Canceled)
			close(src.release)
			s.requireAbsent(t, target, n.Descriptor)

			// A connection, whose reads can be interrupted.
			ctx, cancel = context.WithCancel(t.Context())
			here, there := net.Pipe()
			go func() { ended <- push(ctx, n.Descriptor, here) }()
			there.Write(n.data[:len(n.data)/2])
			cancel()
			requireError(t, name+" from a connection", <-ended, context.Canceled)
			here.Close()
			there.Close()
			s.requireAbsent(t, target, n.Descriptor)
		}
	}
	_, err := target.Resolve(t.Context(), "tag")
	requireError(t, "resolve of what was not tagged", err, errdef.ErrNotFound)
	g.push(t, target)
	g.requireHeld(t, target)
}

const concurrency = 64

func (s *suite) testConcurrentPush(t *testing.T, target oras.Target) {
	g := graph{}
	g.add("application/x-test", []byte("hello, world"))
	g.add("application/x-test", bytesOf(1<<20, 1))
	g.index()
	for _, n := range g.nodes {
		errs := make([]error, concurrency)
		concurrently(concurrency, func(i int) {
			errs[i] = target.Push(t.Context(), n.Descriptor, bytes.NewReader(n.data))
		})
		pushed := 0
		for _, err := range errs {
			if err == nil {
				pushed++
			} else if !errors.Is(err, errdef.ErrAlreadyExists) {
				t.Errorf("one of %d pushes: %v", concurrency, err)
			}
		}
		if pushed == 0 {
			t.Errorf("none of %d pushes of a new blob stored it", concurrency)
		}
	}
	g.requireHeld(t, target)
}

// testConcurrentBadPush: whoever pushes wrong content under the same digest
// disturbs nobody.
func (s *suite) testConcurrentBadPush(t *testing.T, target oras.Target) {
	data := bytesOf(300_000, 1)
	d := describe(data)
	concurrently(concurrency, func(i int) {
		src, good := bytes.NewReader(data), i%2 == 0
		if !good {
			other := bytes.Clone(data)
			other[i] ^= 1
			src = bytes.NewReader(other)
		}
		err := target.Push(t.Context(), d, src)
		if errors.Is(err, errdef.ErrAlreadyExists) || good && err == nil ||
			!good && errors.Is(err, content.ErrMismatchedDigest) {
			return
		}
		t.Errorf("push of right content %t: %v", good, err)
	})
	RequireContent(t, target, d, data)
}

func (s *suite) testConcurrentFetch(t *testing.T, target oras.Target) {
	for _, size := range []int{11, 1 << 20} {
		data := bytesOf(size, 1)
		d := describe(data)
		mustPush(t, target, d, data)
		concurrently(concurrency, func(int) { RequireContent(t, target, d, data) })
	}
}

// testConcurrentAll does everything at once, on content of each one's own and
// on one that all share.
func (s *suite) testConcurrentAll(t *testing.T, target oras.Target) {
	shared := []byte("shared")
	config := describe(shared)
	graphs := make([]graph, concurrency)
	images := make([]ocispec.Descriptor, concurrency)
	tag := func(i int) string { return fmt.Sprintf("tag-%d", i) }
	concurrently(concurrency, func(i int) {
		g := &graphs[i]
		images[i] = g.image(config, g.layer(fmt.Sprintf("layer %d", i)))
		if err := target.Push(t.Context(), config, bytes.NewReader(shared)); err != nil &&
			!errors.Is(err, errdef.ErrAlreadyExists) {
			t.Errorf("push of what all push: %v", err)
		}
		for _, n := range g.nodes {
			if err := target.Push(t.Context(), n.Descriptor, bytes.NewReader(n.data)); err != nil {
				t.Errorf("push: %v", err)
			}
		}
		if err := target.Tag(t.Context(), images[i], tag(i)); err != nil {
			t.Errorf("tag: %v", err)
		}
		requireResolves(t, target, tag(i), images[i])
	})
	concurrently(concurrency, func(i int) {
		if deleter, ok := target.(content.Deleter); ok && i%2 == 1 {
			if err := deleter.Delete(t.Context(), images[i]); err != nil {
				t.Errorf("delete: %v", err)
			}
			_, err := target.Resolve(t.Context(), tag(i))
			requireError(t, "resolve of a deleted tag", err, errdef.ErrNotFound)
			return
		}
		requireResolves(t, target, tag(i), images[i])
		graphs[i].requireHeld(t, target)
		RequireContent(t, target, config, shared)
	})
}
