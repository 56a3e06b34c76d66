package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
)

// root returns the dfcache command with everything below it.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "dfcache [subcommand]",
		Short: "P2P cache for files that are named by their content, or by you",
		Long: `
dfcache imports files into a peer-to-peer cache and exports them from it. It
talks to the dfdaemon of this host, which holds the files, trades them with the
dfdaemons of other hosts, its peers, and is started when none answers at the
default socket.

A file is named by a cid (--cid): an OCI digest of its content, which is checked
whenever the file is imported or exported, or a cache ID, which is a name of
your own. A digest without its algorithm, as sha256sum prints it, is refused, unless
--as-name says that it is a name. A tag (--tag) is a namespace: the same cid under
two tags is two files.

SETTINGS
========

Every flag of the commands that work on files can be given on the command line,
in the environment as DFCACHE_ and the flag's name in upper case, with
underscores for dashes (DFCACHE_DAEMON_SOCK), and in the configuration file
(daemon-sock: /path). The first of these that has a value counts. An unknown key
in the file is an error.

PLUGINS
=======

"dfcache NAME" runs the executable dfcache-NAME from the directory "plugins" in
--workhome, or from the PATH, where NAME is not a command of dfcache.

EXIT STATUS
===========

` + codeBlock(),
		Example: `  dfcache import --tag models --cid v1 /srv/model.bin
  dfcache stat --tag models --cid v1
  dfcache export --tag models --cid v1 -O /tmp/model.bin
  dfcache list
  dfcache peers
  dfcache delete --tag models --cid v1`,
		Args:          a.unknownCommand,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(a.out)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(exit.FlagError)
	a.globalFlags(root)
	root.AddCommand(
		a.importCommand(), a.exportCommand(), a.statCommand(), a.deleteCommand(), a.listCommand(), a.peersCommand(),
		a.pluginCommand(), a.versionCommand(),
	)
	manual.Add(root)
	return root
}

// exitStatus is the last section of a command's help.
func exitStatus(codes ...int) string { return manual.ExitStatus("dfcache", codes...) }

// storeStatus is exitStatus for commands that work on files.
func storeStatus(codes ...int) string {
	return exitStatus(append(codes, exit.Invalid, exit.Timeout, exit.Unavailable, exit.Interrupted)...)
}

// codeBlock is the table of exit codes, set in as markdown wants a block of code.
func codeBlock() string {
	lines := strings.Split(strings.TrimSuffix(exit.Table(), "\n"), "\n")
	return "    " + strings.Join(lines, "\n    ")
}
