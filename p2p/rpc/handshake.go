package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/dfcache/dfcache/p2p"
)

// Version is the version of the protocol, which docs/protocol.md describes. A
// client and a daemon understand each other only where it is the same.
const Version = 1

// preface is the line that each side sends first. HTTP/2 follows it at once,
// so neither side may read past it.
var preface = []byte("dfcache/" + strconv.Itoa(Version) + "\n")

// maxPreface is the longest preface of any version.
const maxPreface = 32

// handshakeTimeout bounds a handshake, on both sides.
const handshakeTimeout = 5 * time.Second

// passAnother is the advice where something else has the daemon's socket.
const passAnother = "stop it, or name another socket"

// busy is the line that a client gets instead of the preface when it is refused for what its user has
// already. To an earlier client it is another version.
var busy = []byte("dfcache/" + strconv.Itoa(Version) + " busy\n")

var errNotOurs = errors.New("the other side does not speak the dfcache protocol")

// versionError says that the two sides speak different versions.
type versionError struct{ theirs string }

// readPreface reads the other side's preface and not a byte more, and compares
// it with ours. It returns a *versionError where the other side speaks another
// version, and io.EOF where it closed the connection before it sent anything.
func readPreface(r io.Reader) error {
	line := make([]byte, len(preface), maxPreface)
	for n := 0; n < len(line); {
		m, err := r.Read(line[n:])
		if err == io.EOF && n > 0 {
			err = io.ErrUnexpectedEOF
		}
		if n += m; n < len(line) && err != nil {
			return err
		}
		if !samePrefix(line[:n], "dfcache/") {
			return fmt.Errorf("%w: it begins with %q", errNotOurs, line[:n])
		}
	}
	if bytes.Equal(line, preface) {
		return nil
	}
	// Nothing of ours follows a preface of another version, so that it does no
	// harm to look for its end.
	for line[len(line)-1] != '\n' && len(line) < maxPreface {
		line = append(line, 0)
		if n, _ := r.Read(line[len(line)-1:]); n == 0 {
			line = line[:len(line)-1]
			break
		}
	}
	line, _, _ = bytes.Cut(line, []byte("\n"))
	return &versionError{theirs: string(line)}
}

// samePrefix reports whether b and s are the same, as far as both go.
func samePrefix(b []byte, s string) bool {
	n := min(len(b), len(s))
	return string(b[:n]) == s[:n]
}

func (e *versionError) Error() string {
	return fmt.Sprintf("the other side speaks protocol %.40q, not %s", e.theirs, bytes.TrimSpace(preface))
}

// caller is the process at the other end of a connection, as the kernel knows it.
type caller struct {
	uid, gid uint32
	pid      int32 // 0 where it is in another PID namespace
}

func peerOf(c *net.UnixConn) (caller, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return caller{}, err
	}
	var cred *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil {
		return caller{}, controlErr
	}
	if err != nil {
		return caller{}, fmt.Errorf("credentials of the other side: %w", err)
	}
	return caller{uid: cred.Uid, gid: cred.Gid, pid: cred.Pid}, nil
}

// conn is a connection with its descriptor channel. Where one of the two ends,
// so does the other.
type conn struct {
	*net.UnixConn
	onClose func(*conn) // where not nil; may be called more than once

	// Of a server's connection:
	shares  *shares
	who     caller
	leave   func() // shares.conns
	reading sync.Mutex
	inflow  inflow // what follows the handshake; under reading

	mu      sync.Mutex
	channel *channel // nil before the handshake
	closed  bool
}

// Read implements [net.Conn].
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.UnixConn.Read(p)
	if c.shares == nil {
		return n, err
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	if failed := c.inflow.saw(p[:n]); failed != nil {
		return 0, failed
	}
	return n, err
}

