package pieces

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

// snapshot tells everything of a directory that a change would change.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, path, info.Mode(), info.ModTime().UnixNano())
		if info.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			fmt.Fprintf(&b, "%x\n", digest.SHA256.FromBytes(content))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// checkDir checks a store and fails the test where that changes anything.
func checkDir(t *testing.T, dir string) ([]Problem, Summary) {
	t.Helper()
	before := snapshot(t, dir)
	var found []Problem
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sum, err := CheckDir(ctx, dir, func(p Problem) { found = append(found, p) })
	if err != nil {
		t.Errorf("check: %v", err)
	}
	if after := snapshot(t, dir); after != before {
		t.Errorf("the check changed the directory from\n%s\nto\n%s", before, after)
	}
	return found, sum
}

// TestCheckDirChangesNothing: a check leaves what an interruption has left for the next
// opening, and does not call it wrong.
func TestCheckDirChangesNothing(t *testing.T) {
	dir := t.TempDir()
	f := &faults{at: -1}
	s := openWith(t, dir, f)
	if _, err := importArtifact(t.Context(), s, "v0", []byte("old")); err != nil {
		t.Fatal(err)
	}
	if _, err := importArtifact(t.Context(), s, "v1", []byte("new")); err != nil {
		t.Fatal(err)
	}
	if _, err := CheckDir(t.Context(), dir, func(Problem) {}); !errors.Is(err, p2p.ErrUnavailable) ||
		!strings.Contains(err.Error(), fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("check of an open store: %v", err)
	}
	f.ops, f.at, f.dead, f.error = nil, 2, true, unix.EIO // after the records, before the files
	if _, err := s.Delete(t.Context(), "t", cacheID(t, "v0"), p2p.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.abandon()
	marked := digest.SHA256.FromString("marked")
	for name, content := range map[string]string{
		"ingest/aaaa": "half", "ingest/bbbb.sha256." + marked.Encoded(): "",
		"blobs/sha256/" + marked.Encoded(): "marked",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if found, sum := checkDir(t, dir); len(found) > 0 || sum.Blobs != 2 {
		t.Errorf("the check finds %v in %+v", found, sum)
	}
	// It needs no lock that was never made, and a store of an earlier version stays one.
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	if found, _ := checkDir(t, dir); len(found) > 0 {
		t.Errorf("the check finds %v", found)
	}
	if found, sum := checkDir(t, unpackStore(t, "testdata/stores/last.tar.gz")); len(found) > 0 || sum.Blobs == 0 {
		t.Errorf("the check of an earlier version finds %v in %+v", found, sum)
	}
	requireCleanAfterOpen(t, dir)
}

// TestCheckDirOfDamagedMetadata: whatever bit is wrong, a check ends, says so, reads the files
// all the same, and does not tell anybody to remove one.
func TestCheckDirOfDamagedMetadata(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	dir, content, _ := richStore(t)
	path := filepath.Join(dir, "meta.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var task p2p.Task
	for task = range content {
	}
	damage(t, filepath.Join(dir, "blobs", task.Digest.Algorithm().String(), task.Digest.Encoded()),
		func(b []byte) []byte { return append(b, 'x') })
	stray := filepath.Join(dir, "blobs", "sha256", "stray")
	if err := os.WriteFile(stray, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	kinds := pageKinds(t, good)
	for _, kind := range []string{"meta", "freelist", "branch", "leaf"} {
		for at := 8; at < 48; at += 3 {
			bad := slices.Clone(good)
			bad[slices.Index(kinds, kind)*page+at] ^= 4
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			found, sum := checkDir(t, dir)
			var kinds []string
			for _, p := range found {
				kinds = append(kinds, p.Kind)
				if damaged := found[0].Kind == KindMetadata; p.Kind == KindStray &&
					strings.Contains(p.Detail, "removed") == damaged {
					t.Errorf("%s page: %s", kind, p)
				}
			}
			slices.Sort(kinds)
			want := []string{KindCorrupt, KindStray}
			if _, err := checkMetaFile(path); err != nil {
				want = []string{KindCorrupt, KindMetadata, KindStray}
			}
			if !slices.Equal(kinds, want) || sum.Blobs < len(content) {
				t.Errorf("%s page: the check finds %v in %+v, want %v", kind, found, sum, want)
			}
		}
	}
}

// TestNotOurs: what somebody has made in the store's directories keeps nobody from opening it, and
// directories stay.
func TestNotOurs(t *testing.T) {
	dir := t.TempDir()
	requireCleanAfterOpen(t, dir)
	pipes := []string{"reserve", "ingest/pipe", "partial/pipe",
		"partial/sha256." + digest.SHA256.FromString("x").Encoded()}
	if err := os.Remove(filepath.Join(dir, "reserve")); err != nil {
		t.Fatal(err)
	}
	for _, name := range pipes {
		if err := unix.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	directories := []string{"ingest/lost+found/x",
		"partial/lost+found/x", "partial/sha256." + digest.SHA256.FromString("y").Encoded() + "/x"}
	for _, name := range directories {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	opened := make(chan error, 1)
	go func() {
		s, err := Open(dir, Options{})
		if err == nil {
			err = s.Close()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for whoever reads from a pipe")
	}
	for _, name := range pipes {
		if info, err := os.Lstat(filepath.Join(dir, name)); err == nil && !info.Mode().IsRegular() {
			t.Errorf("%s is still there", name)
		}
	}
	for _, name := range directories {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, "ingest", "lost+found")); err != nil {
		t.Fatal(err)
	}
	requireCleanAfterOpen(t, dir)
}

// TestNotAFile: what somebody puts in the place of a blob's file is damage of that blob; it
// holds nobody up, and importing the content again replaces it.
func TestNotAFile(t *testing.T) {
	for name, replace := range map[string]func(path string) error{
		"pipe":                func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link to itself":      func(path string) error { return os.Symlink(path, path) },
		"link to nothing":     func(path string) error { return os.Symlink(path+".none", path) },
		"directory":           func(path string) error { return os.Mkdir(path, 0o700) },
		"directory with file": func(path string) error { return os.CopyFS(path, os.DirFS("testdata/stores")) },
	} {
		for _, data := range []string{"data", ""} {
			t.Run(name, func(t *testing.T) {
				s := newStore(t)
				task := enginetest.Import(t, s, "t", []byte(data))
				path := s.bytes.Path(task.Digest)
				spoil := func() {
					t.Helper()
					if err := errors.Join(os.Remove(path), replace(path)); err != nil {
						t.Fatal(err)
					}
				}
				if name == "pipe" { // whoever waits for a writer gets one in the end
					waiting := time.AfterFunc(10*time.Second, func() {
						t.Error("somebody waits for a writer")
						if f, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
							t.Cleanup(func() { f.Close() })
						}
					})
					defer waiting.Stop()
				}
				spoil()
				if _, err := s.Stat(t.Context(), "t", digest.FromDigest(task.Digest),
					p2p.StatOptions{}); !errors.Is(err, digest.ErrCorrupt) {
					t.Errorf("stat: %v", err)
				}
				if blob, err := s.Open(t.Context(), task, p2p.Local); !errors.Is(err, digest.ErrCorrupt) {
					t.Errorf("open: %v", err)
					if err == nil {
						blob.Close()
					}
				}
				var found []Problem
				if _, err := s.Check(t.Context(), func(p Problem) { found = append(found, p) }); err != nil ||
					len(found) != 1 || found[0].Kind != KindCorrupt && name != "link to nothing" {
					t.Errorf("check: %v, %v", found, err)
				}
				enginetest.RequireContent(t, s, enginetest.Import(t, s, "t", []byte(data)), []byte(data))
				spoil()
				if _, err := s.Delete(t.Context(), "t", digest.FromDigest(task.Digest),
					p2p.DeleteOptions{}); err != nil {
					t.Errorf("delete: %v", err)
				}
				s.Close()
				again, err := Open(s.dir, Options{})
				if err != nil {
					t.Fatal(err)
				}
				enginetest.RequireContent(t, again, enginetest.Import(t, again, "t", []byte(data)), []byte(data))
				again.Close()
			})
		}
	}
}
