package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestTables: every change fits the code as it is now, and its test is there.
// That the tests notice them is for make mutants: it takes an hour.
func TestTables(t *testing.T) {
	t.Chdir("../..")
	mutants, err := readTables("integration/mutants")
	if err != nil {
		t.Fatal(err)
	}
	titles := map[string]bool{}
	for _, m := range mutants {
		if titles[m.title] {
			t.Errorf("two mutants are %q", m.title)
		}
		titles[m.title] = true
		name, _, _ := strings.Cut(m.test, "/")
		if !hasTest(t, m.pkg, name) {
			t.Errorf("%s: there is no %s in %s", m.title, name, m.pkg)
		}
	}
}

func hasTest(t *testing.T, pkg, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	function := regexp.MustCompile(`(?m)^func ` + regexp.QuoteMeta(name) + `\(`)
	for _, file := range files {
		if text, err := os.ReadFile(file); err != nil {
			t.Fatal(err)
		} else if function.Match(text) {
			return true
		}
	}
	return false
}

func TestParseTable(t *testing.T) {
	read := func(name string) ([]byte, error) {
		if name == "a.go" {
			return []byte("one\n\ttwo\nthree\nfour\nfour\n"), nil
		}
		return nil, fs.ErrNotExist
	}
	const head = "mutant: x\ntest: ./p TestX/sub\nfile: a.go\n"
	got, err := parseTable("# comment\n\n"+head+
		" one\n-\ttwo\n+\t2\n\n-three\nmutant: y\ntest: ./q TestY\nfile: a.go\n one\n+between\n", read)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].title != "x" || got[0].pkg != "./p" || got[0].test != "TestX/sub" ||
		got[1].title != "y" {
		t.Errorf("parsed as %+v", got)
	}
	if text := string(got[0].files["a.go"]); text != "one\n\t2\nfour\nfour\n" {
		t.Errorf("x makes it %q", text)
	}
	if text := string(got[1].files["a.go"]); text != "one\nbetween\n\ttwo\nthree\nfour\nfour\n" {
		t.Errorf("y makes it %q", text)
	}
	for what, bad := range map[string]string{
		"absent":   head + "-five\n",
		"twice":    head + "-four\n",
		"only new": head + "+five\n",
		"no file":  "mutant: x\ntest: ./p TestX\n-one\n",
		"no title": "test: ./p TestX\nfile: a.go\n-one\n",
		"no test":  "mutant: x\nfile: a.go\n-one\n",
		"nothing":  head,
		"garbage":  head + "one\n",
		"unknown":  "mutant: x\ntest: ./p TestX\nfile: b.go\n-one\n",
	} {
		if _, err := parseTable(bad, read); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}
