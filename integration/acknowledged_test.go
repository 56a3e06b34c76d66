package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestClientsHeal: what was lost of an image or an index, by force or by damage, is
// there again when any client has copied it once more, under the same tag.
func TestClientsHeal(t *testing.T) {
	source, _ := start(t)
	d, u := start(t)
	from := source.host + "/images/app"
	layer := u.pushImage(from+":v1", 1, 300_000).Layers[0].Digest
	u.run("regctl", "registry", "set", source.host, "--tls", "disabled")
	u.run("regctl", "index", "create", from+":index", "--ref", from+":v1")
	image := strings.TrimSpace(u.run("crane", "digest", from+":v1"))

	force := func(repository, what string) {
		u.run("dfcache", "delete", "-t", repository, "--force", "-i", what)
	}
	clients := map[string]func(from, to string){
		"oras":   func(from, to string) { u.run("oras", "cp", from, to) },
		"crane":  func(from, to string) { u.run("crane", "copy", from, to) },
		"skopeo": func(from, to string) { u.skopeo("docker://"+from, "docker://"+to, "--all", "--preserve-digests") },
	}
	losses := map[string]struct {
		tag  string
		lose func(repository string)
	}{
		"a layer":             {"v1", func(repository string) { force(repository, layer.String()) }},
		"an image":            {"index", func(repository string) { force(repository, image) }},
		"a layer of an image": {"index", func(repository string) { force(repository, layer.String()) }},
		"bytes": {"v1", func(repository string) {
			damageFile(t, filepath.Join(d.home, "data", "blobs", "sha256", layer.Encoded()))
			u.fails("corrupt", "dfcache", "export", "-t", repository, "-i", layer.String(), "-O", "damaged")
		}},
	}
	for client, copies := range clients {
		for what, loss := range losses {
			repository := "to/" + client
			to := d.host + "/" + repository + ":" + loss.tag
			copies(from+":"+loss.tag, to)
			loss.lose(repository)
			copies(from+":"+loss.tag, to)
			for _, part := range []string{layer.String(), image} {
				out, err := u.command(nil,
					[]string{"dfcache", "export", "-t", repository, "-i", part,
						"-O", "out", "--overwrite"}).CombinedOutput()
				if err != nil {
					t.Errorf("%s, after the loss of %s: %s\n%s", client, what, part, out)
				}
			}
			u.run("crane", "validate", "--remote", to)
		}
	}
}

// damageFile changes a byte of a file in place.
func damageFile(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], 100); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], 100); err != nil {
		t.Fatal(err)
	}
}

// TestPushWhileDeleting: clients push what they share, and somebody deletes each as
// soon as it is there.
func TestPushWhileDeleting(t *testing.T) {
	source, _ := start(t)
	d, u := start(t)
	const rounds = 6
	u.write("base", content(100_000, 1))
	for i := range rounds {
		u.write(fmt.Sprint("own", i), content(1000, uint64(10+i)))
		u.run("oras", "push", fmt.Sprintf("%s/app:v%d", source.host, i), "base", fmt.Sprint("own", i))
	}
	var pushing sync.WaitGroup
	for client, copies := range map[string]func(from, to string) []string{
		"oras":  func(from, to string) []string { return []string{"oras", "cp", from, to} },
		"crane": func(from, to string) []string { return []string{"crane", "copy", from, to} },
		"skopeo": func(from, to string) []string {
			return []string{"skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
				"docker://" + from, "docker://" + to}
		},
	} {
		pushing.Go(func() {
			for i := range rounds {
				tag := fmt.Sprintf("%s-%d", client, i)
				for _, args := range [][]string{
					copies(fmt.Sprintf("%s/app:v%d", source.host, i), d.host+"/app:"+tag),
					{"dfcache", "delete", "-t", "app", "-i", tag},
				} {
					out, err := u.command(nil, args).CombinedOutput()
					if err != nil {
						t.Errorf("$ %s\n%s", strings.Join(args, " "), out)
						return
					}
				}
			}
		})
	}
	pushing.Wait()
}
