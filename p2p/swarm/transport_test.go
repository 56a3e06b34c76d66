package swarm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"

	"github.com/dfcache/dfcache/p2p"
)

func testSecurity(t testing.TB, secret string, plain bool) (*security, peer.ID) {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSecurity(key, []byte(secret), plain)
	if err != nil {
		t.Fatal(err)
	}
	return s, id
}

// meet connects two ends and returns what each of them thinks of it.
func meet(t testing.TB, client, server *security, plain bool, want peer.ID) (seen, dialled peer.ID, c, s error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := &listener{l, server, false, newConns(1)}
	defer in.Close()
	accepted := make(chan *inbound, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := in.Accept()
		if err != nil {
			return
		}
		i := conn.(*inbound)
		if i.handshake() != nil {
			i.Close() // as the server does
		}
		accepted <- i
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_, dialled, c = client.secure(t.Context(), raw, true, plain, want)
	if c != nil {
		raw.Close()
	}
	i := <-accepted
	<-done
	defer i.Close()
	return i.id, dialled, c, i.err
}

func TestMembership(t *testing.T) {
	server, serverID := testSecurity(t, "one", true)
	tlsOnly, _ := testSecurity(t, "one", false)
	member, memberID := testSecurity(t, "one", true)
	stranger, strangerID := testSecurity(t, "two", true)
	for _, plain := range []bool{false, true} {
		seen, dialled, c, s := meet(t, member, server, plain, serverID)
		if c != nil || s != nil || seen != memberID || dialled != serverID {
			t.Errorf("plain %t: two members: %v, %v, seen %s, dialled %s", plain, c, s, seen, dialled)
		}
		if _, dialled, c, s := meet(t, member, server, plain, ""); c != nil || s != nil || dialled != serverID {
			t.Errorf("plain %t: any member: %v, %v, dialled %s", plain, c, s, dialled)
		}
		if _, _, c, s := meet(t, stranger, server, plain, serverID); !errors.Is(c, errNotMember) || s == nil {
			t.Errorf("plain %t: a stranger calls: %v, %v", plain, c, s)
		}
		if _, _, c, s := meet(t, member, stranger, plain, strangerID); c == nil || s == nil {
			t.Errorf("plain %t: a stranger is called: %v, %v", plain, c, s)
		}
		if _, _, c, _ := meet(t, member, server, plain, strangerID); c == nil {
			t.Errorf("plain %t: another peer answers, and nobody minds", plain)
		}
	}
	if _, _, c, s := meet(t, member, tlsOnly, true, ""); c == nil || s == nil {
		t.Errorf("a plain connection to a peer that wants TLS: %v, %v", c, s)
	}
}

func TestGarbageIsNoHandshake(t *testing.T) {
	server, _ := testSecurity(t, "one", true)
	for _, opening := range []string{"", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x05hello", plainMagic,
		plainMagic + "short", "d", "dfcache plain 2\n0123456789"} {
		mine, theirs := net.Pipe()
		i := &inbound{Conn: theirs, s: server, conns: newConns(1)}
		i.enter()
		done := make(chan struct{})
		go func() {
			defer close(done)
			go io.Copy(io.Discard, mine)
			mine.Write([]byte(opening))
			mine.Close()
		}()
		if _, err := i.Read(make([]byte, 1)); err == nil {
			t.Errorf("%q is taken for a handshake", opening)
		}
		i.Close()
		<-done
	}
}

// A host without the key gets nothing from a daemon, and nothing to it.
func TestStrangers(t *testing.T) {
	h := newHub()
	a := h.start(t)
	stranger := h.start(t, func(o *Options) { o.Secret = []byte("another swarm") })
	task := a.add(t, "", []byte("data"))
	for _, request := range []struct{ method, path string }{
		{http.MethodGet, pathHello}, {http.MethodPost, pathFind}, {http.MethodGet, pathBlob},
		{http.MethodGet, pathLinks},
		{http.MethodPost, pathPieces}, {http.MethodGet, pathDeletes}, {http.MethodPost, pathDeletes},
		{http.MethodPost, pathReplicate},
	} {
		direct := &http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return stranger.client.dialDirect(ctx, a.api.advertise[0], false, a.id)
			},
		}}
		if _, err := stranger.client.do(t.Context(), direct, a.id, request.method, request.path, taskQuery(task),
			nil); !errors.Is(err, errNotMember) {
			t.Errorf("%s %s by a stranger: %v, want %v", request.method, request.path, err, errNotMember)
		}
		// Without any handshake.
		resp, err := http.Get("http://" + a.api.advertise[0] + request.path)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s without a handshake: %s", request.path, resp.Status)
		}
	}
	if _, err := a.store.Stat(t.Context(), "", cidOf(t, string(task.Digest)), p2p.StatOptions{}); err != nil {
		t.Error(err)
	}
}

