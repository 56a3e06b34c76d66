package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// certificates writes an authority, ca.crt, and a certificate of localhost that
// it has signed, server.crt and server.key.
func (u *user) certificates() {
	t := u.t
	t.Helper()
	write := func(name, kind string, der []byte, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		u.write(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	now := time.Now()
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of a test"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	authorityKey, serverKey := key(), key()
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	write("ca/ca.crt", "CERTIFICATE", der, err)
	der, err = x509.CreateCertificate(rand.Reader, server, authority, serverKey.Public(), authorityKey)
	write("server.crt", "CERTIFICATE", der, err)
	der, err = x509.MarshalPKCS8PrivateKey(serverKey)
	write("server.key", "PRIVATE KEY", der, err)
}

// passwords writes an htpasswd file; the password of each user is "pw-" and the name.
func (u *user) passwords(names ...string) {
	u.t.Helper()
	var lines strings.Builder
	for _, name := range names {
		hash, err := bcrypt.GenerateFromPassword([]byte("pw-"+name), bcrypt.MinCost)
		if err != nil {
			u.t.Fatal(err)
		}
		fmt.Fprintf(&lines, "%s:%s\n", name, hash)
	}
	u.write("htpasswd", []byte(lines.String()))
}

// guarded starts a daemon whose registry has TLS and passwords: alice may write,
// bob may read. It returns a user who trusts its certificate.
func guarded(t *testing.T, flags ...string) (*daemon, *user) {
	t.Helper()
	admin := newUser(t, &daemon{})
	admin.certificates()
	admin.passwords("alice", "bob")
	file := func(name string) string { return filepath.Join(admin.dir, name) }
	d, u := start(t, append([]string{
		"--registry-cert", file("server.crt"), "--registry-key", file("server.key"),
		"--registry-htpasswd", file("htpasswd"), "--registry-write", "alice",
	}, flags...)...)
	// oras takes a registry at localhost for one without TLS.
	d.host = strings.Replace(d.host, "localhost", "127.0.0.1", 1)
	u.env = append(u.env, "SSL_CERT_FILE="+file("ca/ca.crt"), "CA="+file("ca"))
	return d, u
}

// trusts returns the directory of the authority that the user trusts.
func (u *user) trusts() string {
	return strings.TrimPrefix(u.env[len(u.env)-1], "CA=")
}

// login writes what a login leaves behind, for clients that take no password on
// their command line.
func (u *user) login(host, name string) {
	u.t.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte(name + ":pw-" + name))
	u.write("home/docker/config.json", fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, auth))
}

// noLogin is what oras says where a login is asked for, and it has none.
const noLogin = "credential not found"

