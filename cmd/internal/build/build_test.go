package build

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestGet(t *testing.T) {
	stamp := func(version string, settings ...debug.BuildSetting) *debug.BuildInfo {
		return &debug.BuildInfo{Main: debug.Module{Version: version}, Settings: settings}
	}
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "abc"}
	tests := []struct {
		name                  string
		version, commit, date string // of the linker
		stamp                 *debug.BuildInfo
		want                  Info
	}{
		{name: "nothing is known", want: Info{Version: "devel"}},
		{name: "linker", version: "v1", commit: "c", date: "d", stamp: stamp("v2", revision),
			want: Info{Version: "v1", Commit: "c", Date: "d"}},
		{name: "go install", stamp: stamp("v2"), want: Info{Version: "v2"}},
		{name: "checkout", stamp: stamp("(devel)", revision, debug.BuildSetting{Key: "vcs.time", Value: "2026"}),
			want: Info{Version: "devel", Commit: "abc", Date: "2026"}},
		{name: "changed checkout", stamp: stamp("", revision, debug.BuildSetting{Key: "vcs.modified", Value: "true"}),
			want: Info{Version: "devel", Commit: "abc-dirty"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			version, commit, date = test.version, test.commit, test.date
			defer func() { version, commit, date = "", "", "" }()
			test.want.GoVersion, test.want.Platform = runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH
			if got := get(test.stamp); got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestString(t *testing.T) {
	const want = "version:  v1\ncommit:   c\ngo:       go9\nplatform: a/b\n"
	if got := (Info{Version: "v1", Commit: "c", GoVersion: "go9", Platform: "a/b"}).String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
