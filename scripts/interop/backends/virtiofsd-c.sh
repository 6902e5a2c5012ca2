# shellcheck shell=sh disable=SC2034
# The virtiofsd in C that QEMU had until 8.0, which leaves the tag to the front-end.
INTEROP=${INTEROP:-/interop}
# shellcheck source=scripts/interop/backends/virtiofsd.sh
. "$INTEROP/backends/virtiofsd.sh"
FROM=bookworm:qemu-system-common
PROGRAM=/usr/lib/qemu/virtiofsd
DEVICE=type=fs,tag=virtiofsd-c
TAG=virtiofsd-c

back_end() { inside /usr/lib/qemu/virtiofsd --socket-path="$SOCKET" -f -o source="$DIR/$NAME" -o sandbox=chroot; }
