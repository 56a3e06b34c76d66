package blobstore_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// titled is a file of an artifact.
type titled struct{ title, text string }

// pushArtifact pushes an artifact as `oras push` does, with a tag.
func pushArtifact(t *testing.T, r *blobstore.Repository, tag string, files ...titled) blobstore.Manifest {
	t.Helper()
	m := ocispec.Manifest{ArtifactType: "application/x-files", Config: ocispec.DescriptorEmptyJSON}
	pushed := map[string]bool{}
	for _, f := range files {
		d := blob(f.text)
		if !pushed[f.text] {
			if err := r.Push(t.Context(), d, strings.NewReader(f.text)); err != nil &&
				!strings.Contains(err.Error(), "already exists") {
				t.Fatal(err)
			}
		}
		pushed[f.text] = true
		d.Annotations = map[string]string{ocispec.AnnotationTitle: f.title}
		m.Layers = append(m.Layers, d)
	}
	return mustPushManifest(t, r, image(m), tag)
}

// tree returns what is below dir: files with their content, and directories.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	if err := fs.WalkDir(os.DirFS(dir), ".", func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir():
			found[path+"/"] = ""
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(filepath.Join(dir, path))
			found[path] = "-> " + target
			return err
		default:
			data, err := os.ReadFile(filepath.Join(dir, path))
			found[path] = string(data)
			return err
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	return found
}

