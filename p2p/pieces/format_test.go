package pieces

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/enginetest"
	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// currentStore is a store of today's format that an earlier program has made. Where the format
// gets another version, it is one of the old ones: TestUpgrade goes on reading it.
const currentStore = "testdata/stores/version2-described.tar.gz"

// earlierStores are of the same version, without fields and buckets that came later.
var earlierStores = []string{"testdata/stores/version2.tar.gz", "testdata/stores/version2-limit.tar.gz",
	"testdata/stores/version2-cleared.tar.gz"}

var makeStore = flag.String("store.make",
	"", "have TestMakeStore make testdata/stores/NAME.tar.gz, a store of today's format")

// madeAt is the time by the clock of those who make a store.
var madeAt = time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)

// TestMakeStore makes the store that currentStore is:
//
//	go test ./p2p/pieces -run TestMakeStore -store.make version2-described
func TestMakeStore(t *testing.T) {
	if *makeStore == "" {
		return // it is no test
	}
	dir := filepath.Join(t.TempDir(), *makeStore)
	makeFullStore(t, dir)
	if err := packStore(dir, filepath.Join("testdata/stores", *makeStore+".tar.gz")); err != nil {
		t.Fatal(err)
	}
}

// packStore is the reverse of unpackStore. It leaves out what is of no interest.
func packStore(dir, archive string) error {
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestCompression)
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() == "lock" || e.Name() == "reserve" {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		h, err := tar.FileInfoHeader(info, "")
		if err != nil {
			return err
		}
		name, err := filepath.Rel(filepath.Dir(dir), path)
		if err != nil {
			return err
		}
		h.Name, h.ModTime, h.Uname, h.Gname, h.Uid, h.Gid = name, madeAt, "", "", 0, 0
		if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err == nil {
			_, err = w.Write(content)
		}
		return err
	})
	return errors.Join(err, w.Close(), z.Close())
}

// What there is in a store that makeFullStore has made, under the tag "r".
var (
	// under a lease, of the one whose manifest has not come
	fullPushed   = []byte("pushed by two clients")
	fullLoose    = []byte("pushed, and nothing refers to it yet")      // in the same way
	fullSpared   = []byte("asked for, while what held it was deleted") // kept for a client that has asked
	fullFetched  = []byte("fetched from a peer")                       // with where it came from
	fullDamaged  = []byte("damaged on the disk")                       // and met
	fullForced   = []byte("deleted by force")                          // of a manifest that is still there
	fullGone     = []byte("deleted, and then the power went")          // its file is still there
	fullSubject  = []byte("what something is about")
	fullReferrer = []byte("what is about it")
	fullLarge    = make([]byte, 20*digest.MinPieceLength)
	fullPart     = bytes.Repeat([]byte("part"), digest.MinPieceLength) // of which one piece has arrived
	fullOrigin   = Version{At: madeAt.Add(-time.Hour), After: madeAt.Add(-2 * time.Hour)}
)

func fullTask(data []byte) p2p.Task {
	return p2p.Task{Tag: "r", Digest: digest.SHA256.FromBytes(data)}
}

// fullManifest is a manifest that refers to one blob.
func fullManifest(data []byte) []byte { return []byte("refers to " + string(fullTask(data).Digest)) }

