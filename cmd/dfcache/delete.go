package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// deletion is the result of a delete.
type deletion struct {
	CID   string `json:"cid"`
	Tag   string `json:"tag"`
	Tasks int    `json:"tasks"` // blobs that the tag has let go
	Freed int64  `json:"freed"` // bytes
}

func (a *app) deleteCommand() *cobra.Command {
	var opts blobstore.DeleteOptions
	cmd := &cobra.Command{
		Use:   "delete -i CID",
		Short: "Delete a file from the P2P cache",
		Long: `
The "delete" command removes what a cid names. A cache ID goes with everything
that only it held: the manifest, its files or layers, and what is attached to it.
A digest that a manifest refers to is not removed, unless --force is given; then
the manifest leads nowhere.

Bytes are freed when no tag holds them any more. Who reads the file at the time
can read on.

` + storeStatus(exit.NotFound, exit.Referenced),
		Example: `  dfcache delete -i testid -t testtag`,
		Args:    exit.NoArgs,
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.needCID(cmd); err != nil {
				return err
			}
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.delete(ctx, opts)
			})
		},
	}
	a.result.flags(cmd)
	cmd.Flags().BoolVar(&opts.Force, "force", false, "delete a digest although other content refers to it")
	return cmd
}

func (s *session) delete(ctx context.Context, opts blobstore.DeleteOptions) error {
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	deleted, err := repo.Remove(ctx, s.cid, opts)
	if err != nil {
		return err
	}
	var text facts
	text.add("deleted", "%s", s.cid)
	if s.tag != "" {
		text.add("tag", "%s", s.tag)
	}
	blobs := "blobs"
	if deleted.Tasks == 1 {
		blobs = "blob"
	}
	text.add("removed", "%d %s", deleted.Tasks, blobs)
	text.add("freed", "%s", bytesAndHuman(deleted.Freed))
	return s.result.print(s.stdout, deletion{s.cid, s.tag, deleted.Tasks, deleted.Freed}, text.String())
}
