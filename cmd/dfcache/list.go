package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
)

// listed is one line of a list.
type listed struct {
	Tag       string        `json:"tag"`
	Type      string        `json:"type"` // name, manifest, blob, part or partial
	CID       string        `json:"cid"`
	Digest    digest.Digest `json:"digest"`   // empty for a name
	Manifest  digest.Digest `json:"manifest"` // what a name leads to, else empty
	Size      int64         `json:"size"`     // in bytes; a name's is that of all it leads to
	MediaType string        `json:"mediaType"`
	Local     bool          `json:"local"`
	Imported  time.Time     `json:"imported"`
	LastUsed  *time.Time    `json:"lastUsed"` // null where never
	Given     string        `json:"given"`    // the cid as Dragonfly's dfcache gave it; as CID where it did not
	GivenTag  string        `json:"givenTag"` // the same of the tag
}

func newListed(e blobstore.Entry) listed {
	l := listed{
		Tag: e.Task.Tag, Type: "part", CID: string(e.Task.Digest), Digest: e.Task.Digest, Size: e.Size,
		MediaType: e.MediaType, Local: e.Local(), Imported: e.Imported,
	}
	if !e.LastUsed.IsZero() {
		l.LastUsed = &e.LastUsed
	}
	switch {
	case e.Held < e.Pieces:
		l.Type, l.Size = "partial", e.Total
	case e.Name != "":
		l.Type, l.CID, l.Digest, l.Manifest, l.Size = "name", e.Name, "", e.Task.Digest, e.Total
	case e.Keep != p2p.KeepReferred && e.IsManifest:
		l.Type = "manifest"
	case e.Keep != p2p.KeepReferred:
		l.Type = "blob"
	}
	l.Given, l.GivenTag = given.Text(l.CID), given.Text(l.Tag)
	return l
}

// listing makes lines of what a store has.
func listing(
	ctx context.Context, store *blobstore.Store, entries iter.Seq2[blobstore.Entry, error],
) iter.Seq2[listed, error] {
	return func(yield func(listed, error) bool) {
		for e, err := range entries {
			l := newListed(e)
			if err == nil && l.Type == "name" && given.IsHashed(l.CID) {
				if repo, err := store.Repository(l.Tag); err == nil {
					l.Given = givenName(ctx, repo, l.CID)
				}
			}
			if !yield(l, err) {
				return
			}
		}
	}
}

func (a *app) listCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list [-t TAG]",
		Short: "List what this host has of the P2P cache",
		Long: `
The "list" command prints what the dfdaemon of this host holds, in order of tag:
the names (cache IDs) first, then the digests. With --tag it prints what is under
this tag; the empty tag is --tag "". The types are

    name      a cache ID, or a tag that a registry client has set; its size is
              that of everything it leads to
    manifest  one that a registry client has pushed, and that no name leads to
    blob      content that was imported or pushed under its digest
    part      content that is held because a name or a manifest leads to it
    partial   what has arrived of a file that is being fetched, or was and nobody
              waits for it any more; it makes room for others. They come last

As JSON the list is an array of objects. A template is executed on all of it. Of
a name, "manifest" is the digest of the manifest that it leads to, and "digest"
is empty: see "dfcache stat" for that of the file. Of the others "manifest" is
empty. "lastUsed" is null where that was never. "given" and "givenTag" are cid and
tag as Dragonfly's dfcache gave them, where they are names made of such a text; the
text form has the cid in parentheses then.

` + storeStatus(),
		Example: `  dfcache list --tag models
  dfcache list --format json | jq -r '.[] | select(.size > 1e9) | .cid'
  dfcache list --template '{{range .}}{{println .tag .cid .size}}{{end}}'`,
		Args: exit.Args(func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("cid") {
				return errors.New("list takes no --cid: use 'dfcache stat' for a single file")
			}
			return exit.NoArgs(cmd, args)
		}),
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.list(ctx, cmd.Flags().Changed("tag"))
			})
		},
	}
	a.result.flags(cmd)
	return cmd
}

// list lists the repository under --tag, or every one.
func (s *session) list(ctx context.Context, tagGiven bool) error {
	if err := s.checkNames(); err != nil {
		return err
	}
	store, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer store.Close()
	entries, partials := store.List(ctx), store.Partials(ctx)
	if tagGiven {
		repo, err := store.Repository(s.tag)
		if err != nil {
			return err
		}
		entries, partials = repo.List(ctx), repo.Partials(ctx)
	}
	entries = join(entries, known(partials, func(err error) {
		s.warn(fmt.Sprintf("what has arrived in part is not listed: %v", err))
	}))
	lines := listing(ctx, store, entries)
	// It may be long: what is printed goes out before the end is known.
	out := bufio.NewWriterSize(s.out, 64<<10)
	switch s.result.name {
	case jsonFormat:
		err = listJSON(out, lines)
	case templateFormat:
		err = s.listTemplate(out, lines)
	default:
		err = listText(out, lines)
	}
	if err != nil {
		err = fmt.Errorf("list: %w", err)
	}
	if flushed := out.Flush(); err == nil && flushed != nil {
		err = fmt.Errorf("print result: %w", flushed)
	}
	return err
}

// join yields what two lists have, up to an error.
func join(lists ...iter.Seq2[blobstore.Entry, error]) iter.Seq2[blobstore.Entry, error] {
	return func(yield func(blobstore.Entry, error) bool) {
		for _, list := range lists {
			for e, err := range list {
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
}

// known yields what a list has. Where the daemon is of a release that does not know such a list, it
// is empty, and warn is told.
func known(list iter.Seq2[blobstore.Entry, error], warn func(error)) iter.Seq2[blobstore.Entry, error] {
	return func(yield func(blobstore.Entry, error) bool) {
		for e, err := range list {
			if errors.Is(err, errors.ErrUnsupported) {
				warn(err)
				return
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func listText(w io.Writer, lines iter.Seq2[listed, error]) error {
	const line = "%-20s  %-8s  %10s  %-25s  %s\n"
	if _, err := fmt.Fprintf(w, line, "TAG", "TYPE", "SIZE", "IMPORTED", "CID"); err != nil {
		return err
	}
	for l, err := range lines {
		if err != nil {
			return err
		}
		tag := asGiven(l.Tag, l.GivenTag)
		if tag == "" {
			tag = "-"
		}
		if _, err := fmt.Fprintf(w, line, tag, l.Type, human(l.Size), moment(l.Imported),
			asGiven(l.CID, l.Given)); err != nil {
			return err
		}
	}
	return nil
}

func listJSON(w io.Writer, lines iter.Seq2[listed, error]) error {
	separator := "["
	for l, err := range lines {
		if err != nil {
			return err
		}
		data, err := json.Marshal(l)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s\n  %s", separator, data); err != nil {
			return err
		}
		separator = ","
	}
	end := "\n]\n"
	if separator == "[" {
		end = "[]\n"
	}
	_, err := io.WriteString(w, end)
	return err
}

// listTemplate executes the template on the whole list, so all of it has to be
// in memory.
func (s *session) listTemplate(w io.Writer, lines iter.Seq2[listed, error]) error {
	all := []listed{}
	for l, err := range lines {
		if err != nil {
			return err
		}
		all = append(all, l)
	}
	var out bytes.Buffer // nothing is printed when the template fails
	if err := s.result.execute(&out, all); err != nil {
		return err
	}
	_, err := out.WriteTo(w)
	return err
}
