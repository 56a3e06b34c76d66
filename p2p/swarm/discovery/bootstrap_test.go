package discovery

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/test"
)

const someID = "12D3KooWQQvHHXM8n7MMreLQMBysWtthtWLFQ9cCd7sboFk6DbpV"

func TestParseEntry(t *testing.T) {
	for in, want := range map[string]string{
		"host":                             "host:65003",
		"host.example.com":                 "host.example.com:65003",
		"host.example.com.:1":              "host.example.com.:1",
		"a_b-c.svc.cluster.local:65535":    "a_b-c.svc.cluster.local:65535",
		"10.0.0.1":                         "10.0.0.1:65003",
		"10.0.0.1:0080":                    "10.0.0.1:80",
		"::1":                              "[::1]:65003",
		"[::1]":                            "[::1]:65003",
		"[2001:db8::1]:9":                  "[2001:db8::1]:9",
		"fe80::1%eth0":                     "[fe80::1%eth0]:65003",
		"/ip4/1.2.3.4/tcp/5/p2p/" + someID: "/ip4/1.2.3.4/tcp/5/p2p/" + someID,
		"/dns4/a.example.com/tcp/5/p2p/" + someID:   "/dns4/a.example.com/tcp/5/p2p/" + someID,
		"/dns6/a.example.com/tcp/5/p2p/" + someID:   "/dns6/a.example.com/tcp/5/p2p/" + someID,
		"/dnsaddr/a.example.com":                    "/dnsaddr/a.example.com",
		"/dnsaddr/a.example.com/p2p/" + someID:      "/dnsaddr/a.example.com/p2p/" + someID,
		"/ip6/2001:db8::1/tcp/65002/ipfs/" + someID: "/ip6/2001:db8::1/tcp/65002/p2p/" + someID,
	} {
		e, err := parseEntry(in)
		if err != nil || e.String() != want {
			t.Errorf("%q: %v, %v; want %s", in, e, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "a b", "host:", ":65003", "host:0", "host:65536", "host:-1", "host:http", "host:1:2", "-host", "ho/st",
		"http://host:1", "[::1", "[host]x", "1.2.3.4/24", strings.Repeat("a", 300), "host\n", "fe80::1%a b",
		"/dnsaddr/a b",
		"/", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/5", "/ip4/1.2.3.400/tcp/5/p2p/" + someID, "/p2p/" + someID,
		"/dns4/a.example.com/tcp/5", "/ip4/1.2.3.4/tcp/5/p2p/nobody", "/nonsense",
	} {
		if e, err := parseEntry(in); err == nil {
			t.Errorf("%q: no error but %v", in, e)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	for _, s := range []string{"host", "host:1", "[::1]:2", "fe80::1%eth0", "/ip4/1.2.3.4/tcp/5/p2p/" + someID,
		"/dnsaddr/x", "# comment", "::ffff:1.2.3.4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := parseEntry(s)
		if err != nil {
			return
		}
		again, err := parseEntry(e.String())
		if err != nil || again.String() != e.String() {
			t.Errorf("%q is %v, but that is %v, %v", s, e, again, err)
		}
		if entries, err := parsePeersFile([]byte(s + "\n" + s)); strings.ContainsAny(s, "#\n\r") {
			return
		} else if err != nil || len(entries) != 2 {
			t.Errorf("as two lines of a file: %v, %v", entries, err)
		}
	})
}

// logged counts messages.
type logged struct {
	slog.Handler
	mu sync.Mutex
	n  map[string]int
}

func (l *logged) Enabled(context.Context, slog.Level) bool { return true }

func (l *logged) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n[r.Message]++
	return nil
}

func (l *logged) count(part string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for text, count := range l.n {
		if strings.Contains(text, part) {
			n += count
		}
	}
	return n
}

// A failure is logged when it begins, and its end, not each try.
func TestFailuresAreLoggedOnce(t *testing.T) {
	a := start(t)
	log := &logged{n: map[string]int{}}
	tries := make(chan bool) // whether the next one may succeed
	b := start(t, bootstrap("127.0.0.1:7"), func(o *Options) {
		o.Log = slog.New(log)
		o.Resolve = func(ctx context.Context, _ string) (peer.AddrInfo, error) {
			select {
			case ok := <-tries:
				if ok {
					return peer.AddrInfo{ID: a.Self(), Addrs: a.host.Addrs()}, nil
				}
			case <-ctx.Done():
			}
			return peer.AddrInfo{}, errors.New("nobody is there")
		}
	})
	for range 4 {
		tries <- false
	}
	if n := log.count("will go on trying"); n != 1 {
		t.Errorf("failures logged %d times", n)
	}
	tries <- true
	connectedWithAll(t, a, b)
	eventually(t, "the success is logged", func() bool { return log.count("that had failed") == 1 })
}

// All addresses of a name are asked, and this host itself is none.
func TestTryEach(t *testing.T) {
	if err := tryEach([]int{1, 2, 3}, func(i int) error {
		if i == 2 {
			return nil
		}
		return errors.New("no")
	}); err != nil {
		t.Errorf("one of three succeeded: %v", err)
	}
	if err := tryEach([]int{1, 2}, func(int) error { return errors.New("no") }); err == nil {
		t.Error("none of two succeeded, and there is no error")
	}
	if err := tryEach(nil, func(int) error { return nil }); err == nil {
		t.Error("of nobody none succeeded, and there is no error")
	}
}

func TestAloneBehindItsOwnName(t *testing.T) {
	id := test.RandPeerIDFatal(t)
	asked := make(chan string, 100)
	n := start(t, bootstrap("127.0.0.1:7"), func(o *Options) {
		self, err := peer.IDFromPrivateKey(o.Identity)
		if err != nil {
			t.Fatal(err)
		}
		id = self
		o.Resolve = func(_ context.Context, at string) (peer.AddrInfo, error) {
			asked <- at
			return peer.AddrInfo{ID: id}, nil
		}
	})
	if at := <-asked; at != "127.0.0.1:7" {
		t.Errorf("asked %s", at)
	}
	e, err := parseEntry("127.0.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.bootstrapper.try(t.Context(), e); err != nil {
		t.Errorf("the only host of the name: %v", err)
	}
}
