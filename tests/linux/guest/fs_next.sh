# shellcheck shell=sh
# Runs in a guest with a share that another machine had before.
set -e
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
echo "given: $(cat /mnt/given)"
probe sum /mnt/kept map
