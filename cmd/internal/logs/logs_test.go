package logs_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/logs"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// Lumberjack has one goroutine for each log file ever written, and no
		// way to end it. A process has one log file.
		goleak.IgnoreAnyFunction("gopkg.in/natefinch/lumberjack%2ev2.(*Logger).millRun"))
}

// open opens a log that is closed at the end of the test.
func open(t *testing.T, o logs.Options) *slog.Logger {
	t.Helper()
	log, closer, err := logs.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closer.Close(); err != nil {
			t.Error(err)
		}
	})
	return log
}

func TestFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "logs")
	var warn bytes.Buffer
	log := open(t, logs.Options{Dir: dir, Name: "x", Warn: &warn})
	if _, err := os.Stat(filepath.Dir(dir)); !os.IsNotExist(err) {
		t.Fatalf("something was created before the first line: %v", err)
	}

	log.Debug("not this")
	log.Info("one", "n", 1)
	log.Info("two")

	content, err := os.ReadFile(filepath.Join(dir, "x.log"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	if len(lines) != 2 {
		t.Fatalf("want 2 lines: %s", content)
	}
	var record struct {
		Msg, Level, Time string
		N                int
	}
	if err := json.Unmarshal([]byte(lines[0]), &record); err != nil {
		t.Fatal(err)
	}
	if record.Msg != "one" || record.Level != "INFO" || record.N != 1 || record.Time == "" {
		t.Errorf("got %s", lines[0])
	}
	for path, want := range map[string]os.FileMode{
		filepath.Join(dir, "x.log"): 0o600,
		dir:                         0o750,
	} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("mode of %s is %o, want %o", path, info.Mode().Perm(), want)
		}
	}
	if warn.Len() > 0 {
		t.Errorf("warned: %s", warn.String())
	}
}

func TestVerboseAndConsole(t *testing.T) {
	dir := t.TempDir()
	var console bytes.Buffer
	log := open(t, logs.Options{Dir: dir, Name: "x", Verbose: true, Console: &console})
	log.With("k", "v").Debug("one")
	content, err := os.ReadFile(filepath.Join(dir, "x.log"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(content), `"msg":"one","k":"v"`) {
		t.Errorf("file: %s", content)
	}
	if !strings.Contains(console.String(), "level=DEBUG msg=one k=v") {
		t.Errorf("console: %s", console.String())
	}
}

func TestConsoleWithoutVerbose(t *testing.T) {
	var console bytes.Buffer
	log := open(t, logs.Options{Dir: t.TempDir(), Name: "x", Console: &console})
	log.Debug("one")
	if console.Len() > 0 {
		t.Errorf("console: %s", console.String())
	}
}

// Commands that run at the same time share a log file.
func TestShared(t *testing.T) {
	const loggers, lines = 4, 50
	dir := t.TempDir()
	var wait sync.WaitGroup
	for range loggers {
		log := open(t, logs.Options{Dir: dir, Name: "x"})
		wait.Go(func() {
			for range lines {
				log.Info("line")
			}
		})
	}
	wait.Wait()
	content, err := os.ReadFile(filepath.Join(dir, "x.log"))
	if err != nil {
		t.Fatal(err)
	}
	whole := 0
	for line := range strings.Lines(string(content)) {
		if json.Valid([]byte(line)) {
			whole++
		}
	}
	if whole != loggers*lines {
		t.Errorf("%d whole lines, want %d", whole, loggers*lines)
	}
}

func TestCannotWrite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var warn, console bytes.Buffer
	log := open(t, logs.Options{Dir: filepath.Join(file, "logs"), Name: "x", Warn: &warn, Console: &console})
	log.Info("one")
	log.Info("two")
	if got := warn.String(); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "x: warning: ") ||
		!strings.Contains(got, file) || !strings.Contains(got, "--logdir") {
		t.Errorf("want one warning: %q", got)
	}
	if !strings.Contains(console.String(), "msg=two") {
		t.Errorf("console: %s", console.String())
	}
}

func TestInvalid(t *testing.T) {
	for _, o := range []logs.Options{{Name: "x"}, {Dir: "d"}, {Dir: "d", Name: "../x"}} {
		if _, _, err := logs.Open(o); exit.Code(err) != exit.Invalid {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// A named pipe in the place of the log is not waited for, whether or not somebody reads it.
func TestPipe(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.log")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	var warn bytes.Buffer
	log := open(t, logs.Options{Dir: dir, Name: "x", Warn: &warn})
	log.Info("one")
	log.Info("two")
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log.Info("three")
	if strings.Count(warn.String(), "the log can't be written: ") != 1 {
		t.Errorf("told: %s", &warn)
	}
	// What is put in its place is written to.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	log.Info("four")
	if content, err := os.ReadFile(path); err != nil || !bytes.Contains(content, []byte("four")) {
		t.Errorf("logged: %s, %v", content, err)
	}
}
