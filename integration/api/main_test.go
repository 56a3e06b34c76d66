package main

import (
	"bytes"
	"os"
	"testing"
)

func TestCurrent(t *testing.T) {
	want, err := describe()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile("../../docs/api.txt"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("docs/api.txt is not the API as it is (%v): run make generate, and see by the diff what the change "+
			"breaks", err)
	}
}
