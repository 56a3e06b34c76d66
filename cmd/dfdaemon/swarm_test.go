package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
)

// What libraries would print on stderr goes to the log, as debug.
func TestLogLibraries(t *testing.T) {
	var log bytes.Buffer
	logLibraries(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	gologshim.Logger("shim").With("a", 1).Error("from the shim", "b", 2)
	gologshim.Logger("shim").Info("not wanted")
	golog.Logger("zap").Error("from zap")
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("logged are %d lines, want 2:\n%s", len(lines), log.String())
	}
	for i, want := range [][]string{
		{"level=DEBUG", "logger=shim", "from the shim", "a=1", "b=2"},
		{"level=DEBUG", "zap: from zap"},
	} {
		for _, w := range want {
			if !strings.Contains(lines[i], w) {
				t.Errorf("no %q in %s", w, lines[i])
			}
		}
	}

	// Where debug is not logged, none of it is.
	log.Reset()
	logLibraries(slog.NewTextHandler(&log, nil))
	gologshim.Logger("other").Error("from the shim")
	golog.Logger("other").Error("from zap")
	if log.Len() > 0 {
		t.Errorf("logged is %s", log.String())
	}
}
