package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

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
to who runs the command.

A cache ID can lead to several files, where a registry client has pushed it so:
they are exported under their own names to a new or empty directory OUTPUT, all
of them or none. With --overwrite the directory may have other files, too.

The output "-" is stdout. What a failed export has written there by then can't be
taken back, so check the exit status. The result goes to stderr.

` + storeStatus(exit.NotFound, exit.NoSpace, exit.Corrupt, exit.OutputExists),
		Example: `  dfcache export --tag models --cid v1 -O /tmp/model.bin

  # only if this host has it
  dfcache export --local --cid sha256:2cf2...9824 /tmp/file

  # into a pipe
  dfcache export --cid backup - | tar -x`,
		Args:    oneFile("output"),
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				output = args[0]
			}
			if output == "" {
				return exit.FlagError(cmd, errors.New("the output is missing: name it as OUTPUT or with -O OUTPUT, \"-\" is stdout"))
			}
			if err := a.needCID(cmd); err != nil {
				return err
			}
			return a.session(cmd, a.consoleFile(output == "-"), func(ctx context.Context, s *session) error {
				return s.exportFile(ctx, output, opts)
			})
		},
	}
	a.result.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "O", "", "export to the given `file`, - is stdout; several files to a directory")
	cmd.Flags().BoolVar(&opts.Overwrite, "overwrite", false, "replace an existing file, or put files into a directory that is not empty")
	localFlag(cmd, &opts.Lookup)
	return cmd
}

// localFlag adds --local.
func localFlag(cmd *cobra.Command, lookup *blobstore.Lookup) {
	cmd.Flags().BoolVarP(&lookup.Local, "local", "l", false, "only look at what this host has, and don't ask peers")
}

func (s *session) exportFile(ctx context.Context, output string, opts blobstore.ExportOptions) error {
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	end := func() {}
	if s.hasTerminal() {
		file, err := repo.Stat(ctx, s.cid, opts.Lookup)
		if err != nil {
			return err
		}
		opts.Progress, end = s.progress("export", file.Size)
	}
	var file blobstore.File
	result := s.stdout
	if output == "-" {
		result = s.stderr
		file, err = repo.Export(ctx, s.cid, s.stdout, opts)
	} else {
		file, err = repo.ExportFile(ctx, s.cid, output, opts)
	}
	end()
	if err != nil {
		return err
	}
	var text facts
	text.describe(file)
	text.files(file)
	return s.result.print(result, file, text.String())
}
