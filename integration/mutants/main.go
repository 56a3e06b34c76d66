// Command mutants makes one deliberate change to the code after the other, each
// of which takes out a defence, and runs the test that has to notice it. It
// fails where one passes. Run it with make mutants; arguments are regular
// expressions for the titles of the mutants to try.
//
// The tables beside it, *.txt, have the changes. The sources are not touched:
// go builds them with the changed files laid over (go help build, -overlay), and
// so do the tests that build programs, by GOFLAGS.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

func main() {
	dir := flag.String("dir", "integration/mutants", "directory of the tables")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *dir, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, titles []string) error {
	mutants, err := readTables(dir)
	if err != nil {
		return err
	}
	wanted := regexp.MustCompile("")
	if len(titles) > 0 {
		if wanted, err = regexp.Compile(strings.Join(titles, "|")); err != nil {
			return err
		}
	}
	tried, unnoticed := 0, 0
	for _, m := range mutants {
		if !wanted.MatchString(m.title) {
			continue
		}
		tried++
		start := time.Now()
		err := m.try(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		result := "noticed"
		if err != nil {
			result, unnoticed = err.Error(), unnoticed+1
		}
		fmt.Printf("%s: %s by %s (%.1f s)\n", m.title, result, m.test, time.Since(start).Seconds())
	}
	if tried == 0 {
		return fmt.Errorf("no title matches %s", wanted)
	}
	if unnoticed > 0 {
		return fmt.Errorf("%d were not noticed", unnoticed)
	}
	return nil
}

var errNotNoticed = errors.New("NOT NOTICED")

// try runs the mutant's test with its changes. Its error is that the test
// passes, or why it can't be run.
func (m *mutant) try(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "mutant")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var overlay struct{ Replace map[string]string }
	overlay.Replace = map[string]string{}
	for name, text := range m.files {
		original, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		changed := filepath.Join(dir, fmt.Sprint(len(overlay.Replace), ".go"))
		if err := os.WriteFile(changed, text, 0o600); err != nil {
			return err
		}
		overlay.Replace[original] = changed
	}
	list, err := json.Marshal(overlay)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		return err
	}
	// Built once, and run from the package's directory as go test does. What does not build would
	// fail the test, too.
	flags := "GOFLAGS=" + strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+file)
	binary := filepath.Join(dir, "test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, m.pkg)
	build.Env = append(os.Environ(), flags)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("DOES NOT BUILD: %w\n%s", err, out)
	}
	test := exec.CommandContext(ctx, binary,
		"-test.timeout", "5m", "-test.run", "^"+strings.ReplaceAll(m.test, "/", "$/^")+"$")
	test.Dir, test.Env = m.pkg, append(os.Environ(), flags)
	out, err := test.CombinedOutput()
	if bytes.Contains(out, []byte("no tests to run")) {
		return errors.New("NO SUCH TEST")
	}
	if bytes.Contains(out, []byte("panic: test timed out")) {
		return errors.New("NOTICED BY HANGING ONLY")
	}
	if err == nil {
		return errNotNoticed
	}
	return nil
}
