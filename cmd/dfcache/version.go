package main

import (
	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show version, commit, platform and Go version",
		Long: `
The "version" command says which build of dfcache this is.

` + exitStatus(exit.Invalid),
		Example: `  dfcache version
  dfcache version --format json`,
		Args:    exit.NoArgs,
		PreRunE: a.load,
		RunE: func(*cobra.Command, []string) error {
			info := build.Get()
			return a.result.print(a.out, info, info.String())
		},
	}
	a.result.flags(cmd)
	return cmd
}
