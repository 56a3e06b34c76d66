package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc/tap"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
)

// The most that all clients may have at once, where the process can have descriptors enough: a quarter
// of them. A connection has two of them in the daemon, and a call as many.
const (
	maxConns      = 512
	maxCalls      = 512
	maxUnclaimed  = 512       // descriptors that clients have sent and that no call has taken
	maxUnfinished = 128 << 20 // bytes of messages of which the end has not come
)

// shares are what clients have of a server. No user keeps out another: where there is no more, the one that has
// most loses the oldest connection to one that has fewer, and else it is refused.
type shares struct {
	conns *connpool.Pool
	calls *connpool.Pool
	kept  *connpool.Pool // descriptors that no call has taken

	mu         sync.Mutex
	unfinished map[uint32]int // bytes of messages, by user
	free       int            // bytes that nobody has
}

func newShares() *shares {
	return &shares{
		conns:      connpool.New(max(connpool.Share(maxConns, 32), 8)),
		calls:      connpool.New(max(connpool.Share(maxCalls, 16), 16)),
		kept:       connpool.New(max(connpool.Share(maxUnclaimed, 16), 16)),
		unfinished: map[uint32]int{}, free: maxUnfinished,
	}
}

// key names a user in the pools.
func (c caller) key() string { return fmt.Sprint(c.uid) }

// errCrowded says that this user has as much as anybody may have.
var errCrowded = fmt.Errorf("%w: this user has as many connections or calls as there may be, or as others have left",
	p2p.ErrBusy)

// begin is a gRPC tap: it counts a call from its headers to its end.
func (s *shares) begin(ctx context.Context, _ *tap.Info) (context.Context, error) {
	auth := authOf(ctx)
	leave, ok := s.calls.Offer(auth.caller.key(), auth.conn.hangUp)
	if !ok {
		return nil, toStatus(errCrowded)
	}
	context.AfterFunc(ctx, leave)
	return ctx, nil
}

// take has n bytes counted to a user, who may have as many as are free afterwards, so that there
// is room for others.
func (s *shares) take(uid uint32, n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unfinished[uid]+n > s.free-n {
		return false
	}
	s.free -= n
	s.unfinished[uid] += n
	return true
}

func (s *shares) give(uid uint32, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free += n
	if s.unfinished[uid] -= n; s.unfinished[uid] == 0 {
		delete(s.unfinished, uid)
	}
}

// What [inflow] has to know of HTTP/2 (RFC 9113), and of gRPC in it.
const (
	clientPreface = 24 // bytes
	frameHeader   = 9  // bytes: length, type, flags, stream
	messageHeader = 5  // bytes: whether it is compressed, and its length

	frameData, frameReset   = 0, 3
	flagEnded, flagIsPadded = 1, 8
)

var (
	errUnfinished = errors.New("this user has begun too many messages, or too large ones, without ending them")
	errPadded     = errors.New("a frame has padding, which is of no use here")
)

// inflow watches the bytes of a client. gRPC keeps what has come of a message until all of it has, for
// every call; so each message is counted from the header that tells its length to its end. The zero
// value, with its first two fields, is for the beginning of a connection. It is for one goroutine at a time.
type inflow struct {
	shares *shares
	uid    uint32

	begun    bool
	skip     int    // bytes that are of no interest
	header   []byte // what has come of a frame's
	data     int    // bytes of a DATA frame that are to come,
	stream   uint32 // its stream,
	last     bool   // and whether it is the last one there
	messages map[uint32]*message
}

// message is one of which the end has not come.
type message struct {
	header []byte // what has come of it
	left   int
	taken  int
}

// saw looks at what has been read. With an error the client is to be hung up on.
func (in *inflow) saw(p []byte) error {
	if !in.begun {
		in.begun, in.skip, in.messages = true, clientPreface, map[uint32]*message{}
	}
	for len(p) > 0 {
		n := len(p)
		switch {
		case in.skip > 0:
			n = min(n, in.skip)
			in.skip -= n
		case in.data > 0:
			n = min(n, in.data)
			if err := in.sawData(p[:n]); err != nil {
				return err
			}
			if in.data -= n; in.data == 0 && in.last {
				in.drop(in.stream)
			}
		default:
			n = min(n, frameHeader-len(in.header))
			if in.header = append(in.header, p[:n]...); len(in.header) == frameHeader {
				if err := in.sawHeader(); err != nil {
					return err
				}
			}
		}
		p = p[n:]
	}
	return nil
}

func (in *inflow) sawHeader() error {
	h := in.header
	in.header = h[:0]
	length := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
	stream := binary.BigEndian.Uint32(h[5:]) & (1<<31 - 1)
	switch h[3] {
	case frameData:
		if h[4]&flagIsPadded != 0 {
			return errPadded
		}
		in.data, in.stream, in.last = length, stream, h[4]&flagEnded != 0
		if length == 0 && in.last {
			in.drop(stream)
		}
	case frameReset:
		in.drop(stream)
		in.skip = length
	default:
		in.skip = length
	}
	return nil
}

func (in *inflow) sawData(p []byte) error {
	m := in.messages[in.stream]
	for len(p) > 0 {
		if m == nil {
			if len(in.messages) >= 2*maxStreams {
				return errUnfinished
			}
			m = &message{}
			in.messages[in.stream] = m
		}
		n := min(len(p), messageHeader-len(m.header))
		if n > 0 {
			if m.header = append(m.header, p[:n]...); len(m.header) == messageHeader {
				length := binary.BigEndian.Uint32(m.header[1:])
				if length > maxRequest {
					length = 0 // it is refused, and the call is over
				}
				m.left = int(length)
				if !in.shares.take(in.uid, m.left) {
					return errUnfinished
				}
				m.taken = m.left
			}
		} else {
			n = min(len(p), m.left)
			m.left -= n
		}
		p = p[n:]
		if len(m.header) == messageHeader && m.left == 0 {
			in.drop(in.stream)
			m = nil
		}
	}
	return nil
}

// drop forgets what has come of a message.
func (in *inflow) drop(stream uint32) {
	if m := in.messages[stream]; m != nil {
		in.shares.give(in.uid, m.taken)
		delete(in.messages, stream)
	}
}

// end forgets everything.
func (in *inflow) end() {
	for stream := range in.messages {
		in.drop(stream)
	}
}
