package blobstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/jsonlimit"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/source"
)

// The methods in this file make a Repository what oras-go calls a target. Their
// errors match the names of this package and those of oras-go (errdef, content).

// ociError makes an error match what oras-go calls the same.
type ociError struct {
	error
	is []error
}

func (e *ociError) Unwrap() []error { return e.is }

// toOCI adds oras-go's names to an error.
func toOCI(err error) error {
	if err == nil {
		return nil
	}
	e := &ociError{err, []error{err}}
	for _, n := range []struct{ ours, theirs error }{
		{ErrNotFound, errdef.ErrNotFound},
		{ErrMismatch, content.ErrMismatchedDigest},
	} {
		if errors.Is(err, n.ours) && !errors.Is(err, n.theirs) {
			e.is = append(e.is, n.theirs)
		}
	}
	if len(e.is) == 1 {
		return err
	}
	return e
}

// checkTarget reports a descriptor that can't be one of content.
func checkTarget(d ocispec.Descriptor) error {
	if _, err := digest.Parse(string(d.Digest)); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalidDigest, err)
	}
	return nil
}

// parseReference reads a reference: a tag, which is a cache ID, or a digest.
func parseReference(reference string) (digest.CID, error) {
	if reference == "" {
		return digest.CID{}, fmt.Errorf(
			"reference: %w: %w: pass a tag or a digest", errdef.ErrMissingReference, ErrInvalid)
	}
	cid, err := digest.ParseCID(reference)
	if err != nil {
		return digest.CID{}, fmt.Errorf("%w: %w", errdef.ErrInvalidReference, err)
	}
	return cid, nil
}

// descriptorOf describes a task as OCI does.
func descriptorOf(info p2p.Info) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: info.MediaType, Digest: info.Task.Digest, Size: info.Size}
	if d.MediaType == "" {
		d.MediaType = blobMediaType
	}
	return d
}

// Exists implements [content.ReadOnlyStorage]. Content is what its digest says:
// the size of target has no say in it, nor has its media type, but for one
// thing. A manifest is there where it was stored as one of that type: it then holds
// what it refers to, as whoever skips a copy of it expects.
//
// Content of which is known that it is damaged is not there, so that it is
// pushed again; nor is a manifest that has lost a part, by such damage or by a
// forced delete. Nor is what only peers could have, where none can be asked:
// pushing has to work on a host that is on its own.
//
// What Exists has said is there stays for as long as an upload may take, for the
// manifest that is to refer to it, also when others that do are deleted.
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) Exists(ctx context.Context, target ocispec.Descriptor) (bool, error) {
	if err := checkTarget(target); err != nil {
		return false, err
	}
	return r.has(ctx, target, p2p.Network)
}

// has reports whether target is there, as Exists does, within scope. On this host
// that is all of it: what is arriving may never do so.
func (r *Repository) has(ctx context.Context, target ocispec.Descriptor, scope p2p.Scope) (bool, error) {
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(target.Digest), p2p.StatOptions{Scope: scope, Lease: true})
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt), errors.Is(err, ErrUnreachable):
		return false, nil
	case err != nil:
		return false, err
	}
	if scope == p2p.Local && !info.Local() {
		return false, nil
	}
	if !manifest.IsType(target.MediaType) {
		return true, nil
	}
	if info.IsManifest && !info.Remote && info.MediaType != target.MediaType {
		return false, nil // it is pushed, and refused, as something else
	}
	return info.IsManifest && len(info.Lacks) == 0, nil
}

// Blob describes content to a client that need not push it then. It fails with
// [ErrNotFound] where [Repository.Exists] would say that it is not there, and keeps
// it as that does.
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) Blob(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(d), p2p.StatOptions{Lease: true})
	if err != nil {
		return ocispec.Descriptor{}, toOCI(fmt.Errorf("blob: %w", notWhole(err)))
	}
	return descriptorOf(info), nil
}

// notWhole says of what is damaged that it is not there: the client is to send it.
func notWhole(err error) error {
	if errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("%w: %v", ErrNotFound, err)
	}
	return err
}

// Fetch implements [content.Fetcher]. What it returns is a [*Reader], which
// seeks, reads anywhere, and verifies what it hands out. The error matches
// [errdef.ErrNotFound] where the content is not there.
//
// What only the swarm has is fetched, and kept on this host.
func (r *Repository) Fetch(ctx context.Context, target ocispec.Descriptor) (io.ReadCloser, error) {
	blob, err := r.OpenBlob(ctx, target.Digest)
	if err != nil {
		return nil, err
	}
	return blob, nil
}

// OpenBlob opens content for reading, by its digest. The error matches
// [errdef.ErrNotFound] where it is not there. The caller closes the Reader.
//
// What only the swarm has is fetched, and kept on this host.
func (r *Repository) OpenBlob(ctx context.Context, d digest.Digest) (*Reader, error) {
	if err := checkTarget(ocispec.Descriptor{Digest: d}); err != nil {
		return nil, err
	}
	blob, err := r.open(ctx, d, p2p.Network)
	if err != nil {
		return nil, toOCI(fmt.Errorf("fetch: %w", err))
	}
	return newReader(blob, File{CID: d.String(), Tag: r.tag, Digest: d, Size: blob.Size()}), nil
}