// makeFullStore makes a store that has something of everything that this format keeps, and what
// an interruption leaves. What was in old stores is in it, too: see oldStores.
func makeFullStore(t *testing.T, dir string) {
	t.Helper()
	f := &faults{at: -1}
	s, err := open(dir, Options{Now: func() time.Time { return madeAt }}, f)
	if err != nil {
		t.Fatal(err)
	}
	s.failCommit = func() error { return f.op("commit") }
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	commit := func(content []byte, n p2p.NewTask, names ...p2p.NewName) {
		t.Helper()
		in, err := s.Ingest(t.Context())
		must(err)
		defer in.Close()
		_, err = in.Add(bytes.NewReader(content), p2p.AddOptions{})
		n.Task = fullTask(content)
		must(err, in.Commit(p2p.Commit{Tasks: []p2p.NewTask{n}, Names: names}))
	}
	name := func(name string, content []byte) p2p.NewName {
		return p2p.NewName{Tag: "r", Name: name, Digest: fullTask(content).Digest}
	}
	// manifest pushes one that refers to data, under a name.
	manifest := func(as string, data []byte) {
		t.Helper()
		refs := []digest.Digest{fullTask(data).Digest}
		commit(fullManifest(data), p2p.NewTask{MediaType: "application/x",
			Manifest: &p2p.NewManifest{Refs: refs, Needs: refs}}, name(as, fullManifest(data)))
	}
	for _, v := range []struct{ name, data string }{{"v0", "old"}, {"v1", "one"}, {"v2", "two"}, {"v0", "new"}} {
		_, err := importArtifact(t.Context(), s, v.name, []byte(v.data))
		must(err)
	}
	_, err = s.Delete(t.Context(), "t", cacheID(t, "v2"), p2p.DeleteOptions{})
	must(err)

	loose := p2p.NewTask{Keep: p2p.KeepUntilReferred}
	commit(fullPushed, loose)
	commit(fullPushed, loose) // by another client
	manifest("pushed", fullPushed)
	commit(fullLoose, loose)
	commit(fullSpared, p2p.NewTask{})
	manifest("spared", fullSpared)
	_, err = s.Stat(t.Context(), "r", digest.FromDigest(fullTask(fullSpared).Digest), p2p.StatOptions{Lease: true})
	must(err)
	_, _, err = s.DeleteForAll(t.Context(), "r", cacheID(t, "spared"), p2p.DeleteOptions{}, nil)
	must(err)
	commit(fullFetched, p2p.NewTask{Keep: p2p.KeepUntilReferred, Origin: fullOrigin.At, After: fullOrigin.After},
		p2p.NewName{Tag: "r", Name: "fetched", Digest: fullTask(fullFetched).Digest, Updated: fullOrigin.At,
			After: fullOrigin.After})
	commit(fullSubject, p2p.NewTask{Keep: p2p.KeepPinned})
	commit(fullReferrer, p2p.NewTask{MediaType: "application/y",
		Manifest: &p2p.NewManifest{Subject: fullTask(fullSubject).Digest}},
		p2p.NewName{Tag: "r", Name: "kept", Digest: fullTask(fullReferrer).Digest, KeepOld: true,
			Description: []byte(`{"annotations":{"a":"b"}}`)})
	commit(fullLarge, p2p.NewTask{Keep: p2p.KeepPinned})
	commit(fullForced, p2p.NewTask{})
	manifest("forced", fullForced)
	_, _, err = s.DeleteForAll(t.Context(), "r", digest.FromDigest(fullTask(fullForced).Digest),
		p2p.DeleteOptions{Force: true}, nil)
	must(err)
	commit([]byte("short-lived"), p2p.NewTask{}, name("nameonly", []byte("short-lived")))
	_, _, err = s.DeleteForAll(t.Context(), "r", cacheID(t, "nameonly"), p2p.DeleteOptions{NameOnly: true}, nil)
	must(err)

	in, err := s.Ingest(t.Context())
	must(err)
	_, err = in.Add(strings.NewReader("cleared"), p2p.AddOptions{})
	must(err, in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: p2p.Task{Tag: "cleared",
		Digest: digest.SHA256.FromString("cleared")}}}}), in.Close())
	_, _, err = s.DeleteForAll(t.Context(), "cleared", digest.CID{}, p2p.DeleteOptions{All: true}, nil)
	must(err)

	commit(fullDamaged, p2p.NewTask{})
	manifest("damaged", fullDamaged)
	damage(t, s.bytes.Path(fullTask(fullDamaged).Digest), func(b []byte) []byte { b[0] ^= 1; return b })
	if err := s.Recheck(t.Context(), fullTask(fullDamaged).Digest); !errors.Is(err, digest.ErrCorrupt) {
		t.Fatal(err)
	}

	table := tableOf(t, fullPart)
	p, err := s.Partial(t.Context(), table.Digest)
	must(err)
	must(p.Use(t.Context(), table.Size, table.Chain), p.Want([]string{"r", "other"}), receive(p, table, fullPart, 0),
		p.Close())

	commit(fullGone, p2p.NewTask{Keep: p2p.KeepPinned})
	enginetest.RequireContent(t, s, fullTask(fullLarge), fullLarge) // a use
	must(s.syncMoved())
	f.ops, f.at, f.dead, f.error = nil, 2, true, syscall.EIO // after the records, before the file
	_, err = s.Delete(t.Context(), "r", digest.FromDigest(fullTask(fullGone).Digest), p2p.DeleteOptions{})
	must(err)
	s.abandon()
	for _, name := range []string{"aaaa", "bbbb.sha256." + digest.SHA256.FromString("not committed").Encoded()} {
		must(os.WriteFile(filepath.Join(dir, "ingest", name), []byte("not committed"), 0o444))
	}
}

