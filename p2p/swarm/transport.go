package swarm

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"

	"github.com/dfcache/dfcache/p2p/connpool"
)

// Connections for pieces are TCP connections of their own, outside of libp2p,
// which would cost twice the CPU time. Both ends prove two things before a byte
// of HTTP passes: that they are who they say, by their libp2p identity, and that
// they have the swarm's key, by an HMAC over what is unique to the connection.
//
// With TLS 1.3 the identity is in the certificates, as libp2p has it, and the
// unique thing is the exporter value (RFC 8446, 7.5). Plain connections, which
// have to be asked for, sign and authenticate two nonces instead: what passes
// can be read and, by those who control the network, be changed; blobs are proven
// against their digests all the same.

// plainMagic begins a plain connection. A TLS one begins with 0x16.
const plainMagic = "dfcache plain 1\n"

const (
	// handshakeTimeout is how long a connection may take to be proven, and then to bring the
	// first request.
	handshakeTimeout = 5 * time.Second
	// maxUnproven is how many connections may be open that are not proven yet. They have a
	// pool of their own: hosts without the key can't keep out those with it.
	maxUnproven = 128
	nonceSize   = 32
	proofSize   = sha256.Size
)

// errNotMember says that the other end does not have this swarm's key.
var errNotMember = errors.New("it is not of this swarm: the swarm keys differ")

// security is what a connection is proven with.
type security struct {
	identity crypto.PrivKey // ed25519
	id       peer.ID        // made of it
	tls      *libp2ptls.Identity
	secret   []byte
	plain    bool // take plain connections, too
	early    atomic.Pointer[early]
}

// early is a host that could not connect, since its certificate is not valid yet: its
// clock is ahead, or that of this host is behind.
type early struct {
	address string
	at      time.Time
}

// isEarly reports whether a certificate was refused for its date.
func isEarly(err error) bool {
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	return ok && invalid.Reason == x509.Expired || err != nil && strings.Contains(err.Error(), "not yet valid")
}

// trouble says why somebody could not connect lately; nil where nothing is known.
func (s *security) trouble() error {
	e := s.early.Load()
	if e == nil || time.Since(e.at) > 5*time.Minute {
		return nil
	}
	return fmt.Errorf("a host at %s could not connect, as its certificate is not yet valid here: the clock of this "+
		"host is behind, or that of the other is ahead, by more than an hour: set it right", e.address)
}

func newSecurity(identity crypto.PrivKey, secret []byte, plain bool) (*security, error) {
	if identity.Type() != crypto.Ed25519 {
		return nil, fmt.Errorf("identity: want an ed25519 key, not one of type %s", identity.Type())
	}
	id, err := libp2ptls.NewIdentity(identity)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	self, err := peer.IDFromPrivateKey(identity)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return &security{identity: identity, id: self, tls: id, secret: secret, plain: plain}, nil
}

// proof is what the end with the role sends, over binding, which is unique to the connection.
func (s *security) proof(role string, binding []byte) []byte {
	mac := hmac.New(sha256.New, s.secret)
	fmt.Fprintf(mac, "dfcache member %s\x00", role)
	mac.Write(binding)
	return mac.Sum(nil)
}

// prove exchanges proofs. The client's goes first, so that one that does not have
// the key is told nothing by a server.
func (s *security) prove(c net.Conn, client bool, binding []byte) error {
	mine, theirs := "server", "client"
	if client {
		mine, theirs = theirs, mine
		if _, err := c.Write(s.proof(mine, binding)); err != nil {
			return err
		}
	}
	var got [proofSize]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		if client && strings.Contains(err.Error(), "bad certificate") {
			return fmt.Errorf("it refuses the certificate of this host, as one does whose clock is behind that of "+
				"this host by more than an hour (%w)", err)
		}
		if client {
			return fmt.Errorf("%w (%w)", errNotMember, err)
		}
		return err
	}
	if !hmac.Equal(got[:], s.proof(theirs, binding)) {
		return errNotMember
	}
	if !client {
		if _, err := c.Write(s.proof(mine, binding)); err != nil {
			return err
		}
	}
	return nil
}

