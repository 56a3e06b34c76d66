package integration

import (
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dfcache/dfcache/"

// layers are the packages from the top down. A package may import those that
// stand below it, and no others: arrows point down.
var layers = [][]string{
	{"cmd/dfcache", "cmd/dfdaemon"},
	{"cmd/internal/logs", "cmd/internal/manual", "cmd/internal/memory", "cmd/internal/profiling",
		"cmd/internal/settings", "cmd/internal/stdio", "cmd/internal/tracing"},
	{"cmd/internal/build", "cmd/internal/exit", "cmd/internal/paths", "docs"},
	{"blobstore/registry", "blobstore/dragonflyapi", "blobstore/client"},
	// none of these knows another
	{"blobstore", "p2p/swarm", "p2p/swarm/discovery", "p2p/dragonfly", "p2p/dragonfly/cluster",
		"p2p/dragonfly/persistent"},
	{"p2p/rpc", "p2p/dragonfly/whole", "blobstore/artifact"},
	{"p2p/front"},
	{"p2p/rpc/pb", "p2p/pieces", "p2p/memory", "p2p/dragonfly/wire", "p2p/throttle", "p2p/connpool"},
	{"p2p/source", "p2p/manifest", "p2p/dragonfly/given"},
	{"p2p", "p2p/grpclimit", "p2p/jsonlimit", "p2p/secret", "p2p/pieces/backend"},
	{"digest", "p2p/dirs", "p2p/swarm/schedule", "blobstore/loopback"},
}

// notLinked are modules that a package must not depend on, however indirectly:
// each costs every start of the program, or ties a layer to what it must not know.
var notLinked = map[string][]string{
	"cmd/dfcache": {"github.com/libp2p/",
		"github.com/russross/blackfriday", "github.com/cpuguy83/go-md2man"},
	"cmd/dfdaemon":       {"github.com/russross/blackfriday", "github.com/cpuguy83/go-md2man"},
	"blobstore/registry": {"github.com/libp2p/", "github.com/spf13/", "go.opentelemetry.io/otel/sdk"},
	"blobstore/dragonflyapi": {"github.com/libp2p/",
		"github.com/spf13/", "go.opentelemetry.io/otel/sdk", "d7y.io/dragonfly"},
	"blobstore": {"oras.land/oras-go/v2/registry", "google.golang.org/grpc", "github.com/libp2p/",
		"github.com/spf13/", "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters"},
	"p2p/rpc":   {"github.com/libp2p/", "github.com/spf13/", "go.opentelemetry.io/otel/sdk"},
	"p2p/swarm": {"github.com/libp2p/go-libp2p-kad-dht", "google.golang.org/grpc", "github.com/spf13/"},
	"p2p/dragonfly": {"github.com/libp2p/",
		"github.com/spf13/", "go.opentelemetry.io/otel/sdk", "d7y.io/dragonfly"},
	"p2p/dragonfly/cluster": {"github.com/libp2p/",
		"github.com/spf13/", "go.opentelemetry.io/otel/sdk", "d7y.io/dragonfly"},
	"p2p/dragonfly/persistent": {"github.com/libp2p/",
		"github.com/spf13/", "go.opentelemetry.io/otel/sdk", "d7y.io/dragonfly"},
	"p2p/swarm/schedule": {"github.com/libp2p/", "google.golang.org/", "golang.org/x/", "github.com/spf13/"},
	"p2p/front":          {"google.golang.org/grpc", "github.com/spf13/", "github.com/libp2p/"},
	"p2p/pieces":         {"google.golang.org/grpc", "github.com/spf13/", "github.com/libp2p/"},
	"p2p/pieces/backend": {"google.golang.org/", "go.etcd.io/", "github.com/libp2p/", "github.com/spf13/"},
	"p2p/memory":         {"google.golang.org/grpc", "go.etcd.io/", "github.com/spf13/", "github.com/libp2p/"},
	"p2p/manifest": {"google.golang.org/",
		"go.etcd.io/", "oras.land/", "golang.org/x/", "github.com/libp2p/"},
	"p2p/jsonlimit": {"google.golang.org/", "go.etcd.io/", "golang.org/x/", "github.com/libp2p/"},
	"p2p":           {"google.golang.org/", "go.etcd.io/", "github.com/spf13/", "github.com/libp2p/"},
	"digest": {"google.golang.org/",
		"go.etcd.io/", "golang.org/x/", "github.com/spf13/", "github.com/libp2p/"},
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v", args, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func layerOf(pkg string) int {
	return slices.IndexFunc(layers, func(l []string) bool {
		return slices.Contains(l, strings.TrimPrefix(pkg, module))
	})
}

func TestLayers(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`,
		"./cmd/...", "./docs/...", "./blobstore/...", "./p2p/...", "./digest/...") {
		fields := strings.Fields(line)
		pkg, imports := fields[0], fields[1:]
		if testOnly := strings.HasSuffix(pkg, "test") || strings.HasSuffix(pkg, "/script"); testOnly {
			continue
		}
		from := layerOf(pkg)
		if from < 0 {
			t.Errorf("%s has no layer: say here where it stands", pkg)
			continue
		}
		for _, imported := range imports {
			if !strings.HasPrefix(imported, module) {
				continue
			}
			if to := layerOf(imported); to <= from {
				t.Errorf("%s imports %s, which is not below it", pkg, imported)
			}
		}
	}
}

// TestPromises: each package says whether its API is kept compatible; docs/api.txt has those whose is.
func TestPromises(t *testing.T) {
	api, err := os.ReadFile("../docs/api.txt")
	if err != nil {
		t.Fatal(err)
	}
	const format = `{{if ne .Name "main"}}{{.ImportPath}}{{range .GoFiles}} {{$.Dir}}/{{.}}{{end}}{{end}}`
	for _, line := range goList(t, "-f", format, "./blobstore/...", "./p2p/...", "./digest/...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		says := "It promises no compatibility."
		if strings.Contains("\n"+string(api), "\npackage "+pkg+"\n") {
			says = "Its API is kept compatible from release to release: docs/api.txt lists it."
		}
		var comment strings.Builder
		for _, name := range fields[1:] {
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			comment.WriteString(file.Doc.Text())
		}
		if !strings.Contains(strings.ReplaceAll(comment.String(), "\n", " "), says) {
			t.Errorf("the comment of package %s does not say: %s", pkg, says)
		}
	}
}

func TestNotLinked(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	for pkg, forbidden := range notLinked {
		for _, dep := range goList(t, "-deps", "./"+pkg) {
			for _, f := range forbidden {
				if strings.HasPrefix(dep, f) {
					t.Errorf("%s depends on %s", pkg, dep)
				}
			}
		}
	}
}
