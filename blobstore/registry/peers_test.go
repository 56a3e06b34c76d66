package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/blobstore/registry"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// eachPeer runs a test against a registry whose store has a peer, in this process
// and behind a socket. theirs is the peer's own registry.
func eachPeer(t *testing.T, test func(s *server, e *peertest.Engine, theirs *server)) {
	for name, engine := range map[string]func(*testing.T, *peertest.Engine) p2p.Engine{
		"Open": func(_ *testing.T, e *peertest.Engine) p2p.Engine { return e },
		"Dial": func(t *testing.T, e *peertest.Engine) p2p.Engine {
			c, err := rpc.Dial(t.Context(), peertest.Serve(t, e))
			if err != nil {
				t.Fatal(err)
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := peertest.New(t)
			test(startOn(t, blobstore.New(engine(t, e)), registry.Options{}), e,
				startOn(t, blobstore.New(e.Peer), registry.Options{}))
		})
	}
}

// skewed is an engine with a peer whose clock is wrong.
type skewed struct {
	*peertest.Engine
	ahead time.Duration
}

func (e *skewed) Peers(context.Context) ([]p2p.Peer, error) {
	return []p2p.Peer{{ID: "12D3KooWA", State: p2p.PeerConnected, Ahead: e.ahead}}, nil
}

// A client that moves a tag is warned where the clocks of hosts differ, in the header that clients print.
func TestClockWarning(t *testing.T) {
	e := &skewed{Engine: peertest.New(t)}
	s := startOn(t, blobstore.New(e), registry.Options{})
	manifest := s.image("a", nil, content(1000, 1))
	for ahead, want := range map[time.Duration]string{
		time.Second:      "",
		-5 * time.Minute: `299 - "the clock of peer 12D3KooWA is 5m0s behind that of this host (1 of 1 peers differ by more than 5s): keep clocks in step, and see 'dfcache peers'"`,
	} {
		e.ahead = ahead
		if got := s.do("PUT", "/v2/a/manifests/v1", manifest,
			"Content-Type", ocispec.MediaTypeImageManifest).header.Get("Warning"); got != want {
			t.Errorf("%s: the warning is %s, want %s", ahead, got, want)
		}
	}
}

// What was pushed to one host is pulled from another, and is there from then on.
func TestPullThrough(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
		data := content(300_000, 1)
		manifest := theirs.image("a", nil, data)
		d, m := digest.SHA256.FromBytes(data), theirs.pushManifest("a", "v1", manifest)

		s.do("HEAD", "/v2/a/manifests/v1", nil).want(http.StatusOK, "Docker-Content-Digest", m.String())
		s.do("HEAD", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK, "Content-Length", size(data))
		s.do("GET", "/v2/a/tags/list", nil).fails(http.StatusNotFound, "NAME_UNKNOWN") // nothing was kept
		for range 2 {
			s.do("GET", "/v2/a/manifests/v1", nil).want(http.StatusOK, "Docker-Content-Digest", m.String()).content(
				manifest)
			s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(
				http.StatusOK, "Content-Length", size(data), "Docker-Content-Digest", d.String()).content(data)
			s.do("GET", "/v2/a/blobs/"+digest.SHA256.FromString("{}").String(), nil).want(http.StatusOK)
			e.Part() // the second time nobody has to be asked
		}
		s.do("GET", "/v2/a/tags/list", nil).lists("tags", "v1")
	})
}

// A blob is sent from its first piece on, and a part of it as soon as that is there.
func TestGetWhileItComes(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
		data := content(5*digest.MinPieceLength, 1)
		d := theirs.pushBlob("a", data)
		released := make(chan struct{})
		e.Piece = func(ctx context.Context, _ digest.Digest, i int) error {
			if i < 3 {
				return nil
			}
			select {
			case <-released:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		part := s.do("GET", "/v2/a/blobs/"+d.String(), nil,
			"Range", fmt.Sprintf("bytes=%d-%d", digest.MinPieceLength, 2*digest.MinPieceLength-1))
		part.want(http.StatusPartialContent, "Content-Length", itoa(digest.MinPieceLength)).content(
			data[digest.MinPieceLength : 2*digest.MinPieceLength])

		resp, err := s.http.Client().Get(s.http.URL + "/v2/a/blobs/" + d.String())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(data)) {
			t.Errorf("status %d, %d bytes", resp.StatusCode, resp.ContentLength)
		}
		first := make([]byte, 2*digest.MinPieceLength)
		if _, err := io.ReadFull(resp.Body, first); err != nil || !bytes.Equal(first, data[:len(first)]) {
			t.Errorf("the first pieces: %v", err)
		}
		close(released)
		rest, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(rest, data[len(first):]) {
			t.Errorf("%d bytes more, %v", len(rest), err)
		}
	})
}

