package blobstore

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// Repository is the part of a store under one tag. It is safe for concurrent use.
type Repository struct {
	engine p2p.Engine
	tag    string
}

// Name returns the tag that the repository is, "" for the empty one.
func (r *Repository) Name() string { return r.tag }

// File says what is known of a file in a repository.
type File struct {
	CID         string        // as it was asked for
	Tag         string        // the tag it is under
	Digest      digest.Digest // of the file's content
	Size        int64         // in bytes
	Title       string        // the file's name, where a cache ID names it
	Manifest    digest.Digest // of the manifest that a cache ID points to
	Pieces      int           // an empty file has none
	PieceLength int64         // in bytes, of every piece but the last
	Held        int           // pieces that are on this host
	Local       bool          // whether all of them are
	Imported    time.Time     // when it came to this host; zero where it is not here, or that was not asked for
	LastUsed    time.Time     // when it was last read on this host; zero where never

	// Providers counts the peers that hold the file. It is nil unless
	// Lookup.Providers asked for it.
	Providers *Providers
	// Sources are the peers that an export got the file from; none where it was
	// on this host. What is said of pieces is how it was before.
	Sources []Source
	// Unchanged says that an export has found the output to have the content already.
	Unchanged bool

	// Files are those of an artifact that has several. Digest is that of its
	// manifest then; Size, Pieces and Held are sums; PieceLength is 0. Providers
	// are those of the file that the fewest peers hold whole.
	Files []File
}

// MarshalJSON makes an object that always has all fields, with null for a time
// that is not known, and for Providers that were not asked for.
func (f File) MarshalJSON() ([]byte, error) { return json.Marshal(f.form()) }

// fileForm is the form of a File in JSON.
type fileForm struct {
	CID         string         `json:"cid"`
	Tag         string         `json:"tag"`
	Digest      digest.Digest  `json:"digest"`
	Size        int64          `json:"size"`
	Title       string         `json:"title"`
	Manifest    digest.Digest  `json:"manifest"`
	Pieces      int            `json:"pieces"`
	PieceLength int64          `json:"pieceLength"`
	Held        int            `json:"held"`
	Local       bool           `json:"local"`
	Imported    *time.Time     `json:"imported"`
	LastUsed    *time.Time     `json:"lastUsed"`
	Providers   *providersForm `json:"holders"`
	Sources     []sourceForm   `json:"sources"`
	Unchanged   bool           `json:"unchanged"`
	Files       []fileForm     `json:"files"`
}

type providersForm struct {
	Some   int `json:"some"`
	Whole  int `json:"whole"`
	Asked  int `json:"asked"`
	Silent int `json:"silent"`
}

type sourceForm struct {
	Peer    string `json:"peer"`
	Address string `json:"address"`
	Bytes   int64  `json:"bytes"`
}

func (f File) form() fileForm {
	known := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	form := fileForm{
		f.CID, f.Tag, f.Digest, f.Size, f.Title, f.Manifest, f.Pieces, f.PieceLength, f.Held, f.Local,
		known(f.Imported), known(f.LastUsed), (*providersForm)(f.Providers), []sourceForm{}, f.Unchanged,
		[]fileForm{},
	}
	for _, s := range f.Sources {
		form.Sources = append(form.Sources, sourceForm(s))
	}
	for _, part := range f.Files {
		form.Files = append(form.Files, part.form())
	}
	return form
}

// Lookup says how far an operation may look for content.
type Lookup struct {
	// Local keeps the lookup on this host. Without it peers are asked too.
	Local bool
	// Providers has a Stat ask every peer whether it has the file. It goes without
	// Local.
	Providers bool
}

func (l Lookup) scope() p2p.Scope {
	if l.Local {
		return p2p.Local
	}
	return p2p.Network
}

// ImportOptions says how to import.
type ImportOptions struct {
	// Title is the file's name in the artifact that a cache ID names; of a
	// path the last element is used. The default is the cache ID.
	Title string
	// Executable says that the file can be run: an export under the cache ID gives it a mode with that.
	Executable bool
	// Algorithm is the algorithm of the digest, where cid is not one. The default is sha256.
	Algorithm digest.Algorithm
	// Annotations are those of the manifest that a cache ID names.
	Annotations map[string]string
	// Progress, where it is not nil, is called with the count of bytes taken in so far.
	Progress func(taken int64)
}

