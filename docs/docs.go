// Package docs holds the documents of the programs' commands: man pages in man,
// markdown in cli. "make generate" makes both of the commands' help. The other
// files of this directory are written by hand, and are not in the package.
package docs

import (
	"embed"
	"path"
	"strings"
)

//go:embed man/*.1 cli/*.md
var files embed.FS

// Man returns the man pages of program, dfcache or dfdaemon, by file name: one
// for the program (dfcache.1), and one for each of its commands
// (dfcache-import.1). It returns none for any other program. The caller owns
// the result. Man is safe for concurrent use.
func Man(program string) map[string][]byte {
	return pages("man", program+".1", program+"-")
}

// Markdown is Man for markdown: dfcache.md, dfcache_import.md.
func Markdown(program string) map[string][]byte {
	return pages("cli", program+".md", program+"_")
}

// pages returns the file called name in dir, and those that begin with prefix.
func pages(dir, name, prefix string) map[string][]byte {
	pages := map[string][]byte{}
	entries, _ := files.ReadDir(dir) // what is embedded can be read
	for _, entry := range entries {
		if entry.Name() == name || strings.HasPrefix(entry.Name(), prefix) {
			pages[entry.Name()], _ = files.ReadFile(path.Join(dir, entry.Name()))
		}
	}
	return pages
}
