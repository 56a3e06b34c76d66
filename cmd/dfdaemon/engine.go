package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly"
	"github.com/dfcache/dfcache/p2p/dragonfly/cluster"
	"github.com/dfcache/dfcache/p2p/dragonfly/persistent"
	"github.com/dfcache/dfcache/p2p/dragonfly/whole"
	"github.com/dfcache/dfcache/p2p/front"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
)

// What --engine can list.
const (
	engineOwn       = "own"
	engineDragonfly = "dragonfly"
	engineCluster   = "dragonfly-cluster"
	engineV2        = "dragonfly-v2"
)

// engineOptions are the values of the flags that say what the network is.
type engineOptions struct {
	sources string // with commas between them
	own     bool   // whether the swarm is one of them
	other   string // the Dragonfly that is one of them, or ""
	socket  string
	timeout time.Duration

	schedulers   string
	advertise    string
	peerListen   string
	uploadListen string
}

// parse reads which sources there are.
func (o *engineOptions) parse() error {
	o.own, o.other = false, ""
	for _, name := range split(o.sources) {
		switch name {
		case engineOwn:
			if o.own {
				return fmt.Errorf("--engine %q: own is there twice", o.sources)
			}
			o.own = true
		case engineDragonfly, engineCluster, engineV2:
			if o.other != "" {
				return fmt.Errorf("--engine %q: %s and %s are both Dragonflies: a daemon has one at most", o.sources,
					o.other, name)
			}
			o.other = name
		default:
			return fmt.Errorf(
				"--engine %q: use %s, %s, %s or %s, or %s and one of the others with a comma between them",
				name, engineOwn, engineDragonfly, engineCluster, engineV2, engineOwn)
		}
	}
	if !o.own && o.other == "" {
		return errors.New("--engine: name a source, such as own")
	}
	return nil
}

func (o *engineOptions) flags(flags *pflag.FlagSet) {
	flags.StringVar(&o.sources, "engine", engineOwn, "`where` to get what is not here; own and one of the others, "+
		"with a comma between them, are asked in that order: own is the swarm of dfdaemons, dragonfly a Dragonfly "+
		"whose dfdaemon runs on this host, dragonfly-cluster the Dragonfly cluster of which this daemon is a peer "+
		"itself, dragonfly-v2 a Dragonfly of the API v2, whose dfdaemon in Rust runs on this host")
	flags.StringVar(&o.socket, "dragonfly-daemon", "", "unix `socket` of Dragonfly's dfdaemon, with --engine "+
		"dragonfly and dragonfly-v2 (default "+dragonfly.DefaultSocket+"; "+persistent.DefaultSocket+
		" with dragonfly-v2)")
	flags.DurationVar(&o.timeout, "dragonfly-timeout", dragonfly.DefaultTimeout, "how long Dragonfly may take to "+
		"import or export a file, and with --engine dragonfly-cluster how long it may take to fetch one")
	flags.StringVar(&o.schedulers, "dragonfly-schedulers", "", "`addresses` of all schedulers of the Dragonfly "+
		"cluster, HOST:PORT with commas between them, as Dragonfly's daemons have them, with --engine "+
		"dragonfly-cluster; with dragonfly-v2 one is enough")
	flags.StringVar(&o.advertise, "dragonfly-advertise", "", "`IP` by which the hosts of the Dragonfly cluster reach "+
		"this one (default the one from which the first scheduler is reached)")
	flags.StringVar(&o.peerListen, "dragonfly-peer-listen", cluster.DefaultPeerListen, "`address` where the daemons "+
		"of the Dragonfly cluster ask this one for pieces, without TLS; port 0 is any free port")
	flags.StringVar(&o.uploadListen, "dragonfly-upload-listen", cluster.DefaultUploadListen,
		"`address` where they fetch them; port 0 is any free port")
}

// dragonflyData is where Dragonfly's dfdaemon keeps its cache, if it is not told otherwise.
const dragonflyData = "/var/lib/dragonfly"

// checkEngine finds what is wrong with the flags of the engine, and with others
// beside them.
func (o *options) checkEngine(cmd *cobra.Command) error {
	e := &o.engine
	if err := e.parse(); err != nil {
		return exit.FlagError(cmd, err)
	}
	if err := whole.MayKeep(o.dataDir); err != nil {
		return exit.FlagError(cmd, fmt.Errorf("--data-dir %w", err))
	}
	switch {
	case e.other == "":
		return nil
	case e.other != engineDragonfly && len(split(e.schedulers)) == 0:
		return exit.FlagError(cmd, fmt.Errorf("--engine %s: name the schedulers with --dragonfly-schedulers", e.other))
	case e.timeout <= 0:
		return exit.FlagError(cmd, fmt.Errorf(
			"--dragonfly-timeout %s: want a duration above zero, such as 10m", e.timeout))
	}
	if !e.own {
		if err := o.checkNoSwarm(cmd); err != nil {
			return err
		}
	}
	if e.other == engineCluster {
		for name, address := range map[string]string{
			"dragonfly-peer-listen": o.engine.peerListen, "dragonfly-upload-listen": o.engine.uploadListen} {
			if !isAddress(address, false) {
				return exit.FlagError(cmd,
					fmt.Errorf("--%s %q: want HOST:PORT, or :PORT for all addresses of this host", name, address))
			}
		}
		return nil
	}
	return o.checkBeside(cmd)
}

