package integration

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/client"
	"github.com/dfcache/dfcache/digest"
)

var (
	powerCuts  = flag.Int("powercut.cuts", 5, "how often the power is cut on each file system")
	powerSteps = flag.Int("powercut.steps", 20, "how much each of those who work does before that")
	powerKinds = flag.String("powercut.fs", "ext4,xfs", "the file systems, of ext4, xfs and btrfs")
)

// TestPowerCut has the real programs work on a real file system, on a disk that records all
// writes and flushes. Then the power is cut at random moments of that: the disk has what
// was flushed until then, and any of the sectors that were written since. After each cut all that
// was acknowledged is there and right, what was deleted stays deleted, and nothing is
// left of the rest.
func TestPowerCut(t *testing.T) {
	seed := logSeed(t)
	for i, kind := range strings.Split(*powerKinds, ",") {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			cutPowerOf(t, kind, rand.New(rand.NewPCG(seed, uint64(i))))
		})
	}
}

func cutPowerOf(t *testing.T, kind string, random *rand.Rand) {
	disk := newRecordedDisk(t, newImage(t, kind))
	m := newMount(t)
	m.image = disk.file
	m.mount()
	data := filepath.Join(m.at, "data")
	if err := os.Mkdir(filepath.Join(m.dir, "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.run("sync")
	first := disk.position()
	home := tempHome(t)
	d := startDaemonWith(t, home, []string{"--data-dir", data}, m.enter...)
	var workers []*powerWorker
	var working sync.WaitGroup
	for i := range 2 {
		w := &powerWorker{
			t: t, name: fmt.Sprintf("worker/%d", i), disk: disk, mount: m,
			random: rand.New(rand.NewPCG(random.Uint64(), 0)), states: []map[string]int{{}},
		}
		workers = append(workers, w)
		working.Go(func() { w.work(d) })
	}
	working.Wait()
	d.stop(t, syscall.SIGTERM)
	m.unmount()
	if t.Failed() {
		return
	}
	last := slices.Max([]int{workers[0].ends[len(workers[0].ends)-1], workers[1].ends[len(workers[1].ends)-1]})
	t.Logf("%d writes and flushes, %d of them before work begins", last, first)
	m.image = filepath.Join(t.TempDir(), "cut")
	for i := range *powerCuts {
		at := first + random.IntN(last-first+1)
		if i == 0 {
			at = last
		}
		if err := disk.cut(m.image, at, random); err != nil {
			t.Fatal(err)
		}
		m.mount()
		requirePowered(t, m, data, workers, at)
		m.unmount()
		if t.Failed() {
			t.Fatalf("when the power is cut after write %d of %d", at, last)
		}
	}
}

// requirePowered fails the test unless on what is mounted, the disk after a power cut at a
// position, there is what has to be.
func requirePowered(t *testing.T, m *powerless, data string, workers []*powerWorker, position int) {
	t.Helper()
	home := tempHome(t)
	d := startDaemonWith(t, home, []string{"--data-dir", data}, m.enter...)
	requireNoIngest(t, filepath.Join(m.dir, "data"))
	store := d.dial(t)
	for _, w := range workers {
		w.check(t, store, position)
	}
	store.Close()
	d.stop(t, syscall.SIGTERM)
	fsck := exec.Command(m.enter[0], append(
		m.enter[1:], dfdaemon, "fsck", "--data-dir", data, "--config", os.DevNull)...)
	fsck.Env = environ(home)
	if out, err := fsck.CombinedOutput(); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

// powerWorker does one thing after the other, and remembers what it was told.
type powerWorker struct {
	t      *testing.T
	name   string // of its repository
	disk   *recordedDisk
	mount  *powerless
	random *rand.Rand

	// What there is after so many steps, the first of which is nothing: names in the
	// repository and, with a slash before, exported files, and which content they have.
	states       []map[string]int
	begins, ends []int // where the disk was when a step began, and was acknowledged
}

// powerContents is what is stored: not much, so that the disk writes other things, too.
var powerContents = func() (all [][]byte) {
	for i, size := range []int{0, 1, 4000, 70_000, 200_000, 300_000} {
		all = append(all, content(size, uint64(1000+i)))
	}
	return all
}()

func (w *powerWorker) work(d *daemon) {
	store, err := client.Dial(context.Background(), d.socket)
	if err != nil {
		w.t.Error(err)
		return
	}
	defer store.Close()
	r, err := store.Repository(w.name)
	if err != nil {
		w.t.Error(err)
		return
	}
	for range *powerSteps {
		now := w.states[len(w.states)-1]
		next := map[string]int{}
		var names []string
		for name, c := range now {
			next[name] = c
			if !strings.HasPrefix(name, "/") {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		name, c := fmt.Sprintf("v%d", w.random.IntN(4)), w.random.IntN(len(powerContents))
		begin := w.disk.position()
		var err error
		switch do := w.random.IntN(10); {
		case do < 2 && len(names) > 0: // a delete
			name = names[w.random.IntN(len(names))]
			_, err = r.Remove(w.t.Context(), name, blobstore.DeleteOptions{})
			delete(next, name)
		case do < 4 && len(names) > 0: // an export
			name = names[w.random.IntN(len(names))]
			out := fmt.Sprintf("/out/%s.%d", strings.ReplaceAll(w.name, "/", "."), w.random.IntN(3))
			args := []string{"export", "-t", w.name, "-i", name, "-O", w.mount.at + out, "--overwrite"}
			if _, stderr, code := d.runWrapped(w.t, w.mount.enter, nil, args...); code != 0 {
				err = errors.New(stderr)
			}
			next[out] = next[name]
		case do < 7: // a push
			err = push(d.host, w.name, name, powerContents[c])
			next[name] = c
		default: // an import, by which a name may move
			_, err = r.Import(w.t.Context(), name, bytes.NewReader(powerContents[c]), blobstore.ImportOptions{})
			next[name] = c
		}
		if err != nil {
			w.t.Errorf("%s: %v", w.name, err)
			return
		}
		w.begins, w.ends = append(w.begins, begin), append(w.ends, w.disk.position())
		w.states = append(w.states, next)
	}
}

// push pushes an artifact of one file over HTTP.
func push(host, repository, tag string, data []byte) error {
	send := func(method, path, mediaType string, body []byte) error {
		req, err := http.NewRequest(method, "http://"+host+"/v2/"+repository+path, bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", mediaType)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if said, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusCreated {
			return fmt.Errorf("%s %s: %s %s %v", method, path, resp.Status, said, err)
		}
		return nil
	}
	config := []byte("{}")
	for _, blob := range [][]byte{config, data} {
		if err := send(http.MethodPost, "/blobs/uploads/?digest="+
			url.QueryEscape(digest.SHA256.FromBytes(blob).String()), "application/octet-stream", blob); err != nil {
			return err
		}
	}
	const kind = "application/vnd.oci.image.manifest.v1+json"
	manifest := fmt.Sprintf(
		`{"schemaVersion":2,"mediaType":%q,"artifactType":"application/x","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},`+
			`"layers":[{"mediaType":"application/octet-stream","digest":%q,"size":%d}]}`, kind, digest.SHA256.FromBytes(
			config), digest.SHA256.FromBytes(data), len(data))
	return send(http.MethodPut, "/manifests/"+tag, kind, []byte(manifest))
}

// check compares what is there after a power cut with what has to be.
func (w *powerWorker) check(t *testing.T, store *blobstore.Store, position int) {
	t.Helper()
	steps := 0 // that were acknowledged
	for steps < len(w.ends) && w.ends[steps] <= position {
		steps++
	}
	may := []map[string]int{w.states[steps]}
	if steps < len(w.begins) && w.begins[steps] < position {
		may = append(may, w.states[steps+1]) // it was under way
	}
	r := repository(t, store, w.name)
	all := map[string]bool{}
	for _, state := range may {
		for name := range state {
			all[name] = true
		}
	}
	for i := range 4 {
		all[fmt.Sprintf("v%d", i)] = true
	}
	for name := range all {
		var got []byte
		var err error
		if strings.HasPrefix(name, "/") {
			got, err = os.ReadFile(w.mount.dir + name)
		} else {
			got, err = readWhole(t.Context(), r, name)
		}
		absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, blobstore.ErrNotFound)
		if err != nil && !absent {
			t.Errorf("%s %s: %v", w.name, name, err)
			continue
		}
		right := slices.ContainsFunc(may, func(state map[string]int) bool {
			c, there := state[name]
			return there == !absent && (absent || bytes.Equal(got, powerContents[c]))
		})
		if !right {
			t.Errorf("%s %s: there are %d bytes (%v), which is none of what may be after %d steps", w.name, name,
				len(got), err, steps)
		}
	}
}

func readWhole(ctx context.Context, r *blobstore.Repository, name string) ([]byte, error) {
	f, err := r.Open(ctx, name, blobstore.Lookup{Local: true})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}
