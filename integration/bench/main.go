// Command bench measures dfcache and dfdaemon, as whole processes and through
// the Go API, beside cp, sync and Go's sha256 on the same files in the same
// run, and writes a report in markdown.
//
//	go run ./integration/bench -bin bin -out docs/benchmarks.md
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/pieces"
)

func main() {
	log.SetFlags(0)
	bin := flag.String("bin", "bin", "directory with dfcache and dfdaemon")
	out := flag.String("out", "", "file to write the report to; standard output if empty")
	dir := flag.String("dir", "", "directory to work in; a temporary one if empty")
	runs := flag.Int("runs", 7, "runs of each command")
	many := flag.Int("many", 1_000_000, "blobs in the store that is only opened")
	tools := flag.String(
		"tools", "", "directory with oras and distribution's registry; empty leaves the registries out")
	only := flag.String(
		"only", "", "only this part of the report: files, stat, small, open, registry, before, peer or crowd")
	before := flag.String("before", "", "directory with dfcache and dfdaemon of an earlier build, to compare with")
	crowds := flag.String("crowds", "8,16", "how many fetch the same file at once")
	rates := flag.String("rates", "10,25", "their links, in Mbit/s")
	hash := flag.String("sha256", "", "only hash this file, as the process to compare with")
	served := flag.String("serve", "", "only serve this file over HTTP and HTTPS, as the process to compare with")
	fetched := flag.String("fetch",
		"", "only get this URL, hash it and write it to the file that is the argument, as the process to compare with")
	flag.Parse()
	if *fetched != "" {
		fetch(*fetched, flag.Arg(0))
		return
	}
	if *served != "" {
		serve(*served)
		return
	}
	if *hash != "" {
		hashFile(*hash)
		return
	}
	if *out != "" {
		*out = must(filepath.Abs(*out)) // the working directory changes
	}
	b, err := newBench(*bin, *dir, *runs)
	if err != nil {
		log.Fatal(err)
	}
	defer b.close()
	b.report(*only, *many, *tools, *before, *crowds, *rates)
	if *out == "" {
		os.Stdout.Write(b.text.Bytes())
	} else if err := os.WriteFile(*out, b.text.Bytes(), 0o644); err != nil {
		log.Fatal(err)
	}
}

func hashFile(name string) {
	f := must(os.Open(name))
	h := sha256.New()
	must(io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20)))
	fmt.Printf("%x\n", h.Sum(nil))
}

// hash returns the SHA-256 of a file, in hexadecimal digits.
func (b *bench) hash(name string) string {
	return strings.TrimSpace(string(must(exec.Command(b.self, "-sha256", name).Output())))
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Panic(err)
	}
	return v
}

type bench struct {
	dir, self, dfcache, dfdaemon, socket string
	registry                             string // address of dfdaemon's registry
	runs                                 int
	daemon                               *exec.Cmd
	text                                 bytes.Buffer
}

func newBench(bin, dir string, runs int) (*bench, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	if dir, err = os.MkdirTemp(dir, "dfbench"); err != nil {
		return nil, err
	}
	b := &bench{dir: dir, self: must(os.Executable()), runs: runs, socket: filepath.Join(dir, "run", "s"),
		dfcache: filepath.Join(bin, "dfcache"), dfdaemon: filepath.Join(bin, "dfdaemon"), registry: freeAddress()}
	os.Setenv("DFDAEMON_REGISTRY", b.registry)
	for k, v := range map[string]string{"WORKHOME": dir, "DAEMON_SOCK": b.socket, "CONFIG": os.DevNull} {
		os.Setenv("DFCACHE_"+k, v)
		os.Setenv("DFDAEMON_"+k, v)
	}
	must(0, exec.Command(b.dfdaemon, "swarm", "key", "new", filepath.Join(b.dir, "swarm.key")).Run())
	b.daemon = startDaemon(b.dfdaemon)
	return b, nil
}

// startDaemon runs the command args of a dfdaemon and waits until it serves.
func startDaemon(args ...string) *exec.Cmd {
	r, w, err := os.Pipe()
	must(0, err)
	defer r.Close()
	cmd := exec.Command(args[0], append(args[1:], "--ready-fd", "3")...)
	cmd.ExtraFiles = []*os.File{w}
	must(0, cmd.Start())
	w.Close()
	if line, _ := bufio.NewReader(r).ReadString('\n'); line != "ready\n" {
		log.Panicf("dfdaemon did not start: %s", line)
	}
	return cmd
}

