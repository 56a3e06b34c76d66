// Package integration holds the tests that see the programs as their users
// do: real processes, killed, starved of space, and asked for what they promise,
// by dfcache and by the registry clients that people use.
package integration