// TestUnproven: however many connect and prove nothing, from the same address, too, a peer that has
// the key gets in.
func TestUnproven(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a, b := h.start(t, func(o *Options) { o.MaxConns = 8 }), h.start(t)
	task := a.add(t, "", content(100_000, 1))
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range 100 {
		c, err := net.Dial("tcp", a.api.advertise[0])
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	conn, err := b.client.dialDirect(t.Context(), a.api.advertise[0], false, a.id)
	if err != nil {
		t.Fatalf("a member does not get in: %v", err)
	}
	defer conn.Close()
	b.want(t, task, content(100_000, 1))
	// All but eight were thrown out; the others have their time.
	closed := make(chan struct{}, len(open))
	for _, c := range open {
		go func() {
			c.Read(make([]byte, 1))
			closed <- struct{}{}
		}()
	}
	for range open {
		<-closed
	}
}

// TestUnprovenPool: of connections that prove nothing there are so many, and none has the place of one that
// is proven.
func TestUnprovenPool(t *testing.T) {
	server, _ := testSecurity(t, "one", false)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := &listener{l, server, false, newConns(8)}
	defer in.Close()
	for range 20 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		accepted, err := in.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
	}
	if unproven, proven := in.conns.unproven.Len(), in.conns.proven.Len(); unproven != 8 || proven != 0 {
		t.Errorf("%d connections are open that are not proven, and %d that are; want 8 and none", unproven, proven)
	}
}

// TestProvenPool: a peer with many connections takes none from another.
func TestProvenPool(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	h := newHub()
	a, many, one := h.start(t, func(o *Options) { o.MaxConns = 8 }), h.start(t), h.start(t)
	ask := func(c net.Conn) error {
		c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.WriteString(c, "GET "+pathHello+" HTTP/1.1\r\nHost: peer\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	dial := func(p *testPeer) error {
		c, err := p.client.dialDirect(t.Context(), a.api.advertise[0], false, a.id)
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		return ask(c)
	}
	refused := 0
	for range 20 {
		if dial(many) != nil {
			refused++
		}
	}
	if refused < 12 {
		t.Errorf("a peer has %d connections of 8", 20-refused)
	}
	if err := dial(one); err != nil {
		t.Errorf("another one does not get in: %v", err)
	}
}

// Addresses that take what is sent and say nothing don't hold up the one that answers.
func TestDialAny(t *testing.T) {
	h := newHub()
	a, b := h.start(t), h.start(t)
	var addresses []string
	for range 7 {
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		addresses = append(addresses, silent.Addr().String())
	}
	ctx, cancel := context.WithTimeout(t.Context(), directTimeout)
	defer cancel()
	conn, address, err := a.client.dialAny(ctx, append(addresses, b.api.advertise[0]), false, b.id)
	if err != nil || address != b.api.advertise[0] {
		t.Fatalf("connected with %q, %v, want %s", address, err, b.api.advertise[0])
	}
	conn.Close()
	cancel()
	if conn, _, err := a.client.dialAny(ctx, addresses, false, b.id); conn != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("connected with %v, %v, want %v", conn, err, context.Canceled)
	}
}

// A certificate that is not valid yet says whose clock is wrong, at both ends.
func TestCertificateOfAClockAhead(t *testing.T) {
	server, serverID := testSecurity(t, "one", false)
	ahead, aheadID := testSecurity(t, "one", false)
	id, err := libp2ptls.NewIdentity(ahead.identity, libp2ptls.WithCertTemplate(&x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(2 * time.Hour),
		NotAfter: time.Now().Add(100 * time.Hour),
	}))
	if err != nil {
		t.Fatal(err)
	}
	ahead.tls = id
	if server.trouble() != nil {
		t.Error(server.trouble())
	}
	_, _, c, _ := meet(t, ahead, server, false, serverID)
	if c == nil || errors.Is(c, errNotMember) || !strings.Contains(c.Error(), "clock is behind") {
		t.Errorf("a peer that is ahead is told %v", c)
	}
	if err := server.trouble(); err == nil ||
		!strings.Contains(err.Error(), "the clock of this host is behind, or that of the other is ahead") {
		t.Errorf("the peer that was called says %v", err)
	}
	if _, _, c, _ := meet(t, server, ahead, false, aheadID); !isEarly(c) {
		t.Errorf("a peer that calls one that is ahead gets %v", c)
	}
}

