// Package settings gives flags the values that are written in the environment
// and in a configuration file.
package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// Load sets the flags of cmd that were not given on the command line: from the
// environment, else from the configuration file. Flags set by either are
// Changed afterwards. It has to be called after the flags were parsed.
//
// The variable of a flag is the flag's name in upper case, with underscores
// for dashes, after prefix and an underscore: DFCACHE_DAEMON_SOCK. An empty
// variable counts as none.
//
// The file is YAML: one map from flag names to values. It is named by the
// flag --config, its variable, or the flag's default; only in the last case
// may it be missing. One file serves all commands of a program, so it may set
// flags of other commands than cmd; a key that is no flag of any of them is an
// error. Help, version and hidden flags can't be set, nor can the file name
// another one.
//
// A file has 64 KiB at most.
//
// Errors name the file and the key, or the variable, and are usage errors of
// package exit.
func Load(cmd *cobra.Command, prefix string) error {
	file, err := readFile(cmd, prefix)
	if err != nil {
		return err
	}
	var failed error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if failed != nil || f.Changed || !settable(f) {
			return
		}
		if value := os.Getenv(variable(prefix, f.Name)); value != "" {
			failed = set(cmd.Flags(), f, value, "environment variable "+variable(prefix, f.Name))
		} else if value, ok := file.values[f.Name]; ok {
			failed = set(cmd.Flags(), f, value, fmt.Sprintf("configuration file %s: %s", file.path, f.Name))
		}
	})
	return failed
}

func set(flags *pflag.FlagSet, f *pflag.Flag, value, source string) error {
	if err := flags.Set(f.Name, value); err != nil {
		return exit.Usage(fmt.Errorf("%s: %q is not a valid %s: %w", source, value, f.Value.Type(),
			exit.ValueError(err)))
	}
	return nil
}

// variable returns the name of a flag's environment variable.
func variable(prefix, flag string) string {
	return prefix + "_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// settable reports whether environment and file can set the flag.
func settable(f *pflag.Flag) bool {
	return !f.Hidden && f.Name != "help" && f.Name != "version" && f.Name != "config"
}

// maxFile bounds, in bytes, what a configuration file may have.
const maxFile = 64 << 10

// file is what a configuration file says, as text for pflag.
type file struct {
	path   string
	values map[string]string
}

func readFile(cmd *cobra.Command, prefix string) (file, error) {
	flag := cmd.Flags().Lookup("config")
	if flag == nil {
		return file{}, nil
	}
	f, named := file{path: flag.Value.String()}, flag.Changed
	if value := os.Getenv(variable(prefix, flag.Name)); value != "" && !named {
		f.path, named = value, true
	}
	if f.path == "" {
		return f, exit.Usage(errors.New("--config is empty: name a configuration file, or leave it out"))
	}
	content, err := read(f.path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return f, nil
	}
	if err != nil {
		return f, exit.Usage(fmt.Errorf("read configuration file: %w", err))
	}
	if f.values, err = parse(content, knownKeys(cmd.Root())); err != nil {
		return f, exit.Usage(fmt.Errorf("configuration file %s: %w", f.path, err))
	}
	return f, nil
}

// read returns the content of a file that is no longer than maxFile.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes: name a configuration file", path, maxFile)
	}
	return content, err
}

// parse reads the YAML of a configuration file. Values stay the text that they
// are in the file, so that the tag 1.10 does not become 1.1.
func parse(content []byte, known []string) (map[string]string, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	// not a map of Go: looking for keys that stand there twice takes that package time by the square
	var document yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if err := decoder.Decode(new(yaml.Node)); err == nil {
		return nil, errors.New("more than one YAML document")
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	root := document.Content[0]
	if root.ShortTag() == "!!null" {
		return nil, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, errNoMap(root)
	}
	values, lines := map[string]string{}, map[string]int{}
	for pair := range slices.Chunk(root.Content, 2) {
		node := pair[1]
		if pair[0].Kind != yaml.ScalarNode {
			return nil, errNoMap(pair[0])
		}
		key := pair[0].Value
		if !slices.Contains(known, key) {
			return nil, fmt.Errorf("line %d: unknown key %q%s", pair[0].Line, key, didYouMean(key, known))
		}
		if lines[key] > 0 {
			return nil, fmt.Errorf("line %d: %s stands at line %d already", pair[0].Line, key, lines[key])
		}
		lines[key] = pair[0].Line
		if node.Kind == yaml.AliasNode {
			node = node.Alias
		}
		switch {
		case node.Kind == yaml.MappingNode:
			return nil, fmt.Errorf("line %d: %s: want a single value, not a map", node.Line, key)
		case node.Kind == yaml.SequenceNode:
			return nil, fmt.Errorf("line %d: %s: want a single value, not a list", node.Line, key)
		case node.ShortTag() == "!!null":
			return nil, fmt.Errorf("line %d: %s has no value: give it one, or leave the key out", node.Line, key)
		}
		values[key] = node.Value
	}
	return values, nil
}

// errNoMap says that a node is not what belongs there.
func errNoMap(node *yaml.Node) error {
	return fmt.Errorf("line %d: want a map of flag names to values", node.Line)
}

// knownKeys returns the names of all flags below cmd that a file can set.
func knownKeys(cmd *cobra.Command) []string {
	keys := map[string]bool{}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, flags := range []*pflag.FlagSet{cmd.Flags(), cmd.PersistentFlags()} {
			flags.VisitAll(func(f *pflag.Flag) {
				if settable(f) {
					keys[f.Name] = true
				}
			})
		}
		for _, child := range cmd.Commands() {
			// Commands that load no settings have no say in what is one.
			if child.Name() != "completion" && child.Name() != "doc" {
				walk(child)
			}
		}
	}
	walk(cmd)
	return slices.Sorted(maps.Keys(keys))
}

// didYouMean names the known keys that are near to key, if any.
func didYouMean(key string, known []string) string {
	if key == "config" {
		return ": a file can't name another one"
	}
	// Cobra knows how to find near names of commands.
	names := &cobra.Command{SuggestionsMinimumDistance: 2}
	for _, name := range known {
		names.AddCommand(&cobra.Command{Use: name, Run: func(*cobra.Command, []string) {}})
	}
	if near := names.SuggestionsFor(key); len(near) > 0 {
		return ", did you mean " + strings.Join(near, " or ") + "?"
	}
	return ", want one of: " + strings.Join(known, ", ")
}
