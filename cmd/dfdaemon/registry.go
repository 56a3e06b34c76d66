package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
)

const (
	// headerTimeout bounds the time in which a client has to send a request's
	// header, and make a TLS connection.
	headerTimeout = 10 * time.Second
	// idleTimeout is how long a connection without a request is kept.
	idleTimeout = 2 * time.Minute
	// maxHeader bounds a request's header, in bytes.
	maxHeader = 64 << 10
	// maxIdleUpload is how long an unfinished upload is kept at most that no request uses.
	maxIdleUpload = 15 * time.Minute
	// maxStreams is the number of requests at once on one connection of HTTP/2.
	maxStreams = 250
	// maxRequests is the number of requests at once, and maxIdle that of connections without one.
	maxRequests, maxIdle = 512, 1024
)

// share is an eighth of the descriptors, where the process can have few. A request takes three at most,
// a connection and an upload one each, so that the registry has three quarters, and what
// is left is for the socket and for peers.
func share(n int) int { return connpool.Share(n, 8) }

// registryOptions are the values of the flags of the registry.
type registryOptions struct {
	address       string
	cert, key     string
	htpasswd      string
	read, write   string
	insecure      bool
	uploadTimeout time.Duration
}

func (o *registryOptions) flags(flags *pflag.FlagSet) {
	flags.StringVar(&o.address, "registry", "127.0.0.1:65001", "`address` at which to serve the content as an OCI "+
		"registry; port 0 is any free port, which is printed; off is none")
	flags.StringVar(&o.cert, "registry-cert", "", "`file` of the registry's TLS certificate, with the chain, in PEM")
	flags.StringVar(&o.key, "registry-key", "", "`file` of the key of --registry-cert")
	flags.StringVar(&o.htpasswd, "registry-htpasswd", "",
		"`file` of the registry's users and their passwords, as htpasswd -B writes it")
	flags.StringVar(&o.read, "registry-read", "", "`who` may read: owner (the user of this dfdaemon on this host, "+
		"and root), anyone, users (those of --registry-htpasswd), or names with commas between them (default users "+
		"with --registry-htpasswd, else owner)")
	flags.StringVar(&o.write, "registry-write", "", "`who` may write and read, in the words of --registry-read "+
		"(default users with --registry-htpasswd, else owner)")
	flags.BoolVar(&o.insecure, "registry-insecure", false,
		"allow a registry without TLS at an address that other hosts can reach")
	flags.DurationVar(&o.uploadTimeout, "registry-upload-timeout", time.Hour, "how long what a client was told is "+
		"there is kept for its manifest, and an unfinished upload that no request uses at most: 15 minutes where "+
		"that is less, and one without a byte 2")
}

// registryServer is a registry on its way: prepared, then with its files read,
// then listening.
type registryServer struct {
	registryOptions
	rights   registry.AccessOptions
	network  string // tcp, or tcp4 to keep Go from making [::] of 0.0.0.0
	at       string // what to listen at
	chosen   bool   // whether somebody has said where
	access   *registry.Access
	tls      *tls.Config // nil without
	listener net.Listener
	handler  *registry.Handler
	server   *http.Server
	cancel   context.CancelFunc // ends requests that run
	scratch  string             // directory of what waits for clients
}

// prepare finds what is wrong with the flags alone. It returns nil where there
// is to be no registry.
func (o registryOptions) prepare(cmd *cobra.Command) (*registryServer, error) {
	if o.address == "off" {
		return nil, nil
	}
	s := &registryServer{registryOptions: o, chosen: cmd.Flags().Changed("registry")}
	if err := s.check(); err != nil {
		return nil, exit.FlagError(cmd, err)
	}
	local, err := s.resolve(cmd.Context())
	if err != nil {
		return nil, err
	}
	if !local {
		if err := s.checkExposed(); err != nil {
			return nil, exit.FlagError(cmd, err)
		}
	}
	return s, nil
}

// check makes the values of the flags complete.
func (s *registryServer) check() error {
	if s.uploadTimeout <= 0 {
		return fmt.Errorf("--registry-upload-timeout %s: want a duration above zero, such as 1h", s.uploadTimeout)
	}
	if (s.cert == "") != (s.key == "") {
		return errors.New("--registry-cert and --registry-key belong together: give both, or none of them")
	}
	for _, path := range []*string{&s.cert, &s.key, &s.htpasswd} {
		if *path == "" {
			continue
		}
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	fallback := "owner"
	if s.htpasswd != "" {
		fallback = "users"
	}
	s.rights.Htpasswd = s.htpasswd
	for _, right := range []struct {
		flag, value string
		who         *registry.Who
	}{
		{"--registry-read", s.read, &s.rights.Read},
		{"--registry-write", s.write, &s.rights.Write},
	} {
		value := cmp.Or(right.value, fallback)
		var err error
		if *right.who, err = registry.ParseWho(value); err != nil {
			return fmt.Errorf("%s: %w", right.flag, err)
		}
		if s.htpasswd == "" && right.who.NeedsPassword() {
			return fmt.Errorf("%s %s needs passwords: give --registry-htpasswd, too", right.flag, value)
		}
		if s.htpasswd != "" && value == registry.Owner.String() {
			return fmt.Errorf("%s owner goes without --registry-htpasswd: give %s the names of users, or leave the "+
				"file out", right.flag, right.flag)
		}
	}
	if s.rights.Write.Anyone() && !s.rights.Read.Anyone() {
		return errors.New("who may write may read, too: with --registry-write anyone, give --registry-read anyone")
	}
	return nil
}

// resolve finds out what to listen at. It returns whether none but this host
// can reach that.
func (s *registryServer) resolve(ctx context.Context) (local bool, err error) {
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		return false, exit.Usage(fmt.Errorf(
			"--registry %q: want HOST:PORT, such as 127.0.0.1:65001, or off", s.address))
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return false, exit.Usage(fmt.Errorf("--registry %q: the port is no number from 0 to 65535", s.address))
	}
	s.network = "tcp"
	if host == "" {
		s.at = s.address
		return false, nil
	}
	s.rights.Host = host
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return false, fmt.Errorf("--registry %s: %w", s.address, err)
	}
	local = !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return !a.Unmap().IsLoopback() })
	// Of several addresses one is listened at, as Go does it: that which comes
	// first, of IPv4 where there is one. It is one of those that were looked at.
	ip := addresses[0]
	if i := slices.IndexFunc(addresses, func(a netip.Addr) bool { return a.Unmap().Is4() }); i >= 0 {
		ip, s.network = addresses[i].Unmap(), "tcp4"
	}
	s.at = net.JoinHostPort(ip.String(), port)
	return local, nil
}

