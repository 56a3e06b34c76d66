package integration

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestDigestImportIsBlob: what is imported under its digest is a blob of the
// repository that the tag is.
func TestDigestImportIsBlob(t *testing.T) {
	d, u := start(t)
	for _, size := range []int{0, 1, 70_000, 3 << 20} {
		data := content(size, uint64(size))
		u.write("model.bin", data)
		for _, cid := range []string{sha256Of(data).String(), fmt.Sprintf("sha512:%x", sha512.Sum512(data))} {
			u.run("dfcache", "import", "-t", "models", "-i", cid, "model.bin")
			u.run("oras", "blob", "fetch", d.host+"/models@"+cid, "--output", "fetched.bin")
			u.has("fetched.bin", data)
			if got := u.run("crane", "blob", d.host+"/models@"+cid); got != string(data) {
				t.Errorf("crane reads %d bytes of %s", len(got), cid)
			}
			u.fails("not found", "oras", "blob", "fetch", d.host+"/other@"+cid, "--output", "other.bin")
			u.hasNot("other.bin")
		}
	}
}

// TestCacheIDIsArtifact: what is imported under a cache ID can be pulled, and
// comes under its name.
func TestCacheIDIsArtifact(t *testing.T) {
	d, u := start(t)
	data := content(300_000, 1)
	tests := []struct{ tag, cid, file string }{
		{"models", "v1", "model.bin"},
		{"a/b-c/d__e", "V1.0_x-y", "a name with späces.bin"},
		{"", "v1", "default.bin"},
		{"models", "v1", "replaced.bin"},
	}
	for _, test := range tests {
		u.write(test.file, data)
		u.run("dfcache", "import", "-t", test.tag, "-i", test.cid, test.file)
		repository := test.tag
		if repository == "" {
			repository = "dfcache/default"
		}
		out := "pulled " + test.file
		u.run("oras", "pull", d.host+"/"+repository+":"+test.cid, "-o", out)
		u.has(filepath.Join(out, test.file), data)
		if all, err := os.ReadDir(filepath.Join(u.dir, out)); err != nil || len(all) != 1 {
			t.Errorf("%s has %v, %v", out, all, err)
		}
	}
	u.prints("a/b-c/d__e dfcache/default models", "oras", "repo", "ls", d.host)
	u.prints("v1", "oras", "repo", "tags", d.host+"/dfcache/default")
	u.feed(bytes.NewReader(data), "dfcache", "import", "-t", "models", "-i", "stdin", "-")
	u.run("oras", "pull", d.host+"/models:stdin", "-o", "out")
	u.has("out/stdin", data)
	// The default repository has the empty tag, and no other.
	u.run("oras", "push", d.host+"/dfcache/default:v2", "default.bin")
	if got := u.export("", "v2"); !bytes.Equal(got, data) {
		t.Errorf("the export of what was pushed to dfcache/default has %d bytes", len(got))
	}
	u.fails("dfcache/default", "dfcache", "stat", "-t", "dfcache/default", "-i", "v2")
	// The artifact says what it is, and the same again for the same file.
	var manifest struct{ ArtifactType string }
	u.json(&manifest, "oras", "manifest", "fetch", d.host+"/models:v1")
	if manifest.ArtifactType != "application/vnd.dfcache.file.v1" {
		t.Errorf("the artifact's type is %q", manifest.ArtifactType)
	}
}

