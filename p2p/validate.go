package p2p

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"time"

	"github.com/dfcache/dfcache/digest"
)

// What callers pass to an engine is checked by these where it comes in, once at each door: in an engine's
// methods, in those of a client, which is one, and where a daemon takes a request from the socket, as
// it can be of any client. Below the doors nothing is parsed again. So the same is refused with the same words.
// Errors wrap [digest.ErrInvalid].

const (
	// MaxMediaType is the longest media type in bytes.
	MaxMediaType = 255
	// MaxManifestRefs is how many others a manifest can refer to.
	MaxManifestRefs = 10_000
)

// ValidateRef reports whether tag and cid can name something.
func ValidateRef(tag string, cid digest.CID) error {
	if err := ValidateTag(tag); err != nil {
		return err
	}
	if cid.CacheID() != "" {
		return nil // only digest.ParseCID makes one
	}
	_, err := digest.ParseCID(cid.String())
	return err
}

// Validate reports whether there can be a Stat of cid under tag with these options.
func (o StatOptions) Validate(tag string, cid digest.CID) error {
	if err := ValidateRef(tag, cid); err != nil {
		return err
	}
	switch {
	case o.Scope < Network || o.Scope > Local:
		return fmt.Errorf("stat %s: %w: there is no scope %d", cid, digest.ErrInvalid, o.Scope)
	case o.Providers && o.Scope != Network:
		return fmt.Errorf("stat %s with its providers: %w: it goes with the network as the scope", cid,
			digest.ErrInvalid)
	}
	return nil
}

// Validate reports whether there can be a Delete of cid under tag with these options.
//
//nolint:cyclop // a list of rules
func (o DeleteOptions) Validate(tag string, cid digest.CID) error {
	if o.Expect != nil && (o.All || len(o.Also) > 0 || o.Unpin) {
		return fmt.Errorf("delete what is expected: %w: it goes with one cid", digest.ErrInvalid)
	}
	if o.All {
		if !cid.IsZero() || len(o.Also) > 0 || o.NameOnly || o.Unpin {
			return fmt.Errorf("delete all under tag %q: %w: no cid goes with that", tag, digest.ErrInvalid)
		}
		return ValidateTag(tag)
	}
	if len(o.Also) > MaxAlso {
		return fmt.Errorf("delete: %w: %d cids at once: want up to %d", digest.ErrInvalid, 1+len(o.Also), 1+MaxAlso)
	}
	for _, c := range o.Also {
		if err := (DeleteOptions{Force: o.Force, NameOnly: o.NameOnly}).Validate(tag, c); err != nil {
			return err
		}
	}
	if err := ValidateRef(tag, cid); err != nil {
		return err
	}
	switch {
	case o.NameOnly && cid.CacheID() == "":
		return fmt.Errorf("delete %s by name only: %w: a digest is not a name", cid, digest.ErrInvalid)
	case o.Unpin && len(o.Also) > 0:
		return fmt.Errorf("delete several cids, and the pin of one: %w: delete one at a time", digest.ErrInvalid)
	case o.Expect != nil && *o.Expect != "" && !isDigest(*o.Expect):
		return fmt.Errorf("delete %s: %w: what is expected is not a digest: %.80q", cid, digest.ErrInvalid, *o.Expect)
	case o.NameOnly && o.Force:
		return fmt.Errorf("delete %s by name only: %w: there is nothing to force", cid, digest.ErrInvalid)
	}
	return nil
}

// Validate reports whether there can be such a list.
func (q Query) Validate() error {
	if q.Kind < KindAll || q.Kind > KindPartials {
		return fmt.Errorf("list: %w: there is no kind %d of entries", digest.ErrInvalid, q.Kind)
	}
	if q.Tag != nil {
		if err := ValidateTag(*q.Tag); err != nil {
			return err
		}
	}
	for _, d := range []digest.Digest{q.Has, q.RefersTo} {
		if d != "" {
			if _, err := digest.Parse(string(d)); err != nil {
				return err
			}
		}
	}
	switch {
	case q.Kind == KindTags && q.Tag != nil:
		return fmt.Errorf("list tags: %w: of one tag there is nothing to list", digest.ErrInvalid)
	case len(q.After) > MaxTag:
		return fmt.Errorf("list after a name of %d bytes: %w: none has more than %d", len(q.After), digest.ErrInvalid,
			MaxTag)
	case q.Has != "" && q.Kind != KindTags:
		return fmt.Errorf("list the tags that have %s: %w: it goes with tags as the kind", q.Has, digest.ErrInvalid)
	case q.RefersTo != "" && (q.Tag == nil || q.Kind != KindAll):
		return fmt.Errorf("list what refers to %s: %w: it goes with a tag, and not with a kind", q.RefersTo,
			digest.ErrInvalid)
	}
	return nil
}

