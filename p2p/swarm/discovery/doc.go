// Package discovery finds the other daemons of a swarm, keeps connections with
// them, and tells who has what. It implements the interface Network of package
// swarm with libp2p; the pieces themselves move elsewhere.
//
// # Who is in the swarm
//
// A swarm is the hosts that hold the same 32 random bytes, the swarm [Key].
// Three secrets are derived from it (RFC 5869, HKDF with SHA-256): the
// pre-shared key that encrypts every connection before a word is said, the
// secret with which the connections that carry pieces prove membership, and the
// name of the service looked for on the local network. Each host has an ed25519
// key besides ([LoadIdentity]); its hash is the peer ID. Connections are TCP,
// then the pre-shared key, TLS 1.3 with both identities, and yamux.
//
// # How peers meet
//
// Any peer will do to get in. It is found by multicast DNS on the same network,
// by a bootstrap entry or a line of the peers file (see [Options]), or in the
// state file that the last run left. Connected peers are asked, over the
// protocol /dfcache/peers/1, for the peers that it is connected with, and so on,
// until all of a small swarm are connected with all, and each of a large one
// with 64 or more. Nothing is ever given up: what failed is tried again, fast
// while this host is alone and slowly otherwise. A peer that nobody has seen for
// a day is forgotten. So no host, not even the first, has to stay up.
//
// # Who has what
//
// Keys are looked up in a Kademlia table (go-libp2p-kad-dht with a prefix of its
// own) in which every host takes part. A record "peer P provides key K" lies
// with the 20 peers next to K, lives for 20 minutes, and is sent again every 10,
// all keys of a region in one sweep. A host does not need records for its own
// keys: it answers from the set of what it announces now. A few keys at a time, as
// of a download that begins, are sent at once, past those that wait. A lookup asks the 20
// peers next to the key, which in a swarm of up to 21 is everybody, and so there
// a key is found at once and a withdrawn one is gone at once (from its own host;
// copies of the record elsewhere end with their time). Where the table doubles,
// as when many hosts start at the same time, everything is announced again.
//
// Records are kept in memory, some 130 bytes each, and bounded in number; the
// oldest go first.
//
// It promises no compatibility.
package discovery