// TestPushIsCacheID: what oras has pushed is found by dfcache under the tag's
// name, and by the digest of the layer.
func TestPushIsCacheID(t *testing.T) {
	d, u := start(t)
	data := content(3<<20, 1)
	u.write("model.bin", data)
	u.run("oras", "push", d.host+"/models:v2", "model.bin")
	s := u.stat("models", "v2")
	if s.Digest != sha256Of(data) || s.Size != int64(len(data)) || s.Title != "model.bin" || !s.Local {
		t.Errorf("stat of v2: %+v", s)
	}
	if got := strings.TrimSpace(u.run("oras", "resolve", d.host+"/models:v2")); got != s.Manifest.String() {
		t.Errorf("oras finds the manifest %s, dfcache %s", got, s.Manifest)
	}
	for _, cid := range []string{"v2", sha256Of(data).String()} {
		out := strings.ReplaceAll("out-"+cid, ":", "-")
		u.run("dfcache", "export", "-t", "models", "-i", cid, out)
		u.has(out, data)
	}
	want := []string{"name:v2", "part:" + s.Manifest.String(), "part:" + s.Digest.String()}
	list := u.list("models")
	for _, entry := range want {
		if !slices.Contains(list, entry) {
			t.Errorf("dfcache list has no %s: %v", entry, list)
		}
	}
	u.fails("not found", "dfcache", "stat", "-t", "models", "-i", "v3")
	u.fails("not found", "dfcache", "stat", "-t", "other", "-i", "v2")
	// One name for both: the later one counts.
	other := content(1000, 2)
	u.write("other.bin", other)
	u.run("dfcache", "import", "-t", "models", "-i", "v2", "other.bin")
	u.run("oras", "pull", d.host+"/models:v2", "-o", "out")
	u.has("out/other.bin", other)
	u.run("oras", "push", d.host+"/models:v2", "model.bin")
	if got := u.export("models", "v2"); !bytes.Equal(got, data) {
		t.Errorf("after another push the export has %d bytes", len(got))
	}
}

// TestArtifactOfFiles: an artifact of several files is exported to a directory.
func TestArtifactOfFiles(t *testing.T) {
	d, u := start(t)
	files := map[string][]byte{"a.txt": []byte("a"), "sub/b.bin": content(100_000, 1), "sub/deep/c": nil}
	args := []string{"oras", "push", d.host + "/sets/all:v1"}
	for name, data := range files {
		u.write(name, data)
		args = append(args, name)
	}
	u.run(args...)
	if s := u.stat("sets/all", "v1"); len(s.Files) != len(files) || s.Size != 100_001 {
		t.Errorf("stat: %+v", s)
	}
	check := func(dir string, more ...string) {
		t.Helper()
		for name, data := range files {
			u.has(filepath.Join(dir, name), data)
		}
		have := 0
		for path := range snapshot(t, filepath.Join(u.dir, dir)) {
			if info, err := os.Stat(path); err == nil && !info.IsDir() {
				have++
			}
		}
		if have != len(files)+len(more) {
			t.Errorf("%s has %d files", dir, have)
		}
	}
	u.run("dfcache", "export", "-t", "sets/all", "-i", "v1", "out")
	check("out")
	u.fails("--overwrite", "dfcache", "export", "-t", "sets/all", "-i", "v1", "out")
	u.write("out/more", nil)
	u.write("out/a.txt", []byte("changed"))
	u.run("dfcache", "export", "-t", "sets/all", "-i", "v1", "--overwrite", "out")
	check("out", "more")
	u.fails("it has 3 files", "dfcache", "export", "-t", "sets/all", "-i", "v1", "-")
	// oras sees the same.
	u.run("oras", "pull", d.host+"/sets/all:v1", "-o", "pulled")
	check("pulled")
}