// Close closes the connection and its channel.
func (c *conn) Close() error {
	c.mu.Lock()
	channel := c.channel
	c.closed = true
	c.mu.Unlock()
	err := c.UnixConn.Close()
	if channel != nil {
		channel.close()
	}
	if c.onClose != nil {
		c.onClose(c)
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	c.inflow.end()
	return err
}

func (c *conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// hangUp has the connection fail, and waits for nothing: whoever uses it closes it then.
func (c *conn) hangUp() { c.UnixConn.Close() }

// keep has a descriptor counted that no call has taken yet.
func (c *conn) keep() (leave func(), ok bool) { return c.shares.kept.Offer(c.who.key(), c.hangUp) }

// attach makes the socket fd, which it takes over, the connection's channel.
func (c *conn) attach(fd int, keep func() (leave func(), ok bool)) error {
	f := os.NewFile(uintptr(fd), "descriptor channel")
	defer f.Close()
	socket, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("descriptor channel: %w", err)
	}
	s, ok := socket.(*net.UnixConn)
	if !ok || s.LocalAddr().Network() != "unixpacket" {
		socket.Close()
		return errors.New("descriptor channel: it is not a unix socket of type SOCK_SEQPACKET")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		s.Close()
		return net.ErrClosed
	}
	c.channel = newChannel(s, keep, c.hangUp)
	return nil
}

// clientHandshake makes a connection of a socket that has just been connected.
func (c *conn) clientHandshake(ctx context.Context, allowed func(uid uint32) bool) error {
	daemon, err := peerOf(c.UnixConn)
	if err != nil {
		return err
	}
	if !allowed(daemon.uid) {
		return fmt.Errorf("%w: %w: the process that listens there runs as uid %d, neither root nor your own: it may "+
			"have taken the daemon's place: %s, or say that this user is to be trusted",
			p2p.ErrUnavailable, fs.ErrPermission, daemon.uid, passAnother)
	}
	if err := c.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	var fds []int
	err = interruptible(ctx, c.SetDeadline, func() error {
		_, writeErr := c.Write(preface)
		err := readPreface(rightsReader{c.UnixConn, &fds})
		if _, ok := errors.AsType[*versionError](err); !ok && writeErr != nil {
			return writeErr
		}
		return err // the daemon may have said why it hung up
	})
	var version *versionError
	switch {
	case errors.As(err, &version) && version.theirs == string(bytes.TrimSpace(busy)):
		err = fmt.Errorf("%w: the daemon has no room for another connection of this user: try again", p2p.ErrBusy)
	case errors.As(err, &version):
		err = fmt.Errorf("this daemon speaks protocol %q, this client %q: install the same version on both",
			version.theirs, bytes.TrimSpace(preface))
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET),
		errors.Is(err, unix.EPIPE):
		err = fmt.Errorf("%w: it closed the connection in the handshake: see its log", p2p.ErrUnavailable)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%w: no answer to the handshake in %s: it hangs, or is not a dfdaemon", p2p.ErrUnavailable,
			handshakeTimeout)
	case err != nil:
		err = noDaemon(err)
	case len(fds) != 1:
		err = noDaemon(fmt.Errorf("%w: it sent %d descriptors in the handshake, want one", errNotOurs, len(fds)))
	}
	if err != nil {
		closeAll(fds)
		return err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		closeAll(fds)
		return err
	}
	if err := c.attach(fds[0], nil); err != nil {
		return noDaemon(err)
	}
	return nil
}

// noDaemon is the error where what listens does not act as a dfdaemon does.
func noDaemon(err error) error {
	return fmt.Errorf("%w: what listens there does not act as one: %w: %s", p2p.ErrUnavailable, err, passAnother)
}

// rightsReader reads from a stream socket and collects the descriptors that come with the bytes.
type rightsReader struct {
	conn *net.UnixConn
	fds  *[]int
}

func (r rightsReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxDescriptors))
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(p, oob)
	if err != nil {
		return n, err
	}
	fds, err := parseRights(oob[:oobn], flags)
	*r.fds = append(*r.fds, fds...)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// serverHandshake makes a connection of one that has just been accepted.
// Descriptors that come with the client's preface are closed by the kernel, as
// no room is given for them. The caller bounds it with a deadline, and closes c
// when it fails.
func (c *conn) serverHandshake() error {
	err := readPreface(c.UnixConn)
	var version *versionError
	if errors.As(err, &version) {
		// The answer has no descriptor: it is there to be compared.
		_, _ = c.Write(preface) // whatever it reads, it is refused
		return fmt.Errorf("this client speaks protocol %q, this daemon %q: install the same version on both",
			version.theirs, bytes.TrimSpace(preface))
	}
	if err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("descriptor channel: %w", err)
	}
	defer unix.Close(pair[1])
	if err := c.attach(pair[0], c.keep); err != nil {
		return err
	}
	_, _, err = c.WriteMsgUnix(preface, unix.UnixRights(pair[1]), nil)
	return err
}

// authInfo is what a handler knows of a connection.
type authInfo struct {
	credentials.CommonAuthInfo
	caller  caller
	channel *channel
	conn    *conn
}

// AuthType implements [credentials.AuthInfo].
func (authInfo) AuthType() string { return "dfcache" }

// serverCredentials makes the handshake on connections that a [listener]
// accepted.
type serverCredentials struct{ log *slog.Logger }

func (s serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection is a %T, want one of a unix socket", raw)
	}
	if err := c.serverHandshake(); err != nil {
		level := slog.LevelWarn
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			level = slog.LevelDebug // someone looked whether we are there, or we are stopping
		}
		s.log.Log(context.Background(), level, "connection refused", "error", err, "uid", c.who.uid, "pid", c.who.pid)
		return nil, nil, err
	}
	return c, authInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		caller:         c.who,
		channel:        c.channel,
		conn:           c,
	}, nil
}

func (serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for a server")
}

func (serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "dfcache"}
}

func (s serverCredentials) Clone() credentials.TransportCredentials { return s }

func (serverCredentials) OverrideServerName(string) error { return nil }
