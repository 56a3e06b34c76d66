package main

import (
	"bytes"
	"context"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// TestProgressLines: without a terminal a line says every ten seconds how far a copy is, and none
// where it takes less.
func TestProgressLines(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a, asked := &app{stderr: w}, 0
	synctest.Test(t, func(t *testing.T) {
		set, end := a.progress(t.Context(), "export", func(context.Context) int64 { asked++; return 4 << 20 })
		set(1 << 20)
		time.Sleep(lineInterval - 1)
		end()
		if asked > 0 {
			t.Error("what is quick looks up its size all the same")
		}
		set, end = a.progress(t.Context(), "export", func(context.Context) int64 { asked++; return 4 << 20 })
		set(1 << 20)
		time.Sleep(lineInterval + 1)
		set(3 << 20)
		time.Sleep(lineInterval)
		end()
		time.Sleep(lineInterval)
		set, end = a.progress(t.Context(), "import", func(context.Context) int64 { return -1 })
		set(5)
		time.Sleep(lineInterval + 1)
		end()
	})
	w.Close()
	var got bytes.Buffer
	got.ReadFrom(r)
	const want = "dfcache: export: 1.0 MiB of 4.0 MiB (25 %)\n" +
		"dfcache: export: 3.0 MiB of 4.0 MiB (75 %)\n" +
		"dfcache: import: 5 B\n"
	if got.String() != want || asked != 1 {
		t.Errorf("printed\n%s\nwant\n%s\nthe size was asked for %d times", &got, want, asked)
	}
}
