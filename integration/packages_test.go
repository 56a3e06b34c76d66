package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPackages: make test installs what is missing, and says what that is where it can't.
func TestPackages(t *testing.T) {
	script, err := os.ReadFile("packages.sh")
	if err != nil {
		t.Fatal(err)
	}
	// A machine that has all but miniupnpd.
	bin := t.TempDir()
	tool := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, list, _ := strings.Cut(string(script), "for pair in ")
	list, _, _ = strings.Cut(list, "; do")
	pairs := strings.Fields(strings.ReplaceAll(list, "\\\n", " "))
	if len(pairs) < 10 {
		t.Fatalf("the script looks for %v", pairs)
	}
	for _, pair := range pairs {
		if name, _, _ := strings.Cut(pair, ":"); name != "miniupnpd" {
			tool(name, "exit 1")
		}
	}
	run := func(uid string) (string, error) {
		tool("id", "echo "+uid)
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "packages.sh")
		cmd.Env = []string{"PATH=" + bin}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("1000"); err == nil || !strings.HasSuffix(out, " miniupnpd-nftables\n") {
		t.Errorf("without root: %v, %s", err, out)
	}
	if out, err := run("0"); err == nil || !strings.HasSuffix(out, " miniupnpd-nftables\n") {
		t.Errorf("without apt-get: %v, %s", err, out)
	}
	tool("apt-get", `echo "apt-get $*"`)
	const install = "\napt-get install -y -q --no-install-recommends miniupnpd-nftables\n"
	if out, err := run("0"); err != nil || !strings.Contains(out, install) {
		t.Errorf("with root: %v, %s", err, out)
	}
	tool("miniupnpd", "exit 1")
	if out, err := run("0"); err != nil || out != "" {
		t.Errorf("with all of it: %v, %s", err, out)
	}
	makefile, err := os.ReadFile("../Makefile")
	if err != nil || !strings.Contains(string(makefile), "\ntest: packages ") {
		t.Errorf("make test does not begin with packages: %v", err)
	}
}