// What was sent before the whole is proven is cut off where the proof fails, and
// where the fetch breaks.
func TestGetIsCutOff(t *testing.T) {
	for name, fail := range map[string]func(e *peertest.Engine, d digest.Digest){
		"proof": func(e *peertest.Engine, d digest.Digest) { e.Lies[d] = 1 },
		"fetch": func(e *peertest.Engine, _ digest.Digest) {
			broken := false
			e.Piece = func(_ context.Context, _ digest.Digest, i int) error {
				if broken || i < 3 {
					return nil
				}
				broken = true
				return fmt.Errorf("every peer is gone: %w", p2p.ErrUnreachable)
			}
		},
	} {
		for _, length := range []int{5 * digest.MinPieceLength, digest.MinPieceLength / 2, 1} {
			if name == "fetch" && length < 4*digest.MinPieceLength {
				continue
			}
			t.Run(fmt.Sprintf("%s of %d bytes", name, length), func(t *testing.T) {
				eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
					data := content(length, 1)
					d := theirs.pushBlob("a", data)
					fail(e, d)
					a, err := s.try("GET", "/v2/a/blobs/"+d.String(), nil)
					switch {
					case err != nil: // cut off before the header
					case a.status != http.StatusOK: // nothing was sent yet
						if bytes.Contains(a.body, data) {
							t.Error("the error has the content in it")
						}
					case a.err == nil || len(a.body) == len(data):
						t.Errorf("the client got %d bytes of %d, and %v", len(a.body), len(data), a.err)
					}
					s.log.wait(t, func(r record) bool {
						return r.level == slog.LevelWarn && r.attrs["path"] == "/v2/a/blobs/"+d.String()
					})
					s.do("GET", "/v2/a/blobs/"+d.String(), nil).want(http.StatusOK).content(data)
				})
			})
		}
	}
}

// A host on its own says that it has not got what it does not have, and takes what
// is pushed. Its operator is told why.
func TestNoPeer(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, _ *server) {
		e.Part()
		d := digest.SHA256.FromString("x").String()
		s.do("HEAD", "/v2/a/blobs/"+d, nil).fails(http.StatusNotFound, "")
		s.do("GET", "/v2/a/blobs/"+d, nil).fails(http.StatusNotFound, "BLOB_UNKNOWN").contains("no peer could be asked")
		s.do("GET", "/v2/a/manifests/v1", nil).fails(http.StatusNotFound, "MANIFEST_UNKNOWN").contains(
			"no peer could be asked")
		s.log.wait(t, func(r record) bool {
			return r.level == slog.LevelWarn && r.attrs["status"] == "404" &&
				strings.Contains(r.attrs["error"], p2p.ErrUnreachable.Error())
		})
		s.pushManifest("a", "v1", s.image("a", nil, []byte("layer")))
		s.do("GET", "/v2/a/referrers/"+d, nil).want(http.StatusOK, "Content-Type", ocispec.MediaTypeImageIndex)
	})
}

// A client does not push what it was told is in the network; the manifest is
// taken all the same, and what it refers to is here then.
func TestPushOfWhatPeersHave(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
		layer := content(200_000, 1)
		manifest := theirs.image("a", nil, layer)
		s.do("HEAD", "/v2/a/blobs/"+digest.SHA256.FromBytes(layer).String(), nil).want(http.StatusOK)
		// Mounts and uploads are about what is here.
		a := s.do("POST", "/v2/b/blobs/uploads/?from=a&mount="+digest.SHA256.FromBytes(layer).String(), nil).want(
			http.StatusAccepted)
		s.do("DELETE", a.header.Get("Location"), nil).want(http.StatusNoContent)
		s.pushManifest("a", "v2", manifest)
		e.Part()
		s.do("GET", "/v2/a/blobs/"+digest.SHA256.FromBytes(layer).String(), nil).want(http.StatusOK).content(layer)
	})
}

func TestReferrersOfPeers(t *testing.T) {
	eachPeer(t, func(s *server, e *peertest.Engine, theirs *server) {
		subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest,
			Digest: digest.SHA256.FromString("subject"), Size: 7}
		m := theirs.pushManifest("a", "v1", theirs.image("a", func(m *ocispec.Manifest) { m.Subject = &subject }))
		for _, part := range []bool{false, true} {
			if part {
				e.Part()
			}
			a := s.do("GET", "/v2/a/referrers/"+subject.Digest.String(), nil).want(http.StatusOK)
			if !bytes.Contains(a.body, []byte(m)) {
				t.Errorf("referrers are %s", a.body)
			}
		}
		if calls := e.Calls("referrers"); calls != 2 {
			t.Errorf("the peer was asked %d times", calls)
		}
	})
}
