package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/stats"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/logs"
	"github.com/dfcache/dfcache/cmd/internal/memory"
	"github.com/dfcache/dfcache/cmd/internal/profiling"
	"github.com/dfcache/dfcache/cmd/internal/tracing"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
	"github.com/dfcache/dfcache/p2p/swarm/discovery"
)

// run starts the daemon and serves until a signal ends it.
func (o *options) run(cmd *cobra.Command) error {
	// From here on a signal is not lost: one that comes during the start ends
	// the daemon as soon as it is up.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)

	d, err := o.start(cmd)
	var says *rpc.Launched
	if err == nil && o.launched {
		says = &rpc.Launched{Door: d.registry.door(), Warnings: d.warnings}
	}
	rpc.Ready(o.readyFD, says, err)
	if err != nil {
		return err
	}
	defer d.close()
	return d.serve(signals)
}

// daemon is a daemon that can serve.
type daemon struct {
	*options
	log      *slog.Logger
	stderr   io.Writer
	listener net.Listener
	server   *rpc.Server
	registry *registryServer // nil where there is none
	upstream *upstreamServer // the same
	metrics  *prometheus.Registry
	warnings []string // of the start
	local    *pieces.Store
	closers  []func() // to be called in reverse order
}

func (d *daemon) onClose(f func()) { d.closers = append(d.closers, f) }

func (d *daemon) close() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

// start opens everything that a daemon needs. The caller closes it.
func (o *options) start(cmd *cobra.Command) (_ *daemon, err error) {
	if err := o.load(cmd); err != nil {
		return nil, err
	}
	if err := o.checkEngine(cmd); err != nil {
		return nil, err
	}
	if err := checkDescriptors(); err != nil {
		return nil, err
	}
	oci, err := o.registry.prepare(cmd)
	if err != nil {
		return nil, err
	}
	d := &daemon{options: o, metrics: prometheus.NewRegistry(), stderr: cmd.ErrOrStderr()}
	defer func() {
		if err != nil {
			d.close()
		}
	}()

	if d.log, err = o.openLog(cmd.OutOrStdout(), d.onClose); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.log.Error("not started", "error", err.Error())
		}
	}()
	if limit := memory.Limit(); limit > 0 {
		d.log.Info("memory is limited by the control group", "limit", limit)
	}
	d.onClose(memory.GiveBack())

	if oci != nil {
		if err := oci.readFiles(d.log); err != nil {
			return nil, err
		}
	}
	trace, err := d.startTracing(cmd)
	if err != nil {
		return nil, err
	}
	engine, peer, err := d.openStore(cmd)
	if err != nil {
		return nil, err
	}
	if err := d.openDoors(engine, trace, oci); err != nil {
		return nil, err
	}

	version := build.Get().Version
	d.log.Info("start", "version", version, "data", o.dataDir, "socket", o.socket, "registry", d.registry.url(),
		"peer", peer, "pid", os.Getpid())
	fmt.Fprintf(d.stderr, "dfdaemon %s: data %s, socket %s, registry %s, peer %s, pid %d\n", version, o.dataDir,
		o.socket, d.registry.url(), peer, os.Getpid())
	return d, nil
}

// minDescriptors is how many descriptors a daemon needs: with all doors and a swarm it has some thirty
// before anybody asks for anything.
const minDescriptors = 64

// checkDescriptors refuses a limit with which the daemon would start, and then answer nobody. Go has raised
// the soft one to the hard one.
func checkDescriptors() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur >= minDescriptors {
		return nil
	}
	return fmt.Errorf("the process may have %d descriptors, and needs %d at least: raise the hard limit (ulimit -Hn, "+
		"or LimitNOFILE of systemd)", limit.Cur, minDescriptors)
}

// warn tells of what is no reason not to start.
func (d *daemon) warn(text string) {
	d.warnings = append(d.warnings, text)
	d.log.Warn(text)
	fmt.Fprintf(d.stderr, "dfdaemon: warning: %s\n", text)
}

// startTracing starts what shows how the daemon works: traces, and profiles.
func (d *daemon) startTracing(cmd *cobra.Command) (*tracing.Tracing, error) {
	trace, err := tracing.Start(cmd.Context(), tracing.Options{
		Endpoint:       d.jaeger,
		ServiceName:    d.serviceName,
		ServiceNameSet: cmd.Flags().Changed("service-name"),
		Version:        build.Get().Version,
		Warn:           d.warn,
	})
	if err != nil {
		return nil, err
	}
	d.onClose(trace.Close)
	stop, err := profiling.Start(d.pprofPort, func(text string) {
		d.log.Info(text)
		fmt.Fprintln(d.stderr, text)
	})
	if err != nil {
		return nil, err
	}
	d.onClose(stop)
	return trace, nil
}

