package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap/zapcore"

	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/cmd/internal/stdio"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/dirs"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/swarm"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
	"github.com/dfcache/dfcache/p2p/swarm/schedule"
)

// swarmOptions are the values of the flags of the swarm.
type swarmOptions struct {
	listen     string
	pieces     string
	bootstrap  string
	peersFile  string
	mdns       bool
	nat        bool
	plain      bool
	mode       string
	maxPeers   int
	slots      int
	uploads    int
	requests   int
	upRate     size
	downRate   size
	memory     size
	lookup     time.Duration
	stall      time.Duration
	remember   time.Duration
	keepPieces time.Duration
	metrics    string
	metricsFor string
}

func (o *swarmOptions) flags(flags *pflag.FlagSet) {
	flags.StringVar(&o.listen, "swarm-listen", ":65002",
		"`addresses` where peers find this daemon, with commas between them; port 0 is any free port")
	flags.StringVar(&o.pieces, "swarm-pieces", ":65003",
		"`addresses` where peers fetch pieces from this daemon, with commas between them; port 0 is any free port")
	flags.StringVar(&o.bootstrap, "bootstrap", "", "`peers` to start from, with commas between them: HOST, HOST:PORT "+
		"with the port of --swarm-pieces there (all addresses of a name are asked), or libp2p multiaddrs")
	flags.StringVar(&o.peersFile, "peers-file", "",
		"`file` with more peers to start from, one on a line; it is read again when it changes")
	flags.BoolVar(&o.mdns, "mdns", true, "find peers on the local network by multicast DNS")
	flags.BoolVar(&o.nat, "nat", false, "for a host behind a router: have it map the port of --swarm-listen, punch "+
		"holes through it, and believe that it lets nobody in")
	flags.BoolVar(&o.plain, "plain-pieces", false, "move pieces without TLS between this daemon and peers that have "+
		"this set, too: faster, verified all the same, and to be read by anybody on the way")
	flags.StringVar(&o.mode, "swarm-mode", string(swarm.Full), "`what` to do for peers and local callers: full, "+
		"seed-only (fetch nothing) or never-serve (serve peers nothing)")
	flags.IntVar(&o.maxPeers, "max-peers", 256, "`connections` with peers above which some are closed")
	flags.IntVar(&o.slots, "upload-slots", schedule.Slots, "`pieces` of one blob that are sent to peers at once")
	flags.IntVar(&o.uploads, "max-uploads", 64, "`pieces` that are sent to peers at once")
	flags.IntVar(&o.requests, "max-requests", schedule.Requests,
		"`pieces` of one blob that are fetched from peers at once")
	flags.Var(&o.upRate, "upload-rate", "`bytes` a second that are sent to peers, such as 50MiB; 0 is no limit")
	flags.Var(&o.downRate, "download-rate", "`bytes` a second that are fetched from peers; 0 is no limit")
	o.memory = 64 << 20
	flags.Var(&o.memory, "piece-memory", "`bytes` of pieces in memory, for sending and for fetching each")
	flags.Lookup("piece-memory").DefValue = "64MiB"
	flags.DurationVar(&o.lookup, "lookup-timeout", 3*time.Second,
		"how long peers, or Dragonfly, are asked for what is not here")
	flags.DurationVar(&o.stall, "stall-timeout", 10*time.Second,
		"how long a peer may send nothing, or next to nothing, before it is asked anew")
	flags.DurationVar(&o.remember, "remember-deletes", 30*24*time.Hour,
		"how long deletes are remembered for peers that are away")
	flags.DurationVar(&o.keepPieces, "keep-partial", 24*time.Hour,
		"how long what has arrived of a file is kept that nobody fetches any more")
	flags.StringVar(&o.metrics, "metrics", "off",
		"`address` at which to serve metrics for Prometheus, such as 127.0.0.1:65004; off is none")
	flags.StringVar(&o.metricsFor, "metrics-read", "owner",
		"`who` may read the metrics: owner (the user of this dfdaemon on this host, and root) or anyone")
}