// Import stores what src has, up to its end, under cid, and returns when it
// is durable: it then survives kill -9 and a power cut.
//
// Where cid is a digest, the content has to match it, or nothing is stored and the error matches
// [ErrMismatch]. Where cid is a cache ID, it becomes the name of an OCI artifact of this one file,
// and if it was the name of another one, that is let go. With an empty cid the content is stored
// under its digest, which the result has; its times are zero. A regular [*os.File] is copied in the
// kernel; where somebody writes to it meanwhile, nothing is stored, as it may be a mix that never
// was the file's content, and the error matches [ErrChanged]. A Read of src that blocks does not
// keep Import from returning when ctx ends.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) Import(ctx context.Context, cid string, src io.Reader, opts ImportOptions) (File, error) {
	var id digest.CID
	if cid != "" {
		var err error
		if id, err = digest.ParseCID(cid); err != nil {
			return File{}, err
		}
	}
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return File{}, fmt.Errorf("import: %w", err)
	}
	defer in.Close()
	file, err := in.Add(src, p2p.AddOptions{Want: id.Digest(), Algorithm: opts.Algorithm, Progress: opts.Progress})
	if err != nil {
		return File{}, fmt.Errorf("import: %w", err)
	}
	var commit p2p.Commit
	table := digest.Table{Size: file.Size, PieceLength: digest.PieceLength(file.Size)}
	result := File{
		Tag: r.tag, Digest: file.Digest, Size: file.Size,
		Pieces: table.Pieces(), PieceLength: table.PieceLength, Held: table.Pieces(), Local: true,
	}
	if name := id.CacheID(); name == "" {
		id = digest.FromDigest(file.Digest)
		commit.Tasks = []p2p.NewTask{{Task: r.task(file.Digest), MediaType: blobMediaType, Keep: p2p.KeepPinned}}
	} else {
		result.Title = titleOf(opts.Title, name)
		if commit, err = r.artifact(in, name, file, result.Title, opts); err != nil {
			return File{}, fmt.Errorf("import: %w", err)
		}
		result.Manifest = commit.Names[0].Digest
	}
	result.CID = id.String()
	// This is the last that can fail: what is stored is never reported as a failure.
	if err := in.Commit(commit); err != nil {
		return File{}, fmt.Errorf("import: %w", err)
	}
	return result, nil
}

// artifact adds what makes an artifact of a file and returns the commit that names it.
func (r *Repository) artifact(
	in p2p.Ingest, name string, file p2p.Added, title string, opts ImportOptions,
) (p2p.Commit, error) {
	data, err := newManifest(file, title, opts)
	if err != nil {
		return p2p.Commit{}, fmt.Errorf("manifest: %w", err)
	}
	config := ocispec.DescriptorEmptyJSON
	if _, err := in.Add(bytes.NewReader(config.Data), p2p.AddOptions{Want: config.Digest}); err != nil {
		return p2p.Commit{}, err
	}
	top, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
	if err != nil {
		return p2p.Commit{}, err
	}
	return p2p.Commit{
		Tasks: []p2p.NewTask{
			{Task: r.task(file.Digest), MediaType: blobMediaType},
			{Task: r.task(config.Digest), MediaType: config.MediaType},
			{
				Task: r.task(top.Digest), MediaType: ocispec.MediaTypeImageManifest,
				Manifest: &p2p.NewManifest{Refs: []digest.Digest{config.Digest, file.Digest}},
			},
		},
		Names: []p2p.NewName{{Tag: r.tag, Name: name, Digest: top.Digest}},
	}, nil
}

func (r *Repository) task(d digest.Digest) p2p.Task { return p2p.Task{Tag: r.tag, Digest: d} }

// Stat says what is known of the file that cid names, or fails with [ErrNotFound],
// or with [ErrUnreachable] where it is not on this host and no peer could be asked.
//
// It asks this host, and, unless l.Local is set, the swarm.
func (r *Repository) Stat(ctx context.Context, cid string, l Lookup) (File, error) {
	f, err := r.stat(ctx, cid, l, request{})
	if err != nil {
		return File{}, fmt.Errorf("stat: %w", err)
	}
	return f.File, nil
}

// stat says what is known of what was requested, and what has arrived of it.
func (r *Repository) stat(ctx context.Context, cid string, l Lookup, req request) (*found, error) {
	req.look = true
	f, err := r.find(ctx, cid, l, req, func(*found) error { return nil })
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnreachable) {
		err = r.withPart(ctx, cid, err)
	}
	if err == nil && !f.Local {
		r.fillParts(ctx, &f.File)
	}
	return f, err
}