// openStore opens the store, and what is behind it, as one engine. peer says what this daemon is to others.
func (d *daemon) openStore(cmd *cobra.Command) (engine p2p.Engine, peer string, err error) {
	var key discovery.Key
	inSwarm := false
	if d.engine.own {
		if key, inSwarm, err = d.readKey(cmd, d.warn); err != nil {
			return nil, "", err
		}
	}
	if err := d.serveMetrics(); err != nil {
		return nil, "", err
	}
	d.local, err = pieces.Open(d.dataDir,
		pieces.Options{Log: d.log, Address: d.socket, MaxSize: int64(d.maxSize),
			Lease: d.options.registry.uploadTimeout, Now: now})
	if err != nil {
		return nil, "", err
	}
	if engine, peer, err = d.openEngine(cmd.Context(), d.local, key, inSwarm, d.warn); err != nil {
		return nil, "", err
	}
	d.onClose(func() {
		if err := engine.Close(); err != nil {
			d.warn(err.Error())
		}
	})
	return engine, peer, nil
}

// openDoors listens at the socket, and for the registry and Dragonfly's dfcache where these are wanted.
func (d *daemon) openDoors(engine p2p.Engine, trace *tracing.Tracing, oci *registryServer) (err error) {
	if d.listener, err = rpc.Listen(d.socket); errors.Is(err, fs.ErrExist) {
		// Not to be taken for an output that exists.
		return fmt.Errorf("%w: %v", p2p.ErrUnavailable, err)
	} else if err != nil {
		return err
	}
	d.onClose(func() { d.listener.Close() }) // already done where the server ran
	d.server = rpc.NewServer(engine, d.log, serverOptions(trace.ServerStatsHandler())...)

	store := blobstore.New(engine)
	if oci != nil {
		oci.scratch = d.local.Scratch()
		listens, err := oci.listen(store, d.log, d.warn)
		if err != nil {
			return err
		}
		if listens {
			d.registry = oci
			d.metrics.MustRegister(oci.metrics()...)
			d.onClose(oci.close)
		}
	}
	if d.upstream, err = d.listenUpstream(store, d.log); err != nil {
		return err
	}
	if d.upstream != nil {
		d.onClose(func() { d.upstream.listener.Close() })
	}
	return nil
}

// serverOptions leaves out a stats handler that is not there.
func serverOptions(h stats.Handler) []rpc.ServerOption {
	if h == nil {
		return nil
	}
	return []rpc.ServerOption{rpc.WithStatsHandler(h)}
}

// openLog opens the log of the daemon. Its records go to console, too, where
// --console asks for that.
func (o *options) openLog(console io.Writer, onClose func(func())) (*slog.Logger, error) {
	if !o.console {
		console = nil
	}
	log, closer, err := logs.Open(logs.Options{Dir: o.logDir, Name: "dfdaemon", Verbose: o.verbose, Console: console})
	if err != nil {
		return nil, err
	}
	onClose(func() { closer.Close() })
	return log, nil
}

// failureTimeout is how long running operations may go on when the store can't
// store anything any more: enough for them to say why they failed.
const failureTimeout = 5 * time.Second

// serve serves until a signal comes, or the store can't store anything any
// more, and then until running operations have ended. It returns nil where they
// could end. A store that failed is the error: whoever supervises the daemon may
// start it again, which looks at everything anew.
func (d *daemon) serve(signals <-chan os.Signal) error {
	doors := []door{{d.socket, func() error { return d.server.Serve(d.listener) }, d.server.Shutdown}}
	if d.registry != nil {
		doors = append(doors, door{d.registry.url(), d.registry.serve, d.registry.shutdown})
	}
	if d.upstream != nil {
		doors = append(doors, door{d.dragonflySocket, d.upstream.serve, d.upstream.server.Shutdown})
	}
	served := make(chan error, len(doors))
	for _, door := range doors {
		go func() {
			err := door.serve()
			if err != nil {
				err = fmt.Errorf("serve at %s: %w", door.at, err)
			}
			served <- err
		}()
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var failure error
	timeout := d.shutdownTimeout
	select {
	case <-d.local.Failed():
		failure = d.local.Failure()
		d.log.Error("stop: the store failed", "error", failure.Error())
		if timeout == 0 || timeout > failureTimeout {
			timeout = failureTimeout
		}
	case err := <-served:
		// What runs would hold up closing the store, and nobody can ask for more.
		cancel()
		_ = shutdown(ctx, doors) // the error before it is what counts
		for range len(doors) - 1 {
			<-served
		}
		return err
	case s := <-signals:
		d.log.Info("stop", "signal", s.String())
	}

	if timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	stopped := make(chan error, 1)
	go func() { stopped <- shutdown(ctx, doors) }()
	var err error
	select {
	case err = <-stopped:
	case s := <-signals:
		d.log.Warn("stop at once", "signal", s.String())
		cancel()
		err = <-stopped
	}
	for range doors {
		<-served
	}
	if failure != nil {
		return failure
	}
	if err != nil {
		d.log.Warn("operations were cut off", "error", err.Error())
		return fmt.Errorf("stop: operations that were running were cut off: %w", err)
	}
	d.log.Info("stopped")
	return nil
}

// door is where content is asked for.
type door struct {
	at       string
	serve    func() error // until shutdown; then it returns nil
	shutdown func(context.Context) error
}

// shutdown shuts all doors, and returns the first error.
func shutdown(ctx context.Context, doors []door) error {
	stopped := make(chan error, len(doors))
	for _, door := range doors {
		go func() { stopped <- door.shutdown(ctx) }()
	}
	var first error
	for range doors {
		if err := <-stopped; err != nil && first == nil {
			first = err
		}
	}
	return first
}
