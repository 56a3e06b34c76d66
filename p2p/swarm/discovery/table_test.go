package discovery

import (
	"bytes"
	"encoding/binary"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
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
	question, err := proto.Marshal(&pb.Message{Type: pb.Message_FIND_NODE, Key: []byte(a.Self())})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := send(question); err != nil {
		t.Fatalf("an ordinary question: %d bytes, %v", n, err)
	}
	for name, message := range map[string][]byte{
		"many peers":     append(bytes.Repeat([]byte{0x42, 0}, maxTableElements+1), question...),
		"many addresses": []byte(string(question) + "\x42\x80\x80\x10" + strings.Repeat("\x12\x00", 1<<17)),
		"many bytes":     append(question, make([]byte, maxTableMessage)...),
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
}
