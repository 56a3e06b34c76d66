package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
	"github.com/dfcache/dfcache/p2p/manifest"
)

// holding is a task of the store, as Dragonfly knows it: by its digest, or by a name that leads to it.
type holding struct {
	task   p2p.Task
	peerID string // of this host, for this task
	since  time.Time

	name     string        // a cache ID of the task's tag, or ""
	text     string        // as it was given to Dragonfly's dfcache
	manifest digest.Digest // that the name points to
}

// url is what Dragonfly knows the holding by, together with the tag.
func (h *holding) url() string {
	if h.name != "" {
		return wire.Scheme + url.QueryEscape(h.text)
	}
	return wire.URL(h.task)
}

func (h *holding) isName(tag, name string) bool { return h.name == name && h.task.Tag == tag }

func (h *holding) String() string {
	if h.name != "" {
		return h.name + ", " + h.task.String()
	}
	return h.task.String()
}

// newHost describes this host to schedulers. listeners are for peers and for uploads.
func newHost(opts Options, listeners [2]net.Listener) (*schedulerv1.PeerHost, error) {
	advertise := opts.Advertise
	if advertise == "" {
		// Nothing is sent: it says which address would be used.
		conn, err := net.Dial("udp", opts.Schedulers[0])
		if err != nil {
			return nil, fmt.Errorf("find the IP of this host: %w: name the IP to advertise", err)
		}
		advertise = conn.LocalAddr().(*net.UDPAddr).IP.String()
		conn.Close()
	}
	ip, err := netip.ParseAddr(advertise)
	if err != nil || ip.IsUnspecified() || ip.Zone() != "" {
		return nil, fmt.Errorf("IP to advertise %q: want one by which other hosts reach this one, such as 10.0.0.7",
			advertise)
	}
	port := func(i int) int32 { return int32(listeners[i].Addr().(*net.TCPAddr).Port) }
	hostname, err := os.Hostname()
	if err != nil {
		hostname = ip.String()
	}
	host := &schedulerv1.PeerHost{Ip: ip.String(), RpcPort: port(0), DownPort: port(1), Hostname: hostname}
	// Schedulers take two hosts of the same ID for one, and send peers of the one not to
	// the other. Names are often the same in containers, and ports everywhere.
	host.Id = fmt.Sprintf("%s-%s-%d", host.Ip, hostname, host.RpcPort)
	if host.Validate() != nil { // of names that Dragonfly refuses
		host.Hostname = "host-" + strings.ReplaceAll(ip.String(), ":", "-")
		host.Id = fmt.Sprintf("%s-%d", host.Hostname, host.RpcPort)
	}
	if err := host.Validate(); err != nil {
		return nil, fmt.Errorf("address for peers: Dragonfly's schedulers refuse it: %w: use ports from 1024 to 65534",
			err)
	}
	return host, nil
}

// newPeerID returns an ID that no peer has had: schedulers do not take back one that has left.
func (e *Source) newPeerID() string {
	return fmt.Sprintf("%s-%d-%s", e.host.Ip, os.Getpid(), strings.ToLower(rand.Text()))
}

// hold notes that a task is here, and returns its ID. peerID is who has fetched it,
// or "" for whoever held it before, or somebody new.
func (e *Source) hold(task p2p.Task, peerID string) (id string) {
	id = taskID(task)
	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.held[id]; h == nil || peerID != "" || h.name != "" {
		if peerID == "" {
			peerID = e.newPeerID()
		}
		e.held[id] = &holding{task: task, peerID: peerID, since: time.Now()}
	}
	return id
}

// holdName notes that the file is here that a name leads to, and returns the ID by which Dragonfly's
// dfcache asks for the name; or "" where there is no such file, or the ID is another's: Dragonfly takes
// cid and tag together, without a separator. Nothing is fetched by that ID: who has what it stands for,
// nothing proves. points is the manifest that the name was just seen to point to.
func (e *Source) holdName(ctx context.Context, tag, name string, points digest.Digest) (id string, err error) {
	id = nameID(tag, given.Text(name))
	if h := e.holding(id); h != nil && h.isName(tag, name) && h.manifest == points {
		return id, nil
	}
	cid, err := digest.ParseCID(name)
	if err != nil {
		return "", err
	}
	var before *holding
	if id, before, err = e.holdNow(ctx, tag, name, cid); err == nil && before != nil {
		err = e.leaveAs(ctx, id, before)
	}
	return id, err
}

