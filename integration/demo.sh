#!/bin/sh
# The main job, on a real file, in a directory that is gone at the end.
set -eu
dir=$(mktemp -d)
daemon=
cleanup() {
	[ -z "$daemon" ] || kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT
say() { printf '\n$ %s\n' "$*"; "$@"; }

export DFCACHE_WORKHOME="$dir" DFCACHE_DAEMON_SOCK="$dir/run/dfdaemon.sock" DFCACHE_CONFIG=/dev/null
export DFDAEMON_WORKHOME="$dir" DFDAEMON_DAEMON_SOCK="$dir/run/dfdaemon.sock" DFDAEMON_CONFIG=/dev/null
dfdaemon 3>"$dir/ready" --ready-fd 3 2>/dev/null &
daemon=$!
while [ ! -s "$dir/ready" ]; do kill -0 "$daemon"; sleep 0.05; done

file=$(command -v go)
cd "$dir"
digest=sha256:$(sha256sum "$file" | cut -d' ' -f1)
say dfcache import -t demo -i "$digest" "$file"
say dfcache import -t demo -i v1 "$file"
say dfcache stat -t demo -i v1
say dfcache export -t demo -i v1 "$dir/copy"
say cmp "$file" "$dir/copy" && echo "the copy is the file"
say dfcache list -t demo
say dfcache delete -t demo -i v1
say dfcache delete -t demo -i "$digest"
printf '\n$ dfcache stat -t demo -i v1\n'
if dfcache stat -t demo -i v1; then exit 1; else echo "(exit code $?)"; fi
