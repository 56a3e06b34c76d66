package script

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// need fails the script unless the count of arguments is right and the command
// is not negated against its nature.
func need(ts *testscript.TestScript, neg bool, ok bool, usage string) {
	if neg {
		ts.Fatalf("unsupported: ! %s", usage)
	}
	if !ok {
		ts.Fatalf("usage: %s", usage)
	}
}

func exitCodeCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) >= 2, "exitcode N CMD [ARG...]")
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	// A daemon that is not to start would run for ever.
	if err := ts.Exec("timeout", append([]string{"--foreground", "30"}, args[1:]...)...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code is %d, want %d", got, want)
	}
}

func mkfileCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 2 || len(args) == 3, "mkfile FILE SIZE [SEED]")
	number, unit := args[1], int64(1)
	for suffix, factor := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} {
		if n, ok := strings.CutSuffix(args[1], suffix); ok {
			number, unit = n, factor
		}
	}
	size, err := strconv.ParseInt(number, 10, 64)
	ts.Check(err)
	seed := sha256.Sum256([]byte(strings.Join(args[2:], "")))

	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	_, err = io.CopyN(f, rand.NewChaCha8(seed), size*unit)
	ts.Check(err)
	ts.Check(f.Close())
}

func sha256Cmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 2, "sha256 FILE VAR")
	f, err := os.Open(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	ts.Check(err)
	ts.Setenv(args[1], hex.EncodeToString(hash.Sum(nil)))
}

func flipBitCmd(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, len(args) == 2, "flipbit FILE OFFSET")
	offset, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	name := ts.MkAbs(args[0])
	info, err := os.Stat(name)
	ts.Check(err)
	ts.Check(os.Chmod(name, info.Mode()|0o200))
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, offset)
	ts.Check(err)
	b[0] ^= 1
	_, err = f.WriteAt(b, offset)
	ts.Check(err)
	ts.Check(f.Close())
	ts.Check(os.Chmod(name, info.Mode()))
}

func fileSameCmd(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: filesame A B")
	}
	err := sameFile(ts.MkAbs(args[0]), ts.MkAbs(args[1]))
	if err != nil && !errors.Is(err, errDiffer) {
		ts.Fatalf("%v", err)
	}
	finish(ts, neg, err)
}

var errDiffer = errors.New("files differ")

// sameFile returns nil where two files have the same content, and otherwise
// an error that wraps errDiffer.
func sameFile(a, b string) error {
	var files [2]*os.File
	for i, name := range []string{a, b} {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		files[i] = f
	}
	var chunks [2][]byte
	for i := range chunks {
		chunks[i] = make([]byte, 1<<20)
	}
	for at := int64(0); ; at += int64(len(chunks[0])) {
		var n [2]int
		for i, f := range files {
			var err error
			n[i], err = io.ReadFull(f, chunks[i])
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return err
			}
		}
		if !bytes.Equal(chunks[0][:n[0]], chunks[1][:n[1]]) {
			return fmt.Errorf("%w after byte %d", errDiffer, at)
		}
		if n[0] < len(chunks[0]) {
			return nil
		}
	}
}

func jsonCmd(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: json FILE PATH VALUE")
	}
	got, err := field(ts.ReadFile(args[0]), args[1])
	ts.Check(err)
	if got != args[2] {
		err = fmt.Errorf("%s is %s, want %s", args[1], got, args[2])
	}
	finish(ts, neg, err)
}

// field returns what is found in JSON text along a path of keys and indexes: a
// string as it is, anything else as JSON.
func field(text, path string) (string, error) {
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return "", err
	}
	if decoder.More() {
		return "", errors.New("more than one JSON value")
	}
	for key := range strings.SplitSeq(path, ".") {
		switch v := value.(type) {
		case map[string]any:
			var ok bool
			if value, ok = v[key]; !ok {
				return "", fmt.Errorf("%s: there is no %q", path, key)
			}
		case []any:
			i, err := strconv.Atoi(key)
			if err != nil || i < 0 || i >= len(v) {
				return "", fmt.Errorf("%s: there is no %q in a list of %d", path, key, len(v))
			}
			value = v[i]
		default:
			return "", fmt.Errorf("%s: there is nothing below %v", path, value)
		}
	}
	if s, ok := value.(string); ok {
		return s, nil
	}
	out, err := json.Marshal(value)
	return string(out), err
}
