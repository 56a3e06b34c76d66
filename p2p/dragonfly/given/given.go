// Package given maps what Dragonfly's dfcache takes for a cid and a tag, which is any text, to what a
// store takes for them, and back.
//
// What a store takes is left as it is: a digest, a cache ID that is an OCI tag, a tag that is the name of
// an OCI repository. Any other text becomes "d7y--" and the text, in which each byte but a to y and 0 to 9
// is "z" and its two hex digits: "model:v1" is d7y--modelz3av1, the tag "Team" is d7y--z54eam. So does what
// begins with "d7y--" itself. So no two texts become the same, and each name says which text it was.
//
// A cid for which that is too long becomes "d7y--sha256-" and the SHA-256 of the text, in hex, which no
// other text becomes either. The text itself is then an annotation of its manifest, [Annotation].
//
// It promises no compatibility.
package given

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
)

const (
	prefix = "d7y--"
	hashed = prefix + "sha256-"

	// Annotation is what has the text of a cache ID, in the manifest of its artifact, where that does
	// not say it.
	Annotation = "io.github.dfcache.given"
)

// CID returns what a store takes for what Dragonfly's dfcache takes for a cid. The error wraps
// [digest.ErrInvalid] where that is empty, or would be a digest and is none: such a text is a mistake.
func CID(text string) (string, error) {
	if !strings.HasPrefix(text, prefix) {
		if _, err := digest.ParseCID(text); err == nil {
			return text, nil
		}
	}
	if algorithm, _, found := strings.Cut(text, ":"); found || text == "" {
		if _, err := digest.ParseAlgorithm(algorithm); err == nil || text == "" {
			_, err := digest.ParseCID(text)
			return "", err
		}
	}
	if name := prefix + escape(text); len(name) <= digest.MaxCacheID {
		return name, nil
	}
	sum := sha256.Sum256([]byte(text))
	return hashed + hex.EncodeToString(sum[:]), nil
}

// Tag returns what a store takes for what Dragonfly's dfcache takes for a tag. The error wraps
// [digest.ErrInvalid] where that is too long.
func Tag(text string) (string, error) {
	if !strings.HasPrefix(text, prefix) && p2p.ValidateTag(text) == nil {
		return text, nil
	}
	tag := prefix + escape(text)
	if len(tag) > p2p.MaxTag {
		return "", fmt.Errorf("tag of %d bytes starting %q: %w: as the name of an OCI repository it would have %d, "+
			"at most %d are possible", len(text), text[:min(len(text), 16)], digest.ErrInvalid, len(tag), p2p.MaxTag)
	}
	return tag, nil
}

// Text returns the text that a cid or a tag was made of, or the name itself where it was made of none;
// also where only its annotation says which: see [IsHashed].
func Text(name string) string {
	rest, found := strings.CutPrefix(name, prefix)
	if !found {
		return name
	}
	text, ok := unescape(rest)
	if !ok || text == "" {
		return name
	}
	return text
}

// IsHashed reports whether a cache ID was made of a text that is an annotation of its manifest.
func IsHashed(name string) bool { return strings.HasPrefix(name, hashed) }

func plain(c byte) bool { return 'a' <= c && c <= 'y' || '0' <= c && c <= '9' }

func escape(text string) string {
	var b strings.Builder
	for i := range len(text) {
		if c := text[i]; plain(c) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "z%02x", c)
		}
	}
	return b.String()
}

// unescape reports whether there is a text that becomes s.
func unescape(s string) (text string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case plain(s[i]):
			b.WriteByte(s[i])
		case s[i] == 'z' && i+2 < len(s):
			c, err := hex.DecodeString(s[i+1 : i+3])
			if err != nil {
				return "", false
			}
			b.Write(c)
			i += 2
		default:
			return "", false
		}
	}
	return b.String(), escape(b.String()) == s
}