// secure proves both ends of a TCP connection. want is the peer that a client
// wants to reach, or "" for any.
func (s *security) secure(
	ctx context.Context, raw net.Conn, client, plain bool, want peer.ID,
) (net.Conn, peer.ID, error) {
	if plain {
		return s.securePlain(raw, client, want)
	}
	config, keys := s.tls.ConfigForPeer(want)
	config.NextProtos = []string{"http/1.1"}
	// Many short connections are made when many fetch the same. Without ML-KEM
	// each costs a third less; what is to stay secret for decades is not for a cache.
	config.CurvePreferences = []tls.CurveID{tls.X25519}
	var c *tls.Conn
	if client {
		c = tls.Client(raw, config)
	} else {
		c = tls.Server(raw, config)
	}
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, "", err
	}
	var key crypto.PubKey
	select {
	case key = <-keys:
	default:
	}
	if key == nil {
		return nil, "", errors.New("the peer has no identity")
	}
	id, err := peer.IDFromPublicKey(key)
	if err != nil {
		return nil, "", err
	}
	state := c.ConnectionState()
	binding, err := state.ExportKeyingMaterial("EXPORTER-dfcache-swarm", nil, nonceSize)
	if err != nil {
		return nil, "", err
	}
	return c, id, s.prove(c, client, binding)
}

// securePlain proves both ends without encrypting what follows.
func (s *security) securePlain(c net.Conn, client bool, want peer.ID) (net.Conn, peer.ID, error) {
	public, err := s.identity.GetPublic().Raw()
	if err != nil {
		return nil, "", err
	}
	mine := make([]byte, nonceSize, nonceSize+len(public))
	rand.Read(mine)
	mine = append(mine, public...)
	opening := mine
	if client {
		opening = append([]byte(plainMagic), mine...)
	}
	theirs := make([]byte, len(mine))
	// The one that is asked answers only to a member, and in the order in which
	// each can check the other.
	if _, err := c.Write(opening); err != nil {
		return nil, "", err
	}
	if _, err := io.ReadFull(c, theirs); err != nil {
		return nil, "", err
	}
	key, err := crypto.UnmarshalEd25519PublicKey(theirs[nonceSize:])
	if err != nil {
		return nil, "", err
	}
	id, err := peer.IDFromPublicKey(key)
	if err != nil {
		return nil, "", err
	}
	if want != "" && id != want {
		return nil, "", fmt.Errorf("it is peer %s, want %s", id, want)
	}
	first, second := mine, theirs
	if !client {
		first, second = theirs, mine
	}
	binding := sha256Sum([]byte("dfcache plain binding\x00"), first, second)
	if err := s.prove(c, client, binding); err != nil {
		return nil, "", err
	}
	role, other := byte('s'), byte('c')
	if client {
		role, other = other, role
	}
	signature, err := s.identity.Sign(append([]byte{role}, binding...))
	if err != nil {
		return nil, "", err
	}
	if _, err := c.Write(signature); err != nil {
		return nil, "", err
	}
	got := make([]byte, len(signature))
	if _, err := io.ReadFull(c, got); err != nil {
		return nil, "", err
	}
	if ok, err := key.Verify(append([]byte{other}, binding...), got); err != nil || !ok {
		return nil, "", fmt.Errorf("peer %s has not signed the connection", id)
	}
	return c, id, nil
}

