package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writeCertificate writes a certificate of that name, and its key.
func writeCertificate(t *testing.T, dir, name string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: cert},
		keyFile:  {Type: "PRIVATE KEY", Bytes: secret},
	} {
		// As a rename does it, so that it is another file.
		if err := os.WriteFile(file+".new", pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := writeCertificate(t, dir, "first")
	var log bytes.Buffer
	c, err := readCertificate(certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := c.looked
	c.now = func() time.Time { return now }
	want := func(name string) {
		t.Helper()
		got, err := c.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.Leaf.Subject.CommonName != name {
			t.Errorf("the certificate is the %s, want the %s", got.Leaf.Subject.CommonName, name)
		}
	}
	want("first")
	now = now.Add(certInterval)
	before, _ := c.get(nil)
	if log.Len() > 0 {
		t.Errorf("nothing has changed, but: %s", &log)
	}

	writeCertificate(t, dir, "second")
	want("first") // too early to look
	now = now.Add(certInterval)
	want("second")
	if after, _ := c.get(nil); after == before ||
		!strings.Contains(log.String(), "read the registry's certificate again") {
		t.Errorf("the log: %s", &log)
	}

	// What is wrong changes nothing.
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	for text, spoil := range map[string]func() error{
		"private key does not match": func() error { return os.WriteFile(keyFile, key, 0o600) },
		"no such file":               func() error { return os.Remove(keyFile) },
		"not a regular file": func() error { // nor is it waited for
			return errors.Join(os.Remove(certFile), unix.Mkfifo(certFile, 0o600))
		},
	} {
		writeCertificate(t, dir, "third")
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		log.Reset()
		now = now.Add(certInterval)
		want("second")
		want("second")
		if got := log.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, text) {
			t.Errorf("%s was logged as: %s", text, got)
		}
	}
	writeCertificate(t, dir, "fourth")
	now = now.Add(certInterval)
	want("fourth")
}
