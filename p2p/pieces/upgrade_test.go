package pieces

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// The stores below testdata/stores were made by programs of this repository's history,
// as their names tell:
//
//	first       0b70d25, the first one that kept anything
//	cli         c484ca0, the last one before there was a registry
//	oci         64c5a31: referrers, loose tasks, a count of bytes
//	count       6967cba, the last one before there were swarms
//	swarm       03d980d: deletes, origins; large blobs have 256 pieces or more
//	pieces512   6c1e273: large blobs have 512 pieces or more
//	last        4eefe46, the last one of format version 1
//	A-B         made by A, and opened once by B, which may have counted bytes twice
//
// Each was told to import v0 ("old"), v1 ("one"), v2 ("two"), to move v0 to "new", to delete v2
// (twice where it had a swarm), and to import zeros: 100 bytes, 33 MiB (swarm) or 66 MiB (pieces512).
// Those of today's version are currentStore and earlierStores.
func oldStores(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("testdata/stores/*.tar.gz")
	names = slices.DeleteFunc(names, func(name string) bool {
		return name == currentStore || slices.Contains(earlierStores, name)
	})
	if err != nil || len(names) < 10 {
		t.Fatalf("the stores are %v, %v", names, err)
	}
	return names
}

func unpackStore(t *testing.T, archive string) (dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return filepath.Join(dir, strings.TrimSuffix(filepath.Base(archive), ".tar.gz"))
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, h.Name)
		if h.FileInfo().IsDir() {
			err = os.Mkdir(name, 0o750)
		} else {
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(name, content, fs.FileMode(h.Mode))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// requireUpgraded fails the test unless all that an old store held is there.
func requireUpgraded(t *testing.T, s *Store, deletes bool) {
	t.Helper()
	for name, data := range map[string]string{"v0": "new", "v1": "one", "v2": ""} {
		info, err := s.Stat(t.Context(), "t", cacheID(t, name), p2p.StatOptions{})
		if data == "" {
			if !errors.Is(err, p2p.ErrNotFound) {
				t.Errorf("%s, which was deleted: %v", name, err)
			}
			continue
		}
		layer := digest.SHA256.FromString(data)
		manifest := "manifest of " + string(layer)
		if err != nil || info.Task.Digest != digest.SHA512.FromString(manifest) {
			t.Errorf("%s is %s, %v", name, info.Task, err)
			continue
		}
		enginetest.RequireContent(t, s, info.Task, []byte(manifest))
		enginetest.RequireContent(t, s, p2p.Task{Tag: "t", Digest: layer}, []byte(data))
	}
	var bytes int64
	for e, err := range s.List(t.Context(), p2p.Query{Kind: p2p.KindAll}) {
		if err != nil {
			t.Error(err)
		}
		if e.Name != "" {
			continue
		}
		bytes += e.Size
		blob, err := s.Open(t.Context(), e.Task, p2p.Local)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := blob.CopyRange(t.Context(), io.Discard, 0, blob.Size(), nil); err != nil {
			t.Error(err)
		}
		blob.Close()
	}
	if stored := s.stored.Load(); stored != bytes {
		t.Errorf("the blobs have %d bytes, counted were %d", bytes, stored)
	}
	known, _, err := s.Deletes(t.Context(), 0, 10)
	if err != nil || deletes != (len(known) == 1) || deletes && known[0].CID.String() != "v2" {
		t.Errorf("the deletes are %v, %v", known, err)
	}
}

type recordAt struct{ bucket, key string }

// rawRecords returns what the metadata of a store of version 1 has, but for what an upgrade makes anew.
func rawRecords(t *testing.T, dir string) map[recordAt]string {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	all := map[recordAt]string{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(bucket []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				all[recordAt{string(bucket), string(k)}] = string(v)
				return nil
			})
		})
	})
	delete(all, recordAt{"meta", string(keyVersion)})
	delete(all, recordAt{"meta", string(keyBytes)})
	if err != nil || len(all) < 10 {
		t.Fatalf("there are %d records, %v", len(all), err)
	}
	return all
}

