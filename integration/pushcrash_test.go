package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	orascontent "oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/dfcache/dfcache/p2p"
)

// TestPushCrash kills the daemon with SIGKILL at random moments of pushes and
// deletes, again and again on one data directory. After every start, all blobs
// and manifests that were acknowledged are there and can be pulled, what was
// deleted is gone, and nothing is left of the rest: when all is deleted, the
// data directory has no blob.
func TestPushCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	seed := logSeed(t)
	random := rand.New(rand.NewPCG(seed, 0))
	home := tempHome(t)
	var pushers []*pusher
	for i := range 3 {
		pushers = append(pushers, &pusher{
			name: fmt.Sprintf("push/%d", i), random: rand.New(rand.NewPCG(seed, uint64(i+1))),
			held: map[string]pushed{},
		})
	}
	var d *daemon
	defer func() { d.stop(t, syscall.SIGKILL) }() // where the test gives up
	cycles, done, life := max(4, *crashCycles/10), 0, 400*time.Millisecond
	for cycle := 0; cycle < cycles || done == 0 && cycle < 10*cycles; cycle++ {
		d = startDaemon(t, home)
		requireNoIngest(t, filepath.Join(home, "data"))
		for _, p := range pushers {
			p.check(t, p.repository(t, d))
		}
		if t.Failed() {
			t.Fatalf("in cycle %d", cycle)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var working sync.WaitGroup
		for _, p := range pushers {
			r := p.repository(t, d)
			working.Go(func() { p.work(t, ctx, r) })
		}
		<-time.After(time.Duration(random.Int64N(int64(life))))
		d.stop(t, syscall.SIGKILL)
		cancel()
		working.Wait()
		acknowledged := 0
		for _, p := range pushers {
			acknowledged += p.done
			p.done = 0
		}
		if acknowledged == 0 {
			life = longerLife(life)
		}
		done += acknowledged
	}
	d = startDaemon(t, home)
	for _, p := range pushers {
		r := p.repository(t, d)
		p.check(t, r)
		for _, a := range p.held {
			if err := r.Manifests().Delete(t.Context(), a.manifest); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d pushes and deletes were acknowledged", done)
	if done == 0 {
		t.Error("nothing was ever acknowledged: the test tests nothing")
	}
	// What is left are blobs of pushes that were interrupted before their manifest.
	store := d.dial(t)
	for e, err := range store.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Name != "" || e.Keep != p2p.KeepUntilReferred || e.IsManifest {
			t.Errorf("there is still %+v", e)
			continue
		}
		p := pusher{name: e.Task.Tag}
		if err := p.repository(t, d).Blobs().Delete(t.Context(),
			ocispec.Descriptor{Digest: e.Task.Digest}); err != nil {
			t.Error(err)
		}
	}
	store.Close()
	if left := d.blobs(t); len(left) > 0 {
		t.Errorf("when all is deleted these files are left: %v", left)
	}
	d.stop(t, syscall.SIGTERM)
	requireFsck(t, home)
}

// pusher is a client with a repository of its own, and what it knows is there.
type pusher struct {
	name   string
	random *rand.Rand
	held   map[string]pushed // by tag
	blobs  []ocispec.Descriptor
	doubt  *pushDoubt // what was under way when the daemon was killed
	pushes int        // that were tried
	layers int        // that were made
	done   int        // pushes and deletes that this cycle acknowledged
}

// pushed is an artifact that was acknowledged.
type pushed struct {
	manifest ocispec.Descriptor
	layers   []ocispec.Descriptor
}

// pushDoubt is an operation that may have happened or not.
type pushDoubt struct {
	tag     string
	deletes bool
	pushed
}

func (p *pusher) repository(t *testing.T, d *daemon) *remote.Repository {
	t.Helper()
	r, err := remote.NewRepository(d.host + "/" + p.name)
	if err != nil {
		t.Fatal(err)
	}
	r.PlainHTTP, r.Client = true, direct
	return r
}

// work pushes and deletes until the daemon is gone.
func (p *pusher) work(t *testing.T, ctx context.Context, r *remote.Repository) {
	for ctx.Err() == nil {
		var err error
		if tags := slices.Sorted(maps.Keys(p.held)); len(tags) > 3 && p.random.IntN(3) == 0 {
			err = p.delete(ctx, r, tags[p.random.IntN(len(tags))])
		} else {
			err = p.push(ctx, r)
		}
		if err != nil {
			if ctx.Err() == nil && !isConnection(err) {
				t.Errorf("%s: %v", p.name, err)
			}
			return
		}
		p.done++
	}
}

// isConnection reports whether an error is what a client sees of a daemon that
// is killed, not an answer of it.
func isConnection(err error) bool {
	text := err.Error()
	for _, part := range []string{"EOF", "connection re", "broken pipe", "server closed"} {
		if strings.Contains(text, part) {
			return true
		}
	}
	return false
}

func (p *pusher) delete(ctx context.Context, r *remote.Repository, tag string) error {
	a := p.held[tag]
	p.doubt = &pushDoubt{tag, true, a}
	if err := r.Manifests().Delete(ctx, a.manifest); err != nil {
		return err
	}
	delete(p.held, tag)
	p.doubt = nil
	return nil
}

// push pushes an artifact of layers that nothing else has.
func (p *pusher) push(ctx context.Context, r *remote.Repository) error {
	p.pushes++
	tag := fmt.Sprintf("v%d", p.pushes)
	var a pushed
	p.blobs = nil
	for range 1 + p.random.IntN(3) {
		p.layers++
		data := fmt.Appendf(content(p.random.IntN(300_000), uint64(p.layers)), "%s %d", p.name, p.layers)
		layer := orascontent.NewDescriptorFromBytes("application/octet-stream", data)
		if err := r.Blobs().Push(ctx, layer, bytes.NewReader(data)); err != nil {
			return err
		}
		p.blobs = append(p.blobs, layer)
		a.layers = append(a.layers, layer)
	}
	if err := r.Blobs().Push(ctx, ocispec.DescriptorEmptyJSON, strings.NewReader("{}")); err != nil {
		return err
	}
	manifest, err := manifestOf(a.layers)
	if err != nil {
		return err
	}
	a.manifest = orascontent.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, manifest)
	p.doubt = &pushDoubt{tag, false, a}
	if err := r.Manifests().PushReference(ctx, a.manifest, bytes.NewReader(manifest), tag); err != nil {
		return err
	}
	p.held[tag] = a
	p.doubt, p.blobs = nil, nil
	return nil
}

