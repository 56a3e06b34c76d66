package manual_test

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
	"github.com/dfcache/dfcache/docs"
)

// run runs the program prog, and returns its output.
func run(args ...string) (string, error) { return runAs("prog", args...) }

// runAs runs a program of that name that has one command of its own.
func runAs(program string, args ...string) (string, error) {
	root := &cobra.Command{Use: program, Long: "This is prog.", Args: exit.NoArgs, SilenceErrors: true,
		SilenceUsage: true,
		RunE:         func(*cobra.Command, []string) error { return nil }}
	root.SetFlagErrorFunc(exit.FlagError)
	sub := &cobra.Command{Use: "sub", Long: "This is sub.", RunE: root.RunE}
	sub.Flags().Bool("flag", false, "This is a flag.")
	root.AddCommand(sub)
	manual.Add(root)
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.Execute()
	return out.String(), err
}

func TestOutput(t *testing.T) {
	tests := []struct {
		args string
		want []string
	}{
		{"help", []string{"This is prog.", "exit-codes"}},
		{"help sub", []string{"This is sub.", "--flag", "--help"}},
		{"help help", []string{"EXIT STATUS", "Exit status is 2"}},
		{"help exit-codes", []string{exit.Table()}},
		{"completion bash", []string{"__start_prog"}},
		{"completion zsh", []string{"#compdef prog"}},
		{"completion fish", []string{"complete -c prog"}},
		{"completion powershell", []string{"Register-ArgumentCompleter"}},
		{"__complete help ", []string{"exit-codes", "sub"}},
		{"__complete completion ", []string{"bash", "zsh", "fish", "powershell"}},
		{"__complete doc --format ", []string{"man", "markdown", "all"}},
	}
	for _, test := range tests {
		t.Run(test.args, func(t *testing.T) {
			args := strings.Split(test.args, " ")
			out, err := run(args...)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range test.want {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
		})
	}
}

func TestMistakes(t *testing.T) {
	for args, want := range map[string]string{
		"help nothing":              `unknown help topic "nothing"`,
		"help sub nothing":          `unknown help topic "sub nothing"`,
		"completion":                "the shell is missing: name one of bash, zsh, fish, powershell",
		"completion ksh":            `unknown shell "ksh": name one of bash`,
		"completion bash zsh":       `surplus argument "zsh"`,
		"doc":                       "the directory is missing",
		"doc x":                     `surplus argument "x"`,
		"doc --path x --format pdf": `unknown --format "pdf"`,
	} {
		_, err := run(strings.Fields(args)...)
		if exit.Code(err) != exit.Invalid || !strings.Contains(err.Error(), want) ||
			!strings.Contains(err.Error(), "--help'") {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// A program writes its own documents, over what is there.
func TestDoc(t *testing.T) {
	for _, program := range []string{"dfcache", "dfdaemon"} {
		man, markdown := docs.Man(program), docs.Markdown(program)
		all := maps.Clone(man)
		maps.Copy(all, markdown)
		for format, want := range map[string]map[string][]byte{"man": man, "markdown": markdown, "all": all} {
			t.Run(program+"/"+format, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "new", "dir")
				for range 2 {
					if out, err := runAs(program, "doc", "--path", dir, "--format", format); err != nil || out != "" {
						t.Fatalf("%v, output %q", err, out)
					}
					if got := read(t, dir); len(got) == 0 || !maps.EqualFunc(got, want, bytes.Equal) {
						t.Errorf("got %v, want %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
					}
					if err := os.WriteFile(filepath.Join(dir, slices.Min(slices.Collect(maps.Keys(want)))),
						[]byte("old"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

func read(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, entry := range entries {
		if files[entry.Name()], err = os.ReadFile(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func TestDocFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := runAs("dfcache", "doc", "--path", file); exit.Code(err) != exit.Failure {
		t.Errorf("a file in place of the directory: %v", err)
	}
}
