package integration

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/digest"
)

var (
	crashCycles = flag.Int("crash.cycles", 10, "how many times TestCrash kills the daemon")
	crashSeed   = flag.Uint64("crash.seed", 0, "seed of TestCrash; 0 takes a new one")
)

// logSeed returns the seed of a run, and logs how to have the same again.
func logSeed(t *testing.T) uint64 {
	seed := *crashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-crash.seed=%d", seed)
	return seed
}

// TestCrash kills the daemon with SIGKILL at random moments of imports,
// deletes and exports, again and again on one data directory. After every
// start, what was acknowledged is there and right, what was not is there whole
// or not at all, nothing is left in ingest/, and no export has made a part of a file.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	seed := logSeed(t)
	random := rand.New(rand.NewPCG(seed, 0))
	home := tempHome(t)
	var tags []*crashTag
	for _, name := range []string{"digests/a", "digests/b", "names/a", "names/b"} {
		tags = append(tags, &crashTag{
			tag: name, named: strings.HasPrefix(name, "names"), out: t.TempDir(),
			random: rand.New(rand.NewPCG(seed, uint64(len(tags)+1))),
			held:   map[string]int{},
		})
	}
	done := map[string]int{}
	life := 60 * time.Millisecond
	for cycle := 0; cycle < *crashCycles || len(done) < len(crashOps) && cycle < 4*(*crashCycles); cycle++ {
		d := startDaemon(t, home)
		requireNoIngest(t, filepath.Join(home, "data"))
		store := d.dial(t)
		for _, tag := range tags {
			tag.check(t, store)
		}
		if t.Failed() {
			t.Fatalf("in cycle %d", cycle)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var working sync.WaitGroup
		for _, tag := range tags {
			working.Go(func() { tag.work(t, ctx, store) })
		}
		<-time.After(time.Duration(random.Int64N(int64(life))))
		d.stop(t, syscall.SIGKILL)
		cancel()
		working.Wait()
		store.Close()
		acknowledged := 0
		for _, tag := range tags {
			tag.checkOutputs(t)
			for op, n := range tag.done {
				done[op] += n
				acknowledged += n
			}
			tag.done = nil
		}
		if acknowledged == 0 {
			life = longerLife(life)
		}
		if cycle%20 == 19 || cycle >= *crashCycles-1 {
			// Opening the store cleans up; then everything has to be right.
			startDaemon(t, home).stop(t, syscall.SIGTERM)
			requireFsck(t, home)
		}
		if t.Failed() {
			t.Fatalf("in cycle %d", cycle)
		}
	}
	t.Logf("acknowledged: %v", done)
	for _, op := range crashOps {
		if done[op] == 0 {
			t.Errorf("no %s was ever acknowledged: the test tests nothing", op)
		}
	}
}

// crashOps are the operations of TestCrash, each of which has to succeed once
// for the test to mean something.
var crashOps = []string{"import", "delete", "export"}

// longerLife returns how long a daemon may live in the next cycles, after one
// in which it acknowledged nothing: a slow machine gets the time that it needs.
func longerLife(life time.Duration) time.Duration { return min(2*life, 10*time.Second) }

// crashContents is what is imported: few files, so that tags share blobs.
var crashContents = func() (all [][]byte) {
	for i, size := range []int{0, 1, 4000, 70_000, 200_000, 1 << 20, 5 << 20} {
		all = append(all, content(size, uint64(i)))
	}
	return all
}()

// crashTag is one tag, worked on by one goroutine, and what is known of it.
type crashTag struct {
	tag    string
	named  bool // whether its cids are cache IDs
	out    string
	random *rand.Rand
	held   map[string]int // cid -> index into crashContents
	doubt  *crashDoubt    // what was under way when the daemon was killed
	done   map[string]int
}

// crashDoubt is an operation that may have happened or not.
type crashDoubt struct {
	cid    string
	before int // -1: not there
	after  int
}

func (c *crashTag) get(cid string) int {
	if i, ok := c.held[cid]; ok {
		return i
	}
	return -1
}

func (c *crashTag) set(cid string, i int) {
	if i < 0 {
		delete(c.held, cid)
	} else {
		c.held[cid] = i
	}
}

