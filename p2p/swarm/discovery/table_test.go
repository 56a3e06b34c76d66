package discovery

import (
	"bytes"
	"encoding/binary"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"
)

// TestTableMessages: a peer that sends the table messages with more in them than there may be
// has its stream ended, before they cost many times their bytes; others are answered.
func TestTableMessages(t *testing.T) {
	a := start(t)
	b := start(t, bootstrap(addr(t, a)))
	connectedWithAll(t, a, b)
	send := func(message []byte) (answer int, err error) {
		s, err := b.host.NewStream(t.Context(), a.Self(), tablePrefix+"/kad/1.0.0")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Reset()
		s.SetDeadline(time.Now().Add(time.Minute))
		framed := append(binary.AppendUvarint(nil, uint64(len(message))), message...)
		if _, err := s.Write(framed); err != nil {
			return 0, err
		}
		return io.ReadAtLeast(s, make([]byte, 64), 2)
	}
	many := bytes.Repeat([]byte{0x42, 0}, maxTableElements+1)
	question, err := proto.Marshal(&pb.Message{Type: pb.Message_FIND_NODE, Key: []byte(a.Self())})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := send(question); err != nil {
		t.Fatalf("an ordinary question: %d bytes, %v", n, err)
	}
	long, err := proto.Marshal(&pb.Message{Type: pb.Message_FIND_NODE, Key: make([]byte, maxTableMessage)})
	if err != nil {
		t.Fatal(err)
	}
	for name, message := range map[string][]byte{
		"many peers":     append(bytes.Clone(many), question...),
		"many addresses": []byte(string(question) + "\x42\x80\x80\x10" + strings.Repeat("\x12\x00", 1<<17)),
		"many bytes":     long,
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		n, err := send(message)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: answered with %d bytes", name, n)
		}
		if took := int(after.TotalAlloc - before.TotalAlloc); took > 12<<20 {
			t.Errorf("%s: %d bytes take %d", name, len(message), took)
		}
	}
	if _, err := send(question); err != nil {
		t.Errorf("an ordinary question afterwards: %v", err)
	}
	// So it is with what a peer answers.
	c := start(t)
	var answer atomic.Pointer[[]byte]
	c.host.SetStreamHandler(tablePrefix+"/kad/1.0.0", func(s network.Stream) {
		if b := answer.Load(); b != nil {
			s.Write(append(binary.AppendUvarint(nil, uint64(len(*b))), *b...))
		}
		s.CloseWrite()
	})
	if err := a.Connect(t.Context(), peer.AddrInfo{ID: c.Self(), Addrs: c.host.Addrs()}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		answer []byte
		fits   bool
	}{"an answer": {question, true}, "many peers": {many, false}, "many bytes": {long, false}} {
		answer.Store(&test.answer)
		_, err := a.table.MessageSender().SendRequest(
			t.Context(), c.Self(), &pb.Message{Type: pb.Message_FIND_NODE, Key: []byte("x")})
		if (err == nil) != test.fits {
			t.Errorf("%s in an answer: %v", name, err)
		}
	}
}