// holdNow is holdName as far as the store tells. before is what it takes the place of, or nil.
func (e *Source) holdNow(ctx context.Context, tag, name string, cid digest.CID) (
	id string, before *holding, err error,
) {
	// What a name leads to is read and noted by one caller at a time: an import and a sweep would
	// otherwise take each other's word back.
	e.naming.Lock()
	defer e.naming.Unlock()
	now, err := e.fileOf(ctx, tag, name, cid)
	if err != nil || now == nil {
		return "", nil, err
	}
	id = nameID(tag, now.text)
	e.mu.Lock()
	defer e.mu.Unlock()
	before = e.held[id]
	switch {
	case before == nil:
	case !before.isName(tag, name):
		return "", nil, nil
	case before.manifest == now.manifest:
		return id, nil, nil
	}
	e.held[id] = now
	return id, before, nil
}

// fileOf returns the only file that a name leads to now, with the name as it was given; or nil.
func (e *Source) fileOf(ctx context.Context, tag, name string, cid digest.CID) (*holding, error) {
	info, err := e.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local, Manifest: true, ContentOnly: true})
	if errors.Is(err, p2p.ErrNotFound) || err == nil && info.Manifest == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m, err := manifest.Read(info.Manifest.Content)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", name, err)
	}
	text := given.Text(name)
	if given.IsHashed(name) {
		text = m.Annotations[given.Annotation]
		if made, err := given.CID(text); err != nil || made != name {
			return nil, nil
		}
	}
	layers := slices.Concat(m.Layers, m.Blobs)
	if len(layers) != 1 {
		return nil, nil
	}
	return &holding{task: p2p.Task{Tag: tag, Digest: layers[0].Digest}, peerID: e.newPeerID(), since: time.Now(),
		name: name, text: text, manifest: info.Task.Digest}, nil
}

// holding returns what is held under an ID, or nil.
func (e *Source) holding(id string) *holding {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.held[id]
}

func (e *Source) isHeld(id string) bool { return e.holding(id) != nil }

// announceAll announces the host and what it holds until the engine is closed. What
// an earlier process on this host has announced, and could not take back, is taken back
// before: schedulers would go on to send peers to it, for a day.
func (e *Source) announceAll() {
	_ = e.leaveHost(e.ctx) // where schedulers know of none, that is an error
	close(e.fresh)
	e.background.Go(e.announceTasks)
	e.announceHost()
}

// announceHost announces the host again and again, until the engine is closed.
func (e *Source) announceHost() {
	tick := time.NewTicker(e.opts.AnnounceInterval)
	defer tick.Stop()
	for {
		if err := e.announceHostOnce(e.ctx); err != nil && e.ctx.Err() == nil {
			e.log.Warn("no scheduler of Dragonfly answers: other hosts find nothing here, and nothing is fetched",
				"error", err)
		}
		select {
		case <-tick.C:
		case <-e.ctx.Done():
			return
		}
	}
}

// announceHostOnce announces the host to every scheduler. It fails where none answers.
func (e *Source) announceHostOnce(ctx context.Context) error {
	req := &schedulerv1.AnnounceHostRequest{
		Id: e.host.Id, Type: "normal", Hostname: e.host.Hostname, Ip: e.host.Ip, Port: e.host.RpcPort,
		DownloadPort: e.host.DownPort,
		Os:           runtime.GOOS, Platform: runtime.GOOS,
		// Schedulers insist on these, and keep them for whoever looks.
		Cpu:    &schedulerv1.CPU{LogicalCount: uint32(runtime.NumCPU()), Times: &schedulerv1.CPUTimes{}},
		Memory: &schedulerv1.Memory{}, Network: &schedulerv1.Network{}, Disk: &schedulerv1.Disk{},
		Build: &schedulerv1.Build{GitVersion: e.opts.Version, GoVersion: runtime.Version(),
			Platform: runtime.GOOS + "/" + runtime.GOARCH},
	}
	return e.eachScheduler(func(s *scheduler) error {
		err := s.call(ctx, "announce host", e.opts.LookupTimeout, func(ctx context.Context) error {
			_, err := s.rpc.AnnounceHost(ctx, req)
			return err
		})
		if ctx.Err() == nil {
			e.noteAnswer(s, err)
		}
		return err
	})
}

// eachScheduler calls all schedulers at once, and fails where none succeeds.
func (e *Source) eachScheduler(do func(*scheduler) error) error {
	errs := make([]error, len(e.schedulers.all))
	var all sync.WaitGroup
	for i, s := range e.schedulers.all {
		all.Go(func() { errs[i] = do(s) })
	}
	all.Wait()
	for _, err := range errs {
		if err == nil {
			return nil
		}
	}
	return errors.Join(errs...)
}

