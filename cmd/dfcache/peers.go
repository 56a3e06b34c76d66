package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// knownPeer is one line of the peers.
type knownPeer struct {
	ID        string     `json:"id"`
	State     string     `json:"state"` // connected, away, shunned, foreign or cloned
	Mode      string     `json:"mode"`  // full, seed-only, never-serve, or "" where it has not told
	Addresses []string   `json:"addresses"`
	Gave      int64      `json:"gave"`     // bytes
	Took      int64      `json:"took"`     // bytes
	Latency   float64    `json:"latency"`  // milliseconds
	LastSeen  *time.Time `json:"lastSeen"` // null where never
	Faults    int        `json:"faults"`
	Reason    string     `json:"reason"`  // of the last fault, or of the state
	Version   string     `json:"version"` // of its dfdaemon, or "" where it has not told
	Ahead     float64    `json:"ahead"`   // seconds that its clock is ahead of this host's; 0 where it is not known
}

func newKnownPeer(p blobstore.Peer) knownPeer {
	k := knownPeer{
		ID: p.ID, State: string(p.State), Mode: p.Mode, Addresses: append([]string{}, p.Addresses...),
		Gave: p.Gave, Took: p.Took, Latency: float64(p.Latency) / float64(time.Millisecond), Faults: p.Faults,
		Reason:  p.Reason,
		Version: p.Version, Ahead: p.Ahead.Seconds(),
	}
	if !p.LastSeen.IsZero() {
		k.LastSeen = &p.LastSeen
	}
	return k
}

func (a *app) peersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peers",
		Short: "Show the peers of this host in the P2P cache",
		Long: `
The "peers" command prints the dfdaemons of other hosts that the one of this host
knows, those that it is connected with first. The columns are

    STATE      connected; away: known, and not connected now; shunned: caught with
               wrong data, and asked for nothing for a while; foreign: its dfdaemon is
               too old or too new for this one; cloned: two hosts have this identity,
               which may be that of this host
    MODE       full, seed-only or never-serve, as the peer was started
    GAVE       bytes of files that it has given to this host
    TOOK       bytes of files that it has taken from this host
    LATENCY    of a request and its answer
    CLOCK      how far its clock is ahead (+) or behind (-), from a second on
    LAST SEEN  when it was heard of last
    FAULTS     how often it was caught, and with what the last time; or what else is to
               be known: that it does not answer, or that names were moved on both hosts
    ADDRESSES  where it can be reached

A "-" stands for what is not known. As JSON the peers are an array of objects, in
which "latency" is in milliseconds and "ahead" in seconds, 0 where they are not known,
and "lastSeen" is null where that was never. A template is executed on all of it.

` + storeStatus(),
		Example: `  dfcache peers
  dfcache peers --format json | jq -r '.[] | select(.state == "connected") | .id'
  dfcache peers --template '{{range .}}{{println .id .gave .took}}{{end}}'`,
		Args: exit.Args(func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("cid") || cmd.Flags().Changed("tag") {
				return errors.New(
					"peers takes no --cid and no --tag: use 'dfcache stat' to see how many peers hold a file")
			}
			return exit.NoArgs(cmd, args)
		}),
		PreRunE: a.load,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.session(cmd, a.consoleFile(false), func(ctx context.Context, s *session) error {
				return s.peers(ctx)
			})
		},
	}
	a.result.flags(cmd)
	return cmd
}

func (s *session) peers(ctx context.Context) error {
	store, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer store.Close()
	found, err := store.Peers(ctx)
	if err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	peers := []knownPeer{}
	for _, p := range found {
		peers = append(peers, newKnownPeer(p))
	}
	return s.result.print(s.out, peers, peersText(peers))
}

func peersText(peers []knownPeer) string {
	if len(peers) == 0 {
		return "no peers are known: start dfdaemon on other hosts, with the same swarm key, and give its bootstrap " +
			"addresses where they are not on one network\n"
	}
	var text strings.Builder
	const line = "%-52s  %-9s  %-11s  %10s  %10s  %8s  %-8s  %-25s  %-6s  %s\n"
	fmt.Fprintf(&text, line, "ID", "STATE", "MODE", "GAVE", "TOOK", "LATENCY", "CLOCK", "LAST SEEN",
		"FAULTS", "ADDRESSES")
	for _, p := range peers {
		latency, seen, ahead := "-", "-", "-"
		if math.Abs(p.Ahead) >= 1 {
			ahead = fmt.Sprintf("%+.0fs", p.Ahead)
		}
		if p.Latency > 0 {
			latency = fmt.Sprintf("%.1f ms", p.Latency)
		}
		if p.LastSeen != nil {
			seen = moment(*p.LastSeen)
		}
		faults := fmt.Sprint(p.Faults)
		if p.Reason != "" {
			faults += " (" + printable(p.Reason) + ")"
		}
		addresses := cmp.Or(printable(strings.Join(p.Addresses, " ")), "-")
		fmt.Fprintf(&text, line, printable(p.ID), p.State, cmp.Or(printable(p.Mode), "-"), human(p.Gave), human(p.Took),
			latency, ahead, seen, faults, addresses)
	}
	return text.String()
}

// warnOfClocks says on stderr where the clock of this host and those of peers differ,
// after a command about a name.
func (s *session) warnOfClocks(ctx context.Context, store *blobstore.Store) {
	if text := store.ClockWarning(ctx); text != "" {
		s.warn(printable(text))
	}
}
