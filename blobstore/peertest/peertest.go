// Package peertest has an engine with a peer that a test has in its hand: what is
// only there comes piece by piece, when and as the test wants it. It stands in
// for a swarm where the subject is what is built on top of one.
//
// It promises no compatibility.
package peertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p"
	"github.com/dfcache/dfcache/p2p/manifest"
	"github.com/dfcache/dfcache/p2p/pieces"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// PeerID and Address are what the peer is called.
const (
	PeerID  = "12D3KooWPeer"
	Address = "10.0.0.7:4001"
)

// Engine is a store and a peer's. Its fields are set before it is used.
type Engine struct {
	*pieces.Store               // this host's
	Peer          *pieces.Store // what the peer has

	// Piece, where it is not nil, is called before piece i of d comes. Its error
	// is that of the download.
	Piece func(ctx context.Context, d digest.Digest, i int) error
	// Lies is how often the proof of a download fails.
	Lies map[digest.Digest]int
	// HoldError is the error of a HoldManifest that brings something here.
	HoldError error

	dir string

	mu    sync.Mutex
	alone bool
	calls map[string]int
}

var _ p2p.Engine = (*Engine)(nil)

// New returns an engine and a peer that are empty. They are closed when the test ends.
func New(t testing.TB) *Engine {
	t.Helper()
	e := &Engine{dir: t.TempDir(), Lies: map[digest.Digest]int{}, calls: map[string]int{}}
	for name, s := range map[string]**pieces.Store{"here": &e.Store, "peer": &e.Peer} {
		store, err := pieces.Open(filepath.Join(e.dir, name), pieces.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		*s = store
	}
	return e
}

// Serve serves an engine at a socket until the test ends, and returns its path.
func Serve(t testing.TB, e p2p.Engine) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "run", "s")
	l, err := rpc.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	server := rpc.NewServer(e, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Shutdown(context.Background()), <-served); err != nil {
			t.Error(err)
		}
	})
	return socket
}

// Damage flips a bit of a blob on this host.
func (e *Engine) Damage(t testing.TB, d digest.Digest, off int64) {
	t.Helper()
	path := filepath.Join(e.dir, "here", "blobs", d.Algorithm().String(), d.Encoded())
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[off] ^= 1
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, data, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// Part makes it so that no peer can be asked.
func (e *Engine) Part() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.alone = true
}

// Calls returns how often this was called since the last time it was asked:
// "stat", "open", "mend" and "referrers" count those that asked the peer.
func (e *Engine) Calls(what string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := e.calls[what]
	e.calls[what] = 0
	return n
}

// ask notes a call that asks the peer.
func (e *Engine) ask(what, name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls[what]++
	if e.alone {
		return fmt.Errorf("%s: %w", name, p2p.ErrUnreachable)
	}
	return nil
}

// Stat implements [p2p.Engine].
func (e *Engine) Stat(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	return e.stat(ctx, tag, cid, opts, false)
}

// HoldManifest implements [p2p.Holder].
func (e *Engine) HoldManifest(ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions) (p2p.Info, error) {
	opts.Manifest, opts.Scope = true, p2p.Network
	return e.stat(ctx, tag, cid, opts, true)
}

func (e *Engine) stat(
	ctx context.Context, tag string, cid digest.CID, opts p2p.StatOptions, hold bool,
) (info p2p.Info, err error) {
	local := opts
	local.Providers = false
	info, err = e.Store.Stat(ctx, tag, cid, local)
	if opts.Scope == p2p.Local {
		return info, err
	}
	if opts.Providers {
		providers := &p2p.Providers{Asked: 3, Silent: 1}
		if e.ask("stat", p2p.Describe(tag, cid)) != nil {
			providers = &p2p.Providers{}
		} else if _, err := e.Peer.Stat(ctx, tag, cid, local); err == nil {
			providers.Some, providers.Whole = 2, 1
		}
		defer func() { info.Providers = providers }()
	}
	if !errors.Is(err, p2p.ErrNotFound) && !errors.Is(err, digest.ErrCorrupt) {
		return info, err
	}
	if damage := err; errors.Is(damage, digest.ErrCorrupt) {
		defer func() {
			if errors.Is(err, p2p.ErrNotFound) || errors.Is(err, p2p.ErrUnreachable) {
				err = damage
			}
		}()
	}
	if err := e.ask("stat", p2p.Describe(tag, cid)); err != nil {
		return p2p.Info{}, err
	}
	if info, err = e.Peer.Stat(ctx, tag, cid, local); err != nil {
		return p2p.Info{}, err
	}
	if hold && e.HoldError != nil {
		return p2p.Info{}, e.HoldError
	}
	if hold {
		var names []p2p.NewName
		if name := cid.CacheID(); name != "" {
			names = []p2p.NewName{{Tag: tag, Name: name, Digest: info.Task.Digest, Updated: time.Now(), KeepOld: true}}
		}
		return info, e.keep(ctx, info, info.Manifest.Content, names...)
	}
	remote(&info)
	if info.Manifest != nil {
		for i, ref := range info.Manifest.Refs {
			here, err := e.Store.Stat(ctx, tag, digest.FromDigest(ref.Task.Digest), p2p.StatOptions{Scope: p2p.Local})
			if err == nil {
				info.Manifest.Refs[i] = here
			} else {
				remote(&info.Manifest.Refs[i])
			}
		}
	}
	return info, nil
}

