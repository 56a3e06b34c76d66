package artifact

import "testing"

// SetMaxEntries changes how many entries an archive may have, and bytes of their names, for a test.
func SetMaxEntries(t *testing.T, entries, names int) {
	before, beforeNames := maxEntries, maxEntryNames
	t.Cleanup(func() { maxEntries, maxEntryNames = before, beforeNames })
	maxEntries, maxEntryNames = entries, names
}
