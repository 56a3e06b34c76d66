package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
	"github.com/prometheus/client_golang/prometheus"
)

// What libraries would print on stderr goes to the log, as debug.
func TestLogLibraries(t *testing.T) {
	var log bytes.Buffer
	logLibraries(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	gologshim.Logger("shim").With("a", 1).Error("from the shim", "b", 2)
	gologshim.Logger("shim").Info("not wanted")
	golog.Logger("zap").Error("from zap")
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("logged are %d lines, want 2:\n%s", len(lines), log.String())
	}
	for i, want := range [][]string{
		{"level=DEBUG", "logger=shim", "from the shim", "a=1", "b=2"},
		{"level=DEBUG", "zap: from zap"},
	} {
		for _, w := range want {
			if !strings.Contains(lines[i], w) {
				t.Errorf("no %q in %s", w, lines[i])
			}
		}
	}

	// Where debug is not logged, none of it is.
	log.Reset()
	logLibraries(slog.NewTextHandler(&log, nil))
	gologshim.Logger("other").Error("from the shim")
	golog.Logger("other").Error("from zap")
	if log.Len() > 0 {
		t.Errorf("logged is %s", log.String())
	}
}

// Whoever asks for metrics again and again holds so many connections, and has so many answers made, and no more.
func TestMetricsAreBounded(t *testing.T) {
	if testing.Short() && share(maxMetrics) < maxMetrics {
		t.Skip("-short: needs more descriptors than this process may have")
	}
	var log bytes.Buffer
	d := &daemon{options: &options{}, metrics: prometheus.NewRegistry(), log: slog.New(slog.NewTextHandler(&log, nil))}
	d.swarm.metrics, d.swarm.metricsFor = "127.0.0.1:0", "owner"
	counting, count := make(chan struct{}, 2*maxMetrics), make(chan struct{})
	d.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "slow"}, func() float64 {
		counting <- struct{}{}
		<-count
		return 0
	}))
	if err := d.serveMetrics(); err != nil {
		t.Fatal(err)
	}
	defer d.close()
	defer close(count)
	_, text, _ := strings.Cut(strings.TrimSpace(log.String()), "url=")
	at, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	ask := func() net.Conn {
		c, err := net.Dial("tcp", at.Host)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for range maxMetrics {
		conns = append(conns, ask())
		<-counting
	}
	answer, err := http.ReadResponse(bufio.NewReader(ask()), nil)
	if err != nil {
		t.Fatalf("one more: %v", err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("one more: %s", answer.Status)
	}
	if _, err := conns[0].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest connection stays: %v", err)
	}
}
