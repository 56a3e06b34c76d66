package profiling

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Somebody's page on the default mux.
func init() { http.HandleFunc("/secret", func(http.ResponseWriter, *http.Request) {}) }

func TestStart(t *testing.T) {
	var line string
	stop, err := Start(0, func(s string) { line = s })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	address, ok := strings.CutPrefix(line, "pprof: ")
	if !ok {
		t.Fatalf("logged %q", line)
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() != "127.0.0.1" || u.Path != "/debug/pprof/" {
		t.Fatalf("%s, %v", address, err)
	}

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		response, err := client.Get("http://" + u.Host + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(body)
	}
	if code, body := get("/debug/pprof/goroutine?debug=1"); code != 200 ||
		!strings.Contains(body, "goroutine profile") {
		t.Errorf("goroutines: %d %s", code, body)
	}
	if code, _ := get("/secret"); code != 404 {
		t.Errorf("the default mux is served: %d", code)
	}

	// Not on other addresses of this host.
	if conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.2", u.Port())); err == nil {
		conn.Close()
		t.Error("listens on more than 127.0.0.1")
	}

	// The port is taken, and free again after stop.
	port, _ := strconv.Atoi(u.Port())
	if _, err := Start(port, func(string) {}); err == nil {
		t.Error("a port in use is no error")
	}
	stop()
	again, err := Start(port, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// Connections that ask for nothing make room for others, the oldest first.
func TestConnections(t *testing.T) {
	var line string
	stop, err := Start(0, func(s string) { line = s })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	u, err := url.Parse(strings.TrimPrefix(line, "pprof: "))
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for range maxConns + 1 {
		c, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	closed := func(c net.Conn, within time.Duration) bool {
		c.SetReadDeadline(time.Now().Add(within))
		_, err := c.Read(make([]byte, 1))
		return !errors.Is(err, os.ErrDeadlineExceeded)
	}
	if !closed(conns[0], 5*time.Second) { // a header may take 10
		t.Errorf("%d connections are open", len(conns))
	}
	if closed(conns[1], time.Millisecond) {
		t.Error("one more is closed than has to be")
	}
}

func TestOff(t *testing.T) {
	stop, err := Start(-1, func(s string) { t.Errorf("logged %q", s) })
	if err != nil {
		t.Fatal(err)
	}
	stop()
}

func TestInvalid(t *testing.T) {
	for _, port := range []int{-2, 65536} {
		if _, err := Start(port, func(string) {}); exit.Code(err) != exit.Invalid {
			t.Errorf("%d: %v", port, err)
		}
	}
}