// withPart adds to err, with which a digest was not found, what of it is here.
func (r *Repository) withPart(ctx context.Context, cid string, err error) error {
	for e, listErr := range r.Partials(ctx) {
		if listErr == nil && string(e.Task.Digest) == cid {
			return fmt.Errorf("%w (%d bytes of it are here, and are kept for a while)", err, e.Total)
		}
	}
	return err
}

// fillParts fills in what is here of a file of which nothing is in the store. What can't be
// found out, as an older daemon can't tell it, is left out.
func (r *Repository) fillParts(ctx context.Context, f *File) {
	held := map[digest.Digest]int{}
	for e, err := range r.Partials(ctx) {
		if err == nil {
			held[e.Task.Digest] = e.Held
		}
	}
	if len(f.Files) == 0 && f.Held == 0 {
		f.Held = min(held[f.Digest], f.Pieces)
	}
	for i := range f.Files {
		if part := &f.Files[i]; part.Held == 0 {
			part.Held = min(held[part.Digest], part.Pieces)
			f.Held += part.Held
		}
	}
}

const (
	// findAttempts is how often what a name points to is looked up again, when it
	// is gone before it could be used.
	findAttempts = 10
	// goneAttempts is how often of these it may point to the same.
	goneAttempts = 3
)

// request says what of a manifest is wanted.
type request struct {
	artifact.Choice
	describe bool // all of it, whatever it is
	look     bool // only: nothing is to be fetched but the manifest
}

// found is a file that was found.
type found struct {
	File
	here      bool             // all of it, and its name, were on this host
	others    []digest.Digest  // what its manifest refers to besides files
	mediaType string           // of what the cid leads to
	layout    *artifact.Layout // of its manifest, nil where there is none
	layers    []artifact.Layer // Files, or the one that is File: as the manifest has them
	directory bool             // it belongs into one
	manifest  *manifest.Manifest
	about     digest.Digest // the manifest that the cid leads to, of an index that
}

// find finds the file that cid names and calls use with it: a digest is the
// file's own, a cache ID leads to it through a manifest. An import of another
// file under the same cache ID takes all of that away meanwhile; it is then
// looked up anew, so that either the one file is found or the other. A digest of a manifest leads to
// its files where some are chosen.
func (r *Repository) find(
	ctx context.Context, cid string, l Lookup, req request, use func(*found) error,
) (*found, error) {
	id, err := digest.ParseCID(cid)
	if err != nil {
		return nil, err
	}
	if l.Local && l.Providers {
		return nil, fmt.Errorf("%s: %w: peers are to be counted, and not to be asked", p2p.Describe(r.tag, id),
			ErrInvalid)
	}
	named := id.CacheID() != ""
	follow := named || req.Given()
	var before digest.Digest
	for attempt, same := 1, 0; ; attempt++ {
		info, err := r.engine.Stat(ctx, r.tag, id,
			p2p.StatOptions{Scope: l.scope(), Manifest: follow, Providers: l.Providers && !follow})
		if err != nil {
			return nil, err
		}
		if info.Task.Digest != before {
			before, same = info.Task.Digest, 0
		}
		same++
		f := &found{File: File{CID: cid, Tag: r.tag, Digest: info.Task.Digest}, here: !info.Remote,
			mediaType: info.MediaType}
		if info.Manifest == nil {
			if follow && l.Providers {
				info.Providers, err = r.providers(ctx, info.Task.Digest)
			}
			if req.Given() {
				err = fmt.Errorf("%s: %w: it is a single file, of which nothing can be chosen", p2p.Describe(r.tag, id),
					ErrInvalid)
			}
			f.fill(info)
			f.here = f.Local
		} else if err = r.followManifest(ctx, f, info.Manifest, l, req); err != nil {
			err = fmt.Errorf("%s: %w", p2p.Describe(r.tag, id), err)
		}
		if err == nil {
			err = use(f)
		}
		// What a name leads to is missing for good only where a part was deleted
		// by force, or no peer has it any more.
		if !errors.Is(err, ErrNotFound) || attempt == findAttempts || same == goneAttempts || !named {
			return f, err
		}
	}
}

// providers counts the peers that have d, or a part of it.
func (r *Repository) providers(ctx context.Context, d digest.Digest) (*Providers, error) {
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(d), p2p.StatOptions{Providers: true})
	return info.Providers, err
}

