# shellcheck shell=sh disable=SC2034
# A disk by libvhost-user's example, which keeps a record of requests in flight: fio verifies what it wrote at random.
FROM=qemu-source:vhost-user-blk
DEVICE=type=blk
MODULES=virtio_blk
TOOLS=fio:fio

prepare() { truncate -s 64M "$DIR/$NAME.img"; }
back_end() { inside vhost-user-blk --socket-path="$SOCKET" --blk-file="$DIR/$NAME.img"; }

# No discard: it asks the host for that with an ioctl of block devices.
work() {
    disk=/dev/$(basename /sys/bus/virtio/drivers/virtio_blk/virtio*/block/*)
    fio --minimal --name=verify --filename="$disk" --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=4k-32k \
        --size=24M --offset_increment=24M --numjobs=2 --verify=crc32c --verify_fatal=1 --do_verify=1
}
touch_it() { dd if="/dev/$(basename /sys/bus/virtio/drivers/virtio_blk/virtio*/block/*)" of=/dev/null bs=4k count=1 iflag=direct; }