func requireTree(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	if got := tree(t, dir); !maps.Equal(got, want) {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

// fill makes files, directories (with a slash at the end) and links.
func fill(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		text, path := files[name], filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o777)
		if target, link := strings.CutPrefix(text, "-> "); strings.HasSuffix(name, "/") {
			err = errors.Join(err, os.MkdirAll(path, 0o777))
		} else if link {
			err = errors.Join(err, os.Symlink(target, path))
		} else {
			err = errors.Join(err, os.WriteFile(path, []byte(text), 0o666))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestArtifactStat(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		large := string(bytesOf(3<<20, 1))
		m := pushArtifact(t, r, "v1", titled{"weights.bin", large}, titled{"dir/config.json", "{}"},
			titled{"empty", ""}, titled{"copy.bin", large})
		got, err := r.Stat(t.Context(), "v1", blobstore.Lookup{})
		if err != nil {
			t.Fatal(err)
		}
		one, err := r.Stat(t.Context(), digest.SHA256.FromString(large).String(), blobstore.Lookup{})
		if err != nil {
			t.Fatal(err)
		}
		want := []blobstore.File{
			{Title: "weights.bin", Digest: one.Digest, Size: 3 << 20, Pieces: one.Pieces, PieceLength: one.PieceLength,
				Held: one.Pieces},
			{Title: "dir/config.json", Digest: digest.SHA256.FromString("{}"), Size: 2, Pieces: 1, Held: 1},
			{Title: "empty", Digest: digest.SHA256.FromString("")},
			{Title: "copy.bin", Digest: one.Digest, Size: 3 << 20, Pieces: one.Pieces, PieceLength: one.PieceLength,
				Held: one.Pieces},
		}
		if len(got.Files) != len(want) {
			t.Fatalf("stat has the files %+v", got.Files)
		}
		for i, f := range got.Files {
			want[i].CID, want[i].Tag, want[i].Manifest, want[i].Local = "v1", "t", m.Digest, true
			if want[i].Imported = f.Imported; f.Imported.IsZero() {
				t.Errorf("file %d has no time of import", i)
			}
			if want[i].PieceLength == 0 {
				want[i].PieceLength = f.PieceLength
			}
			if !reflect.DeepEqual(f, want[i]) {
				t.Errorf("file %d is %+v, want %+v", i, f, want[i])
			}
		}
		sum := blobstore.File{
			CID: "v1", Tag: "t", Digest: m.Digest, Manifest: m.Digest, Size: 6<<20 + 2, Pieces: 2*one.Pieces + 1,
			Held:  2*one.Pieces + 1,
			Local: true, Imported: got.Imported, LastUsed: got.LastUsed, Files: got.Files,
		}
		if !reflect.DeepEqual(got, sum) || got.Imported.IsZero() {
			t.Errorf("stat is %+v, want %+v", got, sum)
		}
		// By the digest of the manifest it is the manifest's own bytes.
		if f, err := r.Stat(t.Context(), m.Digest.String(), blobstore.Lookup{}); err != nil || f.Size != m.Size ||
			len(f.Files) != 0 {
			t.Errorf("stat of the manifest: %+v, %v", f, err)
		}
		// There is no one content to open or to write to a stream.
		if reader, err := r.Open(t.Context(), "v1", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrInvalid) {
			t.Errorf("open: %v, %v", reader, err)
		}
		var out strings.Builder
		if _, err := r.Export(t.Context(), "v1", &out, blobstore.ExportOptions{}); !errors.Is(err,
			blobstore.ErrInvalid) || out.Len() != 0 {
			t.Errorf("export: %v, with %d bytes", err, out.Len())
		}
	})
}

// TestArtifactFiles: which of a manifest's layers are files.
func TestArtifactFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		pushBlobs(t, r, "one", "two", "config")
		layer := func(text, title string) ocispec.Descriptor {
			d := blob(text)
			if title != "" {
				d.Annotations = map[string]string{ocispec.AnnotationTitle: title}
			}
			return d
		}
		missing := blob("missing")
		missing.Annotations = map[string]string{ocispec.AnnotationTitle: "missing"}
		for i, c := range []struct {
			layers []ocispec.Descriptor
			want   []string // titles
			text   string   // of a single file
			err    error
		}{
			{layers: []ocispec.Descriptor{layer("one", "")}, want: []string{""}, text: "one"},
			{layers: []ocispec.Descriptor{layer("one", "1")}, want: []string{"1"}, text: "one"},
			// the caller names the output
			{layers: []ocispec.Descriptor{layer("one", "../1")}, want: []string{"../1"}, text: "one"},
			// nothing is left out silently
			{layers: []ocispec.Descriptor{layer("one", ""), layer("two", "2")}, err: blobstore.ErrInvalid},
			{layers: []ocispec.Descriptor{layer("one", "1"), layer("two", "2")}, want: []string{"1", "2"}},
			{layers: []ocispec.Descriptor{layer("one", ""), layer("two", "")}, err: blobstore.ErrInvalid},
			{layers: []ocispec.Descriptor{}, err: blobstore.ErrInvalid},
			{layers: []ocispec.Descriptor{layer("one", "1"), missing}, err: blobstore.ErrNotFound},
		} {
			tag := fmt.Sprintf("v%d", i)
			mustPushManifest(t, r, image(ocispec.Manifest{Config: blob("config"), Layers: c.layers}), tag)
			f, err := r.Stat(t.Context(), tag, blobstore.Lookup{})
			var titles []string
			for _, file := range f.Files {
				titles = append(titles, file.Title)
			}
			if err == nil && f.Files == nil {
				titles = []string{f.Title}
			}
			if !errors.Is(err, c.err) || err == nil && !slices.Equal(titles, c.want) {
				t.Errorf("stat of %+v: %q, %v; want %q, %v", c.layers, titles, err, c.want, c.err)
			}
			if c.text == "" {
				continue
			}
			dir := t.TempDir()
			if _, err := r.ExportFile(t.Context(), tag, filepath.Join(dir, "out"),
				blobstore.ExportOptions{}); err != nil {
				t.Error(err)
			}
			requireTree(t, dir, map[string]string{"./": "", "out": c.text})
		}
		index := mustPushManifest(t, r, []byte(`{"schemaVersion":2,"manifests":[{"digest":"`+
			blob("one").Digest.String()+`"}]}`), "index")
		if f, err := r.Stat(t.Context(), "index", blobstore.Lookup{}); !errors.Is(err, blobstore.ErrInvalid) ||
			!strings.Contains(err.Error(), "index") {
			t.Errorf("stat of the index %s: %+v, %v", index.Digest, f, err)
		}
		// Of the artifact manifest of the release candidates.
		mustPushManifest(
			t, r, []byte(`{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[{"digest":"`+
				blob("two").Digest.String()+`"}]}`), "rc")
		if f, err := r.Stat(t.Context(), "rc", blobstore.Lookup{}); err != nil || f.Digest != blob("two").Digest {
			t.Errorf("stat of an artifact manifest: %+v, %v", f, err)
		}
		// A tag can name a blob itself.
		if err := r.Tag(t.Context(), blob("one"), "blob"); err != nil {
			t.Fatal(err)
		}
		if f, err := r.Stat(t.Context(), "blob", blobstore.Lookup{}); err != nil || f.Digest != blob("one").Digest ||
			f.Manifest != "" {
			t.Errorf("stat of a tagged blob: %+v, %v", f, err)
		}
		// More files than a stat gets at once.
		var many []titled
		for i := range 300 {
			many = append(many, titled{fmt.Sprintf("file-%d", i), fmt.Sprint(i)})
		}
		pushArtifact(t, r, "many", many...)
		if f, err := r.Stat(t.Context(), "many", blobstore.Lookup{}); err != nil || len(f.Files) != len(many) ||
			!f.Local || f.Size != 10+2*90+3*200 {
			t.Errorf("stat of many files: %d, %d bytes, %v", len(f.Files), f.Size, err)
		}
	})
}

