package registry

import (
	"cmp"
	"errors"
	"net/http"
	"strings"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

// conditions are what a request says that it is to be answered for only (RFC 9110, section 13.1). The
// ETag of content is its digest, so they compare digests.
type conditions struct {
	match     *etags // If-Match
	noneMatch *etags // If-None-Match
}

// etags are a list of entity tags, or any.
type etags struct {
	any    bool
	strong map[string]bool // as they are, with the quotes
	weak   map[string]bool // without their W/
}

// parseConditions reads the conditions of a request. One that is malformed is an error, and has nothing.
func parseConditions(header http.Header) (c conditions, err error) {
	for _, one := range []struct {
		key  string
		list **etags
	}{{"If-Match", &c.match}, {"If-None-Match", &c.noneMatch}} {
		values := header.Values(one.key)
		if len(values) == 0 {
			continue
		}
		list, ok := parseETags(strings.Join(values, ","))
		if !ok {
			list = &etags{}
			err = newProblem(http.StatusBadRequest, codeUnsupported, "%s: %.80q is no list of entity tags: want "+
				"\"<digest>\" in quotes, as ETag has it, or *", one.key, values)
		}
		*one.list = list
	}
	return c, err
}

// parseETags reads a list of entity tags.
func parseETags(text string) (*etags, bool) {
	list := &etags{strong: map[string]bool{}, weak: map[string]bool{}}
	if strings.Trim(text, " \t") == "*" {
		list.any = true
		return list, true
	}
	for first := true; ; first = false {
		rest := strings.TrimLeft(text, ", \t") // elements of a list may be empty
		if rest == "" {
			return list, !first
		}
		if !first && !strings.Contains(text[:len(text)-len(rest)], ",") {
			return nil, false
		}
		text = rest
		into := list.strong
		if rest, weak := strings.CutPrefix(text, "W/"); weak {
			text, into = rest, list.weak
		}
		if text[:min(1, len(text))] != `"` {
			return nil, false
		}
		end := strings.IndexByte(text[1:], '"') + 2
		if end < 2 || strings.ContainsFunc(text[1:end-1], func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return nil, false
		}
		into[text[:end]] = true
		text = text[end:]
	}
}

// matches reports whether content of a digest is meant: by If-Match, a strong tag has to say so.
func (c conditions) matches(d digest.Digest) bool {
	return c.match == nil || d != "" && (c.match.any || c.match.strong[etag(d)])
}

// isKnown reports whether If-None-Match has the content of a digest.
func (c conditions) isKnown(d digest.Digest) bool {
	list := c.noneMatch
	return list != nil && d != "" && (list.any || list.strong[etag(d)] || list.weak[etag(d)])
}

// errCondition says that a condition does not hold.
func errCondition(d digest.Digest) error {
	is := "there is " + d.String()
	if d == "" {
		is = "there is nothing"
	}
	return newProblem(http.StatusPreconditionFailed, codeDenied,
		"the condition of the request (If-Match, If-None-Match) does not hold: %s", is)
}

// isAnswered answers a request to read content by its conditions, where these have it so.
func (w *response) isAnswered(r *request, d digest.Digest) (bool, error) {
	c, err := parseConditions(r.Header)
	switch {
	case !c.matches(d):
		return false, cmp.Or(err, errCondition(d))
	case c.isKnown(d): // one that is malformed knows nothing, and no harm is done
		w.Header().Del("Content-Length")
		w.WriteHeader(http.StatusNotModified)
		return true, nil
	}
	return false, nil
}

// maxMoved is how often a change is tried that others are faster than: each time the conditions are
// compared with what is there then.
const maxMoved = 10

// change makes a change of what a request's reference stands for, where the conditions of the request
// hold: in the transaction that makes it, it is still what they were compared with.
func (h *Handler) change(r *request, do func(*blobstore.Standing) error) error {
	c, err := parseConditions(r.Header)
	if err != nil {
		return err
	}
	if c == (conditions{}) {
		return do(nil)
	}
	for attempt := 1; ; attempt++ {
		standing, err := r.repo.Standing(r.Context(), r.reference)
		if err != nil {
			return err
		}
		if !c.matches(standing.Digest) || c.isKnown(standing.Digest) {
			return errCondition(standing.Digest)
		}
		if err = do(&standing); !errors.Is(err, blobstore.ErrMoved) || attempt == maxMoved {
			return err
		}
	}
}
