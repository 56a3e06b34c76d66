package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
)

// peerDaemon is a dfdaemon of a swarm.
type peerDaemon struct {
	cmd          *exec.Cmd
	home, socket string
}

// startPeer starts a dfdaemon with an empty store and waits until it serves.
func (b *bench) startPeer(name string, wrap []string, flags ...string) *peerDaemon {
	p := &peerDaemon{home: filepath.Join(b.dir, name)}
	p.socket = filepath.Join(p.home, "run", "s")
	must(0, os.RemoveAll(p.home))
	p.cmd = startDaemon(slices.Concat(wrap,
		[]string{b.dfdaemon, "--workhome", p.home, "--daemon-sock", p.socket, "--registry", "off",
			"--swarm-key", filepath.Join(b.dir, "swarm.key"), "--mdns=false"}, flags)...)
	return p
}

func (p *peerDaemon) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.cmd.Wait()
	os.RemoveAll(p.home)
}

// meet waits until the daemon is connected with so many others.
func (b *bench) meet(p *peerDaemon, n int) {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var peers []struct{ State string }
		out := must(exec.Command(b.dfcache, "peers", "--daemon-sock", p.socket, "--format", "json").Output())
		must(0, json.Unmarshal(out, &peers))
		connected := 0
		for _, peer := range peers {
			if peer.State == "connected" {
				connected++
			}
		}
		if connected >= n {
			return
		}
		if time.Now().After(deadline) {
			log.Panicf("connected with %d peers, want %d", connected, n)
		}
	}
}

// fromPeer measures an export of what only another daemon has.
func (b *bench) fromPeer(size int64) {
	file, copied := b.file(size), filepath.Join(b.dir, "copy")
	defer os.Remove(file)
	defer os.Remove(copied)
	digest := "sha256:" + b.hash(file)
	plainURL, tlsURL, stopServer := b.serveFile(file)
	defer stopServer()
	clean := func() { fresh(file, copied, copied+"2") } // the other one is that of the store
	var stops []func()
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	export := func(name string, flags ...string) command {
		address := freeAddress()
		a := b.startPeer(name+"A", nil, append(flags, "--swarm-listen", freeAddress(), "--swarm-pieces", address)...)
		stops = append(stops, a.stop)
		must(0, exec.Command(b.dfcache, "import", "--daemon-sock", a.socket, "-i", digest, file).Run())
		var fetching *peerDaemon
		stops = append(stops, func() {
			if fetching != nil {
				fetching.stop()
			}
		})
		return command{
			name: name,
			before: func() {
				if fetching != nil {
					fetching.stop()
				}
				fetching = b.startPeer(name+"B", nil,
					append(flags, "--swarm-listen", freeAddress(), "--swarm-pieces", freeAddress(),
						"--bootstrap", address)...)
				b.meet(fetching, 1)
				clean()
			},
			args: []string{b.dfcache, "export", "--daemon-sock", filepath.Join(b.dir, name+"B", "run", "s"),
				"-i", digest, copied},
		}
	}
	commands := []command{
		{name: "`cp FILE COPY`", before: clean, args: []string{"cp", file, copied}},
		{name: "Go sha256 of FILE", before: clean, args: []string{b.self, "-sha256", file}},
		{name: "`curl -o COPY http://…`", before: clean, args: []string{"curl", "-sS", "-o", copied, plainURL}},
		{name: "`curl -k -o COPY https://…`", before: clean, args: []string{"curl", "-sSk", "-o", copied, tlsURL}},
		{name: "Go: http://…, sha256 and COPY", before: clean, args: []string{b.self, "-fetch", plainURL, copied}},
		{name: "Go: https://…, sha256 and COPY", before: clean, args: []string{b.self, "-fetch", tlsURL, copied}},
		export("plain", "--plain-pieces"),
		export("tls"),
	}
	titles := map[string]string{"plain": "`dfcache export` from another dfdaemon, plain",
		"tls": "`dfcache export` from another dfdaemon, TLS"}
	samples := b.measure(commands)
	b.printf("## %s from another dfdaemon\n\nBoth on this host, over loopback; the one that is asked has nothing "+
		"before. The export is verified, and so is what the daemon keeps. curl verifies nothing, and gets the file "+
		"from a Go HTTP server. \"Go\" is a program that does what can't be left out, and no more: it gets the file "+
		"from that server, hashes it on another core meanwhile, and writes it once, where dfdaemon keeps it and "+
		"dfcache writes the output.\n\n"+
		"| command | wall ms | min | max | / cp | / Go sha256 |\n|---|---:|---:|---:|---:|---:|\n", mib(size))
	cp, sha := median(samples[commands[0].name], wall), median(samples[commands[1].name], wall)
	for _, c := range commands {
		s := samples[c.name]
		w, title := median(s, wall), c.name
		if titles[title] != "" {
			title = titles[title]
		}
		b.printf("| %s | %.0f | %.0f | %.0f | %.2f | %.2f |\n", title, ms(w), ms(slices.MinFunc(s, byWall).wall),
			ms(slices.MaxFunc(s, byWall).wall),
			float64(w)/float64(cp), float64(w)/float64(sha))
	}
	b.printf("\n")
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// serveFile starts a process that serves a file over HTTP and HTTPS.
func (b *bench) serveFile(name string) (plainURL, tlsURL string, stop func()) {
	cmd := exec.Command(b.self, "-serve", name)
	cmd.Stderr = os.Stderr
	out := must(cmd.StdoutPipe())
	must(0, cmd.Start())
	lines := bufio.NewReader(out)
	plainURL = strings.TrimSpace(must(lines.ReadString('\n')))
	tlsURL = strings.TrimSpace(must(lines.ReadString('\n')))
	return plainURL, tlsURL, func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// selfSigned makes a certificate of 127.0.0.1.
func selfSigned() (certificate []byte, key *ecdsa.PrivateKey) {
	key = must(ecdsa.GenerateKey(elliptic.P256(), crand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	return must(x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)), key
}

// serve is the process that serveFile starts.
func serve(name string) {
	certificate, key := selfSigned()
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, name) }),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}},
			NextProtos: []string{"http/1.1"}},
	}
	plain, secure := must(net.Listen("tcp", "127.0.0.1:0")), must(net.Listen("tcp", "127.0.0.1:0"))
	fmt.Printf("http://%s/\nhttps://%s/\n", plain.Addr(), secure.Addr())
	go server.Serve(plain)
	log.Panic(server.ServeTLS(secure, "", ""))
}

