# shellcheck shell=sh disable=SC2034
# `hotslot-backend pmem` (SHMEM): ext4 with DAX, a page written through a mapping, a tree of files summed twice.
DEVICE=vhost-user-test-device-pci,virtio-id=27,num_vqs=1,vq_size=128,config_size=16
SUITES=sid
MODULES='virtio_pmem nd_pmem'

prepare() {
    truncate -s 128M "$DIR/pmem.img"
    mkfs.ext4 -q -b 4096 -O '^has_journal' "$DIR/pmem.img"
}
back_end() { exec "$BACKEND" pmem --socket "$SOCKET" --file "$DIR/pmem.img"; }
beside() {
    text=$(debugfs -R 'cat /hello' "$DIR/pmem.img" 2>/dev/null | tr -d '\0')
    if [ "$text" = 'written through a mapping' ]; then report pmem host ok; else report pmem host WRONG "$text"; fi
}

work() {
    mkdir -p mnt
    mount -t ext4 -o dax=always /dev/pmem0 mnt
    probe pmem-write mnt/hello 'written through a mapping'
    tar -C / -cf - interop lib/modules | tar -C mnt -xf -
    before=$(cd mnt && find . -type f | sort | xargs sha256sum)
    umount mnt
    mount -t ext4 -o dax=always /dev/pmem0 mnt
    [ "$before" = "$(cd mnt && find . -type f | sort | xargs sha256sum)" ]
    umount mnt
}
