package tracing_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/dfcache/dfcache/cmd/internal/exit"
	"github.com/dfcache/dfcache/cmd/internal/tracing"
)

func TestMain(m *testing.M) {
	for _, variable := range os.Environ() {
		if strings.HasPrefix(variable, "OTEL_") {
			name, _, _ := strings.Cut(variable, "=")
			os.Unsetenv(name)
		}
	}
	goleak.VerifyTestMain(m)
}

// server is a collector.
type server struct {
	*httptest.Server
	t    *testing.T
	mu   sync.Mutex
	path string
	head http.Header
	got  []*tracepb.ResourceSpans
}

func newServer(t *testing.T) *server {
	s := &server{t: t}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Error(err)
	}
	var request collector.ExportTraceServiceRequest
	if err := proto.Unmarshal(body, &request); err != nil {
		s.t.Error(err)
	}
	s.path, s.head, s.got = r.URL.Path, r.Header, append(s.got, request.ResourceSpans...)
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// spans returns all spans by name.
func (s *server) spans() map[string]*tracepb.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	spans := map[string]*tracepb.Span{}
	for _, resource := range s.got {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				spans[span.Name] = span
			}
		}
	}
	return spans
}

// resource returns an attribute of the sender.
func (s *server) resource(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, resource := range s.got {
		for _, kv := range resource.Resource.Attributes {
			if kv.Key == key {
				return kv.Value.GetStringValue()
			}
		}
	}
	return ""
}

// warnings collects warnings.
type warnings struct {
	mu  sync.Mutex
	all []string
}

func (w *warnings) add(s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, s)
}

func start(t *testing.T, o tracing.Options) (*tracing.Tracing, *warnings) {
	t.Helper()
	w := &warnings{}
	o.Warn = w.add
	tr, err := tracing.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return tr, w
}

func none(t *testing.T, w *warnings) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) > 0 {
		t.Errorf("warned: %q", w.all)
	}
}

func TestSpans(t *testing.T) {
	s := newServer(t)
	tr, w := start(t, tracing.Options{Endpoint: s.URL, ServiceName: "svc", Version: "v1"})
	ctx, endOuter := tr.StartSpan(t.Context(), "outer", attribute.String("cid", "x"))
	_, endInner := tr.StartSpan(ctx, "inner")
	endInner(errors.New("broken"))
	endOuter(nil)
	tr.Close()
	none(t, w)

	spans := s.spans()
	outer, inner := spans["outer"], spans["inner"]
	if outer == nil || inner == nil {
		t.Fatalf("got %v", spans)
	}
	if string(inner.ParentSpanId) != string(outer.SpanId) || string(inner.TraceId) != string(outer.TraceId) {
		t.Error("inner is no child of outer")
	}
	if inner.Status.GetCode() != tracepb.Status_STATUS_CODE_ERROR || inner.Status.GetMessage() != "broken" {
		t.Errorf("status of inner: %v", inner.Status)
	}
	if outer.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR {
		t.Errorf("status of outer: %v", outer.Status)
	}
	if a := outer.Attributes; len(a) != 1 || a[0].Key != "cid" || a[0].Value.GetStringValue() != "x" {
		t.Errorf("attributes: %v", a)
	}
	if s.path != "/v1/traces" || s.resource("service.name") != "svc" || s.resource("service.version") != "v1" {
		t.Errorf("path %q, service %q, version %q", s.path, s.resource("service.name"), s.resource("service.version"))
	}
}

