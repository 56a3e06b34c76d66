package settings_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/settings"
)

// program is a small command tree whose command "stat" loads settings.
type program struct {
	root        *cobra.Command
	tag         string
	timeout     time.Duration
	verbose     bool
	local       bool
	hidden      int
	daemonSock  string
	sockChanged bool
}

func newProgram(config string) *program {
	p := &program{}
	p.root = &cobra.Command{Use: "prog", SilenceErrors: true, SilenceUsage: true}
	flags := p.root.PersistentFlags()
	flags.String("config", config, "")
	flags.StringVar(&p.tag, "tag", "default", "")
	flags.DurationVar(&p.timeout, "timeout", 0, "")
	flags.BoolVar(&p.verbose, "verbose", false, "")
	flags.StringVar(&p.daemonSock, "daemon-sock", "/sock", "")
	flags.Int("count", 0, "")
	flags.IntVar(&p.hidden, "ready-fd", -1, "")
	flags.Lookup("ready-fd").Hidden = true
	stat := &cobra.Command{Use: "stat", RunE: func(cmd *cobra.Command, _ []string) error {
		err := settings.Load(cmd, "PROG")
		p.sockChanged = cmd.Flags().Changed("daemon-sock")
		return err
	}}
	stat.Flags().BoolVar(&p.local, "local", false, "")
	export := &cobra.Command{Use: "export", RunE: func(*cobra.Command, []string) error { return nil }}
	export.Flags().Bool("overwrite", false, "")
	doc := &cobra.Command{Use: "doc", RunE: export.RunE}
	doc.Flags().String("path", "", "")
	p.root.AddCommand(stat, export, doc)
	return p
}

func (p *program) run(args ...string) error {
	p.root.SetArgs(append([]string{"stat"}, args...))
	return p.root.Execute()
}

func write(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "prog.yaml")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestPrecedence(t *testing.T) {
	tests := []struct {
		file, env, flag string
		want            string
	}{
		{"", "", "", "default"},
		{"file", "", "", "file"},
		{"", "env", "", "env"},
		{"file", "env", "", "env"},
		{"", "", "flag", "flag"},
		{"file", "", "flag", "flag"},
		{"file", "env", "flag", "flag"},
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%+v", test), func(t *testing.T) {
			content := ""
			if test.file != "" {
				content = "tag: " + test.file
			}
			t.Setenv("PROG_TAG", test.env)
			var args []string
			if test.flag != "" {
				args = []string{"--tag", test.flag}
			}
			p := newProgram(write(t, content))
			if err := p.run(args...); err != nil {
				t.Fatal(err)
			}
			if p.tag != test.want {
				t.Errorf("got %q, want %q", p.tag, test.want)
			}
		})
	}
}

func TestValues(t *testing.T) {
	p := newProgram(write(t, `
# a comment
tag: &t 1.10        # text, not a number
timeout: 90s
verbose: true
local: true
overwrite: true     # of another command
daemon-sock: *t
`))
	if err := p.run(); err != nil {
		t.Fatal(err)
	}
	if p.tag != "1.10" || p.timeout != 90*time.Second || !p.verbose || !p.local || p.daemonSock != "1.10" {
		t.Errorf("got %+v", p)
	}
}

func TestChanged(t *testing.T) {
	for _, source := range []string{"none", "flag", "env", "file"} {
		t.Run(source, func(t *testing.T) {
			content := ""
			var args []string
			switch source {
			case "flag":
				args = []string{"--daemon-sock", "/s"}
			case "env":
				t.Setenv("PROG_DAEMON_SOCK", "/s")
			case "file":
				content = "daemon-sock: /s"
			}
			p := newProgram(write(t, content))
			if err := p.run(args...); err != nil {
				t.Fatal(err)
			}
			if want := source != "none"; p.sockChanged != want {
				t.Errorf("Changed is %v", p.sockChanged)
			}
		})
	}
}

func TestWhichFile(t *testing.T) {
	byDefault, byEnv, byFlag := write(t, "tag: default-file"), write(t, "tag: env-file"), write(t, "tag: flag-file")
	missing := filepath.Join(t.TempDir(), "missing.yaml")
	tests := []struct {
		name          string
		fallback, env string
		args          []string
		want, wantErr string
	}{
		{"default", byDefault, "", nil, "default-file", ""},
		{"environment", byDefault, byEnv, nil, "env-file", ""},
		{"flag", byDefault, byEnv, []string{"--config", byFlag}, "flag-file", ""},
		{"missing default", missing, "", nil, "default", ""},
		{"missing in environment", byDefault, missing, nil, "", missing},
		{"missing in flag", byDefault, "", []string{"--config", missing}, "", missing},
		{"a directory", t.TempDir(), "", nil, "", "is a directory"},
		{"empty flag", byDefault, byEnv, []string{"--config", ""}, "", "--config is empty"},
		{"no file", byDefault, "/dev/zero", nil, "", "/dev/zero is larger than 65536 bytes"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("PROG_CONFIG", test.env)
			p := newProgram(test.fallback)
			err := p.run(test.args...)
			if test.wantErr != "" {
				wantError(t, err, test.wantErr)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.tag != test.want {
				t.Errorf("got %q, want %q", p.tag, test.want)
			}
		})
	}
}

