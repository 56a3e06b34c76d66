package main

import (
	"cmp"
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

func (a *app) statCommand() *cobra.Command {
	var lookup blobstore.Lookup
	cmd := &cobra.Command{
		Use:   "stat -i CID",
		Short: "Check if a file exists in the P2P cache, and say what is known of it",
		Long: `
The "stat" command prints what is known of the file that a cid names: digest and
size, the pieces that it is transferred and verified in, whether this host has
it, when it came here and when it was last used here.

Of a cid that leads to several files, to an image or to an index of platforms it
prints that, with its files or layers and its platforms; and of each manifest the
manifests that refer to it, such as signatures. A file's mode is printed where the
artifact has it. Size and pieces are those of all files then.

It also asks all peers, and prints how many of them hold the file or a part of it,
how many hold it whole, and how many did not answer. Of several files the one is
meant that the fewest peers hold whole. Nothing is fetched, unless the engine is a
Dragonfly, which knows no sizes: then the file is. With --local nobody is asked.

That no peer has the file is "not found"; that it is not here, and none could be
asked, is "unreachable".

As JSON, "holders" is null where peers were not asked, else an object of the
counts "some" (hold it, or a part), "whole", "asked" and "silent". "kind" is "file",
"artifact", "image" or "index"; "files" is an array of all files and layers where
there are several, each with "title", "digest", "size", "mediaType", "mode" ("0755",
or null), "packed" and what is said of a single one; "platforms" one of objects with
"platform", "digest", "size" (of its layers, or null) and "local"; "referrers" one
with "digest", "artifactType" and "annotations".

` + storeStatus(exit.NotFound, exit.Corrupt, exit.Unreachable),
		Example: `  dfcache stat --cid testid          # ask peers, too
  dfcache stat --cid testid --local  # only look at this host

  # for scripts
  dfcache stat --cid testid --format json
  dfcache stat --cid testid --template '{{.digest}}'`,
		Args:    exit.NoArgs,
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.needCID(cmd); err != nil {
				return err
			}
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.stat(ctx, lookup)
			})
		},
	}
	a.result.flags(cmd)
	localFlag(cmd, &lookup)
	return cmd
}

func (s *session) stat(ctx context.Context, lookup blobstore.Lookup) error {
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	lookup.Providers = !lookup.Local
	d, err := repo.Describe(ctx, s.cid, lookup)
	if err != nil {
		return err
	}
	file := d.File
	var text facts
	text.describe(file)
	text.manifest(d)
	text.given(ctx, repo, s.cid, s.tag)
	switch {
	case len(file.Files) > 0 || len(d.Platforms) > 0:
		text.add("pieces", "%d", file.Pieces)
	case file.Pieces > 0:
		text.add("pieces", "%d of %s", file.Pieces, human(file.PieceLength))
	default:
		text.add("pieces", "none: the file is empty")
	}
	switch {
	case file.Local:
		text.add("local", "yes (held %d of %d)", file.Held, file.Pieces)
	case file.Held > 0:
		text.add("local", "no (held %d of %d)", file.Held, file.Pieces)
	default:
		text.add("local", "no")
	}
	if h := file.Providers; h != nil {
		text.add("peers", "%s", providers(*h))
	}
	if !file.Imported.IsZero() {
		text.add("imported", "%s", moment(file.Imported))
		text.add("last used", "%s", moment(file.LastUsed))
	}
	text.parts(d)
	return s.result.print(s.out, d, text.String())
}

// manifest adds what a manifest is, where it is not just the name of one file.
func (f *facts) manifest(d blobstore.Description) {
	alone := len(d.Layers) == 1 && d.Kind == "artifact"
	if d.Kind != "file" && !alone {
		f.add("kind", "%s", d.Kind)
		f.add("type", "%s", printable(cmp.Or(d.ArtifactType, d.MediaType)))
	}
	if alone && d.Layers[0].HasMode {
		f.add("mode", "%04o", d.Layers[0].Mode)
	}
}

// parts adds what a manifest is made of, and what refers to it.
func (f *facts) parts(d blobstore.Description) {
	for _, p := range d.Platforms {
		size := "size not known"
		if p.Size >= 0 {
			size = human(p.Size)
		}
		if !p.Local {
			size += ", not all of it here"
		}
		f.add("platform", "%s %s %s", printable(cmp.Or(p.Name, "none")), p.Digest, size)
	}
	for i, file := range d.Files {
		layer := d.Layers[i]
		if file.Title == "" {
			f.add("layer", "%s %s %s", file.Digest, human(file.Size), printable(layer.MediaType))
			continue
		}
		mode := ""
		if layer.HasMode {
			mode = fmt.Sprintf("%04o ", layer.Mode)
		}
		f.add("file", "%s %s %s%s", file.Digest, human(file.Size), mode, printable(file.Title))
	}
	for _, r := range d.Referrers {
		f.add("referrer", "%s %s", r.Digest, printable(r.ArtifactType))
	}
}

// providers says how many peers hold a file.
func providers(h blobstore.Providers) string {
	if h.Asked == 0 {
		return "none to ask"
	}
	text := fmt.Sprintf("%d (%d whole)", h.Some, h.Whole)
	if h.Silent > 0 {
		text += fmt.Sprintf(", %d of %d did not answer", h.Silent, h.Asked)
	}
	return text
}