func TestExportDirectory(t *testing.T) {
	eachStore(t, func(t *testing.T, s *blobstore.Store) {
		r := repository(t, s, "t")
		large := string(bytesOf(3<<20, 1))
		m := pushArtifact(t, r, "v1", titled{"large", large}, titled{"sub/dir/file", "file"},
			titled{"sub/./other/../b", "b"}, titled{"empty", ""})
		want := map[string]string{"./": "", "large": large, "sub/": "", "sub/dir/": "", "sub/dir/file": "file",
			"sub/b": "b", "empty": ""}
		for name, dir := range map[string]string{
			"new": "new", "with a slash": "new/", "empty": "empty", "linked": "link", "this": "."} {
			t.Run(name, func(t *testing.T) {
				base := t.TempDir()
				fill(t, base, map[string]string{"empty/": "", "target/": "", "link": "-> target"})
				out, before := filepath.Join(base, dir), tree(t, base)
				if dir == "." {
					t.Chdir(filepath.Join(base, "empty"))
					out = "."
				}
				var last int64
				f, err := r.ExportFile(t.Context(), "v1", out, blobstore.ExportOptions{Progress: func(n int64) {
					if n < last {
						t.Errorf("progress goes from %d to %d", last, n)
					}
					last = n
				}})
				if err != nil || f.Digest != m.Digest || len(f.Files) != 4 || last != f.Size {
					t.Errorf("export: %+v, %v; progress ended at %d", f, err, last)
				}
				requireTree(t, out+"/.", want)
				for path := range tree(t, base) {
					_, was := before[path]
					if !was && !strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") && name != "linked" &&
						name != "this" {
						t.Errorf("%s has been left", path)
					}
				}
				// Again it is in the way of itself.
				if _, err := r.ExportFile(t.Context(), "v1", out, blobstore.ExportOptions{}); !errors.Is(err,
					fs.ErrExist) {
					t.Errorf("export into a directory that is not empty: %v", err)
				}
				requireTree(t, out+"/.", want)
				if _, err := r.ExportFile(t.Context(), "v1", out,
					blobstore.ExportOptions{Overwrite: true}); err != nil {
					t.Errorf("export with overwrite: %v", err)
				}
				requireTree(t, out+"/.", want)
			})
		}
	})
}

// exported returns a repository with an artifact of two files under v1.
func exported(t *testing.T) *blobstore.Repository {
	t.Helper()
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r := repository(t, s, "t")
	pushArtifact(t, r, "v1", titled{"a", "new a"}, titled{"dir/b", "new b"})
	return r
}

