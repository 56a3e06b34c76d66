package paths

import (
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestPaths(t *testing.T) {
	me, err := user.LookupId(strconv.Itoa(os.Geteuid()))
	if err != nil {
		t.Fatal(err)
	}
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
			"/var/lib/dfcache", "/var/log/dragonfly", "/run/dragonfly/dfdaemon.sock"},
		{"user", false, nil,
			"/home/u/.local/share/dragonfly", "/home/u/.local/state/dragonfly/logs",
			"/home/u/.local/state/dragonfly/run/dfdaemon.sock"},
		{"user with XDG", false, map[string]string{
			"XDG_DATA_HOME": "/d", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"},
			"/d/dragonfly", "/s/dragonfly/logs", "/r/dragonfly/dfdaemon.sock"},
		{"relative XDG is ignored", false,
			map[string]string{"XDG_DATA_HOME": "d", "XDG_STATE_HOME": "s", "XDG_RUNTIME_DIR": "r"},
			"/home/u/.local/share/dragonfly", "/home/u/.local/state/dragonfly/logs",
			"/home/u/.local/state/dragonfly/run/dfdaemon.sock"},
		{"home in the password file", false, map[string]string{"HOME": ""},
			me.HomeDir + "/.local/share/dragonfly", me.HomeDir + "/.local/state/dragonfly/logs",
			me.HomeDir + "/.local/state/dragonfly/run/dfdaemon.sock"},
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

func TestCheckHome(t *testing.T) {
	const nobodyKnown = 1<<31 - 7 // a user ID without an entry
	for _, test := range []struct {
		home, path string
		uid        int
		ok         bool
	}{
		{"/home/u", "/home/u/.local/share/dragonfly", nobodyKnown, true},
		{"/", "/.local/share/dragonfly", nobodyKnown, true},
		{"", "/run/user/5/dragonfly/dfdaemon.sock", nobodyKnown, true},
		{"", "/.local/share/dragonfly", os.Geteuid(), true},
		{"", "/.local/share/dragonfly", nobodyKnown, false},
	} {
		t.Setenv("HOME", test.home)
		if err := checkHome(test.path, test.uid); (err == nil) != test.ok ||
			err != nil && !strings.Contains(err.Error(), "set HOME") {
			t.Errorf("%+v: %v", test, err)
		}
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

func TestSwarmKey(t *testing.T) {
	t.Setenv("HOME", "/home/u")
	for _, test := range []struct {
		root      bool
		xdg, want string
	}{
		{true, "/c", "/etc/dragonfly/swarm.key"},
		{false, "/c", "/c/dragonfly/swarm.key"},
		{false, "c", "/home/u/.config/dragonfly/swarm.key"},
		{false, "", "/home/u/.config/dragonfly/swarm.key"},
	} {
		t.Setenv("XDG_CONFIG_HOME", test.xdg)
		if got := swarmKey(test.root); got != test.want {
			t.Errorf("root %v, XDG_CONFIG_HOME %q: got %s, want %s", test.root, test.xdg, got, test.want)
		}
	}
}

func TestDataDir(t *testing.T) {
	if got := DataDir("/w"); got != "/w/data" {
		t.Errorf("got %s", got)
	}
}
