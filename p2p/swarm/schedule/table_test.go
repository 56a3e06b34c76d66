package schedule

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var writeTable = flag.Bool("schedule.table", false,
	"simulate all that docs/swarm.md shows, and write it there (some minutes)")

const document = "../../../docs/swarm.md"

// The tables are between these lines of the document.
const (
	tableBegin = "<!-- Made by: go test ./p2p/swarm/schedule -run TestTable -schedule.table -timeout 1h -->"
	tableEnd   = "<!-- The end of what is made. -->"
)

// knows is how many others a peer of a larger swarm looks for.
const knows = 10

// TestSimulation has the bounds that the rule has to keep. They are of simulated
// time, which is the same on every machine.
func TestSimulation(t *testing.T) {
	for _, test := range []struct {
		peers, knows, seeds int
		limit               float64 // times the lower bound
	}{
		{peers: 1, seeds: 1, limit: 1.005},
		{peers: 2, seeds: 3, limit: 1.04},
		{peers: 8, seeds: 3, limit: 1.07},
		{peers: 16, seeds: 3, limit: 1.14},
		{peers: 100, knows: knows, seeds: 1, limit: 1.30},
	} {
		if testing.Short() && test.peers > 16 {
			continue
		}
		t.Run(fmt.Sprintf("peers=%d", test.peers), func(t *testing.T) {
			t.Parallel()
			for seed := range test.seeds {
				c := circumstances{peers: test.peers, pieces: 256, knows: test.knows, seed: uint64(seed)}
				w := simulate(c)
				complete(t, w)
				if got := w.time() / c.bound(); got > test.limit {
					t.Errorf("seed %d: the last of %d peers took %.3f times the lower bound, want at most %.3f", seed,
						c.peers, got, test.limit)
				}
				if w.surplus() > 5 {
					t.Errorf("seed %d: a peer received %.1f pieces in vain", seed, w.surplus())
				}
			}
		})
	}
}

// complete fails the test unless every peer has the whole blob.
func complete(t *testing.T, w *swarm) {
	t.Helper()
	for _, n := range w.nodes {
		if !n.download.Complete() {
			t.Fatalf("peer %s stopped with %d of %d pieces", n.name, n.download.Held().Count(), w.pieces)
		}
	}
}

// TestAdversity has what must not bring a swarm to a stop, nor slow it down
// more than has to be.
func TestAdversity(t *testing.T) {
	t.Run("the seed leaves", func(t *testing.T) {
		t.Parallel()
		w := simulate(circumstances{peers: 16, pieces: 256, leaves: true})
		complete(t, w)
		if left := float64(w.left) / float64(w.whole()); left == 0 || left > 1.08 || w.time() > 1.25 {
			t.Errorf("the seed left after %.3f, the last peer was done after %.3f of S/B", left, w.time())
		}
	})
	t.Run("a slow peer", func(t *testing.T) {
		t.Parallel()
		w := simulate(circumstances{peers: 16, pieces: 256, slow: 1})
		complete(t, w)
		if times := w.times(); times[14] > 1.3 || times[15] > 10.2 {
			t.Errorf("the others took %.3f, the slow one %.3f of S/B", times[14], times[15])
		}
	})
	t.Run("one after the other", func(t *testing.T) {
		t.Parallel()
		w := simulate(circumstances{peers: 16, pieces: 256, stagger: 100})
		complete(t, w)
		if w.time() > 1.3 {
			t.Errorf("a peer took %.3f of S/B", w.time())
		}
	})
	t.Run("every policy", func(t *testing.T) {
		t.Parallel()
		for p := uploaderPicks; p <= downloaderPicksFirst; p++ {
			complete(t, simulate(circumstances{peers: 16, pieces: 64, policy: p}))
		}
	})
}

func TestSimulationIsDeterministic(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	c := circumstances{peers: 30, pieces: 64, knows: 6, seed: 7}
	a, b := simulate(c), simulate(c)
	if !slices.Equal(a.times(), b.times()) || a.messages != b.messages {
		t.Error("the same swarm came out in two ways")
	}
	c.seed++
	if slices.Equal(a.times(), simulate(c).times()) {
		t.Error("the seed makes no difference")
	}
}

