// Package schedule is the rule by which the pieces of a blob move through a
// swarm: which piece is asked of whom, which peer is served, and which piece is sent.
// It has no clock, no goroutines and no I/O, so the daemon and a simulation of
// thousands of peers run the same code. Its types are not safe for concurrent
// use: the caller has a lock for each.
//
// A downloader asks a source for any one of a set of pieces, the want set. The
// request waits at the source until it is its turn; then the source answers with
// the one of the pieces that it has sent least often, so that pieces spread
// evenly without anybody knowing how rare they are.
//
//	downloader                                 uploader
//	Download.Next     asks for a piece         Uploads.Ask
//	                                           Uploads.Grant  whose turn it is, and with which piece
//	Download.Answered the answer begins
//	Download.Slow     hardly anything comes
//	Download.Done     the piece is here        Uploads.End
//	Download.Idle     the sources that have nothing wanted, and is to tell when it has
//
// The want sets of requests under way are disjoint, and that of one that has been
// answered shrinks to the piece that is coming: no piece comes twice. Only of the
// last few pieces a second one is asked for, of another source, and of what is slow to come.
//
// The numbers here were chosen by simulation and in real swarms: see docs/swarm.md.
//
// It promises no compatibility.
package schedule

const (
	// Slots is how many pieces of a blob an uploader sends at a time.
	Slots = 8
	// Requests is how many pieces of a blob a downloader asks for at a time.
	Requests = 10
	// PerSource is how many of these one source may have where it is the only
	// one; of several, fewer.
	PerSource = 4
	// copies is how many requests there may be at a time for one of the last pieces.
	copies = 2
)
