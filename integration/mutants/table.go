package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// mutant is a change of the code, and the test that has to notice it.
type mutant struct {
	title     string
	pkg, test string
	files     map[string][]byte // as changed, by their names in the module
}

// readTables reads all tables of a directory, *.txt. The current directory is the
// module's. Each change has to fit the code: what it replaces is there once.
func readTables(dir string) ([]*mutant, error) {
	tables, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return nil, err
	}
	var all []*mutant
	for _, name := range tables {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		mutants, err := parseTable(string(text), os.ReadFile)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, mutants...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("there are no mutants in %s", dir)
	}
	return all, nil
}

// parseTable parses a table, of blocks like
//
//	mutant: what a peer says of a name is believed without its proof
//	test: ./p2p/swarm TestNames
//	file: p2p/swarm/find.go
//	 	if err := m.verify(); err != nil {
//	-		return err
//	+		_ = err
//
// where the lines of a change are as in a diff: they begin with a space, - or +.
// Another change of the same file comes after a line "file:" with its name, or
// after an empty line. Lines that begin with # are comments.
func parseTable(text string, read func(name string) ([]byte, error)) ([]*mutant, error) {
	var all []*mutant
	var m *mutant
	var file string
	var before, after []byte
	change := func() error {
		if before == nil && after == nil {
			return nil
		}
		content := m.files[file]
		if content == nil {
			var err error
			if content, err = read(file); err != nil {
				return err
			}
		}
		if n := bytes.Count(content, before); len(before) == 0 || n != 1 {
			return fmt.Errorf("%s: what it replaces is %d times in %s, not once:\n%s", m.title, n, file, before)
		}
		m.files[file] = bytes.Replace(content, before, after, 1)
		before, after = nil, nil
		return nil
	}
	for i, line := range strings.Split(text+"\n", "\n") {
		key, value, _ := strings.Cut(line, ": ")
		var err error
		switch {
		case strings.HasPrefix(line, "#"):
		case line == "":
			err = change()
		case key == "mutant":
			if err = change(); err == nil {
				m, file = &mutant{title: value, files: map[string][]byte{}}, ""
				all = append(all, m)
			}
		case m == nil:
			err = errors.New("a mutant has to begin with its title")
		case key == "test":
			m.pkg, m.test, _ = strings.Cut(value, " ")
		case key == "file":
			err, file = change(), value
		case file == "":
			err = errors.New("no file is named before the change")
		case line[0] == ' ':
			before = append(append(before, line[1:]...), '\n')
			after = append(append(after, line[1:]...), '\n')
		case line[0] == '-':
			before = append(append(before, line[1:]...), '\n')
		case line[0] == '+':
			after = append(append(after, line[1:]...), '\n')
		default:
			err = errors.New("neither a key nor a change")
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	for _, m := range all {
		if m.title == "" || m.test == "" || len(m.files) == 0 {
			return nil, fmt.Errorf("mutant %q has no title, test or change", m.title)
		}
	}
	return all, nil
}