// TestExportIntoDirectory: what is there, and what becomes of it.
func TestExportIntoDirectory(t *testing.T) {
	outside := t.TempDir()
	fill(t, outside, map[string]string{"file": "outside"})
	for name, c := range map[string]struct {
		before    map[string]string
		overwrite bool
		err       error
		after     map[string]string // nil where it is as before
	}{
		"empty": {
			before: map[string]string{}, after: map[string]string{"a": "new a", "dir/": "", "dir/b": "new b"}},
		"empty, overwrite": {before: map[string]string{}, overwrite: true,
			after: map[string]string{"a": "new a", "dir/": "", "dir/b": "new b"}},
		"a file":             {before: map[string]string{"c": "old"}, err: fs.ErrExist},
		"a hidden file":      {before: map[string]string{".c": "old"}, err: fs.ErrExist},
		"an empty directory": {before: map[string]string{"dir/": ""}, err: fs.ErrExist},
		"merge": {
			before: map[string]string{"c": "old", "dir/": "", "dir/d": "old"}, overwrite: true,
			after: map[string]string{"c": "old", "dir/": "", "dir/d": "old", "a": "new a", "dir/b": "new b"}},
		"replace": {
			before: map[string]string{"a": "old", "dir/": "", "dir/b": "old", "dir/d": "old"}, overwrite: true,
			after: map[string]string{"a": "new a", "dir/": "", "dir/b": "new b", "dir/d": "old"}},
		"a link for a file": {before: map[string]string{"a": "-> " + outside + "/file"}, overwrite: true,
			after: map[string]string{"a": "new a", "dir/": "", "dir/b": "new b"}},
		"a link to nothing": {before: map[string]string{"a": "-> nowhere"}, overwrite: true,
			after: map[string]string{"a": "new a", "dir/": "", "dir/b": "new b"}},
		"a link out": {
			before: map[string]string{"dir": "-> " + outside}, overwrite: true, err: errAny},
		"a relative link out": {before: map[string]string{"dir": "-> ../.."}, overwrite: true, err: errAny},
		"a link within": {before: map[string]string{"dir": "-> real", "real/": ""}, overwrite: true,
			after: map[string]string{"dir": "-> real", "real/": "", "a": "new a", "real/b": "new b"}},
		"a file as directory": {before: map[string]string{"dir": "old"}, overwrite: true, err: errAny},
		"a directory as file": {
			before: map[string]string{"dir/": "", "dir/b/": ""}, overwrite: true, err: fs.ErrExist},
		"a directory, not empty, as file": {
			before: map[string]string{"a/": "", "a/x": "old", "dir/": ""}, overwrite: true, err: fs.ErrExist},
	} {
		t.Run(name, func(t *testing.T) {
			r := exported(t)
			dir := t.TempDir()
			fill(t, dir, c.before)
			_, err := r.ExportFile(t.Context(), "v1", dir, blobstore.ExportOptions{Overwrite: c.overwrite})
			if c.err == errAny && err == nil || c.err != errAny && !errors.Is(err, c.err) {
				t.Errorf("export: %v; want %v", err, c.err)
			}
			want := maps.Clone(c.after)
			if want == nil {
				want = maps.Clone(c.before)
			}
			want["./"] = ""
			requireTree(t, dir, want)
			requireTree(t, outside, map[string]string{"./": "", "file": "outside"})
		})
	}
}

var errAny = errors.New("any error")

func TestExportDirectoryOutputs(t *testing.T) {
	r := exported(t)
	base := t.TempDir()
	fill(t, base, map[string]string{"file": "old", "dangling": "-> nowhere"})
	for out, want := range map[string]error{
		"file": fs.ErrExist, "dangling": fs.ErrExist, "no/such/dir": fs.ErrNotExist, "file/x": errAny} {
		for _, overwrite := range []bool{false, true} {
			_, err := r.ExportFile(t.Context(), "v1", filepath.Join(base, out),
				blobstore.ExportOptions{Overwrite: overwrite})
			if want == errAny && err == nil || want != errAny && !errors.Is(err, want) {
				t.Errorf("export to %s: %v; want %v", out, err, want)
			}
			requireTree(t, base, map[string]string{"./": "", "file": "old", "dangling": "-> nowhere"})
		}
	}
}

