# shellcheck shell=sh
# Runs in each guest of host.sh: OPTIONS are mount's. What was read is forgotten at each mount.
set -e
mkdir -p /mnt
again() {
    umount /mnt 2>/dev/null || true
    mount -t virtiofs -o "$OPTIONS" share /mnt
}
# What is used below is in memory then, and what the kernels put off at their start is done.
for _ in 1 2 3 4 5 6 7 8; do probe speed memory 64 >/dev/null; done
probe speed memory 64
again
# Files that are not cached are not mapped either.
probe speed mapped /mnt/data || true
again
probe speed read /mnt/data
again
probe speed pages /mnt/data