// TestUpgrade: a store of every earlier format has all it had, and its bytes
// counted once, and is whole for the next opening.
func TestUpgrade(t *testing.T) {
	for _, archive := range oldStores(t) {
		name := strings.TrimSuffix(filepath.Base(archive), ".tar.gz")
		if testing.Short() && name != "first" && name != "last" {
			continue
		}
		deletes := name == "swarm" || name == "pieces512" || name == "last"
		t.Run(name, func(t *testing.T) {
			dir := unpackStore(t, archive)
			before := rawRecords(t, dir)
			for round := range 2 {
				s, err := Open(dir, Options{})
				if err != nil {
					t.Fatal(err)
				}
				err = s.view(func(tx *bbolt.Tx) error {
					for at, v := range before {
						if got := value(tx, []byte(at.bucket), []byte(at.key)); round == 0 && string(got) != v {
							t.Errorf("record %q in %s is %.100q, was %.100q", at.key, at.bucket, got, v)
						}
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				requireUpgraded(t, s, deletes)
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if version, err := checkMetaFile(filepath.Join(dir, "meta.db")); err != nil || version != formatVersion {
				t.Errorf("the format is now version %d, %v", version, err)
			}
			s, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := importArtifact(t.Context(), s, "v3", []byte("more")); err != nil {
				t.Error(err)
			}
			// What is deleted then is told beside what was deleted before.
			known, _, err := s.Deletes(t.Context(), 0, 100)
			if err != nil {
				t.Fatal(err)
			}
			_, now, err := s.DeleteForAll(t.Context(), "t", cacheID(t, "v3"), p2p.DeleteOptions{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if all, _, err := s.Deletes(t.Context(), 0, 100); err != nil || len(all) != len(known)+len(now) {
				t.Errorf("the deletes are %v, %v; before there were %d, and %d are new", all, err, len(known), len(now))
			}
			s.Close()
			requireClean(t, dir)
		})
	}
}

// TestUpgradeInterrupted stops an upgrade at every operation, and leaves rubbish where it
// writes: the old metadata counts until the new one is whole.
func TestUpgradeInterrupted(t *testing.T) {
	all := strings.Fields("sync rename syncdir")
	for at := range len(all) + 1 {
		dir := unpackStore(t, "testdata/stores/last.tar.gz")
		dying := &faults{at: at, dead: true, error: syscall.EIO}
		if s, err := open(dir, Options{}, dying); err == nil {
			s.abandon()
		} else if !errors.Is(err, syscall.EIO) {
			t.Errorf("operation %d fails: %v", at, err)
		}
		if want := all[:min(at+1, len(all))]; !slices.Equal(dying.ops, want) {
			t.Errorf("up to operation %d it does %v, want %v", at, dying.ops, want)
		}
		if err := os.WriteFile(filepath.Join(dir, "meta.db.new"), bytes.Repeat([]byte("half"), 5000),
			0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		requireUpgraded(t, s, true)
		s.Close()
		requireClean(t, dir)
		if _, err := os.Stat(filepath.Join(dir, "meta.db.new")); !backend.IsMissing(err) {
			t.Errorf("the file of the upgrade that was interrupted is still there: %v", err)
		}
	}
}

// TestNewBucket: a store of this version that lacks a bucket, as one of another state of
// this release may, gets it, and nothing else changes.
func TestNewBucket(t *testing.T) {
	s := newStore(t)
	task := enginetest.Import(t, s, "t", []byte("data"))
	err := s.db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.DeleteBucket(bucketReferrers), tx.Bucket(bucketSums).Delete(bucketReferrers))
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if s, err = Open(s.dir, Options{}); err != nil {
		t.Fatal(err)
	}
	enginetest.RequireContent(t, s, task, []byte("data"))
	if stored := s.stored.Load(); stored != 4 {
		t.Errorf("counted were %d bytes", stored)
	}
	s.Close()
	requireClean(t, s.dir)
}