// Validate reports whether an Add can have these options.
func (o AddOptions) Validate() error {
	if o.Want != "" {
		if _, err := digest.Parse(string(o.Want)); err != nil {
			return err
		}
	}
	if o.Algorithm != "" {
		if _, err := digest.ParseAlgorithm(o.Algorithm.String()); err != nil {
			return err
		}
	}
	return nil
}

// HashWith returns the algorithm that the content is hashed with.
func (o AddOptions) HashWith() digest.Algorithm {
	if o.Want != "" {
		return o.Want.Algorithm()
	}
	return cmp.Or(o.Algorithm, digest.SHA256)
}

// Validate reports whether the commit is well-formed.
func (c Commit) Validate() error {
	for _, n := range c.Tasks {
		if err := n.Validate(); err != nil {
			return err
		}
	}
	for _, n := range c.Names {
		if err := n.Validate(); err != nil {
			return err
		}
	}
	for _, e := range c.Expect {
		if err := e.Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Validate reports whether this can be expected.
func (e Expectation) Validate() error {
	if err := ValidateRef(e.Tag, e.CID); err != nil {
		return err
	}
	if e.Digest != "" && !isDigest(e.Digest) {
		return fmt.Errorf("%s: %w: what is expected is not a digest: %.80q", Describe(e.Tag, e.CID), digest.ErrInvalid,
			e.Digest)
	}
	return nil
}

func isDigest(d digest.Digest) bool {
	_, err := digest.Parse(string(d))
	return err == nil
}

// Validate reports whether the task can be committed.
func (n NewTask) Validate() error {
	if err := n.Task.Validate(); err != nil {
		return err
	}
	if err := validateMediaType(n.MediaType); err != nil {
		return fmt.Errorf("task %s: %w", n.Task, err)
	}
	if n.Keep < KeepReferred || n.Keep > KeepPinned {
		return fmt.Errorf("task %s: %w: nothing is kept as %d", n.Task, digest.ErrInvalid, n.Keep)
	}
	if err := validateTime("origin", n.Origin); err != nil {
		return fmt.Errorf("task %s: %w", n.Task, err)
	}
	if n.Manifest != nil {
		if err := n.Manifest.validate(n.Task.Digest); err != nil {
			return fmt.Errorf("manifest %s: %w", n.Task, err)
		}
	}
	return nil
}

func (m *NewManifest) validate(own digest.Digest) error {
	if n := max(len(m.Refs), len(m.Needs)); n > MaxManifestRefs {
		return fmt.Errorf("%w: it refers to %d others, at most %d can be kept", digest.ErrInvalid, n, MaxManifestRefs)
	}
	refs := make(map[digest.Digest]bool, len(m.Refs))
	for _, d := range m.Refs {
		if _, err := digest.Parse(string(d)); err != nil {
			return err
		}
		refs[d] = true
	}
	for _, d := range m.Needs {
		if _, err := digest.Parse(string(d)); err != nil {
			return err
		}
		if !refs[d] {
			return fmt.Errorf("it needs %s: %w: it does not refer to it", d, digest.ErrInvalid)
		}
	}
	if m.Subject != "" {
		if _, err := digest.Parse(string(m.Subject)); err != nil {
			return err
		}
	}
	if refs[own] || m.Subject == own {
		return fmt.Errorf("%w: it refers to itself", digest.ErrInvalid)
	}
	return nil
}

// Validate reports whether the name can be committed.
func (n NewName) Validate() error {
	if err := (Task{n.Tag, n.Digest}).Validate(); err != nil {
		return err
	}
	cid, err := digest.ParseCID(n.Name)
	if err != nil {
		return err
	}
	if cid.CacheID() == "" {
		return fmt.Errorf("name %q: %w: a digest can't be the name of a task", n.Name, digest.ErrInvalid)
	}
	if err := validateMediaType(n.MediaType); err != nil {
		return fmt.Errorf("name %q: %w", n.Name, err)
	}
	if d := n.Description; d != nil && (len(d) > MaxDescription || !bytes.HasPrefix(d, []byte("{")) || !json.Valid(d)) {
		return fmt.Errorf("name %q: %w: its description is no object of JSON of at most %d bytes", n.Name,
			digest.ErrInvalid, MaxDescription)
	}
	return validateTime("name "+n.Name, n.Updated)
}

func validateTime(what string, t time.Time) error {
	if !t.IsZero() && t.Before(time.Unix(0, 0)) {
		return fmt.Errorf("%s: %w: it is before 1970", what, digest.ErrInvalid)
	}
	return nil
}

func validateMediaType(s string) error {
	if len(s) > MaxMediaType {
		return fmt.Errorf("media type: %w: it has %d characters, at most %d are allowed", digest.ErrInvalid, len(s),
			MaxMediaType)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return fmt.Errorf("media type %q: %w: it has a character outside printable ASCII", s, digest.ErrInvalid)
		}
	}
	return nil
}
