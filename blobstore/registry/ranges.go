package registry

import (
	"errors"
	"fmt"
	"math"
	"strings"
)

// errRange says that nothing of the content is in the range that was asked for.
var errRange = errors.New("range not satisfiable")

// maxRanges is how many ranges one request may ask for. It is what podman asks for at most.
const maxRanges = 1024

// byteRange is a part of some content.
type byteRange struct{ off, n int64 }

// contentRange returns it as the header Content-Range has it.
func (r byteRange) contentRange(size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", r.off, r.off+r.n-1, size)
}

// parseRanges reads a Range header (RFC 9110, section 14.2) for content of size bytes, as net/http
// does. There are none where the whole content is the answer: no header, a unit other than bytes,
// empty content, more ranges than [maxRanges], or more bytes in them than there are. What is in bytes
// and no range, or all outside the content, is errRange.
func parseRanges(header string, size int64) ([]byteRange, error) {
	unit, list, _ := strings.Cut(header, "=")
	if !strings.EqualFold(strings.TrimSpace(unit), "bytes") || size == 0 || strings.Count(list, ",") >= maxRanges {
		return nil, nil
	}
	var ranges []byteRange
	left := size
	for spec := range strings.SplitSeq(list, ",") {
		if spec = strings.Trim(spec, " \t"); spec == "" {
			continue
		}
		r, err := parseRange(spec, size)
		if err != nil {
			return nil, err
		}
		if r.n == 0 {
			continue // it is outside
		}
		ranges = append(ranges, r)
		left = max(left-r.n, -1)
	}
	switch {
	case len(ranges) == 0:
		return nil, errRange
	case left < 0:
		return nil, nil // it is less to send the whole
	}
	return ranges, nil
}

// parseRange reads one range. One that has nothing of the content is empty.
func parseRange(spec string, size int64) (r byteRange, err error) {
	first, last, found := strings.Cut(spec, "-")
	if first, last = strings.Trim(first, " \t"), strings.Trim(last, " \t"); !found {
		return r, errRange
	}
	if first == "" { // the last bytes
		n, ok := parseNumber(last)
		if !ok {
			return r, errRange
		}
		n = min(n, size)
		return byteRange{size - n, n}, nil
	}
	off, ok := parseNumber(first)
	if !ok {
		return r, errRange
	}
	end := size - 1
	if last != "" {
		if end, ok = parseNumber(last); !ok || end < off {
			return r, errRange
		}
		end = min(end, size-1)
	}
	if off >= size {
		return r, nil
	}
	return byteRange{off, end - off + 1}, nil
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
