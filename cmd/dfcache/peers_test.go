package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

// network is an engine with peers that a test makes up.
type network struct {
	*peertest.Engine
	mu        sync.Mutex // of what follows
	peers     []p2p.Peer
	missed    []p2p.Missed
	replicate func(ctx context.Context, n int) ([]string, error)
	partials  []p2p.Entry // of the tag "t"
	older     bool        // than partials
}

func (n *network) set(do func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	do()
}

func (n *network) Peers(context.Context) ([]p2p.Peer, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.peers, nil
}

func (n *network) Delete(ctx context.Context, tag string, cid digest.CID, opts p2p.DeleteOptions) (p2p.Deleted, error) {
	deleted, err := n.Engine.Delete(ctx, tag, cid, opts)
	n.mu.Lock()
	defer n.mu.Unlock()
	deleted.Reached, deleted.Removed, deleted.Missed = 3, 2, n.missed
	return deleted, err
}

func (n *network) Replicate(ctx context.Context, _ string, _ digest.CID, count int) ([]string, error) {
	n.mu.Lock()
	replicate := n.replicate
	n.mu.Unlock()
	return replicate(ctx, count)
}

func (n *network) List(ctx context.Context, q p2p.Query) iter.Seq2[p2p.Entry, error] {
	if q.Kind != p2p.KindPartials {
		return n.Engine.List(ctx, q)
	}
	n.mu.Lock()
	partials, older := n.partials, n.older
	n.mu.Unlock()
	return func(yield func(p2p.Entry, error) bool) {
		if older {
			yield(p2p.Entry{}, fmt.Errorf("kind 4: %w: it is missing, or not known", digest.ErrInvalid))
			return
		}
		for _, e := range partials {
			if (q.Tag == nil || *q.Tag == "t") && !yield(e, nil) {
				return
			}
		}
	}
}

// daemon serves the network and returns what runs dfcache with it.
func (n *network) daemon(t *testing.T) func(args ...string) output {
	t.Helper()
	dir := t.TempDir()
	socket := peertest.Serve(t, n)
	return func(args ...string) output {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "dfcache", append(args, "--daemon-sock", socket, "--logdir", dir)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "DFCACHE_CONFIG=", "HOME="+dir, "TZ=UTC")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return output{t, strings.Join(args, " "), cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	}
}

// output is what a run of dfcache gave.
type output struct {
	*testing.T
	what           string
	code           int
	stdout, stderr string
}

// want checks the exit code, and that stdout, or else stderr, has these lines.
func (o output) want(code int, lines ...string) output {
	o.Helper()
	if o.code != code {
		o.Fatalf("dfcache %s: exit code %d, want %d\n%s%s", o.what, o.code, code, o.stdout, o.stderr)
	}
	text := o.stdout
	if code != 0 {
		text = o.stderr
	}
	for _, line := range lines {
		if !regexp.MustCompile(`(?m)^` + line + `$`).MatchString(text) {
			o.Errorf("dfcache %s: no line %s in\n%s", o.what, line, text)
		}
	}
	return o
}

// json checks a field of the result.
func (o output) json(key, want string) output {
	o.Helper()
	var fields map[string]json.RawMessage
	if err := json.Unmarshal([]byte(o.stdout), &fields); err != nil {
		o.Fatalf("dfcache %s: %v in %s", o.what, err, o.stdout)
	}
	var got bytes.Buffer
	if err := json.Compact(&got, fields[key]); err != nil || got.String() != want {
		o.Errorf("dfcache %s: %s is %s, want %s", o.what, key, &got, want)
	}
	return o
}