// remote makes of what the peer says of itself what is known of the peer's.
func remote(info *p2p.Info) {
	info.Remote, info.Held, info.Imported, info.LastUsed = true, 0, time.Time{}, time.Time{}
}

// keep stores what the peer has.
func (e *Engine) keep(ctx context.Context, info p2p.Info, content []byte, names ...p2p.NewName) error {
	task := p2p.NewTask{Task: info.Task, MediaType: info.MediaType, Keep: p2p.KeepUntilReferred, Origin: info.Origin}
	if info.IsManifest {
		var err error
		if task.Manifest, err = manifest.Parse(info.MediaType, content); err != nil {
			return err
		}
	}
	in, err := e.Store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(bytes.NewReader(content), p2p.AddOptions{Want: info.Task.Digest}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{task}, Names: names})
}

// HoldReferrers implements [p2p.Holder].
func (e *Engine) HoldReferrers(ctx context.Context, task p2p.Task) error {
	if err := e.ask("referrers", task.String()); err != nil {
		return err
	}
	for entry, err := range e.Peer.List(ctx, p2p.Query{Tag: &task.Tag, RefersTo: task.Digest}) {
		var info p2p.Info
		if err == nil {
			info, err = e.Peer.Stat(ctx, entry.Task.Tag, digest.FromDigest(entry.Task.Digest),
				p2p.StatOptions{Manifest: true})
		}
		if err == nil {
			err = e.keep(ctx, info, info.Manifest.Content)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Replicate implements [p2p.Peering]: there is one peer.
func (e *Engine) Replicate(ctx context.Context, tag string, cid digest.CID, n int) ([]string, error) {
	if err := e.ask("replicate", cid.String()); err != nil {
		return nil, err
	}
	if n > 1 {
		return nil, fmt.Errorf("1 of %d peers has it: %w", n, p2p.ErrUnreachable)
	}
	return []string{PeerID}, nil
}

// Peers implements [p2p.Peering].
func (e *Engine) Peers(context.Context) ([]p2p.Peer, error) {
	return []p2p.Peer{{ID: PeerID, Addresses: []string{Address}, State: p2p.PeerConnected}}, nil
}

// Open implements [p2p.Engine].
func (e *Engine) Open(ctx context.Context, task p2p.Task, scope p2p.Scope) (p2p.Blob, error) {
	here, err := e.Store.Open(ctx, task, scope)
	if scope == p2p.Local || !errors.Is(err, p2p.ErrNotFound) {
		return here, err
	}
	if err := e.ask("open", task.String()); err != nil {
		return nil, err
	}
	info, err := e.Peer.Stat(ctx, task.Tag, digest.FromDigest(task.Digest), p2p.StatOptions{})
	if err != nil {
		return nil, err
	}
	src, err := e.Peer.Open(ctx, task, p2p.Local)
	if err != nil {
		return nil, err
	}
	in, err := os.CreateTemp(e.dir, "arriving-")
	if err != nil {
		return nil, err
	}
	if err := in.Truncate(src.Size()); err != nil {
		return nil, err
	}
	out, err := os.Open(in.Name())
	if err != nil {
		return nil, err
	}
	table := &digest.Table{Digest: task.Digest, Size: info.Size, PieceLength: info.PieceLength,
		CRC: make([]uint32, info.Pieces)}
	b := &blob{
		engine: e, info: info, src: src, in: in, out: out, table: table,
		there: make([]bool, info.Pieces), changed: make(chan struct{}),
	}
	b.Verified = digest.NewArriving(out, table, b.await)
	var download context.Context
	download, b.cancel = context.WithCancel(ctx)
	b.running.Go(func() { b.finish(b.download(download)) })
	return b, nil
}

// Mend implements [p2p.Holder]: it imports again, from the peer, what is damaged here.
func (e *Engine) Mend(ctx context.Context, task p2p.Task) error {
	if err := e.ask("mend", task.String()); err != nil {
		return err
	}
	src, err := e.Peer.Open(ctx, task, p2p.Local)
	if err != nil {
		return err
	}
	defer src.Close()
	in, err := e.Store.Ingest(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.Add(io.NewSectionReader(src, 0, src.Size()), p2p.AddOptions{Want: task.Digest}); err != nil {
		return err
	}
	return in.Commit(p2p.Commit{Tasks: []p2p.NewTask{{Task: task, Keep: p2p.KeepUntilReferred}}})
}

// blob is one that comes from the peer.
type blob struct {
	*digest.Verified
	engine  *Engine
	info    p2p.Info
	src     p2p.Blob
	in, out *os.File
	table   *digest.Table
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	there   []bool
	order   []int         // in which pieces came
	changed chan struct{} // closed at the next change
	over    bool
	err     error
}

var _ p2p.ArrivingBlob = (*blob)(nil)

func (b *blob) download(ctx context.Context) error {
	for i := range b.there {
		if hook := b.engine.Piece; hook != nil {
			if err := hook(ctx, b.info.Task.Digest, i); err != nil {
				return err
			}
		}
		start, end := b.table.Bounds(i)
		piece := make([]byte, end-start)
		if _, err := b.src.ReadAt(piece, start); err != nil && err != io.EOF {
			return err
		}
		if _, err := b.in.WriteAt(piece, start); err != nil {
			return err
		}
		b.change(func() {
			b.table.CRC[i], b.there[i] = digest.CRC32C(piece), true
			b.order = append(b.order, i)
		})
	}
	b.engine.mu.Lock()
	lie := b.engine.Lies[b.info.Task.Digest] > 0
	if lie {
		b.engine.Lies[b.info.Task.Digest]--
	}
	b.engine.mu.Unlock()
	if lie {
		return fmt.Errorf("%s: %w", b.info.Task, digest.ErrMismatch)
	}
	content := make([]byte, b.info.Size)
	if _, err := b.in.ReadAt(content, 0); err != nil && err != io.EOF {
		return err
	}
	return b.engine.keep(ctx, b.info, content)
}

func (b *blob) change(do func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	do()
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *blob) finish(err error) { b.change(func() { b.over, b.err = true, err }) }

// until waits until ok, which is called with b.mu held, or the download is over.
func (b *blob) until(ctx context.Context, ok func() bool) error {
	for {
		b.mu.Lock()
		changed, over, err, enough := b.changed, b.over, b.err, ok()
		b.mu.Unlock()
		if over || enough {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (b *blob) await(ctx context.Context, i int) error {
	return b.until(ctx, func() bool { return b.there[i] })
}

// CopyRange implements [p2p.Blob].
func (b *blob) CopyRange(ctx context.Context, w io.Writer, off, n int64, progress func(int64)) error {
	if off != 0 || n != b.Size() {
		return b.Verified.CopyRange(ctx, w, off, n, progress)
	}
	return b.Verified.CopyWhole(ctx, w, func(ctx context.Context) error {
		return b.until(ctx, func() bool { return false })
	}, nil)
}

// Arrived implements [p2p.ArrivingBlob].
func (b *blob) Arrived(ctx context.Context) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		for next := 0; ; next++ {
			piece := -1
			if err := b.until(ctx, func() bool {
				if len(b.order) > next {
					piece = b.order[next]
				}
				return piece >= 0
			}); err != nil {
				yield(0, err)
				return
			}
			if piece < 0 || !yield(piece, nil) {
				return
			}
		}
	}
}

// Want implements [p2p.ArrivingBlob]. It does nothing: pieces come in order.
func (b *blob) Want(first, last int) {}

// File implements [p2p.FileBlob].
func (b *blob) File() *os.File { return b.out }

// Sources implements [p2p.Blob].
func (b *blob) Sources() []p2p.Source {
	b.mu.Lock()
	defer b.mu.Unlock()
	var n int64
	for _, i := range b.order {
		start, end := b.table.Bounds(i)
		n += end - start
	}
	return []p2p.Source{{Peer: PeerID, Address: Address, Bytes: n}}
}

// Close implements [p2p.Blob]: it ends the download.
func (b *blob) Close() error {
	b.cancel()
	b.running.Wait()
	os.Remove(b.in.Name())
	return errors.Join(b.src.Close(), b.in.Close(), b.out.Close())
}
