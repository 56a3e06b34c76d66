// Package blobstore is the store of dfcache for Go programs: files named by an
// OCI digest or by a cache ID, under a tag.
//
// A [Store] is opened in a directory of its own, in this process ([Open]), or
// through a dfdaemon ([Dial]); everything else is the same. A [Repository] is
// the part of it under one tag. In it a digest names a blob, and a cache ID
// names an OCI artifact of one file, as `oras push` would store it.
//
//	store, err := blobstore.Open("/var/lib/myapp/blobs")
//	...
//	defer store.Close()
//	models, err := store.Repository("models")
//	...
//	file, err := models.Import(ctx, "v1", f, blobstore.ImportOptions{Title: f.Name()})
//	...
//	_, err = models.ExportFile(ctx, "v1", "/srv/model.bin", blobstore.ExportOptions{})
//
// What holds: content is compared with its digest before it is stored, and
// checked against bit rot whenever it is read. An import that has returned
// survives kill -9 and a power cut; one that has not leaves nothing. An export
// makes a whole file or none.
package blobstore
