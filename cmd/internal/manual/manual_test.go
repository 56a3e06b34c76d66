package manual_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
)

// run runs a program that has one command of its own, and returns its output.
func run(args ...string) (string, error) {
	root := &cobra.Command{Use: "prog", Long: "This is prog.", Args: exit.NoArgs, SilenceErrors: true, SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error { return nil }}
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
		if exit.Code(err) != exit.Invalid || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--help'") {
			t.Errorf("%s: %v", args, err)
		}
	}
}

func TestDoc(t *testing.T) {
	commands := []string{"prog", "prog sub", "prog help", "prog doc", "prog completion"}
	var man, markdown []string
	for _, command := range commands {
		man = append(man, strings.ReplaceAll(command, " ", "-")+".1")
		markdown = append(markdown, strings.ReplaceAll(command, " ", "_")+".md")
	}
	for format, want := range map[string][]string{
		"man":      man,
		"markdown": markdown,
		"all":      slices.Concat(man, markdown),
	} {
		t.Run(format, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new", "dir")
			if _, err := run("doc", "--path", dir, "--format", format); err != nil {
				t.Fatal(err)
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, entry := range entries {
				got = append(got, entry.Name())
				content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(string(content), "1970") || strings.Contains(string(content), "Auto generated") {
					t.Errorf("%s has a date", entry.Name())
				}
				if strings.Contains(entry.Name(), "sub") && !strings.Contains(string(content), "This is a flag.") {
					t.Errorf("%s does not describe the flag", entry.Name())
				}
			}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestDocFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run("doc", "--path", file); exit.Code(err) != exit.Failure {
		t.Errorf("a file in place of the directory: %v", err)
	}
}
