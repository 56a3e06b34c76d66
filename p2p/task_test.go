package p2p

import (
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/digest"
)

// repositoryName is the grammar as the distribution specification has it.
var repositoryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

func TestValidateTag(t *testing.T) {
	for _, good := range []string{"", "a", "models", "models/llm/7b", "a.b_c__d-e---f", "0", strings.Repeat("a", 255)} {
		if err := ValidateTag(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for bad, reason := range map[string]string{
		"Models":                 `"Models" is not a path component`,
		"a b":                    "path component",
		"/a":                     `"" is not a path component`,
		"a/":                     `"" is not a path component`,
		"a//b":                   `"" is not a path component`,
		"a/../b":                 `".." is not a path component`,
		".":                      "path component",
		"a..b":                   "path component",
		"a___b":                  "path component",
		"a._b":                   "path component",
		"-a":                     "path component",
		"a-":                     "path component",
		"a:b":                    "path component",
		"a\x00b":                 "path component",
		"é":                      "path component",
		"a\n":                    "path component",
		strings.Repeat("a", 256): "255 characters",
		DefaultRepository:        "empty tag",
	} {
		if err := ValidateTag(bad); !errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: error is %v; want one that has %q", bad, err, reason)
		}
	}
}

// TestTaskID: what differs in tag or digest has another ID, also where the
// two put together are the same text.
func TestTaskID(t *testing.T) {
	d := digest.SHA256.FromString("data")
	seen := map[string]Task{}
	for _, task := range []Task{{"", d}, {"a", d}, {"ab", d}, {"a", "b" + d}, {"", "a" + d}, {"", "ab" + d},
		{"a", digest.SHA512.FromString("data")}} {
		if other, ok := seen[task.ID()]; ok {
			t.Errorf("%q and %q have the same ID", task, other)
		}
		seen[task.ID()] = task
	}
	// Peers of other versions have to come to the same.
	if got, want := (Task{"models", d}).ID(),
		"fb9b2dbb508a4eb3472689afbc67f4c7b466726d85ce117f01bc4641f4e009af"; got != want {
		t.Errorf("the ID is %s, want %s", got, want)
	}
}

func FuzzValidateTag(f *testing.F) {
	for _, s := range []string{"", "a", "models/llm", "a.b_c__d-e---f", "a___b", "A", "a/../b", "a\x00", "é",
		DefaultRepository, strings.Repeat("a", 256)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, tag string) {
		want := tag == "" || len(tag) <= MaxTag && tag != DefaultRepository && repositoryName.MatchString(tag)
		err := ValidateTag(tag)
		if (err == nil) != want {
			t.Errorf("%q: %v, want it to be valid: %v", tag, err, want)
		}
		if err != nil && !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("%q: %v", tag, err)
		}
	})
}
