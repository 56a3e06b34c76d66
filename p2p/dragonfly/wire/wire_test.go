package wire

import (
	"testing"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// No two tasks have the same texts in a row.
func TestTaskNames(t *testing.T) {
	seen := map[string]p2p.Task{}
	for _, tag := range []string{"", "a", "ab", "abc", "bc", "c", "0", "00"} {
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			for _, text := range []string{"x", "y"} {
				task := p2p.Task{Tag: tag, Digest: alg.FromString(text)}
				key := URL(task) + Meta(task).GetTag()
				if other, found := seen[key]; found {
					t.Errorf("%s and %s are both %s", task, other, key)
				}
				seen[key] = task
			}
		}
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("x")}
	if want := "d7y:/sha256%3A" + task.Digest.Encoded(); URL(task) != want {
		t.Errorf("the URL of %s is %s; Dragonfly's dfcache has %s", task, URL(task), want)
	}
}
