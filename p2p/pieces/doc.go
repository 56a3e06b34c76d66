// Package pieces is the engine that keeps blobs on this machine: names and piece
// tables in one bbolt file, bytes in files, where its package backend puts them.
// Unless [Options] says otherwise, that is the same directory.
//
//	DIR/lock                   held by the process that has the store open
//	DIR/meta.db                tags, names, references, piece tables, last use
//	DIR/blobs/<alg>/<hex>      blobs, immutable, 0444
//	DIR/ingest/                content that is not committed yet
//
// docs/format.md has every byte of it.
//
// # The life of a blob
//
// [Ingest.Add] copies the source into a file in ingest/, in the kernel where
// it can. A second goroutine follows it and hashes: what the kernel has copied
// is read back from the page cache, so that what is hashed is what is stored,
// whoever writes to the source meanwhile. Write-back to the disk is started on
// the way. When the content turns out to be here already, the stored blob
// is checked and the copy is dropped.
//
// [Ingest.Commit] makes it durable, in an order of which every step can be
// interrupted: fsync of the data; a marker in ingest/, a second name of the file,
// that says which blob is about to appear; rename into blobs/; fsync of the directory; one bbolt
// transaction with blob, tasks and names; removal of the marker. The
// transaction is the moment at which all of it exists. When a store is opened,
// a marker whose blob is not in meta.db tells which file to remove, and all of ingest/ is emptied.
//
// Deleting goes the other way: a transaction removes the task and notes the
// blob in the bucket "loose" where no tag holds it any more; a second one
// removes the blob's records; then the file is unlinked. A crash in between
// is made up for when the store is opened, from that bucket, without a walk over the blobs.
//
// What has changed is told when it is durable, and why: [Store.Watch].
//
// From the moment its digest is known until the ingest is closed, an ingest
// holds its blobs: a blob that is held is not dropped, whoever deletes it.
//
// It promises no compatibility.
package pieces
