package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p"
)

// deletion is the result of a delete.
type deletion struct {
	CID   string `json:"cid"` // "" where there are several, or all of the tag
	Tag   string `json:"tag"`
	Tasks int    `json:"tasks"` // blobs that the tag has let go, here
	Freed int64  `json:"freed"` // bytes, here

	Reached int `json:"reached"` // peers that do not hold it any more
	Removed int `json:"removed"` // of these, that had something to remove

	NotFound []string `json:"notFound"` // of several cids, those that were nowhere
	Missed   []missed `json:"missed"`
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
	var all bool
	cmd := &cobra.Command{
		Use:   "delete {-i CID | CID... | -t TAG --all}",
		Short: "Delete files from the P2P cache",
		Long: `
The "delete" command removes what a cid names. A cache ID goes with everything
that only it held: the manifest, its files or layers, and what is attached to it.
A digest that a manifest refers to is not removed, unless --force is given; then
the manifest leads nowhere.

Several cids go in one transaction of up to ` + strconv.Itoa(p2p.MaxAlso+1) + `, in any order: all of them or, where one
can't, none. Those that are nowhere are named, and the exit code is that of one that is not found;
the others are deleted all the same. --all deletes everything under the tag, here and on all
peers, and leaves less to remember than a delete of each.

Bytes are freed when no tag holds them any more. A program that reads the file at the time
can read on.

All peers do the same. The result says how many were reached, on how many of these
there was something to remove, and which were missed: they are named on stderr,
too, and do it when they return, so that this is a success. Dragonfly, where that is
the engine, deletes on this host only, and is among the missed where others have it
still: they don't do it by themselves.

As JSON, "missed" is an array of objects with "peer", "address" and "reason", and "notFound" one
of cids.

` + storeStatus(exit.NotFound, exit.Referenced),
		Example: `  dfcache delete -i testid -t testtag
  dfcache delete -t builds v1 v2 v3
  dfcache delete -t builds --all`,
		Args:    cobra.ArbitraryArgs,
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, cids []string) error {
			if a.cid != "" {
				cids = append([]string{a.cid}, cids...)
			}
			switch {
			case all && len(cids) > 0:
				return exit.FlagError(cmd, errors.New("--all deletes everything under --tag: leave the cids out"))
			case all && !cmd.Flags().Changed("tag"):
				return exit.FlagError(cmd, errors.New(
					"--all deletes everything under a tag: say which with --tag (--tag '' is where no tag is given)"))
			case !all && len(cids) == 0:
				return a.needCID(cmd)
			}
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.delete(ctx, cids, opts)
			})
		},
	}
	a.result.flags(cmd)
	cmd.Flags().BoolVar(&all, "all", false, "delete everything under --tag")
	cmd.Flags().BoolVar(&opts.Force, "force", false, "delete a digest although other content refers to it")
	return cmd
}

// delete deletes cids, or, where there are none, everything under the tag.
func (s *session) delete(ctx context.Context, cids []string, opts blobstore.DeleteOptions) error {
	seen := map[string]bool{}
	cids = slices.DeleteFunc(cids, func(cid string) bool { again := seen[cid]; seen[cid] = true; return again })
	for _, cid := range cids {
		if err := s.checkCID(cid); err != nil {
			return err
		}
	}
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	var result deletion
	if len(cids) == 0 {
		result, err = s.deleted(repo.RemoveAll(ctx))
	}
	var nowhere error
	for part := range slices.Chunk(cids, p2p.MaxAlso+1) {
		var one deletion
		opts.Also = part[1:]
		one, err = s.deleted(repo.Remove(ctx, part[0], opts))
		if errors.Is(err, blobstore.ErrNotFound) && len(cids) > 1 {
			one.NotFound, nowhere, err = part, err, nil
		}
		result.add(one)
		if err != nil {
			break
		}
	}
	if err != nil || nowhere != nil && len(result.NotFound) == len(cids) {
		return cmp.Or(err, nowhere)
	}
	what := "all"
	if len(cids) == 1 {
		result.CID, what = cids[0], cids[0]
	} else if len(cids) > 1 {
		what = count(len(cids)-len(result.NotFound), "cid", "cids")
	}
	if err := s.printDeletion(what, result); err != nil {
		return err
	}
	if len(result.NotFound) > 0 {
		err = fmt.Errorf("delete: %s: %w; the others are deleted", strings.Join(result.NotFound, ", "),
			blobstore.ErrNotFound)
	}
	return err
}

// deleted is the result of one call.
func (s *session) deleted(d blobstore.Deleted, err error) (deletion, error) {
	result := deletion{Tag: s.tag, Tasks: d.Tasks, Freed: d.Freed, Reached: d.Reached, Removed: d.Removed,
		Missed: []missed{}, NotFound: []string{}}
	for _, m := range d.Missed {
		result.Missed = append(result.Missed, missed(m))
	}
	if err == nil {
		for _, c := range d.NotFound {
			result.NotFound = append(result.NotFound, c.String())
		}
	}
	return result, err
}

// add adds the result of a further call.
func (d *deletion) add(next deletion) {
	if d.Missed == nil {
		*d = next
		return
	}
	d.Tasks, d.Freed = d.Tasks+next.Tasks, d.Freed+next.Freed
	d.Reached, d.Removed = max(d.Reached, next.Reached), max(d.Removed, next.Removed)
	for _, m := range next.Missed {
		if !slices.ContainsFunc(d.Missed, func(known missed) bool { return known.Peer == m.Peer }) {
			d.Missed = append(d.Missed, m)
		}
	}
	d.NotFound = append(d.NotFound, next.NotFound...)
}

func (s *session) printDeletion(what string, result deletion) error {
	var text facts
	text.add("deleted", "%s", what)
	if s.tag != "" {
		text.add("tag", "%s", s.tag)
	}
	text.add("removed", "%s", count(result.Tasks, "blob", "blobs"))
	text.add("freed", "%s", bytesAndHuman(result.Freed))
	if result.Reached > 0 || len(result.Missed) > 0 {
		text.add("peers", "reached %d, removed on %d", result.Reached, result.Removed)
	}
	for _, m := range result.Missed {
		text.add("missed", "%s", m)
	}
	s.warnOfMissed(result.Missed)
	return s.report(s.out, result, text.String())
}

// dragonfly is what stands for a Dragonfly among the peers of a daemon, which has no ID.
const dragonfly = "Dragonfly"

// warnOfMissed says on stderr where a delete was not done, and what becomes of that.
func (s *session) warnOfMissed(all []missed) {
	if len(all) == 0 {
		return
	}
	s.log.Warn("peers were missed", "count", len(all))
	var peers, dragonflies []missed
	for _, m := range all {
		if m.Peer == dragonfly {
			dragonflies = append(dragonflies, m)
		} else {
			peers = append(peers, m)
		}
	}
	say := func(what string, about []missed) {
		if len(about) > 0 {
			fmt.Fprintf(s.stderr, "dfcache: warning: %s:\n", what)
		}
		for _, m := range about {
			fmt.Fprintf(s.stderr, "  %s\n", m)
		}
	}
	say(count(len(peers), "peer was", "peers were")+
		" not reached; a dfdaemon of the swarm deletes it when it returns", peers)
	say("Dragonfly has it still, or may have, and does not delete it by itself", dragonflies)
}