func sha256Sum(parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// inbound is a connection that was accepted. It is proven with its first Read,
// in the goroutine that serves it.
type inbound struct {
	net.Conn // the raw one; c once it is proven
	s        *security
	once     sync.Once
	c        net.Conn
	id       peer.ID
	err      error
	conns    *conns

	mu     sync.Mutex
	leave  func() // the pool that the connection is in
	closed bool
}

// conns are the connections that are open, of all listeners.
type conns struct{ unproven, proven *connpool.Pool }

func newConns(proven int) *conns {
	return &conns{connpool.New(min(maxUnproven, proven)), connpool.New(proven)}
}

// enter has an accepted connection counted.
func (c *inbound) enter() (ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c == nil {
		c.leave, ok = c.conns.unproven.Push(connpool.Host(c.Conn.RemoteAddr()), func() { c.Conn.Close() }), true
	} else {
		c.leave, ok = c.conns.proven.Offer(string(c.id), func() { c.Conn.Close() })
	}
	return ok
}

// prove moves a connection to those that are proven.
func (c *inbound) prove() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.leave()
	var ok bool
	if c.leave, ok = c.conns.proven.Offer(string(c.id), func() { c.Conn.Close() }); !ok {
		return errTooMany
	}
	return nil
}

// errTooMany closes a connection: the peer tries again, or asks another one.
var errTooMany = errors.New("too many connections are open")

func (c *inbound) handshake() error {
	c.once.Do(func() {
		if c.c != nil {
			return // it came proven
		}
		ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
		defer cancel()
		c.Conn.SetDeadline(time.Now().Add(handshakeTimeout))
		defer func() {
			c.Conn.SetDeadline(time.Time{})
			// For the first request; the server sets its own then.
			c.Conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
		}()
		var first [1]byte
		if _, c.err = io.ReadFull(c.Conn, first[:]); c.err != nil {
			return
		}
		raw := &prefixed{c.Conn, first[:]}
		switch {
		case first[0] == plainMagic[0] && c.s.plain:
			magic := make([]byte, len(plainMagic))
			if _, c.err = io.ReadFull(raw, magic); c.err == nil && !bytes.Equal(magic, []byte(plainMagic)) {
				c.err = fmt.Errorf("%w: not a peer", errMessage)
			}
			if c.err == nil {
				c.c, c.id, c.err = c.s.securePlain(c.Conn, false, "")
			}
		case first[0] == 0x16:
			c.c, c.id, c.err = c.s.secure(ctx, raw, false, false, "")
			if isEarly(c.err) {
				c.s.early.Store(&early{c.Conn.RemoteAddr().String(), time.Now()})
			}
		default:
			c.err = fmt.Errorf("%w: neither TLS nor a plain connection that is allowed", errMessage)
		}
		if c.err == nil {
			c.err = c.prove()
		}
	})
	return c.err
}

func (c *inbound) Read(p []byte) (int, error) {
	if err := c.handshake(); err != nil {
		return 0, err
	}
	return c.c.Read(p)
}

func (c *inbound) Write(p []byte) (int, error) {
	if err := c.handshake(); err != nil {
		return 0, err
	}
	return c.c.Write(p)
}

// Close closes the connection, with a TLS alert where there is a proven one.
func (c *inbound) Close() error {
	c.mu.Lock()
	c.closed = true
	c.leave()
	c.mu.Unlock()
	return c.Conn.Close()
}

// prefixed is a connection of which the first bytes have been read already.
type prefixed struct {
	net.Conn
	first []byte
}

func (c *prefixed) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// listener makes inbound connections of what it accepts.
type listener struct {
	net.Listener
	s      *security
	proven bool // what it accepts is proven by libp2p, and the remote address is the peer's ID
	conns  *conns
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &inbound{Conn: raw, s: l.s, conns: l.conns}
		if l.proven {
			if c.id, err = peer.Decode(raw.RemoteAddr().String()); err != nil {
				raw.Close()
				continue
			}
			c.c = raw
		}
		if !c.enter() {
			raw.Close()
			continue
		}
		return c, nil
	}
}

type peerKey struct{}

// withConn is the ConnContext of the server: handlers find the connection with peerOf.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, c)
}

// peerOf returns the peer that a request is from.
func peerOf(r *http.Request) peer.ID {
	if c, ok := r.Context().Value(peerKey{}).(*inbound); ok && c.handshake() == nil {
		return c.id
	}
	return ""
}
