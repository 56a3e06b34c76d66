package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestOrasPushPull: all that one push and one pull can carry, byte for byte.
func TestOrasPushPull(t *testing.T) {
	d, u := start(t)
	files := map[string][]byte{"empty": nil, "small.txt": []byte("small"), "large.bin": content(8<<20, 1),
		"dir/a": []byte("a"), "dir/b/c": []byte("c")}
	for name, data := range files {
		u.write(name, data)
	}
	u.write("config.json", []byte(`{"a":"b"}`))
	u.run("oras", "push", d.host+"/a/b:v1", "--artifact-type", "application/vnd.test.v1", "--annotation", "key=välue",
		"--config", "config.json:application/vnd.test.config+json", "empty", "small.txt:text/plain", "large.bin", "dir")
	u.run("oras", "pull", d.host+"/a/b:v1", "-o", "out", "--config", "config")
	for name, data := range files {
		u.has("out/"+name, data)
	}
	u.has("out/config", []byte(`{"a":"b"}`))
	var m ocispec.Manifest
	u.json(&m, "oras", "manifest", "fetch", d.host+"/a/b:v1")
	if m.ArtifactType != "application/vnd.test.v1" || m.Annotations["key"] != "välue" || len(m.Layers) != 4 {
		t.Errorf("the manifest has changed: %+v", m)
	}
	// By digest, too; and what is there is not sent again.
	digest := strings.TrimSpace(u.run("oras", "resolve", d.host+"/a/b:v1"))
	r := record(t, d)
	u.run("oras", "pull", r.host+"/a/b@"+digest, "-o", "again")
	u.has("again/large.bin", files["large.bin"])
	u.run("oras", "push", r.host+"/a/b:v2", "large.bin")
	r.requireCount(t, 0, `^PUT .*/blobs/uploads/.*`+sha256Of(files["large.bin"]).Encoded())
	u.fails("not found", "oras", "pull", d.host+"/a/b:none", "-o", "none")
	u.fails("not found", "oras", "pull", d.host+"/none:v1", "-o", "none")
	u.hasNot("none")
}

// TestOrasCopy copies artifacts with their referrers between repositories,
// which moves no bytes, between daemons, and to and from a layout on disk.
func TestOrasCopy(t *testing.T) {
	d, u := start(t)
	other, _ := start(t)
	data := content(4<<20, 1)
	u.write("model.bin", data)
	u.write("sig", []byte("signed"))
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
	u.run("oras", "attach", d.host+"/models:v1", "--artifact-type", "application/vnd.sig", "sig")
	digest := strings.TrimSpace(u.run("oras", "resolve", d.host+"/models:v1"))

	before, r := d.blobs(t), record(t, d)
	u.run("oras", "cp", "-r", r.host+"/models:v1", r.host+"/copy/of:v1")
	r.requireCount(t, 3, `^POST /v2/copy/of/blobs/uploads/\?.*mount=.* 201$`) // config, layer, signature
	r.requireCount(t, 0, `^(PUT|PATCH) /v2/copy/of/blobs/`)
	if now := d.blobs(t); fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("a copy within the registry made files: %v, before %v", now, before)
	}
	u.run("oras", "cp", "-r", d.host+"/copy/of:v1", other.host+"/models:v1")
	u.run("oras", "cp", "-r", other.host+"/models:v1", "--to-oci-layout", "layout:v1")
	u.run("oras", "cp", "-r", "--from-oci-layout", "layout:v1", d.host+"/back:v1")
	for _, repository := range []string{d.host + "/copy/of", other.host + "/models", d.host + "/back"} {
		u.prints(digest, "oras", "resolve", repository+":v1")
		out := strings.NewReplacer("/", "-", ":", "-").Replace(repository)
		u.run("oras", "pull", repository+":v1", "-o", out)
		u.has(out+"/model.bin", data)
		if tree := u.run("oras", "discover", repository+":v1"); !strings.Contains(tree, "application/vnd.sig") {
			t.Errorf("%s has no signature:\n%s", repository, tree)
		}
	}
	// The first daemon does not know that the second one has it.
	u.run("dfcache", "delete", "-t", "back", "-i", "v1")
	u.run("oras", "pull", other.host+"/models:v1", "-o", "still")
	u.has("still/model.bin", data)

	// A whole repository goes into an archive and comes back.
	u.run("oras", "tag", d.host+"/models:v1", "latest")
	u.run("oras", "backup", "--include-referrers", "-o", "backup.tar", d.host+"/models")
	u.run("oras", "restore", "--input", "backup.tar", other.host+"/restored")
	u.prints("latest v1", "oras", "repo", "tags", other.host+"/restored")
	u.prints(digest, "oras", "resolve", other.host+"/restored:latest")
}

