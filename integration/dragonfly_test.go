package integration

import (
	"bytes"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	commonv1 "d7y.io/api/v2/pkg/apis/common/v1"
	dfdaemonv1 "d7y.io/api/v2/pkg/apis/dfdaemon/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dfcache/dfcache/p2p/dragonfly/given"
)

// Dragonfly's dfcache, as far as it can be seen on the wire, ours and oras use the
// same files.
func TestDragonflyClient(t *testing.T) {
	home := tempHome(t)
	socket := filepath.Join(home, "run", "dragonfly.sock")
	flags := []string{"--dragonfly-sock", socket}
	d := startDaemonWith(t, home, flags)
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client, ctx := dfdaemonv1.NewDaemonClient(conn), t.Context()
	models := &commonv1.UrlMeta{Tag: "models"}

	data := content(3_000_000, 1)
	file := filepath.Join(home, "file.bin")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CheckHealth(ctx, &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.ImportTask(ctx, &dfdaemonv1.ImportTaskRequest{
		Url: "d7y:/" + url.QueryEscape("v1"), UrlMeta: models, Path: file}); err != nil {
		t.Fatal(err)
	}
	d.stop(t, syscall.SIGKILL)
	d = startDaemonWith(t, home, flags) // with the socket still there
	ok := func(args ...string) {
		t.Helper()
		if _, says, code := d.run(t, nil, args...); code != 0 {
			t.Fatalf("dfcache %v: exit status %d: %s", args, code, says)
		}
	}
	out := filepath.Join(home, "out")
	ok("export", "-t", "models", "-i", "v1", "-O", out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("exported are %d bytes, %v", len(got), err)
	}
	u := newUser(t, d)
	u.run("oras", "pull", d.host+"/models:v1")
	if got, err := os.ReadFile(filepath.Join(u.dir, "file.bin")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("pulled are %d bytes, %v", len(got), err)
	}
	ok("import", "-t", "models", "-i", "v2", file)
	again := filepath.Join(home, "again")
	if _, err := client.ExportTask(ctx, &dfdaemonv1.ExportTaskRequest{Url: "d7y:/v2", UrlMeta: models, Output: again},
		grpc.WaitForReady(true)); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(again); err != nil || !bytes.Equal(got, data) {
		t.Errorf("exported are %d bytes, %v", len(got), err)
	}
	if _, err := client.DeleteTask(ctx, &dfdaemonv1.DeleteTaskRequest{Url: "d7y:/v2", UrlMeta: models}); err != nil {
		t.Error(err)
	}
	if _, says, code := d.run(t, nil, "stat", "-t", "models", "-i", "v2"); code != notFound {
		t.Errorf("stat of what was deleted: exit status %d: %s", code, says)
	}
	if _, err := client.StatTask(ctx, &dfdaemonv1.StatTaskRequest{Url: "d7y:/v2", UrlMeta: models}); err == nil ||
		!strings.Contains(err.Error(), "[1404]") {
		t.Errorf("stat of what was deleted: %v", err)
	}
	// Any text is a cid and a tag there, and shown as it was given.
	for _, text := range []string{"model:v1", strings.Repeat("long/", 100)} {
		req := &dfdaemonv1.ImportTaskRequest{
			Url: "d7y:/" + url.QueryEscape(text), UrlMeta: &commonv1.UrlMeta{Tag: "Team"}, Path: file}
		if _, err := client.ImportTask(ctx, req); err != nil {
			t.Fatal(err)
		}
		name, err := given.CID(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"list"}, {"stat", "-t", "d7y--z54eam", "-i", name}} {
			if out, says, code := d.run(t, nil, args...); code != 0 || !strings.Contains(out, text) ||
				!strings.Contains(out, "Team") || !strings.Contains(out, name) {
				t.Errorf("dfcache %v: exit status %d: %s%s", args, code, out, says)
			}
		}
	}
	d.stop(t, syscall.SIGTERM)
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}
