package discovery

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/pnet"
)

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "swarm.key")
	if _, err := ReadKeyFile(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read what is not there: %v", err)
	}
	k := NewKey()
	if k == NewKey() {
		t.Error("two new keys are the same")
	}
	if err := WriteKeyFile(path, k); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if got, err := ReadKeyFile(path); err != nil || got != k {
		t.Errorf("read another key than written (%v)", err)
	}
	if err := WriteKeyFile(path, NewKey()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwrite: %v", err)
	}
	if got, err := ReadKeyFile(path); err != nil || got != k {
		t.Errorf("the key has changed (%v)", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
	// The form is that of libp2p.
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if psk, err := pnet.DecodeV1PSK(bytes.NewReader(data)); err != nil || !bytes.Equal(psk, k.secret[:]) {
		t.Errorf("libp2p reads another key (%v)", err)
	}
}

func TestSecretFilesOfOthers(t *testing.T) {
	dir := t.TempDir()
	keyPath, idPath := filepath.Join(dir, "swarm.key"), filepath.Join(dir, "identity.pem")
	if err := WriteKeyFile(keyPath, NewKey()); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadIdentity(idPath); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[fs.FileMode]bool{
		0o400: true, 0o600: true, 0o700: true, 0o640: true, 0o440: true,
		0o644: false, 0o604: false, 0o620: false, 0o602: false, 0o660: false, 0o666: false,
	} {
		for path, read := range map[string]func(string) error{
			keyPath: func(p string) error { _, err := ReadKeyFile(p); return err },
			idPath:  func(p string) error { _, err := LoadIdentity(p); return err },
		} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			err := read(path)
			if ok && err != nil {
				t.Errorf("mode %o: %v", mode, err)
			} else if !ok && (err == nil || !strings.Contains(err.Error(), "chmod 600 "+path)) {
				t.Errorf("%s with mode %o: error %v, want advice", path, mode, err)
			}
		}
	}
}

func TestParseKey(t *testing.T) {
	digits := strings.Repeat("0a", 32)
	for text, ok := range map[string]bool{
		keyHeader + digits:        true,
		keyHeader + digits + "\n": true,
		strings.ReplaceAll(keyHeader+digits+"\n", "\n", "\r\n"): true,
		keyHeader + strings.ToUpper(digits):                     true,
		"":                                                      false,
		keyHeader:                                               false,
		keyHeader + digits[1:]:                                  false,
		keyHeader + digits + "00":                               false,
		keyHeader + digits + "\n\n":                             false,
		keyHeader + "xx" + digits[2:]:                           false,
		keyHeader + strings.Repeat("00", 32):                    false,
		"/key/swarm/psk/1.0.0/\n/base64/\n" + digits:            false,
		digits: false,
	} {
		if _, err := ParseKey([]byte(text)); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestKeyIsNotShown(t *testing.T) {
	k := NewKey()
	hex := fmt.Sprintf("%x", k.secret[:4])
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if got := fmt.Sprintf(format, k); !strings.Contains(got, "(swarm key)") || strings.Contains(got, hex) {
			t.Errorf("%s shows %s", format, got)
		}
	}
}

// What is derived must stay the same, or hosts of two versions do not meet, and
// must differ, or one secret tells another.
func TestDerivedSecrets(t *testing.T) {
	var k Key
	for i := range k.secret {
		k.secret[i] = byte(i)
	}
	got := fmt.Sprintf("%x %x %s", k.Secret(), k.psk(), k.service())
	const want = "8a6d235174bc9f4ea7a14a47f4ba2ded632fe9e3ffe20fda161cf04ea4306600 " +
		"25f8b8dbf60846549426e3985b0a03315f1dd3d1471debc6a68cdbbde1eadc94 _dfd798bac3ab6b._udp"
	if got != want {
		t.Errorf("derived\n%s, want\n%s", got, want)
	}
	if bytes.Equal(k.Secret(), k.psk()) || bytes.Equal(k.Secret(), k.secret[:]) || bytes.Equal(k.psk(), k.secret[:]) {
		t.Error("two secrets are the same")
	}
	if k.service() == NewKey().service() {
		t.Error("two swarms have the same service")
	}
}

func TestLoadIdentity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "identity.pem")
	ids := make([]crypto.PrivKey, 8)
	var wg sync.WaitGroup
	for i := range ids { // of all processes that start at once, one makes the key
		wg.Go(func() {
			var err error
			if ids[i], err = LoadIdentity(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, id := range ids {
		if id.Type() != crypto.Ed25519 || !id.Equals(ids[0]) {
			t.Errorf("identity %v of type %v, want %v", id, id.Type(), ids[0])
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
	for _, bad := range []string{"", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		strings.Repeat("x", maxKeyFile+1)} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadIdentity(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("from %.20q: %v, want an error that names the file", bad, err)
		}
		if got, _ := os.ReadFile(path); string(got) != bad {
			t.Error("the file was overwritten")
		}
	}
	if _, err := LoadIdentity(filepath.Join(path, "no", "directory")); err == nil {
		t.Error("made an identity without a directory")
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add([]byte(keyHeader + strings.Repeat("0a", 32) + "\n"))
	f.Add([]byte(strings.ReplaceAll(keyHeader, "\n", "\r\n") + strings.Repeat("F0", 32)))
	f.Add([]byte(keyHeader))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := ParseKey(data)
		if (err == nil) == (k == Key{}) {
			t.Fatalf("key %x with error %v", k.secret, err)
		}
		if err != nil {
			return
		}
		// Where libp2p has the same idea of the header, it reads the same key.
		if psk, err := pnet.DecodeV1PSK(bytes.NewReader(data)); err != nil || !bytes.Equal(psk, k.secret[:]) {
			t.Errorf("libp2p reads %x, %v, where we read %x", psk, err, k.secret)
		}
	})
}
