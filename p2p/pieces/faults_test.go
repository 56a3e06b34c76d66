package pieces

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// requireClean fails the test unless the closed store in dir has nothing in
// ingest/, and a check of it finds nothing wrong.
func requireClean(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("ingest/ has %s", e.Name())
	}
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Check(context.Background(), func(p Problem) { t.Errorf("check: %s", p) }); err != nil {
		t.Fatal(err)
	}
}
