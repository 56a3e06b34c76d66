package script

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

var registryPattern = regexp.MustCompile(`\bregistry (https?://[^\s,]+)`)

// anyHost is what a daemon that listens at all addresses says.
var anyHost = strings.NewReplacer("0.0.0.0", "127.0.0.1", "[::]", "127.0.0.1")

// registry returns the URL of the running daemon's registry, or "".
func (d *daemon) registry(ts *testscript.TestScript) string {
	if d.cmd == nil {
		return ""
	}
	if match := registryPattern.FindStringSubmatch(ts.ReadFile(d.output("stderr"))); match != nil {
		return anyHost.Replace(match[1])
	}
	return ""
}

func httpCmd(ts *testscript.TestScript, neg bool, args []string) {
	const usage = "http [-ca FILE] [-as UID] [-user NAME:PASSWORD] [-body FILE] METHOD URL [HEADER:VALUE...]"
	flags := flag.NewFlagSet("http", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	as := flags.Int("as", os.Geteuid(), "")
	ca, user, body := flags.String("ca", "", ""), flags.String("user", "", ""), flags.String("body", "", "")
	if flags.Parse(args) != nil || flags.NArg() < 2 {
		ts.Fatalf("usage: %s", usage)
	}
	method, url, headers := flags.Arg(0), flags.Arg(1), flags.Args()[2:]
	if strings.HasPrefix(url, "/") {
		base := of(ts).registry(ts)
		if base == "" {
			ts.Fatalf("there is no registry")
		}
		url = base + url
	}
	var content io.Reader
	if *body != "" {
		content = strings.NewReader(ts.ReadFile(*body))
	}
	r, err := http.NewRequest(method, url, content)
	ts.Check(err)
	for _, h := range headers {
		name, value, ok := strings.Cut(h, ":")
		if !ok {
			ts.Fatalf("usage: %s", usage)
		}
		if value = strings.TrimSpace(value); strings.EqualFold(name, "Host") {
			r.Host = value
		}
		r.Header.Add(name, value)
	}
	if name, password, ok := strings.Cut(*user, ":"); ok {
		r.SetBasicAuth(name, password)
	}
	// Nothing is left open that a daemon would have to wait for.
	transport := &http.Transport{DisableKeepAlives: true, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{},
		DialContext: dialAs(*as)}
	if *ca != "" {
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM([]byte(ts.ReadFile(*ca))) {
			ts.Fatalf("%s is no certificate", *ca)
		}
	}
	answer, err := transport.RoundTrip(r)
	if err != nil {
		fmt.Fprintln(ts.Stderr(), err)
		finish(ts, neg, err)
		return
	}
	defer answer.Body.Close()
	if neg {
		ts.Fatalf("unexpected answer: %s", answer.Status)
	}
	var text bytes.Buffer
	fmt.Fprintf(&text, "%s %s\n", answer.Proto, answer.Status)
	ts.Check(answer.Header.Write(&text))
	text.WriteByte('\n')
	_, err = io.Copy(&text, answer.Body)
	ts.Check(err)
	_, err = io.WriteString(ts.Stdout(), strings.ReplaceAll(text.String(), "\r\n", "\n"))
	ts.Check(err)
}

// dialAs dials as a user. Another one than that of the test needs root.
func dialAs(uid int) func(ctx context.Context, network, at string) (net.Conn, error) {
	return func(ctx context.Context, network, at string) (net.Conn, error) {
		if uid == os.Geteuid() {
			return new(net.Dialer).DialContext(ctx, network, at)
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if _, err := unix.SetfsuidRetUid(uid); err != nil { // of this thread alone
			return nil, err
		}
		defer unix.SetfsuidRetUid(os.Geteuid())
		return new(net.Dialer).DialContext(ctx, network, at)
	}
}

// urlCmd takes the URL that is told out of a text.
func urlCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 2, "url FILE VAR")
	match := urlPattern.FindString(ts.ReadFile(args[0]))
	if match == "" {
		ts.Fatalf("no URL in %s", args[0])
	}
	ts.Setenv(args[1], match)
}

var urlPattern = regexp.MustCompile(`https?://[^\s,)]+`)

// certificateCmd writes a certificate that is its own authority.
func certificateCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 2, "certificate CERTFILE KEYFILE")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	ts.Check(err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	for i, block := range []*pem.Block{{Type: "CERTIFICATE", Bytes: cert}, {Type: "PRIVATE KEY", Bytes: secret}} {
		ts.Check(os.WriteFile(ts.MkAbs(args[i]), pem.EncodeToMemory(block), 0o600))
	}
}
