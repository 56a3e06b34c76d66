package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/p2p"
)

const (
	// maxList is the number of tags or repositories in one answer.
	maxList = 10_000
	// maxIndex is the size in bytes of an answer with referrers, unless a
	// single one is larger: clients read no more.
	maxIndex = 4 << 20
)

// defaultName is what a registry calls the repository of the empty tag.
var defaultName = blobstore.RepositoryName("")

// errEnough ends a list.
var errEnough = errors.New("enough")

// listSize reads how many entries a client wants.
func listSize(r *request) (int, error) {
	query := r.URL.Query()
	if !query.Has("n") {
		return maxList, nil
	}
	n, ok := parseNumber(query.Get("n"))
	if !ok {
		return 0, newProblem(http.StatusBadRequest, codeUnsupported, "n is %.40q: want the number of entries",
			query.Get("n"))
	}
	return int(min(n, maxList)), nil
}

// collect returns the first n of what list gives page by page, and whether
// there are more.
func collect(n int, list func(fn func([]string) error) error) (all []string, more bool, err error) {
	if n == 0 {
		return nil, false, nil
	}
	err = list(func(page []string) error {
		all = append(all, page...)
		if len(all) > n {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return all[:n], true, nil
	}
	return all, false, err
}

// linkNext says where the list goes on.
func (w *response) linkNext(r *request, query url.Values) {
	next := url.URL{Path: r.URL.Path, RawQuery: query.Encode()}
	w.Header().Set("Link", "<"+next.String()+`>; rel="next"`)
}

func (w *response) linkAfter(r *request, n int, last string) {
	w.linkNext(r, url.Values{"n": {strconv.Itoa(n)}, "last": {last}})
}

// tags lists the tags of a repository.
func (h *Handler) tags(w *response, r *request) error {
	n, err := listSize(r)
	if err != nil {
		return err
	}
	last := r.URL.Query().Get("last")
	tags, more, err := collect(n, func(fn func([]string) error) error { return r.repo.Tags(r.Context(), last, fn) })
	if err != nil {
		return err
	}
	if len(tags) == 0 {
		if err := checkHolds(r); err != nil {
			return err
		}
	}
	if more {
		w.linkAfter(r, n, tags[n-1])
	}
	return h.sendValue(w, r, struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{r.name, append([]string{}, tags...)})
}

// checkHolds fails where the repository holds nothing: there is no other way
// for a registry's client to hear that a name is wrong.
func checkHolds(r *request) error {
	if found, err := holds(r.Context(), r.repo); found || err != nil {
		return err
	}
	return newProblem(http.StatusNotFound, codeNameUnknown, "repository %s holds nothing", r.name)
}

// holds reports whether a repository has something besides blobs that wait for their manifest, which may never
// come.
func holds(ctx context.Context, repo *blobstore.Repository) (bool, error) {
	for e, err := range repo.List(ctx) {
		if err != nil || e.Name != "" || e.IsManifest || e.Keep != p2p.KeepUntilReferred {
			return err == nil, err
		}
	}
	return false, nil
}

// catalog lists the repositories.
func (h *Handler) catalog(w *response, r *request) error {
	n, err := listSize(r)
	if err != nil {
		return err
	}
	last := r.URL.Query().Get("last")
	var names []string
	var more bool
	if n > 0 {
		if names, more, err = h.repositories(r.Context(), n, last); err != nil {
			return err
		}
	}
	if more {
		w.linkAfter(r, n, names[len(names)-1])
	}
	return h.sendValue(w, r, struct {
		Repositories []string `json:"repositories"`
	}{append([]string{}, names...)})
}

// repositories returns the names of the first n repositories after last, and
// whether there are more. The empty tag is the first of all tags, and its name
// has another place.
func (h *Handler) repositories(ctx context.Context, n int, last string) (names []string, more bool, err error) {
	names, more, err = collect(n+1, func(fn func([]string) error) error {
		return h.store.Repositories(ctx, last, func(tags []string) error {
			var page []string
			for _, tag := range tags {
				if found, err := h.holds(ctx, tag); err != nil {
					return err
				} else if found {
					page = append(page, tag)
				}
			}
			return fn(page)
		})
	})
	if err != nil {
		return nil, false, err
	}
	if len(names) > 0 && names[0] == "" {
		names = names[1:]
	}
	if last < defaultName {
		found, err := h.holds(ctx, "")
		if err != nil {
			return nil, false, err
		}
		if i, _ := slices.BinarySearch(names, defaultName); found && (i < len(names) || !more) {
			names = slices.Insert(names, i, defaultName)
		}
	}
	if len(names) > n {
		return names[:n], true, nil
	}
	return names, more, nil
}

// holds reports whether what is under a tag is a repository to be listed.
func (h *Handler) holds(ctx context.Context, tag string) (bool, error) {
	repo, err := h.store.Repository(tag)
	if err != nil {
		return false, err
	}
	return holds(ctx, repo)
}

// referrers lists the manifests whose subject a digest is, as an image index.
func (h *Handler) referrers(w *response, r *request) error {
	d, err := parseDigest(r.reference)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	artifactType, last := query.Get("artifactType"), query.Get("last")
	index := &document{h: h}
	defer index.close()
	const begin, end = `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[`, "]}"
	if _, err := io.WriteString(index, begin); err != nil {
		return err
	}
	var entry bytes.Buffer
	encoder := json.NewEncoder(&entry)
	encoder.SetEscapeHTML(false) // it would make text longer than it is in the manifest
	if err := h.acquire(r, h.indexes, 1); err != nil {
		return err
	}
	count, latest := 0, ""
	err = r.repo.Referrers(r.Context(), ocispec.Descriptor{Digest: d}, artifactType,
		func(page []ocispec.Descriptor) error {
			for _, referrer := range page {
				if referrer.Digest.String() <= last {
					continue
				}
				entry.Reset()
				if count > 0 {
					entry.WriteByte(',')
				}
				if err := encoder.Encode(referrer); err != nil {
					return err
				}
				if count > 0 && index.size+int64(entry.Len()+len(end)) > maxIndex {
					return errEnough
				}
				if _, err := entry.WriteTo(index); err != nil {
					return err
				}
				count, latest = count+1, referrer.Digest.String()
			}
			return nil
		})
	h.indexes.Release(1)
	if errors.Is(err, errEnough) {
		next := url.Values{"last": {latest}}
		if artifactType != "" {
			next.Set("artifactType", artifactType)
		}
		w.linkNext(r, next)
	} else if err != nil {
		return err
	}
	if _, err := io.WriteString(index, end); err != nil {
		return err
	}
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	return index.send(w, r, ocispec.MediaTypeImageIndex)
}

// sendValue answers with JSON.
func (h *Handler) sendValue(w *response, r *request, v any) error {
	document, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return h.sendDocument(w, r, "application/json", document)
}