// TestHostileTitles: the names of files in an artifact are not to be trusted.
// None may lead out of the directory, whoever pushed them.
func TestHostileTitles(t *testing.T) {
	d, u := start(t)
	u.write("good.txt", []byte("good"))
	u.write("evil", []byte("evil"))
	u.write("config.json", []byte("{}"))
	for _, blob := range []string{"good.txt", "evil", "config.json"} {
		u.run("oras", "blob", "push", d.host+"/sets", blob)
	}
	// The links of the directory that is exported to are not followed.
	u.write("into/keep", nil)
	u.write("outside/keep", nil)
	if err := os.Symlink(filepath.Join(u.dir, "outside"), filepath.Join(u.dir, "into", "link")); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, filepath.Join(u.dir, "outside"))
	titles := []string{
		"../escaped", "../../escaped", "a/../../escaped", "/" + strings.TrimPrefix(u.dir, "/") + "/outside/escaped",
		"..", ".", "./", "a/..", "link/escaped", "good.txt", "./good.txt", "x\u0000y",
	}
	for i, title := range titles {
		u.write("manifest.json", artifactOf(t, [2]string{"good.txt", "good"}, [2]string{title, "evil"}))
		tag := fmt.Sprintf("v%d", i)
		u.run("oras", "manifest", "push", d.host+"/sets:"+tag, "manifest.json")
		u.fails("", "dfcache", "export", "-t", "sets", "-i", tag, "--overwrite", "into")
		if title != "link/escaped" { // where there is no link, it is a name as others
			u.fails("invalid", "dfcache", "export", "-t", "sets", "-i", tag, "out")
			u.hasNot("out")
		}
	}
	requireUnchanged(t, filepath.Join(u.dir, "outside"), before)
	u.hasNot("escaped")
	u.hasNot("../escaped")
	// Of the failed one, what came before the link may be there.
	if all, err := os.ReadDir(filepath.Join(u.dir, "into")); err != nil || len(all) > 3 {
		t.Errorf("the directory has %v, %v", all, err)
	}

	// Where there is one file, its place is the one that the user names.
	u.write("manifest.json", artifactOf(t, [2]string{"../../escaped", "evil"}))
	u.run("oras", "manifest", "push", d.host+"/sets:one", "manifest.json")
	u.run("dfcache", "export", "-t", "sets", "-i", "one", "one")
	u.has("one", []byte("evil"))
	u.hasNot("../escaped")
	// oras lets such names be pushed where it is told to.
	u.write("a/b", nil)
	u.run("oras", "push", "--disable-path-validation", d.host+"/sets:oras", filepath.Join(u.dir, "good.txt"), "evil")
	u.fails("invalid", "dfcache", "export", "-t", "sets", "-i", "oras", "out")
}

// TestDeleteOfName: deleting a cache ID frees what only it held.
func TestDeleteOfName(t *testing.T) {
	d, u := start(t)
	shared, own := content(200_000, 1), content(100_000, 2)
	u.write("shared.bin", shared)
	u.write("own.bin", own)
	u.run("oras", "push", d.host+"/models:v1", "shared.bin", "own.bin")
	u.run("dfcache", "import", "-t", "models", "-i", "v2", "shared.bin")
	u.run("oras", "push", d.host+"/models:v3", "own.bin", "--artifact-type", "application/vnd.test")
	u.run("oras", "cp", d.host+"/models:v3", d.host+"/other:v3")

	u.run("dfcache", "delete", "-t", "models", "-i", "v1")
	u.fails("not found", "oras", "pull", d.host+"/models:v1")
	if !d.holds(t, shared) || !d.holds(t, own) {
		t.Error("content is gone that another name leads to")
	}
	u.run("dfcache", "delete", "-t", "models", "-i", "v3")
	if !d.holds(t, own) {
		t.Error("content is gone that another repository has")
	}
	u.fails("not found", "oras", "blob", "fetch", d.host+"/models@"+sha256Of(own).String(), "--descriptor")
	u.run("oras", "pull", d.host+"/other:v3", "-o", "out")
	u.has("out/own.bin", own)
	u.run("dfcache", "delete", "-t", "other", "-i", "v3")
	if d.holds(t, own) {
		t.Error("content is there that nothing leads to")
	}
	u.run("oras", "pull", d.host+"/models:v2", "-o", "out")
	u.has("out/shared.bin", shared)
	u.run("dfcache", "delete", "-t", "models", "-i", "v2")
	if left := d.blobs(t); len(left) > 0 {
		t.Errorf("these files are left: %v", left)
	}
	if list := u.list("models"); len(list) > 0 {
		t.Errorf("these are left: %v", list)
	}
	u.prints("", "oras", "repo", "ls", d.host)

	// What is attached to a manifest goes with it.
	u.run("oras", "push", d.host+"/models:v1", "own.bin")
	u.run("oras", "attach", d.host+"/models:v1", "--artifact-type", "application/vnd.sig", "shared.bin")
	u.run("dfcache", "delete", "-t", "models", "-i", "v1")
	if left := d.blobs(t); len(left) > 0 {
		t.Errorf("of an artifact with referrers these files are left: %v", left)
	}
}

