package integration

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestSkips: a test is skipped with -short only, and then says so. Without it, what a test
// needs and does not find fails it: nothing is left out in silence.
func TestSkips(t *testing.T) {
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		// there a skip says what a store is not
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == ".cache" || entry.Name() == "storagetest"):
			return fs.SkipDir
		case strings.HasSuffix(path, ".go"):
			return skipsOfGo(t, path)
		case strings.HasSuffix(path, ".txtar"):
			return skipsOfScript(t, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// skipsOfGo finds calls of Skip, Skipf and SkipNow of a test that are not in a statement
// "if testing.Short()", or don't begin with "-short: ".
func skipsOfGo(t *testing.T, path string) error {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	var look func(node ast.Node, short bool)
	look = func(node ast.Node, short bool) {
		ast.Inspect(node, func(n ast.Node) bool {
			if branch, ok := n.(*ast.IfStmt); ok && isShort(branch.Cond) && !short {
				look(branch.Body, true)
				if branch.Else != nil {
					look(branch.Else, false)
				}
				return false
			}
			call, _ := n.(*ast.CallExpr)
			if call == nil {
				return true
			}
			method, _ := call.Fun.(*ast.SelectorExpr)
			if method == nil || !isTest(method.X) || !strings.HasPrefix(method.Sel.Name, "Skip") ||
				method.Sel.Name == "Skipped" {
				return true
			}
			if at := files.Position(call.Pos()); !short {
				t.Errorf("%s: want it in an if testing.Short()", at)
			} else if len(call.Args) == 0 || !saysShort(call.Args[0]) {
				t.Errorf("%s: want that it begins with %q", at, "-short: ")
			}
			return true
		})
	}
	look(file, false)
	return nil
}

// isTest reports whether an expression is what tests are named: t, or something's t.
func isTest(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name == "t" || e.Name == "tb" || e.Name == "b" || e.Name == "f"
	case *ast.SelectorExpr:
		return e.Sel.Name == "t"
	}
	return false
}

// isShort reports whether a condition holds with -short only: it is testing.Short(), or that and more.
func isShort(cond ast.Expr) bool {
	switch e := cond.(type) {
	case *ast.BinaryExpr:
		return e.Op == token.LAND && (isShort(e.X) || isShort(e.Y))
	case *ast.CallExpr:
		f, ok := e.Fun.(*ast.SelectorExpr)
		return ok && f.Sel.Name == "Short"
	}
	return false
}

func saysShort(e ast.Expr) bool {
	if sum, ok := e.(*ast.BinaryExpr); ok {
		e = sum.X
	}
	text, ok := e.(*ast.BasicLit)
	if !ok {
		return false
	}
	value, _ := strconv.Unquote(text.Value)
	return strings.HasPrefix(value, "-short: ")
}

// In a script, [root] is no way out: without -short it fails where there is no root.
var (
	skip      = regexp.MustCompile(`^(\[.*\]\s*)?skip\b|^\[!?exec:`)
	shortSkip = regexp.MustCompile(`^\[(short|!root)\] skip '-short: `)
)

// skipsOfScript finds lines of a script that skip it, or a command, where the machine lacks something.
func skipsOfScript(t *testing.T, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	script, _, _ := strings.Cut(string(text), "\n-- ")
	for line := range strings.Lines(script) {
		if skip.MatchString(line) && !shortSkip.MatchString(line) {
			t.Errorf("%s: %s: want [short] skip '-short: WHY'", path, strings.TrimSpace(line))
		}
	}
	return nil
}