// fill fills in what the engine knows of a file.
func (f *File) fill(info p2p.Info) {
	f.Size, f.Pieces, f.PieceLength = info.Size, info.Pieces, info.PieceLength
	f.Held, f.Local = info.Held, info.Local()
	f.Imported, f.LastUsed = info.Imported, info.LastUsed
	f.Providers = info.Providers
}

// followManifest fills in what a manifest leads to.
func (r *Repository) followManifest(ctx context.Context, file *found, m *p2p.Manifest, l Lookup, req request) error {
	parsed, err := manifest.Read(m.Content)
	if err != nil {
		return err
	}
	file.manifest, file.Manifest, file.about = parsed, file.Digest, cmp.Or(file.about, file.Digest)
	if parsed.Manifests != nil && !req.describe {
		return r.followIndex(ctx, file, parsed, l, req)
	}
	if req.Platform != "" {
		return fmt.Errorf("manifest: %w: it is for one platform, of which none can be chosen", ErrInvalid)
	}
	scope := l.scope()
	if req.look {
		scope = p2p.Local
	}
	file.layout = artifact.Read(parsed, r.namingConfig(ctx, parsed, scope))
	file.layers, file.directory = file.layout.Layers, len(file.layout.Layers) != 1
	if !req.describe {
		if file.layers, file.directory, err = file.layout.Choose(req.Choice); err != nil {
			return err
		}
	}
	if err := r.fillFiles(ctx, file, m, l, req); err != nil {
		return err
	}
	isFile := map[digest.Digest]bool{}
	for _, layer := range file.layers {
		isFile[layer.Digest] = true
	}
	for _, d := range parsed.References(false).Refs {
		if !isFile[d] {
			file.others = append(file.others, d)
		}
	}
	if len(file.Files) == 1 {
		file.File = file.Files[0]
		return nil
	}
	file.sum()
	return nil
}

// followIndex follows an index to the manifest that is for a platform.
func (r *Repository) followIndex(
	ctx context.Context, file *found, index *manifest.Manifest, l Lookup, req request,
) error {
	child, err := artifact.ChoosePlatform(index, req.Platform)
	if err != nil {
		return err
	}
	info, err := r.engine.Stat(ctx, r.tag, digest.FromDigest(child.Digest),
		p2p.StatOptions{Scope: l.scope(), Manifest: true})
	if err != nil {
		return fmt.Errorf("leads to: %w", err)
	}
	if info.Manifest == nil {
		return fmt.Errorf("leads to %s: %w: it is no manifest", child.Digest, ErrInvalid)
	}
	file.Digest, file.here = child.Digest, file.here && info.Local()
	req.Platform = ""
	return r.followManifest(ctx, file, info.Manifest, l, req)
}

// maxNamingConfig is the size in bytes of the largest config that is read for the name of a file.
const maxNamingConfig = 1 << 20

// namingConfig returns the config that names the files of a manifest; nil where none does, or where it
// can't be had: the files then have another name.
func (r *Repository) namingConfig(ctx context.Context, m *manifest.Manifest, scope p2p.Scope) []byte {
	config := artifact.NamingConfig(m)
	if config == nil || config.Size > maxNamingConfig {
		return nil
	}
	blob, err := r.open(ctx, config.Digest, scope)
	if err != nil {
		return nil
	}
	defer blob.Close()
	var content bytes.Buffer
	if blob.Size() > maxNamingConfig || blob.CopyRange(ctx, &content, 0, blob.Size(), nil) != nil {
		return nil
	}
	return content.Bytes()
}

// fillFiles fills in what the engine knows of the layers that were chosen.
func (r *Repository) fillFiles(ctx context.Context, file *found, m *p2p.Manifest, l Lookup, req request) error {
	known := map[digest.Digest]p2p.Info{}
	for _, info := range m.Refs {
		known[info.Task.Digest] = info
	}
	for _, layer := range file.layers {
		info, found := known[layer.Digest]
		if !found || l.Providers {
			// It was too far down the list, or it is damaged or missing, which this tells.
			var err error
			info, err = r.engine.Stat(ctx, r.tag, digest.FromDigest(layer.Digest),
				p2p.StatOptions{Scope: l.scope(), Providers: l.Providers})
			if req.describe && layer.Foreign() && (errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnreachable)) {
				table := digest.Table{Size: layer.Size, PieceLength: digest.PieceLength(layer.Size)}
				info = p2p.Info{Size: table.Size, PieceLength: table.PieceLength, Pieces: table.Pieces(), Remote: true}
			} else if err != nil {
				return fmt.Errorf("leads to: %w", err)
			}
			known[layer.Digest] = info
		}
		f := File{CID: file.CID, Tag: r.tag, Digest: layer.Digest, Title: layer.Name, Manifest: file.Manifest}
		f.fill(info)
		file.Files = append(file.Files, f)
		file.here = file.here && f.Local
	}
	return nil
}

