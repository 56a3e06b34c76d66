// Command dfcache imports files into a peer-to-peer cache, and exports, looks
// up, lists and deletes what is in it, and shows the peers. It has no store of its own: a dfdaemon
// does the work.
//
// This package holds flags and output only; the work is done by package blobstore.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/cmd/internal/settings"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
)

func main() { os.Exit(run(os.Args[1:])) }

// run runs the command line args and returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once, should something hang.
	context.AfterFunc(ctx, stop)

	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, out: &stdio.Output{}}
	root := a.root()
	root.SetArgs(args)
	// A plugin takes the place of this process. Where there is none of that
	// name, cobra says that the command is unknown.
	err := a.runPlugin(root, args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	if err == nil && a.out.Err() != nil {
		err = fmt.Errorf("print: %w", a.out.Err())
	}
	if err != nil {
		fmt.Fprintf(a.stderr, "dfcache: %v\n", err)
	}
	return exit.Code(err)
}

// app is one run of dfcache: its files, and the values of its flags.
type app struct {
	stdin, stdout, stderr *os.File
	out                   *stdio.Output // stdout, for what is printed

	// The global flags. What is empty by default is filled in by load.
	cid         string
	asName      bool
	tag         string
	timeout     time.Duration
	workHome    string
	logDir      string
	console     bool
	verbose     bool
	pprofPort   int
	jaeger      string
	serviceName string
	socket      string
	daemonUsers string
	daemonUIDs  []uint32 // of these
	noTTY       bool

	result resultFormat

	workHomeGiven, logDirGiven, socketGiven, serviceNameGiven bool
}

// globalFlags adds the flags that every command has. Their defaults must not
// show where this machine keeps things, so that generated documents are the
// same everywhere.
func (a *app) globalFlags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVarP(&a.cid, "cid", "i", "",
		"content or cache `ID`: an OCI digest of the content (sha256:HEX), or a name of your own")
	f.BoolVar(&a.asName, "as-name", false, "take a --cid of hex digits alone, as sha256sum prints a digest, for a name")
	f.StringVarP(&a.tag, "tag", "t", "", "namespace of the cid: the same cid under different `tag`s is different files")
	f.DurationVar(&a.timeout, "timeout", 0, "bound for the whole operation, for example 90s; 0 is infinite")
	f.StringVar(&a.workHome, "workhome", "", "working `directory` (default /var/lib/dfcache for root, else dragonfly "+
		"in the XDG data directory); a dfdaemon that runs already keeps its own")
	f.StringVar(&a.logDir, "logdir", "", "`directory` of the log files (default logs in --workhome where that is "+
		"given, else /var/log/dragonfly for root, dragonfly/logs in the XDG state directory for others)")
	f.BoolVar(&a.console, "console", false,
		"print log records, too: to stdout, or to stderr where stdout has the content or a --format")
	f.BoolVar(&a.verbose, "verbose", false, "log at debug level")
	f.String("config", paths.Config("dfcache"), "configuration `file` in YAML, also set by DFCACHE_CONFIG (default "+
		"/etc/dragonfly/dfcache.yaml, or dragonfly/dfcache.yaml in the XDG configuration directory)")
	f.Lookup("config").DefValue = ""
	f.IntVar(&a.pprofPort, "pprof-port", -1, "serve pprof profiles on this `port` of 127.0.0.1, to this user and "+
		"root; 0 is any free port, which is printed; -1 is off")
	f.StringVar(&a.jaeger, "jaeger", "",
		"send traces to this OTLP/HTTP `URL` of a Jaeger or a collector, for example http://localhost:4318")
	f.StringVar(&a.serviceName, "service-name", "dragonfly-dfcache", "`name` of the service in traces")
	f.StringVar(&a.socket, "daemon-sock", "", "unix `socket` of the dfdaemon (default dfdaemon.sock in "+
		"/run/dragonfly for root, else in dragonfly in the XDG runtime directory; a dfdaemon is started there when "+
		"none answers)")
	f.StringVar(&a.daemonUsers, "daemon-user", "dragonfly",
		"`users` whose dfdaemon is trusted, besides root and you: names or IDs, with commas between them")
	f.BoolVar(&a.noTTY, "no-tty", false, "no progress bar, even on a terminal: a line every ten seconds, as elsewhere")
}

// load completes the flags of cmd from the environment and the configuration
// file, and checks those that all commands share. It is the PreRunE of every
// command that can be configured.
func (a *app) load(cmd *cobra.Command, _ []string) error {
	if err := settings.Load(cmd, "DFCACHE"); err != nil {
		return err
	}
	if a.timeout < 0 {
		return exit.FlagError(cmd, fmt.Errorf(
			"--timeout %s is negative: pass a duration such as 30s, or 0 for no limit", a.timeout))
	}
	var err error
	if a.daemonUIDs, err = uidsOf(a.daemonUsers, cmd.Flags().Changed("daemon-user")); err != nil {
		return exit.FlagError(cmd, err)
	}
	for _, path := range []*string{&a.workHome, &a.logDir, &a.socket} {
		// A daemon that is started does not run where this process does.
		if *path != "" {
			if *path, err = filepath.Abs(*path); err != nil {
				return err
			}
		}
	}
	a.serviceNameGiven = cmd.Flags().Changed("service-name")
	a.workHomeGiven, a.logDirGiven, a.socketGiven = a.workHome != "", a.logDir != "", a.socket != ""
	if !a.logDirGiven {
		a.logDir = paths.LogDir()
		if a.workHomeGiven {
			a.logDir = filepath.Join(a.workHome, "logs")
		}
	}
	if !a.workHomeGiven {
		a.workHome = paths.WorkHome()
	}
	if !a.socketGiven {
		a.socket = paths.Socket()
	}
	return a.result.check(cmd)
}

// uidsOf returns the IDs of users, which are names or IDs with commas between
// them. One that is not there is passed over unless it was given.
func uidsOf(users string, given bool) (uids []uint32, err error) {
	for name := range strings.SplitSeq(users, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		number := name
		if _, err := strconv.ParseUint(name, 10, 32); err != nil {
			u, err := user.Lookup(name)
			if err != nil && !given {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("--daemon-user %s: %w: pass a user of this host, or a user ID", name, err)
			}
			number = u.Uid
		}
		uid, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("--daemon-user %s: %w", name, err)
		}
		uids = append(uids, uint32(uid))
	}
	return uids, nil
}

// needCID reports a missing --cid.
func (a *app) needCID(cmd *cobra.Command) error {
	if a.cid == "" {
		return exit.FlagError(cmd, errors.New("--cid is missing: name the file with -i, by a digest or a cache ID"))
	}
	return nil
}
