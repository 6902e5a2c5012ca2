# shellcheck shell=sh
# Runs in a guest whose share loses its back-end while a file is mapped.
set -e
stty -echo
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
mkfifo /tmp/again
# Its end would be one for ever: nobody answers the file system that it is done with the file.
probe watch /mnt/kept </tmp/again &
exec 4>/tmp/again
read -r _
echo again >&4
read -r _
echo "alive: $(probe cpus)"
# Nor does anybody answer that it is synchronised.
poweroff -nf