// sum makes of a file the sum of its files.
func (f *File) sum() {
	f.Local = true
	for _, part := range f.Files {
		f.Size, f.Pieces, f.Held = f.Size+part.Size, f.Pieces+part.Pieces, f.Held+part.Held
		f.Local = f.Local && part.Local
		if f.Imported.Before(part.Imported) {
			f.Imported = part.Imported
		}
		if f.LastUsed.Before(part.LastUsed) {
			f.LastUsed = part.LastUsed
		}
		if f.Providers == nil || part.Providers != nil && part.Providers.Whole < f.Providers.Whole {
			f.Providers = part.Providers
		}
	}
}

// maxKept is the size in bytes of what an artifact has besides its files, a
// config, that is fetched to be kept with it.
const maxKept = MaxManifest

// keepTimeout is how long a caller that has the files waits for what is to be kept with them.
var keepTimeout = 3 * time.Second

// keep keeps the artifact that id names, and that was not all here, so that this
// host can serve it when those that it came from are gone: its name, its manifest,
// and what else it is made of besides its files, which have been fetched already.
// What of that fails is no failure of whoever wanted the files, and has nowhere to
// be reported: the next fetch of the artifact tries again.
func (r *Repository) keep(ctx context.Context, f *found, l Lookup) {
	id, err := digest.ParseCID(f.CID)
	if err != nil || id.CacheID() == "" || f.here || l.Local {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, keepTimeout)
	defer cancel()
	if !r.keepFound(ctx, f, id) {
		return
	}
	for _, d := range f.others {
		if d == ocispec.DescriptorEmptyJSON.Digest && r.keepEmpty(ctx) == nil {
			continue
		}
		blob, err := r.open(ctx, d, p2p.Network)
		if err != nil {
			continue
		}
		if blob.Size() <= maxKept {
			_ = blob.CopyRange(ctx, io.Discard, 0, blob.Size(), nil)
		}
		blob.Close()
	}
}

// keepFound has the manifest held that was found, and the name that led to it. An engine
// that remembers the name holds it with the manifest, and asks nobody what it stands for.
func (r *Repository) keepFound(ctx context.Context, f *found, name digest.CID) bool {
	if f.Manifest != "" {
		if _, err := r.engine.HoldManifest(ctx, r.tag, digest.FromDigest(f.Manifest),
			p2p.StatOptions{ContentOnly: true}); err != nil {
			return false
		}
		held, err := r.engine.Stat(ctx, r.tag, name, p2p.StatOptions{Scope: p2p.Local})
		if err == nil && held.Task.Digest == f.Manifest {
			return true
		}
	}
	_, err := r.engine.HoldManifest(ctx, r.tag, name, p2p.StatOptions{ContentOnly: true})
	return err == nil
}

// keepEmpty stores the empty config, which most artifacts have: nobody need be asked for
// its two bytes. Its date is that of nothing, so that it is nowhere newer than a delete.
func (r *Repository) keepEmpty(ctx context.Context) error {
	config := ocispec.DescriptorEmptyJSON
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(config.Data), p2p.AddOptions{Want: config.Digest}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{
		Task: r.task(config.Digest), MediaType: config.MediaType, Keep: p2p.KeepUntilReferred,
		Origin: time.Unix(0, 1).UTC(),
	}}})
}

// Open opens the file that cid names for reading, or fails with [ErrNotFound].
// An artifact of several files can't be opened: the error matches [ErrInvalid].
// The caller closes the Reader.
//
// A file that peers have is read while it comes from them, and kept on this host.
// ctx bounds that as far as only this Reader waits for it.
//
// Unless l.Local is set, what only the swarm has is fetched, and kept on this host.
func (r *Repository) Open(ctx context.Context, cid string, l Lookup) (*Reader, error) {
	return r.openChosen(ctx, cid, l, artifact.Choice{})
}

