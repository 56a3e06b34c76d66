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
			return a.result.print(a.stdout, plugins, pluginText(plugins))
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

// runPlugin replaces this process by the plugin that args name. It returns nil
// where args are for dfcache itself, or name nothing.
func (a *app) runPlugin(root *cobra.Command, args []string) error {
	if len(args) == 0 || args[0] == "" || strings.HasPrefix(args[0], "-") ||
		strings.ContainsRune(args[0], filepath.Separator) || slices.Contains(builtIn(root), args[0]) {
		return nil
	}
	// Settings may say where plugins are. Flags can't: they follow the name, and are the plugin's.
	if err := root.ParseFlags(nil); err != nil {
		return err
	}
	if err := a.load(root, nil); err != nil {
		return err
	}
	for _, dir := range a.pluginDirs() {
		path := filepath.Join(dir, pluginPrefix+args[0])
		if executable(path) == nil {
			err := syscall.Exec(path, append([]string{path}, args[1:]...), os.Environ())
			return fmt.Errorf("plugin %s: %w", path, err)
		}
	}
	return nil
}
