package paths

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPaths(t *testing.T) {
	clear := map[string]string{
		"HOME": "/home/u", "XDG_DATA_HOME": "", "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": "", "XDG_RUNTIME_DIR": "",
	}
	tests := []struct {
		name                     string
		root                     bool
		env                      map[string]string
		workHome, logDir, socket string
	}{
		{"root", true, map[string]string{"XDG_DATA_HOME": "/d", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"},
			"/var/lib/dragonfly", "/var/log/dragonfly", "/run/dragonfly/dfdaemon.sock"},
		{"user", false, nil,
			"/home/u/.local/share/dragonfly", "/home/u/.local/state/dragonfly/logs", "/home/u/.local/state/dragonfly/run/dfdaemon.sock"},
		{"user with XDG", false, map[string]string{"XDG_DATA_HOME": "/d", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"},
			"/d/dragonfly", "/s/dragonfly/logs", "/r/dragonfly/dfdaemon.sock"},
		{"relative XDG is ignored", false, map[string]string{"XDG_DATA_HOME": "d", "XDG_STATE_HOME": "s", "XDG_RUNTIME_DIR": "r"},
			"/home/u/.local/share/dragonfly", "/home/u/.local/state/dragonfly/logs", "/home/u/.local/state/dragonfly/run/dfdaemon.sock"},
		{"no home", false, map[string]string{"HOME": ""},
			"/.local/share/dragonfly", "/.local/state/dragonfly/logs", "/.local/state/dragonfly/run/dfdaemon.sock"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, env := range []map[string]string{clear, test.env} {
				for name, value := range env {
					t.Setenv(name, value)
				}
			}
			for _, path := range [][3]string{
				{"workHome", workHome(test.root), test.workHome},
				{"logDir", logDir(test.root), test.logDir},
				{"socket", socket(test.root), test.socket},
			} {
				if path[1] != path[2] {
					t.Errorf("%s: got %s, want %s", path[0], path[1], path[2])
				}
			}
		})
	}
}

func TestConfig(t *testing.T) {
	const system = "/etc/dragonfly/dfcache.yaml"
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	if got := config(false, "dfcache"); got != system {
		t.Errorf("without an own file: got %s, want %s", got, system)
	}

	own := filepath.Join(dir, "dragonfly", "dfcache.yaml")
	if err := os.MkdirAll(filepath.Dir(own), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := config(false, "dfcache"); got != own {
		t.Errorf("with an own file: got %s, want %s", got, own)
	}
	if got := config(false, "dfdaemon"); got != "/etc/dragonfly/dfdaemon.yaml" {
		t.Errorf("of another command: got %s", got)
	}
	if got := config(true, "dfcache"); got != system {
		t.Errorf("for root: got %s, want %s", got, system)
	}
}

func TestDataDir(t *testing.T) {
	if got := DataDir("/w"); got != "/w/data" {
		t.Errorf("got %s", got)
	}
}
