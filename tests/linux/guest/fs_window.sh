# shellcheck shell=sh
# Runs in a guest with a share: reads a file that is larger than the window, then WRITES blocks of others, of SIZE.
set -e
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt

free_memory() { sed -n "s/^MemFree: *\([0-9]*\) kB/$1: \1/p" /proc/meminfo; }

# Programs that are used below are in memory then.
probe sum /mnt/fio/list map >/dev/null
sync
free_memory 'free before'
echo "cold: $(probe sum /mnt/big map)"
echo "again: $(probe sum /mnt/big map)"
echo "read: $(probe sum /mnt/big read)"
free_memory 'free after'

# It has sixty libraries, each in a piece of 2 MiB of the window of its own: more than there are.
cp -r /mnt/fio /tmp/fio
fio() { /tmp/fio/ld-linux-x86-64.so.2 --library-path /tmp/fio /tmp/fio/fio "$@"; }
for engine in mmap psync; do
    fio --name=random --filename=/mnt/random.$engine --size="$SIZE" --rw=randwrite --bs=4k --ioengine=$engine \
        --number_ios="$WRITES" --fallocate=none --randseed=1 --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/fio.out 2>&1 || {
        cat /tmp/fio.out
        exit 1
    }
    sed -n "s/^ *\(read\|write\): \(.*\)/fio $engine \1: \2/p" /tmp/fio.out
done
umount /mnt
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
