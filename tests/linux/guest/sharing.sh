# shellcheck shell=sh
# Runs in a guest with /dev/pmem0 and /dev/vda.
mkdir /rw
mount -t ext4 -o dax /dev/pmem0 /rw
probe fill /rw/first 1 >/dev/null
head -c 1048576 /dev/zero >/rw/second
# A request that the back-end never answers would keep us, too.
(probe direct /rw/first /dev/vda write && probe direct /rw/second /dev/vda read) >/tmp/said 2>&1 &
job=$!
tries=0
while kill -0 $job 2>/dev/null && [ $tries -lt 75 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
cat /tmp/said
kill -0 $job 2>/dev/null || umount /rw
echo 'machine: goes on'