// imported stores data where the peer has it.
func (n *network) imported(t *testing.T, data []byte) blobstore.File {
	t.Helper()
	r, err := blobstore.New(n.Peer).Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	f, err := r.Import(t.Context(), "v1", bytes.NewReader(data), blobstore.ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFileOfPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	n := &network{Engine: peertest.New(t)}
	run := n.daemon(t)
	data := bytes.Repeat([]byte("content"), 30_000)
	f := n.imported(t, data)

	run("stat", "-t", "t", "-i", "v1").want(
		0, `digest: +`+f.Digest.String(), `local: +no`, `peers: +2 \(1 whole\), 1 of 3 did not answer`).
		lacks("imported").lacks("last used")
	run("stat", "-t", "t", "-i", "v1", "--format", "json").want(0).
		json("holders", `{"some":2,"whole":1,"asked":3,"silent":1}`).json("local", "false").json(
		"imported", "null").json("sources", "[]")
	run("stat", "-l", "-t", "t", "-i", "v1").want(3)
	run("stat", "-t", "t", "-i", "v2").want(3)

	run("export", "-l", "-t", "t", "-i", "v1", "none").want(3)
	run("export", "-t", "t", "-i", "v1", "out").want(
		0, `from: +peer 10\.0\.0\.7:4001 \(12D3KooWPeer\), 210000 B \(205\.1 KiB\)`)
	run("export", "-t", "t", "-i", "v1", "out2", "--format", "json").want(0).json("sources", "[]").json(
		"holders", "null").json("local", "true")
	run("export", "-t", "t", "-i", "v1", "out3").want(0, "from: +this host")
	run("stat", "-l", "-t", "t", "-i", "v1", "--format", "json").want(0).json("holders", "null").json("local", "true")
	run("stat", "-l", "-t", "t", "-i", "v1").want(0).lacks("peers:")

	n.Part()
	run("stat", "-t", "t", "-i", "v1").want(0, `local: +yes \(held 4 of 4\)`, `peers: +none to ask`)
	for _, args := range [][]string{{"stat", "-i", "v2"}, {"export", "-i", "v2", "none"}} {
		run(args...).want(
			11,
			`dfcache: .*no peer can be reached; another host may have it: see 'dfcache peers', and check dfdaemon's bootstrap addresses and swarm key`)
	}
}

// What has arrived of a file that nobody fetches any more is shown, also by a stat.
func TestPartials(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	n := &network{Engine: peertest.New(t)}
	run := n.daemon(t)
	f := n.imported(t, bytes.Repeat([]byte("content"), 30_000))
	lost := digest.SHA256.FromString("lost")
	n.set(func() {
		for _, d := range []digest.Digest{f.Digest, lost} {
			n.partials = append(n.partials, p2p.Entry{
				Info: p2p.Info{Task: p2p.Task{Tag: "t", Digest: d}, Size: f.Size, PieceLength: 65536, Pieces: 4,
					Held: 3, Keep: p2p.KeepUntilReferred},
				Total: 200_000,
			})
		}
	})
	run("list").want(0, `t +partial +195\.3 KiB .*`+lost.String())
	run("list", "-t", "t").want(0, `t +partial +195\.3 KiB .*`+lost.String())
	run("list", "-t", "other").want(0).lacks("partial")
	run("stat", "-t", "t", "-i", "v1").want(0, `local: +no \(held 3 of 4\)`)
	run("stat", "-t", "t", "-i", "v1", "--format", "json").want(0).json("held", "3").json("local", "false")
	run("stat", "-t", "t", "-i", lost.String()).want(
		3, `dfcache: stat: .*: not found \(200000 bytes of it are here, and are kept for a while\): .*`)
	run("stat", "-l", "-t", "t", "-i", f.Digest.String()).want(
		3, `dfcache: stat: .* \(200000 bytes of it are here, and are kept for a while\) on this host: .*`)

	// A daemon of a release before does not know them, and is no reason to fail.
	n.set(func() { n.older = true })
	run("import", "-t", "t", "-i", "v2", "/proc/self/cmdline").want(0)
	for _, args := range [][]string{{"list"}, {"list", "--format", "json"},
		{"list", "-t", "t", "--template", "{{len .}}"}} {
		const warning = "dfcache: warning: what has arrived in part is not listed: dfdaemon at .* does not know this " +
			"call: install the same version of dfcache and dfdaemon"
		if o := run(args...).want(0); !regexp.MustCompile(warning).MatchString(o.stderr) {
			t.Errorf("dfcache %s: stderr is %s", o.what, o.stderr)
		}
	}
	run("stat", "-t", "t", "-i", "v1").want(0, "local: +no")
}

func (o output) lacks(text string) output {
	o.Helper()
	if strings.Contains(o.stdout, text) {
		o.Errorf("dfcache %s: %q in\n%s", o.what, text, o.stdout)
	}
	return o
}

func TestDeleteOnPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	n := &network{Engine: peertest.New(t)}
	run := n.daemon(t)
	store := func() { run("import", "-i", "v1", "/proc/self/cmdline").want(0) }
	store()
	if o := run("delete", "-i", "v1").want(0, `removed: +3 blobs`,
		`peers: +reached 3, removed on 2`).lacks("missed"); o.stderr != "" {
		t.Errorf("stderr has %s", o.stderr)
	}
	n.set(func() {
		n.missed = []p2p.Missed{{Peer: "12D3KooWA", Address: "10.0.0.7:4001", Reason: "away since \x1b[1myesterday"},
			{Peer: "12D3KooWB", Reason: "it refused"}}
	})
	store()
	o := run("delete", "-i", "v1").want(0, `missed: +12D3KooWA 10\.0\.0\.7:4001: "away since \\x1b\[1myesterday"`,
		`missed: +12D3KooWB \(no address\): it refused`)
	for _, want := range []string{"warning: 2 peers were not reached; a dfdaemon of the swarm deletes it when it " +
		"returns:", "  12D3KooWB (no address): it refused\n"} {
		if !strings.Contains(o.stderr, want) {
			t.Errorf("stderr does not say %q:\n%s", want, o.stderr)
		}
	}
	n.set(func() { n.missed = n.missed[1:] })
	store()
	o = run("delete", "-i", "v1", "--format", "json").want(0).
		json("reached", "3").json("removed", "2").json(
		"missed", `[{"peer":"12D3KooWB","address":"","reason":"it refused"}]`)
	if !strings.Contains(o.stderr, "warning: 1 peer was not reached") {
		t.Errorf("stderr is %s", o.stderr)
	}
	n.set(func() { n.missed = nil })
	store()
	run("delete", "-i", "v1", "--format", "json").want(0).json("missed", "[]")
}

func TestImportWithReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	n := &network{Engine: peertest.New(t)}
	run := n.daemon(t)
	n.replicate = func(_ context.Context, count int) ([]string, error) {
		ids := []string{"12D3KooWA", "12D3KooWB"}
		if count > len(ids) {
			return nil, fmt.Errorf("%w: 2 of %d peers hold it", p2p.ErrUnreachable, count)
		}
		return ids[:count], nil
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	run("import", "-i", "v1", "--replicas", "2", file).want(0, `size: +7 B`, `replicas: +2: 12D3KooWA, 12D3KooWB`)
	run("import", "-i", "v1", file).want(0).lacks("replicas")
	run("import", "-i", "v1", "--format", "json", file).want(0).json("replicas", "[]").json("size", "7")
	run("import", "-i", "v1", "--replicas", "1", "--format", "json", file).want(0).json(
		"replicas", `["12D3KooWA"]`).json("cid", `"v1"`)
	run("import", "-i", "v1", "--replicas", "1", "--template", "{{.cid}} {{index .replicas 0}}", file).want(
		0, "v1 12D3KooWA")
	run("import", "-i", "v1", "--replicas", "-1", file).want(2, "dfcache: --replicas -1 is negative: .*")

	// The file is stored all the same, and the user is told so.
	run("import", "-i", "v3", "--replicas", "3", file).
		want(
			11,
			`dfcache: import: the file is stored on this host as v3, but not on 3 peers, too: .*2 of 3 peers hold it: see 'dfcache peers', .*`)
	run("stat", "-l", "-i", "v3").want(0)

	n.set(func() {
		n.replicate = func(ctx context.Context, _ int) ([]string, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
	})
	r, err := blobstore.New(n.Peer).Repository("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Import(t.Context(), "v4", strings.NewReader("content"), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	run("import", "-i", "v4", "--replicas", "2", "--timeout", "2s", file).
		want(
			5,
			`dfcache: import: the file is stored on this host as v4, but not on 2 peers, too: --timeout 2s was not enough, and 1 peer holds it whole by now`)
	run("stat", "-l", "-i", "v4").want(0)
}

func TestPeers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	n := &network{Engine: peertest.New(t)}
	run := n.daemon(t)
	run("peers").want(0, `no peers are known: start dfdaemon on other hosts, .*`)
	run("peers", "--format", "json").want(0, `\[\]`)

	n.set(func() {
		n.peers = []p2p.Peer{
			{
				ID: "12D3KooWA", Addresses: []string{"10.0.0.7:4001", "[fd00::7]:4001"}, State: p2p.PeerConnected,
				Mode: "seed-only",
				Gave: 3 << 20, Took: 10, Latency: 1500 * time.Microsecond, LastSeen: time.Unix(1, 0),
				Version: "v1.2", Ahead: -5*time.Minute - time.Second/2,
			},
			{ID: "12D3KooWB", State: p2p.PeerShunned, Faults: 2, Reason: "a wrong\npiece"},
		}
	})
	run("peers").want(0,
		`ID +STATE +MODE +GAVE +TOOK +LATENCY +CLOCK +LAST SEEN +FAULTS +ADDRESSES`,
		`12D3KooWA +connected +seed-only +3\.0 MiB +10 B +1\.5 ms +-300s +1970-01-01T00:00:01Z +0 +10\.0\.0\.7:4001 \[fd00::7\]:4001`,
		`12D3KooWB +shunned +- +0 B +0 B +- +- +- +2 \("a wrong\\npiece"\) +-`)
	o := run("peers", "--format", "json").want(0)
	var got []map[string]any
	if err := json.Unmarshal([]byte(o.stdout), &got); err != nil || len(got) != 2 {
		t.Fatalf("%v in %s", err, o.stdout)
	}
	for key, want := range map[string]any{
		"id": "12D3KooWA", "state": "connected", "mode": "seed-only", "gave": 3.0 * (1 << 20), "took": 10.0,
		"latency":  1.5,
		"lastSeen": "1970-01-01T00:00:01Z", "faults": 0.0, "reason": "", "version": "v1.2", "ahead": -300.5,
	} {
		if got[0][key] != want {
			t.Errorf("%s is %v, want %v", key, got[0][key], want)
		}
	}
	if len(got[0]) != 12 || len(got[0]["addresses"].([]any)) != 2 || len(got[1]["addresses"].([]any)) != 0 ||
		got[1]["lastSeen"] != nil {
		t.Errorf("got %s", o.stdout)
	}
	run("peers", "--template", "{{range .}}{{println .id .state}}{{end}}").want(0, "12D3KooWB shunned")

	// Which move of a name counts depends on clocks: commands about one say where they differ.
	const warning = "warning: the clock of peer 12D3KooWA is 5m1s behind that of this host (1 of 1 peers differ by " +
		"more than 5s)"
	for args, want := range map[string]bool{"import -i v1 /proc/self/cmdline": true, "stat -i v1": true,
		"delete -i v1": true, "import /proc/self/cmdline": false, "list": false} {
		if o := run(strings.Fields(args)...); strings.Contains(o.stderr, warning) != want {
			t.Errorf("dfcache %s: stderr has %s", args, o.stderr)
		}
	}
	n.set(func() { n.peers[0].Ahead = 4 * time.Second })
	if o := run("import", "-i", "v1", "/proc/self/cmdline").want(0); o.stderr != "" {
		t.Errorf("stderr has %s", o.stderr)
	}
	run("peers", "-i", "v1").want(2, "dfcache: peers takes no --cid and no --tag: .*")
	run("peers", "-t", "t").want(2)
	run("peers", "surplus").want(2)
}

// Many peers are not all named.
func TestFrom(t *testing.T) {
	f := blobstore.File{Size: 1000}
	for i := range 15 {
		f.Sources = append(f.Sources, blobstore.Source{Peer: fmt.Sprint("p", i), Address: "a", Bytes: int64(i)})
	}
	var text facts
	text.from(f, time.Now())
	lines := strings.Split(strings.TrimSpace(text.String()), "\n")
	if len(lines) != maxSources+2 || !strings.Contains(lines[0], "p14") ||
		!strings.HasSuffix(lines[10], "5 more peers, 10 B") || !strings.HasSuffix(lines[11], "this host, 895 B") {
		t.Errorf("got\n%s", &text)
	}

	// A Dragonfly does not tell from whom: what was not here, or came since the export has begun, was elsewhere.
	began := time.Unix(10, 0)
	for want, f := range map[string]blobstore.File{
		"this host":   {Local: true, Imported: began.Add(-time.Second)},
		"other hosts": {Local: true, Imported: began.Add(time.Second)},
	} {
		var text facts
		text.from(f, began)
		if !strings.HasSuffix(strings.TrimSpace(text.String()), want) {
			t.Errorf("%+v: got %s, want %s", f, &text, want)
		}
	}
}
