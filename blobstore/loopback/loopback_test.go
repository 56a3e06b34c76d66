package loopback

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// accept returns the two ends of a connection to a listener at the address, which dial dials.
func accept(t *testing.T, network, at string, dial func(network, at string) (net.Conn, error)) (theirs, ours net.Conn) {
	t.Helper()
	l, err := net.Listen(network, at)
	if err != nil && testing.Short() {
		t.Skipf("-short: needs %s at %s: %v", network, at, err)
	} else if err != nil {
		t.Fatalf("this host has no %s at %s, or run the tests with -short: %v", network, at, err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	host := "127.0.0.1"
	if at == "[::1]:0" {
		host = "::1"
	}
	if theirs, err = dial("tcp", net.JoinHostPort(host, port)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	return theirs, ours
}

// needRoot ends a test that needs root: it is skipped with -short, and fails without root.
func needRoot(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs root")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: run the tests as .ci/run does, or with -short")
	}
}

// dialAs dials as another user.
func dialAs(uid int) func(network, at string) (net.Conn, error) { return dialAsWith(uid, net.Dial) }

func dialAsWith(uid int, dial func(network, at string) (net.Conn, error)) func(network, at string) (net.Conn, error) {
	return func(network, at string) (net.Conn, error) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if _, err := unix.SetfsuidRetUid(uid); err != nil { // of this thread alone
			return nil, err
		}
		defer unix.SetfsuidRetUid(os.Geteuid())
		return dial(network, at)
	}
}

func TestUserOf(t *testing.T) {
	for _, c := range []struct{ network, at string }{
		{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}, {"tcp", "[::]:0"}, {"tcp4", "0.0.0.0:0"},
	} {
		t.Run(c.network+" "+c.at, func(t *testing.T) {
			_, ours := accept(t, c.network, c.at, net.Dial)
			if uid, err := userOf(ours); err != nil || uid != os.Geteuid() {
				t.Errorf("user %d, %v; want %d", uid, err, os.Geteuid())
			}
			needRoot(t)
			_, ours = accept(t, c.network, c.at, dialAs(12345))
			if uid, err := userOf(ours); err != nil || uid != 12345 {
				t.Errorf("user %d, %v; want 12345", uid, err)
			}
		})
	}
}

// What is closed belongs to nobody, and least of all to root, as the kernel says.
func TestUserOfClosed(t *testing.T) {
	theirs, ours := accept(t, "tcp4", "127.0.0.1:0", net.Dial)
	theirs.(*net.TCPConn).CloseWrite()
	const finWait2 = 5
	for state(t, theirs) != finWait2 { // until the other side's kernel has said that it knows
		runtime.Gosched()
	}
	if uid, err := userOf(ours); err != nil || uid != os.Geteuid() {
		t.Errorf("half closed: user %d, %v", uid, err)
	}
	theirs.Close()
	if uid, err := userOf(ours); !errors.Is(err, ErrUnknown) {
		t.Errorf("closed: user %d, %v", uid, err)
	}
	theirs, ours = accept(t, "tcp4", "127.0.0.1:0", net.Dial)
	theirs.(*net.TCPConn).SetLinger(0)
	theirs.Close()
	if uid, err := userOf(ours); !errors.Is(err, ErrUnknown) {
		t.Errorf("reset: user %d, %v", uid, err)
	}
	// While our end is closed, another connection can have the same addresses.
	_, ours = accept(t, "tcp4", "127.0.0.1:0", net.Dial)
	ours.Close()
	if uid, err := userOf(ours); !errors.Is(err, ErrUnknown) {
		t.Errorf("closed on this side: user %d, %v", uid, err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if uid, err := userOf(a); !errors.Is(err, ErrUnknown) {
		t.Errorf("not TCP: user %d, %v", uid, err)
	}
}

// state returns the state of a connection.
func state(t *testing.T, c net.Conn) (state uint8) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	controlErr := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	if err := errors.Join(err, controlErr); err != nil {
		t.Fatal(err)
	}
	return state
}

// A port can have connections of several users, to several servers.
func TestUserOfSharedPort(t *testing.T) {
	needRoot(t)
	_, port, _ := net.SplitHostPort(func() string {
		l, err := net.Listen("tcp4", "127.0.0.1:0") // one that is free
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}())
	shared := &net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(controlErr, err)
	}}
	if n, err := strconv.Atoi(port); err == nil {
		shared.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: n}
	}
	uids := []int{12345, 0, 12346}
	var servers []net.Conn
	for _, uid := range uids {
		_, ours := accept(t, "tcp4", "127.0.0.1:0", dialAsWith(uid, shared.Dial))
		servers = append(servers, ours)
	}
	for i, want := range uids {
		if uid, err := userOf(servers[i]); err != nil || uid != want {
			t.Errorf("user %d, %v; want %d", uid, err, want)
		}
	}
}

