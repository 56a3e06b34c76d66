// Command api prints the exported API of the packages that promise
// compatibility. make generate puts it into docs/api.txt, so that a change of
// what they promise is seen in its diff.
package main

import (
	"bytes"
	"cmp"
	"fmt"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const module = "github.com/dfcache/dfcache/"

// packages promise that what compiles with one release does so with the next.
var packages = []string{"blobstore", "blobstore/client", "blobstore/registry", "blobstore/storagetest", "digest", "p2p",
	"p2p/enginetest"}

func main() {
	text, err := describe()
	if err != nil {
		fmt.Fprintln(os.Stderr, "api:", err)
		os.Exit(1)
	}
	os.Stdout.Write(text)
}

// describe returns the API of all packages. The current directory is in the module.
func describe() ([]byte, error) {
	exports, err := exportFiles()
	if err != nil {
		return nil, err
	}
	gc := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(exports[path])
	})
	var b bytes.Buffer
	for _, name := range packages {
		pkg, err := gc.Import(module + name)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "package %s\n", name)
		for _, name := range pkg.Scope().Names() {
			if o := pkg.Scope().Lookup(name); o.Exported() {
				object(&b, o)
			}
		}
		b.WriteByte('\n')
	}
	return b.Bytes(), nil
}

// exportFiles has go build the packages, and returns where what they export is.
func exportFiles() (map[string]string, error) {
	args := []string{"list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}"}
	for _, name := range packages {
		args = append(args, module+name)
	}
	list := exec.Command("go", args...)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	files := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		files[path] = file
	}
	return files, nil
}

// object prints what one name stands for: a type with its exported fields and
// methods, and the value of a constant.
func object(b *bytes.Buffer, o types.Object) {
	qualify := func(p *types.Package) string {
		if p == o.Pkg() {
			return ""
		}
		return p.Name()
	}
	name, ok := o.(*types.TypeName)
	if c, isConst := o.(*types.Const); isConst {
		fmt.Fprintf(b, "%s = %s\n", types.ObjectString(o, qualify), c.Val())
		return
	}
	if !ok || name.IsAlias() {
		fmt.Fprintln(b, types.ObjectString(o, qualify))
		return
	}
	fields, isStruct := o.Type().Underlying().(*types.Struct)
	if !isStruct {
		fmt.Fprintln(b, types.ObjectString(o, qualify))
	} else {
		fmt.Fprintf(b, "type %s struct\n", o.Name())
		for field := range fields.Fields() {
			if field.Exported() {
				fmt.Fprintf(b, "\t%s\n", strings.TrimPrefix(types.ObjectString(field, qualify), "field "))
			}
		}
	}
	if types.IsInterface(o.Type()) {
		return
	}
	methods := slices.SortedFunc(types.NewMethodSet(types.NewPointer(o.Type())).Methods(),
		func(x, y *types.Selection) int {
			return cmp.Compare(x.Obj().Name(), y.Obj().Name())
		})
	for _, m := range methods {
		if m.Obj().Exported() {
			fmt.Fprintf(b, "\t%s\n", types.SelectionString(m, qualify))
		}
	}
}
