package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// pluginPrefix begins the name of the executable of a plugin.
const pluginPrefix = "dfcache-"

// plugin is an executable that extends dfcache by a command.
type plugin struct {
	Name   string `json:"name"`
	Path   string `json:"path"`
	Usable bool   `json:"usable"`
	Reason string `json:"reason,omitempty"` // why it is not usable
}

func (a *app) pluginCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "Show plugins",
		Long: `
The "plugin" command lists the plugins: executables with a name of the form
dfcache-NAME, in the directory "plugins" in --workhome or on the PATH. The command
"dfcache NAME ARGS..." runs the first one of that name, with the arguments as they
are. It also says why one is not usable.

` + exitStatus(exit.Invalid),
		Example: `  dfcache plugin
  dfcache plugin --format json`,
		Args:    exit.NoArgs,
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, _ []string) error {
			plugins := findPlugins(a.pluginDirs(), builtIn(cmd.Root()))
			return a.result.print(a.out, plugins, pluginText(plugins))
		},
	}
	a.result.flags(cmd)
	return cmd
}

func pluginText(plugins []plugin) string {
	if len(plugins) == 0 {
		return "no plugins\n"
	}
	var text strings.Builder
	for _, p := range plugins {
		status := "usable"
		if !p.Usable {
			status = "not usable: " + p.Reason
		}
		fmt.Fprintf(&text, "%-12s  %s  (%s)\n", printable(p.Name), printable(p.Path), status)
	}
	return text.String()
}

// pluginDirs returns where plugins are looked for, in order.
func (a *app) pluginDirs() []string {
	dirs := []string{filepath.Join(a.workHome, "plugins")}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		// The directory one happens to be in is no place for commands.
		if filepath.IsAbs(dir) && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// builtIn returns the names that commands of dfcache have.
func builtIn(root *cobra.Command) []string {
	names := []string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}
	for _, cmd := range root.Commands() {
		names = append(append(names, cmd.Name()), cmd.Aliases...)
	}
	return names
}

// findPlugins returns every plugin in dirs. What can't be read holds none.
func findPlugins(dirs, builtIn []string) []plugin {
	plugins := []plugin{}
	first := map[string]string{} // the path that runs, by name
	for _, dir := range dirs {
		entries, _ := os.ReadDir(dir)
		for _, entry := range entries {
			name, ok := strings.CutPrefix(entry.Name(), pluginPrefix)
			if !ok || name == "" {
				continue
			}
			p := plugin{Name: name, Path: filepath.Join(dir, entry.Name())}
			switch err := executable(p.Path); {
			case err != nil:
				p.Reason = err.Error()
			case slices.Contains(builtIn, name):
				p.Reason = "shadowed by the command of dfcache"
			case strings.HasPrefix(name, "-"):
				p.Reason = "the name looks like a flag"
			case first[name] != "":
				p.Reason = "shadowed by " + first[name]
			default:
				p.Usable = true
				first[name] = p.Path
			}
			plugins = append(plugins, p)
		}
	}
	return plugins
}

// executable returns why the file at path can't be run, or nil.
func executable(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return errors.New("broken link")
	case !info.Mode().IsRegular():
		return errors.New("not a regular file")
	case unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS) != nil:
		return errors.New("not executable")
	}
	return nil
}

// lookPlugin returns the path of the plugin of that name, or "" where there is
// none. Where none of that name is usable, unusable says why the first is not.
func (a *app) lookPlugin(name string) (path string, unusable error) {
	if name == "" || strings.HasPrefix(name, "-") || strings.ContainsRune(name, filepath.Separator) {
		return "", nil
	}
	for _, dir := range a.pluginDirs() {
		path := filepath.Join(dir, pluginPrefix+name)
		err := executable(path)
		if err == nil {
			return path, nil
		}
		if _, missing := os.Lstat(path); missing == nil && unusable == nil {
			unusable = fmt.Errorf("%s is not usable: %w", printable(path), err)
		}
	}
	return "", unusable
}

// unknownCommand is for [cobra.Command.Args] of the root command: what it has
// as an argument is no command. It may be the name of a plugin that can't run.
func (a *app) unknownCommand(root *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if err := a.load(root, nil); err != nil { // it may say where plugins are
		return err
	}
	path, unusable := a.lookPlugin(args[0])
	switch {
	case path != "":
		return exit.FlagError(root, fmt.Errorf(
			"%q is a plugin: flags go after its name, and are its own: dfcache %[1]s [FLAGS]", args[0]))
	case unusable != nil:
		return exit.FlagError(root, fmt.Errorf(
			"unknown command %q for %q: the plugin %w", args[0], root.CommandPath(), unusable))
	}
	return exit.NoArgs(root, args)
}

// runPlugin replaces this process by the plugin that args name. It returns nil
// where args are for dfcache itself, or name nothing that can run.
func (a *app) runPlugin(root *cobra.Command, args []string) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") || slices.Contains(builtIn(root), args[0]) {
		return nil
	}
	// Settings may say where plugins are. Flags can't: they follow the name, and are the plugin's.
	if err := root.ParseFlags(nil); err != nil {
		return err
	}
	if err := a.load(root, nil); err != nil {
		return err
	}
	path, _ := a.lookPlugin(args[0])
	if path == "" {
		return nil
	}
	err := syscall.Exec(path, append([]string{path}, args[1:]...), os.Environ())
	return fmt.Errorf("plugin %s: %w", path, err)
}