// check finds what is wrong with the flags.
func (o *swarmOptions) check() error {
	switch swarm.Mode(o.mode) {
	case swarm.Full, swarm.SeedOnly, swarm.NeverServe:
	default:
		return fmt.Errorf("--swarm-mode %q: use %s, %s or %s", o.mode, swarm.Full, swarm.SeedOnly, swarm.NeverServe)
	}
	for name, n := range map[string]int{
		"max-peers": o.maxPeers, "upload-slots": o.slots, "max-uploads": o.uploads, "max-requests": o.requests} {
		if n <= 0 {
			return fmt.Errorf("--%s %d: want a number above zero", name, n)
		}
	}
	for name, d := range map[string]time.Duration{"lookup-timeout": o.lookup, "stall-timeout": o.stall,
		"remember-deletes": o.remember, "keep-partial": o.keepPieces} {
		if d <= 0 {
			return fmt.Errorf("--%s %s: want a duration above zero, such as 10s", name, d)
		}
	}
	if o.memory <= 0 {
		return fmt.Errorf("--piece-memory %d: want a size above zero, such as 64MiB", o.memory)
	}
	for name, list := range map[string]string{"swarm-listen": o.listen, "swarm-pieces": o.pieces} {
		if len(split(list)) == 0 {
			return fmt.Errorf("--%s is empty: want an address, such as :65002", name)
		}
		for _, address := range split(list) {
			if !isAddress(address, name == "swarm-listen") {
				return fmt.Errorf("--%s %q: want IP:PORT, or :PORT for all addresses of this host", name, address)
			}
		}
	}
	if o.metrics != "off" && !isAddress(o.metrics, false) {
		return fmt.Errorf("--metrics %q: want HOST:PORT, such as 127.0.0.1:65004, or off", o.metrics)
	}
	if o.metricsFor != registry.Owner.String() && o.metricsFor != registry.Anyone.String() {
		return fmt.Errorf("--metrics-read %q: use owner or anyone", o.metricsFor)
	}
	return nil
}

// isAddress reports whether one can listen at a text: HOST:PORT, or :PORT. With
// numeric the host is no name.
func isAddress(text string, numeric bool) bool {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return false
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return false
	}
	_, err = netip.ParseAddr(host)
	return !numeric || host == "" || err == nil
}

// split splits a list with commas.
func split(list string) []string {
	return slices.DeleteFunc(strings.Split(strings.ReplaceAll(list, " ", ""), ","),
		func(s string) bool { return s == "" })
}

// keyFile returns the swarm's key file, and whether somebody has named it.
func (o *options) keyFile(cmd *cobra.Command) (name string, named bool, err error) {
	if named = cmd.Flags().Changed("swarm-key"); !named {
		return paths.SwarmKey(), false, nil
	}
	if o.swarmKey == "" {
		return "", true, exit.FlagError(cmd, errors.New("--swarm-key is empty: name a file, or off"))
	}
	name, err = filepath.Abs(o.swarmKey)
	return name, true, err
}

// readKey reads the swarm's key. found is false where there is to be no swarm.
func (o *options) readKey(cmd *cobra.Command, warn func(string)) (key discovery.Key, found bool, err error) {
	if o.swarmKey == "off" {
		return key, false, nil
	}
	name, named, err := o.keyFile(cmd)
	if err != nil {
		return key, false, err
	}
	key, err = discovery.ReadKeyFile(name)
	switch {
	case err == nil:
		return key, true, nil
	case !errors.Is(err, fs.ErrNotExist):
		return key, false, exit.Usage(err)
	case named:
		return key, false, exit.Usage(fmt.Errorf(
			"%w: make one with 'dfdaemon swarm key new %s', or copy that of the other daemons", err, name))
	case o.swarm.bootstrap != "" || o.swarm.peersFile != "":
		warn(fmt.Sprintf("going on without a swarm, and without --bootstrap and --peers-file: there is no key in %s: "+
			"make one with 'dfdaemon swarm key new', or copy that of the other daemons", name))
	}
	return key, false, nil
}