// It is looked once for each connection: what it was when its first request came counts.
func TestUserOnce(t *testing.T) {
	theirs, ours := accept(t, "tcp4", "127.0.0.1:0", net.Dial)
	r := httptest.NewRequest("GET", "/", nil).WithContext(ConnContext(t.Context(), ours))
	for range 2 {
		if uid, err := User(r); err != nil || uid != os.Geteuid() {
			t.Errorf("user %d, %v", uid, err)
		}
		theirs.Close()
	}
}

// Every connection is asked about, with TLS and without.
func TestIsOwner(t *testing.T) {
	for _, start := range []func(*httptest.Server){(*httptest.Server).Start, (*httptest.Server).StartTLS} {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte(strconv.FormatBool(IsOwner(r))))
		}))
		server.Config.ConnContext = ConnContext
		start(server)
		ask := func(dial func(network, at string) (net.Conn, error)) string {
			transport := server.Client().Transport.(*http.Transport).Clone()
			transport.DialContext = func(_ context.Context, network, at string) (net.Conn, error) {
				return dial(network, at)
			}
			defer transport.CloseIdleConnections()
			response, err := (&http.Client{Transport: transport}).Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			var text [5]byte
			n, _ := response.Body.Read(text[:])
			return string(text[:n])
		}
		if got := ask(net.Dial); got != "true" {
			t.Errorf("%s: the same user: %s", server.URL, got)
		}
		if !testing.Short() { // it needs root
			if got := ask(dialAs(12345)); got != "false" {
				t.Errorf("%s: another user: %s", server.URL, got)
			}
		}
		server.Close()
	}
	if IsOwner(httptest.NewRequest("GET", "/", nil)) {
		t.Error("a request of no connection is the owner's")
	}
}

func TestIsNamed(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:80": true, "a.localhost.": true, "127.0.0.1:65001": true, "127.1.2.3": true,
		"[::1]:80": true, "::1": true,
		"": false, "example.com": false, "localhost.example.com": false, "127.0.0.1.example.com": false,
		"10.0.0.1": false, "[::]": false,
	} {
		if IsNamed(host) != want {
			t.Errorf("%q: want %t", host, want)
		}
	}
}

// Where the user is the right, it is not for the pages that the user's browser shows.
func TestForOwner(t *testing.T) {
	server := httptest.NewUnstartedServer(
		ForOwner("things", http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("things")) })))
	server.Config.ConnContext = ConnContext
	server.Start()
	defer server.Close()
	ask := func(method, host, header, value string, want int) {
		t.Helper()
		r, err := http.NewRequest(method, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		r.Header.Set(header, value)
		response, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s to %q, %s: %s: %s, want %d", method, host, header, value, response.Status, want)
		}
	}
	for _, method := range []string{"GET", "HEAD", "POST"} {
		ask(method, "localhost", "Accept", "*/*", 200)
		ask(method, "evil.example", "Accept", "*/*", 421)
		ask(method, "localhost", "Sec-Fetch-Site", "none", 200)
		ask(method, "localhost", "Sec-Fetch-Site", "same-origin", 200)
		ask(method, "localhost", "Sec-Fetch-Site", "same-site", 403)
		ask(method, "localhost", "Sec-Fetch-Site", "cross-site", 403)
		ask(method, "localhost", "Origin", "http://evil.example", 403)
		ask(method, "localhost", "Origin", "http://localhost", 200)
	}
	w := httptest.NewRecorder()
	server.Config.Handler.ServeHTTP(w, httptest.NewRequest("GET", "http://localhost/", nil))
	if w.Code != 403 {
		t.Errorf("of no connection: %d", w.Code)
	}
}

// TestUserNamespace: a user without a number in the user namespace of the server is not taken for the
// user who has the number of all these.
func TestUserNamespace(t *testing.T) {
	const inside = "LOOPBACK_TEST_INSIDE"
	if os.Getenv(inside) != "" { // as the server
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		fmt.Println(l.Addr())
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		uid, err := userOf(c)
		fmt.Println(uid, err)
		return
	}
	needRoot(t)
	server := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestUserNamespace$")
	server.Env = append(os.Environ(), inside+"=1")
	server.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}},
	}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal("needs user namespaces: ", err)
	}
	defer server.Wait()
	said := bufio.NewScanner(out)
	if !said.Scan() {
		t.Fatal("the server does not say where it is")
	}
	c, err := dialAs(12345)("tcp4", said.Text())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !said.Scan() || said.Text() != "0 "+ErrUnknown.Error() {
		t.Errorf("a user without a number is %s", said.Text())
	}
}
