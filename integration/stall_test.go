package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// exporting is an export that runs in the background.
type exporting struct {
	h     *host
	out   string
	ended chan struct{}
	says  string
	code  int
}

// beginExport begins an export, and returns when some of the file has arrived.
func (h *host) beginExport(args ...string) *exporting {
	t := h.lan.t
	t.Helper()
	e := &exporting{h: h, out: filepath.Join(tempHome(t), "out"), ended: make(chan struct{})}
	go func() {
		defer close(e.ended)
		_, e.says, e.code = h.run(t, nil, append([]string{"export", "-O", e.out}, args...)...)
	}()
	t.Cleanup(func() { <-e.ended })
	for h.partialBytes() < 1<<20 {
		select {
		case <-e.ended:
			t.Fatalf("the export ends with exit status %d before much has arrived: %s", e.code, e.says)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return e
}

// partialBytes is what a host has of files that are not whole.
func (h *host) partialBytes() (n int64) {
	files, _ := filepath.Glob(filepath.Join(h.home, "data", "partial", "*"))
	for _, name := range files {
		var s syscall.Stat_t
		if syscall.Stat(name, &s) == nil {
			n += s.Blocks * 512
		}
	}
	return n
}

// end waits for the end, which has to come well before the minutes that it might take.
func (e *exporting) end() (code int, says string) {
	e.h.lan.t.Helper()
	select {
	case <-e.ended:
	case <-time.After(45 * time.Second):
		e.h.lan.t.Fatal("the export does not end")
	}
	return e.code, e.says
}

// has checks that the export has succeeded.
func (e *exporting) has(data []byte) {
	t := e.h.lan.t
	t.Helper()
	if code, says := e.end(); code != 0 {
		t.Fatalf("the export ends with exit status %d: %s", code, says)
	}
	if got, err := os.ReadFile(e.out); err != nil || string(got) != string(data) {
		t.Errorf("exported are %d bytes, %v", len(got), err)
	}
}

// arrived waits until a host has so many bytes of files that are not whole.
func (h *host) arrived(n int64) {
	t := h.lan.t
	t.Helper()
	for h.partialBytes() < n {
		if h.lan.late() {
			t.Fatalf("host %d: %d bytes have arrived, want %d", h.n, h.partialBytes(), n)
		}
	}
}

func (h *host) signal(s syscall.Signal) {
	h.lan.t.Helper()
	if err := syscall.Kill(h.cmd.Process.Pid, s); err != nil {
		h.lan.t.Fatal(err)
	}
}

// stopped stops the host's daemon, for as long as f runs.
func (h *host) stopped(f func()) {
	h.signal(syscall.SIGSTOP)
	defer h.signal(syscall.SIGCONT)
	f()
}

// Whoever stops in the middle of a download, its only source or the receiver: somebody else is connected.
func TestStall(t *testing.T) {
	l := newLAN(t, 3)
	a, b, c := l.hosts[0], l.hosts[1], l.hosts[2]
	short := []string{"--stall-timeout", "1s", "--lookup-timeout", "1s"}
	a.start("--upload-rate", "5MiB")
	b.start(short...)
	c.start()
	l.meet(2)

	// The source for good: that is said, and then it is over.
	name, data, cid := l.file(6<<20, 1)
	a.ok("import", "-i", cid, name)
	a.stopped(func() {}) // it can be
	e := b.beginExport("-i", cid)
	a.stopped(func() {
		code, says := e.end()
		if code != unreachable || !strings.Contains(says, "dfcache: waiting: ") || !strings.Contains(says, "are kept") {
			t.Errorf("without its source the export ends with exit status %d: %s", code, says)
		}
	})
	b.export(data, "-i", cid)

	// The source for a while, and the receiver for longer than a download goes on without progress.
	for i, stop := range []*host{a, b} {
		name, data, cid := l.file(6<<20, uint64(2+i))
		a.ok("import", "-i", cid, name)
		l.meet(2)
		e := b.beginExport("-i", cid)
		stop.stopped(func() { time.Sleep(time.Duration(2+2*i) * time.Second) })
		e.has(data)
	}
	if peers := b.ok("peers"); strings.Contains(peers, "sent nothing") {
		t.Errorf("a stall is a fault:\n%s", peers)
	}
}

// A file that goes while it is fetched: a caller that waits for it is told at once, and what has arrived goes, too.
func TestDeleteDuringDownload(t *testing.T) {
	l := newLAN(t, 3)
	a, b, c := l.hosts[0], l.hosts[1], l.hosts[2]
	a.start("--upload-rate", "2MiB")
	b.start()
	c.start()
	l.meet(2)
	for i, end := range []func(){
		func() { c.ok("delete", "-t", "models", "-i", "v1") },
		func() {
			other, _, _ := l.file(1000, 9)
			a.ok("import", "-t", "models", "-i", "v1", other)
		},
	} {
		name, _, _ := l.file(12<<20, uint64(1+i))
		a.ok("import", "-t", "models", "-i", "v1", name)
		e := b.beginExport("-t", "models", "-i", "v1")
		end()
		began := time.Now()
		// Where the name has moved, it is what it stands for now that is exported.
		if code, says := e.end(); code != notFound && (i == 0 || code != 0) {
			t.Errorf("%d: the export ends with exit status %d: %s", i, code, says)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("%d: that took %s", i, took)
		}
		for b.partialBytes() > 0 {
			if l.late() {
				t.Fatalf("%d: %d bytes are left of what was deleted", i, b.partialBytes())
			}
		}
	}
}
