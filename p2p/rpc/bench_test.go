package rpc

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dfcache/dfcache/p2p"
)

func benchmarkServer(b *testing.B) (socket string, task p2p.Task) {
	b.Helper()
	s := newStore(b.TempDir())
	socket = filepath.Join(b.TempDir(), "run", "d.sock")
	l, err := Listen(socket)
	if err != nil {
		b.Fatal(err)
	}
	server := NewServer(s, slog.New(slog.NewTextHandler(io.Discard, nil)))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	b.Cleanup(func() { server.Shutdown(context.Background()); <-served })
	c := dial(b, socket)
	return socket, add(b, c, "", strings.NewReader("content"))
}

// BenchmarkDialAndStat is all that a short-lived client does.
func BenchmarkDialAndStat(b *testing.B) {
	socket, task := benchmarkServer(b)
	for b.Loop() {
		c, err := Dial(b.Context(), socket)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := stat(b.Context(), c, task); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

func BenchmarkStat(b *testing.B) {
	socket, task := benchmarkServer(b)
	c := dial(b, socket)
	for b.Loop() {
		if _, err := stat(b.Context(), c, task); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	socket, task := benchmarkServer(b)
	c := dial(b, socket)
	for b.Loop() {
		blob, err := c.Open(b.Context(), task, p2p.Local)
		if err != nil {
			b.Fatal(err)
		}
		blob.Close()
	}
}

func BenchmarkIngest10KiB(b *testing.B) {
	socket, _ := benchmarkServer(b)
	c := dial(b, socket)
	file := tempFile(b, bytes.Repeat([]byte("x"), 10<<10))
	for b.Loop() {
		file.Seek(0, io.SeekStart)
		add(b, c, "", file)
	}
}
