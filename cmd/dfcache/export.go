package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
	"github.com/dfcache/dfcache/p2p"
)

//nolint:funlen // most of it is the text of the help
func (a *app) exportCommand() *cobra.Command {
	var output string
	var opts blobstore.ExportOptions
	cmd := &cobra.Command{
		Use:   "export -i CID {OUTPUT | -O OUTPUT}",
		Short: "Export a file from the P2P cache",
		Long: `
The "export" command writes the file that a cid names to a new file. All of it
is verified before the new file can be seen; a failure leaves no file behind. An
existing file is left as it is, unless --overwrite is given. The new file belongs
to who runs the command. It is on disk when the command returns, and survives a
power cut; with --no-sync the disk gets it later, within half a minute or so.

What is not on this host is fetched from the peers that have it, from all of them
at once, and is kept on this host; a cache ID is kept with it, so that this host
can serve the file on. The result says where the bytes came from. With --local
nobody is asked. While nothing comes, a line on stderr says now and then what is
waited for, and how long still.

A cache ID can lead to several files, where they were imported together or a
registry client has pushed them so: they are exported under their own names to a
new or empty directory OUTPUT, all of them or none. With --overwrite the directory
may have other files, too. --file exports one of them, to a file OUTPUT, or some, to
a directory. Names are those that oras, CNCF ModelPack, KitOps, Ollama or Helm give
them; layers that have none, such as those of an image, are named by their digests,
and exported only if you ask for them by --file DIGEST or by --all, which always makes
a directory. Of an index, --platform says which manifest is meant. With these three a
cid can be the digest of a manifest, too. Without them nothing is left out silently:
what would be is listed, and nothing is exported.

A directory that oras has packed, and an archive of ModelPack or KitOps, is unpacked:
into OUTPUT where it is alone, else below it. Files and directories get the modes that
the artifact has for them; a file that is replaced keeps who may read and write it.
Links may only lead to what is in the directory. With --no-unpack it stays an archive.

With --parents missing directories that lead to OUTPUT are made. With --skip-same an
OUTPUT that has the content already is left as it is, and that is a success: a file is
compared by its digest, a directory by all files and links that would be in it, whatever
else is there; modes do not count. Nothing is fetched then, and "unchanged" is true in JSON.

The output "-" is stdout. What a failed export has written there by then can't be
taken back, so check the exit status. It is not synced. The result goes to stderr.

As JSON, "sources" is an array of the peers that bytes came from, with "peer",
"address" and "bytes"; it is empty where the file was here, and "local" and "held"
are how it was before.

` + storeStatus(exit.NotFound, exit.Mismatch, exit.NoSpace, exit.Corrupt, exit.OutputExists, exit.Unreachable),
		Example: `  dfcache export --tag models --cid v1 -O /tmp/model.bin

  # only if this host has it
  dfcache export --local --cid sha256:2cf2...9824 /tmp/file

  # one file of several, and one platform of an image
  dfcache export --tag models --cid v2 --file config.json -O config.json
  dfcache export --tag base/alpine --cid latest --platform linux/arm64 --all -O layers

  # into a pipe
  dfcache export --cid backup - | tar -x`,
		Args:    oneFile("output"),
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				output = args[0]
			}
			if output == "" {
				return exit.FlagError(cmd,
					errors.New("the output is missing: name it as OUTPUT or with -O OUTPUT, \"-\" is stdout"))
			}
			if err := a.needCID(cmd); err != nil {
				return err
			}
			if opts.All && len(opts.Files) > 0 {
				return exit.FlagError(cmd, errors.New("--all and --file given: pass one of them"))
			}
			return a.session(cmd, a.consoleFile(output == "-"), func(ctx context.Context, s *session) error {
				return s.exportFile(ctx, output, opts)
			})
		},
	}
	a.result.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "O", "",
		"export to the given `file`, - is stdout; several files to a directory")
	cmd.Flags().BoolVar(&opts.Overwrite, "overwrite", false,
		"replace an existing file, or put files into a directory that is not empty")
	cmd.Flags().BoolVar(&opts.NoSync, "no-sync", false,
		"return before the output is on disk: faster, and a power cut can leave an empty file")
	cmd.Flags().BoolVar(&opts.All, "all", false, "export all layers, also those without a name, to a directory")
	cmd.Flags().StringArrayVar(&opts.Files, "file", nil,
		"export only the file of this `name`, or the layer of this digest; can be repeated")
	cmd.Flags().StringVar(&opts.Platform, "platform", "",
		"of an index, export the manifest for this `os/architecture[/variant]`")
	cmd.Flags().BoolVar(&opts.NoUnpack, "no-unpack", false, "leave packed directories packed")
	cmd.Flags().BoolVar(&opts.Parents, "parents", false, "make missing directories that lead to the output")
	cmd.Flags().BoolVar(&opts.SkipSame, "skip-same", false, "succeed where the output has the content already")
	localFlag(cmd, &opts.Lookup)
	return cmd
}

