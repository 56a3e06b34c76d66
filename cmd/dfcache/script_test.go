package main

import (
	"testing"

	"github.com/dfcache/dfcache/cmd/internal/script"
)

func TestMain(m *testing.M) { script.Main(m) }

func TestScripts(t *testing.T) { script.Run(t, "testdata/script") }