// wantError checks that err is a usage error with all the words.
func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	if exit.Code(err) != exit.Invalid {
		t.Errorf("exit code of %q is %d", err, exit.Code(err))
	}
}

func TestBadFile(t *testing.T) {
	tests := []struct {
		content string
		words   []string
	}{
		{"tga: x", []string{"line 1", `unknown key "tga"`, "did you mean tag?"}},
		{"\nnothing-like-it: x", []string{"line 2", `unknown key "nothing-like-it"`,
			"want one of: count, daemon-sock, local, overwrite, tag, timeout, verbose"}},
		{"path: of-doc", []string{`unknown key "path"`}},
		{"help: true", []string{`unknown key "help"`}},
		{"ready-fd: 3", []string{`unknown key "ready-fd"`}},
		{"config: other.yaml", []string{`unknown key "config"`, "can't name another one"}},
		{"1: x", []string{`unknown key "1"`}},
		{"tag: {a: b}", []string{"tag", "map"}},
		{"tag: [a]", []string{"tag", "list"}},
		{"tag:", []string{"tag has no value"}},
		{"tag: null", []string{"tag has no value"}},
		{"overwrite: [a]", []string{"overwrite", "list"}},
		{"verbose: maybe", []string{"verbose", `"maybe" is not a valid bool: want true or false`}},
		{"timeout: 30", []string{"timeout", `"30" is not a valid duration: the unit is missing`}},
		{"timeout: later", []string{"timeout", `"later" is not a valid duration: want one such as 30s`}},
		{"count: x", []string{"count", `"x" is not a valid int: want a whole number`}},
		{"count: 9223372036854775808", []string{"count", "out of range"}},
		{"tag: a\ntag: b", []string{": line 2: tag stands at line 1 already"}},
		{"tag: a\n---\ntag: b", []string{"more than one YAML document"}},
		{"tag: a\n---\n: b: c", []string{"yaml"}},
		{"tag: a\n  b", nil},
		{"# nothing", nil},
		{"---\n", nil},
		{"<<: {tag: x}", []string{`unknown key "<<"`}},
		{"- tag", []string{"line 1: want a map of flag names to values"}},
		{"text", []string{"line 1: want a map of flag names to values"}},
		{"? [a]\n: b", []string{"line 1: want a map of flag names to values"}},
		{"tag: \x00", []string{"control characters"}},
	}
	for _, test := range tests {
		t.Run(test.content, func(t *testing.T) {
			name := write(t, test.content)
			p := newProgram(name)
			err := p.run()
			if test.words == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, append(test.words, name)...)
		})
	}
}

func TestLongFile(t *testing.T) {
	longest := "tag: x" + strings.Repeat("\n", 64<<10-6)
	if err := newProgram(write(t, longest)).run(); err != nil {
		t.Error(err)
	}
	wantError(t, newProgram(write(t, longest+"\n")).run(), "larger than 65536 bytes")
}

func TestBadEnvironment(t *testing.T) {
	t.Setenv("PROG_TIMEOUT", "soon")
	wantError(t, newProgram(write(t, "timeout: 1s")).run(), "environment variable PROG_TIMEOUT",
		`"soon" is not a valid duration: want one such`)
}

// The command line goes before everything, even what is wrong.
func TestNotUsed(t *testing.T) {
	t.Setenv("PROG_TIMEOUT", "soon")
	if err := newProgram(write(t, "timeout: later")).run("--timeout", "1s"); err != nil {
		t.Error(err)
	}
}

func TestNotSettable(t *testing.T) {
	t.Setenv("PROG_HELP", "true")
	t.Setenv("PROG_READY_FD", "3")
	p := newProgram(write(t, ""))
	if err := p.run(); err != nil {
		t.Fatal(err)
	}
	if p.hidden != -1 {
		t.Error("a hidden flag was set by the environment")
	}
}

func FuzzFile(f *testing.F) {
	for _, seed := range []string{"", "tag: x", "tag: *x", "a: &a [*a]", "<<: {tag: x}", "tag: !!binary x",
		"---\n---\n", "? [a]\n: b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, content string) {
		name := filepath.Join(t.TempDir(), "prog.yaml")
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := newProgram(name).run(); err != nil && exit.Code(err) != exit.Invalid {
			t.Errorf("exit code %d of %v", exit.Code(err), err)
		}
	})
}
