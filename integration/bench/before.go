package main

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// build is one build of the programs, with a daemon of its own that is alone in
// its swarm.
type build struct {
	dfcache, socket, registry string
	daemon                    *exec.Cmd
}

// start runs the dfdaemon in bin, with further flags.
func (b *bench) start(name, bin string, flags ...string) build {
	dir := filepath.Join(b.dir, name)
	must(0, os.MkdirAll(dir, 0o755))
	bin = must(filepath.Abs(bin))
	n := build{dfcache: filepath.Join(bin, "dfcache"), socket: filepath.Join(dir, "run", "s"), registry: freeAddress()}
	key := filepath.Join(dir, "swarm.key")
	must(0, exec.Command(filepath.Join(bin, "dfdaemon"), "swarm", "key", "new", key).Run())
	n.daemon = startDaemon(slices.Concat(
		[]string{filepath.Join(bin, "dfdaemon"), "--workhome", dir, "--daemon-sock", n.socket, "--registry", n.registry,
			"--swarm-key", key,
			"--swarm-listen", freeAddress(), "--swarm-pieces", freeAddress(), "--mdns=false"}, flags)...)
	return n
}

func (n build) stop() {
	n.daemon.Process.Signal(syscall.SIGTERM)
	n.daemon.Wait()
}

// command is a command of this build's dfcache.
func (n build) command(args ...string) []string {
	return append([]string{n.dfcache, args[0], "--daemon-sock", n.socket}, args[1:]...)
}

// before measures this build and an earlier one, whose binaries are in bin, in turn.
func (b *bench) before(bin, tools string) {
	now, then := b.start("now", filepath.Dir(b.dfcache)), b.start("then", bin)
	defer now.stop()
	defer then.stop()
	version := strings.TrimSpace(string(must(exec.Command(then.dfcache, "version").Output())))
	version, _, _ = strings.Cut(strings.TrimSpace(strings.TrimPrefix(version, "version:")), "\n")
	b.printf("## Beside an earlier build\n\nThe same commands with this build and with an earlier one (%s), in turn, "+
		"each with a daemon of its own. "+
		"An export of the earlier build returned before the file was on disk: it compares with `--no-sync`.\n\n"+
		"| what | command | this build, ms | the earlier, ms | ratio |\n|---|---|---:|---:|---:|\n", version)
	for _, size := range []int64{1 << 20, 100 << 20, 1 << 30} {
		b.filesBefore(size, now, then)
	}
	if tools == "" {
		return
	}
	oras := filepath.Join(must(filepath.Abs(tools)), "oras")
	os.Setenv("HOME", b.dir)
	for _, files := range []struct {
		name string
		n    int
		size int64
	}{{"1 GiB", 1, 1 << 30}, {"1000 files of 10 KiB", 1000, 10 << 10}} {
		b.registryBefore(files.name, files.n, files.size, now, then, oras, "--plain-http")
	}
	cert, key := b.tlsFiles()
	tls := []string{"--registry-cert", cert, "--registry-key", key}
	secureNow, secureThen := b.start("now-tls", filepath.Dir(b.dfcache), tls...), b.start("then-tls", bin, tls...)
	defer secureNow.stop()
	defer secureThen.stop()
	b.registryBefore("1 GiB, TLS", 1, 1<<30, secureNow, secureThen, oras, "--ca-file", cert)
	b.printf("\n")
}

// tlsFiles makes the files of a certificate of 127.0.0.1 and its key.
func (b *bench) tlsFiles() (cert, key string) {
	certificate, private := selfSigned()
	cert, key = filepath.Join(b.dir, "cert.pem"), filepath.Join(b.dir, "key.pem")
	must(0, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), 0o644))
	must(
		0, os.WriteFile(key, pem.EncodeToMemory(
			&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))}), 0o600))
	return cert, key
}

func (b *bench) filesBefore(size int64, now, then build) {
	file, copied := b.file(size), filepath.Join(b.dir, "copy")
	defer os.Remove(file)
	defer os.Remove(copied)
	digest := "sha256:" + b.hash(file)
	clean := func() { fresh(file, copied) }
	var commands []command
	for _, n := range []struct {
		name string
		build
	}{{"now", now}, {"then", then}} {
		gone := func() {
			args := n.command("delete", "-i", digest)
			exec.Command(args[0], args[1:]...).Run() // in the first round there is none
			clean()
		}
		commands = append(commands,
			command{name: n.name + " import", before: gone, args: n.command("import", "-i", digest, file),
				server: n.daemon.Process.Pid},
			command{name: n.name + " export", before: clean, args: n.command("export", "-i", digest, copied),
				server: n.daemon.Process.Pid})
		if n.build == now {
			commands = append(commands, command{name: "now export --no-sync", before: clean,
				args: n.command("export", "--no-sync", "-i", digest, copied), server: n.daemon.Process.Pid})
		}
	}
	samples := b.measure(commands)
	b.compare(mib(size), "import", samples["now import"], samples["then import"])
	b.compare(mib(size), "export --no-sync", samples["now export --no-sync"], samples["then export"])
	b.compare(mib(size), "export", samples["now export"], samples["then export"])
}

// registryBefore measures pushes and pulls. The flags say how oras connects.
func (b *bench) registryBefore(what string, files int, size int64, now, then build, oras string, flags ...string) {
	in, out := filepath.Join(b.dir, "push"), filepath.Join(b.dir, "pull")
	must(0, os.MkdirAll(in, 0o755))
	defer os.RemoveAll(in)
	names := randomFiles(in, files, size)
	must(0, os.Chdir(in))
	defer os.Chdir(b.dir)
	var commands []command
	for _, n := range []struct {
		name string
		build
	}{{"now", now}, {"then", then}} {
		reference := n.registry + "/bench:v1"
		clean := func() { fresh(names[0], out) }
		empty := func() {
			args := n.command("delete", "-t", "bench", "-i", "v1")
			exec.Command(args[0], args[1:]...).Run()
			clean()
		}
		commands = append(commands,
			command{n.name + " push", empty, slices.Concat([]string{oras, "push", "--no-tty", reference}, names, flags),
				n.daemon.Process.Pid},
			command{n.name + " pull", clean,
				slices.Concat([]string{oras, "pull", "--no-tty", "-o", out, reference}, flags), n.daemon.Process.Pid})
	}
	samples := b.measure(commands)
	os.RemoveAll(out)
	b.compare(what, "oras push", samples["now push"], samples["then push"])
	b.compare(what, "oras pull", samples["now pull"], samples["then pull"])
}

// compare prints one row.
func (b *bench) compare(what, verb string, now, then []sample) {
	n, t := median(now, wall), median(then, wall)
	b.printf("| %s | %s | %.1f | %.1f | %.2f |\n", what, verb, ms(n), ms(t), ms(n)/ms(t))
}
