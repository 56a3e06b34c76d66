package given_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
)

// What others have written down stays what it is.
func TestNames(t *testing.T) {
	sum := digest.SHA256.FromString("x").String()
	for text, want := range map[string]string{
		"v1": "v1", "V_1.2-x": "V_1.2-x", sum: sum, strings.Repeat("a", 128): strings.Repeat("a", 128),
		"a/b": "d7y--az2fb", "model:v1": "d7y--modelz3av1", "my model.bin": "d7y--myz20modelz2ebin",
		"-x": "d7y--z2dx", "é": "d7y--zc3za9", "z:": "d7y--z7az3a", "d7y--x": "d7y--d7yz2dz2dx",
		strings.Repeat("a", 129): "d7y--sha256-c12cb024a2e5551cca0e08fce8f1c5e314555cc3fef6329ee994a3db752166ae",
	} {
		if got, err := given.CID(text); err != nil || got != want {
			t.Errorf("CID(%q) is %q, %v; want %q", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "", "models/large": "models/large", "Team/Models": "d7y--z54eamz2fz4dodels", "a//b": "d7y--az2fz2fb",
		p2p.DefaultRepository: "d7y--dfcachez2fdefault", "d7y--x": "d7y--d7yz2dz2dx",
	} {
		if got, err := given.Tag(text); err != nil || got != want {
			t.Errorf("Tag(%q) is %q, %v; want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"", "sha256:", "sha256:abc", "sha512:" + strings.Repeat("a", 64)} {
		if got, err := given.CID(text); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("CID(%q) is %q, %v; want an error", text, got, err)
		}
	}
	if got, err := given.Tag(strings.Repeat("A", 84)); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("a tag that is too long is %q, %v", got, err)
	}
	for _, name := range []string{"d7y--", "d7y--z", "d7y--z4", "d7y--zZZ", "d7y--z61", "d7y--z4D", "d7y--a-b", "v1"} {
		if got := given.Text(name); got != name {
			t.Errorf("%q, which no text becomes, is said to be of %q", name, got)
		}
	}
}

// Every text leads to a name that a store takes, of which the text can be told: so no two texts have one.
func FuzzRoundTrip(f *testing.F) {
	for _, text := range []string{"v1", "a/b", "model:v1", "Z z", "d7y--x", "d7y--az2fb", "\xff", "z2f",
		strings.Repeat("b", 200)} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if name, err := given.CID(text); err == nil {
			if _, err := digest.ParseCID(name); err != nil {
				t.Errorf("CID(%q): %v", text, err)
			}
			if got := given.Text(name); got != text && !given.IsHashed(name) {
				t.Errorf("CID(%q) is %q, of %q", text, name, got)
			}
		}
		if tag, err := given.Tag(text); err == nil {
			if err := p2p.ValidateTag(tag); err != nil {
				t.Errorf("Tag(%q): %v", text, err)
			}
			if got := given.Text(tag); got != text {
				t.Errorf("Tag(%q) is %q, of %q", text, tag, got)
			}
		}
	})
}