// requireFull fails the test unless the store that was opened has all of what makeFullStore has
// put into it.
func requireFull(t *testing.T, s *Store) {
	t.Helper()
	stat := func(data []byte) p2p.Info {
		t.Helper()
		info, err := s.Stat(t.Context(), "r", digest.FromDigest(fullTask(data).Digest), p2p.StatOptions{})
		if err != nil {
			t.Errorf("%q: %v", data[:min(len(data), 40)], err)
		}
		return info
	}
	for _, c := range []struct {
		data    []byte
		keep    p2p.Keep
		pointed []string // names
	}{
		{fullPushed, p2p.KeepReferred, nil}, {fullManifest(fullPushed), p2p.KeepReferred, []string{"pushed"}},
		{fullLoose, p2p.KeepUntilReferred, nil}, {fullSpared, p2p.KeepUntilReferred, nil},
		{fullFetched, p2p.KeepReferred, []string{"fetched"}},
		{fullSubject, p2p.KeepPinned, nil}, {fullReferrer, p2p.KeepReferred, []string{"kept"}},
		{fullLarge, p2p.KeepPinned, nil}, {fullManifest(fullForced), p2p.KeepReferred, []string{"forced"}},
		{fullManifest(fullDamaged), p2p.KeepReferred, []string{"damaged"}},
		{[]byte("short-lived"), p2p.KeepUntilReferred, nil},
	} {
		enginetest.RequireContent(t, s, fullTask(c.data), c.data)
		if info := stat(c.data); info.Keep != c.keep {
			t.Errorf("%q is kept as %d, want %d", c.data[:min(len(c.data), 40)], info.Keep, c.keep)
		}
		for _, name := range c.pointed {
			if n, err := s.Name(t.Context(), "r", name); err != nil || n.Digest != fullTask(c.data).Digest ||
				n.KeepOld != (name == "kept") {
				t.Errorf("%s is %+v, %v", name, n, err)
			}
		}
	}
	for _, data := range [][]byte{fullManifest(fullSpared), fullForced, fullGone, []byte("not committed")} {
		if _, err := os.Stat(s.bytes.Path(fullTask(data).Digest)); !backend.IsMissing(err) {
			t.Errorf("%q is still there (%v)", data, err)
		}
		if _, err := s.Stat(t.Context(), "r", digest.FromDigest(fullTask(data).Digest),
			p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
			t.Errorf("%q: %v", data, err)
		}
	}
	if info := stat(fullFetched); !info.Origin.Equal(fullOrigin.At) || !info.After.Equal(fullOrigin.After) ||
		!info.Imported.Equal(madeAt) {
		t.Errorf("what was fetched is of %v, after %v, imported at %v", info.Origin, info.After, info.Imported)
	}
	if n, err := s.Name(t.Context(), "r", "fetched"); err != nil || !n.Updated.Equal(fullOrigin.At) ||
		!n.After.Equal(fullOrigin.After) {
		t.Errorf("the name that was fetched is %+v, %v", n, err)
	}
	for data, kind := range map[string]string{
		string(fullManifest(fullPushed)): "application/x", string(fullReferrer): "application/y"} {
		if info := stat([]byte(data)); !info.IsManifest || info.MediaType != kind {
			t.Errorf("%q is %+v", data, info)
		}
	}
	tag := "r"
	for to, want := range map[string][]byte{
		string(fullSubject): fullReferrer, string(fullPushed): fullManifest(fullPushed)} {
		var refers []p2p.Task
		for e, err := range s.List(t.Context(), p2p.Query{Tag: &tag, RefersTo: fullTask([]byte(to)).Digest}) {
			if err != nil {
				t.Error(err)
			}
			refers = append(refers, e.Task)
		}
		if !slices.Equal(refers, []p2p.Task{fullTask(want)}) {
			t.Errorf("to %q refers %v", to, refers)
		}
	}
	for _, lost := range [][]byte{fullForced, fullDamaged} {
		if lacks := stat(fullManifest(lost)).Lacks; !slices.Equal(lacks, []digest.Digest{fullTask(lost).Digest}) {
			t.Errorf("%q lacks %v", fullManifest(lost), lacks)
		}
	}
	damaged := digest.FromDigest(fullTask(fullDamaged).Digest)
	// it is not read again
	if _, err := s.Stat(t.Context(), "r", damaged, p2p.StatOptions{Lease: true}); !errors.Is(err, digest.ErrCorrupt) {
		t.Errorf("what is damaged: %v", err)
	}
	if at := stat(fullLarge).LastUsed; at.IsZero() {
		t.Error("it is not known that something was used")
	}
	var arriving []p2p.Task
	for _, a := range s.Arriving() {
		arriving = append(arriving, a.Task)
		if a.Size != int64(len(fullPart)) || a.Bytes < digest.MinPieceLength {
			t.Errorf("arriving is %+v", a)
		}
	}
	if part := fullTask(fullPart); !slices.Equal(arriving, []p2p.Task{{Tag: "other", Digest: part.Digest}, part}) {
		t.Errorf("arriving are %v", arriving)
	}
	type deleted struct {
		cid                   string
		force, nameOnly, soft bool
	}
	var got []deleted
	all, _, err := s.Deletes(t.Context(), 0, 100)
	if err != nil {
		t.Error(err)
	}
	for _, d := range all {
		if d.All { // of earlier stores none has one
			if d.Tag != "cleared" || !d.At.Equal(madeAt) || !d.Made.Equal(madeAt) {
				t.Errorf("the delete of all is %+v", d)
			}
			continue
		}
		got = append(got, deleted{d.CID.String(), d.Force, d.NameOnly, d.Soft})
		if !d.Made.Equal(madeAt) || d.At.IsZero() || d.After.IsZero() {
			t.Errorf("the delete of %s is %+v", d.CID, d)
		}
	}
	want := []deleted{
		{"spared", false, false, false}, {string(fullTask(fullManifest(fullSpared)).Digest), false, false, true},
		{string(fullTask(fullForced).Digest), true, false, false}, {"nameonly", false, true, false},
	}
	if !slices.Equal(got, want) {
		t.Errorf("the deletes are %+v, want %+v", got, want)
	}
	if sum, err := s.DeletesSum(t.Context()); err != nil || sum == [32]byte{} {
		t.Errorf("the sum over deletes is %x, %v", sum, err)
	}
	if left, err := os.ReadDir(s.path("ingest")); err != nil || len(left) > 0 {
		t.Errorf("ingest/ has %v, %v", left, err)
	}
}

