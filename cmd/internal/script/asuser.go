package script

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
)

// nobody is the user and group without rights.
const nobody = 65534

// asUserName is the name under which a test binary, instead of testing, runs
// a command as nobody. It is on the PATH of scripts.
const asUserName = "asuser"

// asUser becomes the command, run as nobody where the caller is root.
func asUser(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("usage: asuser CMD [ARG...]")
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("setgroups: %w", err)
		}
		if err := syscall.Setgid(nobody); err != nil {
			return fmt.Errorf("setgid: %w", err)
		}
		if err := syscall.Setuid(nobody); err != nil {
			return fmt.Errorf("setuid: %w", err)
		}
	}
	return syscall.Exec(path, args, os.Environ())
}

func asUserCmd(ts *testscript.TestScript, neg bool, args []string) {
	finish(ts, neg, ts.Exec(asUserName, args...))
}

// finish fails the script where err is not what neg asks for.
func finish(ts *testscript.TestScript, neg bool, err error) {
	switch {
	case err != nil && !neg:
		ts.Fatalf("%v", err)
	case err == nil && neg:
		ts.Fatalf("unexpected success")
	}
}
