# shellcheck shell=sh
# Runs in a guest whose share loses its back-end while a file is mapped.
set -e
stty -echo
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
mkfifo /tmp/again
# It would never end: the file system waits for an answer that the file is closed, and its back-end is dead.
probe watch /mnt/kept </tmp/again &
exec 4>/tmp/again
read -r _
echo again >&4
read -r _
echo "alive: $(probe cpus)"
# Without a sync, which would wait for the dead back-end, too.
poweroff -nf