// joinSwarm adds the swarm to the sources of an engine, and logs where peers find it. id is who the
// daemon is there.
func (d *daemon) joinSwarm(f *front.Engine, key discovery.Key) (id string, err error) {
	o := &d.swarm
	logLibraries(d.log.Handler())
	if err := dirs.Make(d.workHome, 0o750); err != nil {
		return "", err
	}
	identity, err := discovery.LoadIdentity(filepath.Join(d.workHome, "peer.key"))
	if err != nil {
		return "", err
	}
	instance := swarm.NewInstance()
	resolve, err := swarm.NewResolver(identity, key.Secret(), o.plain, instance)
	if err != nil {
		return "", err
	}
	network, err := discovery.New(discovery.Options{
		Identity:  identity,
		Key:       key,
		Listen:    split(o.listen),
		Bootstrap: split(o.bootstrap),
		PeersFile: o.peersFile,
		Resolve:   resolve,
		MDNS:      o.mdns,
		NAT:       o.nat,
		NoRelay:   swarm.Mode(o.mode) == swarm.NeverServe,
		MaxPeers:  o.maxPeers,
		StateFile: filepath.Join(d.workHome, "peers.json"),
		Log:       d.log,
	})
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return "", listenError("swarm-listen", err)
	}
	if err != nil { // the addresses of this host have passed check
		return "", exit.Usage(fmt.Errorf("--bootstrap and --peers-file: %w", err))
	}
	s, err := swarm.New(f, network, swarm.Options{
		Identity:        identity,
		Secret:          key.Secret(),
		Listen:          split(o.pieces),
		Plain:           o.plain,
		Mode:            swarm.Mode(o.mode),
		Version:         build.Get().Version,
		Instance:        instance,
		Now:             now,
		LookupTimeout:   o.lookup,
		StallTimeout:    o.stall,
		UploadRate:      int64(o.upRate),
		DownloadRate:    int64(o.downRate),
		UploadSlots:     o.slots,
		MaxUploads:      o.uploads,
		MaxRequests:     o.requests,
		Memory:          int64(o.memory),
		RememberDeletes: o.remember,
		KeepPartial:     o.keepPieces,
		Log:             d.log,
		Metrics:         d.metrics,
	})
	if err != nil {
		network.Close()
		if _, ok := errors.AsType[*net.OpError](err); ok {
			err = listenError("swarm-pieces", err)
		}
		return "", err
	}
	self := network.Addresses(network.Self())
	at := make([]string, 0, len(self.Addrs))
	for _, a := range self.Addrs {
		at = append(at, fmt.Sprintf("%s/p2p/%s", a, self.ID))
	}
	d.log.Info("swarm", "peer", s.ID(), "mode", o.mode, "at", at, "pieces", s.Addresses())
	return s.ID(), nil
}

// listenError is that of a flag with an address where one can't listen.
func listenError(flag string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		err = fmt.Errorf("%w: another process listens there (%w): stop that one", p2p.ErrUnavailable, err)
	}
	return fmt.Errorf("--%s: %w, or choose another address", flag, err)
}

// logLibraries has what the libraries of the swarm would print on stderr logged
// as debug: mostly it is peers that come and go.
func logLibraries(h slog.Handler) {
	gologshim.SetDefaultHandler(asDebug{h})
	// The others have zap below, of which only names and messages are wanted.
	text := zapcore.NewConsoleEncoder(zapcore.EncoderConfig{
		NameKey: "logger", MessageKey: "message", ConsoleSeparator: ": "})
	out := slog.NewLogLogger(h, slog.LevelDebug).Writer()
	golog.SetPrimaryCore(zapcore.NewCore(text, zapcore.AddSync(out), zapcore.WarnLevel))
}

// asDebug logs warnings and errors as debug, and nothing else.
type asDebug struct{ slog.Handler }

func (h asDebug) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && h.Handler.Enabled(ctx, slog.LevelDebug)
}

func (h asDebug) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}

func (h asDebug) WithAttrs(attrs []slog.Attr) slog.Handler {
	return asDebug{h.Handler.WithAttrs(attrs)}
}
func (h asDebug) WithGroup(name string) slog.Handler { return asDebug{h.Handler.WithGroup(name)} }

// maxMetrics is how many connections may be open at the address for metrics, of which those of the user who
// has most make room, and how many answers may be under way.
const maxMetrics = 64