// work does random things until the daemon is gone.
func (c *crashTag) work(t *testing.T, ctx context.Context, store *blobstore.Store) {
	r := repository(t, store, c.tag)
	c.done = map[string]int{}
	for n := 0; ctx.Err() == nil; n++ {
		i := c.random.IntN(len(crashContents))
		cid := string(digest.SHA256.FromBytes(crashContents[i]))
		if c.named {
			cid = fmt.Sprintf("v%d", c.random.IntN(4))
		}
		before := c.get(cid)
		var err error
		op := []string{"import", "import", "delete", "export"}[c.random.IntN(4)]
		switch op {
		case "import":
			c.doubt = &crashDoubt{cid, before, i}
			_, err = r.Import(ctx, cid, bytes.NewReader(crashContents[i]),
				blobstore.ImportOptions{Title: fmt.Sprintf("file%d", i)})
		case "delete":
			c.doubt = &crashDoubt{cid, before, -1}
			_, err = r.Remove(ctx, cid, blobstore.DeleteOptions{})
		case "export":
			_, err = r.ExportFile(ctx, cid, filepath.Join(c.out, fmt.Sprintf("%d-%d", before, n)),
				blobstore.ExportOptions{})
		}
		if errors.Is(err, blobstore.ErrNotFound) && before < 0 {
			err = nil // as it should be
		}
		if err != nil {
			if !errors.Is(err, blobstore.ErrUnavailable) && !errors.Is(err, context.Canceled) {
				t.Errorf("%s %s under %s: %v", op, cid, c.tag, err)
			}
			return
		}
		if c.doubt != nil {
			c.set(cid, c.doubt.after)
			c.doubt = nil
		}
		c.done[op]++
	}
}

// check compares what the store has with what is known.
func (c *crashTag) check(t *testing.T, store *blobstore.Store) {
	r := repository(t, store, c.tag)
	got := map[string]int{}
	tasks := map[digest.Digest]bool{}
	for e, err := range r.List(t.Context()) {
		if err != nil {
			t.Errorf("list %s: %v", c.tag, err)
			return
		}
		if e.Name != "" || !c.named {
			cid := e.Name
			if !c.named {
				cid = string(e.Task.Digest)
			}
			got[cid] = c.contentOf(t, r, cid)
		}
		if e.Name == "" {
			tasks[e.Task.Digest] = true
		}
	}
	if c.doubt != nil {
		if now, ok := got[c.doubt.cid]; ok && now == c.doubt.after || !ok && c.doubt.after < 0 {
			c.set(c.doubt.cid, c.doubt.after)
		}
		c.doubt = nil
	}
	if !maps.Equal(got, c.held) {
		t.Errorf("%s has %v, acknowledged were %v", c.tag, got, c.held)
	}
	// Nothing else may be there: each artifact has a manifest, a layer, and the config they share.
	layers := map[int]bool{}
	for _, i := range c.held {
		layers[i] = true
	}
	want := len(layers)
	if c.named && len(layers) > 0 {
		want = 2*len(layers) + 1
	}
	if len(tasks) != want {
		t.Errorf("%s has %d tasks, want %d: %v", c.tag, len(tasks), want, slices.Collect(maps.Keys(tasks)))
	}
}

// contentOf returns which content a cid has, all of it.
func (c *crashTag) contentOf(t *testing.T, r *blobstore.Repository, cid string) int {
	var out bytes.Buffer
	if _, err := r.Export(t.Context(), cid, &out, blobstore.ExportOptions{}); err != nil {
		t.Errorf("export %s under %s: %v", cid, c.tag, err)
	}
	i := slices.IndexFunc(crashContents, func(data []byte) bool { return bytes.Equal(data, out.Bytes()) })
	if i < 0 {
		t.Errorf("%s under %s has %d bytes that nobody imported", cid, c.tag, out.Len())
	}
	return i
}

// checkOutputs looks at every file that exports have made, and removes it.
func (c *crashTag) checkOutputs(t *testing.T) {
	files, err := os.ReadDir(c.out)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := filepath.Join(c.out, f.Name())
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var i, n int
		if _, err := fmt.Sscanf(f.Name(), "%d-%d", &i, &n); err != nil || i < 0 ||
			!bytes.Equal(data, crashContents[i]) {
			t.Errorf("output %s has %d bytes that are not what was exported", f.Name(), len(data))
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}