// FetchReference implements [oras.land/oras-go/v2/registry.ReferenceFetcher].
//
// What only the swarm has is fetched, and kept on this host.
func (r *Repository) FetchReference(ctx context.Context, reference string) (ocispec.Descriptor, io.ReadCloser, error) {
	for attempt := 1; ; attempt++ {
		target, err := r.Resolve(ctx, reference)
		if err != nil {
			return ocispec.Descriptor{}, nil, err
		}
		content, err := r.Fetch(ctx, target)
		// Where the reference has been moved meanwhile, there is another one.
		if errors.Is(err, ErrNotFound) && attempt < findAttempts {
			continue
		}
		return target, content, err
	}
}

// Resolve implements [content.Resolver]: reference is a tag or a digest, of a
// manifest or any other content. Of a tag that was made on this host the result has the annotations, the
// platform and the artifact type of the descriptor it was made with, where these are not more than 256
// annotations and 16 KiB together.
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) Resolve(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	cid, err := parseReference(reference)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	info, err := r.engine.Stat(ctx, r.tag, cid, p2p.StatOptions{})
	if err != nil {
		return ocispec.Descriptor{}, toOCI(fmt.Errorf("resolve: %w", err))
	}
	d := descriptorOf(info)
	addDescription(&d, info.Description)
	return d, nil
}

