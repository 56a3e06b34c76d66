package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	schedulerv1 "d7y.io/api/v2/pkg/apis/scheduler/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"stathat.com/c/consistent"

	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/wire"
)

// schedulers are the schedulers of the cluster. Each knows the tasks that the hash
// ring gives it, so that everybody asks the same one about a task.
type schedulers struct {
	all []*scheduler

	mu    sync.Mutex
	rings [len(joints)]*consistent.Consistent // of those that are not down; of all where all are
}

// joints are what Dragonfly's daemons put between a scheduler's address and its host
// where they name it in their ring: those of today first, then older ones. Where the
// two differ about a task, both schedulers are told of it, and asked.
var joints = [2]string{":", ""}

// scheduler is one of them.
type scheduler struct {
	addr string
	conn *grpc.ClientConn
	rpc  schedulerv1.SchedulerClient
	down bool // guarded by schedulers.mu
}

func newSchedulers(addrs []string) (_ *schedulers, err error) {
	s := new(schedulers)
	defer func() {
		if err != nil {
			_ = s.close() // the error before it is what counts
		}
	}()
	for _, addr := range addrs {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return nil, fmt.Errorf("scheduler %q: %w: want HOST:PORT, such as 10.0.0.1:8002", addr, err)
		}
		conn, err := dial(addr)
		if err != nil {
			return nil, fmt.Errorf("scheduler %s: %w", addr, err)
		}
		s.all = append(s.all, &scheduler{addr: addr, conn: conn, rpc: schedulerv1.NewSchedulerClient(conn)})
	}
	if len(s.all) == 0 {
		return nil, errors.New("there is no scheduler: name one at least, as HOST:PORT")
	}
	s.place()
	return s, nil
}

// dial returns a connection with a host of the cluster.
func dial(addr string) (*grpc.ClientConn, error) {
	return wire.Dial("passthrough:///"+addr, grpc.WithNoProxy())
}

func (s *schedulers) close() error {
	var errs []error
	for _, sched := range s.all {
		errs = append(errs, sched.conn.Close())
	}
	return errors.Join(errs...)
}

// element is what stands for a scheduler in the ring: its address, and after it
// its host once more. That is what Dragonfly's daemons do, and all have to do the same.
func (s *scheduler) element(joint string) string {
	host, _, _ := net.SplitHostPort(s.addr)
	return s.addr + joint + host
}

// place makes the rings. As Dragonfly's daemons do, it leaves out those that are down.
func (s *schedulers) place() {
	for i, joint := range joints {
		ring := consistent.New()
		for _, sched := range s.all {
			if !sched.down {
				ring.Add(sched.element(joint))
			}
		}
		if len(ring.Members()) == 0 {
			for _, sched := range s.all {
				ring.Add(sched.element(joint))
			}
		}
		s.rings[i] = ring
	}
}

// mark notes whether a scheduler is down, and reports whether that is news.
func (s *schedulers) mark(sched *scheduler, down bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sched.down == down {
		return false
	}
	sched.down = down
	s.place()
	return true
}

// up reports whether any scheduler is not known to be down.
func (s *schedulers) up() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sched := range s.all {
		if !sched.down {
			return true
		}
	}
	return false
}

// of returns the schedulers of a task, one or two: that of today's daemons first.
func (s *schedulers) of(id string) (found []*scheduler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, joint := range joints {
		element, _ := s.rings[i].Get(id) // no ring is ever empty
		for _, sched := range s.all {
			if sched.element(joint) == element && !slices.Contains(found, sched) {
				found = append(found, sched)
			}
		}
	}
	return found
}

// errDown is wire.ErrAway because nobody is there: Dragonfly's daemons leave such a
// scheduler out of their ring, and one that is only silent they do not.
var errDown = fmt.Errorf("%w", wire.ErrAway)

// call calls a scheduler within limit, and says what its error is: one that matches
// [p2p.ErrNotFound] where it does not know what it was asked about, wire.ErrAway where
// it does not answer.
func (s *scheduler) call(ctx context.Context, what string, limit time.Duration, do func(context.Context) error) error {
	st, late, err := wire.Call(ctx, limit, do)
	if st == nil {
		return err
	}
	at := fmt.Sprintf("%s: scheduler %s", what, s.addr)
	switch code := wire.Code(st); {
	case code == commonv1.Code_PeerTaskNotFound, code == commonv1.Code_SchedPeerNotFound:
		return fmt.Errorf("%s: %w: %s", at, p2p.ErrNotFound, st.Message())
	case late:
		return fmt.Errorf("%s: %w: no answer within %s: see that it runs", at, wire.ErrAway, limit)
	case st.Code() == codes.Unavailable, st.Code() == codes.Canceled: // cancelled by the other side: ctx has not ended
		return fmt.Errorf("%s: %w: %s: see that it runs, and that this is its address", at, errDown, wire.Reason(st))
	}
	return fmt.Errorf("%s: %s", at, st.Message())
}
