# shellcheck shell=sh disable=SC2034
# `hotslot-backend fs` without a window: a tree is unpacked, summed, mounted again, summed again.
INTEROP=${INTEROP:-/interop}
# shellcheck source=scripts/interop/backends/virtiofsd.sh
. "$INTEROP/backends/virtiofsd.sh"
DEVICE=vhost-user-fs-pci,tag=$TAG

back_end() { exec "$BACKEND" fs --socket "$SOCKET" --dir "$DIR/$NAME" --tag $TAG --window 0; }
