package main

import (
	"cmp"
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// deletion is the result of a delete.
type deletion struct {
	CID   string `json:"cid"`
	Tag   string `json:"tag"`
	Tasks int    `json:"tasks"` // blobs that the tag has let go, here
	Freed int64  `json:"freed"` // bytes, here

	Reached int      `json:"reached"` // peers that do not hold it any more
	Removed int      `json:"removed"` // of these, that had something to remove
	Missed  []missed `json:"missed"`
}

// missed is a peer that a delete was not done on.
type missed struct {
	Peer    string `json:"peer"`
	Address string `json:"address"`
	Reason  string `json:"reason"`
}

func (m missed) String() string {
	return fmt.Sprintf("%s %s: %s", printable(m.Peer), printable(cmp.Or(m.Address, "(no address)")),
		printable(m.Reason))
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

Bytes are freed when no tag holds them any more. A program that reads the file at the time
can read on.

All peers do the same. The result says how many were reached, on how many of these
there was something to remove, and which were missed: they are named on stderr,
too, and do it when they return, so that this is a success. Dragonfly, where that is
the engine, deletes on this host only; the result says where others have it still.

As JSON, "missed" is an array of objects with "peer", "address" and "reason".

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
	text.add("removed", "%s", count(deleted.Tasks, "blob", "blobs"))
	text.add("freed", "%s", bytesAndHuman(deleted.Freed))
	result := deletion{
		CID: s.cid, Tag: s.tag, Tasks: deleted.Tasks, Freed: deleted.Freed,
		Reached: deleted.Reached, Removed: deleted.Removed, Missed: []missed{},
	}
	if deleted.Reached > 0 || len(deleted.Missed) > 0 {
		text.add("peers", "reached %d, removed on %d", deleted.Reached, deleted.Removed)
	}
	for _, m := range deleted.Missed {
		result.Missed = append(result.Missed, missed(m))
		text.add("missed", "%s", missed(m))
	}
	if len(result.Missed) > 0 {
		s.log.Warn("peers were missed", "count", len(result.Missed))
		fmt.Fprintf(s.stderr, "dfcache: warning: %s not reached; a dfdaemon of the swarm deletes it when it returns:\n",
			count(len(result.Missed), "peer was", "peers were"))
		for _, m := range result.Missed {
			fmt.Fprintf(s.stderr, "  %s\n", m)
		}
	}
	return s.result.print(s.stdout, result, text.String())
}