// finishFull does with such a store what shows what it knows: a lease holds, what was asked for
// goes when nobody comes back, content that comes again repairs.
func finishFull(t *testing.T, s *Store) {
	t.Helper()
	if _, err := s.Delete(t.Context(), "r", cacheID(t, "pushed"), p2p.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	enginetest.RequireContent(t, s, fullTask(fullPushed), fullPushed)
	if err := s.releaseSpared(); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(t.Context(), "r", digest.FromDigest(fullTask(fullSpared).Digest),
		p2p.StatOptions{}); !errors.Is(err, p2p.ErrNotFound) {
		t.Errorf("what was kept for the client that had asked: %v", err)
	}
	enginetest.RequireContent(t, s, enginetest.Import(t, s, "r", fullDamaged), fullDamaged)
}

// fullOptions open such a store a minute after it was made, by its clock.
var fullOptions = Options{Now: func() time.Time { return madeAt.Add(time.Minute) }}

// recordTypes are what the values of those buckets are that have JSON.
var recordTypes = map[string]any{
	string(bucketBlobs): blobRecord{}, string(bucketTasks): taskRecord{}, string(bucketNames): nameRecord{},
	string(bucketDeletes): deleteRecord{}, string(bucketCleared): clearedFields{},
	string(bucketDamaged): damageRecord{},
}

// clearedFields are those that a deleteRecord has of a delete of all under a tag.
type clearedFields struct {
	At     time.Time `json:"at"`
	Made   time.Time `json:"made,omitzero"`
	Limit  time.Time `json:"limit,omitzero"`
	Number uint64    `json:"number"`
}

// fieldsOf returns the names of the fields of a record, as they are stored.
func fieldsOf(record any) (names []string) {
	for i := range reflect.TypeOf(record).NumField() {
		name, _, _ := strings.Cut(reflect.TypeOf(record).Field(i).Tag.Get("json"), ",")
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// TestFormat: the store that an earlier program has made is of today's format, with every bucket
// and field of it, and so is one that is made now. Where it fails, the format has changed: a field that
// is new only wants a new store, made by TestMakeStore, beside the one that is there; whatever an
// earlier program would misread, or not keep up, wants a new version first.
func TestFormat(t *testing.T) {
	now := filepath.Join(t.TempDir(), "now")
	makeFullStore(t, now)
	stores := map[string]string{"then": unpackStore(t, currentStore), "now": now}
	for _, archive := range earlierStores {
		stores["earlier: "+archive] = unpackStore(t, archive)
	}
	for name, dir := range stores {
		earlier := strings.HasPrefix(name, "earlier")
		path := filepath.Join(dir, "meta.db")
		if version, err := checkMetaFile(path); err != nil || version != formatVersion {
			t.Fatalf("%s: version %d, %v", name, version, err)
		}
		db, err := openBolt(path, true)
		if err != nil {
			t.Fatal(err)
		}
		err = db.View(func(tx *bbolt.Tx) error {
			for _, bucket := range allBuckets {
				if tx.Bucket(bucket) == nil {
					if earlier {
						continue
					}
					t.Errorf("%s: there is no bucket %s", name, bucket)
					continue
				}
				record := recordTypes[string(bucket)]
				seen := map[string]bool{}
				records := 0
				scan(tx, bucket, nil, func(k, v []byte) bool {
					records++
					if record == nil {
						return true
					}
					into := reflect.New(reflect.TypeOf(record))
					d := json.NewDecoder(bytes.NewReader(v))
					d.DisallowUnknownFields()
					if err := d.Decode(into.Interface()); err != nil {
						t.Errorf("%s: record %q in %s: %v", name, k, bucket, err)
					}
					if again, err := json.Marshal(into.Interface()); err != nil || !bytes.Equal(again, v) {
						t.Errorf("%s: record %q in %s is %s, now it would be %s (%v)", name, k, bucket, v, again, err)
					}
					var fields map[string]json.RawMessage
					if err := json.Unmarshal(v, &fields); err != nil {
						t.Error(err)
					}
					for field := range fields {
						seen[field] = true
					}
					return true
				})
				if records == 0 {
					t.Errorf("%s: bucket %s has nothing", name, bucket)
				}
				for _, field := range fieldsOf(cmp.Or(record, any(struct{}{}))) {
					if !seen[field] && !earlier {
						t.Errorf("%s: no record in %s has %q", name, bucket, field)
					}
				}
			}
			return nil
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Error(err)
		}
		requireFullAgain(t, dir)
	}
}

// requireFullAgain opens such a store twice: it has all, and is whole.
func requireFullAgain(t *testing.T, dir string) {
	t.Helper()
	for i := range 2 {
		s, err := Open(dir, fullOptions)
		if err != nil {
			t.Fatal(err)
		}
		requireFull(t, s)
		if i == 1 {
			finishFull(t, s)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	requireClean(t, dir)
}

// TestFormatIsDocumented: docs/format.md names every bucket and field, and all that is in the directory.
func TestFormatIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(text)
	rows := map[string]string{}
	for line := range strings.Lines(doc) {
		if cells := strings.Split(line, "|"); len(cells) > 3 {
			rows[strings.Trim(cells[1], " `")] += line
		}
	}
	for _, bucket := range allBuckets {
		row := rows[string(bucket)]
		if row == "" {
			t.Errorf("there is no row for the bucket %s", bucket)
		}
		if record := recordTypes[string(bucket)]; record != nil {
			for _, field := range fieldsOf(record) {
				if !strings.Contains(row, fmt.Sprintf("%q", field)) {
					t.Errorf("the row of %s does not have %q", bucket, field)
				}
			}
		}
	}
	if want := fmt.Sprintf("format **version %d**", formatVersion); !strings.Contains(doc, want) {
		t.Errorf("it does not say %q", want)
	}
	dir := filepath.Join(t.TempDir(), "store")
	makeFullStore(t, dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	layout := doc[strings.Index(doc, "DATA/"):]
	layout = layout[:strings.Index(layout, "```")]
	for _, e := range entries {
		if !strings.Contains(layout, "\n  "+e.Name()) {
			t.Errorf("the layout does not have %s", e.Name())
		}
	}
}
