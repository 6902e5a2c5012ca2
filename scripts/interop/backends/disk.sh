# shellcheck shell=sh disable=SC2034
# A disk with two queues: fio verifies what two jobs write at random; discarded blocks read as zeroes.
FROM=sid:qemu-utils
PROGRAM=qemu-storage-daemon
DEVICE=type=blk
MODULES=virtio_blk
TOOLS='fio:fio blkdiscard:util-linux'

prepare() { [ -e "$DIR/$NAME.img" ] || truncate -s 64M "$DIR/$NAME.img"; }
back_end() {
    inside qemu-storage-daemon --blockdev driver=file,node-name=file,filename="$DIR/$NAME.img",discard=unmap \
        --blockdev driver=raw,node-name=disk,file=file,discard=unmap \
        --export type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path="$SOCKET"
}

work() {
    disk=/dev/$(basename /sys/bus/virtio/drivers/virtio_blk/virtio*/block/*)
    ls "/sys/block/${disk#/dev/}/mq"
    [ -e "/sys/block/${disk#/dev/}/mq/1" ] || [ "$(nproc)" = 1 ]
    fio --minimal --name=verify --filename="$disk" --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=4k-32k \
        --size=24M --offset_increment=24M --numjobs=2 --verify=crc32c --verify_fatal=1 --do_verify=1
    head -c 1048576 /dev/urandom >data
    dd if=data of="$disk" bs=1M count=1 oflag=direct
    blkdiscard -o 0 -l 1048576 "$disk"
    dd if="$disk" of=back bs=1M count=1 iflag=direct
    dd if=/dev/zero of=zeroes bs=1M count=1
    cmp back zeroes
}
touch_it() { dd if="/dev/$(basename /sys/bus/virtio/drivers/virtio_blk/virtio*/block/*)" of=/dev/null bs=4k count=1 iflag=direct; }
