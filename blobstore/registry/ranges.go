package registry

import (
	"errors"
	"math"
	"strings"
)

// errRange says that nothing of the content is in the range that was asked for.
var errRange = errors.New("range not satisfiable")

// parseRange reads a Range header (RFC 9110, section 14.2) for content of size
// bytes. Partial is false where the whole content is the answer: no header,
// several ranges, a unit other than bytes, or empty content. What is in bytes
// and no range, or one outside the content, is errRange.
func parseRange(header string, size int64) (off, n int64, partial bool, err error) {
	unit, spec, _ := strings.Cut(header, "=")
	if !strings.EqualFold(strings.TrimSpace(unit), "bytes") || strings.Contains(spec, ",") || size == 0 {
		return 0, size, false, nil
	}
	first, last, found := strings.Cut(strings.Trim(spec, " \t"), "-")
	if !found {
		return 0, 0, false, errRange
	}
	if first == "" { // the last bytes
		n, ok := parseNumber(last)
		if !ok || n == 0 {
			return 0, 0, false, errRange
		}
		n = min(n, size)
		return size - n, n, true, nil
	}
	off, ok := parseNumber(first)
	if !ok || off >= size {
		return 0, 0, false, errRange
	}
	end := size - 1
	if last != "" {
		if end, ok = parseNumber(last); !ok || end < off {
			return 0, 0, false, errRange
		}
		end = min(end, size-1)
	}
	return off, end - off + 1, true, nil
}

// parseContentRange reads the Content-Range header of a chunk, "<first>-<last>"
// as the OCI distribution specification has it.
func parseContentRange(header string) (off, n int64, ok bool) {
	first, last, _ := strings.Cut(header, "-")
	off, ok1 := parseNumber(first)
	end, ok2 := parseNumber(last)
	if !ok1 || !ok2 || end < off || end == math.MaxInt64 {
		return 0, 0, false
	}
	return off, end - off + 1, true
}

// parseNumber reads a number of digits only. What is too large becomes the largest.
func parseNumber(s string) (n int64, ok bool) {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		if digit := int64(s[i] - '0'); n > (math.MaxInt64-digit)/10 {
			n = math.MaxInt64
		} else if n < math.MaxInt64 {
			n = 10*n + digit
		}
	}
	return n, s != ""
}