// checkExposed refuses what would open the content to other hosts without
// somebody having said so.
func (s *registryServer) checkExposed() error {
	var missing []string
	if s.cert == "" && !s.insecure {
		missing = append(missing,
			"--registry-cert and --registry-key, or --registry-insecure to let content and passwords pass in the clear")
	}
	var open []string
	if s.htpasswd == "" && s.read == "" {
		open = append(open, "--registry-read anyone")
	}
	if s.htpasswd == "" && s.write == "" {
		open = append(open, "--registry-write anyone")
	}
	if len(open) > 0 {
		missing = append(missing, "--registry-htpasswd, or "+strings.Join(open, " and ")+" to ask for no password")
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("--registry %s can be reached from other hosts, so it needs %s", s.address,
		strings.Join(missing, "; and "))
}

// readFiles reads the files that the flags name.
func (s *registryServer) readFiles(log *slog.Logger) error {
	s.rights.Log = log
	var err error
	if s.access, err = registry.NewAccess(s.rights); err != nil {
		return exit.Usage(fmt.Errorf("--registry-htpasswd: %w", err))
	}
	if s.cert == "" {
		return nil
	}
	certificate, err := readCertificate(s.cert, s.key, log)
	if err != nil {
		return exit.Usage(fmt.Errorf("--registry-cert and --registry-key: %w", err))
	}
	s.tls = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate.get}
	return nil
}

// listen opens the registry of store, which can serve then. The caller closes
// it. It returns false where it has to be done without: nobody has said where
// to listen, and the default can't be had, of which warn is told.
func (s *registryServer) listen(store *blobstore.Store, log *slog.Logger, warn func(string)) (bool, error) {
	var err error
	if s.listener, err = net.Listen(s.network, s.at); err != nil {
		const advice = "choose another address with --registry, or --registry off"
		switch {
		case !s.chosen:
			warn(fmt.Sprintf("going on without a registry: %v: %s", err, advice))
			return false, nil
		case errors.Is(err, syscall.EADDRINUSE):
			return false, fmt.Errorf("--registry %s: %w: another process listens there (%w): stop that one, or %s",
				s.address, p2p.ErrUnavailable, err, advice)
		}
		return false, fmt.Errorf("--registry %s: %w: %s", s.address, err, advice)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.handler = registry.New(store, registry.Options{
		Log: log, UploadTimeout: min(s.uploadTimeout, maxIdleUpload), Scratch: s.scratch,
		MaxUploads: share(1000), MaxRequests: share(maxRequests),
	})
	connections := registry.NewConnections(share(maxIdle))
	s.server = &http.Server{
		Handler:           s.access.Wrap(s.handler),
		TLSConfig:         s.tls,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return connections.Context(loopback.ConnContext(ctx, c), c)
		},
		ConnState: connections.State,
		HTTP2:     &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:  slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return true, nil
}

// metrics are those of the registry.
func (s *registryServer) metrics() []prometheus.Collector {
	return []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "dfcache_registry_uploads", Help: "Uploads that are unfinished."}, func() float64 {
			count, _ := s.handler.Uploads()
			return float64(count)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "dfcache_registry_upload_bytes", Help: "Bytes that unfinished uploads have."}, func() float64 {
			_, received := s.handler.Uploads()
			return float64(received)
		}),
	}
}

// url returns where the registry is, or "off" where there is none.
func (s *registryServer) url() string {
	if s == nil {
		return "off"
	}
	scheme := "http"
	if s.tls != nil {
		scheme = "https"
	}
	return scheme + "://" + s.listener.Addr().String()
}

// door says where the registry is and who may come in, for people; "no registry" where there is none.
func (s *registryServer) door() string {
	switch {
	case s == nil:
		return "no registry"
	case s.htpasswd != "":
		return "registry " + s.url() + " with passwords"
	case s.rights.Read.Anyone():
		return "registry " + s.url() + " for anyone"
	}
	return "registry " + s.url() + " for this user only"
}

// serve serves until the registry is shut down; it then returns nil.
func (s *registryServer) serve() error {
	var err error
	if s.tls != nil {
		err = s.server.ServeTLS(s.listener, "", "") // the certificate is in the configuration
	} else {
		err = s.server.Serve(s.listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// shutdown takes no more requests, and lets those that run end. When ctx ends
// first, it cuts them off, and returns the cause of ctx.
func (s *registryServer) shutdown(ctx context.Context) error {
	err := s.server.Shutdown(ctx)
	s.cancel()
	if err == nil {
		return nil
	}
	s.server.Close()
	return context.Cause(ctx)
}

// close ends what is left. It is not called while requests run that may end.
func (s *registryServer) close() {
	s.cancel()
	s.server.Close()
	s.listener.Close() // done already where it served
	s.handler.Close()  // never fails
}
