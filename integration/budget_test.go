package integration

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestRegistryLeavesDescriptors: whatever clients of the registry hold, connections that ask for
// nothing, or that have begun to, and uploads without a byte, dfcache gets in, and so does
// the next client of the registry.
func TestRegistryLeavesDescriptors(t *testing.T) {
	d := startDaemonWith(t, tempHome(t), nil, "sh", "-c", `ulimit -n 256 && exec "$0" "$@"`)
	sum := d.pushed(t, "models", []byte("model"))
	for range 40 {
		d.beginUpload(t, "models") // the daemon may have 32
	}
	for i := range 300 {
		conn := d.dialRegistry(t)
		defer conn.Close()
		request := "GET /v2/models/blobs/" + sum.String() + " HTTP/1.1\r\nHost: " + d.host + "\r\n\r\n"
		switch i % 3 {
		case 0:
			request = "" // it says nothing
		case 1:
			request = request[:10]
		}
		io.WriteString(conn, request) // the daemon may have closed it
	}
	time.Sleep(100 * time.Millisecond) // until all of them are with the daemon
	if out, errs, code := d.run(t, strings.NewReader("content"), "import", "-i", "v1", "-"); code != 0 {
		t.Errorf("import: exit code %d: %s%s", code, out, errs)
	}
	if out, errs, code := d.run(t, nil, "export", "-i", "v1", "-O", "-"); code != 0 || out != "content" {
		t.Errorf("export: exit code %d: %s%s", code, out, errs)
	}
	d.require(t, http.StatusOK, http.MethodGet, "/v2/models/blobs/"+sum.String(), nil)
	location := d.beginUpload(t, "models")
	d.require(t, http.StatusCreated, http.MethodPut, location+"?digest="+sum.String(), []byte("model"))
}
