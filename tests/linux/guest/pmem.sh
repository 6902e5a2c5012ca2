# shellcheck shell=sh
# Runs in a guest with three pmem devices: /dev/pmem0, /dev/pmem1 that can only be read, and /dev/pmem2, the large one. Stops at the first mistake.
set -e
stty -echo

# tell STATE: lets the host look at us.
tell() {
    echo "now $1"
    read -r _
}
interrupts() { awk '/virtio0/ { sum += $2 } END { print sum + 0 }' /proc/interrupts; }

echo "devices: $(find /sys/bus/acpi/devices/ -name 'LNRO0005:*' | wc -l)"
mkdir /rw /ro
mount -t ext4 -o dax /dev/pmem0 /rw
grep pmem0 /proc/mounts
probe pmem-write /rw/hello 'Written through a mapping.'
before=$(interrupts)
echo 'Written and flushed.' | dd of=/rw/flushed conv=fsync 2>/dev/null
after=$(interrupts)
echo "flushes: $((after - before))"

mount -t ext4 -o ro,dax /dev/pmem1 /ro
echo "given: $(cat /ro/given)"
if (echo changed >/ro/given) 2>/dev/null; then echo 'a read-only file system was written to'; fi
umount /ro
# Past the file system: what a read-only mapping does not take is lost, and the machine goes on.
dd if=/dev/zero of=/dev/pmem1 bs=4096 count=4 conv=fsync 2>/dev/null || true
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro,dax /dev/pmem1 /ro
echo "still given: $(cat /ro/given)"
umount /ro
# Without reading what is before it: 5000 bytes that no file is behind, and 15 that it ends with.
echo "sectors: $(cat /sys/block/pmem2/size)"
echo "end: $(dd if=/dev/pmem2 bs=1M skip=2053 2>/dev/null | tail -c 5015 | tr -d '\0')"
echo 'In the middle.' | dd of=/dev/pmem2 bs=1M seek=1900 conv=fsync,notrunc 2>/dev/null
tell mapped

umount /rw
driver=/sys/bus/virtio/drivers/virtio_pmem
echo virtio0 >$driver/unbind
tell unbound
echo virtio0 >$driver/bind
tell bound
again=$(find /dev -name 'pmem*' ! -name pmem1 ! -name pmem2)
mount -t ext4 -o dax "$again" /rw
echo "found again: $(tr -d '\0' </rw/hello)"
echo 'Written after the restart.' >/rw/restarted
umount /rw
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
