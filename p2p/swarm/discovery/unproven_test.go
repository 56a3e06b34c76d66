package discovery

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/dfcache/dfcache/p2p/connpool"
)

// TestUnproven: however many connect and prove nothing, from the same address, too, a member of
// the swarm gets in.
func TestUnproven(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for name, nat := range map[string]bool{"": false, "with NAT": true} {
		t.Run(name, func(t *testing.T) {
			a := start(t, func(o *Options) { o.MaxPeers, o.NAT = 64, nat })
			info, err := peer.AddrInfoFromString(addr(t, a))
			if err != nil {
				t.Fatal(err)
			}
			at, err := manet.ToNetAddr(info.Addrs[0])
			if err != nil {
				t.Fatal(err)
			}
			var open []net.Conn
			defer func() {
				for _, c := range open {
					c.Close()
				}
			}()
			for range 4*64 + 50 { // libp2p's own bound is 4*64
				c, err := net.Dial("tcp", at.String())
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, c)
			}
			b := start(t)
			if err := b.Connect(t.Context(), *info); err != nil {
				t.Fatal(err)
			}
			closed := make(chan struct{}, len(open))
			for _, c := range open {
				go func() {
					b := make([]byte, 64)
					for { // libp2p speaks first
						if _, err := c.Read(b); err != nil {
							break
						}
					}
					closed <- struct{}{}
				}()
			}
			for range len(open) - maxUnproven {
				<-closed
			}
		})
	}
}

// accepted is a listener of libp2p's that accepts what it is given.
type accepted struct {
	transport.GatedMaListener
	conns chan net.Conn
}

func (l accepted) Accept() (manet.Conn, network.ConnManagementScope, error) {
	c, err := manet.WrapNetConn(overTCP{<-l.conns})
	return c, nil, err
}

// overTCP is a connection that seems to be one of TCP.
type overTCP struct{ net.Conn }

func (overTCP) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1} }
func (overTCP) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 2), Port: 2} }

// TestProvingTimeout: a peer that has not proven that it is a member in time is closed, and not counted any
// more. One that has, stays.
func TestProvingTimeout(t *testing.T) {
	for name, proves := range map[string]bool{"nothing": false, "in time": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool := connpool.New(2)
				l := accepted{conns: make(chan net.Conn, 1)}
				a := &accepting{GatedMaListener: l, unproven: pool, leave: map[string]func(){}}
				ours, theirs := net.Pipe()
				defer ours.Close()
				defer theirs.Close()
				l.conns <- ours
				c, _, err := a.Accept()
				if err != nil {
					t.Fatal(err)
				}
				if pool.Len() != 1 {
					t.Errorf("%d connections are counted, want one", pool.Len())
				}
				if proves {
					a.proven(c.RemoteMultiaddr().String())
				}
				start := time.Now()
				theirs.SetDeadline(start.Add(time.Minute))
				_, err = theirs.Read(make([]byte, 1))
				if stays := errors.Is(err, os.ErrDeadlineExceeded); stays != proves {
					t.Errorf("after %s: %v", time.Since(start), err)
				}
				c.Close()
				if pool.Len() != 0 {
					t.Errorf("%d connections are counted when it is closed", pool.Len())
				}
			})
		})
	}
}
