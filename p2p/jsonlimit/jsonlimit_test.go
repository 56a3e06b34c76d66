package jsonlimit

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestUnmarshal(t *testing.T) {
	for _, c := range []struct {
		name, text string
		elements   int
		tooMuch    bool
	}{
		{"as many as there may be", `[1,2,3]`, 3, false},
		{"one more", `[1,2,3,4]`, 3, true},
		{"empty objects", `[{},{}]`, 3, true},
		{"members of an object", `{"a":1,"b":2}`, 1, true},
		{"brackets and commas in strings", `["{[,{[,", "\"[,[,", "\\"]`, 3, false},
		{"after a string that ends with a backslash", `["\\",{},{},{}]`, 3, true},
		{"as deep as it may be", strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth), 100, false},
		{"too deep", strings.Repeat("[", MaxDepth+1) + strings.Repeat("]", MaxDepth+1), 100, true},
		{"too deep, and it does not end", strings.Repeat(`{"a":`, MaxDepth+1), 100, true},
	} {
		var v any
		err := Unmarshal([]byte(c.text), &v, c.elements)
		if errors.Is(err, ErrLimit) != c.tooMuch || !c.tooMuch && err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if c.tooMuch && v != nil {
			t.Errorf("%s: %v was made of it", c.name, v)
		}
	}
}

// FuzzUnmarshal: what is within the limits is read as ever, and what is read is within them.
func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"a":[1,2,{"b":null}],"c":"\",["}`), 5)
	f.Add([]byte(`[[[]]]`), 2)
	f.Fuzz(func(t *testing.T, data []byte, elements int) {
		var got, want any
		err, plain := Unmarshal(data, &got, elements), json.Unmarshal(data, &want)
		if errors.Is(err, ErrLimit) {
			return
		}
		if (err == nil) != (plain == nil) || !reflect.DeepEqual(got, want) {
			t.Fatalf("%v, %v; encoding/json: %v, %v", got, err, want, plain)
		}
		if err == nil && count(got) > 2*max(elements, 0)+1 {
			t.Fatalf("%d values with %d elements", count(got), elements)
		}
	})
}

func count(v any) int {
	n := 1
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			n += count(e)
		}
	case map[string]any:
		for _, e := range v {
			n += count(e)
		}
	}
	return n
}