// TestAccess: with TLS and passwords, each client gets what its user may have.
func TestAccess(t *testing.T) {
	d, u := guarded(t)
	u.write("model.bin", content(100_000, 1))
	u.write("layer.tar", tarOf(t, "file", content(100_000, 2)))
	model, image, remote := d.host+"/models:v1", d.host+"/images/app:v1", "docker://"+d.host
	as := func(name string) []string { return []string{"-u", name, "-p", "pw-" + name} }
	skopeo := func(args ...string) []string { return append([]string{"skopeo", "--insecure-policy"}, args...) }

	// alice may write and read.
	u.run(append([]string{"oras", "push", model, "model.bin"}, as("alice")...)...)
	u.login(d.host, "alice")
	u.run("crane", "append", "--oci-empty-base", "-f", "layer.tar", "-t", image)
	u.run(skopeo("copy", "--src-cert-dir", u.trusts(), "--dest-cert-dir", u.trusts(),
		"--src-creds", "bob:pw-bob", "--dest-creds", "alice:pw-alice", remote+"/images/app:v1", remote+"/copy:v1")...)
	u.requireLayers("copy", u.manifest(d.host+"/copy:v1"))
	u.run("regctl", "image", "copy", image, d.host+"/copy:v2")
	u.run("crane", "delete", d.host+"/copy:v2")

	// bob may read alone, whatever he sends.
	u.run(append([]string{"oras", "pull", model, "-o", "out"}, as("bob")...)...)
	u.has("out/model.bin", content(100_000, 1))
	u.run(skopeo("copy", "--src-cert-dir", u.trusts(), "--src-creds", "bob:pw-bob", remote+"/images/app:v1",
		"oci:layout:v1")...)
	u.fails("denied", append([]string{"oras", "tag", model, "v2"}, as("bob")...)...)
	u.fails("denied", append([]string{"oras", "push", d.host + "/models:v2", "model.bin"}, as("bob")...)...)
	u.fails("denied", append([]string{"oras", "manifest", "delete", "-f", model}, as("bob")...)...)
	u.fails("denied", skopeo("copy", "--dest-cert-dir", u.trusts(),
		"--dest-creds", "bob:pw-bob", "oci:layout:v1", remote+"/copy:v3")...)
	u.login(d.host, "bob")
	u.run("crane", "validate", "--remote", image)
	u.fails("DENIED", "crane", "delete", image)
	u.fails("DENIED", "crane", "tag", image, "v2")
	u.fails("DENIED", "crane", "append", "--oci-empty-base", "-f", "layer.tar", "-t", d.host+"/images/app:v3")
	u.fails("unauthorized", "regctl", "tag", "rm", image)

	// Nobody else may do anything.
	u.write("home/docker/config.json", []byte("{}"))
	for _, login := range [][]string{nil, {"-u", "alice", "-p", "pw-bob"}, {"-u", "mallory", "-p", "pw-mallory"}} {
		says := "unauthorized"
		if login == nil {
			says = noLogin
		}
		u.fails(says, append([]string{"oras", "pull", model, "-o", "none"}, login...)...)
		u.fails(says, append([]string{"oras", "push", d.host + "/models:v3", "model.bin"}, login...)...)
	}
	u.hasNot("none")
	u.fails("UNAUTHORIZED", "crane", "manifest", image)
	u.fails("UNAUTHORIZED", "crane", "catalog", d.host)
	u.fails("login is needed", skopeo("inspect", "--cert-dir", u.trusts(), remote+"/images/app:v1")...)
	u.fails("unauthorized", "regctl", "manifest", "get", image)
	u.prints("v1", append([]string{"oras", "repo", "tags", d.host + "/models"}, as("bob")...)...)
	u.prints("v1", append([]string{"oras", "repo", "tags", d.host + "/images/app"}, as("bob")...)...)

	// The certificate is looked at, and plain HTTP is not answered.
	u.fails("certificate", "oras", "pull", model,
		"-o", "none", "-u", "bob", "-p", "pw-bob", "--ca-file", filepath.Join(u.dir, "home", "docker", "config.json"))
	u.fails("400", "oras", "pull", "--plain-http", model, "-o", "none", "-u", "bob", "-p", "pw-bob")
	if status, _ := d.raw(t, "GET /v2/ HTTP/1.1\r\nHost: "+d.host+"\r\n\r\n"); status != 400 {
		t.Errorf("plain HTTP is answered with %d", status)
	}

	// dfcache has its own door, with the rights of the socket.
	if s := u.stat("models", "v1"); s.Title != "model.bin" {
		t.Errorf("stat: %+v", s)
	}
}

