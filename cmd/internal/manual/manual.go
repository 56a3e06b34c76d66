// Package manual has the commands with which both programs tell about
// themselves: help, doc and completion.
package manual

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p/dirs"
)

// Add gives root the commands help, with the topic exit-codes, doc and
// completion. It replaces cobra's own, which take no notice of wrong arguments.
func Add(root *cobra.Command) {
	root.DisableAutoGenTag = true // it would have the date in it
	help := helpCommand(root.Name())
	root.SetHelpCommand(help)
	root.AddCommand(help, exit.HelpTopic(), docCommand(root.Name()), completionCommand(root.Name()))
}

// ExitStatus is the last section of a command's help: the codes that are its
// own, out of those that any command can end with.
func ExitStatus(program string, codes ...int) string {
	var b strings.Builder
	b.WriteString("EXIT STATUS\n===========\n\n")
	for _, c := range exit.Codes {
		if c.Code <= exit.Failure || slices.Contains(codes, c.Code) {
			fmt.Fprintf(&b, "Exit status is %d: %s.\n", c.Code, c.Meaning)
		}
	}
	fmt.Fprintf(&b, "See also \"%s help exit-codes\".", program)
	return b.String()
}

func helpCommand(program string) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about any command, or about exit-codes",
		Long: `
The "help" command prints the help of ` + program + `, of one of its commands, or on
the topic "exit-codes".

` + ExitStatus(program, exit.Invalid),
		Example: "  " + program + " help doc\n  " + program + " help exit-codes",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			topics := []string{"exit-codes"}
			for _, c := range cmd.Root().Commands() {
				if len(args) == 0 && c.IsAvailableCommand() {
					topics = append(topics, c.Name())
				}
			}
			return topics, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			topic, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return exit.FlagError(cmd, fmt.Errorf("unknown help topic %q", strings.Join(args, " ")))
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
}

func docCommand(program string) *cobra.Command {
	var dir, format string
	formats := []string{"man", "markdown", "all"}
	cmd := &cobra.Command{
		Use:   "doc --path DIR",
		Short: "Generate documents: man pages and markdown",
		Long: `
The "doc" command writes a man page and a markdown file for every command to a
directory, which is created when there is none. The same ` + program + ` writes the same
files everywhere. Its flags can be given on the command line only.

` + ExitStatus(program, exit.Invalid),
		Example: "  " + program + " doc --path /usr/local/share/man/man1 --format man\n" +
			"  " + program + " doc --path docs/cli --format markdown",
		Args: exit.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return exit.FlagError(cmd, errors.New("the directory is missing: name it with --path"))
			}
			if !slices.Contains(formats, format) {
				return exit.FlagError(cmd, fmt.Errorf("unknown --format %q: use man, markdown or all", format))
			}
			if err := write(cmd.Root(), dir, format); err != nil {
				return fmt.Errorf("write documents: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "path", "", "`directory` to write to")
	cmd.Flags().StringVar(&format, "format", "all", "`format`: man, markdown or all")
	// The error would be for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// write writes the documents of root's program to dir, over those that are there.
func write(root *cobra.Command, dir, format string) error {
	pages, err := pages(root, format != "markdown", format != "man")
	if err != nil {
		return err
	}
	if err := dirs.Make(dir, 0o777); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(pages)) {
		if err := os.WriteFile(filepath.Join(dir, name), pages[name], 0o666); err != nil {
			return err
		}
	}
	return nil
}

func completionCommand(program string) *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:   "completion {bash | zsh | fish | powershell}",
		Short: "Generate the autocompletion script for the specified shell",
		Long: `
The "completion" command prints a script that makes a shell complete the commands
and flags of ` + program + `.

` + ExitStatus(program, exit.Invalid),
		Example: strings.ReplaceAll(
			`  # bash, which needs the package bash-completion: for this shell, and for every new one
  source <(PROGRAM completion bash)
  PROGRAM completion bash > /etc/bash_completion.d/PROGRAM

  # zsh
  PROGRAM completion zsh > "${fpath[1]}/_PROGRAM"

  # fish
  PROGRAM completion fish > ~/.config/fish/completions/PROGRAM.fish

  # PowerShell
  PROGRAM completion powershell | Out-String | Invoke-Expression`, "PROGRAM", program),
		ValidArgs: shells,
		Args: exit.Args(func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return fmt.Errorf("the shell is missing: name one of %s", strings.Join(shells, ", "))
			case len(args) > 1:
				return fmt.Errorf("surplus argument %q: name one shell", args[1])
			case !slices.Contains(shells, args[0]):
				return fmt.Errorf("unknown shell %q: name one of %s", args[0], strings.Join(shells, ", "))
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			default:
				return root.GenPowerShellCompletionWithDesc(out)
			}
		},
	}
}
