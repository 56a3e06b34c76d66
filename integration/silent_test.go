package integration

import (
	"strings"
	"testing"
	"time"
)

// A host vanishes without a word, and libp2p has not noticed yet. What is here is served,
// pushes and deletes go on, and what is nowhere is not found: nobody waits for the host.
func TestSwarmVanishedHost(t *testing.T) {
	// A question may take the lookup timeout, 3 s. It took 10 s and more.
	const soon = 8 * time.Second
	l := newLAN(t, 2)
	a, b := l.hosts[0], l.hosts[1]
	a.start()
	b.start()
	l.meet(1)
	u := a.user()
	registry := a.daemon.host
	timed := func(what string, do func()) {
		t.Helper()
		start := time.Now()
		do()
		took := time.Since(start)
		t.Logf("%s took %s", what, took.Round(time.Millisecond))
		if took > soon {
			t.Errorf("%s took %s, want %s at most", what, took, soon)
		}
	}
	run := func(args ...string) {
		t.Helper()
		timed(strings.Join(args, " "), func() { u.run(args...) })
	}
	fails := func(says string, args ...string) {
		t.Helper()
		timed(strings.Join(args, " "), func() { u.fails(says, args...) })
	}
	u.write("file.bin", content(300_000, 1))
	u.write("other.bin", content(200_000, 2))
	u.run("oras", "push", registry+"/models:v1", "file.bin")
	_, data, _ := l.file(300_000, 1)
	b.export(data, "-t", "models", "-i", "v1")

	b.plug(false)
	run("crane", "digest", registry+"/models:v1")
	fails("not found", "oras", "resolve", registry+"/models:nowhere")
	run("crane", "digest", registry+"/models:v1")
	fails("MANIFEST_UNKNOWN", "crane", "manifest", registry+"/models:nowhere")
	run("oras", "discover", registry+"/models:v1")
	run("oras", "push", registry+"/models:v2", "other.bin")
	run("crane", "copy", registry+"/models:v1", registry+"/crane:v1")
	run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
		"docker://"+registry+"/models:v1", "docker://"+registry+"/skopeo:v1")
	run("oras", "tag", registry+"/models:v1", "stable")
	timed("import", func() { a.ok("import", "-t", "models", "-i", "v3", u.dir+"/other.bin") })
	timed("delete", func() {
		if out := a.ok("delete", "-t", "models", "-i", "v1"); !strings.Contains(out, "silent") &&
			!strings.Contains(out, "no answer") {
			t.Errorf("delete does not say who was missed:\n%s", out)
		}
	})
	if out := a.ok("peers"); !strings.Contains(out, "has not answered") {
		t.Errorf("the peers are:\n%s", out)
	}

	b.plug(true)
	b.gone("-l", "-t", "models", "-i", "v1") // it is told when it answers
	b.eventually("stat", "-t", "models", "-i", "v3")
}