// openChosen opens the file that was chosen of what cid names.
func (r *Repository) openChosen(ctx context.Context, cid string, l Lookup, c artifact.Choice) (*Reader, error) {
	var blob p2p.Blob
	f, err := r.find(ctx, cid, l, request{Choice: c}, func(f *found) (err error) {
		if f.directory {
			return fmt.Errorf("%s: %w: it has %d files: export it to a directory, or choose one of them",
				f.CID, ErrInvalid, len(f.layers))
		}
		blob, err = r.open(ctx, f.Digest, l.scope())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	r.keep(ctx, f, l)
	return newReader(blob, f.File), nil
}

// Reader reads a file of a repository. Every byte has been verified before it
// is handed out; damage gives an error that matches [ErrCorrupt]. The file
// stays readable until the Reader is closed, even when it is deleted
// meanwhile. ReadAt and CopyRange are safe for concurrent use, Read and Seek
// are not.
//
// Reads of a file that is still coming from peers wait for what they want, and
// have it fetched first. Only a copy of the whole proves the whole: where a peer
// has sent wrong content, so that this fails, the error matches [ErrMismatch], and the file is to
// be opened again.
type Reader struct {
	*io.SectionReader
	blob p2p.Blob
	file File
}

func newReader(blob p2p.Blob, file File) *Reader {
	return &Reader{SectionReader: io.NewSectionReader(blob, 0, blob.Size()), blob: blob, file: file}
}

// CopyRange writes the n bytes from off on to w. Each piece is verified before
// bytes of it are written, and a copy of the whole ends with success only when
// the whole is proven. Where w can read from an [*os.File] by itself, as
// connections do, the bytes stay in the kernel. It ends with ctx.
func (r *Reader) CopyRange(ctx context.Context, w io.Writer, off, n int64) error {
	return r.blob.CopyRange(ctx, w, off, n, nil)
}

// File returns what was known of the file when it was opened.
func (r *Reader) File() File { return r.file }

// Sources says from which peers the file has come, when all of it has; nil where
// it was on this host.
func (r *Reader) Sources() []Source { return r.blob.Sources() }

// WriteTo implements [io.WriterTo]: it writes what is left of the file to w.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	off, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	var written int64
	err = r.blob.CopyRange(context.Background(), w, off, max(0, r.Size()-off), func(n int64) { written = n })
	_, seekErr := r.Seek(off+written, io.SeekStart)
	return written, cmp.Or(err, seekErr)
}

// Close closes the Reader.
func (r *Reader) Close() error { return r.blob.Close() }

// ExportOptions says how to export.
type ExportOptions struct {
	Lookup
	// Overwrite lets an export replace a file. Without it an existing output
	// is an error that matches [fs.ErrExist].
	Overwrite bool
	// NoSync lets [Repository.ExportFile] return before the disk has what it wrote.
	// That is faster, and a power cut within the next half a minute can leave an empty file, also
	// in place of one that was replaced.
	NoSync bool
	// All exports all layers of a manifest, also those without a name, to a directory.
	All bool
	// Files are names of files, or digests of layers, to export of a manifest: one to a file, more to a directory.
	Files []string
	// Platform is that of the manifest to export of an index: os/architecture, or os/architecture/variant.
	Platform string
	// NoUnpack leaves archives of directories packed.
	NoUnpack bool
	// Parents has [Repository.ExportFile] make the directories that lead to the output.
	Parents bool
	// SkipSame has [Repository.ExportFile] leave an output as it is that has the content already: a file with
	// these bytes, or a directory that has all files and links, whatever else is in it. File.Unchanged says so.
	SkipSame bool
	// Progress, where it is not nil, is called with the count of bytes written so far.
	Progress func(written int64)
}

func (o ExportOptions) choice() artifact.Choice {
	return artifact.Choice{All: o.All, Names: o.Files, Platform: o.Platform}
}

// Export writes the file that cid names to w. Every piece is verified before
// it is written, but when Export fails w may have got some of them; [Repository.ExportFile]
// leaves nothing behind.
//
// Unless opts.Local is set, what only the swarm has is fetched, and kept on this host.
func (r *Repository) Export(ctx context.Context, cid string, w io.Writer, opts ExportOptions) (File, error) {
	if w == nil {
		return File{}, fmt.Errorf("export %s: %w: there is no writer to export to", cid, ErrInvalid)
	}
	in, err := r.openChosen(ctx, cid, opts.Lookup, opts.choice())
	if err != nil {
		return File{}, fmt.Errorf("export: %w", err)
	}
	defer in.Close()
	if err := in.blob.CopyRange(ctx, w, 0, in.Size(), opts.Progress); err != nil {
		return File{}, fmt.Errorf("export %s: %w", cid, err)
	}
	in.file.Sources = in.Sources()
	return in.file, nil
}

// ExportFile writes the file that cid names to a new file at path. It is all or
// nothing: the content is written to a file that can't be seen yet, in the
// same directory, and gets its name when it is complete, verified and on disk. A failure
// leaves no file, and one that was there as it was. When ExportFile returns, the
// file survives a power cut, unless opts.NoSync is set.
//
// An artifact of several files becomes a directory at path, as does one that was imported from a
// directory, and an archive that is said to be one: that is unpacked, unless opts.NoUnpack is set. A new one
// appears at once, with everything in it. Into an empty one that is there, or, with
// opts.Overwrite, into any, the files are moved one by one when all are complete
// and verified; other files in it stay. A file whose name would lead out of the
// directory is refused, with [ErrInvalid]. Nothing is left out that was not chosen: where layers have no names,
// or cid leads to an index, the error is an [*artifact.ChoiceError] unless opts says what is wanted. Where cid is
// the digest of a manifest, opts can choose, too.
//
// A new file has the permissions that the artifact has for it. One that is replaced can be read and written
// by whoever could before.
//
// Unless opts.Local is set, what only the swarm has is fetched, and kept on this host.
func (r *Repository) ExportFile(ctx context.Context, cid, path string, opts ExportOptions) (File, error) {
	f, err := r.find(ctx, cid, opts.Lookup, request{Choice: opts.choice()}, func(f *found) (err error) {
		if opts.Parents {
			undo, madeErr := makeParents(path, opts)
			if madeErr != nil {
				return madeErr
			}
			defer func() {
				if err != nil {
					undo()
				}
			}()
		}
		var layer artifact.Layer
		if len(f.layers) == 1 {
			layer = f.layers[0]
		}
		if f.directory || layer.Packed && !opts.NoUnpack {
			return r.writeDir(ctx, f, path, opts)
		}
		if opts.SkipSame && hasContent(ctx, func() (*os.File, error) { return openRegular(path) }, f.Digest, f.Size) {
			f.Unchanged = true
			return nil
		}
		return writeFile(path, opts, layer, func(out *os.File) (err error) {
			f.Sources, err = r.copyFile(ctx, f.File, out, opts)
			return err
		})
	})
	if err != nil {
		return File{}, fmt.Errorf("export %s: %w", cid, err)
	}
	if !f.Unchanged { // nothing was fetched, then
		r.keep(ctx, f, opts.Lookup)
	}
	return f.File, nil
}

// writeDir writes what an artifact has to a directory at path.
func (r *Repository) writeDir(ctx context.Context, f *found, path string, opts ExportOptions) error {
	files := f.Files
	if len(files) == 0 && len(f.layers) == 1 {
		files = []File{f.File}
	}
	var tree artifact.Tree
	if len(opts.Files) == 0 {
		var err error
		if tree, err = f.layout.Tree(); err != nil {
			return err
		}
	}
	places, err := artifact.PlaceAll(f.layers, tree, !opts.NoUnpack, !f.directory)
	if err != nil {
		return err
	}
	if opts.SkipSame && hasAll(ctx, path, places, tree) {
		f.Unchanged = true
		return nil
	}
	var written int64
	err = writeDir(ctx, path, opts, places, tree, func(i int, out *os.File) error {
		each := opts
		if before := written; opts.Progress != nil {
			each.Progress = func(n int64) { opts.Progress(before + n) }
		}
		sources, err := r.copyFile(ctx, files[i], out, each)
		files[i].Sources = sources
		written += files[i].Size
		return err
	})
	if errors.Is(err, errUnchanged) {
		f.Unchanged, err = true, nil
	}
	f.Sources = allSources(files)
	return err
}

// allSources adds up what came from each peer.
func allSources(files []File) []Source {
	var all []Source
	for _, f := range files {
		for _, s := range f.Sources {
			i := slices.IndexFunc(all,
				func(known Source) bool { return known.Peer == s.Peer && known.Address == s.Address })
			if i < 0 {
				all = append(all, s)
			} else {
				all[i].Bytes += s.Bytes
			}
		}
	}
	return all
}

// copyFile copies the content of f to out, which is empty, and says which peers
// it came from.
func (r *Repository) copyFile(ctx context.Context, f File, out *os.File, opts ExportOptions) ([]Source, error) {
	progress := opts.Progress
	if !opts.NoSync {
		progress = writeBack(out, progress)
	}
	for attempt := 1; ; attempt++ {
		w := &sparseWriter{file: out}
		sources, err := r.copyBlob(ctx, f.Digest, w, opts.scope(), progress)
		if err == nil {
			err = w.finish()
		}
		if !errors.Is(err, ErrMismatch) || attempt == copyAttempts {
			return sources, err
		}
		// Nobody has seen what was written.
		if err := out.Truncate(0); err != nil {
			return nil, err
		}
	}
}

// copyAttempts is how often a blob is copied from the beginning where a peer has
// sent wrong content, so that its proof fails: it is fetched from others then.
const copyAttempts = 3

// copyBlob copies a blob to w.
func (r *Repository) copyBlob(
	ctx context.Context, d digest.Digest, w io.Writer, scope p2p.Scope, progress func(int64),
) ([]Source, error) {
	blob, err := r.open(ctx, d, scope)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	err = blob.CopyRange(ctx, w, 0, blob.Size(), progress)
	return blob.Sources(), err
}

// DeleteOptions says how to delete.
type DeleteOptions struct {
	// Force deletes content that other content refers to.
	Force bool
	// Also are further cids, up to [p2p.MaxAlso], that go in the same transaction: all of them, or,
	// where it fails, none.
	Also []string
	// Unpin keeps a digest that other content here refers to for that content alone, in place of a
	// failure: it goes with the last that refers to it.
	Unpin bool
}

// Deleted says what a Delete did.
type Deleted = p2p.Deleted

// Remove removes what cid names. A cache ID goes with everything that only it
// held. A digest that a manifest refers to is an error that matches
// [ErrReferenced], unless opts.Force is set. Bytes are freed when no tag holds
// them any more; readers that have them open read on. Peers do the same; the result
// names those that were not reached: of a swarm, they are told when they return.
// It fails with [ErrNotFound] where there is nothing to remove; of several, the result says which
// were nowhere.
//
// It acts on the whole swarm.
func (r *Repository) Remove(ctx context.Context, cid string, opts DeleteOptions) (Deleted, error) {
	id, err := digest.ParseCID(cid)
	if err != nil {
		return Deleted{}, fmt.Errorf("delete: %w", err)
	}
	how := p2p.DeleteOptions{Force: opts.Force, Unpin: opts.Unpin}
	for _, s := range opts.Also {
		c, err := digest.ParseCID(s)
		if err != nil {
			return Deleted{}, fmt.Errorf("delete: %w", err)
		}
		how.Also = append(how.Also, c)
	}
	return r.remove(ctx, id, how)
}

// RemoveAll removes everything under the tag, in one transaction. That there is nothing is no error.
//
// It acts on the whole swarm: what peers have goes, too, as far as it is not newer.
func (r *Repository) RemoveAll(ctx context.Context) (Deleted, error) {
	return r.remove(ctx, digest.CID{}, p2p.DeleteOptions{All: true})
}

func (r *Repository) remove(ctx context.Context, cid digest.CID, opts p2p.DeleteOptions) (Deleted, error) {
	deleted, err := r.engine.Delete(ctx, r.tag, cid, opts)
	if err != nil {
		return Deleted{}, fmt.Errorf("delete: %w", err)
	}
	return deleted, nil
}

// Replicate makes n other peers hold what cid names whole, with all that belongs
// to it, and returns their IDs when they do. It fails with [ErrUnreachable] where
// there are not so many peers that can, and says how many did; ctx bounds it.
//
// It acts on the swarm.
func (r *Repository) Replicate(ctx context.Context, cid string, n int) ([]string, error) {
	id, err := digest.ParseCID(cid)
	if err != nil {
		return nil, fmt.Errorf("replicate: %w", err)
	}
	peers, err := p2p.Replicate(ctx, r.engine, r.tag, id, n)
	if err != nil {
		return nil, fmt.Errorf("replicate: %w", err)
	}
	return peers, nil
}

// List yields what the repository holds on this host: names, then blobs, each
// in order. It ends after the first error.
//
// It lists this host alone.
func (r *Repository) List(ctx context.Context) iter.Seq2[Entry, error] {
	return r.engine.List(ctx, p2p.Query{Tag: &r.tag})
}

// Partials is [Store.Partials] of the repository.
//
// It lists this host alone.
func (r *Repository) Partials(ctx context.Context) iter.Seq2[Entry, error] {
	return r.engine.List(ctx, p2p.Query{Tag: &r.tag, Kind: p2p.KindPartials})
}
