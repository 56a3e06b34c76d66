package memory

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestControlGroupLimit(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"memory.max":                            "max\n",
		"a/memory.max":                          "1000\n",
		"a/b/memory.max":                        "max\n",
		"a/b/c/memory.max":                      "3000\n",
		"small/memory.max":                      "7\n",
		"bad/memory.max":                        "x\n",
		"memory/memory.limit_in_bytes":          "9223372036854771712\n",
		"memory/docker/memory.limit_in_bytes":   "5000\n",
		"memory/docker/x/memory.limit_in_bytes": "6000\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		groups string
		want   int64
	}{
		{"", 0},
		{"0::/\n", 0},
		{"0::/a/b\n", 1000},
		{"0::/a/b/c\n", 1000},
		{"0::/small\n", 7},
		{"0::/bad\n", 0},
		{"0::/gone/from/here\n", 0},
		{"0::/../../small\n", 7}, // of a process outside of its name space
		{"5:cpu:/small\n4:memory:/\n0::/\n", 0},
		{"4:memory:/docker/x\n0::/\n", 5000},
		{"4:memory:/docker/x\n0::/a\n", 1000},
		{"nonsense\n::\n", 0},
	} {
		if got := controlGroupLimit(root, c.groups); got != c.want {
			t.Errorf("%q: %d, want %d", c.groups, got, c.want)
		}
	}
}

func TestGiveBack(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	stop := GiveBack()
	defer stop()
	load := make([][]byte, 100)
	for i := range load {
		load[i] = make([]byte, 1<<20)
	}
	if held := read().held; held < int64(len(load))<<20 {
		t.Fatalf("%d bytes are held of a load of %d MiB", held, len(load))
	}
	clear(load)
	for start := time.Now(); read().held > 32<<20; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("%d bytes are held still", read().held)
		}
	}
	stop()
}
