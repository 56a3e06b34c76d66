package artifact_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore/artifact"
	"github.com/dfcache/dfcache/digest"
)

// entry is one of an archive: a file with its text, a directory, whose name ends with a slash, or another.
type entry struct {
	name, text string
	kind       byte
	mode       int64
}

// archive makes a tar.
func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		h := tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Format: tar.FormatPAX}
		switch {
		case e.kind == tar.TypeSymlink || e.kind == tar.TypeLink:
			h.Linkname = e.text
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		case e.kind == 0:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.text))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, e.text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zip(t testing.TB, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// openOut makes the directory dir/out, and opens it until the test ends.
func openOut(t testing.TB, dir string) (out string, root *os.Root) {
	t.Helper()
	out = filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o777); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return out, root
}

// unpackIn unpacks an archive whose names begin with base into dir/out.
func unpackIn(t testing.TB, dir, base string, data []byte, annotations map[string]string) error {
	t.Helper()
	_, root := openOut(t, dir)
	layer := artifact.Layer{Descriptor: ocispec.Descriptor{Annotations: annotations}, Name: "archive", Packed: true,
		Base: base}
	tree, err := artifact.Unpack(t.Context(), root, artifact.Place{Layer: layer, Path: ".", Unpack: true},
		bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return err
	}
	return artifact.MakeLinks(root, tree)
}

// found returns what is below dir: files with their text, links with an arrow.
func found(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			all[name+"/"] = ""
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			all[name] = "-> " + target
			return err
		default:
			data, err := os.ReadFile(path)
			all[name] = string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestUnpack(t *testing.T) {
	data := archive(t, entry{name: "dir/", mode: 0o700}, entry{name: "dir/a", text: "a", mode: 0o4751},
		entry{name: "dir/sub/b", text: "b", mode: 0o444},
		entry{name: "dir/hard", text: "dir/a", kind: tar.TypeLink},
		entry{name: "dir/sub/link", text: "../a", kind: tar.TypeSymlink},
		entry{name: "dir/dangling", text: "nothing", kind: tar.TypeSymlink}, entry{name: "dir/sub/", mode: 0o555})
	want := map[string]string{"./": "", "a": "a", "sub/": "", "sub/b": "b", "hard": "a", "sub/link": "-> ../a",
		"dangling": "-> nothing"}
	sum := string(digest.SHA256.FromBytes(data))
	for what, data := range map[string][]byte{"tar": data, "gzip": zip(t, data)} {
		dir := t.TempDir()
		annotations := map[string]string{artifact.AnnotationDigest: sum}
		if err := unpackIn(t, dir, "dir", data, annotations); err != nil {
			t.Fatal(err)
		}
		got := found(t, filepath.Join(dir, "out"))
		for name, text := range want {
			if got[name] != text || len(got) != len(want) {
				t.Errorf("%s: there is %q, want %q", what, got, want)
			}
		}
		for name, mode := range map[string]fs.FileMode{"a": 0o751, "sub/b": 0o444} {
			if info, err := os.Stat(filepath.Join(dir, "out", name)); err != nil || info.Mode() != mode {
				t.Errorf("%s has mode %v, want %v (%v)", name, info.Mode(), mode, err)
			}
		}
	}
}

// TestUnpackHostile: nothing of an archive leaves its directory, and what is wrong with it is said.
func TestUnpackHostile(t *testing.T) {
	long := strings.Repeat("x/", 3000) + "x"
	for what, entries := range map[string][]entry{
		"parent":            {{name: "../outside"}},
		"parent below":      {{name: "dir/../../outside"}},
		"absolute":          {{name: "/outside"}},
		"not below":         {{name: "other/outside"}},
		"prefix":            {{name: "dirt"}},
		"no directory":      {{name: "dir"}},
		"too long":          {{name: "dir/" + long}},
		"link out":          {{name: "dir/l", text: "../outside", kind: tar.TypeSymlink}},
		"link to root":      {{name: "dir/l", text: "/", kind: tar.TypeSymlink}},
		"empty link":        {{name: "dir/l", text: "", kind: tar.TypeSymlink}},
		"hard link out":     {{name: "dir/l", text: "../outside", kind: tar.TypeLink}},
		"hard link, later":  {{name: "dir/l", text: "dir/a", kind: tar.TypeLink}, {name: "dir/a"}},
		"hard link to link": {{name: "dir/a", text: "b", kind: tar.TypeSymlink}, {name: "dir/l", text: "dir/a", kind: tar.TypeLink}},
		"through a link":    {{name: "dir/l", text: ".", kind: tar.TypeSymlink}, {name: "dir/l/a", text: "x"}},
		"over a link":       {{name: "dir/l", text: "a", kind: tar.TypeSymlink}, {name: "dir/l", text: "x"}},
		"link over a file":  {{name: "dir/l", text: "x"}, {name: "dir/l", text: "a", kind: tar.TypeSymlink}},
		"link over a dir":   {{name: "dir/l/"}, {name: "dir/l", text: "a", kind: tar.TypeSymlink}},
		"twice":             {{name: "dir/a", text: "1"}, {name: "dir/a", text: "2"}},
		"below a file":      {{name: "dir/a", text: "1"}, {name: "dir/a/b", text: "2"}},
		"file as directory": {{name: "dir/a", text: "1"}, {name: "dir/a/"}},
		"device":            {{name: "dir/null", kind: tar.TypeChar}},
		"pipe":              {{name: "dir/pipe", kind: tar.TypeFifo}},
		// a chain: each link stays inside by its words, and the second goes out by way of the first
		"chain": {{name: "dir/a/b/up", text: "../..", kind: tar.TypeSymlink},
			{name: "dir/out", text: "a/b/up/../outside", kind: tar.TypeSymlink}},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			err := unpackIn(t, dir, "dir", archive(t, entries...), nil)
			if !errors.Is(err, digest.ErrInvalid) || len(err.Error()) > 1000 {
				t.Errorf("%.1000v", err)
			}
			for name := range found(t, dir) {
				if !strings.HasPrefix(name, "out") && name != "./" {
					t.Errorf("there is %s", name)
				}
			}
		})
	}
}