// described is what a descriptor says beside what the content has, of a tag.
type described struct {
	ArtifactType string            `json:"artifactType,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	Platform     *ocispec.Platform `json:"platform,omitempty"`
}

// maxAnnotations is how many annotations are kept of a descriptor that is tagged, and other elements.
const maxAnnotations = 256

// describe returns what is kept of a descriptor that is tagged. Where it is too much, that is nothing.
func describe(d ocispec.Descriptor) []byte {
	data, err := json.Marshal(described{d.ArtifactType, d.Annotations, d.Platform})
	if err != nil || len(data) > p2p.MaxDescription || len(d.Annotations) > maxAnnotations {
		return []byte("{}")
	}
	return data
}

// addDescription adds to d what was kept of the descriptor that was tagged.
func addDescription(d *ocispec.Descriptor, data []byte) {
	var said described
	// One that is not of this program's making is not worth an error.
	if len(data) > 0 && jsonlimit.Unmarshal(data, &said, 2*maxAnnotations) == nil {
		d.ArtifactType, d.Annotations, d.Platform = said.ArtifactType, said.Annotations, said.Platform
	}
}

// Push implements [content.Pusher]: it stores what src has, which has to be as
// expected says, and returns when it is durable.
//
// Where the content is there already, Push reads nothing and the error matches
// [errdef.ErrAlreadyExists]. What is too short fails with
// [io.ErrUnexpectedEOF], what is too long with [content.ErrTrailingData], what
// has another digest with [content.ErrMismatchedDigest], as does a file that is written to
// meanwhile, where that was read, and what has no room with [ErrNoSpace], before src is read
// where that can be told; then nothing is stored, nor when ctx ends before all of src has been
// read. Where it ends later, the content may be stored by the time. Of concurrent pushes of the
// same content each ends with nil or ErrAlreadyExists.
//
// Content with the media type of a manifest is one: it holds what it refers to,
// which may come later. Where it is there as a manifest of another type, or can't be one of that
// type, the error matches [ErrInvalid]. Other content is kept until a manifest refers to it,
// and then for as long as one does.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) Push(ctx context.Context, expected ocispec.Descriptor, src io.Reader) error {
	if err := checkTarget(expected); err != nil {
		return err
	}
	switch exists, err := r.has(ctx, expected, p2p.Local); {
	case err != nil:
		return fmt.Errorf("push: %w", err)
	case exists:
		return fmt.Errorf("push: %s: %w", expected.Digest, errdef.ErrAlreadyExists)
	}
	if err := r.push(ctx, expected, src, nil); err != nil {
		return toOCI(fmt.Errorf("push: %w", err))
	}
	return nil
}

// PushBlob stores what src has as Push does, but takes it in also where it is there
// already, and so makes good what is damaged.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) PushBlob(ctx context.Context, d digest.Digest, size int64, src io.Reader) error {
	expected := ocispec.Descriptor{MediaType: blobMediaType, Digest: d, Size: size}
	if err := checkTarget(expected); err != nil {
		return err
	}
	if err := r.push(ctx, expected, src, nil); err != nil {
		return toOCI(fmt.Errorf("push: %w", err))
	}
	return nil
}

// PushReference implements [oras.land/oras-go/v2/registry.ReferencePusher]: it
// stores a manifest and tags it, in one step. A manifest that is there already
// is only tagged. With its own digest as reference it gets no tag.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) PushReference(
	ctx context.Context, expected ocispec.Descriptor, src io.Reader, reference string,
) error {
	if err := checkTarget(expected); err != nil {
		return err
	}
	names, err := r.names(expected.Digest, reference)
	if err != nil {
		return err
	}
	for i := range names {
		names[i].Description = describe(expected)
	}
	exists, err := r.has(ctx, expected, p2p.Local)
	if err != nil {
		return fmt.Errorf("push: %w", err)
	}
	if exists {
		err = r.Tag(ctx, expected, reference)
	}
	if !exists || errors.Is(err, ErrNotFound) { // or it has been deleted just now
		err = r.push(ctx, expected, src, names)
	}
	if err != nil {
		return toOCI(fmt.Errorf("push: %w", err))
	}
	return nil
}

// names makes names of references, which point to nothing yet. Each has to be a
// tag, or d, the digest of the content that it is for, which goes without a name.
func (r *Repository) names(d digest.Digest, references ...string) ([]p2p.NewName, error) {
	var names []p2p.NewName
	for _, reference := range references {
		cid, err := parseReference(reference)
		switch {
		case err != nil:
			return nil, err
		case cid.CacheID() != "":
			names = append(names, p2p.NewName{Tag: r.tag, Name: reference, KeepOld: true})
		case cid.Digest() != d:
			return nil, fmt.Errorf("reference %s: %w: %w: it is a digest, want a tag", reference,
				errdef.ErrInvalidReference, ErrInvalid)
		}
	}
	return names, nil
}

// push stores content and points names to it.
func (r *Repository) push(ctx context.Context, expected ocispec.Descriptor, src io.Reader, names []p2p.NewName) error {
	if expected.Size < 0 {
		return fmt.Errorf("%w: %d: %w", content.ErrInvalidDescriptorSize, expected.Size, ErrInvalid)
	}
	if err := checkMediaType(expected.MediaType); err != nil {
		return err
	}
	if err := source.Check(src); err != nil {
		return err
	}
	if manifest.IsType(expected.MediaType) {
		if expected.Size > MaxManifest {
			return fmt.Errorf("manifest %s: %w: %w: it has %d bytes, the limit is %d", expected.Digest,
				errdef.ErrSizeExceedsLimit, ErrInvalid, expected.Size, MaxManifest)
		}
		data, err := readAll(ctx, sized(ctx, src, expected.Size), expected.Size)
		if err != nil {
			return err
		}
		_, err = r.pushManifest(ctx, data,
			manifestPush{mediaType: expected.MediaType, want: expected.Digest, names: names})
		return err
	}
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := in.Room(expected.Size); err != nil {
		// What is here already, maybe under another tag, needs none.
		if _, missing := r.tagWith(ctx, expected.Digest, ""); missing != nil {
			return err
		}
	}
	if _, err := in.Add(sized(ctx, src, expected.Size), p2p.AddOptions{Want: expected.Digest}); err != nil {
		return err
	}
	return in.Commit(r.blobCommit(expected.Digest, expected.MediaType, names))
}

// blobCommit makes content visible that is no manifest.
func (r *Repository) blobCommit(d digest.Digest, mediaType string, names []p2p.NewName) p2p.Commit {
	if mediaType == "" {
		mediaType = blobMediaType
	}
	return p2p.Commit{
		Tasks: []p2p.NewTask{{Task: r.task(d), MediaType: mediaType, Keep: p2p.KeepUntilReferred}},
		Names: pointing(names, d),
	}
}

// pointing makes names point to d, and returns them.
func pointing(names []p2p.NewName, d digest.Digest) []p2p.NewName {
	for i := range names {
		names[i].Digest = d
	}
	return names
}

// readAll reads src, which has size bytes. A Read that blocks does not keep it
// from returning when ctx ends.
func readAll(ctx context.Context, src io.Reader, size int64) ([]byte, error) {
	interrupt := source.Interruptor(src)
	src = source.Guard(ctx, src)
	if interrupt != nil {
		defer context.AfterFunc(ctx, interrupt)()
		data, err := readSized(src, size)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return data, err
	}
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		data, err := readSized(src, size)
		done <- result{data, err}
	}()
	select {
	case r := <-done:
		return r.data, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func readSized(src io.Reader, size int64) ([]byte, error) {
	data := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead))
	_, err := data.ReadFrom(src)
	return data.Bytes(), err
}

// sizedReader reads from src, which has to have just so many bytes.
type sizedReader struct {
	src  io.Reader
	left int64
	err  error
}

// interruptibleReader is a sizedReader whose Read can be interrupted.
type interruptibleReader struct {
	*sizedReader
	deadline interface{ SetReadDeadline(time.Time) error }
}

func (r interruptibleReader) SetReadDeadline(t time.Time) error {
	return r.deadline.SetReadDeadline(t)
}

// sized returns a reader of src that fails with [io.ErrUnexpectedEOF] where src
// is shorter than size, and with [content.ErrTrailingData] where it is longer. What src
// claims is not believed: size is counted by it.
func sized(ctx context.Context, src io.Reader, size int64) io.Reader {
	s := &sizedReader{src: source.Guard(ctx, src), left: size}
	if source.Interruptor(src) == nil {
		return s
	}
	return interruptibleReader{s, src.(interface{ SetReadDeadline(time.Time) error })}
}

func (r *sizedReader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if r.left == 0 {
		var one [1]byte
		n, err := io.ReadFull(r.src, one[:])
		if n > 0 {
			err = content.ErrTrailingData
		}
		r.err = err
		return 0, err
	}
	n, err := r.src.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if errors.Is(err, io.EOF) {
		// Whether there is nothing after the last byte is for the next Read.
		if err = nil; r.left > 0 {
			err = io.ErrUnexpectedEOF
		}
	}
	r.err = err
	return n, err
}

// Tag implements [content.Tagger]: it points the tag reference to content that
// is there, or on a peer, which is then kept here; else it fails with
// [errdef.ErrNotFound]. What the tag pointed to before
// stays. Content has its own digest for a tag without that.
//
// The media type of desc, where it has one, has to be that of the content: a manifest keeps the one
// that it was pushed as, and so does what a tag points to, as that is what the tag stands for. The
// error matches [ErrInvalid].
//
// It moves the tag on this host, where the swarm finds it; what only the swarm has is fetched.
func (r *Repository) Tag(ctx context.Context, desc ocispec.Descriptor, reference string) error {
	if err := checkTarget(desc); err != nil {
		return err
	}
	names, err := r.names(desc.Digest, reference)
	if err != nil {
		return err
	}
	for i := range names {
		names[i].MediaType, names[i].Description = desc.MediaType, describe(desc)
	}
	if err := checkMediaType(desc.MediaType); err != nil {
		return toOCI(fmt.Errorf("tag: %w", err))
	}
	if len(names) == 0 {
		_, err = r.engine.Stat(ctx, r.tag, digest.FromDigest(desc.Digest), p2p.StatOptions{})
	} else {
		err = r.tagAll(ctx, desc.Digest, names)
	}
	if err != nil {
		return toOCI(fmt.Errorf("tag: %w", err))
	}
	return nil
}

// tagAll points names to what is there under d, on this host or on a peer.
func (r *Repository) tagAll(ctx context.Context, d digest.Digest, names []p2p.NewName) error {
	err := r.point(ctx, d, names)
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	// What a tag points to has to be here: of a manifest that is itself.
	info, statErr := r.engine.HoldManifest(ctx, r.tag, digest.FromDigest(d), p2p.StatOptions{ContentOnly: true})
	if statErr == nil && !info.IsManifest {
		_, statErr = r.copyBlob(ctx, d, io.Discard, p2p.Network, nil)
	}
	if statErr != nil {
		return statErr
	}
	return r.point(ctx, d, names)
}

// point points names to what is on this host under d.
func (r *Repository) point(ctx context.Context, d digest.Digest, names []p2p.NewName) error {
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	return in.Commit(p2p.Commit{Names: pointing(names, d)})
}

// Untag implements [content.Untagger]: it removes the tag. What it pointed to
// stays.
//
// It acts on the whole swarm.
func (r *Repository) Untag(ctx context.Context, reference string) error {
	if _, err := r.names("", reference); err != nil {
		return err
	}
	cid, err := parseReference(reference)
	if err == nil {
		_, err = r.engine.Delete(ctx, r.tag, cid, p2p.DeleteOptions{NameOnly: true})
	}
	if err != nil {
		return toOCI(fmt.Errorf("untag: %w", err))
	}
	return nil
}

// Standing is what a reference stands for.
type Standing struct {
	Reference string
	// Digest is that of the manifest, or of what else a tag points to, as this host and the swarm know
	// it; "" where there is none.
	Digest digest.Digest
	here   digest.Digest // the same on this host
}

// Standing looks what reference, a tag or the digest of a manifest, stands for now. A change that is made
// with it fails with [ErrMoved] where it stands for something else on this host by then, or no more.
//
// It asks this host, and the swarm.
func (r *Repository) Standing(ctx context.Context, reference string) (Standing, error) {
	cid, err := parseReference(reference)
	if err != nil {
		return Standing{}, err
	}
	s := Standing{Reference: reference}
	// This host first: whatever changes later is noticed.
	if s.here, err = r.standing(ctx, cid, p2p.Local); err == nil {
		s.Digest, err = r.standing(ctx, cid, p2p.Network)
	}
	if err != nil {
		return Standing{}, toOCI(err)
	}
	return s, nil
}

func (r *Repository) standing(ctx context.Context, cid digest.CID, scope p2p.Scope) (digest.Digest, error) {
	info, err := r.engine.Stat(ctx, r.tag, cid, p2p.StatOptions{Scope: scope})
	damage, damaged := errors.AsType[*digest.CorruptError](err)
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrUnreachable):
		return "", nil
	case damaged:
		return damage.Digest, nil
	case err != nil:
		return "", err
	case cid.Digest() != "" && !info.IsManifest:
		return "", nil
	}
	return info.Task.Digest, nil
}

// expect returns what is to hold for a change.
func (r *Repository) expect(s *Standing) ([]p2p.Expectation, error) {
	if s == nil {
		return nil, nil
	}
	cid, err := parseReference(s.Reference)
	return []p2p.Expectation{{Tag: r.tag, CID: cid, Digest: s.here}}, err
}

// DeleteManifest removes a tag, as [Repository.Untag] does, or by its digest a manifest, as
// [Repository.Delete] does. Other content is none: the error matches [ErrNotFound]. With expect, which
// may be nil, it fails with [ErrMoved] where the reference stands for something else by now.
//
// It acts on the whole swarm.
func (r *Repository) DeleteManifest(ctx context.Context, reference string, expect *Standing) error {
	cid, err := parseReference(reference)
	if err != nil {
		return err
	}
	opts := p2p.DeleteOptions{NameOnly: cid.CacheID() != ""}
	if expect != nil {
		opts.Expect = &expect.here
	}
	if !opts.NameOnly {
		var info p2p.Info
		info, err = r.engine.Stat(ctx, r.tag, cid, p2p.StatOptions{})
		switch {
		case errors.Is(err, ErrCorrupt):
			err = nil
		case err == nil && !info.IsManifest:
			err = fmt.Errorf("%s is not a manifest: %w", p2p.Describe(r.tag, cid), ErrNotFound)
		}
	}
	if err == nil {
		_, err = r.engine.Delete(ctx, r.tag, cid, opts)
	}
	if err != nil {
		return toOCI(fmt.Errorf("delete: %w", err))
	}
	return nil
}

// DeleteBlob removes content as [Repository.Delete] does, but no manifest, with which more goes: the
// error matches [ErrMoved].
//
// It acts on the whole swarm.
func (r *Repository) DeleteBlob(ctx context.Context, d digest.Digest) error {
	if err := checkTarget(ocispec.Descriptor{Digest: d}); err != nil {
		return err
	}
	cid, none := digest.FromDigest(d), digest.Digest("")
	info, err := r.engine.Stat(ctx, r.tag, cid, p2p.StatOptions{}) // what only peers have, too
	if err == nil && info.IsManifest {
		return fmt.Errorf("delete %s as a blob: %w: a manifest", d, ErrMoved)
	}
	if _, err := r.engine.Delete(ctx, r.tag, cid, p2p.DeleteOptions{Expect: &none}); err != nil {
		return toOCI(fmt.Errorf("delete: %w", err))
	}
	return nil
}

// Delete implements [content.Deleter]: it removes content, the tags that point
// to it, and what only it held, its referrers too. Where a manifest refers to
// it, the error matches [ErrReferenced].
//
// It acts on the whole swarm.
func (r *Repository) Delete(ctx context.Context, target ocispec.Descriptor) error {
	if err := checkTarget(target); err != nil {
		return err
	}
	if _, err := r.engine.Delete(ctx, r.tag, digest.FromDigest(target.Digest), p2p.DeleteOptions{}); err != nil {
		return toOCI(fmt.Errorf("delete: %w", err))
	}
	return nil
}

// Predecessors implements [content.PredecessorFinder]: it returns the manifests
// that refer to node, or have it as their subject, in no particular order. Those
// that peers have are brought here first.
//
// It asks the whole swarm.
func (r *Repository) Predecessors(ctx context.Context, node ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if checkTarget(node) != nil {
		return nil, nil // nothing can refer to it
	}
	// Where no peer answers, what is here is an answer, too: nobody can tell whether it is all there is.
	if err := r.engine.HoldReferrers(ctx, r.task(node.Digest)); err != nil && !errors.Is(err, ErrUnreachable) {
		return nil, fmt.Errorf("predecessors of %s: %w", node.Digest, err)
	}
	return r.predecessorsHere(ctx, node)
}

// predecessorsHere is Predecessors for what is on this host.
func (r *Repository) predecessorsHere(ctx context.Context, node ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	for entry, err := range r.engine.List(ctx, p2p.Query{Tag: &r.tag, RefersTo: node.Digest}) {
		if err != nil {
			return nil, fmt.Errorf("predecessors of %s: %w", node.Digest, err)
		}
		found = append(found, descriptorOf(entry.Info))
	}
	return found, nil
}

// referrersPage is how many bytes of manifests are given at once, about: each
// comes with its annotations.
const referrersPage = 1 << 20

// Referrers implements [oras.land/oras-go/v2/registry.ReferrerLister]: it calls
// fn with the manifests whose subject is desc, with their artifact type and
// annotations, in order of digest, of one artifact type where that is not "".
// The subject need not be there.
//
// It asks the whole swarm.
func (r *Repository) Referrers(
	ctx context.Context, desc ocispec.Descriptor, artifactType string, fn func(referrers []ocispec.Descriptor) error,
) error {
	if err := checkTarget(desc); err != nil {
		return err
	}
	candidates, err := r.Predecessors(ctx, desc)
	if err != nil {
		return err
	}
	return r.referrersOf(ctx, desc, candidates, artifactType, fn)
}

// referrersOf is Referrers among candidates, which are on this host.
func (r *Repository) referrersOf(
	ctx context.Context, desc ocispec.Descriptor, candidates []ocispec.Descriptor, artifactType string,
	fn func(referrers []ocispec.Descriptor) error,
) error {
	slices.SortFunc(candidates, func(a, b ocispec.Descriptor) int {
		return bytes.Compare([]byte(a.Digest), []byte(b.Digest))
	})
	var page []ocispec.Descriptor
	var size int64
	for _, d := range candidates {
		m, err := r.Manifest(ctx, d.Digest.String())
		if errors.Is(err, ErrNotFound) {
			continue // deleted just now
		}
		if err != nil {
			return err
		}
		if m.Subject != desc.Digest || artifactType != "" && m.ArtifactType != artifactType {
			continue
		}
		page, size = append(page, m.Descriptor), size+m.Size
		if size >= referrersPage {
			if err := fn(page); err != nil {
				return err
			}
			page, size = nil, 0
		}
	}
	if len(page) == 0 {
		return nil
	}
	return fn(page)
}

// tagsPage is the number of tags that are given at once.
const tagsPage = 1000

// Tags implements [oras.land/oras-go/v2/registry.TagLister]: it calls fn with
// the repository's tags that sort after last, in order. An error of fn ends it.
//
// It lists this host alone.
func (r *Repository) Tags(ctx context.Context, last string, fn func(tags []string) error) error {
	return pages(r.engine.List(ctx, p2p.Query{Tag: &r.tag, Kind: p2p.KindNames, After: last}),
		func(e p2p.Entry) string { return e.Name }, fn)
}

// Repositories calls fn with the tags of all repositories that hold something
// and that sort after last, in order. An error of fn ends it.
func (s *Store) Repositories(ctx context.Context, last string, fn func(tags []string) error) error {
	return pages(s.engine.List(ctx, p2p.Query{Kind: p2p.KindTags, After: last}),
		func(e p2p.Entry) string { return e.Task.Tag }, fn)
}

// pages calls fn with what text says of entries, page by page.
func pages(entries func(func(p2p.Entry, error) bool), text func(p2p.Entry) string, fn func([]string) error) error {
	var page []string
	for entry, err := range entries {
		if err != nil {
			return err
		}
		if page = append(page, text(entry)); len(page) == tagsPage {
			if err := fn(page); err != nil {
				return err
			}
			page = nil
		}
	}
	if len(page) == 0 {
		return nil
	}
	return fn(page)
}

// Mount implements [oras.land/oras-go/v2/registry.Mounter]: it makes content of
// another repository part of this one, without a copy; of a manifest with all that it
// refers to. Where that does not hold
// it, what getContent returns is pushed, or, without getContent, the error
// matches [errdef.ErrNotFound]. fromRepo is named as a registry does:
// [p2p.DefaultRepository] is that of the empty tag, "" is any that holds it.
//
// It acts on this host alone.
func (r *Repository) Mount(
	ctx context.Context, desc ocispec.Descriptor, fromRepo string, getContent func() (io.ReadCloser, error),
) error {
	if err := checkTarget(desc); err != nil {
		return err
	}
	err := r.mount(ctx, desc.Digest, fromRepo)
	if errors.Is(err, ErrNotFound) && getContent != nil {
		var src io.ReadCloser
		if src, err = getContent(); err == nil {
			defer src.Close()
			if err = r.Push(ctx, desc, src); errors.Is(err, errdef.ErrAlreadyExists) {
				err = nil
			}
		}
	}
	if err != nil {
		return toOCI(fmt.Errorf("mount: %w", err))
	}
	return nil
}

func (r *Repository) mount(ctx context.Context, d digest.Digest, fromRepo string) error {
	tag, err := r.tagWith(ctx, d, fromRepo)
	if err != nil {
		return err
	}
	m := mounting{from: &Repository{engine: r.engine, tag: tag}, to: r, seen: map[digest.Digest]bool{}}
	if err := m.add(ctx, d, p2p.KeepUntilReferred); err != nil {
		return notWhole(err)
	}
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	return in.Commit(m.commit)
}

// mounting is what is mounted together: a manifest with all that it refers to, as
// whoever hears that a manifest is there takes all of it for there.
type mounting struct {
	from, to *Repository
	commit   p2p.Commit
	seen     map[digest.Digest]bool
}

func (m *mounting) add(ctx context.Context, d digest.Digest, keep p2p.Keep) error {
	if m.seen[d] {
		return nil
	}
	m.seen[d] = true
	info, err := m.from.engine.Stat(ctx, m.from.tag, digest.FromDigest(d),
		p2p.StatOptions{Scope: p2p.Local, Manifest: true, ContentOnly: true})
	if err == nil && !info.Local() {
		err = fmt.Errorf("%s is still arriving: %w", m.from.task(d), ErrNotFound)
	}
	if err == nil {
		err = m.from.intact(ctx, d)
	}
	if err != nil {
		return err
	}
	n := p2p.NewTask{Task: m.to.task(d), MediaType: info.MediaType, Keep: keep}
	// What is there already has its type.
	here, err := m.to.engine.Stat(ctx, m.to.tag, digest.FromDigest(d), p2p.StatOptions{Scope: p2p.Local})
	if err == nil && here.IsManifest {
		n.MediaType = here.MediaType
	}
	if info.Manifest != nil {
		parsed, err := manifest.Read(info.Manifest.Content)
		if err != nil {
			return err
		}
		n.Manifest = parsed.References(true)
		for _, child := range n.Manifest.Needs {
			if err := m.add(ctx, child, p2p.KeepReferred); err != nil {
				return err
			}
		}
	}
	m.commit.Tasks = append(m.commit.Tasks, n)
	return nil
}

// intact reads a blob of this host to its end: a client that is told that it is mounted
// does not send it any more.
func (r *Repository) intact(ctx context.Context, d digest.Digest) error {
	blob, err := r.open(ctx, d, p2p.Local)
	if err != nil {
		return err
	}
	defer blob.Close()
	return blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
}

// tagWith returns the tag of the repository fromRepo, or, where that is "", of one
// that holds d.
func (r *Repository) tagWith(ctx context.Context, d digest.Digest, fromRepo string) (string, error) {
	if fromRepo != "" {
		return TagOf(fromRepo)
	}
	for entry, err := range r.engine.List(ctx, p2p.Query{Kind: p2p.KindTags, Has: d}) {
		return entry.Task.Tag, err
	}
	return "", fmt.Errorf("%s: %w", d, ErrNotFound)
}

// TagOf returns the tag of the repository that a registry calls name. Errors
// match [ErrInvalid].
func TagOf(name string) (string, error) {
	switch name {
	case p2p.DefaultRepository:
		return "", nil
	case "":
		return "", fmt.Errorf("repository name: %w: it is empty", ErrInvalid)
	}
	return name, p2p.ValidateTag(name)
}

// RepositoryName returns what a registry calls the repository of a tag.
func RepositoryName(tag string) string {
	if tag == "" {
		return p2p.DefaultRepository
	}
	return tag
}

// MaxManifest is the largest manifest in bytes that is stored and read: the
// limit that the OCI distribution specification asks every registry for.
const MaxManifest = p2p.MaxManifest

// Manifest is a manifest with its content.
type Manifest struct {
	ocispec.Descriptor
	Content []byte
	Subject digest.Digest // of the manifest it is about, or ""
}

// Manifest returns the manifest that reference, a tag or a digest, names. Other
// content is none: the error matches [ErrNotFound].
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) Manifest(ctx context.Context, reference string) (Manifest, error) {
	m, err := r.ManifestContent(ctx, reference, false, 0)
	if err != nil {
		return Manifest{}, err
	}
	if parsed, err := manifest.Read(m.Content); err == nil {
		m.ArtifactType, m.Annotations = parsed.TypeOfArtifact(), parsed.Annotations
		if parsed.Subject != nil {
			m.Subject = parsed.Subject.Digest
		}
	}
	return m, nil
}

// ManifestContent is Manifest for callers that read the content: what that says of artifact
// type, annotations and subject is not set. With keep, for callers that mean to fetch what it
// is made of: where peers have it, the manifest is kept on this host, with the tag. One of
// more than limit bytes, where that is not 0, may come without its content, for Fetch to read.
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) ManifestContent(ctx context.Context, reference string, keep bool, limit int64) (Manifest, error) {
	cid, err := parseReference(reference)
	if err != nil {
		return Manifest{}, err
	}
	look := r.engine.Stat
	if keep {
		look = r.engine.HoldManifest
	}
	return r.manifest(ctx, cid, p2p.StatOptions{MaxContent: limit}, look)
}

// manifest returns a manifest as look, a method of the engine, describes it.
func (r *Repository) manifest(
	ctx context.Context, cid digest.CID, opts p2p.StatOptions,
	look func(context.Context, string, digest.CID, p2p.StatOptions) (p2p.Info, error),
) (Manifest, error) {
	opts.Manifest, opts.ContentOnly = true, true
	info, err := look(ctx, r.tag, cid, opts)
	switch {
	case err != nil:
	case info.Manifest == nil:
		err = fmt.Errorf("%s is not a manifest: %w", p2p.Describe(r.tag, cid), ErrNotFound)
	case opts.Lease && len(info.Lacks) > 0:
		err = fmt.Errorf("%s: %w whole: it has lost %s", p2p.Describe(r.tag, cid), ErrNotFound, info.Lacks[0])
	}
	if err != nil {
		return Manifest{}, toOCI(err)
	}
	return Manifest{Descriptor: descriptorOf(info), Content: info.Manifest.Content}, nil
}

// maxLooked is how many bytes a manifest may have to be read, and so checked, when
// somebody only asks for it.
const maxLooked = 32 << 10

// ManifestExists describes a manifest to a client that need not push it then, nor what
// it refers to. It fails with [ErrNotFound] where [Repository.Exists] would say that it is
// not there, and keeps what is named by its digest as that does.
//
// It asks this host, and the swarm for what is not here.
func (r *Repository) ManifestExists(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	cid, err := parseReference(reference)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m, err := r.manifest(ctx, cid, p2p.StatOptions{Lease: true, MaxContent: maxLooked}, r.engine.Stat)
	return m.Descriptor, notWhole(err)
}

// ManifestOptions says how to push a manifest.
type ManifestOptions struct {
	// MediaType is the type as the client gives it; parameters are dropped.
	// By default it is what the manifest says of itself.
	MediaType string
	// Digest is what the content has to match, or "" for its sha256.
	Digest digest.Digest
	// Tags are to point to the manifest.
	Tags []string
	// Expect, where it is not nil, is what a reference, of these tags or the digest, has to stand for
	// still: else the push fails with [ErrMoved].
	Expect *Standing
	// CheckRefs refuses the manifest, with [ErrMissingRef], where it refers to
	// what neither the repository holds nor a peer does; its subject and layers
	// that are not for distribution may be missing. What peers have is fetched:
	// a client that was told of it does not push it.
	CheckRefs bool
}

// PushManifest stores a manifest and points tags to it, in one step, and
// returns when that is durable. What is there already is only tagged. The error
// matches [ErrInvalid] where content is not a manifest, or is there as one of another type, also
// [errdef.ErrSizeExceedsLimit] where it is larger than [MaxManifest], and
// [ErrMismatch] where it is another one than wanted.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) PushManifest(ctx context.Context, content []byte, opts ManifestOptions) (Manifest, error) {
	names, err := r.names("", opts.Tags...)
	if err != nil {
		return Manifest{}, err
	}
	if opts.Digest != "" {
		if err := checkTarget(ocispec.Descriptor{Digest: opts.Digest}); err != nil {
			return Manifest{}, err
		}
	}
	expect, err := r.expect(opts.Expect)
	if err != nil {
		return Manifest{}, err
	}
	m, err := r.pushManifest(ctx, content, manifestPush{mediaType: opts.MediaType, want: opts.Digest, names: names,
		expect: expect, check: opts.CheckRefs, required: true})
	if err != nil {
		return Manifest{}, toOCI(fmt.Errorf("push: %w", err))
	}
	return m, nil
}

// manifestPush says how to push a manifest.
type manifestPush struct {
	mediaType string
	want      digest.Digest // "" is sha256
	names     []p2p.NewName // to point to it
	expect    []p2p.Expectation
	check     bool // whether what it refers to has to be there
	required  bool // whether what the specification requires has to be there
}

func (r *Repository) pushManifest(ctx context.Context, data []byte, push manifestPush) (Manifest, error) {
	if len(data) > MaxManifest {
		return Manifest{}, fmt.Errorf("manifest: %w: %w: it has %d bytes, the limit is %d", errdef.ErrSizeExceedsLimit,
			ErrInvalid, len(data), MaxManifest)
	}
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return Manifest{}, err
	}
	defer in.Close()
	// The digest first: a client has to hear that it sent something else.
	added, err := in.Add(bytes.NewReader(data), p2p.AddOptions{Want: push.want})
	if err != nil {
		return Manifest{}, err
	}
	parsed, err := manifest.Accept(data)
	if err != nil {
		return Manifest{}, err
	}
	mediaType, err := parsed.TypeAs(push.mediaType)
	if err != nil {
		return Manifest{}, err
	}
	if err := checkMediaType(mediaType); err != nil {
		return Manifest{}, err
	}
	if push.required {
		if err := parsed.CheckRequired(mediaType); err != nil {
			return Manifest{}, err
		}
	}
	children := parsed.Children()
	refs := parsed.References(push.check)
	if push.check {
		if err := r.checkSizes(ctx, children); err != nil {
			return Manifest{}, err
		}
	}
	commit := p2p.Commit{
		Tasks: []p2p.NewTask{{Task: r.task(added.Digest), MediaType: mediaType, Keep: p2p.KeepUntilReferred,
			Manifest: refs}},
		Names:  pointing(push.names, added.Digest),
		Expect: push.expect,
	}
	err = in.Commit(commit)
	if errors.Is(err, ErrMissingRef) && r.bring(ctx, refs.Needs) {
		if err := r.checkSizes(ctx, children); err != nil {
			return Manifest{}, err
		}
		// An ingest can't go on after an error.
		err = r.commitAgain(ctx, data, added.Digest, commit)
	}
	if err != nil {
		return Manifest{}, err
	}
	return Manifest{
		Descriptor: ocispec.Descriptor{
			MediaType: mediaType, Digest: added.Digest, Size: added.Size,
			ArtifactType: parsed.TypeOfArtifact(), Annotations: parsed.Annotations,
		},
		Content: data,
		Subject: refs.Subject,
	}, nil
}

// checkSizes fails with [ErrInvalid] where a descriptor states another size than what is on
// this host under its digest has. A descriptor without a size states none.
func (r *Repository) checkSizes(ctx context.Context, descriptors []ocispec.Descriptor) error {
	for _, d := range descriptors {
		info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(d.Digest), p2p.StatOptions{Scope: p2p.Local})
		if err == nil && info.Local() && d.Size != 0 && d.Size != info.Size {
			return fmt.Errorf("manifest: %w: it says that %s has %d bytes, it has %d", ErrInvalid, d.Digest, d.Size,
				info.Size)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// bring fetches those of digests that are not on this host, or not whole, from peers,
// until one of them can't be had. It reports whether any came.
func (r *Repository) bring(ctx context.Context, digests []digest.Digest) (some bool) {
	for _, d := range digests {
		info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(d), p2p.StatOptions{Scope: p2p.Local})
		switch {
		case errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt), err == nil && !info.Local():
			_, err = r.copyBlob(ctx, d, io.Discard, p2p.Network, nil)
			some = some || err == nil
		case err == nil && len(info.Lacks) > 0:
			some = r.bring(ctx, info.Lacks) || some
		}
		if err != nil {
			return some
		}
	}
	return some
}

// commitAgain adds a manifest and commits it.
func (r *Repository) commitAgain(ctx context.Context, data []byte, d digest.Digest, commit p2p.Commit) error {
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(data), p2p.AddOptions{Want: d}); err != nil {
		return err
	}
	return in.Commit(commit)
}

// checkMediaType refuses a media type that can't be passed on. The error matches [ErrInvalid] and
// [errdef.ErrInvalidMediaType].
func checkMediaType(mediaType string) error {
	if err := manifest.CheckType(mediaType); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalidMediaType, err)
	}
	return nil
}
