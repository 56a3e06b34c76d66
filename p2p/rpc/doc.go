// Package rpc is dfdaemon's own API: gRPC over a unix socket, server and client.
// docs/protocol.md describes what goes over the wire.
//
// [Server] serves any [p2p.Engine]; [Client] is one. gRPC carries the words.
// Bytes of blobs never go through it: for each connection there is a second
// socket on which file descriptors travel. A client hands over the file that it
// opened itself, so that the daemon opens no path for anyone, and gets a
// read-only descriptor of a blob, which it reads and checks in its own process.
//
// [Listen] and [Dial] see to who may talk to whom: the socket is in a directory
// that only the daemon's user and group can enter, and a client refuses a
// daemon of another user. [Launch] starts a daemon where none runs.
//
// It promises no compatibility.
package rpc
