# shellcheck shell=sh
# Runs in a guest with two pmem devices: /dev/pmem0, and /dev/pmem1 that can only be read. Stops at the first mistake.
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
tell mapped

umount /rw
driver=/sys/bus/virtio/drivers/virtio_pmem
echo virtio0 >$driver/unbind
tell unbound
echo virtio0 >$driver/bind
tell bound
again=$(find /dev -name 'pmem*' ! -name pmem1)
mount -t ext4 -o dax "$again" /rw
echo "found again: $(tr -d '\0' </rw/hello)"
echo 'Written after the restart.' >/rw/restarted
umount /rw
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
