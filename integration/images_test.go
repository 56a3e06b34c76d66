package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha512"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tarOf makes a tar archive with one file.
func tarOf(t *testing.T, name string, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// pushImage makes an image of as many layers as there are sizes, pushes it with
// crane, and returns its manifest. The same arguments make the same image.
func (u *user) pushImage(reference string, seed uint64, sizes ...int) ocispec.Manifest {
	u.t.Helper()
	args := []string{"crane", "append", "--oci-empty-base", "-t", reference}
	for i, size := range sizes {
		name := fmt.Sprintf("layer%d.tar", i)
		u.write(name, tarOf(u.t, fmt.Sprintf("etc/file%d", i), content(size, seed+uint64(i))))
		args = append(args, "-f", name)
	}
	u.run(args...)
	draft := reference[:strings.LastIndex(reference, ":")] + "@" +
		strings.TrimSpace(u.run("crane", "digest", reference))
	u.run("crane", "mutate", reference, "--set-platform", runtime.GOOS+"/"+runtime.GOARCH, "-t", reference)
	u.run("crane", "delete", draft)
	return u.manifest(reference)
}

func (u *user) manifest(reference string) (m ocispec.Manifest) {
	u.t.Helper()
	u.json(&m, "crane", "manifest", reference)
	return m
}

// requireLayers fails the test unless dfcache finds the image's layers, whole.
func (u *user) requireLayers(tag string, m ocispec.Manifest) {
	u.t.Helper()
	if len(m.Layers) == 0 {
		u.t.Error("the image has no layers")
	}
	for _, layer := range append(m.Layers, m.Config) {
		if s := u.stat(tag, layer.Digest.String()); s.Size != layer.Size || !s.Local {
			u.t.Errorf("layer %s of %d bytes: stat says %+v", layer.Digest, layer.Size, s)
		}
		if got := u.export(tag, layer.Digest.String()); sha256Of(got) != layer.Digest {
			u.t.Errorf("layer %s: the export has %d bytes that are others", layer.Digest, len(got))
		}
	}
}

func TestCrane(t *testing.T) {
	d, u := start(t)
	m := u.pushImage(d.host+"/images/app:v1", 1, 1<<20, 1000)
	u.requireLayers("images/app", m)
	digest := strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:v1"))

	// To disk and back, in both forms.
	u.run("crane", "pull", d.host+"/images/app:v1", "image.tar")
	u.run("crane", "pull", "--format", "oci", d.host+"/images/app:v1", "layout")
	u.run("crane", "push", "layout", d.host+"/pushed:oci")
	u.prints(digest, "crane", "digest", d.host+"/pushed:oci")
	u.run("crane", "push", "image.tar", d.host+"/pushed:docker")
	u.requireLayers("pushed", u.manifest(d.host+"/pushed:docker"))
	for _, reference := range []string{"/pushed:oci", "/pushed:docker", "/images/app:v1", "/images/app@" + digest} {
		u.run("crane", "validate", "--remote", d.host+reference)
	}
	u.run("crane", "export", d.host+"/pushed:docker", "files.tar")
	if files, err := os.ReadFile(filepath.Join(u.dir, "files.tar")); err != nil ||
		!bytes.Contains(files, content(1000, 2)) {
		t.Errorf("the image's files do not have what went in: %v", err)
	}

	// Within the registry nothing is sent.
	r := record(t, d)
	u.run("crane", "copy", r.host+"/images/app:v1", r.host+"/copy/app:v1")
	r.requireCount(t, 3, `^POST /v2/copy/app/blobs/uploads/\?.*mount=.* 201$`)
	r.requireCount(t, 0, `^(PATCH|PUT) /v2/copy/app/blobs/`)
	u.prints(digest, "crane", "digest", d.host+"/copy/app:v1")
	u.run("crane", "tag", d.host+"/copy/app:v1", "v1.0")

	u.run("crane", "mutate", d.host+"/images/app:v1", "--label", "a=b", "-t", d.host+"/images/app:labelled")
	u.run("crane", "index", "append", "-m", d.host+"/images/app:v1", "-m", d.host+"/images/app:labelled",
		"-t", d.host+"/images/app:all")
	u.run("crane", "validate", "--remote", d.host+"/images/app:all")
	u.run("crane", "copy", d.host+"/images/app:all", d.host+"/copy/app:all")
	u.run("crane", "validate", "--remote", d.host+"/copy/app:all")
	u.prints("all labelled v1", "crane", "ls", d.host+"/images/app")
	u.prints("copy/app images/app pushed", "crane", "catalog", d.host)

	// What an index refers to stays until the index has gone.
	u.fails("DENIED", "crane", "delete", d.host+"/images/app@"+digest)
	if out := u.run("dfcache", "stat", "-t", "images/app", "-i", "all"); !strings.Contains(out, "kind:      index\n") {
		t.Errorf("stat of an index says %s", out)
	}
	u.fails("index of several manifests", "dfcache", "export", "-t", "images/app", "-i", "all", "none")
	u.run("crane", "delete", d.host+"/images/app:v1") // the tag alone
	u.prints("all labelled", "crane", "ls", d.host+"/images/app")
	u.run("crane", "validate", "--remote", d.host+"/images/app@"+digest)
	u.run("dfcache", "delete", "-t", "images/app", "-i", "all")
	u.fails("MANIFEST_UNKNOWN", "crane", "manifest", d.host+"/images/app@"+digest)
	for _, tag := range u.list("copy/app") {
		if name, ok := strings.CutPrefix(tag, "name:"); ok {
			u.run("dfcache", "delete", "-t", "copy/app", "-i", name)
		}
	}
	u.run("crane", "delete", d.host+"/images/app@"+
		strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:labelled")))
	u.prints("pushed", "crane", "catalog", d.host)
	u.run("crane", "delete", d.host+"/pushed@"+digest)
	u.run("dfcache", "delete", "-t", "pushed", "-i", "docker")
	if left := d.blobs(t); len(left) > 0 {
		t.Errorf("when all is deleted these files are left: %v", left)
	}
}

func TestRegctl(t *testing.T) {
	d, u := start(t)
	r := record(t, d)
	for _, host := range []string{d.host, r.host} {
		u.run("regctl", "registry", "set", host, "--tls", "disabled", "--skip-check")
	}
	m := u.pushImage(d.host+"/images/app:v1", 1, 3<<20, 1000)
	digest := strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:v1"))

	u.write("sbom", []byte("bill of materials"))
	u.run("regctl", "artifact", "put", "--artifact-type", "application/vnd.sbom", "--subject", d.host+"/images/app:v1",
		"-f", "sbom")
	if list := u.run("regctl", "artifact", "list", d.host+"/images/app:v1", "--filter-artifact-type",
		"application/vnd.sbom", "--format", "{{len .Descriptors}}"); strings.TrimSpace(list) != "1" {
		t.Errorf("%s artifacts are found", list)
	}
	if got := u.run("regctl", "artifact", "get", "--subject", d.host+"/images/app:v1",
		"--filter-artifact-type", "application/vnd.sbom"); got != "bill of materials" {
		t.Errorf("the artifact has %q", got)
	}

	u.run("regctl", "image", "copy", "--referrers", r.host+"/images/app:v1", r.host+"/copy:v1")
	r.requireCount(t, 0, `^(PATCH|PUT) /v2/copy/blobs/`)
	if r.count(`^POST /v2/copy/blobs/uploads/\?.*from=.* 201$`) < 3 {
		t.Error("blobs were not mounted")
	}
	u.prints(digest, "regctl", "image", "digest", d.host+"/copy:v1")
	u.requireLayers("copy", m)
	if tree := u.run("regctl", "artifact", "tree", d.host+"/copy:v1"); !strings.Contains(tree, "application/vnd.sbom") {
		t.Errorf("the copy has no artifact: %s", tree)
	}
	u.run("regctl", "image", "copy", d.host+"/images/app:v1", "ocidir://layout:v1")
	u.run("regctl", "image", "copy", "ocidir://layout:v1", d.host+"/fromdir:v1")
	u.prints(digest, "regctl", "image", "digest", d.host+"/fromdir:v1")
	u.run("regctl", "image", "export", d.host+"/images/app:v1", "image.tar")
	u.run("regctl", "image", "import", d.host+"/imported:v1", "image.tar")
	u.prints(digest, "regctl", "image", "digest", d.host+"/imported:v1")
	u.prints("copy fromdir images/app imported", "regctl", "repo", "ls", d.host)

	u.run("regctl", "index", "create", d.host+"/images/app:all", "--ref", d.host+"/images/app:v1")
	u.prints("all v1", "regctl", "tag", "ls", d.host+"/images/app")
	u.run("regctl", "tag", "rm", d.host+"/images/app:v1")
	u.prints("all", "regctl", "tag", "ls", d.host+"/images/app")
	u.prints(digest, "crane", "digest", d.host+"/images/app@"+digest) // the manifest stays
	u.run("regctl", "manifest", "delete", d.host+"/imported@"+digest)
	u.fails("not found", "regctl", "manifest", "get", d.host+"/imported@"+digest)
}

// TestRegctlChunks: regctl sends what it does not know the size of in chunks,
// and goes on from what the registry has when an answer is lost.
func TestRegctlChunks(t *testing.T) {
	d, u := start(t)
	r := record(t, d)
	u.run("regctl", "registry", "set", r.host, "--tls", "disabled", "--skip-check")
	put := func(data []byte, flags ...string) {
		t.Helper()
		u.feed(bytes.NewReader(data), append([]string{"regctl", "blob", "put", r.host + "/blobs"}, flags...)...)
	}
	data := content(3<<20+1, 5)
	put(data)
	r.requireCount(t, 4, `^PATCH .* 202 Content-Range:\d+-\d+$`)
	if got := u.export("blobs", sha256Of(data).String()); !bytes.Equal(got, data) {
		t.Errorf("the export has %d bytes", len(got))
	}
	sum := fmt.Sprintf("sha512:%x", sha512.Sum512(data))
	put(data, "--digest", sum)
	if got := u.run("regctl", "blob", "get", r.host+"/blobs", sum); got != string(data) {
		t.Errorf("under sha512 are %d bytes", len(got))
	}
	if got := u.export("blobs", sum); !bytes.Equal(got, data) {
		t.Errorf("the export under sha512 has %d bytes", len(got))
	}
	u.fails("", "regctl", "blob", "put", r.host+"/blobs", "--digest", "sha512:"+strings.Repeat("0", 128))

	var lost atomic.Int32
	r.meddle(func(answer *http.Response) {
		if answer.Request.Method == http.MethodPatch && lost.Add(1) == 2 {
			panic(http.ErrAbortHandler)
		}
	})
	data = content(3<<20+1, 6)
	put(data)
	if got := u.export("blobs", sha256Of(data).String()); !bytes.Equal(got, data) || lost.Load() < 2 {
		t.Errorf("after a lost answer the export has %d bytes", len(got))
	}
}

// skopeo copies with plain HTTP, and trusts any image.
func (u *user) skopeo(from, to string, flags ...string) {
	u.t.Helper()
	u.run(
		append([]string{"skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
			from, to}, flags...)...)
}

func TestSkopeo(t *testing.T) {
	d, u := start(t)
	m := u.pushImage(d.host+"/images/app:v1", 1, 1<<20, 1000)
	digest := strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:v1"))
	remote := "docker://" + d.host + "/"

	u.skopeo(remote+"images/app:v1", "oci:layout:v1")
	u.skopeo("oci:layout:v1", remote+"fromoci:v1")
	u.prints(digest, "crane", "digest", d.host+"/fromoci:v1")
	u.requireLayers("fromoci", m)
	u.skopeo(remote+"images/app:v1", "docker-archive:archive.tar:app:v1")
	u.skopeo("docker-archive:archive.tar", remote+"fromarchive:v1")
	u.run("crane", "validate", "--remote", d.host+"/fromarchive:v1")
	u.requireLayers("fromarchive", u.manifest(d.host+"/fromarchive:v1"))
	r := record(t, d)
	u.skopeo("docker://"+r.host+"/images/app:v1", "docker://"+r.host+"/copy:v1")
	u.prints(digest, "crane", "digest", d.host+"/copy:v1")
	u.skopeo("docker://"+r.host+"/copy:v1", "docker://"+r.host+"/copy/of/it:v1") // it knows by now where the blobs are
	r.requireCount(t, 2, `^POST /v2/copy/of/it/blobs/uploads/\?.*mount=.* 201$`)

	u.run("regctl", "registry", "set", d.host, "--tls", "disabled", "--skip-check")
	u.run("regctl", "index", "create", d.host+"/images/app:all", "--ref", d.host+"/images/app:v1")
	u.skopeo(remote+"images/app:all", remote+"copy:all", "--all", "--preserve-digests")
	u.prints(strings.TrimSpace(u.run("crane", "digest", d.host+"/images/app:all")),
		"crane", "digest", d.host+"/copy:all")

	var info struct {
		Digest   string
		RepoTags []string
		Layers   []string
	}
	u.json(&info, "skopeo", "inspect", "--tls-verify=false", remote+"copy:v1")
	if info.Digest != digest || len(info.Layers) != 2 || fmt.Sprint(info.RepoTags) != "[all v1]" {
		t.Errorf("skopeo inspect: %+v", info)
	}
	u.run("skopeo", "delete", "--tls-verify=false", remote+"fromoci:v1")
	u.fails("manifest unknown", "skopeo", "inspect", "--tls-verify=false", remote+"fromoci:v1")
	if list := u.list("fromoci"); len(list) > 3 {
		t.Errorf("after skopeo delete there is %v", list)
	}
}

// TestDockerTypes: manifests in Docker's own format are kept as they come, byte
// for byte and with their types.
func TestDockerTypes(t *testing.T) {
	d, u := start(t)
	u.pushImage(d.host+"/images/app:v1", 1, 1000, 1000)
	u.skopeo("docker://"+d.host+"/images/app:v1", "dir:docker", "--format", "v2s2")
	manifest, err := os.ReadFile(filepath.Join(u.dir, "docker", "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	u.skopeo("dir:docker", "docker://"+d.host+"/docker:v1", "--preserve-digests")
	check := func(reference, mediaType string, want []byte) {
		t.Helper()
		answer, body := d.get(t, "/v2/docker/manifests/"+reference)
		if got := answer.Header.Get("Content-Type"); got != mediaType {
			t.Errorf("%s has the type %q", reference, got)
		}
		if !bytes.Equal(body, want) || answer.Header.Get("Docker-Content-Digest") != sha256Of(want).String() {
			t.Errorf("%s is %s, want %s", reference, body, want)
		}
	}
	const image, list = "application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.docker.distribution.manifest.list.v2+json"
	check("v1", image, manifest)
	check(sha256Of(manifest).String(), image, manifest)
	u.skopeo("docker://"+d.host+"/docker:v1", "dir:back", "--preserve-digests")
	u.has("back/manifest.json", manifest)
	u.requireLayers("docker", u.manifest(d.host+"/docker:v1"))

	u.run("crane", "index", "append", "--docker-empty-base", "-m", d.host+"/docker:v1", "-t", d.host+"/docker:all")
	u.skopeo("docker://"+d.host+"/docker:all", "dir:all", "--all", "--preserve-digests")
	if manifest, err = os.ReadFile(filepath.Join(u.dir, "all", "manifest.json")); err != nil {
		t.Fatal(err)
	}
	check("all", list, manifest)
}
