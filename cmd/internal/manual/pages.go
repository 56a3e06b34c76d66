//go:build !gendocs

package manual

import (
	"maps"

	"github.com/spf13/cobra"

	"github.com/dfcache/dfcache/docs"
)

// pages returns the documents of root's program, by file name. They were made
// beforehand: what makes them would cost every start of the program.
func pages(root *cobra.Command, man, markdown bool) (map[string][]byte, error) {
	pages := map[string][]byte{}
	if man {
		maps.Copy(pages, docs.Man(root.Name()))
	}
	if markdown {
		maps.Copy(pages, docs.Markdown(root.Name()))
	}
	return pages, nil
}