func (b *bench) close() {
	b.daemon.Process.Signal(syscall.SIGTERM)
	b.daemon.Wait()
	os.RemoveAll(b.dir)
}

// sample is one run of a command: wall time, CPU time of the process, and CPU
// time that the daemon spent meanwhile.
type sample struct{ wall, cpu, daemon time.Duration }

// command is something to measure.
type command struct {
	name   string
	before func() // not measured
	args   []string
	server int // pid of the server that works for it; 0 is dfdaemon
}

// measure runs the commands in turn, b.runs times, after one round that does
// not count, and returns their samples.
func (b *bench) measure(commands []command) map[string][]sample {
	samples := map[string][]sample{}
	for round := range b.runs + 1 {
		for _, c := range commands {
			if c.before != nil {
				c.before()
			}
			cmd := exec.Command(c.args[0], c.args[1:]...)
			server := cmp.Or(c.server, b.daemon.Process.Pid)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			busy, start := cpuOf(server), time.Now()
			if err := cmd.Run(); err != nil {
				log.Panicf("%s: %v: %s", strings.Join(c.args, " "), err, stderr.String())
			}
			s := sample{time.Since(start), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(),
				cpuOf(server) - busy}
			if round > 0 {
				samples[c.name] = append(samples[c.name], s)
			}
		}
	}
	return samples
}

// cpuOf returns the CPU time that a process has used so far. It counts in hundredths of a second.
func cpuOf(pid int) time.Duration {
	stat := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))))
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+2:])
	return time.Duration(must(strconv.Atoi(fields[11]))+must(strconv.Atoi(fields[12]))) * 10 * time.Millisecond
}

// resetPeak makes the peak memory of a process what it has now.
func resetPeak(pid int) {
	must(0, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0))
}

// peakOf returns the most memory that a process had since resetPeak, in MiB.
func peakOf(pid int) int {
	for line := range strings.Lines(string(must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))))) {
		if kib, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return must(strconv.Atoi(strings.Fields(kib)[0])) / 1024
		}
	}
	return 0
}

