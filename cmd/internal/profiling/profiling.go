// Package profiling serves the runtime's profiles (net/http/pprof) to this host.
package profiling

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"time"

	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p/connpool"
)

// maxConns is how many connections may be open: the oldest makes room.
const maxConns = 16

// Start serves profiles on a port of 127.0.0.1 until stop is called, which
// waits until everything has ended. Only the user of this process and root get an
// answer, and only under a name of this host. Port -1 is off: nothing happens. Port 0 is
// a free port; log is called with the address. Other ports than these and 1
// to 65535 are a usage error of package exit.
func Start(port int, log func(string)) (stop func(), err error) {
	if port == -1 {
		return func() {}, nil
	}
	if port < -1 || port > 65535 {
		return nil, exit.Usage(fmt.Errorf("pprof port %d: want 1 to 65535, 0 for any free port, or -1 for off", port))
	}
	// Loopback only, and not for every user of the host: profiles tell file names and
	// what is going on, and cost time.
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("serve profiles: %w", err)
	}

	// Not http.DefaultServeMux, on which any package may have put something.
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)

	server := &http.Server{
		Handler: loopback.ForOwner("profiles", mux), ConnContext: loopback.ConnContext,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(connpool.Listen(l, maxConns)); !errors.Is(err, http.ErrServerClosed) {
			log(fmt.Sprintf("pprof: %v", err))
		}
	}()
	log(fmt.Sprintf("pprof: http://%s/debug/pprof/", l.Addr()))
	return func() {
		server.Close()
		<-done
	}, nil
}
