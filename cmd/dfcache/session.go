package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/attribute"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/cmd/internal/build"
	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/logs"
	"github.com/dfcache/dfcache/cmd/internal/paths"
	"github.com/dfcache/dfcache/cmd/internal/profiling"
	"github.com/dfcache/dfcache/cmd/internal/tracing"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// session is what a command that works on the store has around it.
type session struct {
	*app
	command string // its name
	log     *slog.Logger
	trace   *tracing.Tracing
}

// session runs work within the timeout, and with log, profiles and traces.
// It gives the error that work ends with the words for the user.
// Records go to console where --console asks for that.
func (a *app) session(cmd *cobra.Command, console io.Writer, work func(context.Context, *session) error) (err error) {
	ctx := cmd.Context()
	if a.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}

	if !a.console {
		console = nil
	}
	log, closer, err := logs.Open(logs.Options{
		Dir: a.logDir, Name: "dfcache", Verbose: a.verbose, Console: console, Warn: a.stderr})
	if err != nil {
		return err
	}
	defer closer.Close()
	log = log.With("command", cmd.Name(), "pid", os.Getpid())
	log.Info("start", "cid", a.cid, "tag", a.tag)
	started := time.Now()
	defer func() {
		took := slog.Duration("duration", time.Since(started))
		if err != nil {
			log.Error("end", took, "exit", exit.Code(err), "error", err.Error())
		} else {
			log.Info("end", took, "exit", exit.OK)
		}
	}()

	s := &session{app: a, command: cmd.Name(), log: log}
	stop, err := profiling.Start(a.pprofPort, func(text string) { fmt.Fprintln(a.stderr, text) })
	if err != nil {
		return exit.Usage(err)
	}
	defer stop()
	s.trace, err = tracing.Start(ctx, tracing.Options{
		Endpoint:       a.jaeger,
		ServiceName:    a.serviceName,
		ServiceNameSet: a.serviceNameGiven,
		Version:        build.Get().Version,
		Warn:           s.warn,
	})
	if err != nil {
		return exit.Usage(err)
	}
	defer s.trace.CloseWithin(ctx)

	ctx, end := s.trace.StartSpan(ctx, cmd.CommandPath(), attribute.String("dfcache.cid", a.cid),
		attribute.String("dfcache.tag", a.tag))
	done := make(chan error, 1)
	go func() { done <- work(ctx, s) }()
	err = a.explain(ctx, cmd, wait(ctx, done))
	end(err)
	return err
}

// warn tells what is amiss and no reason to fail.
func (s *session) warn(text string) {
	s.log.Warn(text)
	fmt.Fprintf(s.stderr, "dfcache: warning: %s\n", text)
}

// notices returns a context for what stores something, and a function that says on stderr what the
// user should know of it although it is done.
func (s *session) notices(ctx context.Context) (_ context.Context, warn func()) {
	var mu sync.Mutex
	var texts []string
	ctx = p2p.WithNotice(ctx, func(text string) {
		mu.Lock()
		defer mu.Unlock()
		texts = append(texts, text)
	})
	return ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		for _, text := range texts {
			s.warn(printable(text))
		}
	}
}

// stuckAfter is how long work may take to end after its context has ended.
const stuckAfter = time.Second

// wait returns what work ends with. Where it does not end together with ctx, it
// is stuck in the kernel: opening a named pipe that nobody writes to, or
// writing to a pipe that nobody reads. That ends with the process.
func wait(ctx context.Context, done <-chan error) error {
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(stuckAfter):
		return ctx.Err()
	}
}

// explain adds to an error what the user can do about it.
func (a *app) explain(ctx context.Context, cmd *cobra.Command, err error) error {
	if _, ok := errors.AsType[*storedError](err); ok {
		return err
	}
	if choice, ok := errors.AsType[*artifact.ChoiceError](err); ok {
		if len(choice.Platforms) > 0 {
			return fmt.Errorf("%w\n(--platform OS/ARCHITECTURE)", err)
		}
		return fmt.Errorf("%w\n(--file NAME for one, or --all with a directory as the output)", err)
	}
	switch exit.Code(err) {
	case exit.Timeout:
		// The daemon has the deadline, too, and may notice it first.
		if deadline, set := ctx.Deadline(); set && !time.Now().Before(deadline) {
			return &toldError{fmt.Sprintf("%s: not done within --timeout %s, and given up", cmd.Name(), a.timeout), err}
		}
	case exit.Interrupted:
		if ctx.Err() != nil {
			return &toldError{cmd.Name() + ": interrupted", err}
		}
	case exit.NotFound:
		if local := cmd.Flags().Lookup("local"); local != nil && local.Value.String() == "true" {
			return fmt.Errorf(
				"%w on this host: see what it has with 'dfcache list', or leave --local out to ask peers, too", err)
		}
		return fmt.Errorf("%w: see what is here with 'dfcache list', or check --cid and --tag", err)
	case exit.Corrupt:
		return fmt.Errorf("%w: import the file again, and see what else is damaged with 'dfdaemon fsck'", err)
	case exit.Referenced:
		return fmt.Errorf("%w, or force it (--force)", err)
	case exit.Unreachable:
		if !isOfSwarm(err) {
			return err
		}
		return fmt.Errorf("%w; another host may have it: %s", err, unreachableAdvice)
	}
	return err
}

// unreachableAdvice is what can be done where peers can't be reached.
const unreachableAdvice = "see 'dfcache peers', and check dfdaemon's bootstrap addresses and swarm key"

