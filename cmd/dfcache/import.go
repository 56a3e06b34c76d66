package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
	"github.com/dfcache/dfcache/digest"
)

func (a *app) importCommand() *cobra.Command {
	var input, algorithm string
	var replicas int
	cmd := &cobra.Command{
		Use:   "import [-i CID] {FILE | -I FILE}",
		Short: "Import a file into the P2P cache",
		Long: `
The "import" command stores a file under a cid, and returns when it is durable:
it then survives a crash and a power cut. The file "-" is stdin.

A file that is written to while it is imported is refused: what was read may be a mix
that it never was. The message says where it was only appended to.

Where the cid is a digest, the content has to match it; otherwise nothing is
stored. Where it is a cache ID, it names the file from now on, and if it was the
name of another file, that one is let go. Without --cid the file is stored under
its sha256, or the digest that --algorithm says, which is printed.

With --replicas the command returns when so many peers, too, hold the file whole. It
fails where there are not so many that can, or when --timeout is over; the file
is stored on this host then all the same. As JSON, "replicas" is an array of the
IDs of these peers.

` + storeStatus(exit.Mismatch, exit.NoSpace, exit.Unreachable, exit.Changed),
		Example: `  # under a name of your own
  dfcache import --tag models --cid v1 /srv/model.bin

  # under its digest, which is computed and printed
  dfcache import --tag models /srv/model.bin

  # on this host and two others
  dfcache import --tag models --cid v1 --replicas 2 --timeout 10m /srv/model.bin

  # from stdin, checked
  curl -sSL https://example.com/file | dfcache import --cid sha256:2cf2...9824 -`,
		Args:    oneFile("input"),
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				input = args[0]
			}
			if input == "" {
				return exit.FlagError(cmd,
					errors.New("the file is missing: name it as FILE or with -I FILE, \"-\" is stdin"))
			}
			if a.cid == "" && cmd.Flags().Changed("cid") {
				// Most likely a variable that has no value.
				return exit.FlagError(cmd,
					errors.New("--cid is empty: give it a value, or leave it out to store the file under its digest"))
			}
			if replicas < 0 {
				return exit.FlagError(cmd,
					fmt.Errorf("--replicas %d is negative: pass how many peers are to hold the file, or 0", replicas))
			}
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.importFile(ctx, input, algorithm, replicas)
			})
		},
	}
	a.result.flags(cmd)
	cmd.Flags().StringVarP(&input, "input", "I", "", "import the given `file`, - is stdin")
	cmd.Flags().StringVar(&algorithm, "algorithm", string(digest.SHA256),
		"digest `algorithm` where --cid is no digest: sha256, sha384 or sha512")
	cmd.Flags().IntVar(&replicas, "replicas", 0, "return when `N` peers, too, hold the file whole")
	complete(cmd, "algorithm", string(digest.SHA256), string(digest.SHA384), string(digest.SHA512))
	return cmd
}

func (s *session) importFile(ctx context.Context, input, algorithm string, replicas int) error {
	alg, err := digest.ParseAlgorithm(algorithm)
	if err != nil {
		return fmt.Errorf("--algorithm: %w", err)
	}
	// Before a pipe is opened that then nobody reads.
	if err := s.checkNames(); err != nil {
		return err
	}
	if input == "-" && stdio.IsClosed(s.stdin) {
		return exit.Usage(errors.New("standard input is closed: there is nothing to import"))
	}
	var src io.Reader = s.stdin
	title, size := "", int64(-1)
	if input != "-" {
		f, err := openInput(input)
		if err != nil {
			return err
		}
		defer f.Close()
		src, title = f, input
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			size = info.Size()
		}
	}
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	set, end := s.progress("import", size)
	file, err := repo.Import(ctx, s.cid, src, blobstore.ImportOptions{Title: title, Algorithm: alg, Progress: set})
	end()
	if err != nil {
		return err
	}
	var text facts
	text.describe(file)
	result := imported{File: file, replicas: []string{}}
	if replicas > 0 {
		result.replicas, err = repo.Replicate(ctx, file.CID, replicas)
		if err != nil {
			return s.notReplicated(ctx, repo, file, replicas, err)
		}
		text.add("replicas", "%d: %s", len(result.replicas), strings.Join(result.replicas, ", "))
	}
	return s.result.print(s.stdout, result, text.String())
}

// imported is the result of an import.
type imported struct {
	blobstore.File
	replicas []string // IDs of the peers that hold it, too
}

// MarshalJSON adds "replicas" to what a file is as JSON.
func (i imported) MarshalJSON() ([]byte, error) {
	file, err := json.Marshal(i.File)
	if err != nil {
		return nil, err
	}
	replicas, err := json.Marshal(i.replicas)
	if err != nil {
		return nil, err
	}
	file = append(bytes.TrimSuffix(file, []byte("}")), `,"replicas":`...)
	return append(append(file, replicas...), '}'), nil
}

// holdersWithin bounds how long peers are asked whether they have a file, when the time
// for the command is over.
const holdersWithin = stuckAfter / 2

// notReplicated says that a file is stored, although the command fails: err is why
// there are too few peers that hold it.
func (s *session) notReplicated(
	ctx context.Context, repo *blobstore.Repository, file blobstore.File, replicas int, err error,
) error {
	why, code := err.Error(), exit.Code(err)
	switch {
	case code == exit.Interrupted:
		why = "interrupted"
	case code == exit.Timeout && s.timeout > 0: // which the daemon can notice first
		why = fmt.Sprintf("--timeout %s was not enough", s.timeout)
	}
	if code == exit.Interrupted || code == exit.Timeout {
		// The engine had no time to say it.
		counting, cancel := context.WithTimeout(context.WithoutCancel(ctx), holdersWithin)
		defer cancel()
		if f, statErr := repo.Stat(counting, file.CID, blobstore.Lookup{Providers: true}); statErr == nil &&
			f.Providers != nil {
			why += ", and " + count(f.Providers.Whole, "peer holds it", "peers hold it") + " whole by now"
		}
	}
	if code == exit.Unreachable && isOfSwarm(err) {
		why += ": " + unreachableAdvice
	}
	return &storedError{toldError{
		fmt.Sprintf("import: the file is stored on this host as %s, but not on %s, too: %s", file.CID,
			count(replicas, "peer", "peers"), why),
		err,
	}}
}

// storedError says that an import failed although the file is stored.
type storedError struct{ toldError }

// openInput opens a file to import.
func openInput(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, exit.Usage(fmt.Errorf("input: %w", err))
	}
	if info, err := f.Stat(); err == nil && info.IsDir() {
		f.Close()
		return nil, exit.Usage(fmt.Errorf(
			"input %s is a directory: import a single file, such as an archive of it", path))
	}
	return f, nil
}

// oneFile checks that a file is named on the command line at most once: as an
// argument or by the flag.
func oneFile(flag string) cobra.PositionalArgs {
	return exit.Args(func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) > 1:
			return fmt.Errorf("surplus argument %q: %s takes one file", args[1], cmd.CommandPath())
		case len(args) == 1 && cmd.Flags().Changed(flag):
			return fmt.Errorf("file %q and --%s given: pass one of them", args[0], flag)
		case len(args) == 1 && args[0] == "":
			return errors.New("the file's name is empty")
		}
		return nil
	})
}
