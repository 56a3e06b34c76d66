package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// fields are the members of an object that are read here, each with those of the objects in it: its
// value, or what is in its list. One whose fields are nil is not looked into.
type fields map[string]fields

var (
	annotationFields = fields{} // of any name
	platformFields   = fields{"architecture": nil, "os": nil, "os.version": nil, "os.features": nil, "variant": nil}
	descriptorFields = fields{
		"mediaType": nil, "digest": nil, "size": nil, "urls": nil, "data": nil, "artifactType": nil,
		"annotations": annotationFields, "platform": platformFields,
	}
	manifestFields = fields{
		"schemaVersion": nil, "mediaType": nil, "artifactType": nil, "fsLayers": nil,
		"config": descriptorFields, "layers": descriptorFields, "manifests": descriptorFields,
		"blobs": descriptorFields, "subject": descriptorFields, "annotations": annotationFields,
	}
)

// checkMembers refuses the JSON of a manifest that parsers read in different ways: some take the
// first of two members of one name, others the last, and Go's takes "Layers" for "layers". It returns
// the names of the members.
func checkMembers(data []byte) (names map[string]bool, err error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber() // of any length
	return checkValue(d, manifestFields)
}

// checkValue checks the next value of d. Of an object it returns the names of its members.
func checkValue(d *json.Decoder, known fields) (names map[string]bool, err error) {
	if known == nil {
		var skipped json.RawMessage
		return nil, d.Decode(&skipped)
	}
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('['):
		for d.More() {
			if _, err := checkValue(d, known); err != nil {
				return nil, err
			}
		}
	case json.Delim('{'):
		names = map[string]bool{}
		for d.More() {
			if token, err = d.Token(); err != nil {
				return nil, err
			}
			name, _ := token.(string)
			if err := checkName(name, names, known); err != nil {
				return nil, err
			}
			names[name] = true
			if _, err := checkValue(d, known[name]); err != nil {
				return nil, err
			}
		}
	default:
		return nil, nil
	}
	_, err = d.Token() // the bracket that ends it
	return names, err
}

// checkName refuses a member's name that is there already, or that only some parsers take for a
// known one.
func checkName(name string, names map[string]bool, known fields) error {
	if names[name] {
		return fmt.Errorf("it has %.80q twice in one object", name)
	}
	if _, exact := known[name]; exact {
		return nil
	}
	for k := range known {
		if strings.EqualFold(k, name) {
			return fmt.Errorf("it has %+.80q, which some read as %q", name, k)
		}
	}
	return nil
}
