# shellcheck shell=sh
# Runs in a guest with a share and a disk, and maybe a second disk, with ext4: a file goes to the disk and comes back into another, both by O_DIRECT from and to where the
# files are mapped.
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt || exit 1
echo "size: $(cat /sys/block/vda/size)"
echo "serial: $(cat /sys/block/vda/serial)"
probe direct /mnt/file /dev/vda write 2>&1
probe direct /mnt/back /dev/vda read 2>&1
# The same with another share in place of the disk, which has no mapping of its own.
mkdir -p /other
mount -t virtiofs other /other || exit 1
probe direct /mnt/file /other/to write 2>&1 | sed 's/direct/other/'
probe direct /mnt/again /other/to read 2>&1 | sed 's/direct/other/'
umount /other
# Both devices go on.
echo "share: $(probe sum /mnt/file map | cut -d ' ' -f 3-6)"
dd if=/dev/zero of=/dev/vda bs=64k seek=128 count=1 oflag=direct 2>/dev/null && echo 'disk: written'
dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null && echo 'disk: read'
umount /mnt

# On the second disk both queues are busy at a time.
vdb=/sys/block/vdb
if [ -e $vdb ]; then
    echo "blocks: $(cat $vdb/queue/logical_block_size $vdb/queue/physical_block_size $vdb/queue/minimum_io_size | xargs)"
    echo "queues: $(find $vdb/mq -mindepth 1 -maxdepth 1 | wc -l)"
    echo "cache: $(cat $vdb/cache_type)"
    echo 'write through' >$vdb/cache_type
    echo "then: $(cat $vdb/cache_type)"
    mkdir /rw
    mount -t ext4 /dev/vdb /rw
    for cpu in 0 1; do
        (taskset -c $cpu probe fill /rw/$cpu 4 >/dev/null && sync /rw/$cpu) &
    done
    wait
    umount /rw
    mount -t ext4 /dev/vdb /rw
    for cpu in 0 1; do
        echo "on disk: $(taskset -c $cpu probe sum /rw/$cpu read | cut -d ' ' -f 3-6)"
    done
    umount /rw
fi
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
exit 0
