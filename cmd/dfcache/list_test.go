package main

import (
	"encoding/json"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/p2p"
)

// A template can rely on every key, whatever is known of an entry.
func TestListedKeys(t *testing.T) {
	keys := []string{"cid", "digest", "given", "givenTag", "imported", "lastUsed", "local", "manifest", "mediaType",
		"size", "tag", "type"}
	task := p2p.Task{Digest: "sha256:0"}
	for name, test := range map[string]struct {
		entry                      blobstore.Entry
		digest, manifest, lastUsed any
	}{
		"part": {blobstore.Entry{Info: p2p.Info{Task: task}}, "sha256:0", "", nil},
		"name": {blobstore.Entry{Info: p2p.Info{Task: task}, Name: "v1"}, "", "sha256:0", nil},
		"used": {blobstore.Entry{Info: p2p.Info{Task: task, LastUsed: time.Unix(1, 0).UTC()}},
			"sha256:0", "", "1970-01-01T00:00:01Z"},
	} {
		data, err := json.Marshal(newListed(test.entry))
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(data, &got); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(slices.Sorted(maps.Keys(got)), keys) || got["mediaType"] != "" ||
			got["digest"] != test.digest || got["manifest"] != test.manifest || got["lastUsed"] != test.lastUsed {
			t.Errorf("%s: %s", name, data)
		}
	}
}
