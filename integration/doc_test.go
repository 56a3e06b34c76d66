package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// documents are those whose blocks of commands are run.
var documents = []string{"../README.md", "../docs/oci.md"}

// block is a block of code in a document.
type block struct {
	document, language, text string
	line                     int    // where it begins
	unrun                    string // why its commands are not run, as the line before it says; or ""
}

var fence = regexp.MustCompile("(?ms)^(?:<!-- not run: ([^\n]+) -->\n)?^ *```(\\w*)\n(.*?)^ *```$")

// blocks returns those of a document.
func blocks(t *testing.T, document string) (all []block, rest string) {
	t.Helper()
	data, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, m := range fence.FindAllStringSubmatchIndex(text, -1) {
		b := block{document: document, language: text[m[4]:m[5]], text: text[m[6]:m[7]],
			line: strings.Count(text[:m[4]], "\n") + 1}
		if m[2] >= 0 {
			b.unrun = text[m[2]:m[3]]
		}
		all = append(all, b)
	}
	return all, fence.ReplaceAllString(text, "")
}

// TestShellBlocks: what the documents show of commands is run by a test, or says why it is not.
func TestShellBlocks(t *testing.T) {
	all, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	indented := regexp.MustCompile(`(?m)^    (\$ |(sudo|make|dfcache|dfdaemon|oras|crane|skopeo|ctr|regctl|docker|podman) ).*$`)
	for _, document := range append(all, "../README.md", "../CONTRIBUTING.md") {
		found, rest := blocks(t, document)
		for _, b := range found {
			shell := b.language == "sh" || b.language == "console"
			switch {
			case !shell && (regexp.MustCompile(`(?m)^\$ `).MatchString(b.text) || strings.Contains(b.language, "sh")):
				t.Errorf("%s:%d: a block with commands is sh, or console where their output is shown", document, b.line)
			case shell && b.unrun == "" && !slices.Contains(documents, document):
				t.Errorf("%s:%d: no test runs this: add the document to those that are run, or say why before it: "+
					"<!-- not run: REASON -->", document, b.line)
			}
		}
		for _, line := range indented.FindAllString(rest, -1) {
			t.Errorf("%s: %q is not in a block of its own, with ```", document, line)
		}
	}
}

// TestDocuments does what documents show: it runs the commands of their blocks, one after the other.
//
// In a block of the language console a line that begins with "$ " is a command, with the lines that it
// is continued on; what follows is its output. There "…" stands for a part of a
// line, and a line "..." for any lines. A command that fails ends in a line
// "(exit code N)". Two commands are not run: "dfdaemon" starts the daemon anew,
// with the flags given, at a free port that takes the place of 65001; and "cat"
// makes the file where there is none. Images are for this machine's platform.
//
// In one of the language sh each line is a command that succeeds. Before it there is model.bin, which
// is imported as v1 of models, README.md, and a directory bin; "sha256:…" is the digest of the file. For
// dfdaemon's subcommands the daemon is stopped.
func TestDocuments(t *testing.T) {
	for _, document := range documents {
		t.Run(filepath.Base(document), func(t *testing.T) { runDocument(t, document) })
	}
}

func runDocument(t *testing.T, document string) {
	home := tempHome(t)
	d := startDaemon(t, home)
	u := newUser(t, d)
	for name := range clients {
		u.command(nil, []string{name}) // fails where it is missing
	}
	u.env = append(u.env, "DFDAEMON_WORKHOME="+home)
	all, _ := blocks(t, document)
	if slices.ContainsFunc(all, func(b block) bool { return strings.Contains(b.text, "$ ctr ") }) {
		u.env = append(u.env, "CONTAINERD_ADDRESS="+u.startContainerd().socket, "CONTAINERD_SNAPSHOTTER=native")
	}
	commands := 0
	for _, b := range all {
		switch {
		case b.unrun != "":
		case b.language == "sh":
			commands += strings.Count(b.text, "\n")
			u.runLines(b, &d)
		case b.language == "console":
			for _, step := range regexp.MustCompile(`(?m)^\$ `).Split(b.text, -1)[1:] {
				commands++
				command, want := cutCommand(step)
				replace := d.documentNames()
				var got string
				switch name, rest, _ := strings.Cut(command, " "); name {
				case "dfdaemon":
					d.stop(t, syscall.SIGTERM)
					d = startDaemonWith(t, home, u.documentFlags(rest))
					got, replace = d.says, d.documentNames()
				case "cat":
					path := strings.Replace(rest, "~", "home", 1)
					if _, err := os.Stat(filepath.Join(u.dir, path)); err != nil {
						u.write(path, []byte(replace(want)))
					}
					got = u.run("cat", path)
				default:
					got = u.console(replace(command))
				}
				if !matches(replace(want), got) {
					t.Errorf("$ %s\nprints\n%s\nand the document says\n%s", replace(command), got, replace(want))
				}
			}
		}
	}
	if commands < 10 {
		t.Errorf("the document has %d commands", commands)
	}
	d.stop(t, syscall.SIGTERM)
	requireFsck(t, home)
}

