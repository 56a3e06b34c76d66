// Package tracing sends spans of what a command does to an OpenTelemetry
// collector, or to a Jaeger that speaks OTLP, over HTTP.
//
// The environment variables of the OpenTelemetry specification are honoured:
// OTEL_EXPORTER_OTLP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
// OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_SDK_DISABLED, and OTEL_TRACES_EXPORTER
// with the values otlp and none.
package tracing

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/stats"

	"github.com/dfcache/dfcache/cmd/internal/exit"
)

const (
	// closeTimeout is how long Close waits for the collector.
	closeTimeout = 3 * time.Second
	// lateTimeout is how long CloseWithin waits where there is no time left.
	lateTimeout = 200 * time.Millisecond
)

// protocol is how spans are sent, as OTEL_EXPORTER_OTLP_PROTOCOL calls it.
const protocol = "http/protobuf"

const scope = "github.com/dfcache/dfcache"

// Options says where spans go and what they say of the sender.
type Options struct {
	// Endpoint is the URL of the collector, such as http://localhost:4318;
	// the path /v1/traces is added where it has none. It goes before the
	// environment's endpoint. URLs of Jaeger's own, former protocol are
	// taken to mean the OTLP port of the same host.
	Endpoint string
	// ServiceName is the name that traces are shown under. The environment
	// goes before it, unless ServiceNameSet says that a user chose it.
	ServiceName    string
	ServiceNameSet bool
	Version        string // of the program
	// Warn is told what does not work. It may be called from any goroutine,
	// until Close or CloseWithin returns.
	Warn func(string)
}

// Tracing sends spans. Where it is off its methods do nothing. Its methods
// are safe for concurrent use.
type Tracing struct {
	provider *sdk.TracerProvider // nil is off
	tracer   trace.Tracer
	exporter *exporter
}

// Start begins to collect spans, where an endpoint is given in o or in the
// environment. Nothing is sent yet, and no collector has to be there. ctx
// bounds only this call. An endpoint that is no URL is a usage error of package
// exit. The caller closes the Tracing.
func Start(ctx context.Context, o Options) (*Tracing, error) {
	envEndpoints := []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"}
	if o.Endpoint == "" && os.Getenv(envEndpoints[0]) == "" && os.Getenv(envEndpoints[1]) == "" ||
		strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") ||
		os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return &Tracing{}, nil
	}
	if name := os.Getenv("OTEL_TRACES_EXPORTER"); name != "" && name != "otlp" {
		o.Warn(fmt.Sprintf("OTEL_TRACES_EXPORTER=%s is not supported, traces are sent by OTLP", name))
	}

	for _, name := range []string{"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"} {
		if value := os.Getenv(name); value != "" {
			if value != protocol {
				o.Warn(fmt.Sprintf("%s=%s is not supported, traces are sent by %s", name, value, protocol))
			}
			break // the first goes before the second
		}
	}

	var options []otlptracehttp.Option
	if o.Endpoint != "" {
		endpoint, replaced, err := parseEndpoint(o.Endpoint)
		if err != nil {
			return nil, exit.Usage(err)
		}
		if replaced {
			o.Warn(fmt.Sprintf("%s belongs to a protocol that Jaeger has given up: traces are sent to %s instead",
				o.Endpoint, endpoint))
		}
		options = append(options, otlptracehttp.WithEndpointURL(endpoint))
	} else {
		for _, name := range envEndpoints {
			if value := os.Getenv(name); value != "" {
				if _, err := parseURL(value); err != nil {
					return nil, exit.Usage(fmt.Errorf("environment variable %s: %w", name, err))
				}
			}
		}
	}
	client, err := otlptracehttp.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("send traces: %w", err)
	}

	// Later ones go before earlier ones.
	detectors := []resource.Option{
		resource.WithAttributes(attribute.String("service.name", o.ServiceName),
			attribute.String("service.version", o.Version)),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv(),
	}
	if o.ServiceNameSet {
		detectors = append(detectors, resource.WithAttributes(attribute.String("service.name", o.ServiceName)))
	}
	about, err := resource.New(ctx, detectors...)
	if err != nil {
		o.Warn(fmt.Sprintf("traces: %v", err)) // what could be read is used
	}

	e := &exporter{SpanExporter: client, warn: o.Warn}
	e.closed, e.close = context.WithCancel(context.Background())
	provider := sdk.NewTracerProvider(sdk.WithBatcher(e), sdk.WithResource(about))
	return &Tracing{provider: provider, tracer: provider.Tracer(scope), exporter: e}, nil
}

