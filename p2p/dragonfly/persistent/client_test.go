package persistent

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/dragonfly/persistent/persistenttest"
)

// full is a file on a disk that is full.
type full struct{}

func (full) WriteAt([]byte, int64) (int, error) { return 0, syscall.ENOSPC }

// That this host can't write is not taken for something that Dragonfly does.
func TestDiskFull(t *testing.T) {
	cluster := persistenttest.StartCluster(t)
	c, err := newClient(cluster.Start(t).Socket, []string{cluster.Addr})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	task := p2p.Task{Tag: "t", Digest: digest.SHA256.FromString("data")}
	if err := c.upload(t.Context(), task, path, time.Hour, time.Minute); err != nil {
		t.Fatal(err)
	}
	_, err = c.download(t.Context(), task, full{}, 4, nil, limits{time.Minute, time.Minute, time.Minute})
	if !errors.Is(err, p2p.ErrNoSpace) || errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("download: %v; want that there is no space", err)
	}
}
