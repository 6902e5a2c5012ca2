# shellcheck shell=sh
# Runs in a guest with a directory of the host, tagged `share`: runs every check there. Stops at the first mistake.
set -e
stty -echo

# tell STATE: the host now looks at the share.
tell() {
    echo "now $1"
    read -r _
}

mount_share() { mount -t virtiofs -o dax=always share /mnt; }

mkdir -p /mnt
mount_share
grep ' /mnt ' /proc/mounts
echo "given: $(cat /mnt/given)"
probe files /mnt/files
echo 'From the guest.' >/mnt/told
/mnt/busybox echo "run: out of the share"
# The same file through a mapping that stays.
exec 4</mnt/given
tell looked
echo "changed: $(cat /mnt/given)"
# The guest may cache for a moment that a name does not exist.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ ! -e /mnt/made ] || break
    sleep 1
done
echo "made: $(cat /mnt/made)"
exec 4<&-
tell turns
probe turns /mnt/turns first
probe watch /mnt/cut

umount /mnt
mount_share
echo "again: $(cat /mnt/given)"
umount /mnt
driver=/sys/bus/virtio/drivers/virtiofs
echo virtio0 >$driver/unbind
if mount_share 2>/dev/null; then echo 'mounted without a driver'; fi
echo virtio0 >$driver/bind
mount_share
echo "rebound: $(cat /mnt/given)"
probe sum /mnt/kept map
umount /mnt
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