// fetch is the process that gets a file, hashes it and writes it.
func fetch(url, output string) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	answer := must(client.Get(url))
	f := must(os.Create(output))
	free, full := make(chan []byte, 8), make(chan []byte, 8)
	for range cap(free) {
		free <- make([]byte, 256<<10)
	}
	h := sha256.New()
	var hashing sync.WaitGroup
	hashing.Go(func() {
		for buf := range full {
			h.Write(buf)
			free <- buf[:cap(buf)]
		}
	})
	for got := int64(0); got < answer.ContentLength; {
		buf := <-free
		n, err := io.ReadFull(answer.Body, buf)
		if err != io.ErrUnexpectedEOF {
			must(n, err)
		}
		must(f.Write(buf[:n]))
		got += int64(n)
		full <- buf[:n]
	}
	close(full)
	hashing.Wait()
	must(0, f.Close())
	fmt.Printf("%x\n", h.Sum(nil))
}

// smallFromPeer measures many small files.
func (b *bench) smallFromPeer(n, size int) {
	ctx := context.Background()
	address := freeAddress()
	a := b.startPeer("smallA", nil, "--swarm-listen", freeAddress(), "--swarm-pieces", address)
	defer a.stop()
	there := must(client.Dial(ctx, a.socket))
	defer there.Close()
	tag := must(there.Repository("many"))
	data := make([]byte, size)
	var cids []string
	for i := range n {
		copy(data, fmt.Sprint(i))
		cids = append(cids, must(tag.Import(ctx, "", bytes.NewReader(data), blobstore.ImportOptions{})).CID)
	}
	b.printf("## %d files of %d KiB from another dfdaemon\n\nThrough the Go API, TLS, medians of %d runs.\n\n| "+
		"callers | s | files/s |\n|---:|---:|---:|\n", n, size>>10, b.runs)
	for _, callers := range []int{1, 16} {
		var samples []sample
		for range b.runs {
			p := b.startPeer("smallB", nil, "--swarm-listen", freeAddress(), "--swarm-pieces", freeAddress(),
				"--bootstrap", address)
			b.meet(p, 1)
			store := must(client.Dial(ctx, p.socket))
			r := must(store.Repository("many"))
			work := make(chan string)
			var all sync.WaitGroup
			start := time.Now()
			for range callers {
				all.Go(func() {
					for cid := range work {
						must(r.Export(ctx, cid, io.Discard, blobstore.ExportOptions{}))
					}
				})
			}
			for _, cid := range cids {
				work <- cid
			}
			close(work)
			all.Wait()
			samples = append(samples, sample{wall: time.Since(start)})
			store.Close()
			p.stop()
		}
		took := median(samples, wall)
		b.printf("| %d | %.2f | %.0f |\n", callers, took.Seconds(), float64(n)/took.Seconds())
	}
	b.printf("\n")
}