// discovered is what oras discover prints.
type discovered struct {
	Digest, ArtifactType string
	Annotations          map[string]string
	Referrers            []discovered
}

// TestOrasReferrers attaches to artifacts, and finds by type what was attached.
func TestOrasReferrers(t *testing.T) {
	d, u := start(t)
	u.write("model.bin", []byte("model"))
	u.write("sig", []byte("signature"))
	u.write("sbom", []byte("bill of materials"))
	r := record(t, d)
	host := r.host
	u.run("oras", "push", host+"/models:v1", "model.bin")
	u.run("oras", "attach", host+"/models:v1", "--artifact-type", "application/vnd.sig", "--annotation", "by=me", "sig")
	u.run("oras", "attach", host+"/models:v1", "--artifact-type", "application/vnd.sbom", "sbom")
	var tree discovered
	u.json(&tree, "oras", "discover", host+"/models:v1", "--format", "json")
	if len(tree.Referrers) != 2 {
		t.Fatalf("the referrers are %+v", tree.Referrers)
	}
	var sigs discovered
	u.json(&sigs, "oras", "discover", host+"/models:v1", "--artifact-type", "application/vnd.sig", "--format", "json")
	if len(sigs.Referrers) != 1 || sigs.Referrers[0].ArtifactType != "application/vnd.sig" ||
		sigs.Referrers[0].Annotations["by"] != "me" {
		t.Fatalf("the referrers of one type are %+v", sigs.Referrers)
	}
	r.requireCount(t, 0, `/manifests/sha256-`) // what clients use where there is no referrers API
	// What is attached to something attached is found below it.
	u.run("oras", "attach", host+"/models@"+sigs.Referrers[0].Digest, "--artifact-type", "application/vnd.sig", "sig")
	u.json(&sigs, "oras", "discover", host+"/models:v1", "--artifact-type", "application/vnd.sig", "--format", "json")
	if len(sigs.Referrers) != 1 || len(sigs.Referrers[0].Referrers) != 1 {
		t.Errorf("the tree is %+v", sigs)
	}
	u.run("oras", "pull", host+"/models@"+sigs.Referrers[0].Digest, "-o", "out")
	u.has("out/sig", []byte("signature"))
	u.run("oras", "manifest", "delete", "-f", host+"/models@"+sigs.Referrers[0].Digest)
	u.json(&tree, "oras", "discover", host+"/models:v1", "--format", "json")
	if len(tree.Referrers) != 1 || tree.Referrers[0].ArtifactType != "application/vnd.sbom" {
		t.Errorf("after the signature was deleted there are %+v", tree.Referrers)
	}
}

// TestOrasManage: tags, lists, manifests and blobs, one by one.
func TestOrasManage(t *testing.T) {
	d, u := start(t)
	repo := d.host + "/models"
	u.write("a.bin", []byte("a"))
	u.write("b.bin", []byte("b"))
	u.run("oras", "push", repo+":v1", "a.bin")
	u.run("oras", "push", repo+":v2", "b.bin")
	u.run("oras", "tag", repo+":v1", "stable", "latest")
	u.prints("latest stable v1 v2", "oras", "repo", "tags", repo)
	u.prints("v1 v2", "oras", "repo", "tags", repo, "--last", "stable")
	u.run("oras", "tag", repo+":v2", "latest") // moves it
	v2 := strings.TrimSpace(u.run("oras", "resolve", repo+":v2"))
	u.prints(v2, "oras", "resolve", repo+":latest")
	u.run("oras", "push", d.host+"/zoo/animals:v1", "a.bin")
	u.prints("models zoo/animals", "oras", "repo", "ls", d.host)

	var descriptor ocispec.Descriptor
	u.json(&descriptor, "oras", "manifest", "fetch", repo+":v1", "--descriptor")
	manifest := []byte(u.run("oras", "manifest", "fetch", repo+":v1"))
	if descriptor.Digest != sha256Of(manifest) || descriptor.Size != int64(len(manifest)) ||
		descriptor.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("the descriptor is %+v, the manifest %s", descriptor, manifest)
	}
	u.run("oras", "manifest", "index", "create", repo+":all", "v1", "v2")
	u.run("oras", "manifest", "delete", "-f", repo+"@"+strings.TrimSpace(u.run("oras", "resolve", repo+":all")))
	u.fails("not found", "oras", "resolve", repo+":all")
	// By tag oras deletes the manifest, and with it its other tags.
	u.run("oras", "manifest", "delete", "-f", repo+":latest")
	u.prints("stable v1", "oras", "repo", "tags", repo)
	u.fails("not found", "oras", "manifest", "fetch", repo+"@"+v2)
	u.write("manifest.json", manifest)
	u.run("oras", "manifest", "push", repo+":pushed", "manifest.json")
	if got := u.run("oras", "manifest", "fetch", repo+":pushed"); got != string(manifest) {
		t.Errorf("the manifest comes back as %s", got)
	}

	data := content(2<<20, 1)
	blob := repo + "@" + sha256Of(data).String()
	u.feed(bytes.NewReader(data), "oras", "blob", "push", blob, "-", "--size", fmt.Sprint(len(data)))
	u.json(&descriptor, "oras", "blob", "fetch", blob, "--descriptor")
	if descriptor.Size != int64(len(data)) {
		t.Errorf("the blob's descriptor is %+v", descriptor)
	}
	u.run("oras", "blob", "fetch", blob, "-o", "out.bin")
	u.has("out.bin", data)
	u.run("oras", "blob", "delete", "-f", blob)
	u.fails("not found", "oras", "blob", "fetch", blob, "--descriptor")
	if d.holds(t, data) {
		t.Error("the blob's file is still there")
	}
	// A digest that is not that of the content.
	u.write("wrong.bin", content(1000, 2))
	_, stderr, ok := u.try(nil, "oras", "blob", "push", blob, "wrong.bin")
	if ok {
		t.Errorf("a blob was pushed under another's digest: %s", stderr)
	}
	u.fails("not found", "oras", "blob", "fetch", blob, "--descriptor")
}

