package integration

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStrangers: a host without the key has 1,500 connections open to each port for peers, says nothing on
// them, and opens another one for each that is closed. A daemon with the key joins, and fetches.
func TestStrangers(t *testing.T) {
	l := newLAN(t, 3)
	a, b, stranger := l.hosts[0], l.hosts[1], l.hosts[2]
	a.start("--mdns=false")
	name, data, cid := l.file(1<<20, 1)
	a.ok("import", "-i", cid, name)
	for _, port := range []string{"65002", "65003"} {
		stranger.connectIdle(net.JoinHostPort(a.address(), port), 1500)
	}
	b.start("--mdns=false", "--bootstrap", a.address())
	b.eventually("stat", "-i", cid)
	b.export(data, "-i", cid)
	a.ok("stat", "-l", "-i", cid)
}

// connectIdle opens n connections from the host to an address, and keeps as many open until the test ends.
func (h *host) connectIdle(address string, n int) {
	t := h.lan.t
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	all := map[net.Conn]bool{}
	var running sync.WaitGroup
	opened, closed := make(chan error, 1), make(chan struct{}, n)
	running.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		netns, err := os.Open(filepath.Join("/run/netns", h.netns))
		if err == nil {
			err = unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET)
			netns.Close()
		}
		for i := 0; err == nil; i++ {
			if i == n {
				opened <- nil
			}
			if i >= n {
				select {
				case <-closed:
				case <-ctx.Done():
					return
				}
				time.Sleep(time.Millisecond) // it is not to wear out this machine
			}
			var c net.Conn
			if c, err = net.Dial("tcp", address); err != nil {
				break
			}
			mu.Lock()
			all[c] = true
			mu.Unlock()
			running.Go(func() {
				io.Copy(io.Discard, c) // until it is closed
				c.Close()
				mu.Lock()
				delete(all, c)
				mu.Unlock()
				closed <- struct{}{}
			})
		}
		opened <- err
	})
	t.Cleanup(func() {
		cancel()
		mu.Lock()
		for c := range all {
			c.Close()
		}
		mu.Unlock()
		go func() { // so that none waits to tell
			for range closed {
			}
		}()
		running.Wait()
		close(closed)
	})
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
}
