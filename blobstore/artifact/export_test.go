package artifact

import "testing"

// SetLimits changes, for a test, how many entries an archive may have, bytes of their names, and bytes of files
// whatever its own size is.
func SetLimits(t testing.TB, entries, names int, unpacked int64) {
	before, beforeNames, beforeUnpacked := maxEntries, maxEntryNames, minUnpacked
	t.Cleanup(func() { maxEntries, maxEntryNames, minUnpacked = before, beforeNames, beforeUnpacked })
	maxEntries, maxEntryNames, minUnpacked = entries, names, unpacked
}
