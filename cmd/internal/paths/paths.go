// Package paths says where the commands keep things unless they are told
// otherwise. Root uses the places of the Filesystem Hierarchy Standard, other
// users those of the XDG Base Directory Specification, so that nobody needs
// root for anything. Nothing is created here, and nothing is looked up but the
// home directory where HOME is not set, and the file in [Config].
package paths

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// Socket is where dfdaemon listens and dfcache finds it.
func Socket() string { return socket(isRoot()) }

// WorkHome is the working directory of the commands: the parent of [DataDir].
func WorkHome() string { return workHome(isRoot()) }

// LogDir is the directory of the log files.
func LogDir() string { return logDir(isRoot()) }

// Config is the configuration file of the command of that name: the one in
// /etc/dragonfly, or a user's own where there is one.
func Config(name string) string { return config(isRoot(), name) }

// SwarmKey is the key file of the swarm.
func SwarmKey() string { return swarmKey(isRoot()) }

// DataDir is where the daemon keeps content, below its working directory.
func DataDir(workHome string) string { return filepath.Join(workHome, "data") }

func isRoot() bool { return os.Geteuid() == 0 }

func workHome(root bool) string {
	if root {
		// Not /var/lib/dragonfly: Dragonfly's own dfdaemon, where one runs, removes
		// what it does not know there.
		return "/var/lib/dfcache"
	}
	return filepath.Join(xdg("XDG_DATA_HOME", ".local/share"), "dragonfly")
}

func logDir(root bool) string {
	if root {
		return "/var/log/dragonfly"
	}
	return filepath.Join(stateDir(), "logs")
}

func socket(root bool) string {
	const name = "dfdaemon.sock"
	if root {
		return filepath.Join("/run/dragonfly", name)
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "dragonfly", name)
	}
	// Not in /tmp, where anybody could put a socket of that name. And not
	// below XDG_STATE_HOME, which may be too long for a socket's address.
	return filepath.Join(home(), ".local/state/dragonfly/run", name)
}

func config(root bool, name string) string {
	if !root {
		own := filepath.Join(xdg("XDG_CONFIG_HOME", ".config"), "dragonfly", name+".yaml")
		if _, err := os.Stat(own); err == nil {
			return own
		}
	}
	return filepath.Join("/etc/dragonfly", name+".yaml")
}

func swarmKey(root bool) string {
	const name = "swarm.key"
	if root {
		return filepath.Join("/etc/dragonfly", name)
	}
	return filepath.Join(xdg("XDG_CONFIG_HOME", ".config"), "dragonfly", name)
}

func stateDir() string { return filepath.Join(xdg("XDG_STATE_HOME", ".local/state"), "dragonfly") }

// xdg returns the directory in the environment variable, or its default below
// the home directory. The specification has relative paths ignored.
func xdg(variable, fallback string) string {
	if dir := os.Getenv(variable); filepath.IsAbs(dir) {
		return dir
	}
	return filepath.Join(home(), fallback)
}

// CheckHome returns an error that says what to set where path, which is one of
// this package, is in the home directory and that is not known.
func CheckHome(path string) error { return checkHome(path, os.Geteuid()) }

func checkHome(path string, uid int) error {
	if _, err := homeOf(uid); err == nil || !strings.HasPrefix(path, "/.") {
		return nil
	}
	return fmt.Errorf("user ID %d has no home directory: set HOME", uid)
}

// home returns the user's home directory, or "/" where it is not known.
func home() string {
	dir, err := homeOf(os.Geteuid())
	if err != nil {
		return "/"
	}
	return dir
}

// homeOf returns the home directory that the environment names, else the one
// in the password file.
func homeOf(uid int) (string, error) {
	if dir, err := os.UserHomeDir(); err == nil {
		return dir, nil
	}
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(u.HomeDir) {
		return "", fmt.Errorf("home directory %q of user ID %d: not an absolute path", u.HomeDir, uid)
	}
	return u.HomeDir, nil
}