// crowds measures flash crowds of so many daemons each, on links of so many Mbit/s.
func (b *bench) crowds(counts, rates []string, size int64) {
	b.printf("## One file to many daemons at once\n\nOne dfdaemon has %s, N others fetch it at the same moment, each "+
		"in a network namespace with the same rate both ways (tc tbf, which lets up to 100 ms of it wait) and TCP's "+
		"congestion control %s. "+
		"Until the last export has ended, with TLS, over what the bytes alone take at that rate; the headers of TCP "+
		"and IP make that 1.05. "+
		"All daemons share this machine's processors, which are busy to more than 80 %% with 16 at 25 Mbit/s.\n\n| N "+
		"| Mbit/s | s | min | max | size / rate | ratio |\n|---:|---:|---:|---:|---:|---:|---:|\n",
		mib(size), congestion())
	for _, rate := range rates {
		mbit := must(strconv.Atoi(rate))
		ideal := time.Duration(float64(size*8) / float64(mbit*1_000_000) * float64(time.Second))
		for _, count := range counts {
			n := must(strconv.Atoi(count))
			samples := b.flashCrowd(n, size, mbit)
			w := median(samples, wall)
			b.printf("| %d | %d | %.2f | %.2f | %.2f | %.2f | %.2f |\n", n, mbit, w.Seconds(),
				slices.MinFunc(samples, byWall).wall.Seconds(), slices.MaxFunc(
					samples, byWall).wall.Seconds(), ideal.Seconds(), float64(w)/float64(ideal))
		}
	}
	b.printf("\n")
}

// cubic is Linux's default of TCP's congestion control.
const cubic = "cubic"

// congestion says what the crowds have.
func congestion() string {
	netns := fmt.Sprintf("dfb%d-tcp", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", netns).CombinedOutput(); err != nil {
		log.Panicf("ip netns add %s: %v\n%s", netns, err, out)
	}
	defer exec.Command("ip", "netns", "del", netns).Run()
	if has := setCongestion(netns, cubic); has != cubic {
		log.Printf("a network namespace may not have %s here, and has %s (net.ipv4.tcp_allowed_congestion_control)",
			cubic, has)
		return has + ", as a network namespace may not have " + cubic + ", Linux's default, on this machine"
	}
	return cubic + ", Linux's default"
}

// setCongestion has a network namespace use an algorithm, where it may, and returns which one it uses.
func setCongestion(netns, algorithm string) string {
	const setting = "/proc/sys/net/ipv4/tcp_congestion_control"
	_ = exec.Command("ip", "netns", "exec", netns, "sh", "-c", "echo "+algorithm+" >"+setting).Run()
	return strings.TrimSpace(string(must(exec.Command("ip", "netns", "exec", netns, "cat", setting).Output())))
}

// flashCrowd has n daemons fetch the same file at once from one that has it,
// each in a network namespace with the same rate both ways.
func (b *bench) flashCrowd(n int, size int64, mbit int) (samples []sample) {
	run := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			log.Panicf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	name := fmt.Sprintf("dfb%d", os.Getpid())
	ns := func(i int) string { return fmt.Sprintf("%s-%d", name, i) }
	run("ip", "netns", "add", name)
	defer exec.Command("ip", "netns", "del", name).Run()
	run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
	run("ip", "-n", name, "link", "set", "br0", "up")
	shape := func(netns, device string) {
		run("ip", "netns", "exec", netns, "tc", "qdisc", "add", "dev", device,
			"root", "tbf", "rate", fmt.Sprintf("%dmbit", mbit), "burst", "64kb", "latency", "100ms")
	}
	for i := range n + 1 {
		run("ip", "netns", "add", ns(i))
		defer exec.Command("ip", "netns", "del", ns(i)).Run()
		port := fmt.Sprintf("p%d", i)
		run("ip", "-n", name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", ns(i))
		run("ip", "-n", name, "link", "set", port, "master", "br0", "up")
		run("ip", "-n", ns(i), "link", "set", "lo", "up")
		run("ip", "-n", ns(i), "addr", "add", fmt.Sprintf("10.78.0.%d/24", i+1), "dev", "eth0")
		run("ip", "-n", ns(i), "link", "set", "eth0", "up")
		setCongestion(ns(i), cubic)
		shape(ns(i), "eth0")
		shape(name, port)
	}
	file := b.file(size)
	defer os.Remove(file)
	for range b.runs {
		var peers []*peerDaemon
		for i := range n + 1 {
			flags := []string{}
			if i > 0 {
				flags = []string{"--bootstrap", "10.78.0.1"}
			}
			peers = append(peers, b.startPeer(
				fmt.Sprintf("crowd%d", i), []string{"ip", "netns", "exec", ns(i)}, flags...))
		}
		for _, p := range peers {
			b.meet(p, n)
		}
		out := must(exec.Command(b.dfcache, "import", "--daemon-sock", peers[0].socket, file,
			"--template", "{{.digest}}").Output())
		cid := strings.TrimSpace(string(out))
		var all sync.WaitGroup
		start := time.Now()
		for _, p := range peers[1:] {
			all.Go(func() {
				cmd := exec.Command(b.dfcache, "export", "--daemon-sock", p.socket, "-i", cid,
					"-O", filepath.Join(p.home, "out"))
				if out, err := cmd.CombinedOutput(); err != nil {
					log.Panicf("export: %v\n%s", err, out)
				}
			})
		}
		all.Wait()
		samples = append(samples, sample{wall: time.Since(start)})
		for _, p := range peers {
			p.stop()
		}
	}
	return samples
}