// inOneLine is text whose lines may have been broken anew.
func inOneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// TestTable compares the document with what small swarms do now, or writes it.
func TestTable(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	doc, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(doc, []byte(tableBegin+"\n"))
	made, after, ok2 := bytes.Cut(rest, []byte(tableEnd+"\n"))
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the tables: %s", document, tableBegin)
	}
	if *writeTable {
		var b bytes.Buffer
		for i, table := range tables {
			fmt.Fprintf(&b, "\n%s\n\n%s\n|%s\n", table.about, table.head,
				strings.Repeat("---|", strings.Count(table.head, "|")-1))
			for _, row := range table.rows {
				fmt.Fprintln(&b, row.line())
				t.Logf("table %d: %s", i, row.label)
			}
		}
		b.WriteString("\n")
		doc = slices.Concat(before, []byte(tableBegin+"\n"), b.Bytes(), []byte(tableEnd+"\n"), after)
		if err := os.WriteFile(document, doc, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	lines := strings.Split(string(made), "\n")
	for _, table := range tables {
		if !slices.Contains(lines, table.head) || !strings.Contains(inOneLine(string(made)), inOneLine(table.about)) {
			t.Errorf("%s has not this table: %s", document, table.head)
		}
		for _, row := range table.rows {
			if !slices.ContainsFunc(lines,
				func(line string) bool { return strings.HasPrefix(line, "| "+row.label+" |") }) {
				t.Errorf("%s has no row %q", document, row.label)
			}
			if !row.checked {
				continue
			}
			t.Run(row.label, func(t *testing.T) {
				t.Parallel()
				if line := row.line(); !slices.Contains(lines, line) {
					t.Errorf("%s is stale: its tables have not\n%s\nMake them with the command that is there.",
						document, line)
				}
			})
		}
	}
}

type table struct {
	about string
	head  string
	rows  []row
}

type row struct {
	label   string
	checked bool // by every test run; others take too long
	cells   func() []string
}

func (r row) line() string { return "| " + r.label + " | " + strings.Join(r.cells(), " | ") + " |" }

var tables = []table{
	{
		about: "Time of the last peer, in S/B, and in parentheses how many times the lower bound that is. " +
			"In swarms of 100 and more, each peer looks for 10 others, the seed among them or not, and knows those " +
			"that looked for it, too.",
		head: "| peers, pieces | uploader picks (the rule) | the same, ties at random | downloader picks at random | " +
			"downloader picks in order | pieces received in vain | messages a piece |",
		rows: []row{
			compared(1, 256), compared(2, 256), compared(8, 256), compared(16, 256), compared(16, 512),
			compared(100, 256), compared(100, 512), compared(500, 256), compared(5000, 256),
		},
	},
	{
		about: "When things are not even. The times are of the first, the middle and the last of 100 peers, each " +
			"from its own start.",
		head: "| 100 peers, 256 pieces | first | middle | last |",
		rows: []row{
			uneven("all the same", circumstances{}),
			uneven("a message takes five times as long", circumstances{latency: 1000}),
			uneven("a message takes ten times as long", circumstances{latency: 500}),
			uneven("one peer has a tenth of the bandwidth", circumstances{slow: 1}),
			uneven("ten peers have a tenth of the bandwidth", circumstances{slow: 10}),
			uneven("the seed leaves when it has sent each piece once", circumstances{leaves: true}),
			uneven("they come evenly over S/B", circumstances{stagger: 100}),
			uneven("they come evenly over 4 S/B", circumstances{stagger: 400}),
		},
	},
	{
		about: "How the defaults were chosen: times of the last peer over the lower bound, the worst of three " +
			"swarms. In the second column of each pair a message takes five times as long.",
		head: "| slots, requests, of one source | 8 peers | | 16 peers | | 100 peers | | messages a piece, 16 peers |",
		rows: []row{
			tuned(2, 4, 2), tuned(4, 4, 2), tuned(4, 8, 2), tuned(6, 6, 2), tuned(6, 8, 2), tuned(8, 8, 2),
			tuned(8, 10, 2), tuned(8, 16, 2), tuned(12, 16, 2), tuned(8, 10, 1), tuned(8, 10, 4),
		},
	},
}

func swarmOf(peers, pieces int) circumstances {
	c := circumstances{peers: peers, pieces: pieces}
	if peers >= 100 {
		c.knows = knows
	}
	return c
}

func compared(peers, pieces int) row {
	return row{fmt.Sprintf("%d, %d", peers, pieces), peers < 100 && pieces == 256, func() []string {
		var cells, more []string
		for p := uploaderPicks; p <= downloaderPicksFirst; p++ {
			if peers > 500 && p != uploaderPicks {
				cells = append(cells, "–") // minutes, and nothing new
				continue
			}
			c := swarmOf(peers, pieces)
			c.policy = p
			w := simulate(c)
			cells = append(cells, fmt.Sprintf("%.2f (%.2f)", w.time(), w.time()/c.bound()))
			if p == uploaderPicks {
				more = []string{fmt.Sprintf("%.1f", w.surplus()),
					fmt.Sprintf("%.1f", float64(w.messages)/float64(peers*pieces))}
			}
		}
		return append(cells, more...)
	}}
}

func uneven(label string, c circumstances) row {
	c.peers, c.pieces, c.knows = 100, 256, knows
	return row{label, false, func() []string {
		times := simulate(c).times()
		return []string{fmt.Sprintf("%.2f", times[0]), fmt.Sprintf("%.2f", times[50]), fmt.Sprintf("%.2f", times[99])}
	}}
}

func tuned(slots, requests, waits int) row {
	return row{fmt.Sprintf("%d, %d, %d", slots, requests, waits), false, func() []string {
		var cells []string
		messages := 0.0
		for _, peers := range []int{8, 16, 100} {
			for _, latency := range []int64{5000, 1000} {
				worst := 0.0
				for seed := range uint64(3) {
					c := swarmOf(peers, 256)
					c.slots, c.limits, c.latency, c.seed = slots, Limits{requests, waits}, latency, seed
					w := simulate(c)
					worst = max(worst, w.time()/c.bound())
					if peers == 16 && latency == 5000 {
						messages = max(messages, float64(w.messages)/float64(16*256))
					}
				}
				cells = append(cells, fmt.Sprintf("%.2f", worst))
			}
		}
		return append(cells, fmt.Sprintf("%.1f", messages))
	}}
}