// readOnly is a command that runs another one, which finds dir read-only.
func readOnly(dir string) []string {
	unshare := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		unshare = []string{"unshare", "--user", "--map-root-user", "--mount"}
	}
	return append(unshare, "sh", "-c", fmt.Sprintf(
		`mount --bind %[1]s %[1]s && mount -o remount,bind,ro %[1]s && exec "$0" "$@"`, dir))
}

// TestDataDirectoryIsLayout: the data directory of a daemon, running or not, is
// an OCI image layout, from which oras reads blobs, and takes them when it pulls
// from elsewhere (ORAS_CACHE). Nothing is changed there.
func TestDataDirectoryIsLayout(t *testing.T) {
	remote, u := start(t)
	u.write("model.bin", content(3<<20, 1))
	u.write("other.bin", content(1<<20, 2))
	u.run("oras", "push", remote.host+"/models:v1", "model.bin", "other.bin")
	u.write("new.bin", content(1000, 3))
	u.run("oras", "push", remote.host+"/models:new", "new.bin")

	// Who may read the data directory is decided before the daemon makes it.
	const readers = 54321
	home := tempHome(t)
	data := filepath.Join(home, "data")
	if err := errors.Join(os.Mkdir(data, 0o750), os.Chmod(data, 0o750|os.ModeSetgid)); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chown(data, -1, readers), os.Chmod(data, 0o750|os.ModeSetgid)); err != nil {
			t.Fatal(err)
		}
	}
	near := startDaemon(t, home)
	u.run("oras", "cp", remote.host+"/models:v1", near.host+"/models:v1")
	manifest := u.run("oras", "manifest", "fetch", near.host+"/models:v1")
	check := func(t *testing.T, as *user, wrap ...string) {
		as.t = t
		before, r := snapshot(t, data), record(t, remote)
		layout := data + "@" + sha256Of(content(3<<20, 1)).String()
		as.run(append(wrap, "oras", "blob", "fetch", "--oci-layout", layout, "-o", "blob.bin")...)
		as.has("blob.bin", content(3<<20, 1))
		if got := as.run(append(wrap, "oras", "manifest", "fetch", "--oci-layout",
			data+"@"+sha256Of([]byte(manifest)).String())...); got != manifest {
			t.Errorf("the manifest in the layout is %s", got)
		}
		as.run(append(wrap, "oras", "pull", r.host+"/models:v1", "-o", "pulled")...)
		r.requireCount(t, 2, `^GET /v2/models/blobs/`)
		as.env = append(as.env, "ORAS_CACHE="+data)
		as.run(append(wrap, "oras", "pull", r.host+"/models:v1", "-o", "cached")...)
		as.has("cached/model.bin", content(3<<20, 1))
		as.has("cached/other.bin", content(1<<20, 2))
		r.requireCount(t, 2, `^GET /v2/models/blobs/`) // no more
		// What is not there oras would have to put there: it fails, and changes nothing.
		as.fails("", append(wrap, "oras", "pull", r.host+"/models:new", "-o", "new")...)
		requireUnchanged(t, data, before)
	}
	t.Run("mounted read-only", func(t *testing.T) {
		check(t, newUser(t, near), readOnly(data)...)
	})
	near.stop(t, syscall.SIGTERM)
	t.Run("of a daemon that does not run", func(t *testing.T) {
		check(t, newUser(t, near), readOnly(data)...)
	})
	t.Run("of a user who may only read", func(t *testing.T) {
		needRoot(t)
		as := newUser(t, near)
		for _, dir := range []string{near.home, as.dir} {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for path := range snapshot(t, as.dir) {
			if err := os.Chown(path, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}
		// Its path leads through directories that another user can't enter.
		oras, err := os.ReadFile(filepath.Join(toolsDir, "oras"))
		if err != nil {
			t.Fatal(err)
		}
		as.write("bin/oras", oras)
		if err := os.Chmod(filepath.Join(as.dir, "bin", "oras"), 0o755); err != nil {
			t.Fatal(err)
		}
		as.env[0] = "PATH=" + filepath.Join(as.dir, "bin") + ":" + os.Getenv("PATH")
		check(t, as, "setpriv", "--reuid", "65534", "--regid", fmt.Sprint(readers), "--clear-groups")
		as.t = t
		as.fails("permission denied", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
			"oras", "blob", "fetch", "--oci-layout", data+"@"+
				sha256Of(content(3<<20, 1)).String(), "-o", "stranger.bin")
	})
	var index ocispec.Index
	if raw, err := os.ReadFile(filepath.Join(data, "index.json")); err != nil || json.Unmarshal(raw, &index) != nil ||
		index.SchemaVersion != 2 {
		t.Errorf("index.json: %s, %v", raw, err)
	}
}

// TestConcurrentPushes: many clients push the same content at once, to one
// repository and to others. Each succeeds, and the content is there once.
func TestConcurrentPushes(t *testing.T) {
	d, u := start(t)
	data := content(2<<20, 1)
	u.write("model.bin", data)
	u.write("layer.tar", tarOf(t, "file", data))
	var clients sync.WaitGroup
	push := func(args ...string) {
		cmd := u.command(nil, args)
		clients.Go(func() {
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("$ %s\n%s", strings.Join(args, " "), out)
			}
		})
	}
	for i := range 4 {
		tag := fmt.Sprintf(":v%d", i)
		push("oras", "push", d.host+"/models"+tag, "model.bin")
		push("oras", "push", d.host+"/models:same", "model.bin")
		push("oras", "push", fmt.Sprintf("%s/models/%d:v1", d.host, i), "model.bin")
		push("crane", "append", "--oci-empty-base", "-f", "layer.tar", "-t", d.host+"/images"+tag)
		push("dfcache", "import", "-t", "models", "-i", fmt.Sprintf("imported%d", i), "model.bin")
	}
	clients.Wait()
	for _, reference := range []string{"/models:v0",
		"/models:v3", "/models:same", "/models/2:v1", "/models:imported1"} {
		out := strings.NewReplacer("/", "-", ":", "-").Replace(reference)
		u.run("oras", "pull", d.host+reference, "-o", out)
		u.has(filepath.Join(out, "model.bin"), data)
	}
	for i := range 4 {
		u.run("crane", "validate", "--remote", fmt.Sprintf("%s/images:v%d", d.host, i))
	}
}

