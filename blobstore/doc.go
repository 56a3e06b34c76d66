// Package blobstore is the store of dfcache for Go programs: files named by an
// OCI digest or by a cache ID, under a tag.
//
// A [Store] is opened in a directory of its own, in this process ([Open]), or
// through a dfdaemon (package client); all else is the same. A [Repository] is
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
// [Repository.ImportFiles] makes an artifact of many files, and [Repository.Describe] says what a
// cid names, whatever a registry's client has pushed: files, an image, an index.
//
// # OCI
//
// A Repository is what oras-go (oras.land/oras-go/v2) calls a target, so that
// oras.Copy works in both directions between it and any other one. It
// implements content.Storage, TagResolver, Untagger, Deleter and
// PredecessorFinder, and of package registry TagLister, ReferrerLister,
// ReferenceFetcher, ReferencePusher and Mounter. Package
// [github.com/dfcache/dfcache/blobstore/registry] serves all of a Store to
// other programs over HTTP; package storagetest is the suite for the contract.
//
// What is pushed is kept until a manifest refers to it, and from then on as long
// as one does. A manifest is kept by its tags, by indexes that refer to it, and by
// its subject; one that nothing has held yet is kept, too. What was imported
// under its digest is kept until that is deleted.
//
// # Peers
//
// Where the dfdaemon has peers, what is not on this host is found on theirs: by its
// digest, or by a cache ID, of which the newest counts. Reading it fetches and keeps
// it, and an artifact's name with it, so that this host can give it to others.
// [Lookup] keeps an operation on this host. That nobody has it is [ErrNotFound];
// that it is not here, and nobody could be asked, [ErrUnreachable]. [Repository.Remove]
// removes it everywhere, [Repository.Replicate] copies it to so many hosts, and
// [Store.Peers] says who they are.
//
// # What holds
//
// Content is compared with its digest before it is stored, and
// checked against bit rot whenever it is read. An import that has returned
// survives kill -9 and a power cut; one that has not leaves nothing. An export
// makes a whole file or none, wherever its pieces came from.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package blobstore
