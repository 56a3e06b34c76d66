package dragonflyapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/blobstore/peertest"
	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/connpool"
	"github.com/dfcache/dfcache/p2p/dragonfly/given"
	"github.com/dfcache/dfcache/p2p/rpc"
)

// strangerSocket has the test binary be a client that runs as another user.
const strangerSocket = "DFCACHE_TEST_STRANGER"

func TestMain(m *testing.M) {
	if socket := os.Getenv(strangerSocket); socket != "" {
		_, err := dial(socket).CheckHealth(context.Background(), &emptypb.Empty{})
		fmt.Println(err)
		stream, err := dial(socket).Download(context.Background(), &dfdaemonv1.DownRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		fmt.Println(err)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func dial(socket string) dfdaemonv1.DaemonClient {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	return dfdaemonv1.NewDaemonClient(conn)
}

// setup is a store that is served, and a client of Dragonfly.
type setup struct {
	dfdaemonv1.DaemonClient
	t      *testing.T
	server *Server
	engine *peertest.Engine
	store  *blobstore.Store
	dir    string
	socket string
}

func serve(t *testing.T) *setup {
	t.Helper()
	s := &setup{t: t, engine: peertest.New(t), dir: t.TempDir()}
	s.store = blobstore.New(s.engine)
	s.socket = filepath.Join(s.dir, "s")
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := rpc.ListenShared(s.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := NewServer(s.store, slog.New(slog.DiscardHandler))
	s.server = server
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	s.DaemonClient = dfdaemonv1.NewDaemonClient(conn)
	t.Cleanup(func() {
		conn.Close()
		if err := server.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s
}

// The calls, as Dragonfly's dfcache makes them.

func urlOf(cid string) string { return "d7y:/" + url.QueryEscape(cid) }

func (s *setup) stat(cid, tag string, local bool) error {
	_, err := s.StatTask(s.t.Context(), &dfdaemonv1.StatTaskRequest{
		Url: urlOf(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}, LocalOnly: local})
	return err
}

func (s *setup) importFile(cid, tag, path string) error {
	_, err := s.ImportTask(s.t.Context(),
		&dfdaemonv1.ImportTaskRequest{Url: urlOf(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}, Path: path,
			Type: commonv1.TaskType_DfCache})
	return err
}

func (s *setup) export(cid, tag, output string) error {
	_, err := s.ExportTask(s.t.Context(),
		&dfdaemonv1.ExportTaskRequest{Url: urlOf(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}, Output: output,
			Uid: int64(os.Getuid()), Gid: int64(os.Getgid())})
	return err
}

func (s *setup) delete(cid, tag string) error {
	_, err := s.DeleteTask(s.t.Context(),
		&dfdaemonv1.DeleteTaskRequest{Url: urlOf(cid), UrlMeta: &commonv1.UrlMeta{Tag: tag}})
	return err
}

func (s *setup) file(name string, data []byte) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// requireCode fails the test unless an error is as Dragonfly's servers send it.
func requireCode(t *testing.T, what string, err error, want commonv1.Code) {
	t.Helper()
	st := status.Convert(err)
	if want == 0 {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		return
	}
	var detail *commonv1.GrpcDfError
	for _, d := range st.Details() {
		detail, _ = d.(*commonv1.GrpcDfError)
	}
	if st.Code() != codes.Unknown || detail.GetCode() != want ||
		st.Message() != fmt.Sprintf("[%d]%s", want, detail.GetMessage()) {
		t.Errorf("%s: %v (detail %v); want code %d", what, err, detail, want)
	}
}

const (
	notFound = commonv1.Code_PeerTaskNotFound
	bad      = commonv1.Code_BadRequest
)

func TestClient(t *testing.T) {
	s := serve(t)
	if _, err := s.CheckHealth(t.Context(), &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("content\n"), 50_000)
	path := s.file("model.bin", data)
	sum := digest.SHA256.FromBytes(data)
	for cid, tag := range map[string]string{"v1": "models", sum.String(): "files"} {
		requireCode(t, "stat before", s.stat(cid, tag, false), notFound)
		requireCode(t, "export before", s.export(cid, tag, filepath.Join(s.dir, "none")), notFound)
		requireCode(t, "import", s.importFile(cid, tag, path), 0)
		requireCode(t, "stat", s.stat(cid, tag, false), 0)
		requireCode(t, "stat on this host", s.stat(cid, tag, true), 0)
		requireCode(t, "stat under another tag", s.stat(cid, "other", false), notFound)
		out := filepath.Join(s.dir, "out")
		requireCode(t, "export", s.export(cid, tag, out), 0)
		if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
			t.Errorf("exported are %d bytes, %v", len(got), err)
		}
		var stat unix.Stat_t
		if err := unix.Stat(out, &stat); err != nil || stat.Nlink != 1 {
			t.Errorf("the exported file has %d links, %v: want one of its own", stat.Nlink, err)
		}
		requireCode(t, "export to what is there", s.export(cid, tag, out), bad)
		// nobody is asked
		requireCode(t, "export of what nobody has to what is there", s.export("nowhere", tag, out), bad)
		if err := os.Remove(out); err != nil {
			t.Fatal(err)
		}
	}
	// What came through one door goes through the other.
	models, err := s.store.Repository("models")
	if err != nil {
		t.Fatal(err)
	}
	if f, err := models.Stat(t.Context(), "v1", blobstore.Lookup{Local: true}); err != nil || f.Digest != sum ||
		f.Title != "model.bin" {
		t.Errorf("the store has %+v, %v", f, err)
	}
	// With the file gone, what is left of it does not count.
	if _, err := models.Remove(t.Context(), sum.String(), blobstore.DeleteOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	requireCode(t, "stat of what is not whole on this host", s.stat("v1", "models", true), notFound)
	for range 2 { // what is gone can be deleted again
		requireCode(t, "delete", s.delete("v1", "models"), 0)
		requireCode(t, "stat after", s.stat("v1", "models", false), notFound)
	}
	requireCode(t, "stat of the other one", s.stat(sum.String(), "files", true), 0)
}

func TestOfPeers(t *testing.T) {
	s := serve(t)
	theirs, err := blobstore.New(s.engine.Peer).Repository("models")
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("theirs"), 100_000)
	if _, err := theirs.Import(t.Context(), "v1", bytes.NewReader(data), blobstore.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	requireCode(t, "stat", s.stat("v1", "models", false), 0)
	requireCode(t, "stat on this host", s.stat("v1", "models", true), notFound)
	out := filepath.Join(s.dir, "out")
	_, err = s.ExportTask(t.Context(), &dfdaemonv1.ExportTaskRequest{
		Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{Tag: "models"}, Output: out, LocalOnly: true})
	requireCode(t, "export from this host", err, notFound)
	requireCode(t, "export", s.export("v1", "models", out), 0)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("exported are %d bytes, %v", len(got), err)
	}
}

// Dragonfly takes any text for a cid and a tag, and so does this: scripts go on unchanged.
func TestAnyText(t *testing.T) {
	s := serve(t)
	texts := []string{"v1", "a/b", "model:v1", "my model.bin", "grün", ".hidden", strings.Repeat("long/", 100),
		strings.Repeat("long/", 101), "d7y--az2fb"}
	tags := []string{"", "models", "Team/Models", "a b", "d7y--z54eam"}
	for _, tag := range tags {
		for _, text := range texts {
			requireCode(t, "stat of "+text, s.stat(text, tag, false), notFound)
			requireCode(t, "import of "+text, s.importFile(text, tag, s.file("in", []byte(text+tag))), 0)
		}
	}
	names := map[string]bool{}
	for e, err := range s.store.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Name != "" {
			names[given.Text(e.Task.Tag)+" "+given.Text(e.Name)] = true
		}
	}
	for _, tag := range tags {
		for i, text := range texts {
			out := filepath.Join(s.dir, "out")
			requireCode(t, "export of "+text, s.export(text, tag, out), 0)
			if got, err := os.ReadFile(out); err != nil || string(got) != text+tag {
				t.Errorf("exported of %q under %q is %q, %v", text, tag, got, err)
			}
			if err := os.Remove(out); err != nil {
				t.Fatal(err)
			}
			if long := len(text) > 128; !long && !names[tag+" "+text] {
				t.Errorf("%q under %q is not among %v", text, tag, names)
			}
			requireCode(t, "delete of "+text, s.delete(text, tag), 0)
			requireCode(t, "stat of what was deleted", s.stat(text, tag, false), notFound)
			if i+1 < len(texts) {
				requireCode(t, "stat of another one", s.stat(texts[i+1], tag, true), 0)
			}
		}
	}
	// What a client gave is what it is told of.
	err := s.export("no such:thing", "Team", filepath.Join(s.dir, "none"))
	if err == nil || !strings.Contains(err.Error(), `"no such:thing" under tag "Team"`) {
		t.Errorf("the error is %v", err)
	}
}

// A text that is too long for a name is in the manifest.
func TestLongText(t *testing.T) {
	s := serve(t)
	text := strings.Repeat("long/", 100)
	requireCode(t, "import", s.importFile(text, "t", s.file("in", []byte("data"))), 0)
	name, err := given.CID(text)
	if err != nil || !given.IsHashed(name) {
		t.Fatal(name, err)
	}
	r, err := s.store.Repository("t")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := r.Manifest(t.Context(), name); err != nil || !strings.Contains(string(m.Content), text) {
		t.Errorf("the manifest is %s, %v", m.Content, err)
	}
}

// With Dragonfly, a file under a name and under its digest are two. Here they are one: of a delete of the
// digest only that goes, and the file when the name does.
func TestDeleteOfDigest(t *testing.T) {
	s := serve(t)
	data := []byte("data")
	path, sum := s.file("in", data), digest.SHA256.FromBytes(data).String()
	requireCode(t, "import of the name", s.importFile("v1", "t", path), 0)
	requireCode(t, "import of the digest", s.importFile(sum, "t", path), 0)
	requireCode(t, "delete of the digest", s.delete(sum, "t"), 0)
	requireCode(t, "stat of the name", s.stat("v1", "t", true), 0)
	requireCode(t, "delete of the name", s.delete("v1", "t"), 0)
	requireCode(t, "stat of the digest", s.stat(sum, "t", true), notFound)
}

func TestRefused(t *testing.T) {
	s := serve(t)
	path := s.file("file", []byte("content"))
	fifo := filepath.Join(s.dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	other := digest.SHA256.FromString("other")
	for what, err := range map[string]error{
		"no cid":                    s.importFile("", "", path),
		"a malformed digest":        s.importFile("sha256:xyz", "", path),
		"a tag that is too long":    s.importFile("v1", strings.Repeat("T", 100), path),
		"content of another digest": s.importFile(other.String(), "", path),
		"a relative path":           s.importFile("v1", "", "file"),
		"a relative path of a file": s.importFile("v1", "", "server_test.go"),
		"a path of nothing":         s.importFile("v1", "", path+"x"),
		"a directory":               s.importFile("v1", "", s.dir),
		"a relative output":         s.export("v1", "", "out"),
		"stat of a bad cid":         s.stat("sha256:a b", "", false),
		"delete of a bad cid":       s.delete("sha256:a/b", ""),
		"a range": call(
			s.StatTask(t.Context(), &dfdaemonv1.StatTaskRequest{
				Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{Range: "0-9"}})),
		"another URL": call(
			s.StatTask(t.Context(), &dfdaemonv1.StatTaskRequest{
				Url: "https://example.com/v1", UrlMeta: &commonv1.UrlMeta{}})),
		"an escape that is not whole": call(
			s.StatTask(t.Context(), &dfdaemonv1.StatTaskRequest{Url: "d7y:/v1%2", UrlMeta: &commonv1.UrlMeta{}})),
	} {
		requireCode(t, what, err, bad)
	}
	// Nobody waits for the other end of a pipe.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := s.ImportTask(ctx, &dfdaemonv1.ImportTaskRequest{
		Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{}, Path: fifo, Type: commonv1.TaskType_DfCache})
	requireCode(t, "a pipe", err, bad)
	if f, err := os.OpenFile(fifo, os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
		f.Close()
	}
	if _, err := s.StatTask(t.Context(),
		&dfdaemonv1.StatTaskRequest{Url: urlOf(strings.Repeat("x", 64<<10))}); status.Code(
		err) != codes.ResourceExhausted {
		t.Errorf("a long request: %v", err)
	}
	for e, err := range s.store.List(t.Context()) {
		t.Errorf("the store has %v, %v", e, err)
	}
	if _, err := s.LeaveHost(t.Context(), &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a call that is not served: %v", err)
	}
}

func call(_ *emptypb.Empty, err error) error { return err }

// A timeout ends an export, at the rate that it is limited to, without an output.
func TestTimeout(t *testing.T) {
	s := serve(t)
	requireCode(t, "import", s.importFile("v1", "", s.file("file", make([]byte, 16<<20))), 0)
	out := filepath.Join(s.dir, "out")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := s.ExportTask(ctx, &dfdaemonv1.ExportTaskRequest{
		Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{}, Output: out, Limit: 1, Timeout: uint64(100e6)})
	requireCode(t, "export of a byte in a second", err, commonv1.Code_RequestTimeOut)
	if _, err := os.Lstat(out); !os.IsNotExist(err) {
		t.Errorf("there is an output: %v", err)
	}
	_, err = s.ExportTask(t.Context(), &dfdaemonv1.ExportTaskRequest{
		Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{}, Output: out, Limit: 1 << 30, Timeout: uint64(60e9)})
	requireCode(t, "export at a rate", err, 0)
}

// needRoot ends a test that needs root: it is skipped with -short, and fails without root.
func needRoot(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: needs root")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: run the tests as .ci/run does, or with -short")
	}
}

// What is exported for another user is that user's.
func TestOwner(t *testing.T) {
	needRoot(t)
	s := serve(t)
	requireCode(t, "import", s.importFile("v1", "", s.file("file", []byte("content"))), 0)
	out := filepath.Join(s.dir, "out")
	_, err := s.ExportTask(t.Context(), &dfdaemonv1.ExportTaskRequest{
		Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{}, Output: out, Uid: 65533, Gid: 65534})
	requireCode(t, "export", err, 0)
	var stat unix.Stat_t
	if err := unix.Stat(out, &stat); err != nil || stat.Uid != 65533 || stat.Gid != 65534 {
		t.Errorf("the output is %d:%d's, %v; want 65533:65534", stat.Uid, stat.Gid, err)
	}
}

// A call that goes on does not hold Shutdown up longer than its context lasts.
func TestShutdown(t *testing.T) {
	s := serve(t)
	requireCode(t, "import", s.importFile("v1", "", s.file("file", make([]byte, 1<<20))), 0)
	out := filepath.Join(s.dir, "out")
	exported := make(chan error, 1)
	go func() {
		_, err := s.ExportTask(t.Context(),
			&dfdaemonv1.ExportTaskRequest{Url: urlOf("v1"), UrlMeta: &commonv1.UrlMeta{}, Output: out, Limit: 1})
		exported <- err
	}()
	time.Sleep(100 * time.Millisecond) // mostly it is under way then
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	ended := make(chan error, 1)
	go func() { ended <- s.server.Shutdown(ctx) }()
	select {
	case err := <-ended:
		if !errors.Is(err, gone) {
			t.Errorf("shutdown: %v; want the cause for which it was cut short", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the server does not end")
	}
	if err := <-exported; err == nil {
		t.Error("the call that was cut off has succeeded")
	}
}

// No descriptor being free is not taken for a bad path.
func TestOutOfDescriptors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	if _, err := openFile(path); !errors.Is(err, blobstore.ErrBusy) || errors.Is(err, blobstore.ErrInvalid) {
		t.Errorf("open: %v; want that it is busy", err)
	}
}

// Another user is refused, whatever the mode of the socket.
func TestStranger(t *testing.T) {
	needRoot(t)
	s := serve(t)
	if err := os.Chmod(s.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	// The directories above it are only for their owner.
	for dir := s.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	client := filepath.Join(s.dir, "client")
	if err := os.WriteFile(client, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(client)
	cmd.Env = append(os.Environ(), strangerSocket+"="+s.socket)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Count(string(out), "PermissionDenied") != 2 ||
		strings.Count(string(out), "uid 65534 may not use this socket") != 2 {
		t.Errorf("another user is told: %s", out)
	}
}

// Connections that ask for nothing make room for others, the oldest first.
func TestConnections(t *testing.T) {
	s := serve(t)
	var first net.Conn
	for range max(connpool.Share(maxConns, 16), 8) + 1 {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first == nil {
			first = c
		}
	}
	first.SetReadDeadline(time.Now().Add(5 * time.Second)) // it would be given up after 10
	if _, err := io.Copy(io.Discard, first); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the oldest connection stays open")
	}
	if _, err := s.CheckHealth(t.Context(), &emptypb.Empty{}); err != nil {
		t.Error(err)
	}
}

func FuzzParseURL(f *testing.F) {
	for _, cid := range []string{"v1", "sha256:" + strings.Repeat("0", 64), "a b/%+", ""} {
		f.Add(urlOf(cid))
	}
	f.Add("d7y:/%zz")
	f.Add("http://host/path")
	f.Fuzz(func(t *testing.T, raw string) {
		cid, err := parseURL(raw)
		if err != nil {
			return
		}
		if again, err := parseURL(urlOf(cid)); err != nil || again != cid {
			t.Errorf("%q is the cid %q, which comes back as %q, %v", raw, cid, again, err)
		}
	})
}