func median(samples []sample, of func(sample) time.Duration) time.Duration {
	all := make([]time.Duration, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func wall(s sample) time.Duration { return s.wall }

func (b *bench) printf(format string, args ...any) { fmt.Fprintf(&b.text, format, args...) }

func (b *bench) report(only string, many int, tools, before, crowds, rates string) {
	b.printf("# Benchmarks\n\nMade by `make bench`; do not edit. Medians of %d runs, after one that is not counted; "+
		"the commands of a table take turns.\n"+
		"Files are in the page cache, and memory for copies is at hand: before each run one is made and removed.\n"+
		"Wall time of whole processes, unless it says otherwise.\n\n", b.runs)
	b.machine()
	for _, part := range []struct {
		name string
		run  func()
	}{
		{"files", func() {
			for _, size := range []int64{1 << 20, 100 << 20, 1 << 30} {
				b.files(size)
			}
		}},
		{"stat", b.stat},
		{"small", func() { b.small(10_000, 10<<10) }},
		{"open", func() { b.open(many) }},
		{"registry", func() {
			if tools != "" {
				b.registries(tools)
			}
		}},
		{"before", func() {
			if before != "" {
				b.before(before, tools)
			}
		}},
		{"peer", func() {
			b.fromPeer(1 << 30)
			b.smallFromPeer(1000, 10<<10)
		}},
		{"crowd", func() { b.crowds(strings.Split(crowds, ","), strings.Split(rates, ","), 64<<20) }},
	} {
		if only == "" || only == part.name {
			log.Print(part.name)
			part.run()
		}
	}
}

func (b *bench) machine() {
	cpu := ""
	for line := range strings.Lines(string(must(os.ReadFile("/proc/cpuinfo")))) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			cpu = strings.TrimSpace(value)
			break
		}
	}
	kernel := strings.TrimSpace(string(must(exec.Command("uname", "-sr").Output())))
	fs := strings.TrimSpace(string(must(exec.Command("stat", "-f", "-c", "%T", b.dir).Output())))
	tcp := strings.TrimSpace(string(must(os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"))))
	b.printf("Machine: %s, %d cores, %s, %s, TCP with %s; %s; %s.%s\n\n", cpu, runtime.NumCPU(), kernel, fs, tcp,
		runtime.Version(), time.Now().UTC().Format(time.DateOnly), pageReporting())
}

// pageReporting says whether the kernel tells a host which memory is free, which
// makes every use of that memory after it slower by a multiple.
func pageReporting() string {
	order, err := os.ReadFile("/sys/module/page_reporting/parameters/page_reporting_order")
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" Free memory is reported to the host from order %s on (above 10: never).",
		strings.TrimSpace(string(order)))
}

func mib(size int64) string {
	if size >= 1<<30 {
		return fmt.Sprintf("%d GiB", size>>30)
	}
	return fmt.Sprintf("%d MiB", size>>20)
}

func (b *bench) file(size int64) string {
	name := filepath.Join(b.dir, fmt.Sprintf("file-%d", size))
	f := must(os.Create(name))
	must(io.CopyN(f, rand.NewChaCha8([32]byte{byte(size >> 20)}), size))
	must(0, f.Sync())
	must(0, f.Close())
	return name
}

// fresh removes copies of a file, and has memory for them at hand: a virtual machine gives
// memory that is free back to its host after a while, and pays for getting it again. So
// no command pays for another one.
func fresh(file string, copies ...string) {
	remove := func() {
		for _, name := range copies {
			must(0, os.RemoveAll(name))
		}
	}
	remove()
	must(0, exec.Command("sync").Run())
	for _, name := range copies {
		must(0, exec.Command("cp", file, name).Run())
	}
	remove()
}

func (b *bench) files(size int64) {
	file, copied := b.file(size), filepath.Join(b.dir, "copy")
	defer os.Remove(file)
	defer os.Remove(copied)
	digest := "sha256:" + b.hash(file)
	clean := func() { fresh(file, copied) }
	gone := func() {
		for _, tag := range []string{"", "again"} {
			exec.Command(b.dfcache, "delete", "-t", tag, "-i", digest).Run() // in the first round there is none
		}
		clean()
	}
	commands := []command{
		{name: "`cp FILE COPY`", before: clean, args: []string{"cp", file, copied}},
		{name: "`cp FILE COPY && sync COPY`", before: clean,
			args: []string{"sh", "-c", `cp "$0" "$1" && sync "$1"`, file, copied}},
		{name: "Go sha256 of FILE", before: clean, args: []string{b.self, "-sha256", file}},
		{name: "`dfcache import -i sha256:… FILE`", before: gone,
			args: []string{b.dfcache, "import", "-i", digest, file}},
		{name: "the same, when it is held already", before: clean,
			args: []string{b.dfcache, "import", "-t", "again", "-i", digest, file}},
		{name: "`dfcache export -i sha256:… COPY`", before: clean,
			args: []string{b.dfcache, "export", "-i", digest, copied}},
		{name: "`dfcache export --no-sync -i sha256:… COPY`", before: clean,
			args: []string{b.dfcache, "export", "--no-sync", "-i", digest, copied}},
	}
	resetPeak(b.daemon.Process.Pid)
	samples := b.measure(commands)
	peak := peakOf(b.daemon.Process.Pid)
	for _, tag := range []string{"", "again"} {
		must(0, exec.Command(b.dfcache, "delete", "-t", tag, "-i", digest).Run())
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", ms(d)) }
	ratio := func(a, b time.Duration) string { return fmt.Sprintf("%.2f", float64(a)/float64(b)) }
	b.printf("## One file of %s\n\n| command | wall ms | min | max | CPU ms | of it dfdaemon | / cp | / Go sha256 "+
		"|\n|---|---:|---:|---:|---:|---:|---:|---:|\n", mib(size))
	cp, sha := median(samples[commands[0].name], wall), median(samples[commands[2].name], wall)
	for _, c := range commands {
		s := samples[c.name]
		w, daemon := median(s, wall), median(s, func(s sample) time.Duration { return s.daemon })
		b.printf("| %s | %s | %s | %s | %s | %s | %s | %s |\n", c.name, ms(w),
			ms(slices.MinFunc(s, byWall).wall), ms(slices.MaxFunc(s, byWall).wall),
			ms(daemon+median(s, func(s sample) time.Duration { return s.cpu })), ms(daemon), ratio(w, cp), ratio(
				w, sha))
	}
	b.printf("\nPeak memory of dfdaemon meanwhile: %d MiB.\n\n", peak)
}

func byWall(a, b sample) int { return int(a.wall - b.wall) }

func (b *bench) stat() {
	name := filepath.Join(b.dir, "one")
	must(0, os.WriteFile(name, []byte("data"), 0o644))
	must(0, exec.Command(b.dfcache, "import", "-i", "v1", name).Run())
	runs := b.runs
	b.runs = 10 * runs
	defer func() { b.runs = runs }()
	commands := []command{
		{name: "`true`", args: []string{"/bin/true"}},
		{name: "`dfcache version`", args: []string{b.dfcache, "version"}},
		{name: "`dfcache stat -i v1`", args: []string{b.dfcache, "stat", "-i", "v1"}},
	}
	samples := b.measure(commands)
	b.printf("## A whole `dfcache stat`\n\nMedians of %d runs.\n\n| command | wall ms | min | CPU ms "+
		"|\n|---|---:|---:|---:|\n", b.runs)
	for _, c := range commands {
		s := samples[c.name]
		b.printf("| %s | %.2f | %.2f | %.2f |\n", c.name, float64(median(s, wall).Microseconds())/1000,
			float64(slices.MinFunc(s, byWall).wall.Microseconds())/1000,
			float64(median(s, func(s sample) time.Duration { return s.cpu }).Microseconds())/1000)
	}
	store := must(client.Dial(context.Background(), b.socket))
	defer store.Close()
	r := must(store.Repository(""))
	var calls []sample
	for range 2000 {
		start := time.Now()
		must(r.Stat(context.Background(), "v1", blobstore.Lookup{}))
		calls = append(calls, sample{wall: time.Since(start)})
	}
	b.printf("\nThe same through the Go API, on an open connection: %d µs.\n\n", median(calls, wall).Microseconds())
}

func (b *bench) small(n, size int) {
	data := make([]byte, size)
	embedded := must(blobstore.Open(filepath.Join(b.dir, "embedded")))
	defer embedded.Close()
	dialled := must(client.Dial(context.Background(), b.socket))
	defer dialled.Close()
	b.printf("## %d files of %d KiB through the Go API\n\nEach import is durable when it returns. One run each.\n\n| "+
		"store | callers | s | files/s |\n|---|---:|---:|---:|\n", n, size>>10)
	run := 0
	for _, store := range []struct {
		name string
		*blobstore.Store
	}{{"embedded", embedded}, {"through dfdaemon", dialled}} {
		for _, callers := range []int{1, 16} {
			run++
			if callers == 16 {
				resetPeak(b.daemon.Process.Pid)
			}
			r := must(store.Repository(fmt.Sprintf("run%d", run)))
			work := make(chan int)
			var all sync.WaitGroup
			start := time.Now()
			for range callers {
				all.Go(func() {
					data := slices.Clone(data)
					for i := range work {
						copy(data, fmt.Sprintf("%d %d", run, i))
						must(r.Import(context.Background(), "", bytes.NewReader(data), blobstore.ImportOptions{}))
					}
				})
			}
			for i := range n {
				work <- i
			}
			close(work)
			all.Wait()
			took := time.Since(start)
			b.printf("| %s | %d | %.2f | %.0f |\n", store.name, callers, took.Seconds(), float64(n)/took.Seconds())
		}
	}
	b.printf("\nPeak memory of dfdaemon meanwhile: %d MiB.\n\n", peakOf(b.daemon.Process.Pid))
}

// open measures the opening of stores of few and of many blobs. They are made
// in memory, where fsync costs nothing: only the number of blobs matters here.
func (b *bench) open(many int) {
	dir := must(os.MkdirTemp("/dev/shm", "dfbench"))
	defer os.RemoveAll(dir)
	b.printf("## Opening a store\n\nThe data directory is in memory. `blobstore.Open`, in this process.\n\n| blobs | " +
		"ms |\n|---:|---:|\n")
	const together = 500
	for have, want := 0, 1000; want <= many; want *= 10 {
		store := must(pieces.Open(dir, pieces.Options{}))
		for ; have < want; have += together {
			in := must(store.Ingest(context.Background()))
			var c p2p.Commit
			for i := range together {
				added := must(in.Add(strings.NewReader(strconv.Itoa(have+i)), p2p.AddOptions{}))
				c.Tasks = append(c.Tasks,
					p2p.NewTask{Task: p2p.Task{Tag: "t", Digest: added.Digest}, Keep: p2p.KeepPinned})
			}
			must(0, in.Commit(c))
			must(0, in.Close())
		}
		must(0, store.Close())
		var samples []sample
		for range b.runs {
			start := time.Now()
			s := must(blobstore.Open(dir))
			samples = append(samples, sample{wall: time.Since(start)})
			must(0, s.Close())
		}
		b.printf("| %d | %.2f |\n", want, float64(median(samples, wall).Microseconds())/1000)
	}
	b.printf("\n")
}
