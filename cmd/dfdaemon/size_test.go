package main

import (
	"math"
	"testing"
)

func TestSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "12345": 12345, "7B": 7, "0GiB": 0,
		"1KiB": 1 << 10, "2MiB": 2 << 20, "500GiB": 500 << 30, "3TiB": 3 << 40,
		"1KB": 1e3, "2MB": 2e6, "500GB": 500e9, "3TB": 3e12, "10 GiB": 10 << 30,
		"9223372036854775807": math.MaxInt64, "8388607TiB": 8388607 << 40,
	} {
		var s size
		if err := s.Set(text); err != nil || int64(s) != want {
			t.Errorf("%q is %d, %v, want %d", text, s, err, want)
		}
	}
	for text, want := range map[string]string{
		"9223372036854775808": "out of range", "8388608TiB": "out of range", "18446744073709551616": "out of range",
		"99999999999999999999GB": "out of range",
		"":                       "", "-1": "", "+1": "", "1.5GiB": "", "GiB": "", "5G": "", "5Gib": "", "5gib": "",
		"5GiBGiB": "", "5iB": "",
		"5GiB ": "", "1e3": "", "0x10": "", "1_000": "",
	} {
		s := size(42)
		err := s.Set(text)
		if err == nil || want != "" && err.Error() != want || want == "" && err.Error() == "out of range" || s != 42 {
			t.Errorf("%q is %d, %v", text, s, err)
		}
	}
}
