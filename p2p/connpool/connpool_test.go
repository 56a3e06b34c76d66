package connpool

import (
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

// crowd notes who was thrown out.
type crowd struct {
	*Pool
	thrown []string
}

func (c *crowd) push(who, name string) func() {
	return c.Push(who, func() { c.thrown = append(c.thrown, name) })
}

func (c *crowd) want(t *testing.T, thrown ...string) {
	t.Helper()
	if !slices.Equal(c.thrown, thrown) {
		t.Errorf("thrown out: %v, want %v", c.thrown, thrown)
	}
	c.thrown = nil
}

func TestPush(t *testing.T) {
	c := &crowd{Pool: New(4)}
	leave := c.push("a", "a1")
	c.push("b", "b1")
	c.push("b", "b2")
	c.push("c", "c1")
	c.want(t)
	c.push("d", "d1")
	c.want(t, "b1") // the oldest of the client with most
	c.push("e", "e1")
	c.want(t, "a1") // all have one: the oldest
	leave()         // it is out already
	if c.Len() != 4 {
		t.Errorf("there are %d, want 4", c.Len())
	}
	c.push("b", "b3")
	c.want(t, "b2") // the client with most is the one that came
}

func TestOffer(t *testing.T) {
	p := New(3)
	var thrown []string
	offer := func(who, name string) bool {
		_, ok := p.Offer(who, func() { thrown = append(thrown, name) })
		return ok
	}
	if !offer("a", "a1") || !offer("a", "a2") || !offer("b", "b1") {
		t.Fatal("refused where there is room")
	}
	if offer("a", "a3") || offer("b", "b2") {
		t.Error("taken in from a client with as many as others")
	}
	if !offer("c", "c1") || !slices.Equal(thrown, []string{"a1"}) {
		t.Errorf("one who has none: thrown out: %v", thrown)
	}
	if offer("d", "d1") {
		t.Error("one is thrown out of who has no more than one")
	}
}

// TestLimit: whatever comes and goes, it is counted right.
func TestLimit(t *testing.T) {
	p := New(10)
	open := map[int]func(){}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 10_000 {
		who := string(rune('a' + r.IntN(5)))
		switch r.IntN(3) {
		case 0:
			open[i] = p.Push(who, func() { delete(open, i) })
		case 1:
			if leave, ok := p.Offer(who, func() { delete(open, i) }); ok {
				open[i] = leave
			}
		default:
			for j, leave := range open {
				leave()
				leave()
				delete(open, j)
				break
			}
		}
		if p.Len() > 10 || p.Len() != len(open) {
			t.Fatalf("step %d: %d are counted, %d are open", i, p.Len(), len(open))
		}
	}
}

func TestHost(t *testing.T) {
	for address, want := range map[string]string{
		"10.1.2.3:5":            "10.1.2.3",
		"[::ffff:10.1.2.3]:5":   "10.1.2.3",
		"[2001:db8:0:1::2:3]:5": "2001:db8:0:1::/64",
		"[fe80::1%eth0]:5":      "fe80::/64",
	} {
		a, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if got := Host(a); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}

// TestListen: whoever has connected before, and however often, the one who comes is let in.
func TestListen(t *testing.T) {
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listen(raw, 2)
	defer l.Close()
	var clients, accepted []net.Conn
	for range 4 {
		c, err := net.Dial("tcp", raw.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		clients, accepted = append(clients, c), append(accepted, a)
	}
	for _, c := range clients[:2] {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("an old connection is not closed")
		}
	}
	for i := range 2 {
		if _, err := accepted[2+i].Write([]byte{1}); err != nil {
			t.Error(err)
		}
		if _, err := clients[2+i].Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
}
