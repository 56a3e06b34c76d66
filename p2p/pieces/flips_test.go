package pieces

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
)

var (
	flips    = flag.Int("flips", 200, "how many bits of meta.db TestFlippedBits flips, each alone; 0 for all")
	flipSeed = flag.Uint64("flips.seed", uint64(time.Now().UnixNano()), "chooses the bits that TestFlippedBits flips")
)

// richStore makes a store whose metadata has something of everything, and pages
// of every kind. It is closed.
func richStore(t *testing.T) (dir string, content map[p2p.Task][]byte, names map[string]p2p.Task) {
	t.Helper()
	s := newStore(t)
	content, names = map[p2p.Task][]byte{}, map[string]p2p.Task{}
	for i := range 6 {
		data := fmt.Appendf(nil, "artifact %d", i)
		layer, err := importArtifact(t.Context(), s, fmt.Sprint("v", i), data)
		if err != nil {
			t.Fatal(err)
		}
		manifest := []byte("manifest of " + string(layer.Digest))
		content[layer] = data
		names[fmt.Sprint("v", i)] = p2p.Task{Tag: "t", Digest: digest.SHA512.FromBytes(manifest)}
		content[names[fmt.Sprint("v", i)]] = manifest
		enginetest.RequireContent(t, s, layer, data)
	}
	in, err := s.Ingest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	subject := names["v0"].Digest
	added, err := in.Add(bytes.NewReader([]byte("referrer")), p2p.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	referrer := p2p.Task{Tag: "t", Digest: added.Digest}
	if err := in.Commit(p2p.Commit{Tasks: []p2p.NewTask{
		{Task: referrer, Manifest: &p2p.NewManifest{Subject: subject}}}}); err != nil {
		t.Fatal(err)
	}
	content[referrer] = []byte("referrer")
	// Many deletes, some of which are forgotten, make branches and free pages.
	for i := range 120 {
		if _, err := s.ApplyDelete(t.Context(),
			Delete{Tag: "gone", CID: cacheID(t, fmt.Sprint("n", i)), At: time.Unix(int64(i), 0)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.ForgetDeletes(t.Context(), time.Unix(50, 0)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.DeleteForAll(t.Context(), "t", cacheID(t, "v5"), p2p.DeleteOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	for _, task := range []p2p.Task{names["v5"], {Tag: "t", Digest: digest.SHA256.FromString("artifact 5")}} {
		delete(content, task)
	}
	delete(names, "v5")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return s.dir, content, names
}

// pageKinds returns what each page of a bbolt file is, free ones as "free".
func pageKinds(t *testing.T, file []byte) []string {
	t.Helper()
	page := os.Getpagesize()
	kinds := slices.Repeat([]string{"free"}, len(file)/page)
	kinds[0], kinds[1] = "meta", "meta"
	meta, err := readMetaPages(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	r := newPageReader(bytes.NewReader(file), meta, newMetaCheck(t.Context()))
	if err := r.readAll(); err != nil {
		t.Fatal(err)
	}
	free := map[uint64]bool{}
	list := file[r.meta.freelist*uint64(page):]
	for i := range uint64(binary.NativeEndian.Uint16(list[10:])) {
		free[binary.NativeEndian.Uint64(list[16+8*i:])] = true
	}
	for id := uint64(2); id < r.meta.pages; id++ {
		if !free[id] {
			kinds[id] = map[uint16]string{flagBranch: "branch", flagLeaf: "leaf",
				flagFreelist: "freelist"}[binary.NativeEndian.Uint16(file[id*uint64(page)+8:])]
		}
	}
	return kinds
}

// inlineStructure returns the bytes of a leaf page, as offsets in it, that tell
// where things are in the buckets that it has inside.
func inlineStructure(page []byte) map[int]bool {
	offsets := map[int]bool{}
	for i := range int(binary.NativeEndian.Uint16(page[10:])) {
		element := page[pageHeader+16*i:]
		pos, key := binary.NativeEndian.Uint32(element[4:]), binary.NativeEndian.Uint32(element[8:])
		at := pageHeader + 16*i + int(pos+key)
		if binary.NativeEndian.Uint32(element) != 1 || binary.NativeEndian.Uint64(page[at:]) != 0 {
			continue // not a bucket, or one with a page of its own
		}
		at += 16
		for j := range pageHeader + 16*int(binary.NativeEndian.Uint16(page[at+10:])) {
			offsets[at+j] = true
		}
	}
	return offsets
}

// TestFlippedBits flips bits of the metadata, each alone. Either the store says
// that its metadata is damaged before it does anything, or the bit does not
// matter: all that was acknowledged is there, and what is imported then is
// there after a restart.
func TestFlippedBits(t *testing.T) {
	dir, content, names := richStore(t)
	path := filepath.Join(dir, "meta.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	byKind := map[string][]int{} // the bits of pages of a kind
	for i, kind := range pageKinds(t, good) {
		used := bytes.TrimRight(good[i*page:(i+1)*page], "\x00")
		for bit := range 8 * min(page, len(used)+8) {
			byKind[kind] = append(byKind[kind], i*page*8+bit)
		}
	}
	for _, kind := range []string{"meta", "freelist", "branch", "leaf", "free"} {
		if len(byKind[kind]) == 0 {
			t.Errorf("there is no %s page", kind)
		}
	}
	rnd := rand.New(rand.NewPCG(*flipSeed, 0))
	var bits []int
	for kind, all := range byKind {
		n := len(all)
		if *flips > 0 {
			n = min(n, max(1, *flips/len(byKind)))
			if testing.Short() {
				n = min(n, 5)
			}
			rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		}
		t.Logf("%d of the %d bits of %s pages", n, len(all), kind)
		bits = append(bits, all[:n]...)
	}
	if noticed(t, dir, good, content, names) {
		t.Fatal("the metadata that is good is said to be damaged")
	}
	detected := 0
	for _, bit := range bits {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if noticed(t, dir, bad, content, names) {
			detected++
		}
		if t.Failed() {
			t.Fatalf("after a flip of bit %d of the metadata, -flips.seed %d", bit, *flipSeed)
		}
	}
	t.Logf("%d of %d flips were detected, the others do not matter", detected, len(bits))
}

// TestPages: pages that are as bbolt writes them, and do not fit each other, are noticed. What they
// have adds up to the same sums.
func TestPages(t *testing.T) {
	dir, content, names := richStore(t)
	good, err := os.ReadFile(filepath.Join(dir, "meta.db"))
	if err != nil {
		t.Fatal(err)
	}
	page, kinds := os.Getpagesize(), pageKinds(t, good)
	freelist, branch := slices.Index(kinds, "freelist")*page, slices.Index(kinds, "branch")*page
	used := binary.NativeEndian.Uint64(good[branch:])
	for name, change := range map[string]func(file []byte){
		"a page is used that is free": func(file []byte) {
			n := binary.NativeEndian.Uint16(file[freelist+10:])
			binary.NativeEndian.PutUint16(file[freelist+10:], n+1)
			binary.NativeEndian.PutUint64(file[freelist+pageHeader+8*int(n):], used)
		},
		"a page is lost": func(file []byte) {
			binary.NativeEndian.PutUint16(file[freelist+10:], binary.NativeEndian.Uint16(file[freelist+10:])-1)
		},
		"a branch has another key": func(file []byte) {
			second := branch + pageHeader + branchElement
			at := second + int(binary.NativeEndian.Uint32(file[second:])+
				binary.NativeEndian.Uint32(file[second+4:])) - 1
			file[at]++ // it leads past what it has first
		},
		"the newer meta page is damaged": func(file []byte) {
			newer := 0
			if binary.NativeEndian.Uint64(file[page+pageHeader+48:]) > binary.NativeEndian.Uint64(
				file[pageHeader+48:]) {
				newer = page
			}
			file[newer+pageHeader+16]++ // where bbolt would go by the older one
		},
		"two records have changed places": func(file []byte) { swap(t, file, kinds, true) },
		"two values have changed places":  func(file []byte) { swap(t, file, kinds, false) },
	} {
		bad := bytes.Clone(good)
		change(bad)
		if !noticed(t, dir, bad, content, names) {
			t.Errorf("%s: it was not noticed", name)
		}
	}
}

// swap has two records, or only their values, change places in a leaf page, where that can be done with
// nothing else changed.
func swap(t *testing.T, file []byte, kinds []string, withKeys bool) {
	t.Helper()
	size, number := len(file)/len(kinds), binary.NativeEndian.Uint32
	for i, kind := range kinds {
		page := file[i*size : (i+1)*size]
		if kind != "leaf" || binary.NativeEndian.Uint16(page[10:]) < 3 {
			continue
		}
		// Not the first one, whose key the branch has, too.
		one, two := page[pageHeader+leafElement:], page[pageHeader+2*leafElement:]
		if number(one) != 0 || number(two) != 0 || number(one[8:]) != number(two[8:]) ||
			number(one[12:]) != number(two[12:]) {
			continue
		}
		a, b := one[number(one[4:]):][:number(one[8:])+number(one[12:])],
			two[number(two[4:]):][:number(two[8:])+number(two[12:])]
		if !withKeys {
			a, b = a[number(one[8:]):], b[number(two[8:]):]
		}
		if kept := bytes.Clone(a); !bytes.Equal(a, b) {
			copy(a, b)
			copy(b, kept)
			return
		}
	}
	t.Error("there are no two of one length")
}

// noticed opens a store whose metadata is bad. It reports whether that says so, and fails the test
// where it does not, and it matters.
func noticed(t *testing.T, dir string, bad []byte, content map[p2p.Task][]byte, names map[string]p2p.Task) bool {
	t.Helper()
	path := filepath.Join(dir, "meta.db")
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(dir, Options{})
	if err != nil {
		if !errors.Is(err, digest.ErrCorrupt) {
			t.Error(err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, bad) {
			t.Errorf("the damaged file was changed (%v)", err)
		}
		return true
	}
	requireAll(t, s, content, names)
	later := enginetest.Import(t, s, "later", []byte("later"))
	s.Close()
	if s, err = Open(dir, Options{}); err != nil {
		t.Fatalf("the store does not open again: %v", err)
	}
	requireAll(t, s, content, names)
	enginetest.RequireContent(t, s, later, []byte("later"))
	s.Close()
	if err := os.Remove(s.bytes.Path(later.Digest)); err != nil {
		t.Fatal(err)
	}
	return false
}

// TestLostWrites: a page that the disk has as it was before, though it said that it wrote it, is
// noticed, or it does not matter. Meta pages are left out: without the last write of one the file is
// what it was before the last change, of which nothing else tells.
func TestLostWrites(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	dir, content, names := richStore(t)
	path := filepath.Join(dir, "meta.db")
	detected := 0
	for round := range 12 {
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		data := fmt.Appendf(nil, "round %d", round)
		content[enginetest.Import(t, s, "t", data)] = data
		s.Close()
		after, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		page := os.Getpagesize()
		for at := 2 * page; at < min(len(before), len(after)); at += page {
			if bytes.Equal(before[at:at+page], after[at:at+page]) {
				continue
			}
			bad := bytes.Clone(after)
			copy(bad[at:at+page], before[at:])
			if noticed(t, dir, bad, content, names) {
				detected++
			}
			if t.Failed() {
				t.Fatalf("in round %d, without the write of page %d", round, at/page)
			}
		}
		if err := os.WriteFile(path, after, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if detected < 12 {
		t.Errorf("%d were noticed, which is too few for a test", detected)
	}
}

func requireAll(t *testing.T, s *Store, content map[p2p.Task][]byte, names map[string]p2p.Task) {
	t.Helper()
	for task, data := range content {
		enginetest.RequireContent(t, s, task, data)
	}
	for name, task := range names {
		if info, err := s.Stat(t.Context(), "t", cacheID(t, name), p2p.StatOptions{}); err != nil || info.Task != task {
			t.Errorf("%s is %s, %v; want %s", name, info.Task, err, task)
		}
	}
}

// TestPagesAreAsChecked: whatever bbolt writes passes the check of its pages.
func TestPagesAreAsChecked(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	s := newStore(t)
	s.db.NoSync = true
	rnd := rand.New(rand.NewPCG(*flipSeed, 1))
	for round := range 60 {
		err := s.update(func(tx *bbolt.Tx) error {
			for range rnd.IntN(400) {
				bucket := [][]byte{bucketHolders, bucketTables, bucketUsed}[rnd.IntN(3)]
				k := fmt.Appendf(nil, "%d", rnd.IntN(1000))
				err := removeKeys(tx, bucket, k)
				if rnd.IntN(round%7+1) < 3 {
					err = putValue(tx, bucket, k, make([]byte, rnd.IntN(1<<rnd.IntN(14))))
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := checkMetaFile(s.path("meta.db")); err != nil {
			t.Fatalf("round %d, -flips.seed %d: %v", round, *flipSeed, err)
		}
	}
}
