package main

import (
	"context"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
)

// givenName returns the text that Dragonfly's dfcache gave for a cache ID of a repository, or the cache ID
// itself where that is the text, or can't be found out.
func givenName(ctx context.Context, repo *blobstore.Repository, name string) string {
	if !given.IsHashed(name) {
		return given.Text(name)
	}
	if m, err := repo.Manifest(ctx, name); err == nil && m.Annotations[given.Annotation] != "" {
		return m.Annotations[given.Annotation]
	}
	return name
}

// asGiven is a name, with the text that it was given as where that is another.
func asGiven(name, text string) string {
	if text == name {
		return name
	}
	return printable(text) + " (" + name + ")"
}

// given adds what a cid and a tag were given as to Dragonfly's dfcache.
func (f *facts) given(ctx context.Context, repo *blobstore.Repository, cid, tag string) {
	if text := givenName(ctx, repo, cid); text != cid {
		f.add("given", "%s", printable(text))
	}
	if text := given.Text(tag); text != tag {
		f.add("given tag", "%s", printable(text))
	}
}
