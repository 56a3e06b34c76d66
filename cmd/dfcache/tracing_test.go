package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

// TestSpans runs a command that sends its traces to a receiver of the test.
func TestSpans(t *testing.T) {
	for name, test := range map[string]struct {
		args, env []string
		service   string
	}{
		"default name": {service: "dragonfly-dfcache"},
		"flag": {args: []string{"--service-name", "by-flag"}, env: []string{"OTEL_SERVICE_NAME=by-otel"},
			service: "by-flag"},
		"variable":           {env: []string{"DFCACHE_SERVICE_NAME=by-variable"}, service: "by-variable"},
		"OpenTelemetry's":    {env: []string{"OTEL_SERVICE_NAME=by-otel"}, service: "by-otel"},
		"configuration file": {args: []string{"--config", "testdata/service.yaml"}, service: "by-file"},
	} {
		t.Run(name, func(t *testing.T) {
			receiver := newReceiver(t)
			dir := t.TempDir()
			cmd := exec.CommandContext(t.Context(), "dfcache", append([]string{
				"stat", "-t", "models", "-i", "v1", "--jaeger", receiver.URL,
				"--logdir", dir, "--daemon-sock", filepath.Join(dir, "none.sock"),
			}, test.args...)...)
			cmd.Env = append(append(os.Environ(), "DFCACHE_CONFIG=", "HOME="+dir), test.env...)
			out, err := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != 6 {
				t.Fatalf("exit code %d (%v), want 6:\n%s", code, err, out)
			}
			if strings.Contains(string(out), "warning") {
				t.Errorf("a warning although the receiver is there:\n%s", out)
			}
			receiver.mu.Lock()
			defer receiver.mu.Unlock()
			if receiver.service != test.service {
				t.Errorf("service is %q, want %q", receiver.service, test.service)
			}
			span := receiver.spans["dfcache stat"]
			if span["dfcache.cid"] != "v1" || span["dfcache.tag"] != "models" {
				t.Errorf("spans are %v, want dfcache stat with cid and tag", receiver.spans)
			}
			if !receiver.failed {
				t.Error("the span says nothing of the failure")
			}
		})
	}
}

// A collector that hangs does not hold up a command that is told to end.
func TestSpansGiveUp(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	release, arrived := make(chan struct{}), make(chan struct{}, 1)
	collector := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-release
	}))
	defer collector.Close()
	defer close(release)
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "dfcache", "stat", "-i", "v1", "--jaeger", collector.URL,
		"--logdir", dir, "--daemon-sock", filepath.Join(dir, "none.sock"), "--timeout", "1h")
	cmd.Env = append(os.Environ(), "DFCACHE_CONFIG=", "HOME="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-arrived // so the work is done, and what is left is to send its span
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 6 || !strings.Contains(out.String(), "lost: interrupted") {
		t.Errorf("exit code %d, want 6 and that the traces were given up:\n%s", code, &out)
	}
}

// receiver takes traces over OTLP/HTTP.
type receiver struct {
	URL string

	mu      sync.Mutex
	service string
	spans   map[string]map[string]string // attributes by name of the span
	failed  bool                         // the last span has an error
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{spans: map[string]map[string]string{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			t.Errorf("read traces: %v", err)
		}
		var traces collector.ExportTraceServiceRequest
		if err := proto.Unmarshal(body, &traces); err != nil {
			t.Errorf("decode traces: %v", err)
		}
		r.add(&traces)
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	r.URL = server.URL
	return r
}

func (r *receiver) add(traces *collector.ExportTraceServiceRequest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range traces.ResourceSpans {
		for _, attribute := range resource.Resource.Attributes {
			if attribute.Key == "service.name" {
				r.service = attribute.Value.GetStringValue()
			}
		}
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				attributes := map[string]string{}
				for _, attribute := range span.Attributes {
					attributes[attribute.Key] = attribute.Value.GetStringValue()
				}
				r.spans[span.Name] = attributes
				r.failed = span.Status.GetMessage() != ""
			}
		}
	}
}