// StartSpan begins a span. The caller calls end once, with the error that the
// work ended with, if any.
func (t *Tracing) StartSpan(
	ctx context.Context, name string, attrs ...attribute.KeyValue,
) (_ context.Context, end func(err error)) {
	if t.provider == nil {
		return ctx, func(error) {}
	}
	ctx, span := t.tracer.Start(ctx, name, trace.WithAttributes(attrs...))
	return ctx, func(err error) {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}
}

// ClientStatsHandler makes spans of the calls of a gRPC client and sends their
// context along, as W3C Trace Context. It is nil where tracing is off.
func (t *Tracing) ClientStatsHandler() stats.Handler {
	if t.provider == nil {
		return nil
	}
	return otelgrpc.NewClientHandler(t.grpcOptions()...)
}

// ServerStatsHandler makes spans of the calls that a gRPC server answers, as
// children of the callers' spans. It is nil where tracing is off.
func (t *Tracing) ServerStatsHandler() stats.Handler {
	if t.provider == nil {
		return nil
	}
	return otelgrpc.NewServerHandler(t.grpcOptions()...)
}

func (t *Tracing) grpcOptions() []otelgrpc.Option {
	return []otelgrpc.Option{
		otelgrpc.WithTracerProvider(t.provider),
		otelgrpc.WithMeterProvider(noop.NewMeterProvider()),
		otelgrpc.WithPropagators(propagation.TraceContext{}),
	}
}

// Close sends what was not sent yet, for three seconds at most. What could not
// be sent is lost, with a warning.
func (t *Tracing) Close() { t.CloseWithin(context.Background()) }

// CloseWithin is a Close that waits no longer than ctx lasts. Where that has
// ended already, it waits for a fifth of a second.
func (t *Tracing) CloseWithin(ctx context.Context) {
	if t.provider == nil {
		return
	}
	ctx, cancel := closing(ctx)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		t.exporter.report(err)
	}
	// A collector that hangs keeps nothing alive beyond this.
	t.exporter.close()
}

// closing returns the context of a close within ctx.
func closing(ctx context.Context) (context.Context, context.CancelFunc) {
	if ctx.Err() != nil {
		return context.WithTimeout(context.WithoutCancel(ctx), lateTimeout)
	}
	return context.WithTimeout(ctx, closeTimeout)
}

// exporter reports the first failure and gives up everything once closed.
type exporter struct {
	sdk.SpanExporter
	warn   func(string)
	once   sync.Once
	closed context.Context
	close  context.CancelFunc
}

func (e *exporter) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.closed, cancel)()
	if err := e.SpanExporter.ExportSpans(ctx, spans); err != nil && e.closed.Err() == nil {
		e.report(err)
	}
	return nil // it has been dealt with
}

func (e *exporter) report(err error) {
	e.once.Do(func() {
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			err = errors.New("the collector does not answer in time")
		case errors.Is(err, context.Canceled):
			err = errors.New("interrupted")
		}
		e.warn(fmt.Sprintf("traces could not be sent and are lost: %v", err))
	})
}

// parseEndpoint returns the URL to send spans to, and whether it stands in for
// one of Jaeger's former protocols.
func parseEndpoint(endpoint string) (_ string, replaced bool, _ error) {
	u, err := parseURL(endpoint)
	if err != nil {
		return "", false, err
	}
	const path = "/v1/traces"
	switch {
	case u.Port() == "14250" || u.Port() == "14268" || strings.TrimSuffix(u.Path, "/") == "/api/traces":
		u.Host, u.Path, replaced = net.JoinHostPort(u.Hostname(), "4318"), path, true
	case u.Path == "" || u.Path == "/":
		u.Path = path
	}
	return u.String(), replaced, nil
}

func parseURL(endpoint string) (*url.URL, error) {
	const want = "want a URL such as http://localhost:4318"
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("endpoint of traces: %w: %s", err, want)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("endpoint of traces %q: %s", u.Redacted(), want)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("endpoint of traces %q: user, query and fragment are not sent: %s, and put "+
			"credentials in OTEL_EXPORTER_OTLP_HEADERS", u.Redacted(), want)
	}
	if port := u.Port(); port != "" {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return nil, fmt.Errorf("endpoint of traces %q: no such port: %s", endpoint, want)
		}
	}
	return u, nil
}
