// Package registry serves a [blobstore.Store] as an OCI registry: version 1.1 of
// the OCI distribution specification over HTTP, which oras, crane, regctl,
// skopeo, podman, containerd and Docker speak.
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md
//
// A repository is a tag of the store, a tag of the repository is a cache ID; the
// empty tag is repository "dfcache/default". So what was imported can be pulled,
// and what was pushed can be exported. A repository needs no creating.
//
//	store, err := blobstore.Open("/var/lib/myapp/blobs")
//	...
//	handler := registry.New(store, registry.Options{Log: slog.Default()})
//	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
//	err = server.Serve(listener)
//	... // to stop: server, handler, store
//
// # Endpoints
//
//	GET     /v2/                              that this is a registry
//	GET     /v2/_catalog                      names of repositories; n, last
//	GET     /v2/<name>/tags/list              tags; n, last
//	GET     /v2/<name>/referrers/<digest>     what has it as its subject; artifactType
//	GET     /v2/<name>/manifests/<reference>  a manifest, by tag or digest
//	PUT     /v2/<name>/manifests/<reference>  push one; by digest, with any number of tag parameters
//	DELETE  /v2/<name>/manifests/<reference>  remove a tag, or a manifest with its tags
//	GET     /v2/<name>/blobs/<digest>         a blob, or with Range a part of it
//	DELETE  /v2/<name>/blobs/<digest>         remove a blob
//	POST    /v2/<name>/blobs/uploads/         begin an upload; digest-algorithm
//	POST    ...?digest=<digest>               push a blob in one request
//	POST    ...?mount=<digest>&from=<name>    take a blob over from another repository
//	GET     /v2/<name>/blobs/uploads/<id>     how much of an upload has come
//	PATCH   /v2/<name>/blobs/uploads/<id>     a chunk, or all of it as a stream
//	PUT     ...?digest=<digest>               the last chunk, or all of it; ends the upload
//	DELETE  /v2/<name>/blobs/uploads/<id>     cancel an upload
//
// HEAD is answered wherever GET is. Upload cancelling, digest-algorithm, and the
// parameter tag of manifests are of the specification's main branch; _catalog is
// from before it.
//
// # Content
//
// Digests are sha256, sha384 or sha512. What is pushed is compared with its
// digest before it can be seen, and survives a power cut once 201 is answered.
// Every piece of a blob is verified before it is sent. Where one is damaged the
// answer is 500, or, when the answer has begun, the connection is cut: never
// wrong bytes. Nothing is ever compressed.
//
// A manifest is kept byte by byte under the media type it is pushed with, up to
// 4 MiB. What it refers to has to be there, but for its subject and for layers
// that are not for distribution; else it is refused with 404 and
// MANIFEST_BLOB_UNKNOWN. Manifests of Docker's schema 2 are as good as OCI's;
// schema 1 is refused. A blob endpoint serves a manifest's bytes too, a
// manifest endpoint serves manifests only.
//
// Deleting a manifest deletes what only it held. What a manifest refers to can't
// be deleted: that is answered with 405 and DENIED.
//
// # Uploads
//
// An upload session is known to this process only. It ends when it is idle for
// [Options.UploadTimeout], and with [Handler.Close]. It serves one request at a
// time: others wait until that has ended, which after a break of the connection
// is within the stall timeout, and are answered with 409 where it goes on. DELETE
// does not wait, but breaks it off. What came before a break is kept: GET says
// how much, and the next chunk goes on from there. Only a PUT of the whole blob,
// the usual way, begins again.
//
// # Limits
//
// A client that stalls is cut off ([Options.StallTimeout]); a slow one is not. The server
// in front should limit the reading of headers ([http.Server.ReadHeaderTimeout]),
// but not of whole requests or the writing of answers. A disk or quota that is
// full is answered with 507 and DENIED: clients give up then. Requests that a
// browser sends for pages of other origins are refused; [Access] is for
// passwords.
//
// Its API is kept compatible from release to release: docs/api.txt lists it.
package registry
