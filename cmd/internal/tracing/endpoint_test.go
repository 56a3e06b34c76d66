package tracing

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// How long a close may take, by a clock that stands still.
func TestClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		over, cancel := context.WithCancel(t.Context())
		cancel()
		short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		long, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		for _, test := range []struct {
			name string
			ctx  context.Context
			want time.Duration
		}{
			{"no limit", t.Context(), closeTimeout},
			{"much time", long, closeTimeout},
			{"little time", short, 300 * time.Millisecond},
			{"no time", over, lateTimeout},
		} {
			ctx, cancel := closing(test.ctx)
			defer cancel()
			if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) != test.want || ctx.Err() != nil {
				t.Errorf("%s: %s, %v", test.name, time.Until(deadline), ctx.Err())
			}
		}
	})
}

func TestParseEndpoint(t *testing.T) {
	tests := []struct {
		endpoint, want string
		replaced       bool
	}{
		{"http://h:4318", "http://h:4318/v1/traces", false},
		{"http://h:4318/", "http://h:4318/v1/traces", false},
		{"http://h:4318/v1/traces", "http://h:4318/v1/traces", false},
		{"https://h", "https://h/v1/traces", false},
		{"https://h/own/path", "https://h/own/path", false},
		{"http://[::1]:4318", "http://[::1]:4318/v1/traces", false},
		{"http://h:14250/api/traces", "http://h:4318/v1/traces", true},
		{"http://h:14268/api/traces", "http://h:4318/v1/traces", true},
		{"http://h:14250", "http://h:4318/v1/traces", true},
		{"https://h/api/traces/", "https://h:4318/v1/traces", true},
		{"http://[::1]:14250/api/traces", "http://[::1]:4318/v1/traces", true},
	}
	for _, test := range tests {
		got, replaced, err := parseEndpoint(test.endpoint)
		if err != nil || got != test.want || replaced != test.replaced {
			t.Errorf("%s: got %s, %v, %v", test.endpoint, got, replaced, err)
		}
	}
}
