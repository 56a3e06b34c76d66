package integration

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/blobstore"
)

// TestFewDescriptors: a daemon that may have few files open gives a peer more files than that
// one after the other, and goes on answering.
func TestFewDescriptors(t *testing.T) {
	const descriptors, files = 96, 100
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.daemon = startDaemonWith(t, a.home, []string{"--swarm-key", l.key},
		slices.Concat(a.in(), []string{"prlimit", fmt.Sprintf("--nofile=%d:%d", descriptors, descriptors)})...)
	b.start()
	l.meet(1)
	at, there := a.dial(t), b.dial(t)
	defer at.Close()
	defer there.Close()
	from, to := repository(t, at, "files"), repository(t, there, "files")
	for i := range files {
		if _, err := from.Import(t.Context(), fmt.Sprintf("f%d", i), strings.NewReader(fmt.Sprint("file ", i)),
			blobstore.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range files {
		f, err := to.Open(t.Context(), fmt.Sprintf("f%d", i), blobstore.Lookup{})
		if err != nil {
			t.Fatalf("file %d of %d: %v", i, files, err)
		}
		got, err := io.ReadAll(f)
		f.Close()
		if err != nil || string(got) != fmt.Sprint("file ", i) {
			t.Fatalf("file %d: %q, %v", i, got, err)
		}
	}
	a.ok("stat", "-t", "files", "-i", "f0", "-l")
}
