package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/digest"
)

// toolsDir is where the Makefile builds the clients that are Go programs.
const toolsDir = "../.cache/tools"

// clients are the programs that tests need, and how to get them. A client that
// is missing fails the tests: what was not run is not known to work.
var clients = map[string]string{
	"oras":       "run 'make clients'",
	"crane":      "run 'make clients'",
	"regctl":     "run 'make clients'",
	"skopeo":     "install the package skopeo",
	"containerd": "install the package containerd",
	"ctr":        "install the package containerd",
	"htpasswd":   "install the package apache2-utils",
	"openssl":    "install the package openssl",
}

// user is somebody who works with a daemon. The home directory, and with it all
// configuration and credentials, is the test's own. It is not for concurrent use.
type user struct {
	t   *testing.T
	dir string // where commands run; what they keep is in dir/home
	env []string
	in  []string // what comes before each command, such as ip netns exec
}

// newUser returns a user whose dfcache talks to d.
func newUser(t *testing.T, d *daemon, env ...string) *user {
	t.Helper()
	dir := tempHome(t)
	home := filepath.Join(dir, "home")
	tools, err := filepath.Abs(toolsDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"tmp", "run", "docker", ".config/containers/registries.d"} {
		if err := os.MkdirAll(filepath.Join(home, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	u := &user{t: t, dir: dir}
	u.env = append([]string{
		"PATH=" + strings.Join([]string{filepath.Dir(dfcache), tools, os.Getenv("PATH")}, ":"),
		"HOME=" + home, "TMPDIR=" + home + "/tmp", "XDG_RUNTIME_DIR=" + home + "/run",
		"DFCACHE_DAEMON_SOCK=" + d.socket, "DFCACHE_WORKHOME=" + d.home, "DFCACHE_CONFIG=" + os.DevNull, quickExit,
		"DOCKER_CONFIG=" + home + "/docker",
		// What skopeo knows of registries it keeps in /var/lib where the user is root.
		"_CONTAINERS_ROOTLESS_UID=65534",
	}, env...)
	// These take the place of those in /etc.
	u.write("home/.config/containers/registries.conf", nil)
	u.write("home/.config/containers/policy.json", []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`))
	return u
}

// start starts a daemon with its registry at a free port, and a user of it who has
// registry clients.
func start(t *testing.T, flags ...string) (*daemon, *user) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs registry clients")
	}
	return startWithUser(t, flags...)
}

// startWithUser starts a daemon with its registry at a free port, and a user of it.
// When the test ends, the daemon has to end well and its store to be in order.
func startWithUser(t *testing.T, flags ...string) (*daemon, *user) {
	t.Helper()
	d := startDaemonWith(t, tempHome(t), flags)
	t.Cleanup(func() {
		d.stop(t, syscall.SIGTERM)
		requireNoIngest(t, filepath.Join(d.home, "data"))
		requireFsck(t, d.home)
	})
	return d, newUser(t, d)
}

// command prepares a command. The first of args may be a client, or a command
// that runs one.
func (u *user) command(stdin io.Reader, args []string) *exec.Cmd {
	u.t.Helper()
	args = slices.Concat(u.in, []string{u.program(args[0])}, args[1:])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdin = u.dir, u.env, stdin
	return cmd
}

// program returns the path of a program.
func (u *user) program(name string) string {
	u.t.Helper()
	for dir := range strings.SplitSeq(strings.TrimPrefix(u.env[0], "PATH="), ":") {
		path, err := exec.LookPath(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		if clients[name] != "" && testing.Short() {
			u.t.Skip("-short: needs " + name)
		}
		return path
	}
	if advice := clients[name]; advice != "" {
		u.t.Fatalf("%s is missing: %s", name, advice)
	}
	return name
}

// try runs a command and returns what it prints and whether it succeeds.
func (u *user) try(stdin io.Reader, args ...string) (stdout, stderr string, ok bool) {
	u.t.Helper()
	cmd := u.command(stdin, args)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, exit := errors.AsType[*exec.ExitError](err); err != nil && !exit {
		u.t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errs.String(), err == nil
}

// run runs a command that has to succeed and returns its stdout.
func (u *user) run(args ...string) string {
	u.t.Helper()
	return u.feed(nil, args...)
}

// feed is run with a standard input.
func (u *user) feed(stdin io.Reader, args ...string) string {
	u.t.Helper()
	stdout, stderr, ok := u.try(stdin, args...)
	if !ok {
		u.t.Fatalf("$ %s\n%s%s", strings.Join(args, " "), stdout, stderr)
	}
	return stdout
}

// fails runs a command that has to fail and to print what, in upper or lower case.
func (u *user) fails(what string, args ...string) {
	u.t.Helper()
	stdout, stderr, ok := u.try(nil, args...)
	if ok || !strings.Contains(strings.ToLower(stdout+stderr), strings.ToLower(what)) {
		u.t.Errorf("$ %s\nhas to fail and to say %q:\n%s%s", strings.Join(args, " "), what, stdout, stderr)
	}
}

// prints runs a command that has to succeed and print the lines of want.
func (u *user) prints(want string, args ...string) {
	u.t.Helper()
	got := strings.TrimSpace(u.run(args...))
	if want := strings.Join(strings.Fields(want), "\n"); got != want {
		u.t.Errorf("$ %s\nprints\n%s\nwant\n%s", strings.Join(args, " "), got, want)
	}
}

// json runs a command that has to succeed and reads the JSON that it prints.
func (u *user) json(into any, args ...string) {
	u.t.Helper()
	if out := u.run(args...); json.Unmarshal([]byte(out), into) != nil {
		u.t.Fatalf("$ %s\nprints no such JSON:\n%s", strings.Join(args, " "), out)
	}
}

// write makes a file in the user's directory.
func (u *user) write(name string, data []byte) {
	u.t.Helper()
	path := filepath.Join(u.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		u.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		u.t.Fatal(err)
	}
}

// has fails the test unless the user's file has just this content.
func (u *user) has(name string, want []byte) {
	u.t.Helper()
	if got, err := os.ReadFile(filepath.Join(u.dir, name)); err != nil || !bytes.Equal(got, want) {
		u.t.Errorf("%s has %d bytes, not the %d that it should have, %v", name, len(got), len(want), err)
	}
}

// hasNot fails the test if there is something at this path.
func (u *user) hasNot(name string) {
	u.t.Helper()
	if _, err := os.Lstat(filepath.Join(u.dir, name)); !errors.Is(err, fs.ErrNotExist) {
		u.t.Errorf("there is a %s, %v", name, err)
	}
}

// stat is what dfcache stat says of a cid.
type stat struct {
	Digest, Manifest digest.Digest
	Size             int64
	Title            string
	Local            bool
	Files            []stat
}

func (u *user) stat(tag, cid string) stat {
	u.t.Helper()
	var s stat
	u.json(&s, "dfcache", "stat", "-t", tag, "-i", cid, "--format", "json")
	return s
}

// export returns the content of a cid, as dfcache sees it.
func (u *user) export(tag, cid string) []byte {
	u.t.Helper()
	return []byte(u.run("dfcache", "export", "-t", tag, "-i", cid, "-"))
}

// list is what dfcache list says: "type cid" of everything under a tag.
func (u *user) list(tag string) []string {
	u.t.Helper()
	return strings.Fields(u.run("dfcache", "list", "-t", tag,
		"--template", `{{range .}}{{.type}}:{{.cid}}{{"\n"}}{{end}}`))
}

func sha256Of(data []byte) digest.Digest { return digest.SHA256.FromBytes(data) }

// blobs returns the digests that have a file in the data directory, sorted.
func (d *daemon) blobs(t *testing.T) []digest.Digest {
	t.Helper()
	var all []digest.Digest
	files, err := filepath.Glob(filepath.Join(d.home, "data", "blobs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		all = append(all, digest.Digest(filepath.Base(filepath.Dir(f))+":"+filepath.Base(f)))
	}
	slices.Sort(all)
	return all
}

// holds reports whether there is a file of this content in the data directory.
func (d *daemon) holds(t *testing.T, data []byte) bool {
	t.Helper()
	return slices.Contains(d.blobs(t), sha256Of(data))
}

// snapshot describes everything below dir: a change shows.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		all[path] = fmt.Sprint(info.Mode(), info.Size(), info.ModTime())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// requireUnchanged fails the test where dir is not as it was.
func requireUnchanged(t *testing.T, dir string, before map[string]string) {
	t.Helper()
	if now := snapshot(t, dir); !maps.Equal(before, now) {
		t.Errorf("%s was\n%v\nand is now\n%v", dir, before, now)
	}
}

// recorder stands between clients and a daemon, and writes down what they ask
// and what they are told.
type recorder struct {
	host string // to be used as the daemon's

	mu     sync.Mutex
	log    []string
	change func(*http.Response)
}

// record starts a recorder in front of d, which ends with the test.
func record(t *testing.T, d *daemon) *recorder {
	t.Helper()
	target, err := url.Parse("http://" + d.host)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{}
	transport := &http.Transport{}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0), // answers that are cut short
		Rewrite:   func(p *httputil.ProxyRequest) { p.SetURL(target) },
		ModifyResponse: func(answer *http.Response) error {
			asked := answer.Request
			line := fmt.Sprintf("%s %s %d", asked.Method, asked.URL.RequestURI(), answer.StatusCode)
			for _, header := range []string{"Range", "Content-Range"} {
				if v := asked.Header.Get(header); v != "" {
					line += " " + header + ":" + v
				}
			}
			r.mu.Lock()
			r.log = append(r.log, line)
			change := r.change
			r.mu.Unlock()
			if change != nil {
				change(answer)
			}
			return nil
		},
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
	})
	_, port, _ := strings.Cut(server.Listener.Addr().String(), ":")
	r.host = "localhost:" + port
	return r
}

// meddle has change called from now on before an answer goes back.
func (r *recorder) meddle(change func(*http.Response)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.change = change
}

// count returns how many requests match a regular expression on lines of the
// form "METHOD PATH STATUS Header:value".
func (r *recorder) count(pattern string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, line := range r.log {
		if regexp.MustCompile(pattern).MatchString(line) {
			n++
		}
	}
	return n
}

// requireCount fails the test unless just want requests match.
func (r *recorder) requireCount(t *testing.T, want int, pattern string) {
	t.Helper()
	if got := r.count(pattern); got != want {
		r.mu.Lock()
		defer r.mu.Unlock()
		t.Errorf("%d requests match %s, want %d:\n%s", got, pattern, want, strings.Join(r.log, "\n"))
	}
}

// artifactOf makes the manifest of an artifact of files, each a title and its content.
func artifactOf(t *testing.T, files ...[2]string) []byte {
	t.Helper()
	var layers []ocispec.Descriptor
	for _, f := range files {
		layers = append(layers, ocispec.Descriptor{
			MediaType: "text/plain", Digest: sha256Of([]byte(f[1])), Size: int64(len(f[1])),
			Annotations: map[string]string{ocispec.AnnotationTitle: f[0]},
		})
	}
	data, err := manifestOf(layers)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// manifestOf makes the manifest of an artifact with an empty config.
func manifestOf(layers []ocispec.Descriptor) ([]byte, error) {
	return json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: "application/vnd.test",
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       layers,
	})
}

// get asks for a path of the daemon's registry, and returns the answer with its body.
func (d *daemon) get(t *testing.T, path string) (*http.Response, []byte) {
	t.Helper()
	return d.ask(t, http.MethodGet, path, nil)
}

// ask sends a request to the daemon's registry. What is after the path in
// headers are names and values in turn.
func (d *daemon) ask(t *testing.T, method, path string, body io.Reader, headers ...string) (*http.Response, []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+d.host+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	answer, err := direct.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer answer.Body.Close()
	got, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer, got
}

// direct is a client that keeps no connections, so that none outlives its test.
var direct = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
