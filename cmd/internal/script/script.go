// Package script runs scripts against the real commands, in the language of
// [testscript]. A test package uses it as
//
//	func TestMain(m *testing.M)     { script.Main(m) }
//	func TestScripts(t *testing.T) { script.Run(t, "testdata/script") }
//
// dfcache and dfdaemon are first on the PATH. The home directory of a script
// is $WORK/user and $SOCK a short path for a daemon's socket. The environment
// holds nothing of the user who runs the test but the rest of PATH.
//
// The condition [root] is for what needs root: with -short it does not hold, and without it
// the script fails where the test does not run as root. A script that is not for -short
// begins with a line "[short] skip '-short: WHY'". These commands are added to the language.
// Those that can fail can be negated with "!".
//
//	daemon [ARG...]           start "dfdaemon --workhome $WORK/home --daemon-sock $SOCK ARG...",
//	                          in the background, and wait until it is ready. REGISTRY is
//	                          set to the host and port of its registry, "" without one
//	stopdaemon [SIGNAL]       send it a signal, by default TERM, wait until it has ended,
//	                          and have its output checked by stdout and stderr. It fails
//	                          when the daemon's exit code is not 0
//	killdaemon                kill -9
//	killstarted FILE          stop the daemon that dfcache has started: FILE, or stdout or
//	                          stderr, has its "pid NUMBER"
//	exitcode N CMD [ARG...]   run and check the exit code, which is 124 where it runs for half a minute
//	asuser CMD [ARG...]       run as a user without rights, where the test runs as root; "exec
//	                          asuser CMD ..." does it in the background or with a pipe
//	mkfile FILE SIZE [SEED]   write SIZE bytes that look random and depend on SEED; KiB, MiB
//	                          and GiB may follow the number
//	sha256 FILE VAR           set VAR to the digest's hex digits
//	flipbit FILE OFFSET       invert the lowest bit of a byte
//	filesame A B              compare two files of any size
//	json FILE PATH VALUE      compare a field, as in "json stdout tasks.0.size 12"
//	http [-ca FILE] [-as UID] [-user NAME:PASSWORD] [-body FILE] METHOD URL [HEADER:VALUE...]
//	                          send a request; a URL that begins with "/" is of the running
//	                          daemon's registry. The status line, headers and body of the
//	                          answer go to stdout. It fails where there is no answer. With
//	                          -as the connection is that of another user, which needs root
//	url FILE VAR              set VAR to the first URL in FILE, or stdout or stderr
//	certificate CERT KEY      write a TLS certificate for 127.0.0.1, ::1 and localhost, which
//	                          is its own authority, and its key
package script

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

// bin is the directory of the commands under test.
var bin string

// Daemons of tests that run at once would fight for the default address.
const (
	registryVariable = "DFDAEMON_REGISTRY"
	anyPort          = "127.0.0.1:0"

	// A program with the race detector sleeps when it ends: by default for a
	// second, which hundreds of short programs would wait for.
	raceVariable = "GORACE"
	quickExit    = "atexit_sleep_ms=10"
)

// Main is for TestMain: it builds dfcache and dfdaemon, with the race detector
// where the test has it, runs the tests, looks for goroutines that they have
// left behind, and exits.
func Main(m *testing.M, options ...goleak.Option) {
	if filepath.Base(os.Args[0]) == asUserName {
		fmt.Fprintln(os.Stderr, asUser(os.Args[1:]))
		os.Exit(1)
	}
	code, err := run(m, options)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M, options []goleak.Option) (code int, err error) {
	if bin, err = os.MkdirTemp("", "dfcache-bin"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(bin)
	// Other users have to be able to run what is there.
	if err := os.Chmod(bin, 0o755); err != nil {
		return 0, err
	}
	if err := build(bin); err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	if err := os.Symlink(self, filepath.Join(bin, asUserName)); err != nil {
		return 0, err
	}
	if os.Getenv(raceVariable) == "" {
		os.Setenv(raceVariable, quickExit)
	}
	os.Setenv(registryVariable, anyPort)
	os.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))

	if code = m.Run(); code != 0 {
		return code, nil
	}
	return 0, goleak.Find(options...)
}

// build puts every command of the module into dir.
func build(dir string) error {
	const all = "github.com/dfcache/dfcache/cmd/..."
	list, err := exec.Command("go", "list", "-f", `{{if eq .Name "main"}}{{.ImportPath}}{{end}}`, all).Output()
	if err != nil {
		return fmt.Errorf("go list %s: %w%s", all, err, stderrOf(err))
	}
	args := []string{"build", "-o", dir + string(os.PathSeparator)}
	if race {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, strings.Fields(string(list))...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func stderrOf(err error) []byte {
	if exit, ok := err.(*exec.ExitError); ok {
		return append([]byte("\n"), bytes.TrimSpace(exit.Stderr)...)
	}
	return nil
}

// Run runs every script in dir, each as a parallel subtest.
func Run(t *testing.T, dir string) {
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		Setup:               setup,
		Condition:           condition,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"asuser":      asUserCmd,
			"certificate": certificateCmd,
			"daemon":      daemonCmd,
			"exitcode":    exitCodeCmd,
			"filesame":    fileSameCmd,
			"flipbit":     flipBitCmd,
			"http":        httpCmd,
			"json":        jsonCmd,
			"killdaemon":  killDaemonCmd,
			"killstarted": killStartedCmd,
			"mkfile":      mkfileCmd,
			"sha256":      sha256Cmd,
			"stopdaemon":  stopDaemonCmd,
			"url":         urlCmd,
		},
	})
}

func setup(env *testscript.Env) error {
	home := filepath.Join(env.WorkDir, "user")
	runtime := filepath.Join(home, "run")
	if err := os.MkdirAll(runtime, 0o700); err != nil {
		return err
	}
	env.Setenv("HOME", home)
	env.Setenv("XDG_RUNTIME_DIR", runtime)
	env.Setenv(registryVariable, anyPort)
	env.Setenv("SOCK", filepath.Join(env.WorkDir, "run", "d.sock"))
	env.Setenv(raceVariable, os.Getenv(raceVariable))
	if os.Geteuid() == 0 {
		if err := os.Chmod(filepath.Dir(env.WorkDir), 0o755); err != nil {
			return err
		}
		for _, dir := range []string{env.WorkDir, home, runtime} {
			if err := os.Chown(dir, nobody, nobody); err != nil {
				return err
			}
		}
	}
	d := &daemon{t: env.T().(testing.TB), work: env.WorkDir}
	env.Values[daemonKey{}] = d
	env.Defer(d.cleanup)
	return nil
}

// condition adds the condition "root" to the language.
func condition(name string) (bool, error) {
	switch {
	case name != "root":
		return false, fmt.Errorf("unknown condition %q", name)
	case testing.Short():
		return false, nil
	case os.Geteuid() != 0:
		return false, errors.New("needs root: run the tests as .ci/run does, or with -short")
	}
	return true, nil
}
