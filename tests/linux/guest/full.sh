# shellcheck shell=sh
# Runs in a guest whose /dev/pmem0 and share are on a full disk of the host: writes more than there is room for, and reads it back.
set -e
while :; do
    echo tick
    sleep 0.5
done &
ticks=$!

# text MIB: of it, the same each time.
text() { yes 'What is written to a full disk must not be lost.' | head -c $(($1 << 20)); }

# Directly: of the page cache's pages, dd and the kernel's flusher may write one each, and then both processors wait.
text 8 | dd of=/dev/pmem0 bs=64k iflag=fullblock oflag=direct conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
echo "disk sum: $(head -c $((8 << 20)) /dev/pmem0 | md5sum)"

mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
text 2 | dd of=/mnt/written bs=64k conv=notrunc,fsync 2>/dev/null
echo "written sum: $(md5sum </mnt/written)"
echo "right sums: $(text 8 | md5sum) $(text 2 | md5sum)"
kill $ticks
umount /mnt
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
