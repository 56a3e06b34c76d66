package tracing

import "testing"

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
