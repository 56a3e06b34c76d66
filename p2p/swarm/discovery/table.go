package discovery

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/dfcache/dfcache/p2p/grpclimit"
)

// Bounds of a message of the table of keys. The table itself allows 4 MiB of any number of
// elements, which are many times that in memory.
const (
	maxTableMessage  = 1 << 20 // bytes: 1,000 peers with all their addresses
	maxTableElements = 1 << 16
)

// tableHost is the host as the table of keys has it: messages are bounded before the table
// makes anything of them.
type tableHost struct{ host.Host }

func (h tableHost) SetStreamHandler(p protocol.ID, f network.StreamHandler) {
	h.Host.SetStreamHandler(p, func(s network.Stream) { f(newTableStream(s)) })
}

func (h tableHost) NewStream(ctx context.Context, p peer.ID, protocols ...protocol.ID) (network.Stream, error) {
	s, err := h.Host.NewStream(ctx, p, protocols...)
	if err != nil {
		return nil, err
	}
	return newTableStream(s), nil
}

// tableStream hands on the messages of a stream, each with its length before it, that are
// within bounds. It fails at the first that is not.
type tableStream struct {
	network.Stream
	in      *bufio.Reader
	message []byte // what is left of the last one
}

func newTableStream(s network.Stream) network.Stream {
	return &tableStream{Stream: s, in: bufio.NewReader(s)}
}

func (s *tableStream) Read(p []byte) (int, error) {
	if len(p) > 0 && len(s.message) == 0 {
		if err := s.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.message)
	s.message = s.message[n:]
	return n, nil
}

func (s *tableStream) next() error {
	size, err := binary.ReadUvarint(s.in)
	if err != nil {
		return err
	}
	if size > maxTableMessage {
		return fmt.Errorf("a message of the table has %d bytes, the limit is %d", size, maxTableMessage)
	}
	framed := binary.AppendUvarint(nil, size)
	head := len(framed)
	// What is there grows with what comes, not with what is said to come.
	body, err := io.ReadAll(io.LimitReader(s.in, int64(size)))
	if err == nil && uint64(len(body)) < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	framed = append(framed, body...)
	if err := grpclimit.Check((*pb.Message)(nil), framed[head:], maxTableElements); err != nil {
		return fmt.Errorf("a message of the table: %w", err)
	}
	s.message = framed
	return nil
}
