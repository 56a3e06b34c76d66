package blobstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// TreeType is the artifact type of the manifest that [Repository.ImportFiles] makes.
const TreeType = artifact.TreeType

// ImportFiles stores files and directories of this host together, as one artifact that the cache ID name
// names, in one step, and returns when it is durable. Each file is a layer with its path as the title. What is in a
// directory that is alone has its path below that; of several paths, each has its own name before that.
// The permissions of files and directories are recorded, empty directories, and symbolic links; a link in a
// directory has to lead to something in that. The same content makes the same manifest.
//
// Files are at most 9,999. What this can't store, such as a socket, a link that leads out of its directory, or a
// digest for a name, is an error that matches [ErrInvalid]; a file that is written to meanwhile is one that
// matches [ErrChanged]. opts.Title and opts.Executable say nothing here.
//
// It stores on this host alone, where the swarm finds it.
func (r *Repository) ImportFiles(ctx context.Context, name string, paths []string, opts ImportOptions) (File, error) {
	result, err := r.importFiles(ctx, name, paths, opts)
	if err != nil {
		return File{}, fmt.Errorf("import: %w", err)
	}
	return result, nil
}

func (r *Repository) importFiles(ctx context.Context, name string, paths []string, opts ImportOptions) (File, error) {
	id, err := digest.ParseCID(name)
	if err != nil {
		return File{}, err
	}
	if id.CacheID() == "" {
		return File{}, fmt.Errorf("%s: %w: several files can't have the digest of one: name them by a cache ID", name,
			ErrInvalid)
	}
	sources, tree, err := artifact.Scan(paths)
	if err != nil {
		return File{}, err
	}
	in, err := r.engine.Ingest(ctx)
	if err != nil {
		return File{}, err
	}
	defer in.Close()
	var commit p2p.Commit
	result := File{CID: name, Tag: r.tag}
	added := map[digest.Digest]bool{}
	var refs []digest.Digest
	add := func(d digest.Digest, mediaType string) {
		if !added[d] {
			added[d], refs = true, append(refs, d)
			commit.Tasks = append(commit.Tasks, p2p.NewTask{Task: r.task(d), MediaType: mediaType})
		}
	}
	config := ocispec.DescriptorEmptyJSON
	if _, err := in.Add(bytes.NewReader(config.Data), p2p.AddOptions{Want: config.Digest}); err != nil {
		return File{}, err
	}
	add(config.Digest, config.MediaType)
	var files []artifact.File
	for _, s := range sources {
		f, err := addFile(in, s, opts, result.Size)
		if err != nil {
			return File{}, err
		}
		add(f.Digest, blobMediaType)
		files = append(files, f)
		table := digest.Table{Size: f.Size, PieceLength: digest.PieceLength(f.Size)}
		result.Files = append(result.Files, File{
			CID: name, Tag: r.tag, Digest: f.Digest, Size: f.Size, Title: f.Name, Pieces: table.Pieces(),
			PieceLength: table.PieceLength, Held: table.Pieces(), Local: true,
		})
		result.Size, result.Pieces = result.Size+f.Size, result.Pieces+table.Pieces()
	}
	data, err := artifact.New(files, tree)
	if err != nil {
		return File{}, err
	}
	top, err := in.Add(bytes.NewReader(data), p2p.AddOptions{})
	if err != nil {
		return File{}, err
	}
	commit.Tasks = append(commit.Tasks, p2p.NewTask{Task: r.task(top.Digest), MediaType: ocispec.MediaTypeImageManifest,
		Manifest: &p2p.NewManifest{Refs: refs}})
	commit.Names = []p2p.NewName{{Tag: r.tag, Name: name, Digest: top.Digest}}
	result.Digest, result.Manifest, result.Held, result.Local = top.Digest, top.Digest, result.Pieces, true
	for i := range result.Files {
		result.Files[i].Manifest = top.Digest
	}
	// This is the last that can fail: what is stored is never reported as a failure.
	if err := in.Commit(commit); err != nil {
		return File{}, err
	}
	return result, nil
}

// addFile takes in a file, before which so many bytes have been taken in.
func addFile(in p2p.Ingest, s artifact.Source, opts ImportOptions, before int64) (artifact.File, error) {
	f, err := os.Open(s.Path)
	if err != nil {
		return artifact.File{}, fmt.Errorf("input: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return artifact.File{}, fmt.Errorf("input: %w", err)
	}
	if !info.Mode().IsRegular() {
		return artifact.File{}, fmt.Errorf("input %s: %w: it is no file any more", s.Path, ErrChanged)
	}
	add := p2p.AddOptions{Algorithm: opts.Algorithm}
	if opts.Progress != nil {
		add.Progress = func(n int64) { opts.Progress(before + n) }
	}
	file, err := in.Add(f, add)
	if err != nil {
		if errors.Is(err, ErrChanged) {
			err = fmt.Errorf("input %s: %w", s.Path, err)
		}
		return artifact.File{}, err
	}
	return artifact.File{Name: s.Name, Mode: info.Mode().Perm(), Digest: file.Digest, Size: file.Size}, nil
}
