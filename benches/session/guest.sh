# shellcheck shell=sh
# Runs in each guest of host.sh: a session in a share by DAX, with a window that is smaller than the data. The tree comes
# from the guest's own memory, the data is the host's.
set -e
export GIT_AUTHOR_NAME=bench GIT_AUTHOR_EMAIL=bench GIT_COMMITTER_NAME=bench GIT_COMMITTER_EMAIL=bench
again() {
    umount /mnt 2>/dev/null || true
    mount -t virtiofs -o dax=always share /mnt
}
mkdir -p /mnt
# What is used below is in memory then, and what the kernels put off at their start is done.
probe speed memory 64 >/dev/null
again
mkdir /mnt/tree
probe speed program untar tar -xf /bench/tree.tar -C /mnt/tree
cd /mnt/tree
git init -q --template=
git config maintenance.auto false
git add .
git commit -q -m tree
for _ in 1 2 3; do
    cd /
    again
    probe speed program 'git status' git -C /mnt/tree status
    probe speed pages /mnt/data
done
