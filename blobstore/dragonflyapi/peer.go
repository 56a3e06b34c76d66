package dragonflyapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// localCredentials ask the kernel who has connected to a unix socket. They
// exchange nothing with the client, which believes to speak without any.
type localCredentials struct{}

// caller is the user at the other end of a connection.
type caller struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (caller) AuthType() string { return "unix" }

func (localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	raw := conn
	if counted, ok := conn.(interface{ NetConn() net.Conn }); ok {
		raw = counted.NetConn()
	}
	c, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("connection from %s is not one of a unix socket", conn.RemoteAddr())
	}
	fd, err := c.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	if controlErr := fd.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil || err != nil {
		return nil, nil, errors.Join(controlErr, err)
	}
	return conn, caller{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, cred.Uid}, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are a server's credentials")
}

func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}
func (c localCredentials) Clone() credentials.TransportCredentials { return c }
func (localCredentials) OverrideServerName(string) error           { return nil }

// check reports whether a caller may have the daemon open paths.
func check(ctx context.Context) error {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return status.Error(codes.PermissionDenied, "nobody knows who you are")
	}
	c, ok := p.AuthInfo.(caller)
	if ok && (c.uid == 0 || int(c.uid) == os.Geteuid()) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "uid %d may not use this socket: the daemon opens the paths that "+
		"come here, so it answers only root and uid %d: use the dfcache that came with this dfdaemon, which opens "+
		"files itself", c.uid, os.Geteuid())
}

func admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := check(ctx); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func admitStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := check(stream.Context()); err != nil {
		return err
	}
	return handler(srv, stream)
}
