# shellcheck shell=sh
# Runs in a guest with /dev/pmem0, /dev/vda and a share. Stops at the first mistake.
set -e
stty -echo
mkdir /rw /mnt
mount -t ext4 -o dax /dev/pmem0 /rw
mount -t virtiofs -o dax=always share /mnt
sectors() { cat /sys/block/vda/size; }
# The shell gives its own background jobs an empty standard input.
exec 3<&0
{
    read -r cache <&3
    echo "$cache" >/sys/block/vda/cache_type
    read -r _ <&3
    touch /tmp/stop
} &
# Prints the number of its last write after each sync; the session looks whether they are there.
probe keep fs /mnt/blocks &
keep=$!
echo 'now working'
round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1))
    dir=/mnt/$round
    dd if=/dev/urandom of=/tmp/block bs=64k count=1 2>/dev/null
    dd if=/tmp/block of=/rw/file bs=64k conv=fsync 2>/dev/null
    dd if=/tmp/block of=/dev/vda bs=64k seek=$((round % 16)) conv=fsync,notrunc 2>/dev/null
    mkdir $dir
    cp /tmp/block $dir/file
    mv $dir/file $dir/moved
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp/block /rw/file
    dd if=/dev/vda bs=64k skip=$((round % 16)) count=1 2>/dev/null | cmp - /tmp/block
    cmp /tmp/block $dir/moved
    rm -r $dir
    echo "done with round $round"
done
# It has ended by itself if it found a mistake.
kill $keep
echo "rounds: $round"
echo "cache: $(cat /sys/block/vda/cache_type)"
before=$(sectors)
echo "sectors: $before"
tries=0
while [ "$(sectors)" = "$before" ] && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
echo "sectors later: $(sectors)"
umount /rw /mnt
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