// checkBeside finds flags that do not go with a Dragonfly's dfdaemon on this host.
func (o *options) checkBeside(cmd *cobra.Command) error {
	e := &o.engine
	if rel, err := filepath.Rel(dragonflyData, o.dataDir); err == nil && filepath.IsLocal(rel) {
		return exit.FlagError(cmd, fmt.Errorf("--data-dir %s: Dragonfly's dfdaemon keeps its cache in %s, and "+
			"removes there what it does not know when it starts: choose another directory", o.dataDir, dragonflyData))
	}
	if e.socket == "" {
		e.socket = dragonfly.DefaultSocket
		if e.other == engineV2 {
			e.socket = persistent.DefaultSocket
		}
	}
	socket, err := filepath.Abs(e.socket)
	if err != nil {
		return err
	}
	e.socket = socket
	if samePath(o.dragonflySocket, socket) {
		return exit.FlagError(cmd, fmt.Errorf("--dragonfly-sock and --dragonfly-daemon are both %s: the one is where "+
			"this daemon stands in for Dragonfly's, the other where that one listens", socket))
	}
	if samePath(o.socket, socket) {
		return exit.FlagError(cmd, fmt.Errorf(
			"--daemon-sock and --dragonfly-daemon are both %s: give this daemon, and dfcache, another one", socket))
	}
	return nil
}

// checkNoSwarm finds flags of a swarm where there is none.
func (o *options) checkNoSwarm(cmd *cobra.Command) error {
	for _, name := range []string{"swarm-key", "bootstrap", "peers-file"} {
		if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() != "off" {
			return exit.FlagError(cmd, fmt.Errorf(
				"--%s: with --engine %s there is no swarm: leave one of them out", name, o.engine.other))
		}
	}
	if o.engine.other == engineCluster && o.swarm.mode != string(swarm.Full) {
		return exit.FlagError(cmd, fmt.Errorf("--swarm-mode %s: with --engine %s this daemon fetches and serves: "+
			"leave one of them out", o.swarm.mode, engineCluster))
	}
	return nil
}

// samePath reports whether two paths, of what need not exist, are one.
func samePath(a, b string) bool {
	resolve := func(path string) string {
		if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			path = filepath.Join(dir, filepath.Base(path))
		}
		path, _ = filepath.Abs(path)
		// The one is a link to the other, also where there is nothing in it yet.
		if rest, found := strings.CutPrefix(path, "/var/run/"); found {
			path = "/run/" + rest
		}
		return path
	}
	return resolve(a) == resolve(b)
}

// openEngine puts an engine in front of the store, with the sources that the flags name. It
// takes over the store, also where it fails. at is who the daemon is there.
func (d *daemon) openEngine(
	ctx context.Context, store *pieces.Store, key discovery.Key, inSwarm bool, warn func(string),
) (_ p2p.Engine, at string, err error) {
	f := front.New(store, d.log)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	var are []string
	for _, name := range split(d.engine.sources) { // which is the order in which they are asked
		var who string
		switch {
		case name != engineOwn:
			who, err = d.addDragonfly(f)
		case !inSwarm:
			continue
		default:
			who, err = d.joinSwarm(f, key)
		}
		if err != nil {
			return nil, "", err
		}
		are = append(are, who)
	}
	if err := f.Health(ctx); err != nil {
		who := "Dragonfly"
		if d.engine.other == engineCluster {
			who = "a scheduler of Dragonfly"
		}
		warn(fmt.Sprintf("going on alone until %s answers: %v", who, err))
	}
	return f, cmp.Or(strings.Join(are, " and "), "none"), nil
}

// addDragonfly adds the Dragonfly that the flags name to the sources of an engine. at is who the
// daemon is there.
func (d *daemon) addDragonfly(f *front.Engine) (at string, err error) {
	switch d.engine.other {
	case engineDragonfly:
		_, err = dragonfly.New(f, dragonfly.Options{
			Socket:        d.engine.socket,
			LookupTimeout: d.swarm.lookup,
			Timeout:       d.engine.timeout,
			Log:           d.log,
		})
	case engineV2:
		_, err = persistent.New(f, persistent.Options{
			Socket:        d.engine.socket,
			Schedulers:    split(d.engine.schedulers),
			LookupTimeout: d.swarm.lookup,
			StallTimeout:  6 * d.swarm.stall, // what is waited for is a whole piece, of 64 MiB at most
			Timeout:       d.engine.timeout,
			Log:           d.log,
		})
	case engineCluster:
		c, err := cluster.New(f, cluster.Options{
			Schedulers:    split(d.engine.schedulers),
			Advertise:     d.engine.advertise,
			PeerListen:    d.engine.peerListen,
			UploadListen:  d.engine.uploadListen,
			Version:       build.Get().Version,
			LookupTimeout: d.swarm.lookup,
			StallTimeout:  d.swarm.stall,
			Timeout:       d.engine.timeout,
			UploadRate:    int64(d.swarm.upRate),
			DownloadRate:  int64(d.swarm.downRate),
			MaxUploads:    d.swarm.uploads,
			Log:           d.log,
		})
		if err != nil {
			return "", err
		}
		return "in Dragonfly at " + c.Address(), nil
	}
	return "Dragonfly at " + d.engine.socket, err
}