// TestUnpackBroken: an archive that is none, or another than its layer says.
func TestUnpackBroken(t *testing.T) {
	good := archive(t, entry{name: "dir/a", text: strings.Repeat("a", 5000)})
	zipped := zip(t, good)
	for name, data := range map[string][]byte{
		"text": []byte("text"), "cut": good[:3000], "cut gzip": zipped[:len(zipped)-10],
		"flipped gzip": append(bytes.Clone(zipped[:30]), bytes.Repeat([]byte{0xff}, 40)...),
		"zstd":         {0x28, 0xb5, 0x2f, 0xfd, 0, 0},
	} {
		if err := unpackIn(t, t.TempDir(), "dir", data, nil); !errors.Is(err, artifact.ErrPacked) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := map[string]string{artifact.AnnotationDigest: string(digest.SHA256.FromString("other"))}
	if err := unpackIn(t, t.TempDir(), "dir", zipped, other); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("another content: %v", err)
	}
	if err := unpackIn(t, t.TempDir(), "dir", append(bytes.Clone(good), "behind"...), map[string]string{
		artifact.AnnotationDigest: string(digest.SHA256.FromBytes(good))}); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("something behind the end: %v", err)
	}
	for _, text := range []string{"x", "md5:0123"} {
		if err := unpackIn(t, t.TempDir(), "dir", good,
			map[string]string{artifact.AnnotationDigest: text}); !errors.Is(err, artifact.ErrPacked) {
			t.Errorf("digest %q: %v", text, err)
		}
	}
}

// TestUnpackBounds: an archive does not become more than its size can be reason for, whether that is in it or
// only said.
func TestUnpackBounds(t *testing.T) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: "dir/a", Typeflag: tar.TypeReg, Size: 1 << 40, Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	if err := unpackIn(t, t.TempDir(), "dir", out.Bytes(), nil); !errors.Is(err, artifact.ErrPacked) ||
		!strings.Contains(err.Error(), "too large") {
		t.Errorf("a file of 1 TiB: %v", err)
	}
	artifact.SetLimits(t, 2, 100, 1<<20)
	three := []entry{{name: "dir/a"}, {name: "dir/b"}, {name: "dir/c"}}
	if err := unpackIn(t, t.TempDir(), "dir", archive(t, three...), nil); !errors.Is(err, artifact.ErrPacked) {
		t.Errorf("three entries, where two are possible: %v", err)
	}
	if err := unpackIn(t, t.TempDir(), "dir", archive(t, three[:2]...), nil); err != nil {
		t.Errorf("two entries: %v", err)
	}
	if err := unpackIn(t, t.TempDir(), "dir", archive(t, entry{name: "dir/" + strings.Repeat("x", 100)}),
		nil); !errors.Is(err, artifact.ErrPacked) {
		t.Errorf("long names: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := artifact.Unpack(ctx, root, artifact.Place{Path: "."},
		bytes.NewReader(archive(t, entry{name: "a"})), 1024); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// FuzzUnpack: whatever an archive is, nothing of it is outside of its directory.
func FuzzUnpack(f *testing.F) {
	artifact.SetLimits(f, 1000, 1<<20, 1<<20)
	f.Add(archive(f, entry{name: "dir/a", text: "a"}, entry{name: "dir/b/", mode: 0o755},
		entry{name: "dir/l", text: "a", kind: tar.TypeSymlink}), "dir")
	f.Add(archive(f, entry{name: "../a", text: "a"}), ".")
	f.Add(zip(f, archive(f, entry{name: "a/b/up", text: "../..", kind: tar.TypeSymlink},
		entry{name: "out", text: "a/b/up/../x", kind: tar.TypeSymlink})), ".")
	f.Fuzz(func(t *testing.T, data []byte, base string) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "outside"), []byte("outside"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := unpackIn(t, dir, base, data, nil)
		entries, readErr := os.ReadDir(dir)
		if readErr != nil || len(entries) != 2 {
			t.Fatalf("%v %v", entries, readErr)
		}
		if text, readErr := os.ReadFile(filepath.Join(dir, "outside")); readErr != nil || string(text) != "outside" {
			t.Fatalf("%q %v", text, readErr)
		}
		if err != nil {
			return
		}
		requireInside(t, filepath.Join(dir, "out"))
	})
}

// requireInside checks that no link below dir leads out of it.
func requireInside(t *testing.T, dir string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Type() != fs.ModeSymlink {
			return err
		}
		if target, err := filepath.EvalSymlinks(path); err == nil && target != dir &&
			!strings.HasPrefix(target, dir+"/") {
			t.Errorf("%s leads to %s", path, target)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
