# shellcheck shell=sh
# Runs in a guest with /dev/pmem0 and /dev/vda.
mkdir /rw
mount -t ext4 -o dax /dev/pmem0 /rw
# A request that the back-end never answers would keep us, too.
probe direct-io /rw/direct /dev/vda >/tmp/said 2>&1 &
tries=0
while [ ! -s /tmp/said ] && [ $tries -lt 50 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
cat /tmp/said
[ ! -s /tmp/said ] || umount /rw
echo 'machine: goes on'