// localFlag adds --local.
func localFlag(cmd *cobra.Command, lookup *blobstore.Lookup) {
	cmd.Flags().BoolVarP(&lookup.Local, "local", "l", false, "only look at what this host has, and don't ask peers")
}

func (s *session) exportFile(ctx context.Context, output string, opts blobstore.ExportOptions) error {
	if output == "-" && stdio.IsClosed(s.stdout) {
		return exit.Usage(errors.New("standard output is closed, or /dev/null that is open for reading, " +
			"too: there is nowhere to export to: say >/dev/null where that is meant"))
	}
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	began := time.Now()
	ctx = p2p.WithNotice(ctx, func(text string) { fmt.Fprintf(s.stderr, "dfcache: waiting: %s\n", printable(text)) })
	var end func()
	opts.Progress, end = s.progress(ctx, "export", func(ctx context.Context) int64 {
		file, err := repo.Stat(ctx, s.cid, opts.Lookup)
		if err != nil || opts.All || len(opts.Files) > 0 {
			return -1 // the export says why; or where something is chosen
		}
		return file.Size
	})
	var file blobstore.File
	var result io.Writer = s.out
	if output == "-" {
		result = s.stderr
		file, err = repo.Export(ctx, s.cid, s.stdout, opts)
	} else {
		file, err = repo.ExportFile(ctx, s.cid, output, opts)
	}
	end()
	switch {
	case errors.Is(err, artifact.ErrPacked):
		return fmt.Errorf("%w (--no-unpack exports the archive)", err)
	case errors.Is(err, blobstore.ErrNoOverwrite):
		if info, statErr := os.Stat(output); statErr == nil && info.IsDir() {
			return fmt.Errorf("%w: pass --overwrite to put the files there", err)
		}
		return fmt.Errorf("%w: pass --overwrite to replace it", err)
	case err != nil:
		return err
	}
	var text facts
	text.describe(file)
	if file.Unchanged {
		text.add("unchanged", "the output has it already")
	} else {
		text.from(file, began)
	}
	text.files(file)
	return s.report(result, file, text.String())
}

// maxSources is the number of peers that are named as those a file came from.
const maxSources = 10

// from adds where the bytes of a file came from, of an export that has begun at a time.
func (f *facts) from(file blobstore.File, began time.Time) {
	rest := file.Size
	for _, s := range file.Sources {
		rest -= s.Bytes
	}
	if len(file.Sources) == 0 {
		from := "this host"
		if !file.Local || !file.Imported.Before(began) { // as with a Dragonfly, which does not tell
			from = "other hosts"
		}
		f.add("from", "%s", from)
		return
	}
	sources := slices.SortedFunc(slices.Values(file.Sources),
		func(a, b blobstore.Source) int { return cmp.Compare(b.Bytes, a.Bytes) })
	for _, s := range sources[:min(len(sources), maxSources)] {
		f.add("from", "peer %s (%s), %s", printable(cmp.Or(s.Address, "(no address)")), printable(s.Peer),
			bytesAndHuman(s.Bytes))
	}
	if len(sources) > maxSources {
		var n int64
		for _, s := range sources[maxSources:] {
			n += s.Bytes
		}
		f.add("from", "%d more peers, %s", len(sources)-maxSources, bytesAndHuman(n))
	}
	if rest > 0 {
		f.add("from", "this host, %s", bytesAndHuman(rest))
	}
}
