package main

import (
	"crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/dfcache/dfcache/p2p/secret"
)

// certInterval is the least time between two looks at a certificate's files.
const certInterval = time.Minute

// maxPEM bounds, in bytes, the file of a certificate with its chain, and that of its key.
const maxPEM = 1 << 20

// certificate is a TLS certificate that is read again when its files change.
// What can't be read changes nothing. It is safe for concurrent use.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	now               func() time.Time

	mu      sync.Mutex
	current *tls.Certificate
	files   [2]fs.FileInfo // as they were before they were read
	looked  time.Time
}

// readCertificate reads a certificate with its chain, and its key, which is refused where
// others may read or write it.
func readCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log, now: time.Now}
	return c, c.load()
}

// get is a [tls.Config.GetCertificate].
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now().Sub(c.looked) >= certInterval {
		if err := c.load(); err != nil {
			c.log.Error("the registry's certificate can't be read again: the one before stays", "error", err.Error())
		}
	}
	return c.current, nil
}

// load reads the files where they have changed.
func (c *certificate) load() error {
	c.looked = c.now()
	var files [2]fs.FileInfo
	changed := c.current == nil
	for i, name := range []string{c.certFile, c.keyFile} {
		var err error
		if files[i], err = os.Stat(name); err != nil {
			return err
		}
		changed = changed || !secret.Same(c.files[i], files[i])
	}
	if !changed {
		return nil
	}
	chain, _, err := secret.ReadPublic(c.certFile, maxPEM)
	if err != nil {
		return err
	}
	key, _, err := secret.Read(c.keyFile, maxPEM)
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	read, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return err
	}
	if c.current != nil {
		c.log.Info("read the registry's certificate again", "file", c.certFile)
	}
	c.current, c.files = &read, files
	return nil
}
