# shellcheck shell=sh disable=SC2034
# `hotslot-backend blk` with two queues: fio verifies what two jobs write at random; discarded blocks read as zeroes.
INTEROP=${INTEROP:-/interop}
# shellcheck source=scripts/interop/backends/disk.sh
. "$INTEROP/backends/disk.sh"
DEVICE=vhost-user-blk-pci,num-queues=2

back_end() { exec "$BACKEND" blk --socket "$SOCKET" --file "$DIR/$NAME.img" --queues 2; }
