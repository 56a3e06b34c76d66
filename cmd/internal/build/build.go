// Package build says which build of the program this is.
package build

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker:
//
//	go build -ldflags "-X github.com/dfcache/dfcache/cmd/internal/build.version=v1.2.3"
//
// Without, the Go toolchain's own stamp is used.
var version, commit, date string

// Info describes a build. Fields that are not known are empty, except Version,
// which is "devel" then.
type Info struct {
	Version   string `json:"version"`
	Commit    string `json:"commit,omitempty"` // of git; ends in "-dirty" where files had been changed
	Date      string `json:"date,omitempty"`   // of the commit, RFC 3339
	GoVersion string `json:"goVersion"`
	Platform  string `json:"platform"` // as in linux/amd64
}

// Get describes the running program.
func Get() Info {
	stamp, _ := debug.ReadBuildInfo()
	return get(stamp)
}

func get(stamp *debug.BuildInfo) Info {
	info := Info{
		Version:   version,
		Commit:    commit,
		Date:      date,
		GoVersion: runtime.Version(),
		Platform:  runtime.GOOS + "/" + runtime.GOARCH,
	}
	if stamp != nil {
		settings := make(map[string]string, len(stamp.Settings))
		for _, s := range stamp.Settings {
			settings[s.Key] = s.Value
		}
		if info.Commit == "" && settings["vcs.revision"] != "" {
			info.Commit, info.Date = settings["vcs.revision"], settings["vcs.time"]
			if settings["vcs.modified"] == "true" {
				info.Commit += "-dirty"
			}
		}
		if info.Version == "" && stamp.Main.Version != "(devel)" {
			info.Version = stamp.Main.Version
		}
	}
	if info.Version == "" {
		info.Version = "devel"
	}
	return info
}

// String describes the build in lines of text, one fact on each.
func (i Info) String() string {
	text := "version:  " + i.Version + "\n"
	for _, fact := range [][2]string{
		{"commit", i.Commit}, {"date", i.Date}, {"go", i.GoVersion}, {"platform", i.Platform},
	} {
		if fact[1] != "" {
			text += fmt.Sprintf("%-9s %s\n", fact[0]+":", fact[1])
		}
	}
	return text
}
