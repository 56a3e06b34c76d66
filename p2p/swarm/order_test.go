package swarm

import (
	"errors"
	"flag"
	"fmt"
	mathrand "math/rand/v2"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/dfcache/dfcache/p2p"
)

var orderSeeds = flag.Int("swarm.orders", 4, "how many orders TestOrder tries")

// Hosts whose clocks are set anyhow move and delete a name, together and apart: what comes
// last counts on all of them, and of what was done apart nothing that only one side has done
// is undone.
func TestOrder(t *testing.T) {
	seeds := *orderSeeds
	if testing.Short() {
		seeds = min(seeds, 1)
	}
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { testOrder(t, mathrand.New(mathrand.NewPCG(seed, 1))) })
	}
}

func testOrder(t *testing.T, r *mathrand.Rand) {
	h := newHub()
	var clocks [3]testClock
	var hosts []*testPeer
	wrong := []time.Duration{0, 0, 4 * time.Second, 5 * time.Minute, year, -5 * time.Minute, -year}
	set := func() { clocks[r.IntN(3)].set(wrong[r.IntN(len(wrong))]) }
	for i := range clocks {
		set()
		hosts = append(hosts, h.start(t, clocks[i].with))
	}
	const name = "v"
	// known is what a host knows of the name: what it stands for, or nothing.
	type state struct {
		task    p2p.Task
		touched bool // since they were apart
	}
	known := [3]state{}
	apart := -1 // the host that is
	var said []string
	side := func(i int) (all []int) {
		for j := range hosts {
			if apart < 0 || (i == apart) == (j == apart) {
				all = append(all, j)
			}
		}
		return all
	}
	keep := func() { // all have it on their own
		t.Helper()
		eventually(t, "they do not meet", func() bool {
			for _, p := range hosts {
				for _, other := range hosts {
					e := p.peers.get(other.id)
					if _, known := e.skew(readingOf(time.Now())); p != other &&
						(!known || e.silence() > 0 || len(p.network.Connected()) != 2) {
						return false
					}
				}
			}
			return true
		})
		for _, p := range hosts {
			if _, err := p.holdName(t, "m", name); err != nil && !errors.Is(err, p2p.ErrNotFound) {
				t.Fatal(err)
			}
		}
	}
	check := func(what string) {
		t.Helper()
		for i, p := range hosts {
			look := p.Stat
			if apart >= 0 || r.IntN(3) == 0 {
				look = p.HoldManifest
			}
			info, err := look(t.Context(), "m", cidOf(t, name), p2p.StatOptions{Manifest: true})
			if errors.Is(err, p2p.ErrUnreachable) {
				err = p2p.ErrNotFound
			}
			if want := known[i].task; want == (p2p.Task{}) && !errors.Is(err, p2p.ErrNotFound) ||
				want != (p2p.Task{}) && (err != nil || info.Task != want) {
				t.Fatalf("%v\n%s: on host %d it is %v, %v; want %v", said, what, i, info.Task, err, want)
			}
		}
	}
	keep()
	for step := range 25 {
		i := r.IntN(3)
		what := ""
		switch r.IntN(7) {
		case 0, 1, 2:
			task := hosts[i].pushNamed(t, p2p.NewName{Tag: "m", Name: name, KeepOld: r.IntN(2) == 0},
				"", fmt.Appendf(nil, "%d %d", step, r.Uint64()))
			what = fmt.Sprintf("%d moves it to %s", i, task.Digest[7:12])
			for _, j := range side(i) {
				known[j] = state{task, true}
			}
		case 3:
			_, err := hosts[i].Delete(t.Context(), "m", cidOf(t, name), p2p.DeleteOptions{NameOnly: r.IntN(2) == 0})
			if there := known[i].task != (p2p.Task{}); there != (err == nil) {
				t.Fatalf("%v\nhost %d deletes it: %v", said, i, err)
			}
			what = fmt.Sprintf("%d deletes it", i)
			for _, j := range side(i) {
				if known[j].task != (p2p.Task{}) {
					known[j] = state{touched: true}
				}
			}
		case 4:
			set()
			what = "a clock is set"
		case 5:
			if apart < 0 {
				keep()
				apart = i
				for j := range known {
					known[j].touched = false
				}
				h.setCut(func(x, y peer.ID) bool { return (x == hosts[i].id) != (y == hosts[i].id) })
				what = fmt.Sprintf("%d is apart", i)
			}
		case 6:
			if apart < 0 {
				continue
			}
			one, other := known[apart], known[(apart+1)%3]
			all := one
			switch {
			case !one.touched:
				all = other
			case !other.touched || other.task == (p2p.Task{}):
			case one.task == (p2p.Task{}):
				all = other
			default: // both have moved it: one counts
				all.task = p2p.Task{}
			}
			both := one.touched && other.touched && one.task != (p2p.Task{}) && other.task != (p2p.Task{}) &&
				one.task != other.task
			apart = -1
			h.setCut(nil)
			keep()
			what = "all are together"
			deadline := time.Now().Add(10 * time.Second)
			for { // they have met when they say the same
				var got [3]p2p.Task
				for j, p := range hosts {
					info, err := p.statName(t, "m", name, p2p.StatOptions{})
					if err == nil {
						got[j] = info.Task
					}
				}
				if both && got[0] != one.task && got[0] != other.task {
					t.Fatalf("%v\nboth moved it, and it is %v", said, got)
				}
				if got[0] == got[1] && got[1] == got[2] && (both || got[0] == all.task) {
					all.task = got[0]
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%v\nthey do not agree: %v, want %v", said, got, all.task)
				}
				<-time.After(time.Millisecond)
			}
			for j := range known {
				known[j] = state{all.task, false}
			}
		}
		said = append(said, what+";")
		check(what)
	}
}