func TestEnvironment(t *testing.T) {
	tests := []struct {
		name     string
		env      map[string]string // {} stands for the server's URL
		endpoint bool              // whether --jaeger is given
		set      bool              // whether --service-name is given
		sent     bool
		service  string
		path     string
	}{
		{name: "off"},
		{name: "flag", endpoint: true, sent: true, service: "svc", path: "/v1/traces"},
		{name: "endpoint", env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "{}/base"}, sent: true, service: "svc",
			path: "/base/v1/traces"},
		{name: "endpoint of traces", env: map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "{}/as/is"},
			sent: true, service: "svc", path: "/as/is"},
		{name: "flag before endpoint", env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
			endpoint: true, sent: true, service: "svc", path: "/v1/traces"},
		{name: "disabled", env: map[string]string{"OTEL_SDK_DISABLED": "TRUE"}, endpoint: true},
		{name: "no exporter", env: map[string]string{"OTEL_TRACES_EXPORTER": "none"}, endpoint: true},
		{name: "exporter", env: map[string]string{"OTEL_TRACES_EXPORTER": "otlp"}, endpoint: true, sent: true,
			service: "svc", path: "/v1/traces"},
		{name: "sampler", env: map[string]string{"OTEL_TRACES_SAMPLER": "always_off"}, endpoint: true},
		{name: "service name", env: map[string]string{"OTEL_SERVICE_NAME": "env"}, endpoint: true, sent: true,
			service: "env", path: "/v1/traces"},
		{name: "service name by flag", env: map[string]string{"OTEL_SERVICE_NAME": "env"}, endpoint: true, set: true,
			sent: true, service: "svc", path: "/v1/traces"},
		{name: "resource", env: map[string]string{"OTEL_RESOURCE_ATTRIBUTES": "service.name=res,site=here"},
			endpoint: true, sent: true, service: "res", path: "/v1/traces"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t)
			for name, value := range test.env {
				t.Setenv(name, strings.ReplaceAll(value, "{}", s.URL))
			}
			o := tracing.Options{ServiceName: "svc", ServiceNameSet: test.set}
			if test.endpoint {
				o.Endpoint = s.URL
			}
			tr, w := start(t, o)
			_, end := tr.StartSpan(t.Context(), "span")
			end(nil)
			tr.Close()
			none(t, w)
			if sent := s.spans()["span"] != nil; sent != test.sent {
				t.Errorf("sent: %v", sent)
			}
			if s.resource("service.name") != test.service || s.path != test.path {
				t.Errorf("service %q, path %q", s.resource("service.name"), s.path)
			}
			if _, ok := test.env["OTEL_RESOURCE_ATTRIBUTES"]; ok && s.resource("site") != "here" {
				t.Errorf("resource attribute is %q", s.resource("site"))
			}
		})
	}
}

func TestHeaders(t *testing.T) {
	s := newServer(t)
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
	tr, w := start(t, tracing.Options{Endpoint: s.URL})
	_, end := tr.StartSpan(t.Context(), "span")
	end(nil)
	tr.Close()
	none(t, w)
	if got := s.head.Get("Authorization"); got != "secret" {
		t.Errorf("header is %q", got)
	}
}

func TestOff(t *testing.T) {
	tr, w := start(t, tracing.Options{})
	ctx, end := tr.StartSpan(t.Context(), "span")
	if ctx != t.Context() {
		t.Error("the context is another one")
	}
	end(errors.New("x"))
	if tr.ClientStatsHandler() != nil || tr.ServerStatsHandler() != nil {
		t.Error("a stats handler where tracing is off")
	}
	tr.Close()
	none(t, w)
}

func TestInvalidEndpoint(t *testing.T) {
	bad := []string{"localhost:4318", "localhost", "ftp://h", "http://", "http://h:x", "http://h:70000",
		"http://u:secret@h", "http://h?q", "http://h#f", "%"}
	for _, endpoint := range bad {
		_, err := tracing.Start(t.Context(), tracing.Options{Endpoint: endpoint})
		if exit.Code(err) != exit.Invalid || !strings.Contains(err.Error(), "http://localhost:4318") {
			t.Errorf("%s: %v", endpoint, err)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error has the password: %v", endpoint, err)
		}
	}
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense")
	if _, err := tracing.Start(t.Context(), tracing.Options{}); exit.Code(err) != exit.Invalid ||
		!strings.Contains(err.Error(), "OTEL_EXPORTER_OTLP_ENDPOINT") {
		t.Errorf("environment: %v", err)
	}
}

