package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// freeAddress returns an address of this host that nothing listens at.
func freeAddress() string {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// server is a registry to measure.
type server struct {
	name, address string
	pid           int
	empty         func() // takes away what was pushed to the repository bench
}

// distribution starts the CNCF registry, with its data beside ours.
func (b *bench) distribution(tools string) (s server, stop func()) {
	data, address := filepath.Join(b.dir, "distribution"), freeAddress()
	config := filepath.Join(b.dir, "distribution.yml")
	must(0, os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}
http: {addr: %q}
`, data, address), 0o644))
	cmd := exec.Command(filepath.Join(tools, "registry"), "serve", config)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	must(0, cmd.Start())
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		answer, err := http.Get("http://" + address + "/v2/")
		if err == nil {
			answer.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			log.Panicf("distribution does not start: %v", err)
		}
	}
	return server{"distribution", address, cmd.Process.Pid, func() { must(0, os.RemoveAll(data)) }}, func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
}

func (b *bench) registries(tools string) {
	tools = must(filepath.Abs(tools))
	theirs, stop := b.distribution(tools)
	defer stop()
	ours := server{"dfdaemon", b.registry, b.daemon.Process.Pid, func() {
		exec.Command(b.dfcache, "delete", "-t", "bench", "-i", "v1").Run() // in the first round there is none
	}}
	floor := new(nothing)
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	defer listener.Close()
	go http.Serve(listener, floor)
	none := server{"none", listener.Addr().String(), os.Getpid(), floor.empty}
	b.printf("## The registry, with oras and beside distribution\n\n`oras push` and `oras pull` v1.3.3 as whole " +
		"processes, plain HTTP on loopback, against dfdaemon and distribution v3.1.2 with a file system. " +
		"dfdaemon has everything on disk when it answers, distribution does not sync. " +
		"\"none\" is what oras takes by itself: a Go HTTP server that hashes nothing, throws away what is pushed, " +
		"and sends the same files by sendfile when they are pulled.\n\n" +
		"| what | command | registry | wall ms | min | max | its CPU ms | peak MiB | wall / distribution | CPU / " +
		"distribution |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|\n")
	os.Setenv("HOME", b.dir) // oras has settings there
	os.Unsetenv("ORAS_CACHE")
	for _, what := range []struct {
		name  string
		files int
		size  int64
	}{{"1 MiB", 1, 1 << 20}, {"100 MiB", 1, 100 << 20}, {"1 GiB", 1, 1 << 30}, {
		"1000 files of 10 KiB", 1000, 10 << 10}} {
		b.pushAndPull(what.name, what.files, what.size, filepath.Join(tools, "oras"), []server{ours, none, theirs},
			floor)
	}
	b.printf("\n")
	b.latencies([]server{ours, none, theirs})
}

// randomFiles makes n files of that many bytes in dir, and returns their names.
func randomFiles(dir string, n int, size int64) (names []string) {
	random := rand.NewChaCha8([32]byte{byte(n)})
	for i := range n {
		name := fmt.Sprintf("file-%d", i)
		f := must(os.Create(filepath.Join(dir, name)))
		must(io.CopyN(f, random, size))
		must(0, f.Close())
		names = append(names, name)
	}
	return names
}

// pushAndPull measures one row for each command and server.
func (b *bench) pushAndPull(what string, files int, size int64, oras string, servers []server, floor *nothing) {
	in, out := filepath.Join(b.dir, "push"), filepath.Join(b.dir, "pull")
	must(0, os.MkdirAll(in, 0o755))
	defer os.RemoveAll(in)
	names := randomFiles(in, files, size)
	for _, name := range names {
		path := filepath.Join(in, name)
		floor.content.Store("sha256:"+b.hash(path), path)
	}
	must(0, os.Chdir(in))
	defer os.Chdir(b.dir)
	type row struct{ verb, server string }
	peaks := map[row]int{}
	samples := map[row][]sample{}
	for _, s := range servers {
		reference := s.address + "/bench:v1"
		clean := func() { fresh(names[0], out) }
		push := command{"push", func() { s.empty(); clean() },
			append([]string{oras, "push", "--no-tty", "--plain-http", reference}, names...), s.pid}
		pull := command{"pull", clean, []string{oras, "pull", "--no-tty", "--plain-http", "-o", out, reference}, s.pid}
		for _, c := range []command{push, pull} {
			resetPeak(s.pid)
			for verb, got := range b.measure([]command{c}) {
				samples[row{verb, s.name}] = got
			}
			peaks[row{c.name, s.name}] = peakOf(s.pid)
		}
		s.empty()
	}
	os.RemoveAll(out)
	cpu := func(s sample) time.Duration { return s.daemon }
	for _, verb := range []string{"push", "pull"} {
		base := samples[row{verb, servers[len(servers)-1].name}]
		for _, s := range servers {
			got := samples[row{verb, s.name}]
			ratio := "-"
			if c := median(base, cpu); c > 0 {
				ratio = fmt.Sprintf("%.2f", ms(median(got, cpu))/ms(c))
			}
			b.printf("| %s | %s | %s | %.0f | %.0f | %.0f | %.0f | %d | %.2f | %s |\n", what, verb, s.name,
				ms(median(got, wall)), ms(slices.MinFunc(got, byWall).wall), ms(slices.MaxFunc(got, byWall).wall),
				ms(median(got, cpu)), peaks[row{verb, s.name}], ms(median(got, wall))/ms(median(base, wall)), ratio)
		}
	}
}

// nothing is as little of a registry as oras needs: see [bench.registries].
type nothing struct {
	content sync.Map // by digest or tag: the path of a file, or bytes
}

// empty forgets what was pushed.
func (n *nothing) empty() {
	n.content.Range(func(name, content any) bool {
		if _, pushed := content.([]byte); pushed {
			n.content.Delete(name)
		}
		return true
	})
}

func (n *nothing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := path.Base(r.URL.Path)
	switch {
	case r.Method == "POST":
		w.Header().Set("Location", r.URL.Path+"session")
		w.WriteHeader(http.StatusAccepted)
	case r.Method == "PUT" && r.ContentLength > 1<<20:
		must(io.Copy(io.Discard, r.Body))
		w.WriteHeader(http.StatusCreated)
	case r.Method == "PUT":
		content := must(io.ReadAll(r.Body))
		if strings.Contains(r.URL.Path, "/manifests/") {
			n.content.Store(name, content)
			name = fmt.Sprintf("sha256:%x", sha256.Sum256(content))
		} else {
			name = r.URL.Query().Get("digest")
		}
		n.content.LoadOrStore(name, content)
		w.WriteHeader(http.StatusCreated)
	default:
		switch content, _ := n.content.Load(name); content := content.(type) {
		case []byte:
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256(content)))
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		case string:
			if r.Method == "HEAD" {
				w.WriteHeader(http.StatusNotFound) // so that it is pushed
				return
			}
			http.ServeFile(w, r, content)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}
}

// latencies measures single requests on connections that are open.
func (b *bench) latencies(servers []server) {
	const requests = 20_000
	b.printf("### Single requests\n\nOn open connections, %d requests each: HEAD and GET of a blob of 10 KiB, GET of "+
		"a manifest by its tag. Here \"none\" has all in memory.\n\n"+
		"| request | connections | registry | p50 µs | p99 µs | requests/s | its CPU µs a request "+
		"|\n|---|---:|---|---:|---:|---:|---:|\n", requests)
	const mediaType = "application/vnd.oci.image.manifest.v1+json"
	content := strings.Repeat("0123456789", 1024)
	blob := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(content)))
	manifest := fmt.Sprintf(
		`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/x","digest":%q,"size":%d},"layers":[]}`,
		mediaType, blob, len(content))
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16, DisableCompression: true}}
	do := func(method, url, contentType, body string) *http.Response {
		req := must(http.NewRequest(method, url, strings.NewReader(body)))
		req.Header.Set("Content-Type", contentType)
		req.Header.Set("Accept", mediaType+", */*")
		answer := must(client.Do(req))
		must(io.Copy(io.Discard, answer.Body))
		answer.Body.Close()
		if answer.StatusCode >= 300 {
			log.Panicf("%s %s: %s", method, url, answer.Status)
		}
		return answer
	}
	for _, s := range servers {
		base := "http://" + s.address + "/v2/bench/"
		location := must(do("POST", base+"blobs/uploads/", "", "").Location())
		query := location.Query()
		query.Set("digest", blob)
		location.RawQuery = query.Encode()
		do("PUT", location.String(), "application/octet-stream", content)
		do("PUT", base+"manifests/v1", mediaType, manifest)
	}
	for _, r := range []struct{ name, method, path string }{
		{"HEAD blob", "HEAD", "blobs/" + blob}, {"GET blob", "GET", "blobs/" + blob},
		{"GET manifest", "GET", "manifests/v1"},
	} {
		for _, connections := range []int{1, 16} {
			for _, s := range servers {
				took := make([]time.Duration, requests)
				var all sync.WaitGroup
				busy, start := cpuOf(s.pid), time.Now()
				for c := range connections {
					all.Go(func() {
						for i := c; i < requests; i += connections {
							began := time.Now()
							do(r.method, "http://"+s.address+"/v2/bench/"+r.path, "", "")
							took[i] = time.Since(began)
						}
					})
				}
				all.Wait()
				total, cpu := time.Since(start), fmt.Sprint((cpuOf(s.pid)-busy).Microseconds()/requests)
				if s.pid == os.Getpid() {
					cpu = "-" // it is the client's, too
				}
				slices.Sort(took)
				b.printf("| %s | %d | %s | %d | %d | %.0f | %s |\n", r.name, connections, s.name,
					took[requests/2].Microseconds(), took[requests*99/100].Microseconds(), requests/total.Seconds(),
					cpu)
			}
		}
	}
	b.printf("\n")
}