// TestLogins: each client's own login, and what it keeps of it.
func TestLogins(t *testing.T) {
	d, u := guarded(t)
	u.write("model.bin", []byte("model"))
	u.feed(strings.NewReader("pw-alice"), "oras", "login", d.host, "-u", "alice", "--password-stdin")
	u.run("oras", "push", d.host+"/models:v1", "model.bin")
	u.run("oras", "logout", d.host)
	u.fails(noLogin, "oras", "pull", d.host+"/models:v1", "-o", "out")
	u.fails("password is wrong", "oras", "login", d.host, "-u", "alice", "-p", "wrong")

	u.feed(strings.NewReader("pw-bob"), "crane", "auth", "login", d.host, "-u", "bob", "--password-stdin")
	u.run("crane", "manifest", d.host+"/models:v1")
	u.run("crane", "auth", "logout", d.host)
	u.fails("UNAUTHORIZED", "crane", "manifest", d.host+"/models:v1")

	u.feed(strings.NewReader("pw-bob"), "skopeo", "login", "--cert-dir", u.trusts(),
		"-u", "bob", "--password-stdin", d.host)
	u.run("skopeo", "inspect", "--raw", "--cert-dir", u.trusts(), "docker://"+d.host+"/models:v1")
	u.run("skopeo", "logout", d.host)
	u.fails("", "skopeo", "login", "--cert-dir", u.trusts(), "-u", "bob", "-p", "wrong", d.host)

	u.feed(strings.NewReader("pw-bob"), "regctl", "registry", "login", d.host, "-u", "bob", "--pass-stdin")
	u.run("regctl", "manifest", "get", d.host+"/models:v1")
	u.run("regctl", "registry", "logout", d.host)
	u.fails("unauthorized", "regctl", "manifest", "get", d.host+"/models:v1")

	c := u.startContainerd()
	reference := d.host + "/models:v1"
	u.write("hosts/"+d.host+"/hosts.toml",
		fmt.Appendf(nil, "[host.\"https://%s\"]\nca = %q\n", d.host, filepath.Join(u.trusts(), "ca.crt")))
	fetch := []string{"content", "fetch", "--hosts-dir", filepath.Join(u.dir, "hosts"), reference}
	u.fails("401", append([]string{"ctr", "--address", c.socket}, fetch...)...)
	c.ctr(slices.Insert(fetch, 2, "--user", "bob:pw-bob")...)
	c.requireContent(sha256Of([]byte("model")).String())
}

// TestAnonymousRead: where anyone may read, clients need a password to write only.
func TestAnonymousRead(t *testing.T) {
	d, u := guarded(t, "--registry-read", "anyone")
	u.write("model.bin", []byte("model"))
	u.write("layer.tar", tarOf(t, "file", content(100_000, 2)))
	u.fails(noLogin, "oras", "push", d.host+"/models:v1", "model.bin")
	u.run("oras", "push", d.host+"/models:v1", "model.bin", "-u", "alice", "-p", "pw-alice")
	u.run("oras", "pull", d.host+"/models:v1", "-o", "out")
	u.has("out/model.bin", []byte("model"))
	u.fails("UNAUTHORIZED", "crane", "append", "--oci-empty-base", "-f", "layer.tar", "-t", d.host+"/app:v1")
	u.login(d.host, "alice")
	u.run("crane", "append", "--oci-empty-base", "-f", "layer.tar", "-t", d.host+"/app:v1")
	u.login(d.host, "bob") // who is a user, and may not write
	u.fails("DENIED", "crane", "delete", d.host+"/app:v1")
	u.write("home/docker/config.json", []byte("{}"))
	u.run("crane", "validate", "--remote", d.host+"/app:v1")
	u.run("skopeo", "inspect", "--cert-dir", u.trusts(), "docker://"+d.host+"/app:v1")
	u.run("regctl", "manifest", "get", d.host+"/app:v1")
}

// TestNotExposed: what other hosts could reach does not start without somebody
// having said that it may.
func TestNotExposed(t *testing.T) {
	admin := newUser(t, &daemon{})
	args := []string{"dfdaemon", "--workhome", filepath.Join(admin.dir, "w"),
		"--daemon-sock", filepath.Join(admin.dir, "r", "s"), "--config", "/dev/null"}
	admin.fails("can be reached from other hosts", append(args, "--registry", "0.0.0.0:0")...)
	admin.hasNot("w/data/meta.db")
}
