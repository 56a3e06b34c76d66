package cluster

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/digest"
)

// The sizes are those that Dragonfly computes.
func TestPieceSize(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct{ length, size, count int64 }{
		{0, 4 * mib, 0}, {1, 4 * mib, 1}, {4 * mib, 4 * mib, 1}, {4*mib + 1, 4 * mib, 2},
		{200 * mib, 4 * mib, 50}, {200*mib + 1, 4 * mib, 51}, {299 * mib, 4 * mib, 75}, {300 * mib, 5 * mib, 60},
		{1300 * mib, 15 * mib, 87}, {1400 * mib, 15 * mib, 94}, {100 << 30, 15 * mib, 6827},
	} {
		if size, count := pieceSize(c.length), pieceCount(c.length); size != c.size || int64(count) != c.count {
			t.Errorf("%d bytes are %d pieces of %d, want %d of %d", c.length, count, size, c.count, c.size)
		}
	}
}

// Schedulers tell hosts apart by their IDs alone: two with the same name and the same
// ports, as in containers, have others.
func TestHostID(t *testing.T) {
	var ids []string
	for _, ip := range []string{"127.0.0.1", "127.0.0.2"} {
		var listeners [2]net.Listener
		for i := range listeners {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			listeners[i] = l
		}
		host, err := newHost(Options{Advertise: ip}, listeners)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, strings.TrimSuffix(host.Id, strconv.Itoa(int(host.RpcPort))))
	}
	if ids[0] == ids[1] {
		t.Errorf("both are %s", ids[0])
	}
}

// What is remembered of MD5s has a bound.
func TestSumsAreBounded(t *testing.T) {
	s := newSums()
	for _, d := range []string{"a", "b", "c"} {
		s.remember(digest.SHA256.FromString(d), maxSums/2, 0, []byte{1})
	}
	if s.count > maxSums || len(s.of) != 2 {
		t.Errorf("%d sums of %d blobs are remembered, want %d at most", s.count, len(s.of), maxSums)
	}
}
