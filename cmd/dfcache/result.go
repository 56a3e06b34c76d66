package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"
	"time"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/blobstore"
	"github.com/dfcache/dfcache/cmd/internal/exit"
)

// The values of --format.
const (
	textFormat     = "text"
	jsonFormat     = "json"
	templateFormat = "go-template"
)

// resultFormat is how a result is printed: --format and --template.
type resultFormat struct {
	name, template string
	parsed         *template.Template
}

// flags adds the flags to a command that has a result.
func (r *resultFormat) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.name, "format", textFormat, "`format` of the result: text, json or go-template")
	cmd.Flags().StringVar(&r.template, "template", "",
		"Go `template` for the result, executed on its JSON form: '{{.digest}}'; implies --format go-template")
	complete(cmd, "format", textFormat, jsonFormat, templateFormat)
}

// complete makes shells complete the values of a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	// The error is for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// check validates the flags, before there is a result. r is as it was for a
// command without these flags.
func (r *resultFormat) check(cmd *cobra.Command) error {
	format := cmd.Flags().Lookup("format")
	if format == nil {
		return nil
	}
	if r.template != "" {
		if !format.Changed {
			r.name = templateFormat
		}
		if r.name != templateFormat {
			return exit.FlagError(cmd, fmt.Errorf("--template is for --format %s, not for %q", templateFormat, r.name))
		}
	}
	switch r.name {
	case textFormat, jsonFormat:
	case templateFormat:
		if r.template == "" {
			return exit.FlagError(cmd, fmt.Errorf(
				"--format %s has no template: pass one with --template", templateFormat))
		}
		var err error
		if r.parsed, err = template.New("--template").Option("missingkey=error").Parse(r.template); err != nil {
			return exit.FlagError(cmd, err)
		}
	default:
		return exit.FlagError(cmd, fmt.Errorf(
			"unknown --format %q: use %s, %s or %s", r.name, textFormat, jsonFormat, templateFormat))
	}
	return nil
}

// consoleFile returns where log records go, so that stdout has a result that a
// program reads to itself. content says that stdout has the file's content.
func (a *app) consoleFile(content bool) io.Writer {
	if content || a.result.name != textFormat {
		return a.stderr
	}
	return a.stdout
}

// print writes a result to w: v as JSON or to the template, or as text has it.
func (r *resultFormat) print(w io.Writer, v any, text string) error {
	var out bytes.Buffer
	switch r.name {
	case jsonFormat:
		encoder := json.NewEncoder(&out)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(v); err != nil {
			return fmt.Errorf("print result: %w", err)
		}
	case templateFormat:
		if err := r.execute(&out, v); err != nil {
			return err
		}
	default:
		out.WriteString(text)
	}
	if _, err := w.Write(out.Bytes()); err != nil {
		return fmt.Errorf("print result: %w", exit.Printing(err))
	}
	return nil
}

// report prints the result of a command that changes something, and says where that fails that the
// change is made.
func (s *session) report(w io.Writer, v any, text string) error {
	if err := s.result.print(w, v, text); err != nil {
		return fmt.Errorf("the %s is done, but: %w", s.command, err)
	}
	return nil
}

// execute executes the template on what v is as JSON.
func (r *resultFormat) execute(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	// Numbers stay what they are: a float64 would print a size as 1e+09.
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var form any
	if err := decoder.Decode(&form); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	if err := r.parsed.Execute(w, form); err != nil {
		if _, ok := errors.AsType[template.ExecError](err); ok {
			return exit.Usage(err)
		}
		return fmt.Errorf("print result: %w", err)
	}
	return nil
}

// facts is text of one fact on each line.
type facts struct{ strings.Builder }

func (f *facts) add(name, format string, args ...any) {
	fmt.Fprintf(f, "%-10s %s\n", name+":", fmt.Sprintf(format, args...))
}

// describe adds what a file is.
func (f *facts) describe(file blobstore.File) {
	f.add("cid", "%s", file.CID)
	if file.Tag != "" {
		f.add("tag", "%s", file.Tag)
	}
	if file.Title != "" {
		f.add("title", "%s", printable(file.Title))
	}
	if len(file.Files) == 0 {
		f.add("digest", "%s", file.Digest)
	}
	if file.Manifest != "" {
		f.add("manifest", "%s", file.Manifest)
	}
	f.add("size", "%s", bytesAndHuman(file.Size))
}

// files adds the files of an artifact that has several.
func (f *facts) files(artifact blobstore.File) {
	for _, file := range artifact.Files {
		f.add("file", "%s %s %s", file.Digest, human(file.Size), printable(file.Title))
	}
}

// printable returns text from elsewhere as one line that a terminal can show.
func printable(s string) string {
	quoted := fmt.Sprintf("%q", s)
	if quoted[1:len(quoted)-1] == s {
		return s
	}
	return quoted
}

// count prints how many there are of something.
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// bytesAndHuman prints a size exactly, and as people read it.
func bytesAndHuman(n int64) string {
	if n < 1024 {
		return human(n)
	}
	return fmt.Sprintf("%d B (%s)", n, human(n))
}

// human prints a size in bytes in IEC units.
func human(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), 0
	for value >= 1023.95 { // would be printed as 1024.0
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, " KMGTPE"[unit])
}

// moment prints a time.
func moment(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.Local().Format(time.RFC3339)
}
