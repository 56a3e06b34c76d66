// Package dragonflyapi lets Dragonfly's own dfcache, unmodified, use a store: it
// serves the part of the API of Dragonfly's dfdaemon, v1, that this client calls:
// CheckHealth, StatTask, ImportTask, ExportTask and DeleteTask. The words are those
// of d7y.io/api/v2. Every other call is answered with "unimplemented".
//
// The client sends paths, which the daemon opens, so that any caller can read
// and write whatever the daemon can. The server answers only root and the user that
// it runs as, whom the kernel names, and refuses all others.
//
// A cid is a digest or a cache ID, and a tag the name of an OCI repository, as
// everywhere in a store; Dragonfly takes any text: package given says what becomes of such as these
// rules forbid. What is imported under a digest is compared with it.
//
// It promises no compatibility.
package dragonflyapi
