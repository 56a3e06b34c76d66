package main

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// TestCongestion: a machine on which a network namespace may not have what is wanted is measured as it is.
func TestCongestion(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: needs root")
	}
	netns := fmt.Sprintf("dfbtest%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", netns).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("ip", "netns", "del", netns).Run()
	before := setCongestion(netns, "reno")
	if before != "reno" {
		t.Fatalf("it has %s, where all may have reno", before)
	}
	if has := setCongestion(netns, "nosuch"); has != before {
		t.Errorf("it has %q, and had %q", has, before)
	}
	if text := congestion(); text == "" {
		t.Error("nothing is said of what the crowds have")
	}
}
