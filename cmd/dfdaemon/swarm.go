package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/manual"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
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
}

func (o *swarmOptions) flags(flags *pflag.FlagSet) {
	flags.StringVar(&o.listen, "swarm-listen", ":65002", "`addresses` where peers find this daemon, with commas between them; port 0 is any free port")
	flags.StringVar(&o.pieces, "swarm-pieces", ":65003", "`addresses` where peers fetch pieces from this daemon, with commas between them; port 0 is any free port")
	flags.StringVar(&o.bootstrap, "bootstrap", "", "`peers` to start from, with commas between them: HOST, HOST:PORT with the port of --swarm-pieces there (all addresses of a name are asked), or libp2p multiaddrs")
	flags.StringVar(&o.peersFile, "peers-file", "", "`file` with more peers to start from, one on a line; it is read again when it changes")
	flags.BoolVar(&o.mdns, "mdns", true, "find peers on the local network by multicast DNS")
	flags.BoolVar(&o.nat, "nat", false, "have a router map the port of --swarm-listen, and peers with public addresses relay")
	flags.BoolVar(&o.plain, "plain-pieces", false, "move pieces without TLS between this daemon and peers that have this set, too: faster, verified all the same, and to be read by anybody on the way")
	flags.StringVar(&o.mode, "swarm-mode", string(swarm.Full), "`what` to do for peers and local callers: full, seed-only (fetch nothing) or never-serve (serve peers nothing)")
	flags.IntVar(&o.maxPeers, "max-peers", 256, "`connections` with peers above which some are closed")
	flags.IntVar(&o.slots, "upload-slots", 4, "`pieces` of one blob that are sent to peers at once")
	flags.IntVar(&o.uploads, "max-uploads", 64, "`pieces` that are sent to peers at once")
	flags.IntVar(&o.requests, "max-requests", 8, "`pieces` of one blob that are fetched from peers at once")
	flags.Var(&o.upRate, "upload-rate", "`bytes` a second that are sent to peers, such as 50MiB; 0 is no limit")
	flags.Var(&o.downRate, "download-rate", "`bytes` a second that are fetched from peers; 0 is no limit")
	o.memory = 64 << 20
	flags.Var(&o.memory, "piece-memory", "`bytes` of pieces in memory, for sending and for fetching each")
	flags.Lookup("piece-memory").DefValue = "64MiB"
	flags.DurationVar(&o.lookup, "lookup-timeout", 3*time.Second, "how long peers are asked for what is not here")
	flags.DurationVar(&o.stall, "stall-timeout", 10*time.Second, "how long a peer may send nothing before it is given up")
	flags.DurationVar(&o.remember, "remember-deletes", 30*24*time.Hour, "how long deletes are remembered for peers that are away")
	flags.DurationVar(&o.keepPieces, "keep-partial", 24*time.Hour, "how long what has arrived of a file is kept that nobody fetches any more")
	flags.StringVar(&o.metrics, "metrics", "off", "`address` at which to serve metrics for Prometheus, such as 127.0.0.1:65004; off is none")
}

// check finds what is wrong with the flags.
func (o *swarmOptions) check() error {
	switch swarm.Mode(o.mode) {
	case swarm.Full, swarm.SeedOnly, swarm.NeverServe:
	default:
		return fmt.Errorf("--swarm-mode %q: use %s, %s or %s", o.mode, swarm.Full, swarm.SeedOnly, swarm.NeverServe)
	}
	for name, n := range map[string]int{"max-peers": o.maxPeers, "upload-slots": o.slots, "max-uploads": o.uploads, "max-requests": o.requests} {
		if n <= 0 {
			return fmt.Errorf("--%s %d: want a number above zero", name, n)
		}
	}
	for name, d := range map[string]time.Duration{"lookup-timeout": o.lookup, "stall-timeout": o.stall, "remember-deletes": o.remember, "keep-partial": o.keepPieces} {
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
	}
	return nil
}

// split splits a list with commas.
func split(list string) []string {
	return slices.DeleteFunc(strings.Split(strings.ReplaceAll(list, " ", ""), ","), func(s string) bool { return s == "" })
}

// keyFile returns the swarm's key file, and whether somebody has named it.
func (o *options) keyFile(cmd *cobra.Command) (name string, named bool, err error) {
	if named = cmd.Flags().Changed("swarm-key"); !named {
		return paths.SwarmKey(), false, nil
	}
	name, err = filepath.Abs(o.swarmKey)
	return name, true, err
}

// readKey reads the swarm's key. found is false where there is to be no swarm.
func (o *options) readKey(cmd *cobra.Command) (key discovery.Key, found bool, err error) {
	if o.swarmKey == "off" {
		return key, false, nil
	}
	name, named, err := o.keyFile(cmd)
	if err != nil {
		return key, false, err
	}
	key, err = discovery.ReadKeyFile(name)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return key, false, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = exit.Usage(fmt.Errorf("%w: make one with 'dfdaemon swarm key new %s', or copy that of the other daemons", err, name))
	}
	return key, err == nil, err
}

// joinSwarm makes the store part of the swarm.
func (d *daemon) joinSwarm(store *pieces.Store, key discovery.Key) (*swarm.Swarm, error) {
	o := &d.swarm
	identity, err := discovery.LoadIdentity(filepath.Join(d.workHome, "peer.key"))
	if err != nil {
		return nil, err
	}
	resolve, err := swarm.NewResolver(identity, key.Secret(), o.plain)
	if err != nil {
		return nil, err
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
		MaxPeers:  o.maxPeers,
		StateFile: filepath.Join(d.workHome, "peers.json"),
		Log:       d.log,
	})
	if err != nil {
		return nil, err
	}
	s, err := swarm.New(store, network, swarm.Options{
		Identity:        identity,
		Secret:          key.Secret(),
		Listen:          split(o.pieces),
		Plain:           o.plain,
		Mode:            swarm.Mode(o.mode),
		Version:         build.Get().Version,
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
		ParseManifest:   blobstore.ParseManifest,
		Log:             d.log,
		Metrics:         d.metrics,
	})
	if err != nil {
		network.Close()
		return nil, err
	}
	return s, nil
}

// serveMetrics serves what the daemon counts, where that is asked for.
func (d *daemon) serveMetrics() error {
	if d.swarm.metrics == "off" {
		return nil
	}
	l, err := net.Listen("tcp", d.swarm.metrics)
	if err != nil {
		return fmt.Errorf("--metrics: %w: choose another address, or off", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug)}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(l)
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

func (o *options) newKey(cmd *cobra.Command, args []string) error {
	if err := o.load(cmd); err != nil {
		return err
	}
	key := discovery.NewKey()
	if len(args) > 0 && args[0] == "-" {
		_, err := cmd.OutOrStdout().Write(key.File())
		return err
	}
	name, _, err := o.keyFile(cmd)
	if len(args) > 0 {
		name = args[0]
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := discovery.WriteKeyFile(name, key); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "wrote %s: copy it to the other hosts of the swarm\n", name)
	return nil
}
