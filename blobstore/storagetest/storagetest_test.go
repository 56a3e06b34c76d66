package storagetest_test

import (
	"testing"

	"go.uber.org/goleak"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/content/oci"

	"github.com/dfcache/dfcache/blobstore/storagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The suite asks for nothing that oras-go's own stores do not give, but for
// what the options name.

func TestMemory(t *testing.T) {
	storagetest.Run(t, func(*testing.T) oras.Target { return memory.New() }, storagetest.Options{
		KeyedByDescriptor:   true,
		IgnoresContext:      true,
		UncheckedDigests:    true,
		ResolvesTagsOnly:    true,
		TakesEmptyReference: true,
		KeepsBadManifests:   true,
	})
}

func TestLayout(t *testing.T) {
	for name, autoGC := range map[string]bool{"AutoGC": true, "NoGC": false} {
		if testing.Short() && autoGC {
			continue
		}
		t.Run(name, func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T) oras.Target {
				store, err := oci.New(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				store.AutoGC = autoGC
				return store
			}, storagetest.Options{
				IgnoresContext:    true,
				KeepsBadManifests: true,
				KeepsUnreferenced: !autoGC,
			})
		})
	}
}
