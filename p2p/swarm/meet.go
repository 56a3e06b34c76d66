package swarm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// When peers meet, and now and then afterwards, each asks the other who it is: which
// version of this protocol it speaks, what time it has, and whether somebody else
// says to be this very peer.

const (
	// protocol is the version of what peers say to each other. It is raised whenever
	// a peer of before would misunderstand what is said, or could not answer, and
	// then oldestProtocol says whom this one still understands.
	//
	//	1  had no number
	//	2  After of versions and deletes, Age of deletes, clock and instance in hello
	protocol       = 2
	oldestProtocol = 1

	headerProtocol = "Dfcache-Protocol" // of a request: protocol of the peer that asks
	headerInstance = "Dfcache-Instance" // of a request: which run of it asks

	// helloInterval is how often connected peers are asked again.
	helloInterval = 5 * time.Minute
	// twinFor is how long it is told that there is another host with the same identity.
	twinFor = time.Hour
)

// Instance is one run of a daemon. By it a daemon, and its peers, tell it from
// another host that has a copy of its identity. It is safe for concurrent use.
type Instance struct {
	id string

	mu   sync.Mutex
	log  *slog.Logger
	twin string    // where the other one is
	seen time.Time // when it was heard of last
}

// NewInstance returns a new one.
func NewInstance() *Instance { return &Instance{id: rand.Text(), log: slog.New(slog.DiscardHandler)} }

// errTwin says that another host has the identity of this one.
var errTwin = errors.New("it has the identity of this host: peer.key was copied from one to the other; stop one of " +
	"the two dfdaemons, remove its peer.key, and start it again")

// found notes that another host has the same identity; not where that is "".
func (in *Instance) found(where string) {
	if where == "" {
		return
	}
	where = where[:min(len(where), 1024)] // it is another peer that tells
	in.mu.Lock()
	defer in.mu.Unlock()
	news := time.Since(in.seen) > twinFor
	in.twin, in.seen = where, time.Now()
	if news {
		in.log.Error("another host is in the swarm with the identity of this one", "at", where, "error", errTwin)
	}
}

// other returns where the other host is, or "".
func (in *Instance) other() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	if time.Since(in.seen) > twinFor {
		return ""
	}
	return in.twin
}

// says is what the header of every request says of its sender.
func (in *Instance) says(h http.Header) {
	h.Set(headerProtocol, strconv.Itoa(protocol))
	h.Set(headerInstance, in.id)
}

// protocolOf returns which version of the protocol the sender of a request speaks.
func protocolOf(r *http.Request) int {
	n, err := strconv.Atoi(r.Header.Get(headerProtocol))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// maxAheadOld is how far ahead of its own clock a peer of version 1 believes dates.
const maxAheadOld = time.Hour

// meetings asks peers who they are, and compares with them what was deleted and moved. It is safe for
// concurrent use, and has no lock: what is known of each peer, and of this run, has one.
type meetings struct {
	network  Network
	peers    *peerTable
	client   *client
	instance *Instance
	clock    *clock
	deletes  *deletes
	names    *names
	timeout  time.Duration // of a peer that is asked again
	log      *slog.Logger

	ctx context.Context // ends with the swarm
}

// meet asks a peer who it is.
func (m *meetings) meet(ctx context.Context, p peer.ID) error {
	h, err := m.client.hello(ctx, p)
	if err != nil {
		return err
	}
	m.instance.found(h.Twin)
	m.clock.now() // to have it when no peer is connected any more
	e := m.peers.get(p)
	if why, news := e.speaks(h); news {
		m.log.Warn("a peer can't be understood, and is asked for nothing", "peer", p.String(), "reason", why)
	}
	switch skew, news := e.skewed(); {
	case news && skew == 0:
		m.log.Info("the clock of a peer is right again", "peer", p.String())
	case news:
		m.log.Warn("the clocks of this host and of a peer differ: keep both in step, such as by NTP",
			"peer", p.String(), "address", e.lastAddress(), "ahead", skew.Round(
				time.Millisecond).String(), "whose", m.clock.whose(skew))
	}
	return nil
}

// greet asks a peer that has been met who it is, what was deleted, and for names that
// were moved here.
func (m *meetings) greet(p peer.ID) {
	ctx, cancel := context.WithTimeout(m.ctx, time.Minute)
	defer cancel()
	err := m.meet(ctx, p)
	if err == nil && m.peers.get(p).misunderstood() == "" {
		err = m.deletes.compare(ctx, p)
		if err == nil {
			err = m.names.compare(ctx, p)
		}
	}
	if err != nil && m.ctx.Err() == nil {
		m.log.Debug("could not ask a peer what was deleted and moved", "peer", p.String(), "error", err)
	}
}

// meetAll asks all connected peers again.
func (m *meetings) meetAll() {
	slots := make(chan struct{}, maxTelling)
	var meeting sync.WaitGroup
	defer meeting.Wait()
	for _, p := range m.network.Connected() {
		select {
		case slots <- struct{}{}:
		case <-m.ctx.Done():
			return
		}
		meeting.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(m.ctx, m.timeout)
			defer cancel()
			err := m.meet(ctx, p)
			if err == nil && m.peers.get(p).misunderstood() == "" {
				err = m.names.compare(ctx, p)
			}
			if err != nil && m.ctx.Err() == nil {
				m.log.Debug("a peer does not say who it is", "peer", p.String(), "error", err)
			}
		})
	}
}

