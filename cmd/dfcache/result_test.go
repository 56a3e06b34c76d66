package main

import "testing"

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{
		0:                   "0 B",
		1:                   "1 B",
		1023:                "1023 B",
		1024:                "1.0 KiB",
		1536:                "1.5 KiB",
		1<<20 - 1:           "1.0 MiB",
		9 << 20:             "9.0 MiB",
		1 << 30:             "1.0 GiB",
		1 << 40:             "1.0 TiB",
		9223372036854775807: "8.0 EiB",
	} {
		if got := human(n); got != want {
			t.Errorf("human(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"model.bin":      "model.bin",
		"grüße 世界":       "grüße 世界",
		"a\x1b[2Jb":      `"a\x1b[2Jb"`,
		"two\nlines":     `"two\nlines"`,
		"back\\slash":    `"back\\slash"`,
		"\u202eexe.fdp":  `"\u202eexe.fdp"`,
		"not utf8 \xff!": `"not utf8 \xff!"`,
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %s, want %s", text, got, want)
		}
	}
}
