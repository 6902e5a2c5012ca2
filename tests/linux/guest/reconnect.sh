# shellcheck shell=sh
# Runs in a guest with /dev/pmem0 and /dev/vda. Stops at the first mistake.
set -e
stty -echo
mkdir /rw
mount -t ext4 -o dax /dev/pmem0 /rw
sectors() { cat /sys/block/vda/size; }
# The shell gives its own background jobs an empty standard input.
exec 3<&0
{ read -r _ <&3 && touch /tmp/stop; } &
echo 'now working'
round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1))
    dd if=/dev/urandom of=/tmp/block bs=64k count=1 2>/dev/null
    dd if=/tmp/block of=/rw/file bs=64k conv=fsync 2>/dev/null
    dd if=/tmp/block of=/dev/vda bs=64k seek=$((round % 16)) conv=fsync,notrunc 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp/block /rw/file
    dd if=/dev/vda bs=64k skip=$((round % 16)) count=1 2>/dev/null | cmp - /tmp/block
done
echo "rounds: $round"
before=$(sectors)
echo "sectors: $before"
tries=0
while [ "$(sectors)" = "$before" ] && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
echo "sectors later: $(sectors)"
umount /rw
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