// noteAnswer notes whether a scheduler has answered. When that changes, tasks get
// other schedulers, and are announced to those.
func (e *Source) noteAnswer(s *scheduler, err error) {
	down := errors.Is(err, errDown)
	if errors.Is(err, wire.ErrAway) && !down || !e.schedulers.mark(s, down) {
		return
	}
	if down {
		e.log.Warn("a scheduler of Dragonfly does not answer: others have its tasks until it does", "scheduler", s.addr,
			"error", err)
	} else {
		e.log.Info("a scheduler of Dragonfly answers again", "scheduler", s.addr)
	}
	select {
	case e.sweepNow <- struct{}{}:
	default:
	}
}

// leaveHost takes the host from all schedulers.
func (e *Source) leaveHost(ctx context.Context) error {
	return e.eachScheduler(func(s *scheduler) error {
		return s.call(ctx, "leave", e.opts.LookupTimeout, func(ctx context.Context) error {
			_, err := s.rpc.LeaveHost(ctx, &schedulerv1.LeaveHostRequest{Id: e.host.Id})
			return err
		})
	})
}

// announceTasks announces what the store holds again and again, until the engine is
// closed: schedulers forget, and are started anew.
func (e *Source) announceTasks() {
	tick := time.NewTicker(e.opts.SweepInterval)
	defer tick.Stop()
	for {
		if err := e.sweep(); err != nil && e.ctx.Err() == nil {
			e.log.Warn("not all tasks were announced: the rest will be", "error", err)
		}
		select {
		case <-tick.C:
		case <-e.sweepNow:
		case <-e.ctx.Done():
			return
		}
	}
}

// sweep announces every task of the store, and every name of a file, at a bounded rate.
func (e *Source) sweep() error {
	var ids []string
	began, named := time.Now(), map[string]bool{}
	for entry, err := range e.store.List(e.ctx, p2p.Query{}) {
		if err != nil {
			return err
		}
		if entry.Name == "" {
			ids = append(ids, e.hold(entry.Task, ""))
			continue
		}
		id, err := e.holdName(e.ctx, entry.Task.Tag, entry.Name, entry.Task.Digest)
		if err != nil {
			e.log.Debug("a name was not announced", "name", entry.Name, "task", entry.Task.String(), "error", err)
		}
		if id != "" {
			ids, named[id] = append(ids, id), true
		}
	}
	for _, id := range e.namesBefore(began) {
		if !named[id] {
			if err := e.leave(e.ctx, id); err != nil {
				e.log.Debug("a name that is gone was not taken back", "id", id, "error", err)
			}
		}
	}
	pace := rate.NewLimiter(rate.Limit(e.opts.SweepRate), 1)
	for _, id := range ids {
		if err := pace.Wait(e.ctx); err != nil {
			return err
		}
		if !e.schedulers.up() {
			return nil // when one is up again, all begins anew
		}
		if err := e.announceAgain(e.ctx, id); err != nil {
			if e.ctx.Err() != nil {
				return err
			}
			e.log.Debug("a task was not announced", "id", id, "error", err)
		}
	}
	return nil
}

// namesGone returns the IDs of names of a tag that are held, and not in the store any more.
func (e *Source) namesGone(ctx context.Context, tag string) (gone []string) {
	held := map[string]string{}
	e.naming.Lock() // what was read of the store before a name went has been noted then
	e.mu.Lock()
	for id, h := range e.held {
		if h.name != "" && h.task.Tag == tag {
			held[id] = h.name
		}
	}
	e.mu.Unlock()
	e.naming.Unlock()
	for id, name := range held {
		cid, err := digest.ParseCID(name)
		if err == nil {
			_, err = e.store.Stat(ctx, tag, cid, p2p.StatOptions{Scope: p2p.Local})
		}
		if errors.Is(err, p2p.ErrNotFound) {
			gone = append(gone, id)
		}
	}
	return gone
}

// namesBefore returns the IDs of names that were held at a time.
func (e *Source) namesBefore(at time.Time) (ids []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, h := range e.held {
		if h.name != "" && h.since.Before(at) {
			ids = append(ids, id)
		}
	}
	return ids
}

// announceAgain tells a task's schedulers that it is here, as peers that schedulers have
// not forgotten. Where a scheduler knows the task, it has to know no more: the sums of its
// pieces need not be computed.
func (e *Source) announceAgain(ctx context.Context, id string) error {
	h := e.holding(id)
	if h == nil {
		return nil // deleted
	}
	old := h
	if time.Since(h.since) > e.opts.PeerLifetime {
		e.renew(id, h)
	}
	var errs []error
	for _, s := range e.schedulers.of(id) {
		_, err := e.statTask(ctx, s, id, h.String())
		if err == nil || errors.Is(err, p2p.ErrNotFound) {
			err = e.announceAt(ctx, s, id, err != nil)
		}
		errs = append(errs, err)
	}
	if now := e.holding(id); now != nil && now.peerID != old.peerID {
		errs = append(errs, e.leaveAs(ctx, id, old))
	}
	return errors.Join(errs...)
}

