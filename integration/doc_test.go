package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// TestDocument does what docs/oci.md shows: it runs the commands of its console
// blocks, one after the other, and compares what they print.
//
// In a block a line that begins with "$ " is a command, with the lines that it
// is continued on; what follows is its output. There "…" stands for a part of a
// line, and a line "..." for any lines. A command that fails ends in a line
// "(exit code N)". Two commands are not run: "dfdaemon" starts the daemon anew,
// with the flags given, at a free port that takes the place of 65001; and "cat"
// makes the file where there is none. Images are for this machine's platform.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/oci.md")
	if err != nil {
		t.Fatal(err)
	}
	home := tempHome(t)
	d := startDaemon(t, home)
	u := newUser(t, d)
	for name := range clients {
		u.command(nil, []string{name}) // fails where it is missing
	}
	c := u.startContainerd()
	u.env = append(u.env, "CONTAINERD_ADDRESS="+c.socket, "CONTAINERD_SNAPSHOTTER=native", "DFDAEMON_WORKHOME="+home)
	blocks := regexp.MustCompile("(?ms)^```console\n(.*?)^```$").FindAllStringSubmatch(string(text), -1)
	commands := 0
	for _, block := range blocks {
		for _, step := range regexp.MustCompile(`(?m)^\$ `).Split(block[1], -1)[1:] {
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
	if commands < 20 {
		t.Errorf("the document has %d commands", commands)
	}
	d.stop(t, syscall.SIGTERM)
	requireFsck(t, home)
}

// documentNames makes of a text of the document what it is in the test.
func (d *daemon) documentNames() func(string) string {
	return strings.NewReplacer("65001", strings.TrimPrefix(d.host, "localhost:"),
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