// TestOrasTrees: a tree that dfcache imports comes out of oras, and a directory that oras pushes out of dfcache.
func TestOrasTrees(t *testing.T) {
	d, u := start(t)
	files := map[string][]byte{"tree/a": []byte("a"), "tree/sub/b": content(100_000, 1), "tree/sub/same": []byte("a")}
	for name, data := range files {
		u.write(name, data)
	}
	if err := errors.Join(os.Chmod(filepath.Join(u.dir, "tree/sub/b"), 0o755),
		os.Symlink("sub/b", filepath.Join(u.dir, "tree/link"))); err != nil {
		t.Fatal(err)
	}
	u.run("dfcache", "import", "-t", "builds", "-i", "v1", "tree")
	u.run("oras", "pull", d.host+"/builds:v1", "-o", "pulled/tree")
	for name, data := range files {
		u.has("pulled/"+name, data)
	}
	u.run("oras", "push", d.host+"/builds:v2", "tree", "--disable-path-validation")
	u.run("dfcache", "export", "-t", "builds", "-i", "v2", "unpacked")
	u.run("dfcache", "export", "-t", "builds", "-i", "v1", "exported")
	for _, out := range []string{"unpacked", "exported"} {
		for name, data := range files {
			u.has(strings.Replace(name, "tree", out, 1), data)
		}
		info, err := os.Stat(filepath.Join(u.dir, out, "sub/b"))
		target, linkErr := os.Readlink(filepath.Join(u.dir, out, "link"))
		if err != nil || info.Mode() != 0o755 || linkErr != nil || target != "sub/b" {
			t.Errorf("%s/sub/b has mode %v (%v), the link leads to %q (%v)", out, info.Mode(), err, target, linkErr)
		}
	}
}