// isOfSwarm reports whether the peers that could not be reached are those of a swarm.
// Where a Dragonfly stands for them, the error says what can be done: it is not there,
// or can't do that.
func isOfSwarm(err error) bool {
	return !errors.Is(err, p2p.ErrUnavailable) && !errors.Is(err, errors.ErrUnsupported)
}

// toldError has words of its own for an error.
type toldError struct {
	text string
	err  error
}

func (e *toldError) Error() string { return e.text }
func (e *toldError) Unwrap() error { return e.err }

// checkNames reports a malformed --cid or --tag, which needs no daemon.
func (s *session) checkNames() error {
	if err := p2p.ValidateTag(s.tag); err != nil {
		return err
	}
	if s.cid == "" {
		return nil
	}
	return s.checkCID(s.cid)
}

// checkCID reports a malformed cid, and one that is a digest without its algorithm, as sha256sum prints
// it: it would be a name, and nothing would be checked.
func (a *app) checkCID(cid string) error {
	if _, err := digest.ParseCID(cid); err != nil {
		return err
	}
	bare := strings.ToLower(cid)
	if a.asName || strings.Trim(bare, "0123456789abcdef") != "" {
		return nil
	}
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		if len(bare) == 2*alg.Size() {
			return exit.Usage(fmt.Errorf("cid %q is a digest without its algorithm: pass %s:%s to have the content "+
				"checked against it, or --as-name where it is a name", cid, alg, bare))
		}
	}
	return nil
}

// repository opens the part of the store under --tag. The caller calls done
// when it is no longer used.
func (s *session) repository(ctx context.Context) (repo *blobstore.Repository, done func(), err error) {
	if err := s.checkNames(); err != nil {
		return nil, nil, err
	}
	store, err := s.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	if repo, err = store.Repository(s.tag); err != nil {
		store.Close()
		return nil, nil, err
	}
	return repo, func() {
		if cid, err := digest.ParseCID(s.cid); err == nil && cid.CacheID() != "" {
			s.warnOfClocks(ctx, store)
		}
		store.Close()
	}, nil
}

// dial opens the store of the dfdaemon. Where none answers, and the user named
// no socket, it starts one.
func (s *session) dial(ctx context.Context) (*blobstore.Store, error) {
	var opts []client.Option
	if h := s.trace.ClientStatsHandler(); h != nil {
		opts = append(opts, client.WithStatsHandler(h))
	}
	for _, uid := range s.daemonUIDs {
		opts = append(opts, client.WithServerUID(uid))
	}
	store, err := client.Dial(ctx, s.socket, opts...)
	if err == nil {
		s.log.Debug("connected", "socket", s.socket)
		return store, nil
	}
	if !errors.Is(err, rpc.ErrNoDaemon) {
		if errors.Is(err, p2p.ErrUnavailable) {
			err = fmt.Errorf("%w (--daemon-sock names the socket, --daemon-user other users to trust)", err)
		}
		return nil, err
	}
	if s.socketGiven {
		return nil, &toldError{
			fmt.Sprintf("no dfdaemon answers at %s: start one there, or set no socket to have one started (it is set "+
				"by --daemon-sock, DFCACHE_DAEMON_SOCK or daemon-sock in the configuration file)", s.socket),
			err,
		}
	}
	if err := paths.CheckHome(s.socket); err != nil {
		return nil, exit.Usage(fmt.Errorf("no place for the socket of a dfdaemon: %w, or pass --daemon-sock", err))
	}
	s.log.Debug("no dfdaemon answers", "socket", s.socket, "error", err.Error())
	if err := s.launch(ctx); err != nil {
		return nil, err
	}
	return client.Dial(ctx, s.socket, opts...)
}

// launch starts a dfdaemon that outlives this process.
func (s *session) launch(ctx context.Context) error {
	if !s.workHomeGiven {
		if err := paths.CheckHome(s.workHome); err != nil {
			return exit.Usage(fmt.Errorf("no dfdaemon answers at %s, and there is no place for the content of a new "+
				"one: %w, or pass --workhome", s.socket, err))
		}
	}
	args := []string{"--daemon-sock", s.socket}
	if s.workHomeGiven {
		args = append(args, "--workhome", s.workHome)
	}
	if s.logDirGiven {
		args = append(args, "--logdir", s.logDir)
	}
	options := rpc.LaunchOptions{Path: daemonPath(), Args: args, Socket: s.socket}
	if info, err := os.Stat(s.logDir); err == nil && info.IsDir() {
		// Beside its log: what it prints when it crashes.
		options.LogPath = filepath.Join(s.logDir, "dfdaemon.out")
	}
	launched, err := rpc.Launch(ctx, options)
	if err != nil {
		return &toldError{
			fmt.Sprintf("no dfdaemon answers at %s, and none can be started: %v", s.socket, err),
			errors.Join(blobstore.ErrUnavailable, err),
		}
	}
	if launched.PID == 0 { // another dfcache was faster
		return nil
	}
	s.log.Info("started dfdaemon", "daemon", launched.PID, "socket", s.socket, "door", launched.Door)
	fmt.Fprintf(s.stderr, "dfcache: started dfdaemon (pid %d, socket %s, %s)\n", launched.PID, s.socket,
		printable(launched.Door))
	for _, text := range launched.Warnings {
		s.warn("dfdaemon: " + printable(text))
	}
	return nil
}

// daemonPath names the dfdaemon to start: the one that was installed with this
// dfcache, else the one on the PATH.
func daemonPath() string {
	const name = "dfdaemon"
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
			return beside
		}
	}
	return name
}
