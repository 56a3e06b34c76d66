// Package jsonlimit reads JSON that comes from outside. What it holds is counted before
// anything is made of it: three bytes of a message, `{},`, can become hundreds in memory.
//
// It promises no compatibility.
package jsonlimit

import (
	"encoding/json"
	"errors"
	"fmt"
)

// MaxDepth is how deep objects and arrays may stand in each other.
const MaxDepth = 64

// ErrLimit is what the error of a text matches that holds too much.
var ErrLimit = errors.New("too much JSON")

// Unmarshal is [json.Unmarshal] for a text of at most so many elements: commas and
// opening brackets, of which every value that is not the only one in its object or array has one.
// One that has more, or is deeper than [MaxDepth], fails with an error that matches
// [ErrLimit], and v is as it was.
func Unmarshal(data []byte, v any, elements int) error {
	if err := check(data, elements); err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

func check(data []byte, elements int) error {
	count, depth, quoted := 0, 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted:
			switch c {
			case '\\':
				i++ // what follows ends no string
			case '"':
				quoted = false
			}
		case c == '"':
			quoted = true
		case c == '{' || c == '[':
			count++
			depth++
		case c == '}' || c == ']':
			depth--
		case c == ',':
			count++
		}
		if count > elements {
			return fmt.Errorf("%w: it has more than %d elements", ErrLimit, elements)
		}
		if depth > MaxDepth {
			return fmt.Errorf("%w: it is more than %d levels deep", ErrLimit, MaxDepth)
		}
	}
	return nil
}
