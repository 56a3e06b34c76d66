// Command dfdaemon holds the content of the cache, answers dfcache over a unix
// socket, and serves the content as an OCI registry.
//
// This package holds flags and output only: the store is package pieces, the
// service package rpc, the registry package registry.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/cmd/internal/settings"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
)

func main() {
	root, out := newRoot(), &stdio.Output{}
	root.SetOut(out)
	cmd, err := root.ExecuteC()
	if err == nil && cmd != root { // which prints log records, at most
		err = out.Err()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "dfdaemon: %v\n", err)
	}
	os.Exit(exit.Code(err))
}

// options are the values of the flags.
type options struct {
	workHome string
	dataDir  string
	logDir   string
	console  bool
	verbose  bool

	socket          string
	registry        registryOptions
	dragonflySocket string
	engine          engineOptions
	swarmKey        string
	swarm           swarmOptions
	maxSize         size
	shutdownTimeout time.Duration
	pprofPort       int
	jaeger          string
	serviceName     string
	readyFD         int
	launched        bool
}

//nolint:funlen // the help and the flags of one command
func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "dfdaemon",
		Short: "Hold the content of the cache and serve it",
		Long: `
The "dfdaemon" command holds the content of the cache in its data directory and
answers dfcache at a unix socket, until it gets SIGTERM or SIGINT. Then it lets
running operations end; a second signal ends them at once.

It serves the same content as an OCI registry at --registry, by default to the user
that it runs as, and to root, on this host. At an address that other hosts can reach,
it wants TLS, and users with passwords, unless the flags say that it goes without.

With a swarm key it trades content with the other daemons that have the same
('dfdaemon help swarm'). With --engine dragonfly it has a Dragonfly for that, whose
dfdaemon runs on this host, dragonfly-v2 for the newer one in Rust; with --engine
dragonfly-cluster it is a peer of Dragonfly's daemons itself.

SETTINGS
========

Every flag can be given on the command line, in the environment as DFDAEMON_ and
the flag's name in upper case, with underscores for dashes (DFDAEMON_DATA_DIR),
and in the configuration file (data-dir: /path). The first of these that has a
value counts. An unknown key in the file is an error.

` + manual.ExitStatus("dfdaemon", exit.Invalid, exit.Timeout, exit.Unavailable, exit.NoSpace, exit.Corrupt,
			exit.Interrupted),
		Example: `  dfdaemon
  dfdaemon --workhome /srv/dragonfly --daemon-sock /run/dragonfly/dfdaemon.sock`,
		Args:          exit.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	root.SetFlagErrorFunc(exit.FlagError)

	// The defaults that depend on the user are filled in by load, so that help
	// and documents are the same everywhere.
	all := root.PersistentFlags()
	all.String("config", paths.Config("dfdaemon"), "configuration `file` in YAML, also set by DFDAEMON_CONFIG "+
		"(default /etc/dragonfly/dfdaemon.yaml, or dragonfly/dfdaemon.yaml in the XDG configuration directory)")
	all.Lookup("config").DefValue = ""
	all.StringVar(&o.workHome, "workhome", "",
		"working `directory` (default /var/lib/dfcache for root, else dragonfly in the XDG data directory)")
	all.StringVar(&o.dataDir, "data-dir", "", "`directory` of the content (default data in --workhome)")
	all.StringVar(&o.logDir, "logdir", "", "`directory` of the log files (default logs in --workhome where that is "+
		"given, else /var/log/dragonfly for root, dragonfly/logs in the XDG state directory for others)")
	all.BoolVar(&o.console, "console", false,
		"print log records, too: to stdout, or to stderr where stdout has a result")
	all.BoolVar(&o.verbose, "verbose", false, "log at debug level")

	all.StringVar(&o.swarmKey, "swarm-key", "", "`file` with the key of the swarm of daemons to be part of; off is "+
		"none (default /etc/dragonfly/swarm.key for root, else dragonfly/swarm.key in the XDG configuration "+
		"directory; without that file there is no swarm)")

	flags := root.Flags()
	flags.StringVar(&o.socket, "daemon-sock", "", "unix `socket` to listen at (default dfdaemon.sock in "+
		"/run/dragonfly for root, else in dragonfly in the XDG runtime directory)")
	flags.StringVar(&o.dragonflySocket, "dragonfly-sock", "", "unix `socket` for Dragonfly's own dfcache, which "+
		"looks for /var/run/dfdaemon.sock; whoever may use it can have the daemon read and write any file; off is "+
		"none (default off)")
	o.registry.flags(flags)
	o.engine.flags(flags)
	o.swarm.flags(flags)
	flags.Var(&o.maxSize,
		"max-size", "`bytes` that blobs and unfinished uploads may take on disk, such as 500GiB; 0 is no limit")
	flags.DurationVar(&o.shutdownTimeout, "shutdown-timeout", 30*time.Second,
		"how long running operations may take after SIGTERM; 0 is as long as they need")
	flags.IntVar(&o.pprofPort, "pprof-port", -1, "serve pprof profiles on this `port` of 127.0.0.1, to this user and "+
		"root; 0 is any free port, which is printed; -1 is off")
	flags.StringVar(&o.jaeger, "jaeger", "",
		"send traces to this OTLP/HTTP `URL` of a Jaeger or a collector, for example http://localhost:4318")
	flags.StringVar(&o.serviceName, "service-name", "dragonfly-dfdaemon", "`name` of the service in traces")
	flags.IntVar(&o.readyFD, "ready-fd", -1,
		"file descriptor to tell whoever starts the daemon that it is ready, or why not")
	flags.Lookup("ready-fd").Hidden = true
	flags.BoolVar(&o.launched, "launched", false,
		"say at --ready-fd where the content is served, too, and what there was to warn of")
	flags.Lookup("launched").Hidden = true

	root.AddCommand(newFsck(o), newSwarm(o), newVersion())
	manual.Add(root)
	return root
}

// load completes the flags of cmd from the environment, the configuration file
// and the defaults.
func (o *options) load(cmd *cobra.Command) error {
	if err := settings.Load(cmd, "DFDAEMON"); err != nil {
		return err
	}
	if o.shutdownTimeout < 0 {
		return exit.FlagError(cmd, fmt.Errorf(
			"--shutdown-timeout %s is negative: pass a duration such as 30s, or 0 for no limit", o.shutdownTimeout))
	}
	if err := o.swarm.check(); err != nil {
		return exit.FlagError(cmd, err)
	}
	if o.logDir == "" {
		o.logDir = paths.LogDir()
		if o.workHome != "" {
			o.logDir = filepath.Join(o.workHome, "logs")
		}
	}
	if o.workHome == "" {
		o.workHome = paths.WorkHome()
	}
	if o.dataDir == "" {
		o.dataDir = paths.DataDir(o.workHome)
	}
	if o.socket == "" {
		o.socket = paths.Socket()
	}
	// What is logged and printed has to mean something elsewhere, too.
	for _, path := range []*string{&o.workHome, &o.dataDir, &o.logDir, &o.socket} {
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	return nil
}

func newVersion() *cobra.Command {
	var format format
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show version, commit, platform and Go version",
		Long: `
The "version" command says which build of dfdaemon this is.

` + manual.ExitStatus("dfdaemon", exit.Invalid),
		Example: `  dfdaemon version
  dfdaemon version --format json`,
		Args: exit.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := format.check(cmd); err != nil {
				return err
			}
			info := build.Get()
			if format == "json" {
				return printJSON(cmd.OutOrStdout(), info)
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), info)
			return err
		},
	}
	format.flag(cmd)
	return cmd
}
