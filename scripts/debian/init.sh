#!/bin/sh
# PID 1 of debian.sh's guest (rdinit=) until Debian's own: mounts the root that CONFIGURATION names (a variable of the
# kernel's command line) and becomes its systemd. The shell is busybox.

mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec <>/dev/console >&0 2>&1
die() {
    echo "init.sh: $*"
    poweroff -f
}

# Of each module, its name and the files to load.
while read -r _ files; do
    for file in $files; do grep -q "^$(basename "$file" .ko | tr - _) " /proc/modules || insmod "$file"; done
done </etc/hotslot/modules

mkdir -p /new
case $CONFIGURATION in
fs-dax) mount -t virtiofs -o dax=always root /new ;;
fs) mount -t virtiofs root /new ;;
blk) mount -t ext4 /dev/vda /new ;;
pmem) mount -t ext4 -o dax=always /dev/pmem0 /new ;;
*) die "CONFIGURATION=$CONFIGURATION is unknown" ;;
esac || die "cannot mount the root"
# The programs of this run, whatever the image has.
cp /check/* /new/check/
# Under emulation, and on a busy machine, udev may take longer than its 90 seconds.
mkdir -p /new/etc/systemd/system.conf.d
printf '%s\n' '[Manager]' DefaultTimeoutStartSec=15min DefaultDeviceTimeoutSec=15min >/new/etc/systemd/system.conf.d/slow.conf
umount /proc
mount -o move /dev /new/dev
exec switch_root /new /sbin/init
