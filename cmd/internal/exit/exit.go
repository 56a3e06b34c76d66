// Package exit gives errors their exit codes, which scripts rely on: a code
// once given keeps its meaning.
package exit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// The exit codes of both commands. [Codes] describes them.
const (
	OK           = 0
	Failure      = 1
	Invalid      = 2
	NotFound     = 3
	Mismatch     = 4
	Timeout      = 5
	Unavailable  = 6
	NoSpace      = 7
	Corrupt      = 8
	OutputExists = 9
	Referenced   = 10
	Unreachable  = 11
	Changed      = 12
	Interrupted  = 130
)

// Codes lists the exit codes in order, for help texts and manuals.
var Codes = []struct {
	Code          int
	Name, Meaning string
}{
	{OK, "success", "everything was done"},
	{Failure, "failure", "any failure that has no code of its own"},
	{Invalid, "invalid input", "an unknown flag, command or argument, a malformed cid or tag, or a bad configuration"},
	{NotFound, "not found", "there is no such cid under the tag"},
	{Mismatch, "digest mismatch", "the content is not what its digest says; nothing was stored or written"},
	{Timeout, "timeout", "the time given by --timeout or --shutdown-timeout was not enough"},
	{Unavailable, "no daemon",
		"no dfdaemon answers, or another process holds the data directory, the socket or an address to listen at"},
	{NoSpace, "no space", "the disk that content was to go to is full, or a quota is"},
	{Corrupt, "corrupt", "stored content is damaged"},
	{OutputExists, "output exists", "the output exists and --overwrite was not given"},
	{Referenced, "referenced", "other content still refers to what was to be deleted"},
	{Unreachable,
		"unreachable", "it is not on this host and no peer can be reached, or too few of them for --replicas"},
	{Changed, "changed", "the file was written to while it was imported; nothing was stored"},
	{Interrupted, "interrupted", "a signal ended the command before it was done"},
}

// Code returns the exit code for the error with which a command ended.
func Code(err error) int {
	is := func(targets ...error) bool {
		for _, target := range targets {
			if errors.Is(err, target) {
				return true
			}
		}
		return false
	}
	// The order matters where an error wraps several. What is known about
	// content comes before how the operation ended, and that before whom it
	// could not reach: a daemon that does not answer in time is a timeout.
	switch {
	case err == nil:
		return OK
	case errors.As(err, new(usageError)):
		return Invalid
	case errors.As(err, new(printError)):
		return Failure
	case is(digest.ErrMismatch):
		return Mismatch
	case is(digest.ErrCorrupt):
		return Corrupt
	case is(p2p.ErrChanged):
		return Changed
	case is(p2p.ErrNoSpace, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG):
		return NoSpace
	case is(context.DeadlineExceeded, os.ErrDeadlineExceeded):
		return Timeout
	case is(context.Canceled):
		return Interrupted
	case is(p2p.ErrReferenced):
		return Referenced
	case is(p2p.ErrNotFound):
		return NotFound
	case is(fs.ErrExist):
		return OutputExists
	case is(digest.ErrInvalid):
		return Invalid
	case is(p2p.ErrUnreachable):
		return Unreachable
	case is(p2p.ErrUnavailable):
		return Unavailable
	default:
		return Failure
	}
}

// usageError is an error in what the user wrote.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// Usage marks err as a mistake in what the user wrote: on the command line, in
// the environment or in a configuration file. Its code is [Invalid]. Usage of
// nil is nil.
func Usage(err error) error {
	if err == nil {
		return nil
	}
	return usageError{err}
}

// printError is a failure to print what a command has to say.
type printError struct{ error }

func (e printError) Unwrap() error { return e.error }

// Printing marks err as a failure to print what a command has to say, when all else is done. Its
// code is [Failure], whatever it is: a disk that is full is not one that content goes to. Printing of
// nil is nil.
func Printing(err error) error {
	if err == nil {
		return nil
	}
	return printError{err}
}

// FlagError is for [cobra.Command.SetFlagErrorFunc]: it marks err with [Usage]
// and adds where to look.
func FlagError(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	if invalid, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		about := strings.TrimSuffix(invalid.Error(), invalid.Unwrap().Error())
		err = fmt.Errorf("%s%w", about, ValueError(invalid))
	}
	return Usage(fmt.Errorf("%w\nsee '%s --help'", err, cmd.CommandPath()))
}

// ValueError says why a flag does not take a value, without the names that this
// has in Go. err is what setting the flag returned.
func ValueError(err error) error {
	invalid, ok := errors.AsType[*pflag.InvalidValueError](err)
	if !ok {
		return err
	}
	reason := invalid.Unwrap()
	switch invalid.GetFlag().Value.Type() {
	case "bool":
		return errors.New("want true or false")
	case "int":
		if errors.Is(reason, strconv.ErrRange) {
			return errors.New("out of range")
		}
		return errors.New("want a whole number")
	case "duration":
		if strings.Contains(reason.Error(), "missing unit") {
			return errors.New("the unit is missing: want one such as 30s or 5m")
		}
		return errors.New("want one such as 30s or 5m")
	}
	return reason
}

// Args is for [cobra.Command.Args]: it makes the errors of check those of
// [FlagError].
func Args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		return FlagError(cmd, check(cmd, args))
	}
}

// NoArgs is for [cobra.Command.Args] of commands without arguments. In a
// command that has subcommands, an argument is an unknown command.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if !cmd.HasAvailableSubCommands() {
		return FlagError(cmd, fmt.Errorf("surplus argument %q: %s takes none", args[0], cmd.CommandPath()))
	}
	err := fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
	if cmd.SuggestionsMinimumDistance == 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		err = fmt.Errorf("%w, did you mean %s?", err, strings.Join(near, " or "))
	}
	return FlagError(cmd, err)
}

// HelpTopic returns the command that answers "help exit-codes". It can't be
// run, only asked for help, and is not listed among the commands.
func HelpTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "exit codes, for scripts",
		Long:  "The exit codes that scripts can rely on:\n\n" + Table(),
	}
}

// Table returns the exit codes as lines of text.
func Table() string {
	var b strings.Builder
	for _, c := range Codes {
		fmt.Fprintf(&b, "  %3d  %-15s  %s\n", c.Code, c.Name, c.Meaning)
	}
	return b.String()
}