// TestDeleteOfDigest: a digest that a manifest refers to is not deleted, but by force.
func TestDeleteOfDigest(t *testing.T) {
	d, u := start(t)
	data := content(200_000, 1)
	u.write("model.bin", data)
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
	layer := sha256Of(data).String()
	_, stderr, code := d.run(t, nil, "delete", "-t", "models", "-i", layer)
	if code != 10 || !strings.Contains(stderr, "still referred to") || !strings.Contains(stderr, "--force") {
		t.Errorf("delete of a layer: exit code %d, %s", code, stderr)
	}
	u.fails("still referred to", "oras", "blob", "delete", "-f", d.host+"/models@"+layer)
	u.run("oras", "pull", d.host+"/models:v1", "-o", "out")
	u.has("out/model.bin", data)

	u.run("dfcache", "delete", "-t", "models", "-i", layer, "--force")
	if d.holds(t, data) {
		t.Error("the layer is still there")
	}
	u.fails("not found", "oras", "pull", d.host+"/models:v1", "-o", "gone")
	u.hasNot("gone/model.bin")
	// Pushing it again mends that. With the same manifest oras would not look at the layer.
	u.run("oras", "push", d.host+"/models:v2", "model.bin", "--annotation", "again=yes")
	u.run("oras", "pull", d.host+"/models:v1", "-o", "mended")
	u.has("mended/model.bin", data)

	// A blob that nothing refers to can be deleted at either door.
	for i, args := range [][]string{
		{"dfcache", "delete", "-t", "models", "-i"},
		{"oras", "blob", "delete", "-f"},
	} {
		blob := content(1000, uint64(10+i))
		u.write("blob", blob)
		cid := sha256Of(blob).String()
		u.run("oras", "blob", "push", d.host+"/models", "blob")
		if args[0] == "oras" {
			cid = d.host + "/models@" + cid
		}
		u.run(append(args, cid)...)
		if d.holds(t, blob) {
			t.Errorf("%s leaves the blob", args[0])
		}
	}
}

// TestList: dfcache list shows tags, names and blobs of both doors.
func TestList(t *testing.T) {
	d, u := start(t)
	a, b, c := []byte("aaa"), []byte("bbb"), []byte("ccc")
	for name, data := range map[string][]byte{"a": a, "b": b, "c": c} {
		u.write(name, data)
	}
	u.run("dfcache", "import", "-i", "v1", "a")
	u.run("oras", "push", d.host+"/models:v2", "b")
	u.run("oras", "blob", "push", d.host+"/models", "c")
	manifest := u.stat("models", "v2").Manifest
	want := []string{"name:v2", "part:" + sha256Of([]byte("{}")).String(), "part:" + sha256Of(b).String(),
		"part:" + manifest.String(), "blob:" + sha256Of(c).String()}
	if got := u.list("models"); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
		t.Errorf("under models is %v, want %v", got, want)
	}
	u.run("crane", "delete", d.host+"/models:v2")
	if got := u.list("models"); slices.Contains(got, "name:v2") ||
		!slices.Contains(got, "manifest:"+manifest.String()) {
		t.Errorf("after the tag was taken away: %v", got)
	}
	all := u.run("dfcache", "list")
	for _, want := range []string{"-  ", "models  ", "v1", manifest.String(), sha256Of(c).String()} {
		if !strings.Contains(all, want) {
			t.Errorf("the list has no %q:\n%s", want, all)
		}
	}
	// All of it is there after a restart.
	d.stop(t, syscall.SIGTERM)
	*d = *startDaemon(t, d.home)
	if again := u.run("dfcache", "list"); again != all {
		t.Errorf("after a restart the list is\n%s\nit was\n%s", again, all)
	}
}
