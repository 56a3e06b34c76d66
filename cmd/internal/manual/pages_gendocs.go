//go:build gendocs

package manual

import (
	"bytes"
	"maps"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// pages makes the documents of cmd and of the commands below it, by file name.
func pages(cmd *cobra.Command, man, markdown bool) (map[string][]byte, error) {
	all := map[string][]byte{}
	for _, child := range cmd.Commands() {
		if child.Hidden || child.IsAdditionalHelpTopicCommand() {
			continue
		}
		below, err := pages(child, man, markdown)
		if err != nil {
			return nil, err
		}
		maps.Copy(all, below)
	}
	if man {
		const section = "1"
		// A date would differ from day to day; a fixed one would be wrong.
		noDate := time.Unix(0, 0).UTC()
		header := &doc.GenManHeader{Section: section, Date: &noDate, Source: cmd.Root().Name(),
			Manual: cmd.Root().Name()}
		var page bytes.Buffer
		if err := doc.GenMan(cmd, header, &page); err != nil {
			return nil, err
		}
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + "." + section
		all[name] = bytes.Replace(page.Bytes(), []byte(noDate.Format(`"Jan 2006"`)), []byte(`""`), 1)
	}
	if markdown {
		var page bytes.Buffer
		if err := doc.GenMarkdown(cmd, &page); err != nil {
			return nil, err
		}
		all[strings.ReplaceAll(cmd.CommandPath(), " ", "_")+".md"] = page.Bytes()
	}
	return all, nil
}