// TestExportKeepsModes: nobody can read what was private before, and a
// directory that is there stays itself.
func TestExportKeepsModes(t *testing.T) {
	r := exported(t)
	dir := t.TempDir()
	private := filepath.Join(dir, "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(private)
	if err != nil {
		t.Fatal(err)
	}
	// The caller may have no rights on the directory above.
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(dir, 0o700) })
	for _, overwrite := range []bool{false, true} {
		if _, err := r.ExportFile(t.Context(), "v1", private,
			blobstore.ExportOptions{Overwrite: overwrite}); err != nil {
			t.Fatal(err)
		}
		after, err := os.Stat(private)
		if err != nil || !os.SameFile(before, after) || after.Mode() != before.Mode() {
			t.Errorf("the directory was %v, and is %v (%v)", before.Mode(), after.Mode(), err)
		}
		file := filepath.Join(private, "dir", "b")
		if overwrite {
			if info, err := os.Stat(file); err != nil || info.Mode() != 0o640 {
				t.Errorf("a file that was replaced has mode %v, had 0640 (%v)", info.Mode(), err)
			}
		}
		if err := errors.Join(os.Chmod(file, 0o640), os.WriteFile(file, []byte("old"), 0)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostileTitles: no title leads out of the directory, and an artifact with
// one that would is not exported at all.
func TestHostileTitles(t *testing.T) {
	s, err := blobstore.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "t")
	for i, titles := range [][]string{
		{"../x"}, {"/abs"}, {"/tmp/x"}, {"a/../../x"}, {"."}, {"./"}, {".."}, {"a/.."}, {"/"}, {"x\x00y"}, {"\x00"},
		{"good", "../x"}, {"same", "same"}, {"same", "./same"}, {"same", "a/../same"}, {"same", "same/"},
		{"a", "a/b"}, {"a/b", "a"}, {"a/b/c", "a"}, {strings.Repeat("a/", 3000) + "x"},
		{strings.Repeat("a/", 1<<20) + "x"},
	} {
		files := []titled{{"first", "first"}}
		for j, title := range titles {
			files = append(files, titled{title, fmt.Sprintf("hostile %d", j)})
		}
		tag := fmt.Sprintf("v%d", i)
		pushArtifact(t, r, tag, files...)
		if _, err := r.Stat(t.Context(), tag, blobstore.Lookup{}); err != nil {
			t.Errorf("stat of %.40q: %v", titles, err)
		}
		for _, overwrite := range []bool{false, true} {
			base := t.TempDir()
			fill(t, base, map[string]string{"empty/": "", "full/": "", "full/old": "old"})
			before := tree(t, base)
			for _, out := range []string{"new", "empty", "full"} {
				_, err := r.ExportFile(t.Context(), tag, filepath.Join(base, out),
					blobstore.ExportOptions{Overwrite: overwrite})
				if !errors.Is(err, blobstore.ErrInvalid) || len(err.Error()) > 1000 {
					t.Errorf("export of %.40q to %s: %.1000v", titles, out, err)
				}
				requireTree(t, base, before)
			}
		}
	}
	// Titles that are only odd.
	for i, title := range []string{"...", "..x", " ", "a b",
		"-rf", "~", "$HOME", "a\nb", "\xff", "C:\\x", "..\\x", "a//b", strings.Repeat("x", 255)} {
		tag := fmt.Sprintf("odd-%d", i)
		pushArtifact(t, r, tag, titled{"first", "first"}, titled{title, "odd"})
		dir := filepath.Join(t.TempDir(), "out")
		if _, err := r.ExportFile(t.Context(), tag, dir, blobstore.ExportOptions{}); err != nil {
			t.Errorf("export of %q: %v", title, err)
			continue
		}
		stored := strings.ToValidUTF8(title, "\uFFFD") // a manifest is JSON
		if data, err := os.ReadFile(filepath.Join(dir, stored)); err != nil || string(data) != "odd" {
			t.Errorf("export of %q: %q, %v", title, data, err)
		}
	}
	// A name that no file system takes.
	pushArtifact(t, r, "long", titled{"first", "first"}, titled{strings.Repeat("x", 256), "long"})
	base := t.TempDir()
	if _, err := r.ExportFile(t.Context(), "long", filepath.Join(base, "out"), blobstore.ExportOptions{}); err == nil {
		t.Error("a name of 256 bytes is possible")
	}
	requireTree(t, base, map[string]string{"./": ""})
}

// TestExportDirectoryFails: an export of several files that fails leaves
// everything as it was.
func TestExportDirectoryFails(t *testing.T) {
	store := t.TempDir()
	s, err := blobstore.Open(store)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := repository(t, s, "t")
	damaged := string(bytesOf(3<<20, 1))
	pushArtifact(t, r, "v1", titled{"a", "new a"}, titled{"dir/b", damaged})
	pushArtifact(t, r, "good", titled{"a", "new a"}, titled{"dir/b", "good"})
	pushArtifact(t, r, "missing", titled{"a", "new a"}, titled{"dir/b", "missing"})
	path := filepath.Join(store, "blobs", "sha256", digest.SHA256.FromString(damaged).Encoded())
	data := []byte(damaged)
	data[len(data)-1] ^= 1
	if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(t.Context(), blob("missing").Digest.String(),
		blobstore.DeleteOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	fill(t, base, map[string]string{"empty/": "", "full/": "", "full/a": "old", "full/dir/": "", "full/dir/b": "old"})
	before := tree(t, base)
	for _, out := range []string{"new", "empty", "full"} {
		for cid, want := range map[string]error{"v1": blobstore.ErrCorrupt, "missing": blobstore.ErrNotFound} {
			_, err := r.ExportFile(t.Context(), cid, filepath.Join(base, out), blobstore.ExportOptions{Overwrite: true})
			if !errors.Is(err, want) {
				t.Errorf("export of %s to %s: %v; want %v", cid, out, err, want)
			}
			requireTree(t, base, before)
		}
		ctx, cancel := context.WithCancel(t.Context())
		_, err := r.ExportFile(ctx, "good", filepath.Join(base, out),
			blobstore.ExportOptions{Overwrite: true, Progress: func(n int64) { cancel() }})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("export to %s with a context that ends: %v", out, err)
		}
		requireTree(t, base, before)
	}
}
