package rpc

import (
	"errors"
	"fmt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/rpc/pb"
)

// maxChecksums is the number of checksums, or of pieces, in one message of an Open.
const maxChecksums = 64 << 10 / 4

// openMessages returns the messages that describe t, the last of which says
// that the descriptor was sent.
func openMessages(t *digest.Table) []*pb.OpenReply {
	first := &pb.OpenReply{Header: &pb.OpenReply_Header{Size: t.Size, PieceLength: t.PieceLength}}
	messages := []*pb.OpenReply{first}
	for crc := t.CRC; len(crc) > 0; {
		n := min(len(crc), maxChecksums)
		last := messages[len(messages)-1]
		if len(last.Crc32C) > 0 {
			last = &pb.OpenReply{}
			messages = append(messages, last)
		}
		last.Crc32C, crc = crc[:n], crc[n:]
	}
	messages[len(messages)-1].Sent = true
	return messages
}

// tableParser makes a piece table of the messages of an Open, up to the one that
// says that the descriptor was sent.
type tableParser struct {
	table    *digest.Table
	arriving bool // the table has no checksum yet
}

func (p *tableParser) add(d digest.Digest, m *pb.OpenReply) error {
	if h := m.GetHeader(); h != nil {
		if err := p.begin(d, h); err != nil {
			return err
		}
	}
	if len(m.GetPieces()) > 0 || m.GetDone() != nil {
		return errors.New("the daemon's answer has pieces before the descriptor was sent, or of a blob that is whole")
	}
	if p.table == nil {
		if len(m.GetCrc32C()) > 0 || m.GetSent() {
			return errors.New("the daemon's answer has no header")
		}
		return nil
	}
	if p.arriving {
		if len(m.GetCrc32C()) > 0 {
			return errors.New("the daemon's answer has checksums of pieces that are not there")
		}
		return nil
	}
	if p.table.CRC == nil {
		p.table.CRC = m.GetCrc32C() // the message is not used for anything else
	} else {
		p.table.CRC = append(p.table.CRC, m.GetCrc32C()...)
	}
	if n := len(p.table.CRC); n > p.table.Pieces() || m.GetSent() && n < p.table.Pieces() {
		return fmt.Errorf("the daemon's answer has %d checksums for %d pieces", n, p.table.Pieces())
	}
	return nil
}

// begin makes the table that the checksums go to.
func (p *tableParser) begin(d digest.Digest, h *pb.OpenReply_Header) error {
	if p.table != nil {
		return errors.New("the daemon's answer has two headers")
	}
	if h.GetSize() < 0 || h.GetPieceLength() != digest.PieceLength(h.GetSize()) {
		return fmt.Errorf("the daemon's answer: pieces of %d bytes do not fit a blob of %d bytes", h.GetPieceLength(),
			h.GetSize())
	}
	p.table = &digest.Table{Digest: d, Size: h.GetSize(), PieceLength: h.GetPieceLength()}
	if p.arriving = h.GetArriving(); p.arriving {
		if n := p.table.Pieces(); n < 0 || n > maxPieces {
			return fmt.Errorf("the daemon's answer: a blob of %d bytes has more than %d pieces", h.GetSize(), maxPieces)
		}
		p.table.CRC = make([]uint32, p.table.Pieces())
	}
	return nil
}
