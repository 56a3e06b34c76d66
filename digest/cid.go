package digest

import (
	_ "crypto/sha256" // registers sha256 with go-digest
	_ "crypto/sha512" // registers sha384 and sha512 with go-digest
	"errors"
	"fmt"
	"strings"

	godigest "github.com/opencontainers/go-digest"
)

// Digest is an OCI digest, "<algorithm>:<lower-case hex>". It is the type that
// OCI descriptors use, so that it can be passed to and from other OCI libraries.
type Digest = godigest.Digest

// Algorithm names a hash function of the OCI image specification.
type Algorithm = godigest.Algorithm

// The algorithms that are accepted everywhere in dfcache.
const (
	SHA256 = godigest.SHA256
	SHA384 = godigest.SHA384
	SHA512 = godigest.SHA512
)

// ErrInvalid is wrapped by every error that says that a cid, a digest or an
// algorithm is malformed. Its message has the rule that was broken.
var ErrInvalid = errors.New("invalid")

// MaxCacheID is the longest cache ID in bytes, the limit that the OCI
// distribution specification sets for a tag.
const MaxCacheID = 128

// CID is what names a file: a digest or a cache ID. The zero CID names nothing.
// A CID is comparable and safe to copy.
type CID struct {
	digest Digest
	id     string
}

// ParseCID parses a cid. Text with a colon in it is a digest and has to be a
// valid one ([Parse]); anything else is a cache ID and has to be an OCI tag
// name: a letter, a digit or "_", then up to 127 of these, "." or "-". Errors
// wrap [ErrInvalid].
func ParseCID(s string) (CID, error) {
	if strings.Contains(s, ":") {
		d, err := Parse(s)
		if err != nil {
			return CID{}, err
		}
		return CID{digest: d}, nil
	}
	if err := checkCacheID(s); err != nil {
		return CID{}, err
	}
	return CID{id: s}, nil
}

// FromDigest returns the CID of a digest that has been checked already, by
// [Parse] or by hashing.
func FromDigest(d Digest) CID { return CID{digest: d} }

// Digest returns the digest that c is, or "" where c is a cache ID.
func (c CID) Digest() Digest { return c.digest }

// CacheID returns the cache ID that c is, or "" where c is a digest.
func (c CID) CacheID() string { return c.id }

// IsZero reports whether c names nothing.
func (c CID) IsZero() bool { return c == CID{} }

// String returns the text that ParseCID accepts, or "" for the zero CID.
func (c CID) String() string {
	if c.digest != "" {
		return string(c.digest)
	}
	return c.id
}

// Parse parses an OCI digest of one of the algorithms sha256, sha384 and
// sha512. Errors wrap [ErrInvalid] and say which rule is broken.
func Parse(s string) (Digest, error) {
	name, hex, found := strings.Cut(s, ":")
	if !found {
		return "", fmt.Errorf("digest %q: %w: want ALGORITHM:HEX, for example sha256:<64 hex digits>", s, ErrInvalid)
	}
	alg, err := ParseAlgorithm(name)
	if err != nil {
		return "", fmt.Errorf("digest %q: %w", s, err)
	}
	for i := 0; i < len(hex); i++ {
		switch c := hex[i]; {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f':
		case 'A' <= c && c <= 'F':
			return "", fmt.Errorf("digest %q: %w: hex digits have to be lower-case, found %q", s, ErrInvalid, c)
		default:
			return "", fmt.Errorf("digest %q: %w: %q is not a hex digit (0-9, a-f)", s, ErrInvalid, rune(c))
		}
	}
	if want := 2 * alg.Size(); len(hex) != want {
		return "", fmt.Errorf("digest %q: %w: %s has %d hex digits, found %d", s, ErrInvalid, alg, want, len(hex))
	}
	return Digest(s), nil
}

// ParseAlgorithm parses the name of a hash algorithm. Errors wrap [ErrInvalid].
func ParseAlgorithm(s string) (Algorithm, error) {
	switch alg := Algorithm(s); alg {
	case SHA256, SHA384, SHA512:
		return alg, nil
	}
	return "", fmt.Errorf("%w: unknown algorithm %q: use sha256, sha384 or sha512", ErrInvalid, s)
}

func checkCacheID(s string) error {
	if s == "" {
		return fmt.Errorf("cid: %w: it is empty: pass a digest (sha256:<64 hex digits>) or a cache ID", ErrInvalid)
	}
	const rule = "a cache ID is an OCI tag name: letters, digits, \"_\", and after the first character \".\" and " +
		"\"-\", 128 at most"
	if len(s) > MaxCacheID {
		return fmt.Errorf("cache ID of %d characters starting %q: %w: %s", len(s), s[:16], ErrInvalid, rule)
	}
	for i, r := range s {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '_':
		case i > 0 && (r == '.' || r == '-'):
		default:
			return fmt.Errorf("cache ID %q: %w: %q at position %d: %s", s, ErrInvalid, r, i+1, rule)
		}
	}
	return nil
}
