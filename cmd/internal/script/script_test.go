package script

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

func TestScripts(t *testing.T) { Run(t, "testdata/script") }

func TestField(t *testing.T) {
	const text = `{"a": {"b": [1, "two", {"c": null}]}, "big": 12345678901234567890, "f": false, "empty": []}`
	tests := []struct{ path, want, wantErr string }{
		{path: "a.b.0", want: "1"},
		{path: "a.b.1", want: "two"},
		{path: "a.b.2", want: `{"c":null}`},
		{path: "a.b.2.c", want: "null"},
		{path: "big", want: "12345678901234567890"},
		{path: "f", want: "false"},
		{path: "empty", want: "[]"},
		{path: "x", wantErr: `no "x"`},
		{path: "a.b.3", wantErr: `no "3" in a list of 3`},
		{path: "a.b.x", wantErr: `no "x" in a list`},
		{path: "f.x", wantErr: "nothing below false"},
	}
	for _, test := range tests {
		got, err := field(text, test.path)
		if test.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), test.wantErr) {
				t.Errorf("%s: error %v, want %s", test.path, err, test.wantErr)
			}
		} else if err != nil || got != test.want {
			t.Errorf("%s: got %s, %v, want %s", test.path, got, err, test.want)
		}
	}
	for _, bad := range []string{"", "{", "{} {}"} {
		if _, err := field(bad, "a"); err == nil {
			t.Errorf("%q is no error", bad)
		}
	}
}

func TestSameFile(t *testing.T) {
	dir := t.TempDir()
	big := strings.Repeat("x", 1<<20)
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tests := []struct {
		a, b string
		same bool
	}{
		{"", "", true},
		{"x", "x", true},
		{"x", "y", false},
		{"x", "", false},
		{"", "x", false},
		{big, big, true},
		{big, big + "x", false},
		{big + "x", big, false},
		{big + "x", big + "y", false},
		{big + "xy", big + "x", false},
	}
	for _, test := range tests {
		err := sameFile(write("a", test.a), write("b", test.b))
		if (err == nil) != test.same {
			t.Errorf("%d and %d bytes: %v, want same %v", len(test.a), len(test.b), err, test.same)
		}
	}
}
