package p2p

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/dfcache/dfcache/digest"
)

// Errors that engines return, wrapped with what they are about.
var (
	// ErrNotFound: there is no such task, name or blob.
	ErrNotFound = errors.New("not found")
	// ErrReferenced: another task refers to what was to be deleted.
	ErrReferenced = errors.New("still referred to")
	// ErrMissingRef: a manifest refers to what is not held.
	ErrMissingRef = errors.New("refers to what is not here")
	// ErrNoSpace: a disk or a quota is full.
	ErrNoSpace = errors.New("no space left")
	// ErrUnavailable: the daemon, or the store's directory, can't be reached or used.
	ErrUnavailable = errors.New("unavailable")
	// ErrFailed: the disk has failed the store, which stores nothing more until it is opened again. What
	// is there can be read.
	ErrFailed = errors.New("the store has failed")
	// ErrBusy: it would need more than there is at the moment, as of descriptors; it is to
	// be tried again. It matches ErrUnavailable.
	ErrBusy = fmt.Errorf("%w: busy", ErrUnavailable)
	// ErrUnreachable: it is not here, and there was no peer that could be asked.
	ErrUnreachable = errors.New("no peer can be reached")
	// ErrChanged: a file was written to while it was added.
	ErrChanged = errors.New("the file changed while it was read")
	// ErrMoved: what a change was to be made to is not what its caller expects.
	ErrMoved = errors.New("it is another one by now")
	// ErrClosed: the engine has been closed.
	ErrClosed = errors.New("closed")
)

// MissingRefError says what a manifest refers to that is not held. It matches
// [ErrMissingRef].
type MissingRefError struct {
	Manifest digest.Digest
	Missing  digest.Digest
}

func (e *MissingRefError) Error() string {
	return fmt.Sprintf("manifest %s %v: %s", e.Manifest, ErrMissingRef, e.Missing)
}

// Unwrap returns [ErrMissingRef].
func (e *MissingRefError) Unwrap() error { return ErrMissingRef }

// ReferencedError says what keeps a task from being deleted. It matches [ErrReferenced].
type ReferencedError struct {
	Task Task
	By   string // what refers to it, for people
}

func (e *ReferencedError) Error() string {
	return fmt.Sprintf("%s: %v: by %s: delete that first", e.Task, ErrReferenced, e.By)
}

// Unwrap returns [ErrReferenced].
func (e *ReferencedError) Unwrap() error { return ErrReferenced }

// DefaultRepository is the name that the empty tag has where a tag has to be
// a repository: in the registry view. It can't be used as a tag itself, so that
// every task has one tag and every repository one name.
const DefaultRepository = "dfcache/default"

// MaxTag is the longest tag in bytes: what registry clients accept for host
// and repository together.
const MaxTag = 255

// Task is a blob under a tag. It is comparable.
type Task struct {
	Tag    string
	Digest digest.Digest
}

// ID returns the name under which peers know the task: the SHA-256, in hex, of
// a fixed prefix, the tag and the digest, with a zero byte after each of the
// first two. Neither a tag nor a digest can contain one, so no two tasks share
// an ID.
func (t Task) ID() string {
	sum := sha256.Sum256([]byte("dfcache task\x00" + t.Tag + "\x00" + string(t.Digest)))
	return hex.EncodeToString(sum[:])
}

// String describes the task in messages.
func (t Task) String() string { return Describe(t.Tag, digest.FromDigest(t.Digest)) }

// Describe names a cid under a tag in messages.
func Describe(tag string, cid digest.CID) string {
	if tag == "" {
		return cid.String()
	}
	return fmt.Sprintf("%s under tag %s", cid, tag)
}

// Validate reports whether both parts of the task are well-formed. Errors wrap
// [digest.ErrInvalid].
func (t Task) Validate() error {
	if err := ValidateTag(t.Tag); err != nil {
		return err
	}
	_, err := digest.Parse(string(t.Digest))
	return err
}

// ValidateTag reports whether tag can be the namespace of a cid: empty, or a
// repository name of the OCI distribution specification. Errors wrap
// [digest.ErrInvalid] and have the rule in them.
func ValidateTag(tag string) error {
	if tag == "" {
		return nil
	}
	const rule = "a tag is an OCI repository name: components of a-z and 0-9, joined within by \".\", \"_\", \"__\" " +
		"or dashes, separated by \"/\", 255 characters at most"
	if len(tag) > MaxTag {
		return fmt.Errorf("tag of %d characters starting %q: %w: %s", len(tag), tag[:16], digest.ErrInvalid, rule)
	}
	if tag == DefaultRepository {
		return fmt.Errorf("tag %q: %w: it is the registry's name for the empty tag: leave the tag out", tag,
			digest.ErrInvalid)
	}
	for component := range strings.SplitSeq(tag, "/") {
		if !isPathComponent(component) {
			return fmt.Errorf("tag %q: %w: %q is not a path component: %s", tag, digest.ErrInvalid, component, rule)
		}
	}
	return nil
}

// isPathComponent reports whether s matches [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*.
func isPathComponent(s string) bool {
	separator := "" // the run of separators that ends before s[i]
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
			if separator != "" && separator != "." && separator != "_" && separator != "__" &&
				strings.Trim(separator, "-") != "" {
				return false
			}
			separator = ""
		case (c == '.' || c == '_' || c == '-') && i > 0:
			separator += string(c)
		default:
			return false
		}
	}
	return s != "" && separator == ""
}
