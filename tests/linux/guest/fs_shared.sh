# shellcheck shell=sh
# Runs in a guest with a share that another guest has, too: maps a file, and waits.
set -e
stty -echo
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
probe sum /mnt/common map
echo 'now read'
read -r _
umount /mnt