// runLines runs the commands of a block of the language sh. Where it stops the daemon, it starts another one.
func (u *user) runLines(b block, d **daemon) {
	u.t.Helper()
	u.console("echo model >model.bin; mkdir -p bin; echo file >bin/file; echo read >README.md")
	u.run("dfcache", "import", "-t", "models", "-i", "v1", "model.bin")
	sum, _, _ := strings.Cut(u.run("sha256sum", "model.bin"), " ")
	for line := range strings.Lines(strings.ReplaceAll(b.text, "\\\n", "")) {
		line = strings.ReplaceAll((*d).documentNames()(line), "sha256:…", "sha256:"+sum)
		stopped := strings.HasPrefix(line, "dfdaemon ")
		if stopped {
			(*d).stop(u.t, syscall.SIGTERM)
		}
		if got := u.console(line); strings.HasSuffix(got, ")\n") && strings.Contains(got, "(exit code ") {
			u.t.Errorf("%s:%d: %s\nprints\n%s", b.document, b.line, line, got)
		}
		if stopped {
			*d = startDaemon(u.t, (*d).home)
		}
	}
}

// documentNames makes of a text of the document what it is in the test.
func (d *daemon) documentNames() func(string) string {
	return strings.NewReplacer("65001", strings.TrimPrefix(d.host, "localhost:"), "/var/lib/dfcache", d.home,
		"linux/amd64", runtime.GOOS+"/"+runtime.GOARCH).Replace
}

// cutCommand cuts a step into the command and its output.
func cutCommand(step string) (command, output string) {
	lines := strings.SplitAfter(step, "\n")
	n := 1
	for n < len(lines) && strings.HasSuffix(lines[n-1], "\\\n") {
		n++
	}
	return strings.TrimSuffix(strings.Join(lines[:n], ""), "\n"), strings.Join(lines[n:], "")
}

// documentFlags are the flags of a dfdaemon in the document: with whole paths,
// and at any port.
func (u *user) documentFlags(text string) []string {
	flags := strings.Fields(strings.ReplaceAll(strings.ReplaceAll(text, "\\\n", " "), ":65001", ":0"))
	for i, flag := range flags {
		if _, err := os.Stat(filepath.Join(u.dir, flag)); err == nil {
			flags[i] = filepath.Join(u.dir, flag)
		}
	}
	return flags
}

// console runs a line in a shell and returns all that it prints, and the exit
// code where that is not 0.
func (u *user) console(line string) string {
	u.t.Helper()
	cmd := u.command(nil, []string{"sh", "-c", line})
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s(exit code %d)\n", out, cmd.ProcessState.ExitCode())
	}
	return string(out)
}

// matches reports whether got is what the document says.
func matches(want, got string) bool {
	var pattern strings.Builder
	for line := range strings.Lines(want) {
		if line == "...\n" {
			pattern.WriteString(`(?:[^\n]*\n)*?`)
			continue
		}
		pattern.WriteString(strings.ReplaceAll(regexp.QuoteMeta(line), "…", `[^\n]*`))
	}
	if got != "" && !strings.HasSuffix(got, "\n") {
		got += "\n"
	}
	return regexp.MustCompile("^(?:" + pattern.String() + ")$").MatchString(got)
}
