package main

import (
	"context"

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
it, when it was imported here and when it was last used here.

` + storeStatus(exit.NotFound, exit.Corrupt),
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
	file, err := repo.Stat(ctx, s.cid, lookup)
	if err != nil {
		return err
	}
	var text facts
	text.describe(file)
	switch {
	case len(file.Files) > 0:
		text.add("pieces", "%d", file.Pieces)
	case file.Pieces > 0:
		text.add("pieces", "%d of %s", file.Pieces, human(file.PieceLength))
	default:
		text.add("pieces", "none: the file is empty")
	}
	local := "yes"
	if !file.Local {
		local = "no"
	}
	text.add("local", "%s (held %d of %d)", local, file.Held, file.Pieces)
	if !file.Imported.IsZero() {
		text.add("imported", "%s", moment(file.Imported))
		text.add("last used", "%s", moment(file.LastUsed))
	}
	text.files(file)
	return s.result.print(s.stdout, file, text.String())
}
