package exit_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

func TestCode(t *testing.T) {
	tests := []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{exit.Usage(errors.New("x")), 2},
		{fmt.Errorf("x: %w", exit.Usage(errors.New("x"))), 2},
		{digest.ErrInvalid, 2},
		{p2p.ValidateTag("A"), 2},
		{p2p.ErrNotFound, 3},
		{&digest.MismatchError{}, 4},
		{context.DeadlineExceeded, 5},
		{os.ErrDeadlineExceeded, 5},
		{p2p.ErrUnavailable, 6},
		{p2p.ErrFailed, 1},
		{p2p.ErrNoSpace, 7},
		{&fs.PathError{Op: "write", Path: "f", Err: syscall.ENOSPC}, 7},
		{&fs.PathError{Op: "write", Path: "f", Err: syscall.EDQUOT}, 7},
		{&digest.CorruptError{}, 8},
		{&fs.PathError{Op: "open", Path: "f", Err: syscall.EEXIST}, 9},
		{p2p.ErrReferenced, 10},
		{p2p.ErrUnreachable, 11},
		{context.Canceled, 130},
		{exit.Printing(syscall.ENOSPC), 1},
		{exit.Printing(syscall.EPIPE), 1},

		// Errors that are several things.
		{exit.Usage(os.ErrExist), 2},
		{errors.Join(context.Canceled, digest.ErrMismatch), 4},
		{errors.Join(p2p.ErrUnavailable, context.DeadlineExceeded), 5},
		{errors.Join(p2p.ErrUnreachable, context.DeadlineExceeded), 5},
		{errors.Join(p2p.ErrUnreachable, p2p.ErrUnavailable), 11},
		{errors.Join(p2p.ErrUnreachable, digest.ErrMismatch), 4},
		{errors.Join(p2p.ErrUnavailable, p2p.ErrNoSpace), 7},
		{errors.Join(p2p.ErrUnavailable, context.Canceled), 130},
	}
	for _, test := range tests {
		if got := exit.Code(fmt.Errorf("import: %w", test.err)); test.err != nil && got != test.want {
			t.Errorf("%v: got %d, want %d", test.err, got, test.want)
		}
		if got := exit.Code(test.err); got != test.want {
			t.Errorf("%v: got %d, want %d", test.err, got, test.want)
		}
	}
}

func TestFlagError(t *testing.T) {
	cmd := &cobra.Command{Use: "prog"}
	cmd.Flags().IntP("count", "c", 0, "")
	cmd.Flags().Bool("yes", false, "")
	cmd.Flags().Duration("wait", 0, "")
	for flag, want := range map[string]string{
		"--count=x":                    `invalid argument "x" for "-c, --count" flag: want a whole number`,
		"-cx":                          `invalid argument "x" for "-c, --count" flag: want a whole number`,
		"--count=99999999999999999999": `invalid argument "99999999999999999999" for "-c, --count" flag: out of range`,
		"--yes=maybe":                  `invalid argument "maybe" for "--yes" flag: want true or false`,
		"--wait=soon":                  `invalid argument "soon" for "--wait" flag: want one such as 30s or 5m`,
		"--wait=5":                     `invalid argument "5" for "--wait" flag: the unit is missing: want one such as 30s or 5m`,
		"--nope":                       `unknown flag: --nope`,
	} {
		err := exit.FlagError(cmd, cmd.ParseFlags([]string{flag}))
		if exit.Code(err) != exit.Invalid || err.Error() != want+"\nsee 'prog --help'" {
			t.Errorf("%s: %v", flag, err)
		}
	}
}

func TestCodes(t *testing.T) {
	table := exit.Table()
	for i, c := range exit.Codes {
		if i > 0 && c.Code <= exit.Codes[i-1].Code {
			t.Errorf("%d comes after %d", c.Code, exit.Codes[i-1].Code)
		}
		if c.Name == "" || c.Meaning == "" || !strings.Contains(table, c.Meaning) {
			t.Errorf("%d is not described", c.Code)
		}
	}
}

// The manual has the same codes.
func TestManual(t *testing.T) {
	manual, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, c := range exit.Codes {
		fmt.Fprintf(&want, "| %d | %s | %s |\n", c.Code, c.Name, c.Meaning)
	}
	if !strings.HasSuffix(string(manual), "|---|---|---|\n"+want.String()) {
		t.Errorf("the table of docs/configuration.md is not\n%s", &want)
	}
}

func TestNil(t *testing.T) {
	if exit.Usage(nil) != nil || exit.FlagError(&cobra.Command{}, nil) != nil {
		t.Error("an error out of none")
	}
}

func TestCommandLine(t *testing.T) {
	run := func(*cobra.Command, []string) error { return nil }
	tests := []struct {
		args string
		want string // "" for success
	}{
		{"", ""},
		{"check", ""},
		{"check one", ""},
		{"chekc", "unknown command \"chekc\" for \"prog\", did you mean check?\nsee 'prog --help'"},
		{"something", "unknown command \"something\" for \"prog\"\nsee 'prog --help'"},
		{"none x", "surplus argument \"x\": prog none takes none\nsee 'prog none --help'"},
		{"check a b", "accepts at most 1 arg(s), received 2\nsee 'prog check --help'"},
		{"check --nix", "unknown flag: --nix\nsee 'prog check --help'"},
		{"--num x", "invalid argument \"x\" for \"--num\" flag: want a whole number\nsee 'prog --help'"},
	}
	for _, test := range tests {
		t.Run(test.args, func(t *testing.T) {
			root := &cobra.Command{Use: "prog", Args: exit.NoArgs, RunE: run, SilenceErrors: true, SilenceUsage: true}
			root.Flags().Int("num", 0, "")
			root.SetFlagErrorFunc(exit.FlagError)
			root.AddCommand(
				&cobra.Command{Use: "check", Args: exit.Args(cobra.MaximumNArgs(1)), RunE: run},
				&cobra.Command{Use: "none", Args: exit.NoArgs, RunE: run},
			)
			root.SetArgs(strings.Fields(test.args))
			err := root.Execute()
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || err.Error() != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if exit.Code(err) != exit.Invalid {
				t.Errorf("exit code is %d", exit.Code(err))
			}
		})
	}
}
