package discovery

import (
	"net"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	manet "github.com/multiformats/go-multiaddr/net"
)

// TestUnproven: however many connect and prove nothing, from the same address, too, a member of
// the swarm gets in.
func TestUnproven(t *testing.T) {
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
