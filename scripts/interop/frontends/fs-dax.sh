# shellcheck shell=sh disable=SC2034
# `hotslot-backend fs` with a window (SHMEM) and dax=always: a file through mappings, mounted again, summed by the host.
INTEROP=${INTEROP:-/interop}
# shellcheck source=scripts/interop/backends/virtiofsd.sh
. "$INTEROP/backends/virtiofsd.sh"
# struct virtio_fs_config has 44 bytes; a queue of high priority and one for requests.
DEVICE=vhost-user-test-device-pci,virtio-id=26,num_vqs=2,vq_size=128,config_size=44
# Only from 11.1 on QEMU has SHMEM.
SUITES=sid
MOUNT='mount -t virtiofs -o dax=always'

back_end() { exec "$BACKEND" fs --socket "$SOCKET" --dir "$DIR/$NAME" --tag $TAG --window 256M; }
beside() {
    wait_for "^$NAME: " || return
    if grep -aq "^$NAME: $(sha256sum <"$DIR/$NAME/filled")" "$OUT/console"; then report fs-dax host ok; else report fs-dax host WRONG; fi
}
# QEMU refuses a mapping that reaches past the end of its file: files of whole 2 MiB.
work() {
    mkdir mnt
    $MOUNT $TAG mnt
    grep 'dax=always' /proc/mounts
    probe fill mnt/filled 8
    sum=$(probe sum mnt/filled map | cut -d ' ' -f 1)
    [ "$sum" = "$(probe sum mnt/filled read | cut -d ' ' -f 1)" ]
    head -c 4194304 /dev/urandom >data
    # Into the file's mappings.
    dd if=data of=mnt/filled bs=1M seek=2 conv=notrunc
    umount mnt
    $MOUNT $TAG mnt
    dd if=mnt/filled bs=1M skip=2 count=4 | cmp - data
    echo "$NAME: $(sha256sum <mnt/filled)" >/dev/console
}