// TestSayNothing: a peer that connects and proves nothing, or proves it and asks for nothing, is
// closed within seconds, and not counted any more. It runs with a clock of its own.
func TestSayNothing(t *testing.T) {
	server, _ := testSecurity(t, "key", false)
	member, _ := testSecurity(t, "key", false)
	now := time.Now() // certificates are of now
	for name, client := range map[string]*security{"nothing": nil, "the proof": member} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(now))
				conns := newConns(8)
				ours, theirs := net.Pipe()
				defer theirs.Close()
				in := &inbound{Conn: ours, s: server, conns: conns}
				if !in.enter() {
					t.Fatal("it is refused")
				}
				if client != nil {
					go client.secure(context.Background(), theirs, true, false, "")
				}
				start := time.Now()
				if _, err := in.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) ||
					time.Since(start) > 2*handshakeTimeout {
					t.Errorf("after %s: %v", time.Since(start), err)
				}
				if n := conns.unproven.Len() + conns.proven.Len(); n != 1 {
					t.Errorf("%d connections are counted, want one", n)
				}
				in.Close()
				if n := conns.unproven.Len() + conns.proven.Len(); n != 0 {
					t.Errorf("%d connections are counted when it is closed", n)
				}
			})
		})
	}
}

// pipeOf returns the two ends of a TCP connection.
func pipeOf(t *testing.T) (dialled, accepted net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if dialled, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{dialled, accepted} {
		c.SetDeadline(time.Now().Add(30 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return dialled, accepted
}

// half makes an end of a TLS connection as far as a host can that does not have the key.
func half(t *testing.T, s *security, raw net.Conn, client bool) net.Conn {
	t.Helper()
	config, _ := s.tls.ConfigForPeer("")
	config.NextProtos = []string{"http/1.1"}
	c := tls.Server(raw, config)
	if client {
		c = tls.Client(raw, config)
	}
	if err := c.Handshake(); err != nil {
		t.Error(err)
	}
	return c
}

// TestProofsOfOthers: a host without the key has no use for the proofs of one that has it. A client's own is
// not one of a server, nor is that of another connection; and a server gives none before it has
// seen one.
func TestProofsOfOthers(t *testing.T) {
	member, _ := testSecurity(t, "one", true)
	server, _ := testSecurity(t, "one", true)
	stranger, _ := testSecurity(t, "two", true)
	secured := func(s *security, c net.Conn, client, plain bool) chan error {
		done := make(chan error, 1)
		go func() {
			_, _, err := s.secure(t.Context(), c, client, plain, "")
			c.Close()
			done <- err
		}()
		return done
	}
	t.Run("sent back", func(t *testing.T) {
		ours, theirs := pipeOf(t)
		done := secured(member, ours, true, false)
		c := half(t, stranger, theirs, false)
		proof := make([]byte, proofSize)
		io.ReadFull(c, proof)
		c.Write(proof)
		if err := <-done; !errors.Is(err, errNotMember) {
			t.Errorf("a client takes its own proof for one of the server: %v", err)
		}
	})
	t.Run("sent back, plain", func(t *testing.T) {
		ours, theirs := pipeOf(t)
		done := secured(member, ours, true, true)
		public, _ := stranger.identity.GetPublic().Raw()
		mine := append(make([]byte, nonceSize), public...)
		opening := make([]byte, len(plainMagic)+len(mine))
		io.ReadFull(theirs, opening)
		theirs.Write(mine)
		proof := make([]byte, proofSize)
		io.ReadFull(theirs, proof)
		theirs.Write(proof)
		signature, _ := stranger.identity.Sign(
			append([]byte{'s'}, sha256Sum([]byte("dfcache plain binding\x00"), opening[len(plainMagic):], mine)...))
		theirs.Write(signature)
		if err := <-done; !errors.Is(err, errNotMember) {
			t.Errorf("a client takes its own proof for one of the server: %v", err)
		}
	})
	t.Run("handed on", func(t *testing.T) {
		ours, between := pipeOf(t)
		beyond, theirs := pipeOf(t)
		client, served := secured(member, ours, true, false), secured(server, theirs, false, false)
		one, two := half(t, stranger, between, false), half(t, stranger, beyond, true)
		go func() {
			io.Copy(two, one)
			two.Close()
		}()
		io.Copy(one, two)
		one.Close()
		if c, s := <-client, <-served; c == nil || s == nil {
			t.Errorf("one in the middle is taken for a member: %v, %v", c, s)
		}
	})
	t.Run("of an earlier connection, plain", func(t *testing.T) {
		ours, between := pipeOf(t)
		beyond, theirs := pipeOf(t)
		client, served := secured(member, ours, true, true), make(chan error, 1)
		accept := func(c net.Conn) {
			io.ReadFull(c, make([]byte, len(plainMagic)))
			_, _, err := server.securePlain(c, false, "")
			c.Close()
			served <- err
		}
		go accept(theirs)
		var sent bytes.Buffer
		go io.Copy(between, beyond)
		io.Copy(beyond, io.TeeReader(between, &sent))
		if c, s := <-client, <-served; c != nil || s != nil {
			t.Fatalf("two members: %v, %v", c, s)
		}
		beyond, theirs = pipeOf(t)
		go accept(theirs)
		beyond.Write(sent.Bytes())
		if err := <-served; !errors.Is(err, errNotMember) {
			t.Errorf("what a member has sent before, again: %v", err)
		}
	})
	t.Run("not before the client's", func(t *testing.T) {
		ours, theirs := pipeOf(t)
		done := secured(server, theirs, false, false)
		c := half(t, stranger, ours, true)
		c.Write(make([]byte, proofSize))
		if n, err := c.Read(make([]byte, 1)); n > 0 {
			t.Errorf("a server has said something to a host without the key (%v)", err)
		}
		if err := <-done; !errors.Is(err, errNotMember) {
			t.Errorf("a proof of zeros: %v", err)
		}
	})
}

// stolen is the identity of another peer, of which only the public half is known.
type stolen struct {
	crypto.PrivKey
	public crypto.PubKey
}

func (s stolen) GetPublic() crypto.PubKey { return s.public }

// TestStolenIdentity: a member of the swarm is not believed to be another one, at either end.
func TestStolenIdentity(t *testing.T) {
	member, _ := testSecurity(t, "one", true)
	victim, victimID := testSecurity(t, "one", true)
	thief, _ := testSecurity(t, "one", true)
	thief.identity = stolen{thief.identity, victim.identity.GetPublic()}
	if _, _, _, s := meet(t, thief, member, true, ""); s == nil {
		t.Error("a server takes a client for another peer")
	}
	if _, _, c, _ := meet(t, member, thief, true, victimID); c == nil {
		t.Error("a client takes a server for another peer")
	}
}

// TestPlainAtBothEnds: what moves between two peers of which one does not want it plain is encrypted, and
// comes all the same.
func TestPlainAtBothEnds(t *testing.T) {
	for _, wants := range [][2]bool{{true, false}, {false, true}, {true, true}} {
		h := newHub()
		a := h.start(t, func(o *Options) { o.Plain = wants[0] })
		data := bytes.Repeat([]byte("what is to stay secret "), 10_000)
		task := a.add(t, "", data)
		// Another one reaches it by way of one that reads what passes.
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var passed record
		var passing sync.WaitGroup
		at := a.api.advertise[0]
		passing.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				to, err := net.Dial("tcp", at)
				if err != nil {
					c.Close()
					return
				}
				passing.Go(func() { io.Copy(to, c); to.Close() })
				passing.Go(func() { io.Copy(c, io.TeeReader(to, &passed)); c.Close() })
			}
		})
		a.api.advertise = []string{l.Addr().String()}
		b := h.start(t, func(o *Options) { o.Plain = wants[1] })
		b.want(t, task, data)
		a.Close()
		b.Close()
		l.Close()
		passing.Wait()
		if got, want := passed.has("what is to stay secret"), wants[0] && wants[1]; got != want {
			t.Errorf("wanted is %v: what passes can be read is %t", wants, got)
		}
	}
}
