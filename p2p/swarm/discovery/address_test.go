package discovery

import (
	"testing"

	"github.com/multiformats/go-multiaddr"
)

// TestDescribeAddress: where a peer is reached is said as people write addresses.
func TestDescribeAddress(t *testing.T) {
	const id = "12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"
	for address, want := range map[string]string{
		"/ip4/10.0.0.7/tcp/4001":                                       "10.0.0.7:4001",
		"/ip6/fd00::7/tcp/4001/p2p/" + id:                              "[fd00::7]:4001",
		"/ip4/192.0.2.1/tcp/4001/p2p/" + id + "/p2p-circuit":           "192.0.2.1:4001 (a relay)",
		"/ip4/192.0.2.1/tcp/4001/p2p/" + id + "/p2p-circuit/p2p/" + id: "192.0.2.1:4001 (a relay)",
	} {
		a, err := multiaddr.NewMultiaddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if got := describeAddress(a); got != want {
			t.Errorf("%s is %q, want %q", address, got, want)
		}
	}
}
