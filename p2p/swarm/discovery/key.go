package discovery

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/libp2p/go-libp2p/core/crypto"

	"github.com/dfcache/dfcache/p2p/secret"
)

// keyHeader is what a swarm key file starts with: the format of libp2p's
// pre-shared keys, version 1, with the key in hexadecimal.
const keyHeader = "/key/swarm/psk/1.0.0/\n/base16/\n"

// maxKeyFile is more than any key file has, in bytes.
const maxKeyFile = 4096

// Key is the secret that the hosts of a swarm share. The zero Key is none.
// Formatting it does not show it.
type Key struct{ secret [32]byte }

// NewKey returns a random key.
func NewKey() Key {
	var k Key
	rand.Read(k.secret[:]) // never fails
	return k
}

// ParseKey parses the content of a key file: the two header lines of libp2p's
// pre-shared key format and one line of 64 hexadecimal digits.
func ParseKey(data []byte) (Key, error) {
	var k Key
	text := strings.ReplaceAll(string(data), "\r\n", "\n")
	digits, ok := strings.CutPrefix(text, keyHeader)
	if !ok {
		return k, errors.New("not a swarm key: its first lines are not /key/swarm/psk/1.0.0/ and /base16/; make one " +
			"with: dfdaemon swarm key new")
	}
	digits = strings.TrimSuffix(digits, "\n")
	if len(digits) != 64 {
		return k, fmt.Errorf("not a swarm key: the third line has %d characters where 64 hexadecimal digits belong",
			len(digits))
	}
	if _, err := hex.Decode(k.secret[:], []byte(digits)); err != nil {
		return Key{}, errors.New("not a swarm key: the third line is not hexadecimal")
	}
	if k == (Key{}) {
		return k, errors.New("not a swarm key: all zeros are no secret")
	}
	return k, nil
}

// ReadKeyFile reads the swarm key in the named file. It refuses a file that
// others can read, or that group or others can write. The error is
// fs.ErrNotExist where there is no file.
func ReadKeyFile(path string) (Key, error) {
	data, _, err := secret.Read(path, maxKeyFile)
	if err != nil {
		return Key{}, fmt.Errorf("swarm key: %w", err)
	}
	k, err := ParseKey(data)
	if err != nil {
		return k, fmt.Errorf("swarm key %s: %w", path, err)
	}
	return k, nil
}

// WriteKeyFile writes k to the named file, readable by its owner alone. The
// error is fs.ErrExist where there is a file: a key is never overwritten.
func WriteKeyFile(path string, k Key) error {
	if err := writeNew(path, k.File()); err != nil {
		return fmt.Errorf("write swarm key: %w", err)
	}
	return nil
}

// File returns the content of a key file with k.
func (k Key) File() []byte { return []byte(keyHeader + hex.EncodeToString(k.secret[:]) + "\n") }

// Secret returns the 32 bytes with which piece connections prove that both ends
// are of the swarm.
func (k Key) Secret() []byte { return k.derive("dfcache piece connections v1", 32) }

// String returns a placeholder: the key is a secret.
func (k Key) String() string { return "(swarm key)" }

// GoString returns a placeholder, too.
func (k Key) GoString() string { return k.String() }

// psk returns the pre-shared key of libp2p's private networks.
func (k Key) psk() []byte { return k.derive("dfcache libp2p psk v1", 32) }

// service returns the name of the mDNS service (RFC 6763), the same for all of
// the swarm and, for others, without meaning.
func (k Key) service() string {
	return fmt.Sprintf("_df%x._udp", k.derive("dfcache mdns v1", 6))
}

func (k Key) derive(label string, n int) []byte {
	b, err := hkdf.Key(sha256.New, k.secret[:], nil, label, n)
	if err != nil {
		panic(err) // only for lengths above 8160
	}
	return b
}

// LoadIdentity reads the private key of this host, an ed25519 key in PKCS #8
// and PEM, from the named file, after it has made a random one if there was no
// file. It refuses a file that others can read, or that group or others can
// write.
func LoadIdentity(path string) (crypto.PrivKey, error) {
	data, _, err := secret.Read(path, maxKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		if err = newIdentity(path); err == nil || errors.Is(err, fs.ErrExist) {
			data, _, err = secret.Read(path, maxKeyFile) // another process may have been faster
		}
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("identity %s: not PEM; remove the file to get a new identity", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("identity %s: %w; remove the file to get a new identity", path, err)
	}
	ed, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("identity %s: the key is a %T where an ed25519 key belongs; remove the file to get a "+
			"new identity", path, key)
	}
	priv, _, err := crypto.KeyPairFromStdKey(&ed)
	return priv, err
}

func newIdentity(path string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writeNew(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// writeNew makes a durable file, at once and whole, unless there is one.
func writeNew(path string, data []byte) error {
	return writeFile(path, data, func(tmp string) error {
		if err := os.Link(tmp, path); err != nil {
			return err // fs.ErrExist
		}
		return os.Remove(tmp)
	})
}

// replace makes a durable file, at once and whole, in place of what was there.
func replace(path string, data []byte) error {
	return writeFile(path, data, func(tmp string) error { return os.Rename(tmp, path) })
}

// writeFile writes a temporary file (mode 0600), lets put give it its name, and
// makes that last.
func writeFile(path string, data []byte, put func(tmp string) error) error {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	f, err := os.CreateTemp(dir, "."+base+".*")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, bytes.NewReader(data))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = put(f.Name())
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the error before it is what counts
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