// check compares what the registry has with what is known.
func (p *pusher) check(t *testing.T, r *remote.Repository) {
	ctx := t.Context()
	if doubt := p.doubt; doubt != nil {
		_, err := r.Resolve(ctx, doubt.tag)
		switch {
		case err == nil:
			p.held[doubt.tag] = doubt.pushed
		case !errors.Is(err, errdef.ErrNotFound):
			t.Error(err)
		case doubt.deletes:
			delete(p.held, doubt.tag)
			for _, layer := range doubt.layers {
				if exists, err := r.Blobs().Exists(ctx, layer); exists || err != nil {
					t.Errorf("%s is half deleted: layer %s is there, %v", doubt.tag, layer.Digest, err)
				}
			}
		}
		p.doubt = nil
	}
	// Those that no manifest came for.
	for _, blob := range p.blobs {
		p.fetch(t, r, blob)
	}
	p.blobs = nil
	var tags []string
	if err := r.Tags(ctx, "", func(page []string) error { tags = append(tags, page...); return nil }); err != nil &&
		len(p.held) > 0 {
		t.Error(err)
	}
	if want := slices.Sorted(maps.Keys(p.held)); fmt.Sprint(tags) != fmt.Sprint(want) {
		t.Errorf("%s has the tags %v, acknowledged were %v", p.name, tags, want)
	}
	for tag, a := range p.held {
		manifest, err := r.Resolve(ctx, tag)
		if err != nil || !orascontent.Equal(manifest, a.manifest) {
			t.Errorf("%s leads to %v, want %v, %v", tag, manifest, a.manifest, err)
			continue
		}
		if _, err := orascontent.FetchAll(ctx, r, a.manifest); err != nil {
			t.Errorf("the manifest of %s: %v", tag, err)
		}
		for _, layer := range append(a.layers, ocispec.DescriptorEmptyJSON) {
			p.fetch(t, r, layer)
		}
	}
}

// fetch reads a blob, all of it.
func (p *pusher) fetch(t *testing.T, r *remote.Repository, blob ocispec.Descriptor) {
	if _, err := orascontent.FetchAll(t.Context(), r.Blobs(), blob); err != nil {
		t.Errorf("%s of %s was acknowledged: %v", blob.Digest, p.name, err)
	}
}