// renew has what is held be held by another peer.
func (e *Source) renew(id string, h *holding) {
	now := *h
	now.peerID, now.since = e.newPeerID(), time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.held[id] == h {
		e.held[id] = &now
	}
}

// announce tells a task's schedulers that it is here, with its pieces.
func (e *Source) announce(ctx context.Context, id string) error {
	var errs []error
	for _, s := range e.schedulers.of(id) {
		errs = append(errs, e.announceAt(ctx, s, id, true))
	}
	return errors.Join(errs...)
}

// announceAt tells a scheduler that a task is here; with its pieces, where the scheduler
// does not know the task.
func (e *Source) announceAt(ctx context.Context, s *scheduler, id string, full bool) error {
	h := e.holding(id)
	if h == nil {
		return nil
	}
	limit := 0
	if full {
		limit = maxPieces
	}
	packet, err := e.packet(ctx, id, h, 0, limit)
	if errors.Is(err, p2p.ErrNotFound) {
		return e.leave(ctx, id) // deleted meanwhile
	}
	if err != nil {
		return fmt.Errorf("announce %s: %w", h, err)
	}
	err = e.ask(ctx, s, "announce "+h.String(), func(ctx context.Context) error {
		_, err := s.rpc.AnnounceTask(ctx, &schedulerv1.AnnounceTaskRequest{
			TaskId: id, Url: h.url(), UrlMeta: wire.Meta(h.task), PeerHost: e.host, PiecePacket: packet,
			TaskType: commonv1.TaskType_DfCache,
		})
		return err
	})
	if e.holding(id) != h {
		// Deleted, or another peer's, meanwhile: what took it back may have come before this.
		err = errors.Join(err, e.leaveAs(ctx, id, h))
	}
	return err
}

// ask calls a scheduler about a task.
func (e *Source) ask(ctx context.Context, s *scheduler, what string, do func(context.Context) error) error {
	select {
	case <-e.fresh:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := s.call(ctx, what, e.opts.LookupTimeout, do)
	if errors.Is(err, errDown) {
		e.noteAnswer(s, err)
	}
	return err
}

// statTask asks a scheduler about a task. The error matches [p2p.ErrNotFound] where no
// peer that it knows of has it.
func (e *Source) statTask(ctx context.Context, s *scheduler, id, called string) (found *schedulerv1.Task, err error) {
	what := "stat " + called
	err = e.ask(ctx, s, what, func(ctx context.Context) error {
		found, err = s.rpc.StatTask(ctx, &schedulerv1.StatTaskRequest{TaskId: id})
		return err
	})
	if err == nil && !available(found) {
		err = fmt.Errorf("%s: %w: no peer has all of it", what, p2p.ErrNotFound)
	}
	return found, err
}

// lookup asks a task's schedulers about it, until one knows it. The error matches
// [p2p.ErrNotFound] where all say that no peer has it.
func (e *Source) lookup(ctx context.Context, task p2p.Task) (found *schedulerv1.Task, at *scheduler, err error) {
	id := taskID(task)
	for _, s := range e.schedulers.of(id) {
		found, failed := e.statTask(ctx, s, id, task.String())
		if failed == nil {
			return found, s, nil
		}
		if err == nil || !errors.Is(failed, p2p.ErrNotFound) {
			err = failed
		}
	}
	return nil, nil, err
}

// leave tells a task's schedulers that it is not here any more.
func (e *Source) leave(ctx context.Context, id string) error {
	e.mu.Lock()
	h := e.held[id]
	delete(e.held, id)
	e.mu.Unlock()
	if h == nil {
		return nil
	}
	return e.leaveAs(ctx, id, h)
}

// leaveAs tells a task's schedulers that a peer does not hold it any more. One that does
// not know it is content.
func (e *Source) leaveAs(ctx context.Context, id string, h *holding) error {
	var errs []error
	for _, s := range e.schedulers.of(id) {
		err := e.ask(ctx, s, "leave "+h.String(), func(ctx context.Context) error {
			_, err := s.rpc.LeaveTask(ctx, &schedulerv1.PeerTarget{TaskId: id, PeerId: h.peerID})
			return err
		})
		if !errors.Is(err, p2p.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
