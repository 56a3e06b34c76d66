package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
	"github.com/dfcache/dfcache/digest"
)

func (a *app) importCommand() *cobra.Command {
	var input, algorithm string
	var replicas int
	cmd := &cobra.Command{
		Use:   "import [-i CID] {FILE | -I FILE | DIR | FILE|DIR...}",
		Short: "Import a file, or several together, into the P2P cache",
		Long: `
The "import" command stores a file under a cid, and returns when it is durable:
it then survives a crash and a power cut. The file "-" is stdin.

A directory, or several files and directories, become one artifact under a cache ID,
in one step: each file keeps its path and its mode, and there are the modes of
directories, empty directories, and symbolic links. Of a single directory the paths
are those below it; several each have their own name before that. A link may only
lead to what is in its directory; devices, pipes and sockets are refused. There are
at most 9,999 files. The same content makes the same artifact, and "dfcache export"
gives all of it back. Registry clients get each file under its path.

A file that is written to while it is imported is refused: what was read may be a mix
that it never was. The message says where it was only appended to.

Where the cid is a digest, the content has to match it; otherwise nothing is
stored. Where it is a cache ID, it names the file from now on, and if it was the
name of another file, that one is let go; of the file's mode is recorded whether it
can be run, nothing else. Without --cid the file is stored under
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

  # a directory, or several files
  dfcache import --tag builds --cid v1 out/
  dfcache import --tag builds --cid v2 bin/ README.md

  # on this host and two others
  dfcache import --tag models --cid v1 --replicas 2 --timeout 10m /srv/model.bin

  # from stdin, checked
  curl -sSL https://example.com/file | dfcache import --cid sha256:2cf2...9824 -`,
		Args:    inputs,
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, args []string) error {
			paths := args
			if len(paths) == 0 && input != "" {
				paths = []string{input}
			}
			if len(paths) == 0 {
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
				return s.importPaths(ctx, paths, algorithm, replicas)
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

func (s *session) importPaths(ctx context.Context, paths []string, algorithm string, replicas int) error {
	alg, err := digest.ParseAlgorithm(algorithm)
	if err != nil {
		return fmt.Errorf("--algorithm: %w", err)
	}
	// Before a pipe is opened that then nobody reads.
	if err := s.checkNames(); err != nil {
		return err
	}
	if len(paths) == 1 && paths[0] == "-" && stdio.IsClosed(s.stdin) {
		return exit.Usage(errors.New("standard input is closed, or /dev/null that is open for writing, too: " +
			"there is nothing to import: say </dev/null where that is meant"))
	}
	if info, err := os.Stat(paths[0]); len(paths) > 1 || err == nil && info.IsDir() {
		if s.cid == "" {
			what := fmt.Sprintf("input %s is a directory", paths[0])
			if len(paths) > 1 {
				what = fmt.Sprintf("input: there are %d files", len(paths))
			}
			return exit.Usage(fmt.Errorf("%s: name what is imported together by a cache ID, with -i", what))
		}
		return s.imports(ctx, replicas, func(ctx context.Context, repo *blobstore.Repository) (blobstore.File, error) {
			set, end := s.progress(ctx, "import", func(context.Context) int64 { return -1 })
			defer end()
			file, err := repo.ImportFiles(ctx, s.cid, paths, blobstore.ImportOptions{Algorithm: alg, Progress: set})
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				err = exit.Usage(err)
			}
			return file, err
		})
	}
	if err := checkStdin(s.stdin); paths[0] == "-" && err != nil {
		return err
	}
	var src io.Reader = s.stdin
	title, size, executable := "", int64(-1), false
	if input := paths[0]; input != "-" {
		f, err := os.Open(input)
		if err != nil {
			return exit.Usage(fmt.Errorf("input: %w", err))
		}
		defer f.Close()
		src, title = f, input
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			size, executable = info.Size(), info.Mode()&0o111 != 0
		}
	}
	return s.imports(ctx, replicas, func(ctx context.Context, repo *blobstore.Repository) (blobstore.File, error) {
		set, end := s.progress(ctx, "import", func(context.Context) int64 { return size })
		defer end()
		return repo.Import(ctx, s.cid, src,
			blobstore.ImportOptions{Title: title, Executable: executable, Algorithm: alg, Progress: set})
	})
}

// imports does an import, has peers hold what was imported, and prints the result.
func (s *session) imports(
	ctx context.Context, replicas int, do func(context.Context, *blobstore.Repository) (blobstore.File, error),
) error {
	repo, done, err := s.repository(ctx)
	if err != nil {
		return err
	}
	defer done()
	noticing, warn := s.notices(ctx)
	file, err := do(noticing, repo)
	warn()
	if err != nil {
		return err
	}
	var text facts
	text.describe(file)
	result := imported{File: file, replicas: []string{}}
	if replicas > 0 {
		end := nowAndThen(ctx, s.stderr, func() string {
			return "dfcache: import: the file is stored here; waiting until " +
				count(replicas, "peer holds", "peers hold") + " it, too"
		})
		result.replicas, err = repo.Replicate(ctx, file.CID, replicas)
		end()
		if err != nil {
			return s.notReplicated(ctx, repo, file, replicas, err)
		}
		text.add("replicas", "%d: %s", len(result.replicas), strings.Join(result.replicas, ", "))
	}
	text.files(file)
	return s.report(s.out, result, text.String())
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

// inputs checks what is to be imported: as arguments or by the flag.
func inputs(cmd *cobra.Command, args []string) error {
	check := exit.Args(func(cmd *cobra.Command, args []string) error {
		for _, arg := range args {
			if arg == "-" {
				return errors.New("\"-\" is stdin, which can't be imported together with files")
			}
		}
		if cmd.Flags().Changed("input") {
			return fmt.Errorf("file %q and --input given: pass one of them", args[0])
		}
		if slices.Contains(args, "") {
			return errors.New("the file's name is empty")
		}
		return nil
	})
	if len(args) > 1 {
		return check(cmd, args)
	}
	return oneFile("input")(cmd, args)
}

// checkStdin reports what can't be imported whatever it has.
func checkStdin(f *os.File) error {
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return exit.Usage(errors.New("standard input is a directory: import it by its path"))
	}
	flags := 0
	if raw, err := f.SyscallConn(); err == nil { // Fd would have the kernel wait for a pipe, without end
		_ = raw.Control(func(fd uintptr) { flags, _ = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	}
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		return exit.Usage(errors.New("standard input is not open for reading"))
	}
	return nil
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