// serveMetrics serves what the daemon counts, where that is asked for.
func (d *daemon) serveMetrics() error {
	if d.swarm.metrics == "off" {
		return nil
	}
	l, err := net.Listen("tcp", d.swarm.metrics)
	if err != nil {
		return listenError("metrics", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{MaxRequestsInFlight: maxMetrics}))
	var handler http.Handler = mux
	if d.swarm.metricsFor != registry.Anyone.String() {
		if tcp, ok := l.Addr().(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() {
			l.Close()
			return exit.Usage(fmt.Errorf(
				"--metrics %s can be reached from other hosts, so it needs --metrics-read anyone", d.swarm.metrics))
		}
		handler = loopback.ForOwner("metrics", mux)
	}
	server := &http.Server{
		Handler: handler, ConnContext: loopback.ConnContext,
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug), MaxHeaderBytes: 16 << 10,
		ReadHeaderTimeout: headerTimeout, WriteTimeout: time.Minute, IdleTimeout: idleTimeout,
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(connpool.Listen(l, share(maxMetrics)))
	}()
	d.onClose(func() {
		server.Close()
		<-served
	})
	d.log.Info("metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return nil
}

func newSwarm(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "swarm",
		Short: "Set up the swarm of daemons that trade pieces",
		Long: `
A swarm is all daemons that have the same key. Without the key nobody can see them,
fetch from them, announce anything to them or delete anything.

Make a key on one host with 'dfdaemon swarm key new', copy the file to the others,
and start their daemons. On one local network they find each other; else give one or
more of them with --bootstrap, on every host.

` + manual.ExitStatus("dfdaemon", exit.Invalid),
		Args: exit.NoArgs,
		RunE: noCommand,
	}
	key := &cobra.Command{
		Use:   "key",
		Short: "Make the key of a swarm",
		Long: `
The key of a swarm is a file that all its daemons have: --swarm-key, by default
/etc/dragonfly/swarm.key for root, else dragonfly/swarm.key in the XDG configuration
directory. Nobody but the daemon's user may be able to read it.

` + manual.ExitStatus("dfdaemon", exit.Invalid),
		Args: exit.NoArgs,
		RunE: noCommand,
	}
	key.AddCommand(&cobra.Command{
		Use:   "new [FILE]",
		Short: "Make a new key",
		Long: `
The "new" command makes the key of a new swarm and writes it to FILE, by default
that of --swarm-key. It never replaces a file. "-" is standard output.

` + manual.ExitStatus("dfdaemon", exit.Invalid, exit.OutputExists),
		Example: `  dfdaemon swarm key new
  dfdaemon swarm key new - | ssh host 'umask 077; cat > /etc/dragonfly/swarm.key'`,
		Args: exit.Args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return o.newKey(cmd, args) },
	})
	cmd.AddCommand(key)
	return cmd
}

// noCommand is what a command does that only has others.
func noCommand(cmd *cobra.Command, _ []string) error {
	return exit.FlagError(cmd, fmt.Errorf("the command is missing: %s is followed by one", cmd.CommandPath()))
}

func (o *options) newKey(cmd *cobra.Command, args []string) error {
	if err := o.load(cmd); err != nil {
		return err
	}
	key := discovery.NewKey()
	var name string
	switch {
	case len(args) > 0 && args[0] == "-":
		if stdio.IsClosed(os.Stdout) {
			return exit.Usage(errors.New("standard output is closed, or /dev/null that is open for reading, " +
				"too: there is nowhere to write the key to"))
		}
		_, err := cmd.OutOrStdout().Write(key.File())
		return err
	case len(args) > 0:
		name = args[0]
	case o.swarmKey == "off":
		return exit.FlagError(cmd, errors.New("--swarm-key is off: name the FILE to write"))
	default:
		var err error
		if name, _, err = o.keyFile(cmd); err != nil {
			return err
		}
	}
	if err := dirs.Make(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	err := discovery.WriteKeyFile(name, key)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: a key is never replaced: name another file, or move this one away", err)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "wrote %s: copy it to the other hosts of the swarm\n", name)
	return err
}
