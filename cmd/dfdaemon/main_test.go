package main

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/cmd/internal/script"
)

func TestMain(m *testing.M) { script.Main(m) }

func TestScripts(t *testing.T) { script.Run(t, "testdata/script") }

// The manual has every flag of what can be configured, with its default.
func TestManual(t *testing.T) {
	content, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	manual := string(content)
	root := newRoot()
	for _, cmd := range append(root.Commands(), root) {
		if name := cmd.Name(); name != "dfdaemon" && name != "fsck" {
			continue
		}
		check := func(f *pflag.Flag) {
			if f.Hidden || f.Name == "help" {
				return
			}
			if !strings.Contains(manual, "`--"+f.Name+"`") && !strings.Contains(manual, "`--"+f.Name+" ") {
				t.Errorf("%s: no --%s in docs/configuration.md", cmd.Name(), f.Name)
			}
			if f.DefValue != "" && !strings.Contains(manual, "`"+f.DefValue+"`") && cmd == root {
				t.Errorf("%s: no default %s of --%s in docs/configuration.md", cmd.Name(), f.DefValue, f.Name)
			}
		}
		for _, flags := range []func(*cobra.Command) *pflag.FlagSet{
			(*cobra.Command).Flags, (*cobra.Command).PersistentFlags} {
			flags(cmd).VisitAll(check)
		}
	}
}
