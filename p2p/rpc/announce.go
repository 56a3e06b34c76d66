package rpc

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

const (
	// maxArrived is the number of pieces in one message about a blob that is
	// arriving, and of those that wait for the next one.
	maxArrived = 1024
	// announcements is how many messages tell of the pieces of a blob that is arriving:
	// each has the client woken up, and copy.
	announcements = 64
)

// announceDelay is how long a piece that nobody has asked for may wait for others, to be
// announced with them. Only tests change it.
var announceDelay = 250 * time.Millisecond

// openServer is the daemon's end of the stream of an Open.
type openServer = grpc.BidiStreamingServer[pb.OpenRequest, pb.OpenReply]

// announcer tells a client of the pieces of a blob that is arriving, several at a time.
type announcer struct {
	stream openServer
	table  *digest.Table

	left    int           // pieces that the client has not been told of
	asked   []bool        // pieces that the client wants first
	batch   int           // pieces that are worth a message
	message *pb.OpenReply // the next one
	soon    bool          // it is not to wait for more
	late    *time.Timer   // runs while there is something in it
}

// announce tells a client of each piece of a blob as it arrives, and
// the blob which pieces the client wants. Where the client does not read, sending blocks, and
// with it all of this.
func announce(stream openServer, blob p2p.ArrivingBlob, notices <-chan string) error {
	table := blob.Table()
	header := &pb.OpenReply_Header{Size: table.Size, PieceLength: table.PieceLength, Arriving: true}
	if err := stream.Send(&pb.OpenReply{Header: header, Sent: true}); err != nil {
		return err
	}
	n := table.Pieces()
	a := &announcer{
		stream: stream, table: table,
		left: n, asked: make([]bool, n), batch: min(max(1, n/announcements), maxArrived),
		message: &pb.OpenReply{}, soon: true, // what is there at first
		late: time.NewTimer(announceDelay),
	}
	a.late.Stop()
	defer a.late.Stop()
	wants := receiveWants(stream, n)
	arrived, stop := watch(stream.Context(), blob)
	defer func() { _ = stop() }()
	for {
		select {
		case w := <-wants:
			if w.err != nil {
				return w.err
			}
			blob.Want(w.first, w.last)
			a.want(w.first, w.last)
		case text := <-notices:
			if err := stream.Send(&pb.OpenReply{Notice: text}); err != nil {
				return err
			}
		case <-a.late.C:
			a.soon = true
		case i, more := <-arrived:
			if !more {
				return a.end(stop(), blob.Sources)
			}
			a.add(i)
			if len(arrived) > 0 && len(a.message.Pieces) < maxArrived {
				continue
			}
		}
		if err := a.sendWhenDue(); err != nil {
			return err
		}
	}
}

// wanted are the pieces that a client wants first.
type wanted struct {
	first, last int
	err         error // why they can't be
}

// receiveWants returns what the client of an Open wants of so many pieces. It ends with the call.
func receiveWants(stream openServer, pieces int) <-chan wanted {
	wants := make(chan wanted)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				return // no more wants, or the call is over
			}
			var w wanted
			w.first, w.last, w.err = parseWant(req, pieces)
			select {
			case wants <- w:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return wants
}

// watch returns the pieces of a blob as they arrive, up to the end, and a function that returns the error
// that ended it, or has it end. It may be called more than once.
func watch(call context.Context, blob p2p.ArrivingBlob) (arrived <-chan int, stop func() error) {
	ctx, cancel := context.WithCancel(call)
	pieces := make(chan int, maxArrived)
	var failure error
	var watching sync.WaitGroup
	watching.Go(func() {
		defer close(pieces)
		for i, err := range blob.Arrived(ctx) {
			if err != nil {
				failure = err
				return
			}
			select {
			case pieces <- i:
			case <-ctx.Done():
				return
			}
		}
	})
	return pieces, func() error {
		cancel()
		watching.Wait()
		return failure
	}
}

// want has the pieces first to last announced as soon as they are there.
func (a *announcer) want(first, last int) {
	for i := first; i <= last; i++ {
		a.asked[i] = true
	}
	for _, p := range a.message.Pieces {
		a.soon = a.soon || a.asked[p.GetIndex()]
	}
}

// add adds a piece to the next message.
func (a *announcer) add(piece int) {
	if len(a.message.Pieces) == 0 {
		a.late.Reset(announceDelay)
	}
	a.message.Pieces = append(a.message.Pieces, &pb.OpenReply_Piece{Index: uint32(piece), Crc32C: a.table.CRC[piece]})
	a.soon = a.soon || a.asked[piece]
}

// sendWhenDue sends the next message, unless it can wait for more.
func (a *announcer) sendWhenDue() error {
	if n := len(a.message.Pieces); a.soon || n >= a.batch || n == a.left {
		return a.send()
	}
	return nil
}

func (a *announcer) send() error {
	a.late.Stop()
	if len(a.message.Pieces) == 0 {
		return nil
	}
	a.left -= len(a.message.Pieces)
	full := a.message
	a.message, a.soon = &pb.OpenReply{}, false
	return a.stream.Send(full)
}

// end says that nothing more arrives: because the whole is there and proven, or because of failure.
func (a *announcer) end(failure error, sources func() []p2p.Source) error {
	if err := cmp.Or(failure, context.Cause(a.stream.Context())); err != nil {
		return err
	}
	if err := a.send(); err != nil {
		return err
	}
	if a.left != 0 {
		return fmt.Errorf("%s: its download ended without %d pieces", a.table.Digest, a.left)
	}
	return a.stream.Send(&pb.OpenReply{Done: &pb.OpenReply_Done{Sources: sourceMessages(sources())}})
}