// introduced notes from which run of a peer a request comes.
func (m *meetings) introduced(from peer.ID, r *http.Request) {
	instance := r.Header.Get(headerInstance)
	if from == m.network.Self() {
		if instance != m.instance.id {
			m.instance.found(r.RemoteAddr)
		}
		return
	}
	if len(instance) == 0 || len(instance) > 64 {
		return
	}
	if m.peers.get(from).runs(instance) {
		m.log.Error("two hosts have the same identity: peer.key was copied from one to the other; stop one of the "+
			"two dfdaemons, remove its peer.key, and start it again",
			"peer", from.String(), "at", m.addressesOf(from))
	}
}

// twinOf says where two hosts are that say to be the peer; "" where there is one.
func (m *meetings) twinOf(p peer.ID) string {
	if p == m.network.Self() || !m.peers.get(p).isTwin() {
		return ""
	}
	return m.addressesOf(p)
}

// addressesOf says where a peer is.
func (m *meetings) addressesOf(p peer.ID) string {
	var all []string
	for _, a := range m.network.Addresses(p).Addrs {
		if len(all) < 8 {
			all = append(all, a.String())
		}
	}
	if len(all) == 0 {
		return "an unknown address"
	}
	return strings.Join(all, " ")
}

// speaks says why a peer can't be understood, or "", and whether that is new.
func (e *peerEntry) speaks(h *hello) (why string, news bool) {
	from, to := max(h.OldestProtocol, 1), max(h.Protocol, 1)
	if from > protocol || to < oldestProtocol {
		older := "that peer"
		if from > protocol {
			older = "this host"
		}
		why = fmt.Sprintf("it speaks version %d to %d of the peers' protocol (dfdaemon %s), this one %d to %d: "+
			"upgrade the dfdaemon of %s", from, to, h.Version, oldestProtocol, protocol, older)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	news = why != "" && why != e.foreign
	e.foreign = why
	return why, news
}

func (e *peerEntry) misunderstood() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.foreign
}

// version returns that of the peer's dfdaemon, or "".
func (e *peerEntry) version() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.said == nil {
		return ""
	}
	return e.said.Version
}

// maxInstances is how many runs of a peer are remembered.
const maxInstances = 8

// runs notes which run of the peer is there. It reports whether it is new that there
// are two: one that was followed by another is there again.
func (e *peerEntry) runs(instance string) (twins bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.instances)
	if n > 0 && e.instances[n-1] == instance {
		return false
	}
	if i := slices.Index(e.instances, instance); i >= 0 {
		e.instances = append(slices.Delete(e.instances, i, i+1), instance)
		twins = e.now().Sub(e.twins) > twinFor
		e.twins = e.now()
		return twins
	}
	e.instances = append(e.instances[max(0, n-maxInstances+1):], instance)
	return false
}

func (e *peerEntry) isTwin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.twins.IsZero() && e.now().Sub(e.twins) <= twinFor
}
