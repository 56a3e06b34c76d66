#!/bin/sh
# Installs what the tests need and is missing: packages of Debian. It wants root for that; without, or on
# another system, it says what is missing, and fails.
set -eu
missing=
for pair in make:make gcc:gcc git:git unshare:util-linux setpriv:util-linux mount:mount mkfs.ext4:e2fsprogs \
	mkfs.xfs:xfsprogs ip:iproute2 tc:iproute2 nft:nftables miniupnpd:miniupnpd-nftables skopeo:skopeo \
	containerd:containerd ctr:containerd openssl:openssl htpasswd:apache2-utils; do
	command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "the tests need what these packages of Debian have, and root on Debian to install them:$missing" >&2
	exit 1
fi
echo "installing what the tests need:$missing" >&2
apt-get update -q
# shellcheck disable=SC2086 # a list of packages
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