func TestWarnings(t *testing.T) {
	t.Setenv("OTEL_TRACES_EXPORTER", "zipkin")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "nonsense")
	tr, w := start(t, tracing.Options{Endpoint: "http://127.0.0.1:14250/api/traces"})
	tr.Close()
	all := strings.Join(w.all, "\n")
	for _, want := range []string{"zipkin", "http://127.0.0.1:4318/v1/traces instead", "resource"} {
		if !strings.Contains(all, want) {
			t.Errorf("no warning of %s: %s", want, all)
		}
	}
}

// A collector that fails is told of once.
func TestFailure(t *testing.T) {
	var requests int
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests++
		http.Error(w, "go away", http.StatusForbidden)
	}))
	defer s.Close()
	t.Setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
	tr, w := start(t, tracing.Options{Endpoint: s.URL})
	for range 3 {
		_, end := tr.StartSpan(t.Context(), "span")
		end(nil)
	}
	tr.Close()
	if requests < 2 || len(w.all) != 1 || !strings.Contains(w.all[0], "go away") {
		t.Errorf("%d requests, warned: %q", requests, w.all)
	}
}

// A collector that hangs does not hang the command, and leaves no goroutine.
func TestHang(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: takes long")
	}
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer s.Close()
	defer close(release)
	tr, w := start(t, tracing.Options{Endpoint: s.URL})
	_, end := tr.StartSpan(t.Context(), "span")
	end(nil)
	tr.Close()
	if len(w.all) != 1 || !strings.Contains(w.all[0], "does not answer in time") {
		t.Errorf("warned: %q", w.all)
	}
}

// The wait for a collector that hangs ends with the context.
func TestCloseWithin(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { cancel(); <-release }))
	defer s.Close()
	defer close(release)
	tr, w := start(t, tracing.Options{Endpoint: s.URL})
	_, end := tr.StartSpan(t.Context(), "span")
	end(nil)
	tr.CloseWithin(ctx)
	if len(w.all) != 1 || !strings.Contains(w.all[0], "lost: interrupted") {
		t.Errorf("warned: %q", w.all)
	}
}

func TestProtocol(t *testing.T) {
	const general, special = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
	for _, test := range []struct{ general, special, warning string }{
		{"", "", ""},
		{"http/protobuf", "", ""},
		{"grpc", "http/protobuf", ""},
		{"grpc", "", general + "=grpc is not supported, traces are sent by http/protobuf"},
		{"http/protobuf", "http/json", special + "=http/json is not supported"},
	} {
		t.Setenv(general, test.general)
		t.Setenv(special, test.special)
		tr, w := start(t, tracing.Options{Endpoint: "http://127.0.0.1:1"})
		tr.Close()
		if all := strings.Join(w.all, "\n"); test.warning == "" && all != "" || !strings.Contains(all, test.warning) {
			t.Errorf("%+v: warned: %q", test, all)
		}
	}
}

// A trace goes on from a gRPC client to the server.
func TestGRPC(t *testing.T) {
	s := newServer(t)
	tr, w := start(t, tracing.Options{Endpoint: s.URL})

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var seen trace.SpanContext // of the server's span
	server := grpc.NewServer(grpc.StatsHandler(tr.ServerStatsHandler()), grpc.UnaryInterceptor(
		func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			seen = trace.SpanContextFromContext(ctx)
			return handler(ctx, request)
		}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStatsHandler(tr.ClientStatsHandler()))
	if err != nil {
		t.Fatal(err)
	}

	ctx, end := tr.StartSpan(t.Context(), "command")
	if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	end(nil)
	conn.Close()
	server.GracefulStop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	tr.Close()
	none(t, w)

	if got, want := seen.TraceID(), trace.SpanContextFromContext(ctx).TraceID(); got != want || !got.IsValid() {
		t.Errorf("the server's trace is %s, the client's %s", got, want)
	}
	kinds := map[tracepb.Span_SpanKind]bool{}
	for _, resource := range s.got {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				kinds[span.Kind] = true
			}
		}
	}
	if !kinds[tracepb.Span_SPAN_KIND_CLIENT] || !kinds[tracepb.Span_SPAN_KIND_SERVER] {
		t.Errorf("kinds of spans: %v", kinds)
	}
}
