// Package swarm is a source of content that is other dfdaemons: it asks them for what
// the store in front of it does not have, and gives them what that has.
//
// It finds peers by a [Network], which package discovery implements, and asks
// them over HTTP/1.1 on connections that both sides have proven the swarm's key
// on (transport.go; the messages and their bounds are in wire.go and
// docs/swarm.md). Bytes are proven against their digest before they count. Names,
// deletes and dates can't be proven: they are bounded, compared with what others
// say (names.go, deletes.go, meet.go), and believed of every peer that has the key.
//
// # Where things are
//
//	source.go                      what package front, the engine before it, sees of the swarm
//	swarm.go                       New, Close, what is done now and then
//	questions.go, silent.go        lookups: what peers are asked, and which do not answer
//	find.go, manifests.go          who has a task; recent.go remembers it for a moment
//	names.go, conflicts.go         what a name stands for, and moves of it that crossed
//	deletes.go                     deletes everywhere, and those that were missed
//	download.go                    a fetch; sources.go, chains.go, transfer.go and progress.go are its parts
//	arriving.go                    the reader of a blob that is being fetched
//	server.go, answers.go          the API for peers; upload.go: what they are sent, and when
//	client.go, transport.go        the requests, and the connections
//	peers.go                       what is known of each peer: its version, clock, faults, silence
//	meet.go, clock.go              what peers that meet ask each other, and the time of most of them
//	late.go                        questions whose asker has stopped waiting
//
// # The life of a fetch
//
// A reader of what is not here begins a download, or joins the one that runs:
// there is one for each digest. Its goroutine, run, alone decides: what belongs
// to it, as the comment in the struct says, has no lock. Whatever takes time runs
// in a goroutine of its own, counted by calls: a search for sources, a question to
// a source for its hash chain or its news, a request for pieces. Each ends by
// posting an event, a function that run calls. Nothing is posted once the
// download's context has ended.
//
//  1. A search asks connected peers and those that have announced the digest.
//     Each that has it, or a part of it, becomes a source (sources.go), and names others.
//  2. A source is asked for size and hash chain. The first chain that holds is
//     worked by; where sources state different ones they are tried against each other,
//     since at most one leads to the digest (chains.go).
//  3. Package schedule, which knows no network, says which piece is to be asked of whom.
//     A piece is hashed as it comes, and written only where it leads from the chain's
//     value before it to the one after it (transfer.go, and package pieces). What does not
//     is proof of a lie: its source is excluded. Slowness and silence prove nothing:
//     such a source rests, others are asked beside it, and it is come back to.
//  4. Each piece is offered to peers, and to readers, as soon as it is there.
//  5. One clock, in progress.go, ends what makes no progress, whatever else goes on.
//  6. When all pieces are there the readers have what they want, and the blob
//     becomes one of the store, with all tasks that were asked for. A download that
//     nobody waits for ends; its part is kept for a day, unless it was deleted.
//
// # Goroutines and locks
//
// background counts the goroutines that belong to no call: listeners, tend,
// deletes.tellAll, lookups, downloads. calls counts what callers ask for. late, of
// questions and of client, counts questions to peers: a call waits for their answer, as
// long as it has time, and not for their goroutine. Close ends the context, and waits for
// all of these.
//
// A lock guards fields, and no peer is waited for with one held. Where several are
// held the order is: that of all uploads, of one upload, of a download. That of all downloads
// is held with none of them.
//
// It promises no compatibility.
package swarm
