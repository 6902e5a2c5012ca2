# shellcheck shell=sh disable=SC2034
# The same disk by the storage daemon of QEMU 7.2.
INTEROP=${INTEROP:-/interop}
# shellcheck source=scripts/interop/backends/disk.sh
. "$INTEROP/backends/disk.sh"
FROM=bookworm:qemu-system-common
