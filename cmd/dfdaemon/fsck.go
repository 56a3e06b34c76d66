package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/pieces"
)

// fsckResult is what fsck prints as JSON.
type fsckResult struct {
	Blobs    int              `json:"blobs"` // that were read
	Bytes    int64            `json:"bytes"` // that were read
	Problems []pieces.Problem `json:"problems"`
}

func newFsck(o *options) *cobra.Command {
	var format format
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Read all content and report what is damaged",
		Long: `
The "fsck" command reads every blob in the data directory and compares it with its
digest, and the records with each other and with the files. It prints each problem
on a line, then a summary, and changes nothing. No dfdaemon may be running there.

To repair a damaged blob, import its file again.

` + manual.ExitStatus("dfdaemon", exit.Invalid, exit.Unavailable, exit.Corrupt, exit.Interrupted),
		Example: `  dfdaemon fsck
  dfdaemon fsck --data-dir /srv/dragonfly/data --format json`,
		Args: exit.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.fsck(cmd, format) },
	}
	format.flag(cmd)
	return cmd
}

func (o *options) fsck(cmd *cobra.Command, format format) error {
	if err := o.load(cmd); err != nil {
		return err
	}
	if err := format.check(cmd); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	var closeLog func()
	log, err := o.openLog(cmd.ErrOrStderr(), func(f func()) { closeLog = f })
	if err != nil {
		return err
	}
	defer closeLog()
	out := cmd.OutOrStdout()
	result := fsckResult{Problems: []pieces.Problem{}}
	advice := "import the files of damaged blobs again; a stray file can be removed"
	sum, err := pieces.CheckDir(ctx, o.dataDir, func(p pieces.Problem) {
		if p.Kind == pieces.KindMetadata {
			advice = "put meta.db back from a copy, or start with an empty data directory and import the files in " +
				"blobs/ of this one; remove nothing before"
		}
		log.Warn("problem", "kind", p.Kind, "digest", p.Digest, "piece", p.Piece, "path", p.Path, "detail", p.Detail)
		if format == "json" {
			result.Problems = append(result.Problems, p)
		} else {
			fmt.Fprintln(out, p)
		}
	})
	if errors.Is(err, fs.ErrNotExist) {
		return exit.Usage(fmt.Errorf("%w: name the data directory with --data-dir or --workhome", err))
	} else if err != nil {
		return err
	}
	if format == "json" {
		result.Blobs, result.Bytes = sum.Blobs, sum.Bytes
		err = printJSON(out, result)
	} else {
		_, err = fmt.Fprintf(out, "%d blobs with %d bytes read, %d problems\n", sum.Blobs, sum.Bytes, sum.Problems)
	}
	if err != nil {
		return err
	}
	if sum.Problems > 0 {
		return fmt.Errorf("the data directory %s is %w: %s", o.dataDir, digest.ErrCorrupt, advice)
	}
	return nil
}

// format is the value of --format.
type format string

func (f *format) flag(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(f), "format", "text", "`format` of the result: text or json")
	// The error would be for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc("format",
		cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

func (f format) check(cmd *cobra.Command) error {
	if f != "text" && f != "json" {
		return exit.FlagError(cmd, fmt.Errorf("unknown --format %q: use text or json", f))
	}
	return nil
}

func printJSON(w io.Writer, value any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(value)
}
