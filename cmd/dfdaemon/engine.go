package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
)

// Values of --engine.
const (
	engineOwn       = "own"
	engineDragonfly = "dragonfly"
)

// engineOptions are the values of the flags that say what the network is.
type engineOptions struct {
	kind    string
	socket  string
	timeout time.Duration
}

func (o *engineOptions) flags(flags *pflag.FlagSet) {
	flags.StringVar(&o.kind, "engine", engineOwn, "`where` to get what is not here: own is the swarm of dfdaemons, dragonfly a Dragonfly whose dfdaemon runs on this host")
	flags.StringVar(&o.socket, "dragonfly-daemon", dragonfly.DefaultSocket, "unix `socket` of Dragonfly's dfdaemon, with --engine dragonfly")
	flags.DurationVar(&o.timeout, "dragonfly-timeout", dragonfly.DefaultTimeout, "how long Dragonfly may take to import or export a file")
}

// checkEngine finds what is wrong with the flags of the engine, and with others
// beside them.
func (o *options) checkEngine(cmd *cobra.Command) error {
	switch e := &o.engine; {
	case e.kind == engineOwn:
		return nil
	case e.kind != engineDragonfly:
		return exit.FlagError(cmd, fmt.Errorf("--engine %q: use %s or %s", e.kind, engineOwn, engineDragonfly))
	case e.socket == "":
		return exit.FlagError(cmd, errors.New("--dragonfly-daemon is empty: name the socket of Dragonfly's dfdaemon"))
	case e.timeout <= 0:
		return exit.FlagError(cmd, fmt.Errorf("--dragonfly-timeout %s: want a duration above zero, such as 10m", e.timeout))
	}
	for _, name := range []string{"swarm-key", "bootstrap", "peers-file"} {
		if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() != "off" {
			return exit.FlagError(cmd, fmt.Errorf("--%s: with --engine %s there is no swarm: leave one of them out", name, engineDragonfly))
		}
	}
	socket, err := filepath.Abs(o.engine.socket)
	if err != nil {
		return err
	}
	o.engine.socket = socket
	if own, err := filepath.Abs(o.dragonflySocket); err == nil && own == socket {
		return exit.FlagError(cmd, fmt.Errorf("--dragonfly-sock and --dragonfly-daemon are both %s: the one is where this daemon stands in for Dragonfly's, the other where that one listens", socket))
	}
	return nil
}

// openEngine gives the store its network, as the flags say. It takes over the store,
// also where it fails. at is who the daemon is there.
func (d *daemon) openEngine(ctx context.Context, store *pieces.Store, key discovery.Key, inSwarm bool, warn func(string)) (engine p2p.Engine, at string, err error) {
	switch {
	case d.engine.kind == engineDragonfly:
		e, err := dragonfly.New(store, dragonfly.Options{
			Socket:         d.engine.socket,
			LookupTimeout:  d.swarm.lookup,
			Timeout:        d.engine.timeout,
			DetectManifest: blobstore.DetectManifest,
			Log:            d.log,
		})
		if err != nil {
			return nil, "", errors.Join(err, store.Close())
		}
		if err := e.Health(ctx); err != nil {
			warn(fmt.Sprintf("going on alone until Dragonfly answers: %v", err))
		}
		return e, "Dragonfly at " + d.engine.socket, nil
	case inSwarm:
		joined, err := d.joinSwarm(store, key)
		if err != nil {
			return nil, "", errors.Join(err, store.Close())
		}
		return joined, joined.ID(), nil
	}
	return store, "none", nil
}
